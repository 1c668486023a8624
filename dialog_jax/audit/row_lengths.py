"""How long dialogues are, what those that are too long lose at several lengths of a row, and how full the rows are.

Does what `dataset.prepare` and `batches.Plan` do, for many lengths from one rendering. Knows no text.
"""

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from dialog_jax.batching import packing
from dialog_jax.dialogues.dialogue import Dialogue
from dialog_jax.trees import fitting as fitting_lib
from dialog_jax.trees import weighting
from dialog_jax.trees.fitting import Excerpt
from dialog_jax.trees.objectives import ObjectiveConfig
from dialog_jax.trees.prefix_tree import Tree

LENGTHS = tuple(2**power for power in range(9, 18))  # tokens of a row


@dataclasses.dataclass(frozen=True, kw_only=True)
class Spread:
    """How long things are."""

    median: int
    most: int
    """19 of 20 are at most so long."""
    longest: int
    where: str
    """What is the longest."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Fill:
    """What rows of `max_length` tokens hold, if dialogues that are too long lose their last turns."""

    max_length: int
    rows: int
    used: float
    """Share of the rows' tokens that is not padding."""
    too_long: int
    """Dialogues that do not fit whole."""
    dropped: int
    """Those of them of which nothing fits."""
    responses_cut: int
    targets_lost: float
    """Share of all targets."""


class Fit(NamedTuple):
    """What a dialogue's tree has at some max_length."""

    tokens: int
    targets: int
    responses: int
    whole: bool


def spread(values: Sequence[tuple[int, str]]) -> Spread | None:
    """Of (how long, what) of each; None of none."""
    if not values:
        return None
    sizes = np.sort([size for size, _ in values])
    longest, where = max(values, key=lambda value: value[0])
    middle, most = np.quantile(sizes, (0.5, 0.95), method="inverted_cdf").tolist()
    return Spread(median=middle, most=most, longest=longest, where=where)


def fits(
    dialogue: Dialogue, pieces: Sequence[Excerpt], tree: Tree, objective: ObjectiveConfig, lengths: Sequence[int]
) -> list[Fit]:
    """What is left of a dialogue at each of `lengths`, which ascend, as `prepare` does it with truncate=turns.

    The last one is what it has without a limit.
    """
    full = Fit(len(tree.tokens), int((tree.weight > 0).sum()), sum(len(piece.responses) for piece in pieces), True)
    made: list[Fit] = []
    for max_length in lengths:
        if made and made[-1].whole:
            made.append(full)
            continue
        fitting = fitting_lib.select_fitting([piece.sequences for piece in pieces], objective, max_length)
        left = [piece._replace(sequences=own) for piece, own in zip(pieces, fitting, strict=True)]
        kept = sum(len(piece.responses) for piece in left)
        if all(fitting_lib.is_complete(piece, objective) for piece in left):
            made.append(full)
        elif kept and (
            some := weighting.build_trees(weighting.select_supervised(dialogue, [left], objective), objective)[0]
        ):
            made.append(Fit(len(some.tokens), int((some.weight > 0).sum()), kept, False))
        else:
            made.append(Fit(0, 0, kept, False))
    return [*made, full]


def fills(all_fits: Sequence[Sequence[Fit]], lengths: Sequence[int], max_length: int) -> list[Fill]:
    """What rows hold at `max_length`, and at the other `lengths` up to the first that cuts nothing.

    Args:
      all_fits: of each tree its `fits` at `lengths`.
    """
    made: list[Fill] = []
    for length, fits_there in zip(lengths, zip(*all_fits, strict=True), strict=False):
        if not made or made[-1].too_long or length == max_length:
            made.append(_fill(fits_there, [own[-1] for own in all_fits], length))
    return made


def _fill(fits: Sequence[Fit], full: Sequence[Fit], max_length: int) -> Fill:
    tokens, targets, responses, whole = (np.array(column) for column in zip(*fits, strict=True))
    kept = tokens > 0
    rows = packing.pack_trees(
        tokens[kept], targets[kept], max_length=max_length, max_targets=max_length, rng=np.random.default_rng(0)
    )
    return Fill(
        max_length=max_length,
        rows=len(rows),
        used=float(tokens.sum() / max(1, len(rows) * max_length)),
        too_long=int((~whole).sum()),
        dropped=int((~kept).sum()),
        responses_cut=int(sum(fit.responses for fit in full) - responses.sum()),
        targets_lost=float(1 - targets.sum() / sum(fit.targets for fit in full)),
    )
