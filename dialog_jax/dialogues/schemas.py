"""Records in any of the supported formats to lists of messages, with the parent of each; messages are not yet checked.

Knows the formats of records, and nothing of weights, templates or tokens.
"""

import json
from collections.abc import Mapping
from typing import Any, NamedTuple

from dialog_jax.errors import UserError

_MAX_DEPTH = 100  # levels of lists and objects; messages, calls and their arguments need only a few
_CONTAINERS = (Mapping, list, tuple)

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
    "tool": "tool",
    "observation": "tool",
    "function": "tool",
    "function_response": "tool",
    "ipython": "tool",
}

FORMATS = (
    '"messages": [{"role", "content"}, ...], "conversations": [{"from", "value"}, ...], or "prompt" and "completion" '
    'or "continuations"'
)


class Unpacked(NamedTuple):
    """The contents of a record."""

    messages: list[Any]
    """As in the record, unchecked."""
    parents: list[int]
    """The index of each message's parent, -1 for the first."""
    tools: tuple[Mapping[str, Any], ...] | None
    used: set[str]
    """The keys of the record that are not metadata."""


def unpack(record: Mapping[str, Any], name: str) -> Unpacked:
    """Returns the messages, parents and tools of a record; `name` is the dialogue's, for errors.

    Raises:
      UserError: the record has none of the formats, its messages are not a list, or their parents are wrong.
    """
    used = {"id", "tools"}
    if record.get("messages") is not None:
        used |= {"messages"}
        items = _check_list(record["messages"], "messages", name)
    elif record.get("conversations") is not None:
        used |= {"conversations", "system"}
        items = _check_list(record["conversations"], "conversations", name)
        items = _list_system(record.get("system"), items, name) + items
    elif record.get("prompt") is not None and record.get("completion") is not None:
        used |= {"prompt", "completion"}
        items = _list_prompt(record["prompt"], name) + _list_response(record["completion"], "completion", name)
    elif record.get("prompt") is not None and record.get("continuations") is not None:
        used |= {"prompt"}
        items = _list_prompt(record["prompt"], name)
    else:
        keys = ", ".join(f"{key!r}{' (null)' if value is None else ''}" for key, value in record.items()) or "none"
        raise UserError(f"{name}: has the keys {keys}; needed {FORMATS}. Rename or convert its fields.")
    items, parents = _find_parents(items, name)
    if record.get("continuations") is not None:
        if "completion" in used or parents != list(range(-1, len(items) - 1)):
            other = "a completion" if "completion" in used else "messages with a parent"
            raise UserError(f"{name}: has continuations and {other}; needed one of them. Remove the other.")
        used |= {"continuations"}
        items, parents = _append_continuations(items, record["continuations"], name)
    return Unpacked(items, parents, _parse_tools(record.get("tools"), name), used)


def _find_parents(items: list[Any], name: str) -> tuple[list[Any], list[int]]:
    """Returns (the items, the index of each item's parent): the item before it, unless the items name parents."""
    if not any(isinstance(item, Mapping) and item.get("parent") is not None for item in items):
        return items, list(range(-1, len(items) - 1))
    places: dict[str | int, int] = {}
    parents = []
    for index, item in enumerate(items):
        identifier, parent = (item.get("id"), item.get("parent")) if isinstance(item, Mapping) else (None, None)
        if not isinstance(item, Mapping) or (parent is None and index):
            raise UserError(
                f"{name}: message {index} has no parent, but others have; only the first message of a tree has none. "
                'Give it "parent", the id of the message it follows.'
            )
        if parent is not None and (not isinstance(parent, str | int) or parent not in places):
            raise UserError(
                f"{name}: message {index} has parent {quote(parent)}, which is the id of no message before it. List "
                "parents before what follows them."
            )
        if identifier is not None and (not isinstance(identifier, str | int) or identifier in places):
            raise UserError(
                f"{name}: message {index} has id {quote(identifier)}; needed a string or an integer that no message "
                "before it has. Change it."
            )
        parents.append(-1 if parent is None else places[parent])
        if identifier is not None:
            places[identifier] = index
    return [{key: value for key, value in dict(item).items() if key != "id"} for item in items], parents


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
    if not isinstance(value, list | tuple):
        raise UserError(f"{name}: {key} is {quote(value)}; needed a list of messages. Write it as a list.")
    if not value:
        raise UserError(f"{name}: has no messages; needed at least one in {key}. Remove the record, or fill it.")
    return list(value)


