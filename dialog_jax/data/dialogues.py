"""Files, hub data sets and Python records in; checked `Dialogue`s out, one at a time.

Knows the forms people give dialogues, and nothing of templates, tokens or loss.
"""

import dataclasses
import json
import math
import pathlib
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from dialog_jax.data import sources

ROLES = ("system", "user", "assistant", "tool")

# ShareGPT's names for the speaker. A function call is something the assistant writes.
_SHAREGPT_ROLES = {
    "system": "system",
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "chatgpt": "assistant",
    "model": "assistant",
    "function_call": "assistant",
    "tool": "tool",
    "observation": "tool",
    "function_response": "tool",
}

_SMALLEST_WEIGHT, _LARGEST_WEIGHT = 1e-30, 1e30
_FORMATS = (
    '"messages": [{"role", "content"}, ...], "conversations": [{"from", "value"}, ...], or "prompt" and "completion" '
    'or "continuations"'
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Part:
    """A part of a message's content with a weight of its own, which the message's weight multiplies."""

    text: str
    weight: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class Message:
    """One message. `weight` multiplies its loss; `fields` is what else a template may read, such as `tool_calls`."""

    role: str
    content: str
    weight: float = 1.0
    fields: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    parts: tuple[Part, ...] = ()
    """What `content` is joined from, where not all of it has weight 1; else empty."""

    def as_dict(self) -> dict[str, Any]:
        """What a chat template sees: role, content and the further fields, never the weight."""
        return {"role": self.role, "content": self.content, **self.fields}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Dialogue:
    """Messages, in order or as a tree. `id` is the record's own, or its index in the source; `where` is for errors."""

    id: str | int
    messages: tuple[Message, ...]
    parents: tuple[int, ...] = ()
    """Empty where each message follows the one before it; else the index of each one's parent, -1 for the first."""
    tools: tuple[Mapping[str, Any], ...] | None = None
    metadata: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    where: str = ""

    @property
    def name(self) -> str:
        """How messages to the user call it: `dialogue 412 (train.jsonl:413)`."""
        return _name(self.id, self.where)

    def __str__(self) -> str:
        return self.name

    def before(self, index: int) -> tuple[int, ...]:
        """The messages that lead to message `index`, the first of the dialogue first."""
        if not self.parents:
            return tuple(range(index))
        path = []
        while (index := self.parents[index]) >= 0:
            path.append(index)
        return tuple(reversed(path))

    def paths(self) -> list[tuple[int, ...]]:
        """The messages from the first to each that none follows, depth first; a list of messages is one path."""
        if not self.parents:
            return [tuple(range(len(self.messages)))]
        leaves = set(range(len(self.messages))) - set(self.parents)
        return sorted((*self.before(leaf), leaf) for leaf in leaves)


def read_dialogues(source: str | pathlib.Path, *, split: str = "train") -> Iterator[Dialogue]:
    """The dialogues of a file or data set, read as they are asked for.

    Args:
      source: a `.jsonl`, `.json` (a list of records, or one) or `.parquet` file; otherwise a directory or Hugging Face
        hub name that the optional package `datasets` reads.
      split: which split of a data set; files have none.

    Raises:
      ValueError: the source does not exist, cannot be read as what its name says, is empty, or holds a record that is
        no dialogue. Names the file, the line and what to do.
    """
    return _parse_all(sources.read_records(source, split=split), pathlib.Path(source).name)


def dialogues_from_records(records: Iterable[Any], *, source: str = "records") -> Iterator[Dialogue]:
    """The dialogues of Python records in any of the formats of `parse_dialogue`; `source` names them in errors."""
    return _parse_all(((f"{source}[{index}]", record) for index, record in enumerate(records)), source)


def parse_dialogue(record: Any, *, index: int, where: str) -> Dialogue:
    """One record as a Dialogue.

    The formats, tried in this order; every other key of the record is kept as metadata:

        {"messages": [{"role": "user", "content": "Hi", "weight": 0.5, "name": "Ann"}, ...], "tools": [...]}
        {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}], "system": "Be kind."}
        {"prompt": "Hi", "completion": "Hello"}                     or lists of messages for either

    Any of them may have `continuations` (in the last form instead of `completion`): a list of several responses to the
    history, each a string, a message or a list of messages. Or its messages are a tree, listed parents first:

        {"messages": [{"id": "q", "role": "user", "content": "Hi"},
                      {"id": "a", "parent": "q", "role": "assistant", "content": "Hello"},
                      {"id": "b", "parent": "q", "role": "assistant", "content": "Good day"}]}

    `content` may be a list of parts, `{"type": "text", "text": "...", "weight": 0.2}`, each with a weight of its own.
    A message's `weight` is 1 unless given, and `"train": false` makes it 0. An assistant message inside `prompt` is
    history, not what the record teaches: its weight is 0 unless given. A message's field that is null is absent, and
    null `content` is the empty string where there are `tool_calls`. JSON text in `tool_calls` and in the fields of a
    tool stays text; `tools` itself may be JSON text, and an empty list of tools is none.

    Args:
      index: the record's place in its source, from 0; the dialogue's id if it has none.
      where: "train.jsonl:413", for errors.

    Raises:
      ValueError: got something else. Says what, what was needed, where, and the remedy.
    """
    if not isinstance(record, Mapping):
        raise ValueError(
            f"{_name(index, where)}: got {_shown(record)}; needed an object with the keys of one of {_FORMATS}. "
            "Write one object a dialogue."
        )
    identifier = index if record.get("id") is None else record["id"]
    if isinstance(identifier, bool) or not isinstance(identifier, str | int):
        raise ValueError(
            f"{_name(index, where)}: id is {_shown(identifier)}; needed a string or an integer. Change it."
        )
    name = _name(identifier, where)
    used = {"id", "tools"}
    if record.get("messages") is not None:
        used |= {"messages"}
        items = _items(record["messages"], "messages", name)
    elif record.get("conversations") is not None:
        used |= {"conversations", "system"}
        items = _items(record["conversations"], "conversations", name)
        items = _system_items(record.get("system"), items, name) + items
    elif record.get("prompt") is not None and record.get("completion") is not None:
        used |= {"prompt", "completion"}
        items = _prompt_items(record["prompt"], name) + _chain(record["completion"], "completion", name)
    elif record.get("prompt") is not None and record.get("continuations") is not None:
        used |= {"prompt"}
        items = _prompt_items(record["prompt"], name)
    else:
        keys = ", ".join(f"{key!r}{' (null)' if value is None else ''}" for key, value in record.items()) or "none"
        raise ValueError(f"{name}: has the keys {keys}; needed {_FORMATS}. Rename or convert its fields.")
    items, parents = _tree(items, name)
    if record.get("continuations") is not None:
        if "completion" in used or parents != list(range(-1, len(items) - 1)):
            other = "a completion" if "completion" in used else "messages with a parent"
            raise ValueError(f"{name}: has continuations and {other}; needed one of them. Remove the other.")
        used |= {"continuations"}
        items, parents = _continued(items, record["continuations"], name)
    return Dialogue(
        id=identifier,
        messages=tuple(_message(item, f"{name}: message {i}") for i, item in enumerate(items)),
        parents=() if parents == list(range(-1, len(items) - 1)) else tuple(parents),
        tools=_tools(record.get("tools"), name),
        metadata={key: value for key, value in record.items() if key not in used},
        where=where,
    )


def _parse_all(records: Iterable[tuple[str, Any]], source: str) -> Iterator[Dialogue]:
    index = -1
    for index, (where, record) in enumerate(records):
        yield parse_dialogue(record, index=index, where=where)
    if index < 0:
        raise ValueError(f"{source}: holds no dialogue; needed at least one record. Check that it was written in full.")


def _message(item: Any, where: str) -> Message:
    if not isinstance(item, Mapping):
        raise ValueError(f'{where} is {_shown(item)}; needed an object with "role" and "content". Write it as one.')
    sharegpt = "from" in item and "role" not in item
    role_key, content_key = ("from", "value") if sharegpt else ("role", "content")
    given = item.get(role_key)
    role = _SHAREGPT_ROLES.get(given) if sharegpt and isinstance(given, str) else given
    if role not in ROLES:
        allowed = ", ".join(_SHAREGPT_ROLES if sharegpt else ROLES)
        has = f"has no {role_key!r}" if given is None else f"has {'role' if role_key == 'role' else 'from'} {given!r}"
        raise ValueError(f"{where} {has}; needed one of {allowed}. Rename it in the data.")
    fields = {
        key: value
        for key, value in item.items()
        if key not in (role_key, content_key, "weight", "train", "parent") and value is not None
    }
    content = item.get(content_key)
    parts: tuple[Part, ...] = ()
    if isinstance(content, list):
        parts = _parts(content, f"{where} ({role})")
        content = "".join(part.text for part in parts)
    if content is None and fields.get("tool_calls"):
        content = ""
    if not isinstance(content, str):
        raise ValueError(
            f"{where} ({role}) has {content_key} {_shown(content)}; needed a string or a list of text parts. "
            "Write it as text; only a message with tool_calls may leave it out."
        )
    try:
        content.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"{where} ({role}) has half a surrogate pair at character {error.start} of its {content_key}; "
            "needed Unicode text. Write the whole pair, or remove it."
        ) from None
    _check_text(fields, f"{where} ({role})")
    weight = _weight(item, where)
    weighted = weight > 0 and any(part.weight != 1 for part in parts)
    return Message(role=role, content=content, weight=weight, fields=fields, parts=parts if weighted else ())


