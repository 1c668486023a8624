"""Runs one command: imports it, parses its flags, calls its `main`, and prints a user's error in one line.

A command is a module with absl flags and a function `main`, which returns its exit code, None for 0.
"""

import errno
import importlib
import pathlib
import re
import sys
import traceback
from collections.abc import Sequence
from typing import Any

from absl import flags

from dialog_jax import atomic_files
from dialog_jax.errors import UserError
from dialog_jax.training import console

_DEBUG = flags.DEFINE_bool("debug", False, "Print the traceback of every error, also of those in your input.")

# Errors of the machine, not bugs: no permission, a full disk, or one that cannot be written or read.
_ENVIRONMENT = {errno.EACCES, errno.EPERM, errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO}
_VALUES = {"bool": "true or false", "int": "an integer", "float": "a number"}
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
            from dialog_jax.commands import help_text  # imports transformers, which must be quiet by now

            own_flags = flags.FLAGS.get_flags_for_module(module.__name__)
            shared = [flags.FLAGS[name] for name in ("adapter", "base", "data", "debug") if name in flags.FLAGS]
            own_flags += [flag for flag in shared if flag not in own_flags]
            print(help_text.format_help(module.__doc__ or "", own_flags, with_config="config" in flags.FLAGS))
            return 0
        positional = flags.FLAGS(sys.argv)[1:]
        if positional:
            raise UserError(f"got {positional[0]!r}; all arguments are flags, see --help.")
        return module.main() or 0
    except flags.IllegalFlagValueError as error:
        return _report(error, arguments, _explain_value(str(error), arguments))
    except (UserError, flags.Error) as error:
        return _report(error, arguments)
    except OSError as error:
        if error.errno not in _ENVIRONMENT:
            raise
        return _report(error, arguments)
    except KeyboardInterrupt:
        print_message("interrupted")
        return _INTERRUPTED


def _report(error: Exception, arguments: Sequence[str], text: str = "") -> int:
    if "--debug" in arguments:
        traceback.print_exc()
    print_message(" ".join((text or str(error)).split("\n")))
    return 1


def _explain_value(message: str, arguments: Sequence[str]) -> str:
    """Returns a message in our words in place of `flag --config.rows=abc: invalid literal for int() with base 10`."""
    match = re.fullmatch(r"flag --([\w.]+)=(.*?): .*", message, re.DOTALL)
    if not match or match[1] not in flags.FLAGS:
        return message
    parser = flags.FLAGS[match[1]].parser
    needed = parser.syntactic_help or _VALUES.get(parser.flag_type())
    given = (argument.partition("=")[2] for argument in arguments if message.startswith(f"flag {argument}: "))
    value = next(given, match[2])  # which may have a colon
    return f"--{match[1]} is {value!r}; needed {needed}. --help describes it." if needed else message


def require_file_path(flag: flags.FlagHolder, example: str = "") -> pathlib.Path:
    """Returns the path of a file to write, so that a wrong one is an error before the work and not after it.

    Raises:
      UserError: the flag is not set, or no file can be made there.
    """
    path = pathlib.Path(required(flag, example))
    if path.is_dir():
        raise UserError(f"--{flag.name}={path} is a directory; name a file.")
    atomic_files.check_parents(path, f"--{flag.name}={path}")
    return path


def required(flag: flags.FlagHolder, example: str) -> Any:
    """Returns the value of a flag.

    Raises:
      UserError: it is not set.
    """
    if flag.value is None:
        raise UserError(f"--{flag.name} is missing. Pass it, for instance --{flag.name}={example}.")
    return flag.value


def print_message(text: str) -> None:
    """Prints a line to the user, outside the command's output: `dialog_jax train: text`."""
    print(f"{sys.argv[0]}: {text}", file=sys.stderr)
