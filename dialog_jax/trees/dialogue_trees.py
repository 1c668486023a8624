"""One dialogue to weighted trees that fit a row: the treatment of what is too long, the weights, and the division.

In: a dialogue's excerpts with their sequences. Out: trees, and what became of the dialogue. Knows no files and no rows.
"""

import collections
import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Int64

from dialog_jax.dialogues.dialogue import Dialogue
from dialog_jax.errors import UserError
from dialog_jax.rendering.sequences import Renderer
from dialog_jax.trees import division, fitting, weighting
from dialog_jax.trees import teacher as teacher_lib
from dialog_jax.trees.fitting import Excerpt
from dialog_jax.trees.objectives import ObjectiveConfig
from dialog_jax.trees.prefix_tree import Tree
from dialog_jax.trees.teacher_file import TeacherFile

TRUNCATIONS = ("split", "turns", "drop", "error")
ON_ERROR = ("stop", "skip")
# Why a dialogue is not trained on completely, in every response behind all of its history.
SHORTENED, CUT = "with a shortened history", "with responses left out"
TOO_LONG, NO_TARGET = "dropped, too long", "dropped, no target"


@dataclasses.dataclass(frozen=True, kw_only=True)
class TreeConfig:
    """How rendered dialogues become trees."""

    objective: ObjectiveConfig = dataclasses.field(default_factory=ObjectiveConfig)
    max_length: int
    """Largest number of tokens of a tree. A larger tree is divided into trees that repeat the history they share."""
    truncate: str = "split"
    """What becomes of a response that has more than `max_length` tokens together with its history. `split` trains it
    behind the system prompt and the most recent turns; `turns` leaves it out; `drop` leaves its dialogue out; `error`
    refuses it."""
    share_prefixes: bool = False
    """Let trees of a row that begin with the same system prompt share it."""
    on_error: str = "stop"
    """What becomes of a record that is no valid dialogue or that the chat template refuses: `stop` raises its error,
    `skip` leaves the record out and lists it."""

    def __post_init__(self) -> None:
        if self.max_length < 2:
            raise UserError(f"data.max_length is {self.max_length}; it must be at least 2.")
        if self.truncate not in TRUNCATIONS:
            raise UserError(f"data.truncate is {self.truncate!r}; it must be one of {', '.join(TRUNCATIONS)}.")
        if self.on_error not in ON_ERROR:
            raise UserError(f"data.on_error is {self.on_error!r}; it must be one of {', '.join(ON_ERROR)}.")


class Fit(NamedTuple):
    """What of a dialogue is trained on in rows of some length."""

    groups: list[list[Excerpt]]
    """Excerpts with sequences that fit a row, in groups; a group becomes one tree, which may have to be divided."""
    counts: collections.Counter[str]
    """Responses: `turns shortened` are trained behind a part of their history, `turns cut` are left out."""
    reasons: list[tuple[str, str]]
    """Why the dialogue is not trained on completely, each with a detail."""


class DialogueTrees(NamedTuple):
    """The trees of a dialogue, and what became of it."""

    trees: list[Tree]
    teacher_rows: list[Int64[np.ndarray, " _"]]
    """With a teacher, for each tree the row of each token in the teacher's file; otherwise empty."""
    counts: collections.Counter[str]
    """Those of `Fit`, and `turns` (responses that are trained); `divided` (trees that are larger than a row), their
    `parts`, of which at least `parts needed` are needed, and the tokens that these repeat, `repeated`."""
    reasons: list[tuple[str, str]]
    """Why the dialogue is not trained on completely, each with a detail."""
    unwritten: list[tuple[str, str]]
    """What the chat template does not write of the dialogue: its kind (one of `written.KINDS`) and its place."""


