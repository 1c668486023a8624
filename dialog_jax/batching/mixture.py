"""Several sets of trees as one, and from which of them each row comes.

A row holds trees of one set. How many rows a set gives is a share of all; they are drawn as evenly as can be, by a rule
that tells the n-th row without those before it.
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
    """Sets of trees, numbered through: those of the first set, then those of the second, and so on.

    It has of `Trees` what rows and batches are made from.
    """

    sets: Mapping[str, Trees]
    mix: Mapping[str, Mapping[str, Any]]
    """How much of each, by the same names: what `check` lets through."""
    teacher: None = None

    @functools.cached_property
    def starts(self) -> list[int]:
        """The number of the first tree of each set."""
        return [0, *itertools.accumulate(len(trees) for trees in self.sets.values())][:-1]

    @property
    def branching(self) -> bool:
        """Whether some tree of some set is no path."""
        return any(trees.branching for trees in self.sets.values())

    def tree(self, number: int) -> Tree:
        """Tree `number`, as views."""
        _, trees, own = self._at(number)
        return trees.tree(own)

    def size(self, number: int) -> int:
        """Tokens of tree `number`."""
        _, trees, own = self._at(number)
        return trees.size(own)

    def shared_prefix(self, number: int) -> tuple[int, int]:
        """(id, length) of the shared prefix of tree `number`; ids are unique within a set."""
        _, trees, own = self._at(number)
        return trees.shared_prefix(own)

    def dialogue(self, number: int) -> str:
        """The set and the dialogue of tree `number`."""
        name, trees, own = self._at(number)
        return f"{name}: {trees.dialogue(own)}"

    def _at(self, number: int) -> tuple[str, Trees, int]:
        place = bisect.bisect_right(self.starts, number) - 1
        name = list(self.sets)[place]
        return name, self.sets[name], number - self.starts[place]


def check_mix(mix: Mapping[str, Mapping[str, Any]]) -> None:
    """Raises UserError unless `mix` says of each set where it is (`train`), and how much of it is taken.

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
                f"{', '.join(kinds)}, as the others have."
            )
        (kind,) = kinds
        amount = entry[kind]
        if isinstance(amount, bool) or not isinstance(amount, int | float) or not 0 < amount < math.inf:
            raise UserError(f"data.mix.{name}.{kind} is {amount!r}; it must be a number above 0.")


def compute_quotas(mix: Mapping[str, Mapping[str, Any]], rows: Mapping[str, int]) -> dict[str, Fraction]:
    """Returns how many rows of each set an epoch of the mixture has, which need not be whole numbers.

    With `epochs`, so many times all rows of the set. With `weight`, rows in proportion to it, as many as give the set
    that runs out first one whole pass.

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

    Row j of a set with share s of all rows has its place at (j + 1/2) / s; the rows of a mixture are those of its sets
    in the order of their places. So of any m rows that follow each other, a set of k gives m * s to within 1 + k * s.

        parts 1/2, 1/4, 1/4   ->   sets 0 1 2 0  0 1 2 0  0 1 2 0 ...

    Args:
      parts: rows of each set, in any unit.
    """
    total = sum(parts)
    shares = [part / total for part in parts]
    # Up to place t, a set has given floor(s * t + 1/2) rows: all of them t and at most half a row a set more.
    place = max(Fraction(0), start - len(shares) * _HALF)
    given = [math.floor(share * place + _HALF) for share in shares]
    skipped = start - sum(given)
    assert 0 <= skipped <= len(shares), (start, given)
    waiting = [
        ((number + _HALF) / share, index) for index, (number, share) in enumerate(zip(given, shares, strict=True))
    ]
    heapq.heapify(waiting)
    drawn = []
    for _ in range(skipped + count):
        _, index = waiting[0]
        drawn.append((index, given[index]))
        given[index] += 1
        heapq.heapreplace(waiting, ((given[index] + _HALF) / shares[index], index))
    return drawn[skipped:]


def describe_mixture(
    mixture: Mixture, parts: Mapping[str, Fraction], rows: Mapping[str, int], tokens: Mapping[str, int]
) -> list[str]:
    """Returns a line a set: what an epoch of the mixture takes of it.

    Args:
      parts: rows of an epoch of the mixture, of each set.
      rows, tokens: of one pass over each set.
    """
    passes = {name: float(part / rows[name]) for name, part in parts.items()}
    total = sum(passes[name] * tokens[name] for name in parts)
    return [
        f"{name}: {float(part):,.0f} rows an epoch, {passes[name]:.2f} passes over {len(mixture.sets[name]):,} trees, "
        f"{passes[name] * tokens[name] / total:.1%} of the tokens"
        for name, part in parts.items()
    ]
