"""Flags that several commands share, and what the config says about the model that they load. Imports no JAX."""

import dataclasses
import json
import pathlib
from typing import Any

from absl import flags

from dialog_jax.commands import config_flag, entry
from dialog_jax.errors import UserError
from dialog_jax.training import config_renderer
from dialog_jax.training.config import TrainConfig


def define_data() -> flags.FlagHolder[str]:
    """Defines --data, for `data_sources.find_source`."""
    return flags.DEFINE_string(
        "data",
        "train",
        "Which data of the config: train (all of data.train), validation (data.validation, or the share that is held "
        "out), or the name of a set in data.mix.",
    )


def define_adapter() -> flags.FlagHolder[str]:
    """Defines --adapter, for `read_config`."""
    return flags.DEFINE_string("adapter", "", "An adapter for the model: short for --config.adapter.")


def define_base() -> flags.FlagHolder[str]:
    """Defines --base, for `trained_models.load_model`."""
    return flags.DEFINE_string(
        "base",
        "",
        "With a run that has trained a part of its model: the model that it began with, if it is not where the run's "
        "config.json says.",
    )


def read_config(config: flags.FlagHolder, adapter: flags.FlagHolder[str]) -> TrainConfig:
    """Returns the config, with the adapter that --adapter names.

    Raises:
      UserError: a value is not valid, or the config names another adapter.
    """
    values = config_flag.read(config)
    if adapter.value and values.adapter not in ("", adapter.value):
        raise UserError(f"--adapter is {adapter.value} and config.adapter is {values.adapter}. Name one of the two.")
    return dataclasses.replace(values, adapter=adapter.value) if adapter.value else values


def model_options(config: TrainConfig) -> dict[str, Any]:
    """Returns the fields of the config that determine how a model is opened, as arguments of `load_model`."""
    return {
        "adapter": config.adapter,
        "tokenizer": config.tokenizer,
        "resize_embedding": config.resize_embedding,
        "row_length": config.data.max_length,
        "report": entry.print_message,
        **config_renderer.renderer_options(config),
    }


def read_embedding_rows(model: str) -> int | None:
    """Returns the number of rows that config.json of a local model says its embedding has; None if it says nothing."""
    file = pathlib.Path(model).expanduser() / "config.json"
    if not model or not file.is_file():
        return None
    try:
        fields = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{file} cannot be read as JSON: {error}. Download or save the model again.") from None
    rows = fields.get("vocab_size", (fields.get("text_config") or {}).get("vocab_size"))
    return rows if isinstance(rows, int) else None
