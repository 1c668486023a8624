"""Lengths of dialogues, what truncation loses at several row lengths, and how full the rows are.

Does what `dataset.prepare` and `batches.Plan` do, for many lengths. Knows no texts.
"""

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from dialog_jax.batching import packing
from dialog_jax.dialogues.dialogue import Dialogue
from dialog_jax.errors import UserError
from dialog_jax.rendering.sequences import Renderer
from dialog_jax.trees import dialogue_trees
from dialog_jax.trees.dialogue_trees import TreeConfig
from dialog_jax.trees.fitting import Excerpt

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
    """Rows of `max_length` tokens."""

    max_length: int
    rows: int
    used: float
    """Share of the rows' tokens that is not padding."""
    divided: int
    """Number of trees that are larger than a row."""
    repeated: int
    """Number of tokens that the parts of divided trees repeat."""
    shortened: int
    """Number of responses that are trained behind a part of their history."""
    cut: int
    """Number of responses that are left out."""
    targets_lost: float
    """Share of all targets."""


class Measure(NamedTuple):
    """A dialogue in rows of some length."""

    tokens: list[int]
    """Of each tree."""
    targets: list[int]
    """Of each tree."""
    divided: int
    repeated: int
    shortened: int
    cut: int
    complete: bool
    """Whether the dialogue is one tree, with all of its responses."""
    refusal: str = ""
    """Why the chat template refuses a shortened history; the dialogue then has no trees."""


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


def measure_percentiles(values: Sequence[tuple[int, str]]) -> list[int]:
    """Returns the percentiles 0, 1, ..., 100 of (length, name) pairs, each a length that occurs; [] of no pairs."""
    if not values:
        return []
    return np.quantile([size for size, _ in values], np.arange(101) / 100, method="inverted_cdf").tolist()


def measure_lengths(
    dialogue: Dialogue, excerpts: Sequence[Excerpt], renderer: Renderer, config: TreeConfig, lengths: Sequence[int]
) -> list[Measure]:
    """Returns the measure of a dialogue at each of `lengths`, which ascend.

    Args:
      excerpts: its paths, with all of their sequences.
      config: with any `max_length`. Where `truncate` is `error`, the dialogue is measured as with `drop`.
    """
    truncate = "drop" if config.truncate == "error" else config.truncate
    measures: list[Measure] = []
    for max_length in lengths:
        if measures and measures[-1].complete:
            measures.append(measures[-1])
            continue
        config = dataclasses.replace(config, max_length=max_length, truncate=truncate)
        shorter = [_select_fitting(excerpt, renderer, config) for excerpt in excerpts]
        try:
            fit = dialogue_trees.fit(dialogue, shorter, renderer, config)
        except UserError as error:
            measures.append(Measure([], [], 0, 0, 0, 0, complete=False, refusal=str(error)))
            continue
        result = dialogue_trees.build(dialogue, fit, config)
        measures.append(
            Measure(
                tokens=[len(tree.tokens) for tree in result.trees],
                targets=[int(np.count_nonzero(tree.weight > 0)) for tree in result.trees],
                divided=result.counts["divided"],
                repeated=result.counts["repeated"],
                shortened=result.counts["turns shortened"],
                cut=result.counts["turns cut"],
                complete=not result.reasons and not result.counts["divided"],
            )
        )
    return measures


def measure_fills(
    measures: Sequence[Sequence[Measure]],
    complete_targets: int,
    lengths: Sequence[int],
    max_length: int,
    *,
    soft_prompt: int = 0,
) -> list[Fill]:
    """Returns the rows at `max_length`, and at the other `lengths` up to the first at which every dialogue is complete.

    Args:
      measures: of each dialogue, at each of `lengths`.
      complete_targets: number of targets of all complete dialogues.
      lengths, max_length: of rows, less the soft prompt.
      soft_prompt: number of tokens of a soft prompt, which each row has once.
    """
    fills: list[Fill] = []
    is_complete = False
    for length, of_length in zip(lengths, zip(*measures, strict=True), strict=False):
        if not is_complete or length == max_length:
            fills.append(_measure_fill(of_length, complete_targets, length, soft_prompt))
        is_complete = is_complete or all(measure.complete for measure in of_length)
    return fills


def _select_fitting(excerpt: Excerpt, renderer: Renderer, config: TreeConfig) -> Excerpt:
    """Returns the excerpt with the sequences that have at most `max_length` tokens."""
    objective, max_length = config.objective, config.max_length
    if not objective.needs_full_rendering:
        return excerpt._replace(sequences=[one for one in excerpt.sequences if len(one.tokens) <= max_length])
    # A sequence has the spans of the messages that the one before it lacks, which may be too long.
    (sequences,) = renderer.render([excerpt.dialogue], max_length=max_length, full=True, locate=objective.needs_span)
    return excerpt._replace(sequences=list(sequences))


def _measure_fill(measures: Sequence[Measure], complete_targets: int, room: int, soft_prompt: int) -> Fill:
    """Returns the rows that have room for that many tokens behind a soft prompt."""
    tokens = np.array([size for measure in measures for size in measure.tokens], np.int64)
    targets = np.array([size for measure in measures for size in measure.targets], np.int64)
    rows = packing.pack_trees(tokens, targets, max_length=room, rng=np.random.default_rng(0))
    max_length = room + soft_prompt
    return Fill(
        max_length=max_length,
        rows=len(rows),
        used=float((tokens.sum() + len(rows) * soft_prompt) / max(1, len(rows) * max_length)),
        divided=sum(measure.divided for measure in measures),
        repeated=sum(measure.repeated for measure in measures),
        shortened=sum(measure.shortened for measure in measures),
        cut=sum(measure.cut for measure in measures),
        targets_lost=float(1 - targets.sum() / complete_targets),
    )
