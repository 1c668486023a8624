"""Files, hub data sets and Python records to checked `Dialogue`s, one at a time.

Knows the formats of records, and nothing of templates, tokens or loss.
"""

import math
import pathlib
import types
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from dialog_jax.dialogues import schemas, sources
from dialog_jax.dialogues.dialogue import Dialogue, Message, Part, name_dialogue
from dialog_jax.errors import UserError

_NO_ROLES: Mapping[str, str] = types.MappingProxyType({})
_SMALLEST_WEIGHT, _LARGEST_WEIGHT = 1e-30, 1e30


def read_dialogues(
    source: str | pathlib.Path, *, split: str = "train", roles: Mapping[str, str] = _NO_ROLES
) -> Iterator[Dialogue]:
    """Returns an iterator over the dialogues of a file or data set.

    Args:
      source: a `.jsonl`, `.ndjson`, `.json` (a list of records, or one) or `.parquet` file, all but the last also
        compressed; otherwise a directory or Hugging Face hub name that the optional package `datasets` reads.
      split: which split of a data set; files have none.
      roles: further names of roles, as `data.roles`.

    Raises:
      UserError: the source does not exist, is not of the format of its suffix, is empty, or holds a record that
        is not a dialogue. Names the file, the line and the remedy.
    """
    return _raise_errors(iterate_dialogues(source, split=split, roles=roles), pathlib.Path(source).name)


def iterate_dialogues(
    source: str | pathlib.Path, *, split: str = "train", roles: Mapping[str, str] = _NO_ROLES
) -> Iterator[Dialogue | UserError]:
    """Returns an iterator over the records of a source: each a dialogue, or the error that `read_dialogues` raises.

    Raises:
      UserError: the source does not exist, or is not of the format of its name.
    """
    return _parse_all(sources.read_records(source, split=split), roles)


def parse_records(
    records: Iterable[Any], *, source: str = "records", roles: Mapping[str, str] = _NO_ROLES
) -> Iterator[Dialogue]:
    """Returns an iterator over the dialogues of Python records, in any format of `parse_dialogue`.

    Args:
      source: what errors call the records.
      roles: further names of roles, as `data.roles`.
    """
    places = ((f"{source}[{index}]", record) for index, record in enumerate(records))
    return _raise_errors(_parse_all(places, roles), source)


def check_roles(roles: Mapping[str, str]) -> None:
    """Raises UserError if `data.roles` maps a name to something that is no role."""
    for name, role in roles.items():
        if role not in schemas.ROLES:
            raise UserError(
                f"data.roles maps {name!r} to {role!r}; needed one of {', '.join(schemas.ROLES)}, for example "
                "{'developer': 'system'}."
            )


def parse_dialogue(record: Any, *, index: int, where: str, roles: Mapping[str, str] = _NO_ROLES) -> Dialogue:
    """Returns the dialogue of a record.

    A record has one of these formats, tried in this order; its other keys become metadata:

        {"messages": [{"role": "user", "content": "Hi", "weight": 0.5, "name": "Ann"}, ...], "tools": [...]}
        {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}], "system": "Be kind."}
        {"prompt": "Hi", "completion": "Hello"}                     or lists of messages for either

    Any of them may have `continuations` (in the last form instead of `completion`): a list of several responses to the
    history, each a string, a message or a list of messages. Or its messages are a tree, listed parents first:

        {"messages": [{"id": "q", "role": "user", "content": "Hi"},
                      {"id": "a", "parent": "q", "role": "assistant", "content": "Hello"},
                      {"id": "b", "parent": "q", "role": "assistant", "content": "Good day"}]}

    `content` may be a list of parts, `{"type": "text", "text": "...", "weight": 0.2}`, each with its own weight.
    A message's `weight` is 1 unless given, and `"train": false` makes it 0. An assistant message inside `prompt` is
    history: its weight is 0 unless given. A null field of a message counts as absent, and null `content` as the empty
    string where there are `tool_calls`. JSON text in `tool_calls` and in the fields of a tool stays text; `tools`
    itself may be JSON text. An empty list of tools counts as no tools.

    Args:
      index: the record's place in its source, from 0; the dialogue's id if it has none.
      where: "train.jsonl:413", for errors.

    Raises:
      UserError: the record has none of the formats; names what it has, what is needed, the place and the remedy.
    """
    schemas.check_depth(record, name_dialogue(index, where))
    if not isinstance(record, Mapping):
        raise UserError(
            f"{name_dialogue(index, where)}: got {schemas.quote(record)}; needed an object with the keys of one of "
            f"{schemas.FORMATS}. Write one object per dialogue."
        )
    identifier = index if record.get("id") is None else record["id"]
    if isinstance(identifier, bool) or not isinstance(identifier, str | int):
        raise UserError(
            f"{name_dialogue(index, where)}: id is {schemas.quote(identifier)}; needed a string or an integer. "
            "Change it."
        )
    schemas.check_text(identifier, f"{name_dialogue(index, where)}: id")
    name = name_dialogue(identifier, where)
    unpacked = schemas.unpack(record, name)
    return Dialogue(
        id=identifier,
        messages=tuple(_parse_message(item, f"{name}: message {i}", roles) for i, item in enumerate(unpacked.messages)),
        parents=() if unpacked.parents == list(range(-1, len(unpacked.messages) - 1)) else tuple(unpacked.parents),
        tools=unpacked.tools,
        metadata={key: value for key, value in record.items() if key not in unpacked.used},
        where=where,
    )


