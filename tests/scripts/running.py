"""Runs a script inside the process of the test: quicker than a process each, and under the shape checks of tests."""

import contextlib
import importlib.util
import io
import pathlib
import sys
from collections.abc import Iterator
from unittest import mock

from absl import flags

SCRIPTS = pathlib.Path(__file__).parents[2] / "scripts"


@contextlib.contextmanager
def loaded(name: str) -> Iterator:
    """The script as a module; the flags it defines are gone afterwards, since scripts share names."""
    before, parsed = set(flags.FLAGS), flags.FLAGS.is_parsed()
    spec = importlib.util.spec_from_file_location(f"{name}_script", SCRIPTS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
        yield module
    finally:
        for flag in set(flags.FLAGS) - before:
            delattr(flags.FLAGS, flag)
        flags.FLAGS.unparse_flags()
        if parsed:
            flags.FLAGS.mark_as_parsed()


def run(name: str, *arguments: str) -> tuple[str, str]:
    """(standard output, standard error) of a script; what it says when it exits is at the end of the latter."""
    out, error = io.StringIO(), io.StringIO()
    argv = [f"{name}.py", *arguments]
    with loaded(name) as module, mock.patch.object(sys, "argv", argv):
        rest = getattr(module, "parse_flags", flags.FLAGS)(argv)
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(error):
            try:
                module.main(rest)
            except SystemExit as stop:
                error.write(str(stop))
    return out.getvalue(), error.getvalue()
