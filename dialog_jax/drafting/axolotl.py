"""An Axolotl YAML file to entries of a config, with a list of all that is not carried over.

`axolotl_fields` has the fields; this module reads the file and its data sets. No field is left out in silence.
"""

import functools
import pathlib
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import yaml

from dialog_jax.dialogues.schemas import ROLE_NAMES
from dialog_jax.drafting import axolotl_fields, axolotl_reasons, config_text
from dialog_jax.drafting.axolotl_fields import NotCarriedError
from dialog_jax.drafting.config_text import Entry
from dialog_jax.errors import UserError

_TYPES = ("chat_template", "sharegpt")
_MESSAGES = ("messages", "conversations")
_MAPPINGS = {"role": ("role", "from"), "content": ("content", "value")}
_DATA_FIELDS = ("datasets", "test_datasets")
_IN_RECORD = "recognized from the record, or not supported: see docs/data.md"


class Conversion(NamedTuple):
    """What became of the fields of a file that have a value."""

    entries: list[Entry]
    carried: list[str]
    """Names of fields that the config has, or that say what is done here anyway."""
    left: dict[str, str]
    """Names of the other fields, such as `datasets[0].type`, with the reason of each."""


def convert(file: pathlib.Path) -> Conversion:
    """Returns the conversion of a file.

    Raises:
      UserError: there is no such file, it is not YAML or not a mapping, or it has no field that can be carried over.
    """
    fields = {str(name): value for name, value in _read(file).items() if value is not None}
    conversion = Conversion([], [], {})
    order = dict.fromkeys(["base_model", *_DATA_FIELDS, *axolotl_fields.RULES, *fields])
    for name in (name for name in order if name in fields):
        if rule := axolotl_fields.RULES.get(name):
            _add(conversion, name, functools.partial(rule, fields[name], fields))
        elif name == "datasets":
            _convert_data(conversion, fields[name])
        elif name == "test_datasets":
            _convert_test_data(conversion, fields[name])
        else:
            conversion.left[name] = axolotl_reasons.find_reason(name)
    if not conversion.carried:
        raise UserError(
            f"{file}: none of its fields ({', '.join(fields) or 'none'}) can be carried over. Name an Axolotl file, "
            "which has base_model and datasets, or use --model and --data."
        )
    return conversion


def _read(file: pathlib.Path) -> dict[Any, Any]:
    if not file.is_file():
        raise UserError(f"--from={file}: no such file. Name a YAML file of Axolotl.")
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


def _add(conversion: Conversion, name: str, read: Callable[[], list[Entry]]) -> None:
    """Adds the entries of a field, or the reason why it has none."""
    try:
        entries = read()
        present = {entry.field for entry in conversion.entries}
        if repeated := [entry.field for entry in entries if entry.field in present]:
            raise NotCarriedError(f"another field sets {', '.join(repeated)}")
        config_text.build_config([*conversion.entries, *entries])
    except (NotCarriedError, UserError) as error:
        conversion.left[name] = str(error)
    else:
        conversion.entries.extend(entries)
        conversion.carried.append(name)


def _convert_data(conversion: Conversion, value: Any) -> None:
    """Adds what `datasets` says: data.train, or data.mix of several."""
    if not isinstance(value, list) or not all(isinstance(one, Mapping) and one.get("path") for one in value):
        conversion.left["datasets"] = "no list of data sets that have a path"
        return
    paths = [str(one["path"]) for one in value]
    if len(paths) == 1:
        _add(conversion, "datasets[0].path", lambda: [Entry("data.train", paths[0])])
    else:
        mix = {f"set{index}": {"train": path, "epochs": 1.0} for index, path in enumerate(paths)}
        comment = "Each set is passed once per epoch, as one data set of all."
        _add(conversion, "datasets", lambda: [Entry("data.mix", mix, comment)])
    roles: dict[str, str] = {}
    for index, one in enumerate(value):
        for name, part in one.items():
            if name != "path" and part is not None:
                read = functools.partial(_read_part, name, part, one, len(paths), roles)
                _add(conversion, f"datasets[{index}].{name}", read)
    if roles:
        conversion.entries.append(Entry("data.roles", roles))


def _read_part(name: str, value: Any, fields: Mapping[str, Any], sets: int, roles: dict[str, str]) -> list[Entry]:
    """Returns the entries of a field of a data set; its further names of roles are added to `roles`.

    Args:
      fields: of the data set.
      sets: number of data sets.
    """
    if name == "type":
        if value not in _TYPES:
            raise NotCarriedError(f"records of {value!r} are not read here: write messages, or prompt and completion")
    elif name == "split":
        if sets > 1 and value != "train":
            raise NotCarriedError("all sets of data.mix have the split data.train_split")
        if "[" in str(value):
            raise NotCarriedError("a part of a split: write it to a file")
        return [] if value == "train" else [Entry("data.train_split", axolotl_fields.text(value))]
    elif name == "field_messages":
        if value not in _MESSAGES:
            raise NotCarriedError(f"records have messages or conversations here: rename {value!r}")
    elif name in ("message_field_role", "message_field_content"):
        _check_mapping({name.removeprefix("message_field_"): value})
    elif name == "message_property_mappings":
        _check_mapping(axolotl_fields.mapping(value))
    elif name == "roles":
        roles.update(_read_roles(axolotl_fields.mapping(value)))
    elif name in ("roles_to_train", "train_on_eos", "chat_template", "chat_template_jinja"):
        if sets > 1:
            raise NotCarriedError("one for all data here")
        return axolotl_fields.RULES[name](value, fields)
    else:
        raise NotCarriedError(_IN_RECORD)
    return []


def _check_mapping(names: Mapping[str, Any]) -> None:
    if wrong := [f"{key}: {name}" for key, name in names.items() if name not in _MAPPINGS.get(key, (key,))]:
        raise NotCarriedError(f"messages have role and content, or from and value, here; rename {', '.join(wrong)}")


def _read_roles(value: Mapping[str, Any]) -> dict[str, str]:
    """Returns the role of each name in the data that is not known anyway."""
    roles: dict[str, str] = {}
    for role, names in value.items():
        if str(role) not in ROLE_NAMES:
            raise NotCarriedError(f"{role!r} is no role here")
        roles.update({str(name): ROLE_NAMES[str(role)] for name in (names if isinstance(names, list) else [names])})
    return {name: role for name, role in roles.items() if ROLE_NAMES.get(name) != role}


def _convert_test_data(conversion: Conversion, value: Any) -> None:
    """Adds what `test_datasets` says: data.validation."""
    if not isinstance(value, list) or len(value) != 1 or not isinstance(value[0], Mapping) or "path" not in value[0]:
        conversion.left["test_datasets"] = "not one data set with a path, as data.validation has"
        return
    _add(conversion, "test_datasets", lambda: [Entry("data.validation", str(value[0]["path"]))])
    if split := value[0].get("split"):
        _add(conversion, "test_datasets[0].split", lambda: [Entry("data.validation_split", str(split))])
    for name in value[0].keys() - {"path", "split"}:
        conversion.left[f"test_datasets[0].{name}"] = "read as that of datasets"
