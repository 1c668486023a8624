"""Attention on TPUs for plain packed rows, by the splash attention kernels that come with JAX.

In: queries, keys and values of packed rows whose trees are all paths, and their `subtree_end`. Out: what each query
reads. On a path every token is seen up to the path's end, so two tokens are of one path if and only if their
`subtree_end` is equal: it serves as the segment id. Of the blocks on and under the diagonal, those that no pair of one
path meets are switched off row by row.

Not for trees: the kernels know a mask as an array [T, T], or as a function of the two places and one number of the
query; the ancestor mask needs one of the key.

Never run on hardware yet. What was seen: equal to float64 in Pallas' interpreter, and compiled by libtpu 0.0.48 for a
TPU v5e, bfloat16 and float32, heads of 64 and 128.
"""

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu import splash_attention
from jaxtyping import Array, Float, Int

from dialog_jax.attention import padding

LARGEST_BLOCK = 512
_SMALLEST_BLOCK = 128


def attend(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B T K H"],
    v: Float[Array, "B T K H"],
    subtree_end: Int[Array, "B T"],
    *,
    largest_block: int = LARGEST_BLOCK,
    interpret: bool = False,
) -> Float[Array, "B T N H"]:
    """What each query reads of its path up to itself, in the type of `q`. Wrong where a tree of a row branches.

    Args:
      largest_block: tokens of a block of rows that have as many; of shorter ones 128.
      interpret: run in Pallas' interpreter, on any device, slowly.
    """
    length, heads, head_dim = q.shape[1:]
    block = block_of(length, largest_block)
    q, k, v, subtree_end = padding.to_multiple(block, q, k, v, subtree_end)
    kernel = _kernel(q.shape[1], heads, block, interpret)

    def of_row(q, k, v, subtree_end):  # [N, T, H], [K, T, H], [K, T, H], [T]
        segments = splash_attention.SegmentIds(q=subtree_end, kv=subtree_end)
        return _without(kernel, _apart(subtree_end, block))(q, k, v, segment_ids=segments)

    q, k, v = (x.transpose(0, 2, 1, 3) for x in (q * head_dim**-0.5, k, v))
    return jax.vmap(of_row)(q, k, v, subtree_end).transpose(0, 2, 1, 3)[:, :length]


def block_of(length: int, largest_block: int = LARGEST_BLOCK) -> int:
    """Tokens of a block of rows of `length` tokens."""
    return largest_block if length >= largest_block else _SMALLEST_BLOCK


def _kernel(length: int, heads: int, block: int, interpret: bool):
    """The causal kernels; `block` is the size of all their blocks."""
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
        mask, block_sizes=sizes, residual_checkpoint_name="read", interpret=interpret
    )


def _apart(subtree_end: Int[Array, "T"], block: int) -> Array:
    """[I, J], true where no query of block I sees a key of block J: all of J's paths end before I begins."""
    end = jnp.max(subtree_end.reshape(-1, block), axis=1)
    return end[None, :] <= jnp.arange(0, subtree_end.size, block)[:, None]


def _without(kernel, apart: Array):
    """The kernel without the blocks that are `apart`: 0 in its block mask means that there is nothing to do."""

    def switched_off(mask):
        return mask._replace(block_mask=jnp.where(apart[None], jnp.zeros_like(mask.block_mask), mask.block_mask))

    masks, settings = kernel.tree_flatten()
    return type(kernel).tree_unflatten(settings, tuple(map(switched_off, masks)))
