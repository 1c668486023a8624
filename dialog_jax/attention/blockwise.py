"""Attention over rows that are forests of dialogues, skipping pairs of blocks in which nothing is visible. Any device.

In: queries, keys and values of rows, and their `Mask`. Out: the attention output. Knows no roles and no dialogue
boundaries; the ancestor mask covers both. A row of two dialogues, the first of which branches after its first two
tokens (0 1 -> 2 3 and 0 1 -> 4):

    token        0  1  2  3  4 | 5  6          query 3 sees 0 1 2 3
    subtree_end  5  5  4  4  5 | 7  7          query 4 sees 0 1 4
                                               query 6 sees 5 6

Queries and keys are divided into blocks. In the forward and in the backward pass a loop visits the pairs of blocks that
contain a visible pair of tokens, so a token's cost grows with its dialogue, or with the window if that is shorter, and
not with the row. The rows of a call share one loop: a pair of blocks that one row needs is visited in all. No array has
shape [T, T].
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float

from dialog_jax.attention.mask import Mask

BLOCK = 256
PAIRS = "block_pairs"  # name of the loop over pairs of blocks in compiled programs
OUTPUT = "attention_output"  # checkpoint name of what every kernel saves for its backward pass
_MASKED = -1e30  # score of an invisible key: finite, so that no difference of scores is NaN


class _Pairs(NamedTuple):
    """The pairs of blocks to visit: the first `total` of each list. A query block's own key block comes first."""

    total: Array
    query: Array
    key: Array


def attend(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B T K H"],
    v: Float[Array, "B T K H"],
    mask: Mask,
    sinks: Float[Array, "N"] | None = None,
    *,
    cap: float | None = None,
    block: int = BLOCK,
) -> Float[Array, "B T N H"]:
    """Returns the attention output of each query over the keys it sees; softmax and sums are float32.

    The backward pass recomputes the probabilities of a pair of blocks. Saved for it under the checkpoint name `OUTPUT`
    are the output and the log-sum-exp of each query's scores.

    Args:
      sinks: a score per head that joins each query's softmax and has no value: exp(sink) is added to the denominator.
      cap: scores s become cap * tanh(s / cap), between -cap and cap.
      block: tokens per block. Smaller blocks skip more and have less efficient matrix products.

    Source: FlashAttention-2 (arXiv 2307.08691, algorithms 1 and 2), with its names; differs in the mask, in the list of
    pairs, and in one loop for all three gradients.
    """
    length = q.shape[1]
    block = min(block, length)
    q, k, v = (pad_to_multiple(block, x) for x in (q, k, v))
    return _attend(q, k, v, mask.pad_to_multiple(block), sinks, cap, block)[:, :length]


def pad_to_multiple(multiple: int, x: Float[Array, "B T N H"]) -> Float[Array, "B S N H"]:
    """Returns `x` with T padded with zeros to the next multiple."""
    missing = -x.shape[1] % multiple
    return jnp.pad(x, ((0, 0), (0, missing), (0, 0), (0, 0))) if missing else x


@functools.partial(jax.custom_vjp, nondiff_argnums=(5, 6))
def _attend(q, k, v, mask, sinks, cap, block):
    return _forward(q, k, v, mask, sinks, cap, block)[0]


def _forward(q, k, v, mask, sinks, cap, block):
    group = q.shape[2] // k.shape[2]
    pairs = _list_pairs(mask, block)
    q_blocks, k_blocks, v_blocks = (_head_blocks(block, heads, x) for heads, x in ((group, _scale(q)), (1, k), (1, v)))
    is_visible = _make_is_visible(mask, block, group)

    def visit(index, carry):
        m, l, acc = carry
        i, j = pairs.query[index], pairs.key[index]
        s = _matmul(q_blocks[i], k_blocks[j].swapaxes(-1, -2))  # [B, K, G * block, block]
        s = jnp.where(is_visible(i, j)[:, None], _cap(s, cap), _MASKED)
        m_new = jnp.maximum(m[i], jnp.max(s, axis=-1, keepdims=True))
        p = jnp.exp(s - m_new)
        alpha = jnp.exp(m[i] - m_new)
        l_new = l[i] * alpha + jnp.sum(p, axis=-1, keepdims=True)
        acc_new = acc[i] * alpha + _matmul(p.astype(v.dtype), v_blocks[j])
        return m.at[i].set(m_new), l.at[i].set(l_new), acc.at[i].set(acc_new)

    column = (*q_blocks.shape[:-1], 1)
    if sinks is None:
        m, l = jnp.full(column, _MASKED), jnp.zeros(column)
    else:  # as if each query had seen one key with this score and the value zero
        m, l = jnp.broadcast_to(_sink_columns(sinks, k.shape[2], block), column), jnp.ones(column)
    with jax.named_scope(PAIRS):
        m, l, acc = jax.lax.fori_loop(0, pairs.total, visit, (m, l, jnp.zeros(q_blocks.shape)))
    output = checkpoint_name(_undivide(acc / l, group).astype(q.dtype), OUTPUT)
    lse = checkpoint_name(m + jnp.log(l), OUTPUT)  # [n, B, K, G * block, 1]
    return output, (q, k, v, mask, sinks, output, lse)


