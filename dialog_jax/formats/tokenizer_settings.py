"""The files beside a tokenizer.json, checked for the shapes of the fields that transformers reads.

transformers reads them without checks, so that it raises anything. Other fields, and what the fields mean, are not
known here.
"""

import json
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

from dialog_jax.errors import UserError

_REMEDY = "Correct it, or download the file again."


def check_settings(directory: pathlib.Path) -> None:
    """Raises UserError if a file of a tokenizer's directory has a field of another shape than transformers needs."""
    for name, shapes in _SHAPES.items():
        file = directory / name
        if not file.is_file():
            continue
        where = f"{directory.name}/{name}"
        try:
            value = json.loads(file.read_bytes().decode())
        except ValueError as error:  # not JSON, or not UTF-8
            raise UserError(f"{where}: not JSON ({error}). {_REMEDY}") from None
        if not isinstance(value, dict):
            raise UserError(f"{where}: got {_quote(value)}; needed an object. {_REMEDY}")
        if name == "added_tokens.json" and not all(isinstance(number, int) for number in value.values()):
            raise UserError(f"{where}: got {_quote(value)}; needed the id of each token. {_REMEDY}")
        for field, (has_shape, needed) in shapes.items():
            if value.get(field) is not None and not has_shape(value[field]):
                raise UserError(f"{where}: {field} is {_quote(value[field])}; needed {needed}. {_REMEDY}")


def _quote(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else text[:57] + "..."


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _is_token(value: Any) -> bool:
    return isinstance(value, str) or (isinstance(value, Mapping) and isinstance(value.get("content"), str))


def _are_tokens(value: Any) -> bool:
    return isinstance(value, list) and all(map(_is_token, value))


def _are_named_or_listed(value: Any) -> bool:
    return all(map(_is_token, value.values())) if isinstance(value, Mapping) else _are_tokens(value)


def _are_numbered(value: Any) -> bool:
    return isinstance(value, Mapping) and all(
        number.isdecimal() and isinstance(token, Mapping) and _is_token(token) for number, token in value.items()
    )


def _are_templates(value: Any) -> bool:
    if isinstance(value, list):
        return all(isinstance(one, Mapping) and all(map(_is_text, map(one.get, ("name", "template")))) for one in value)
    return _is_text(value) or (isinstance(value, Mapping) and all(map(_is_text, value.values())))


_Shape = tuple[Callable[[Any], bool], str]
_TEXT: _Shape = _is_text, "text"
_TOKENS: dict[str, _Shape] = {
    **dict.fromkeys(
        ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token"),
        (_is_token, 'text, or an object with "content"'),
    ),
    "additional_special_tokens": (_are_tokens, "a list of tokens"),
    "extra_special_tokens": (_are_named_or_listed, "an object of tokens, or a list of them"),
}
_SHAPES: dict[str, dict[str, _Shape]] = {
    "tokenizer_config.json": {
        **_TOKENS,
        "added_tokens_decoder": (_are_numbered, 'an object with a number and an object with "content" for each token'),
        "tokenizer_class": _TEXT,
        "chat_template": (_are_templates, 'text, or a list of {"name": ..., "template": ...}'),
    },
    "special_tokens_map.json": _TOKENS,
    "added_tokens.json": {},
    "config.json": {"model_type": _TEXT, "tokenizer_class": _TEXT},
}
