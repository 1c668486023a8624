"""Attention of a few new queries over a cache of keys, under any mask: for decoding.

All scores are in memory at once; for training rows see `attention.blockwise`.
"""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float


def attend(
    q: Float[Array, "B Q N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K H"],
    visible: Bool[Array, "#B Q S"],
    sinks: Float[Array, "N"] | None = None,
    *,
    cap: float | None = None,
) -> Float[Array, "B Q N H"]:
    """Returns softmax attention over the `visible` keys; N / K query heads share each key/value head.

    Every query must see at least one key. For `sinks` and `cap` see `attention.blockwise`.
    """
    batch, queries, heads, head_dim = q.shape
    kv_heads, keys = k.shape[2:0:-1]
    group = heads // kv_heads
    # One matrix product per key/value head, and the division by l after the second product: on CPU twice as fast as
    # einsums with the group as its own axis around jax.nn.softmax.
    rows = (q * head_dim**-0.5).reshape(batch, queries, kv_heads, group, head_dim).transpose(0, 2, 3, 1, 4)
    rows = rows.reshape(batch, kv_heads, group * queries, head_dim)  # [B, K, G Q, H]
    s = jnp.matmul(rows, k.transpose(0, 2, 3, 1), preferred_element_type=jnp.float32)
    s = s.reshape(batch, kv_heads, group, queries, keys)
    if cap is not None:
        s = cap * jnp.tanh(s / cap)
    s = s + jnp.where(visible, 0.0, jnp.finfo(jnp.float32).min)[:, None, None]
    m = jnp.max(s, axis=-1, keepdims=True)
    sink = None if sinks is None else sinks.astype(jnp.float32).reshape(1, kv_heads, group, 1, 1)
    if sink is not None:
        m = jnp.maximum(m, sink)
    p = jnp.exp(s - m)
    l = jnp.sum(p, axis=-1, keepdims=True)  # [B, K, G, Q, 1]
    if sink is not None:
        l = l + jnp.exp(sink - m)
    p = p.astype(v.dtype).reshape(batch, kv_heads, group * queries, keys)
    acc = jnp.matmul(p, v.transpose(0, 2, 1, 3), preferred_element_type=jnp.float32)
    output = acc.reshape(batch, kv_heads, group, queries, head_dim) / l
    return output.transpose(0, 3, 1, 2, 4).reshape(q.shape).astype(q.dtype)
