"""Which dialogues a config names: its training sets, and those that are held out. Imports no JAX."""

import dataclasses
import functools
import os
from collections.abc import Iterator, Sequence

from dialog_jax.audit import inspection
from dialog_jax.dialogues import holdout
from dialog_jax.dialogues.dialogue import Dialogue
from dialog_jax.dialogues.parsing import read_dialogues
from dialog_jax.errors import UserError
from dialog_jax.training.config import TrainConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class Division:
    """The division of the training data into dialogues to train on and held-out ones."""

    paths: tuple[str, ...]
    """All of the training data."""
    split: str
    share: float
    """Of the dialogues that is held out."""

    @functools.cached_property
    def limit(self) -> int:
        """Dialogues whose hash is below it are held out (`holdout.find_limit`); found by reading the first dialogues.

        Raises:
          UserError: all dialogues are equal, or the data cannot be read.
        """
        try:
            dialogues = (record for record in self._iterate_records() if isinstance(record, Dialogue))
            return holdout.find_limit(dialogues, self.share)
        except UserError as error:
            for record in self._iterate_records():  # a record that is no dialogue is the better explanation
                if isinstance(record, UserError):
                    raise record from None
            raise UserError(f"{_join_names(self.paths)}: data.validation is empty, and {error}") from None

    def _iterate_records(self) -> Iterator[Dialogue | UserError]:
        for path in self.paths:
            yield from inspection.iterate_dialogues(path, split=self.split)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Source:
    """Files or hub data sets, or one side of the division into training and held-out dialogues."""

    paths: tuple[str, ...]
    split: str
    """The split of hub data sets; files have none."""
    division: Division | None = None
    """None if all dialogues of the sources are read."""
    held_out: bool = False
    """Whether this is the held-out side."""

    @property
    def name(self) -> str:
        """The name in messages: `my.jsonl`, or `5% of my.jsonl` for the held-out side."""
        files = _join_names(self.paths)
        return f"{100 * self.division.share:.3g}% of {files}" if self.division and self.held_out else files

    def selects(self, dialogue: Dialogue) -> bool:
        """Returns whether a dialogue of the sources is on this side."""
        if self.division is None:
            return True
        return (holdout.hash_dialogue(dialogue) < self.division.limit) == self.held_out

    def read(self) -> Iterator[Dialogue]:
        """Yields the dialogues of this side.

        Raises:
          UserError: what `read_dialogues` raises, or none of the dialogues is on this side.
        """
        count, selected = 0, 0
        for path in self.paths:
            for dialogue in read_dialogues(path, split=self.split):
                count += 1
                if self.selects(dialogue):
                    selected += 1
                    yield dialogue
        if count and not selected:  # of one set of a mixture; the division as a whole has dialogues on both sides
            raise UserError(
                f"{self.name}: data.validation is empty, and the share that is held out in its place takes all of the "
                f"{count:,} dialogues of this set. Lower data.validation_share, or give data.validation."
            )


def training_sources(config: TrainConfig) -> dict[str, Source]:
    """Returns what a run trains on, by the config's field: `data.train`, or `data.mix.NAME` of each set."""
    division = None if config.data.validation else _make_division(config)
    return {
        field: Source(paths=(path,), split=config.data.train_split, division=division)
        for field, path in _training_paths(config).items()
    }


def validation_source(config: TrainConfig) -> Source:
    """Returns what a run evaluates on: data.validation, or a share of what data.train or data.mix names."""
    if config.data.validation:
        return Source(paths=(config.data.validation,), split=config.data.validation_split)
    division = _make_division(config)
    return Source(paths=division.paths, split=division.split, division=division, held_out=True)


def find_source(config: TrainConfig, name: str) -> Source:
    """Returns the source that a command looks at: all of `train` or of a set in data.mix, or `validation`.

    Raises:
      UserError: the config has no such source.
    """
    paths = {field.rpartition(".")[2]: path for field, path in _training_paths(config).items()}
    if name == "validation" and (config.data.validation or paths):
        return validation_source(config)
    if not paths:
        raise UserError("data.train is empty. Name a file or hub data set: --config.data.train=...")
    if name not in paths:
        raise UserError(f"--data={name}: the config names no such data; it names {', '.join(paths)} and validation.")
    return Source(paths=(paths[name],), split=config.data.train_split)


def _training_paths(config: TrainConfig) -> dict[str, str]:
    if config.data.mix:
        return {f"data.mix.{name}": entry["train"] for name, entry in config.data.mix.items()}
    return {"data.train": config.data.train} if config.data.train else {}


def _make_division(config: TrainConfig) -> Division:
    return Division(
        paths=tuple(_training_paths(config).values()),
        split=config.data.train_split,
        share=config.data.validation_share,
    )


def _join_names(paths: Sequence[str]) -> str:
    return ", ".join(os.path.basename(path) for path in paths)
