"""A mixture of experts: which experts each token is given to, and what they compute.

In: hidden states, the matrices of a layer's experts, with LoRA or without, and their `Experts`. Out: the weighted sum
of the chosen experts. The tokens are sorted by expert, so that each expert multiplies only its own (see
`model.grouped_products`). Padding is given to no expert. There is no capacity and no auxiliary loss: no other token is
dropped, and the router learns from the loss alone.

    two tokens, three experts of which two are active, choice [[0, 2], [2, 1]]
    sorted: expert 0: token 0; expert 1: token 1; expert 2: tokens 0 and 1; sizes [1, 1, 2]

    the same with token 1 as padding: choice [[0, 2], [3, 3]]
    sorted: expert 0: token 0; expert 2: token 0; none: token 1, twice; sizes [1, 0, 1]
"""

from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Bool, Float, Int

from dialog_jax.model import grouped_products
from dialog_jax.model.decoder_config import Experts
from dialog_jax.model.matrices import PRODUCT, Matrix

MATRICES = ("w_gate", "w_up", "w_down")
BIASES = ("b_gate", "b_up", "b_down")

Choice = Int[Array, "*T k"]


def route(
    config: Experts,
    x: Float[Array, "*T D"],
    w_router: Float[Array, "D E"],
    bias: Float[Array, "E"] | None,
) -> tuple[Choice, Float[Array, "*T k"]]:
    """Returns (the experts of each token, their weights), in float32.

    Args:
      bias: added to the scores; with `scoring` "sigmoid" only for the choice, without a gradient.

    Source: the routers of qwen3_moe, gpt_oss and glm4_moe in transformers 5.24.
    """
    scores = jnp.matmul(x.astype(jnp.float32), w_router.astype(jnp.float32), precision=jax.lax.Precision.HIGHEST)
    if config.scoring == "softmax_of_top":
        scores = scores if bias is None else scores + jnp.expand_dims(bias.astype(jnp.float32), range(x.ndim - 1))
        top, choice = jax.lax.top_k(scores, config.active)
        return choice, _scale(config, jax.nn.softmax(top))
    scores = jax.nn.softmax(scores) if config.scoring == "softmax" else jax.nn.sigmoid(scores)
    preferences = jax.lax.stop_gradient(scores)
    if bias is not None:
        bias = jax.lax.stop_gradient(bias.astype(jnp.float32))
        preferences = preferences + jnp.expand_dims(bias, range(x.ndim - 1))
    if config.groups > 1:
        preferences = _keep_best_groups(config, preferences)
    choice = jax.lax.top_k(preferences, config.active)[1]
    weights = jnp.take_along_axis(scores, choice, axis=-1)
    if config.normalize:
        weights = weights / (jnp.sum(weights, axis=-1, keepdims=True) + 1e-20)
    return choice, _scale(config, weights)


def _scale(config: Experts, weights: Array) -> Array:
    return weights if config.scale == 1.0 else weights * config.scale


def _keep_best_groups(config: Experts, preferences: Float[Array, "*T E"]) -> Float[Array, "*T E"]:
    """Returns -inf for experts outside the best groups; a group is as good as the sum of its two best experts."""
    by_group = preferences.reshape(*preferences.shape[:-1], config.groups, -1)
    best = jnp.sum(jax.lax.top_k(by_group, min(2, by_group.shape[-1]))[0], axis=-1)  # [*T, groups]
    kept = jax.lax.top_k(best, config.active_groups)[1]
    is_kept = jnp.any(jax.nn.one_hot(kept, config.groups, dtype=bool), axis=-2)
    return jnp.where(is_kept[..., None], by_group, -jnp.inf).reshape(preferences.shape)


def leave_out_padding(run: Callable[..., Array], segment: Int[Array, "B T"]) -> Callable[..., Array]:
    """Returns `run`, or one like it, with the tokens of segment 0 given to no expert: their output is 0."""

    def run_others(config, x, choice, weights, matrices):
        return run(config, x, jnp.where(segment[..., None] > 0, choice, config.count), weights, matrices)

    return run_others


