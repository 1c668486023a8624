"""Steps without an update: sums over held-out rows by turn, and the scores of each target."""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int

from dialog_jax.attention import blockwise, dispatch
from dialog_jax.attention.dispatch import Attend
from dialog_jax.batching.batches import Batch
from dialog_jax.model import decoder, experts, parameter_trees
from dialog_jax.model.decoder_config import DecoderConfig
from dialog_jax.training import expert_sharding, loss, sharding, train_step
from dialog_jax.training.trainable import Parameters


class EvaluationSums(NamedTuple):
    """Sums over a batch by turn. The first bin holds targets outside responses, the last one all later turns."""

    nll: Float[Array, "bins"]
    """sum(weight * nll), nats."""
    weight: Float[Array, "bins"]
    targets: Int[Array, "bins"]
    correct: Int[Array, "bins"]
    """Targets that have the highest logit."""


def make_evaluation_step(
    model: DecoderConfig,
    mesh: Mesh,
    *,
    compute_dtype: jax.typing.DTypeLike,
    turns: int,
    attend: Attend | None = None,
    shapes: Parameters | None = None,
) -> Callable[[dict, Batch], EvaluationSums]:
    """Returns the jitted sums of a [1, B, ...] batch, with one bin for each of the first `turns` turns.

    Args:
      attend: attention over the mesh, from `attention.dispatch`; None for blockwise attention.
      shapes: of the trained and frozen parameters; None if all are trained.
    """
    shapes = shapes or Parameters(decoder.abstract_parameters(model), {})
    attend = attend or dispatch.shard_attention(blockwise.attend, mesh)
    score = functools.partial(loss.score_targets, mesh=mesh, logit_cap=model.logit_cap)

    def evaluate(parameters: dict, batch: Batch) -> EvaluationSums:
        batch = jax.tree.map(lambda array: array[0], batch)
        run_experts = expert_sharding.shard_experts(mesh)
        scores = _compute_scores(model, parameters, batch, compute_dtype, attend, run_experts, score)
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
            sharding.state_sharding(mesh, parameter_trees.merge(*shapes)),
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
    score = functools.partial(loss.score_targets, top_k=top_k, logit_cap=model.logit_cap)
    return jax.jit(
        lambda parameters, batch: _compute_scores(
            model, parameters, batch, compute_dtype, blockwise.attend, experts.run, score
        )
    )


def _compute_scores(
    model: DecoderConfig,
    parameters: dict,
    batch: Batch,
    compute_dtype: jax.typing.DTypeLike,
    attend: Attend,
    run_experts: Callable[..., Array],
    score: Callable[..., loss.TargetScores],
) -> loss.TargetScores:
    hidden = decoder.hidden_states(
        model,
        parameters,
        batch.tokens,
        batch.position,
        batch.subtree_end,
        segment=batch.segment,
        compute_dtype=compute_dtype,
        attend_trees=attend,
        run_experts=run_experts,
    )
    return score(hidden, decoder.unembedding(model, parameters), train_step.make_targets(batch))
