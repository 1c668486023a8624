"""Objectives as weights: which tokens of a dialogue's sequences are trained on, and how much.

In: rendered sequences. Out: their supervised spans, before packing, so that they can be printed. Knows no templates,
trees or rows.
"""

import dataclasses
import math
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from dialog_jax.dialogues.dialogue import Dialogue, Message
from dialog_jax.dialogues.schemas import ROLES
from dialog_jax.errors import UserError
from dialog_jax.rendering.rendered_sequence import RenderedSequence
from dialog_jax.rendering.token_spans import MessageSpan
from dialog_jax.trees.prefix_tree import Span, common_prefix_length

NAMES = ("conditional", "joint", "last", "roles")
UNITS = ("token", "turn", "dialogue")
MERGES = ("max", "sum")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ObjectiveConfig:
    """What is maximized, as weights on tokens.

    | name | weight 1 on |
    |---|---|
    | `conditional` | every assistant message, its end-of-turn token included: log Pr(y | x) |
    | `joint` | every token of the dialogue but the first: log Pr(x, y); behind a soft prompt also the first |
    | `last` | the last assistant message of weight above 0 |
    | `roles` | the messages of the named `roles` |

    A token's weight is multiplied by the weight of its message (and of its part), and in turn k by a schedule: either
    `turn_discount ** (K-1-k)`, where K-1 is the last turn that is trained on, or `turn_weights[k]`. Under `joint`, what
    the template writes around messages has weight 1, and a message that later history renders differently is trained
    there too.
    """

    name: str = "conditional"
    """conditional (every assistant message), joint (every token), last (the last assistant message) or roles."""
    roles: tuple[str, ...] = ("assistant",)
    """Whose messages the objective `roles` trains on."""
    turn_discount: float = 1.0
    """Weights are multiplied by turn_discount ** (number of turns that follow); above 0."""
    turn_weights: tuple[float, ...] = ()
    """Weights by turn, from the first; the last one holds for all later turns. Empty to use turn_discount."""
    normalize: str = "token"
    """`token`: weights as they are. `turn`: the weights of each response sum to its message's weight times its
    schedule. `dialogue`: all weights of a dialogue sum to 1; a message tree is one dialogue."""
    merge_weights: str = "max"
    """Weight of a message that several paths of a message tree share: `max` trains it once; `sum` trains it once per
    path, as if each path were a separate dialogue."""

    def __post_init__(self):
        if self.name not in NAMES:
            raise UserError(f"objective.name is {self.name!r}; it must be one of {', '.join(NAMES)}.")
        if self.normalize not in UNITS:
            raise UserError(f"objective.normalize is {self.normalize!r}; it must be one of {', '.join(UNITS)}.")
        unknown = [role for role in self.roles if role not in ROLES]
        if unknown or not self.roles:
            raise UserError(f"objective.roles is {self.roles!r}; it must contain one or more of {', '.join(ROLES)}.")
        if self.merge_weights not in MERGES:
            raise UserError(
                f"objective.merge_weights is {self.merge_weights!r}; it must be one of {', '.join(MERGES)}."
            )
        if not (self.turn_discount > 0 and math.isfinite(self.turn_discount)):
            raise UserError(f"objective.turn_discount is {self.turn_discount}; it must be a finite number above 0.")
        if not all(_is_weight(weight) for weight in self.turn_weights):
            raise UserError(f"objective.turn_weights is {self.turn_weights}; it must contain finite numbers >= 0.")
        if self.turn_weights and self.turn_discount != 1:
            raise UserError("objective.turn_discount and objective.turn_weights are two schedules; set one of them.")

    @property
    def needs_full_rendering(self) -> bool:
        """Whether tokens after the last response are trained on, so that the rendering of all messages is needed."""
        return self.name == "joint" or (self.name == "roles" and self.roles != ("assistant",))

    def needs_span(self, message: Message) -> bool:
        """Whether the tokens of a message in the history must be located."""
        if self.name == "joint":
            return message.weight != 1 or bool(message.parts)
        is_response = message.role == "assistant" and message.weight > 0
        return self.name == "roles" and not is_response and message.role in self.roles and message.weight > 0

    def schedule(self, turn: int, last_turn: int) -> float:
        """Returns the factor of the weights of turn `turn`, if `last_turn` is the last turn that is trained on."""
        if self.name == "last" and turn != last_turn:
            return 0.0
        if self.name == "roles" and "assistant" not in self.roles:
            return 0.0
        if self.turn_weights:
            return float(self.turn_weights[min(turn, len(self.turn_weights) - 1)])
        return self.turn_discount ** (last_turn - turn)


