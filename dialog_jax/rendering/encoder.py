"""Text to tokens and back, as inference has them: a tokenizer, and where a response ends.

Adds no special token to those in the text. Texts may be escaped (`special_tokens`): escaped spellings never become
special tokens. Knows nothing of dialogues.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import tokenizers
import transformers
from jaxtyping import Int32

from dialog_jax.rendering.special_tokens import SpecialTokenEscaper


class Tokenized(NamedTuple):
    """A text and its tokens, each with the characters of the text at which it starts and ends (exclusive)."""

    text: str
    ids: Int32[np.ndarray, " n"]
    starts: Int32[np.ndarray, " n"]
    ends: Int32[np.ndarray, " n"]

    def count_before(self, character: int) -> int | None:
        """Returns the number of tokens before `character`, or None where no token starts there."""
        if character == len(self.text):
            return len(self.ids)
        index = int(np.searchsorted(self.ends, character, "right"))  # the first token that ends after it
        return index if index < len(self.ids) and self.starts[index] == character else None

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


class Encoder:
    """A tokenizer, and the token with which a template ends a turn.

    Args:
      tokenizer: a fast tokenizer.
      after_response: what the template writes after the content of an assistant message.
      escaper: the one that escaped the texts.
    """

    def __init__(
        self, tokenizer: transformers.PreTrainedTokenizerFast, after_response: str, escaper: SpecialTokenEscaper
    ):
        self.escaper = escaper
        self._backend: tokenizers.Tokenizer = tokenizer.backend_tokenizer
        added = self._backend.get_added_tokens_decoder()
        self.special = np.zeros(self._backend.get_vocab_size(with_added_tokens=True), bool)
        """Whether each token id is a special token."""
        self.special[[index for index, token in added.items() if token.special]] = True
        # Tokenizers that put a space in front of a text put none after a special token.
        anchors = (token.content for token in added.values() if token.special and not (token.lstrip or token.rstrip))
        self._anchor = next(anchors, "")
        ends = [index for index in self.tokenize_continuation(after_response).ids.tolist() if index in added]
        special = [index for index in ends if added[index].special]
        visible = [index for index in ends if added[index].content.strip()]  # some vocabularies add white space
        self.end_of_turn: int | None = next(iter(special + visible), None)
        """Id of the special token that the template writes after a response; None if it writes none."""
        self.end_text = "" if self.end_of_turn is None else added[self.end_of_turn].content
        """The text of that token, or empty."""

    def encode(self, text: str) -> Int32[np.ndarray, " n"]:
        """Returns the token ids of a text by itself."""
        return self.tokenize([text])[0].ids

    def tokenize_continuation(self, text: str) -> Tokenized:
        """Returns the tokens of a text that continues another."""
        _, ids, starts, ends = self.tokenize([self._anchor + text])[0]
        skipped, length = bool(self._anchor), len(self._anchor)
        return Tokenized(text, ids[skipped:], starts[skipped:] - length, ends[skipped:] - length)

    def decode(self, ids: Int32[np.ndarray, " n"]) -> str:
        """Returns the text of token ids, special tokens included."""
        return self._backend.decode(ids.tolist(), skip_special_tokens=False)

    def tokenize(self, texts: Sequence[str]) -> list[Tokenized]:
        """Returns each text with its tokens; several texts in one call are faster than one by one."""
        tokenized = []
        for text, encoding in zip(texts, self.escaper.encode(texts), strict=True):
            starts, ends = np.array(encoding.offsets, np.int32).reshape(-1, 2).T.copy()
            tokenized.append(Tokenized(text, np.array(encoding.ids, np.int32), starts, ends))
        return tokenized

    def response_length(self, ids: Int32[np.ndarray, " n"]) -> int:
        """Returns the number of tokens up to the last end of turn, or to another special token that ends the text."""
        if self.end_of_turn is None:
            return len(ids)
        ends = np.flatnonzero(ids == self.end_of_turn)
        if not len(ends):
            ends = np.flatnonzero(self.special[ids])
            if not len(ends) or self.decode(ids[ends[-1] + 1 :]).strip():
                return len(ids)
        return int(ends[-1]) + 1
