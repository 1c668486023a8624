"""Lengths of dialogues, what truncation loses at several row lengths, and how full the rows are.

Does what `dataset.prepare` and `batches.Plan` do, for many lengths from one rendering. Knows no texts.
"""

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from dialog_jax.batching import packing
from dialog_jax.dialogues.dialogue import Dialogue
from dialog_jax.trees import fitting, weighting
from dialog_jax.trees.fitting import Excerpt
from dialog_jax.trees.objectives import ObjectiveConfig
from dialog_jax.trees.prefix_tree import Tree

LENGTHS = tuple(2**power for power in range(9, 18))  # tokens of a row


@dataclasses.dataclass(frozen=True, kw_only=True)
class Spread:
    """A distribution of lengths."""

    median: int
    most: int
    """The 95th percentile."""
    longest: int
    where: str
    """Name of the longest dialogue or response."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Fill:
    """Rows of `max_length` tokens, if dialogues that are too long lose their last turns."""

    max_length: int
    rows: int
    used: float
    """Share of the rows' tokens that is not padding."""
    too_long: int
    """Number of dialogues that do not fit completely."""
    dropped: int
    """Number of dialogues of which nothing fits."""
    responses_cut: int
    targets_lost: float
    """Share of all targets."""


class Fit(NamedTuple):
    """What is left of a dialogue's tree at some max_length."""

    tokens: int
    targets: int
    responses: int
    complete: bool


def measure_spread(values: Sequence[tuple[int, str]]) -> Spread | None:
    """Returns the spread of (length, name) pairs; None if there are none.

    [(3, "a"), (9, "b"), (5, "c")]   ->   Spread(median=5, most=9, longest=9, where="b")
    """
    if not values:
        return None
    sizes = np.sort([size for size, _ in values])
    longest, where = max(values, key=lambda value: value[0])
    median, most = np.quantile(sizes, (0.5, 0.95), method="inverted_cdf").tolist()
    return Spread(median=median, most=most, longest=longest, where=where)


def measure_fits(
    dialogue: Dialogue, excerpts: Sequence[Excerpt], tree: Tree, objective: ObjectiveConfig, lengths: Sequence[int]
) -> list[Fit]:
    """Returns what `truncate=turns` leaves of a dialogue at each of `lengths`, which ascend; last, at no limit."""
    responses = sum(len(excerpt.response_turns) for excerpt in excerpts)
    complete = Fit(len(tree.tokens), int((tree.weight > 0).sum()), responses, True)
    fits: list[Fit] = []
    for max_length in lengths:
        if fits and fits[-1].complete:
            fits.append(complete)
            continue
        selected = fitting.select_fitting([excerpt.sequences for excerpt in excerpts], objective, max_length)
        shorter = [excerpt._replace(sequences=sequences) for excerpt, sequences in zip(excerpts, selected, strict=True)]
        responses = sum(len(excerpt.response_turns) for excerpt in shorter)
        if all(fitting.is_complete(excerpt, objective) for excerpt in shorter):
            fits.append(complete)
            continue
        sequences = weighting.select_supervised(dialogue, [shorter], objective)
        (shorter_tree,) = weighting.build_trees(sequences, objective) if responses else (None,)
        tokens, targets = 0, 0
        if shorter_tree is not None:
            tokens, targets = len(shorter_tree.tokens), int((shorter_tree.weight > 0).sum())
        fits.append(Fit(tokens, targets, responses, False))
    return [*fits, complete]


def measure_fills(all_fits: Sequence[Sequence[Fit]], lengths: Sequence[int], max_length: int) -> list[Fill]:
    """Returns the rows at `max_length`, and at the other `lengths` up to the first that cuts nothing.

    Args:
      all_fits: for each tree, its `measure_fits` at `lengths`.
    """
    fills: list[Fill] = []
    for length, fits in zip(lengths, zip(*all_fits, strict=True), strict=False):
        if not fills or fills[-1].too_long or length == max_length:
            fills.append(_measure_fill(fits, [tree_fits[-1] for tree_fits in all_fits], length))
    return fills


def _measure_fill(fits: Sequence[Fit], complete_fits: Sequence[Fit], max_length: int) -> Fill:
    tokens, targets, responses, complete = (np.array(column) for column in zip(*fits, strict=True))
    fitting_trees = tokens > 0
    rng = np.random.default_rng(0)
    rows = packing.pack_trees(tokens[fitting_trees], targets[fitting_trees], max_length=max_length, rng=rng)
    return Fill(
        max_length=max_length,
        rows=len(rows),
        used=float(tokens.sum() / max(1, len(rows) * max_length)),
        too_long=int((~complete).sum()),
        dropped=int((~fitting_trees).sum()),
        responses_cut=int(sum(fit.responses for fit in complete_fits) - responses.sum()),
        targets_lost=float(1 - targets.sum() / sum(fit.targets for fit in complete_fits)),
    )
