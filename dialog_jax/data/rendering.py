"""Dialogues to sequences: for each supervised response, the tokens inference would see and the tokens it would write.

A response's *prompt* is what the chat template renders of the messages before it, with the generation prompt; the
*response* is what the template adds when the message joins them, up to and including the end-of-turn token. This holds
for any template: nothing is read from it but what it renders. Where the K prompts of a dialogue are beginnings of its
full rendering, in text and in tokens, one tokenisation is cut K times; elsewhere each is tokenised by itself.

Knows templates and tokenizers; knows no objective, tree or row.
"""

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jinja2
import numpy as np
import tokenizers
import transformers
from jaxtyping import Bool, Int32

from dialog_jax.data.dialogues import Dialogue, Message

_PROBE = "Qx7 zebra"  # content of the message by which the end-of-turn token is found; any text no template contains


class MessageSpan(NamedTuple):
    """Tokens `start` to `stop` (exclusive) of a sequence that are message number `message`, with its end of turn."""

    message: int
    start: int
    stop: int


class RenderedSequence(NamedTuple):
    """prompt ++ response as inference would see them; `tokens[start:]` is the response."""

    tokens: Int32[np.ndarray, " n"]
    start: int
    message: int
    """Index of the response in the dialogue's messages; -1 in a whole rendering, which has no response of its own."""
    turn: int
    """Index of the response among the dialogue's assistant messages; -1 in a whole rendering."""
    others: tuple[MessageSpan, ...] = ()
    """The messages asked for by `locate` that no earlier sequence of the dialogue has shown."""


