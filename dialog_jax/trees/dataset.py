"""Dialogues to trees: many of them end to end in flat arrays, and a report of what became of the dialogues.

`prepare` makes them in memory; `disk_cache` keeps them in files, for sets of any size.
"""

import collections
import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float32, Int32, Int64

from dialog_jax.dialogues.dialogue import Dialogue
from dialog_jax.errors import UserError
from dialog_jax.rendering import written
from dialog_jax.rendering.sequences import Renderer
from dialog_jax.trees import chunks, dialogue_trees
from dialog_jax.trees.dialogue_trees import TreeConfig
from dialog_jax.trees.prefix_tree import Tree
from dialog_jax.trees.teacher_file import TeacherFile

_NAMES_SHOWN = 3


@dataclasses.dataclass(frozen=True, kw_only=True)
class Report:
    """What became of a set of dialogues: counts, and in `named` the first dialogues or places of each reason."""

    dialogues: int
    skipped: int
    """Records that are left out because they are no valid dialogue, or because the chat template refuses them."""
    trees: int
    tokens: int
    targets: int
    turns: int
    """Responses that are trained on."""
    turns_shortened: int
    """Responses that are trained behind a part of their history, because all of it is too long."""
    turns_cut: int
    """Responses that are left out because they are too long with their history."""
    shortened: int
    """Dialogues with responses that are trained behind a part of their history."""
    cut: int
    """Dialogues with responses that are left out."""
    dropped_too_long: int
    dropped_no_target: int
    divided: int
    """Trees that were larger than a row, and were divided into trees with all of the history of each response."""
    parts: int
    """Trees into which they were divided."""
    parts_needed: int
    """Lower bound on `parts`."""
    repeated: int
    """Tokens of the parts, less those of the divided trees."""
    branching: int
    """Trees with branches: messages with several answers, or history that is rendered differently from how it was
    generated."""
    unwritten: Mapping[str, int]
    """How often the chat template does not write something that a record says, by kind (`written.KINDS`)."""
    named: Mapping[str, Sequence[str]]

    def __str__(self) -> str:
        return self.format()

    def format(self, names_file: str = "", skipped_file: str = "") -> str:
        """Returns the report as lines of text.

        Args:
          names_file: the file that lists the named dialogues; the text points to it. Without one, the text names some.
          skipped_file: the file that lists all skipped records.
        """
        lines = [
            f"{self.dialogues:,} dialogues read, {self.trees:,} trees kept: {self.tokens:,} tokens, "
            f"{self.targets:,} of them targets ({self.targets / max(1, self.tokens):.2%}), in {self.turns:,} turns"
        ]
        if self.branching:
            lines.append(
                f"{self.branching:,} trees branch: a message has several answers, or the template renders history "
                "differently from how it was generated"
            )
        if self.divided:
            lines.append(
                f"{self.divided:,} trees larger than a row, divided into {self.parts:,} (at least "
                f"{self.parts_needed:,} are needed), which repeat {self.repeated:,} tokens of history"
            )
        for reason, count, remedy in (
            (chunks.SKIPPED, self.skipped, "data.on_error is skip"),
            (dialogue_trees.SHORTENED, self.shortened, "raise max_length to keep all of it"),
            (
                dialogue_trees.CUT,
                self.cut,
                "raise max_length; truncate=split leaves out only what no history is short enough for",
            ),
            (dialogue_trees.TOO_LONG, self.dropped_too_long, "raise max_length"),
            (dialogue_trees.NO_TARGET, self.dropped_no_target, "give an assistant message a weight above 0"),
            *((what, self.unwritten[kind], remedy) for kind, (what, remedy) in written.KINDS.items()),
        ):
            file = skipped_file if reason == chunks.SKIPPED else names_file
            if count and file:
                lines.append(f"{count:,} {reason}, listed in {file} ({remedy})")
            elif count:
                names = self.named[reason][:_NAMES_SHOWN]
                more = f" and {count - len(names):,} more" if count > len(names) else ""
                lines.append(f"{count:,} {reason}: {'; '.join(names)}{more} ({remedy})")
        if self.turns_shortened:
            lines.append(f"{self.turns_shortened:,} turns trained with a shortened history")
        if self.turns_cut:
            lines.append(f"{self.turns_cut:,} turns left out")
        return "\n".join(lines)