def fit(dialogue: Dialogue, excerpts: Sequence[Excerpt], renderer: Renderer, config: TreeConfig) -> Fit:
    """Returns what of a dialogue is trained on: every sequence that fits a row, and of others what `truncate` says.

    Args:
      excerpts: its paths, with all sequences of at most `max_length` tokens.

    Raises:
      UserError: a sequence is too long and `truncate` is `error`; what `Renderer.render` raises.
    """
    objective, max_length = config.objective, config.max_length
    incomplete = [excerpt for excerpt in excerpts if not fitting.is_complete(excerpt, objective)]
    if not incomplete:
        return Fit([list(excerpts)], collections.Counter(), [])
    if config.truncate == "error":
        raise UserError(
            f"{dialogue.name}: has more than max_length = {max_length:,} tokens. Raise max_length, or set truncate to "
            "split, turns or drop."
        )
    shorter: list[Excerpt] = []
    if config.truncate == "split":
        for excerpt in incomplete:
            shorter += fitting.shorten_histories(excerpt, renderer, objective, max_length)
    turns = sum(len(excerpt.supervised_messages) for excerpt in excerpts)
    complete, shortened = (sum(len(one.response_turns) for one in group) for group in (excerpts, shorter))
    if not complete + shortened or config.truncate == "drop":
        detail = "" if complete else f", no turn of which fits {max_length:,} tokens together with its context"
        return Fit([], collections.Counter({"turns cut": turns}), [(TOO_LONG, detail)])
    counts = collections.Counter({"turns shortened": shortened, "turns cut": turns - complete - shortened})
    reasons = [(SHORTENED, "")] if shorter else []
    if counts["turns cut"] or not shorter:
        reasons.append((CUT, ""))
    return Fit([list(excerpts), *([excerpt] for excerpt in shorter)], counts, reasons)


def build(dialogue: Dialogue, fitted: Fit, config: TreeConfig, teacher: TeacherFile | None = None) -> DialogueTrees:
    """Returns the trees of a dialogue, which have at most `max_length` tokens.

    Raises:
      UserError: the teacher's file lacks a response or has other tokens. Names the dialogue, its place and the remedy.
    """
    counts = collections.Counter(fitted.counts)
    trees: list[Tree] = []
    teacher_rows: list[Int64[np.ndarray, " _"]] = []
    supervised = weighting.select_supervised(dialogue, fitted.groups, config.objective)
    for sequences, tree in zip(supervised, weighting.build_trees(supervised, config.objective), strict=True):
        if tree is None:
            continue
        counts["turns"] += len(weighting.select_responses(sequences))
        parts = division.divide_tree(tree, config.max_length)
        part_trees = division.select_nodes(tree, parts)
        trees += part_trees
        if len(parts) > 1:
            counts["divided"] += 1
            counts["parts"] += len(parts)
            counts["parts needed"] += division.count_parts_needed(tree, config.max_length)
            counts["repeated"] += sum(map(len, parts)) - len(tree.tokens)
        if teacher is not None:
            rows = teacher_lib.find_rows(teacher, dialogue, tree, sequences)
            teacher_rows += [
                np.where(part.weight > 0, rows[nodes], -1) for part, nodes in zip(part_trees, parts, strict=True)
            ]
    reasons = [(NO_TARGET, "")] if fitted.groups and not trees else fitted.reasons
    unwritten = list_unwritten([excerpt for group in fitted.groups for excerpt in group]) if trees else []
    return DialogueTrees(trees, teacher_rows, counts, reasons, unwritten)


def list_unwritten(excerpts: Sequence[Excerpt]) -> list[tuple[str, str]]:
    """Returns (kind, place) of what the chat template does not write of a dialogue, once if excerpts share it.

    [("tool_calls", "message 1: call 'tide'"), ("reasoning", "message 3")]
    """
    places: dict[tuple[str, int], str] = {}
    for excerpt in excerpts:
        for sequence in excerpt.sequences:
            for one in sequence.unwritten:
                index = excerpt.original_indices[one.message_index] if one.message_index >= 0 else -1
                places.setdefault((one.kind, index), one.describe(index))
    return [(kind, place) for (kind, _), place in places.items()]
