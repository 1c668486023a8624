"""A file that gives the responses of a data set other weights: written by `dialog_jax select`, read as `data.weights`.

It has one line of JSON for each dialogue of the data, also for those of which nothing is trained:

    {"id": "a1", "content": "93f1c2d47a60b58e", "turns": [{"turn": 0, "message": 1, "weight": 0.0, "value": 2.31}, ...]}

`weight` multiplies the weight that the data gives the message; `value` is what it was chosen by, for people to read.
`content` is `holdout.format_hash` of the dialogue. With "turns_cut": 2, two responses have no turn here, because they
were too long to be scored; their weight is 0. Knows no files of dialogues, and no tokens.
"""

import dataclasses
import hashlib
import json
import math
import os
import pathlib
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

from dialog_jax import atomic_files
from dialog_jax.dialogues import holdout, json_files, weights
from dialog_jax.dialogues.dialogue import Dialogue
from dialog_jax.errors import UserError

_REMEDY = "Score the data again and run dialog_jax select on the scores."


class Entry(NamedTuple):
    """The weights of a dialogue."""

    content: str
    weights: Mapping[int, float]
    """By message index."""
    turns_cut: int


@dataclasses.dataclass(frozen=True)
class WeightFile:
    """A file's weights."""

    name: str
    digest: str
    entries: Mapping[str | int, Entry]
    """By the id of the dialogue."""

    def apply(self, records: Iterable[Dialogue | UserError]) -> Iterator[Dialogue | UserError]:
        """Yields the records of a data set with the weights of the file; errors among them stay.

        A record is the error of a dialogue without a line. So a dialogue that could not be scored, because the template
        refuses it, stops training or is skipped as any other that it refuses.

        Raises:
          UserError: a dialogue or a response is not the one that was scored, two dialogues have the same id, or lines
            are left for which there is no dialogue.
        """
        seen: set[str | int] = set()
        for record in records:
            if isinstance(record, UserError):
                yield record
                continue
            if record.id in seen:
                raise UserError(
                    f"{record.name}: an earlier dialogue has its id, which {self.name} could not tell apart. Give each "
                    "another id, or omit the ids, and score the data again."
                )
            entry = self.entries.get(record.id)
            if entry is None:
                yield UserError(f"{record.name}: {self.name} has no line with this id. {_REMEDY}")
                continue
            seen.add(record.id)
            yield _apply_entry(record, entry, self.name)
        if unseen := self.entries.keys() - seen:
            raise UserError(
                f"{self.name}: has {len(unseen):,} lines for which the data has no dialogue, such as that of "
                f"{min(unseen, key=str)!r}. {_REMEDY}"
            )


def write_file(file: pathlib.Path, lines: Iterable[Mapping[str, Any]]) -> None:
    """Writes the lines, complete or not at all."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with atomic_files.replace(file) as unfinished, unfinished.open("w", encoding="utf-8") as stream:
        for line in lines:
            stream.write(json.dumps(line, ensure_ascii=False) + "\n")


def read_file(path: str | os.PathLike[str]) -> WeightFile:
    """Returns the weights of a file.

    Raises:
      UserError: there is no such file, or a line is not what `write_file` writes.
    """
    file = pathlib.Path(path).expanduser()
    if not file.is_file():
        raise UserError(f"data.weights={path}: is not a file. Make it with dialog_jax select.")
    entries: dict[str | int, Entry] = {}
    for where, line in json_files.read_lines(file):
        if isinstance(line, UserError):
            raise line
        identifier, entry = _parse_line(line, where)
        if identifier in entries:
            raise UserError(f"{where}: has the id {identifier!r} of an earlier line. {_REMEDY}")
        entries[identifier] = entry
    return WeightFile(file.name, hashlib.sha256(file.read_bytes()).hexdigest(), entries)


def _parse_line(line: Any, where: str) -> tuple[str | int, Entry]:
    """Returns the id and the weights of a line."""
    try:
        identifier, content, turns, turns_cut = line["id"], line["content"], line["turns"], line.get("turns_cut", 0)
        weight_by_message = {turn["message"]: turn["weight"] for turn in turns}
    except (TypeError, KeyError, AttributeError) as error:
        raise UserError(
            f"{where}: is not a line of a weight file ({type(error).__name__}: {error}). {_REMEDY}"
        ) from None
    values = weight_by_message.values()
    is_valid = (
        isinstance(identifier, str | int)
        and isinstance(content, str)
        and isinstance(turns_cut, int)
        and all(isinstance(message, int) for message in weight_by_message)
        and all(isinstance(value, int | float) and math.isfinite(value) and value >= 0 for value in values)
        and len(weight_by_message) == len(turns)
    )
    if not is_valid:
        raise UserError(f"{where}: has an invalid id, message index or weight, or lists a message twice. {_REMEDY}")
    return identifier, Entry(content, {index: float(value) for index, value in weight_by_message.items()}, turns_cut)


def _apply_entry(dialogue: Dialogue, entry: Entry, name: str) -> Dialogue:
    """Returns the dialogue with the weights of its entry."""
    if holdout.format_hash(dialogue) != entry.content:
        raise UserError(f"{dialogue.name}: has changed since its responses were scored for {name}. {_REMEDY}")
    messages = list(dialogue.messages)
    responses = {i for i, message in enumerate(messages) if message.role == "assistant"}
    if others := entry.weights.keys() - responses:
        raise UserError(f"{dialogue.name}: {name} has a weight for message {min(others)}, no response. {_REMEDY}")
    without = [i for i in responses - entry.weights.keys() if messages[i].weight > 0]
    if len(without) != entry.turns_cut:
        raise UserError(
            f"{dialogue.name}: {len(without):,} of its responses have no weight in {name}, of which "
            f"{entry.turns_cut:,} were too long to be scored; the others had weight 0 in the data. {_REMEDY}"
        )
    for index in responses:
        message = messages[index]
        weight = weights.multiply(message.weight, entry.weights.get(index, 0.0), f"{dialogue.name}: message {index}")
        messages[index] = dataclasses.replace(message, weight=weight, parts=message.parts if weight else ())
    return dataclasses.replace(dialogue, messages=tuple(messages))
