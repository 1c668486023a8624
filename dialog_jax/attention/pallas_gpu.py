"""Attention on NVIDIA GPUs that reads only blocks in which some query sees some key: our own kernels, for any tree.

In: queries, keys and values of packed rows, and their `subtree_end`. Out: what each query reads. Three kernels in the
Triton dialect of Pallas: one reads, one gives the gradient to queries, one that to keys and values, each over blocks
that stay in the fast memory of one multiprocessor.

Which blocks are worth a visit is computed from `subtree_end` before the kernels start, and is exact: block J of keys is
visited from block I of queries if and only if some query of I sees some key of J. For a key that stands at or before
the first query f of I this is subtree_end > f, so a maximum over J decides; else J holds a token of I, seen by itself.

    keys      0 0 0 0 | 1 1 1 1 | 2 2 2 2        three blocks, two dialogues of six tokens
    sees up to      6     6 / 12       12        (subtree_end, largest of each block)
    queries   block 0: 0    block 1: 0 1    block 2: 1 2     key block 0 is not read for queries 8 to 11

Never run on hardware yet. What was seen: equal to float64 in Pallas' interpreter; compiled by XLA of JAX 0.11.2 for an
H200 that was not there, alone and within training steps; and by Triton 3.9, which shows, for bfloat16, all products on
the matrix units, loads ahead of their use and no spilled registers. Sizes of blocks were chosen by that, not by time.
JAX 0.11 has deprecated Triton in Pallas, so a later one may lack it.

Source: Dao, "FlashAttention-2", sections 3.1 and 3.2; there, what is skipped is known from the causal mask alone.
"""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton
from jaxtyping import Array, Float, Int

from dialog_jax.attention import padding
from dialog_jax.errors import UserError

HEAD_DIMS = (64, 128)

_LOWEST = -1e30  # below any score, and finite, so that a query that sees nothing of a block gives no NaN


class Blocks(NamedTuple):
    """Tokens of a block, powers of 2 from 16 on, and how many warps and pipeline stages work on it."""

    queries: int
    keys: int
    warps: int
    stages: int


class Tiling(NamedTuple):
    """The blocks of each kernel."""

    read: Blocks
    to_queries: Blocks
    to_keys: Blocks


def tiling(head_dim: int, dtype: jax.typing.DTypeLike) -> Tiling:
    """Blocks that fit the registers and the shared memory of a Hopper multiprocessor.

    Raises:
      UserError: there are none for this size of heads or type.
    """
    if head_dim not in HEAD_DIMS:
        raise UserError(f"head_dim is {head_dim}; the kernels have blocks for {HEAD_DIMS}. Take another path.")
    if dtype == jnp.float32:  # products in full float32 run outside the matrix units, from registers
        return Tiling(Blocks(32, 32, 8, 1), Blocks(32, 32, 8, 1), Blocks(32, 32, 8, 1))
    if dtype != jnp.bfloat16:
        raise UserError(f"the type is {jnp.dtype(dtype).name}; the kernels take bfloat16 and float32.")
    if head_dim == 64:
        return Tiling(Blocks(128, 64, 8, 3), Blocks(128, 64, 8, 2), Blocks(64, 64, 4, 3))
    return Tiling(Blocks(128, 64, 8, 3), Blocks(128, 64, 8, 2), Blocks(64, 64, 8, 2))


def attend(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B T K H"],
    v: Float[Array, "B T K H"],
    subtree_end: Int[Array, "B T"],
    *,
    blocks: Tiling | None = None,
    interpret: bool = False,
) -> Float[Array, "B T N H"]:
    """What each query reads of its ancestors and itself, in the type of `q`.

    Args:
      blocks: those of `tiling` unless given.
      interpret: run in Pallas' interpreter, on any device, slowly.

    Raises:
      UserError: see `tiling`.
    """
    length = q.shape[1]
    blocks = tiling(q.shape[-1], q.dtype) if blocks is None else blocks
    largest = max(max(part.queries, part.keys) for part in blocks)  # all are powers of 2
    q, k, v, subtree_end = padding.to_multiple(largest, q, k, v, subtree_end)
    return _attend(q, k, v, subtree_end, blocks, interpret)[:, :length]


