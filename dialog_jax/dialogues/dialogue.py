"""A dialogue: messages in order, or as a tree. Knows nothing of files, templates or tokens."""

import dataclasses
from collections.abc import Mapping
from typing import Any


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
        return name_dialogue(self.id, self.where)

    def __str__(self) -> str:
        return self.name

    def ancestors(self, index: int) -> tuple[int, ...]:
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
        return sorted((*self.ancestors(leaf), leaf) for leaf in leaves)


def name_dialogue(identifier: str | int, where: str) -> str:
    """Returns how messages to the user call a dialogue: `dialogue 412 (train.jsonl:413)`."""
    return f"dialogue {identifier} ({where})" if where else f"dialogue {identifier}"
