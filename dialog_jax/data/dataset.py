"""Dialogues to stored trees: renders, weighs, cuts to length and builds the tree of each, and counts what it did.

Trees are stored once, end to end in flat arrays; on disk these are memory-mapped `.npy` files in a directory named by a
hash of all that determines them.
"""

import collections
import concurrent.futures
import dataclasses
import functools
import hashlib
import itertools
import json
import os
import pathlib
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float32, Int, Int32, Int64

from dialog_jax.data import supervision, tries, truncation
from dialog_jax.data import teacher as teacher_lib
from dialog_jax.data.dialogues import Dialogue
from dialog_jax.data.objectives import ObjectiveConfig
from dialog_jax.data.rendering import Renderer
from dialog_jax.data.teacher import TeacherFile
from dialog_jax.data.tries import Tree
from dialog_jax.data.truncation import Piece

TRUNCATIONS = ("turns", "drop", "split", "error")
FORMAT = 3  # raise whenever the same input gives other trees
_COLUMNS = (*Tree._fields, "offsets", "preamble")
_RENDERED_TOGETHER = 256  # dialogues
_NAMES_KEPT = 1000  # dialogues named for each reason in a stored report
_NAMES_SHOWN = 3


@dataclasses.dataclass(frozen=True, kw_only=True)
class Report:
    """What became of a set of dialogues. Counts; `named` lists the first dialogues of each reason."""

    dialogues: int
    trees: int
    tokens: int
    targets: int
    turns: int
    """Responses that are trained on."""
    turns_cut: int
    """Responses that were left out because their dialogue is too long."""
    shortened: int
    split: int
    dropped_too_long: int
    dropped_no_target: int
    branching: int
    """Trees with branches: messages with several answers, or history rendered otherwise than it was generated."""
    named: Mapping[str, Sequence[str]]

    def __str__(self) -> str:
        lines = [
            f"{self.dialogues:,} dialogues read, {self.trees:,} trees kept: {self.tokens:,} tokens, "
            f"{self.targets:,} of them targets ({self.targets / max(1, self.tokens):.2%}), in {self.turns:,} turns"
        ]
        if self.branching:
            lines.append(
                f"{self.branching:,} trees branch: a message has several answers, or the template renders history not "
                "as it was generated"
            )
        for reason, count, remedy in (
            ("shortened", self.shortened, "raise max_length, or set truncate to split"),
            ("split", self.split, "raise max_length to keep them whole"),
            ("dropped, too long", self.dropped_too_long, "raise max_length"),
            ("dropped, no target", self.dropped_no_target, "give an assistant message a weight above 0"),
        ):
            if count:
                names = self.named[reason][:_NAMES_SHOWN]
                more = f" and {count - len(names):,} more" if count > len(names) else ""
                lines.append(f"{count:,} {reason}: {'; '.join(names)}{more} ({remedy})")
        if self.turns_cut:
            lines.append(f"{self.turns_cut:,} turns cut with them")
        return "\n".join(lines)


@dataclasses.dataclass(frozen=True)
class Trees:
    """Many trees end to end: tree n is tokens `offsets[n]` to `offsets[n + 1]`."""

    tokens: Int32[np.ndarray, " N"]
    parent: Int32[np.ndarray, " N"]
    position: Int32[np.ndarray, " N"]
    subtree_end: Int32[np.ndarray, " N"]
    weight: Float32[np.ndarray, " N"]
    turn: Int32[np.ndarray, " N"]
    offsets: Int64[np.ndarray, " offsets"]
    preamble: Int32[np.ndarray, " trees"]
    """Tokens at the beginning of each tree that it may share with others in a row; 0 for none."""
    ids: tuple[str | int, ...]
    """The dialogue of each tree."""
    report: Report
    teacher_row: Int64[np.ndarray, " N"] | None = None
    """Of each token that a teacher says something of, its row in `teacher`; else -1."""
    teacher: TeacherFile | None = None

    def __len__(self) -> int:
        return len(self.offsets) - 1

    @functools.cached_property
    def groups(self) -> Int64[np.ndarray, " trees"]:
        """A number for each tree that is the same where the preamble is; -1 for those without one."""
        known: dict[bytes, int] = {}
        groups = np.full(len(self), -1)
        for number in np.flatnonzero(self.preamble).tolist():
            start = int(self.offsets[number])
            preamble = self.tokens[start : start + int(self.preamble[number])].tobytes()
            groups[number] = known.setdefault(preamble, len(known))
        return groups

    def tree(self, number: int) -> Tree:
        """Tree `number`, as views."""
        part = slice(int(self.offsets[number]), int(self.offsets[number + 1]))
        return Tree(*(getattr(self, field)[part] for field in Tree._fields))

    def signal(
        self, number: int, nodes: Int[np.ndarray, " s"]
    ) -> tuple[Int32[np.ndarray, "s N"], Float32[np.ndarray, "s N"]]:
        """(likeliest tokens, their log-probabilities) that the teacher gives for some nodes of tree `number`."""
        assert self.teacher is not None and self.teacher_row is not None
        return teacher_lib.read_rows(self.teacher, self.teacher_row[self.offsets[number] + nodes])

    def sizes(self) -> tuple[Int64[np.ndarray, " trees"], Int64[np.ndarray, " trees"]]:
        """(tokens, targets) of each tree."""
        targets = np.concatenate([[0], np.cumsum(self.weight > 0, dtype=np.int64)])
        return np.diff(self.offsets), np.diff(targets[self.offsets])