def _parse_all(records: Iterable[tuple[str, Any]], roles: Mapping[str, str]) -> Iterator[Dialogue | UserError]:
    for index, (where, record) in enumerate(records):
        try:
            parsed = (
                record
                if isinstance(record, UserError)
                else parse_dialogue(record, index=index, where=where, roles=roles)
            )
        except UserError as error:
            yield error
        else:
            yield parsed


def _raise_errors(dialogues: Iterable[Dialogue | UserError], source: str) -> Iterator[Dialogue]:
    empty = True
    for dialogue in dialogues:
        if isinstance(dialogue, UserError):
            raise dialogue
        empty = False
        yield dialogue
    if empty:
        raise make_empty_error(source)


def make_empty_error(source: str) -> UserError:
    """Returns the error of a file or data set without records."""
    return UserError(f"{source}: holds no dialogue; needed at least one record. Check that it was written in full.")


def _parse_message(item: Any, where: str, roles: Mapping[str, str]) -> Message:
    if not isinstance(item, Mapping):
        raise UserError(
            f'{where} is {schemas.quote(item)}; needed an object with "role" and "content". Write it as one.'
        )
    sharegpt = "from" in item and "role" not in item
    role_key, content_key = ("from", "value") if sharegpt else ("role", "content")
    speaker = item.get(role_key)
    names = {**schemas.ROLE_NAMES, **roles}
    if not isinstance(speaker, str) or speaker not in names:
        has = f"has no {role_key!r}" if speaker is None else f"has {role_key} {speaker!r}"
        raise UserError(
            f"{where} {has}; needed one of {', '.join(schemas.ROLES)}, or another name of these: "
            f"{', '.join(name for name in names if name not in schemas.ROLES)}. Rename it in the data, or map it: "
            f"--config.data.roles=\"{{'{speaker if isinstance(speaker, str) else 'NAME'}': 'assistant'}}\"."
        )
    role = names[speaker]
    fields = {
        key: value
        for key, value in item.items()
        if key not in (role_key, content_key, "weight", "train", "parent") and value is not None
    }
    content = item.get(content_key)
    parts: tuple[Part, ...] = ()
    if isinstance(content, list):
        parts = _parse_parts(content, f"{where} ({role})")
        content = "".join(part.text for part in parts)
    if content is None and fields.get("tool_calls"):
        content = ""
    if not isinstance(content, str):
        raise UserError(
            f"{where} ({role}) has {content_key} {schemas.quote(content)}; needed a string or a list of text parts. "
            "Write it as text; only a message with tool_calls may leave it out."
        )
    try:
        content.encode()
    except UnicodeEncodeError as error:
        raise UserError(
            f"{where} ({role}) has half a surrogate pair at character {error.start} of its {content_key}; "
            "needed Unicode text. Write the whole pair, or remove it."
        ) from None
    schemas.check_text(fields, f"{where} ({role})")
    weight = _parse_weight(item, where)
    weighted = weight > 0 and any(part.weight != 1 for part in parts if part.text)
    return Message(role=role, content=content, weight=weight, fields=fields, parts=parts if weighted else ())


def _parse_parts(items: list[Any], where: str) -> tuple[Part, ...]:
    parts = []
    for number, item in enumerate(items):
        is_text = isinstance(item, Mapping) and item.get("type", "text") == "text" and isinstance(item.get("text"), str)
        if not is_text:
            raise UserError(
                f"{where}: part {number} of its content is {schemas.quote(item)}; needed text, as "
                '{"type": "text", "text": "...", "weight": 0.5}. Images and other parts are not supported: remove them.'
            )
        unknown = sorted(set(item) - {"type", "text", "weight", "train"})
        if unknown:
            raise UserError(
                f"{where}: part {number} of its content has {', '.join(map(repr, unknown))}; a part has type, text, "
                "weight and train. Rename or remove it."
            )
        parts.append(Part(text=item["text"], weight=_parse_weight(item, f"{where}: part {number} of its content")))
    return tuple(parts)


def _parse_weight(item: Mapping[str, Any], where: str) -> float:
    weight, train = item.get("weight"), item.get("train")
    if train is not None and not isinstance(train, bool):
        raise UserError(f"{where} has train {schemas.quote(train)}; needed true or false. For a number, use weight.")
    if weight is None:
        weight = 1.0
    is_number = isinstance(weight, int | float) and not isinstance(weight, bool)
    if not is_number or (isinstance(weight, float) and not math.isfinite(weight)) or weight < 0:
        raise UserError(
            f"{where} has weight {schemas.quote(weight)}; needed a finite number >= 0. "
            'Write 1 for a message that is trained on, 0 (or "train": false) for one that is not.'
        )
    # Weights become float32, in which they must be neither infinite nor rounded to 0.
    if weight and not _SMALLEST_WEIGHT <= weight <= _LARGEST_WEIGHT:
        raise UserError(
            f"{where} has weight {schemas.quote(weight)}; needed 0, or a number from {_SMALLEST_WEIGHT:g} to "
            f"{_LARGEST_WEIGHT:g}. Scale the weights."
        )
    return 0.0 if train is False else float(weight)
