"""Inputs of a command that the config names: dialogues, and a tokenizer with its chat template. Imports no JAX."""

import dataclasses
import json
import pathlib
from collections.abc import Iterator
from typing import Any

import transformers
from absl import flags

from dialog_jax.commands import config_flag, entry
from dialog_jax.dialogues.dialogue import Dialogue
from dialog_jax.errors import UserError
from dialog_jax.formats import tokenizer_files
from dialog_jax.rendering.sequences import Renderer
from dialog_jax.rendering.tokenizers import largest_token, load_tokenizer
from dialog_jax.rendering.virtual_tokens import VirtualTokens
from dialog_jax.training.config import TrainConfig
from dialog_jax.training.data_sources import Source


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


def iterate_records(source: Source) -> Iterator[Dialogue | UserError]:
    """Returns an iterator over the records, each a dialogue or its error, whatever data.on_error is."""
    return filter(source.selects, source.files.iterate())


def find_dialogue(source: Source, index: int) -> Dialogue:
    """Returns the dialogue of one record.

    Raises:
      UserError: the record is not a dialogue, or the index is out of range.
    """
    count = 0
    for count, record in enumerate(iterate_records(source), start=1):
        if count > index:
            if isinstance(record, UserError):
                raise record
            return record
    raise UserError(f"--index={index}: {source.name} has {count:,} records, counted from 0.")


def open_renderer(config: TrainConfig) -> tuple[transformers.PreTrainedTokenizerFast, Renderer]:
    """Returns the tokenizer of the config, and a renderer with it.

    Raises:
      UserError: the config names neither model nor tokenizer, or what it names cannot be loaded.
    """
    name = config.tokenizer or tokenizer_files.find_tokenizer(config.model, config.adapter)
    if not name:
        raise UserError("model and tokenizer are empty. Name one of them: --config.model=... or --config.tokenizer=...")
    options = renderer_options(config)
    tokenizer = load_tokenizer(name, chat_template=options.pop("chat_template"), model=config.model)
    # The model's embedding may have more rows; here, ids only have to be none of the tokenizer's.
    virtual_tokens = VirtualTokens(largest_token(tokenizer) + 1, count_virtual_tokens(config))
    return tokenizer, Renderer(tokenizer, virtual_tokens=virtual_tokens, **options)


def count_virtual_tokens(config: TrainConfig) -> int:
    """Returns the length of the soft prompt: of the config, of its adapter, or of the run that is its model."""
    if config.soft_prompt.tokens:
        return config.soft_prompt.tokens
    adapter, model = (pathlib.Path(place).expanduser() for place in (config.adapter, config.model))
    files = [(model / "model.json", "soft_prompt")]
    if config.adapter:  # a soft prompt has a directory for itself, or one within that of LoRA
        files = [(path / "adapter_config.json", "num_virtual_tokens") for path in (adapter, adapter / "soft_prompt")]
    for file, field in files:
        if file.is_file():
            try:
                count = json.loads(file.read_text(encoding="utf-8")).get(field, 0)
            except (ValueError, AttributeError) as error:
                raise UserError(f"{file} is not a JSON object: {error}. Save the adapter or run again.") from None
            if count:
                return count
    return 0


def model_options(config: TrainConfig) -> dict[str, Any]:
    """Returns the fields of the config that determine how a model is opened, as arguments of `load_model`."""
    return {
        "adapter": config.adapter,
        "tokenizer": config.tokenizer,
        "resize_embedding": config.resize_embedding,
        "row_length": config.data.max_length,
        "report": entry.print_message,
        **renderer_options(config),
    }


def renderer_options(config: TrainConfig) -> dict[str, Any]:
    """Returns the fields of the config that determine how dialogues are rendered, as arguments of `open_model`."""
    return {
        "chat_template": config.data.chat_template,
        "chat_template_kwargs": config.data.chat_template_kwargs,
        "allow_special_tokens": config.data.allow_special_tokens,
        "template_time": config.data.template_time,
        "responses": config.data.responses,
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
