"""Dialogues to excerpts: the messages that are rendered together, whole paths and, for what is too long, parts of them.

In: dialogues and their rendered sequences. Out: excerpts, each with the sequences that fit a row. Of weights, only
whether one is 0 matters here. Knows no rows.

A message has two indices: its `message_index` in the dialogue that was rendered, which may be an excerpt, and its
`original_index` in the complete dialogue.
"""

import collections
import dataclasses
import itertools
from collections.abc import Collection, Iterable, Sequence
from typing import NamedTuple

from dialog_jax.dialogues.dialogue import Dialogue
from dialog_jax.rendering.chat_template import TemplateRefused
from dialog_jax.rendering.rendered_sequence import RenderedSequence
from dialog_jax.rendering.sequences import Renderer
from dialog_jax.trees import histories
from dialog_jax.trees.objectives import ObjectiveConfig

_ROOM = 1.5  # how much more text than is expected to fit is rendered


class Excerpt(NamedTuple):
    """Messages that are rendered together: a path of a dialogue, or a part of a path that is too long."""

    dialogue: Dialogue
    """The messages as a dialogue of one path; weight 0 for those that are context only."""
    original_indices: tuple[int, ...]
    """Index of each message in the complete dialogue."""
    sequences: list[RenderedSequence]
    path: int = 0
    """Which of the dialogue's paths the messages are from."""
    omitted_turns: int = 0
    """Number of responses of the path that are left out; all of them come before those to train on."""
    context: frozenset[int] = frozenset()
    """The message indices of those that are context only."""

    @property
    def supervised_messages(self) -> list[int]:
        """The message index of each response to train on."""
        messages = enumerate(self.dialogue.messages)
        return [i for i, message in messages if message.role == "assistant" and message.weight > 0]

    @property
    def response_turns(self) -> dict[int, int]:
        """The turn of each response in `sequences`, by its original index."""
        return {
            self.original_indices[sequence.message_index]: self.omitted_turns + sequence.turn
            for sequence in self.sequences
            if sequence.turn >= 0
        }


def unfold(dialogue: Dialogue, objective: ObjectiveConfig) -> list[Excerpt]:
    """Returns an excerpt for each path of a dialogue, without sequences; a list of messages has one path.

    With `merge_weights=max`, messages that an earlier path trains are context in the later ones. Two answers to u0:

        message   0   1   2   3   4          excerpt of path 0   u0 a0 u1      context {}
                  u0  a0  u1  b0  u2         excerpt of path 1   u0 b0 u2      context {0}: u0 has weight 0

    Under `last`, only the last response of each path keeps its weight.
    """
    paths = dialogue.paths()
    if len(paths) == 1 and objective.name != "last":
        return [Excerpt(dialogue, paths[0], [])]
    once = objective.merge_weights == "max"
    excerpts = []
    earlier: set[int] = set()  # messages that an earlier path trains
    for number, path in enumerate(paths):
        context: frozenset[int] = frozenset()
        if objective.name == "last":
            supervised = {_find_last_response(dialogue, path)} - (earlier if once else set())
        else:
            context = frozenset(i for i, index in enumerate(path) if once and index in earlier)
            supervised = {index for i, index in enumerate(path) if i not in context}
        earlier |= supervised
        messages = tuple(
            dialogue.messages[i] if i in supervised else histories.as_context(dialogue.messages[i]) for i in path
        )
        part = dataclasses.replace(dialogue, messages=messages, parents=())
        excerpts.append(Excerpt(part, path, [], path=number, context=context))
    return excerpts


def is_complete(excerpt: Excerpt, objective: ObjectiveConfig) -> bool:
    """Returns whether an excerpt has all sequences that the objective trains on."""
    has_full_rendering = bool(excerpt.sequences) and excerpt.sequences[-1].turn < 0
    has_all_responses = len(excerpt.response_turns) == len(excerpt.supervised_messages)
    return has_all_responses and (has_full_rendering or not objective.needs_full_rendering)


