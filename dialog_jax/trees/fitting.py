"""Dialogues to excerpts: the messages that are rendered together, whole paths and, for what is too long, parts of them.

In: dialogues and their rendered sequences. Out: excerpts, each with the sequences that fit a row. Of weights, only
whether one is 0 matters here. Knows no rows.

A message has two indices: its `message_index` in the dialogue that was rendered, which may be an excerpt, and its
`original_index` in the complete dialogue.
"""

import collections
import dataclasses
import itertools
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from dialog_jax.dialogues.dialogue import Dialogue, Message
from dialog_jax.rendering.sequences import RenderedSequence, Renderer
from dialog_jax.trees.objectives import ObjectiveConfig

# Share of max_length for the prompt of the first response behind a shortened history. Rows are nearly full, so more
# history takes more rows: 500 dialogues of ChitChat at max_length 1,024 need 535, 682 and 1,027 rows with 0.25, 0.5 and
# 0.75; the prompts of the responses behind shortened histories then have 563, 709 and 848 tokens on average.
_HISTORY = 0.5
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
        messages = tuple(dialogue.messages[i] if i in supervised else _as_context(dialogue.messages[i]) for i in path)
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
    response that does not fit even so is left out. With max_length 100, a system prompt s of 10 tokens and turns of
    10 + 10 tokens (u and a):

        excerpt        s u0 a0 u1 a1 u2 a2 u3 a3 u4 a4 u5 a5
        its sequences  those of a0 to a3 (s and 4 turns have 90 tokens)
        returned       s u3 a3 u4 a4 u5 a5                           trains a4 a5; s, u3 and a3 are context

    Args:
      excerpt: with the sequences that fit, perhaps none.
    """
    messages = excerpt.dialogue.messages
    indices = {original: i for i, original in enumerate(excerpt.original_indices)}
    trained = _find_trained(excerpt, excerpt.context)
    remaining = [i for i in excerpt.supervised_messages if i not in trained]
    shorter: list[Excerpt] = []
    while remaining:
        response = remaining.pop(0)
        history, room = _choose_history(excerpt.dialogue, response, renderer, max_length)
        if not history:
            continue
        characters = itertools.accumulate(len(message.content) for message in messages[response:])
        stop = response + max(1, sum(count <= room * _ROOM for count in characters))
        selected = [*history, *range(response, stop)]
        part = Excerpt(
            dialogue=dataclasses.replace(
                excerpt.dialogue,
                messages=tuple(_as_context(messages[i]) if i in trained else messages[i] for i in selected),
            ),
            original_indices=tuple(excerpt.original_indices[i] for i in selected),
            sequences=[],
            path=excerpt.path,
            omitted_turns=sum(messages[i].role == "assistant" for i in set(range(response)).difference(history)),
            context=frozenset(place for place, i in enumerate(selected) if i in trained),
        )
        (sequences,) = renderer.render(
            [part.dialogue], max_length=max_length, full=objective.needs_full_rendering, locate=objective.needs_span
        )
        part = part._replace(sequences=list(sequences))
        if not part.sequences:
            continue
        trained |= {indices[part.original_indices[i]] for i in _find_trained(part, part.context)}
        remaining = [i for i in remaining if i not in trained]
        shorter.append(part)
    return shorter


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


def _choose_history(dialogue: Dialogue, response: int, renderer: Renderer, max_length: int) -> tuple[list[int], float]:
    """Returns (the messages of the history behind which a response is trained, room for further characters of text).

    The history is empty if the response is too long behind any. See `shorten_histories`.
    """
    messages = dialogue.messages
    system = next((i for i, message in enumerate(messages) if message.role != "system"), 0)
    users = [i for i in range(system, response) if messages[i].role == "user"]
    if not users:
        return [], 0.0
    head = [*range(system), users[-1]]
    calls = [i for i in range(users[-1] + 1, response + 1) if _can_begin(messages, i, response)] or [users[-1] + 1]
    # From the shortest to the longest: within the turn of the last user message; then from a user message on.
    within_turn = [[*head, *range(i, response)] for i in reversed(calls)]
    from_users = [[*head[:-1], *range(i, response)] for i in reversed(users)]
    (sequences,) = renderer.render([_select_messages(dialogue, [*within_turn[0], response])], max_length=max_length)
    shortest = next(sequences, None)
    if shortest is None:
        return [], 0.0
    length = len(shortest.tokens) - shortest.start
    prompts = _PromptLengths(dialogue, renderer)
    if prompts.measure(from_users[0]) <= max_length - length:
        virtual = renderer.virtual_tokens.count
        limit = virtual + int(_HISTORY * (max_length - virtual))
        count = prompts.count_fitting(from_users, min(limit, max_length - length))
        history = from_users[max(count - 1, 0)]
    else:
        history = within_turn[prompts.count_fitting(within_turn, max_length - length) - 1]
    return history, (max_length - prompts.measure(history)) * prompts.characters_per_token


def _can_begin(messages: Sequence[Message], index: int, response: int) -> bool:
    """Returns whether history within a turn may begin at message `index`, so that calls and results stay together.

        user   call   call   result   result   call   result   answer
                 *                               *               the answer, or another call, needs what is before it

    Args:
      response: index of the message that is trained; its history is empty if it begins there.
    """
    before, message = messages[index - 1], messages[index]
    if message.role != "assistant" or before.fields.get("tool_calls"):
        return False
    return before.role != "tool" or (index < response and bool(message.fields.get("tool_calls")))


class _PromptLengths:
    """The number of tokens of the prompts of several histories, found with few renderings."""

    def __init__(self, dialogue: Dialogue, renderer: Renderer):
        self._dialogue, self._renderer = dialogue, renderer
        self._lengths: dict[tuple[int, ...], int] = {}
        self.characters_per_token = 4.0
        """Of the content of the history that was measured last."""

    def measure(self, history: Sequence[int]) -> int:
        """Returns the number of tokens of the prompt after a history."""
        key = tuple(history)
        if key not in self._lengths:
            self._lengths[key] = len(self._renderer.encode_prompt(_select_messages(self._dialogue, history)))
            text_tokens = self._lengths[key] - self._renderer.virtual_tokens.count
            self.characters_per_token = max(1.0, self._count_characters(history) / text_tokens)
        return self._lengths[key]

    def count_fitting(self, histories: Sequence[list[int]], limit: int) -> int:
        """Returns the number of histories, from the first, whose prompts have at most `limit` tokens.

        Each history is longer than the one before. Interpolates by the characters of their messages.
        """
        characters = [self._count_characters(history) for history in histories]
        low, high = 0, len(histories)  # those before `low` fit, those from `high` on do not
        while low < high:
            estimate = sum(count <= limit * self.characters_per_token for count in characters)
            index = min(max(estimate - 1, low), high - 1)
            if self.measure(histories[index]) <= limit:
                low = index + 1
            else:
                high = index
        return low

    def _count_characters(self, history: Sequence[int]) -> int:
        return sum(len(self._dialogue.messages[i].content) for i in history)


def _select_messages(dialogue: Dialogue, indices: Sequence[int]) -> Dialogue:
    """Returns the dialogue of some messages, of which only the last keeps its weight."""
    *context, last = (dialogue.messages[i] for i in indices)
    return dataclasses.replace(dialogue, messages=(*map(_as_context, context), last))


def _find_last_response(dialogue: Dialogue, path: Sequence[int]) -> int:
    """Returns the last assistant message of weight above 0; -1 if there is none."""
    messages = dialogue.messages
    return max((i for i in path if messages[i].role == "assistant" and messages[i].weight > 0), default=-1)


def _as_context(message: Message) -> Message:
    """Returns the message with weight 0."""
    return dataclasses.replace(message, weight=0.0, parts=())
