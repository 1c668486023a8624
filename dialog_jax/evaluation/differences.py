"""Results of one pass and of K passes for the same responses in; how far they differ, and where, out.

Compares arrays in NumPy: tokens, masks, losses and gradients. Knows no template, tree or model.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Float, Int

from dialog_jax.batching.batches import Batch
from dialog_jax.evaluation.k_passes import Pass
from dialog_jax.rendering.sequences import Renderer

# The largest allowed difference of each kind; 0 where both must be equal.
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
    """The results of one pass and of K passes at one place. `size` is relative; integers are equal or differ by inf."""

    size: float
    where: str
    one_pass: str
    k_passes: str


class Finding:
    """All comparisons of one kind: how many, how many beyond the tolerance, and the one with the largest difference."""

    def __init__(self, tolerance: float):
        self.tolerance = tolerance
        self.compared = self.beyond = 0
        self.largest: Difference | None = None

    def add(self, size: float, where: str, one_pass: Any, k_passes: Any) -> None:
        """Counts one comparison. NaN counts as infinite; of equal sizes the first stays the largest."""
        size = math.inf if math.isnan(size) else float(size)
        self.compared += 1
        self.beyond += size > self.tolerance
        if self.largest is None or size > self.largest.size:
            self.largest = Difference(size, where, str(one_pass), str(k_passes))


@dataclasses.dataclass(kw_only=True)
class Agreement:
    """What was compared, what was left out and why, and a finding of each kind."""

    dialogues: int = 0
    branching: int = 0
    """Dialogues whose tree is not a single path."""
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
        """Whether something was compared and nothing was beyond its tolerance."""
        return self.responses > 0 and not any(finding.beyond for finding in self.findings.values())


class Target(NamedTuple):
    """A target of a row with the tokens that predict it according to the mask."""

    context: Int[np.ndarray, " n"]
    """The tokens that the source sees; the last is the source itself."""
    position: Int[np.ndarray, " n"]
    token: int
    weight: float
    nll: float


def read_targets(batch: Batch, nll: Float[np.ndarray, " S"]) -> list[Target]:
    """Returns the targets of a batch of one row, in their order, each with the tokens that its source sees.

    tokens [7 8 9], subtree_end [3 2 3], source [1 2], target [5 6]: 7 8 predict 5; 7 9 predict 6, since 9 is not
    below 8.
    """
    tokens, position, subtree_end = (array[0] for array in (batch.tokens, batch.position, batch.subtree_end))
    targets = []
    for target in np.flatnonzero(batch.weight[0] > 0):
        source = int(batch.source[0, target])
        visible = np.flatnonzero(subtree_end[: source + 1] > source)
        token, weight = int(batch.target[0, target]), float(batch.weight[0, target])
        targets.append(Target(tokens[visible], position[visible], token, weight, float(nll[target])))
    return targets


def compare_responses(
    name: str,
    passes: Sequence[Pass],
    nll: Sequence[Float[np.ndarray, " _"]],
    targets: Sequence[Target],
    renderer: Renderer,
    findings: dict[str, Finding],
) -> None:
    """Compares every token of weight above 0 in a dialogue's passes with the target that has the same context.

    The difference of a response's loss is relative to the loss, or to 1 nat per token where the loss is smaller.

    Args:
      name: the dialogue's.
      nll: for each pass, that of each token of its response.
    """
    targets_by_key = {(target.context.tobytes(), target.token): target for target in targets}
    weights = dict.fromkeys(targets_by_key, 0.0)
    places: dict[tuple[bytes, int], str] = {}
    for one, pass_nll in zip(passes, nll, strict=True):
        response = f"{name}, message {one.message} (turn {one.turn})"
        supervised = np.flatnonzero(one.weight)
        target_nll = []
        for index in (supervised + one.start).tolist():
            key = one.tokens[:index].tobytes(), int(one.tokens[index])
            where = f"{response}, token {index - one.start} {_describe(renderer, key[1])}"
            target = targets_by_key.get(key)
            if target is None:
                first = not findings["token ids"].beyond  # only the first one is shown
                detail = _find_divergence(one.tokens[: index + 1], targets, renderer) if first else ("", "", "")
                findings["token ids"].add(math.inf, where + detail[0], *detail[1:])
                continue
            findings["token ids"].add(0.0, where, "same", "same")
            target_nll.append(target.nll)
            wrong = np.flatnonzero(target.position != np.arange(index))
            first_wrong = int(wrong[0]) if len(wrong) else index - 1
            place = f"{where}: token {first_wrong:,} of its context" if len(wrong) else where
            findings["positions"].add(math.inf if len(wrong) else 0.0, place, target.position[first_wrong], first_wrong)
            weights[key] += float(one.weight[index - one.start])
            places.setdefault(key, where)
        if len(target_nll) == len(supervised):
            value, expected = math.fsum(target_nll), math.fsum(pass_nll[supervised])
            size = abs(value - expected) / max(abs(expected), len(supervised))
            findings["loss of a response"].add(size, response, f"{value:.6f}", f"{expected:.6f}")
    for key, weight in weights.items():
        target = targets_by_key[key]
        where = places.get(key, f"{name}: {_describe(renderer, target.token)} after {len(target.context):,} tokens")
        size = abs(target.weight - weight) / max(weight, 1.0)
        findings["weights"].add(size, where, f"{target.weight:.6g}", f"{weight:.6g}" if weight else "no target")


def compare_gradients(one_pass: dict, k_passes: dict, where: str, findings: dict[str, Finding]) -> None:
    """Compares two gradients: as one vector, and parameter by parameter with each layer separately."""
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
            parameter = f"{name}{'' if layer is ... else f'[{layer}]'}"
            findings["gradient by parameter"].add(
                size, f"{parameter}, {where}", f"norm {norms[0]:.6g}", f"norm {norms[1]:.6g}"
            )
    a, b, distance = np.sqrt(squares)
    findings["gradient norm"].add(abs(a - b) / b if b else math.inf, where, f"{a:.8g}", f"{b:.8g}")
    # |a - b|^2 = (|a| - |b|)^2 + 2 |a| |b| (1 - cosine), which loses no precision where the cosine is nearly 1.
    one_minus_cosine = max(0.0, distance**2 - (a - b) ** 2) / (2 * a * b) if a and b else math.inf
    angle = math.sqrt(2 * one_minus_cosine)  # radians, for small angles
    findings["gradient direction"].add(angle, where, f"cosine {1 - one_minus_cosine:.12f}", "cosine 1")


def _find_divergence(
    tokens: Int[np.ndarray, " n"], targets: Sequence[Target], renderer: Renderer
) -> tuple[str, str, str]:
    """Returns (where, token of one pass, token of K passes) where the most similar context diverges from `tokens`."""
    contexts = [np.append(target.context, target.token) for target in targets]
    lengths = [_count_common(context, tokens) for context in contexts]
    common = max(lengths, default=0)
    closest = next((context for context, length in zip(contexts, lengths, strict=True) if length == common), tokens[:0])
    index = min(common, len(tokens) - 1)
    token = _describe(renderer, closest[common]) if common < min(len(closest), len(tokens)) else "no target"
    return f": they diverge at token {index:,} of {len(tokens):,}", token, _describe(renderer, tokens[index])


def _count_common(a: Int[np.ndarray, " n"], b: Int[np.ndarray, " m"]) -> int:
    """Returns the number of leading tokens that two strings share."""
    differing = np.flatnonzero(a[: len(b)] != b[: len(a)])
    return int(differing[0]) if len(differing) else min(len(a), len(b))


def _describe(renderer: Renderer, token: Any) -> str:
    if renderer.virtual_tokens.contain(int(token)):
        return renderer.virtual_tokens.describe(int(token))
    return f"{int(token)} {renderer.tokenizer.decode([int(token)])!r}"
