"""Attention of a row that is a forest of dialogues: only blocks in which some key is visible are read. Any device.

In: queries, keys and values of a row, and one int32 per token, `subtree_end`, that says which later tokens see it.
Out: what each query reads. Knows nothing of roles, turns or where a dialogue starts: the ancestor mask says it all.

    key j is visible to query i   iff   j <= i < subtree_end[j]

A row of two dialogues, the first of which branches after its first two tokens (0 1 -> 2 3 and 0 1 -> 4):

    token        0  1  2  3  4 | 5  6          query 3 sees 0 1 2 3
    subtree_end  5  5  4  4  5 | 7  7          query 4 sees 0 1 4
                                               query 6 sees 5 6

Queries and keys go in blocks. A loop visits the pairs of blocks that the mask leaves, as many as there are, forward and
backward: the cost of a token grows with its dialogue and not with the row. Rows of one call go together: a pair that
one of them needs is visited in all. Nothing of size [T, T] is made.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int

from dialog_jax.attention import padding

BLOCK = 256
PAIRS = "block_pairs"  # the loop over pairs, as it is called in compiled programs
_HIDDEN = -1e30  # the score of a key that is not seen: finite, so that no difference of scores is NaN


class _Pairs(NamedTuple):
    """The pairs of blocks to visit: the first `number` of each list; of a query's block, its own comes first."""

    number: Array
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
    """What each query reads of its ancestors and itself; softmax and sums in float32.

    Computed again in the backward pass: the probabilities of a pair. Kept for it, under the name "read": what is
    returned and, for each query, the logarithm of its sum.

    Args:
      subtree_end: one more than the last token that sees this one; of padding, its own index + 1.
      block: tokens of a block. Smaller ones skip more and compute less well.

    Source: the order of work is FlashAttention-2's (arXiv 2307.08691, algorithms 1 and 2); differs in the mask, in the
    list of pairs, and in one loop for all gradients.
    """
    length = q.shape[1]
    block = min(block, length)
    q, k, v, subtree_end = padding.to_multiple(block, q, k, v, subtree_end)
    return _attend(q, k, v, subtree_end, block)[:, :length]


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _attend(q, k, v, subtree_end, block):
    return _forward(q, k, v, subtree_end, block)[0]


def _forward(q, k, v, subtree_end, block):
    group = q.shape[2] // k.shape[2]
    pairs = _pairs(subtree_end, block)
    queries, keys, values, ends = _blocks(_scaled(q), k, v, subtree_end, block)

    def visit(index, carry):
        peak, total, read = carry
        i, j = pairs.query[index], pairs.key[index]
        at, seen = _places(i, j, block, group)
        visible = (seen[:, None, :] <= at[:, :, None]) & (at[:, :, None] < ends[j][:, None, :])  # [B, G * block, block]
        score = jnp.where(visible[:, None], _product(queries[i], keys[j].swapaxes(-1, -2)), _HIDDEN)
        new = jnp.maximum(peak[i], jnp.max(score, axis=-1, keepdims=True))
        weight = jnp.exp(score - new)
        faded = jnp.exp(peak[i] - new)
        summed = total[i] * faded + jnp.sum(weight, axis=-1, keepdims=True)
        found = read[i] * faded + _product(weight.astype(v.dtype), values[j])
        return peak.at[i].set(new), total.at[i].set(summed), read.at[i].set(found)

    column = (*queries.shape[:-1], 1)
    empty = jnp.full(column, _HIDDEN), jnp.zeros(column), jnp.zeros(queries.shape)
    with jax.named_scope(PAIRS):
        peak, total, read = jax.lax.fori_loop(0, pairs.number, visit, empty)
    read = checkpoint_name(_row(read / total, group).astype(q.dtype), "read")
    normalizer = checkpoint_name(peak + jnp.log(total), "read")  # [n, B, K, G * block, 1]
    return read, (q, k, v, subtree_end, read, normalizer)


