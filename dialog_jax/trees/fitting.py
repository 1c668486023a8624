"""Truncation and division: which of a dialogue's sequences fit a tree, and what becomes of those that do not.

In: dialogues and their rendered sequences. Out: excerpts, each with the sequences that its tree holds. Of weights, only
whether one is 0 matters here. Knows no rows.

A message has two indices: its `message_index` in the dialogue that was rendered, which may be an excerpt, and its
`original_index` in the complete dialogue.
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
    """Messages that are rendered together: a path of a dialogue, or a part of a path that is too long."""

    dialogue: Dialogue
    """The messages as a dialogue of one path; weight 0 for those that are context only."""
    original_indices: tuple[int, ...]
    """Index of each message in the complete dialogue."""
    sequences: list[RenderedSequence]
    path: int = 0
    """Which of the dialogue's paths the messages are from."""
    first_turn: int = 0
    """Turn of the first response of the excerpt, which is the number of responses of the path before it."""
    context_messages: int = 0
    """Number of leading messages that are context only."""

    @property
    def supervised_messages(self) -> list[int]:
        """The message index of each response to train on."""
        messages = enumerate(self.dialogue.messages)
        return [i for i, message in messages if message.role == "assistant" and message.weight > 0]

    @property
    def response_turns(self) -> dict[int, int]:
        """The turn of each response in `sequences`, by its original index."""
        return {
            self.original_indices[sequence.message_index]: self.first_turn + sequence.turn
            for sequence in self.sequences
            if sequence.turn >= 0
        }


def unfold(dialogue: Dialogue, objective: ObjectiveConfig) -> list[Excerpt]:
    """Returns an excerpt for each path of a dialogue, without sequences; a list of messages has one path.

    With `merge_weights=max`, messages that an earlier path trains are context in the later ones. Two answers to u0:

        message   0   1   2   3   4          excerpt of path 0   u0 a0 u1      context_messages 0
                  u0  a0  u1  b0  u2         excerpt of path 1   u0 b0 u2      context_messages 1: u0 has weight 0

    Under `last`, only the last response of each path keeps its weight.
    """
    paths = dialogue.paths()
    if len(paths) == 1:
        return [Excerpt(dialogue, paths[0], [])]
    once = objective.merge_weights == "max"
    excerpts = []
    earlier: set[int] = set()  # messages that an earlier path trains
    for number, path in enumerate(paths):
        context_messages = 0
        if objective.name == "last":
            supervised = {_find_last_response(dialogue, path)} - (earlier if once else set())
        else:
            context_messages = len(earlier.intersection(path)) if once else 0
            supervised = set(path[context_messages:])
        earlier |= supervised
        messages = tuple(dialogue.messages[i] if i in supervised else _as_context(dialogue.messages[i]) for i in path)
        part = dataclasses.replace(dialogue, messages=messages, parents=())
        excerpts.append(Excerpt(part, path, [], path=number, context_messages=context_messages))
    return excerpts


def select_fitting(
    paths: Sequence[Iterable[RenderedSequence]], objective: ObjectiveConfig, max_length: int
) -> list[list[RenderedSequence]]:
    """Returns for each path the longest prefix of its sequences such that one tree of all has `max_length` tokens.

    One path of three sequences with 4, 8 and 12 tokens, each the beginning of the next, and max_length 10: the first
    two. If the second sequence shares only 2 tokens with the first, the tree of both has 4 + 6 tokens, which fits too.
    """
    selected: list[list[RenderedSequence]] = []
    in_tree: list[RenderedSequence] = []
    size = 0
    for sequences in paths:
        selected.append([])
        for sequence in sequences:
            if objective.name == "last" and len(paths) == 1:  # the tree will hold the last sequence only
                in_tree, size = [], 0
            new = count_new_tokens(sequence, in_tree)
            if size + new > max_length:
                break
            size += new
            in_tree.append(sequence)
            selected[-1].append(sequence)
    return selected


def count_new_tokens(sequence: RenderedSequence, others: Sequence[RenderedSequence]) -> int:
    """Returns how many tokens a sequence adds to the prefix tree of others: `a b d` adds 1 to that of `a b c`."""
    shared = 0
    for other in reversed(others):  # in a path, one comparison with the last sequence is enough
        if len(other.tokens) > shared:
            shared = max(shared, prefix_tree.common_prefix_length(other.tokens, sequence.tokens))
    return len(sequence.tokens) - shared


def is_complete(excerpt: Excerpt, objective: ObjectiveConfig) -> bool:
    """Returns whether an excerpt has all sequences that the objective trains on."""
    has_full_rendering = bool(excerpt.sequences) and excerpt.sequences[-1].turn < 0
    has_all_responses = len(excerpt.response_turns) == len(excerpt.supervised_messages)
    return has_all_responses and (has_full_rendering or not objective.needs_full_rendering)


def split_excerpts(
    excerpts: Sequence[Excerpt], renderer: Renderer, objective: ObjectiveConfig, max_length: int
) -> list[list[Excerpt]]:
    """Returns the excerpts of a dialogue that is too large for a tree in groups, each of which fits one.

    Consecutive paths share a group as long as their tree fits; a path that does not fit by itself is split (see
    `split_excerpt`). Paths of 6, 3 and 14 tokens without a common prefix, and max_length 10:

        [[path 0, path 1], [first part of path 2], [second part of path 2]]
    """

    def fits(group: list[Excerpt]) -> bool:
        selected = select_fitting([excerpt.sequences for excerpt in group], objective, max_length)
        return all(len(some) == len(excerpt.sequences) for some, excerpt in zip(selected, group, strict=True))

    groups: list[list[Excerpt]] = []
    for excerpt in excerpts:
        if groups and is_complete(excerpt, objective) and fits([*groups[-1], excerpt]):
            groups[-1].append(excerpt)
        elif is_complete(excerpt, objective) and fits([excerpt]):
            groups.append([excerpt])
        else:
            (selected,) = select_fitting([excerpt.sequences], objective, max_length)
            parts = split_excerpt(excerpt._replace(sequences=selected), renderer, objective, max_length)
            groups += [[part] for part in parts]
    return groups


