"""Several sets of trees as one mixture, and the set that each row comes from.

A row has trees of one set. Each set has a share of all rows, spread as evenly as possible, by a rule that gives the
n-th row without those before it.
"""

import bisect
import dataclasses
import functools
import heapq
import itertools
import math
from collections.abc import Mapping, Sequence
from fractions import Fraction
from typing import Any

from dialog_jax.errors import UserError
from dialog_jax.trees.dataset import Trees
from dialog_jax.trees.prefix_tree import Tree

_HALF = Fraction(1, 2)


@dataclasses.dataclass(frozen=True)
class Mixture:
    """Sets of trees, numbered consecutively: those of the first set, then those of the second, and so on.

    It has those methods of `Trees` that rows and batches need.
    """

    sets: Mapping[str, Trees]
    mix: Mapping[str, Mapping[str, Any]]
    """The share of each set, by the same names, checked by `check_mix`."""
    teacher: None = None

    @functools.cached_property
    def starts(self) -> list[int]:
        """The number of the first tree of each set: sets of 3, 5 and 2 trees -> [0, 3, 8]."""
        return [0, *itertools.accumulate(len(trees) for trees in self.sets.values())][:-1]

    @property
    def branching(self) -> bool:
        """Whether some tree of some set has branches."""
        return any(trees.branching for trees in self.sets.values())

    def tree(self, number: int) -> Tree:
        """Returns tree `number`, as views."""
        _, trees, index = self._find(number)
        return trees.tree(index)

    def size(self, number: int) -> int:
        """Returns the number of tokens of tree `number`."""
        _, trees, index = self._find(number)
        return trees.size(index)

    def shared_prefix(self, number: int) -> tuple[int, int]:
        """Returns (id, length) of the shared prefix of tree `number`; ids are unique within a set."""
        _, trees, index = self._find(number)
        return trees.shared_prefix(index)

    def without_shared_prefixes(self) -> "Mixture":
        """Returns the mixture of the same trees, none of which shares a prefix with another in a row."""
        return dataclasses.replace(self, sets={name: s.without_shared_prefixes() for name, s in self.sets.items()})

    def dialogue(self, number: int) -> str:
        """Returns the set and the dialogue of tree `number`."""
        name, trees, index = self._find(number)
        return f"{name}: {trees.dialogue(index)}"

    def _find(self, number: int) -> tuple[str, Trees, int]:
        """Returns (name of the set, the set, number in the set) of tree `number`."""
        place = bisect.bisect_right(self.starts, number) - 1
        name = list(self.sets)[place]
        return name, self.sets[name], number - self.starts[place]


def check_mix(mix: Mapping[str, Mapping[str, Any]]) -> None:
    """Raises UserError unless `mix` has for each set a source (`train`) and a share (`weight` or `epochs`), as in

    {"chat": {"train": "chat.jsonl", "weight": 3}, "code": {"train": "code.jsonl", "weight": 1}}
    {"chat": {"train": "chat.jsonl", "epochs": 1}, "code": {"train": "code.jsonl", "epochs": 2.5}}
    """
    kinds = {kind for entry in mix.values() for kind in ("weight", "epochs") if kind in entry}
    if mix and len(kinds) != 1:
        raise UserError(
            f"data.mix has {' and '.join(sorted(kinds)) or 'neither weight nor epochs'}; give every set a weight (its "
            "share of the rows) or every set epochs (passes over it)."
        )
    for name, entry in mix.items():
        if set(entry) != {"train", *kinds} or not isinstance(entry["train"], str) or not entry["train"]:
            raise UserError(
                f"data.mix.{name} has {', '.join(sorted(entry)) or 'nothing'}; needed train (a file or data set) and "
                f"{', '.join(kinds)}, as the other sets have."
            )
        (kind,) = kinds
        amount = entry[kind]
        if isinstance(amount, bool) or not isinstance(amount, int | float) or not 0 < amount < math.inf:
            raise UserError(f"data.mix.{name}.{kind} is {amount!r}; it must be a number above 0.")


def compute_quotas(mix: Mapping[str, Mapping[str, Any]], rows: Mapping[str, int]) -> dict[str, Fraction]:
    """Returns the number of rows of each set in an epoch of the mixture, which need not be an integer.

    With `epochs`, the set's rows times `epochs`. With `weight`, numbers of rows in proportion to the weights, such that
    the set that runs out first has exactly one pass.

        rows {"a": 10, "b": 30}, weights 1 and 1   ->   10 and 10
        rows {"a": 10, "b": 30}, epochs 1.5 and 2  ->   15 and 60
    """
    if any("epochs" in entry for entry in mix.values()):
        return {name: Fraction(str(entry["epochs"])) * rows[name] for name, entry in mix.items()}
    weights = {name: Fraction(str(entry["weight"])) for name, entry in mix.items()}
    factor = min(rows[name] / weight for name, weight in weights.items())
    return {name: weight * factor for name, weight in weights.items()}


def interleave(parts: Sequence[Fraction], start: int, count: int) -> list[tuple[int, int]]:
    """Returns (number of the set, number of the row in it) of rows `start` to `start + count` of a mixture.

    Row j of a set with share s of all rows is placed at (j + 1/2) / s; the mixture has the rows of all sets in the
    order of these places. So of any m consecutive rows, one of k sets gives m * s to within 1 + k * s. With shares 1/2,
    1/4 and 1/4, the sets of the rows are 0 1 2 0  0 1 2 0  0 1 2 0 ...

    Args:
      parts: rows of each set, in any unit.
    """
    total = sum(parts)
    shares = [part / total for part in parts]
    # Up to place t, a set has floor(s * t + 1/2) rows: all sets together t, and at most half a row per set more.
    place = max(Fraction(0), start - len(shares) * _HALF)
    taken = [math.floor(share * place + _HALF) for share in shares]  # rows of each set so far
    skipped = start - sum(taken)
    assert 0 <= skipped <= len(shares), (start, taken)
    next_places = [
        ((number + _HALF) / share, index) for index, (number, share) in enumerate(zip(taken, shares, strict=True))
    ]
    heapq.heapify(next_places)
    rows = []
    for _ in range(skipped + count):
        _, index = next_places[0]
        rows.append((index, taken[index]))
        taken[index] += 1
        heapq.heapreplace(next_places, ((taken[index] + _HALF) / shares[index], index))
    return rows[skipped:]


def describe_mixture(
    mixture: Mixture, parts: Mapping[str, Fraction], rows: Mapping[str, int], tokens: Mapping[str, int]
) -> list[str]:
    """Returns a line per set: its share of an epoch of the mixture.

    Args:
      parts: rows of each set in an epoch of the mixture.
      rows, tokens: numbers of one pass over each set.
    """
    passes = {name: float(part / rows[name]) for name, part in parts.items()}
    total = sum(passes[name] * tokens[name] for name in parts)
    return [
        f"{name}: {float(part):,.0f} rows per epoch, {passes[name]:.2f} passes over {len(mixture.sets[name]):,} trees, "
        f"{passes[name] * tokens[name] / total:.1%} of the tokens"
        for name, part in parts.items()
    ]
