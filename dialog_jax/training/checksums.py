"""Checksums of arrays, computed where the arrays live: the same on any mesh, another if any bit differs."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from jaxtyping import Array, UInt32


def compute_checksums(tree: Any) -> dict[str, int]:
    """Returns {path: checksum of the array}. It depends on every bit of the array and not on its layout over devices.

    Leaves that are `orbax.checkpoint.PLACEHOLDER` have none. All processes call it together. Source: the finalizer of
    MurmurHash3 (Appleby, public domain) of each word mixed with its index, summed modulo 2**32, so that the order of
    summation does not matter.
    """
    leaves = [entry for entry in jax.tree_util.tree_leaves_with_path(tree) if entry[1] is not ocp.PLACEHOLDER]
    sums = _checksums([leaf for _, leaf in leaves])
    return {jax.tree_util.keystr(path): int(value) for (path, _), value in zip(leaves, sums, strict=True)}


@jax.jit
def _checksums(arrays: Sequence[Array]) -> list[UInt32[Array, ""]]:
    return [_checksum(array) for array in arrays]


def _checksum(array: Array) -> UInt32[Array, ""]:
    if array.dtype.itemsize < 4:
        array = jax.lax.bitcast_convert_type(array, f"uint{8 * array.dtype.itemsize}").astype(jnp.uint32)
    assert array.dtype.itemsize == 4, array.dtype
    index, stride = jnp.zeros(array.shape, jnp.uint32), 1
    for axis in reversed(range(array.ndim)):
        index += jax.lax.broadcasted_iota(jnp.uint32, array.shape, axis) * np.uint32(stride % 2**32)
        stride *= array.shape[axis]
    word = jax.lax.bitcast_convert_type(array, jnp.uint32) ^ (index * np.uint32(0x9E3779B9))
    word = (word ^ (word >> 16)) * np.uint32(0x85EBCA6B)
    word = (word ^ (word >> 13)) * np.uint32(0xC2B2AE35)
    return jnp.sum(word ^ (word >> 16), dtype=jnp.uint32)
