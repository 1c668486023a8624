"""Values of an Axolotl file, checked, and the rules that turn a field's value into entries of a config."""

import math
from collections.abc import Callable, Mapping
from typing import Any

from dialog_jax.drafting.config_text import Entry

Fields = Mapping[str, Any]
Rule = Callable[[Any, Fields], list[Entry]]


class NotCarriedError(Exception):
    """A value has no counterpart here; the text says why."""


def to(field: str, convert: Callable[[Any], Any], comment: str = "") -> Rule:
    """Returns the rule of a field that has one counterpart."""
    return lambda value, fields: [Entry(field, convert(value), comment)]


def only(*defaults: Any, reason: str) -> Rule:
    """Returns the rule of a field whose values `defaults` say what is done here anyway."""

    def apply(value: Any, fields: Fields) -> list[Entry]:
        if value not in defaults:
            raise NotCarriedError(reason)
        return []

    return apply


def is_new_adapter(fields: Fields) -> bool:
    return fields.get("adapter") in ("lora", "qlora") and not fields.get("lora_model_dir")


def text(value: Any) -> str:
    if not isinstance(value, str):
        raise NotCarriedError(f"{value!r} is not a string")
    return value


def number(value: Any) -> float:
    """Returns a number; YAML reads 2e-5 as a text."""
    try:
        converted = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError):
        converted = math.nan
    if not math.isfinite(converted):
        raise NotCarriedError(f"{value!r} is not a number")
    return converted


def integer(value: Any) -> int:
    converted = number(value)
    if converted != int(converted):
        raise NotCarriedError(f"{value!r} is not an integer")
    return int(converted)


def mapping(value: Any) -> dict[str, Any]:
    if not isinstance(value, Mapping):
        raise NotCarriedError(f"{value!r} is not a mapping")
    return dict(value)


def boolean(value: Any) -> bool:
    if not isinstance(value, bool):
        raise NotCarriedError(f"{value!r} is neither true nor false")
    return value
