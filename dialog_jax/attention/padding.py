"""Rows made longer: what blocks of a fixed size need."""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int


def to_multiple(
    multiple: int,
    q: Float[Array, "B T N H"],
    k: Float[Array, "B T K H"],
    v: Float[Array, "B T K H"],
    subtree_end: Int[Array, "B T"],
) -> tuple[Array, Array, Array, Array]:
    """Returns the arrays with T the next multiple; what is added is zeros, and sees only itself."""
    batch, length = subtree_end.shape
    missing = -length % multiple
    if not missing:
        return q, k, v, subtree_end
    q, k, v = (jnp.pad(x, ((0, 0), (0, missing), (0, 0), (0, 0))) for x in (q, k, v))
    alone = jnp.arange(length + 1, length + missing + 1, dtype=subtree_end.dtype)
    return q, k, v, jnp.concatenate([subtree_end, jnp.broadcast_to(alone, (batch, missing))], axis=1)
