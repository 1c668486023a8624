"""Learning-rate schedules, weight-decay mask and the optimizers."""

import zlib
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, BFloat16, Float32, Int, Key

from dialog_jax.errors import UserError
from dialog_jax.training.optimizer_config import LEARNING_RATE, OptimizerConfig

_WARMUP_FRACTION = 0.03  # of the steps, for warmup_steps = -1


def make_schedule(config: OptimizerConfig, steps: int) -> optax.Schedule:
    """Returns the learning rate as a function of the step, counted from 0, for a run of `steps` steps.

    During `warmup_steps` = 4 it is 1/4, 2/4, 3/4 and 4/4 of the peak, and then follows `config.schedule`.

    Raises:
      UserError: the warm-up is not shorter than the run.
    """
    warmup = int(_WARMUP_FRACTION * steps) if config.warmup_steps == -1 else config.warmup_steps
    if warmup >= steps:
        raise UserError(f"optimizer.warmup_steps is {warmup}, but the run has only {steps} steps. Lower it.")
    peak = LEARNING_RATE if config.learning_rate == -1 else config.learning_rate
    final = peak * config.final_fraction
    remaining = steps - warmup
    if config.schedule == "cosine":
        main_schedule = optax.cosine_decay_schedule(peak, remaining, alpha=config.final_fraction)
    elif config.schedule == "linear":
        main_schedule = optax.linear_schedule(peak, final, remaining)
    elif config.schedule == "warmup_stable_decay":
        decay = min(remaining, max(1, round(steps * config.decay_fraction)))
        main_schedule = optax.linear_schedule(peak, final, decay, transition_begin=remaining - decay)
    else:
        main_schedule = optax.constant_schedule(peak)
    if not warmup:
        return main_schedule
    rise = optax.linear_schedule(peak / warmup, peak, max(1, warmup - 1))
    return optax.join_schedules([rise, main_schedule], [warmup])


def describe_change_of_steps(config: OptimizerConfig, before: int, now: int, updates: int) -> str:
    """Returns what another number of steps does to the learning rate of a run that continues; empty if nothing.

    Args:
      before: number of steps of the run so far.
      now: number of steps from now on.
      updates: number of updates made.
    """
    if before == now or not 0 < updates < now:
        return ""
    last, following = make_schedule(config, before)(updates - 1), make_schedule(config, now)(updates)
    return (
        f"steps: {before:,} before, {now:,} now. From here on the {config.schedule} schedule is that of {now:,} steps: "
        f"the last update had learning rate {float(last):.3g}, the next has {float(following):.3g}"
    )


def decay_mask(parameters: dict) -> dict:
    """Returns True for the parameters that weight decay applies to: all matrices of the model but the embedding.

    Parameters of layers are stacked, so a norm or a bias has two axes there and a matrix has three. Those of experts
    have one axis more.
    """

    def decays(path: tuple[jax.tree_util.DictKey, ...], parameter: jax.Array) -> bool:
        names = [key.key for key in path]
        is_matrix = parameter.ndim >= (3 if names[0] == "layers" else 2) and not names[-1].startswith("b_")
        return is_matrix and names[-1] not in ("embedding", "lora_a", "lora_b", "soft_prompt")

    return jax.tree_util.tree_map_with_path(decays, parameters)


def make_optimizer(
    config: OptimizerConfig, steps: int, *, rate_ratios: Mapping[str, float] = {}
) -> optax.GradientTransformationExtraArgs:
    """Returns clipping followed by the optimizer, with the schedule of a run of `steps` steps.

    Its `update` needs `norm`, the gradient's global norm, as an additional argument.

    Args:
      rate_ratios: what multiplies the learning rate of parameters, by the last part of their paths. Source of that of
        `lora_b`: Hayou et al. 2024 (LoRA+, arXiv 2402.12354).
    """
    rule = _RULES[config.name](config, make_schedule(config, steps))
    if config.moments_dtype == "bfloat16":
        rule = _store_as_bfloat16(rule)
    parts = [_clip(config.clip_norm)] if config.clip_norm else []
    parts.append(rule)
    if any(ratio != 1 for ratio in rate_ratios.values()):
        parts.append(_scale_rates(rate_ratios))
    if config.ema_decay:
        parts.append(_average(config.ema_decay))
    return optax.with_extra_args_support(optax.chain(*parts) if len(parts) > 1 else rule)


def _adamw(config: OptimizerConfig, schedule: optax.Schedule) -> optax.GradientTransformation:
    return optax.adamw(
        schedule,
        b1=config.b1,
        b2=config.b2,
        eps=config.epsilon,
        weight_decay=config.weight_decay,
        mask=decay_mask,
    )


def _adafactor(config: OptimizerConfig, schedule: optax.Schedule) -> optax.GradientTransformation:
    """Returns Adafactor with the learning rate and the decay of AdamW: steps are not relative to the parameters' size.

    Source: Shazeer and Stern 2018 (arXiv 1804.04235), algorithm 4, with the second moment's decay of section 7.2; clips
    the update of each stacked parameter as one.
    """
    return optax.chain(
        optax.scale_by_factored_rms(),
        optax.clip_by_block_rms(1.0),
        optax.add_decayed_weights(config.weight_decay, decay_mask),
        optax.scale_by_learning_rate(schedule),
    )


