"""Attention over rows that are forests of dialogues, skipping pairs of blocks in which nothing is visible. Any device.

In: queries, keys and values of rows, and one int32 per token, `subtree_end`. Out: the attention output. Knows no roles
and no dialogue boundaries; the ancestor mask covers both:

    key j is visible to query i   iff   j <= i < subtree_end[j]

A row of two dialogues, the first of which branches after its first two tokens (0 1 -> 2 3 and 0 1 -> 4):

    token        0  1  2  3  4 | 5  6          query 3 sees 0 1 2 3
    subtree_end  5  5  4  4  5 | 7  7          query 4 sees 0 1 4
                                               query 6 sees 5 6

Queries and keys are divided into blocks. In the forward and in the backward pass a loop visits the pairs of blocks that
contain a visible pair of tokens, so a token's cost grows with its dialogue and not with the row. The rows of a call
share one loop: a pair of blocks that one row needs is visited in all. No array has shape [T, T].
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int

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
    subtree_end: Int[Array, "B T"],
    *,
    block: int = BLOCK,
) -> Float[Array, "B T N H"]:
    """Returns the attention output of each query over its ancestors and itself; softmax and sums are float32.

    The backward pass recomputes the probabilities of a pair of blocks. Saved for it under the checkpoint name `OUTPUT`
    are the output and the log-sum-exp of each query's scores.

    Args:
      subtree_end: one more than the last token that sees this one; for padding, its own index + 1.
      block: tokens per block. Smaller blocks skip more and have less efficient matrix products.

    Source: FlashAttention-2 (arXiv 2307.08691, algorithms 1 and 2), with its names; differs in the mask, in the list of
    pairs, and in one loop for all three gradients.
    """
    length = q.shape[1]
    block = min(block, length)
    q, k, v, subtree_end = pad_to_multiple(block, q, k, v, subtree_end)
    return _attend(q, k, v, subtree_end, block)[:, :length]


def pad_to_multiple(
    multiple: int,
    q: Float[Array, "B T N H"],
    k: Float[Array, "B T K H"],
    v: Float[Array, "B T K H"],
    subtree_end: Int[Array, "B T"],
) -> tuple[Array, Array, Array, Array]:
    """Returns the arrays with T padded to the next multiple; padding is zeros and sees only itself.

    With multiple 4, a row of three tokens: subtree_end 3 3 3 becomes 3 3 3 4.
    """
    batch, length = subtree_end.shape
    missing = -length % multiple
    if not missing:
        return q, k, v, subtree_end
    q, k, v = (jnp.pad(x, ((0, 0), (0, missing), (0, 0), (0, 0))) for x in (q, k, v))
    alone = jnp.arange(length + 1, length + missing + 1, dtype=subtree_end.dtype)
    return q, k, v, jnp.concatenate([subtree_end, jnp.broadcast_to(alone, (batch, missing))], axis=1)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _attend(q, k, v, subtree_end, block):
    return _forward(q, k, v, subtree_end, block)[0]


def _forward(q, k, v, subtree_end, block):
    group = q.shape[2] // k.shape[2]
    pairs = _list_pairs(subtree_end, block)
    q_blocks, k_blocks, v_blocks, ends = _divide(_scale(q), k, v, subtree_end, block)

    def visit(index, carry):
        m, l, acc = carry
        i, j = pairs.query[index], pairs.key[index]
        query, key = _token_indices(i, j, block, group)
        # [B, G * block, block]
        visible = (key[:, None, :] <= query[:, :, None]) & (query[:, :, None] < ends[j][:, None, :])
        s = jnp.where(visible[:, None], _matmul(q_blocks[i], k_blocks[j].swapaxes(-1, -2)), _MASKED)
        m_new = jnp.maximum(m[i], jnp.max(s, axis=-1, keepdims=True))
        p = jnp.exp(s - m_new)
        alpha = jnp.exp(m[i] - m_new)
        l_new = l[i] * alpha + jnp.sum(p, axis=-1, keepdims=True)
        acc_new = acc[i] * alpha + _matmul(p.astype(v.dtype), v_blocks[j])
        return m.at[i].set(m_new), l.at[i].set(l_new), acc.at[i].set(acc_new)

    column = (*q_blocks.shape[:-1], 1)
    initial = jnp.full(column, _MASKED), jnp.zeros(column), jnp.zeros(q_blocks.shape)
    with jax.named_scope(PAIRS):
        m, l, acc = jax.lax.fori_loop(0, pairs.total, visit, initial)
    output = checkpoint_name(_undivide(acc / l, group).astype(q.dtype), OUTPUT)
    lse = checkpoint_name(m + jnp.log(l), OUTPUT)  # [n, B, K, G * block, 1]
    return output, (q, k, v, subtree_end, output, lse)


def _backward(block, residuals, d_output):
    q, k, v, subtree_end, output, lse = residuals
    group = q.shape[2] // k.shape[2]
    pairs = _list_pairs(subtree_end, block)
    q_blocks, k_blocks, v_blocks, ends = _divide(_scale(q), k, v, subtree_end, block)
    (do_blocks,) = _head_blocks(block, group, d_output)
    product = d_output.astype(jnp.float32) * output.astype(jnp.float32)
    (delta,) = _head_blocks(block, group, jnp.sum(product, axis=-1, keepdims=True))

    def visit(index, carry):
        dq, dk, dv = carry
        i, j = pairs.query[index], pairs.key[index]
        q_block, k_block, v_block, do_block = q_blocks[i], k_blocks[j], v_blocks[j], do_blocks[i]
        query, key = _token_indices(i, j, block, group)
        # [B, block, G * block]: keys by queries, the transpose of the forward pass
        visible = (key[:, :, None] <= query[:, None, :]) & (query[:, None, :] < ends[j][:, :, None])
        s = jnp.where(visible[:, None], _matmul(k_block, q_block.swapaxes(-1, -2)), _MASKED)
        p = jnp.exp(s - lse[i].swapaxes(-1, -2))
        dp = _matmul(v_block, do_block.swapaxes(-1, -2))
        ds = (p * (dp - delta[i].swapaxes(-1, -2))).astype(q.dtype)
        # The barrier makes ds one array: XLA:CPU would otherwise compute it once for each product.
        ds = jax.lax.optimization_barrier(ds)
        return (
            dq.at[i].add(_matmul(k_block.swapaxes(-1, -2), ds)),
            dk.at[j].add(_matmul(ds, q_block)),
            dv.at[j].add(_matmul(p.astype(v.dtype), do_block)),
        )

    # dq is accumulated transposed, so that its product reads ds in the order in which it is stored.
    zeros = tuple(jnp.zeros(x.shape) for x in (q_blocks.swapaxes(-1, -2), k_blocks, v_blocks))
    with jax.named_scope(PAIRS):
        dq, dk, dv = jax.lax.fori_loop(0, pairs.total, visit, zeros)
    return (
        _scale(_undivide(dq.swapaxes(-1, -2), group)).astype(q.dtype),
        _undivide(dk, 1).astype(k.dtype),
        _undivide(dv, 1).astype(v.dtype),
        None,
    )


_attend.defvjp(_forward, _backward)


def _list_pairs(subtree_end, block):
    """Returns the pairs of blocks: (i, i), and (i, j) with j < i iff the first query of i sees a key of j."""
    batch, length = subtree_end.shape
    blocks = length // block
    block_end = jnp.max(subtree_end.reshape(batch, blocks, block), axis=(0, 2))  # [n]
    i, j = jnp.arange(blocks)[:, None], jnp.arange(blocks)[None, :]
    needed = (j == i) | ((j < i) & (block_end[None, :] > i * block))
    # A query block's own key block comes first: from then on m is a visible score of every query.
    query, distance = jnp.nonzero(needed[:, ::-1], size=blocks * (blocks + 1) // 2, fill_value=0)
    return _Pairs(jnp.sum(needed), query, blocks - 1 - distance)


def _scale(q):
    return q * q.shape[-1] ** -0.5


def _matmul(left, right):
    return jnp.matmul(left, right, preferred_element_type=jnp.float32)


def _token_indices(i, j, block, group):
    """Returns (tokens of query block i, repeated per head of a group; tokens of key block j), as indices [1, ...]."""
    offset = jnp.arange(block)[None, :]
    return i * block + jnp.concatenate([offset] * group, axis=1), j * block + offset


def _divide(q, k, v, subtree_end, block):
    group = q.shape[2] // k.shape[2]
    ends = subtree_end.reshape(subtree_end.shape[0], -1, block).swapaxes(0, 1)  # [n, B, block]
    return *_head_blocks(block, group, q), *_head_blocks(block, 1, k, v), ends


def _head_blocks(block, group, *arrays):
    """Returns [B, T, K * G, H] as [n, B, K, G * block, H]: a block is contiguous, and one matrix per key/value head."""

    def divide(x):
        batch, length, heads, head_dim = x.shape
        x = x.reshape(batch, length // block, block, heads // group, group, head_dim)
        return x.transpose(1, 0, 3, 4, 2, 5).reshape(length // block, batch, heads // group, group * block, head_dim)

    return tuple(divide(x) for x in arrays)


def _undivide(x, group):
    """Returns [n, B, K, G * block, H] as [B, T, K * G, H]: the inverse of `_head_blocks`."""
    blocks, batch, heads, rows, head_dim = x.shape
    x = x.reshape(blocks, batch, heads, group, rows // group, head_dim)
    return x.transpose(1, 0, 4, 2, 3, 5).reshape(batch, blocks * rows // group, heads * group, head_dim)