def _list_system(system: Any, items: list[Any], name: str) -> list[Any]:
    """Returns the system message that some ShareGPT data sets keep beside the conversation."""
    if system is None or system == "":
        return []
    if any(isinstance(item, Mapping) and "system" in (item.get("from"), item.get("role")) for item in items):
        raise UserError(f"{name}: has both a system field and a system message; needed one. Remove one of them.")
    return [{"role": "system", "content": system}]


def _list_prompt(prompt: Any, name: str) -> list[Any]:
    if isinstance(prompt, str):
        return [{"role": "user", "content": prompt}]
    history = []
    for item in _check_list(prompt, "prompt", name):
        speaker = item.get("role", item.get("from")) if isinstance(item, Mapping) else None
        is_response = isinstance(speaker, str) and ROLE_NAMES.get(speaker) == "assistant"
        unweighted = is_response and item.get("weight") is None and item.get("train") is None
        history.append({**item, "weight": 0.0} if unweighted else item)
    return history


def _list_response(value: Any, key: str, name: str) -> list[Any]:
    """Returns the messages of a completion: a string, or a message without a role, is the assistant's."""
    if isinstance(value, str):
        return [{"role": "assistant", "content": value}]
    if isinstance(value, Mapping):
        return [value if "role" in value or "from" in value else {"role": "assistant", **value}]
    return _check_list(value, key, name)


def _parse_tools(tools: Any, name: str) -> tuple[Mapping[str, Any], ...] | None:
    remedy = 'Write them as [{"type": "function", "function": {"name": ..., "parameters": ...}}].'
    if isinstance(tools, str):
        try:
            tools = json.loads(tools) if tools.strip() else None
        except json.JSONDecodeError as error:
            raise UserError(
                f"{name}: tools is text but not JSON ({error.msg} at column {error.colno}). {remedy}"
            ) from None
        except (RecursionError, ValueError) as error:
            raise UserError(f"{name}: tools is text that cannot be read as JSON ({error}). {remedy}") from None
        check_depth(tools, f"{name}: tools")
    if tools is None:
        return None
    check_text(tools, f"{name}: tools")
    if not isinstance(tools, list | tuple) or not all(isinstance(tool, Mapping) for tool in tools):
        raise UserError(f"{name}: tools is {quote(tools)}; needed a list of objects. {remedy}")
    return tuple(tools) or None


def check_depth(value: Any, where: str) -> None:
    """Raises UserError if lists and objects nest so deeply in the value that a recursive function could fail."""
    level = [value]
    for _ in range(_MAX_DEPTH):
        containers = [
            one.values() if isinstance(one, Mapping) else one for one in level if isinstance(one, _CONTAINERS)
        ]
        level = [entry for entries in containers for entry in entries]
        if not level:
            return
    raise UserError(f"{where}: nests lists and objects more than {_MAX_DEPTH} deep. Flatten it, or write it as text.")


def check_text(value: Any, where: str) -> None:
    """Raises UserError if a string or key in the value is not Unicode text."""
    if isinstance(value, str):
        try:
            value.encode()
        except UnicodeEncodeError:
            raise UserError(
                f"{where} has half a surrogate pair in {quote(value)}; needed Unicode text. Write the whole pair, or "
                "remove it."
            ) from None
    elif isinstance(value, Mapping):
        for key, entry in value.items():
            check_text(key, where)
            check_text(entry, where)
    elif isinstance(value, list | tuple):
        for entry in value:
            check_text(entry, where)


def quote(value: Any) -> str:
    """Returns the value and its type, short enough for an error."""
    text = repr(value)
    return f"{text if len(text) <= 60 else text[:57] + '...'} ({type(value).__name__})"
