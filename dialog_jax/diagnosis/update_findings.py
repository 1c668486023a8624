"""Findings about the updates of a run: what is trained, learning rate, gradients, parameters and waste.

Each function has a threshold with its reason, and returns None where there is nothing to find.
"""

import math

import numpy as np
from jaxtyping import Float64

from dialog_jax.diagnosis import statistics
from dialog_jax.diagnosis.finding import FEW_STEPS, NAMES, NOISE, Finding
from dialog_jax.diagnosis.run_figures import Figures

_FEW_TARGETS = 0.02  # share of tokens: below it, 98 % of the computation reads context
_FEW_TARGETS_PER_STEP = 64  # the standard error of a mean over fewer losses, which vary by about 3 nats, is above 0.3
_PEAK_REACHED = 0.5  # share of the learning rate that a warm-up has to reach
_EXHAUSTED = 0.01  # of the peak; schedules end at 0.1 of it by default
_EXHAUSTED_SHARE = 0.25  # of the updates
_SMALL_CHANGE = 1e-4  # of a parameter's norm; fine-tuning that lowers the loss moves parameters by 1e-3 to 1e-2
_GROWTH = 2.0  # factor between the gradient norms of the first and the last fifth of a run
_DIVERGED = 1.2  # times the loss before training, of training and held-out loss; the mean of a row varies by less
_CLIPPED = 0.95  # share of the updates
_FAR_CLIPPED = 5.0  # times the limit: to Adam, norms that are always just above it are as good as any
_WASTE = 0.6  # share of the tokens of rows that are not padding; packing reaches 0.9 where dialogues are short
_IMBALANCE = 1.2  # cost of the busiest device over the mean


def _column(figures: Figures, name: str) -> Float64[np.ndarray, " n"]:
    """Returns the values of a figure of all updates that have it."""
    values = figures.updates[name]
    return values[np.isfinite(values)]


def find_few_targets(figures: Figures) -> Finding | None:
    targets, tokens = figures.updates["targets"], figures.updates["tokens"]
    share, per_step = float(targets.sum() / tokens.sum()), float(targets.mean())
    if share >= _FEW_TARGETS and per_step >= _FEW_TARGETS_PER_STEP:
        return None
    return Finding(
        "certain",
        f"{share:.2%} of the tokens are trained on, {per_step:,.0f} per update",
        "Look at a dialogue with dialog_jax show, and at roles, weights and objective.name. If the data is as meant, "
        "raise gradient_accumulation.",
    )


def find_skipped(figures: Figures) -> Finding | None:
    skipped = _column(figures, "skipped")
    count = int(skipped.max(initial=0))
    if not count:
        return None
    return Finding(
        "certain",
        f"{count:,} of {len(skipped):,} updates were skipped, because loss or gradient were not finite",
        "The log names their dialogues. Lower optimizer.learning_rate, or compute in float32 (compute_dtype).",
    )


def find_low_peak(figures: Figures) -> Finding | None:
    highest = float(_column(figures, "learning_rate").max(initial=0))
    is_complete = figures.updates["step"][-1] >= figures.steps
    if highest >= _PEAK_REACHED * figures.learning_rate or not is_complete:
        return None
    return Finding(
        "certain",
        f"the learning rate never exceeded {highest:.3g}, {highest / figures.learning_rate:.1%} of its peak of "
        f"{figures.learning_rate:.3g}: the warm-up is longer than the run",
        "Lower optimizer.warmup_steps, or train for more steps.",
    )


def find_exhausted(figures: Figures) -> Finding | None:
    rate = _column(figures, "learning_rate")
    after_peak = rate[int(rate.argmax()) :] if len(rate) else rate
    count = int((after_peak < _EXHAUSTED * figures.learning_rate).sum())
    if count < _EXHAUSTED_SHARE * max(len(rate), 1):
        return None
    return Finding(
        "certain",
        f"in the last {count:,} of {len(rate):,} updates the learning rate was below {_EXHAUSTED:.0%} of its peak",
        "Raise optimizer.final_fraction, or train for fewer steps: these change next to nothing.",
    )


def _measure_moves(figures: Figures) -> float:
    """Returns the norm of the change of all parameters over their norm."""
    assert figures.changes is not None
    norm = math.hypot(*(change.norm for change in figures.changes))
    return math.hypot(*(change.change for change in figures.changes)) / norm if norm else math.inf


