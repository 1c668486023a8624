"""A published model: its config, tokenizer and stop tokens, checked against one another, and its parameters.

In: a Hugging Face model directory, a .gguf file or a hub name, and an adapter for it. Out: a `Model`. The only place
that opens a model: runs, chat, evaluation, experiments and commands all call it. Knows no mesh; a run lays out the
parameters itself.
"""

import dataclasses
import os
import pathlib
from collections.abc import Callable, Collection, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import transformers

from dialog_jax import atomic_files
from dialog_jax.errors import UserError
from dialog_jax.formats import tokenizer_files
from dialog_jax.model import adapters, decoder, model_files, parameter_trees, peft_reading, pretrained
from dialog_jax.model.decoder_config import DecoderConfig
from dialog_jax.model.peft_reading import Adapter
from dialog_jax.rendering.sequences import Renderer
from dialog_jax.rendering.tokenizers import check_vocabulary, largest_token, load_tokenizer
from dialog_jax.rendering.virtual_tokens import VirtualTokens


class Model(NamedTuple):
    """The contents of a model directory."""

    path: pathlib.Path
    config: DecoderConfig
    tokenizer: transformers.PreTrainedTokenizerFast
    renderer: Renderer
    stop_tokens: frozenset[int]
    """Ids at which a reply ends: the template's end of turn and the model's own end tokens."""
    dtype: str
    """Type of the published weights: float32, float16 or bfloat16."""
    added_rows: int
    """Rows at the end of the embedding that the published one does not have."""
    adapter: Adapter | None
    parameters: dict
    """Those of model and adapter; empty unless `load_model` loaded them."""


def open_model(
    name_or_path: str | os.PathLike[str],
    *,
    adapter: str = "",
    tokenizer: str = "",
    chat_template: str = "",
    chat_template_kwargs: Mapping[str, Any] | None = None,
    allow_special_tokens: bool = False,
    template_time: str = "",
    responses: str = "rendered",
    resize_embedding: bool = False,
    soft_prompt_tokens: int = 0,
    row_length: int = 1,
    report: Callable[[str], None] = print,
) -> Model:
    """Returns the model without its parameters.

    Args:
      name_or_path: a Hugging Face model directory, a .gguf file, or a hub name.
      adapter: the directory of an adapter for the model; empty for none.
      tokenizer: another place to load the tokenizer from; empty for that of the adapter, or else the model's own.
      chat_template: a Jinja file or its text; empty for the tokenizer's own.
      chat_template_kwargs: further variables of the template, such as enable_thinking.
      allow_special_tokens: parse special tokens that messages spell; otherwise they are ordinary text.
      template_time: the time that a template which reads the clock takes for the current one; empty for now.
      responses: `rendered` to train responses as the template renders them, `verbatim` as they are recorded.
      resize_embedding: add rows to the embedding for tokens beyond it; otherwise they are an error.
      soft_prompt_tokens: length of a new soft prompt; 0 for that of the adapter, or none.
      row_length: tokens of the rows that it is for, which decides between the two RoPEs of a LongRoPE model.
      report: called with a line of text for everything that is done otherwise than the model's files say.

    Raises:
      UserError: a part is missing or broken, or tokenizer or adapter do not belong to the model.
    """
    path = pretrained.resolve(name_or_path)
    config = pretrained.load_config(path).for_length(row_length)
    source = tokenizer or tokenizer_files.find_tokenizer(path, adapter)
    fast_tokenizer = load_tokenizer(source, chat_template=chat_template, model=path)
    weights = model_files.describe_weights(path, config)
    name = pathlib.Path(name_or_path).name
    for note in weights.notes:
        report(f"{name}: {note}")
    for sentence in tokenizer_files.list_departures(fast_tokenizer).values():
        report(f"{sentence}; the file is followed, without truncation, padding and dropout")
    added_rows = max(0, largest_token(fast_tokenizer) + 1 - config.vocab_size) if resize_embedding else 0
    if added_rows:
        report(
            f"embedding: {config.vocab_size:,} rows in {name}, and the tokenizer has token ids up to "
            f"{largest_token(fast_tokenizer):,}; rows added, each the mean of the others: {added_rows:,}"
        )
        config = dataclasses.replace(config, vocab_size=config.vocab_size + added_rows)
    content = None
    if adapter:
        content = peft_reading.read_adapter(atomic_files.expand_home(adapter), config, base=path)
        if content.soft_prompt is not None:
            if soft_prompt_tokens:
                raise UserError(
                    f"soft_prompt.tokens is {soft_prompt_tokens} and the adapter {adapter} has a soft prompt of "
                    f"{len(content.soft_prompt)}. Leave soft_prompt.tokens at 0 to continue it."
                )
            soft_prompt_tokens = len(content.soft_prompt)
    return make_model(
        path,
        config,
        fast_tokenizer,
        chat_template_kwargs=chat_template_kwargs,
        allow_special_tokens=allow_special_tokens,
        template_time=template_time,
        responses=responses,
        soft_prompt_tokens=soft_prompt_tokens,
        stop_tokens=model_files.stop_tokens(path),
        dtype=weights.dtype,
        added_rows=added_rows,
        adapter=content,
    )


