"""What a weight matrix may be, and how the decoder multiplies by it.

A matrix is an array, or quantized (see `model.quantization`); with LoRA, a dict of the frozen matrix and its low-rank
update. All are stacked on a leading axis L where the matrix belongs to a layer, and scanned with the layer:

    {"weight": [in, out], "lora_a": [in, r], "lora_b": [r, out], "lora_scale": [r]}

    x @ matrix = x @ weight + ((x @ lora_a) * lora_scale) @ lora_b

`lora_scale` is frozen: alpha / rank, and 0 in the columns beyond the rank of a layer that has a smaller one. Weight and
factors of experts have an axis E before the last two, and `model.experts` multiplies by them. With dropout there are
also `dropout_key` and `dropout_rate`, of the input of `lora_a`. Knows no names and no files.

Source: Hu et al. 2021 (LoRA, arXiv 2106.09685), equation 3.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from dialog_jax.model import quantization

PRODUCT = "product"  # checkpoint name of the products with weights

Matrix = Array | Mapping[str, Any]


def multiply(x: Float[Array, "N in"], matrix: Matrix) -> Float[Array, "N out"]:
    """Returns `x @ matrix` in the type of `x`."""
    if not isinstance(matrix, Mapping):
        return x @ matrix.astype(x.dtype)
    if quantization.is_quantized(matrix):
        return quantization.multiply(x, matrix)
    y = multiply(x, matrix["weight"])
    return y + _update(_drop_out(x, matrix), matrix)


def look_up(matrix: Matrix, tokens: Int[Array, "B T"], dtype: jax.typing.DTypeLike) -> Float[Array, "B T D"]:
    """Returns the rows of an embedding [V, D] that belong to `tokens`; its `lora_a` is [V, r], `lora_b` [r, D]."""
    if not isinstance(matrix, Mapping):
        return matrix[tokens].astype(dtype)
    rows = look_up(matrix["weight"], tokens, dtype)
    low = look_up(matrix["lora_a"], tokens, dtype) * _broadcast(matrix["lora_scale"], tokens.ndim, dtype)
    return rows + low @ matrix["lora_b"].astype(dtype)


def add_update(weight: Float[Array, "*LE in out"], factors: Mapping[str, Array]) -> Float[Array, "*LE in out"]:
    """Returns the weight with its low-rank update added, in float32: the matrix as one array.

    Args:
      factors: `lora_a`, `lora_b` and `lora_scale`, stacked as the weight is; the scale has no axis of experts.
    """
    a, b, scale = (factors[name].astype(jnp.float32) for name in ("lora_a", "lora_b", "lora_scale"))
    return weight.astype(jnp.float32) + (a * align_scale(scale, a.ndim)) @ b


def align_scale(scale: Float[Array, "*L r"], axes: int) -> Float[Array, "..."]:
    """Returns the scale with axes of size 1 before its last, as many as it lacks to have `axes`."""
    return jnp.expand_dims(scale, tuple(range(scale.ndim - 1, axes - 1)))


def _update(x: Float[Array, "N in"], factors: Mapping[str, Array]) -> Float[Array, "N out"]:
    low = _multiply_narrow(x, factors["lora_a"].astype(x.dtype))  # [N, r]
    return (low * _broadcast(factors["lora_scale"], 1, x.dtype)) @ factors["lora_b"].astype(x.dtype)


@jax.custom_vjp
def _multiply_narrow(x: Float[Array, "N in"], a: Float[Array, "in r"]) -> Float[Array, "N r"]:
    """Returns `x @ a`; the gradient of `a` is computed as [r, in], five times as fast on a CPU as [in, r]."""
    return x @ a


def _differentiate_narrow(inputs: tuple[Array, Array], gradient: Float[Array, "N r"]) -> tuple[Array, Array]:
    x, a = inputs
    # Without the barrier XLA turns the product around again.
    transposed = jax.lax.optimization_barrier(gradient.T @ x)
    return gradient @ a.T, transposed.T


_multiply_narrow.defvjp(lambda x, a: (x @ a, (x, a)), _differentiate_narrow)


def _broadcast(scale: Float[Array, "r"], axes: int, dtype: jax.typing.DTypeLike) -> Array:
    return jnp.expand_dims(scale.astype(dtype), range(axes))


def _drop_out(x: Float[Array, "N in"], matrix: Mapping[str, Array]) -> Float[Array, "N in"]:
    """Returns `x` with each number 0 with probability `dropout_rate`, otherwise divided by 1 - `dropout_rate`."""
    if "dropout_key" not in matrix:
        return x
    kept = 1 - matrix["dropout_rate"]
    mask = jax.random.bernoulli(matrix["dropout_key"], kept, x.shape)
    return jnp.where(mask, x / kept.astype(x.dtype), jnp.zeros_like(x))
