"""Dialogues to chunks of trees: renders, weighs, truncates and builds the trees of some dialogues, and counts them.

A chunk is what one worker makes at a time. The trees do not depend on how the dialogues are divided into chunks. Knows
no files and no processes.
"""

import collections
import concurrent.futures
import dataclasses
import functools
import hashlib
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Int32

from dialog_jax.dialogues.dialogue import Dialogue
from dialog_jax.errors import UserError
from dialog_jax.rendering.sequences import Renderer
from dialog_jax.rendering.template_process import TemplateStopped
from dialog_jax.trees import fitting, prefix_tree, refusals, weighting
from dialog_jax.trees import teacher as teacher_lib
from dialog_jax.trees.fitting import Excerpt
from dialog_jax.trees.objectives import ObjectiveConfig
from dialog_jax.trees.prefix_tree import Tree
from dialog_jax.trees.teacher_file import TeacherFile
from dialog_jax.trees.weighting import SupervisedSequence

TOO_LONG, NO_TARGET = "dropped, too long", "dropped, no target"
SKIPPED = "skipped because of errors"
TRUNCATIONS = ("turns", "drop", "split", "error")
ON_ERROR = ("stop", "skip")
# What is stored of each token, and of each tree.
TOKEN_COLUMNS: dict[str, type[np.generic]] = {
    "tokens": np.int32,
    "parent": np.int32,
    "position": np.int32,
    "subtree_end": np.int32,
    "weight": np.float32,
    "turn": np.int32,
}
TREE_COLUMNS: dict[str, type[np.generic]] = {
    "size": np.int64,
    "targets": np.int32,
    "shared_prefix_length": np.int32,
    "shared_prefix_id": np.int64,
}
_MAX_DIALOGUES = 256  # of a chunk
_MAX_CHARACTERS = 1 << 18  # after which a chunk ends; its memory grows with them
_MAX_NAMES = 1000  # dialogues named per reason
_Rendered = tuple[Dialogue, list[Excerpt]] | UserError


@dataclasses.dataclass(frozen=True, kw_only=True)
class TreeConfig:
    """How rendered dialogues become trees."""

    objective: ObjectiveConfig = dataclasses.field(default_factory=ObjectiveConfig)
    max_length: int
    """Largest number of tokens of a tree."""
    truncate: str = "turns"
    """What becomes of a dialogue whose tree is larger. `turns` keeps its longest prefix that ends with a supervised
    response; `drop` leaves it out; `split` divides it into several trees, each with the system prompt and as many of
    the turns before as fit half of `max_length`; `error` refuses it."""
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


class Chunk(NamedTuple):
    """The trees of some dialogues, end to end, and what became of these dialogues."""

    columns: dict[str, np.ndarray]
    """Those of `TOKEN_COLUMNS` and `TREE_COLUMNS`, and with a teacher the token column `teacher_row`."""
    ids: list[str | int]
    """The id of each tree's dialogue."""
    counts: collections.Counter[str]
    named: dict[str, list[str]]
    """The first dialogues of each reason why a dialogue is not trained on completely."""
    skipped: list[str]
    """The error of each record that is left out, in order; empty unless `TreeConfig.on_error` is `skip`."""


def batch_dialogues(dialogues: Iterable[Dialogue | UserError]) -> Iterator[list[Dialogue | UserError]]:
    """Yields the dialogues of one chunk after another, limited in number and in text; see `build_chunk` for errors."""
    batch: list[Dialogue | UserError] = []
    characters = 0
    for dialogue in dialogues:
        batch.append(dialogue)
        if isinstance(dialogue, Dialogue):
            characters += sum(len(message.content) for message in dialogue.messages)
        if len(batch) == _MAX_DIALOGUES or characters >= _MAX_CHARACTERS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


def build_chunks(
    batches: Iterable[list[Dialogue | UserError]],
    renderer: Renderer,
    config: TreeConfig,
    teacher: TeacherFile | None = None,
) -> Iterator[Chunk]:
    """Yields the chunk of each batch, in order; a thread renders the next batch (tokenizers release the GIL).

    Raises:
      UserError: what `build_chunk` raises.
    """
    with concurrent.futures.ThreadPoolExecutor(1) as executor:
        previous: concurrent.futures.Future[list[_Rendered]] | None = None
        for batch in batches:
            future = executor.submit(_render, batch, renderer, config)
            if previous is not None:
                yield _assemble(previous.result(), renderer, config, teacher)
            previous = future
        if previous is not None:
            yield _assemble(previous.result(), renderer, config, teacher)


