"""Fields of Axolotl's data sets to entries of `data`.

In: the value of `datasets` or `test_datasets`. Out: for each of its fields, by a name such as `datasets[0].type`, a
function that returns its entries or raises `NotCarriedError`.
"""

import functools
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from dialog_jax.dialogues import weights
from dialog_jax.dialogues.schemas import ROLE_NAMES
from dialog_jax.drafting import axolotl_fields, axolotl_values
from dialog_jax.drafting.axolotl_values import Fields, NotCarriedError
from dialog_jax.drafting.config_text import Entry

Parts = dict[str, Callable[[], list[Entry]]]
_TYPES = ("chat_template", "sharegpt")
_FILE_TYPES = ("json", "parquet")
_MESSAGES = ("messages", "conversations")
_MAPPINGS = {"role": ("role", "from"), "content": ("content", "value")}
_IN_RECORD = "recognized from the record, or not supported: see docs/data.md"
_LIST = "needed a list of data sets, each with a path"


def list_train_parts(value: Any) -> Parts:
    """Returns the fields of `datasets`: data.train, or data.mix of several, and how records are read."""
    if not isinstance(value, list) or not all(isinstance(one, Mapping) and one.get("path") for one in value):
        return {"datasets": functools.partial(_refuse, _LIST)}
    name = "datasets[0].path" if len(value) == 1 else "datasets"
    parts: Parts = {name: functools.partial(_read_sources, value)}
    for index, one in enumerate(value):
        for key, part in one.items():
            if key != "roles" and key != "path" and part is not None:
                parts[f"datasets[{index}].{key}"] = functools.partial(_read_part, key, part, one, len(value))
    roles = {f"datasets[{index}].roles": one["roles"] for index, one in enumerate(value) if one.get("roles")}
    return {**parts, **_list_role_parts(roles)}


def list_validation_parts(value: Any) -> Parts:
    """Returns the fields of `test_datasets`: data.validation."""
    if not isinstance(value, list) or len(value) != 1 or not isinstance(value[0], Mapping) or not value[0].get("path"):
        return {"test_datasets": functools.partial(_refuse, "not one data set with a path, as data.validation has")}
    fields = value[0]
    parts: Parts = {"test_datasets": lambda: [Entry("data.validation", _find_source(fields))]}
    for name, part in fields.items():
        if name == "split":
            parts["test_datasets[0].split"] = lambda: [Entry("data.validation_split", str(fields["split"]))]
        elif name not in ("path", "data_files", "ds_type") and part is not None:
            parts[f"test_datasets[0].{name}"] = functools.partial(_refuse, "read as that of datasets")
    return parts


def _refuse(reason: str) -> list[Entry]:
    raise NotCarriedError(reason)


def _read_sources(sets: Sequence[Fields]) -> list[Entry]:
    sources = [_find_source(fields) for fields in sets]
    if len(sources) == 1:
        return [Entry("data.train", sources[0])]
    mix = {f"set{index}": {"train": source, "epochs": 1.0} for index, source in enumerate(sources)}
    return [Entry("data.mix", mix, "Each epoch passes once over every set, as if they were concatenated.")]


def _find_source(fields: Fields) -> str:
    """Returns the path of a data set, or its file where the path is a kind of files, such as json."""
    path, files = str(fields["path"]), fields.get("data_files")
    if path in (*_FILE_TYPES, "csv") and files:
        names = files if isinstance(files, list) else [files]
        if len(names) != 1 or not isinstance(names[0], str):
            raise NotCarriedError(f"{path} has several data_files: join them, or list each as a data set")
        path = names[0]
    if pathlib.PurePath(path).suffix == ".csv":
        raise NotCarriedError(f"{path!r} is CSV: write its dialogues to a .jsonl file")
    return path


def _read_part(name: str, value: Any, fields: Fields, sets: int) -> list[Entry]:
    """Returns the entries of a field of a data set.

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
        return [] if value == "train" else [Entry("data.train_split", axolotl_values.text(value))]
    elif name == "ds_type":
        if value not in _FILE_TYPES:
            raise NotCarriedError(f"files of {value!r} are not read here: write JSON lines")
    elif name == "data_files":
        if fields["path"] not in (*_FILE_TYPES, "csv"):
            raise NotCarriedError("single files of a data set cannot be named: download them, and name them as path")
        _find_source(fields)
    elif name in ("name", "revision"):
        raise NotCarriedError("a configuration or revision of a Hub data set cannot be named")
    elif name == "field_messages":
        if value not in _MESSAGES:
            raise NotCarriedError(f"records have messages or conversations here: rename {value!r}")
    elif name == "message_field_training":
        if value not in weights.SWITCHES:
            raise NotCarriedError("rename it to train")
    elif name in ("message_field_role", "message_field_content"):
        _check_mapping({name.removeprefix("message_field_"): value})
    elif name == "message_property_mappings":
        _check_mapping(axolotl_values.mapping(value))
    elif name in ("roles_to_train", "train_on_eos", "chat_template", "chat_template_jinja"):
        entries = axolotl_fields.RULES[name](value, fields)
        if entries and sets > 1:
            raise NotCarriedError("one for all data here")
        return entries
    elif value not in (False, "", [], {}):
        raise NotCarriedError(_IN_RECORD)
    return []


def _check_mapping(names: Mapping[str, Any]) -> None:
    if wrong := [f"{key}: {name}" for key, name in names.items() if name not in _MAPPINGS.get(key, (key,))]:
        raise NotCarriedError(f"messages have role and content, or from and value, here; rename {', '.join(wrong)}")


def _list_role_parts(values: Mapping[str, Any]) -> Parts:
    """Returns the `roles` of data sets, by their names: the entry of all of them, and errors."""
    parts: Parts = {}
    roles: dict[str, str] = {}
    for name, value in values.items():
        try:
            roles.update(_read_roles(value, roles))
        except NotCarriedError as error:
            parts[name] = functools.partial(_refuse, str(error))
        else:
            parts[name] = list
    unknown = {speaker: role for speaker, role in roles.items() if ROLE_NAMES.get(speaker) != role}
    if unknown:
        last = [name for name in parts if parts[name] is list][-1]
        parts[last] = lambda: [Entry("data.roles", unknown)]
    return parts


def _read_roles(value: Any, others: Mapping[str, str]) -> dict[str, str]:
    """Returns the role of each name in a data set.

    Args:
      others: those of other data sets.
    """
    roles: dict[str, str] = {}
    for role, names in axolotl_values.mapping(value).items():
        if str(role) not in ROLE_NAMES:
            raise NotCarriedError(f"{role!r} is no role here")
        roles.update({str(name): ROLE_NAMES[str(role)] for name in (names if isinstance(names, list) else [names])})
    for name, role in roles.items():
        if others.get(name, role) != role:
            raise NotCarriedError(f"{name!r} is {role} in this data set and {others[name]} in another")
    return roles
