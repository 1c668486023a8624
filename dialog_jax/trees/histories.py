"""The history behind which a response is trained that is too long together with all of its own.

In: a dialogue of one path. Out: the indices of the messages that the history keeps. Knows no rows and no weights but 0.
"""

import contextlib
import dataclasses
from collections.abc import Iterator, Sequence

from dialog_jax.dialogues.dialogue import Dialogue, Message
from dialog_jax.errors import UserError
from dialog_jax.rendering.chat_template import TemplateRefused
from dialog_jax.rendering.sequences import Renderer
from dialog_jax.rendering.template_process import TemplateStopped

# Share of max_length for the prompt of the first response behind a shortened history. Rows are nearly full, so more
# history takes more rows: 500 dialogues of ChitChat at max_length 1,024 need 535, 682 and 1,027 rows with 0.25, 0.5 and
# 0.75; the prompts of the responses behind shortened histories then have 563, 709 and 848 tokens on average.
_HISTORY = 0.5


def choose_history(
    dialogue: Dialogue, original_indices: Sequence[int], response: int, renderer: Renderer, max_length: int
) -> tuple[list[int], float]:
    """Returns (the messages of the history behind which a response is trained, room for further characters of text).

    The history is empty if the response is too long behind any. See `fitting.shorten_histories`.

    Args:
      original_indices: of the dialogue's messages, for errors.

    Raises:
      TemplateRefused: the template refuses the dialogue without the messages before.
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
    selected = [*within_turn[0], response]
    with name_original_messages([original_indices[i] for i in selected]):
        (sequences,) = renderer.render([_select_messages(dialogue, selected)], max_length=max_length)
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
    return dataclasses.replace(dialogue, messages=(*map(as_context, context), last))


@contextlib.contextmanager
def name_original_messages(original_indices: Sequence[int]) -> Iterator[None]:
    """Adds to errors in its body, which count the messages of a part of a dialogue, the message that each of them is.

    Args:
      original_indices: of the messages of the part.
    """
    try:
        yield
    except (TemplateRefused, TemplateStopped):
        raise
    except UserError as error:
        places = ", ".join(f"{place} is {original}" for place, original in enumerate(original_indices))
        raise type(error)(
            f"{error} Messages are counted behind a shortened history here: {places} of the dialogue."
        ) from None


def as_context(message: Message) -> Message:
    """Returns the message with weight 0."""
    return dataclasses.replace(message, weight=0.0, parts=())
