"""Records in any of the supported formats to lists of messages, with the parent of each; messages are not yet checked.

Knows the formats of records, and nothing of templates or tokens.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from dialog_jax.dialogues import tool_calls, weights
from dialog_jax.dialogues.json_values import check_depth, check_text, parse_text, quote, read_identifier, remove_nulls
from dialog_jax.errors import UserError

ROLES = ("system", "user", "assistant", "tool")

# Names of the speaker in the common formats. `developer` is OpenAI's newer name for the system message, `function` its
# older one for a tool's result, `ipython` Llama's.
ROLE_NAMES = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "model": "assistant",
    "function_call": "assistant",
    "tool_call": "assistant",
    "tool": "tool",
    "observation": "tool",
    "function": "tool",
    "function_response": "tool",
    "tool_response": "tool",
    "ipython": "tool",
}

CALL_SPEAKERS = ("function_call", "tool_call")
"""Names of a speaker whose content is a call of tools."""

FORMATS = (
    '"messages": [{"role", "content"}, ...], "conversations": [{"from", "value"}, ...], or "prompt" and "completion" '
    'or "continuations"'
)
# Keys of formats that are not read, with the way to write such records.
_OTHER_FORMATS = (
    ({"instruction", "output"}, "Write instruction and input as prompt, and output as completion."),
    ({"chosen", "rejected"}, 'Write the chosen response as completion, or both as continuations: {"weight": ...}.'),
    ({"query", "response"}, "Write history and query as a list of messages in prompt, and response as completion."),
    ({"segments"}, "Write prompt and completion; a text with parts to train on is a list of parts with weights."),
    ({"question", "answer"}, "Write question as prompt, and answer as completion."),
    ({"prompt", "response"}, "Write response as completion."),
    ({"input_ids"}, "Tokens are not read: write the messages."),
    ({"text"}, "Plain text has no responses: write the messages."),
)
_LISTS = ("messages", "conversations")
_SYSTEM_FIELDS = ("system", "system_prompt", "system_message")
# Arguments of `apply_chat_template` that are no variables of the template, and fields of the record.
_NOT_TEMPLATE_KWARGS = {
    *("messages", "conversation", "tools", "add_generation_prompt", "continue_final_message", "chat_template"),
    *("tokenize", "padding", "truncation", "max_length", "return_tensors", "return_dict"),
    *("return_assistant_tokens_mask", "tokenizer_kwargs", "sanitize_control_tokens"),
}


class Unpacked(NamedTuple):
    """The contents of a record."""

    messages: list[Any]
    """As in the record, unchecked."""
    parents: list[int]
    """The index of each message's parent, -1 for the first."""
    tools: tuple[Mapping[str, Any], ...] | None
    chat_template_kwargs: Mapping[str, Any]
    weight: float
    """Of the record; it multiplies those of its messages."""
    used: set[str]
    """The keys of the record that are not metadata."""


def unpack(record: Mapping[str, Any], name: str, role_names: Mapping[str, str]) -> Unpacked:
    """Returns the messages, parents, tools and options of a record whose values have no null fields.

    Args:
      name: the dialogue's, for errors.
      role_names: the role by the name of each speaker.

    Raises:
      UserError: the record has none of the formats, its messages are not a list, their parents are wrong, or another
        field has the wrong form.
    """
    weights.check_keys(record, name, is_record=True)
    used = {"id", "tools", "functions", "chat_template_kwargs", *_SYSTEM_FIELDS, *weights.KEYS}
    items, format_keys = _list_messages(record, name, role_names)
    used |= format_keys
    items, parents = _find_parents(items, name)
    if record.get("continuations") is not None:
        if "completion" in used or parents != list(range(-1, len(items) - 1)):
            other = "a completion" if "completion" in used else "messages with a parent"
            raise UserError(f"{name}: has continuations and {other}; needed one of them. Remove the other.")
        used |= {"continuations"}
        items, parents = _append_continuations(items, record["continuations"], name)
    system = _list_system(record, items, name, role_names)
    if system:
        items, parents = system + items, [-1, *(parent + 1 for parent in parents)]
    return Unpacked(
        messages=items,
        parents=parents,
        tools=_parse_tools(record, name),
        chat_template_kwargs=_parse_kwargs(record.get("chat_template_kwargs"), f"{name}: chat_template_kwargs"),
        weight=weights.parse_weight(record, name),
        used=used,
    )


