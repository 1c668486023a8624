"""Files, hub data sets and Python records in; checked `Dialogue`s out, one at a time.

Knows the formats people keep dialogues in, and nothing of templates, tokens or loss.
"""

import dataclasses
import json
import math
import pathlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

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

_FORMATS = (
    '"messages": [{"role", "content"}, ...], "conversations": [{"from", "value"}, ...], or "prompt" and "completion"'
)
_PARQUET_BATCH = 256  # records held in memory at once


@dataclasses.dataclass(frozen=True, kw_only=True)
class Message:
    """One message. `weight` multiplies its loss; `fields` is what else a template may read, such as `tool_calls`."""

    role: str
    content: str
    weight: float = 1.0
    fields: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        """What a chat template sees: role, content and the further fields, never the weight."""
        return {"role": self.role, "content": self.content, **self.fields}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Dialogue:
    """Messages in order. `id` is the record's own, or its index in the source; `where` is for error messages."""

    id: str | int
    messages: tuple[Message, ...]
    tools: tuple[Mapping[str, Any], ...] | None = None
    metadata: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    where: str = ""

    @property
    def name(self) -> str:
        """How messages to the user call it: `dialogue 412 (train.jsonl:413)`."""
        return _name(self.id, self.where)

    def __str__(self) -> str:
        return self.name


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
    path = pathlib.Path(source).expanduser()
    readers: dict[str, Callable[[pathlib.Path], Iterator[tuple[str, Any]]]] = {
        ".jsonl": _jsonl_records,
        ".json": _json_records,
        ".parquet": _parquet_records,
    }
    suffix = path.suffix.lower()
    if path.is_file() and suffix not in readers:
        raise ValueError(
            f"{path.name}: got a file that ends in {path.suffix or 'nothing'}; dialogues are read from "
            f"{', '.join(readers)}, a directory or a hub data set. Convert it, or rename it to what it is."
        )
    if suffix in readers and not path.is_dir():
        if not path.is_file():
            raise ValueError(
                f"{path.name}: no such file. Check the path; relative paths start at the working directory."
            )
        return _parse_all(readers[suffix](path), path.name)
    return _parse_all(_dataset_records(str(source), path, split), path.name)


def dialogues_from_records(records: Iterable[Any], *, source: str = "records") -> Iterator[Dialogue]:
    """The dialogues of Python records in any of the formats of `parse_dialogue`; `source` names them in errors."""
    return _parse_all(((f"{source}[{index}]", record) for index, record in enumerate(records)), source)


