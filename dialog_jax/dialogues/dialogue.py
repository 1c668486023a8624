"""A dialogue: messages in order, or as a tree. Knows nothing of files, templates or tokens."""

import dataclasses
from collections.abc import Mapping
from typing import Any


@dataclasses.dataclass(frozen=True, kw_only=True)
class Part:
    """A part of a message's content; its tokens have the message's weight times this one."""

    text: str
    weight: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class Message:
    """One message. `weight` multiplies its loss; `fields` holds what else a template may read, such as `tool_calls`."""

    role: str
    content: str
    weight: float = 1.0
    fields: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    parts: tuple[Part, ...] = ()
    """Parts that join to `content`, if one of them has a weight other than 1; otherwise empty."""
    has_own_weight: bool = dataclasses.field(default=False, compare=False)
    """Whether the record gives the message a weight, or says whether it is trained on."""

    def as_dict(self) -> dict[str, Any]:
        """Returns what a chat template sees: role, content and the further fields, never the weight."""
        return {"role": self.role, "content": self.content, **self.fields}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Dialogue:
    """Messages, in order or as a tree. `id` is the record's, or else its index in the source; `where` is for errors."""

    id: str | int
    messages: tuple[Message, ...]
    parents: tuple[int, ...] = ()
    """The index of each message's parent, -1 for the first; empty if each message follows the one before it."""
    tools: tuple[Mapping[str, Any], ...] | None = None
    chat_template_kwargs: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    """Variables of the chat template for this dialogue; they replace those of the config."""
    metadata: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    """The fields of the record that are not read."""
    nulls: int = 0
    """Number of null fields of arguments and of tools' parameters that are left out."""
    where: str = ""

    @property
    def name(self) -> str:
        """The dialogue's name in errors: `dialogue 412 (train.jsonl:413)`."""
        return name_dialogue(self.id, self.where)

    def __str__(self) -> str:
        return self.name

    def ancestors(self, index: int) -> tuple[int, ...]:
        """Returns the indices of the messages before message `index` on its path, from the first of the dialogue."""
        if not self.parents:
            return tuple(range(index))
        path = []
        while (index := self.parents[index]) >= 0:
            path.append(index)
        return tuple(reversed(path))

    def paths(self) -> list[tuple[int, ...]]:
        """Returns the indices of the messages on each path from the first message to a leaf, depth first."""
        if not self.parents:
            return [tuple(range(len(self.messages)))]
        leaves = set(range(len(self.messages))) - set(self.parents)
        return sorted((*self.ancestors(leaf), leaf) for leaf in leaves)


def name_dialogue(identifier: str | int, where: str) -> str:
    """Returns a dialogue's name in errors: `dialogue 412 (train.jsonl:413)`."""
    return f"dialogue {identifier} ({where})" if where else f"dialogue {identifier}"
