"""Objectives as weights: which tokens of a dialogue's sequences are trained on, and how much.

Sequences in, supervised spans out; after the tree is built, `tries.normalise` rescales them. All of it is NumPy made
before packing, so that it can be printed. Knows no template, tree or row.
"""

import dataclasses
from collections.abc import Sequence

from dialog_jax.data.dialogues import ROLES, Dialogue, Message
from dialog_jax.data.rendering import RenderedSequence
from dialog_jax.data.tries import Span, common_prefix

NAMES = ("conditional", "joint", "last", "roles")
UNITS = ("token", "turn", "dialogue")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ObjectiveConfig:
    """What is maximised, as weights on tokens.

    | name | weight 1 on |
    |---|---|
    | `conditional` | every assistant message, its end-of-turn token included: log Pr(y | x) |
    | `joint` | every token of the dialogue but the first: log Pr(x, y) |
    | `last` | the last assistant message of weight above 0 |
    | `roles` | the messages of the named `roles` |

    These are multiplied by the message's own weight, and for the K assistant messages by `turn_discount ** (K-1-k)`.
    Under `joint`, what the template writes around messages has weight 1, and so has history that it renders anew.
    """

    name: str = "conditional"
    roles: tuple[str, ...] = ("assistant",)
    """Read by the objective `roles` only."""
    turn_discount: float = 1.0
    """Above 0; below 1 the later turns weigh more."""
    normalise: str = "token"
    """`token`: as is. `turn`: each response's weights sum to its message's weight. `dialogue`: all of its sum to 1."""

    def __post_init__(self):
        if self.name not in NAMES:
            raise ValueError(f"objective.name is {self.name!r}; it must be one of {', '.join(NAMES)}.")
        if self.normalise not in UNITS:
            raise ValueError(f"objective.normalise is {self.normalise!r}; it must be one of {', '.join(UNITS)}.")
        unknown = [role for role in self.roles if role not in ROLES]
        if unknown or not self.roles:
            raise ValueError(f"objective.roles is {self.roles!r}; it must hold some of {', '.join(ROLES)}.")
        if not self.turn_discount > 0:
            raise ValueError(f"objective.turn_discount is {self.turn_discount}; it must be above 0.")

    @property
    def whole(self) -> bool:
        """Whether tokens after the last response are trained on, so that the whole rendering is needed."""
        return self.name == "joint" or (self.name == "roles" and self.roles != ("assistant",))

    def locates(self, message: Message) -> bool:
        """Whether the place of a message that has no sequence of its own must be known."""
        if message.role == "assistant" and message.weight > 0:
            return False
        if self.name == "joint":
            return message.weight != 1
        return self.name == "roles" and message.role in self.roles and message.weight > 0


def supervise(
    sequences: Sequence[RenderedSequence],
    dialogue: Dialogue,
    objective: ObjectiveConfig,
    *,
    trained: int = 0,
    last_turn: int | None = None,
) -> tuple[list[list[Span]], dict[int, float]]:
    """Returns (for each sequence its supervised spans, for each turn the weight of its message times its schedule).

    With `conditional` and two turns, the second of weight 0.5 and 3 tokens long:

        sequence 0: [Span(start_0, stop_0, 1.0, turn=0)]     sequence 1: [Span(start_1, start_1 + 3, 0.5, turn=1)]

    Args:
      sequences: as rendered, in order, perhaps fewer than the dialogue's turns (the rest was cut off).
      dialogue: whose messages the sequences count.
      trained: the first so many messages, all of weight 0, are trained on elsewhere, and so is the text around them.
      last_turn: the turn that is the last one, if that is not the last of `sequences`.
    """
    if last_turn is None:
        last_turn = max((sequence.turn for sequence in sequences), default=-1)
    spans: list[list[Span]] = []
    totals: dict[int, float] = {}
    previous = None
    for sequence in sequences:
        own = []
        others = [(other, dialogue.messages[other.message].weight) for other in sequence.others]
        if objective.name == "joint":
            # What the sequence shares with the one before it has its weight from there.
            start = common_prefix(previous.tokens, sequence.tokens) if previous else 1
            for other, weight in others:
                if other.message >= trained:
                    own.append(Span(start, other.start, 1.0, -1))
                own.append(Span(max(start, other.start), other.stop, weight, -1))
                start = max(start, other.stop)
            own.append(Span(start, sequence.start, 1.0, -1))
        elif objective.name == "roles":
            own += [Span(other.start, other.stop, weight, -1) for other, weight in others]
        if sequence.turn >= 0 and _responses_count(objective, sequence.turn == last_turn):
            schedule = objective.turn_discount ** (last_turn - sequence.turn)
            totals[sequence.turn] = dialogue.messages[sequence.message].weight * schedule
            own.append(Span(sequence.start, len(sequence.tokens), totals[sequence.turn], sequence.turn))
        spans.append([span for span in own if span.weight > 0 and span.stop > span.start])
        previous = sequence
    return spans, totals


def _responses_count(objective: ObjectiveConfig, is_last: bool) -> bool:
    """Whether a response is supervised."""
    if objective.name == "last":
        return is_last
    return objective.name != "roles" or "assistant" in objective.roles
