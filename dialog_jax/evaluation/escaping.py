"""Escapes special tokens that a dialogue's texts spell, so that the K passes tokenize them as ordinary text.

Independent of `rendering.special_tokens`, which is compared with it. While the template runs, a private-use character
replaces the first character of such a text:

    text        "a <eos> b"                      spelled by a user, not a token
    escaped     "a \\U0010003ceos> b"            "<" is U+3C, so the template writes no "<eos>" here
    rendered    "a \\U0010003ceos> b<eos>"       only the template's own <eos> is a token
    tokenized   tokens of "a <eos> b" as plain text, then the token <eos>
"""

import dataclasses
import functools
import re
from collections.abc import Mapping, Sequence
from typing import Any

import tokenizers

from dialog_jax.dialogues.dialogue import Dialogue, Message

ESCAPE_OFFSET = 0x100000
"""Private-use characters from this one on stand for the first character of an escaped text."""
_FRONT = "\ufdd0front"  # a token in front of a text, so that the tokenizer puts no space there


def escape_special_tokens(dialogue: Dialogue, tokenizer) -> Dialogue:
    """Returns the dialogue with every special token that its texts spell escaped."""
    special = [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]
    special.sort(key=len, reverse=True)
    messages, tools = _escape(dialogue.messages, special), _escape(dialogue.tools, special)
    kwargs = _escape(dialogue.chat_template_kwargs, special)
    return dataclasses.replace(dialogue, messages=messages, tools=tools, chat_template_kwargs=kwargs)


def unescape(text: str) -> str:
    """Returns the text that an escaped one stands for."""
    return "".join(chr(ord(c) - ESCAPE_OFFSET) if ord(c) >= ESCAPE_OFFSET else c for c in text)


def encode_escaped(tokenizer, text: str) -> tuple[list[int], list[int]]:
    """Returns (token ids, the character at which each token ends) of an escaped text.

    Special tokens in it are the template's. Each stretch between two of them is tokenized as ordinary text.
    """
    added = {token.content: (number, token) for number, token in tokenizer.added_tokens_decoder.items()}
    pattern = "|".join(
        (r"\s*" if token.lstrip else "") + re.escape(content) + (r"\s*" if token.rstrip else "")
        for content, (_, token) in sorted(added.items(), key=lambda entry: -len(entry[0]))
        if token.special
    )
    plain_tokenizer = _make_plain_tokenizer(tokenizer.backend_tokenizer.to_str())
    ids, ends, start = [], [], 0
    for match in [*re.finditer(pattern, text), None]:
        stop = len(text) if match is None else match.start()
        front = _FRONT if start else ""
        encoded = plain_tokenizer.encode(front + unescape(text[start:stop]), add_special_tokens=False)
        ids += encoded.ids[bool(front) :]
        ends += [start + end - len(front) for _, end in encoded.offsets[bool(front) :]]
        if match is not None:
            start = match.end()
            ids.append(added[match[0].strip()][0])
            ends.append(start)
    return ids, ends


@functools.lru_cache(maxsize=1)
def _make_plain_tokenizer(tokenizer_json: str) -> tokenizers.Tokenizer:
    """Returns the tokenizer with special tokens treated as text."""
    plain = tokenizers.Tokenizer.from_str(tokenizer_json)
    plain.encode_special_tokens = True
    plain.add_tokens([tokenizers.AddedToken(_FRONT, normalized=False)])
    return plain


def _escape(value: Any, special: Sequence[str]) -> Any:
    """Returns any part of a dialogue with every special token in it escaped."""
    if isinstance(value, str):
        for token in special:
            value = value.replace(token, chr(ESCAPE_OFFSET + ord(token[0])) + token[1:])
        return value
    if isinstance(value, Mapping):
        return {_escape(key, special): _escape(entry, special) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_escape(entry, special) for entry in value)
    if isinstance(value, Message):
        content, fields = _escape(value.content, special), _escape(value.fields, special)
        return dataclasses.replace(value, content=content, fields=fields)
    return value
