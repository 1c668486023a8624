"""Targets to loss: cross-entropy of the hidden states at the targets' sources, without the logits of all positions.

In: hidden states, the unembedding and lists of targets. Out: sums of the loss, or the scores of each target. Only
`hidden[source]` is multiplied by the unembedding, a tile of targets at a time, and tiles that hold only padding are
skipped. The gradient is computed in the same loop as the loss, while a tile's logits are in memory: three matrix
products per target and no recomputation. Logits, softmax and sums are float32. The terms that `LossConfig` adds use the
same logits; those it leaves at 0 are not traced.

Over a mesh, each device loops over the tiles of its own rows: the unembedding is gathered before the loop and its
gradient reduced after it.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.scipy.special import xlogy
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Int

from dialog_jax.training import sharding
from dialog_jax.training.config import LossConfig

TILE = 256  # targets whose logits are in memory at once, in each row of a micro-batch
TILES = "tiles"  # name of the loop over tiles in compiled programs and profiles

PLAIN = LossConfig()


class Teacher(NamedTuple):
    """A teacher's N likeliest tokens for each target. All other tokens form one more outcome, the rest.

    With p the teacher's probabilities of its tokens, r = max(0, 1 - sum(p)) that of the rest, and q the model's, the
    divergence of a target is

        sum(p * log(p / q)) + r * log(r / (1 - sum(q)))

    It is 0 iff the model gives each of these tokens the teacher's probability, however it divides the rest.
    """

    token: Int[Array, "B S N"]
    """Distinct ids."""
    log_probability: Float[Array, "B S N"]
    """In nats; -inf is an empty slot. A target whose first slot is empty has no teacher: its loss is cross-entropy."""


class Targets(NamedTuple):
    """The targets of B rows. Padding has weight 0 and follows the targets of its row.

    Three tokens `7 8 9` of which the last two are a response, in a row of S = 3 targets:

        source  0  1  0        token  8  9  0        weight  1  1  0
    """

    source: Int[Array, "B S"]
    """Index in the row of the token whose hidden state predicts the target."""
    token: Int[Array, "B S"]
    weight: Float[Array, "B S"]
    """At least 0. Not differentiated."""
    teacher: Teacher | None = None
    """Not differentiated."""


class TargetScores(NamedTuple):
    """The model's scores of each target; 0, False and -inf for padding."""

    nll: Float[Array, "B S"]
    """-log p(target | ancestors), in nats."""
    correct: Bool[Array, "B S"]
    """Whether the target has the highest logit."""
    top_token: Int[Array, "B S N"] | None = None
    """The N likeliest tokens, likeliest first; None if not requested."""
    top_log_probability: Float[Array, "B S N"] | None = None
    """Log-probabilities of `top_token`, in nats."""


