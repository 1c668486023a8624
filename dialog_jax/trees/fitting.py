"""Cutting to length: which of a dialogue's sequences fit a tree, and what to do with those that do not.

Knows lengths and messages; knows no weight but whether it is 0, and nothing of rows.
"""

import collections
import dataclasses
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from dialog_jax.dialogues.dialogue import Dialogue, Message
from dialog_jax.rendering.sequences import RenderedSequence, Renderer
from dialog_jax.trees import prefix_tree
from dialog_jax.trees.objectives import ObjectiveConfig


class Excerpt(NamedTuple):
    """A list of messages that are rendered together: a path of a dialogue, or a part of one that is too long."""

    dialogue: Dialogue
    messages: tuple[int, ...]
    """Which of the whole dialogue's messages these are."""
    sequences: list[RenderedSequence]
    path: int = 0
    """Which of the dialogue's paths they are from."""
    first_turn: int = 0
    """Number of responses of the path that stand before this piece's messages."""
    trained: int = 0
    """The first so many messages are in the piece as history only, with weight 0."""

    @property
    def wanted(self) -> list[int]:
        """The messages of the piece that are responses to train on."""
        messages = enumerate(self.dialogue.messages)
        return [i for i, message in messages if message.role == "assistant" and message.weight > 0]

    @property
    def responses(self) -> dict[int, int]:
        """The turn of each response that is trained on, by its number in the whole dialogue."""
        return {self.messages[s.message_index]: self.first_turn + s.turn for s in self.sequences if s.turn >= 0}


def unfold(dialogue: Dialogue, objective: ObjectiveConfig) -> list[Excerpt]:
    """The paths of a dialogue, without sequences yet; a list of messages is its one path.

    With `merge_weights=max`, what one path trains is history in the later ones; under `last`, all is history in a tree
    but the last response of each path.
    """
    paths = dialogue.paths()
    if len(paths) == 1:
        return [Excerpt(dialogue, paths[0], [])]
    once = objective.merge_weights == "max"
    pieces = []
    seen: set[int] = set()
    for number, path in enumerate(paths):
        trained = 0
        if objective.name == "last":
            new = {_last_response(dialogue, path)} - (seen if once else set())
        else:
            trained = len(seen.intersection(path)) if once else 0
            new = set(path[trained:])
        seen |= new
        messages = tuple(dialogue.messages[i] if i in new else _history(dialogue.messages[i]) for i in path)
        part = dataclasses.replace(dialogue, messages=messages, parents=())
        pieces.append(Excerpt(part, path, [], path=number, trained=trained))
    return pieces


def select_fitting(
    paths: Sequence[Iterable[RenderedSequence]], objective: ObjectiveConfig, max_length: int
) -> list[list[RenderedSequence]]:
    """For each path the longest prefix of its sequences such that the tree of all has at most `max_length` tokens."""
    all_fitting: list[list[RenderedSequence]] = []
    counted: list[RenderedSequence] = []
    size = 0
    for sequences in paths:
        all_fitting.append([])
        for sequence in sequences:
            if objective.name == "last" and len(paths) == 1:  # the tree will hold the last one only
                counted, size = [], 0
            new = count_new_tokens(sequence, counted)
            if size + new > max_length:
                break
            size += new
            counted.append(sequence)
            all_fitting[-1].append(sequence)
    return all_fitting


def count_new_tokens(sequence: RenderedSequence, others: Sequence[RenderedSequence]) -> int:
    """How many tokens a sequence adds to the trie of others."""
    shared = 0
    for other in reversed(others):  # in a path, only the last is looked at
        if len(other.tokens) > shared:
            shared = max(shared, prefix_tree.common_prefix_length(other.tokens, sequence.tokens))
    return len(sequence.tokens) - shared


def split_excerpts(
    pieces: Sequence[Excerpt], renderer: Renderer, objective: ObjectiveConfig, max_length: int
) -> list[list[Excerpt]]:
    """The pieces of a dialogue that is too large for a tree, in groups that each fit one.

    Paths go together, in order, as long as they fit whole; one that does not fit by itself is split as a list is.
    """

    def fit(group: list[Excerpt]) -> bool:
        fitting = select_fitting([piece.sequences for piece in group], objective, max_length)
        return all(len(some) == len(piece.sequences) for some, piece in zip(fitting, group, strict=True))

    groups: list[list[Excerpt]] = []
    for piece in pieces:
        if groups and is_complete(piece, objective) and fit([*groups[-1], piece]):
            groups[-1].append(piece)
        elif is_complete(piece, objective) and fit([piece]):
            groups.append([piece])
        else:
            (fitting,) = select_fitting([piece.sequences], objective, max_length)
            groups += [
                [part] for part in split_excerpt(piece._replace(sequences=fitting), renderer, objective, max_length)
            ]
    return groups


