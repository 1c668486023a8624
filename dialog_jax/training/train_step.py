"""One optimizer step: a train state and a batch of packed rows in, the next state and the step's metrics out.

    loss = sum(weight * -log p(token | ancestors)) / sum(weight)

Both sums run over the whole global batch: all rows, devices and micro-batches. The weights are known before the forward
pass, so each micro-batch divides by the sum of all of them, and losses and gradients of micro-batches are only added.
What `LossConfig` adds to -log p is weighted and divided in the same way.
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

OPTIMIZER_SCOPE = "optimizer"  # name of the part after the gradient in compiled programs and profiles


class TrainState(NamedTuple):
    """Everything that a step changes. The optimizer has made `step - skipped` updates."""

    step: Int[Array, ""]
    skipped: Int[Array, ""]
    """Steps whose loss or gradient was not finite; they changed neither parameters nor moments."""
    skipped_in_a_row: Int[Array, ""]
    """How many of the most recent steps were skipped."""
    parameters: dict
    optimizer_state: Any


class StepMetrics(NamedTuple):
    """Scalars of one step, computed with the parameters before its update."""

    loss: Float[Array, ""]
    """The minimized value: the weighted mean over the batch, with everything that `LossConfig` adds, in nats."""
    nll: Float[Array, ""]
    """Weighted mean of the cross-entropy alone; equals `loss` where `LossConfig` adds nothing."""
    gradient_norm: Float[Array, ""]
    """Global norm of the gradient before clipping."""
    tokens: Int[Array, ""]
    """Tokens that are not padding."""
    targets: Int[Array, ""]
    response_tokens: Int[Array, ""]
    """Targets within responses."""
    skipped: Int[Array, ""]
    """As in the state after this step."""
    skipped_in_a_row: Int[Array, ""]
    """As in the state after this step; 0 if it made an update."""
    attention_pairs: Float[Array, ""]
    """Pairs of a token and a token that it sees, itself included."""


class EvaluationSums(NamedTuple):
    """Sums over a batch by turn. The first bin holds targets outside responses, the last one all later turns."""

    nll: Float[Array, "bins"]
    """sum(weight * nll), nats."""
    weight: Float[Array, "bins"]
    targets: Int[Array, "bins"]
    correct: Int[Array, "bins"]
    """Targets that have the highest logit."""


def make_state(parameters: dict, optimizer: optax.GradientTransformation) -> TrainState:
    """Returns the state before the first step, without placing it."""
    zero = jnp.zeros((), jnp.int32)
    return TrainState(zero, zero, zero, parameters, optimizer.init(parameters))


def initialize_state(mesh: Mesh, parameters: dict, optimizer: optax.GradientTransformation) -> TrainState:
    """Returns the state before the first step. Moments are created sharded, each where it belongs.

    Args:
      parameters: laid out by `sharding.parameter_sharding`; donated to the state.
    """
    make = functools.partial(make_state, optimizer=optimizer)
    shardings = sharding.state_sharding(mesh, jax.eval_shape(make, parameters))
    return jax.jit(make, out_shardings=shardings, donate_argnums=0)(parameters)


def abstract_state(model: DecoderConfig, mesh: Mesh, optimizer: optax.GradientTransformation) -> TrainState:
    """Returns a train state of shapes with shardings, as `initialize_state` lays it out."""
    state = jax.eval_shape(functools.partial(make_state, optimizer=optimizer), decoder.abstract_parameters(model))
    return jax.tree.map(
        lambda leaf, layout: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=layout),
        state,
        sharding.state_sharding(mesh, state),
    )


def make_train_step(
    model: DecoderConfig,
    optimizer: optax.GradientTransformation,
    mesh: Mesh,
    *,
    compute_dtype: jax.typing.DTypeLike,
    remat: str,
    loss_config: LossConfig = loss.PLAIN,
    attend: Attend | None = None,
) -> jax.stages.Wrapped:
    """Returns the jitted step: (state, batch) -> (next state, `StepMetrics`).

    The state is donated: use the one that is returned. If loss or gradient are not finite, parameters and optimizer
    state stay as they are and the step counts as skipped.

    Args:
      attend: attention over the mesh, from `attention.dispatch`; None for blockwise attention.
    """
    attend = attend or dispatch.shard_attention(blockwise.attend, mesh)
    optimizer = optax.with_extra_args_support(optimizer)
    state_shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract_state(model, mesh, optimizer))
    batch_sharding = sharding.batch_sharding(mesh)  # [M, B, ...]
    # Rows stay divided over devices from layer to layer. Without this constraint XLA lays activations out like the
    # embedding's width, keeps each row on all devices of `fsdp` and reduces activations where it should gather weights.
    activation_sharding = NamedSharding(mesh, PartitionSpec(*batch_sharding.spec[1:]))  # [B, T, D]

    def micro_batch_loss(parameters, batch, total_weight):
        hidden = decoder.hidden_states(
            model,
            parameters,
            batch.tokens,
            batch.position,
            batch.subtree_end,
            compute_dtype=compute_dtype,
            remat=remat,
            constrain=lambda x: jax.lax.with_sharding_constraint(x, activation_sharding),
            attend_trees=attend,
        )
        unembedding = decoder.unembedding(model, parameters)
        value, nll = loss.weighted_loss(hidden, unembedding, _make_targets(batch), loss_config, mesh)
        return value / total_weight, nll / total_weight

    def batch_loss_and_gradient(parameters, batch):
        loss_and_gradient = jax.value_and_grad(micro_batch_loss, has_aux=True)
        total_weight = jnp.sum(batch.weight)
        if batch.tokens.shape[0] == 1:  # no second copy of the gradient to add to
            return loss_and_gradient(parameters, jax.tree.map(lambda array: array[0], batch), total_weight)

        def add(sums, micro_batch):
            return jax.tree.map(jnp.add, sums, loss_and_gradient(parameters, micro_batch, total_weight)), None

        zeros = (jnp.zeros(()), jnp.zeros(())), jax.tree.map(jnp.zeros_like, parameters)
        return jax.lax.scan(add, zeros, batch)[0]

    def train_step(state: TrainState, batch: Batch) -> tuple[TrainState, StepMetrics]:
        (value, nll), gradient = batch_loss_and_gradient(state.parameters, batch)
        gradient = jax.lax.with_sharding_constraint(gradient, state_shardings.parameters)
        with jax.named_scope(OPTIMIZER_SCOPE):
            norm = optax.tree.norm(gradient)
            finite = jnp.isfinite(value) & jnp.isfinite(norm)

            def update(parameters, optimizer_state):
                updates, optimizer_state = optimizer.update(gradient, optimizer_state, parameters, norm=norm)
                return optax.apply_updates(parameters, updates), optimizer_state

            # One `cond` over the whole state, not a `where` per array: XLA:CPU then updates the arrays in place. Not
            # measured on GPU and TPU.
            parameters, optimizer_state = jax.lax.cond(
                finite, update, lambda *unchanged: unchanged, state.parameters, state.optimizer_state
            )
        next_state = TrainState(
            step=state.step + 1,
            skipped=state.skipped + ~finite,
            skipped_in_a_row=jnp.where(finite, 0, state.skipped_in_a_row + 1),
            parameters=parameters,
            optimizer_state=optimizer_state,
        )
        return next_state, StepMetrics(
            loss=value,
            nll=nll,
            gradient_norm=norm,
            tokens=jnp.sum(batch.segment > 0),
            targets=jnp.sum(batch.weight > 0),
            response_tokens=jnp.sum((batch.weight > 0) & (batch.turn >= 0)),
            skipped=next_state.skipped,
            skipped_in_a_row=next_state.skipped_in_a_row,
            attention_pairs=jnp.sum(jnp.where(batch.segment > 0, batch.position + 1.0, 0.0)),
        )

    return jax.jit(
        train_step,
        in_shardings=(state_shardings, batch_sharding),
        out_shardings=(state_shardings, sharding.replicated_sharding(mesh)),
        donate_argnums=0,
    )


def make_evaluation_step(
    model: DecoderConfig,
    mesh: Mesh,
    *,
    compute_dtype: jax.typing.DTypeLike,
    turns: int,
    attend: Attend | None = None,
) -> Callable[[dict, Batch], EvaluationSums]:
    """Returns the jitted sums of a [1, B, ...] batch, with one bin for each of the first `turns` turns.

    Args:
      attend: attention over the mesh, from `attention.dispatch`; None for blockwise attention.
    """
    attend = attend or dispatch.shard_attention(blockwise.attend, mesh)
    score = functools.partial(loss.score_targets, mesh=mesh)

    def evaluate(parameters: dict, batch: Batch) -> EvaluationSums:
        batch = jax.tree.map(lambda array: array[0], batch)
        scores = _compute_scores(model, parameters, batch, compute_dtype, attend, score)
        bins = jnp.clip(batch.turn, -1, turns) + 1

        def sum_by_turn(values):
            return jax.ops.segment_sum(values.ravel(), bins.ravel(), turns + 2)

        return EvaluationSums(
            nll=sum_by_turn(batch.weight * scores.nll),
            weight=sum_by_turn(batch.weight),
            targets=sum_by_turn((batch.weight > 0).astype(jnp.int32)),
            correct=sum_by_turn(scores.correct.astype(jnp.int32)),
        )

    return jax.jit(
        evaluate,
        in_shardings=(
            sharding.state_sharding(mesh, decoder.abstract_parameters(model)),
            sharding.batch_sharding(mesh),
        ),
        out_shardings=sharding.replicated_sharding(mesh),
    )


def make_score_step(
    model: DecoderConfig, *, compute_dtype: jax.typing.DTypeLike, top_k: int = 0
) -> Callable[[dict, Batch], loss.TargetScores]:
    """Returns the jitted scores of every target of a [B, ...] batch, on one device.

    Args:
      top_k: number of likeliest tokens to return for each target.
    """
    score = functools.partial(loss.score_targets, top_k=top_k)
    return jax.jit(
        lambda parameters, batch: _compute_scores(model, parameters, batch, compute_dtype, blockwise.attend, score)
    )


def _compute_scores(
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
    return score(hidden, decoder.unembedding(model, parameters), _make_targets(batch))


def _make_targets(batch: Batch) -> loss.Targets:
    teacher = None
    if batch.teacher_token is not None and batch.teacher_log_probability is not None:
        teacher = loss.Teacher(batch.teacher_token, batch.teacher_log_probability)
    return loss.Targets(batch.source, batch.target, batch.weight, teacher)
