"""Rotary positions: how queries and keys are turned by where they stand in their own context."""

import dataclasses
import math

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from dialog_jax.errors import UserError


@dataclasses.dataclass(frozen=True, kw_only=True)
class Llama3Scaling:
    """How Llama 3.1 stretches RoPE: slow rotations by `factor`, fast ones not, those between by a mixture.

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
    """Radians a position, one for each of the `head_dim / 2` rotated pairs, fastest first."""
    frequency = 1.0 / theta ** (np.arange(0, head_dim, 2, dtype=np.float64) / head_dim)
    if scaling is not None:
        rotations = scaling.original_max_length * frequency / (2 * math.pi)
        low, high = scaling.low_frequency_factor, scaling.high_frequency_factor
        kept = np.clip((rotations - low) / (high - low), 0.0, 1.0)
        frequency = frequency * (kept + (1.0 - kept) / scaling.factor)
    return frequency.astype(np.float32)


def rotation(
    position: Int[Array, "B T"], frequency: Float[np.ndarray, "P"]
) -> tuple[Float[Array, "B T P"], Float[Array, "B T P"]]:
    """Cosine and sine, float32, of every token's angles."""
    angle = position.astype(jnp.float32)[:, :, None] * jnp.asarray(frequency)[None, None, :]
    return jnp.cos(angle), jnp.sin(angle)


def rotate(
    x: Float[Array, "B T N H"], cosine: Float[Array, "B T P"], sine: Float[Array, "B T P"]
) -> Float[Array, "B T N H"]:
    """`x` turned by its position. Component i is paired with component i + H/2, as in Hugging Face's checkpoints."""
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    cosine, sine = cosine[:, :, None, :], sine[:, :, None, :]
    return jnp.concatenate([first * cosine - second * sine, second * cosine + first * sine], axis=-1).astype(x.dtype)
