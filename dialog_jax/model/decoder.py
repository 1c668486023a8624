"""The decoder: tokens to hidden states. What differs between families is in its `DecoderConfig`.

In: a config, parameters (a nested dict of arrays, those of the layers stacked on a leading axis L) and rows of tokens.
Out: hidden states after the final norm; the loss and generation multiply by the unembedding, where it is needed.
Flax NNX declares the modules; outside this file parameters are plain arrays. Knows no files and no devices.

    x = embedding[tokens]                    # [B, T, D]
    for layer in layers:
        x = x + attention(norm(x))           # q, k, v: project, norm (some families), rotate; attend; project
        x = x + feed_forward(norm(x))        # down(activation(gate(x)) * up(x)), or a mixture of experts of that form
    return norm(x)
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int, Key

from dialog_jax.attention import blockwise
from dialog_jax.attention.mask import Mask
from dialog_jax.errors import UserError
from dialog_jax.model import experts, matrices, rotary
from dialog_jax.model.decoder_config import DecoderConfig
from dialog_jax.model.layer_runs import find_setting, scan_layers
from dialog_jax.model.layers import Decoder, Rotate, normalize
from dialog_jax.model.rotary import Rotary

SOFT_PROMPT = "soft_prompt"  # name of the parameter [P, D] whose rows are the embeddings of the ids from V on
LAYERS = "layers"  # name of the loop over layers in compiled programs and profiles

# Each attention kernel names its own residuals; naming them here as well would save them twice.
_SAVE_ATTENTION = jax.checkpoint_policies.save_only_these_names(blockwise.OUTPUT)

# What the backward pass saves: of attention with its projections, and of a whole layer. None saves everything.
REMAT: dict[str, tuple[Callable[..., Any] | None, Callable[..., Any] | None]] = {
    "none": (None, None),
    "attention": (_SAVE_ATTENTION, None),
    "dots": (None, jax.checkpoint_policies.save_only_these_names(matrices.PRODUCT, blockwise.OUTPUT)),
    "full": (None, jax.checkpoint_policies.nothing_saveable),
}


@functools.lru_cache(maxsize=16)
def _declare(config: DecoderConfig) -> tuple:
    return nnx.split(nnx.eval_shape(lambda: Decoder(config, rngs=nnx.Rngs(0))))


def abstract_parameters(config: DecoderConfig) -> dict:
    """Returns the nested dict of parameters as `jax.ShapeDtypeStruct`, float32."""
    return nnx.to_pure_dict(_declare(config)[1])


def init_parameters(config: DecoderConfig, key: Key[Array, ""]) -> dict:
    """Returns initial float32 parameters: matrices normal with standard deviation 0.02, norms one, biases zero."""
    return nnx.to_pure_dict(nnx.state(Decoder(config, rngs=nnx.Rngs(key))))


def bind(config: DecoderConfig, parameters: dict) -> Decoder:
    """Returns the module with these parameters, whose matrices may be dicts (see `model.matrices`)."""
    graph, state = _declare(config)
    declared = nnx.to_pure_dict(state)
    parameters = {name: parameters[name] for name in declared}
    return nnx.merge(graph, nnx.State(jax.tree.map(lambda _, value: nnx.Param(value), declared, parameters)))


def hidden_states(
    config: DecoderConfig,
    parameters: dict,
    tokens: Int[Array, "B T"],
    position: Int[Array, "B T"],
    subtree_end: Int[Array, "B T"],
    *,
    segment: Int[Array, "B T"] | None = None,
    compute_dtype: jax.typing.DTypeLike = jnp.float32,
    remat: str = "none",
    constrain: Callable[[Array], Array] = lambda x: x,
    attend_trees: Callable[..., Array] = blockwise.attend,
    run_experts: Callable[..., Array] = experts.run,
) -> Float[Array, "B T D"]:
    """Returns hidden states after the final norm, in `compute_dtype`.

    Args:
      position: of each token in its own context, for RoPE; siblings in a tree share it.
      subtree_end: one more than the last token that sees this one (see `attention.blockwise`).
      segment: 0 for padding, which experts do not compute; None if there is none, or to compute it like other tokens.
      remat: what the backward pass recomputes, from least to most. "none": only the attention probabilities, which no
        kernel saves; "attention": also queries, keys and values; "dots": everything but products with weights and the
        attention output; "full": everything but each layer's input.
      constrain: sharding constraint on the residual stream, applied before, between and after the layers.
      attend_trees: (q, k, v, mask) and, by name, the model's `cap` and `sinks` to the attention output; all kernels
        agree to rounding.
      run_experts: as `experts.run`, which is for one device.

    Raises:
      UserError: `remat` is unknown.
    """
    if remat not in REMAT:
        raise UserError(f"remat is {remat!r}; choose one of {', '.join(REMAT)}")
    model = bind(config, parameters)
    attention_policy, layer_policy = REMAT[remat]
    if segment is not None:
        run_experts = experts.leave_out_padding(run_experts, segment)

    def make_body(run):
        make_rotate = rotations(run.rotary, run.heads.head_dim, position)

        def run_layer(x, inputs):
            parameters, number = inputs
            window, rotate = find_setting(run.window, number), make_rotate(find_setting(run.kind, number))
            mask = Mask(subtree_end) if window is None else Mask(subtree_end, position, window)

            def attend(q, k, v, **additions):
                return attend_trees(q, k, v, mask, **additions), None

            return run.bind(parameters)(x, rotate, attend, attention_policy, run_experts)

        if layer_policy is not None:
            # A scan separates the forward from the backward pass, so the barrier that prevents CSE is not needed; with
            # several layers in the scan's body, it keeps them from being recomputed all at once.
            run_layer = jax.checkpoint(run_layer, policy=layer_policy, prevent_cse=run.places is not None)
        return lambda x, inputs: run_layer(constrain(x), inputs)

    x = embed(config, parameters, tokens, compute_dtype)  # [B, T, D]
    with jax.named_scope(LAYERS):
        x = scan_layers(config, model, make_body, constrain(x))
    return finish(config, model, constrain(x))


def finish(config: DecoderConfig, model: Decoder, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
    """Returns the hidden states, whose product with the unembedding is the logits before a cap."""
    x = normalize(x, model.final_norm[...], config)
    return x if config.logit_scale == 1.0 else x * config.logit_scale


def cap_logits(config: DecoderConfig, logits: Float[Array, "..."]) -> Float[Array, "..."]:
    """Returns the logits as the model caps them; the loss does so itself, tile by tile."""
    return logits if config.logit_cap is None else config.logit_cap * jnp.tanh(logits / config.logit_cap)


def embed(
    config: DecoderConfig, parameters: dict, tokens: Int[Array, "B T"], dtype: jax.typing.DTypeLike
) -> Float[Array, "B T D"]:
    """Returns the scaled embeddings of `tokens`; id V + i is row i of the soft prompt, if the parameters have one.

    V = 4, P = 2:  tokens [4, 5, 0, 3]   ->   [soft_prompt[0], soft_prompt[1], embedding[0], embedding[3]]
    """

    def scale(x):
        return x if config.embedding_scale == 1.0 else x * jnp.asarray(config.embedding_scale, x.dtype)

    def look_up(tokens):
        return scale(matrices.look_up(parameters["embedding"], tokens, dtype))

    if SOFT_PROMPT not in parameters:
        return look_up(tokens)
    prompt = parameters[SOFT_PROMPT]
    is_virtual = tokens >= config.vocab_size
    words = look_up(jnp.where(is_virtual, 0, tokens))
    # Index P is beyond the rows: it reads zeros, and the backward pass adds nothing for it.
    index = jnp.where(is_virtual, tokens - config.vocab_size, len(prompt))
    virtual = prompt.at[index].get(mode="fill", fill_value=0).astype(dtype)
    if config.scales_soft_prompt:
        virtual = scale(virtual)
    return jnp.where(is_virtual[..., None], virtual, words)


def unembedding(config: DecoderConfig, parameters: dict) -> Float[Array, "V D"]:
    """Returns the matrix that maps hidden states to logits: the embedding itself where the two are tied."""
    matrix = parameters["embedding" if config.tie_embeddings else "lm_head"]
    weight = matrix["weight"] if isinstance(matrix, Mapping) else matrix
    factors = parameters.get("lm_head")
    if not isinstance(factors, Mapping):
        return weight
    return matrices.add_update(weight.T, factors).T


def rotations(
    rotary_kinds: Sequence[Rotary | None], head_dim: int, position: Int[Array, "B T"]
) -> Callable[[Any], Rotate]:
    """Returns a function of the index of a kind of RoPE, to the function that rotates queries and keys."""
    kinds = [kind for kind in rotary_kinds if kind is not None]
    if not kinds:
        return lambda index: lambda q, k: (q, k)
    found = {kind: kind.rotation(position, head_dim) for kind in kinds}
    nothing = jnp.ones_like(found[kinds[0]][0]), jnp.zeros_like(found[kinds[0]][1])
    angles = [found[kind] if kind is not None else nothing for kind in rotary_kinds]
    cosines, sines = (jnp.stack(arrays) if len(arrays) > 1 else arrays for arrays in zip(*angles, strict=True))
    growing = next((kind for kind in kinds if kind.query_growth), None)

    def make_rotate(index):
        def rotate(q, k):
            q, k = (rotary.rotate(x, cosines[index], sines[index]) for x in (q, k))
            if growing is not None:
                q = q * growing.query_scale(position)[:, :, None, None].astype(q.dtype)
            return q, k

        return rotate

    return make_rotate
