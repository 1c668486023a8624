"""Findings about losses: of the data before training, in the course of epochs, and on held-out dialogues.

Each function has a threshold with its reason, and returns None where there is nothing to find.
"""

import math

import numpy as np

from dialog_jax.diagnosis import statistics
from dialog_jax.diagnosis.finding import NAMES, NOISE, Finding
from dialog_jax.diagnosis.run_figures import Figures

_STRONG = 3.0  # of estimates of which there are many, such as jumps at the end of epochs
# Nats above the tokens between. 57 responses of ChitChat under SmolLM2-135M-Instruct have +1.9 at first and +2.1 at
# last tokens with the model's own template, and +13.2 and +7.4 with headers that the model has not seen.
_TEMPLATE = 4.0
_KNOWN = 0.1  # nats per token: the mean probability of a target is above 0.9
_SHARED = 0.01  # share of held-out responses
_DIVERGENCE = 0.02  # of the lowest held-out loss
_SIGNIFICANT = 0.01  # probability of as strong a pattern by chance
_STEPS_PER_EPOCH = 4  # for jumps; twice as many for patterns


def find_template(figures: Figures) -> Finding | None:
    losses = figures.responses
    assert losses is not None
    ends = {"first": losses.first, "end-of-turn": losses.end}
    far = {name: loss for name, loss in ends.items() if loss > losses.middle + _TEMPLATE}  # nan is not
    if not far:
        return None
    described = " and ".join(f"{loss:.2f} nats at {name} tokens" for name, loss in far.items())
    return Finding(
        "likely" if len(far) == 2 else "possible",
        f"before training, the loss of {losses.responses:,} held-out responses is {described}, against "
        f"{losses.middle:.2f} at those between",
        "The model was not trained with this chat template, or not with any. Use the template that the model was "
        "published with (data.chat_template); a base model needs more training to learn one.",
    )


def find_known(figures: Figures) -> Finding | None:
    loss = figures.evaluations["loss"]
    before = {"held-out": float(loss[0]) if len(loss) else math.nan, "training": float(figures.updates["nll"][0])}
    known = {name: value for name, value in before.items() if value < _KNOWN}
    if not known or figures.updates["step"][0] != 1:
        return None
    described = " and ".join(f"the {name} loss is {value:.4f}" for name, value in known.items())
    return Finding(
        "likely",
        f"before training, {described} nats per token: the model knows the data",
        "The model was trained on these dialogues, or they are trivial, such as templates with few answers. Choose "
        "other data, or begin with another model.",
    )


def find_contaminated(figures: Figures) -> Finding | None:
    overlap = figures.overlap
    assert overlap is not None
    if overlap.shared <= _SHARED * overlap.responses or not overlap.shared:
        return None
    return Finding(
        "certain",
        f"{overlap.shared:,} of {overlap.responses:,} held-out responses are in the training data, behind the same "
        f"user message: {'; '.join(overlap.first[:NAMES])}",
        "Held-out loss then measures memory. Remove duplicates from the training data before it is divided.",
    )


def _measure_jump(figures: Figures) -> statistics.Estimate | None:
    """Returns the change of the training loss at the end of an epoch; None if there are too few steps for it."""
    epoch, nll = figures.updates["epoch"], figures.updates["nll"]
    is_known = np.isfinite(epoch) & np.isfinite(nll)
    epoch, nll = epoch[is_known], nll[is_known]
    epochs = math.floor(epoch[-1]) if len(epoch) else 0
    if epochs < 1 or len(epoch) < _STEPS_PER_EPOCH * (epochs + 1) or not (epoch > 1 + 1e-9).any():
        return None
    return statistics.fit_jump(epoch, nll)


def find_memorizing(figures: Figures) -> Finding | None:
    jump, loss, steps = _measure_jump(figures), figures.evaluations["loss"], figures.evaluations["step"]
    is_known = np.isfinite(figures.updates["nll"])
    nll, nll_steps = figures.updates["nll"][is_known], figures.updates["step"][is_known]
    reasons = []
    mean = float(nll.mean())
    if jump and jump.value < -_STRONG * jump.error and -jump.value > _DIVERGENCE * mean:
        reasons.append(f"training loss falls by {-jump.value:.4f} ± {jump.error:.4f} nats at the end of each epoch")
    if len(loss) > 2:
        best = int(loss.argmin())
        later = nll[nll_steps > steps[best]]
        rise = float(loss[-1] - loss[best])
        # The training loss of a run that has diverged falls from its peak, but stays above that of the first update.
        falls = (
            len(later) >= 3 and statistics.fit_change(later).value < 0 and statistics.measure_ends(later)[1] < nll[0]
        )
        if rise > _DIVERGENCE * loss[best] and falls:
            reasons.append(
                f"since step {steps[best]:,.0f}, held-out loss has risen from {loss[best]:.4f} to {loss[-1]:.4f} while "
                "training loss fell"
            )
    if not reasons:
        return None
    return Finding(
        "likely" if len(reasons) == 2 else "possible",
        ", and ".join(reasons),
        "Train for fewer epochs (export takes the best checkpoint), on more data, or less of the model (LoRA).",
    )


def find_small_held_out(figures: Figures) -> Finding | None:
    sample, loss, targets = figures.held_out, figures.evaluations["loss"], figures.evaluations["targets"]
    assert sample is not None
    change = float(loss.min() - loss[0]) if len(loss) else 0.0
    if not change:
        return None
    error = sample.error * math.sqrt(sample.tokens / targets[0])
    if abs(change) >= NOISE * error:
        return None
    needed = (NOISE * error / change) ** 2
    return Finding(
        "likely",
        f"held-out loss changed by {change:+.4f} ± {error:.4f} nats, which is no evidence of a change; the error is "
        f"estimated from {sample.dialogues:,} dialogues",
        f"Hold out {needed:.1f} times as many dialogues (data.validation_share, data.validation), evaluate all of them "
        "(evaluate_rows=0), or train for longer.",
    )


def find_ordering(figures: Figures) -> Finding | None:
    epoch, nll = figures.updates["epoch"], figures.updates["nll"]
    is_known = np.isfinite(epoch) & np.isfinite(nll)
    epoch, nll = epoch[is_known], nll[is_known]
    epochs = math.floor(epoch[-1] + 1e-9) if len(epoch) else 0
    if epochs < 3 or len(epoch) < 2 * _STEPS_PER_EPOCH * epochs:
        return None
    whole = epoch <= epochs + 1e-9
    amplitude, p = statistics.measure_period(epoch[whole], nll[whole])
    if p >= _SIGNIFICANT or amplitude < _DIVERGENCE * float(nll.mean()):
        return None
    return Finding(
        "likely",
        f"the training loss repeats a pattern of ±{amplitude:.4f} nats in every epoch (p = {p:.3f})",
        "The order of the data repeats. Each epoch shuffles its trees anew, but a few trees have few orders: use more.",
    )
