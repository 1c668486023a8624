"""Frozen dataclasses to nested dicts and back, each value in the type of its field. Knows no config."""

import dataclasses
import typing
from collections.abc import Mapping
from typing import Any

import ml_collections

from dialog_jax.errors import UserError


def to_dict(config: Any) -> dict[str, Any]:
    """Returns the fields of a dataclass, and of the dataclasses in it, as a dict of their values."""
    types = typing.get_type_hints(type(config))
    values = {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}
    return {
        # A flag parses what the default's type says, so that a float must not be the int 1 here.
        name: to_dict(value) if dataclasses.is_dataclass(value) else _convert(value, types[name], name)
        for name, value in values.items()
    }


def build(kind: type, values: Mapping[str, Any] | ml_collections.ConfigDict, where: str) -> Any:
    """Returns the dataclass with these fields; raises UserError for one that is unknown or of the wrong type."""
    types = typing.get_type_hints(kind)
    unknown = sorted(set(values) - set(types))
    if unknown:
        raise UserError(f"{where} has no field {', '.join(unknown)}; it has {', '.join(types)}.")
    fields = {}
    for name, value in values.items():
        field = f"{where}.{name}"
        if dataclasses.is_dataclass(types[name]):
            fields[name] = build(typing.cast(type, types[name]), value, field)
        else:
            fields[name] = _convert(value, types[name], field)
    return kind(**fields)


def _convert(value: Any, kind: Any, where: str) -> Any:
    """Returns the value as its field's type: an int as a float where a float is due, a list as a tuple."""
    outer = typing.get_origin(kind) or kind
    if outer is tuple and isinstance(value, (tuple, list)):
        item_kind = typing.get_args(kind)[0]
        if item_kind is str:  # a flag's q_proj,v_proj arrives as one text
            value = [part for item in value for part in (item.split(",") if isinstance(item, str) else [item])]
        return tuple(_convert(item, item_kind, where) for item in value)
    if outer is Mapping and isinstance(value, (Mapping, ml_collections.ConfigDict)):
        return value.to_dict() if isinstance(value, ml_collections.ConfigDict) else dict(value)
    if outer is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if not isinstance(value, outer) or (outer is int and isinstance(value, bool)):
        name = getattr(kind, "__name__", None) if outer is kind else kind
        raise UserError(f"{where} is {value!r}; it must be of type {name}.")
    return value
