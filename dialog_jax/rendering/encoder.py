"""Text to tokens and back, as inference has them: a tokenizer, and the tokens with which a response ends.

Adds no special token to those in the text. Texts may be escaped (`special_tokens`): escaped spellings never become
special tokens. Knows nothing of dialogues.
"""

import functools
from collections.abc import Collection, Iterable, Sequence
from typing import NamedTuple

import numpy as np
import tokenizers
import transformers
from jaxtyping import Int32

from dialog_jax.rendering.chat_template import ResponseFrame
from dialog_jax.rendering.special_tokens import SpecialTokenEscaper, TokenIds

_SHORT = 64  # characters of a text whose tokens are worth keeping, such as the end of a prompt; or tokens


class Tokenized(NamedTuple):
    """A text and its tokens, each with the characters of the text at which it starts and ends (exclusive)."""

    text: str
    ids: Int32[np.ndarray, " n"]
    starts: Int32[np.ndarray, " n"]
    ends: Int32[np.ndarray, " n"]

    def ends_with(self, other: "Tokenized", index: int, character: int) -> bool:
        """Returns whether the tokens from `index` on begin with those of `other`, a text at `character` of this one."""
        stop = index + len(other.ids)
        return (
            stop <= len(self.ids)
            and np.array_equal(self.ids[index:stop], other.ids)
            and np.array_equal(self.starts[index:stop], other.starts + character)
            and np.array_equal(self.ends[index:stop], other.ends + character)
        )

    def cut(self, text: str, stop: int) -> "Tokenized":
        """Returns the first `stop` tokens, as the tokens of `text`."""
        return Tokenized(text, self.ids[:stop], self.starts[:stop], self.ends[:stop])

    def append(self, text: str, other: "Tokenized") -> "Tokenized":
        """Returns these tokens followed by those of a continuation, as the tokens of `text`, which is both texts."""
        return Tokenized(
            text,
            np.concatenate([self.ids, other.ids]),
            np.concatenate([self.starts, other.starts + len(self.text)]),
            np.concatenate([self.ends, other.ends + len(self.text)]),
        )


class Ending(NamedTuple):
    """How responses end in a frame."""

    text: str
    """What follows a response's content, up to the end of the response."""
    token: int | None
    """The last special token of the text; None if there is none."""
    beyond: Int32[np.ndarray, " n"]
    """What follows a last response beyond its end."""


