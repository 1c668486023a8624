"""Messages in, the text of a reply out, piece by piece: a model directory made ready to talk.

Composes `data.rendering`, `model` and `generation`; knows no terminal and no file format.
"""

import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import transformers

from dialog_jax.dialogues.dialogue import Dialogue, Message
from dialog_jax.errors import UserError
from dialog_jax.inference import generation
from dialog_jax.model import pretrained
from dialog_jax.model.decoder import DecoderConfig
from dialog_jax.rendering.sequences import Renderer
from dialog_jax.rendering.tokenizers import check_vocabulary, load_tokenizer

_UNFINISHED = "\ufffd"  # what a decoder writes for bytes that are not yet a character


class ChatModel(NamedTuple):
    """What a model directory holds, loaded."""

    config: DecoderConfig
    parameters: dict
    tokenizer: transformers.PreTrainedTokenizerFast
    renderer: Renderer
    stop_tokens: frozenset[int]
    """The template's end of turn and the model's own ends."""


class ReplyChunk(NamedTuple):
    """The next piece of a reply, whole characters only. The last piece says in `end` why the reply is over:

    `turn` (the model ended it), `max_new_tokens`, or `context` (there is no room for more).
    """

    text: str
    end: str = ""


def load(
    name_or_path: str | os.PathLike[str],
    *,
    dtype: jax.typing.DTypeLike = jnp.float32,
    chat_template: str = "",
    chat_template_kwargs: Mapping[str, Any] | None = None,
    allow_special_tokens: bool = False,
) -> ChatModel:
    """Returns the model, its tokenizer and chat template, ready for use.

    Args:
      name_or_path: a Hugging Face model directory, a .gguf file, or a hub name.
      dtype: of the parameters in memory.
      chat_template: a Jinja file or its text; empty for the tokenizer's own.
      allow_special_tokens: parse special tokens that messages spell; otherwise they are ordinary text.

    Raises:
      UserError: one of them is missing or broken, or they do not belong together.
    """
    path = pretrained.resolve(name_or_path)
    config = pretrained.load_config(path)
    tokenizer = load_tokenizer(str(path), chat_template=chat_template)
    check_vocabulary(tokenizer, config.vocab_size)
    renderer = Renderer(tokenizer, chat_template_kwargs=chat_template_kwargs, allow_special_tokens=allow_special_tokens)
    stops = {renderer.end_of_turn, tokenizer.eos_token_id, *pretrained.stop_tokens(path)} - {None}
    parameters = pretrained.load_parameters(path, config, dtype=dtype)
    return ChatModel(config, parameters, tokenizer, renderer, frozenset(int(token) for token in stops))


def prompt(model: ChatModel, messages: Sequence[Message]) -> list[int]:
    """Returns the token ids that a reply to `messages` continues.

    Raises:
      UserError: the chat template refuses the messages.
    """
    return model.renderer.encode_prompt(Dialogue(id="chat", messages=tuple(messages))).tolist()


def reply(
    model: ChatModel,
    messages: Sequence[Message],
    *,
    max_new_tokens: int,
    temperature: float,
    top_p: float,
    seed: int,
    session: generation.Session | None = None,
) -> Iterator[ReplyChunk]:
    """Yields a reply to `messages` as it is written; see `generation.generate` for the arguments.

    A character of several tokens appears when its last token is there.

    Raises:
      UserError: an argument is out of range, the template refuses the messages, or their prompt fills the context.
    """
    tokens = prompt(model, messages)
    room = model.config.max_length - len(tokens)
    if room < 1:
        raise UserError(
            f"the history has {len(tokens):,} tokens and the model's context is {model.config.max_length:,}, which "
            "leaves no room for a reply. Start anew, or with less history."
        )
    generated = generation.generate(
        model.config,
        model.parameters,
        tokens,
        max_new_tokens=min(max_new_tokens, room),
        temperature=temperature,
        top_p=top_p,
        seed=seed,
        stop_tokens=model.stop_tokens,
        session=session,
    )
    return _chunks(model, generated, "context" if room < max_new_tokens else "max_new_tokens")


def _chunks(model: ChatModel, generated: Iterator[int], end: str) -> Iterator[ReplyChunk]:
    backend = model.tokenizer.backend_tokenizer
    ids: list[int] = []
    shown = text = ""
    for token in generated:
        if token in model.stop_tokens:
            end = "turn"
            break
        ids.append(token)
        text = backend.decode(ids, skip_special_tokens=True)
        if not text.endswith(_UNFINISHED) and text.startswith(shown):
            yield ReplyChunk(text[len(shown) :])
            shown = text
    yield ReplyChunk(text[len(shown) :], end)