def _backward(block, kept, gradient):
    q, k, v, subtree_end, read, normalizer = kept
    group = q.shape[2] // k.shape[2]
    pairs = _pairs(subtree_end, block)
    queries, keys, values, ends = _blocks(_scaled(q), k, v, subtree_end, block)
    (gradients,) = _query_blocks(block, group, gradient)
    wide = gradient.astype(jnp.float32) * read.astype(jnp.float32)
    (mean,) = _query_blocks(block, group, jnp.sum(wide, axis=-1, keepdims=True))

    def visit(index, carry):
        to_query, to_key, to_value = carry
        i, j = pairs.query[index], pairs.key[index]
        query, key, value, wanted = queries[i], keys[j], values[j], gradients[i]
        at, seen = _places(i, j, block, group)
        visible = (seen[:, :, None] <= at[:, None, :]) & (at[:, None, :] < ends[j][:, :, None])  # [B, block, G * block]
        score = jnp.where(visible[:, None], _product(key, query.swapaxes(-1, -2)), _HIDDEN)
        weight = jnp.exp(score - normalizer[i].swapaxes(-1, -2))
        to_weight = _product(value, wanted.swapaxes(-1, -2))
        to_score = (weight * (to_weight - mean[i].swapaxes(-1, -2))).astype(q.dtype)
        # Said to be one array: XLA:CPU would otherwise form it once for each product.
        to_score = jax.lax.optimization_barrier(to_score)
        return (
            to_query.at[i].add(_product(key.swapaxes(-1, -2), to_score)),
            to_key.at[j].add(_product(to_score, query)),
            to_value.at[j].add(_product(weight.astype(v.dtype), wanted)),
        )

    # Queries' gradients are added up transposed: the product then reads the scores as they lie.
    zeros = tuple(jnp.zeros(x.shape) for x in (queries.swapaxes(-1, -2), keys, values))
    with jax.named_scope(PAIRS):
        to_query, to_key, to_value = jax.lax.fori_loop(0, pairs.number, visit, zeros)
    return (
        _scaled(_row(to_query.swapaxes(-1, -2), group)).astype(q.dtype),
        _row(to_key, 1).astype(k.dtype),
        _row(to_value, 1).astype(v.dtype),
        None,
    )


_attend.defvjp(_forward, _backward)


def _pairs(subtree_end, block):
    """Key block j is visited by a later query block i iff some key of j is seen by the first query of i."""
    batch, length = subtree_end.shape
    count = length // block
    reach = jnp.max(subtree_end.reshape(batch, count, block), axis=(0, 2))  # [n]
    i, j = jnp.arange(count)[:, None], jnp.arange(count)[None, :]
    needed = (j == i) | ((j < i) & (reach[None, :] > i * block))
    # Its own block first: from then on the peak of every query is a score that it sees.
    query, behind = jnp.nonzero(needed[:, ::-1], size=count * (count + 1) // 2, fill_value=0)
    return _Pairs(jnp.sum(needed), query, count - 1 - behind)


def _scaled(q):
    return q * q.shape[-1] ** -0.5


def _product(left, right):
    return jnp.matmul(left, right, preferred_element_type=jnp.float32)


def _places(i, j, block, group):
    """Of a pair: the places in the row of its queries, head after head of a group, and of its keys; [1, ...]."""
    place = jnp.arange(block)[None, :]
    return i * block + jnp.concatenate([place] * group, axis=1), j * block + place


def _blocks(q, k, v, subtree_end, block):
    group = q.shape[2] // k.shape[2]
    ends = subtree_end.reshape(subtree_end.shape[0], -1, block).swapaxes(0, 1)  # [n, B, block]
    return *_query_blocks(block, group, q), *_query_blocks(block, 1, k, v), ends


def _query_blocks(block, group, *arrays):
    """[B, T, K * G, H] to [n, B, K, G * block, H]: a block is one piece of memory, and a matrix a key/value head."""

    def divided(x):
        batch, length, heads, size = x.shape
        x = x.reshape(batch, length // block, block, heads // group, group, size)
        return x.transpose(1, 0, 3, 4, 2, 5).reshape(length // block, batch, heads // group, group * block, size)

    return tuple(divided(x) for x in arrays)


def _row(x, group):
    """The way back: [n, B, K, G * block, H] to [B, T, K * G, H]."""
    count, batch, heads, rows, size = x.shape
    x = x.reshape(count, batch, heads, group, rows // group, size)
    return x.transpose(1, 0, 4, 2, 3, 5).reshape(batch, count * rows // group, heads * group, size)
