"""Attention on TPUs for packed rows whose trees are all paths, by the splash attention kernels that come with JAX.

In: queries, keys and values of such rows, their mask, and what the model adds (a cap, sinks). Out: the attention
output. Every token of a path is visible up to the path's end, so two tokens are on one path if and only if their
`subtree_end` is equal: it serves as the segment id. Blocks on and below the diagonal in which no query sees a key,
because they are on other paths or beyond the window, are disabled row by row; they are read and not computed.

These kernels take a mask as an array [T, T], or as a function of both indices and one number per query. The ancestor
mask of trees needs one number per key, so it cannot be expressed. A window that may differ from layer to layer can: the
number holds the query's index and the window, which limits rows with windows to `LONGEST_WINDOWED_ROW` tokens. On a
path, indices are as far apart as positions.

Not yet run on hardware. Checked so far: equal to float64 in Pallas' interpreter, and compiled by libtpu 0.0.42.1 for a
TPU v5e, with and without windows, caps and sinks, bfloat16 and float32, with head dimensions 64, 128 and 256.
"""

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu import splash_attention
from jaxtyping import Array, Bool, Float, Int

from dialog_jax.attention import blockwise
from dialog_jax.attention.mask import Mask

LARGEST_BLOCK = 512
LONGEST_WINDOWED_ROW = 2**16
_SMALLEST_BLOCK = 128
_HALF = 16  # bits of a query's number: index in the upper half, window - 1 in the lower


def attend(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B T K H"],
    v: Float[Array, "B T K H"],
    mask: Mask,
    sinks: Float[Array, "N"] | None = None,
    *,
    cap: float | None = None,
    largest_block: int = LARGEST_BLOCK,
    interpret: bool = False,
) -> Float[Array, "B T N H"]:
    """Returns the attention output of each query over the keys that it sees on its path, in the type of `q`.

    Wrong for a row in which a tree branches.

    Args:
      sinks: see `attention.blockwise`, as for `cap`.
      largest_block: tokens per block of rows that are at least as long; shorter rows have blocks of 128.
      interpret: run in Pallas' interpreter, on any device, slowly.

    Raises:
      NotImplementedError: there is a window, and rows are longer than `LONGEST_WINDOWED_ROW`.
    """
    length, heads, head_dim = q.shape[1:]
    block = block_length(length, largest_block)
    q, k, v = (blockwise.pad_to_multiple(block, x) for x in (q, k, v))
    if mask.window is not None and q.shape[1] > LONGEST_WINDOWED_ROW:
        raise NotImplementedError(f"rows have {q.shape[1]} tokens; with windows, {LONGEST_WINDOWED_ROW} at most")
    subtree_end = mask.pad_to_multiple(block).subtree_end
    kernel = _make_kernel(q.shape[1], heads, block, cap, interpret)
    if mask.window is not None:
        kernel = _add_window(kernel, mask.window, q.shape[1])

    def attend_row(q, k, v, subtree_end):  # [N, T, H], [K, T, H], [K, T, H], [T]
        segments = splash_attention.SegmentIds(q=subtree_end, kv=subtree_end)
        disabled = _invisible_blocks(subtree_end, mask.window, block)
        return _disable_blocks(kernel, disabled)(q, k, v, segment_ids=segments, sinks=sinks)

    q, k, v = (x.transpose(0, 2, 1, 3) for x in (q * head_dim**-0.5, k, v))
    return jax.vmap(attend_row)(q, k, v, subtree_end).transpose(0, 2, 1, 3)[:, :length]


def block_length(length: int, largest_block: int = LARGEST_BLOCK) -> int:
    """Returns the tokens per block for rows of `length` tokens."""
    return largest_block if length >= largest_block else _SMALLEST_BLOCK


def _make_kernel(length: int, heads: int, block: int, cap: float | None, interpret: bool):
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
        mask,
        block_sizes=sizes,
        attn_logits_soft_cap=cap,
        residual_checkpoint_name=blockwise.OUTPUT,
        interpret=interpret,
    )


def _add_window(kernel, window: int | Array, length: int):
    """Returns the kernel for queries that see themselves and the `window` - 1 keys before."""
    furthest = jnp.clip(jnp.asarray(window, jnp.int32), 1, length) - 1

    def add(mask):
        return mask._replace(q_sequence=(mask.q_sequence << _HALF) | furthest)

    masks, settings = kernel.tree_flatten()
    return type(kernel).tree_unflatten({**settings, "mask_function": _is_visible}, tuple(map(add, masks)))


def _is_visible(number: Int[Array, "I J"], key: Int[Array, "I J"]) -> Bool[Array, "I J"]:
    """Returns which keys a query of this number (see `_add_window`) sees."""
    query = jax.lax.shift_right_logical(number, jnp.full_like(number, _HALF))
    return (key <= query) & (query - key <= (number & (2**_HALF - 1)))


def _invisible_blocks(subtree_end: Int[Array, "T"], window: int | Array | None, block: int) -> Bool[Array, "I J"]:
    """Returns true where no query of block I sees a key of block J: all paths of J end before I begins, or are too far.

    Blocks of 2 tokens, two paths of 3 (subtree_end 3 3 3 6 6 6): only I = 2, J = 0 is true, with a window of 1 also
    I = 1, J = 0 and I = 2, J = 1.
    """
    first_query = jnp.arange(0, subtree_end.size, block)[:, None]
    first_key = first_query.T
    invisible = jnp.max(subtree_end.reshape(-1, block), axis=1)[None, :] <= first_query
    return invisible if window is None else invisible | (first_query - (first_key + block - 1) >= window)


def _disable_blocks(kernel, disabled: Array):
    """Returns the kernel without the `disabled` blocks: 0 in its block mask means that there is nothing to compute."""

    def disable(mask):
        return mask._replace(block_mask=jnp.where(disabled[None], jnp.zeros_like(mask.block_mask), mask.block_mask))

    masks, settings = kernel.tree_flatten()
    return type(kernel).tree_unflatten(settings, tuple(map(disable, masks)))
