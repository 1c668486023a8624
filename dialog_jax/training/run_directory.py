"""The directory of a run: which run it belongs to, and what an export needs besides the parameters.

output_dir/
  config.json        the config; a directory belongs to one config
  inputs.json        hashes of model and data, which must not change before the run is finished
  changes.jsonl      later changes of both, made with --allow_changes
  lock               held by the process that trains here
  model.json         the shape of the model, what of it is trained, and what else an export needs
  scales.safetensors those of LoRA, by the path of the matrix
  licences/          those of the base model
  tokenizer/         with its chat template
  trees/             prepared data; trees/*/report.json names the dialogues that were shortened or dropped
  skipped.txt        errors of the records that data.on_error=skip left out, all of them
  checkpoints/       train states, orbax
  damaged/           checkpoints that could not be read
  metrics.jsonl      one line per update
  evaluation.jsonl   held-out figures, one line per evaluation; step 0 is before training
  sessions.jsonl     one line per process that trained here: its start, versions and devices
  trackers.json      ids of the run at Weights & Biases and Trackio
  tensorboard/       the figures for TensorBoard
  wandb/             what the library of Weights & Biases keeps, or all figures if it is offline
"""

import contextlib
import dataclasses
import fcntl
import itertools
import json
import os
import pathlib
import shutil
import socket
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import safetensors.numpy
import transformers

from dialog_jax import atomic_files
from dialog_jax.errors import UserError
from dialog_jax.formats import tokenizer_files
from dialog_jax.model import hf_config
from dialog_jax.model.decoder_config import DecoderConfig
from dialog_jax.model.soft_prompt_config import SoftPromptConfig
from dialog_jax.training import config_fields, trainable
from dialog_jax.training.config import TrainConfig, set_template_time
from dialog_jax.training.trainable import Selection

SCALES = "scales.safetensors"
_BEFORE_A_CLAIM = {"licences", "trees", "skipped.txt", "tokenizer", "model.json", SCALES, "inputs.json", "lock"}
# Fields that may differ when a run is resumed.
_MAY_CHANGE = (
    "mesh.",
    "data.cache_dir",
    "data.workers",
    "keep_checkpoints",
    "max_bad_steps",
    "trackers",
    "compute_dtype",
)
_BY_CONTENT = (
    "model",
    "adapter",
    "tokenizer",
    "data.train",
    "data.validation",
    "data.teacher",
    "data.weights",
)  # their content is in the hashes


class BaseModel(NamedTuple):
    """What an export repeats of the model that a run began with."""

    hub_name: str = ""
    """Its name on the Hub; empty if it was a local file or directory."""
    dtype: str = "float32"
    """Type of its weights."""
    generation: Mapping[str, Any] = {}
    """The fields of its generation_config.json."""
    licence: Mapping[str, str] = {}
    """What its model card says of the licence: `license`, `license_name`, `license_link`."""
    licences: Sequence[pathlib.Path] = ()
    """Its licence files."""
    added_rows: int = 0
    """Rows of the embedding that the run has added at its end."""
    wrapped: bool = False
    """Whether it is a part of a model that also reads images."""


class RunModel(NamedTuple):
    """The model that a run trains."""

    decoder: DecoderConfig
    stop_tokens: list[int]
    """Ids of the tokens at which a reply ends."""
    base: BaseModel
    selection: Selection
    """Which of its parameters the run trains."""


def _describe_config(config: TrainConfig) -> dict[str, Any]:
    """Returns the config as JSON values; of absolute paths only the last part, because the file may be shared."""

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
    """Returns {path of a field: value}, with the values of config.json. All processes of a run have the same."""
    return _flatten(_describe_config(config))


def check_directory(directory: pathlib.Path) -> None:
    """Raises UserError if the directory holds files that are not of a run."""
    if directory.exists() and not directory.is_dir():
        raise UserError(f"{directory.name} is a file. Choose another --output_dir.")
    if (directory / "config.json").exists() or not directory.exists():
        return
    # Trees are prepared before the directory is claimed, because that finds errors in the data.
    names = {file.name.removeprefix(atomic_files.UNFINISHED) for file in directory.iterdir()}
    if names - _BEFORE_A_CLAIM - {"config.json"}:
        raise UserError(
            f"{directory.name} is not empty and holds no run (no config.json). Choose another --output_dir."
        )


