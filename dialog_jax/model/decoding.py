"""Incremental decoding: the hidden states of new tokens, from a cache of the keys and values of those before.

In: parameters, a cache, new tokens. Out: their hidden states and the extended cache. The layers are those of
`model.decoder`; only attention differs. Knows no sampling.

A layer with a window reads the last tokens only, and its cache keeps no others: slots are filled in a circle. With a
window of 2, calls of up to 2 tokens and so 4 slots, after 6 tokens:

    slots of a layer without a window   0 1 2 3 4 5 . .
    slots of a layer with a window      4 5 2 3             tokens 6 and 7 go where 2 and 3 are; token 6 sees 5
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from dialog_jax.attention import cached
from dialog_jax.model import decoder, layer_runs
from dialog_jax.model.decoder_config import DecoderConfig


class Kind(NamedTuple):
    """What the layers of a stack have in common."""

    window: int
    """0 for none."""
    attention: str
    """The name of their attention (see `DecoderConfig.parts`)."""


class Stack(NamedTuple):
    """Keys and values of the layers of a kind: those of token t of the history in slot t mod C."""

    keys: Float[Array, "L B C K H"]
    values: Float[Array, "L B C K H"]


# A stack for each kind of layer, by ascending window, first that of the layers without one. The history has no
# branches; the caller knows its length.
Cache = tuple[Stack, ...]


def empty_cache(
    config: DecoderConfig, batch: int, capacity: int, chunk: int, dtype: jax.typing.DTypeLike = jnp.float32
) -> Cache:
    """Returns a cache with room for `capacity` tokens; layers with a window keep the last window + `chunk` of them.

    Args:
      chunk: at least the tokens of any call of `extend`.
    """

    def make_stack(kind):
        slots = min(capacity, kind.window + chunk) if kind.window else capacity
        heads = config.attention_heads[kind.attention]
        shape = (_find_kinds(config).count(kind), batch, slots, heads.kv_heads, heads.head_dim)
        return Stack(keys=jnp.zeros(shape, dtype), values=jnp.zeros(shape, dtype))

    return tuple(make_stack(kind) for kind in _distinct_kinds(config))


def grow_cache(config: DecoderConfig, cache: Cache, capacity: int, chunk: int) -> Cache:
    """Returns the cache with room for `capacity` tokens, more than before; `chunk` must be that of `empty_cache`."""
    first = cache[0].keys
    larger = jax.eval_shape(lambda: empty_cache(config, first.shape[1], capacity, chunk, first.dtype))

    def pad(array, larger):
        # Only a stack with a slot for each token grows: no token changes its slot.
        return jnp.pad(array, [(0, new - old) for old, new in zip(array.shape, larger.shape, strict=True)])

    return jax.tree.map(pad, cache, larger)


def keeps_context(config: DecoderConfig, cache: Cache, start: int, written: int) -> bool:
    """Returns whether the cache still has all that a token at `start` sees.

    Args:
      written: slots written since the cache was empty or `extend` began again at 0: the largest start + T.
    """
    oldest = [max(0, start + 1 - kind.window) if kind.window else 0 for kind in _distinct_kinds(config)]
    return all(written <= token + stack.keys.shape[2] for token, stack in zip(oldest, cache, strict=True))


def extend(
    config: DecoderConfig, parameters: dict, cache: Cache, tokens: Int[Array, "B T"], start: Int[Array, ""]
) -> tuple[Float[Array, "B T D"], Cache]:
    """Returns (hidden states of `tokens`, which follow the first `start` tokens in the cache; the extended cache).

    Computes in the type of the cache. What was written from `start` on is overwritten or invisible, so a smaller
    `start` rolls back where `keeps_context`, and tokens may be padded on the right: later calls overwrite the padding.

    Args:
      start: at most capacity - T, which the caller ensures.
    """
    model = decoder.bind(config, parameters)
    kinds = _distinct_kinds(config)
    stack_numbers, indices = _find_stacks(config)
    position = (start + jnp.arange(tokens.shape[1], dtype=jnp.int32))[None, :]  # [1, T]
    visible = [_find_visible(position, stack, kind.window) for stack, kind in zip(cache, kinds, strict=True)]

    def make_body(run):
        make_rotate = decoder.rotations(run.rotary, run.heads.head_dim, jnp.broadcast_to(position, tokens.shape))
        candidates = [number for number, kind in enumerate(kinds) if kind.attention == run.attention]

        def run_layer(carry, inputs):
            x, cache = carry
            parameters, layer = inputs
            stack_number, index = jnp.asarray(stack_numbers)[layer], jnp.asarray(indices)[layer]

            def attend(q, k, v, **additions):
                extended = list(cache)
                for number in candidates:
                    place = jnp.where(stack_number == number, index, len(cache[number].keys))
                    extended[number] = _write(cache[number], place, position[0], k, v)

                def read(number, q):
                    keys, values = (array[index] for array in extended[number])
                    return cached.attend(q, keys, values, visible[number], **additions)

                reads = [functools.partial(read, number) for number in candidates]
                choice = jnp.searchsorted(jnp.asarray(candidates), stack_number)
                return jax.lax.switch(choice, reads, q), tuple(extended)

            return run.bind(parameters)(x, make_rotate(layer_runs.find_setting(run.kind, layer)), attend), None

        return run_layer

    x = decoder.embed(config, parameters, tokens, cache[0].keys.dtype)  # [B, T, D]
    x, cache = layer_runs.scan_layers(config, model, make_body, (x, cache))
    return decoder.finish(config, model, x), cache


def _find_kinds(config: DecoderConfig) -> list[Kind]:
    """Returns the kind of each layer."""
    names = {layer: name for name in config.attention_heads for layer in config.parts[name]}
    return [Kind(window, names[layer]) for layer, window in enumerate(config.windows or (0,) * config.layers)]


def _distinct_kinds(config: DecoderConfig) -> list[Kind]:
    return sorted(set(_find_kinds(config)))


def _find_stacks(config: DecoderConfig) -> tuple[Int[np.ndarray, "L"], Int[np.ndarray, "L"]]:
    """Returns the number of each layer's stack, and its index there: for windows 0 8 8 0, 0 1 1 0 and 0 0 1 1."""
    kinds, distinct = _find_kinds(config), _distinct_kinds(config)
    numbers = [distinct.index(kind) for kind in kinds]
    indices = [kinds[:layer].count(kind) for layer, kind in enumerate(kinds)]
    return np.asarray(numbers, np.int32), np.asarray(indices, np.int32)


def _find_visible(position: Int[Array, "1 T"], stack: Stack, window: int) -> Bool[Array, "1 T C"]:
    """Returns which slots each new token sees, once the new tokens are written."""
    slots = stack.keys.shape[2]
    last = position[:, -1:]
    token = last - (last - jnp.arange(slots)[None, :]) % slots  # the latest that may be in a slot; negative for none
    distance = position[:, :, None] - token[:, None, :]
    visible = (token[:, None, :] >= 0) & (distance >= 0)
    return visible & (distance < window) if window else visible


def _write(
    stack: Stack,
    layer: Int[Array, ""],
    position: Int[Array, "T"],
    k: Float[Array, "B T K H"],
    v: Float[Array, "B T K H"],
) -> Stack:
    """Returns the stack with the new tokens of a layer; unchanged if it does not have the layer."""

    def write(array, new):
        slot = position % array.shape[2]
        return array.at[layer, :, slot].set(new.swapaxes(0, 1), mode="drop", unique_indices=True)

    return Stack(write(stack.keys, k), write(stack.values, v))
