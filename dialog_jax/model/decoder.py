"""The decoder of the llama, qwen2 and qwen3 families: tokens to hidden states.

In: a config, parameters (a nested dict of arrays, those of the layers stacked on a leading axis L) and rows of tokens.
Out: hidden states after the final norm; the loss and generation multiply by the unembedding, where it is needed.
Flax NNX declares the modules; outside this file parameters are plain arrays. Knows no files and no devices.

    x = embedding[tokens]                                                   # [B, T, D]
    for layer in layers:
        x = x + attention(norm(x))           # q, k, v: project, norm (qwen3), rotate; attend; project
        x = x + feed_forward(norm(x))        # SwiGLU
    return norm(x)
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int, Key

from dialog_jax.attention import blockwise
from dialog_jax.errors import UserError
from dialog_jax.model import matrices, rotary

FAMILIES = ("llama", "qwen2", "qwen3")

SOFT_PROMPT = "soft_prompt"  # name of the parameter [P, D] whose rows are the embeddings of the ids from V on
LAYERS = "layers"  # name of the loop over layers in compiled programs and profiles
_PRODUCT = "product"  # name of the products with weights, for remat

Rotate = Callable[[Float[Array, "B T N H"]], Float[Array, "B T N H"]]

# Each attention kernel names its own residuals; naming them here as well would save them twice.
_SAVE_ATTENTION = jax.checkpoint_policies.save_only_these_names(blockwise.OUTPUT)

# What the backward pass saves: of attention with its projections, and of a whole layer. None saves everything.
REMAT: dict[str, tuple[Callable[..., Any] | None, Callable[..., Any] | None]] = {
    "none": (None, None),
    "attention": (_SAVE_ATTENTION, None),
    "dots": (None, jax.checkpoint_policies.save_only_these_names(_PRODUCT, blockwise.OUTPUT)),
    "full": (None, jax.checkpoint_policies.nothing_saveable),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class DecoderConfig:
    """The structure of a decoder. `max_length` is its context in tokens, `rope_theta` the base of its RoPE."""

    family: str
    vocab_size: int
    width: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    feed_forward: int
    max_length: int
    rope_theta: float
    rope_scaling: rotary.Llama3Scaling | None = None
    norm_epsilon: float = 1e-6
    tie_embeddings: bool = False
    qkv_bias: bool = False
    output_bias: bool = False
    qk_norm: bool = False

    def __post_init__(self):
        if self.family not in FAMILIES:
            raise UserError(f"model family is {self.family!r}; known families are {', '.join(FAMILIES)}")
        for field in ("vocab_size", "width", "layers", "heads", "kv_heads", "head_dim", "feed_forward", "max_length"):
            if getattr(self, field) < 1:
                raise UserError(f"{field} is {getattr(self, field)}; it must be at least 1")
        for name in ("rope_theta", "norm_epsilon"):
            if not getattr(self, name) > 0:
                raise UserError(f"{name} is {getattr(self, name)}; it must be above 0")
        if self.heads % self.kv_heads:
            raise UserError(f"heads ({self.heads}) must be a multiple of kv_heads ({self.kv_heads})")
        if self.head_dim % 2:
            raise UserError(f"head_dim is {self.head_dim}; RoPE rotates pairs, so it must be even")
        if self.qk_norm != (self.family == "qwen3"):
            raise UserError(f"qk_norm is {self.qk_norm}, but qwen3 has q/k norms and no other family has")
        if self.family == "qwen2" and not (self.qkv_bias and not self.output_bias):
            raise UserError("qwen2 has biases on q, k and v and none on the output: qkv_bias=True, output_bias=False")
        if self.family != "qwen2" and self.qkv_bias != self.output_bias:
            raise UserError(
                f"{self.family} has biases on all attention projections or on none, got qkv_bias={self.qkv_bias}, "
                f"output_bias={self.output_bias}"
            )


def rms_norm(x: Float[Array, "..."], weight: Float[Array, "D"], epsilon: float) -> Float[Array, "..."]:
    """Returns `x` divided by its root mean square, times `weight`; float32 inside, in the type of `x` outside."""
    wide = x.astype(jnp.float32)
    scale = jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + epsilon)
    return (wide * scale * jnp.expand_dims(weight.astype(jnp.float32), range(x.ndim - 1))).astype(x.dtype)


def _normal(rngs: nnx.Rngs, *shape: int) -> nnx.Param:
    return nnx.Param(0.02 * jax.random.normal(rngs.params(), shape, jnp.float32))


def _ones(size: int) -> nnx.Param:
    return nnx.Param(jnp.ones((size,), jnp.float32))


def _zeros(size: int) -> nnx.Param:
    return nnx.Param(jnp.zeros((size,), jnp.float32))


class Attention(nnx.Module):
    """Projections, q/k norms and RoPE around an attention kernel."""

    def __init__(self, config: DecoderConfig, *, rngs: nnx.Rngs):
        self.config = config
        query, key = config.heads * config.head_dim, config.kv_heads * config.head_dim
        self.w_query = _normal(rngs, config.width, query)
        self.w_key = _normal(rngs, config.width, key)
        self.w_value = _normal(rngs, config.width, key)
        self.w_output = _normal(rngs, query, config.width)
        if config.qkv_bias:
            self.b_query, self.b_key, self.b_value = _zeros(query), _zeros(key), _zeros(key)
        if config.output_bias:
            self.b_output = _zeros(config.width)
        if config.qk_norm:
            self.query_norm, self.key_norm = _ones(config.head_dim), _ones(config.head_dim)

    def __call__(self, x: Float[Array, "B T D"], rotate: Rotate, attend: Callable) -> tuple[Float[Array, "B T D"], Any]:
        config = self.config
        q = _project(x, self.w_query, self.b_query if config.qkv_bias else None)
        k = _project(x, self.w_key, self.b_key if config.qkv_bias else None)
        v = _project(x, self.w_value, self.b_value if config.qkv_bias else None)
        q = q.reshape(*x.shape[:2], config.heads, config.head_dim)  # [B, T, N, H]
        k = k.reshape(*x.shape[:2], config.kv_heads, config.head_dim)  # [B, T, K, H]
        v = v.reshape(*x.shape[:2], config.kv_heads, config.head_dim)
        if config.qk_norm:
            q = rms_norm(q, self.query_norm[...], config.norm_epsilon)
            k = rms_norm(k, self.key_norm[...], config.norm_epsilon)
        output, cache = attend(rotate(q), rotate(k), v)
        output = output.reshape(*x.shape[:2], config.heads * config.head_dim)  # [B, T, N * H]
        return _project(output, self.w_output, self.b_output if config.output_bias else None), cache


class FeedForward(nnx.Module):
    """SwiGLU: down(silu(gate(x)) * up(x))."""

    def __init__(self, config: DecoderConfig, *, rngs: nnx.Rngs):
        self.w_gate = _normal(rngs, config.width, config.feed_forward)
        self.w_up = _normal(rngs, config.width, config.feed_forward)
        self.w_down = _normal(rngs, config.feed_forward, config.width)

    def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        return _project(jax.nn.silu(_project(x, self.w_gate)) * _project(x, self.w_up), self.w_down)


class Layer(nnx.Module):
    """Attention, then feed-forward, each on the normalized residual stream."""

    def __init__(self, config: DecoderConfig, *, rngs: nnx.Rngs):
        self.epsilon = config.norm_epsilon
        self.attention_norm = _ones(config.width)
        self.attention = Attention(config, rngs=rngs)
        self.feed_forward_norm = _ones(config.width)
        self.feed_forward = FeedForward(config, rngs=rngs)

    def __call__(
        self, x: Float[Array, "B T D"], rotate: Rotate, attend: Callable, policy: Callable[..., Any] | None = None
    ) -> tuple[Float[Array, "B T D"], Any]:
        """Returns the residual stream after this layer, and the cache that `attend` returns.

        Args:
          rotate: RoPE at the positions of `x`.
          attend: (q, k, v) to (attention output, cache or None). Training and decoding differ only here.
          policy: what the backward pass saves of attention and its projections; None for everything.
        """

        def attention(x):
            return self.attention(rms_norm(x, self.attention_norm[...], self.epsilon), rotate, attend)

        if policy is not None:
            attention = jax.checkpoint(attention, policy=policy, prevent_cse=False)
        output, cache = attention(x)
        x = x + output
        return x + self.feed_forward(rms_norm(x, self.feed_forward_norm[...], self.epsilon)), cache


class Decoder(nnx.Module):
    """Embedding, layers and final norm; `layers` is one `Layer` whose parameters have a leading axis L."""

    def __init__(self, config: DecoderConfig, *, rngs: nnx.Rngs):
        self.embedding = _normal(rngs, config.vocab_size, config.width)
        graph, _ = nnx.split(nnx.eval_shape(lambda: Layer(config, rngs=nnx.Rngs(0))))
        keys = jax.random.split(rngs.params(), config.layers)
        self.layers = nnx.merge(graph, jax.vmap(lambda key: nnx.state(Layer(config, rngs=nnx.Rngs(key))))(keys))
        self.final_norm = _ones(config.width)
        if not config.tie_embeddings:
            self.lm_head = _normal(rngs, config.vocab_size, config.width)


def _project(x: Array, weight: nnx.Param, bias: nnx.Param | None = None) -> Array:
    # As one matrix of all tokens: with a batch axis XLA:CPU transposes the inputs of the weight's gradient, which takes
    # a third of the feed-forward's time.
    flat = checkpoint_name(matrices.multiply(x.reshape(-1, x.shape[-1]), weight.get_value()), _PRODUCT)
    y = flat.reshape(*x.shape[:-1], flat.shape[-1])
    return y if bias is None else y + jnp.expand_dims(bias[...].astype(x.dtype), range(y.ndim - 1))


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
    compute_dtype: jax.typing.DTypeLike = jnp.float32,
    remat: str = "none",
    constrain: Callable[[Array], Array] = lambda x: x,
    attend_trees: Callable[..., Array] = blockwise.attend,
) -> Float[Array, "B T D"]:
    """Returns hidden states after the final norm, in `compute_dtype`.

    Args:
      position: of each token in its own context, for RoPE; siblings in a tree share it.
      subtree_end: one more than the last token that sees this one (see `attention.blockwise`).
      remat: what the backward pass recomputes, from least to most. "none": only the attention probabilities, which no
        kernel saves; "attention": also queries, keys and values; "dots": everything but products with weights and the
        attention output; "full": everything but each layer's input.
      constrain: sharding constraint on the residual stream, applied before, between and after the layers.
      attend_trees: (q, k, v, subtree_end) to the attention output; all kernels agree to rounding.

    Raises:
      UserError: `remat` is unknown.
    """
    if remat not in REMAT:
        raise UserError(f"remat is {remat!r}; choose one of {', '.join(REMAT)}")
    model = bind(config, parameters)
    graph, layers = nnx.split(model.layers)
    rotate = make_rotate(config, position)

    def attend(q, k, v):
        return attend_trees(q, k, v, subtree_end), None

    attention_policy, layer_policy = REMAT[remat]

    def body(x, layer):
        return nnx.merge(graph, layer)(x, rotate, attend, attention_policy)

    if layer_policy is not None:
        # A scan separates the forward from the backward pass, so the barrier that prevents CSE is not needed.
        body = jax.checkpoint(body, policy=layer_policy, prevent_cse=False)
    x = embed(config, parameters, tokens, compute_dtype)  # [B, T, D]
    with jax.named_scope(LAYERS):
        x, _ = jax.lax.scan(lambda x, layer: body(constrain(x), layer), constrain(x), layers)
    x = constrain(x)
    return rms_norm(x, model.final_norm[...], config.norm_epsilon)


def embed(
    config: DecoderConfig, parameters: dict, tokens: Int[Array, "B T"], dtype: jax.typing.DTypeLike
) -> Float[Array, "B T D"]:
    """Returns the embeddings of `tokens`; id V + i is row i of the soft prompt, if the parameters have one.

    V = 4, P = 2:  tokens [4, 5, 0, 3]   ->   [soft_prompt[0], soft_prompt[1], embedding[0], embedding[3]]
    """
    if SOFT_PROMPT not in parameters:
        return matrices.look_up(parameters["embedding"], tokens, dtype)
    prompt = parameters[SOFT_PROMPT]
    is_virtual = tokens >= config.vocab_size
    words = matrices.look_up(parameters["embedding"], jnp.where(is_virtual, 0, tokens), dtype)
    # Index P is beyond the rows: it reads zeros, and the backward pass adds nothing for it.
    index = jnp.where(is_virtual, tokens - config.vocab_size, len(prompt))
    virtual = prompt.at[index].get(mode="fill", fill_value=0).astype(dtype)
    return jnp.where(is_virtual[..., None], virtual, words)


def unembedding(config: DecoderConfig, parameters: dict) -> Float[Array, "V D"]:
    """Returns the matrix that maps hidden states to logits: the embedding itself where the two are tied."""
    matrix = parameters["embedding" if config.tie_embeddings else "lm_head"]
    weight = matrix["weight"] if isinstance(matrix, Mapping) else matrix
    factors = parameters.get("lm_head")
    if not isinstance(factors, Mapping):
        return weight
    return matrices.add_update(weight.T, factors).T


def make_rotate(config: DecoderConfig, position: Int[Array, "B T"]) -> Rotate:
    """Returns the function that rotates heads [B, T, N, H] by their `position`."""
    frequency = rotary.rotary_frequencies(config.head_dim, config.rope_theta, config.rope_scaling)
    cosine, sine = rotary.rotation(position, frequency)
    return lambda x: rotary.rotate(x, cosine, sine)
