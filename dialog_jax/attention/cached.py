"""Attention of a few new queries over a cache of keys, with any mask: for decoding.

All scores are in memory at once; for rows to train on see `attention.blockwise`.
"""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float


def attend(
    q: Float[Array, "B Q N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K H"],
    visible: Bool[Array, "#B Q S"],
) -> Float[Array, "B Q N H"]:
    """Softmax attention where `visible`; N / K query heads share each key/value head. Every query must see some key."""
    batch, queries, heads, head_dim = q.shape
    kv_heads, keys = k.shape[2:0:-1]
    group = heads // kv_heads
    # One matrix product a key/value head, and the division after the second: on CPU twice as fast as einsums with the
    # group as an axis of its own around jax.nn.softmax.
    rows = (q * head_dim**-0.5).reshape(batch, queries, kv_heads, group, head_dim).transpose(0, 2, 3, 1, 4)
    rows = rows.reshape(batch, kv_heads, group * queries, head_dim)  # [B, K, G Q, H]
    score = jnp.matmul(rows, k.transpose(0, 2, 3, 1), preferred_element_type=jnp.float32)
    score = score.reshape(batch, kv_heads, group, queries, keys)
    score = score + jnp.where(visible, 0.0, jnp.finfo(jnp.float32).min)[:, None, None]
    peak = jnp.max(score, axis=-1, keepdims=True)
    weight = jnp.exp(score - peak)
    total = jnp.sum(weight, axis=-1, keepdims=True)  # [B, K, G, Q, 1]
    weight = weight.astype(v.dtype).reshape(batch, kv_heads, group * queries, keys)
    read = jnp.matmul(weight, v.transpose(0, 2, 1, 3), preferred_element_type=jnp.float32)
    read = read.reshape(batch, kv_heads, group, queries, head_dim) / total
    return read.transpose(0, 3, 1, 2, 4).reshape(q.shape).astype(q.dtype)
