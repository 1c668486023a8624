"""Targets to loss: cross-entropy of hidden states at the sources of targets, without logits of all positions.

Only `hidden[source]` meets the vocabulary matrix, a tile of targets at a time, and tiles that hold padding only are
never computed. The gradient is formed in the same loop as the loss, while a tile's logits are at hand: three matrix
products a target and none twice. Logits, softmax and sums are float32. What `LossConfig` adds is made from the same
logits; what it leaves off is never traced.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.scipy.special import xlogy
from jaxtyping import Array, Bool, Float, Int

from dialog_jax.training.config import LossConfig

TILE = 256  # targets whose logits are in memory at once, in each row of a micro-batch
TILES = "tiles"  # the loop over them, as it is called in compiled programs and profiles


PLAIN = LossConfig()


class Teacher(NamedTuple):
    """A teacher's N likeliest tokens for each target. All other tokens together are one further outcome.

    With p the teacher's probabilities of its tokens, r = max(0, 1 - sum(p)) what it leaves to all others, and q the
    model's, the divergence of a target is

        sum(p * log(p / q)) + r * log(r / (1 - sum(q)))

    It is 0 iff the model gives each of these tokens the teacher's probability; how it divides the rest is left to it.
    """

    token: Int[Array, "B S N"]
    """Distinct ids."""
    log_probability: Float[Array, "B S N"]
    """In nats; -inf is an empty slot. A target whose first slot is empty has no teacher: it is all cross-entropy."""


class TargetScores(NamedTuple):
    """What the model says of each target; padding holds 0, False and -inf."""

    nll: Float[Array, "B S"]
    """-log p(target | ancestors), in nats."""
    correct: Bool[Array, "B S"]
    """Whether the target has the highest logit."""
    top_token: Int[Array, "B S N"] | None = None
    """The N likeliest tokens, the likeliest first; None where they were not asked for."""
    top_log_probability: Float[Array, "B S N"] | None = None
    """Theirs, in nats."""


class _Targets(NamedTuple):
    """The arrays of targets, [B, S] and [B, S, N]."""

    source: Array
    token: Array
    weight: Array
    teacher: Teacher | None


def weighted_nll(
    hidden: Float[Array, "B T D"],
    matrix: Float[Array, "V D"],
    source: Int[Array, "B S"],
    target: Int[Array, "B S"],
    weight: Float[Array, "B S"],
) -> Float[Array, ""]:
    """Returns sum(weight * -log p(target | hidden[source])), in nats, float32; see `weighted_loss`."""
    return weighted_loss(hidden, matrix, source, target, weight)[0]


def weighted_loss(
    hidden: Float[Array, "B T D"],
    matrix: Float[Array, "V D"],
    source: Int[Array, "B S"],
    target: Int[Array, "B S"],
    weight: Float[Array, "B S"],
    teacher: Teacher | None = None,
    config: LossConfig = PLAIN,
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """Returns (sum(weight * loss), sum(weight * -log p(target | hidden[source]))), in nats, float32.

    The first is what `config` says; the second, plain cross-entropy, is there to be looked at and has no gradient.

    Args:
      hidden: after the final norm, in the compute type.
      matrix: output embedding; used in the type of `hidden`.
      weight: >= 0; 0 is padding, which must come after the targets. Not differentiated.
      teacher: needed if `config.distillation` is above 0, and otherwise not read. Not differentiated.

    Source: the order of work is that of Liger-Kernel's fused linear cross-entropy (arXiv 2410.10989, section 3.2);
    differs in gathering targets first, tiling over them alone, and accumulating the matrix's gradient in float32.
    """
    assert teacher is not None or not config.distillation, "distillation without a teacher"
    targets = _whole_tiles(_Targets(source, target, weight, teacher if config.distillation else None))
    value, nll = _weighted_loss(config, hidden, matrix, targets)
    return value, jax.lax.stop_gradient(nll)


def score_targets(
    hidden: Float[Array, "B T D"],
    matrix: Float[Array, "V D"],
    source: Int[Array, "B S"],
    target: Int[Array, "B S"],
    weight: Float[Array, "B S"],
    *,
    top_k: int = 0,
) -> TargetScores:
    """Returns the loss of every target by itself; `weight` only says which are padding. Not differentiable.

    Args:
      top_k: how many of the likeliest tokens to return for each target, at most V; 0 for none.
    """
    targets = _whole_tiles(_Targets(source, target, weight, None))

    def tile_scores(start, scores, gathered, size):
        part = _slice(targets, start, size)
        logits, log_normalizer, nll = _tile(_slice(gathered, start, size), matrix, part.token)
        valid = part.weight > 0
        found = TargetScores(jnp.where(valid, nll, 0), (jnp.argmax(logits, axis=-1) == part.token) & valid)
        if top_k:
            top, token = jax.lax.top_k(logits, top_k)
            keep = valid[..., None]
            log_probability = jnp.where(keep, top - log_normalizer[..., None], -jnp.inf)
            found = found._replace(top_token=jnp.where(keep, token, 0), top_log_probability=log_probability)
        return jax.tree.map(
            lambda array, part: jax.lax.dynamic_update_slice_in_dim(array, part, start, axis=1), scores, found
        )

    shape = targets.source.shape
    empty = TargetScores(jnp.zeros(shape, jnp.float32), jnp.zeros(shape, bool))
    if top_k:
        tokens = jnp.zeros((*shape, top_k), jnp.int32)
        empty = empty._replace(top_token=tokens, top_log_probability=jnp.full(tokens.shape, -jnp.inf, jnp.float32))
    scores = _over_tiles(hidden, targets, tile_scores, empty)
    return jax.tree.map(lambda array: array[:, : source.shape[1]], scores)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _weighted_loss(config, hidden, matrix, targets):
    def tile_loss(start, sums, gathered, size):
        part = _slice(targets, start, size)
        logits, log_normalizer, nll = _tile(_slice(gathered, start, size), matrix, part.token)
        value, _ = _loss_and_error(config, logits, log_normalizer, nll, part)
        return _add(sums, part.weight, value, nll)

    return _over_tiles(hidden, targets, tile_loss, (jnp.zeros((), jnp.float32),) * 2)


def _forward_with_gradient(config, hidden, matrix, targets):
    def tile_gradient(start, carry, gathered, size):
        sums, gathered_gradient, matrix_gradient = carry
        h, part = _slice(gathered, start, size), _slice(targets, start, size)
        logits, log_normalizer, nll = _tile(h, matrix, part.token)
        value, error = _loss_and_error(config, logits, log_normalizer, nll, part)
        error = (error * part.weight[..., None]).astype(hidden.dtype)  # [B, C, V]
        h_gradient = jnp.einsum("bcv,vd->bcd", error, matrix.astype(hidden.dtype))
        # As one matrix of all targets: of a batch of them XLA:CPU writes a transposed copy.
        flat_error, flat_h = (array.reshape(-1, array.shape[-1]) for array in (error, h))
        matrix_gradient += jnp.einsum("cv,cd->vd", flat_error, flat_h, preferred_element_type=jnp.float32)
        gathered_gradient = jax.lax.dynamic_update_slice(gathered_gradient, h_gradient, (0, start, 0))
        return _add(sums, part.weight, value, nll), gathered_gradient, matrix_gradient

    shape = (*targets.source.shape, hidden.shape[-1])
    sums = (jnp.zeros((), jnp.float32),) * 2
    zeros = sums, jnp.zeros(shape, hidden.dtype), jnp.zeros(matrix.shape, jnp.float32)
    sums, gathered_gradient, matrix_gradient = _over_tiles(hidden, targets, tile_gradient, zeros)
    # A source has as many targets as its tree has branches there: their sum is rounded once.
    hidden_gradient = jax.vmap(lambda zero, at, gradient: zero.at[at].add(gradient))(
        jnp.zeros(hidden.shape, jnp.float32), targets.source, gathered_gradient.astype(jnp.float32)
    )
    return sums, (hidden_gradient.astype(hidden.dtype), matrix_gradient.astype(matrix.dtype))


def _backward(config, gradients, cotangents):
    del config
    scale = cotangents[0].astype(jnp.float32)
    hidden_gradient, matrix_gradient = ((x * scale).astype(x.dtype) for x in gradients)
    return hidden_gradient, matrix_gradient, None


_weighted_loss.defvjp(_forward_with_gradient, _backward)


def _loss_and_error(config, logits, log_normalizer, nll, targets):
    """(loss [B, C] of a tile's targets, its derivative by the logits [B, C, V]), before weights."""
    vocabulary = logits.shape[-1]
    probability = jnp.exp(logits - log_normalizer[..., None])
    value, wanted = nll, jnp.arange(vocabulary)[None, None, :] == targets.token[..., None]
    if smoothing := config.label_smoothing:
        value = (1 - smoothing) * nll + smoothing * (log_normalizer - jnp.mean(logits, axis=-1))
        wanted = (1 - smoothing) * wanted + smoothing / vocabulary
    if config.distillation:
        share = jnp.where(targets.teacher.log_probability[..., 0] > -jnp.inf, config.distillation, 0.0)
        divergence, taught = _divergence(logits, log_normalizer, targets.teacher)
        value = (1 - share) * value + share * divergence
        wanted = (1 - share)[..., None] * wanted + share[..., None] * taught
    error = probability - wanted
    if config.z_loss:
        value += config.z_loss * log_normalizer**2
        error += (2 * config.z_loss * log_normalizer)[..., None] * probability
    return value, error


def _divergence(logits, log_normalizer, teacher):
    """(divergence [B, C] from the teacher, the distribution [B, C, V] that the logits are drawn to).

    That is p on the teacher's tokens; the others share r as the model itself divides it.
    """
    filled = teacher.log_probability > -jnp.inf
    at = jnp.where(filled, teacher.token, logits.shape[-1])  # an empty slot is beyond the vocabulary: dropped
    p = jnp.exp(teacher.log_probability)
    log_q = jnp.take_along_axis(logits, jnp.where(filled, teacher.token, 0), axis=-1) - log_normalizer[..., None]
    # 1 - sum(q) by subtraction would be rounding where the model is sure: the other logits are summed instead.
    others = _scatter(lambda row, at: row.at[at].set(-jnp.inf, mode="drop"), logits, at)
    log_others = jax.nn.logsumexp(others, axis=-1)
    exist = log_others > -jnp.inf
    r = jnp.where(exist, jnp.maximum(1 - jnp.sum(p, axis=-1), 0), 0)
    log_others = jnp.where(exist, log_others, 0)
    divergence = jnp.sum(xlogy(p, p) - p * log_q, axis=-1) + xlogy(r, r) - r * (log_others - log_normalizer)
    taught = r[..., None] * jnp.exp(others - log_others[..., None])
    return divergence, _scatter(lambda row, at, p: row.at[at].add(p, mode="drop"), taught, at, p)


def _scatter(write, *arrays):
    """write(row [V], ...) for every target; batched so that rows may live on different devices."""
    return jax.vmap(jax.vmap(write))(*arrays)


def _add(sums, weight, *values):
    return tuple(total + jnp.sum(weight * value) for total, value in zip(sums, values, strict=True))


def _whole_tiles(targets):
    """The targets, padded to a whole number of tiles."""
    count = targets.source.shape[1]
    missing = -count % min(TILE, count)
    return jax.tree.map(lambda array: jnp.pad(array, ((0, 0), (0, missing)) + ((0, 0),) * (array.ndim - 2)), targets)


def _over_tiles(hidden, targets, body, initial):
    """Folds body(start, carry, gathered, size) over the tiles of targets that are not all padding."""
    size = min(TILE, targets.source.shape[1])
    gathered = jnp.take_along_axis(hidden, targets.source[..., None], axis=1)  # [B, S, D]
    filled = jnp.max(jnp.sum(targets.weight > 0, axis=1))
    step = functools.partial(_step, body=body, gathered=gathered, size=size)
    with jax.named_scope(TILES):
        return jax.lax.fori_loop(0, (filled + size - 1) // size, step, initial)


def _step(tile, carry, *, body, gathered, size):
    return body(tile * size, carry, gathered, size)


def _tile(h, matrix, token):
    """(logits [B, C, V], log of their normalizer [B, C], nll [B, C]) of a tile."""
    logits = jnp.einsum("bcd,vd->bcv", h, matrix.astype(h.dtype), preferred_element_type=jnp.float32)
    log_normalizer = jax.nn.logsumexp(logits, axis=-1)
    chosen = jnp.take_along_axis(logits, token[..., None], axis=-1)[..., 0]
    return logits, log_normalizer, log_normalizer - chosen


def _slice(arrays, start, size):
    return jax.tree.map(lambda array: jax.lax.dynamic_slice_in_dim(array, start, size, axis=1), arrays)
