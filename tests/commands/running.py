"""Runs a command inside the process of the test: quicker than a process each, and under the shape checks of tests."""

import contextlib
import importlib
import io
import sys
from collections.abc import Iterator
from unittest import mock

from absl import flags

from dialog_jax.commands import entry


@contextlib.contextmanager
def loaded(command: str, *arguments: str) -> Iterator:
    """The command's module, with its flags parsed; they are gone afterwards, since commands share names of flags."""
    with _clean_flags(command), mock.patch.object(sys, "argv", [f"dialog_jax {command}", *arguments]):
        module = importlib.import_module(f"dialog_jax.commands.{command}")
        flags.FLAGS(sys.argv)
        yield module


def run(command: str, *arguments: str) -> tuple[str, str]:
    """(standard output, standard error) of a command; the latter ends with `[exit code N]` unless it is 0."""
    out, error = io.StringIO(), io.StringIO()
    with (
        _clean_flags(command),
        mock.patch.object(sys, "argv", sys.argv),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(error),
    ):
        code = entry.run(command, arguments)
    if code:
        error.write(f"[exit code {code}]")
    return out.getvalue(), error.getvalue()


@contextlib.contextmanager
def _clean_flags(command: str) -> Iterator[None]:
    before, parsed = set(flags.FLAGS), flags.FLAGS.is_parsed()
    sys.modules.pop(f"dialog_jax.commands.{command}", None)  # defines its flags again
    try:
        yield
    finally:
        for flag in set(flags.FLAGS) - before:
            delattr(flags.FLAGS, flag)
        flags.FLAGS.unparse_flags()
        if parsed:
            flags.FLAGS.mark_as_parsed()
