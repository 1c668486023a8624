"""One update: a batch of packed rows and a train state in, the next state and what to report out.

    loss = sum(weight * -log p(target | ancestors)) / sum(weight)

Both sums run over all rows, devices and micro-batches; the division happens once, before the gradient is taken, since
the weights of the whole batch are known at the start of the step. What `LossConfig` adds stands beside the logarithm
and is divided likewise.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float, Int

from dialog_jax.attention import blockwise, dispatch
from dialog_jax.attention.dispatch import Attend
from dialog_jax.batching.batches import Batch
from dialog_jax.model import decoder
from dialog_jax.model.decoder import DecoderConfig
from dialog_jax.training import loss, sharding
from dialog_jax.training.config import LossConfig

OPTIMIZER_SCOPE = "optimizer"  # what follows the gradient, as it is called in compiled programs and profiles


class TrainState(NamedTuple):
    """All that a step changes. The optimizer has made `step - skipped` updates."""

    step: Int[Array, ""]
    skipped: Int[Array, ""]
    """Steps whose loss or gradient was not finite: they changed neither parameters nor moments."""
    skipped_in_a_row: Int[Array, ""]
    """How many of them were the last ones."""
    parameters: dict
    optimizer_state: Any


class StepMetrics(NamedTuple):
    """Of one step: what it saw before its update was applied. Scalars."""

    loss: Float[Array, ""]
    """What is minimised: the weighted mean over the batch, with all that `LossConfig` adds, in nats."""
    nll: Float[Array, ""]
    """Weighted mean of the cross-entropy alone; the same as `loss` where `LossConfig` adds nothing."""
    gradient_norm: Float[Array, ""]
    """Of the gradient of the loss, before clipping."""
    tokens: Int[Array, ""]
    """Tokens that are not padding."""
    targets: Int[Array, ""]
    response_tokens: Int[Array, ""]
    """Targets within responses."""
    skipped: Int[Array, ""]
    """Steps without an update up to this one, since loss or gradient were not finite."""
    skipped_in_a_row: Int[Array, ""]
    """0 if this step is an update; otherwise how many were none, with those just before."""
    attention_pairs: Float[Array, ""]
    """Pairs of a token and what it sees, itself included."""


class EvaluationSums(NamedTuple):
    """Sums over a batch, by turn; the last bin holds all later turns, and the first the targets outside responses."""

    nll: Float[Array, "bins"]
    """sum(weight * nll), nats."""
    weight: Float[Array, "bins"]
    targets: Int[Array, "bins"]
    correct: Int[Array, "bins"]
    """Targets that have the highest logit."""


def make_state(parameters: dict, optimizer: optax.GradientTransformation) -> TrainState:
    """Returns the state before the first step; wherever JAX puts what it adds."""
    none = jnp.zeros((), jnp.int32)
    return TrainState(none, none, none, parameters, optimizer.init(parameters))


def initialize_state(
    mesh: Mesh, parameters: dict, optimizer: optax.GradientTransformation
) -> tuple[TrainState, TrainState]:
    """Returns (the state before the first step, its shardings). Moments are made where they belong, sharded.

    Args:
      parameters: placed as `sharding.parameter_sharding` says.
    """

    make = functools.partial(make_state, optimizer=optimizer)
    shardings = sharding.state_sharding(mesh, jax.eval_shape(make, parameters))
    return jax.jit(make, out_shardings=shardings, donate_argnums=0)(parameters), shardings


def abstract_state(
    model: DecoderConfig, mesh: Mesh, optimizer: optax.GradientTransformation
) -> tuple[TrainState, TrainState]:
    """Returns (a train state as shapes that know their shardings, the shardings)."""
    state = jax.eval_shape(functools.partial(make_state, optimizer=optimizer), decoder.abstract_parameters(model))
    shardings = sharding.state_sharding(mesh, state)
    placed = jax.tree.map(
        lambda leaf, place: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place), state, shardings
    )
    return placed, shardings


def make_train_step(
    model: DecoderConfig,
    optimizer: optax.GradientTransformation,
    mesh: Mesh,
    shardings: TrainState,
    *,
    compute_dtype: jax.typing.DTypeLike,
    remat: str,
    loss_config: LossConfig = loss.PLAIN,
    attend: Attend | None = None,
) -> jax.stages.Wrapped:
    """Returns the jitted update: (state, batch) to (next state, `StepMetrics`).

    The state it is given is donated: go on with the one it returns. If loss or gradient are not finite, parameters and
    optimizer state stay as they are.

    Args:
      attend: how to attend over the mesh, as `attention.dispatch` says; None for blockwise attention.
    """

    # Said outright: left to itself, XLA lays the stream out as the embedding's width is, keeps each row on all devices
    # of fsdp, and reduces activations where it should gather parameters.
    stream = NamedSharding(mesh, PartitionSpec(*sharding.batch_sharding(mesh).spec[1:]))

    def micro_batch_loss(parameters, batch: Batch, total_weight):
        hidden = decoder.hidden_states(
            model,
            parameters,
            batch.tokens,
            batch.position,
            batch.subtree_end,
            compute_dtype=compute_dtype,
            remat=remat,
            place=lambda x: jax.lax.with_sharding_constraint(x, stream),
            attend_trees=attend or dispatch.sharded(blockwise.attend, mesh),
        )
        unembedding = decoder.unembedding(model, parameters)
        value, nll = loss.weighted_loss(hidden, unembedding, _targets(batch), loss_config, mesh)
        return value / total_weight, nll / total_weight

    gradient_of = jax.value_and_grad(micro_batch_loss, has_aux=True)
    optimizer = optax.with_extra_args_support(optimizer)

    def update(state: TrainState, batch: Batch) -> tuple[TrainState, StepMetrics]:
        weight = jnp.sum(batch.weight)

        def accumulate(carry, micro_batch):
            part = gradient_of(state.parameters, micro_batch, weight)
            return jax.tree.map(jnp.add, carry, part), None

        if batch.tokens.shape[0] == 1:
            only = jax.tree.map(lambda array: array[0], batch)
            (value, nll), gradient = gradient_of(state.parameters, only, weight)
        else:
            zeros = (jnp.zeros(()), jnp.zeros(())), jax.tree.map(jnp.zeros_like, state.parameters)
            ((value, nll), gradient), _ = jax.lax.scan(accumulate, zeros, batch)
        gradient = jax.lax.with_sharding_constraint(gradient, shardings.parameters)
        with jax.named_scope(OPTIMIZER_SCOPE):
            norm = optax.tree.norm(gradient)
            good = jnp.isfinite(value) & jnp.isfinite(norm)

            def updated(parameters, optimizer_state):
                updates, optimizer_state = optimizer.update(gradient, optimizer_state, parameters, norm=norm)
                return optax.apply_updates(parameters, updates), optimizer_state

            # A choice of whole states, not of each number: XLA:CPU then changes them in place, without copies. On GPUs
            # and TPUs it has not been measured.
            kept = jax.lax.cond(good, updated, lambda *same: same, state.parameters, state.optimizer_state)
        after = TrainState(
            state.step + 1,
            state.skipped + ~good,
            jnp.where(good, 0, state.skipped_in_a_row + 1),
            *kept,
        )
        metrics = StepMetrics(
            loss=value,
            nll=nll,
            gradient_norm=norm,
            tokens=jnp.sum(batch.segment > 0),
            targets=jnp.sum(batch.weight > 0),
            response_tokens=jnp.sum((batch.weight > 0) & (batch.turn >= 0)),
            skipped=after.skipped,
            skipped_in_a_row=after.skipped_in_a_row,
            attention_pairs=jnp.sum(jnp.where(batch.segment > 0, batch.position + 1.0, 0.0)),
        )
        return after, metrics

    rows, whole = sharding.batch_sharding(mesh), sharding.replicated_sharding(mesh)
    return jax.jit(
        update,
        in_shardings=(shardings, rows),
        out_shardings=(shardings, whole),
        donate_argnums=0,
    )


def make_evaluation_step(
    model: DecoderConfig,
    mesh: Mesh,
    parameter_shardings: dict,
    *,
    compute_dtype: jax.typing.DTypeLike,
    turns: int,
    attend: Attend | None = None,
) -> Callable[[dict, Batch], EvaluationSums]:
    """Returns the compiled sums of one [1, B, ...] batch, turn by turn for the first `turns` turns.

    Args:
      attend: how to attend over the mesh, as `attention.dispatch` says; None for blockwise attention.
    """
    attend = attend or dispatch.sharded(blockwise.attend, mesh)
    score = functools.partial(loss.score_targets, mesh=mesh)

    def evaluate(parameters: dict, batch: Batch) -> EvaluationSums:
        batch = jax.tree.map(lambda array: array[0], batch)
        scores = _scores(model, parameters, batch, compute_dtype, attend, score)
        bins = jnp.clip(batch.turn, -1, turns) + 1
        valid = batch.weight > 0

        def by_turn(values):
            return jax.ops.segment_sum(values.ravel(), bins.ravel(), turns + 2)

        return EvaluationSums(
            nll=by_turn(batch.weight * scores.nll),
            weight=by_turn(batch.weight),
            targets=by_turn(valid.astype(jnp.int32)),
            correct=by_turn(scores.correct.astype(jnp.int32)),
        )

    rows = sharding.batch_sharding(mesh)
    return jax.jit(
        evaluate,
        in_shardings=(parameter_shardings, rows),
        out_shardings=sharding.replicated_sharding(mesh),
    )


def make_score_step(
    model: DecoderConfig, *, compute_dtype: jax.typing.DTypeLike, top_k: int = 0
) -> Callable[[dict, Batch], loss.TargetScores]:
    """Returns the compiled scores of every target of a [B, ...] batch, on one device.

    Args:
      top_k: how many of the likeliest tokens to return for each target; 0 for none.
    """
    score = functools.partial(loss.score_targets, top_k=top_k)
    return jax.jit(lambda parameters, batch: _scores(model, parameters, batch, compute_dtype, blockwise.attend, score))


def _scores(
    model: DecoderConfig,
    parameters: dict,
    batch: Batch,
    compute_dtype: jax.typing.DTypeLike,
    attend: Attend,
    score: Callable[..., loss.TargetScores],
) -> loss.TargetScores:
    hidden = decoder.hidden_states(
        model,
        parameters,
        batch.tokens,
        batch.position,
        batch.subtree_end,
        compute_dtype=compute_dtype,
        attend_trees=attend,
    )
    return score(hidden, decoder.unembedding(model, parameters), _targets(batch))


def _targets(batch: Batch) -> loss.Targets:
    teacher = None
    if batch.teacher_token is not None and batch.teacher_log_probability is not None:
        teacher = loss.Teacher(batch.teacher_token, batch.teacher_log_probability)
    return loss.Targets(batch.source, batch.target, batch.weight, teacher)