def make_model(
    path: pathlib.Path,
    config: DecoderConfig,
    tokenizer: transformers.PreTrainedTokenizerFast,
    *,
    chat_template_kwargs: Mapping[str, Any] | None,
    allow_special_tokens: bool,
    template_time: str,
    responses: str,
    stop_tokens: Collection[int],
    dtype: str,
    soft_prompt_tokens: int = 0,
    added_rows: int = 0,
    adapter: Adapter | None = None,
    parameters: dict | None = None,
) -> Model:
    """Returns a model of these parts, with a renderer.

    Args:
      stop_tokens: the model's own.
      soft_prompt_tokens: number of virtual tokens that the renderer puts in front of every sequence.

    Raises:
      UserError: the tokenizer does not belong to the model, its chat template cannot be used, or a soft prompt fills
        the model's context.
    """
    check_vocabulary(tokenizer, config.vocab_size)
    _check_soft_prompt(config, soft_prompt_tokens)
    renderer = Renderer(
        tokenizer,
        chat_template_kwargs=chat_template_kwargs,
        allow_special_tokens=allow_special_tokens,
        template_time=template_time,
        responses=responses,
        virtual_tokens=VirtualTokens(config.vocab_size, soft_prompt_tokens),
    )
    stops = {renderer.end_of_turn, tokenizer.eos_token_id, *stop_tokens} - {None}
    return Model(
        path=path,
        config=config,
        tokenizer=tokenizer,
        renderer=renderer,
        stop_tokens=frozenset(int(token) for token in stops),
        dtype=dtype,
        added_rows=added_rows,
        adapter=adapter,
        parameters=parameters or {},
    )


def load_model(
    name_or_path: str | os.PathLike[str], *, dtype: jax.typing.DTypeLike = jnp.float32, **options: Any
) -> Model:
    """Returns the model with its parameters on JAX's default device, ready for `chat.reply`.

    Args:
      dtype: of the model's own parameters in memory.
      options: those of `open_model`.

    Raises:
      UserError: what `open_model` raises, or a tensor is missing, unexpected or misshapen.
    """
    model = open_model(name_or_path, **options)
    parameters = pretrained.load_parameters(model.path, model.config, dtype=dtype, added_rows=model.added_rows)
    if model.adapter:
        parameters = parameter_trees.merge(
            adapters.attach_scales(parameters, _to_device(model.adapter.scales)), _to_device(model.adapter.factors)
        )
        if model.adapter.soft_prompt is not None:
            parameters[decoder.SOFT_PROMPT] = jnp.asarray(model.adapter.soft_prompt)
    return model._replace(parameters=parameters)


def _to_device(arrays: Mapping[str, Any]) -> dict[str, Any]:
    return jax.tree.map(jnp.asarray, dict(arrays))


def _check_soft_prompt(config: DecoderConfig, tokens: int) -> None:
    if tokens > config.context - 2:
        raise UserError(
            f"the soft prompt has {tokens:,} tokens and the model's context is {config.context:,}, which leaves no "
            "room for a prompt and a response. Choose a shorter one."
        )


def check_context(config: DecoderConfig, max_length: int) -> None:
    """Raises UserError if rows of `max_length` tokens exceed the model's context."""
    if max_length > config.context:
        raise UserError(
            f"data.max_length is {max_length:,}, but the model's context is {config.context:,} tokens. Choose a "
            "smaller data.max_length."
        )
