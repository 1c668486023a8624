"""Special tokens that a dialogue's texts spell, disguised while its template runs, and what tokens there are then.

The K passes' own way to have such text as ordinary text. Shares nothing with `data.special_text`, which is held against
it: another disguise, and stretches of text tokenised one by one.
"""

import dataclasses
import functools
import re
from collections.abc import Mapping, Sequence
from typing import Any

import tokenizers

from dialog_jax.dialogues.dialogue import Dialogue, Message

LOWEST = "\U00100000"
"""Private-use characters from this one on stand for the first character of what is disguised."""
_BEHIND = "\ufdd0behind"


def disguised(dialogue: Dialogue, tokenizer) -> Dialogue:
    """The dialogue with another first character in every special token that its texts spell."""
    special = [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]
    special.sort(key=len, reverse=True)
    messages, tools = _disguised(dialogue.messages, special), _disguised(dialogue.tools, special)
    return dataclasses.replace(dialogue, messages=messages, tools=tools)


def undisguised(text: str) -> str:
    """The text that a disguised one stands for."""
    return "".join(chr(ord(c) - ord(LOWEST)) if c >= LOWEST else c for c in text)


def encode(tokenizer, text: str) -> tuple[list[int], list[int]]:
    """(token ids, the character at which each ends) of a disguised text.

    What stands between two special tokens, which the template wrote, is tokenised by itself as ordinary text.
    """
    added = {token.content: (number, token) for number, token in tokenizer.added_tokens_decoder.items()}
    pattern = "|".join(
        (r"\s*" if token.lstrip else "") + re.escape(content) + (r"\s*" if token.rstrip else "")
        for content, (_, token) in sorted(added.items(), key=lambda pair: -len(pair[0]))
        if token.special
    )
    plain = _plain(tokenizer.backend_tokenizer.to_str())
    ids, ends, at = [], [], 0
    for found in [*re.finditer(pattern, text), None]:
        stop = len(text) if found is None else found.start()
        front = _BEHIND if at else ""
        encoded = plain.encode(front + undisguised(text[at:stop]), add_special_tokens=False)
        ids += encoded.ids[bool(front) :]
        ends += [at + end - len(front) for _, end in encoded.offsets[bool(front) :]]
        if found is not None:
            at = found.end()
            ids.append(added[found[0].strip()][0])
            ends.append(at)
    return ids, ends


@functools.lru_cache(maxsize=1)
def _plain(tokenizer: str) -> tokenizers.Tokenizer:
    """The tokenizer to which special tokens are text."""
    plain = tokenizers.Tokenizer.from_str(tokenizer)
    plain.encode_special_tokens = True
    plain.add_tokens([tokenizers.AddedToken(_BEHIND, normalized=False)])  # no space is put in front of what follows
    return plain


def _disguised(value: Any, special: Sequence[str]) -> Any:
    """What may be in a dialogue, with every special token in it disguised."""
    if isinstance(value, str):
        for spelled in special:
            value = value.replace(spelled, chr(ord(LOWEST) + ord(spelled[0])) + spelled[1:])
        return value
    if isinstance(value, Mapping):
        return {_disguised(key, special): _disguised(entry, special) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_disguised(entry, special) for entry in value)
    if isinstance(value, Message):
        content, fields = _disguised(value.content, special), _disguised(value.fields, special)
        return dataclasses.replace(value, content=content, fields=fields)
    return value
