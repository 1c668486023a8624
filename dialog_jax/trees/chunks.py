"""Dialogues to chunks of trees: renders, weighs, cuts to length and builds the trees of some dialogues, and counts.

A chunk is what one worker makes at a time; chunks after each other are the same trees wherever the dialogues were cut
into chunks. Knows no file and no process.
"""

import collections
import concurrent.futures
import dataclasses
import hashlib
import itertools
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Int32

from dialog_jax.dialogues.dialogue import Dialogue
from dialog_jax.errors import UserError
from dialog_jax.rendering.sequences import Renderer
from dialog_jax.trees import fitting as fitting_lib
from dialog_jax.trees import prefix_tree, weighting
from dialog_jax.trees import teacher as teacher_lib
from dialog_jax.trees.fitting import Excerpt
from dialog_jax.trees.objectives import ObjectiveConfig
from dialog_jax.trees.prefix_tree import Tree
from dialog_jax.trees.teacher import TeacherFile

TOO_LONG, NO_TARGET = "dropped, too long", "dropped, no target"
TRUNCATIONS = ("turns", "drop", "split", "error")
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
_DIALOGUES = 256  # of a chunk, at most
_CHARACTERS = 1 << 18  # of a chunk, but for its last dialogue; what a chunk needs of memory grows with them
_NAMES_KEPT = 1000  # dialogues named for each reason


@dataclasses.dataclass(frozen=True, kw_only=True)
class Recipe:
    """How dialogues become trees; see `dataset.prepare`."""

    objective: ObjectiveConfig
    max_length: int
    truncate: str = "turns"
    share_prefixes: bool = False

    def __post_init__(self) -> None:
        if self.truncate not in TRUNCATIONS:
            raise UserError(f"truncate is {self.truncate!r}; it must be one of {', '.join(TRUNCATIONS)}.")


class Chunk(NamedTuple):
    """The trees of some dialogues, end to end, and what became of those."""

    columns: dict[str, np.ndarray]
    """Those of `TOKEN_COLUMNS` and `TREE_COLUMNS`, and with a teacher the token column `teacher_row`."""
    ids: list[str | int]
    """The dialogue of each tree."""
    counts: collections.Counter[str]
    named: dict[str, list[str]]
    """The first dialogues of each reason."""


def batch_dialogues(dialogues: Iterable[Dialogue]) -> Iterator[list[Dialogue]]:
    """Yields the dialogues of one chunk after another: not too many, and not too much text."""
    batch: list[Dialogue] = []
    characters = 0
    for dialogue in dialogues:
        batch.append(dialogue)
        characters += sum(len(message.content) for message in dialogue.messages)
        if len(batch) == _DIALOGUES or characters >= _CHARACTERS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


def build_chunks(
    batches: Iterable[list[Dialogue]], renderer: Renderer, recipe: Recipe, teacher: TeacherFile | None
) -> Iterator[Chunk]:
    """Yields the chunk of each batch; the next one is rendered meanwhile, since the tokenizer leaves Python to others.

    Raises:
      UserError: what `build` raises.
    """
    with concurrent.futures.ThreadPoolExecutor(1) as executor:
        waiting: collections.deque = collections.deque()
        for batch in itertools.chain(batches, [None]):
            if batch is not None:
                waiting.append((batch, executor.submit(_rendered, batch, renderer, recipe)))
            while len(waiting) > (batch is not None):
                done, rendered = waiting.popleft()
                yield _assembled(done, rendered.result(), renderer, recipe, teacher)


def build_chunk(
    batch: Sequence[Dialogue], renderer: Renderer, recipe: Recipe, teacher: TeacherFile | None = None
) -> Chunk:
    """Returns the chunk of a batch.

    Raises:
      UserError: a dialogue is too long and `truncate` is `error`; the teacher knows nothing of a response, or other
        tokens; what `Renderer.render` raises. Names the dialogue, where it stands and what to do.
    """
    return _assembled(batch, _rendered(batch, renderer, recipe), renderer, recipe, teacher)


def add_counts(counts: collections.Counter[str], named: dict[str, list[str]], chunk: Chunk) -> None:
    """Adds what became of a further chunk's dialogues to what became of those before it."""
    counts.update(chunk.counts)
    for reason, names in chunk.named.items():
        own = named.setdefault(reason, [])
        own += names[: _NAMES_KEPT - len(own)]


def _rendered(batch: Sequence[Dialogue], renderer: Renderer, recipe: Recipe) -> list[list[Excerpt]]:
    objective = recipe.objective
    unfolded = [fitting_lib.unfold(dialogue, objective) for dialogue in batch]
    parts = [piece.dialogue for pieces in unfolded for piece in pieces]
    sequences = iter(
        renderer.render(parts, max_length=recipe.max_length, full=objective.whole, locate=objective.locates)
    )
    return [[piece._replace(sequences=list(next(sequences))) for piece in pieces] for pieces in unfolded]


