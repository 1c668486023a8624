"""An Axolotl YAML file to entries of a config, with a list of all that is not carried over.

`axolotl_fields` has the rules of fields and Axolotl's defaults, `axolotl_data` the rules of data sets. No field is left
out in silence.
"""

import functools
import pathlib
from collections.abc import Callable
from typing import Any, NamedTuple

import yaml

from dialog_jax.drafting import axolotl_data, axolotl_fields, axolotl_reasons, config_text
from dialog_jax.drafting.axolotl_values import Fields, NotCarriedError
from dialog_jax.drafting.config_text import Entry
from dialog_jax.errors import UserError

_DATA = {"datasets": axolotl_data.list_train_parts, "test_datasets": axolotl_data.list_validation_parts}
_OTHER_TRAINING = ("rl", "reward_model", "process_reward_model")


class Conversion(NamedTuple):
    """What became of the fields of a file that have a value."""

    entries: list[Entry]
    carried: list[str]
    """Names of fields that the config has, or that say what is done here anyway."""
    defaults: dict[str, Any]
    """Fields that the file leaves out and that the config has with Axolotl's default, which is not ours."""
    left: dict[str, str]
    """Names of the other fields, such as `datasets[0].type`, with the reason of each."""


def convert(file: pathlib.Path) -> Conversion:
    """Returns the conversion of a file.

    Raises:
      UserError: there is no such file, it is not YAML or not a mapping, or it has no field that can be carried over.
    """
    fields = {str(name): value for name, value in _read(file).items() if value is not None}
    _check_training(fields, file)
    defaults = axolotl_fields.find_defaults(fields)
    all_fields = {**defaults, **fields}
    conversion = Conversion([], [], {}, {})
    order = dict.fromkeys(["base_model", *_DATA, *axolotl_fields.RULES, *fields])
    for name in (name for name in order if name in fields):
        if rule := axolotl_fields.RULES.get(name):
            if _add(conversion, name, functools.partial(rule, fields[name], all_fields)):
                conversion.carried.append(name)
        elif list_parts := _DATA.get(name):
            for part, read in list_parts(fields[name]).items():
                if _add(conversion, part, read):
                    conversion.carried.append(part)
        elif axolotl_reasons.is_off(name, fields[name]):
            conversion.carried.append(name)
        else:
            conversion.left[name] = axolotl_reasons.find_reason(name)
    if not conversion.carried:
        raise UserError(
            f"{file}: none of its fields ({', '.join(fields) or 'none'}) can be carried over. Name an Axolotl file, "
            "which has base_model and datasets, or use --model and --data."
        )
    for name, value in defaults.items():
        if _add(conversion, f"{name} (default)", functools.partial(_apply_default, name, value, all_fields)):
            conversion.defaults[name] = value
    return conversion


def _apply_default(name: str, value: Any, fields: Fields) -> list[Entry]:
    """Returns the entries of a default of Axolotl, whose comments say that it is one."""
    entries = axolotl_fields.RULES[name](value, fields)
    return [entry._replace(comment=f"{entry.comment} Axolotl's default.".strip()) for entry in entries]


def _check_training(fields: Fields, file: pathlib.Path) -> None:
    """Raises UserError if a file trains something else than dialogues with cross-entropy."""
    others = [f"{name}: {fields[name]}" for name in _OTHER_TRAINING if fields.get(name)]
    if "pretraining_dataset" in fields and not fields.get("datasets"):
        others.append("pretraining_dataset without datasets")
    if others:
        raise UserError(
            f"{file}: has {', '.join(others)}, which trains something else than dialogues with cross-entropy; it has "
            "no counterpart here. Name a file for supervised fine-tuning."
        )


def _read(file: pathlib.Path) -> dict[Any, Any]:
    if not file.is_file():
        raise UserError(f"--from={file}: no such file. Name an Axolotl config.")
    try:
        fields = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"--from={file}: not YAML ({' '.join(str(error).split())}). Correct it.") from None
    if not isinstance(fields, dict):
        raise UserError(
            f"--from={file}: its content is {type(fields).__name__}; needed a mapping, as Axolotl's files have: "
            "base_model: ..."
        )
    return fields


def _add(conversion: Conversion, name: str, read: Callable[[], list[Entry]]) -> bool:
    """Adds the entries of a field, or the reason why it has none; returns whether it is carried over."""
    try:
        entries = read()
        present = {entry.field for entry in conversion.entries}
        if repeated := [entry.field for entry in entries if entry.field in present]:
            raise NotCarriedError(f"another field sets {', '.join(repeated)}")
        config_text.build_config([*conversion.entries, *entries])
    except (NotCarriedError, UserError) as error:
        conversion.left[name] = str(error)
        return False
    conversion.entries.extend(entries)
    return True
