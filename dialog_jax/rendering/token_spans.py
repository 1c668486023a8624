"""The tokens of each message of a rendering, and of each part of a message.

Messages are found by what the template renders with and without them, parts by their text. Knows no weight and no
objective.
"""

import dataclasses
import itertools
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Int32

from dialog_jax.dialogues.dialogue import Dialogue
from dialog_jax.errors import UserError
from dialog_jax.rendering.chat_template import PROBE, ChatTemplate
from dialog_jax.rendering.encoder import Encoder, Tokenized, count_shared


class MessageSpan(NamedTuple):
    """Tokens `start` to `stop` (exclusive) of a sequence: one message with its end of turn."""

    message_index: int
    start: int
    stop: int
    part_spans: tuple[tuple[int, int], ...] = ()
    """Start and stop of each of the message's `parts`; a token that crosses parts belongs to the one it ends in."""


class SpanFinder:
    """Finds messages among the tokens of renderings of one dialogue.

    The place of a message's content is what changes when another content replaces it:

        rendering     <user> Hi there <end> <assistant>
        with a probe  <user> Qx7 zebra <end> <assistant>        so the content is characters 7 to 15, "Hi there"

        tokens        <user>  Hi   there  <end>  <assistant>
        starts          0     6     9       15       21
        ends            6     9    15       21       33
                             |-----------------|                the content's tokens and the end of turn: 1 to 4

    The first token of the content is the first that ends after character 7; the last is the last that starts before 15.
    """

    def __init__(self, template: ChatTemplate, encoder: Encoder, dialogue: Dialogue):
        self._template = template
        self._encoder = encoder
        self._dialogue = dialogue

    def find_message(self, tokenized: Tokenized, count: int, index: int, *, is_prompt: bool) -> MessageSpan:
        """Returns the span of message `index` in a rendering of the first `count` messages.

        Args:
          is_prompt: the rendering has the generation prompt.

        Raises:
          UserError: the message changes more than its own part of the text.
        """
        begin, end = self._find_characters(tokenized.text, count, index, is_prompt=is_prompt)
        start = int(np.searchsorted(tokenized.ends, begin, "right"))
        stop = int(np.searchsorted(tokenized.starts, end, "left"))
        if self._dialogue.messages[index].role == "assistant":
            stop = start + self._encoder.response_length(tokenized.ids[start:stop])
        if stop < len(tokenized.ids) and tokenized.ids[stop] == self._encoder.end_of_turn:
            stop += 1
        return MessageSpan(index, start, stop, self._find_parts(tokenized, index, begin, end))

    def find_response_parts(
        self, tokenized: Tokenized, index: int, start: int, begin: int
    ) -> tuple[tuple[int, int], ...]:
        """Returns the span of each part of response `index`, which begins at token `start` and character `begin`.

        Raises:
          UserError: the template does not render the content as it is.
        """
        content = self._dialogue.messages[index].content
        end_text = self._encoder.end_text
        end = tokenized.text.rfind(end_text, begin) if end_text else -1
        end = end if end >= 0 else len(tokenized.text)  # with variables of its own, a dialogue may end otherwise
        if content not in tokenized.text[begin:end]:  # the prompt may have the beginning of what is recorded
            crossing = tokenized.text.rfind(content, max(0, begin - len(content)), end)
            begin = crossing if crossing >= 0 else begin
        spans = self._find_parts(tokenized, index, begin, end)
        return tuple((max(start, first), max(start, stop)) for first, stop in spans)

    def _find_characters(self, text: str, count: int, index: int, *, is_prompt: bool) -> tuple[int, int]:
        """Returns (begin, end) in `text` of a message: all of a response, the content of any other."""
        dialogue, message = self._dialogue, self._dialogue.messages[index]
        if message.role == "assistant" and index:
            prompt = self._template.text(dialogue, index, add_generation_prompt=True)
            rendered = self._template.text(dialogue, index + 1)
            if text.startswith(rendered) and rendered.startswith(prompt):
                return len(prompt), len(rendered)
        messages = list(dialogue.messages)
        messages[index] = dataclasses.replace(message, content=PROBE)
        probe = dataclasses.replace(dialogue, messages=tuple(messages))
        before, content, after = self._template.text(probe, count, add_generation_prompt=is_prompt).partition(PROBE)
        if not (content and text.startswith(before) and text[len(before) :].endswith(after)):
            raise UserError(
                f"{dialogue.name}: message {index} ({message.role}) cannot be weighted by itself, because its content "
                "changes other parts of what the chat template renders. Leave its role out of the objective's roles, "
                "or its weight at 1."
            )
        return len(before), len(text) - len(after)

    def _find_parts(self, tokenized: Tokenized, index: int, begin: int, end: int) -> tuple[tuple[int, int], ...]:
        """Returns the span of each part of a message whose text is characters `begin` to `end`."""
        message = self._dialogue.messages[index]
        if not message.parts:
            return ()
        text = tokenized.text[begin:end]
        place = text.find(message.content)
        if place < 0 or text.find(message.content, place + 1) >= 0:
            problem = "does not render its content as it is" if place < 0 else "renders its content more than once"
            raise UserError(
                f"{self._dialogue.name}: message {index} has parts with weights, but the chat template {problem}: "
                f"{self._encoder.escaper.unescape(text[:60])!r}. Write the content as the template renders it, white "
                "space included, or leave out the weights of its parts."
            )
        edges = begin + place + np.cumsum([0] + [len(part.text) for part in message.parts])
        return tuple(itertools.pairwise(np.searchsorted(tokenized.ends, edges, "right").tolist()))


class NewSpans:
    """Finds the messages of each sequence that are new: not entirely in the tokens shared with the sequence before it.

        sequence 0    <user> Hi <end> <assistant> Hello <end>                      new: message 0
        sequence 1    <user> Hi <end> <assistant> Hello <end> <user> Bye <end>     new: message 2

    Message 1 is not new in sequence 1: it is the response with which sequence 0 ended.

    Args:
      message_indices: of the messages to find.
    """

    def __init__(self, finder: SpanFinder, message_indices: Sequence[int]):
        self._finder = finder
        self._message_indices = message_indices
        self._stops: dict[int, int] = {}  # token after the last one of each message in the previous sequence
        self._previous: Int32[np.ndarray, " n"] = np.zeros(0, np.int32)

    def find(self, tokenized: Tokenized, count: int, *, is_prompt: bool) -> tuple[MessageSpan, ...]:
        """Returns the new messages in a rendering of the first `count`; raises what `SpanFinder.find_message` does."""
        shared = count_shared(tokenized.ids, self._previous)
        self._stops = {index: stop for index, stop in self._stops.items() if stop <= shared}
        new_indices = [index for index in self._message_indices if index < count and index not in self._stops]
        spans = tuple(self._finder.find_message(tokenized, count, index, is_prompt=is_prompt) for index in new_indices)
        self._stops.update({span.message_index: span.stop for span in spans})
        return spans

    def end_sequence(self, ids: Int32[np.ndarray, " n"], response_index: int) -> None:
        """Makes `ids`, whose last tokens are a response, the sequence that the next one is compared with."""
        self._stops[response_index] = len(ids)
        self._previous = ids
