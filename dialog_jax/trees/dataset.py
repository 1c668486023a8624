"""Dialogues to trees: many of them end to end in flat arrays, and a report of what became of each dialogue.

`prepare` makes them in memory; `data.storage` keeps them in files, for sets of any size.
"""

import collections
import dataclasses
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
from jaxtyping import Float32, Int, Int32, Int64

from dialog_jax.dialogues.dialogue import Dialogue
from dialog_jax.errors import UserError
from dialog_jax.rendering.sequences import Renderer
from dialog_jax.trees import chunks
from dialog_jax.trees import teacher as teacher_lib
from dialog_jax.trees.chunks import Recipe
from dialog_jax.trees.objectives import ObjectiveConfig
from dialog_jax.trees.prefix_tree import Tree
from dialog_jax.trees.teacher import TeacherFile

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
            (chunks.TOO_LONG, self.dropped_too_long, "raise max_length"),
            (chunks.NO_TARGET, self.dropped_no_target, "give an assistant message a weight above 0"),
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
    """Many trees end to end: tree n is tokens `offsets[n]` to `offsets[n + 1]`. The arrays may lie in files."""

    tokens: Int32[np.ndarray, " N"]
    parent: Int32[np.ndarray, " N"]
    position: Int32[np.ndarray, " N"]
    subtree_end: Int32[np.ndarray, " N"]
    weight: Float32[np.ndarray, " N"]
    turn: Int32[np.ndarray, " N"]
    offsets: Int64[np.ndarray, " offsets"]
    shared_prefix_length: Int32[np.ndarray, " trees"]
    """Tokens at the beginning of each tree that it may share with others in a row; 0 for none."""
    ids: Sequence[str | int]
    """The dialogue of each tree."""
    report: Report
    targets: Int32[np.ndarray, " trees"]
    """Tokens of each tree that were given a weight above 0."""
    shared_prefix_id: Int64[np.ndarray, " trees"]
    """A number for each tree that is the same where the shared prefix is; -1 for those without one."""
    teacher_row: Int64[np.ndarray, " N"] | None = None
    """Of each token that a teacher says something of, its row in `teacher`; else -1."""
    teacher: TeacherFile | None = None

    def __len__(self) -> int:
        return len(self.offsets) - 1

    @property
    def branching(self) -> bool:
        """Whether some tree is no path."""
        return self.report.branching > 0

    def tree(self, number: int) -> Tree:
        """Tree `number`, as views."""
        part = slice(int(self.offsets[number]), int(self.offsets[number + 1]))
        return Tree(*(getattr(self, field)[part] for field in Tree._fields))

    def size(self, number: int) -> int:
        """Tokens of tree `number`."""
        return int(self.offsets[number + 1] - self.offsets[number])

    def shared_prefix(self, number: int) -> tuple[int, int]:
        """(id, length) of the shared prefix of tree `number`."""
        return int(self.shared_prefix_id[number]), int(self.shared_prefix_length[number])

    def dialogue(self, number: int) -> str:
        """The dialogue of tree `number`."""
        return str(self.ids[number])

    def signal(
        self, number: int, nodes: Int[np.ndarray, " s"]
    ) -> tuple[Int32[np.ndarray, "s N"], Float32[np.ndarray, "s N"]]:
        """(likeliest tokens, their log-probabilities) that the teacher gives for some nodes of tree `number`."""
        assert self.teacher is not None and self.teacher_row is not None
        return teacher_lib.read_rows(self.teacher, self.teacher_row[self.offsets[number] + nodes])

    def sizes(self) -> tuple[Int64[np.ndarray, " trees"], Int64[np.ndarray, " trees"]]:
        """(tokens, targets) of each tree."""
        return np.diff(self.offsets), self.targets.astype(np.int64)


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
      UserError: nothing is left to train on; a dialogue is too long and `truncate` is `error`; the teacher knows
        nothing of a response, or other tokens; what `Renderer.render` raises. Names the dialogue, where it stands and
        what to do.
    """
    recipe = Recipe(objective=objective, max_length=max_length, truncate=truncate, share_prefixes=share_prefixes)
    counts: collections.Counter[str] = collections.Counter()
    named: dict[str, list[str]] = {}
    parts = []
    for chunk in chunks.build_chunks(chunks.batch_dialogues(dialogues), renderer, recipe, teacher):
        chunks.add_counts(counts, named, chunk)
        parts.append(chunk)
    report = make_report(counts, named)
    check_not_empty(report, recipe)
    columns = {name: np.concatenate([part.columns[name] for part in parts]) for name in parts[0].columns}
    return _trees(columns, [name for part in parts for name in part.ids], report, teacher)


def concatenate_trees(
    trees: Sequence[Tree], *, ids: Sequence[str | int] = (), shared_prefix_lengths: Sequence[int] = ()
) -> Trees:
    """Returns trees that stand in no file, with an empty report.

    Args:
      ids: their dialogues'; numbers if left out.
      shared_prefix_lengths: tokens at the beginning of each that it may share with others; none if left out.
    """
    columns = chunks.trees_to_columns(trees, shared_prefix_lengths or [0] * len(trees))
    return _trees(columns, ids or range(len(trees)), make_report({}, {}), None)


def check_not_empty(report: Report, recipe: Recipe) -> None:
    """Raises UserError if there is no tree."""
    if not report.trees:
        raise UserError(
            f"None of {report.dialogues:,} dialogues has a target under objective {recipe.objective.name!r} within "
            f"{recipe.max_length:,} tokens.\n{report}"
        )


def make_report(counts: Mapping[str, int], named: Mapping[str, Sequence[str]]) -> Report:
    """Returns the report of what chunks have counted."""
    fields = [field.name for field in dataclasses.fields(Report) if field.name != "named"]
    reasons = {"turns_cut": "turns cut", "dropped_too_long": chunks.TOO_LONG, "dropped_no_target": chunks.NO_TARGET}
    return Report(named=dict(named), **{field: counts.get(reasons.get(field, field), 0) for field in fields})


def _trees(
    columns: Mapping[str, np.ndarray], ids: Sequence[str | int], report: Report, teacher: TeacherFile | None
) -> Trees:
    flat = {name: column for name, column in columns.items() if name != "size"}
    offsets = np.concatenate([[0], np.cumsum(columns["size"])]).astype(np.int64)
    return Trees(**flat, offsets=offsets, ids=tuple(ids), report=report, teacher=teacher)
