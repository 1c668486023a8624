"""What `dialog_jax COMMAND --help` prints: the command's docstring, its flags, and every field of the config."""

import ast
import dataclasses
import inspect
import textwrap
from collections.abc import Iterator

from absl import flags

from dialog_jax.training.config import TrainConfig

_WIDTH = 96  # columns
_INDENT = " " * 6


def format_help(docstring: str, own_flags: list[flags.Flag], *, with_config: bool) -> str:
    """Returns the help of a command."""
    lines = [_reflow(docstring), "", "Flags:"]
    for flag in sorted(own_flags, key=lambda flag: flag.name):
        default = "" if flag.default in (None, "", []) else f"={flag.default}"
        lines += [f"  --{flag.name}{default}", *_wrap(flag.help)]
    if with_config:
        lines += [
            "  --config",
            *_wrap("A Python file whose get_config() returns the config; see experiments/finetune.py."),
        ]
        lines += ["", "Fields of the config, with the defaults that apply without --config=FILE:"]
        lines += _format_fields(TrainConfig(), "")
    return "\n".join(lines)


def _format_fields(config: object, prefix: str) -> Iterator[str]:
    """Yields the lines of a config's own fields, then those of the configs in it."""
    docstrings = attribute_docstrings(type(config))
    nested = []
    for field in dataclasses.fields(config):  # type: ignore[arg-type]  # an instance of a dataclass
        value = getattr(config, field.name)
        if dataclasses.is_dataclass(value):
            nested.append((field.name, value))
        else:
            yield f"  --config.{prefix}{field.name}={value!r}" if value != "" else f"  --config.{prefix}{field.name}="
            yield from _wrap(docstrings[field.name])
    for name, value in nested:
        yield ""
        yield f"{prefix}{name}: {inspect.cleandoc(type(value).__doc__ or '').splitlines()[0]}"
        yield from _format_fields(value, f"{prefix}{name}.")


def attribute_docstrings(config: type) -> dict[str, str]:
    """Returns the string below each annotated attribute of a class, by the attribute's name; read from its source."""
    (node,) = ast.parse(textwrap.dedent(inspect.getsource(config))).body
    assert isinstance(node, ast.ClassDef)
    docstrings = {}
    for attribute, below in zip(node.body, [*node.body[1:], None], strict=True):
        if isinstance(attribute, ast.AnnAssign) and isinstance(attribute.target, ast.Name):
            text = below.value.value if isinstance(below, ast.Expr) and isinstance(below.value, ast.Constant) else ""
            docstrings[attribute.target.id] = inspect.cleandoc(str(text))
    return docstrings


def _reflow(docstring: str) -> str:
    """Wraps the paragraphs of a docstring; lines of indented examples and tables stay as they are."""
    paragraphs = inspect.cleandoc(docstring).split("\n\n")
    return "\n\n".join(text if "\n " in f"\n{text}" else textwrap.fill(text, _WIDTH) for text in paragraphs)


def _wrap(text: str) -> list[str]:
    return textwrap.wrap(text, _WIDTH, initial_indent=_INDENT, subsequent_indent=_INDENT, break_on_hyphens=False)
