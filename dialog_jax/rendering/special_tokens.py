"""Escapes the text of dialogues where it spells special tokens, so that it does not become those tokens.

In an *escaped* text the first character of each such spelling is replaced by a mark: a lone surrogate, which no Unicode
text has. Templates run on escaped dialogues, so a special token that is spelled in full in what they render was written
by the template. An escaped text is as long as the text it stands for: places in one are places in the other.

    special token  <end>
    message        a<end>b                      template   {{ message.content }}<end>
    escaped        a?end>b   (? is the mark)    rendered   a?end>b<end>
    tokens         "a" "<" "end" ">" "b"  <end>

Knows dialogues and tokenizers; knows no template.
"""

import dataclasses
import functools
import itertools
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import tokenizers
import transformers

from dialog_jax.dialogues.dialogue import Dialogue, Message, Part
from dialog_jax.errors import UserError

_FIRST_MARK = 0xD800
_ANCHOR = "\ufdd0\ufdd1\ufdd2"  # noncharacters; a token in front of text that does not begin a rendering


class TokenIds(NamedTuple):
    """Token ids of a text, and the characters (start, stop) of each."""

    ids: list[int]
    offsets: list[tuple[int, int]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class EscapedDialogue(Dialogue):
    """A dialogue whose texts are escaped."""


class SpecialTokenEscaper:
    """Escapes the special tokens that dialogues spell, and encodes rendered text.

    Args:
      tokenizer: a fast tokenizer.
      allow_special_tokens: escape nothing, so that a special token is parsed wherever it is spelled.
    """

    def __init__(self, tokenizer: transformers.PreTrainedTokenizerFast, *, allow_special_tokens: bool = False):
        self._backend: tokenizers.Tokenizer = tokenizer.backend_tokenizer
        decoder = self._backend.get_added_tokens_decoder()
        added = [token for token in decoder.values() if token.content]
        self._ids = {token.content: number for number, token in decoder.items()}
        special = [] if allow_special_tokens else [token.content for token in added if token.special]
        self._special = frozenset(special)
        self._marks = {first: chr(_FIRST_MARK + number) for number, first in enumerate(sorted({s[0] for s in special}))}
        self._unmarked = {ord(mark): first for first, mark in self._marks.items()}
        self._spelling_pattern = re.compile(f"(?=(?:{_any_of(special)})).", re.DOTALL)
        self._beginnings = frozenset(text[:stop] for text in special for stop in range(1, len(text)))
        self._longest = max(map(len, self._beginnings), default=0)
        self._added = sorted(added, key=lambda token: len(token.content), reverse=True)
        self._added_pattern = re.compile("|".join(f"(?:{_make_pattern(token)})" for token in self._added) or "(?!)")
        # Tokens that are matched in normalized text are spelled by every text that the normalizer turns into them.
        normalized = [token for token in added if token.content in self._special and token.normalized]
        self._normalizer = self._backend.normalizer if normalized else None
        if self._normalizer is not None:
            texts = {self._normalizer.normalize_str(token.content) for token in normalized}
            self._normalized_pattern = re.compile(f"(?=(?:{_any_of(texts)})).", re.DOTALL)

    def is_escaped(self, text: str) -> bool:
        """Returns whether there is a mark in a text."""
        return not text.isascii() and any(mark in text for mark in self._marks.values())

    def unescape(self, text: str) -> str:
        """Returns the text that an escaped text stands for."""
        return text.translate(self._unmarked) if self.is_escaped(text) else text

    def escape(self, text: str) -> str:
        """Returns the text with a mark where a special token is spelled, or where its spelling begins at the end.

        The latter because a template may write one text directly after another.
        """
        if not any(first in text for first in self._marks):
            return text
        characters = list(self._spelling_pattern.sub(lambda match: self._marks[match[0]], text))
        for place in range(max(0, len(text) - self._longest), len(text)):
            if text[place:] in self._beginnings:
                characters[place] = self._marks[text[place]]
        return "".join(characters)

    def escape_dialogue(self, dialogue: Dialogue) -> Dialogue:
        """Returns the dialogue with every text that a template sees escaped; the dialogue itself if there is none.

        Raises:
          UserError: a text has a mark already, which is half a surrogate pair; or the tokenizer's normalizer turns
            ordinary text into a special token.
        """
        contents = [message.content for message in dialogue.messages]
        fields = [message.fields for message in dialogue.messages if message.fields]
        for text in iterate_strings((contents, fields, dialogue.tools, dialogue.chat_template_kwargs)):
            if self.is_escaped(text):
                raise UserError(
                    f"{dialogue.name}: has half a surrogate pair in a text; needed Unicode text. Remove it."
                )
            if self._normalizer is not None:
                spellings = self._normalized_pattern.findall(self._normalizer.normalize_str(text))
                if len(spellings) > len(self._spelling_pattern.findall(text)):
                    raise UserError(
                        f"{dialogue.name}: has a text that the tokenizer's normalizer makes a special token of: "
                        f"{text[:60]!r}. Change it, or set allow_special_tokens."
                    )
        escaped = _change_dialogue(dialogue, self.escape)
        return dialogue if escaped is dialogue else EscapedDialogue(**vars(escaped))

    def unescape_dialogue(self, dialogue: EscapedDialogue) -> Dialogue:
        """Returns the dialogue that an escaped one stands for."""
        return _change_dialogue(dialogue, self.unescape)

    def encode(self, texts: Sequence[str]) -> list[TokenIds]:
        """Returns the tokens of texts, escaped or not; what is escaped has the tokens of ordinary text.

        Raises:
          UserError: the tokenizer makes a special token of ordinary text.
        """
        if len(texts) > 1 and not any(map(self.is_escaped, texts)):
            encodings = self._backend.encode_batch(texts, add_special_tokens=False)
            return [TokenIds(encoding.ids, encoding.offsets) for encoding in encodings]
        return [self._encode_escaped(text) if self.is_escaped(text) else self._encode(text) for text in texts]

    def encode_continuation(self, text: str) -> TokenIds:
        """Returns the tokens of a text, escaped or not, that continues ordinary text: no space is put in front of it.

        Some tokenizers put a space in front of a text, and of what follows each added token in it:

            text           (laughs) Here<end>           by itself      ▁( laughs ) ▁Here <end>
                                                        continuation   ( laughs ) ▁Here <end>
        """
        match = self._added_pattern.search(text)
        stop = len(text) if match is None else match.start()
        tokens = self._encode_ordinary(self.unescape(text[:stop]), 0, {_ANCHOR}, self._continuing_tokenizer)
        if stop < len(text):
            (rest,) = self.encode([text[stop:]])
            tokens.ids.extend(rest.ids)
            tokens.offsets.extend((start + stop, end + stop) for start, end in rest.offsets)
        return tokens

    def _encode(self, text: str) -> TokenIds:
        encoding = self._backend.encode(text, add_special_tokens=False)
        return TokenIds(encoding.ids, encoding.offsets)

    def _encode_escaped(self, text: str) -> TokenIds:
        """Returns the tokens of an escaped text: special tokens that the template wrote, and ordinary text between."""
        tokens = TokenIds([], [])
        start = 0
        for match in self._added_pattern.finditer(text):
            assert match.lastindex is not None
            token = self._added[match.lastindex - 1]
            if token.content in self._special:
                self._append_text(tokens, text, start, match.start())
                tokens.ids.append(self._ids[token.content])
                tokens.offsets.append(match.span())
                start = match.end()
        self._append_text(tokens, text, start, len(text))
        return tokens

    def _append_text(self, tokens: TokenIds, text: str, start: int, stop: int) -> None:
        """Appends the tokens of characters `start` to `stop` of an escaped text, as ordinary text."""
        ordinary = self.unescape(text[start:stop])
        new = self._encode_ordinary(ordinary, start, {_ANCHOR}, self._ordinary_tokenizer)
        if not self._special_ids.isdisjoint(new.ids):
            # A special token may also be in the vocabulary; it is not found if its last character is encoded apart.
            new = self._encode_ordinary(ordinary, start, {_ANCHOR, *self._special}, self._ordinary_tokenizer)
            if not self._special_ids.isdisjoint(new.ids):
                raise UserError(
                    f"the tokenizer makes a special token of ordinary text: {ordinary[:60]!r}. Remove it from the "
                    "dialogue, or set allow_special_tokens."
                )
        tokens.ids.extend(new.ids)
        tokens.offsets.extend(new.offsets)

    def _encode_ordinary(
        self, text: str, start: int, divided: Iterable[str], tokenizer: tokenizers.Tokenizer
    ) -> TokenIds:
        """Returns the tokens of a text in which special tokens are ordinary, at character `start` of another.

        Args:
          divided: texts whose last character is encoded apart from what precedes it.
          tokenizer: of the text; what follows a division continues ordinary text.
        """
        tokens = TokenIds([], [])
        cuts = [match.start() + len(match[1]) - 1 for match in re.finditer(f"(?=({_any_of(divided)}))", text)]
        for begin, end in itertools.pairwise([0, *sorted({*cuts} - {0}), len(text)]):
            anchor = _ANCHOR if start and not begin else ""
            part_tokenizer = self._continuing_tokenizer if begin else tokenizer
            encoding = part_tokenizer.encode(anchor + text[begin:end], add_special_tokens=False)
            tokens.ids.extend(encoding.ids[bool(anchor) :])
            shift = start + begin - len(anchor)
            tokens.offsets.extend((first + shift, last + shift) for first, last in encoding.offsets[bool(anchor) :])
        return tokens

    @functools.cached_property
    def _ordinary_tokenizer(self) -> tokenizers.Tokenizer:
        """The tokenizer with special tokens as ordinary text, and an anchor token after which no space is added."""
        ordinary = tokenizers.Tokenizer.from_str(self._backend.to_str())
        ordinary.encode_special_tokens = True
        ordinary.add_tokens([tokenizers.AddedToken(_ANCHOR, normalized=False)])
        return ordinary

    @functools.cached_property
    def _continuing_tokenizer(self) -> tokenizers.Tokenizer:
        """The tokenizer with special tokens as ordinary text, which puts no space in front of a text."""
        definition = json.loads(self._backend.to_str())
        definition["normalizer"] = _remove_prefix_space(definition["normalizer"])
        definition["pre_tokenizer"] = _remove_prefix_space(definition["pre_tokenizer"])
        continuing = tokenizers.Tokenizer.from_str(json.dumps(definition))
        continuing.encode_special_tokens = True
        return continuing

    @functools.cached_property
    def _special_ids(self) -> frozenset[int]:
        """The ids of special tokens without that of the unknown token."""
        model = json.loads(self._backend.to_str())["model"]
        unknown = self._ids.get(model.get("unk_token"), model.get("unk_id"))
        return frozenset(self._ids[text] for text in self._special) - {unknown}


def _remove_prefix_space(component: dict[str, Any] | None) -> dict[str, Any] | None:
    """Returns a normalizer or pre-tokenizer of a tokenizer.json without what puts a space in front of a text."""
    if component is None or component["type"] == "Prepend":
        return None
    if component["type"] == "Metaspace":
        return {**component, "prepend_scheme": "never"}
    if component["type"] == "ByteLevel":
        return {**component, "add_prefix_space": False}
    if component["type"] == "Sequence":
        key = "normalizers" if "normalizers" in component else "pretokenizers"
        return {**component, key: [part for part in map(_remove_prefix_space, component[key]) if part is not None]}
    return component


def _any_of(texts: Iterable[str]) -> str:
    """Returns a pattern of any of `texts`, the longest first."""
    return "|".join(re.escape(text) for text in sorted(texts, key=len, reverse=True)) or "(?!)"


def _make_pattern(token: tokenizers.AddedToken) -> str:
    """Returns a pattern of an added token, in a group, with the white space that belongs to it."""
    pattern = re.escape(token.content)
    if token.single_word:
        pattern = rf"(?<!\w){pattern}(?!\w)"
    return (r"\s*" if token.lstrip else "") + f"({pattern})" + (r"\s*" if token.rstrip else "")


def _change_dialogue(dialogue: Dialogue, change: Callable[[str], str]) -> Dialogue:
    """Returns the dialogue with every text that a template sees changed; the dialogue itself if no text changes."""
    messages = tuple(_change_message(message, change) for message in dialogue.messages)
    tools = _change_strings(dialogue.tools, change)
    kwargs = _change_strings(dialogue.chat_template_kwargs, change)
    if messages == dialogue.messages and tools == dialogue.tools and kwargs == dialogue.chat_template_kwargs:
        return dialogue
    return dataclasses.replace(dialogue, messages=messages, tools=tools, chat_template_kwargs=kwargs)


def _change_message(message: Message, change: Callable[[str], str]) -> Message:
    content = change(message.content)
    fields = _change_strings(message.fields, change) if message.fields else message.fields
    if content == message.content and fields == message.fields:
        return message
    parts, start = [], 0
    for part in message.parts:
        parts.append(Part(text=content[start : start + len(part.text)], weight=part.weight))
        start += len(part.text)
    return dataclasses.replace(message, content=content, fields=fields, parts=tuple(parts))


def _change_strings(value: Any, change: Callable[[str], str]) -> Any:
    """Returns a JSON value with every string in it changed, keys included."""
    if isinstance(value, str):
        return change(value)
    if isinstance(value, Mapping):
        return {_change_strings(key, change): _change_strings(entry, change) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_change_strings(entry, change) for entry in value)
    return value


def iterate_strings(value: Any) -> Iterator[str]:
    """Yields every string in a JSON value, keys included."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for key, entry in value.items():
            yield from iterate_strings(key)
            yield from iterate_strings(entry)
    elif isinstance(value, list | tuple):
        for entry in value:
            yield from iterate_strings(entry)