@dataclasses.dataclass(frozen=True)
class Trees:
    """Many trees end to end: tree n is tokens `offsets[n]` to `offsets[n + 1]`. The arrays may be mapped from files."""

    tokens: Int32[np.ndarray, " N"]
    parent: Int32[np.ndarray, " N"]
    position: Int32[np.ndarray, " N"]
    subtree_end: Int32[np.ndarray, " N"]
    weight: Float32[np.ndarray, " N"]
    turn: Int32[np.ndarray, " N"]
    offsets: Int64[np.ndarray, " offsets"]
    shared_prefix_length: Int32[np.ndarray, " trees"]
    """Number of leading tokens of each tree that it may share with others in a row."""
    ids: Sequence[str | int]
    """The id of each tree's dialogue."""
    report: Report
    targets: Int32[np.ndarray, " trees"]
    """Number of tokens of each tree with a weight above 0."""
    shared_prefix_id: Int64[np.ndarray, " trees"]
    """Equal for trees with the same shared prefix; -1 for trees without one."""
    skipped: Sequence[str] = ()
    """The error of each record that is left out."""
    teacher_row: Int64[np.ndarray, " N"] | None = None
    """Row in `teacher` of each token that it scored; -1 for others."""
    teacher: TeacherFile | None = None

    def __len__(self) -> int:
        return len(self.offsets) - 1

    @property
    def branching(self) -> bool:
        """Whether some tree has branches."""
        return self.report.branching > 0

    def tree(self, number: int) -> Tree:
        """Returns tree `number`, as views."""
        part = slice(int(self.offsets[number]), int(self.offsets[number + 1]))
        return Tree(*(getattr(self, field)[part] for field in Tree._fields))

    def size(self, number: int) -> int:
        """Returns the number of tokens of tree `number`."""
        return int(self.offsets[number + 1] - self.offsets[number])

    def shared_prefix(self, number: int) -> tuple[int, int]:
        """Returns (id, length) of the shared prefix of tree `number`."""
        return int(self.shared_prefix_id[number]), int(self.shared_prefix_length[number])

    def without_shared_prefixes(self) -> "Trees":
        """Returns the same trees, none of which shares a prefix with another in a row."""
        return dataclasses.replace(
            self,
            shared_prefix_length=np.zeros_like(self.shared_prefix_length),
            shared_prefix_id=np.full_like(self.shared_prefix_id, -1),
        )

    def dialogue(self, number: int) -> str:
        """Returns the id of the dialogue of tree `number`."""
        return str(self.ids[number])

    def teacher_rows(self, number: int) -> Int64[np.ndarray, " n"]:
        """Returns for each node of tree `number` its row in `teacher`; -1 where the teacher has none."""
        assert self.teacher_row is not None
        return self.teacher_row[self.offsets[number] : self.offsets[number + 1]]

    def sizes(self) -> tuple[Int64[np.ndarray, " trees"], Int64[np.ndarray, " trees"]]:
        """Returns (number of tokens, number of targets) of each tree."""
        return np.diff(self.offsets), self.targets.astype(np.int64)


def prepare(
    dialogues: Iterable[Dialogue | UserError],
    renderer: Renderer,
    config: TreeConfig,
    *,
    teacher: TeacherFile | None = None,
) -> Trees:
    """Returns the trees of `dialogues`, in order, in memory.

    Args:
      dialogues: among them the errors of records that are skipped.
      teacher: has log-probabilities of every response that is trained on.

    Raises:
      UserError: nothing is left to train on; what `chunks.build_chunk` raises.
    """
    counts: collections.Counter[str] = collections.Counter()
    named: dict[str, list[str]] = {}
    parts: list[chunks.Chunk] = []
    for chunk in chunks.build_chunks(chunks.batch_dialogues(dialogues), renderer, config, teacher):
        chunks.add_counts(counts, named, chunk)
        parts.append(chunk)
    report = make_report(counts, named)
    check_not_empty(report, config)
    columns = {name: np.concatenate([part.columns[name] for part in parts]) for name in parts[0].columns}
    ids = [name for part in parts for name in part.ids]
    return _make_trees(columns, ids, report, teacher, [error for part in parts for error in part.skipped])


def concatenate_trees(
    trees: Sequence[Tree], *, ids: Sequence[str | int] = (), shared_prefix_lengths: Sequence[int] = ()
) -> Trees:
    """Returns trees end to end (see `chunks.trees_to_columns`), with an empty report.

    Args:
      ids: of their dialogues; numbers if omitted.
      shared_prefix_lengths: number of leading tokens of each that it may share with others; 0 if omitted.
    """
    columns = chunks.trees_to_columns(trees, shared_prefix_lengths or [0] * len(trees))
    return _make_trees(columns, ids or range(len(trees)), make_report({}, {}), None)


def check_not_empty(report: Report, config: TreeConfig) -> None:
    """Raises UserError if there is no tree."""
    if not report.trees:
        raise UserError(
            f"None of {report.dialogues:,} dialogues has a target under objective {config.objective.name!r} within "
            f"{config.max_length:,} tokens.\n{report}"
        )


def make_report(counts: Mapping[str, int], named: Mapping[str, Sequence[str]]) -> Report:
    """Returns the report of the counts and names of chunks."""
    fields = [field.name for field in dataclasses.fields(Report) if field.name not in ("named", "unwritten")]
    reasons = {
        "skipped": chunks.SKIPPED,
        "shortened": dialogue_trees.SHORTENED,
        "cut": dialogue_trees.CUT,
        "dropped_too_long": dialogue_trees.TOO_LONG,
        "dropped_no_target": dialogue_trees.NO_TARGET,
    }
    keys = {field: reasons.get(field, field.replace("_", " ")) for field in fields}
    return Report(
        named=dict(named),
        unwritten={kind: counts.get(what, 0) for kind, (what, _) in written.KINDS.items()},
        **{field: counts.get(key, 0) for field, key in keys.items()},
    )


def _make_trees(
    columns: Mapping[str, np.ndarray],
    ids: Sequence[str | int],
    report: Report,
    teacher: TeacherFile | None,
    skipped: Sequence[str] = (),
) -> Trees:
    stored: dict[str, Any] = {name: column for name, column in columns.items() if name != "size"}
    offsets = np.concatenate([[0], np.cumsum(columns["size"])]).astype(np.int64)
    return Trees(**stored, offsets=offsets, ids=tuple(ids), report=report, teacher=teacher, skipped=skipped)