def build_chunk(
    batch: Sequence[Dialogue | UserError],
    renderer: Renderer,
    config: TreeConfig,
    teacher: TeacherFile | None = None,
) -> Chunk:
    """Returns the chunk of a batch.

    Args:
      batch: dialogues, and the errors of records that are none: the chunk lists them among the skipped ones.

    Raises:
      UserError: a dialogue is too long and `truncate` is `error`; the teacher's file lacks a response or has other
        tokens; what `Renderer.render` raises, unless `on_error` is `skip`. Names the dialogue, its place and the
        remedy.
      TemplateStopped: the template exceeded its time or memory, whatever `on_error` is.
    """
    return _assemble(_render(batch, renderer, config), renderer, config, teacher)


def add_counts(counts: collections.Counter[str], named: dict[str, list[str]], chunk: Chunk) -> None:
    """Adds the counts and names of a chunk to those of the chunks before it."""
    counts.update(chunk.counts)
    for reason, names in chunk.named.items():
        all_names = named.setdefault(reason, [])
        all_names += names[: _MAX_NAMES - len(all_names)]


def trees_to_columns(trees: Sequence[Tree], shared_prefix_lengths: Sequence[int]) -> dict[str, np.ndarray]:
    """Returns the columns of trees, end to end.

    Trees 7 8 9 and 7 8, each with a shared prefix of 1 token:

        tokens                7 8 9 7 8        size                  3  2
        position              0 1 2 0 1        targets               2  1
        subtree_end           3 3 3 2 2        shared_prefix_length  1  1
        weight                0 1 1 0 1        shared_prefix_id      the same number twice

    Args:
      shared_prefix_lengths: number of leading tokens of each tree that it may share with others.
    """
    columns = {
        field: np.concatenate([np.zeros(0, kind), *(getattr(tree, field) for tree in trees)])
        for field, kind in TOKEN_COLUMNS.items()
    }
    prefixes = [tree.tokens[:length] for tree, length in zip(trees, shared_prefix_lengths, strict=True)]
    return columns | {
        "size": np.array([len(tree.tokens) for tree in trees], np.int64),
        "targets": np.array([np.count_nonzero(tree.weight > 0) for tree in trees], np.int32),
        "shared_prefix_length": np.array(shared_prefix_lengths, np.int32),
        "shared_prefix_id": np.array([_hash_prefix(prefix) for prefix in prefixes], np.int64),
    }


def _render(batch: Sequence[Dialogue | UserError], renderer: Renderer, config: TreeConfig) -> list[_Rendered]:
    """Returns each dialogue with its excerpts, or its error if `on_error` is `skip`; errors in the batch stay."""
    dialogues = [one for one in batch if isinstance(one, Dialogue)]
    render = functools.partial(_render_dialogues, renderer=renderer, config=config)
    excerpts = render(dialogues) if config.on_error == "stop" else refusals.call_with_each(render, dialogues)
    pairs = zip(dialogues, excerpts, strict=True)
    rendered = iter([result if isinstance(result, UserError) else (dialogue, result) for dialogue, result in pairs])
    results = [one if isinstance(one, UserError) else next(rendered) for one in batch]
    if config.on_error == "stop":
        for result in results:
            if isinstance(result, UserError):
                raise result
    return results


def _render_dialogues(dialogues: Sequence[Dialogue], *, renderer: Renderer, config: TreeConfig) -> list[list[Excerpt]]:
    """Returns the excerpts of each dialogue, one per path, with all sequences of at most `max_length` tokens."""
    objective = config.objective
    unfolded = [fitting.unfold(dialogue, objective) for dialogue in dialogues]
    sequences = iter(
        renderer.render(
            [excerpt.dialogue for excerpts in unfolded for excerpt in excerpts],
            max_length=config.max_length,
            full=objective.needs_full_rendering,
            locate=objective.needs_span,
        )
    )
    return [[excerpt._replace(sequences=list(next(sequences))) for excerpt in excerpts] for excerpts in unfolded]


