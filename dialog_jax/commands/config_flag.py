"""`--config=FILE` and `--config.FIELD=VALUE`, with the same meaning in every command that reads data or a model.

FILE is a Python file with a function `get_config()`, as in experiments/; without it, the defaults of `TrainConfig`
apply. FIELD is the path of a field, such as `optimizer.learning_rate`.
"""

import ast
import importlib.util
import pathlib
import re
import sys
from typing import Any

from absl import flags
from ml_collections import ConfigDict, config_flags

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
    holder = config_flags.DEFINE_config_dict("config", fields, "Overrides a field of the config.", sys_argv=sys.argv)
    for name in flags.FLAGS:
        if name.startswith("config.") and isinstance(_find_value(name.removeprefix("config."), fields), ConfigDict):
            flags.FLAGS[name].parser = _DictParser()
    return holder


class _DictParser(flags.ArgumentParser):
    """Parses a dict such as {"a": 1}; its keys may have dots, which the parser of ml_collections refuses."""

    syntactic_help = 'a dict such as {"a": 1}'

    def parse(self, argument: str) -> ConfigDict:
        try:
            value = ast.literal_eval(argument)
        except (SyntaxError, ValueError):
            value = None
        if not isinstance(value, dict) or not all(isinstance(key, str) for key in value):
            raise ValueError(f"{argument!r} is no dict with texts as keys")
        return ConfigDict(value, allow_dotted_keys=True)


def read(flag: flags.FlagHolder) -> TrainConfig:
    """Returns the config, with its overrides.

    Raises:
      UserError: the value of a field is not valid.
    """
    return config.from_config_dict(flag.value.copy_and_resolve_references())


def _load(file: pathlib.Path) -> ConfigDict:
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
    if not isinstance(fields, ConfigDict):
        raise UserError(
            f"--config={file}: get_config() returned {type(fields).__name__}; needed a ConfigDict, as "
            "config.to_config_dict(TrainConfig(...)) returns. Copy experiments/finetune.py."
        )
    return fields


def _check_field(path: str, fields: ConfigDict) -> None:
    """Raises UserError if the config has no field of this path; the message lists the fields that exist."""
    place: Any = fields
    names = path.split(".")
    for depth, name in enumerate(names):
        if not isinstance(place, ConfigDict) or name not in place:
            parent = ".".join(["config", *names[:depth]])
            known = ", ".join(place) if isinstance(place, ConfigDict) else ""
            raise UserError(
                f"--config.{path}: {parent} has no field {name!r}; it has {known or 'none'}. --help describes them."
            )
        place = place[name]


def _find_value(path: str, fields: ConfigDict) -> Any:
    """Returns the value of a field that exists."""
    place: Any = fields
    for name in path.split("."):
        place = place[name]
    return place
