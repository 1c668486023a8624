"""Rotary position embeddings (RoPE): queries and keys rotated by their position in their own context.

In: a base and an optional scaling, positions, queries or keys. Out: the same, rotated. Knows no model.
"""

import dataclasses
import math

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from dialog_jax.errors import UserError


@dataclasses.dataclass(frozen=True, kw_only=True)
class Llama3Scaling:
    """Llama 3.1's scaling of RoPE: low frequencies are divided by `factor`, high ones kept, those between interpolated.

    Source: the Llama 3.1 reference implementation, as in Hugging Face transformers' `rope_type: llama3`.
    """

    factor: float
    low_frequency_factor: float
    high_frequency_factor: float
    original_max_length: int

    def __post_init__(self):
        if not (self.factor >= 1 and 0 < self.low_frequency_factor < self.high_frequency_factor):
            raise UserError(
                f"rope scaling needs factor >= 1 and 0 < low_frequency_factor < high_frequency_factor, got {self}"
            )
        if self.original_max_length < 1:
            raise UserError(f"rope scaling needs original_max_length >= 1, got {self.original_max_length}")


def rotary_frequencies(head_dim: int, theta: float, scaling: Llama3Scaling | None) -> np.ndarray:
    """Returns radians per position for each of the `head_dim / 2` rotated pairs, highest frequency first.

    With head_dim 4 and theta 10000: [1, 0.01].
    """
    frequency = 1.0 / theta ** (np.arange(0, head_dim, 2, dtype=np.float64) / head_dim)
    if scaling is not None:
        rotations = scaling.original_max_length * frequency / (2 * math.pi)
        low, high = scaling.low_frequency_factor, scaling.high_frequency_factor
        unscaled = np.clip((rotations - low) / (high - low), 0.0, 1.0)
        frequency = frequency * (unscaled + (1.0 - unscaled) / scaling.factor)
    return frequency.astype(np.float32)


def rotation(
    position: Int[Array, "B T"], frequency: Float[np.ndarray, "P"]
) -> tuple[Float[Array, "B T P"], Float[Array, "B T P"]]:
    """Returns cosine and sine, float32, of every token's angles."""
    angle = position.astype(jnp.float32)[:, :, None] * jnp.asarray(frequency)[None, None, :]
    return jnp.cos(angle), jnp.sin(angle)


def rotate(
    x: Float[Array, "B T N H"], cosine: Float[Array, "B T P"], sine: Float[Array, "B T P"]
) -> Float[Array, "B T N H"]:
    """Returns `x` rotated by its position. Component i is paired with i + H/2, as in Hugging Face's checkpoints.

    With H = 2, the angle 90 degrees (cosine 0, sine 1) maps [3, 4] to [-4, 3].
    """
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    cosine, sine = cosine[:, :, None, :], sine[:, :, None, :]
    return jnp.concatenate([first * cosine - second * sine, second * cosine + first * sine], axis=-1).astype(x.dtype)
