"""Where messages, and parts of them, stand among the tokens of a rendering.

Knows templates and tokens; knows no weight and no objective.
"""

import dataclasses
import itertools
from typing import NamedTuple

import numpy as np
from jaxtyping import Int32

from dialog_jax.dialogues.dialogue import Dialogue
from dialog_jax.errors import UserError
from dialog_jax.rendering.chat_template import PROBE, ChatTemplate
from dialog_jax.rendering.encoder import Encoder


class MessageSpan(NamedTuple):
    """Tokens `start` to `stop` (exclusive) of a sequence: one message with its end of turn."""

    message_index: int
    start: int
    stop: int
    part_spans: tuple[tuple[int, int], ...] = ()
    """Likewise, the tokens of each of its `parts`; a token that crosses parts belongs to the one it ends in."""


def locate_messages(
    template: ChatTemplate,
    encoder: Encoder,
    dialogue: Dialogue,
    text: str,
    count: int,
    wanted: list[int],
    *,
    is_prompt: bool,
) -> tuple[MessageSpan, ...]:
    """Where the `wanted` messages stand in the tokens of `text`, which renders the first `count` messages."""
    if not wanted:
        return ()
    tokenized = encoder.tokenize([text])[0]
    starts, ends = tokenized.starts(), tokenized.ends()
    spans = []
    for index in wanted:
        begin, end = _place(template, dialogue, text, count, index, is_prompt=is_prompt)
        start, stop = int(np.searchsorted(ends, begin, "right")), int(np.searchsorted(starts, end, "left"))
        if dialogue.messages[index].role == "assistant":
            stop = start + encoder.response_length(tokenized.ids[start:stop])
        if stop < len(tokenized.ids) and tokenized.ids[stop] == encoder.end_of_turn:
            stop += 1
        parts = _locate_parts(encoder, dialogue, index, text[begin:end], ends - begin)
        spans.append(MessageSpan(index, start, stop, parts))
    return tuple(spans)


def locate_response_parts(
    encoder: Encoder,
    dialogue: Dialogue,
    index: int,
    prompt: str,
    rendered: str,
    tokens: Int32[np.ndarray, " n"],
    start: int,
) -> tuple[tuple[int, int], ...]:
    """Where the parts of a response stand in its sequence."""
    if not dialogue.messages[index].parts:
        return ()
    tokenized = encoder.tokenize([rendered])[0]
    ends = tokenized.ends()[: len(tokens)] - len(prompt)
    if not np.array_equal(tokenized.ids[: len(tokens)], tokens):  # the response was tokenised by itself
        ends = np.concatenate([np.zeros(start, np.int32), encoder.continuation_ends(rendered[len(prompt) :])])
    last = rendered.rfind(encoder.end_text, len(prompt)) if encoder.end_text else len(rendered)
    return _locate_parts(encoder, dialogue, index, rendered[len(prompt) : max(last, len(prompt))], ends)


def _place(
    template: ChatTemplate, dialogue: Dialogue, text: str, count: int, index: int, *, is_prompt: bool
) -> tuple[int, int]:
    """The characters of `text` that are message `index`: as a response where it is one, else its content."""
    message = dialogue.messages[index]
    if message.role == "assistant" and index:
        prompt = template.text(dialogue, index, add_generation_prompt=True)
        rendered = template.text(dialogue, index + 1)
        if text.startswith(rendered) and rendered.startswith(prompt):
            return len(prompt), len(rendered)
    # The content is what changes when another stands in its place.
    messages = list(dialogue.messages)
    messages[index] = dataclasses.replace(message, content=PROBE)
    probe = dataclasses.replace(dialogue, messages=tuple(messages))
    before, found, after = template.text(probe, count, add_generation_prompt=is_prompt).partition(PROBE)
    if not (found and text.startswith(before) and text[len(before) :].endswith(after)):
        raise UserError(
            f"{dialogue.name}: message {index} ({message.role}) cannot be weighted by itself, because its content "
            "changes other parts of what the chat template renders. Leave its role out of the objective's roles, "
            "or its weight at 1."
        )
    return len(before), len(text) - len(after)


def _locate_parts(
    encoder: Encoder, dialogue: Dialogue, index: int, text: str, ends: Int32[np.ndarray, " n"]
) -> tuple[tuple[int, int], ...]:
    """The tokens of a message's parts, from its text and where in it tokens end."""
    message = dialogue.messages[index]
    if not message.parts:
        return ()
    at = text.find(message.content)
    if at < 0 or text.find(message.content, at + 1) >= 0:
        found = "does not render its content as it is" if at < 0 else "renders its content more than once"
        raise UserError(
            f"{dialogue.name}: message {index} has parts with weights, but the chat template {found}: "
            f"{encoder.escaper.unescape(text[:60])!r}. Write the content as the template renders it, white space "
            "included, or leave out the weights of its parts."
        )
    stops = at + np.cumsum([0] + [len(part.text) for part in message.parts])
    edges = np.searchsorted(ends, stops, "right").tolist()
    return tuple(itertools.pairwise(edges))