def weighted_loss(
    hidden: Float[Array, "B T D"],
    unembedding: Float[Array, "V D"],
    targets: Targets,
    config: LossConfig = PLAIN,
    mesh: Mesh | None = None,
    *,
    trains_unembedding: bool = True,
    logit_cap: float | None = None,
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """Returns (sum(weight * loss), sum(weight * -log p(target | hidden[source]))), in nats, float32.

    `config` defines the first. The second is plain cross-entropy, for metrics, and has no gradient.

    Args:
      hidden: after the final norm, in the compute type.
      unembedding: used in the type of `hidden`.
      targets: with a teacher if `config.distillation` is above 0; otherwise its teacher is ignored.
      mesh: the devices over which rows and unembedding are sharded; None for one device.
      trains_unembedding: whether the unembedding has a gradient. A frozen one has none, which saves a third of the work
        and an array of its size.
      logit_cap: logits z become cap * tanh(z / cap).

    Source: the order of work is that of Liger-Kernel's fused linear cross-entropy (arXiv 2410.10989, section 3.2);
    differs in gathering targets first, tiling over them alone, and accumulating the gradient of the unembedding in
    float32.
    """
    if not config.distillation:
        targets = targets._replace(teacher=None)
    assert targets.teacher is not None or not config.distillation, "distillation without a teacher"

    def local_sums(hidden, unembedding, targets):
        sums = _weighted_loss(config, trains_unembedding, logit_cap, hidden, unembedding, _pad_to_tiles(targets))
        return tuple(x[None] for x in sums)

    value, nll = sharding.map_local_rows(mesh, local_sums)(hidden, unembedding, targets)  # [devices] each
    return jnp.sum(value), jax.lax.stop_gradient(jnp.sum(nll))


def score_targets(
    hidden: Float[Array, "B T D"],
    unembedding: Float[Array, "V D"],
    targets: Targets,
    *,
    top_k: int = 0,
    mesh: Mesh | None = None,
    logit_cap: float | None = None,
) -> TargetScores:
    """Returns the scores of every target; weights only tell padding. Not differentiable.

    Args:
      top_k: number of likeliest tokens to return for each target, at most V.
      mesh: the devices over which rows and unembedding are sharded; None for one device.
      logit_cap: logits z become cap * tanh(z / cap).
    """
    score = sharding.map_local_rows(mesh, functools.partial(_score_targets, top_k=top_k, logit_cap=logit_cap))
    return score(hidden, unembedding, targets._replace(teacher=None))


def _score_targets(hidden, unembedding, targets, top_k, logit_cap):
    count = targets.source.shape[1]
    targets = _pad_to_tiles(targets)

    def add_tile(start, scores, gathered, size):
        part = _slice(targets, start, size)
        logits, log_normalizer, nll = _tile_logits(_slice(gathered, start, size), unembedding, part.token, logit_cap)
        valid = part.weight > 0
        tile = TargetScores(jnp.where(valid, nll, 0), (jnp.argmax(logits, axis=-1) == part.token) & valid)
        if top_k:
            top, token = jax.lax.top_k(logits, top_k)
            valid = valid[..., None]
            log_probability = jnp.where(valid, top - log_normalizer[..., None], -jnp.inf)
            tile = tile._replace(top_token=jnp.where(valid, token, 0), top_log_probability=log_probability)
        return jax.tree.map(lambda x, part: jax.lax.dynamic_update_slice_in_dim(x, part, start, axis=1), scores, tile)

    shape = targets.source.shape
    empty = TargetScores(jnp.zeros(shape, jnp.float32), jnp.zeros(shape, bool))
    if top_k:
        tokens = jnp.zeros((*shape, top_k), jnp.int32)
        empty = empty._replace(top_token=tokens, top_log_probability=jnp.full(tokens.shape, -jnp.inf, jnp.float32))
    return jax.tree.map(lambda x: x[:, :count], _fold_tiles(hidden, targets, add_tile, empty))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _weighted_loss(config, trains_unembedding, logit_cap, hidden, unembedding, targets):
    del trains_unembedding  # the value does not depend on it

    def add_tile(start, sums, gathered, size):
        part = _slice(targets, start, size)
        logits, log_normalizer, nll = _tile_logits(_slice(gathered, start, size), unembedding, part.token, logit_cap)
        value, _ = _loss_and_gradient(config, logits, log_normalizer, nll, part)
        return _add_weighted(sums, part.weight, value, nll)

    return _fold_tiles(hidden, targets, add_tile, (jnp.zeros((), jnp.float32),) * 2)


def _forward(config, trains_unembedding, logit_cap, hidden, unembedding, targets):
    def add_tile(start, carry, gathered, size):
        sums, d_gathered, d_unembedding = carry
        h, part = _slice(gathered, start, size), _slice(targets, start, size)
        logits, log_normalizer, nll = _tile_logits(h, unembedding, part.token, logit_cap)
        value, d_logits = _loss_and_gradient(config, logits, log_normalizer, nll, part)
        if logit_cap is not None:
            d_logits *= 1 - (logits / logit_cap) ** 2
        d_logits = (d_logits * part.weight[..., None]).astype(hidden.dtype)  # [B, C, V]
        d_h = jnp.einsum("bcv,vd->bcd", d_logits, unembedding.astype(hidden.dtype))
        if trains_unembedding:
            # As one matrix of all targets: XLA:CPU writes a transposed copy of a batch of matrices.
            flat_d_logits, flat_h = (x.reshape(-1, x.shape[-1]) for x in (d_logits, h))
            d_unembedding += jnp.einsum("cv,cd->vd", flat_d_logits, flat_h, preferred_element_type=jnp.float32)
        d_gathered = jax.lax.dynamic_update_slice(d_gathered, d_h, (0, start, 0))
        return _add_weighted(sums, part.weight, value, nll), d_gathered, d_unembedding

    shape = (*targets.source.shape, hidden.shape[-1])
    sums = (jnp.zeros((), jnp.float32),) * 2
    zeros = (
        sums,
        jnp.zeros(shape, hidden.dtype),
        jnp.zeros(unembedding.shape if trains_unembedding else (), jnp.float32),
    )
    sums, d_gathered, d_unembedding = _fold_tiles(hidden, targets, add_tile, zeros)
    # A source has one target per branch that starts after it: the sum of their gradients is rounded once.
    d_hidden = jax.vmap(lambda zero, source, gradient: zero.at[source].add(gradient))(
        jnp.zeros(hidden.shape, jnp.float32), targets.source, d_gathered.astype(jnp.float32)
    )
    return sums, (d_hidden.astype(hidden.dtype), d_unembedding.astype(unembedding.dtype))


def _backward(config, trains_unembedding, logit_cap, gradients, cotangents):
    del config, logit_cap
    scale = cotangents[0].astype(jnp.float32)
    d_hidden, d_unembedding = ((x * scale).astype(x.dtype) for x in gradients)
    return d_hidden, d_unembedding if trains_unembedding else None, None


_weighted_loss.defvjp(_forward, _backward)


def _loss_and_gradient(config, logits, log_normalizer, nll, targets):
    """Returns (loss [B, C] of a tile's targets, its gradient with respect to the logits [B, C, V]), before weights."""
    vocabulary = logits.shape[-1]
    probability = jnp.exp(logits - log_normalizer[..., None])
    value, goal = nll, jnp.arange(vocabulary)[None, None, :] == targets.token[..., None]
    if smoothing := config.label_smoothing:
        value = (1 - smoothing) * nll + smoothing * (log_normalizer - jnp.mean(logits, axis=-1))
        goal = (1 - smoothing) * goal + smoothing / vocabulary
    if config.distillation:
        share = jnp.where(targets.teacher.log_probability[..., 0] > -jnp.inf, config.distillation, 0.0)
        divergence, teacher_goal = _divergence(logits, log_normalizer, targets.teacher)
        value = (1 - share) * value + share * divergence
        goal = (1 - share)[..., None] * goal + share[..., None] * teacher_goal
    d_logits = probability - goal
    if config.z_loss:
        value += config.z_loss * log_normalizer**2
        d_logits += (2 * config.z_loss * log_normalizer)[..., None] * probability
    return value, d_logits


def _divergence(logits, log_normalizer, teacher):
    """Returns (divergence [B, C] from the teacher, the distribution [B, C, V] at which its gradient is 0).

    That distribution is p on the teacher's tokens; the other tokens share r in the proportions of the model.
    """
    filled = teacher.log_probability > -jnp.inf
    index = jnp.where(filled, teacher.token, logits.shape[-1])  # empty slots lie beyond the vocabulary: dropped
    p = jnp.exp(teacher.log_probability)
    log_q = jnp.take_along_axis(logits, jnp.where(filled, teacher.token, 0), axis=-1) - log_normalizer[..., None]
    # The rest's logits are summed, since 1 - sum(q) is only rounding error where the model is certain.
    others = _scatter(lambda row, index: row.at[index].set(-jnp.inf, mode="drop"), logits, index)
    log_others = jax.nn.logsumexp(others, axis=-1)
    has_others = log_others > -jnp.inf
    r = jnp.where(has_others, jnp.maximum(1 - jnp.sum(p, axis=-1), 0), 0)
    log_others = jnp.where(has_others, log_others, 0)
    divergence = jnp.sum(xlogy(p, p) - p * log_q, axis=-1) + xlogy(r, r) - r * (log_others - log_normalizer)
    goal = r[..., None] * jnp.exp(others - log_others[..., None])
    return divergence, _scatter(lambda row, index, p: row.at[index].add(p, mode="drop"), goal, index, p)


def _scatter(write, *arrays):
    """Returns write(row [V], ...) for every target; vmapped so that rows may be sharded over devices."""
    return jax.vmap(jax.vmap(write))(*arrays)


def _add_weighted(sums, weight, *values):
    return tuple(total + jnp.sum(weight * value) for total, value in zip(sums, values, strict=True))


def _pad_to_tiles(targets):
    count = targets.source.shape[1]
    missing = -count % min(TILE, count)
    return jax.tree.map(lambda x: jnp.pad(x, ((0, 0), (0, missing)) + ((0, 0),) * (x.ndim - 2)), targets)


def _fold_tiles(hidden, targets, body, initial):
    """Returns the fold of body(start, carry, gathered, size) over the tiles of targets that are not all padding."""
    size = min(TILE, targets.source.shape[1])
    gathered = jnp.take_along_axis(hidden, targets.source[..., None], axis=1)  # [B, S, D]
    filled = jnp.max(jnp.sum(targets.weight > 0, axis=1))
    with jax.named_scope(TILES):
        return jax.lax.fori_loop(
            0, (filled + size - 1) // size, lambda tile, carry: body(tile * size, carry, gathered, size), initial
        )


def _tile_logits(h, unembedding, token, cap):
    """Returns (logits [B, C, V], log of their normalizer [B, C], nll [B, C]) of a tile."""
    logits = jnp.einsum("bcd,vd->bcv", h, unembedding.astype(h.dtype), preferred_element_type=jnp.float32)
    if cap is not None:
        logits = cap * jnp.tanh(logits / cap)
    log_normalizer = jax.nn.logsumexp(logits, axis=-1)
    target_logit = jnp.take_along_axis(logits, token[..., None], axis=-1)[..., 0]
    return logits, log_normalizer, log_normalizer - target_logit


def _slice(arrays, start, size):
    return jax.tree.map(lambda x: jax.lax.dynamic_slice_in_dim(x, start, size, axis=1), arrays)