@contextlib.contextmanager
def lock(directory: pathlib.Path) -> Iterator[None]:
    """Creates the directory and keeps other processes from training in it until this process ends, for any reason.

    Raises:
      UserError: another process trains there, or the directory cannot be written.
    """
    try:
        directory.mkdir(parents=True, exist_ok=True)
        file = (directory / "lock").open("a+", encoding="utf-8")
    except OSError as error:
        raise UserError(
            f"{directory.name} cannot be written ({error.strerror}). Choose another --output_dir, or change its "
            "permissions."
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


def keep_template_time(directory: pathlib.Path, config: TrainConfig) -> TrainConfig:
    """Returns the config with the data.template_time of the run in the directory, unless `config` has its own."""
    if config.data.template_time or not (directory / "config.json").exists():
        return config
    before = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    return set_template_time(config, before["data"].get("template_time", ""))


def find_config_changes(directory: pathlib.Path, config: TrainConfig) -> list[str]:
    """Returns how `config` differs from that of the run in the directory: ["seed: 0 before, 1 now"].

    Leaves out fields that determine only where and how fast a run continues.
    """
    if not (directory / "config.json").exists():
        return []
    before = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    old, new = _flatten(before), _flatten(_describe_config(config))
    return [
        f"{key}: {old.get(key)!r} before, {new.get(key)!r} now"
        for key in sorted(old.keys() | new.keys())
        if old.get(key) != new.get(key) and not key.startswith(_MAY_CHANGE) and key not in _BY_CONTENT
    ]


def find_input_changes(directory: pathlib.Path, inputs: Mapping[str, Any]) -> list[str]:
    """Returns how `inputs` differ from those of the run in the directory: ["data.train: 1f... before, 9a... now"]."""
    before = read_hashes(directory)
    return [
        f"{name}: {before.get(name)} before, {inputs.get(name)} now"
        for name in dict.fromkeys([*inputs, *before])
        if before and before.get(name) != inputs.get(name)
    ]


def read_hashes(directory: pathlib.Path) -> dict[str, Any]:
    """Returns the content of inputs.json; empty if the directory holds no run yet."""
    if not (directory / "config.json").exists():  # the last file of a claim: without it there is no run yet
        return {}
    return json.loads((directory / "inputs.json").read_text(encoding="utf-8"))


def claim(
    directory: pathlib.Path,
    config: TrainConfig,
    inputs: Mapping[str, Any],
    model: DecoderConfig,
    tokenizer: transformers.PreTrainedTokenizerFast,
    *,
    stop_tokens: Collection[int],
    base: BaseModel = BaseModel(),  # noqa: B008  (immutable)
    selection: Selection | None = None,
    changes: Sequence[str] = (),
) -> None:
    """Claims the directory for a config: writes what an export needs, the inputs' hashes and, last, the config.

    Args:
      selection: which parameters are trained; None for all.
      changes: allowed differences from the run in the directory; appended to changes.jsonl.
    """
    if changes:
        with (directory / "changes.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps({"changes": list(changes)}) + "\n")
    if changes or not (directory / "config.json").exists():
        directory.mkdir(parents=True, exist_ok=True)
        tokenizer_files.save_tokenizer(tokenizer, directory / "tokenizer")
        # Beside a tokenizer, this file says where responses end; an export has the same.
        stops = json.dumps({"eos_token_id": sorted(stop_tokens)}) + "\n"
        atomic_files.write_text(directory / "tokenizer" / "generation_config.json", stops)
        (directory / "licences").mkdir(exist_ok=True)
        for licence in base.licences:
            shutil.copyfile(licence, directory / "licences" / licence.name)
        selection = selection or trainable.select_all(model)
        (directory / SCALES).unlink(missing_ok=True)  # of a run that trained other parameters before
        if selection.scales:
            with atomic_files.replace(directory / SCALES) as unfinished:
                safetensors.numpy.save_file(dict(selection.scales), unfinished)
        record = {
            "decoder": hf_config.to_json(model),
            "trained": sorted(selection.trained_paths),
            "soft_prompt": selection.soft_prompt.tokens,
            "stop_tokens": sorted(stop_tokens),
            "base": {**base._asdict(), "licences": [file.name for file in base.licences]},
        }
        atomic_files.write_text(directory / "model.json", json.dumps(record, indent=1) + "\n")
        atomic_files.write_text(directory / "inputs.json", json.dumps(inputs, indent=1) + "\n")
        atomic_files.write_text(directory / "config.json", json.dumps(_describe_config(config), indent=1) + "\n")


def move_damaged_checkpoint(directory: pathlib.Path, step: int) -> str:
    """Moves the checkpoint of a step to damaged/; returns its new path within the run's directory."""
    (directory / "damaged").mkdir(exist_ok=True)
    names = (f"{step}{suffix}" for suffix in itertools.chain([""], (f"-{number}" for number in itertools.count(2))))
    place = next(directory / "damaged" / name for name in names if not (directory / "damaged" / name).exists())
    (directory / "checkpoints" / str(step)).rename(place)
    return str(place.relative_to(directory))


def _flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, Mapping) and value:
            flat |= _flatten(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return flat


def read_model(directory: pathlib.Path) -> RunModel:
    """Returns the model that a run trains.

    Raises:
      UserError: there is no run in the directory.
    """
    file = directory / "model.json"
    if not file.exists():
        raise UserError(f"{directory} holds no run: model.json is missing. Name the --output_dir of dialog_jax train.")
    record = json.loads(file.read_text(encoding="utf-8"))
    base = record["base"] | {"licences": [directory / "licences" / name for name in record["base"]["licences"]]}
    model = hf_config.from_json(file, record["decoder"])
    selection = trainable.select_all(model)
    if "trained" in record:
        file = directory / SCALES
        scales = safetensors.numpy.load_file(file) if file.exists() else {}
        selection = selection._replace(
            trained_paths=frozenset(record["trained"]),
            scales=scales,
            soft_prompt=SoftPromptConfig(tokens=record["soft_prompt"]),
        )
    return RunModel(model, record["stop_tokens"], BaseModel(**base), selection)


def read_config(directory: pathlib.Path) -> TrainConfig:
    """Returns the config of the run in a directory; of absolute paths it has only the last part."""
    fields = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    return config_fields.build(TrainConfig, fields, f"{directory.name}/config.json")


def is_run(path: pathlib.Path) -> bool:
    """Returns whether a directory holds a run."""
    return (path / "model.json").is_file()
