"""Frozen matrices in 8 or 4 bits: quantized as they are loaded, dequantized where the decoder multiplies by them.

A quantized matrix is a dict of arrays. Its codes have the axes of the matrix, so that they are divided over devices as
the matrix would be; leading axes, such as that of layers, stay. With blocks of 64 inputs and groups of 256 outputs,
whose last ones may be shorter:

    int8   "int8_codes"     int8 [in, out]
           "int8_scale"     float32 [1, out]                          weight = code * scale
    nf4    "nf4_codes"      uint8 [in / 2, out]                       two inputs in a byte, the first in its high bits
           "scale_codes"    uint8 [in / 64, out]
           "scale_minimum"  float32 [in / 64, out / 256]
           "scale_step"     float32 [in / 64, out / 256]              weight = level[code] * (minimum + code * step)

Source: Dettmers et al. 2023 (QLoRA, arXiv 2305.14314), sections 2 and 3 and appendix E; blocks and groups are those of
bitsandbytes. Differs in the second quantization: 8-bit integers between the least and the largest scale of a group, not
8-bit floats around the mean of all scales, and a group is of one block of inputs.
"""

import concurrent.futures
import functools
import math
import os
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32, UInt8

KINDS = ("int8", "nf4")
CODES = ("int8_codes", "nf4_codes", "scale_codes")
"""The arrays that have the axes of the matrix."""
ARRAYS = (*CODES, "int8_scale", "scale_minimum", "scale_step")

BLOCK, GROUP = 64, 256
# fmt: off
LEVELS = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)
# fmt: on

QuantizedMatrix = Mapping[str, Any]


class RoundingError(NamedTuple):
    """What quantization changed of a matrix."""

    squared_error: float
    """Sum over its weights."""
    squared_norm: float
    """Of the weights before."""

    @property
    def relative(self) -> float:
        """Root mean square of the error divided by that of the weights; 0 for a matrix of zeros."""
        return math.sqrt(self.squared_error / self.squared_norm) if self.squared_norm else 0.0


def is_quantized(matrix: Any) -> bool:
    """Returns whether a matrix is a dict of this module."""
    return isinstance(matrix, Mapping) and bool({"int8_codes", "nf4_codes"} & matrix.keys())


def find_kind(matrix: QuantizedMatrix) -> str:
    """Returns the kind of a quantized matrix."""
    return "int8" if "int8_codes" in matrix else "nf4"


def quantize(kind: str, matrix: np.ndarray) -> tuple[dict[str, np.ndarray], RoundingError]:
    """Returns (a matrix [in, out] as a dict of codes and scales, what that changes). On the host, in all its threads.

    One column of four inputs in int8, and in NF4, where its largest weight is the scale and the code of 0 is 7:

        [1, -2, 0.5, 0]  ->  int8_codes [64, -127, 32, 0], int8_scale [2 / 127]
        [1, -2, 0.5, 0]  ->  nf4_codes [(12, 0), (10, 7)] in two bytes, scale_codes [0], minimum [2], step [0]

    The error is not finite if a weight is not.
    """
    assert kind in KINDS, kind

    def quantize_group(start: int) -> tuple[dict[str, np.ndarray], RoundingError]:
        group = np.ascontiguousarray(matrix[:, start : start + GROUP], np.float32)
        with np.errstate(invalid="ignore"):
            return _quantize_int8(group) if kind == "int8" else _quantize_nf4(group)

    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        quantized = list(pool.map(quantize_group, range(0, matrix.shape[1], GROUP)))
    arrays = {name: np.concatenate([part[name] for part, _ in quantized], axis=-1) for name in quantized[0][0]}
    return arrays, add_errors(error for _, error in quantized)