def _check_text(value: Any, where: str) -> None:
    """Raises ValueError if there is a string in the value that is no text."""
    if isinstance(value, str):
        try:
            value.encode()
        except UnicodeEncodeError:
            raise ValueError(
                f"{where} has half a surrogate pair in {_shown(value)}; needed Unicode text. Write the whole pair, or "
                "remove it."
            ) from None
    elif isinstance(value, Mapping):
        for entry in value.values():
            _check_text(entry, where)
    elif isinstance(value, list | tuple):
        for entry in value:
            _check_text(entry, where)


def _parts(items: list[Any], where: str) -> tuple[Part, ...]:
    parts = []
    for number, item in enumerate(items):
        is_text = isinstance(item, Mapping) and item.get("type", "text") == "text" and isinstance(item.get("text"), str)
        if not is_text:
            raise ValueError(
                f"{where}: part {number} of its content is {_shown(item)}; needed text, as "
                '{"type": "text", "text": "...", "weight": 0.5}. Images and other parts are not supported: remove them.'
            )
        unknown = sorted(set(item) - {"type", "text", "weight", "train"})
        if unknown:
            raise ValueError(
                f"{where}: part {number} of its content has {', '.join(map(repr, unknown))}; a part has type, text, "
                "weight and train. Rename or remove it."
            )
        parts.append(Part(text=item["text"], weight=_weight(item, f"{where}: part {number} of its content")))
    return tuple(parts)


