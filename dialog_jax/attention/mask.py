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
from jaxtyping import Array, Bool, Int


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

    def find_visible_blocks(self, queries: int, keys: int) -> Bool[Array, "B I J"]:
        """Returns from which blocks of so many `queries` some key may be seen in which blocks of so many `keys`.

        For a key at or before the first query f of block I, being seen is subtree_end > f, so a maximum over block J
        decides; a later key of J belongs to I as well, and sees itself. Without a window the result is exact:

            keys      0 0 0 0 | 1 1 1 1 | 2 2 2 2        three blocks, two dialogues of six tokens
            sees up to      6     6 / 12       12        (subtree_end, largest of each block)
            queries   block 0: 0    block 1: 0 1    block 2: 1 2     key block 0 is not read for queries 8 to 11

        A window's edge is judged by the nearest query and key of the two blocks that share a tree, be they on one path
        or not: a few pairs of blocks are true in vain.

        Args:
          queries: tokens per block; divides T, as does `keys`.
        """
        batch, length = self.subtree_end.shape
        end = self.subtree_end.reshape(batch, 1, -1, keys)  # [B, 1, J, keys]
        last_end = jnp.max(end, axis=3)  # [B, 1, J]
        first_query = jnp.arange(0, length, queries)[None, :, None]  # [1, I, 1]
        first_key = jnp.arange(0, length, keys)[None, None, :]  # [1, 1, J]
        visible = (last_end > first_query) & (first_key < first_query + queries)
        if self.window is None:
            return visible
        assert self.position is not None
        seen = end > first_query[..., None]  # [B, I, J, keys], those that block I may see
        nearest_key = jnp.max(jnp.where(seen, self.position.reshape(batch, 1, -1, keys), -1), axis=3)
        query = jnp.arange(length).reshape(1, -1, 1, queries)
        sees = query < last_end[..., None]  # [B, I, J, queries], those that may see block J
        nearest_query = jnp.min(jnp.where(sees, self.position.reshape(batch, -1, 1, queries), length), axis=3)
        shares_token = first_query < first_key + keys
        return visible & (shares_token | (nearest_query - nearest_key < self.window))