def split_excerpt(excerpt: Excerpt, renderer: Renderer, objective: ObjectiveConfig, max_length: int) -> list[Excerpt]:
    """Returns parts of an excerpt that is too long for a tree, such that every response that fits one is trained.

    The first part is the excerpt with the sequences it has. Each further part has the system prompt, then context from
    a user message on, then as many new turns as fit. Its context is the longest for which the prompt of its first new
    response fills at most half of max_length, or the shortest there is. A response that does not fit even so is left
    out. With max_length 100, a system prompt s of 10 tokens and turns of 10 + 10 tokens (u and a):

        excerpt        s u0 a0 u1 a1 u2 a2 u3 a3 u4 a4 u5 a5
        its sequences  those of a0 to a3 (s and 4 turns have 90 tokens)
        part 0         s u0 a0 u1 a1 u2 a2 u3 a3                     trains a0 a1 a2 a3
        part 1         s u3 a3 u4 a4 u5 a5                           trains a4 a5; s, u3 and a3 are context

    Args:
      excerpt: with the sequences that fit its first part, perhaps none.
    """
    parts = [excerpt] if excerpt.sequences else []
    messages = excerpt.dialogue.messages
    context = tuple(_as_context(message) for message in messages)
    system = int(messages[0].role == "system")
    # Responses before this message are trained on in a part, or fit none.
    done = excerpt.sequences[-1].message_index + 1 if excerpt.sequences else system

    def select_messages(start: int, stop: int) -> Dialogue:
        """The system prompt and messages `start` to `stop`; those that an earlier part trains are context."""
        new = max(start, done)
        head = context[:system] if parts else messages[:system]
        return dataclasses.replace(excerpt.dialogue, messages=head + context[start:new] + messages[new:stop])

    while remaining := [i for i in excerpt.supervised_messages if i >= done]:
        response = remaining[0]
        starts = [i for i in range(system, response) if messages[i].role == "user"]
        shortest = select_messages(starts[-1], response + 1) if starts else None
        sequences = [] if shortest is None else list(renderer.render([shortest], max_length=max_length)[0])
        if not sequences:
            done = response + 1
            continue
        room = min(max_length // 2, max_length - (len(sequences[0].tokens) - sequences[0].start))
        start = starts[-1]
        for earlier in reversed(starts[:-1]):
            if len(renderer.encode_prompt(select_messages(earlier, response))) > room:
                break
            start = earlier
        dialogue = select_messages(start, len(messages))
        (rendered,) = renderer.render(
            [dialogue], max_length=max_length, full=objective.needs_full_rendering, locate=objective.needs_span
        )
        (selected,) = select_fitting([rendered], objective, max_length)
        new = max(done if parts else 0, excerpt.context_messages)
        parts.append(
            Excerpt(
                dialogue=dialogue,
                original_indices=excerpt.original_indices[:system] + excerpt.original_indices[start:],
                sequences=selected,
                path=excerpt.path,
                first_turn=sum(message.role == "assistant" for message in messages[system:start]),
                context_messages=min(new, system) + max(0, new - start),
            )
        )
        omitted = len(messages) - len(dialogue.messages)
        done = max(sequence.message_index for sequence in selected) + omitted + 1
    return parts


def compute_factors(
    dialogue: Dialogue, excerpts: Sequence[Excerpt], objective: ObjectiveConfig
) -> list[dict[int, float]]:
    """Returns for each excerpt the factor of each of its responses' weights, by message index.

    A response that several paths share may be the last turn of one and the last but one of another; with
    `merge_weights=max` it has the largest factor. With turn_discount 0.5 and a dialogue of three turns:

        [{1: 0.25, 3: 0.5, 5: 1.0}]
    """
    paths = dialogue.paths()
    paths_with: dict[int, list[int]] = collections.defaultdict(list)  # the paths that each message is on
    for number, path in enumerate(paths):
        for message in path:
            paths_with[message].append(number)
    turns = {index: turn for excerpt in excerpts for index, turn in excerpt.response_turns.items()}
    last_turns = [max((turns[index] for index in path if index in turns), default=-1) for path in paths]

    def factor(excerpt: Excerpt, index: int) -> float:
        numbers = [excerpt.path] if objective.merge_weights == "sum" else paths_with[index]
        return max(objective.schedule(turns[index], last_turns[number]) for number in numbers)

    return [
        {
            sequence.message_index: factor(excerpt, excerpt.original_indices[sequence.message_index])
            for sequence in excerpt.sequences
            if sequence.turn >= 0
        }
        for excerpt in excerpts
    ]


def _find_last_response(dialogue: Dialogue, path: Sequence[int]) -> int:
    """Returns the last assistant message of weight above 0; -1 if there is none."""
    messages = dialogue.messages
    return max((i for i in path if messages[i].role == "assistant" and messages[i].weight > 0), default=-1)


def _as_context(message: Message) -> Message:
    """Returns the message with weight 0."""
    return dataclasses.replace(message, weight=0.0, parts=())