def _tree(items: list[Any], name: str) -> tuple[list[Any], list[int]]:
    """(the items, the index of each one's parent): the item before it, unless they name parents."""
    if not any(isinstance(item, Mapping) and item.get("parent") is not None for item in items):
        return items, list(range(-1, len(items) - 1))
    places: dict[str | int, int] = {}
    parents = []
    for index, item in enumerate(items):
        identifier, parent = (item.get("id"), item.get("parent")) if isinstance(item, Mapping) else (None, None)
        if not isinstance(item, Mapping) or (parent is None and index):
            raise ValueError(
                f"{name}: message {index} has no parent, but others have; only the first message of a tree has none. "
                'Give it "parent", the id of the message it follows.'
            )
        if parent is not None and (not isinstance(parent, str | int) or parent not in places):
            raise ValueError(
                f"{name}: message {index} has parent {_shown(parent)}, which is the id of no message before it. List "
                "parents before what follows them."
            )
        if identifier is not None and (not isinstance(identifier, str | int) or identifier in places):
            raise ValueError(
                f"{name}: message {index} has id {_shown(identifier)}; needed a string or an integer that no message "
                "before it has. Change it."
            )
        parents.append(-1 if parent is None else places[parent])
        if identifier is not None:
            places[identifier] = index
    return [{key: value for key, value in dict(item).items() if key != "id"} for item in items], parents


def _continued(history: list[Any], continuations: Any, name: str) -> tuple[list[Any], list[int]]:
    """(the history and all continuations, the index of each message's parent)."""
    items, parents = list(history), list(range(-1, len(history) - 1))
    for continuation in _items(continuations, "continuations", name):
        chain = _chain(continuation, "continuations", name)
        if any(isinstance(item, Mapping) and item.get("parent") is not None for item in chain):
            raise ValueError(
                f"{name}: a message of its continuations has a parent; they follow the last message. Remove it, or "
                "give all messages parents and no continuations."
            )
        parents += [len(history) - 1, *range(len(items), len(items) + len(chain) - 1)]
        items += chain
    return items, parents


