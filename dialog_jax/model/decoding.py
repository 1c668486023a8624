"""Incremental decoding: the hidden states of new tokens, from a cache of the keys and values of those before.

In: parameters, a cache, new tokens. Out: their hidden states and the extended cache. The layers are those of
`model.decoder`; only attention differs. Knows no sampling.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from dialog_jax.attention import cached
from dialog_jax.model import decoder
from dialog_jax.model.decoder_config import DecoderConfig


class Cache(NamedTuple):
    """Keys and values of one history without branches; the caller knows how many of the C slots are filled."""

    keys: Float[Array, "L B C K H"]
    values: Float[Array, "L B C K H"]


def empty_cache(config: DecoderConfig, batch: int, capacity: int, dtype: jax.typing.DTypeLike = jnp.float32) -> Cache:
    """Returns a cache with room for `capacity` tokens."""
    shape = (config.layers, batch, capacity, config.kv_heads, config.head_dim)
    return Cache(keys=jnp.zeros(shape, dtype), values=jnp.zeros(shape, dtype))


def extend(
    config: DecoderConfig, parameters: dict, cache: Cache, tokens: Int[Array, "B T"], start: Int[Array, ""]
) -> tuple[Float[Array, "B T D"], Cache]:
    """Returns (hidden states of `tokens`, which follow the first `start` tokens in the cache; the extended cache).

    Computes in the type of the cache. Slots from `start` on are overwritten or invisible, so a smaller `start` rolls
    back, and tokens may be padded on the right: later calls overwrite the padding.

    Args:
      start: at most capacity - T, which the caller ensures; beyond it, XLA would shift the write.
    """
    model = decoder.bind(config, parameters)
    settings = decoder.layer_settings(config)
    position = (start + jnp.arange(tokens.shape[1], dtype=jnp.int32))[None, :]  # [1, T]
    distance = position[:, :, None] - jnp.arange(cache.keys.shape[2])[None, None, :]  # [1, T, C]
    make_rotate = decoder.rotations(config, jnp.broadcast_to(position, tokens.shape))

    def body(graph, carry, layer_and_settings):
        x, cache = carry
        layer, index, own = layer_and_settings
        window, kind = settings._replace(**own)
        visible = distance >= 0 if window is None else (distance >= 0) & (distance < window)

        def attend(q, k, v, **additions):
            corner = (index, 0, start, 0, 0)
            extended = Cache(
                keys=jax.lax.dynamic_update_slice(cache.keys, k[None], corner),
                values=jax.lax.dynamic_update_slice(cache.values, v[None], corner),
            )
            return cached.attend(q, extended.keys[index], extended.values[index], visible, **additions), extended

        return nnx.merge(graph, layer)(x, make_rotate(kind), attend), None

    x = decoder.embed(config, parameters, tokens, cache.keys.dtype)  # [B, T, D]
    for run in decoder.layer_runs(config, model):
        scanned = (run.parameters, jnp.arange(run.start, run.stop), settings.scanned(run.start, run.stop))
        (x, cache), _ = jax.lax.scan(functools.partial(body, run.graph), (x, cache), scanned)
    return decoder.finish(config, model, x), cache