def seen_blocks(subtree_end: Int[Array, "B T"], blocks: Blocks) -> tuple[Int[Array, "B I J"], Int[Array, "B I"]]:
    """For each block of queries: the numbers of the blocks of keys that it sees, ascending, and how many those are.

    What follows them in the list is the number of blocks, which none has.
    """
    batch, length = subtree_end.shape
    end = jnp.max(subtree_end.reshape(batch, -1, blocks.keys), axis=2)[:, None, :]  # [B, 1, J]
    first_query = jnp.arange(0, length, blocks.queries)[None, :, None]  # [1, I, 1]
    key_block = jnp.arange(length // blocks.keys, dtype=jnp.int32)[None, None, :]
    seen = (end > first_query) & (key_block * blocks.keys < first_query + blocks.queries)
    listed = jnp.sort(jnp.where(seen, key_block, key_block.size), axis=2)
    return listed, jnp.sum(seen, axis=2, dtype=jnp.int32)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def _attend(q, k, v, subtree_end, blocks, interpret):
    return _read(q, k, v, subtree_end, blocks.read, interpret)[0]


def _attend_forward(q, k, v, subtree_end, blocks, interpret):
    read, log_total = _read(q, k, v, subtree_end, blocks.read, interpret)
    # Both by the name that the decoder's policies keep: with one alone the backward pass would run the kernel again.
    read, log_total = checkpoint_name(read, "read"), checkpoint_name(log_total, "read")
    return read, (q, k, v, subtree_end, read, log_total)


def _attend_backward(blocks, interpret, kept, d_read):
    q, k, v, subtree_end, read, log_total = kept
    moved = jnp.sum(d_read.astype(jnp.float32) * read.astype(jnp.float32), axis=-1).transpose(0, 2, 1)  # [B, N, T]
    seen = (q, k, v, subtree_end, d_read, log_total, moved)
    return _to_queries(*seen, blocks.to_queries, interpret), *_to_keys(*seen, blocks.to_keys, interpret), None


_attend.defvjp(_attend_forward, _attend_backward)


def _read(q, k, v, subtree_end, blocks: Blocks, interpret: bool):
    """(what is read [B, T, N, H], the base-2 logarithm of the sum of the softmax [B, N, T])."""
    batch, length, heads, head_dim = q.shape
    group = heads // k.shape[2]
    listed, count = seen_blocks(subtree_end, blocks)
    of_block = pl.BlockSpec((None, blocks.queries, None, head_dim), lambda i, n, b: (b, i, n, 0))
    of_row = pl.BlockSpec((None, length, None, head_dim), lambda i, n, b: (b, 0, n // group, 0))
    return pl.pallas_call(
        functools.partial(_read_kernel, blocks=blocks, factor=_factor(head_dim)),
        grid=(length // blocks.queries, heads, batch),
        in_specs=[*_list_specs(listed, length), of_block, of_row, of_row],
        out_specs=[of_block, pl.BlockSpec((None, None, blocks.queries), lambda i, n, b: (b, n, i))],
        out_shape=[
            jax.ShapeDtypeStruct(q.shape, q.dtype),
            jax.ShapeDtypeStruct((batch, heads, length), jnp.float32),
        ],
        compiler_params=triton.CompilerParams(num_warps=blocks.warps, num_stages=blocks.stages),
        interpret=interpret,
        name="attention_read",
    )(count, listed, subtree_end, q, k, v)


def _to_queries(q, k, v, subtree_end, d_read, log_total, moved, blocks: Blocks, interpret: bool):
    """The gradient to the queries, [B, T, N, H]."""
    batch, length, heads, head_dim = q.shape
    group = heads // k.shape[2]
    listed, count = seen_blocks(subtree_end, blocks)
    of_block = pl.BlockSpec((None, blocks.queries, None, head_dim), lambda i, n, b: (b, i, n, 0))
    of_row = pl.BlockSpec((None, length, None, head_dim), lambda i, n, b: (b, 0, n // group, 0))
    figure = pl.BlockSpec((None, None, blocks.queries), lambda i, n, b: (b, n, i))
    return pl.pallas_call(
        functools.partial(_to_queries_kernel, blocks=blocks, factor=_factor(head_dim)),
        grid=(length // blocks.queries, heads, batch),
        in_specs=[*_list_specs(listed, length), of_block, of_row, of_row, of_block, figure, figure],
        out_specs=of_block,
        out_shape=jax.ShapeDtypeStruct(q.shape, q.dtype),
        compiler_params=triton.CompilerParams(num_warps=blocks.warps, num_stages=blocks.stages),
        interpret=interpret,
        name="attention_to_queries",
    )(count, listed, subtree_end, q, k, v, d_read, log_total, moved)


def _to_keys(q, k, v, subtree_end, d_read, log_total, moved, blocks: Blocks, interpret: bool):
    """The gradients to keys and values, both [B, T, K, H]."""
    batch, length, heads, head_dim = q.shape
    kv_heads = k.shape[2]
    group = heads // kv_heads
    # The queries that see a key follow it up to its subtree's end: their blocks have no gaps, the last is enough.
    end = jnp.max(subtree_end.reshape(batch, -1, blocks.keys), axis=2)
    stop = (end + blocks.queries - 1) // blocks.queries  # [B, J]
    of_block = pl.BlockSpec((None, blocks.keys, None, head_dim), lambda j, n, b: (b, j, n, 0))
    of_row = pl.BlockSpec((None, length, group, head_dim), lambda j, n, b: (b, 0, n, 0))
    figure = pl.BlockSpec((None, group, length), lambda j, n, b: (b, n, 0))
    return pl.pallas_call(
        functools.partial(_to_keys_kernel, blocks=blocks, factor=_factor(head_dim)),
        grid=(length // blocks.keys, kv_heads, batch),
        in_specs=[
            pl.BlockSpec((None, None), lambda j, n, b: (b, j)),
            pl.BlockSpec((None, blocks.keys), lambda j, n, b: (b, j)),
            *(of_row, of_block, of_block, of_row, figure, figure),
        ],
        out_specs=[of_block, of_block],
        out_shape=[jax.ShapeDtypeStruct(k.shape, k.dtype), jax.ShapeDtypeStruct(v.shape, v.dtype)],
        compiler_params=triton.CompilerParams(num_warps=blocks.warps, num_stages=blocks.stages),
        interpret=interpret,
        name="attention_to_keys",
    )(stop, subtree_end, q, k, v, d_read, log_total, moved)


def _factor(head_dim: int) -> float:
    """Turns products of queries and keys into exponents of 2."""
    return head_dim**-0.5 * math.log2(math.e)


def _list_specs(listed, length: int) -> list[pl.BlockSpec]:
    """Of the count and the list that `seen_blocks` gives, and of the row's `subtree_end`."""
    return [
        pl.BlockSpec((None, None), lambda i, n, b: (b, i)),
        pl.BlockSpec((None, None, listed.shape[2]), lambda i, n, b: (b, i, 0)),
        pl.BlockSpec((None, length), lambda i, n, b: (b, 0)),
    ]


def _dot(a, b, *, transpose_b: bool = False):
    # Triton's own choice for float32 is tf32, ten bits; for bfloat16 there is one way only.
    return triton.dot(a, b, trans_b=transpose_b, precision=jax.lax.Precision.HIGHEST)


def _read_kernel(count, listed, subtree_end, q, k, v, read, log_total, *, blocks: Blocks, factor: float):
    query = pl.program_id(0) * blocks.queries + jnp.arange(blocks.queries)
    q_block = q[...]

    def add(step, carry):
        summed, peak, total = carry
        keys = pl.ds(listed[step] * blocks.keys, blocks.keys)
        key = listed[step] * blocks.keys + jnp.arange(blocks.keys)
        score = _dot(q_block, k[keys, :], transpose_b=True) * factor  # [I, J]
        visible = (key[None, :] <= query[:, None]) & (query[:, None] < subtree_end[keys][None, :])
        score = jnp.where(visible, score, -jnp.inf)
        higher = jnp.maximum(peak, jnp.max(score, axis=1))
        weight = jnp.exp2(score - higher[:, None])
        shrink = jnp.exp2(peak - higher)
        v_block = v[keys, :]
        summed = summed * shrink[:, None] + _dot(weight.astype(v_block.dtype), v_block)
        return summed, higher, total * shrink + jnp.sum(weight, axis=1)

    nothing = jnp.zeros(blocks.queries, jnp.float32)
    carry = jnp.zeros(q_block.shape, jnp.float32), nothing + _LOWEST, nothing
    summed, peak, total = jax.lax.fori_loop(0, count[...], add, carry)
    read[...] = (summed / total[:, None]).astype(read.dtype)
    log_total[...] = peak + jnp.log2(total)


def _to_queries_kernel(
    count, listed, subtree_end, q, k, v, d_read, log_total, moved, d_q, *, blocks: Blocks, factor: float
):
    query = pl.program_id(0) * blocks.queries + jnp.arange(blocks.queries)
    q_block, d_block, log_block, moved_block = q[...], d_read[...], log_total[...], moved[...]

    def add(step, summed):
        keys = pl.ds(listed[step] * blocks.keys, blocks.keys)
        key = listed[step] * blocks.keys + jnp.arange(blocks.keys)
        k_block = k[keys, :]
        score = _dot(q_block, k_block, transpose_b=True) * factor  # [I, J]
        visible = (key[None, :] <= query[:, None]) & (query[:, None] < subtree_end[keys][None, :])
        weight = jnp.where(visible, jnp.exp2(score - log_block[:, None]), 0.0)
        d_score = weight * (_dot(d_block, v[keys, :], transpose_b=True) - moved_block[:, None])
        return summed + _dot(d_score.astype(k_block.dtype), k_block)

    summed = jax.lax.fori_loop(0, count[...], add, jnp.zeros(q_block.shape, jnp.float32))
    d_q[...] = (summed * (factor / math.log2(math.e))).astype(d_q.dtype)


def _to_keys_kernel(stop, subtree_end, q, k, v, d_read, log_total, moved, d_k, d_v, *, blocks: Blocks, factor: float):
    # Scores stand on their side, [J, I], so that no product needs them turned.
    start = pl.program_id(0) * blocks.keys
    key = start + jnp.arange(blocks.keys)
    end, k_block, v_block = subtree_end[...], k[...], v[...]
    first, last = jax.lax.div(start, blocks.queries), stop[...]

    def of_head(head, carry):
        def add(step, carry):
            to_key, to_value = carry
            queries = pl.ds(step * blocks.queries, blocks.queries)
            query = step * blocks.queries + jnp.arange(blocks.queries)
            q_block, d_block = q[queries, head, :], d_read[queries, head, :]
            score = _dot(k_block, q_block, transpose_b=True) * factor  # [J, I]
            visible = (key[:, None] <= query[None, :]) & (query[None, :] < end[:, None])
            weight = jnp.where(visible, jnp.exp2(score - log_total[head, queries][None, :]), 0.0)
            to_value += _dot(weight.astype(d_block.dtype), d_block)
            d_score = weight * (_dot(v_block, d_block, transpose_b=True) - moved[head, queries][None, :])
            return to_key + _dot(d_score.astype(q_block.dtype), q_block), to_value

        return jax.lax.fori_loop(first, last, add, carry)

    nothing = jnp.zeros(k_block.shape, jnp.float32)
    to_key, to_value = jax.lax.fori_loop(0, q.shape[1], of_head, (nothing, nothing))
    d_k[...] = (to_key * (factor / math.log2(math.e))).astype(d_k.dtype)
    d_v[...] = to_value.astype(d_v.dtype)