def _weight(item: Mapping[str, Any], where: str) -> float:
    weight, train = item.get("weight"), item.get("train")
    if train is not None and not isinstance(train, bool):
        raise ValueError(f"{where} has train {_shown(train)}; needed true or false. For a number, use weight.")
    if weight is None:
        weight = 1.0
    is_number = isinstance(weight, int | float) and not isinstance(weight, bool)
    if not is_number or (isinstance(weight, float) and not math.isfinite(weight)) or weight < 0:
        raise ValueError(
            f"{where} has weight {_shown(weight)}; needed a finite number >= 0. "
            'Write 1 for a message that is trained on, 0 (or "train": false) for one that is not.'
        )
    # It will be a float32: neither infinite there, nor 0 though it is not.
    if weight and not _SMALLEST_WEIGHT <= weight <= _LARGEST_WEIGHT:
        raise ValueError(
            f"{where} has weight {_shown(weight)}; needed 0, or a number from {_SMALLEST_WEIGHT:g} to "
            f"{_LARGEST_WEIGHT:g}. Scale the weights."
        )
    return 0.0 if train is False else float(weight)


def _items(value: Any, key: str, name: str) -> list[Any]:
    if not isinstance(value, list | tuple):
        raise ValueError(f"{name}: {key} is {_shown(value)}; needed a list of messages. Write it as a list.")
    if not value:
        raise ValueError(f"{name}: has no messages; needed at least one in {key}. Remove the record, or fill it.")
    return list(value)


def _system_items(system: Any, items: list[Any], name: str) -> list[Any]:
    """The system message that some ShareGPT data sets keep beside the conversation."""
    if system is None or system == "":
        return []
    if any(isinstance(item, Mapping) and "system" in (item.get("from"), item.get("role")) for item in items):
        raise ValueError(f"{name}: has both a system field and a system message; needed one. Remove one of them.")
    return [{"role": "system", "content": system}]


def _prompt_items(prompt: Any, name: str) -> list[Any]:
    if isinstance(prompt, str):
        return [{"role": "user", "content": prompt}]
    history = []
    for item in _items(prompt, "prompt", name):
        speaker = item.get("role", item.get("from")) if isinstance(item, Mapping) else None
        is_response = isinstance(speaker, str) and _SHAREGPT_ROLES.get(speaker) == "assistant"
        unweighted = is_response and item.get("weight") is None and item.get("train") is None
        history.append({**item, "weight": 0.0} if unweighted else item)
    return history


def _chain(value: Any, key: str, name: str) -> list[Any]:
    """One message or several of a completion: text and a message without a role are the assistant's."""
    if isinstance(value, str):
        return [{"role": "assistant", "content": value}]
    if isinstance(value, Mapping):
        return [value if "role" in value or "from" in value else {"role": "assistant", **value}]
    return _items(value, key, name)


def _tools(tools: Any, name: str) -> tuple[Mapping[str, Any], ...] | None:
    remedy = 'Write them as [{"type": "function", "function": {"name": ..., "parameters": ...}}].'
    if isinstance(tools, str):
        try:
            tools = json.loads(tools) if tools.strip() else None
        except json.JSONDecodeError as error:
            raise ValueError(
                f"{name}: tools is text but not JSON ({error.msg} at column {error.colno}). {remedy}"
            ) from None
    if tools is None:
        return None
    _check_text(tools, f"{name}: tools")
    if not isinstance(tools, list | tuple) or not all(isinstance(tool, Mapping) for tool in tools):
        raise ValueError(f"{name}: tools is {_shown(tools)}; needed a list of objects. {remedy}")
    return tuple(tools) or None


def _name(identifier: str | int, where: str) -> str:
    return f"dialogue {identifier} ({where})" if where else f"dialogue {identifier}"


def _shown(value: Any) -> str:
    """The value and its type, short enough for an error."""
    text = repr(value)
    return f"{text if len(text) <= 60 else text[:57] + '...'} ({type(value).__name__})"