def find_low_rate(figures: Figures) -> Finding | None:
    nll = _column(figures, "nll")
    if len(nll) < FEW_STEPS:
        return None
    fall, moved = statistics.fit_change(nll), _measure_moves(figures)
    if fall.value < -NOISE * fall.error or not 0 < moved < _SMALL_CHANGE:
        return None
    return Finding(
        "likely",
        f"the training loss changes by {fall.value:+.4f} ± {fall.error:.4f} nats over the run, which is noise, and the "
        f"parameters by {moved:.1e} of their norm",
        f"Raise optimizer.learning_rate ({figures.learning_rate:.3g}) 10 times, or train for more steps.",
    )


def find_high_rate(figures: Figures) -> Finding | None:
    loss, nll, norm = figures.evaluations["loss"], _column(figures, "nll"), _column(figures, "gradient_norm")
    if len(loss) < 2 or not loss[-1] > loss[0] or len(nll) < 2:
        return None
    first_norm, last_norm = statistics.measure_ends(norm)
    growth = last_norm / max(first_norm, 1e-30)
    # The losses of a run that diverges at once fall from their peak, but stay above those before training.
    diverged = min(loss[-1] / loss[0], statistics.measure_ends(nll)[1] / nll[0]) > _DIVERGED
    rises = diverged or (len(nll) >= 3 and statistics.fit_change(nll).value > 0)
    if growth < _GROWTH and not rises:  # if training loss falls, memorizing explains it better
        return None
    return Finding(
        "likely" if diverged or (growth >= _GROWTH and rises) else "possible",
        f"held-out loss rose from {loss[0]:.4f} to {loss[-1]:.4f}, the gradient norm changed by a factor of "
        f"{growth:.2f}{', and the training loss rose as well' if rises else ''}",
        f"Lower optimizer.learning_rate ({figures.learning_rate:.3g}) 3 to 10 times, or raise optimizer.warmup_steps.",
    )


def find_clipped(figures: Figures) -> Finding | None:
    norm = _column(figures, "gradient_norm")
    if not figures.clip_norm or not len(norm):
        return None
    share, median = float((norm > figures.clip_norm).mean()), float(np.median(norm))
    if share < _CLIPPED or median < _FAR_CLIPPED * figures.clip_norm:
        return None
    return Finding(
        "possible",
        f"{share:.0%} of the updates are clipped; the median gradient norm is {median:.3g} and optimizer.clip_norm is "
        f"{figures.clip_norm:g}",
        "All updates then have one size, whatever their gradient. Raise optimizer.clip_norm above the median, or raise "
        "gradient_accumulation.",
    )


def find_no_gradient(figures: Figures) -> Finding | None:
    norm = _column(figures, "gradient_norm")
    count = int((norm == 0).sum())
    if not count:
        return None
    return Finding(
        "certain",
        f"the gradient is exactly 0 in {count:,} of {len(norm):,} updates",
        "Look at what is trained (freeze, train_only, lora.targets), and at weights with dialog_jax show.",
    )


def find_unmoved(figures: Figures) -> Finding | None:
    assert figures.changes is not None
    paths = [change.path for change in figures.changes if not change.change]
    if not paths:
        return None
    more = f" and {len(paths) - NAMES:,} more" if len(paths) > NAMES else ""
    return Finding(
        "certain",
        f"{len(paths):,} of {len(figures.changes):,} trained parameters have not changed: {', '.join(paths[:NAMES])}"
        f"{more}",
        "Nothing that the loss depends on passes through them, or their updates are too small for their type. Freeze "
        "them, or raise optimizer.learning_rate.",
    )


def find_empty_rows(figures: Figures) -> Finding | None:
    used = float(_column(figures, "row_tokens_used").mean()) if len(_column(figures, "row_tokens_used")) else 1.0
    if used >= _WASTE:
        return None
    return Finding(
        "certain",
        f"{1 - used:.0%} of the tokens of rows are padding",
        "Choose a data.max_length that dialogues fill better: dialog_jax audit lists several.",
    )


def find_imbalance(figures: Figures) -> Finding | None:
    values = _column(figures, "imbalance")
    mean = float(values.mean()) if len(values) else 1.0
    if mean <= _IMBALANCE:
        return None
    return Finding(
        "certain",
        f"attention costs the busiest device {mean:.2f} times the mean",
        "The others wait for it. Raise rows, so that there are more rows to divide, or lower data.max_length.",
    )
