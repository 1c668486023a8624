"""Dialogues to chunks of trees: renders some dialogues, builds their trees, and counts what became of them.

A chunk is what one worker makes at a time. The trees do not depend on how the dialogues are divided into chunks. Knows
no files and no processes.
"""

import collections
import concurrent.futures
import functools
import hashlib
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Int32

from dialog_jax.dialogues.dialogue import Dialogue
from dialog_jax.errors import UserError
from dialog_jax.rendering import written
from dialog_jax.rendering.sequences import Renderer
from dialog_jax.rendering.template_process import TemplateStopped
from dialog_jax.trees import dialogue_trees, fitting, prefix_tree, refusals
from dialog_jax.trees.dialogue_trees import Fit, TreeConfig
from dialog_jax.trees.fitting import Excerpt
from dialog_jax.trees.prefix_tree import Tree
from dialog_jax.trees.teacher_file import TeacherFile

SKIPPED = "skipped because of errors"
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
_MAX_NAMES = 1000  # dialogues or places named per reason
_Rendered = tuple[Dialogue, list[Excerpt]] | UserError


class Chunk(NamedTuple):
    """The trees of some dialogues, end to end, and what became of these dialogues."""

    columns: dict[str, np.ndarray]
    """Those of `TOKEN_COLUMNS` and `TREE_COLUMNS`, and with a teacher the token column `teacher_row`."""
    ids: list[str | int]
    """The id of each tree's dialogue."""
    counts: collections.Counter[str]
    named: dict[str, list[str]]
    """The first dialogues of each reason why a dialogue is not trained on completely, and the first places of each kind
    of what the chat template does not write."""
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
      UserError: what `dialogue_trees.fit` and `build` raise, and unless `on_error` is `skip`, what `Renderer.render`
        raises.
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
        fit = one if isinstance(one, UserError) else _fit_or_skip(*one, renderer, config)
        if isinstance(one, UserError) or isinstance(fit, UserError):
            skipped.append(str(fit))
            _add_name(counts, named, SKIPPED, str(fit))
            continue
        dialogue, _ = one
        result = dialogue_trees.build(dialogue, fit, config, teacher)
        counts["dialogues"] += 1
        counts.update(result.counts)
        trees += result.trees
        teacher_rows += result.teacher_rows
        ids += [dialogue.id] * len(result.trees)
        for tree in result.trees:
            prefix = renderer.encode_shared_prefix(dialogue) if config.share_prefixes else renderer.virtual_tokens.ids()
            shared_prefix_lengths.append(_measure_shared_prefix(tree, prefix))
        for reason, detail in result.reasons:
            _add_name(counts, named, reason, dialogue.name + detail)
        for kind, place in result.unwritten:
            _add_name(counts, named, written.KINDS[kind][0], f"{dialogue.name}: {place}")
    columns = trees_to_columns(trees, shared_prefix_lengths)
    if teacher is not None:
        columns["teacher_row"] = np.concatenate([np.zeros(0, np.int64), *teacher_rows])
    counts["trees"] += len(trees)
    counts["tokens"] += len(columns["tokens"])
    counts["targets"] += int(columns["targets"].sum())
    counts["branching"] += sum(not (tree.subtree_end == len(tree.tokens)).all() for tree in trees)
    return Chunk(columns, ids, counts, named, skipped)


def _fit_or_skip(
    dialogue: Dialogue, excerpts: Sequence[Excerpt], renderer: Renderer, config: TreeConfig
) -> Fit | UserError:
    """Returns what `fit` does, or if `on_error` is `skip` the error of a template that refuses a shortened history."""
    try:
        return dialogue_trees.fit(dialogue, excerpts, renderer, config)
    except TemplateStopped:
        raise
    except UserError as error:
        if config.on_error == "stop" or config.truncate == "error":
            raise
        return error


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
