"""Dialogues to sequences: for each supervised response, the tokens inference would see and the tokens it would write.

A response's *prompt* is what the chat template renders of the messages before it, with the generation prompt; the
*response* is what the template adds when the message joins them, up to and including the end-of-turn token. This holds
for any template: nothing is read from it but what it renders. Where the K prompts of a dialogue are beginnings of its
full rendering, in text and in tokens, one tokenisation is cut K times; elsewhere each is tokenised by itself.

Knows templates and tokenizers; knows no objective, tree or row.
"""

import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import tokenizers
import transformers
from jaxtyping import Int32

from dialog_jax.data.dialogues import Dialogue, Message
from dialog_jax.data.templates import ChatTemplate

_PROBE = "Qx7 zebra"  # stands for a message's content, to find what is around it; any text no template contains
_PREAMBLES_KEPT = 4096
_CHARACTERS_PER_TOKEN = 6  # so much is tokenised of a text for each token of the limit; what lies behind, turn by turn


class MessageSpan(NamedTuple):
    """Tokens `start` to `stop` (exclusive) of a sequence that are message number `message`, with its end of turn."""

    message: int
    start: int
    stop: int
    parts: tuple[tuple[int, int], ...] = ()
    """Likewise, the tokens of each of its `parts`; a token that crosses parts belongs to the one it ends in."""


class RenderedSequence(NamedTuple):
    """prompt ++ response as inference would see them; `tokens[start:]` is the response."""

    tokens: Int32[np.ndarray, " n"]
    start: int
    message: int
    """Index of the response in the dialogue's messages; -1 in a whole rendering, which has no response of its own."""
    turn: int
    """Index of the response among the dialogue's assistant messages; -1 in a whole rendering."""
    others: tuple[MessageSpan, ...] = ()
    """The messages asked for by `locate` in the prompt, less those of an earlier sequence that this one continues."""
    parts: tuple[tuple[int, int], ...] = ()
    """Start and stop of each of the response's `parts`, as in `MessageSpan`."""


class _Tokenized(NamedTuple):
    """A text and its tokens."""

    text: str
    ids: Int32[np.ndarray, " n"]
    encoding: tokenizers.Encoding

    def index_at(self, character: int) -> int | None:
        """Number of tokens before `character`, or None where no token begins there."""
        if character == len(self.text):
            return len(self.ids)
        index = self.encoding.char_to_token(character)
        return index if index is not None and self.start(index) == character else None

    def start(self, index: int) -> int:
        """The character at which a token begins."""
        characters = self.encoding.token_to_chars(index)
        assert characters is not None, index
        return characters[0]


