"""Which dialogues a config names: its training sets, and those that are held out. Imports no JAX."""

import dataclasses
import os
from collections.abc import Iterator

from dialog_jax.dialogues.dialogue import Dialogue
from dialog_jax.dialogues.holdout import is_held_out
from dialog_jax.dialogues.parsing import read_dialogues
from dialog_jax.errors import UserError
from dialog_jax.training.config import TrainConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class Source:
    """Files or hub data sets, or one side of the division into training and held-out dialogues."""

    paths: tuple[str, ...]
    split: str
    """Of hub data sets."""
    share: float = 0.0
    """Of the dialogues that is held out; 0 if the sources are not divided."""
    held_out: bool = False
    """Which side of the division this is."""

    @property
    def name(self) -> str:
        """As messages call it: `my.jsonl`, `5% of my.jsonl` for the held-out side."""
        files = ", ".join(os.path.basename(path) for path in self.paths)
        return f"{self.share:.3g} of {files}" if self.held_out else files

    def selects(self, dialogue: Dialogue) -> bool:
        """Whether a dialogue of the sources is on this side."""
        return not self.share or is_held_out(dialogue, self.share) == self.held_out

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
        if count and not selected:
            raise UserError(
                f"data.validation is empty and data.validation_share is {self.share}, which leaves none of the "
                f"{count:,} dialogues of {self.name} {'to hold out' if self.held_out else 'to train on'}. Change "
                "data.validation_share, or give data.validation."
            )


def training_sources(config: TrainConfig) -> dict[str, Source]:
    """Returns what a run trains on, by the config's field: `data.train`, or `data.mix.NAME` of each set."""
    share = 0.0 if config.data.validation else config.data.validation_share
    return {
        field: Source(paths=(path,), split=config.data.train_split, share=share)
        for field, path in _training_paths(config).items()
    }


def validation_source(config: TrainConfig) -> Source:
    """Returns what a run evaluates on: data.validation, or a share of what data.train or data.mix names."""
    if config.data.validation:
        return Source(paths=(config.data.validation,), split=config.data.validation_split)
    return Source(
        paths=tuple(_training_paths(config).values()),
        split=config.data.train_split,
        share=config.data.validation_share,
        held_out=True,
    )


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