def _muon(config: OptimizerConfig, schedule: optax.Schedule) -> optax.GradientTransformation:
    """Returns Muon for the matrices of layers, each by itself, and AdamW for all other parameters.

    Updates have the root mean square of AdamW's, so that its learning rates hold. Source: Liu et al. 2025 (arXiv
    2502.16982), equation 4.
    """

    def is_matrix(path, leaf):
        return path[0].key == "layers" and leaf.ndim >= 3 and not path[-1].key.startswith("b_")

    def make_labels(parameters):
        return jax.tree_util.tree_map_with_path(
            lambda path, leaf: "muon" if is_matrix(path, leaf) else "adamw", parameters
        )

    def find_axes(parameters):  # of each matrix [L, in, out] or [L, E, in, out], by which it is multiplied
        return jax.tree.map(lambda leaf: optax.contrib.MuonDimensionNumbers(leaf.ndim - 2, leaf.ndim - 1), parameters)

    muon = optax.contrib.muon(
        schedule,
        weight_decay=config.weight_decay,
        weight_decay_mask=decay_mask,
        muon_weight_dimension_numbers=find_axes,
        consistent_rms=0.2,
    )
    return optax.partition({"muon": muon, "adamw": _adamw(config, schedule)}, make_labels)


_RULES = {"adamw": _adamw, "adafactor": _adafactor, "muon": _muon}


class _Narrow(NamedTuple):
    """State of `_store_as_bfloat16`."""

    updates: Int[Array, ""]
    narrow: Any


def _store_as_bfloat16(rule: optax.GradientTransformation) -> optax.GradientTransformation:
    """Returns the same optimizer, with its moments stored as bfloat16 and computed with in float32.

    Second moments are rounded up or down at random, in proportion: one step changes them by less than bfloat16 can
    tell, so that rounded to the nearest they would not change at all.
    """

    def widen(leaf):
        return leaf.astype(jnp.float32) if leaf.dtype == jnp.bfloat16 else leaf

    def narrow(updates, state):
        def convert(path, leaf):
            if leaf.dtype != jnp.float32 or not leaf.ndim:
                return leaf
            names = [key.name for key in path if isinstance(key, jax.tree_util.GetAttrKey)]
            if names[-1:] != ["nu"]:
                return leaf.astype(jnp.bfloat16)
            number = zlib.crc32(jax.tree_util.keystr(path).encode())
            return _round_at_random(leaf, jax.random.fold_in(jax.random.fold_in(jax.random.key(0), number), updates))

        return _Narrow(updates, jax.tree_util.tree_map_with_path(convert, state))

    def init(parameters):
        return narrow(jnp.zeros((), jnp.int32), rule.init(parameters))

    def update(gradient, state, parameters=None):
        changes, wide = rule.update(gradient, jax.tree.map(widen, state.narrow), parameters)
        return changes, narrow(state.updates + 1, wide)

    return optax.GradientTransformation(init, update)


def _round_at_random(x: Float32[Array, "..."], key: Key[Array, ""]) -> BFloat16[Array, "..."]:
    """Returns `x`, at least 0, rounded to one of its two neighbours, so that its expectation is `x`."""
    bits = jax.lax.bitcast_convert_type(x, jnp.uint32)
    noise = jax.random.bits(key, x.shape, jnp.uint16).astype(jnp.uint32)
    return jax.lax.bitcast_convert_type(((bits + noise) >> 16).astype(jnp.uint16), jnp.bfloat16)


class Average(NamedTuple):
    """State of the exponential moving average of the trained parameters."""

    average: dict[str, Any]


def _average(decay: float) -> optax.GradientTransformation:
    """Returns what keeps the average of the parameters after each update; changes no update."""

    def update(updates, state, parameters):
        def average(old, parameter, step):
            return decay * old + (1 - decay) * (parameter + step)

        return updates, Average(jax.tree.map(average, state.average, parameters, updates))

    return optax.GradientTransformation(lambda parameters: Average(jax.tree.map(jnp.copy, parameters)), update)


def find_average(state: Any) -> dict[str, Any] | None:
    """Returns the average of the trained parameters in an optimizer's state; None if it keeps none."""
    leaves = jax.tree.leaves(state, is_leaf=lambda node: isinstance(node, Average))
    return next((node.average for node in leaves if isinstance(node, Average)), None)


def _scale_rates(ratios: Mapping[str, float]) -> optax.GradientTransformation:
    """Returns the scaling of the updates of some parameters, by the last part of their paths."""

    def update(updates, state, parameters=None):
        def scale(path, leaf):
            return leaf * ratios.get(path[-1].key, 1.0)

        return jax.tree_util.tree_map_with_path(scale, updates), state

    return optax.GradientTransformation(optax.init_empty_state, update)


def _clip(limit: float) -> optax.GradientTransformationExtraArgs:
    """Returns the scaling of a gradient whose global norm, the argument `norm`, exceeds the limit, down to the limit.

    It multiplies the gradient by one factor; optax divides each number, for which XLA:CPU keeps a second copy.
    """

    def update(gradient, state, parameters=None, *, norm, **_):
        return optax.tree.scale(jnp.minimum(1.0, limit / norm), gradient), state

    return optax.GradientTransformationExtraArgs(optax.init_empty_state, update)
