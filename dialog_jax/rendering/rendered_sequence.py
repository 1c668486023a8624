"""One training sequence: the tokens of a prompt and its response, and where messages are in them."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Int32

from dialog_jax.rendering.token_spans import MessageSpan
from dialog_jax.rendering.virtual_tokens import VirtualTokens
from dialog_jax.rendering.written import Unwritten


class RenderedSequence(NamedTuple):
    """prompt ++ response as inference sees them; `tokens[start:]` is the response."""

    tokens: Int32[np.ndarray, " n"]
    start: int
    message_index: int
    """Index of the response in the messages of the rendered dialogue; -1 in a full rendering, which has none."""
    turn: int
    """Index of the response among the dialogue's assistant messages; -1 in a full rendering."""
    message_spans: tuple[MessageSpan, ...] = ()
    """The messages selected by `locate` in the prompt, without those in the tokens shared with the sequence before."""
    part_spans: tuple[tuple[int, int], ...] = ()
    """Start and stop of each of the response's `parts`, as in `MessageSpan`."""
    changes_history: bool = False
    """Whether the rendering with the response does not begin with its prompt."""
    is_verbatim: bool = True
    """Whether the response is what is recorded."""
    unwritten: tuple[Unwritten, ...] = ()
    """What the template does not write: of the response in its text, of the tools and of messages that come after the
    sequence before in the prompt."""
    virtual: int = 0
    """Number of leading tokens that are those of a soft prompt."""

    def prepend(self, virtual_tokens: VirtualTokens) -> "RenderedSequence":
        """Returns the sequence behind the tokens of a soft prompt."""
        count = virtual_tokens.count

        def shift(spans: Sequence[tuple[int, int]]) -> tuple[tuple[int, int], ...]:
            return tuple((start + count, stop + count) for start, stop in spans)

        return self._replace(
            tokens=virtual_tokens.prepend(self.tokens),
            start=self.start + count,
            message_spans=tuple(
                MessageSpan(span.message_index, span.start + count, span.stop + count, shift(span.part_spans))
                for span in self.message_spans
            ),
            part_spans=shift(self.part_spans),
            virtual=count,
        )