def parse_dialogue(record: Any, *, index: int, where: str) -> Dialogue:
    """One record as a Dialogue.

    The formats, tried in this order; every other key of the record is kept as metadata:

        {"messages": [{"role": "user", "content": "Hi", "weight": 0.5, "name": "Ann"}, ...], "tools": [...]}
        {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}], "system": "Be kind."}
        {"prompt": "Hi", "completion": "Hello"}                     or lists of messages for either

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
        items = _prompt_items(record["prompt"], name) + _completion_items(record["completion"], name)
    else:
        keys = ", ".join(f"{key!r}{' (null)' if value is None else ''}" for key, value in record.items()) or "none"
        raise ValueError(f"{name}: has the keys {keys}; needed {_FORMATS}. Rename or convert its fields.")
    return Dialogue(
        id=identifier,
        messages=tuple(_message(item, f"{name}: message {i}") for i, item in enumerate(items)),
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
        if key not in (role_key, content_key, "weight", "train") and value is not None
    }
    content = item.get(content_key)
    if content is None and fields.get("tool_calls"):
        content = ""
    if not isinstance(content, str):
        raise ValueError(
            f"{where} ({role}) has {content_key} {_shown(content)}; needed a string. "
            "Join text parts to one string; only a message with tool_calls may leave it out."
        )
    try:
        content.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"{where} ({role}) has half a surrogate pair at character {error.start} of its {content_key}; "
            "needed Unicode text. Write the whole pair, or remove it."
        ) from None
    return Message(role=role, content=content, weight=_weight(item, where), fields=fields)


def _weight(item: Mapping[str, Any], where: str) -> float:
    weight, train = item.get("weight"), item.get("train")
    if train is not None and not isinstance(train, bool):
        raise ValueError(f"{where} has train {_shown(train)}; needed true or false. For a number, use weight.")
    if weight is None:
        weight = 1.0
    is_number = isinstance(weight, int | float) and not isinstance(weight, bool)
    if not is_number or not math.isfinite(weight) or weight < 0:
        raise ValueError(
            f"{where} has weight {_shown(weight)}; needed a finite number >= 0. "
            'Write 1 for a message that is trained on, 0 (or "train": false) for one that is not.'
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
        is_response = isinstance(item, Mapping) and item.get("role") == "assistant"
        unweighted = is_response and item.get("weight") is None and item.get("train") is None
        history.append({**item, "weight": 0.0} if unweighted else item)
    return history


def _completion_items(completion: Any, name: str) -> list[Any]:
    if isinstance(completion, str):
        return [{"role": "assistant", "content": completion}]
    return _items(completion, "completion", name)


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
    if not isinstance(tools, list | tuple) or not all(isinstance(tool, Mapping) for tool in tools):
        raise ValueError(f"{name}: tools is {_shown(tools)}; needed a list of objects. {remedy}")
    return tuple(tools) or None


def _jsonl_records(path: pathlib.Path) -> Iterator[tuple[str, Any]]:
    # Bytes, so that only a newline ends a line: text mode would also split at a lone carriage return.
    with path.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            if number == 1:
                line = line.removeprefix(b"\xef\xbb\xbf")
            if not line.strip():
                continue
            where = f"{path.name}:{number}"
            yield where, _decoded_json(line.rstrip(b"\r\n"), where, "Write one complete JSON object a line.")


def _json_records(path: pathlib.Path) -> Iterator[tuple[str, Any]]:
    data = path.read_bytes().removeprefix(b"\xef\xbb\xbf")
    if not data.strip():
        return
    remedy = "Write a list of records; if the file has one object a line, name it .jsonl."
    value = _decoded_json(data, path.name, remedy)
    if isinstance(value, list):
        for index, record in enumerate(value):
            yield f"{path.name}[{index}]", record
    else:
        yield path.name, value


def _decoded_json(data: bytes, where: str, remedy: str) -> Any:
    try:
        text = data.decode()
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{where}: byte {error.start + 1} is not UTF-8; dialogues are UTF-8 text. Save the file as UTF-8."
        ) from None
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        # A file's line is part of the place; the lines of a .jsonl file are numbered in `where` already.
        place = f"line {error.lineno}, column {error.colno}" if "\n" in text else f"column {error.colno}"
        raise ValueError(f"{where}: not JSON at {place}: {error.msg}. {remedy}") from None


def _parquet_records(path: pathlib.Path) -> Iterator[tuple[str, Any]]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise ValueError(f"{path.name}: reading Parquet needs pyarrow. Run: pip install pyarrow") from None
    try:
        parquet = pyarrow.parquet.ParquetFile(path)
    except pyarrow.ArrowInvalid as error:
        raise ValueError(f"{path.name}: not a Parquet file ({error}). Write it again, or rename it.") from None
    with parquet:
        index = 0
        for batch in parquet.iter_batches(batch_size=_PARQUET_BATCH):
            for record in batch.to_pylist():
                yield f"{path.name}[{index}]", _without_nulls(record)
                index += 1


def _dataset_records(source: str, path: pathlib.Path, split: str) -> Iterator[tuple[str, Any]]:
    looks_local = source.startswith((".", "/", "~")) or source.count("/") > 1
    if looks_local and not path.is_dir():
        raise ValueError(
            f"{path.name}: no such file or directory. Check the path; relative paths start at the working directory, "
            "and a hub data set is written owner/name."
        )
    try:
        import datasets
    except ImportError:
        raise ValueError(
            f"{path.name}: got a directory or hub name, which the package datasets reads, and it is not installed. "
            "Run: pip install datasets; or give a .jsonl, .json or .parquet file."
        ) from None
    try:
        if (path / "dataset_info.json").is_file() or (path / "dataset_dict.json").is_file():
            stored = datasets.load_from_disk(str(path))
            rows = stored[split] if isinstance(stored, Mapping) else stored
        else:
            rows = datasets.load_dataset(source, split=split, streaming=True)
    except KeyError:
        raise ValueError(
            f"{path.name}: has no split {split!r}; it has {', '.join(stored)}. Name one of them."
        ) from None
    except (FileNotFoundError, ConnectionError, ValueError) as error:
        raise ValueError(
            f"{path.name}: split {split!r} could not be opened as a data set ({error}). Check name, split and network."
        ) from None
    for index, record in enumerate(rows):
        yield f"{path.name}[{index}]", _without_nulls(record)


def _without_nulls(value: Any) -> Any:
    """The value less null fields: in a column every struct has all keys of all structs, null where it had none."""
    if isinstance(value, Mapping):
        return {key: _without_nulls(field) for key, field in value.items() if field is not None}
    if isinstance(value, list):
        return [_without_nulls(item) for item in value]
    return value


def _name(identifier: str | int, where: str) -> str:
    return f"dialogue {identifier} ({where})" if where else f"dialogue {identifier}"


def _shown(value: Any) -> str:
    """The value and its type, short enough for an error."""
    text = repr(value)
    return f"{text if len(text) <= 60 else text[:57] + '...'} ({type(value).__name__})"
