"""Rotary position embeddings (RoPE): queries and keys rotated by their position in their own context.

In: a base, an optional scaling, positions, queries or keys. Out: the same, rotated. Knows no model.

Sources: RoPE (arXiv 2104.09864); YaRN (arXiv 2309.00071, sections 3.2 and 3.4); LongRoPE (arXiv 2402.13753); all as
`modeling_rope_utils.py` of Hugging Face transformers computes them from a config.json.
"""

import dataclasses
import math

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from dialog_jax.errors import UserError


@dataclasses.dataclass(frozen=True, kw_only=True)
class LinearScaling:
    """All frequencies are divided by `factor`."""

    factor: float

    def __post_init__(self):
        _check_range("linear", "factor", self.factor >= 1, "at least 1", self.factor)

    def scale(self, frequency: np.ndarray, theta: float) -> np.ndarray:
        """Returns the frequencies that are used instead of `frequency`."""
        return frequency / self.factor


@dataclasses.dataclass(frozen=True, kw_only=True)
class DynamicScaling:
    """Changes nothing up to the model's `max_length`, which no row exceeds; `factor` says how far beyond it goes."""

    factor: float

    def scale(self, frequency: np.ndarray, theta: float) -> np.ndarray:
        """Returns the frequencies that are used instead of `frequency`."""
        return frequency


@dataclasses.dataclass(frozen=True, kw_only=True)
class Llama3Scaling:
    """Llama 3.1's: low frequencies are divided by `factor`, high ones kept, those between interpolated."""

    factor: float
    low_frequency_factor: float
    high_frequency_factor: float
    original_max_length: int

    def __post_init__(self):
        if not (self.factor >= 1 and 0 < self.low_frequency_factor < self.high_frequency_factor):
            raise UserError(
                f"rope scaling needs factor >= 1 and 0 < low_frequency_factor < high_frequency_factor, got {self}"
            )
        _check_range("llama3", "original_max_length", self.original_max_length >= 1, "1 or more", self)

    def scale(self, frequency: np.ndarray, theta: float) -> np.ndarray:
        """Returns the frequencies that are used instead of `frequency`."""
        rotations = self.original_max_length * frequency / (2 * math.pi)
        low, high = self.low_frequency_factor, self.high_frequency_factor
        kept = np.clip((rotations - low) / (high - low), 0.0, 1.0)
        return frequency * (kept + (1.0 - kept) / self.factor)


@dataclasses.dataclass(frozen=True, kw_only=True)
class YarnScaling:
    """YaRN's: pairs that rotate less than `beta_slow` times within the original length are divided by `factor`, those
    that rotate more than `beta_fast` times are kept, those between interpolated; cosine and sine are multiplied by a
    number that makes the softmax sharper."""

    factor: float
    original_max_length: int
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float | None = None
    """What cosine and sine are multiplied by; None for what the next two say."""
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool = True
    """Whether the bounds of the interpolation are rounded to whole pairs."""

    def __post_init__(self):
        _check_range("yarn", "factor", self.factor >= 1, "at least 1", self.factor)
        _check_range("yarn", "original_max_length", self.original_max_length >= 1, "1 or more", self)
        _check_range("yarn", "beta_slow", 0 < self.beta_slow < self.beta_fast, "between 0 and beta_fast", self)

    @property
    def amplitude(self) -> float:
        """What cosine and sine are multiplied by."""
        if self.attention_factor is not None:
            return self.attention_factor
        if self.mscale and self.mscale_all_dim:
            return self._sharpness(self.mscale) / self._sharpness(self.mscale_all_dim)
        return self._sharpness(1.0)

    def _sharpness(self, mscale: float) -> float:
        return 0.1 * mscale * math.log(self.factor) + 1.0 if self.factor > 1 else 1.0

    def scale(self, frequency: np.ndarray, theta: float) -> np.ndarray:
        """Returns the frequencies that are used instead of `frequency`."""

        def find_pair(rotations):  # the index at which a pair rotates so often within the original length
            return len(frequency) * math.log(self.original_max_length / (2 * math.pi * rotations)) / math.log(theta)

        low, high = find_pair(self.beta_fast), find_pair(self.beta_slow)
        if self.truncate:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, 2 * len(frequency) - 1)
        interpolated = np.clip((np.arange(len(frequency)) - low) / max(high - low, 0.001), 0.0, 1.0)
        return frequency * (1.0 - interpolated + interpolated / self.factor)