def is_complete(piece: Excerpt, objective: ObjectiveConfig) -> bool:
    """Whether nothing of what the objective trains on is missing from a piece's sequences."""
    rendered = bool(piece.sequences) and piece.sequences[-1].turn < 0
    return len(piece.responses) == len(piece.wanted) and (rendered or not objective.whole)


def compute_factors(
    dialogue: Dialogue, pieces: Sequence[Excerpt], objective: ObjectiveConfig
) -> list[dict[int, float]]:
    """For each piece, what multiplies the weights of its responses, by their number in the piece.

    A response that several paths share may be their last turn, or the last but one; `merge_weights=max` takes the
    largest schedule of them.
    """
    paths = dialogue.paths()
    through: dict[int, list[int]] = collections.defaultdict(list)
    for number, path in enumerate(paths):
        for message in path:
            through[message].append(number)
    turns = {message: turn for piece in pieces for message, turn in piece.responses.items()}
    lasts = [max((turns[message] for message in path if message in turns), default=-1) for path in paths]

    def factor(piece: Excerpt, message: int) -> float:
        own = [piece.path] if objective.merge_weights == "sum" else through[message]
        return max(objective.schedule(turns[message], lasts[path]) for path in own)

    return [
        {s.message_index: factor(piece, piece.messages[s.message_index]) for s in piece.sequences if s.turn >= 0}
        for piece in pieces
    ]


def split_excerpt(whole: Excerpt, renderer: Renderer, objective: ObjectiveConfig, max_length: int) -> list[Excerpt]:
    """The pieces of a list of messages that is too long, the first of which holds the sequences of `whole`.

    Each of the others has the system prompt and begins with a user message: as much history as leaves half of the row
    to its new turns, or the least there can be. A response that fits no piece, however little comes before it, is left
    out.
    """
    pieces = [whole] if whole.sequences else []
    messages = whole.dialogue.messages
    system = int(messages[0].role == "system")
    known = tuple(_history(message) for message in messages)
    responses = whole.wanted
    done = (
        whole.sequences[-1].message_index + 1 if whole.sequences else system
    )  # what comes before is trained or given up

    def begin(start: int, stop: int) -> Dialogue:
        new = max(start, done)
        head = known[:system] if pieces else messages[:system]
        return dataclasses.replace(whole.dialogue, messages=head + known[start:new] + messages[new:stop])

    while remaining := [i for i in responses if i >= done]:
        starts = [i for i in range(system, remaining[0]) if messages[i].role == "user"]
        first = (
            [] if not starts else list(renderer.render([begin(starts[-1], remaining[0] + 1)], max_length=max_length)[0])
        )
        if not first:
            done = remaining[0] + 1
            continue
        room = min(max_length // 2, max_length - (len(first[0].tokens) - first[0].start))
        best = starts[-1]
        for start in reversed(starts[:-1]):
            if len(renderer.encode_prompt(begin(start, remaining[0]))) > room:
                break
            best = start
        dialogue = begin(best, len(messages))
        (rendered,) = renderer.render([dialogue], max_length=max_length, full=objective.whole, locate=objective.locates)
        dropped = sum(message.role == "assistant" for message in messages[system:best])
        new = max(done if pieces else 0, whole.trained)
        trained = min(new, system) + max(0, new - best)
        (fitting,) = select_fitting([rendered], objective, max_length)
        numbers = whole.messages[:system] + whole.messages[best:]
        pieces.append(Excerpt(dialogue, numbers, fitting, whole.path, dropped, trained))
        done = max(sequence.message_index for sequence in fitting) + len(messages) - len(dialogue.messages) + 1
    return pieces


def _last_response(dialogue: Dialogue, path: Sequence[int]) -> int:
    """The last assistant message of weight above 0; -1 if there is none."""
    messages = dialogue.messages
    return max((i for i in path if messages[i].role == "assistant" and messages[i].weight > 0), default=-1)


def _history(message: Message) -> Message:
    """The message, not trained on."""
    return dataclasses.replace(message, weight=0.0, parts=())
