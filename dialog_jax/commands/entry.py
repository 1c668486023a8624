"""Runs one command: imports it, parses its flags, calls its `main`, and prints a user's error in one line.

A command is a module with absl flags and a function `main`, which returns its exit code, None for 0.
"""

import importlib
import sys
import traceback
from collections.abc import Sequence
from typing import Any

from absl import flags

from dialog_jax.errors import UserError
from dialog_jax.training import console

_DEBUG = flags.DEFINE_bool("debug", False, "Print the traceback of every error, also of those in your input.")

_INTERRUPTED = 130  # as a shell reports a process that SIGINT ended


def run(command: str, arguments: Sequence[str]) -> int:
    """Returns the exit code: that of the command, or 1 after an error that the user can correct.

    Any other exception is a bug and propagates with its traceback.
    """
    console.quiet_libraries()
    sys.argv = [f"dialog_jax {command}", *arguments]  # also read by ml_collections, for --config.FIELD=VALUE
    try:
        module = importlib.import_module(f"dialog_jax.commands.{command}")
        if not {"--help", "-h"}.isdisjoint(arguments):
            print(help_text(module.__doc__ or "", module.__name__))
            return 0
        positional = flags.FLAGS(sys.argv)[1:]
        if positional:
            raise UserError(f"got {positional[0]!r}; all arguments are flags, see --help.")
        return module.main() or 0
    except (UserError, flags.Error, OSError) as error:
        if "--debug" in arguments:
            traceback.print_exc()
        print_message(str(error))
        return 1
    except KeyboardInterrupt:
        print_message("interrupted")
        return _INTERRUPTED


def required(flag: flags.FlagHolder, example: str) -> Any:
    """Returns the value of a flag.

    Raises:
      UserError: it is not set.
    """
    if flag.value is None:
        raise UserError(f"--{flag.name} is missing; give it, for instance --{flag.name}={example}.")
    return flag.value


def print_message(text: str) -> None:
    """Prints a line to the user, outside the command's output: `dialog_jax train: text`."""
    print(f"{sys.argv[0]}: {text}", file=sys.stderr)


def help_text(docstring: str, module: str) -> str:
    """What --help prints: the command's docstring and its flags."""
    defined = [*flags.FLAGS.get_flags_for_module(module), *flags.FLAGS.get_flags_for_module(__name__)]
    lines = [docstring.strip(), "", "Flags:"]
    for flag in sorted(defined, key=lambda flag: flag.name):
        default = f" (default: {flag.default})" if flag.default else ""
        lines.append(f"  --{flag.name}: {flag.help}{default}")
    return "\n".join(lines)
