"""Microscaling 4-bit floats, in which gpt-oss publishes its experts: blocks and scales to bfloat16, exactly.

Source: OCP Microscaling Formats specification 1.0, E2M1 elements with E8M0 scales of 32 of them; two elements are in a
byte, the first in its low bits, as in transformers 5.24 (integrations/mxfp4.py).
"""

import ml_dtypes
import numpy as np
from jaxtyping import UInt8

BLOCKS, SCALES = "_blocks", "_scales"  # ends of the names of tensors
_LEVELS = np.array([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0], np.float32)
_BY_CODE = np.concatenate([_LEVELS, -_LEVELS])


def find_shape(blocks: tuple[int, ...]) -> tuple[int, int, int]:
    """Returns the shape [E, in, out] of matrices with blocks of shape [E, out, in / 32, 16]."""
    experts, outputs, count, size = blocks
    return (experts, count * size * 2, outputs)


def decode(blocks: UInt8[np.ndarray, "E out G 16"], scales: UInt8[np.ndarray, "E out G"]) -> np.ndarray:
    """Returns the matrices [E, in, out], bfloat16.

    One byte with the codes 2 and 15, whose scale is 128:  0xF2  ->  [1.0 * 2, -6.0 * 2]
    """
    matrices = np.empty(find_shape(blocks.shape), ml_dtypes.bfloat16)
    for matrix, own_blocks, own_scales in zip(matrices, blocks, scales, strict=True):
        codes = np.stack([own_blocks & 15, own_blocks >> 4], axis=-1)  # [out, G, 16, 2]
        exponents = own_scales.astype(np.int32)[..., None, None] - 127
        matrix[...] = np.ldexp(_BY_CODE[codes], exponents).reshape(len(own_blocks), -1).T
    return matrices