def shorten_histories(
    excerpt: Excerpt, renderer: Renderer, objective: ObjectiveConfig, max_length: int
) -> list[Excerpt]:
    """Returns excerpts with shorter histories for the responses of an excerpt whose sequences are too long.

    Each has the system prompt, then history from a user message on, then as many of the responses as fit. Its history
    is the longest for which the prompt of its first response fills at most half of max_length, or the shortest there
    is. If even the history from the last user message on is too long, the excerpt has that message and the last of the
    messages after it; a tool result stays with the call that it answers, and a response with the results before it. A
    response that does not fit even so is left out, and so is one whose shortened history the template refuses. With
    max_length 100, a system prompt s of 10 tokens and turns of 10 + 10 tokens (u and a):

        excerpt        s u0 a0 u1 a1 u2 a2 u3 a3 u4 a4 u5 a5
        its sequences  those of a0 to a3 (s and 4 turns have 90 tokens)
        returned       s u3 a3 u4 a4 u5 a5                           trains a4 a5; s, u3 and a3 are context

    Args:
      excerpt: with the sequences that fit, perhaps none.
    """
    indices = {original: i for i, original in enumerate(excerpt.original_indices)}
    trained = _find_trained(excerpt, excerpt.context)
    remaining = [i for i in excerpt.supervised_messages if i not in trained]
    shorter: list[Excerpt] = []
    while remaining:
        part = _shorten_history(excerpt, remaining.pop(0), trained, renderer, objective, max_length)
        if part is None:
            continue
        trained |= {indices[part.original_indices[i]] for i in _find_trained(part, part.context)}
        remaining = [i for i in remaining if i not in trained]
        shorter.append(part)
    return shorter


def _shorten_history(
    excerpt: Excerpt,
    response: int,
    trained: Collection[int],
    renderer: Renderer,
    objective: ObjectiveConfig,
    max_length: int,
) -> Excerpt | None:
    """Returns an excerpt in which a response fits behind a shorter history, with as many after it as fit.

    None if it is too long behind any, or the template refuses the dialogue without the messages before.

    Args:
      trained: the message indices of the responses that other excerpts train, and of messages in their histories.

    Raises:
      UserError: what `Renderer.render` raises, with the original indices of the messages that it counts.
    """
    messages = excerpt.dialogue.messages
    try:
        history, room = histories.choose_history(
            excerpt.dialogue, excerpt.original_indices, response, renderer, max_length
        )
    except TemplateRefused:
        return None
    if not history:
        return None
    characters = itertools.accumulate(len(message.content) for message in messages[response:])
    stop = response + max(1, sum(count <= room * _ROOM for count in characters))
    for end in dict.fromkeys((stop, response + 1)):  # the template may refuse only what follows
        selected = [*history, *range(response, end)]
        part = Excerpt(
            dialogue=dataclasses.replace(
                excerpt.dialogue,
                messages=tuple(histories.as_context(messages[i]) if i in trained else messages[i] for i in selected),
            ),
            original_indices=tuple(excerpt.original_indices[i] for i in selected),
            sequences=[],
            path=excerpt.path,
            omitted_turns=sum(messages[i].role == "assistant" for i in set(range(response)).difference(history)),
            context=frozenset(place for place, i in enumerate(selected) if i in trained),
        )
        try:
            with histories.name_original_messages(part.original_indices):
                (sequences,) = renderer.render(
                    [part.dialogue],
                    max_length=max_length,
                    full=objective.needs_full_rendering,
                    locate=objective.needs_span,
                )
                part = part._replace(sequences=list(sequences))
        except TemplateRefused:
            continue
        return part if part.sequences else None
    return None


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


def _find_trained(excerpt: Excerpt, context: Iterable[int]) -> set[int]:
    """Returns the message indices of the responses that an excerpt's sequences train, and of all that precede one.

    A response is trained where it is a sequence's response, another message in any sequence that contains it. Messages
    that are `context` count as trained elsewhere.
    """
    messages = excerpt.dialogue.messages
    responses = {sequence.message_index for sequence in excerpt.sequences}
    stop = len(messages) if -1 in responses else max(responses, default=0)
    others = {i for i in range(stop) if i not in excerpt.supervised_messages}
    return (responses - {-1}) | others | set(context)


def _find_last_response(dialogue: Dialogue, path: Sequence[int]) -> int:
    """Returns the last assistant message of weight above 0; -1 if there is none."""
    messages = dialogue.messages
    return max((i for i in path if messages[i].role == "assistant" and messages[i].weight > 0), default=-1)
