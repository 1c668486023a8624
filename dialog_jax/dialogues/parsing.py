"""Files, hub data sets and Python records to checked `Dialogue`s, one at a time.

Knows the formats of records, and nothing of templates, tokens or loss.
"""

import pathlib
import types
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from dialog_jax.dialogues import json_values, schemas, sources, tool_calls, weights
from dialog_jax.dialogues.dialogue import Dialogue, Message, Part, name_dialogue
from dialog_jax.dialogues.json_values import quote
from dialog_jax.errors import UserError

_NO_ROLES: Mapping[str, str] = types.MappingProxyType({})
_NULLS_COUNTED = frozenset({"arguments", "parameters"})  # in which a null may have a meaning


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

    A record has one of these formats, tried in this order; keys that are not read become metadata:

        {"messages": [{"role": "user", "content": "Hi", "weight": 0.5, "name": "Ann"}, ...], "tools": [...]}
        {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}], "system": "Be kind."}
        {"prompt": "Hi", "completion": "Hello"}                     or lists of messages for either

    Any of them may have `continuations` (in the last form instead of `completion`): a list of several responses to the
    history, each a string, a message or a list of messages. Or its messages are a tree, listed parents first:

        {"messages": [{"id": "q", "role": "user", "content": "Hi"},
                      {"id": "a", "parent": "q", "role": "assistant", "content": "Hello"},
                      {"id": "b", "parent": "q", "role": "assistant", "content": "Good day"}]}

    Any of them may have `system`, `tools`, `chat_template_kwargs` and `weight`, which multiplies the weights of all
    messages. `content` may be a list of parts, `{"type": "text", "text": "...", "weight": 0.2}`, each with its own
    weight (`weights` has the spellings). An assistant message inside `prompt` is history: its weight is 0 unless given.

    Null fields count as absent, except in JSON text. Null `content` is the empty string where there are `tool_calls`.
    Tools and calls have one form, whatever their spelling (`tool_calls`).

    Args:
      index: the record's place in its source, from 0; the dialogue's id if it has none.
      where: "train.jsonl:413", for errors.
      roles: further names of roles, as `data.roles`.

    Raises:
      UserError: the record has none of the formats; names what it has, what is needed, the place and the remedy.
    """
    json_values.check_depth(record, name_dialogue(index, where))
    if not isinstance(record, Mapping):
        raise UserError(
            f"{name_dialogue(index, where)}: got {quote(record)}; needed an object with the keys of one of "
            f"{schemas.FORMATS}. Write one object per dialogue."
        )
    identifier = index if record.get("id") is None else json_values.read_identifier(record["id"])
    if identifier is None:
        raise UserError(
            f"{name_dialogue(index, where)}: id is {quote(record['id'])}; needed a string or an integer. Change it."
        )
    json_values.check_text(identifier, f"{name_dialogue(index, where)}: id")
    name = name_dialogue(identifier, where)
    role_names = {**schemas.ROLE_NAMES, **roles}
    nulls = json_values.count_nulls(record, _NULLS_COUNTED)
    record = {key: json_values.remove_nulls(value) for key, value in record.items()}
    unpacked = schemas.unpack(record, name, role_names)
    return Dialogue(
        id=identifier,
        messages=tuple(
            _parse_message(item, f"{name}: message {i}", role_names, unpacked.weight)
            for i, item in enumerate(unpacked.messages)
        ),
        parents=() if unpacked.parents == list(range(-1, len(unpacked.messages) - 1)) else tuple(unpacked.parents),
        tools=unpacked.tools,
        chat_template_kwargs=unpacked.chat_template_kwargs,
        metadata={key: value for key, value in record.items() if key not in unpacked.used and value is not None},
        nulls=nulls,
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


def _parse_message(item: Any, where: str, role_names: Mapping[str, str], record_weight: float) -> Message:
    if not isinstance(item, Mapping):
        raise UserError(f'{where} is {quote(item)}; needed an object with "role" and "content". Write it as one.')
    role_key, content_key = ("from", "value") if "from" in item and "role" not in item else ("role", "content")
    speaker = item.get(role_key)
    role = _find_role(speaker, role_key, where, role_names)
    where = f"{where} ({role})"
    weights.check_keys(item, where)
    content = item.get(content_key)
    not_fields = {role_key, content_key, "tool_calls", "function_call", *weights.KEYS}
    fields = {key: value for key, value in item.items() if key not in not_fields and value is not None}
    if both := {"role", "content"} & fields.keys():
        raise UserError(f"{where} has {content_key} and {' and '.join(both)}; needed one of them. Remove the other.")
    calls = _parse_calls(item, where)
    if speaker in schemas.CALL_SPEAKERS:
        if calls or content is None:
            raise UserError(f"{where} needs its call in {content_key}, and nowhere else. Write it there.")
        calls, content = tool_calls.parse_function_call(content, f"{where}: {content_key}"), ""
    if calls:
        fields["tool_calls"] = calls
    parts: tuple[Part, ...] = ()
    if isinstance(content, list):
        parts = _parse_parts(content, where)
        content = "".join(part.text for part in parts)
    if content is None and calls:
        content = ""
    if not isinstance(content, str):
        raise UserError(
            f"{where} has {content_key} {quote(content)}; needed a string or a list of text parts. "
            "Write it as text; only a message with tool_calls may leave it out."
        )
    try:
        content.encode()
    except UnicodeEncodeError as error:
        raise UserError(
            f"{where} has half a surrogate pair at character {error.start} of its {content_key}; "
            "needed Unicode text. Write the whole pair, or remove it."
        ) from None
    json_values.check_text(fields, where)
    weight = weights.multiply(weights.parse_weight(item, where), record_weight, where)
    weighted = weight > 0 and any(part.weight != 1 for part in parts if part.text)
    return Message(
        role=role,
        content=content,
        weight=weight,
        fields=fields,
        parts=parts if weighted else (),
        has_own_weight=weights.has_weight(item),
    )


def _find_role(speaker: Any, key: str, where: str, role_names: Mapping[str, str]) -> str:
    """Returns the role of a message's speaker."""
    if isinstance(speaker, str) and speaker in role_names:
        return role_names[speaker]
    roles = (
        f"needed one of {', '.join(schemas.ROLES)}, or another name of these: "
        f"{', '.join(name for name in role_names if name not in schemas.ROLES)}"
    )
    if speaker is None:
        raise UserError(f"{where} has no {key!r}; {roles}. Add it.")
    if not isinstance(speaker, str):
        raise UserError(f"{where} has {key} {quote(speaker)}; {roles}. Write one of them.")
    guess = guess_role(speaker)
    role = repr(guess) if guess else "ROLE"
    raise UserError(
        f"{where} has {key} {speaker!r}; {roles}. Rename it in the data, or map it: "
        f"--config.data.roles=\"{{'{speaker}': {role}}}\"."
    )