class Renderer:
    """A tokenizer with its chat template, made ready to render many dialogues.

    Args:
      tokenizer: a fast tokenizer whose `chat_template` is set.
      chat_template_kwargs: further variables of the template, for example `{"enable_thinking": False}`.

    Raises:
      ValueError: the template cannot render one user and one assistant message.
    """

    def __init__(
        self, tokenizer: transformers.PreTrainedTokenizerFast, *, chat_template_kwargs: Mapping[str, Any] | None = None
    ):
        self._template = ChatTemplate(tokenizer, chat_template_kwargs)
        self._backend: tokenizers.Tokenizer = tokenizer.backend_tokenizer
        added = self._backend.get_added_tokens_decoder()
        self._special = np.zeros(self._backend.get_vocab_size(with_added_tokens=True), bool)
        self._special[[index for index, token in added.items() if token.special]] = True
        self._preambles: dict[str, Int32[np.ndarray, " n"]] = {}
        self._encode_tail = functools.lru_cache(maxsize=4096)(self._encode)
        # Behind a special token no space is put in front of a text.
        anchors = (token.content for token in added.values() if token.special and not (token.lstrip or token.rstrip))
        self._anchor = next(anchors, "")
        probe = Dialogue(
            id="probe", messages=(Message(role="user", content="Hello"), Message(role="assistant", content=_PROBE))
        )
        text = self.text(probe, 2)
        _, found, after = text.rpartition(_PROBE)
        if not found:
            raise ValueError("The chat template does not render the content of an assistant message. Use another one.")
        ends = [index for index in self._encode_continuation(after).tolist() if index in added]
        special = [index for index in ends if added[index].special]
        named = [index for index in ends if added[index].content.strip()]  # some vocabularies add white space
        self.end_of_turn: int | None = next(iter(special + named), None)
        """Id of the special token that the template writes after a response; None if it writes none."""
        self._end_text = "" if self.end_of_turn is None else added[self.end_of_turn].content

    def text(self, dialogue: Dialogue, count: int, *, add_generation_prompt: bool = False) -> str:
        """The template's rendering of the first `count` messages; raises what `ChatTemplate.text` does."""
        return self._template.text(dialogue, count, add_generation_prompt=add_generation_prompt)

    def render(
        self,
        dialogues: Sequence[Dialogue],
        *,
        limit: int = 0,
        whole: bool = False,
        locate: Callable[[Message], bool] | None = None,
    ) -> list[Iterator[RenderedSequence]]:
        """For each dialogue, the sequences of its assistant messages of weight > 0, in order, made as they are read.

            <user> Hi <end> <assistant> Hello <end> \\n <user> Bye <end> <assistant> Ciao <end> \\n
            |-------- prompt 0 -------| |response 0|
            |--------------------------- prompt 1 ----------------------------| |response 1|

        Args:
          dialogues: a batch, tokenised together.
          limit: a dialogue's sequences end before the first that has more tokens than this; 0 for no limit.
          whole: append the rendering of all messages, for objectives that train on every token.
          locate: says of which messages the place is wanted in `others`.

        Raises:
          ValueError: the template refuses a dialogue, or while reading: it does not begin with the prompt when it
            renders the response, it does not render weighted parts as they are, or (with `locate`) a message changes
            more than its own part of the text.
        """
        texts = [self.text(dialogue, len(dialogue.messages)) for dialogue in dialogues]
        beginnings = self._tokenize([text[: limit * _CHARACTERS_PER_TOKEN or None] for text in texts])
        return [
            self._sequences(dialogue, text, beginning, limit, whole, locate)
            for dialogue, text, beginning in zip(dialogues, texts, beginnings, strict=True)
        ]

    def prompt(self, dialogue: Dialogue) -> Int32[np.ndarray, " n"]:
        """Token ids of all messages and the generation prompt: what a reply to the dialogue continues."""
        return self._encode(self.text(dialogue, len(dialogue.messages), add_generation_prompt=True))

    def preamble(self, dialogue: Dialogue) -> Int32[np.ndarray, " n"]:
        """Token ids of what stands before the content of the first message that is not the system's.

        Dialogues with the same system prompt and tools begin with the same. Empty where the template refuses such a
        beginning by itself.
        """
        first = next((i for i, message in enumerate(dialogue.messages) if message.role != "system"), None)
        if first is None:
            return np.zeros(0, np.int32)
        beginning = (*dialogue.messages[:first], Message(role=dialogue.messages[first].role, content=_PROBE))
        key = repr((beginning, dialogue.tools))
        if key not in self._preambles:
            if len(self._preambles) == _PREAMBLES_KEPT:
                self._preambles.clear()
            try:
                text = self.text(dataclasses.replace(dialogue, messages=beginning, parents=()), first + 1)
            except ValueError:
                text = ""
            before, found, _ = text.partition(_PROBE)
            self._preambles[key] = self._encode(before if found else "")
        return self._preambles[key]

    def _sequences(
        self,
        dialogue: Dialogue,
        text: str,
        beginning: _Tokenized,
        limit: int,
        whole: bool,
        locate: Callable[[Message], bool] | None,
    ) -> Iterator[RenderedSequence]:
        roles = [message.role for message in dialogue.messages]
        wanted = [i for i, message in enumerate(dialogue.messages) if locate is not None and locate(message)]
        shown = 0  # messages that the sequence before has shown
        previous = beginning.ids[:0]
        for index, prompt, rendered in self._template.turns(dialogue):
            start = self._cut_prompt(beginning, prompt)
            if limit and start is not None and start >= limit:
                return
            if not rendered.startswith(prompt):
                raise ValueError(
                    f"{dialogue.name}: with message {index} the chat template does not begin with the prompt that "
                    f"inference shows: {_difference(prompt, rendered)}. Responses cannot be trained as they would be "
                    "generated; merge assistant messages that follow each other, set chat_template_kwargs (such as "
                    "enable_thinking) or pass another chat template."
                )
            stop = None if start is None else self._cut_response(beginning, rendered, len(prompt))
            if start is None or stop is None:
                tokens, start = self._tokenize_alone(dialogue, index, prompt, rendered)
            else:
                tokens = beginning.ids[:stop]
            if limit and len(tokens) > limit:
                return
            first = shown if _begins(tokens, previous) else 0
            others = self._locate(dialogue, prompt, index, [i for i in wanted if first <= i < index], is_prompt=True)
            parts = self._locate_response_parts(dialogue, index, prompt, rendered, tokens, start)
            shown, previous = index + 1, tokens
            yield RenderedSequence(tokens, start, index, roles[:index].count("assistant"), others, parts)
        if whole:
            tokens = beginning.ids if len(beginning.text) == len(text) else self._encode(text)
            if not limit or len(tokens) <= limit:
                first = shown if _begins(tokens, previous) else 0
                others = self._locate(dialogue, text, len(roles), [i for i in wanted if first <= i], is_prompt=False)
                yield RenderedSequence(tokens, len(tokens), -1, -1, others)

    def _cut_prompt(self, beginning: _Tokenized, prompt: str) -> int | None:
        """Number of tokens of `prompt` in `beginning`; None where they are not the tokens that it has by itself."""
        if self.end_of_turn is None or not beginning.text.startswith(prompt):
            return None
        start = beginning.index_at(len(prompt))
        if start is None:
            return None
        # A special token splits the text it stands in, so only what follows the last one can tokenise differently
        # when the prompt stands alone.
        near = max(0, start - 64)
        special = np.flatnonzero(self._special[beginning.ids[near:start]])
        tail = near + int(special[-1]) if len(special) else 0
        tail_ids = self._encode_tail(prompt[beginning.start(tail) if tail else 0 :])
        return start if np.array_equal(tail_ids, beginning.ids[tail:start]) else None

    def _cut_response(self, beginning: _Tokenized, rendered: str, start: int) -> int | None:
        """Number of tokens of `beginning` up to the last end of turn of `rendered` after character `start`.

        None where that is not there, or not the same text; without a special token at its end, what follows the
        response could merge with it.
        """
        last = rendered.rfind(self._end_text, start)
        if last < 0 or not beginning.text.startswith(rendered[: last + len(self._end_text)]):
            return None
        index = beginning.index_at(last)
        return index + 1 if index is not None and beginning.ids[index] == self.end_of_turn else None

    def _tokenize_alone(
        self, dialogue: Dialogue, index: int, prompt: str, rendered: str
    ) -> tuple[Int32[np.ndarray, " n"], int]:
        """(prompt ++ response, where the response starts) of one turn by itself."""
        prompt_ids, ids = self._encode(prompt), self._encode(rendered)
        start = len(prompt_ids)
        if np.array_equal(ids[:start], prompt_ids):
            response = ids[start:]
        else:  # a token crosses from prompt to response: inference fixes the prompt's tokens first
            response = self._encode_continuation(rendered[len(prompt) :])
            if self._decode(np.concatenate([prompt_ids, response])) != self._decode(ids):
                raise ValueError(
                    f"{dialogue.name}: the response of message {index} has no tokens that continue its prompt: tokens "
                    f"cross from {prompt[-20:]!r} to {rendered[len(prompt) :][:20]!r}. Pass a chat template that ends "
                    "the generation prompt where a token ends."
                )
        return np.concatenate([prompt_ids, response[: self._response_length(response)]]), start

    def _response_length(self, ids: Int32[np.ndarray, " n"]) -> int:
        """Number of tokens up to the last end of turn, or up to another special token that ends the text."""
        if self.end_of_turn is None:
            return len(ids)
        ends = np.flatnonzero(ids == self.end_of_turn)
        if not len(ends):
            ends = np.flatnonzero(self._special[ids])
            if not len(ends) or self._decode(ids[ends[-1] + 1 :]).strip():
                return len(ids)
        return int(ends[-1]) + 1

    def _locate(
        self, dialogue: Dialogue, text: str, count: int, wanted: list[int], *, is_prompt: bool
    ) -> tuple[MessageSpan, ...]:
        """Where the `wanted` messages stand in the tokens of `text`, which renders the first `count` messages."""
        if not wanted:
            return ()
        tokenized = self._tokenize([text])[0]
        starts, ends = np.array(tokenized.encoding.offsets, np.int32).T
        spans = []
        for index in wanted:
            begin, end = self._place(dialogue, text, count, index, is_prompt=is_prompt)
            start, stop = int(np.searchsorted(ends, begin, "right")), int(np.searchsorted(starts, end, "left"))
            if dialogue.messages[index].role == "assistant":
                stop = start + self._response_length(tokenized.ids[start:stop])
            if stop < len(tokenized.ids) and tokenized.ids[stop] == self.end_of_turn:
                stop += 1
            parts = self._locate_parts(dialogue, index, text[begin:end], ends - begin)
            spans.append(MessageSpan(index, start, stop, parts))
        return tuple(spans)

    def _locate_response_parts(
        self,
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
        tokenized = self._tokenize([rendered])[0]
        ends = np.array(tokenized.encoding.offsets, np.int32)[: len(tokens), 1] - len(prompt)
        if not np.array_equal(tokenized.ids[: len(tokens)], tokens):  # the response was tokenised by itself
            alone = self._tokenize([self._anchor + rendered[len(prompt) :]])[0]
            own = np.array(alone.encoding.offsets, np.int32)[bool(self._anchor) :, 1] - len(self._anchor)
            ends = np.concatenate([np.zeros(start, np.int32), own])
        last = rendered.rfind(self._end_text, len(prompt)) if self._end_text else len(rendered)
        return self._locate_parts(dialogue, index, rendered[len(prompt) : max(last, len(prompt))], ends)

    def _locate_parts(
        self, dialogue: Dialogue, index: int, text: str, ends: Int32[np.ndarray, " n"]
    ) -> tuple[tuple[int, int], ...]:
        """The tokens of a message's parts, from its text and where in it tokens end."""
        message = dialogue.messages[index]
        if not message.parts:
            return ()
        at = text.find(message.content)
        if at < 0 or text.find(message.content, at + 1) >= 0:
            found = "does not render its content as it is" if at < 0 else "renders its content more than once"
            raise ValueError(
                f"{dialogue.name}: message {index} has parts with weights, but the chat template {found}: "
                f"{text[:60]!r}. Write the content as the template renders it, white space included, or leave out the "
                "weights of its parts."
            )
        stops = at + np.cumsum([0] + [len(part.text) for part in message.parts])
        edges = np.searchsorted(ends, stops, "right").tolist()
        return tuple(itertools.pairwise(edges))

    def _place(self, dialogue: Dialogue, text: str, count: int, index: int, *, is_prompt: bool) -> tuple[int, int]:
        """The characters of `text` that are message `index`: as a response where it is one, else its content."""
        message = dialogue.messages[index]
        if message.role == "assistant" and index:
            prompt = self.text(dialogue, index, add_generation_prompt=True)
            rendered = self.text(dialogue, index + 1)
            if text.startswith(rendered) and rendered.startswith(prompt):
                return len(prompt), len(rendered)
        # The content is what changes when another stands in its place.
        messages = list(dialogue.messages)
        messages[index] = dataclasses.replace(message, content=_PROBE)
        probe = dataclasses.replace(dialogue, messages=tuple(messages))
        before, found, after = self.text(probe, count, add_generation_prompt=is_prompt).partition(_PROBE)
        if not (found and text.startswith(before) and text[len(before) :].endswith(after)):
            raise ValueError(
                f"{dialogue.name}: message {index} ({message.role}) cannot be weighted by itself, because its content "
                "changes other parts of what the chat template renders. Leave its role out of the objective's roles, "
                "or its weight at 1."
            )
        return len(before), len(text) - len(after)

    def _encode(self, text: str) -> Int32[np.ndarray, " n"]:
        return np.array(self._backend.encode(text, add_special_tokens=False).ids, np.int32)

    def _encode_continuation(self, text: str) -> Int32[np.ndarray, " n"]:
        """Token ids of a text that continues another."""
        return self._encode(self._anchor + text)[bool(self._anchor) :]

    def _decode(self, ids: Int32[np.ndarray, " n"]) -> str:
        return self._backend.decode(ids.tolist(), skip_special_tokens=False)

    def _tokenize(self, texts: Sequence[str]) -> list[_Tokenized]:
        encodings = self._backend.encode_batch(texts, add_special_tokens=False)
        return [
            _Tokenized(text, np.array(encoding.ids, np.int32), encoding)
            for text, encoding in zip(texts, encodings, strict=True)
        ]


def _begins(tokens: Int32[np.ndarray, " n"], previous: Int32[np.ndarray, " m"]) -> bool:
    return np.array_equal(tokens[: len(previous)], previous)


def _difference(prompt: str, rendered: str) -> str:
    """Where two texts part, shown with what stands around it."""
    pairs = enumerate(zip(prompt, rendered, strict=False))
    at = next((i for i, (a, b) in pairs if a != b), min(len(prompt), len(rendered)))
    before, wanted, got = prompt[max(0, at - 30) : at], prompt[at : at + 30], rendered[at : at + 30]
    return f"after {before!r} the prompt has {wanted!r}, the rendering {got!r}"
