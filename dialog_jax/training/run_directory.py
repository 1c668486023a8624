"""The directory of a run: whose it is, and what an export needs beside the parameters.

output_dir/
  config.json        what was asked for; a directory serves one config only
  inputs.json        hashes of model and data, which must not change while a run goes on
  changes.jsonl      what of both was changed later, if --allow_changes let it
  lock               held by the process that trains here
  model.json         the shape of the model, and the tokens at which a reply ends
  tokenizer/         with its chat template
  trees/             prepared data
  checkpoints/       train states, orbax
  damaged/           checkpoints that could not be read, moved out of the way
  metrics.jsonl      a line an update
  evaluation.jsonl   held-out figures, a line an evaluation; step 0 is before training
  tensorboard/       the same for TensorBoard
"""

import contextlib
import dataclasses
import fcntl
import itertools
import json
import os
import pathlib
import socket
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

import transformers

from dialog_jax import atomic_files
from dialog_jax.errors import UserError
from dialog_jax.model.decoder import DecoderConfig
from dialog_jax.model.rotary import Llama3Scaling
from dialog_jax.training.config import TrainConfig

_BEFORE_A_CLAIM = {"trees", "tokenizer", "model.json", "inputs.json", "lock"}
_UNFINISHED = ".unfinished"  # ends the name of what is not yet whole
# Fields that may differ when a run goes on.
_FREE = ("mesh.", "data.cache_dir", "data.workers", "keep_checkpoints", "max_bad_steps", "compute_dtype")
_BY_CONTENT = ("model", "tokenizer", "data.train", "data.validation", "data.teacher")  # what they name is in the hashes


def _described(config: TrainConfig) -> dict[str, Any]:
    """The config as JSON values; absolute paths are given by their last part, since the file may be shared."""

    def plain(value: Any) -> Any:
        if isinstance(value, Mapping):
            return {key: plain(entry) for key, entry in value.items()}
        if isinstance(value, list | tuple):
            return [plain(entry) for entry in value]
        if isinstance(value, str) and os.path.isabs(value):
            return os.path.basename(value.rstrip(os.sep))
        return value

    return plain(dataclasses.asdict(config))


def flatten_config(config: TrainConfig) -> dict[str, Any]:
    """The config's fields by their paths, as `config.json` has them: what all processes of a run agree on."""
    return _flat(_described(config))


def check_directory(directory: pathlib.Path) -> None:
    """Raises UserError if the directory holds files that are no run's."""
    if directory.exists() and not directory.is_dir():
        raise UserError(f"{directory.name} is a file. Choose another --output_dir.")
    if (directory / "config.json").exists() or not directory.exists():
        return
    # Trees are prepared before the directory is claimed, since that is when errors in the data are found.
    names = {file.name.removesuffix(_UNFINISHED) for file in directory.iterdir()}
    if names - _BEFORE_A_CLAIM - {"config.json"}:
        raise UserError(
            f"{directory.name} is not empty and holds no run (no config.json). Choose another --output_dir."
        )


@contextlib.contextmanager
def lock(directory: pathlib.Path) -> Iterator[None]:
    """Makes the directory and keeps other processes from training in it; however this one ends, the lock ends with it.

    Raises:
      UserError: another process trains there, or the directory cannot be written.
    """
    try:
        directory.mkdir(parents=True, exist_ok=True)
        file = (directory / "lock").open("a+", encoding="utf-8")
    except OSError as error:
        raise UserError(
            f"{directory.name} cannot be written ({error.strerror}). Choose another --output_dir, or ask for the right "
            "to write there."
        ) from error
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            raise UserError(
                f"{directory.name} is in use: {file.read().strip() or 'another process'} trains there. Wait for it, or "
                "choose another --output_dir."
            ) from None
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        file.flush()
        yield


def find_config_changes(directory: pathlib.Path, config: TrainConfig) -> list[str]:
    """Returns how the run in the directory was configured otherwise: "seed: 0 there, 1 asked for"; empty if it was not.

    What changes where and how fast a run goes on, but not what it computes, is left out.
    """
    if not (directory / "config.json").exists():
        return []
    before = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    old, new = _flat(before), _flat(_described(config))
    return [
        f"{key}: {old.get(key)!r} there, {new.get(key)!r} asked for"
        for key in sorted(old.keys() | new.keys())
        if old.get(key) != new.get(key) and not key.startswith(_FREE) and key not in _BY_CONTENT
    ]


def find_input_changes(directory: pathlib.Path, inputs: Mapping[str, Any]) -> list[str]:
    """Returns what the run began with otherwise: "data.train: 1f... there, 9a... now"; empty for the same."""
    if not (directory / "config.json").exists():  # the last file of a claim: without it there is no run yet
        return []
    before = json.loads((directory / "inputs.json").read_text(encoding="utf-8"))
    return [
        f"{name}: {before.get(name)} there, {value} now" for name, value in inputs.items() if before.get(name) != value
    ]


def claim(
    directory: pathlib.Path,
    config: TrainConfig,
    inputs: Mapping[str, Any],
    model: DecoderConfig,
    tokenizer: transformers.PreTrainedTokenizerFast,
    *,
    stop_tokens: Collection[int],
    changes: Sequence[str] = (),
) -> None:
    """Makes the directory this config's own: writes what an export needs, the inputs' hashes and, last, the config.

    Args:
      changes: what differs from the run that is there, and was allowed to; noted in changes.jsonl.
    """
    if changes:
        with (directory / "changes.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps({"changes": list(changes)}) + "\n")
    if changes or not (directory / "config.json").exists():
        directory.mkdir(parents=True, exist_ok=True)
        tokenizer.save_pretrained(str(directory / "tokenizer"))
        record = {"decoder": dataclasses.asdict(model), "stop_tokens": sorted(stop_tokens)}
        atomic_files.write_text(directory / "model.json", json.dumps(record, indent=1) + "\n")
        atomic_files.write_text(directory / "inputs.json", json.dumps(inputs, indent=1) + "\n")
        atomic_files.write_text(directory / "config.json", json.dumps(_described(config), indent=1) + "\n")


def move_damaged_checkpoint(directory: pathlib.Path, step: int) -> str:
    """Moves the checkpoint of a step to damaged/, where no run looks; returns its place in the run's directory."""
    (directory / "damaged").mkdir(exist_ok=True)
    names = (f"{step}{suffix}" for suffix in itertools.chain([""], (f"-{number}" for number in itertools.count(2))))
    place = next(directory / "damaged" / name for name in names if not (directory / "damaged" / name).exists())
    (directory / "checkpoints" / str(step)).rename(place)
    return str(place.relative_to(directory))


def _flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, Mapping) and value:
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return flat


def read_model(directory: pathlib.Path) -> tuple[DecoderConfig, list[int]]:
    """(shape of the model that a run trains, ids of the tokens at which a reply ends).

    Raises:
      UserError: there is no run in the directory.
    """
    file = directory / "model.json"
    if not file.exists():
        raise UserError(f"{directory} holds no run: model.json is missing. Name the --output_dir of dialog_jax train.")
    read = json.loads(file.read_text(encoding="utf-8"))
    decoder_fields = read["decoder"]
    if decoder_fields["rope_scaling"] is not None:
        decoder_fields["rope_scaling"] = Llama3Scaling(**decoder_fields["rope_scaling"])
    return DecoderConfig(**decoder_fields), read["stop_tokens"]
