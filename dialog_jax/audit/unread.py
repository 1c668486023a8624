"""Keys of records that nothing reads: dialogues in, the keys that change nothing the model sees out, with their counts.

The program ignores metadata. Whether the chat template reads another key is found by rendering the dialogue without it
and with another value: a key that changes no text in any dialogue is not read. No template is analyzed, so one that
writes a whole message as JSON reads all of it. Knows no tokens.
"""

import collections
import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from dialog_jax.dialogues.dialogue import Dialogue, Message
from dialog_jax.errors import UserError
from dialog_jax.rendering.sequences import Renderer

_MAX_DIALOGUES = 50  # in which a key is changed before it counts as unread
_OTHER_TEXT = "Qx7 zebra"
_Fields = Mapping[str, Any]


class _Key(NamedTuple):
    """A kind of key in a record."""

    kind: str
    """What has the key: `user message`, `tool call`, ...; it begins the key's name."""
    key: str

    def __str__(self) -> str:
        return f"{self.kind}: {self.key}" if self.kind else self.key


_CALLS = _Key("assistant message", "tool_calls")
_TOOLS = _Key("", "tools")
_PARENTS = {"tool call": _CALLS, "function of a tool call": _CALLS, "tool": _TOOLS, "function of a tool": _TOOLS}
_READ_BY_PROGRAM = {
    "tool call": {"type", "function"},
    "function of a tool call": {"arguments"},
    "tool": {"type", "function"},
}


class KeyTally:
    """Counts the keys of dialogues and finds those that are read."""

    def __init__(self, renderer: Renderer):
        self._renderer = renderer
        self._counts: collections.Counter[_Key] = collections.Counter()
        self._dialogues: collections.Counter[_Key] = collections.Counter()  # that have a key
        self._tries: collections.Counter[_Key] = collections.Counter()  # those in which it was changed
        self._read: set[_Key] = set()

    def add(self, dialogue: Dialogue, paths: Sequence[Dialogue]) -> None:
        """Adds a dialogue that the template renders.

        Args:
          paths: the dialogue of each of its paths.
        """
        counts = collections.Counter(_list_keys(dialogue, self._renderer.chat_template_kwargs))
        self._counts.update(counts)
        self._counts.update(_Key("", key) for key in dialogue.metadata)
        self._dialogues.update(counts.keys())
        unknown = [key for key in counts if key not in self._read and self._tries[key] < _MAX_DIALOGUES]
        if not unknown:
            return
        texts = [self._renderer.render_texts(path) for path in paths]
        for key in unknown:
            self._tries[key] += 1
            if any(self._changes(path, key, text) for path, text in zip(paths, texts, strict=True)):
                self._read.add(key)

    def count_unread(self) -> dict[str, int]:
        """Returns the keys that are not read, each with the number of times that it occurs, the most frequent first.

        Keys in something that is not read are left out.
        """
        return {str(key): self._counts[key] for key in self._list_unread()}

    def describe_unread(self) -> dict[str, list[str]]:
        """Returns the keys that are not read, by kind of finding: `unread`, or `unread_tools` for tools and calls.

        {"unread": ["source (2)", "user message: mood (60, changed in 50 of 60 dialogues)"]}
        """
        sentences = collections.defaultdict(list)
        for key in self._list_unread():
            tries, dialogues = self._tries[key], self._dialogues[key]
            share = f", changed in {tries:,} of {dialogues:,} dialogues" if tries < dialogues else ""
            kind = "unread_tools" if key in (_TOOLS, _CALLS) else "unread"
            sentences[kind].append(f"{key} ({self._counts[key]:,}{share})")
        return sentences

    def _list_unread(self) -> list[_Key]:
        return [
            key
            for key, _ in self._counts.most_common()
            if key not in self._read and not (key.kind in _PARENTS and _PARENTS[key.kind] not in self._read)
        ]

    def _changes(self, dialogue: Dialogue, key: _Key, texts: Sequence[str]) -> bool:
        """Returns whether the texts change if the key is removed or has another value."""
        for edit in (_remove, _alter):
            changed = _edit(dialogue, key, edit, self._renderer.chat_template_kwargs)
            try:
                if changed != dialogue and self._renderer.render_texts(changed) != texts:
                    return True
            except UserError:  # the template needs the key
                return True
        return False


