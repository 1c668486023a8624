"""A published model: its config, tokenizer and stop tokens, checked against one another, and its parameters.

In: a Hugging Face model directory, a .gguf file or a hub name. Out: a `Model`. The only place that opens a model: runs,
chat, evaluation, experiments and commands all call it. Knows no mesh; a run lays out the parameters itself.
"""

import os
import pathlib
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import transformers

from dialog_jax.errors import UserError
from dialog_jax.model import pretrained
from dialog_jax.model.decoder import DecoderConfig
from dialog_jax.rendering.sequences import Renderer
from dialog_jax.rendering.tokenizers import check_vocabulary, load_tokenizer


class Model(NamedTuple):
    """The contents of a model directory."""

    path: pathlib.Path
    config: DecoderConfig
    tokenizer: transformers.PreTrainedTokenizerFast
    renderer: Renderer
    stop_tokens: frozenset[int]
    """Ids at which a reply ends: the template's end of turn and the model's own end tokens."""
    parameters: dict
    """Empty unless `load_model` loaded them."""


def open_model(
    name_or_path: str | os.PathLike[str],
    *,
    tokenizer: str = "",
    chat_template: str = "",
    chat_template_kwargs: Mapping[str, Any] | None = None,
    allow_special_tokens: bool = False,
) -> Model:
    """Returns the model without its parameters.

    Args:
      name_or_path: a Hugging Face model directory, a .gguf file, or a hub name.
      tokenizer: another place to load the tokenizer from; empty for the model's own.
      chat_template: a Jinja file or its text; empty for the tokenizer's own.
      chat_template_kwargs: further variables of the template, such as enable_thinking.
      allow_special_tokens: parse special tokens that messages spell; otherwise they are ordinary text.

    Raises:
      UserError: a part is missing or broken, or the tokenizer does not belong to the model.
    """
    path = pretrained.resolve(name_or_path)
    config = pretrained.load_config(path)
    fast_tokenizer = load_tokenizer(tokenizer or str(path), chat_template=chat_template)
    check_vocabulary(fast_tokenizer, config.vocab_size)
    renderer = Renderer(
        fast_tokenizer, chat_template_kwargs=chat_template_kwargs, allow_special_tokens=allow_special_tokens
    )
    stop_tokens = {renderer.end_of_turn, fast_tokenizer.eos_token_id, *pretrained.stop_tokens(path)} - {None}
    return Model(
        path=path,
        config=config,
        tokenizer=fast_tokenizer,
        renderer=renderer,
        stop_tokens=frozenset(int(token) for token in stop_tokens),
        parameters={},
    )


def load_model(
    name_or_path: str | os.PathLike[str], *, dtype: jax.typing.DTypeLike = jnp.float32, **options: Any
) -> Model:
    """Returns the model with its parameters on JAX's default device, ready for `chat.reply`.

    Args:
      dtype: of the parameters in memory.
      options: those of `open_model`.

    Raises:
      UserError: what `open_model` raises, or a tensor is missing, unexpected or misshapen.
    """
    model = open_model(name_or_path, **options)
    return model._replace(parameters=pretrained.load_parameters(model.path, model.config, dtype=dtype))


def check_context(config: DecoderConfig, max_length: int) -> None:
    """Raises UserError if rows of `max_length` tokens exceed the model's context."""
    if max_length > config.max_length:
        raise UserError(
            f"data.max_length is {max_length:,}, but the model's context is {config.max_length:,} tokens. Choose a "
            "smaller data.max_length."
        )