def supervise(
    sequences: Sequence[RenderedSequence],
    dialogue: Dialogue,
    objective: ObjectiveConfig,
    factors: Mapping[int, float],
    *,
    context: Collection[int] = (),
) -> list[list[Span]]:
    """Returns the supervised spans of each sequence.

    Two turns, the second of weight 0.5; the responses are tokens 4 to 7 and 11 to 14 of their sequences:

        conditional   [[Span(4, 7, 1.0, 0)], [Span(11, 14, 0.5, 1)]]
        joint         [[Span(1, 4, 1.0, -1), Span(4, 7, 1.0, 0)], [Span(7, 11, 1.0, -1), Span(11, 14, 0.5, 1)]]

    Args:
      sequences: as rendered, in order; those that do not fit may be missing.
      dialogue: a list of messages, which the sequences' message indices refer to.
      factors: by message index, what multiplies the weight of each response: its `schedule`.
      context: indices of messages that are context only; they have weight 0, and so has the text that the template
        writes around them.
    """
    supervised: list[list[Span]] = []
    previous = None
    trained_messages: set[int] = set()  # by an earlier sequence, under `roles`
    for sequence in sequences:
        spans: list[Span] = []
        if objective.name == "joint":
            # What the sequence shares with the one before it has its weight from there.
            # Nothing predicts a first token, and those of a soft prompt are no text.
            start = common_prefix_length(previous.tokens, sequence.tokens) if previous else max(1, sequence.virtual)
            for place in sequence.message_spans:
                if place.message_index not in context:
                    spans.append(Span(start, place.start, 1.0, -1))
                spans += [span._replace(start=max(start, span.start)) for span in _weigh_message(dialogue, place)]
                start = max(start, place.stop)
            spans.append(Span(start, sequence.start, 1.0, -1))
        elif objective.name == "roles":
            places = [place for place in sequence.message_spans if place.message_index not in trained_messages]
            spans += [span for place in places for span in _weigh_message(dialogue, place)]
            trained_messages |= {place.message_index for place in places}
        if sequence.turn >= 0:
            spans += _weigh_response(sequence, dialogue, objective, factors[sequence.message_index])
        supervised.append([span for span in spans if span.weight > 0 and span.stop > span.start])
        previous = sequence
    return supervised


def _is_weight(value: Any) -> bool:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return number and math.isfinite(value) and value >= 0


def _weigh_response(
    sequence: RenderedSequence, dialogue: Dialogue, objective: ObjectiveConfig, factor: float
) -> list[Span]:
    """Returns the spans of a sequence's response; with `normalize=turn` they sum to its message's weight * factor."""
    place = MessageSpan(sequence.message_index, sequence.start, len(sequence.tokens), sequence.part_spans)
    spans = [span._replace(weight=span.weight * factor, turn=sequence.turn) for span in _weigh_message(dialogue, place)]
    total = sum(span.weight * (span.stop - span.start) for span in spans)
    if objective.normalize != "turn" or not total:
        return spans
    scale = dialogue.messages[sequence.message_index].weight * factor / total
    return [span._replace(weight=span.weight * scale) for span in spans]


def _weigh_message(dialogue: Dialogue, place: MessageSpan) -> list[Span]:
    """Returns the spans of a message; tokens of a part have the message's weight times the part's.

    Tokens 4 to 10, weight 2, a part of weight 0 at 6 to 8   ->   weights 2 (4 to 6), 0 (6 to 8), 2 (8 to 10)
    """
    message = dialogue.messages[place.message_index]
    spans = []
    start = place.start
    for part, (part_start, part_stop) in zip(message.parts, place.part_spans, strict=True):
        spans.append(Span(start, part_start, message.weight, -1))
        spans.append(Span(part_start, part_stop, message.weight * part.weight, -1))
        start = part_stop
    return [*spans, Span(start, place.stop, message.weight, -1)]