def _list_messages(record: Mapping[str, Any], name: str, role_names: Mapping[str, str]) -> tuple[list[Any], set[str]]:
    """Returns (the messages of a record's format, without continuations; the keys they are from)."""
    for key in _LISTS:
        if record.get(key) is not None:
            return _check_list(record[key], key, name), {key}
    if record.get("prompt") is not None:
        history = _list_prompt(record["prompt"], name, role_names)
        if record.get("completion") is not None:
            return history + _list_response(record["completion"], "completion", name), {"prompt", "completion"}
        if record.get("continuations") is not None:
            return history, {"prompt"}
    keys = ", ".join(f"{key!r}{' (null)' if value is None else ''}" for key, value in record.items()) or "none"
    remedy = next(
        (remedy for other, remedy in _OTHER_FORMATS if other <= record.keys()), "Rename or convert its fields."
    )
    raise UserError(f"{name}: has the keys {keys}; needed {FORMATS}. {remedy}")


def _find_parents(items: list[Any], name: str) -> tuple[list[Any], list[int]]:
    """Returns (the items, the index of each item's parent): the item before it, unless the items name parents."""
    if not any(isinstance(item, Mapping) and item.get("parent") is not None for item in items):
        return items, list(range(-1, len(items) - 1))
    places: dict[str | int, int] = {}
    parents = []
    for index, item in enumerate(items):
        given = (item.get("id"), item.get("parent")) if isinstance(item, Mapping) else (None, None)
        identifier, parent = map(read_identifier, given)
        if not isinstance(item, Mapping) or (given[1] is None and index):
            raise UserError(
                f"{name}: message {index} has no parent, but others have; only the first message of a tree has none. "
                'Give it "parent", the id of the message it follows.'
            )
        if given[1] is not None and (parent is None or parent not in places):
            raise UserError(
                f"{name}: message {index} has parent {quote(given[1])}, which is the id of no message before it. List "
                "parents before what follows them."
            )
        if given[0] is not None and (identifier is None or identifier in places):
            raise UserError(
                f"{name}: message {index} has id {quote(given[0])}; needed a string or an integer that no message "
                "before it has. Change it."
            )
        parents.append(-1 if parent is None else places[parent])
        if identifier is not None:
            places[identifier] = index
    return [{key: value for key, value in item.items() if key not in ("id", "parent")} for item in items], parents


def _append_continuations(history: list[Any], continuations: Any, name: str) -> tuple[list[Any], list[int]]:
    """Returns (the history and all continuations, the index of each message's parent)."""
    items, parents = list(history), list(range(-1, len(history) - 1))
    for continuation in _check_list(continuations, "continuations", name):
        chain = _list_response(continuation, "continuations", name)
        if any(isinstance(item, Mapping) and item.get("parent") is not None for item in chain):
            raise UserError(
                f"{name}: a message of its continuations has a parent; they follow the last message. Remove it, or "
                "give all messages parents and no continuations."
            )
        parents += [len(history) - 1, *range(len(items), len(items) + len(chain) - 1)]
        items += chain
    return items, parents


def _check_list(value: Any, key: str, name: str) -> list[Any]:
    """Returns a list of messages, which may also be JSON text."""
    if isinstance(value, str) and value.lstrip()[:1] in ("[", "{"):
        value = remove_nulls(parse_text(value, f"{name}: {key}", "Write it as a list."))
    if not isinstance(value, list | tuple):
        raise UserError(f"{name}: {key} is {quote(value)}; needed a list of messages. Write it as a list.")
    if not value:
        raise UserError(f"{name}: has no messages; needed at least one in {key}. Remove the record, or fill it.")
    return list(value)


def _list_system(
    record: Mapping[str, Any], items: Sequence[Any], name: str, role_names: Mapping[str, str]
) -> list[Any]:
    """Returns the system message that a record has beside its other messages; empty if these have the same one."""
    fields = {key: record[key] for key in _SYSTEM_FIELDS if record.get(key) not in (None, "")}
    values = list(fields.values())
    if not values:
        return []
    if any(value != values[0] for value in values):
        raise UserError(f"{name}: has different texts in {' and '.join(fields)}; needed one. Remove one of them.")
    for item in items:
        if _find_role(item, role_names) == "system":
            if item.get("content", item.get("value")) == values[0]:
                return []
            raise UserError(
                f"{name}: has both a {next(iter(fields))} field and a system message, with different texts; needed "
                "one. Remove one of them."
            )
    speaker = next((name for name, role in role_names.items() if role == "system"), "system")
    return [{"role": speaker, "content": values[0]}]


