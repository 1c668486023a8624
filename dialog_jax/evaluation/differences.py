"""What one pass and K passes give for the same responses in; how far they are apart, and where, out.

What is compared is NumPy and works on what has been computed. Knows tokens, masks and gradients as arrays; knows no
template, trie or model.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
import transformers
from jaxtyping import Float, Int

from dialog_jax.batching.batches import Batch
from dialog_jax.evaluation.k_passes import Pass

# What is compared, and how far the two may be apart; 0 where they must be equal.
TOLERANCES = {
    "refusals": 0.0,
    "token ids": 0.0,
    "positions": 0.0,
    "weights": 1e-6,
    "loss of a response": 1e-5,
    "loss of a row": 1e-5,
    "gradient norm": 1e-4,
    "gradient direction": 1e-4,
    "gradient by parameter": 1e-4,
}


class Difference(NamedTuple):
    """What the two ways give in one place. `size` is relative; infinite where what must be equal is not."""

    size: float
    where: str
    one_pass: str
    k_passes: str


class Finding:
    """All comparisons of one kind: how many there were, how many went too far, and the one that went farthest."""

    def __init__(self, tolerance: float):
        self.tolerance = tolerance
        self.compared = self.beyond = 0
        self.largest: Difference | None = None

    def add(self, size: float, where: str, one_pass: Any, k_passes: Any) -> None:
        """Counts one comparison; a size that is no number is infinite. Of equal sizes, the first stays the largest."""
        size = math.inf if math.isnan(size) else float(size)
        self.compared += 1
        self.beyond += size > self.tolerance
        if self.largest is None or size > self.largest.size:
            self.largest = Difference(size, where, str(one_pass), str(k_passes))


@dataclasses.dataclass(kw_only=True)
class Agreement:
    """The outcome: what was compared, what was left out and why, and a finding of each kind."""

    dialogues: int = 0
    branching: int = 0
    """Dialogues whose tree is no single path."""
    responses: int = 0
    response_tokens: int = 0
    rows: list[list[str]] = dataclasses.field(default_factory=list)
    """The dialogues of each row."""
    row_length: int = 0
    one_pass_tokens: int = 0
    k_pass_tokens: int = 0
    left_out: list[str] = dataclasses.field(default_factory=list)
    findings: dict[str, Finding] = dataclasses.field(
        default_factory=lambda: {what: Finding(tolerance) for what, tolerance in TOLERANCES.items()}
    )

    @property
    def passed(self) -> bool:
        """Whether something was compared and nothing was too far apart."""
        return self.responses > 0 and not any(finding.beyond for finding in self.findings.values())


class Target(NamedTuple):
    """A target of a row and what predicts it, as the mask has it."""

    context: Int[np.ndarray, " n"]
    """The tokens that the source sees, itself the last."""
    position: Int[np.ndarray, " n"]
    token: int
    weight: float
    nll: float


def read_targets(batch: Batch, nll: Float[np.ndarray, " S"], segment: int) -> list[Target]:
    """Returns the targets of one segment of a batch of one row, each with the tokens that its source sees."""
    tokens, position, subtree_end = (array[0] for array in (batch.tokens, batch.position, batch.subtree_end))
    found = []
    for target in np.flatnonzero((batch.weight[0] > 0) & (batch.segment[0][batch.source[0]] == segment)):
        source = int(batch.source[0, target])
        seen = np.flatnonzero(subtree_end[: source + 1] > source)
        token, weight = int(batch.target[0, target]), float(batch.weight[0, target])
        found.append(Target(tokens[seen], position[seen], token, weight, float(nll[target])))
    return found


def compare_responses(
    name: str,
    passes: Sequence[Pass],
    nll: Sequence[Float[np.ndarray, " _"]],
    targets: Sequence[Target],
    tokenizer: transformers.PreTrainedTokenizerFast,
    findings: dict[str, Finding],
) -> None:
    """Finds for every token of weight above 0 in a dialogue's passes the target that sees the same; compares the two.

    A response's loss is relative to itself, or to 1 nat a token where it is smaller.

    Args:
      name: of the dialogue.
      nll: of each token of each pass's response.
    """
    by_string = {(target.context.tobytes(), target.token): target for target in targets}
    weights = dict.fromkeys(by_string, 0.0)
    places: dict[tuple[bytes, int], str] = {}
    for one, own in zip(passes, nll, strict=True):
        response = f"{name}, message {one.message} (turn {one.turn})"
        trained = np.flatnonzero(one.weight)
        found = []
        for index in (trained + one.start).tolist():
            key = one.tokens[:index].tobytes(), int(one.tokens[index])
            where = f"{response}, token {index - one.start} {_shown(tokenizer, key[1])}"
            target = by_string.get(key)
            if target is None:
                first = not findings["token ids"].beyond
                parting = _parting(one.tokens[: index + 1], targets, tokenizer) if first else ("", "", "")
                findings["token ids"].add(math.inf, where + parting[0], *parting[1:])
                continue
            findings["token ids"].add(0.0, where, "same", "same")
            found.append(target.nll)
            wrong = np.flatnonzero(target.position != np.arange(index))
            at = int(wrong[0]) if len(wrong) else index - 1
            place = f"{where}: token {at:,} of what predicts it" if len(wrong) else where
            findings["positions"].add(math.inf if len(wrong) else 0.0, place, target.position[at], at)
            weights[key] += float(one.weight[index - one.start])
            places.setdefault(key, where)
        if len(found) == len(trained):
            value, expected = math.fsum(found), math.fsum(own[trained])
            size = abs(value - expected) / max(abs(expected), len(trained))
            findings["loss of a response"].add(size, response, f"{value:.6f}", f"{expected:.6f}")
    for key, weight in weights.items():
        target = by_string[key]
        where = places.get(key, f"{name}: {_shown(tokenizer, target.token)} behind {len(target.context):,} tokens")
        size = abs(target.weight - weight) / max(weight, 1.0)
        findings["weights"].add(size, where, f"{target.weight:.6g}", f"{weight:.6g}" if weight else "no target")


def compare_gradients(one_pass: dict, k_passes: dict, where: str, findings: dict[str, Finding]) -> None:
    """Compares two gradients: as one vector, and parameter by parameter, those of each layer apart."""
    squares = np.zeros(3)
    for (path, leaf), other in zip(
        jax.tree_util.tree_leaves_with_path(one_pass), jax.tree.leaves(k_passes), strict=True
    ):
        name = "/".join(key.key for key in path)
        first, second = np.asarray(leaf), np.asarray(other)
        for layer in range(len(first)) if path[0].key == "layers" else [...]:
            a, b = first[layer].astype(np.float64), second[layer].astype(np.float64)
            sums = np.array([np.vdot(a, a), np.vdot(b, b), np.vdot(a - b, a - b)])
            squares += sums
            norms = np.sqrt(sums)
            size = norms[2] / norms[1] if norms[1] or norms[2] else 0.0
            at = f"{name}{'' if layer is ... else f'[{layer}]'}, {where}"
            findings["gradient by parameter"].add(size, at, f"norm {norms[0]:.6g}", f"norm {norms[1]:.6g}")
    a, b, apart = np.sqrt(squares)
    findings["gradient norm"].add(abs(a - b) / b if b else math.inf, where, f"{a:.8g}", f"{b:.8g}")
    # |a - b|^2 = (|a| - |b|)^2 + 2 |a| |b| (1 - cosine), which loses nothing where the cosine is nearly 1.
    beside_cosine = max(0.0, apart**2 - (a - b) ** 2) / (2 * a * b) if a and b else math.inf
    angle = math.sqrt(2 * beside_cosine)  # radians, where it is small
    findings["gradient direction"].add(angle, where, f"cosine {1 - beside_cosine:.12f}", "cosine 1")


def _parting(
    wanted: Int[np.ndarray, " n"], targets: Sequence[Target], tokenizer: transformers.PreTrainedTokenizerFast
) -> tuple[str, str, str]:
    """(where, what one pass has there, what K passes have) for the target that is most like the string `wanted`."""
    strings = [np.append(target.context, target.token) for target in targets]
    shared = [_common(string, wanted) for string in strings]
    at = max(shared, default=0)
    best = next((string for string, depth in zip(strings, shared, strict=True) if depth == at), wanted[:0])
    both = at < min(len(best), len(wanted))
    place = min(at, len(wanted) - 1)
    has = _shown(tokenizer, best[at]) if both else "no target"
    return f": they part at token {place:,} of {len(wanted):,}", has, _shown(tokenizer, wanted[place])


def _common(a: Int[np.ndarray, " n"], b: Int[np.ndarray, " m"]) -> int:
    """Number of leading tokens that two strings share."""
    differs = np.flatnonzero(a[: len(b)] != b[: len(a)])
    return int(differs[0]) if len(differs) else min(len(a), len(b))


def _shown(tokenizer: transformers.PreTrainedTokenizerFast, token: Any) -> str:
    return f"{int(token)} {tokenizer.decode([int(token)])!r}"
