"""Attention on TPUs for packed rows whose trees are all paths, by the splash attention kernels that come with JAX.

In: queries, keys and values of such rows, and their mask. Out: the attention output. Every token of a path is
visible up to the path's end, so two tokens are on one path if and only if their `subtree_end` is equal: it serves as
the segment id. Blocks on and below the diagonal in which no two tokens share a path are disabled row by row.

Not for trees: these kernels take a mask as an array [T, T], or as a function of both indices and one number per query;
the ancestor mask needs one per key.

Not yet run on hardware. Checked so far: equal to float64 in Pallas' interpreter, and compiled by libtpu 0.0.48 for a
TPU v5e, bfloat16 and float32, with head dimensions 64 and 128.
"""

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu import splash_attention
from jaxtyping import Array, Float, Int

from dialog_jax.attention import blockwise
from dialog_jax.attention.mask import Mask

LARGEST_BLOCK = 512
_SMALLEST_BLOCK = 128


def attend(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B T K H"],
    v: Float[Array, "B T K H"],
    mask: Mask,
    *,
    largest_block: int = LARGEST_BLOCK,
    interpret: bool = False,
) -> Float[Array, "B T N H"]:
    """Returns the attention output of each query over its path up to itself, in the type of `q`.

    Wrong for a row in which a tree branches, and for windows.

    Args:
      largest_block: tokens per block of rows that are at least as long; shorter rows have blocks of 128.
      interpret: run in Pallas' interpreter, on any device, slowly.
    """
    length, heads, head_dim = q.shape[1:]
    block = block_length(length, largest_block)
    q, k, v = (blockwise.pad_to_multiple(block, x) for x in (q, k, v))
    subtree_end = mask.pad_to_multiple(block).subtree_end
    kernel = _make_kernel(q.shape[1], heads, block, interpret)

    def attend_row(q, k, v, subtree_end):  # [N, T, H], [K, T, H], [K, T, H], [T]
        segments = splash_attention.SegmentIds(q=subtree_end, kv=subtree_end)
        return _disable_blocks(kernel, _disjoint_blocks(subtree_end, block))(q, k, v, segment_ids=segments)

    q, k, v = (x.transpose(0, 2, 1, 3) for x in (q * head_dim**-0.5, k, v))
    return jax.vmap(attend_row)(q, k, v, subtree_end).transpose(0, 2, 1, 3)[:, :length]


def block_length(length: int, largest_block: int = LARGEST_BLOCK) -> int:
    """Returns the tokens per block for rows of `length` tokens."""
    return largest_block if length >= largest_block else _SMALLEST_BLOCK


def _make_kernel(length: int, heads: int, block: int, interpret: bool):
    """Returns the causal kernels, all with blocks of `block` tokens."""
    sizes = splash_attention.BlockSizes(
        block_q=block,
        block_kv=block,
        block_kv_compute=block,
        block_q_dkv=block,
        block_kv_dkv=block,
        block_kv_dkv_compute=block,
        block_q_dq=block,
        block_kv_dq=block,
    )
    mask = splash_attention.MultiHeadMask([splash_attention.CausalMask((length, length))] * heads)
    return splash_attention.make_splash_mha_single_device(
        mask, block_sizes=sizes, residual_checkpoint_name=blockwise.OUTPUT, interpret=interpret
    )


def _disjoint_blocks(subtree_end: Int[Array, "T"], block: int) -> Array:
    """Returns [I, J], true where no query of block I sees a key of block J: all paths of J end before I begins.

    Blocks of 2 tokens, two paths of 3 (subtree_end 3 3 3 6 6 6): only I = 2, J = 0 is true.
    """
    end = jnp.max(subtree_end.reshape(-1, block), axis=1)
    return end[None, :] <= jnp.arange(0, subtree_end.size, block)[:, None]


def _disable_blocks(kernel, disjoint: Array):
    """Returns the kernel without the `disjoint` blocks: 0 in its block mask means that there is nothing to compute."""

    def disable(mask):
        return mask._replace(block_mask=jnp.where(disjoint[None], jnp.zeros_like(mask.block_mask), mask.block_mask))

    masks, settings = kernel.tree_flatten()
    return type(kernel).tree_unflatten(settings, tuple(map(disable, masks)))