def _assemble(
    rendered: Sequence[_Rendered],
    renderer: Renderer,
    config: TreeConfig,
    teacher: TeacherFile | None,
) -> Chunk:
    """Returns the chunk of rendered dialogues; errors among them are listed."""
    counts: collections.Counter[str] = collections.Counter()
    named: dict[str, list[str]] = {}
    skipped: list[str] = []
    trees: list[Tree] = []
    ids: list[str | int] = []
    shared_prefix_lengths: list[int] = []
    teacher_rows: list[np.ndarray] = []
    for one in rendered:
        counts["records"] += 1
        fitted = one if isinstance(one, UserError) else _fit_or_skip(*one, renderer, config, counts)
        if isinstance(one, UserError) or isinstance(fitted, UserError):
            skipped.append(str(fitted))
            _add_name(counts, named, SKIPPED, str(fitted))
            continue
        (dialogue, _), (groups, reason, detail) = one, fitted
        counts["dialogues"] += 1
        if groups:
            built = _build_trees(dialogue, groups, config.objective)
            for sequences, tree in built:
                counts["turns"] += len(weighting.select_responses(sequences))
                trees.append(tree)
                ids.append(dialogue.id)
                prefix = renderer.encode_shared_prefix(dialogue) if config.share_prefixes else tree.tokens[:0]
                shared_prefix_lengths.append(_measure_shared_prefix(tree, prefix))
                if teacher is not None:
                    teacher_rows.append(teacher_lib.find_rows(teacher, dialogue, tree, sequences))
            if not built:
                _add_name(counts, named, NO_TARGET, dialogue.name)
        if reason:
            _add_name(counts, named, reason, dialogue.name + detail)
    columns = trees_to_columns(trees, shared_prefix_lengths)
    if teacher is not None:
        columns["teacher_row"] = np.concatenate([np.zeros(0, np.int64), *teacher_rows])
    counts["trees"] += len(trees)
    counts["tokens"] += len(columns["tokens"])
    counts["targets"] += int(columns["targets"].sum())
    counts["branching"] += sum(not (tree.subtree_end == len(tree.tokens)).all() for tree in trees)
    return Chunk(columns, ids, counts, named, skipped)


def _build_trees(
    dialogue: Dialogue, groups: Sequence[Sequence[Excerpt]], objective: ObjectiveConfig
) -> list[tuple[list[SupervisedSequence], Tree]]:
    """Returns the supervised sequences and the tree of each group in which something is trained on."""
    supervised = weighting.select_supervised(dialogue, groups, objective)
    trees = weighting.build_trees(supervised, objective)
    return [(sequences, tree) for sequences, tree in zip(supervised, trees, strict=True) if tree is not None]


def _fit_or_skip(
    dialogue: Dialogue,
    excerpts: Sequence[Excerpt],
    renderer: Renderer,
    config: TreeConfig,
    counts: collections.Counter[str],
) -> tuple[list[list[Excerpt]], str, str] | UserError:
    """Returns what `_fit` does, or if `on_error` is `skip` the error of a template that refuses a shortened history."""
    try:
        return _fit(dialogue, excerpts, renderer, config, counts)
    except TemplateStopped:
        raise
    except UserError as error:
        if config.on_error == "stop" or config.truncate == "error":
            raise
        return error


def _fit(
    dialogue: Dialogue,
    excerpts: Sequence[Excerpt],
    renderer: Renderer,
    config: TreeConfig,
    counts: collections.Counter[str],
) -> tuple[list[list[Excerpt]], str, str]:
    """Returns (groups of excerpts, each of which fits a tree; why the dialogue is not complete, or ""; a detail)."""
    objective, max_length = config.objective, config.max_length
    turns = sum(len(excerpt.supervised_messages) for excerpt in excerpts)
    selected = fitting.select_fitting([excerpt.sequences for excerpt in excerpts], objective, max_length)
    groups = [[excerpt._replace(sequences=sequences) for excerpt, sequences in zip(excerpts, selected, strict=True)]]
    if all(fitting.is_complete(excerpt, objective) for excerpt in groups[0]):
        return groups, "", ""
    if config.truncate == "error":
        raise UserError(
            f"{dialogue.name}: has more than max_length = {max_length:,} tokens. Raise max_length, or set truncate to "
            "turns, split or drop."
        )
    if config.truncate == "split":
        groups = fitting.split_excerpts(excerpts, renderer, objective, max_length)
    remaining = sum(len(excerpt.response_turns) for group in groups for excerpt in group)
    if config.truncate == "drop" or not remaining:
        counts["turns cut"] += turns
        detail = "" if remaining else f", no turn of which fits {max_length:,} tokens together with its context"
        return [], TOO_LONG, detail
    counts["turns cut"] += turns - remaining
    return groups, "split" if len(groups) > 1 else "shortened", ""


def _add_name(counts: collections.Counter[str], named: dict[str, list[str]], reason: str, name: str) -> None:
    counts[reason] += 1
    names = named.setdefault(reason, [])
    if len(names) < _MAX_NAMES:
        names.append(name)


def _measure_shared_prefix(tree: Tree, prefix: Int32[np.ndarray, " n"]) -> int:
    """Returns how many leading tokens of `prefix` a tree begins with before it branches."""
    branches = np.flatnonzero(tree.subtree_end != len(tree.tokens))
    path = int(branches[0]) if len(branches) else len(tree.tokens)
    return min(prefix_tree.common_prefix_length(tree.tokens, prefix), path)


def _hash_prefix(prefix: Int32[np.ndarray, " n"]) -> int:
    """Returns a number in [0, 2^63) that other prefixes are unlikely to have; -1 for an empty one."""
    if not len(prefix):
        return -1
    return int.from_bytes(hashlib.blake2b(prefix.astype("<i4").tobytes(), digest_size=8).digest(), "little") >> 1
