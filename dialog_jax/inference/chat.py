"""Messages in, the text of a reply out, piece by piece: a model directory made ready to talk.

Composes `data.rendering`, `model` and `generation`; knows no terminal and no file format.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from dialog_jax.dialogues.dialogue import Dialogue, Message
from dialog_jax.errors import UserError
from dialog_jax.inference import generation
from dialog_jax.inference.loading import Model

_UNFINISHED = "\ufffd"  # what a decoder writes for bytes that are not yet a character


class ReplyChunk(NamedTuple):
    """The next piece of a reply, whole characters only. The last piece says in `end` why the reply is over:

    `turn` (the model ended it), `max_new_tokens`, or `context` (there is no room for more).
    """

    text: str
    end: str = ""


def prompt(model: Model, messages: Sequence[Message]) -> list[int]:
    """Returns the token ids that a reply to `messages` continues.

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


def _chunks(model: Model, generated: Iterator[int], end: str) -> Iterator[ReplyChunk]:
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
