"""Values of records, as JSON has them: checks, and the several spellings of one value.

Knows nothing of messages and weights.
"""

import json
from collections.abc import Mapping
from typing import Any

from dialog_jax.errors import UserError

_MAX_DEPTH = 100  # levels of lists and objects; messages, calls and their arguments need only a few
_CONTAINERS = (Mapping, list, tuple)
_LARGEST_FLOAT = 2.0**53  # up to which every integer is a float


def quote(value: Any) -> str:
    """Returns the value and its type, short enough for an error."""
    text = repr(value)
    return f"{text if len(text) <= 60 else text[:57] + '...'} ({type(value).__name__})"


def check_depth(value: Any, where: str) -> None:
    """Raises UserError if lists and objects nest so deeply in the value that a recursive function could fail."""
    level = [value]
    for _ in range(_MAX_DEPTH):
        containers = [
            one.values() if isinstance(one, Mapping) else one for one in level if isinstance(one, _CONTAINERS)
        ]
        level = [entry for entries in containers for entry in entries]
        if not level:
            return
    raise UserError(f"{where}: nests lists and objects more than {_MAX_DEPTH} deep. Flatten it, or write it as text.")


def check_text(value: Any, where: str) -> None:
    """Raises UserError if a string or key in the value is not Unicode text."""
    if isinstance(value, str):
        try:
            value.encode()
        except UnicodeEncodeError:
            raise UserError(
                f"{where} has half a surrogate pair in {quote(value)}; needed Unicode text. Write the whole pair, or "
                "remove it."
            ) from None
    elif isinstance(value, Mapping):
        for key, entry in value.items():
            check_text(key, where)
            check_text(entry, where)
    elif isinstance(value, list | tuple):
        for entry in value:
            check_text(entry, where)


def parse_text(text: str, where: str, remedy: str) -> Any:
    """Returns the value of JSON text, in which null fields stay; None for text that is only white space.

    Raises:
      UserError: the text is not JSON, or nests too deeply.
    """
    if not text.strip():
        return None
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        raise UserError(f"{where} is text but not JSON ({error.msg} at column {error.colno}). {remedy}") from None
    except (RecursionError, ValueError) as error:
        raise UserError(f"{where} is text that cannot be read as JSON ({error}). {remedy}") from None
    check_depth(value, where)
    return value


def parse_object(text: str) -> Any:
    """Returns the object that JSON text has, also if it is encoded twice; None if the text has no object."""
    value: Any = text
    for _ in range(2):
        try:
            value = parse_text(value, "", "")
        except UserError:
            return None
        if not isinstance(value, str):
            break
    return value if isinstance(value, Mapping) else None


def remove_nulls(value: Any) -> Any:
    """Returns the value without null fields of objects; nulls in lists stay.

        {"a": null, "b": [null, {"c": null, "d": 1}]}  ->  {"b": [null, {"d": 1}]}

    Arrow gives every object of a column the fields of all objects of that column, null where they are absent; the
    formats of Parquet and of the exports of data sets have them.
    """
    if isinstance(value, Mapping):
        return {key: remove_nulls(field) for key, field in value.items() if field is not None}
    if isinstance(value, list | tuple):
        return [remove_nulls(item) for item in value]
    return value


def count_nulls(value: Any, keys: frozenset[str], *, inside: bool = False) -> int:
    """Returns the number of null fields in the objects at `keys`, at any depth below them."""
    if isinstance(value, Mapping):
        return sum(
            int(inside) if entry is None else count_nulls(entry, keys, inside=inside or key in keys)
            for key, entry in value.items()
        )
    if isinstance(value, list | tuple):
        return sum(count_nulls(entry, keys, inside=inside) for entry in value)
    return 0


def read_identifier(value: Any) -> str | int | None:
    """Returns an id as a string or an integer, 3.0 as 3; None if it is neither.

    Tables with missing values store integers as floats.
    """
    if isinstance(value, float) and value.is_integer() and abs(value) <= _LARGEST_FLOAT:
        return int(value)
    return value if isinstance(value, str | int) and not isinstance(value, bool) else None
