"""Cutting to length: which of a dialogue's sequences fit a tree, and what to do with those that do not.

Knows lengths and messages; knows no weight but whether it is 0, and nothing of rows.
"""

import dataclasses
from collections.abc import Iterable
from typing import NamedTuple

from dialog_jax.data import tries
from dialog_jax.data.dialogues import Dialogue
from dialog_jax.data.objectives import ObjectiveConfig
from dialog_jax.data.rendering import RenderedSequence, Renderer


class Piece(NamedTuple):
    """What becomes one tree: a dialogue, or system prompt, history and some turns of one that is too long."""

    dialogue: Dialogue
    sequences: list[RenderedSequence]
    first_turn: int
    """Number of responses of the whole dialogue that stand before this piece's messages."""
    trained: int
    """The first so many messages are in the piece as history only, with weight 0."""

    @property
    def turns(self) -> int:
        return sum(sequence.turn >= 0 for sequence in self.sequences)

    @property
    def last_turn(self) -> int:
        """The last turn of it that is trained on, counted in the whole dialogue; -1 if there is none."""
        return max((self.first_turn + sequence.turn for sequence in self.sequences if sequence.turn >= 0), default=-1)


def that_fit(
    sequences: Iterable[RenderedSequence], objective: ObjectiveConfig, max_length: int
) -> list[RenderedSequence]:
    """The longest prefix of `sequences` whose tree has at most `max_length` tokens."""
    fitting: list[RenderedSequence] = []
    size = 0
    for sequence in sequences:
        shared = 0
        for other in reversed(fitting):
            if len(other.tokens) > shared:
                shared = max(shared, tries.common_prefix(other.tokens, sequence.tokens))
        # The tree of the objective `last` holds the last sequence only.
        size = len(sequence.tokens) if objective.name == "last" else size + len(sequence.tokens) - shared
        if size > max_length:
            break
        fitting.append(sequence)
    return fitting


def split(whole: Piece, renderer: Renderer, objective: ObjectiveConfig, max_length: int) -> list[Piece]:
    """The pieces of a dialogue that is too long, the first of which holds the sequences of `whole`.

    Each of the others has the system prompt and begins with a user message: as much history as leaves half of the row
    to its new turns, or the least there can be. A response that fits no piece, however little comes before it, is left
    out.
    """
    pieces = [whole] if whole.sequences else []
    messages = whole.dialogue.messages
    system = int(messages[0].role == "system")
    known = tuple(dataclasses.replace(message, weight=0.0) for message in messages)
    responses = [i for i, message in enumerate(messages) if message.role == "assistant" and message.weight > 0]
    done = whole.sequences[-1].message + 1 if whole.sequences else system  # what comes before is trained or given up

    def begin(start: int, stop: int) -> Dialogue:
        new = max(start, done)
        head = known[:system] if pieces else messages[:system]
        return dataclasses.replace(whole.dialogue, messages=head + known[start:new] + messages[new:stop])

    while remaining := [i for i in responses if i >= done]:
        starts = [i for i in range(system, remaining[0]) if messages[i].role == "user"]
        first = [] if not starts else list(renderer.render([begin(starts[-1], remaining[0] + 1)], limit=max_length)[0])
        if not first:
            done = remaining[0] + 1
            continue
        room = min(max_length // 2, max_length - (len(first[0].tokens) - first[0].start))
        best = starts[-1]
        for start in reversed(starts[:-1]):
            if len(renderer.prompt(begin(start, remaining[0]))) > room:
                break
            best = start
        dialogue = begin(best, len(messages))
        (rendered,) = renderer.render([dialogue], limit=max_length, whole=objective.whole, locate=objective.locates)
        dropped = sum(message.role == "assistant" for message in messages[system:best])
        trained = system + max(best, done) - best if pieces else 0
        pieces.append(Piece(dialogue, that_fit(rendered, objective, max_length), dropped, trained))
        last = max(sequence.message for sequence in pieces[-1].sequences)
        done = last + len(messages) - len(dialogue.messages) + 1
    return pieces