def run(
    config: Experts,
    x: Float[Array, "B T D"],
    choice: Int[Array, "B T k"],
    weights: Float[Array, "B T k"],
    matrices: Mapping[str, Matrix],
    *,
    first: Int[Array, ""] | int = 0,
) -> Float[Array, "B T D"]:
    """Returns the weighted sum of what the chosen experts compute, in the type of `x`.

    Args:
      choice: experts; `config.count` for none.
      matrices: "w_gate" and "w_up" [E, D, F], "w_down" [E, F, D], and their biases "b_gate", "b_up" and "b_down", of
        the experts from `first` on; the others count as computing nothing. One with LoRA is as in `model.matrices`.
    """
    gate = matrices["w_gate"]
    count, active = (gate["weight"] if isinstance(gate, Mapping) else gate).shape[0], choice.shape[-1]
    expert = choice.reshape(-1) - first  # [Nk]
    expert = jnp.where((expert >= 0) & (expert < count), expert, count)  # none or of another device: sorted behind
    order = jnp.argsort(expert)
    inverse = jnp.argsort(order)
    sizes = jnp.sum(jax.nn.one_hot(expert, count, dtype=jnp.int32), axis=0)  # [E]
    is_computed = (jnp.arange(len(order)) < jnp.sum(sizes))[:, None]  # [Nk, 1]
    is_chosen = jax.nn.one_hot(expert[order], count)  # [Nk, E]

    def multiply(rows, name):
        product = _multiply(rows, matrices[f"w_{name}"], sizes, is_computed)
        bias = matrices.get(f"b_{name}")
        if bias is not None:
            assert not isinstance(bias, Mapping)
            # Not indexed: XLA:CPU adds rows one after the other in the gradient of a gather.
            chosen = jnp.matmul(is_chosen, bias.astype(jnp.float32), precision=jax.lax.Precision.HIGHEST)
            product = product + chosen.astype(rows.dtype)
        # Rows of no expert are unspecified, here and in the gradient.
        return checkpoint_name(jnp.where(is_computed, product, 0), PRODUCT)

    rows = _sort_tokens(x.reshape(-1, x.shape[-1]), order, inverse, active)  # [Nk, D]
    rows = jnp.where(is_computed, rows, 0)
    output = multiply(activate(config, multiply(rows, "gate"), multiply(rows, "up")), "down")
    output = _permute(output, inverse, order).reshape(-1, active, x.shape[-1])  # [N, k, D]
    total = jnp.einsum("nkd,nk->nd", output.astype(jnp.float32), weights.reshape(-1, active))
    return total.astype(x.dtype).reshape(x.shape)


def _multiply(
    rows: Float[Array, "M in"], matrix: Matrix, sizes: Int[Array, "E"], is_computed: Bool[Array, "M 1"]
) -> Float[Array, "M out"]:
    """Returns the product of each row with the matrix of its expert, unspecified where it is not computed."""
    if not isinstance(matrix, Mapping):
        return grouped_products.multiply(rows, matrix.astype(rows.dtype), sizes)
    low = _multiply(rows, matrix["lora_a"], sizes, is_computed)
    low = jnp.where(is_computed, low, 0) * jnp.expand_dims(matrix["lora_scale"].astype(rows.dtype), 0)
    return _multiply(rows, matrix["weight"], sizes, is_computed) + _multiply(low, matrix["lora_b"], sizes, is_computed)


def activate(config: Experts, gate: Float[Array, "..."], up: Float[Array, "..."]) -> Float[Array, "..."]:
    """Returns the input of the last matrix."""
    if not config.clamp:
        return jax.nn.silu(gate) * up
    gate = jnp.minimum(gate, config.clamp)
    up = jnp.clip(up, -config.clamp, config.clamp)
    return (up + 1) * gate * jax.nn.sigmoid(config.gate_slope * gate)


@jax.custom_vjp
def _permute(rows, order, inverse):
    """Returns `rows[order]`; its gradient is gathered too, not scattered."""
    return rows[order]


_permute.defvjp(lambda rows, order, inverse: (rows[order], inverse), lambda inverse, d: (d[inverse], None, None))


def _sort_tokens(tokens: Float[Array, "N D"], order: Array, inverse: Array, active: int) -> Float[Array, "Nk D"]:
    """Returns the token of each pair of a token and one of its experts, sorted by expert."""

    @jax.custom_vjp
    def sort(tokens, order, inverse):
        return tokens[order // active]

    def backward(inverse, d):
        return (
            jnp.sum(d[inverse].reshape(-1, active, d.shape[-1]), axis=1, dtype=jnp.float32).astype(d.dtype),
            None,
            None,
        )

    sort.defvjp(lambda tokens, order, inverse: (sort(tokens, order, inverse), inverse), backward)
    return sort(tokens, order, inverse)