class Encoder:
    """A tokenizer, and the tokens with which a template ends a response.

    A response extends through the special tokens that the template writes before the next message. Where the rendering
    of a last message has more of them, these are a part of it only if nothing before stops generation:

        after the last message   <end> \\n <eos>
        if another follows       <end> \\n <user> \\n      the response ends with <end>, and not with <eos>

    Args:
      tokenizer: a fast tokenizer.
      frame: what the template writes around a response.
      escaper: the one that escaped the texts.
      stop_tokens: ids at which generation stops, as far as the model's files say so.
    """

    def __init__(
        self,
        tokenizer: transformers.PreTrainedTokenizerFast,
        frame: ResponseFrame,
        escaper: SpecialTokenEscaper,
        stop_tokens: Collection[int] = (),
    ):
        self.escaper = escaper
        self._backend: tokenizers.Tokenizer = tokenizer.backend_tokenizer
        added = self._backend.get_added_tokens_decoder()
        self.special = np.zeros(self._backend.get_vocab_size(with_added_tokens=True), bool)
        """Whether each token id is a special token."""
        self.special[[index for index, token in added.items() if token.special]] = True
        self._dividers = {index: token.content for index, token in added.items() if _divides(token, added.values())}
        self._is_divider = np.isin(np.arange(len(self.special)), list(self._dividers))
        self._tokenize_short = functools.lru_cache(maxsize=4096)(lambda text: self.tokenize([text])[0])
        self._eos = -1 if tokenizer.eos_token_id is None else int(tokenizer.eos_token_id)
        self._stop_tokens = list(stop_tokens)
        ending = self.find_ending(frame)
        self._beyond = ending.beyond
        self.end_of_turn = ending.token
        """Id of the last special token that the template writes after a response; None if it writes none."""
        self.response_end = ending.text
        """The text after a response's content, up to the end of the response."""
        self.end_text = "" if self.end_of_turn is None else added[self.end_of_turn].content
        """The text of the end of turn, or empty."""

    def find_ending(self, frame: ResponseFrame) -> Ending:
        """Returns the end of the responses in a frame."""
        after = self.tokenize_continuation(frame.after)
        length = self._count_before_header(after, frame)
        last = self._find_end(after.ids[:length])
        if last is None:  # only the rendering of a last message has an end
            length = len(after.ids)
            last = self._find_end(after.ids)
        if last is None:
            return Ending(frame.after, None, after.ids[length:])
        return Ending(frame.after[: after.ends[last]], int(after.ids[last]), after.ids[length:])

    def encode(self, text: str) -> Int32[np.ndarray, " n"]:
        """Returns the token ids of a text by itself."""
        return self.tokenize([text])[0].ids

    def tokenize_continuation(self, text: str) -> Tokenized:
        """Returns the tokens of a text that continues ordinary text."""
        return _convert(text, self.escaper.encode_continuation(text))

    def decode(self, ids: Int32[np.ndarray, " n"]) -> str:
        """Returns the text of token ids, special tokens included."""
        return self._backend.decode(ids.tolist(), skip_special_tokens=False)

    def decodes_equal(self, one: Int32[np.ndarray, " n"], two: Int32[np.ndarray, " m"]) -> bool:
        """Returns whether two lists of tokens have the same text; decodes only from where they differ."""
        shared = count_shared(one, two)
        special = np.flatnonzero(self.special[one[:shared]])
        start = int(special[-1]) if len(special) else 0  # decoders treat the beginning of a text in their own way
        return self.decode(one[start:]) == self.decode(two[start:])

    def tokenize(self, texts: Sequence[str]) -> list[Tokenized]:
        """Returns each text with its tokens; several texts in one call are faster than one by one."""
        return [_convert(text, tokens) for text, tokens in zip(texts, self.escaper.encode(texts), strict=True)]

    def tokenize_like(self, text: str, others: Sequence[Tokenized]) -> Tokenized:
        """Returns the tokens of a text by itself, taking those at its beginning from texts that begin the same.

        A special token divides a text: the tokens before it do not depend on it, nor on what follows. Only what follows
        the last one that both texts share is tokenized.

            other    <user> Hi <end> <assistant> Hello <end>
            text     <user> Hi <end> <assistant> <think> </think> Hello <end>
            taken    <user> Hi <end>             tokenized   <assistant> <think> </think> Hello <end>
        """
        lengths = [_count_equal_characters(other.text, text) for other in others]
        number = int(np.argmax(lengths))
        other = others[number]
        index = self._find_divider(other, lengths[number])
        if index is None:
            return self.tokenize([text])[0]
        character = int(other.starts[index])
        rest = text[character:]
        tokenized = self._tokenize_short(rest) if len(rest) <= _SHORT else self.tokenize([rest])[0]
        if other.ends_with(tokenized, index, character):
            return other.cut(text, index + len(tokenized.ids))
        return other.cut(text[:character], index).append(text, tokenized)

    def _find_divider(self, tokenized: Tokenized, stop: int) -> int | None:
        """Returns the index of the last token in the first `stop` characters that divides the text; None if none."""
        last = int(np.searchsorted(tokenized.ends, stop, "right"))
        while last > 0:
            first = max(0, last - _SHORT)  # it is usually among the last few tokens
            for offset in np.flatnonzero(self._is_divider[tokenized.ids[first:last]])[::-1].tolist():
                index = first + offset
                # The unknown token is special, too, and may stand for any text.
                if tokenized.text.startswith(self._dividers[int(tokenized.ids[index])], int(tokenized.starts[index])):
                    return index
            last = first
        return None

    def find_longer(self, tokenized: Tokenized, length: int) -> str:
        """Returns a beginning of a text such that every text that begins with it has over `length` tokens.

        It ends with a special token, which divides a text, so that the tokens before it do not depend on what follows.
        Empty if there is none.
        """
        special = np.flatnonzero(self.special[tokenized.ids[length:]])
        return tokenized.text[: tokenized.ends[length + special[0]]] if len(special) else ""

    def response_length(self, ids: Int32[np.ndarray, " n"]) -> int:
        """Returns how many of the tokens from a response on belong to it.

        Up to the last end of turn, and the special tokens after it; without an end of turn, up to another special
        token that ends the text, or all.
        """
        if self.end_of_turn is None:
            return len(ids)
        total = len(ids)
        if len(self._beyond) and np.array_equal(ids[-len(self._beyond) :], self._beyond):
            ids = ids[: -len(self._beyond)]
        ends = np.flatnonzero(ids == self.end_of_turn)
        special = np.flatnonzero(self.special[ids])
        if len(special) and not self.decode(ids[special[-1] + 1 :]).strip():
            return max(int(special[-1]), int(ends[-1]) if len(ends) else 0) + 1
        return int(ends[-1]) + 1 if len(ends) else total

    def _count_before_header(self, after: Tokenized, frame: ResponseFrame) -> int:
        """Returns how many of the tokens after a last response come before the header of the next message."""
        ids = after.ids
        following = self.tokenize_continuation(frame.following).ids
        header = self.tokenize_continuation(frame.header).ids
        length = count_shared(ids, following) if frame.following else len(ids)
        at_end = ids[len(ids) - count_shared(ids[::-1], header[::-1]) :]
        special = np.flatnonzero(self.special[ids])
        if len(special) and (self._is_visible(at_end) or self._is_visible(ids[length:][~self.special[ids[length:]]])):
            # A header, although no message follows: the response ends with a token that stops generation, or with the
            # one that ends a user's message, too.
            stops = special[np.isin(ids[special], [*self._stop_tokens, self._eos])]
            if not len(stops):
                user_end = special[(special >= len(ids) - len(at_end)) & (special < length)]
                stops = user_end[:1] if len(user_end) else special[special < length]
            return int(stops[-1] if len(stops) else special[0]) + 1
        stops = np.flatnonzero(np.isin(ids, self._stop_tokens))
        return int(stops[0]) + 1 if len(stops) and stops[0] >= length else length

    def _is_visible(self, ids: Int32[np.ndarray, " n"]) -> bool:
        """Returns whether tokens have a text other than white space."""
        return bool(self.decode(ids).strip())

    def _find_end(self, ids: Int32[np.ndarray, " n"]) -> int | None:
        """Returns the index of the last special token, or of the last other added token that is visible."""
        added = self._backend.get_added_tokens_decoder()
        special = [index for index, token in enumerate(ids.tolist()) if token in added and added[token].special]
        visible = [i for i, token in enumerate(ids.tolist()) if token in added and added[token].content.strip()]
        return next(iter([*special[::-1], *visible[::-1]]), None)  # some vocabularies add white space


