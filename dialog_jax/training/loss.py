"""Targets to loss: cross-entropy of hidden states at the sources of targets, without logits of all positions.

Only `hidden[source]` meets the vocabulary matrix, a tile of targets at a time, and tiles that hold padding only are
never computed. The gradient is formed in the same loop as the loss, while a tile's logits are at hand: three matrix
products a target and none twice. Logits, softmax and sums are float32.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

TILE = 256  # targets whose logits are in memory at once, in each row of a micro-batch


class TargetScores(NamedTuple):
    """What the model says of each target; padding holds 0 and False."""

    nll: Float[Array, "B S"]
    """-log p(target | ancestors), in nats."""
    correct: Bool[Array, "B S"]
    """Whether the target has the highest logit."""


def weighted_nll(
    hidden: Float[Array, "B T D"],
    matrix: Float[Array, "V D"],
    source: Int[Array, "B S"],
    target: Int[Array, "B S"],
    weight: Float[Array, "B S"],
) -> Float[Array, ""]:
    """Returns sum(weight * -log p(target | hidden[source])), in nats, float32.

    Args:
      hidden: after the final norm, in the compute type.
      matrix: output embedding; used in the type of `hidden`.
      weight: >= 0; 0 is padding, which must come after the targets. Not differentiated.

    Source: the order of work is that of Liger-Kernel's fused linear cross-entropy (arXiv 2410.10989, section 3.2);
    differs in gathering targets first, tiling over them alone, and accumulating the matrix's gradient in float32.
    """
    return _weighted_nll(hidden, matrix, *_whole_tiles(source, target, weight))


def score_targets(
    hidden: Float[Array, "B T D"],
    matrix: Float[Array, "V D"],
    source: Int[Array, "B S"],
    target: Int[Array, "B S"],
    weight: Float[Array, "B S"],
) -> TargetScores:
    """Returns the loss of every target by itself; `weight` only says which are padding. Not differentiable."""

    count = source.shape[1]
    source, target, weight = _whole_tiles(source, target, weight)

    def tile_scores(start, scores, gathered, size):
        logits, _, nll = _tile(gathered, matrix, target, start, size)
        valid = _slice(weight, start, size) > 0
        hit = (jnp.argmax(logits, axis=-1) == _slice(target, start, size)) & valid
        return TargetScores(
            jax.lax.dynamic_update_slice(scores.nll, jnp.where(valid, nll, 0), (0, start)),
            jax.lax.dynamic_update_slice(scores.correct, hit, (0, start)),
        )

    empty = TargetScores(jnp.zeros(source.shape, jnp.float32), jnp.zeros(source.shape, bool))
    scores = _over_tiles(hidden, source, weight, tile_scores, empty)
    return TargetScores(scores.nll[:, :count], scores.correct[:, :count])


@jax.custom_vjp
def _weighted_nll(hidden, matrix, source, target, weight):
    def tile_loss(start, total, gathered, size):
        _, _, nll = _tile(gathered, matrix, target, start, size)
        return total + jnp.sum(_slice(weight, start, size) * nll)

    return _over_tiles(hidden, source, weight, tile_loss, jnp.zeros((), jnp.float32))


def _forward_with_gradient(hidden, matrix, source, target, weight):
    def tile_gradient(start, carry, gathered, size):
        total, gathered_gradient, matrix_gradient = carry
        logits, log_normalizer, nll = _tile(gathered, matrix, target, start, size)
        w = _slice(weight, start, size)
        total += jnp.sum(w * nll)
        probability = jnp.exp(logits - log_normalizer[..., None])
        hit = jnp.arange(matrix.shape[0])[None, None, :] == _slice(target, start, size)[..., None]
        error = ((probability - hit) * w[..., None]).astype(hidden.dtype)  # [B, C, V]
        h = _slice(gathered, start, size)
        h_gradient = jnp.einsum("bcv,vd->bcd", error, matrix.astype(hidden.dtype))
        matrix_gradient += jnp.einsum("bcv,bcd->vd", error, h, preferred_element_type=jnp.float32)
        return total, jax.lax.dynamic_update_slice(gathered_gradient, h_gradient, (0, start, 0)), matrix_gradient

    shape = (*source.shape, hidden.shape[-1])
    zeros = jnp.zeros((), jnp.float32), jnp.zeros(shape, hidden.dtype), jnp.zeros(matrix.shape, jnp.float32)
    total, gathered_gradient, matrix_gradient = _over_tiles(hidden, source, weight, tile_gradient, zeros)
    hidden_gradient = jax.vmap(lambda zero, at, gradient: zero.at[at].add(gradient))(
        jnp.zeros_like(hidden), source, gathered_gradient
    )
    return total, (hidden_gradient, matrix_gradient.astype(matrix.dtype))


def _backward(gradients, cotangent):
    hidden_gradient, matrix_gradient = gradients
    scale = cotangent.astype(jnp.float32)
    return (hidden_gradient * scale).astype(hidden_gradient.dtype), matrix_gradient * scale, None, None, None


_weighted_nll.defvjp(_forward_with_gradient, _backward)


def _whole_tiles(source, target, weight):
    """The targets, padded to a whole number of tiles."""
    count = source.shape[1]
    missing = -count % min(TILE, count)
    return tuple(jnp.pad(array, ((0, 0), (0, missing))) for array in (source, target, weight))


def _over_tiles(hidden, source, weight, body, initial):
    """Folds body(start, carry, gathered, size) over the tiles of targets that are not all padding."""
    size = min(TILE, source.shape[1])
    gathered = jnp.take_along_axis(hidden, source[..., None], axis=1)  # [B, S, D]
    filled = jnp.max(jnp.sum(weight > 0, axis=1))
    step = functools.partial(_step, body=body, gathered=gathered, size=size)
    return jax.lax.fori_loop(0, (filled + size - 1) // size, step, initial)


def _step(tile, carry, *, body, gathered, size):
    return body(tile * size, carry, gathered, size)


def _tile(gathered, matrix, target, start, size):
    """(logits [B, C, V], log of their normalizer [B, C], nll [B, C]) of the tile from `start`."""
    h = _slice(gathered, start, size)
    logits = jnp.einsum("bcd,vd->bcv", h, matrix.astype(h.dtype), preferred_element_type=jnp.float32)
    log_normalizer = jax.nn.logsumexp(logits, axis=-1)
    chosen = jnp.take_along_axis(logits, _slice(target, start, size)[..., None], axis=-1)[..., 0]
    return logits, log_normalizer, log_normalizer - chosen


def _slice(array, start, size):
    return jax.lax.dynamic_slice_in_dim(array, start, size, axis=1)
