"""Which keys a query sees: one mask for causal rows, packed dialogues, trees and windows.

    key j is visible to query i   iff   j <= i < subtree_end[j]  and  position[i] - position[j] < window

A window counts *positions*, each token's distance from the start of its own context, so that a branch sees the nearest
of its own ancestors, however many tokens of other branches lie between. With window 2, and the branches 0 1 2 3 and
0 1 4 in one row:

    token        0  1  2  3  4        query 3 sees 2 3
    subtree_end  5  5  4  4  5        query 4 sees 1 4
    position     0  1  2  3  2
"""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Int


class Mask(NamedTuple):
    """Visibility in rows that are forests; without a window, that of all ancestors."""

    subtree_end: Int[Array, "B T"]
    """One more than the last token that sees this one; for padding, its own index + 1."""
    position: Int[Array, "B T"] | None = None
    """Tokens before this one in its own context; needed with a window only."""
    window: int | Int[Array, ""] | None = None
    """Ancestors that a query sees, itself included; a number above every position for all of them."""

    def pad_to_multiple(self, multiple: int) -> "Mask":
        """Returns the mask with T padded to the next multiple; padding sees only itself.

        With multiple 4, a row of three tokens: subtree_end 3 3 3 becomes 3 3 3 4.
        """
        batch, length = self.subtree_end.shape
        missing = -length % multiple
        if not missing:
            return self
        alone = jnp.arange(length + 1, length + missing + 1, dtype=self.subtree_end.dtype)
        ends = jnp.concatenate([self.subtree_end, jnp.broadcast_to(alone, (batch, missing))], axis=1)
        position = None if self.position is None else jnp.pad(self.position, ((0, 0), (0, missing)))
        return Mask(ends, position, self.window)