def prepare(
    dialogues: Iterable[Dialogue],
    renderer: Renderer,
    *,
    objective: ObjectiveConfig,
    max_length: int,
    truncate: str = "turns",
    share_prefixes: bool = False,
    teacher: TeacherFile | None = None,
) -> Trees:
    """Returns the trees of `dialogues`, in order.

    Args:
      max_length: tokens a tree may have.
      truncate: what becomes of a dialogue whose tree is larger. `turns` keeps its longest prefix that ends with a
        supervised response; `drop` leaves it out; `split` goes on in further trees, each with the system prompt and as
        many of the turns before as fit half of `max_length`; `error` refuses it.
      share_prefixes: let trees of a row that begin with the same system prompt share it.
      teacher: must say something of every response that is trained on.

    Raises:
      ValueError: nothing is left to train on; a dialogue is too long and `truncate` is `error`; the teacher knows
        nothing of a response, or other tokens; what `Renderer.render` raises. Names the dialogue, where it stands and
        what to do.
    """
    if truncate not in TRUNCATIONS:
        raise ValueError(f"truncate is {truncate!r}; it must be one of {', '.join(TRUNCATIONS)}.")
    counts: collections.Counter[str] = collections.Counter()
    named: dict[str, list[str]] = collections.defaultdict(list)
    trees: list[Tree] = []
    rows: list[np.ndarray] = []
    ids: list[str | int] = []
    preambles: list[int] = []

    def name(reason: str, dialogue: Dialogue, detail: str = "") -> None:
        counts[reason] += 1
        if len(named[reason]) < _NAMES_KEPT:
            named[reason].append(dialogue.name + detail)

    def render(batch: Sequence[Dialogue]) -> list[list[Piece]]:
        unfolded = [truncation.unfold(dialogue, objective) for dialogue in batch]
        parts = [piece.dialogue for pieces in unfolded for piece in pieces]
        rendered = iter(renderer.render(parts, limit=max_length, whole=objective.whole, locate=objective.locates))
        return [[piece._replace(sequences=list(next(rendered))) for piece in pieces] for pieces in unfolded]

    for batch, unfolded in _ahead(render, _batched(dialogues, _RENDERED_TOGETHER)):
        for dialogue, pieces in zip(batch, unfolded, strict=True):
            counts["dialogues"] += 1
            wanted = sum(len(piece.wanted) for piece in pieces)
            fitting = truncation.that_fit([piece.sequences for piece in pieces], objective, max_length)
            groups = [[piece._replace(sequences=own) for piece, own in zip(pieces, fitting, strict=True)]]
            if not all(truncation.is_whole(piece, objective) for piece in groups[0]):
                if truncate == "error":
                    raise ValueError(
                        f"{dialogue.name}: has more than max_length = {max_length:,} tokens. Raise max_length, or set "
                        "truncate to turns, split or drop."
                    )
                if truncate == "split":
                    groups = truncation.split_paths(pieces, renderer, objective, max_length)
                kept = sum(len(piece.responses) for group in groups for piece in group)
                if truncate == "drop" or not kept:
                    detail = "" if kept else f", no turn of which fits {max_length:,} tokens with what leads to it"
                    name("dropped, too long", dialogue, detail)
                    counts["turns cut"] += wanted
                    continue
                counts["turns cut"] += wanted - kept
                name("split" if len(groups) > 1 else "shortened", dialogue)
            made = 0
            supervised = supervision.trained(dialogue, groups, objective)
            built = supervision.build_trees(supervised, objective)
            for trained, tree in zip(supervised, built, strict=True):
                if tree is None:
                    continue
                made += 1
                counts["turns"] += len(supervision.responses(trained))
                trees.append(tree)
                ids.append(dialogue.id)
                preambles.append(_shared(tree, renderer.preamble(dialogue)) if share_prefixes else 0)
                if teacher is not None:
                    rows.append(teacher_lib.rows_of_tree(teacher, dialogue, tree, trained))
            if not made:
                name("dropped, no target", dialogue)

    report = _report(trees, counts, named)
    if not trees:
        raise ValueError(
            f"None of {counts['dialogues']:,} dialogues has a target under objective {objective.name!r} within "
            f"{max_length:,} tokens.\n{report}"
        )
    offsets = np.concatenate([[0], np.cumsum([len(tree.tokens) for tree in trees])]).astype(np.int64)
    columns = {field: np.concatenate([getattr(tree, field) for tree in trees]) for field in Tree._fields}
    return Trees(
        **columns,
        offsets=offsets,
        preamble=np.array(preambles, np.int32),
        ids=tuple(ids),
        report=report,
        teacher_row=None if teacher is None else np.concatenate(rows),
        teacher=teacher,
    )