def _backward(cap, block, residuals, d_output):
    q, k, v, mask, sinks, output, lse = residuals
    group = q.shape[2] // k.shape[2]
    pairs = _list_pairs(mask, block)
    q_blocks, k_blocks, v_blocks = (_head_blocks(block, heads, x) for heads, x in ((group, _scale(q)), (1, k), (1, v)))
    is_visible = _make_is_visible(mask, block, group)
    do_blocks = _head_blocks(block, group, d_output)
    product = d_output.astype(jnp.float32) * output.astype(jnp.float32)
    delta = _head_blocks(block, group, jnp.sum(product, axis=-1, keepdims=True))

    def visit(index, carry):
        dq, dk, dv = carry
        i, j = pairs.query[index], pairs.key[index]
        q_block, k_block, v_block, do_block = q_blocks[i], k_blocks[j], v_blocks[j], do_blocks[i]
        # [B, K, block, G * block]: keys by queries, the transpose of the forward pass
        s = _cap(_matmul(k_block, q_block.swapaxes(-1, -2)), cap)
        p = jnp.exp(jnp.where(is_visible(i, j, transposed=True)[:, None], s, _MASKED) - lse[i].swapaxes(-1, -2))
        dp = _matmul(v_block, do_block.swapaxes(-1, -2))
        ds = p * (dp - delta[i].swapaxes(-1, -2))
        if cap is not None:
            ds = ds * (1 - (s / cap) ** 2)
        # The barrier makes ds one array: XLA:CPU would otherwise compute it once for each product.
        ds = jax.lax.optimization_barrier(ds.astype(q.dtype))
        return (
            dq.at[i].add(_matmul(k_block.swapaxes(-1, -2), ds)),
            dk.at[j].add(_matmul(ds, q_block)),
            dv.at[j].add(_matmul(p.astype(v.dtype), do_block)),
        )

    # dq is accumulated transposed, so that its product reads ds in the order in which it is stored.
    zeros = tuple(jnp.zeros(x.shape) for x in (q_blocks.swapaxes(-1, -2), k_blocks, v_blocks))
    with jax.named_scope(PAIRS):
        dq, dk, dv = jax.lax.fori_loop(0, pairs.total, visit, zeros)
    d_sinks = None
    if sinks is not None:
        per_query = -jnp.exp(_sink_columns(sinks, k.shape[2], block) - lse) * delta  # [n, B, K, G * block, 1]
        per_head = per_query.reshape(*per_query.shape[:3], group, block).sum(axis=(0, 1, 4))
        d_sinks = per_head.reshape(sinks.shape).astype(sinks.dtype)
    return (
        _scale(_undivide(dq.swapaxes(-1, -2), group)).astype(q.dtype),
        _undivide(dk, 1).astype(k.dtype),
        _undivide(dv, 1).astype(v.dtype),
        None,
        d_sinks,
    )


_attend.defvjp(_forward, _backward)


def _list_pairs(mask, block):
    """Returns the pairs of blocks: (i, i), and (i, j) with j < i unless no query of i sees a key of j in any row."""
    blocks = mask.subtree_end.shape[1] // block
    needed = jnp.any(mask.find_visible_blocks(block, block), axis=0)
    # A query block's own key block comes first: from then on m is a visible score of every query.
    query, distance = jnp.nonzero(needed[:, ::-1], size=blocks * (blocks + 1) // 2, fill_value=0)
    return _Pairs(jnp.sum(needed), query, blocks - 1 - distance)


def _make_is_visible(mask, block, group):
    """Returns a function of blocks (i, j): bool [B, G * block, block], which queries of i see which keys of j."""

    def divide(x):
        return x.reshape(x.shape[0], -1, block).swapaxes(0, 1)  # [n, B, block]

    ends = divide(mask.subtree_end)
    position = None if mask.window is None else divide(mask.position)
    offset = jnp.arange(block)[None, :]

    def is_visible(i, j, transposed=False):
        def pair(queries, keys):  # [1 or B, block] each
            queries = jnp.concatenate([queries] * group, axis=1)
            return (queries[:, None, :], keys[:, :, None]) if transposed else (queries[:, :, None], keys[:, None, :])

        query, key = pair(i * block + offset, j * block + offset)
        _, end = pair(offset, ends[j])
        visible = (key <= query) & (query < end)
        if position is None:
            return visible
        query_position, key_position = pair(position[i], position[j])
        return visible & (query_position - key_position < mask.window)

    return is_visible


def _cap(s, cap):
    return s if cap is None else cap * jnp.tanh(s / cap)


def _sink_columns(sinks, kv_heads, block):
    """Returns [N] as [1, 1, K, G * block, 1]: the sink of each query of a block of heads."""
    return jnp.repeat(sinks.astype(jnp.float32).reshape(kv_heads, -1), block, axis=1)[None, None, ..., None]


def _scale(q):
    return q * q.shape[-1] ** -0.5


def _matmul(left, right):
    return jnp.matmul(left, right, preferred_element_type=jnp.float32)


def _head_blocks(block, group, x):
    """Returns [B, T, K * G, H] as [n, B, K, G * block, H]: a block is contiguous, and one matrix per key/value head."""
    batch, length, heads, head_dim = x.shape
    x = x.reshape(batch, length // block, block, heads // group, group, head_dim)
    return x.transpose(1, 0, 3, 4, 2, 5).reshape(length // block, batch, heads // group, group * block, head_dim)


def _undivide(x, group):
    """Returns [n, B, K, G * block, H] as [B, T, K * G, H]: the inverse of `_head_blocks`."""
    blocks, batch, heads, rows, head_dim = x.shape
    x = x.reshape(blocks, batch, heads, group, rows // group, head_dim)
    return x.transpose(1, 0, 4, 2, 3, 5).reshape(batch, blocks * rows // group, heads * group, head_dim)