def dequantize(matrix: QuantizedMatrix, inputs: int, dtype: jax.typing.DTypeLike) -> Float[Array, "*L in out"]:
    """Returns the matrix as one array.

    Args:
      inputs: size of its input axis; half the number of bytes cannot say whether it is odd.
    """
    if find_kind(matrix) == "int8":
        return (matrix["int8_codes"].astype(jnp.float32) * matrix["int8_scale"]).astype(dtype)
    codes, scale = matrix["nf4_codes"], _dequantize_scale(matrix)  # [*L, in / 2, out], [*L, in / 64, out]
    *lead, blocks, outputs = scale.shape
    if missing := blocks * BLOCK // 2 - codes.shape[-2]:
        codes = jnp.pad(codes, [(0, 0)] * len(lead) + [(0, missing), (0, 0)])
    pairs = codes.reshape(*lead, blocks, BLOCK // 2, 1, outputs)
    shift = jnp.array([4, 0], jnp.uint8).reshape(*[1] * (pairs.ndim - 2), 2, 1)  # of the first and the second input
    levels = _look_up_level((pairs >> shift) & 15)  # [*L, in / 64, 32, 2, out]
    weights = levels * jnp.expand_dims(scale, (-2, -3))
    return weights.reshape(*lead, blocks * BLOCK, outputs)[..., :inputs, :].astype(dtype)


def multiply(x: Float[Array, "N in"], matrix: QuantizedMatrix) -> Float[Array, "N out"]:
    """Returns `x @ matrix` in the type of `x`. The matrix has no gradient.

    The backward pass keeps the codes and dequantizes them again, whatever the remat policy.
    """
    return _multiply(x.shape[-1], x, dict(matrix))


def abstract_quantized(kind: str, shape: tuple[int, ...]) -> dict[str, jax.ShapeDtypeStruct]:
    """Returns the arrays of a quantized matrix of `shape`, [*L, in, out], as `jax.ShapeDtypeStruct`."""
    *lead, inputs, outputs = shape
    blocks, groups = -(-inputs // BLOCK), -(-outputs // GROUP)
    shapes = {
        "int8": {"int8_codes": (inputs, outputs, jnp.int8), "int8_scale": (1, outputs, jnp.float32)},
        "nf4": {
            "nf4_codes": (-(-inputs // 2), outputs, jnp.uint8),
            "scale_codes": (blocks, outputs, jnp.uint8),
            "scale_minimum": (blocks, groups, jnp.float32),
            "scale_step": (blocks, groups, jnp.float32),
        },
    }
    return {name: jax.ShapeDtypeStruct((*lead, *sizes), dtype) for name, (*sizes, dtype) in shapes[kind].items()}


def add_errors(errors: Iterable[RoundingError]) -> RoundingError:
    """Returns the error of several matrices together."""
    squared_errors, squared_norms = zip(*errors, strict=True)
    return RoundingError(sum(squared_errors), sum(squared_norms))


def describe_errors(kind: str, errors: Mapping[str, RoundingError]) -> str:
    """Returns a line that says how far the quantized matrices are from float32; `errors` are by name."""
    total = add_errors(errors.values())
    worst = max(errors, key=lambda name: errors[name].relative)
    return (
        f"quantized to {kind}: {len(errors):,} matrices, relative error {total.relative:.3%} (root mean square); "
        f"the largest is {errors[worst].relative:.3%}, of {worst}"
    )


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _multiply(inputs: int, x: Float[Array, "N in"], matrix: dict[str, Array]) -> Float[Array, "N out"]:
    return x @ dequantize(matrix, inputs, x.dtype)


def _multiply_forward(inputs, x, matrix):
    return _multiply(inputs, x, matrix), matrix


def _multiply_backward(inputs, matrix, dy):
    return dy @ dequantize(matrix, inputs, dy.dtype).T, None


_multiply.defvjp(_multiply_forward, _multiply_backward)


def _quantize_int8(matrix: Float32[np.ndarray, "in out"]) -> tuple[dict[str, np.ndarray], RoundingError]:
    scale = np.abs(matrix).max(axis=0, keepdims=True) / np.float32(127)
    codes = np.rint(matrix / np.where(scale > 0, scale, 1))
    error = _measure_error(codes * scale, matrix)
    return {"int8_codes": codes.astype(np.int8), "int8_scale": scale}, error


def _quantize_nf4(matrix: Float32[np.ndarray, "in out"]) -> tuple[dict[str, np.ndarray], RoundingError]:
    """Returns the arrays of one group of outputs, and their error."""
    inputs, outputs = matrix.shape
    blocks = np.pad(matrix, ((0, -inputs % BLOCK), (0, 0))).reshape(-1, BLOCK, outputs)
    scale = np.abs(blocks).max(axis=1, keepdims=True)
    codes = np.zeros(blocks.shape, np.uint8)
    # Compared with multiples of the scale, not divided by it: a block of zeros needs no exception.
    for middle in np.convolve(LEVELS, [0.5, 0.5], "valid").astype(np.float32):
        codes += blocks > middle * scale
    pairs = codes.reshape(-1, 2, outputs)
    packed = (pairs[:, 0] << 4 | pairs[:, 1])[: -(-inputs // 2)]
    minimum = scale.min(axis=2)  # [in / 64, 1]
    step = (scale.max(axis=2) - minimum) / np.float32(255)
    scale_codes = np.rint((scale[:, 0] - minimum) / np.where(step > 0, step, 1))
    arrays = {
        "nf4_codes": packed,
        "scale_codes": scale_codes.astype(np.uint8),
        "scale_minimum": minimum,
        "scale_step": step,
    }
    weights = np.array(LEVELS, np.float32)[codes] * np.expand_dims(minimum + scale_codes * step, 1)
    return arrays, _measure_error(weights.reshape(-1, outputs)[:inputs], matrix)


def _measure_error(weights: Float32[np.ndarray, "in out"], matrix: Float32[np.ndarray, "in out"]) -> RoundingError:
    difference = weights - matrix
    return RoundingError(float(np.vdot(difference, difference)), float(np.vdot(matrix, matrix)))


def _dequantize_scale(matrix: QuantizedMatrix) -> Float[Array, "*L blocks out"]:
    codes = matrix["scale_codes"]
    outputs = codes.shape[-1]
    minimum, step = (
        jnp.repeat(matrix[name], GROUP, axis=-1)[..., :outputs] for name in ("scale_minimum", "scale_step")
    )
    return minimum + codes.astype(jnp.float32) * step


def _look_up_level(codes: UInt8[Array, "..."]) -> Float[Array, "..."]:
    # A tree of selects is as fast on a CPU, but XLA does not fuse it: it needs nine times the memory of the matrix.
    return jnp.array(LEVELS, jnp.float32).at[codes].get(mode="promise_in_bounds")
