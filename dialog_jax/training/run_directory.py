"""The directory of a run: whose it is, and what an export needs beside the parameters.

output_dir/
  config.json        what was asked for; a directory serves one config only
  decoder.json       the shape of the model
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
from collections.abc import Mapping
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
    elif directory.exists() and any(file.name != "trees" for file in directory.iterdir()):
        raise ValueError(
            f"{directory.name} is not empty and holds no run (no config.json). Choose another --output_dir."
        )


def claim(
    directory: pathlib.Path,
    config: TrainConfig,
    model: DecoderConfig,
    tokenizer: transformers.PreTrainedTokenizerFast,
) -> None:
    """Makes the directory this config's own: writes tokenizer, shape of the model and, last, the config."""
    if not (directory / "config.json").exists():
        directory.mkdir(parents=True, exist_ok=True)
        tokenizer.save_pretrained(str(directory / "tokenizer"))
        write_whole(directory / "decoder.json", json.dumps(dataclasses.asdict(model), indent=1) + "\n")
        write_whole(directory / "config.json", json.dumps(_described(config), indent=1) + "\n")


def _flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, Mapping) and value:
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return flat


def read_model(directory: pathlib.Path) -> DecoderConfig:
    """The shape of the model that a run trains.

    Raises:
      ValueError: there is no run in the directory.
    """
    file = directory / "decoder.json"
    if not file.exists():
        raise ValueError(
            f"{directory} holds no run: decoder.json is missing. Name the --output_dir of scripts/train.py."
        )
    fields = json.loads(file.read_text(encoding="utf-8"))
    if fields["rope_scaling"] is not None:
        fields["rope_scaling"] = Llama3Scaling(**fields["rope_scaling"])
    return DecoderConfig(**fields)


def write_whole(file: pathlib.Path, text: str) -> None:
    """Writes a file that is either whole or not there."""
    unfinished = file.with_name(file.name + ".unfinished")
    unfinished.write_text(text, encoding="utf-8")
    unfinished.replace(file)