@dataclasses.dataclass(frozen=True, kw_only=True)
class LongRopeScaling:
    """LongRoPE's: each frequency is divided by a factor of its own, from one of two lists; cosine and sine are
    multiplied by a number that makes the softmax sharper."""

    short_factors: tuple[float, ...]
    """For rows of up to `original_max_length` tokens."""
    long_factors: tuple[float, ...]
    factor: float
    """How many times longer than the original length sequences may be."""
    original_max_length: int
    attention_factor: float | None = None
    """What cosine and sine are multiplied by; None for what `factor` implies."""
    uses_long: bool = False
    """Whether rows are longer than the original length. It holds for all rows alike: with factors chosen sequence by
    sequence, as in transformers, tokens of a history would change when it grows, and rows could not be packed."""

    @property
    def amplitude(self) -> float:
        """What cosine and sine are multiplied by."""
        if self.attention_factor is not None:
            return self.attention_factor
        return math.sqrt(1 + math.log(self.factor) / math.log(self.original_max_length)) if self.factor > 1 else 1.0

    def scale(self, frequency: np.ndarray, theta: float) -> np.ndarray:
        """Returns the frequencies that are used instead of `frequency`.

        Raises:
          UserError: there is not a factor for each.
        """
        factors = self.long_factors if self.uses_long else self.short_factors
        if len(factors) != len(frequency):
            raise UserError(f"rope scaling longrope has {len(factors)} factors for {len(frequency)} rotated pairs")
        return frequency / np.asarray(factors)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ProportionalScaling:
    """The first `fraction` of the pairs of a whole head are rotated, and the frequencies of the others are 0. (With
    `Rotary.fraction`, that part of a head has pairs, and frequencies, of its own.)"""

    fraction: float
    factor: float = 1.0
    """What the frequencies are divided by."""

    def __post_init__(self):
        _check_range("proportional", "fraction", 0 < self.fraction <= 1, "above 0 and at most 1", self.fraction)
        _check_range("proportional", "factor", self.factor >= 1, "at least 1", self.factor)

    def scale(self, frequency: np.ndarray, theta: float) -> np.ndarray:
        """Returns the frequencies that are used instead of `frequency`."""
        rotated = int(self.fraction * len(frequency))
        return np.where(np.arange(len(frequency)) < rotated, frequency / self.factor, 0.0)


Scaling = LongRopeScaling | LinearScaling | DynamicScaling | Llama3Scaling | YarnScaling | ProportionalScaling


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rotary:
    """One kind of RoPE: `theta` is its base, and the first `fraction` of a head's dimensions are rotated."""

    theta: float
    scaling: Scaling | None = None
    fraction: float = 1.0
    query_growth: float = 0.0
    """Queries at position p are multiplied by 1 + query_growth * log(1 + floor(p / original length of the scaling))."""

    def __post_init__(self):
        if not self.theta > 0:
            raise UserError(f"rope theta is {self.theta}; it must be above 0")
        if not 0 < self.fraction <= 1:
            raise UserError(f"the rotated fraction of a head is {self.fraction}; it must be above 0 and at most 1")

    @property
    def amplitude(self) -> float:
        """What cosine and sine are multiplied by."""
        return getattr(self.scaling, "amplitude", 1.0)

    def frequencies(self, head_dim: int) -> np.ndarray:
        """Returns radians per position for each of the P rotated pairs, float32, highest frequency first.

        With head_dim 4 and theta 10000: [1, 0.01].
        """
        rotated = int(head_dim * self.fraction)
        frequency = 1.0 / self.theta ** (np.arange(0, rotated, 2, dtype=np.float64) / rotated)
        if self.scaling is not None:
            frequency = self.scaling.scale(frequency, self.theta)
        return frequency.astype(np.float32)

    def query_scale(self, position: Int[Array, "B T"]) -> Float[Array, "B T"]:
        """Returns what queries are multiplied by after they are rotated, float32."""
        original = getattr(self.scaling, "original_max_length", 1)
        return 1.0 + self.query_growth * jnp.log1p((position // original).astype(jnp.float32))

    def rotation(
        self, position: Int[Array, "B T"], head_dim: int
    ) -> tuple[Float[Array, "B T P"], Float[Array, "B T P"]]:
        """Returns cosine and sine, float32, of every token's angles, times the amplitude."""
        angle = position.astype(jnp.float32)[:, :, None] * jnp.asarray(self.frequencies(head_dim))[None, None, :]
        if self.amplitude == 1.0:
            return jnp.cos(angle), jnp.sin(angle)
        return jnp.cos(angle) * self.amplitude, jnp.sin(angle) * self.amplitude


def rotate(
    x: Float[Array, "B T N H"], cosine: Float[Array, "B T P"], sine: Float[Array, "B T P"]
) -> Float[Array, "B T N H"]:
    """Returns `x` rotated by its position. Component i is paired with i + P, as in Hugging Face's checkpoints; those
    from 2 P on stay as they are.

    With H = 2, the angle 90 degrees (cosine 0, sine 1) maps [3, 4] to [-4, 3].
    """
    pairs = cosine.shape[-1]
    wide = x.astype(jnp.float32)
    first, second = wide[..., :pairs], wide[..., pairs : 2 * pairs]
    cosine, sine = cosine[:, :, None, :], sine[:, :, None, :]
    parts = [first * cosine - second * sine, second * cosine + first * sine, wide[..., 2 * pairs :]]
    return jnp.concatenate(parts[: 2 if 2 * pairs == x.shape[-1] else 3], axis=-1).astype(x.dtype)


def _check_range(kind: str, name: str, holds: bool, needed: str, got: object) -> None:
    if not holds:
        raise UserError(f"rope scaling {kind} needs {name} to be {needed}, got {got}")
