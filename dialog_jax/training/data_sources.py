"""Which dialogues a config names: its training sets, and those that are held out. Imports no JAX."""

import dataclasses
import functools
import os
from collections.abc import Iterator, Mapping

from dialog_jax.dialogues import holdout, parsing, weight_file
from dialog_jax.dialogues.dialogue import Dialogue
from dialog_jax.errors import UserError
from dialog_jax.training.config import TrainConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class Files:
    """Files or hub data sets, and how they are read."""

    paths: tuple[str, ...]
    split: str
    """The split of hub data sets; files have none."""
    roles: Mapping[str, str] = dataclasses.field(default_factory=dict)
    """As `data.roles`."""
    weights: str = ""
    """As `data.weights`; empty where the weights are those of the data."""

    @property
    def name(self) -> str:
        """The name in messages: `a.jsonl, b.jsonl`."""
        return ", ".join(os.path.basename(path) for path in self.paths)

    def iterate(self) -> Iterator[Dialogue | UserError]:
        """Yields each record as a dialogue or as its error.

        Raises:
          UserError: a file is missing or not of the format of its name, or holds no record; what `WeightFile.apply`
            raises.
        """
        records = self._read_records()
        yield from weight_file.read_file(self.weights).apply(records) if self.weights else records

    def _read_records(self) -> Iterator[Dialogue | UserError]:
        for path in self.paths:
            empty = True
            for record in parsing.iterate_dialogues(path, split=self.split, roles=self.roles):
                empty = False
                yield record
            if empty:
                raise parsing.make_empty_error(os.path.basename(path))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Division:
    """The division of the training data into dialogues to train on and held-out ones."""

    files: Files
    """All of the training data."""
    share: float
    """Of the dialogues that is held out."""

    @functools.cached_property
    def limit(self) -> int:
        """Dialogues whose hash is below it are held out (`holdout.find_limit`); found by reading the first dialogues.

        Raises:
          UserError: all dialogues are equal, or the data cannot be read.
        """
        try:
            dialogues = (record for record in self.files.iterate() if isinstance(record, Dialogue))
            return holdout.find_limit(dialogues, self.share)
        except UserError as error:
            for record in self.files.iterate():  # a record that is no dialogue is the better explanation
                if isinstance(record, UserError):
                    raise record from None
            raise UserError(f"{self.files.name}: data.validation is empty, and {error}") from None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Source:
    """Files, or one side of the division of their dialogues into training and held-out ones."""

    files: Files
    on_error: str = "stop"
    """As `data.on_error`."""
    division: Division | None = None
    """None if all dialogues of the files are read."""
    held_out: bool = False
    """Whether this is the held-out side."""

    @property
    def name(self) -> str:
        """The name in messages: `my.jsonl`, or `5% of my.jsonl` for the held-out side."""
        share = f"{100 * self.division.share:.3g}% of " if self.division and self.held_out else ""
        return share + self.files.name

    def selects(self, record: Dialogue | UserError) -> bool:
        """Returns whether a record of the files is on this side.

        The error of an invalid record stops the reading of both sides; if it is skipped, it is on the training side.
        """
        if self.division is None:
            return True
        if isinstance(record, UserError):
            return self.on_error == "stop" or not self.held_out
        return (holdout.hash_dialogue(record) < self.division.limit) == self.held_out

    def iterate(self) -> Iterator[Dialogue | UserError]:
        """Yields the dialogues of this side, and the errors of invalid records if `on_error` is `skip`.

        Raises:
          UserError: the error of an invalid record if `on_error` is `stop`; what `Files.iterate` raises; or none of the
            dialogues is on this side.
        """
        count, selected = 0, 0
        for record in self.files.iterate():
            if isinstance(record, UserError) and self.on_error == "stop":
                raise record
            is_selected = self.selects(record)
            if isinstance(record, Dialogue):
                count += 1
                selected += is_selected
            if is_selected:
                yield record
        if count and not selected:  # of one set of a mixture; the division as a whole has dialogues on both sides
            raise UserError(
                f"{self.name}: data.validation is empty, and the share that is held out in its place takes all of the "
                f"{count:,} dialogues of this set. Lower data.validation_share, or give data.validation."
            )

    def iterate_records(self) -> Iterator[Dialogue | UserError]:
        """Returns an iterator over the records of this side, each a dialogue or its error, whatever `on_error` is."""
        return filter(self.selects, self.files.iterate())

    def find_dialogue(self, index: int) -> Dialogue:
        """Returns the dialogue of one record.

        Raises:
          UserError: the record is not a dialogue, or the index is out of range.
        """
        count = 0
        for count, record in enumerate(self.iterate_records(), start=1):
            if count > index >= 0:
                if isinstance(record, UserError):
                    raise record
                return record
        raise UserError(f"index {index}: {self.name} has {count:,} records, counted from 0.")

    def read(self, skipped: list[str]) -> Iterator[Dialogue]:
        """Yields the dialogues of this side; appends the errors that `iterate` yields to `skipped`."""
        for record in self.iterate():
            if isinstance(record, UserError):
                skipped.append(str(record))
            else:
                yield record


def training_sources(config: TrainConfig) -> dict[str, Source]:
    """Returns what a run trains on, by the config's field: `data.train`, or `data.mix.NAME` of each set."""
    division = None if config.data.validation else _make_division(config)
    return {
        field: _make_source(config, (path,), config.data.train_split, division, weights=config.data.weights)
        for field, path in _training_paths(config).items()
    }


def validation_source(config: TrainConfig) -> Source:
    """Returns what a run evaluates on: data.validation, or a share of what data.train or data.mix names."""
    if config.data.validation:
        return _make_source(config, (config.data.validation,), config.data.validation_split)
    division = _make_division(config)
    return Source(files=division.files, on_error=config.data.on_error, division=division, held_out=True)


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
        raise UserError(f"data {name!r}: the config names no such data; name one of {', '.join(paths)} or validation.")
    return _make_source(config, (paths[name],), config.data.train_split, weights=config.data.weights)


def _training_paths(config: TrainConfig) -> dict[str, str]:
    if config.data.mix:
        return {f"data.mix.{name}": entry["train"] for name, entry in config.data.mix.items()}
    return {"data.train": config.data.train} if config.data.train else {}


def _make_source(
    config: TrainConfig, paths: tuple[str, ...], split: str, division: Division | None = None, *, weights: str = ""
) -> Source:
    files = Files(paths=paths, split=split, roles=config.data.roles, weights=weights)
    return Source(files=files, on_error=config.data.on_error, division=division)


def _make_division(config: TrainConfig) -> Division:
    paths = tuple(_training_paths(config).values())
    files = Files(paths=paths, split=config.data.train_split, roles=config.data.roles)
    return Division(files=files, share=config.data.validation_share)