def _convert(text: str, tokens: TokenIds) -> Tokenized:
    """Returns the tokens of a text as arrays."""
    starts, ends = np.array(tokens.offsets, np.int32).reshape(-1, 2).T.copy()
    return Tokenized(text, np.array(tokens.ids, np.int32), starts, ends)


def count_shared(tokens: Int32[np.ndarray, " n"], others: Int32[np.ndarray, " m"]) -> int:
    """Returns the number of tokens with which both begin."""
    length = min(len(tokens), len(others))
    different = np.flatnonzero(tokens[:length] != others[:length])
    return int(different[0]) if len(different) else length


def _divides(token: tokenizers.AddedToken, added: Iterable[tokenizers.AddedToken]) -> bool:
    """Returns whether the tokens before a special token and those from it on are those of the two texts by themselves.

    Not if it is looked for in normalized text, takes white space or a word boundary before it into account, or may be a
    part of another added token.
    """
    first = token.content[:1]
    return (
        token.special
        and not (token.normalized or token.lstrip or token.single_word)
        and not (not first or first.isspace() or first.isalnum() or first == "_")
        and not any(token.content in other.content[1:] for other in added)
    )


def _count_equal_characters(one: str, two: str) -> int:
    """Returns the number of characters with which both texts begin."""
    low, high = 0, min(len(one), len(two))
    if one[:high] == two[:high]:
        return high
    while high - low > 1:  # the first `low` characters are equal, the first `high` are not
        middle = (low + high) // 2
        if one[low:middle] == two[low:middle]:
            low = middle
        else:
            high = middle
    return low
