"""Incremental decoding: the hidden states of new tokens, from a cache of the keys and values of those before.

In: parameters, a cache, new tokens. Out: their hidden states and the extended cache. The layers are those of
`model.decoder`; only attention differs. Knows no sampling.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from dialog_jax.attention import cached
from dialog_jax.model import decoder, layer_runs
from dialog_jax.model.decoder_config import DecoderConfig


class Cache(NamedTuple):
    """Keys and values of one history without branches; the caller knows how many of the C slots are filled."""

    keys: dict[str, Float[Array, "L B C K H"]]
    """By the name of the attention (see `DecoderConfig.parts`), of the layers that have it."""
    values: dict[str, Float[Array, "L B C K H"]]

    @property
    def capacity(self) -> int:
        """The number of slots."""
        return self.keys["attention"].shape[2]


def empty_cache(config: DecoderConfig, batch: int, capacity: int, dtype: jax.typing.DTypeLike = jnp.float32) -> Cache:
    """Returns a cache with room for `capacity` tokens."""

    def make():
        return {
            name: jnp.zeros((len(config.parts[name]), batch, capacity, heads.kv_heads, heads.head_dim), dtype)
            for name, heads in config.attention_heads.items()
        }

    return Cache(keys=make(), values=make())


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
    position = (start + jnp.arange(tokens.shape[1], dtype=jnp.int32))[None, :]  # [1, T]
    distance = position[:, :, None] - jnp.arange(cache.capacity)[None, None, :]  # [1, T, C]
    positions = jnp.broadcast_to(position, tokens.shape)

    def make_body(run):
        make_rotate = decoder.rotations(run.rotary, run.heads.head_dim, positions)
        places = np.searchsorted(config.parts[run.attention], np.arange(config.layers))  # in the cache

        def run_layer(carry, inputs):
            x, cache = carry
            parameters, number = inputs
            window = layer_runs.find_setting(run.window, number)
            visible = distance >= 0 if window is None else (distance >= 0) & (distance < window)
            place = jnp.asarray(places)[number]

            def attend(q, k, v, **additions):
                keys, values = (
                    jax.lax.dynamic_update_slice(stacked[run.attention], new[None], (place, 0, start, 0, 0))
                    for stacked, new in zip(cache, (k, v), strict=True)
                )
                output = cached.attend(q, keys[place], values[place], visible, **additions)
                return output, Cache({**cache.keys, run.attention: keys}, {**cache.values, run.attention: values})

            return run.bind(parameters)(x, make_rotate(layer_runs.find_setting(run.kind, number)), attend), None

        return run_layer

    x = decoder.embed(config, parameters, tokens, cache.keys["attention"].dtype)  # [B, T, D]
    x, cache = layer_runs.scan_layers(config, model, make_body, (x, cache))
    return decoder.finish(config, model, x), cache