def load_or_prepare(
    cache_directory: str | os.PathLike,
    key: Mapping[str, Any],
    make: Callable[[], Trees],
    teacher: TeacherFile | None = None,
) -> Trees:
    """Returns the stored trees of `key`, made and stored first if they are not there.

    Args:
      cache_directory: holds one directory for each key; made if missing.
      key: all that determines the trees, as JSON values.
      teacher: the file that `make` gives its trees; what it says is not stored twice.
    """
    fields = _COLUMNS if teacher is None else (*_COLUMNS, "teacher_row")
    text = json.dumps({**key, "format": FORMAT}, sort_keys=True)
    directory = pathlib.Path(cache_directory) / hashlib.sha256(text.encode()).hexdigest()[:16]
    if not directory.exists():
        trees = make()
        unfinished = directory.with_name(f"{directory.name}.{os.getpid()}.unfinished")
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir(parents=True)
        for field in fields:
            np.save(unfinished / f"{field}.npy", getattr(trees, field))
        (unfinished / "ids.json").write_text(json.dumps(trees.ids), encoding="utf-8")
        (unfinished / "report.json").write_text(
            json.dumps(dataclasses.asdict(trees.report), indent=1), encoding="utf-8"
        )
        (unfinished / "key.json").write_text(text, encoding="utf-8")
        try:
            unfinished.rename(directory)
        except OSError:
            if not directory.exists():
                raise
            shutil.rmtree(unfinished)  # another process was faster
    columns = {field: np.load(directory / f"{field}.npy", mmap_mode="r") for field in fields}
    ids = tuple(json.loads((directory / "ids.json").read_text(encoding="utf-8")))
    report = Report(**json.loads((directory / "report.json").read_text(encoding="utf-8")))
    return Trees(**columns, ids=ids, report=report, teacher=teacher)


def _batched(dialogues: Iterable[Dialogue], count: int) -> Iterator[list[Dialogue]]:
    iterator = iter(dialogues)
    while batch := list(itertools.islice(iterator, count)):
        yield batch


def _ahead(
    render: Callable[[Sequence[Dialogue]], list[list[Piece]]], batches: Iterable[list[Dialogue]]
) -> Iterator[tuple[list[Dialogue], list[list[Piece]]]]:
    """Yields each batch with what `render` makes of it, in a thread, since the tokenizer leaves Python to others."""
    with concurrent.futures.ThreadPoolExecutor(1) as executor:
        waiting: collections.deque = collections.deque()
        for batch in batches:
            waiting.append((batch, executor.submit(render, batch)))
            if len(waiting) > 1:
                done, rendered = waiting.popleft()
                yield done, rendered.result()
        for done, rendered in waiting:
            yield done, rendered.result()


def _shared(tree: Tree, preamble: Int32[np.ndarray, " n"]) -> int:
    """How many tokens a tree begins with as `preamble` does, before anything branches."""
    branches = np.flatnonzero(tree.subtree_end != len(tree.tokens))
    path = int(branches[0]) if len(branches) else len(tree.tokens)
    return min(tries.common_prefix(tree.tokens, preamble), path)


def _report(trees: Sequence[Tree], counts: Mapping[str, int], named: Mapping[str, list[str]]) -> Report:
    supervised = [tree.weight > 0 for tree in trees]
    return Report(
        dialogues=counts["dialogues"],
        trees=len(trees),
        tokens=sum(len(tree.tokens) for tree in trees),
        targets=int(sum(mask.sum() for mask in supervised)),
        turns=counts["turns"],
        turns_cut=counts["turns cut"],
        shortened=counts["shortened"],
        split=counts["split"],
        dropped_too_long=counts["dropped, too long"],
        dropped_no_target=counts["dropped, no target"],
        branching=sum(not (tree.subtree_end == len(tree.tokens)).all() for tree in trees),
        named=dict(named),
    )