def _assembled(
    batch: Sequence[Dialogue],
    rendered: Sequence[Sequence[Excerpt]],
    renderer: Renderer,
    recipe: Recipe,
    teacher: TeacherFile | None,
) -> Chunk:
    counts: collections.Counter[str] = collections.Counter()
    named: dict[str, list[str]] = {}
    trees: list[Tree] = []
    ids: list[str | int] = []
    shared_prefix_lengths: list[int] = []
    rows: list[np.ndarray] = []
    for dialogue, pieces in zip(batch, rendered, strict=True):
        counts["dialogues"] += 1
        groups, reason, detail = _fitted(dialogue, pieces, renderer, recipe, counts)
        if groups:
            made = len(trees)
            supervised = weighting.select_supervised(dialogue, groups, recipe.objective)
            built = weighting.build_trees(supervised, recipe.objective)
            for trained, tree in zip(supervised, built, strict=True):
                if tree is None:
                    continue
                counts["turns"] += len(weighting.select_responses(trained))
                trees.append(tree)
                ids.append(dialogue.id)
                shared_prefix_lengths.append(
                    _shared_prefix_length(tree, renderer.encode_shared_prefix(dialogue)) if recipe.share_prefixes else 0
                )
                if teacher is not None:
                    rows.append(teacher_lib.find_rows(teacher, dialogue, tree, trained))
            if made == len(trees):
                _name(counts, named, NO_TARGET, dialogue.name)
        if reason:
            _name(counts, named, reason, dialogue.name + detail)
    columns = trees_to_columns(trees, shared_prefix_lengths)
    if teacher is not None:
        columns["teacher_row"] = np.concatenate([np.zeros(0, np.int64), *rows])
    counts["trees"] += len(trees)
    counts["tokens"] += len(columns["tokens"])
    counts["targets"] += int(columns["targets"].sum())
    counts["branching"] += sum(not (tree.subtree_end == len(tree.tokens)).all() for tree in trees)
    return Chunk(columns, ids, counts, named)


def trees_to_columns(trees: Sequence[Tree], shared_prefix_lengths: Sequence[int]) -> dict[str, np.ndarray]:
    """Returns the columns of trees, end to end; `shared_prefix_lengths` has the leading tokens of each to share."""
    columns = {
        field: np.concatenate([np.zeros(0, kind), *(getattr(tree, field) for tree in trees)])
        for field, kind in TOKEN_COLUMNS.items()
    }
    shared = [_shared_prefix_id(tree.tokens[:count]) for tree, count in zip(trees, shared_prefix_lengths, strict=True)]
    return columns | {
        "size": np.array([len(tree.tokens) for tree in trees], np.int64),
        "targets": np.array([np.count_nonzero(tree.weight > 0) for tree in trees], np.int32),
        "shared_prefix_length": np.array(shared_prefix_lengths, np.int32),
        "shared_prefix_id": np.array(shared, np.int64),
    }


def _fitted(
    dialogue: Dialogue,
    pieces: Sequence[Excerpt],
    renderer: Renderer,
    recipe: Recipe,
    counts: collections.Counter[str],
) -> tuple[list[list[Excerpt]], str, str]:
    """(groups of pieces that fit, a tree each; why they are not the whole dialogue, or empty; more about it)."""
    objective, max_length = recipe.objective, recipe.max_length
    wanted = sum(len(piece.wanted) for piece in pieces)
    fitting = fitting_lib.select_fitting([piece.sequences for piece in pieces], objective, max_length)
    groups = [[piece._replace(sequences=own) for piece, own in zip(pieces, fitting, strict=True)]]
    if all(fitting_lib.is_complete(piece, objective) for piece in groups[0]):
        return groups, "", ""
    if recipe.truncate == "error":
        raise UserError(
            f"{dialogue.name}: has more than max_length = {max_length:,} tokens. Raise max_length, or set truncate to "
            "turns, split or drop."
        )
    if recipe.truncate == "split":
        groups = fitting_lib.split_excerpts(pieces, renderer, objective, max_length)
    kept = sum(len(piece.responses) for group in groups for piece in group)
    if recipe.truncate == "drop" or not kept:
        counts["turns cut"] += wanted
        detail = "" if kept else f", no turn of which fits {max_length:,} tokens with what leads to it"
        return [], TOO_LONG, detail
    counts["turns cut"] += wanted - kept
    return groups, "split" if len(groups) > 1 else "shortened", ""


def _name(counts: collections.Counter[str], named: dict[str, list[str]], reason: str, name: str) -> None:
    counts[reason] += 1
    own = named.setdefault(reason, [])
    if len(own) < _NAMES_KEPT:
        own.append(name)


def _shared_prefix_length(tree: Tree, prefix: Int32[np.ndarray, " n"]) -> int:
    """How many tokens a tree begins with as `prefix` does, before anything branches."""
    branches = np.flatnonzero(tree.subtree_end != len(tree.tokens))
    path = int(branches[0]) if len(branches) else len(tree.tokens)
    return min(prefix_tree.common_prefix_length(tree.tokens, prefix), path)


def _shared_prefix_id(prefix: Int32[np.ndarray, " n"]) -> int:
    """A number in [0, 2^63) that no other prefix is likely to have, so that none is remembered; -1 of none."""
    if not len(prefix):
        return -1
    return int.from_bytes(hashlib.blake2b(prefix.astype("<i4").tobytes(), digest_size=8).digest(), "little") >> 1
