"""Objectives as weights: which tokens of a dialogue's sequences are trained on, and how much.

Sequences in, supervised spans out. All of it is made before packing, so that it can be printed. Knows no template, tree
or row.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

from dialog_jax.dialogues.dialogue import Dialogue, Message
from dialog_jax.dialogues.schemas import ROLES
from dialog_jax.errors import UserError
from dialog_jax.rendering.sequences import RenderedSequence
from dialog_jax.rendering.token_spans import MessageSpan
from dialog_jax.trees.prefix_tree import Span, common_prefix_length

NAMES = ("conditional", "joint", "last", "roles")
UNITS = ("token", "turn", "dialogue")
MERGES = ("max", "sum")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ObjectiveConfig:
    """What is maximised, as weights on tokens.

    | name | weight 1 on |
    |---|---|
    | `conditional` | every assistant message, its end-of-turn token included: log Pr(y | x) |
    | `joint` | every token of the dialogue but the first: log Pr(x, y) |
    | `last` | the last assistant message of weight above 0 |
    | `roles` | the messages of the named `roles` |

    These are multiplied by the message's own weight (and its part's), and those of turn k by a schedule: either
    `turn_discount ** (K-1-k)`, K-1 being the last turn that is trained on, or `turn_weights[k]`. Under `joint`, what
    the template writes around messages has weight 1, and a message that later history renders anew is trained there
    too.
    """

    name: str = "conditional"
    roles: tuple[str, ...] = ("assistant",)
    """Read by the objective `roles` only."""
    turn_discount: float = 1.0
    """Above 0; below 1 the later turns weigh more."""
    turn_weights: tuple[float, ...] = ()
    """One a turn, from the first; later turns have the last one's. Empty for `turn_discount`."""
    normalise: str = "token"
    """`token`: as is. `turn`: each response's weights sum to its message's weight times its schedule. `dialogue`: all
    of a dialogue's sum to 1; a message tree is one dialogue."""
    merge_weights: str = "max"
    """What a message has that several paths of a message tree share: `max` trains it once; `sum` as often as it stands
    in them, as if each path were a dialogue of its own."""

    def __post_init__(self):
        if self.name not in NAMES:
            raise UserError(f"objective.name is {self.name!r}; it must be one of {', '.join(NAMES)}.")
        if self.normalise not in UNITS:
            raise UserError(f"objective.normalise is {self.normalise!r}; it must be one of {', '.join(UNITS)}.")
        unknown = [role for role in self.roles if role not in ROLES]
        if unknown or not self.roles:
            raise UserError(f"objective.roles is {self.roles!r}; it must hold some of {', '.join(ROLES)}.")
        if self.merge_weights not in MERGES:
            raise UserError(
                f"objective.merge_weights is {self.merge_weights!r}; it must be one of {', '.join(MERGES)}."
            )
        if not (self.turn_discount > 0 and math.isfinite(self.turn_discount)):
            raise UserError(f"objective.turn_discount is {self.turn_discount}; it must be a finite number above 0.")
        if not all(_is_weight(weight) for weight in self.turn_weights):
            raise UserError(f"objective.turn_weights is {self.turn_weights}; it must hold finite numbers >= 0.")
        if self.turn_weights and self.turn_discount != 1:
            raise UserError("objective.turn_discount and objective.turn_weights are two schedules; set one of them.")

    @property
    def whole(self) -> bool:
        """Whether tokens after the last response are trained on, so that the whole rendering is needed."""
        return self.name == "joint" or (self.name == "roles" and self.roles != ("assistant",))

    def locates(self, message: Message) -> bool:
        """Whether the place of a message must be known where it stands in the history."""
        if self.name == "joint":
            return message.weight != 1 or bool(message.parts)
        is_response = message.role == "assistant" and message.weight > 0
        return self.name == "roles" and not is_response and message.role in self.roles and message.weight > 0

    def schedule(self, turn: int, last_turn: int) -> float:
        """What multiplies the weights of response number `turn`, if `last_turn` is the last that is trained on."""
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
    trained: int = 0,
) -> list[list[Span]]:
    """Returns the supervised spans of each sequence.

    With `conditional` and two turns, the second of weight 0.5 and 3 tokens long:

        sequence 0: [Span(start_0, stop_0, 1.0, turn=0)]     sequence 1: [Span(start_1, start_1 + 3, 0.5, turn=1)]

    Args:
      sequences: as rendered, in order, perhaps fewer than the dialogue's turns (the rest was cut off).
      dialogue: a list of messages, whose numbers the sequences have.
      factors: what multiplies the weight of a message that is a response, by its number: its `schedule`.
      trained: the first so many messages, all of weight 0, are trained on elsewhere, and so is the text around them.
    """
    spans: list[list[Span]] = []
    previous = None
    seen: set[int] = set()
    for sequence in sequences:
        own: list[Span] = []
        if objective.name == "joint":
            # What the sequence shares with the one before it has its weight from there.
            start = common_prefix_length(previous.tokens, sequence.tokens) if previous else 1
            for other in sequence.message_spans:
                if other.message_index >= trained:
                    own.append(Span(start, other.start, 1.0, -1))
                own += [span._replace(start=max(start, span.start)) for span in _spans(dialogue, other)]
                start = max(start, other.stop)
            own.append(Span(start, sequence.start, 1.0, -1))
        elif objective.name == "roles":
            own += [
                span
                for other in sequence.message_spans
                if other.message_index not in seen
                for span in _spans(dialogue, other)
            ]
            seen |= {other.message_index for other in sequence.message_spans}
        if sequence.turn >= 0:
            own += _response_spans(sequence, dialogue, objective, factors[sequence.message_index])
        spans.append([span for span in own if span.weight > 0 and span.stop > span.start])
        previous = sequence
    return spans


def _is_weight(value: Any) -> bool:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return number and math.isfinite(value) and value >= 0


def _response_spans(
    sequence: RenderedSequence, dialogue: Dialogue, objective: ObjectiveConfig, factor: float
) -> list[Span]:
    """The spans of a sequence's response, which with `normalise=turn` sum to its message's weight times the factor."""
    place = MessageSpan(sequence.message_index, sequence.start, len(sequence.tokens), sequence.part_spans)
    spans = [span._replace(weight=span.weight * factor, turn=sequence.turn) for span in _spans(dialogue, place)]
    total = sum(span.weight * (span.stop - span.start) for span in spans)
    if objective.normalise != "turn" or not total:
        return spans
    scale = dialogue.messages[sequence.message_index].weight * factor / total
    return [span._replace(weight=span.weight * scale) for span in spans]


def _spans(dialogue: Dialogue, place: MessageSpan) -> list[Span]:
    """A message's tokens with its weight, times its part's for those that belong to a part."""
    message = dialogue.messages[place.message_index]
    spans = []
    start = place.start
    for part, (begin, end) in zip(message.parts, place.part_spans, strict=True):
        spans += [Span(start, begin, message.weight, -1), Span(begin, end, message.weight * part.weight, -1)]
        start = end
    return [*spans, Span(start, place.stop, message.weight, -1)]
