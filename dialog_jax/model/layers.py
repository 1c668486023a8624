"""The modules of the decoder: attention around a kernel, feed-forward, a layer of both, and the stack of layers.

Flax NNX declares them; `model.decoder` runs them. What differs between families is in their `DecoderConfig`.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float

from dialog_jax.model import experts, matrices
from dialog_jax.model.decoder_config import DecoderConfig, Heads

# Rotates queries [B, T, N, H] and keys [B, T, K, H].
Rotate = Callable[[Array, Array], tuple[Array, Array]]

_ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "silu": jax.nn.silu,
    "gelu_tanh": functools.partial(jax.nn.gelu, approximate=True),
}


def normalize(x: Float[Array, "..."], weight: Float[Array, "D"] | None, config: DecoderConfig) -> Float[Array, "..."]:
    """Returns `x` divided by its root mean square, times `weight`; float32 inside, in the type of `x` outside."""
    wide = x.astype(jnp.float32)
    scale = jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + config.norm_epsilon)
    if weight is None:
        return (wide * scale).astype(x.dtype)
    weight = weight.astype(jnp.float32)
    if config.norm_offset:
        weight = weight + config.norm_offset
    return (wide * scale * jnp.expand_dims(weight, range(x.ndim - 1))).astype(x.dtype)


def _normal(rngs: nnx.Rngs, *shape: int) -> nnx.Param:
    return nnx.Param(0.02 * jax.random.normal(rngs.params(), shape, jnp.float32))


def _norm(size: int, config: DecoderConfig) -> nnx.Param:
    return nnx.Param(jnp.full((size,), 1.0 - config.norm_offset, jnp.float32))


def _zeros(*shape: int) -> nnx.Param:
    return nnx.Param(jnp.zeros(shape, jnp.float32))


class Attention(nnx.Module):
    """Projections, norms of heads and RoPE around an attention kernel."""

    def __init__(self, config: DecoderConfig, heads: Heads, *, rngs: nnx.Rngs):
        self.config, self.heads = config, heads
        query, key = config.heads * heads.head_dim, heads.kv_heads * heads.head_dim
        self.w_query = _normal(rngs, config.width, query)
        self.w_key = _normal(rngs, config.width, key)
        if not heads.values_are_keys:
            self.w_value = _normal(rngs, config.width, key)
        self.w_output = _normal(rngs, query, config.width)
        if config.qkv_bias:
            self.b_query, self.b_key = _zeros(query), _zeros(key)
            if not heads.values_are_keys:
                self.b_value = _zeros(key)
        if config.output_bias:
            self.b_output = _zeros(config.width)
        if config.qk_norm == "head":
            self.query_norm, self.key_norm = _norm(heads.head_dim, config), _norm(heads.head_dim, config)
        elif config.qk_norm == "width":
            self.query_norm, self.key_norm = _norm(query, config), _norm(key, config)
        if config.sinks:
            self.sinks = _zeros(config.heads)

    def __call__(self, x: Float[Array, "B T D"], rotate: Rotate, attend: Callable) -> tuple[Float[Array, "B T D"], Any]:
        config, kv_heads, head_dim = self.config, self.heads.kv_heads, self.heads.head_dim
        q = _project(x, self.w_query, self.b_query if config.qkv_bias else None)
        k = v = _project(x, self.w_key, self.b_key if config.qkv_bias else None)
        if not self.heads.values_are_keys:
            v = _project(x, self.w_value, self.b_value if config.qkv_bias else None)
        if config.qk_norm == "width":
            q, k = normalize(q, self.query_norm[...], config), normalize(k, self.key_norm[...], config)
        q = q.reshape(*x.shape[:2], config.heads, head_dim)  # [B, T, N, H]
        k = k.reshape(*x.shape[:2], kv_heads, head_dim)  # [B, T, K, H]
        v = v.reshape(*x.shape[:2], kv_heads, head_dim)
        if config.qk_norm == "head":
            q, k = normalize(q, self.query_norm[...], config), normalize(k, self.key_norm[...], config)
        if config.value_norm:
            v = normalize(v, None, config)
        q, k = rotate(q, k)
        if config.attention_scale is not None:  # kernels multiply by head_dim ** -0.5
            q = q * (config.attention_scale * head_dim**0.5)
        settings: dict[str, Any] = {} if config.attention_cap is None else {"cap": config.attention_cap}
        if config.sinks:
            settings["sinks"] = self.sinks[...]
        output, cache = attend(q, k, v, **settings)
        output = output.reshape(*x.shape[:2], config.heads * head_dim)  # [B, T, N * H]
        return _project(output, self.w_output, self.b_output if config.output_bias else None), cache


class FeedForward(nnx.Module):
    """A gated linear unit: down(activation(gate(x)) * up(x))."""

    def __init__(self, config: DecoderConfig, width: int, *, rngs: nnx.Rngs):
        self.activation = _ACTIVATIONS[config.activation]
        self.w_gate = _normal(rngs, config.width, width)
        self.w_up = _normal(rngs, config.width, width)
        self.w_down = _normal(rngs, width, config.width)

    def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        return _project(self.activation(_project(x, self.w_gate)) * _project(x, self.w_up), self.w_down)


class ExpertMixture(nnx.Module):
    """A router, the experts among which it chooses, and in some families a feed-forward beside them."""

    def __init__(self, config: DecoderConfig, *, rngs: nnx.Rngs):
        assert config.experts is not None
        self.config = config.experts
        count, width = self.config.count, self.config.width
        self.w_router = _normal(rngs, config.width, count)
        self.w_gate = _normal(rngs, count, config.width, width)
        self.w_up = _normal(rngs, count, config.width, width)
        self.w_down = _normal(rngs, count, width, config.width)
        if self.config.router_bias:
            self.b_router = _zeros(count)
        if self.config.biases:
            self.b_gate, self.b_up, self.b_down = (_zeros(count, size) for size in (width, width, config.width))
        if self.config.shared_width:
            self.shared = FeedForward(config, self.config.shared_width, rngs=rngs)

    def __call__(self, x: Float[Array, "B T D"], run_experts: Callable) -> Float[Array, "B T D"]:
        bias = self.b_router[...] if self.config.router_bias else None
        choice, weights = experts.route(self.config, x, self.w_router[...], bias)  # [B, T, k]
        names = experts.MATRICES + (experts.BIASES if self.config.biases else ())
        parameters = {name: getattr(self, name).get_value() for name in names}
        output = run_experts(self.config, x, choice, weights, parameters)
        return output + self.shared(x) if self.config.shared_width else output


class Layer(nnx.Module):
    """Attention, then feed-forward or experts, each added to the residual stream, with norms before, after, or both."""

    def __init__(self, config: DecoderConfig, number: int, *, rngs: nnx.Rngs):
        self.config = config
        for name, heads in config.attention_heads.items():
            if number in config.parts[name]:
                setattr(self, name, Attention(config, heads, rngs=rngs))
        if number in config.sparse_layers:
            self.experts = ExpertMixture(config, rngs=rngs)
        else:
            self.feed_forward = FeedForward(config, config.feed_forward, rngs=rngs)
        if config.norms != "post":
            self.attention_norm, self.feed_forward_norm = _norm(config.width, config), _norm(config.width, config)
        if config.norms != "pre":
            self.attention_post_norm = _norm(config.width, config)
            self.feed_forward_post_norm = _norm(config.width, config)
        if config.layer_scales:
            self.scale = nnx.Param(jnp.ones((1,), jnp.float32))

    def __call__(
        self,
        x: Float[Array, "B T D"],
        rotate: Rotate,
        attend: Callable,
        policy: Callable[..., Any] | None = None,
        run_experts: Callable = experts.run,
    ) -> tuple[Float[Array, "B T D"], Any]:
        """Returns the residual stream after this layer, and the cache that `attend` returns.

        Args:
          rotate: RoPE at the positions of `x`.
          attend: (q, k, v) and, by name, the model's `cap` and `sinks` to (attention output, cache or None). Training
            and decoding differ only here.
          policy: what the backward pass saves of attention and its projections; None for everything.
          run_experts: as `experts.run`.
        """

        def attention(x):
            module = next(getattr(self, name) for name in self.config.attention_heads if hasattr(self, name))
            return module(self._normalize(x, "attention_norm"), rotate, attend)

        if policy is not None:
            attention = jax.checkpoint(attention, policy=policy, prevent_cse=False)
        output, cache = attention(x)
        x = x + self._scale_branch(self._normalize(output, "attention_post_norm"))
        own = self._normalize(x, "feed_forward_norm")
        output = self.experts(own, run_experts) if hasattr(self, "experts") else self.feed_forward(own)
        x = x + self._scale_branch(self._normalize(output, "feed_forward_post_norm"))
        return x * jax.lax.stop_gradient(self.scale[0]).astype(x.dtype) if self.config.layer_scales else x, cache

    def _normalize(self, x: Array, name: str) -> Array:
        return normalize(x, getattr(self, name)[...], self.config) if hasattr(self, name) else x

    def _scale_branch(self, x: Array) -> Array:
        return x if self.config.residual_scale == 1.0 else x * self.config.residual_scale


class Decoder(nnx.Module):
    """Embedding, layers and final norm; `layers` is one `Layer` whose parameters have a leading axis L.

    Where some layers have one part and others another (`DecoderConfig.parts`), such as feed-forward or experts, it has
    both, each with the axis of the layers that have it.
    """

    def __init__(self, config: DecoderConfig, *, rngs: nnx.Rngs):
        self.embedding = _normal(rngs, config.vocab_size, config.width)
        keys = jax.random.split(rngs.params(), config.layers)
        self.layers = _stack_layers(config, keys, 0)
        for name, layers in config.parts.items():
            if len(layers) < config.layers:
                setattr(self.layers, name, getattr(_stack_layers(config, keys[jnp.array(layers)], layers[0]), name))
        self.final_norm = _norm(config.width, config)
        if not config.tie_embeddings:
            self.lm_head = _normal(rngs, config.vocab_size, config.width)


@functools.lru_cache(maxsize=64)
def declare_layer(config: DecoderConfig, number: int) -> nnx.GraphDef:
    """Returns the module of a layer, without its parameters."""
    return nnx.split(nnx.eval_shape(lambda: Layer(config, number, rngs=nnx.Rngs(0))))[0]


def _stack_layers(config: DecoderConfig, keys: Array, number: int) -> Layer:
    make = jax.vmap(lambda key: nnx.state(Layer(config, number, rngs=nnx.Rngs(key))))
    return nnx.merge(declare_layer(config, number), make(keys))


def _project(x: Array, weight: nnx.Param, bias: nnx.Param | None = None) -> Array:
    # As one matrix of all tokens: with a batch axis XLA:CPU transposes the inputs of the weight's gradient, which takes
    # a third of the feed-forward's time.
    flat = checkpoint_name(matrices.multiply(x.reshape(-1, x.shape[-1]), weight.get_value()), matrices.PRODUCT)
    y = flat.reshape(*x.shape[:-1], flat.shape[-1])
    return y if bias is None else y + jnp.expand_dims(bias[...].astype(x.dtype), range(y.ndim - 1))