class _Tokenized(NamedTuple):
    """A text, its token ids, and where each token starts and ends in it, in characters."""

    text: str
    ids: Int32[np.ndarray, " n"]
    starts: Int32[np.ndarray, " n"]
    ends: Int32[np.ndarray, " n"]

    def index_at(self, character: int) -> int | None:
        """Number of tokens before `character`, or None where a token crosses it."""
        index = int(np.searchsorted(self.starts, character, "left"))
        if index and self.ends[index - 1] > character:
            return None
        return index


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
        self._tokenizer = tokenizer
        self._kwargs = dict(chat_template_kwargs or {})
        self._backend: tokenizers.Tokenizer = tokenizer.backend_tokenizer
        added = self._backend.get_added_tokens_decoder()
        self._special = np.zeros(self._backend.get_vocab_size(with_added_tokens=True), bool)
        self._special[[index for index, token in added.items() if token.special]] = True
        self._encode_tail = functools.lru_cache(maxsize=4096)(self._encode_ids)
        probe = Dialogue(
            id="probe", messages=(Message(role="user", content="Hello"), Message(role="assistant", content=_PROBE))
        )
        text = self._tokenize([self.text(probe, 2)])[0]
        content = text.text.rfind(_PROBE)
        if content < 0:
            raise ValueError("The chat template does not render the content of an assistant message. Use another one.")
        after = text.ids[np.searchsorted(text.starts, content + len(_PROBE), "left") :]
        special = after[self._is_special(after)]
        self.end_of_turn: int | None = int(special[0]) if len(special) else None
        """Id of the special token that the template writes after a response; None if it writes none."""

    def text(self, dialogue: Dialogue, count: int, *, add_generation_prompt: bool = False) -> str:
        """The template's rendering of the first `count` messages.

        Raises:
          ValueError: the template refuses them; names the dialogue and repeats the template's reason.
        """
        try:
            return self._tokenizer.apply_chat_template(
                [message.as_dict() for message in dialogue.messages[:count]],
                tools=list(dialogue.tools) if dialogue.tools else None,
                add_generation_prompt=add_generation_prompt,
                tokenize=False,
                **self._kwargs,
            )
        except (jinja2.TemplateError, TypeError, IndexError, KeyError, AttributeError) as error:
            raise ValueError(
                f"{dialogue.name}: the chat template refuses its first {count} messages "
                f"({', '.join(message.role for message in dialogue.messages[:count]) or 'none'}): {error}. "
                "Change the dialogue, or pass another --config.data.chat_template."
            ) from error

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
          locate: says of which messages, responses apart, the place is wanted in `others`.

        Raises:
          ValueError: while reading: the template refuses a dialogue, does not begin with the prompt when it renders
            the response, or (with `locate`) does not contain a message's content verbatim.
        """
        texts = [self.text(dialogue, len(dialogue.messages)) for dialogue in dialogues]
        return [
            self._sequences(dialogue, tokenized, limit, whole, locate)
            for dialogue, tokenized in zip(dialogues, self._tokenize(texts), strict=True)
        ]

    def prompt(self, dialogue: Dialogue) -> Int32[np.ndarray, " n"]:
        """Token ids of all messages and the generation prompt: what a reply to the dialogue continues."""
        return self._encode_ids(self.text(dialogue, len(dialogue.messages), add_generation_prompt=True))

    def _sequences(
        self, dialogue: Dialogue, full: _Tokenized, limit: int, whole: bool, locate: Callable[[Message], bool] | None
    ) -> Iterator[RenderedSequence]:
        shown = 0  # messages that earlier sequences have shown
        turn = -1
        for index, message in enumerate(dialogue.messages):
            if message.role != "assistant":
                continue
            turn += 1
            if message.weight == 0:
                continue
            # Of texts that begin the full rendering, no longer one can fit.
            reach = int(full.ends[limit]) if limit and len(full.ids) > limit else len(full.text)
            prompt = self.text(dialogue, index, add_generation_prompt=True)
            if len(prompt) > reach and full.text.startswith(prompt):
                return
            rendered = self.text(dialogue, index + 1)
            if not rendered.startswith(prompt):
                raise ValueError(
                    f"{dialogue.name}: with message {index} the chat template does not begin with the prompt that "
                    f"inference shows: {_difference(prompt, rendered)}. Responses cannot be trained as they would be "
                    "generated; set chat_template_kwargs (such as enable_thinking) or pass another chat template."
                )
            source = full
            cut = self._cut_full(full, prompt, rendered)
            if cut is None:
                source, tokens, start = self._tokenize_alone(dialogue, index, prompt, rendered)
            else:
                start, stop = cut
                tokens = full.ids[:stop]
            if limit and len(tokens) > limit:
                return
            others = self._locate(dialogue, source, shown, index, locate, len(prompt))
            shown = index + 1
            yield RenderedSequence(tokens, start, index, turn, others)
        if whole and not (limit and len(full.ids) > limit):
            others = self._locate(dialogue, full, shown, len(dialogue.messages), locate, len(full.text))
            yield RenderedSequence(full.ids, len(full.ids), -1, -1, others)

    def _cut_full(self, full: _Tokenized, prompt: str, rendered: str) -> tuple[int, int] | None:
        """(start, stop) of the response in `full`, or None where that would not be what inference sees."""
        if not full.text.startswith(rendered):
            return None
        start, end = full.index_at(len(prompt)), full.index_at(len(rendered))
        if start is None or end is None:
            return None
        # A special token splits the text it stands in, so only what follows the last one can tokenise differently
        # when the prompt stands alone.
        special = np.flatnonzero(self._is_special(full.ids[max(0, start - 64) : start]))
        tail = max(0, start - 64) + int(special[-1]) if len(special) else 0
        character = int(full.starts[tail]) if tail else 0
        if not np.array_equal(self._encode_tail(prompt[character:]), full.ids[tail:start]):
            return None
        stop = self._response_end(full.ids[start:end])
        if stop is None:  # without a special token at its end, the response may merge with what follows
            return None if len(full.text) > len(rendered) else (start, end)
        return start, start + stop

    def _tokenize_alone(
        self, dialogue: Dialogue, index: int, prompt: str, rendered: str
    ) -> tuple[_Tokenized, Int32[np.ndarray, " n"], int]:
        """(the tokenised rendering, prompt ++ response, where the response starts) of one turn by itself."""
        prompt_ids = self._encode_ids(prompt)
        source = self._tokenize([rendered])[0]
        start = len(prompt_ids)
        if np.array_equal(source.ids[:start], prompt_ids):
            response = source.ids[start:]
        else:  # a token crosses from prompt to response: inference fixes the prompt's tokens first
            response = self._encode_ids(rendered[len(prompt) :])
            joined = np.concatenate([prompt_ids, response])
            if self._backend.decode(joined, skip_special_tokens=False) != self._backend.decode(
                source.ids, skip_special_tokens=False
            ):
                raise ValueError(
                    f"{dialogue.name}: the response of message {index} has no tokens that continue its prompt: tokens "
                    f"cross from {prompt[-20:]!r} to {rendered[len(prompt) :][:20]!r}. Pass a chat template that ends "
                    "the generation prompt where a token ends."
                )
        stop = self._response_end(response)
        return source, np.concatenate([prompt_ids, response[:stop]]), start

    def _response_end(self, response: Int32[np.ndarray, " n"]) -> int | None:
        """Number of tokens up to the end of turn, or to the last special token; None if there is none of them."""
        ends = np.flatnonzero(response == self.end_of_turn) if self.end_of_turn is not None else ()
        if not len(ends):
            ends = np.flatnonzero(self._is_special(response))
        return int(ends[-1]) + 1 if len(ends) else None

    def _locate(
        self,
        dialogue: Dialogue,
        source: _Tokenized,
        first: int,
        last: int,
        locate: Callable[[Message], bool] | None,
        stop: int,
    ) -> tuple[MessageSpan, ...]:
        """Spans of the wanted ones of messages `first` to `last` (exclusive), found by their content before `stop`."""
        if locate is None or not any(map(locate, dialogue.messages[first:last])):
            return ()
        spans = []
        character = len(self.text(dialogue, first)) if first else 0
        for index in range(first, last):
            message = dialogue.messages[index]
            content = message.content.strip()
            found = source.text.find(content, character, stop) if content else -1
            if found >= 0:
                character = found + len(content)
            if not locate(message):
                continue
            if found < 0:
                raise ValueError(
                    f"{dialogue.name}: message {index} ({message.role}) cannot be weighted by itself, because the chat "
                    "template does not render its content verbatim. Leave its role out of the objective's roles, or "
                    "its weight at 1."
                )
            start = int(np.searchsorted(source.ends, found, "right"))
            end = int(np.searchsorted(source.starts, character, "left"))
            if end < len(source.ids) and source.ids[end] == self.end_of_turn:
                end += 1
            spans.append(MessageSpan(index, start, end))
        return tuple(spans)

    def _is_special(self, ids: Int32[np.ndarray, " n"]) -> Bool[np.ndarray, " n"]:
        return self._special[ids]

    def _encode_ids(self, text: str) -> Int32[np.ndarray, " n"]:
        return np.array(self._backend.encode(text, add_special_tokens=False).ids, np.int32)

    def _tokenize(self, texts: Sequence[str]) -> list[_Tokenized]:
        tokenized = []
        for text, encoding in zip(texts, self._backend.encode_batch(texts, add_special_tokens=False), strict=True):
            offsets = np.array(encoding.offsets, np.int32).reshape(-1, 2)
            tokenized.append(_Tokenized(text, np.array(encoding.ids, np.int32), offsets[:, 0], offsets[:, 1]))
        return tokenized


def _difference(prompt: str, rendered: str) -> str:
    """Where two texts part, shown with what stands around it."""
    pairs = enumerate(zip(prompt, rendered, strict=False))
    at = next((i for i, (a, b) in pairs if a != b), min(len(prompt), len(rendered)))
    before, wanted, got = prompt[max(0, at - 30) : at], prompt[at : at + 30], rendered[at : at + 30]
    return f"after {before!r} the prompt has {wanted!r}, the rendering {got!r}"