def _list_keys(dialogue: Dialogue, config_kwargs: _Fields) -> Iterator[_Key]:
    """Yields the keys that a template may read, once for each place that has them."""
    if dialogue.tools:
        yield _TOOLS
    yield from (_Key("chat_template_kwargs", key) for key in dialogue.chat_template_kwargs)
    yield from (_Key("data.chat_template_kwargs", key) for key in config_kwargs)
    for message in dialogue.messages:
        yield from (_Key(f"{message.role} message", key) for key in message.fields)
    for kind, container in (
        *(("tool call", call) for message in dialogue.messages for call in message.fields.get("tool_calls", ())),
        *(("tool", tool) for tool in dialogue.tools or ()),
    ):
        yield from (_Key(kind, key) for key in container if key not in _READ_BY_PROGRAM[kind])
        kind, function = f"function of a {kind}", container.get("function")
        if isinstance(function, Mapping):
            yield from (_Key(kind, key) for key in function if key not in _READ_BY_PROGRAM.get(kind, ()))


def _edit(dialogue: Dialogue, key: _Key, edit: Callable[[_Fields, str], _Fields], config_kwargs: _Fields) -> Dialogue:
    """Returns the dialogue with a key edited in each place that has it."""

    def edit_container(container: _Fields) -> _Fields:
        return edit(container, key.key) if key.key in container else container

    def edit_function(container: _Fields) -> _Fields:
        function = container.get("function")
        return {**container, "function": edit_container(function)} if isinstance(function, Mapping) else container

    def edit_calls(message: Message, change: Callable[[_Fields], _Fields]) -> Message:
        calls = message.fields.get("tool_calls")
        fields = {**message.fields, "tool_calls": [change(call) for call in calls]} if calls else message.fields
        return dataclasses.replace(message, fields=fields)

    messages, tools = dialogue.messages, dialogue.tools or ()
    if key == _TOOLS:
        return dataclasses.replace(dialogue, tools=None)
    if key.kind == "chat_template_kwargs":
        return dataclasses.replace(dialogue, chat_template_kwargs=edit_container(dialogue.chat_template_kwargs))
    if key.kind == "data.chat_template_kwargs":
        kwargs = edit_container(config_kwargs) if edit is _alter else {}
        return dataclasses.replace(dialogue, chat_template_kwargs={**kwargs, **dialogue.chat_template_kwargs})
    if key.kind in ("tool", "function of a tool"):
        change = edit_container if key.kind == "tool" else edit_function
        return dataclasses.replace(dialogue, tools=tuple(change(tool) for tool in tools))
    if key.kind in ("tool call", "function of a tool call"):
        change = edit_container if key.kind == "tool call" else edit_function
        return dataclasses.replace(dialogue, messages=tuple(edit_calls(message, change) for message in messages))
    return dataclasses.replace(
        dialogue,
        messages=tuple(
            dataclasses.replace(message, fields=edit_container(message.fields))
            if key.kind == f"{message.role} message"
            else message
            for message in messages
        ),
    )


def _remove(container: _Fields, key: str) -> _Fields:
    return {name: value for name, value in container.items() if name != key}


def _alter(container: _Fields, key: str) -> _Fields:
    """Returns the container with another value of the same type."""
    value = container[key]
    if isinstance(value, bool):
        other: Any = not value
    elif isinstance(value, int | float):
        other = value + 1
    else:
        other = type(value)() if isinstance(value, list | dict) else _OTHER_TEXT
    return {**container, key: other}
