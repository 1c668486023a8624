"""Short dialogues as files, and runs on them that are made once: what exists in a directory of runs stays as it is.

In: files of dialogues, a config. Out: files of their first turns, and the directory of a finished run. Does not know
what is compared.
"""

import contextlib
import json
import pathlib
import random
from collections.abc import Mapping, Sequence
from typing import Any

import rich.console
from report import Options

from dialog_jax import atomic_files
from dialog_jax.errors import UserError
from dialog_jax.inference.loading import Model
from dialog_jax.training import compilation_cache, run_directory, trained_models
from dialog_jax.training import run as run_lib
from dialog_jax.training.config import TrainConfig

MESSAGES = 6  # of a dialogue: three responses
_CHARACTERS = 600  # of a dialogue, about 200 tokens with the template's


def read_short(path: str, *, first: int, count: int) -> list[dict[str, Any]]:
    """Returns the beginnings of dialogues of a .jsonl file, of `MESSAGES` messages each.

    Dialogues that are shorter, or of which the beginning is long, are left out; the others are in an order that depends
    on the file only.

    Args:
      first: how many of them to leave out, which another call has taken.

    Raises:
      UserError: there are too few.
    """
    records = read_lines(pathlib.Path(path))
    beginnings = [
        {"id": record["id"], "messages": record["messages"][:MESSAGES]}
        for record in records
        if len(record["messages"]) >= MESSAGES
        and sum(len(message["content"]) for message in record["messages"][:MESSAGES]) <= _CHARACTERS
    ]
    random.Random(0).shuffle(beginnings)
    if len(beginnings) < first + count:
        raise UserError(
            f"{path}: has {len(beginnings):,} dialogues of {MESSAGES} messages and at most {_CHARACTERS} characters; "
            f"needed {first + count:,}."
        )
    return beginnings[first : first + count]


def claim_directory(options: Options, settings: Mapping[str, Any]) -> None:
    """Creates the directory of an experiment's runs if it is missing, and checks that it holds no others.

    Args:
      settings: what the runs depend on besides model and data, as JSON has it.

    Raises:
      UserError: the directory has runs with another model, other data or other settings.
    """
    directory = pathlib.Path(options.runs_dir)
    file = directory / "settings.json"
    names = {field: getattr(options, field) for field in ("model", "train", "validation")}
    text = json.dumps({**names, **settings})
    if not file.exists():
        directory.mkdir(parents=True, exist_ok=True)
        atomic_files.write_text(file, text)
    elif file.read_text(encoding="utf-8") != text:
        raise UserError(f"{file}: the runs there do not have the settings {text}. Name another --runs_dir.")


def write_lines(file: pathlib.Path, records: Sequence[Mapping[str, Any]]) -> None:
    """Writes records as lines of JSON."""
    file.parent.mkdir(parents=True, exist_ok=True)
    atomic_files.write_text(file, "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records))


def read_lines(file: pathlib.Path) -> list[dict[str, Any]]:
    """Returns the records of a .jsonl file."""
    with file.open(encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


def train(config: TrainConfig, directory: pathlib.Path) -> None:
    """Trains, or continues the run in `directory`; its output goes to a file beside it.

    Raises:
      UserError: what `run.run` raises.
    """
    directory.parent.mkdir(parents=True, exist_ok=True)
    compilation_cache.enable(print)
    with contextlib.closing(directory.with_name(f"{directory.name}.log").open("a", encoding="utf-8")) as log:
        run_lib.run(config, directory, console=rich.console.Console(file=log, width=120))


def load_trained(directory: pathlib.Path, base: Model) -> Model:
    """Returns the model of the last checkpoint of a run that began with `base`."""
    model = run_directory.read_model(directory)
    step = trained_models.choose_checkpoint(directory, "latest").step
    trained = trained_models.read_trained(directory, model, step)
    return base._replace(parameters=trained_models.assemble(model, trained, base.path))
