"""The tokenizer and the chat template that a config names, opened without a model. Imports no JAX."""

import json
import pathlib
from typing import Any

import transformers

from dialog_jax.errors import UserError
from dialog_jax.formats import tokenizer_files
from dialog_jax.rendering.sequences import Renderer
from dialog_jax.rendering.tokenizers import largest_token, load_tokenizer
from dialog_jax.rendering.virtual_tokens import VirtualTokens
from dialog_jax.training.config import TrainConfig


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


def renderer_options(config: TrainConfig) -> dict[str, Any]:
    """Returns the fields of the config that determine how dialogues are rendered, as arguments of `open_model`."""
    return {
        "chat_template": config.data.chat_template,
        "chat_template_kwargs": config.data.chat_template_kwargs,
        "allow_special_tokens": config.data.allow_special_tokens,
        "template_time": config.data.template_time,
        "responses": config.data.responses,
    }


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
