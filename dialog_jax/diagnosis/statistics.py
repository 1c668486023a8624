"""Statistics of a run's losses: slopes, jumps and periods, each with its uncertainty. Knows no runs."""

from typing import NamedTuple

import numpy as np
from jaxtyping import Float64

_SHUFFLES = 999
_PHASES = 8  # bins of an epoch


class Estimate(NamedTuple):
    """A number and its standard error."""

    value: float
    error: float

    @property
    def ratio(self) -> float:
        """The number in standard errors; infinite if the error is 0."""
        return self.value / self.error if self.error else float(np.sign(self.value)) * np.inf


def fit(columns: Float64[np.ndarray, "n k"], values: Float64[np.ndarray, " n"]) -> list[Estimate]:
    """Returns the least-squares coefficient of each column, with the standard error of independent residuals.

    Args:
      columns: fewer than rows, linearly independent.
    """
    solution, _, _, _ = np.linalg.lstsq(columns, values, rcond=None)
    residuals = values - columns @ solution
    variance = float(residuals @ residuals) / (len(values) - columns.shape[1])
    errors = np.sqrt(np.maximum(np.diag(np.linalg.pinv(columns.T @ columns)) * variance, 0))
    return [Estimate(float(value), float(error)) for value, error in zip(solution, errors, strict=True)]


def fit_change(values: Float64[np.ndarray, " n"]) -> Estimate:
    """Returns by how much values change from first to last along the line that fits them best; n is at least 3."""
    ramp = np.linspace(0, 1, len(values))
    return fit(np.stack([np.ones_like(ramp), ramp], axis=1), values)[1]


def measure_ends(values: Float64[np.ndarray, " n"]) -> tuple[float, float]:
    """Returns the medians of the first and of the last fifth of the values; n is at least 1."""
    fifth = max(1, len(values) // 5)
    return float(np.median(values[:fifth])), float(np.median(values[-fifth:]))


def fit_jump(epoch: Float64[np.ndarray, " n"], values: Float64[np.ndarray, " n"]) -> Estimate:
    """Returns by how much values change at the end of an epoch beyond their slope within epochs.

    The steps of values 3 3 3 | 2 2 2 | 1 1 1 give -1, those of a straight line 0.

    Args:
      epoch: passes over the data after each value, such as 0.5, 1.0, 1.5; it passes at least one whole number.
    """
    number = np.ceil(epoch - 1e-9) - 1  # of the epoch that a value ends in
    columns = np.stack([np.ones_like(epoch), epoch, number], axis=1)
    return fit(columns, values)[2]


def measure_period(epoch: Float64[np.ndarray, " n"], values: Float64[np.ndarray, " n"]) -> tuple[float, float]:
    """Returns (amplitude, p) of a pattern of the values that every epoch repeats.

    The amplitude is half the range of the means by phase, of what remains without the mean of each epoch and a common
    slope. p is the share of random orders of the values within each epoch that have as large a variance by phase.

    Args:
      epoch: as in `fit_jump`; values of three or more epochs.
    """
    number = (np.ceil(epoch - 1e-9) - 1).astype(int)
    numbers = np.unique(number)
    dummies = (number[:, None] == numbers).astype(np.float64)
    columns = np.concatenate([epoch[:, None], dummies], axis=1)
    residuals = values - columns @ np.linalg.lstsq(columns, values, rcond=None)[0]
    phase = np.minimum(((epoch - number - 1e-9) * _PHASES).astype(int), _PHASES - 1)
    groups = [np.flatnonzero(number == one) for one in numbers]

    def average(ordered: Float64[np.ndarray, " n"]) -> Float64[np.ndarray, " phases"]:
        sums, counts = np.bincount(phase, ordered, _PHASES), np.bincount(phase, minlength=_PHASES)
        return sums[counts > 0] / counts[counts > 0]

    rng = np.random.default_rng(0)
    means = average(residuals)
    larger = 0
    for _ in range(_SHUFFLES):
        shuffled = residuals.copy()
        for group in groups:
            shuffled[group] = rng.permutation(residuals[group])
        larger += average(shuffled).var() >= means.var()
    return float(np.ptp(means)) / 2, (larger + 1) / (_SHUFFLES + 1)
