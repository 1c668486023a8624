"""Learning-rate schedules, weight-decay mask and the optax chain."""

import jax
import jax.numpy as jnp
import optax

from dialog_jax.errors import UserError
from dialog_jax.training.config import OptimizerConfig

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
    peak, final = config.learning_rate, config.learning_rate * config.final_fraction
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
    """Returns True for the parameters that weight decay applies to: all matrices but the embedding.

    Parameters of layers are stacked, so a norm or a bias has two axes there and a matrix has three.
    """

    def decays(path: tuple[jax.tree_util.DictKey, ...], parameter: jax.Array) -> bool:
        names = [key.key for key in path]
        return names[-1] != "embedding" and parameter.ndim >= (3 if names[0] == "layers" else 2)

    return jax.tree_util.tree_map_with_path(decays, parameters)


def make_optimizer(config: OptimizerConfig, steps: int) -> optax.GradientTransformationExtraArgs:
    """Returns clipping followed by AdamW, with the schedule of a run of `steps` steps.

    Its `update` needs `norm`, the gradient's global norm, as an additional argument.
    """
    adamw = optax.adamw(
        make_schedule(config, steps),
        b1=config.b1,
        b2=config.b2,
        eps=config.epsilon,
        weight_decay=config.weight_decay,
        mask=decay_mask,
    )
    return optax.chain(_clip(config.clip_norm), adamw) if config.clip_norm else optax.with_extra_args_support(adamw)


def _clip(limit: float) -> optax.GradientTransformationExtraArgs:
    """Returns the scaling of a gradient whose global norm, the argument `norm`, exceeds the limit, down to the limit.

    It multiplies the gradient by one factor; optax divides each number, for which XLA:CPU keeps a second copy.
    """

    def update(gradient, state, parameters=None, *, norm, **_):
        return optax.tree.scale(jnp.minimum(1.0, limit / norm), gradient), state

    return optax.GradientTransformationExtraArgs(optax.init_empty_state, update)
