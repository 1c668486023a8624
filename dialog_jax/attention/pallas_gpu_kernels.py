"""The kernels of `attention.pallas_gpu`: what one program of a GPU computes of a block of queries or of keys.

In: references to a row's arrays, of which a program reads the blocks that are listed for it. Out: a block of the
output, of dq, or of dk and dv. The block stays in the fast memory of one multiprocessor. Scores are in base 2.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

_LOWEST = -1e30  # below any score, and finite, so that a query that sees no key of a block gives no NaN


class Blocks(NamedTuple):
    """Tokens per block, powers of 2 of at least 16, and the warps and pipeline stages of its program."""

    queries: int
    keys: int
    warps: int
    stages: int


def forward_kernel(
    count, indices, mask, q, k, v, sinks, output, lse, *, blocks: Blocks, factor: float, cap: float | None
):
    """Writes the output and the log-sum-exp of the scores of a block of queries."""
    start = pl.program_id(0) * blocks.queries
    query = start + jnp.arange(blocks.queries)
    query_position, window = _load_window(mask, pl.ds(start, blocks.queries))
    q_block = q[...]

    def visit(index, carry):
        m, l, acc = carry
        keys = pl.ds(indices[index] * blocks.keys, blocks.keys)
        key = indices[index] * blocks.keys + jnp.arange(blocks.keys)
        s = _cap(_dot(q_block, k[keys, :], transpose_b=True) * factor, cap)  # [I, J]
        visible = (key[None, :] <= query[:, None]) & (query[:, None] < mask.subtree_end[keys][None, :])
        if window is not None:
            visible &= query_position[:, None] - mask.position[keys][None, :] < window
        s = jnp.where(visible, s, -jnp.inf)
        m_new = jnp.maximum(m, jnp.max(s, axis=1))
        p = jnp.exp2(s - m_new[:, None])
        alpha = jnp.exp2(m - m_new)
        v_block = v[keys, :]
        acc = acc * alpha[:, None] + _dot(p.astype(v_block.dtype), v_block)
        return m_new, l * alpha + jnp.sum(p, axis=1), acc

    zeros = jnp.zeros(blocks.queries, jnp.float32)
    # A sink is as one key with this score and the value zero.
    m, l = (zeros + _LOWEST, zeros) if sinks is None else (zeros + sinks[...], zeros + 1.0)
    m, l, acc = jax.lax.fori_loop(0, count[...], visit, (m, l, jnp.zeros(q_block.shape, jnp.float32)))
    output[...] = (acc / l[:, None]).astype(output.dtype)
    lse[...] = m + jnp.log2(l)


def dq_kernel(
    count, indices, mask, q, k, v, d_output, lse, delta, dq, *, blocks: Blocks, factor: float, cap: float | None
):
    """Writes dq of a block of queries."""
    start = pl.program_id(0) * blocks.queries
    query = start + jnp.arange(blocks.queries)
    query_position, window = _load_window(mask, pl.ds(start, blocks.queries))
    q_block, do_block, lse_block, delta_block = q[...], d_output[...], lse[...], delta[...]

    def visit(index, acc):
        keys = pl.ds(indices[index] * blocks.keys, blocks.keys)
        key = indices[index] * blocks.keys + jnp.arange(blocks.keys)
        k_block = k[keys, :]
        s = _cap(_dot(q_block, k_block, transpose_b=True) * factor, cap)  # [I, J]
        visible = (key[None, :] <= query[:, None]) & (query[:, None] < mask.subtree_end[keys][None, :])
        if window is not None:
            visible &= query_position[:, None] - mask.position[keys][None, :] < window
        p = jnp.where(visible, jnp.exp2(s - lse_block[:, None]), 0.0)
        ds = p * (_dot(do_block, v[keys, :], transpose_b=True) - delta_block[:, None])
        return acc + _dot(_uncap(ds, s, cap).astype(k_block.dtype), k_block)

    acc = jax.lax.fori_loop(0, count[...], visit, jnp.zeros(q_block.shape, jnp.float32))
    dq[...] = (acc * (factor / math.log2(math.e))).astype(dq.dtype)


def dkv_kernel(
    stop, indices, mask, q, k, v, d_output, lse, delta, dk, dv, *, blocks: Blocks, factor: float, cap: float | None
):
    """Writes dk and dv of a block of keys, visiting the blocks of queries that are listed, or all up to `stop`."""
    # Scores are transposed, [J, I], so that no product needs a transposition.
    start = pl.program_id(0) * blocks.keys
    key = start + jnp.arange(blocks.keys)
    key_position, window = _load_window(mask, pl.ds(start, blocks.keys))
    end, k_block, v_block = mask.subtree_end[pl.ds(start, blocks.keys)], k[...], v[...]
    first = jax.lax.div(start, blocks.queries) if indices is None else 0
    last = stop[...]

    def visit_head(head, carry):
        def visit(index, carry):
            dk_acc, dv_acc = carry
            block = index if indices is None else indices[index]
            queries = pl.ds(block * blocks.queries, blocks.queries)
            query = block * blocks.queries + jnp.arange(blocks.queries)
            q_block, do_block = q[queries, head, :], d_output[queries, head, :]
            s = _cap(_dot(k_block, q_block, transpose_b=True) * factor, cap)  # [J, I]
            visible = (key[:, None] <= query[None, :]) & (query[None, :] < end[:, None])
            if window is not None:
                visible &= mask.position[queries][None, :] - key_position[:, None] < window
            p = jnp.where(visible, jnp.exp2(s - lse[head, queries][None, :]), 0.0)
            dv_acc += _dot(p.astype(do_block.dtype), do_block)
            ds = p * (_dot(v_block, do_block, transpose_b=True) - delta[head, queries][None, :])
            return dk_acc + _dot(_uncap(ds, s, cap).astype(q_block.dtype), q_block), dv_acc

        return jax.lax.fori_loop(first, last, visit, carry)

    zeros = jnp.zeros(k_block.shape, jnp.float32)
    dk_acc, dv_acc = jax.lax.fori_loop(0, q.shape[1], visit_head, (zeros, zeros))
    dk[...] = (dk_acc * (factor / math.log2(math.e))).astype(dk.dtype)
    dv[...] = dv_acc.astype(dv.dtype)


def _load_window(mask, tokens: slice | pl.Slice):
    """Returns (the positions of `tokens`, the window), or None for both."""
    return (None, None) if mask.window is None else (mask.position[tokens], mask.window[...])


def _dot(a, b, *, transpose_b: bool = False):
    # Triton's default for float32 is tf32, which has ten bits; for bfloat16 there is only one precision.
    return triton.dot(a, b, trans_b=transpose_b, precision=jax.lax.Precision.HIGHEST)


def _cap(s, cap: float | None):
    return s if cap is None else cap * jnp.tanh(s / cap)


def _uncap(ds, s, cap: float | None):
    """Returns the gradient of the scores before the cap, from that of the capped scores `s`."""
    return ds if cap is None else ds * (1.0 - (s / cap) * (s / cap))
