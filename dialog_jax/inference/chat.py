"""Replies to dialogues: messages in, the text of a reply out, in chunks as it is generated.

Composes rendering and `inference.generation`; knows no terminal and no file format.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from dialog_jax.dialogues.dialogue import Dialogue, Message
from dialog_jax.errors import UserError
from dialog_jax.inference import generation
from dialog_jax.inference.loading import Model

_INCOMPLETE = "\ufffd"  # what a tokenizer decodes to for bytes that do not form a character yet


class ReplyChunk(NamedTuple):
    """The next part of a reply, complete characters only."""

    text: str
    end: str = ""
    """In the last chunk, why the reply ends: "turn" (the model ended it), "max_new_tokens" or "context" (full)."""


def encode_prompt(model: Model, messages: Sequence[Message]) -> list[int]:
    """Returns the token ids of `messages` as the chat template renders them for generation.

    Raises:
      UserError: the chat template refuses the messages.
    """
    return model.renderer.encode_prompt(Dialogue(id="chat", messages=tuple(messages))).tolist()


def reply(
    model: Model,
    messages: Sequence[Message],
    *,
    max_new_tokens: int,
    temperature: float,
    top_p: float,
    seed: int,
    session: generation.Session | None = None,
) -> Iterator[ReplyChunk]:
    """Yields a reply to `messages` as it is generated; see `generation.generate` for the arguments.

    A character of several tokens appears with its last token.

    Raises:
      UserError: an argument is out of range, the template refuses the messages, or their prompt fills the context.
    """
    tokens = encode_prompt(model, messages)
    room = model.config.context - len(tokens)
    if room < 1:
        raise UserError(
            f"the history has {len(tokens):,} tokens and the model's context is {model.config.context:,}, which "
            "leaves no room for a reply. Start a new chat, or shorten the history."
        )
    new_tokens = generation.generate(
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
    return _decode_chunks(model, new_tokens, "context" if room < max_new_tokens else "max_new_tokens")


def reply_text(
    model: Model,
    messages: Sequence[Message] | str,
    *,
    max_new_tokens: int = 256,
    temperature: float = 0.7,
    top_p: float = 0.9,
    seed: int = 0,
) -> str:
    """Returns the whole text of a reply to `messages`, or to a single message of the user; the rest as in `reply`."""
    if isinstance(messages, str):
        messages = [Message(role="user", content=messages)]
    chunks = reply(model, messages, max_new_tokens=max_new_tokens, temperature=temperature, top_p=top_p, seed=seed)
    return "".join(chunk.text for chunk in chunks)


def _decode_chunks(model: Model, tokens: Iterator[int], end: str) -> Iterator[ReplyChunk]:
    backend = model.tokenizer.backend_tokenizer
    ids: list[int] = []
    previous = text = ""
    for token in tokens:
        if token in model.stop_tokens:
            end = "turn"
            break
        ids.append(token)
        text = backend.decode(ids, skip_special_tokens=True)
        if not text.endswith(_INCOMPLETE) and text.startswith(previous):
            yield ReplyChunk(text[len(previous) :])
            previous = text
    yield ReplyChunk(text[len(previous) :], end)
