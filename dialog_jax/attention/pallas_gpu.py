"""Attention on NVIDIA GPUs that skips blocks in which no query sees a key: our own kernels, for any tree.

In: queries, keys and values of packed rows, their mask, and what the model adds (a cap, sinks). Out: the attention
output. Three kernels in the Triton dialect of Pallas (`attention.pallas_gpu_kernels`) compute the output, dq, and dk
with dv. The blocks that they visit are listed from the mask before they start (`Mask.find_visible_blocks`).

Not yet run on hardware. Checked so far: equal to float64 in Pallas' interpreter; compiled for an H200 without the
device by Triton 3.9, with and without windows, caps and sinks, which for bfloat16 shows all products on the matrix
units, loads ahead of their use and no spilled registers; without them also by XLA of JAX 0.11.2, alone and within
training steps. Block sizes were chosen by that, not by time. Pallas' Triton backend is deprecated since JAX 0.11 (see
BUILD.md).

Source: FlashAttention-2 (arXiv 2307.08691, sections 3.1 and 3.2), with its names; there, the blocks to skip follow from
the causal mask alone.
"""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton
from jaxtyping import Array, Bool, Float, Int

from dialog_jax.attention import blockwise, pallas_gpu_kernels
from dialog_jax.attention.mask import Mask
from dialog_jax.attention.pallas_gpu_kernels import Blocks

HEAD_DIMS = (64, 128)

_LOG2_E = math.log2(math.e)  # scores times this, so that softmax can use powers of 2


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
    sinks: Float[Array, "N"] | None = None,
    *,
    cap: float | None = None,
    blocks: Tiling | None = None,
    interpret: bool = False,
) -> Float[Array, "B T N H"]:
    """Returns the attention output of each query over the keys it sees, in the type of `q`.

    Args:
      sinks: see `attention.blockwise`, as for `cap`.
      blocks: None for those of `tiling`.
      interpret: run in Pallas' interpreter, on any device, slowly.

    Raises:
      NotImplementedError: see `tiling`.
    """
    length = q.shape[1]
    blocks = tiling(q.shape[-1], q.dtype) if blocks is None else blocks
    largest = max(max(part.queries, part.keys) for part in blocks)  # all are powers of 2
    q, k, v = (blockwise.pad_to_multiple(largest, x) for x in (q, k, v))
    return _attend(q, k, v, mask.pad_to_multiple(largest), sinks, cap, blocks, interpret)[:, :length]


def list_blocks(visible: Bool[Array, "B I J"]) -> tuple[Int[Array, "B I"], Int[Array, "B I J"]]:
    """Returns the number of true blocks J of each I, and their indices, ascending; the rest of a list is filled with J.

    In the picture of `Mask.find_visible_blocks`: [1, 2, 2] and [[0, 3, 3], [0, 1, 3], [1, 2, 3]].
    """
    index = jnp.arange(visible.shape[2], dtype=jnp.int32)[None, None, :]
    indices = jnp.sort(jnp.where(visible, index, index.size), axis=2)
    return jnp.sum(visible, axis=2, dtype=jnp.int32), indices


@functools.partial(jax.custom_vjp, nondiff_argnums=(5, 6, 7))
def _attend(q, k, v, mask, sinks, cap, blocks, interpret):
    return _forward(q, k, v, mask, sinks, cap, blocks.forward, interpret)[0]


def _attend_forward(q, k, v, mask, sinks, cap, blocks, interpret):
    output, lse = _forward(q, k, v, mask, sinks, cap, blocks.forward, interpret)
    # The decoder's remat policies save this name. Without either of the two the backward pass would rerun the kernel.
    output, lse = checkpoint_name(output, blockwise.OUTPUT), checkpoint_name(lse, blockwise.OUTPUT)
    return output, (q, k, v, mask, sinks, output, lse)


def _attend_backward(cap, blocks, interpret, residuals, d_output):
    q, k, v, mask, sinks, output, lse = residuals
    delta = jnp.sum(d_output.astype(jnp.float32) * output.astype(jnp.float32), axis=-1).transpose(0, 2, 1)  # [B, N, T]
    d_sinks = None
    if sinks is not None:
        p = jnp.exp2(_sink_scores(sinks)[None, :, None] - lse)
        d_sinks = -jnp.sum(p * delta, axis=(0, 2)).astype(sinks.dtype)
    arrays = (q, k, v, d_output, lse, delta)
    dq = _dq(mask, *arrays, cap, blocks.dq, interpret)
    return dq, *_dkv(mask, *arrays, cap, blocks.dkv, interpret), None, d_sinks


_attend.defvjp(_attend_forward, _attend_backward)


