"""The loss of a response in a forward pass of its own, and its gradient: the reference for those of one pass.

Naive as `evaluation.k_passes`: the logits of all positions and their log-softmax. Shares only the decoder with
training; knows no row, target list or fused loss.
"""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32, Int, Int32

from dialog_jax.evaluation.k_passes import Pass
from dialog_jax.model import decoder, parameter_trees
from dialog_jax.model.decoder_config import DecoderConfig

_SHORTEST_LENGTH = 128


def compute_response_nll(
    model: DecoderConfig, parameters: dict, one: Pass, *, compute_dtype: jax.typing.DTypeLike = jnp.float32
) -> Float32[np.ndarray, " r"]:
    """Returns -log p of each token of the response, in nats, from a forward pass over prompt and response."""
    nll = _forward(model, compute_dtype, parameters, _pad(one.tokens))
    return np.asarray(nll)[one.start - 1 : len(one.tokens) - 1]


def compute_nll_and_gradient(
    model: DecoderConfig, trained: dict, passes: Sequence[Pass], *, frozen: dict | None = None, remat: str = "dots"
) -> tuple[list[Float32[np.ndarray, " r"]], dict]:
    """Returns (`compute_response_nll` of each pass, gradient of the sum over all tokens of weight * nll).

    Args:
      trained: the parameters that the gradient is of.
      frozen: the others.
      remat: see `decoder.hidden_states`.
    """
    all_nll, gradient = [], jax.tree.map(jnp.zeros_like, trained)
    for one in passes:
        tokens = _pad(one.tokens)
        weight = np.zeros(tokens.shape[1] - 1, np.float32)
        response = slice(one.start - 1, len(one.tokens) - 1)
        weight[response] = one.weight
        nll, gradient = _add_gradient(model, remat, trained, frozen or {}, gradient, tokens, weight)
        all_nll.append(np.asarray(nll)[response])
    return all_nll, gradient


def _pad(tokens: Int32[np.ndarray, " n"]) -> Int32[np.ndarray, "1 T"]:
    """Returns the tokens padded with zeros to 128, 192, 256, 384, 512, ..., so that few programs are compiled."""
    length = _SHORTEST_LENGTH
    while length < len(tokens):
        length = length * 3 // 2 if length & (length - 1) == 0 else length * 4 // 3
    return np.pad(tokens, (0, length - len(tokens)))[None]


def _compute_token_nll(
    model: DecoderConfig, parameters: dict, tokens: Int[Array, "1 T"], compute_dtype, remat: str
) -> Float[Array, " T-1"]:
    """Returns -log p of every token but the first under the causal mask."""
    length = tokens.shape[1]
    hidden = decoder.hidden_states(
        model,
        parameters,
        tokens,
        jnp.arange(length, dtype=jnp.int32)[None],
        jnp.full((1, length), length, jnp.int32),
        compute_dtype=compute_dtype,
        remat=remat,
    )
    unembedding = decoder.unembedding(model, parameters)
    logits = hidden[0, :-1].astype(jnp.float32) @ unembedding.astype(jnp.float32).T  # [T-1, V]
    logits = decoder.cap_logits(model, logits)
    return -jnp.take_along_axis(jax.nn.log_softmax(logits), tokens[0, 1:, None], axis=1)[:, 0]


@functools.partial(jax.jit, static_argnums=(0, 1))
def _forward(model, compute_dtype, parameters, tokens):
    return _compute_token_nll(model, parameters, tokens, compute_dtype, "none")


@functools.partial(jax.jit, static_argnums=(0, 1), donate_argnums=4)
def _add_gradient(model, remat, trained, frozen, gradient, tokens, weight):
    """Returns (-log p of every token but the first, `gradient` plus the gradient of sum(weight * -log p))."""

    def loss(trained):
        nll = _compute_token_nll(model, parameter_trees.merge(trained, frozen), tokens, jnp.float32, remat)
        return jnp.sum(weight * nll), nll

    pass_gradient, nll = jax.grad(loss, has_aux=True)(trained)
    return nll, jax.tree.map(jnp.add, gradient, pass_gradient)