def iterate_speakers(record: Mapping[str, Any]) -> Iterator[str]:
    """Yields the name of the speaker of each message of an unchecked record that has one, whatever its format."""
    for key in (*_LISTS, "prompt", "completion", "continuations"):
        items = _parse_messages(record.get(key))
        for item in items if isinstance(items, list) else [items]:
            if speaker := _find_speaker(item):
                yield speaker


def _find_speaker(item: Any) -> str | None:
    """Returns the name of the speaker of a message that is not yet checked; None if it has none."""
    speaker = item.get("role", item.get("from")) if isinstance(item, Mapping) else None
    return speaker if isinstance(speaker, str) else None


def _find_role(item: Any, role_names: Mapping[str, str]) -> str | None:
    """Returns the role of a message that is not yet checked; None if it has none."""
    speaker = _find_speaker(item)
    return role_names.get(speaker) if speaker is not None else None


def _list_prompt(prompt: Any, name: str, role_names: Mapping[str, str]) -> list[Any]:
    """Returns the messages of a prompt, in which responses are history and not trained on unless they say so."""
    prompt = _parse_messages(prompt)
    if isinstance(prompt, str):
        return [{"role": "user", "content": prompt}]
    return [
        {**item, "weight": 0.0}
        if _find_role(item, role_names) == "assistant" and not weights.has_weight(item)
        else item
        for item in ([prompt] if isinstance(prompt, Mapping) else _check_list(prompt, "prompt", name))
    ]


def _parse_messages(value: Any) -> Any:
    """Returns the messages, or the message, that a text is JSON of; any other text, which may be JSON too, as it is."""
    if not isinstance(value, str) or value.lstrip()[:1] not in ("[", "{"):
        return value
    try:
        parsed = remove_nulls(parse_text(value, "", ""))
    except UserError:
        return value
    items = parsed if isinstance(parsed, list) else [parsed]
    is_message = [isinstance(item, Mapping) and ("role" in item or {"from", "value"} <= item.keys()) for item in items]
    return parsed if items and all(is_message) else value


def _list_response(value: Any, key: str, name: str) -> list[Any]:
    """Returns the messages of a completion: a string, or a message without a role, is the assistant's."""
    value = _parse_messages(value)
    if isinstance(value, str):
        return [{"role": "assistant", "content": value}]
    if isinstance(value, Mapping):
        return [value if "role" in value or "from" in value else {"role": "assistant", **value}]
    return _check_list(value, key, name)


def _parse_tools(record: Mapping[str, Any], name: str) -> tuple[Mapping[str, Any], ...] | None:
    """Returns the tools of a record, which OpenAI's older format calls functions."""
    tools = tool_calls.parse_tools(record.get("tools"), f"{name}: tools")
    functions = tool_calls.parse_tools(record.get("functions"), f"{name}: functions")
    if tools and functions and tools != functions:
        raise UserError(f"{name}: has both tools and functions; needed one of them. Remove one.")
    return tools or functions


def _parse_kwargs(kwargs: Any, where: str) -> Mapping[str, Any]:
    """Returns the variables of the chat template that a record gives."""
    remedy = 'Write it as an object, for example {"enable_thinking": false}.'
    if isinstance(kwargs, str):
        kwargs = parse_text(kwargs, where, remedy)
    if kwargs is None:
        return {}
    if not isinstance(kwargs, Mapping):
        raise UserError(f"{where} is {quote(kwargs)}; needed an object. {remedy}")
    check_text(kwargs, where)
    check_depth(kwargs, where)
    if reserved := sorted(_NOT_TEMPLATE_KWARGS & kwargs.keys()):
        raise UserError(
            f"{where} has {', '.join(map(repr, reserved))}, which is no variable that a record can set. Remove it; "
            "messages and tools are fields of the record, and data.chat_template is set in the config."
        )
    return dict(kwargs)