def _forward(q, k, v, mask, sinks, cap, blocks: Blocks, interpret: bool):
    """Returns (output [B, T, N, H], base-2 log-sum-exp of each query's scores [B, N, T])."""
    batch, length, heads, head_dim = q.shape
    group = heads // k.shape[2]
    count, indices = list_blocks(mask.find_visible_blocks(blocks.queries, blocks.keys))
    mask, mask_specs = _mask_arrays(mask)
    block_spec = pl.BlockSpec((None, blocks.queries, None, head_dim), lambda i, n, b: (b, i, n, 0))
    row_spec = pl.BlockSpec((None, length, None, head_dim), lambda i, n, b: (b, 0, n // group, 0))
    sink_scores = None if sinks is None else _sink_scores(sinks)
    sink_spec = None if sinks is None else pl.BlockSpec((None,), lambda i, n, b: (n,))
    return pl.pallas_call(
        functools.partial(pallas_gpu_kernels.forward_kernel, blocks=blocks, **_settings(head_dim, cap)),
        grid=(length // blocks.queries, heads, batch),
        in_specs=[*_list_specs(indices), mask_specs, block_spec, row_spec, row_spec, sink_spec],
        out_specs=[block_spec, pl.BlockSpec((None, None, blocks.queries), lambda i, n, b: (b, n, i))],
        out_shape=[
            jax.ShapeDtypeStruct(q.shape, q.dtype),
            jax.ShapeDtypeStruct((batch, heads, length), jnp.float32),
        ],
        compiler_params=triton.CompilerParams(num_warps=blocks.warps, num_stages=blocks.stages),
        interpret=interpret,
        name="attention_forward",
    )(count, indices, mask, q, k, v, sink_scores)


def _dq(mask, q, k, v, d_output, lse, delta, cap, blocks: Blocks, interpret: bool):
    """Returns the gradient with respect to the queries, [B, T, N, H]."""
    batch, length, heads, head_dim = q.shape
    group = heads // k.shape[2]
    count, indices = list_blocks(mask.find_visible_blocks(blocks.queries, blocks.keys))
    mask, mask_specs = _mask_arrays(mask)
    block_spec = pl.BlockSpec((None, blocks.queries, None, head_dim), lambda i, n, b: (b, i, n, 0))
    row_spec = pl.BlockSpec((None, length, None, head_dim), lambda i, n, b: (b, 0, n // group, 0))
    statistic = pl.BlockSpec((None, None, blocks.queries), lambda i, n, b: (b, n, i))
    return pl.pallas_call(
        functools.partial(pallas_gpu_kernels.dq_kernel, blocks=blocks, **_settings(head_dim, cap)),
        grid=(length // blocks.queries, heads, batch),
        in_specs=[
            *_list_specs(indices),
            mask_specs,
            *(block_spec, row_spec, row_spec, block_spec, statistic, statistic),
        ],
        out_specs=block_spec,
        out_shape=jax.ShapeDtypeStruct(q.shape, q.dtype),
        compiler_params=triton.CompilerParams(num_warps=blocks.warps, num_stages=blocks.stages),
        interpret=interpret,
        name="attention_dq",
    )(count, indices, mask, q, k, v, d_output, lse, delta)


def _dkv(mask, q, k, v, d_output, lse, delta, cap, blocks: Blocks, interpret: bool):
    """Returns the gradients with respect to keys and values, both [B, T, K, H]."""
    batch, length, heads, head_dim = q.shape
    kv_heads = k.shape[2]
    group = heads // kv_heads
    if mask.window is None:
        # The queries that see a key are the tokens from it to its subtree's end: their blocks have no gaps.
        end = jnp.max(mask.subtree_end.reshape(batch, -1, blocks.keys), axis=2)
        stop, indices = (end + blocks.queries - 1) // blocks.queries, None  # [B, J]
    else:
        stop, indices = list_blocks(mask.find_visible_blocks(blocks.queries, blocks.keys).swapaxes(1, 2))
    mask, mask_specs = _mask_arrays(mask)
    block_spec = pl.BlockSpec((None, blocks.keys, None, head_dim), lambda j, n, b: (b, j, n, 0))
    row_spec = pl.BlockSpec((None, length, group, head_dim), lambda j, n, b: (b, 0, n, 0))
    statistic = pl.BlockSpec((None, group, length), lambda j, n, b: (b, n, 0))
    return pl.pallas_call(
        functools.partial(pallas_gpu_kernels.dkv_kernel, blocks=blocks, **_settings(head_dim, cap)),
        grid=(length // blocks.keys, kv_heads, batch),
        in_specs=[
            *_list_specs(indices),
            mask_specs,
            *(row_spec, block_spec, block_spec, row_spec, statistic, statistic),
        ],
        out_specs=[block_spec, block_spec],
        out_shape=[jax.ShapeDtypeStruct(k.shape, k.dtype), jax.ShapeDtypeStruct(v.shape, v.dtype)],
        compiler_params=triton.CompilerParams(num_warps=blocks.warps, num_stages=blocks.stages),
        interpret=interpret,
        name="attention_dkv",
    )(stop, indices, mask, q, k, v, d_output, lse, delta)


def _settings(head_dim: int, cap: float | None) -> dict[str, Any]:
    """Returns the factor of the products that gives scores in base 2, and the cap of those scores."""
    return {"factor": head_dim**-0.5 * _LOG2_E, "cap": None if cap is None else cap * _LOG2_E}


def _sink_scores(sinks: Float[Array, "N"]) -> Float[Array, "N"]:
    return sinks.astype(jnp.float32) * _LOG2_E


def _list_specs(indices) -> list[pl.BlockSpec | None]:
    """Returns the specs of what `list_blocks` returns, of which there may be no indices."""
    count = pl.BlockSpec((None, None), lambda i, n, b: (b, i))
    return [count, None if indices is None else pl.BlockSpec((None, None, indices.shape[2]), lambda i, n, b: (b, i, 0))]


def _mask_arrays(mask: Mask) -> tuple[Mask, Mask]:
    """Returns (the arrays of the mask that a kernel reads, their specs)."""
    row = pl.BlockSpec((None, mask.subtree_end.shape[1]), lambda i, n, b: (b, 0))
    one = pl.BlockSpec((None,), lambda i, n, b: (0,))
    if mask.window is None:
        mask = Mask(mask.subtree_end)
    else:
        mask = mask._replace(window=jnp.asarray(mask.window, jnp.int32).reshape(1))
    return mask, jax.tree.map(lambda array: one if array.ndim == 1 else row, mask)
