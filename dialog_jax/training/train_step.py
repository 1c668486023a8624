"""One optimizer step: a train state and a batch of packed rows in, the next state and the step's metrics out.

    loss = sum(weight * -log p(token | ancestors)) / sum(weight)

Both sums run over the whole global batch: all rows, devices and micro-batches. The weights are known before the forward
pass, so each micro-batch divides by the sum of all of them, and losses and gradients of micro-batches are only added.
What `LossConfig` adds to -log p is weighted and divided in the same way.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float, Int

from dialog_jax.attention import blockwise, dispatch
from dialog_jax.attention.dispatch import Attend
from dialog_jax.batching.batches import Batch
from dialog_jax.model import adapters, decoder, parameter_trees
from dialog_jax.model.decoder_config import DecoderConfig
from dialog_jax.training import expert_sharding, loss, sharding
from dialog_jax.training.config import LossConfig
from dialog_jax.training.trainable import Parameters

OPTIMIZER_SCOPE = "optimizer"  # name of the part after the gradient in compiled programs and profiles


class TrainState(NamedTuple):
    """Everything that a step changes. The optimizer has made `step - skipped` updates."""

    step: Int[Array, ""]
    skipped: Int[Array, ""]
    """Steps whose loss or gradient was not finite; they changed neither parameters nor moments."""
    skipped_in_a_row: Int[Array, ""]
    """How many of the most recent steps were skipped."""
    trained: dict
    frozen: dict
    """The parameters that no step changes; empty in full fine-tuning."""
    optimizer_state: Any

    @property
    def parameters(self) -> dict:
        """All parameters of the model, as one tree; copies nothing."""
        return parameter_trees.merge(self.trained, self.frozen)


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
    """Pairs of a token and a token that it sees, itself included; the mean over the layers."""


def make_state(trained: dict, optimizer: optax.GradientTransformation, frozen: dict | None = None) -> TrainState:
    """Returns the state before the first step, without placing it."""
    zero = jnp.zeros((), jnp.int32)
    return TrainState(zero, zero, zero, trained, frozen or {}, optimizer.init(trained))


def initialize_state(
    mesh: Mesh, trained: dict, optimizer: optax.GradientTransformation, frozen: dict | None = None
) -> TrainState:
    """Returns the state before the first step. Moments are created sharded, each where it belongs.

    Args:
      trained, frozen: laid out by `sharding.parameter_sharding`; donated to the state.
    """

    def make(trained, frozen):
        return make_state(trained, optimizer, frozen)

    shardings = sharding.state_sharding(mesh, jax.eval_shape(make, trained, frozen))
    return jax.jit(make, out_shardings=shardings, donate_argnums=(0, 1))(trained, frozen)


def abstract_state(parameters: Parameters, mesh: Mesh, optimizer: optax.GradientTransformation) -> TrainState:
    """Returns a train state of shapes with shardings, as `initialize_state` lays it out."""
    state = jax.eval_shape(lambda parts: make_state(parts.trained, optimizer, parts.frozen), parameters)
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
    shapes: Parameters | None = None,
    lora_dropout: float = 0.0,
    seed: int = 0,
) -> jax.stages.Wrapped:
    """Returns the jitted step: (state, batch) -> (next state, `StepMetrics`).

    The state is donated: use the one that is returned. If loss or gradient are not finite, parameters and optimizer
    state stay as they are and the step counts as skipped.

    Args:
      attend: attention over the mesh, from `attention.dispatch`; None for blockwise attention.
      shapes: of the trained and frozen parameters; None if all are trained.
      lora_dropout: probability with which an input of LoRA is set to 0.
      seed: of the dropout, together with the step.
    """
    attend = attend or dispatch.shard_attention(blockwise.attend, mesh)
    optimizer = optax.with_extra_args_support(optimizer)
    shapes = shapes or Parameters(decoder.abstract_parameters(model), {})
    state_shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract_state(shapes, mesh, optimizer))
    trains_unembedding = bool({"embedding" if model.tie_embeddings else "lm_head", "lm_head"} & shapes.trained.keys())
    batch_sharding = sharding.batch_sharding(mesh)  # [M, B, ...]
    # Rows stay divided over devices from layer to layer. Without this constraint XLA lays activations out like the
    # embedding's width, keeps each row on all devices of `fsdp` and reduces activations where it should gather weights.
    activation_sharding = NamedSharding(mesh, PartitionSpec(*batch_sharding.spec[1:]))  # [B, T, D]

    def micro_batch_loss(trained, frozen, batch, total_weight, key):
        parameters = parameter_trees.merge(trained, frozen)
        if lora_dropout:
            parameters = adapters.add_dropout(parameters, lora_dropout, key)
        hidden = decoder.hidden_states(
            model,
            parameters,
            batch.tokens,
            batch.position,
            batch.subtree_end,
            segment=batch.segment,
            compute_dtype=compute_dtype,
            remat=remat,
            constrain=lambda x: jax.lax.with_sharding_constraint(x, activation_sharding),
            attend_trees=attend,
            run_experts=expert_sharding.shard_experts(mesh),
        )
        unembedding = decoder.unembedding(model, parameters)
        value, nll = loss.weighted_loss(
            hidden,
            unembedding,
            make_targets(batch),
            loss_config,
            mesh,
            trains_unembedding=trains_unembedding,
            logit_cap=model.logit_cap,
        )
        return value / total_weight, nll / total_weight

    def batch_loss_and_gradient(trained, frozen, batch, key):
        loss_and_gradient = jax.value_and_grad(micro_batch_loss, has_aux=True)
        total_weight = jnp.sum(batch.weight)
        if batch.tokens.shape[0] == 1:  # no second copy of the gradient to add to
            return loss_and_gradient(trained, frozen, jax.tree.map(lambda array: array[0], batch), total_weight, key)

        def add(sums, numbered_micro_batch):
            number, micro_batch = numbered_micro_batch
            parts = loss_and_gradient(trained, frozen, micro_batch, total_weight, jax.random.fold_in(key, number))
            return jax.tree.map(jnp.add, sums, parts), None

        zeros = (jnp.zeros(()), jnp.zeros(())), jax.tree.map(jnp.zeros_like, trained)
        return jax.lax.scan(add, zeros, (jnp.arange(batch.tokens.shape[0]), batch))[0]

    def train_step(state: TrainState, batch: Batch) -> tuple[TrainState, StepMetrics]:
        key = jax.random.fold_in(jax.random.key(seed), state.step)
        (value, nll), gradient = batch_loss_and_gradient(state.trained, state.frozen, batch, key)
        gradient = jax.lax.with_sharding_constraint(gradient, state_shardings.trained)
        with jax.named_scope(OPTIMIZER_SCOPE):
            norm = optax.tree.norm(gradient)
            finite = jnp.isfinite(value) & jnp.isfinite(norm)

            def update(trained, optimizer_state):
                updates, optimizer_state = optimizer.update(gradient, optimizer_state, trained, norm=norm)
                return optax.apply_updates(trained, updates), optimizer_state

            # One `cond` over the whole state, not a `where` per array: XLA:CPU then updates the arrays in place. Not
            # measured on GPU and TPU.
            trained, optimizer_state = jax.lax.cond(
                finite, update, lambda *unchanged: unchanged, state.trained, state.optimizer_state
            )
        next_state = TrainState(
            step=state.step + 1,
            skipped=state.skipped + ~finite,
            skipped_in_a_row=jnp.where(finite, 0, state.skipped_in_a_row + 1),
            trained=trained,
            frozen=state.frozen,
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
            attention_pairs=jnp.sum(jnp.where(batch.segment > 0, _count_visible(model, batch.position), 0.0)),
        )

    return jax.jit(
        train_step,
        in_shardings=(state_shardings, batch_sharding),
        out_shardings=(state_shardings, sharding.replicated_sharding(mesh)),
        donate_argnums=0,
    )


def _count_visible(model: DecoderConfig, position: Int[Array, "..."]) -> Float[Array, "..."]:
    """Returns how many tokens a token sees, itself included: the mean over the layers."""
    visible = jnp.zeros(position.shape, jnp.float32)
    for window, share in model.window_shares.items():
        visible += share * jnp.minimum(position + 1.0, window)
    return visible


def make_targets(batch: Batch) -> loss.Targets:
    """Returns the targets of a batch, with its teacher if it has one."""
    teacher = None
    if batch.teacher_token is not None and batch.teacher_log_probability is not None:
        teacher = loss.Teacher(batch.teacher_token, batch.teacher_log_probability)
    return loss.Targets(batch.source, batch.target, batch.weight, teacher)
