"""Attention on NVIDIA GPUs that skips blocks in which no query sees a key: our own kernels, for any tree.

In: queries, keys and values of packed rows, and their mask, without a window. Out: the attention output. Three kernels
in the Triton dialect of Pallas compute the output, dq, and dk with dv, each on blocks that stay in the fast memory of
one multiprocessor.

The blocks to visit are computed from `subtree_end` before the kernels start, exactly: block J of keys is visited from
block I of queries if and only if some query of I sees some key of J. For a key at or before the first query f of I this
is subtree_end > f, so a maximum over J decides; otherwise J contains a token of I, which sees itself.

    keys      0 0 0 0 | 1 1 1 1 | 2 2 2 2        three blocks, two dialogues of six tokens
    sees up to      6     6 / 12       12        (subtree_end, largest of each block)
    queries   block 0: 0    block 1: 0 1    block 2: 1 2     key block 0 is not read for queries 8 to 11

Not yet run on hardware. Checked so far: equal to float64 in Pallas' interpreter; compiled for an H200 without the
device, by XLA of JAX 0.11.2, alone and within training steps, and by Triton 3.9, which for bfloat16 shows all products
on the matrix units, loads ahead of their use and no spilled registers. Block sizes were chosen by that, not by time.
Pallas' Triton backend is deprecated since JAX 0.11 (see BUILD.md).

Source: FlashAttention-2 (arXiv 2307.08691, sections 3.1 and 3.2), with its names; there, the blocks to skip follow from
the causal mask alone.
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

from dialog_jax.attention import blockwise
from dialog_jax.attention.mask import Mask

HEAD_DIMS = (64, 128)

_LOWEST = -1e30  # below any score, and finite, so that a query that sees no key of a block gives no NaN


class Blocks(NamedTuple):
    """Tokens per block, powers of 2 of at least 16, and the warps and pipeline stages of its program."""

    queries: int
    keys: int
    warps: int
    stages: int


class Tiling(NamedTuple):
    """The blocks of each kernel."""

    forward: Blocks
    dq: Blocks
    dkv: Blocks


def tiling(head_dim: int, dtype: jax.typing.DTypeLike) -> Tiling:
    """Returns blocks that fit the registers and the shared memory of a Hopper multiprocessor.

    Raises:
      NotImplementedError: there are none for this head dimension or type.
    """
    if head_dim not in HEAD_DIMS:
        raise NotImplementedError(f"head_dim is {head_dim}; the kernels have blocks for {HEAD_DIMS}")
    if dtype == jnp.float32:  # products in full float32 run outside the matrix units, from registers
        return Tiling(Blocks(32, 32, 8, 1), Blocks(32, 32, 8, 1), Blocks(32, 32, 8, 1))
    if dtype != jnp.bfloat16:
        raise NotImplementedError(f"the type is {jnp.dtype(dtype).name}; the kernels take bfloat16 and float32")
    if head_dim == 64:
        return Tiling(Blocks(128, 64, 8, 3), Blocks(128, 64, 8, 2), Blocks(64, 64, 4, 3))
    return Tiling(Blocks(128, 64, 8, 3), Blocks(128, 64, 8, 2), Blocks(64, 64, 8, 2))


def attend(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B T K H"],
    v: Float[Array, "B T K H"],
    mask: Mask,
    *,
    blocks: Tiling | None = None,
    interpret: bool = False,
) -> Float[Array, "B T N H"]:
    """Returns the attention output of each query over its ancestors and itself, in the type of `q`.

    Args:
      blocks: None for those of `tiling`.
      interpret: run in Pallas' interpreter, on any device, slowly.

    Raises:
      NotImplementedError: see `tiling`.
    """
    length = q.shape[1]
    blocks = tiling(q.shape[-1], q.dtype) if blocks is None else blocks
    largest = max(max(part.queries, part.keys) for part in blocks)  # all are powers of 2
    q, k, v = (blockwise.pad_to_multiple(largest, x) for x in (q, k, v))
    return _attend(q, k, v, mask.pad_to_multiple(largest).subtree_end, blocks, interpret)[:, :length]


def list_visible_blocks(
    subtree_end: Int[Array, "B T"], blocks: Blocks
) -> tuple[Int[Array, "B I J"], Int[Array, "B I"]]:
    """Returns, for each block of queries, the indices of the key blocks that it sees, ascending, and their number.

    The rest of a list is filled with the number of key blocks. In the picture above: [[0, 3, 3], [0, 1, 3], [1, 2, 3]]
    and [1, 2, 2].
    """
    batch, length = subtree_end.shape
    end = jnp.max(subtree_end.reshape(batch, -1, blocks.keys), axis=2)[:, None, :]  # [B, 1, J]
    first_query = jnp.arange(0, length, blocks.queries)[None, :, None]  # [1, I, 1]
    key_block = jnp.arange(length // blocks.keys, dtype=jnp.int32)[None, None, :]
    visible = (end > first_query) & (key_block * blocks.keys < first_query + blocks.queries)
    indices = jnp.sort(jnp.where(visible, key_block, key_block.size), axis=2)
    return indices, jnp.sum(visible, axis=2, dtype=jnp.int32)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def _attend(q, k, v, subtree_end, blocks, interpret):
    return _forward(q, k, v, subtree_end, blocks.forward, interpret)[0]


def _attend_forward(q, k, v, subtree_end, blocks, interpret):
    output, lse = _forward(q, k, v, subtree_end, blocks.forward, interpret)
    # The decoder's remat policies save this name. Without either of the two the backward pass would rerun the kernel.
    output, lse = checkpoint_name(output, blockwise.OUTPUT), checkpoint_name(lse, blockwise.OUTPUT)
    return output, (q, k, v, subtree_end, output, lse)


def _attend_backward(blocks, interpret, residuals, d_output):
    q, k, v, subtree_end, output, lse = residuals
    delta = jnp.sum(d_output.astype(jnp.float32) * output.astype(jnp.float32), axis=-1).transpose(0, 2, 1)  # [B, N, T]
    arrays = (q, k, v, subtree_end, d_output, lse, delta)
    return _dq(*arrays, blocks.dq, interpret), *_dkv(*arrays, blocks.dkv, interpret), None


_attend.defvjp(_attend_forward, _attend_backward)


def _forward(q, k, v, subtree_end, blocks: Blocks, interpret: bool):
    """Returns (output [B, T, N, H], base-2 log-sum-exp of each query's scores [B, N, T])."""
    batch, length, heads, head_dim = q.shape
    group = heads // k.shape[2]
    indices, count = list_visible_blocks(subtree_end, blocks)
    block_spec = pl.BlockSpec((None, blocks.queries, None, head_dim), lambda i, n, b: (b, i, n, 0))
    row_spec = pl.BlockSpec((None, length, None, head_dim), lambda i, n, b: (b, 0, n // group, 0))
    return pl.pallas_call(
        functools.partial(_forward_kernel, blocks=blocks, factor=_factor(head_dim)),
        grid=(length // blocks.queries, heads, batch),
        in_specs=[*_list_specs(indices, length), block_spec, row_spec, row_spec],
        out_specs=[block_spec, pl.BlockSpec((None, None, blocks.queries), lambda i, n, b: (b, n, i))],
        out_shape=[
            jax.ShapeDtypeStruct(q.shape, q.dtype),
            jax.ShapeDtypeStruct((batch, heads, length), jnp.float32),
        ],
        compiler_params=triton.CompilerParams(num_warps=blocks.warps, num_stages=blocks.stages),
        interpret=interpret,
        name="attention_forward",
    )(count, indices, subtree_end, q, k, v)


def _dq(q, k, v, subtree_end, d_output, lse, delta, blocks: Blocks, interpret: bool):
    """Returns the gradient with respect to the queries, [B, T, N, H]."""
    batch, length, heads, head_dim = q.shape
    group = heads // k.shape[2]
    indices, count = list_visible_blocks(subtree_end, blocks)
    block_spec = pl.BlockSpec((None, blocks.queries, None, head_dim), lambda i, n, b: (b, i, n, 0))
    row_spec = pl.BlockSpec((None, length, None, head_dim), lambda i, n, b: (b, 0, n // group, 0))
    statistic = pl.BlockSpec((None, None, blocks.queries), lambda i, n, b: (b, n, i))
    return pl.pallas_call(
        functools.partial(_dq_kernel, blocks=blocks, factor=_factor(head_dim)),
        grid=(length // blocks.queries, heads, batch),
        in_specs=[*_list_specs(indices, length), block_spec, row_spec, row_spec, block_spec, statistic, statistic],
        out_specs=block_spec,
        out_shape=jax.ShapeDtypeStruct(q.shape, q.dtype),
        compiler_params=triton.CompilerParams(num_warps=blocks.warps, num_stages=blocks.stages),
        interpret=interpret,
        name="attention_dq",
    )(count, indices, subtree_end, q, k, v, d_output, lse, delta)


def _dkv(q, k, v, subtree_end, d_output, lse, delta, blocks: Blocks, interpret: bool):
    """Returns the gradients with respect to keys and values, both [B, T, K, H]."""
    batch, length, heads, head_dim = q.shape
    kv_heads = k.shape[2]
    group = heads // kv_heads
    # The queries that see a key are the tokens from it to its subtree's end: their blocks have no gaps.
    end = jnp.max(subtree_end.reshape(batch, -1, blocks.keys), axis=2)
    stop = (end + blocks.queries - 1) // blocks.queries  # [B, J]
    block_spec = pl.BlockSpec((None, blocks.keys, None, head_dim), lambda j, n, b: (b, j, n, 0))
    row_spec = pl.BlockSpec((None, length, group, head_dim), lambda j, n, b: (b, 0, n, 0))
    statistic = pl.BlockSpec((None, group, length), lambda j, n, b: (b, n, 0))
    return pl.pallas_call(
        functools.partial(_dkv_kernel, blocks=blocks, factor=_factor(head_dim)),
        grid=(length // blocks.keys, kv_heads, batch),
        in_specs=[
            pl.BlockSpec((None, None), lambda j, n, b: (b, j)),
            pl.BlockSpec((None, blocks.keys), lambda j, n, b: (b, j)),
            *(row_spec, block_spec, block_spec, row_spec, statistic, statistic),
        ],
        out_specs=[block_spec, block_spec],
        out_shape=[jax.ShapeDtypeStruct(k.shape, k.dtype), jax.ShapeDtypeStruct(v.shape, v.dtype)],
        compiler_params=triton.CompilerParams(num_warps=blocks.warps, num_stages=blocks.stages),
        interpret=interpret,
        name="attention_dkv",
    )(stop, subtree_end, q, k, v, d_output, lse, delta)


def _factor(head_dim: int) -> float:
    """Returns the scale of the scores, times log2(e), so that softmax can use powers of 2."""
    return head_dim**-0.5 * math.log2(math.e)


def _list_specs(indices, length: int) -> list[pl.BlockSpec]:
    """Returns the specs of the count and the indices of `list_visible_blocks`, and of the row's `subtree_end`."""
    return [
        pl.BlockSpec((None, None), lambda i, n, b: (b, i)),
        pl.BlockSpec((None, None, indices.shape[2]), lambda i, n, b: (b, i, 0)),
        pl.BlockSpec((None, length), lambda i, n, b: (b, 0)),
    ]


def _dot(a, b, *, transpose_b: bool = False):
    # Triton's default for float32 is tf32, which has ten bits; for bfloat16 there is only one precision.
    return triton.dot(a, b, trans_b=transpose_b, precision=jax.lax.Precision.HIGHEST)


def _forward_kernel(count, indices, subtree_end, q, k, v, output, lse, *, blocks: Blocks, factor: float):
    query = pl.program_id(0) * blocks.queries + jnp.arange(blocks.queries)
    q_block = q[...]

    def visit(index, carry):
        m, l, acc = carry
        keys = pl.ds(indices[index] * blocks.keys, blocks.keys)
        key = indices[index] * blocks.keys + jnp.arange(blocks.keys)
        s = _dot(q_block, k[keys, :], transpose_b=True) * factor  # [I, J]
        visible = (key[None, :] <= query[:, None]) & (query[:, None] < subtree_end[keys][None, :])
        s = jnp.where(visible, s, -jnp.inf)
        m_new = jnp.maximum(m, jnp.max(s, axis=1))
        p = jnp.exp2(s - m_new[:, None])
        alpha = jnp.exp2(m - m_new)
        v_block = v[keys, :]
        acc = acc * alpha[:, None] + _dot(p.astype(v_block.dtype), v_block)
        return m_new, l * alpha + jnp.sum(p, axis=1), acc

    zeros = jnp.zeros(blocks.queries, jnp.float32)
    carry = zeros + _LOWEST, zeros, jnp.zeros(q_block.shape, jnp.float32)
    m, l, acc = jax.lax.fori_loop(0, count[...], visit, carry)
    output[...] = (acc / l[:, None]).astype(output.dtype)
    lse[...] = m + jnp.log2(l)


def _dq_kernel(count, indices, subtree_end, q, k, v, d_output, lse, delta, dq, *, blocks: Blocks, factor: float):
    query = pl.program_id(0) * blocks.queries + jnp.arange(blocks.queries)
    q_block, do_block, lse_block, delta_block = q[...], d_output[...], lse[...], delta[...]

    def visit(index, acc):
        keys = pl.ds(indices[index] * blocks.keys, blocks.keys)
        key = indices[index] * blocks.keys + jnp.arange(blocks.keys)
        k_block = k[keys, :]
        s = _dot(q_block, k_block, transpose_b=True) * factor  # [I, J]
        visible = (key[None, :] <= query[:, None]) & (query[:, None] < subtree_end[keys][None, :])
        p = jnp.where(visible, jnp.exp2(s - lse_block[:, None]), 0.0)
        ds = p * (_dot(do_block, v[keys, :], transpose_b=True) - delta_block[:, None])
        return acc + _dot(ds.astype(k_block.dtype), k_block)

    acc = jax.lax.fori_loop(0, count[...], visit, jnp.zeros(q_block.shape, jnp.float32))
    dq[...] = (acc * (factor / math.log2(math.e))).astype(dq.dtype)


def _dkv_kernel(stop, subtree_end, q, k, v, d_output, lse, delta, dk, dv, *, blocks: Blocks, factor: float):
    # Scores are transposed, [J, I], so that no product needs a transposition.
    start = pl.program_id(0) * blocks.keys
    key = start + jnp.arange(blocks.keys)
    end, k_block, v_block = subtree_end[...], k[...], v[...]
    first, last = jax.lax.div(start, blocks.queries), stop[...]

    def visit_head(head, carry):
        def visit(index, carry):
            dk_acc, dv_acc = carry
            queries = pl.ds(index * blocks.queries, blocks.queries)
            query = index * blocks.queries + jnp.arange(blocks.queries)
            q_block, do_block = q[queries, head, :], d_output[queries, head, :]
            s = _dot(k_block, q_block, transpose_b=True) * factor  # [J, I]
            visible = (key[:, None] <= query[None, :]) & (query[None, :] < end[:, None])
            p = jnp.where(visible, jnp.exp2(s - lse[head, queries][None, :]), 0.0)
            dv_acc += _dot(p.astype(do_block.dtype), do_block)
            ds = p * (_dot(v_block, do_block, transpose_b=True) - delta[head, queries][None, :])
            return dk_acc + _dot(ds.astype(q_block.dtype), q_block), dv_acc

        return jax.lax.fori_loop(first, last, visit, carry)

    zeros = jnp.zeros(k_block.shape, jnp.float32)
    dk_acc, dv_acc = jax.lax.fori_loop(0, q.shape[1], visit_head, (zeros, zeros))
    dk[...] = (dk_acc * (factor / math.log2(math.e))).astype(dk.dtype)
    dv[...] = dv_acc.astype(dv.dtype)
