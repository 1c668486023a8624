"""The layers of a decoder in runs of alike layers.

Where not all layers have the same parts (`DecoderConfig.parts`), the parameters of each part are stacked for the layers
that have it. If the parts repeat after some layers, a period, all layers are one scan over periods, and each layer of a
period is a run; otherwise each run is a scan over consecutive layers with the same parts.

    layers with parts   a a b a a b        period 3: one scan of two steps, with three runs of one layer
                        b a a a a a        no period: two scans, of one layer and of five
                        a a a a a a        one scan of six layers
"""

import itertools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Int

from dialog_jax.model.decoder_config import DecoderConfig, Heads
from dialog_jax.model.layers import Decoder, Layer, declare_layer
from dialog_jax.model.rotary import Rotary

_ALL_ANCESTORS = np.iinfo(np.int32).max  # a window that reaches every token


class LayerRun(NamedTuple):
    """Layers with the same parts, and what they have in common."""

    start: int
    stop: int
    """Layers from `start` to `stop`, of the model or of each period."""
    attention: str
    """The name of their attention."""
    heads: Heads
    rotary: tuple[Rotary | None, ...]
    """The kinds of RoPE that they have."""
    window: Any
    """None if none of them has a window, a number if all have the same, and otherwise those of all layers of the model,
    [L]."""
    kind: Any
    """Index in `rotary`, as `window`."""
    graph: nnx.GraphDef
    """Of a layer."""
    places: Mapping[str, int | None] | None
    """Of a run in a period: where it is among the layers that have each part; None for those that it does not have."""

    def bind(self, parameters: Mapping[str, Any]) -> Layer:
        """Returns a layer.

        Args:
          parameters: its own; of a run in a period, those of the period. They are selected here, so that the backward
            pass can do it again: slices that the forward pass stores would be a copy of all parameters.
        """
        if self.places is not None:
            places = {name: self.places.get(name, self.start) for name in parameters}
            parameters = {
                name: jax.tree.map(lambda array, place=place: array[place], parameters[name])
                for name, place in places.items()
                if place is not None
            }
        return nnx.merge(self.graph, nnx.State(dict(parameters)))


def list_runs(config: DecoderConfig) -> list[LayerRun]:
    """Returns the runs of the model, or those of a period."""
    parts = [
        tuple(name for name, layers in config.parts.items() if number in layers) for number in range(config.layers)
    ]
    period = _find_period(parts)
    windows = np.array([window or _ALL_ANCESTORS for window in config.windows or (0,) * config.layers], np.int32)
    kinds = np.array(config.layer_rotary or (0,) * config.layers, np.int32)
    runs = []
    is_scanned = period == config.layers
    for _, group in itertools.groupby(range(period), lambda number: parts[number] if is_scanned else number):
        numbers = list(group)
        start, stop = numbers[0], numbers[-1] + 1
        layers = [number for number in range(config.layers) if start <= number % period < stop]
        attention = next(name for name in parts[start] if name in config.attention_heads)
        window = None if min(windows[layers]) == _ALL_ANCESTORS else _reduce(windows, layers)
        kind, rotary = _reduce(kinds, layers), config.rotary
        if isinstance(kind, int):
            kind, rotary = 0, (rotary[kind],)
        places = None
        if not is_scanned:
            places = {name: own.index(start) if start in own else None for name, own in config.parts.items()}
        heads, graph = config.attention_heads[attention], declare_layer(config, start)
        runs.append(LayerRun(start, stop, attention, heads, rotary, window, kind, graph, places))
    return runs


def _find_period(parts: list) -> int:
    """Returns after how many layers they repeat; the number of layers if they do not, or if all are alike."""
    if len(set(parts)) == 1:
        return len(parts)
    return next(size for size in range(1, len(parts) + 1) if parts[:size] * (len(parts) // size) == parts)


def _reduce(values: np.ndarray, layers: list[int]) -> int | np.ndarray:
    """Returns the value that all of `layers` have, or else the values."""
    return int(values[layers[0]]) if len(set(values[layers].tolist())) == 1 else values


def find_setting(values: Any, number: Int[Array, ""]) -> Any:
    """Returns that of a layer, of `LayerRun.window` or `kind`."""
    return jnp.asarray(values)[number] if isinstance(values, np.ndarray) else values


def scan_layers(config: DecoderConfig, model: Decoder, make_body: Callable[[LayerRun], Callable], carry: Any) -> Any:
    """Returns `carry` after all layers.

    Args:
      make_body: a run to (carry, (what `LayerRun.bind` takes, number of the layer)) to (carry, None).
    """
    runs = list_runs(config)
    bodies = [make_body(run) for run in runs]
    stacked = dict(nnx.split(model.layers)[1].items())
    owners = {name: config.parts.get(name, tuple(range(config.layers))) for name in stacked}
    numbers = np.arange(config.layers, dtype=np.int32)
    period = runs[-1].stop
    if period == config.layers:
        for run, body in zip(runs, bodies, strict=True):
            own = {
                name: _slice(part, owners[name].index(run.start), run.stop - run.start)
                for name, part in stacked.items()
                if run.start in owners[name]
            }
            carry, _ = jax.lax.scan(body, carry, (own, numbers[run.start : run.stop]))
        return carry

    def run_period(carry, inputs):
        stacked, numbers = inputs
        for run, body in zip(runs, bodies, strict=True):
            carry, _ = body(carry, (stacked, numbers[run.start]))
        return carry, None

    periods = config.layers // period
    divided = jax.tree.map(lambda array: array.reshape(periods, -1, *array.shape[1:]), (stacked, numbers))
    return jax.lax.scan(run_period, carry, divided)[0]


def _slice(stacked: Any, start: int, size: int) -> Any:
    """Returns so many of the layers; all of them are not copied."""
    return jax.tree.map(lambda array: array if size == len(array) else array[start : start + size], stacked)
