"""`--config=FILE` and `--config.FIELD=VALUE`, with the same meaning in every command that reads data or a model.

FILE is a Python file with a function `get_config()`, as in experiments/; without it, the defaults of `TrainConfig`
apply. FIELD is the path of a field, such as `optimizer.learning_rate`.
"""

import importlib.util
import pathlib
import re
import sys
from typing import Any

import ml_collections
from absl import flags
from ml_collections import config_flags

from dialog_jax.errors import UserError
from dialog_jax.training import config
from dialog_jax.training.config import TrainConfig


def define() -> flags.FlagHolder:
    """Returns the holder of both flags, for `read`; defines them and takes `--config=FILE` out of sys.argv.

    Raises:
      UserError: there is no such file, its config is refused, or a field that a flag names does not exist.
    """
    parser = flags.FlagValues()
    parser.set_gnu_getopt(True)
    file = flags.DEFINE_string("config", None, "", flag_values=parser)
    sys.argv = parser(sys.argv, known_only=True)
    fields = _load(pathlib.Path(file.value)) if file.value else config.to_config_dict(TrainConfig())
    for argument in sys.argv[1:]:
        if match := re.match(r"--?(?:no)?config\.([^=]*)", argument):
            _check_field(match[1], fields)
    return config_flags.DEFINE_config_dict("config", fields, "Overrides a field of the config.", sys_argv=sys.argv)


def read(flag: flags.FlagHolder) -> TrainConfig:
    """Returns the config, with its overrides.

    Raises:
      UserError: the value of a field is not valid.
    """
    return config.from_config_dict(flag.value.copy_and_resolve_references())


def _load(file: pathlib.Path) -> ml_collections.ConfigDict:
    """Returns the config of a file. An exception of its code, other than a UserError, is a bug in it and propagates."""
    if not file.is_file():
        raise UserError(
            f"--config={file}: no such file. Name a Python file with a function get_config(), such as "
            "experiments/finetune.py, or leave --config out for the defaults."
        )
    spec = importlib.util.spec_from_file_location("dialog_jax_config", file)
    if spec is None or spec.loader is None:
        raise UserError(f"--config={file}: not a Python file. Its name must end in .py.")
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except SyntaxError as error:
        raise UserError(
            f"--config={file}: {error.msg} in line {error.lineno} of {error.filename}. Correct it."
        ) from error
    if not hasattr(module, "get_config"):
        raise UserError(f"--config={file}: has no function get_config(). Copy experiments/finetune.py.")
    fields = module.get_config()
    if not isinstance(fields, ml_collections.ConfigDict):
        raise UserError(
            f"--config={file}: get_config() returned {type(fields).__name__}; needed a ConfigDict, as "
            "config.to_config_dict(TrainConfig(...)) returns. Copy experiments/finetune.py."
        )
    return fields


def _check_field(path: str, fields: ml_collections.ConfigDict) -> None:
    """Raises UserError if the config has no field of this path; the message lists the fields that exist."""
    place: Any = fields
    names = path.split(".")
    for depth, name in enumerate(names):
        if not isinstance(place, ml_collections.ConfigDict) or name not in place:
            parent = ".".join(["config", *names[:depth]])
            known = ", ".join(place) if isinstance(place, ml_collections.ConfigDict) else ""
            raise UserError(
                f"--config.{path}: {parent} has no field {name!r}; it has {known or 'none'}. --help describes them."
            )
        place = place[name]
