"""The directory of a run: whose it is, and what an export needs beside the parameters.

output_dir/
  config.json        what was asked for; a directory serves one config only
  inputs.json        hashes of model and data, which must not change while a run goes on
  model.json         the shape of the model, and the tokens at which a reply ends
  tokenizer/         with its chat template
  trees/             prepared data
  checkpoints/       train states, orbax
  metrics.jsonl      a line an update
  evaluation.jsonl   held-out figures, a line an evaluation; step 0 is before training
  tensorboard/       the same for TensorBoard
"""

import dataclasses
import json
import os
import pathlib
from collections.abc import Collection, Mapping
from typing import Any

import transformers

from dialog_jax.model.attention import Llama3Scaling
from dialog_jax.model.decoder import DecoderConfig
from dialog_jax.training.config import TrainConfig


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


def check(directory: pathlib.Path, config: TrainConfig) -> None:
    """Raises ValueError if the directory holds another run, or files that are no run's."""
    if (directory / "config.json").exists():
        before = json.loads((directory / "config.json").read_text(encoding="utf-8"))
        old, new = _flat(before), _flat(_described(config))
        differences = [
            f"{key}: {old.get(key)!r} there, {new.get(key)!r} asked for"
            for key in sorted(old.keys() | new.keys())
            if old.get(key) != new.get(key)
        ]
        if differences:
            raise ValueError(
                f"{directory.name} belongs to a run with another config ({'; '.join(differences)}). Choose another "
                "--output_dir, or remove this one."
            )
    # Trees are prepared before the directory is claimed, since that is when errors in the data are found.
    elif directory.exists() and not directory.is_dir():
        raise ValueError(f"{directory.name} is a file. Choose another --output_dir.")
    elif directory.exists() and any(
        file.name not in ("trees", "tokenizer", "model.json", "inputs.json") for file in directory.iterdir()
    ):
        raise ValueError(
            f"{directory.name} is not empty and holds no run (no config.json). Choose another --output_dir."
        )


def check_inputs(directory: pathlib.Path, inputs: Mapping[str, Any]) -> None:
    """Raises ValueError if the run began with other inputs: hashes of model and data, and the number of steps."""
    if (directory / "config.json").exists():  # the last file of a claim: without it there is no run yet
        before = json.loads((directory / "inputs.json").read_text(encoding="utf-8"))
        changed = [name for name, value in inputs.items() if before.get(name) != value]
        if changed:
            raise ValueError(
                f"{directory.name} began with another content of {', '.join(changed)}, so going on would not give the "
                "same run. Put back what it began with, or choose another --output_dir."
            )


def claim(
    directory: pathlib.Path,
    config: TrainConfig,
    inputs: Mapping[str, Any],
    model: DecoderConfig,
    tokenizer: transformers.PreTrainedTokenizerFast,
    *,
    stop_tokens: Collection[int],
) -> None:
    """Makes the directory this config's own: writes what an export needs, the inputs' hashes and, last, the config."""
    if not (directory / "config.json").exists():
        directory.mkdir(parents=True, exist_ok=True)
        tokenizer.save_pretrained(str(directory / "tokenizer"))
        fields = {"decoder": dataclasses.asdict(model), "stop_tokens": sorted(stop_tokens)}
        write_whole(directory / "model.json", json.dumps(fields, indent=1) + "\n")
        write_whole(directory / "inputs.json", json.dumps(inputs, indent=1) + "\n")
        write_whole(directory / "config.json", json.dumps(_described(config), indent=1) + "\n")


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
      ValueError: there is no run in the directory.
    """
    file = directory / "model.json"
    if not file.exists():
        raise ValueError(f"{directory} holds no run: model.json is missing. Name the --output_dir of scripts/train.py.")
    read = json.loads(file.read_text(encoding="utf-8"))
    fields = read["decoder"]
    if fields["rope_scaling"] is not None:
        fields["rope_scaling"] = Llama3Scaling(**fields["rope_scaling"])
    return DecoderConfig(**fields), read["stop_tokens"]


def write_whole(file: pathlib.Path, text: str) -> None:
    """Writes a file that is either whole or not there."""
    unfinished = file.with_name(file.name + ".unfinished")
    unfinished.write_text(text, encoding="utf-8")
    unfinished.replace(file)