def guess_role(speaker: str) -> str | None:
    """Returns the role that an unknown name of a speaker says: "The User" -> "user"; None if it says none, or two."""
    guesses = {role for name, role in schemas.ROLE_NAMES.items() if name in speaker.lower()}
    return guesses.pop() if len(guesses) == 1 else None


def _parse_calls(item: Mapping[str, Any], where: str) -> list[Any]:
    """Returns the calls of a message's `tool_calls`, or of OpenAI's older `function_call`."""
    calls = tool_calls.parse_calls(item.get("tool_calls"), f"{where}: tool_calls")
    if tool_calls.is_padding(item.get("function_call")):
        return calls
    if calls:
        raise UserError(f"{where} has both tool_calls and function_call; needed one of them. Remove one.")
    return tool_calls.parse_function_call(item["function_call"], f"{where}: function_call")


def _parse_parts(items: list[Any], where: str) -> tuple[Part, ...]:
    parts = []
    for number, item in enumerate(items):
        is_text = isinstance(item, Mapping) and item.get("type", "text") == "text" and isinstance(item.get("text"), str)
        if not is_text:
            raise UserError(
                f"{where}: part {number} of its content is {quote(item)}; needed text, as "
                '{"type": "text", "text": "...", "weight": 0.5}. Images and other parts are not supported: remove them.'
            )
        unknown = sorted(set(item) - {"type", "text", *weights.KEYS})
        if unknown:
            raise UserError(
                f"{where}: part {number} of its content has {', '.join(map(repr, unknown))}; a part has type, text, "
                "weight and train. Rename or remove it."
            )
        weight = weights.parse_weight(item, f"{where}: part {number} of its content")
        parts.append(Part(text=item["text"], weight=weight))
    return tuple(parts)
