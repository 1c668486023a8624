"""Text of dialogues that spells special tokens, kept from becoming those tokens.

In a *guarded* text the first character of each such spelling is a mark: a lone surrogate, which no Unicode text has. So
templates run on guarded dialogues, and a special token that is spelled in full in what they render was written by the
template. A guarded text is as long as the text it stands for: places in one are places in the other.

Knows dialogues and tokenizers; knows no template.
"""

import dataclasses
import json
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any

import tokenizers
import transformers

from dialog_jax.dialogues.dialogue import Dialogue, Message, Part
from dialog_jax.errors import UserError

_FIRST_MARK = 0xD800
_PRIVATE = range(0xF0000, 0x10FFFE)  # characters without a meaning of their own, to spell special tokens otherwise
_SPELLINGS_KEPT = 4


@dataclasses.dataclass(frozen=True, kw_only=True)
class EscapedDialogue(Dialogue):
    """A dialogue with marks in its texts."""


class SpecialTokenEscaper:
    """What guards dialogues for a tokenizer, and encodes what is rendered of them.

    Args:
      tokenizer: a fast tokenizer.
      allow_special_tokens: guard nothing, so that a special token is parsed wherever it is spelled.
    """

    def __init__(self, tokenizer: transformers.PreTrainedTokenizerFast, *, allow_special_tokens: bool = False):
        self._backend: tokenizers.Tokenizer = tokenizer.backend_tokenizer
        added = [token for token in self._backend.get_added_tokens_decoder().values() if token.content]
        special = [] if allow_special_tokens else [token.content for token in added if token.special]
        self._special = frozenset(special)
        self._marks = {first: chr(_FIRST_MARK + number) for number, first in enumerate(sorted({s[0] for s in special}))}
        self._unmarked = {ord(mark): first for first, mark in self._marks.items()}
        self._spelled = re.compile(f"(?=(?:{_any_of(special)})).", re.DOTALL)
        self._beginnings = frozenset(text[:stop] for text in special for stop in range(1, len(text)))
        self._longest = max(map(len, self._beginnings), default=0)
        # As the tokenizer looks for them: of those that begin at one place the longest, special or not.
        words = [token.content for token in added if token.single_word]
        self._added = re.compile(_any_of((token.content for token in added), words))
        # Tokens that are looked for in normalised text are spelled by whatever becomes them.
        found_late = [token for token in added if token.content in self._special and token.normalized]
        self._normalizer = self._backend.normalizer if found_late else None
        if self._normalizer is not None:
            late = {self._normalizer.normalize_str(token.content) for token in found_late}
            self._late = re.compile(f"(?=(?:{_any_of(late)})).", re.DOTALL)
        self._respelled: dict[int, tokenizers.Tokenizer] = {}

    def is_escaped(self, text: str) -> bool:
        """Whether there is a mark in a text."""
        return not text.isascii() and any(mark in text for mark in self._marks.values())

    def unescape(self, text: str) -> str:
        """The text that a guarded text stands for."""
        return text.translate(self._unmarked) if self.is_escaped(text) else text

    def escape(self, text: str) -> str:
        """The text with a mark where a special token is spelled, or begins to be spelled when the text ends.

        The latter since a template may write one text directly behind another.
        """
        if not any(first in text for first in self._marks):
            return text
        marked = list(self._spelled.sub(lambda found: self._marks[found[0]], text))
        for place in range(max(0, len(text) - self._longest), len(text)):
            if text[place:] in self._beginnings:
                marked[place] = self._marks[text[place]]
        return "".join(marked)

    def escape_dialogue(self, dialogue: Dialogue) -> Dialogue:
        """A `EscapedDialogue` of every text that a template sees; the same object where there is nothing to mark.

        Raises:
          UserError: a text has a mark already, which is half a surrogate pair; or the tokenizer's normalizer makes a
            special token of what is none.
        """
        contents = [message.content for message in dialogue.messages]
        fields = [message.fields for message in dialogue.messages if message.fields]
        for text in iterate_strings((contents, fields, dialogue.tools)):
            if self.is_escaped(text):
                raise UserError(
                    f"{dialogue.name}: has half a surrogate pair in a text; needed Unicode text. Remove it."
                )
            if self._normalizer is not None:
                late = self._late.findall(self._normalizer.normalize_str(text))
                if len(late) > len(self._spelled.findall(text)):
                    raise UserError(
                        f"{dialogue.name}: has a text that the tokenizer's normalizer makes a special token of: "
                        f"{text[:60]!r}. Change it, or set allow_special_tokens."
                    )
        marked = _changed(dialogue, self.escape)
        return dialogue if marked is dialogue else EscapedDialogue(**vars(marked))

    def unescape_dialogue(self, dialogue: EscapedDialogue) -> Dialogue:
        """The dialogue that a guarded one stands for."""
        return _changed(dialogue, self.unescape)

    def encode(self, texts: Sequence[str]) -> list[tokenizers.Encoding]:
        """The tokens of texts, guarded or not; what is marked has the tokens of ordinary text.

        Raises:
          UserError: a guarded text has so many private-use characters that none is left to encode it with.
        """
        if len(texts) > 1 and not any(map(self.is_escaped, texts)):
            return self._backend.encode_batch(texts, add_special_tokens=False)
        return [
            self._encoding(text) if self.is_escaped(text) else self._backend.encode(text, add_special_tokens=False)
            for text in texts
        ]

    def _encoding(self, text: str) -> tokenizers.Encoding:
        """Of a guarded text, from a tokenizer that spells special tokens as nothing in the text is spelled."""
        size = len(self._marks)
        used = {(ord(character) - _PRIVATE.start) // size for character in set(text)}
        base = next((at for block, at in enumerate(_PRIVATE[:-size:size]) if block not in used), None)
        if base is None:
            raise UserError("A text that spells special tokens has all private-use characters. Remove some of them.")
        spelling = {first: chr(base + number) for number, first in enumerate(self._marks)}
        respelled = self._respelled.get(base)
        if respelled is None:
            respelled = _respelled(self._backend, {text: spelling[text[0]] + text[1:] for text in self._special})
            if len(self._respelled) == _SPELLINGS_KEPT:
                self._respelled.clear()
            self._respelled[base] = respelled

        def respell(found: re.Match[str]) -> str:
            token = found[0]
            return spelling[token[0]] + token[1:] if token in self._special else token

        genuine = self._added.sub(respell, text).translate(self._unmarked)
        return respelled.encode(genuine, add_special_tokens=False)


def _any_of(texts: Iterable[str], words: Collection[str] = ()) -> str:
    """A pattern of the longest of `texts` that begins at a place; some are found as whole words only."""
    longest_first = sorted(texts, key=len, reverse=True)
    patterns = [rf"(?<!\w){re.escape(text)}(?!\w)" if text in words else re.escape(text) for text in longest_first]
    return "|".join(patterns) or "(?!)"


def _respelled(backend: tokenizers.Tokenizer, spelling: Mapping[str, str]) -> tokenizers.Tokenizer:
    """The same tokenizer, ids included, in which tokens are spelled as `spelling` says, and the old ones are text."""
    made = json.loads(backend.to_str())
    for token in made["added_tokens"]:
        token["content"] = spelling.get(token["content"], token["content"])
    model = made["model"]
    if isinstance(model["vocab"], dict):
        model["vocab"] = {spelling.get(text, text): number for text, number in model["vocab"].items()}
    else:  # Unigram
        model["vocab"] = [[spelling.get(text, text), score] for text, score in model["vocab"]]
    if model.get("merges"):
        pairs = (merge.split(" ", 1) if isinstance(merge, str) else merge for merge in model["merges"])
        model["merges"] = [pair for pair in pairs if not {*pair, "".join(pair)} & spelling.keys()]
    if model.get("unk_token"):
        model["unk_token"] = spelling.get(model["unk_token"], model["unk_token"])
    respelled = tokenizers.Tokenizer.from_str(json.dumps(made))
    for old, new in spelling.items():
        assert respelled.token_to_id(new) == backend.token_to_id(old), old
    return respelled


def _changed(dialogue: Dialogue, change: Callable[[str], str]) -> Dialogue:
    """The dialogue with every text that a template sees changed; the same object where none is."""
    messages = tuple(_changed_message(message, change) for message in dialogue.messages)
    tools = _mapped(dialogue.tools, change)
    if messages == dialogue.messages and tools == dialogue.tools:
        return dialogue
    return dataclasses.replace(dialogue, messages=messages, tools=tools)


def _changed_message(message: Message, change: Callable[[str], str]) -> Message:
    content = change(message.content)
    fields = _mapped(message.fields, change) if message.fields else message.fields
    if content == message.content and fields == message.fields:
        return message
    parts, start = [], 0
    for part in message.parts:
        parts.append(Part(text=content[start : start + len(part.text)], weight=part.weight))
        start += len(part.text)
    return dataclasses.replace(message, content=content, fields=fields, parts=tuple(parts))


def _mapped(value: Any, change: Callable[[str], str]) -> Any:
    """A value of JSON's kinds with every string in it changed, keys included."""
    if isinstance(value, str):
        return change(value)
    if isinstance(value, Mapping):
        return {_mapped(key, change): _mapped(entry, change) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_mapped(entry, change) for entry in value)
    return value


def iterate_strings(value: Any) -> Iterator[str]:
    """Every string in a value of JSON's kinds."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for key, entry in value.items():
            yield from iterate_strings(key)
            yield from iterate_strings(entry)
    elif isinstance(value, list | tuple):
        for entry in value:
            yield from iterate_strings(entry)
