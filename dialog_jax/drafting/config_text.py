"""Fields of a config, each with a comment, to the text of a Python file that `--config=FILE` reads.

The text is as `ruff format` leaves it, for any length of line: what has several parts has one per line.
"""

import re
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from dialog_jax.training.config import TrainConfig

_WIDTH = 100  # of comments
_INDENT = " " * 4


class Entry(NamedTuple):
    """A field of the config that the file sets."""

    field: str
    """Its path, such as `data.max_length`."""
    value: Any
    comment: str = ""
    """Why it has this value; written above it."""


def build_config(entries: Sequence[Entry]) -> TrainConfig:
    """Returns the config that a file with these entries has.

    Raises:
      UserError: a value is not valid, or contradicts another.
    """
    default, fields = TrainConfig(), {}
    for group, members in _group(entries).items():
        values = {entry.field.rpartition(".")[2]: entry.value for entry in members}
        fields.update({group: type(getattr(default, group))(**values)} if group else values)
    return TrainConfig(**fields)


def write_config(docstring: str, entries: Sequence[Entry]) -> str:
    """Returns the text of the file: the docstring, and `get_config()` with the entries.

    [Entry("rows", 8, "On 8 devices."), Entry("data.train", "my.jsonl")]   ->   TrainConfig(
                                                                                    # On 8 devices.
                                                                                    rows=8,
                                                                                    data=DataConfig(
                                                                                        train="my.jsonl",
                                                                                    ),
                                                                                )

    Fields without a group come where the first of them stands.
    """
    default = TrainConfig()
    imports = {("dialog_jax.training", "config"), ("dialog_jax.training.config", "TrainConfig")}
    body: list[str] = []
    written: set[str] = set()
    groups = _group(entries)
    for entry in entries:
        group = entry.field.rpartition(".")[0]
        if not group:
            body += _write_field(entry, depth=3)
        elif group not in written:
            written.add(group)
            kind = type(getattr(default, group))
            imports.add((kind.__module__, kind.__name__))
            body.append(f"{_INDENT * 3}{group}={kind.__name__}(")
            for member in groups[group]:
                body += _write_field(member, depth=4)
            body.append(f"{_INDENT * 3}),")
    modules = sorted({module for module, _ in imports})
    lines = [
        f'"""{_escape(docstring)}"""',
        "",
        "import ml_collections",
        "",
        *(f"from {module} import {', '.join(sorted(n for m, n in imports if m == module))}" for module in modules),
        "",
        "",
        "def get_config() -> ml_collections.ConfigDict:",
        f"{_INDENT}return config.to_config_dict(",
        f"{_INDENT * 2}TrainConfig(",
        *body,
        f"{_INDENT * 2})",
        f"{_INDENT})",
    ]
    return "\n".join(lines) + "\n"


def _group(entries: Sequence[Entry]) -> dict[str, list[Entry]]:
    """Returns the entries by the first part of their path; those of the config itself are in group ""."""
    groups: dict[str, list[Entry]] = {}
    for entry in entries:
        groups.setdefault(entry.field.rpartition(".")[0], []).append(entry)
    assert len({entry.field for entry in entries}) == len(entries), "each field once"
    return groups


def _write_field(entry: Entry, depth: int) -> list[str]:
    indent = _INDENT * depth
    comment = textwrap.wrap(entry.comment, _WIDTH - len(indent) - 2, break_on_hyphens=False, break_long_words=False)
    value = _write_value(entry.value, depth)
    return [*(f"{indent}# {line}" for line in comment), f"{indent}{entry.field.rpartition('.')[2]}={value},"]


def _write_value(value: Any, depth: int) -> str:
    """Returns a value as Python; a dict, list or tuple with one part per line."""
    if isinstance(value, str):
        return _quote(value)
    if isinstance(value, float):
        return re.sub(r"e([+-])0(\d)", r"e\1\2", repr(value))  # 2e-05 -> 2e-5
    if isinstance(value, Mapping):
        parts = [f"{_quote(key)}: {_write_value(part, depth + 1)}" for key, part in value.items()]
    elif isinstance(value, list | tuple):
        parts = [_write_value(part, depth + 1) for part in value]
    else:
        return repr(value)
    opening, closing = "{}" if isinstance(value, Mapping) else "[]" if isinstance(value, list) else "()"
    if not parts:
        return opening + closing
    indent = _INDENT * (depth + 1)
    return "\n".join([opening, *(f"{indent}{part}," for part in parts), f"{_INDENT * depth}{closing}"])


def _quote(text: str) -> str:
    """Returns a literal in double quotes, or in single ones where these need fewer escapes."""
    quote = "'" if text.count('"') > text.count("'") else '"'
    # Between quotes of both kinds, repr escapes single quotes only.
    inner = repr(f"'{text}\"")[3:-2].replace("\\'", "'")
    return quote + inner.replace(quote, f"\\{quote}") + quote


def _escape(docstring: str) -> str:
    text = docstring.strip() + "\n" * ("\n" in docstring.strip())  # the quotes of several lines are on their own
    return text.replace("\\", "\\\\").replace('"""', '\\"\\"\\"')
