"""The layers of a decoder in runs of alike layers, each of which is one scan.

Where not all layers have the same parts (`DecoderConfig.parts`), the parameters of each part are stacked for the layers
that have it, and consecutive layers with the same parts are a run. If the parts repeat after some layers, a period, the
runs are those of one period, within a scan over periods.

    layers with parts   a a b a a b        period 3, two runs: layers 0 to 2 and 2 to 3 of each period
                        b a a a a a        period 6, two runs: layers 0 to 1 and 1 to 6
                        a a a a a a        period 6, one run
"""

import functools
import itertools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Int

from dialog_jax.model.decoder_config import DecoderConfig, Heads
from dialog_jax.model.layers import Decoder, declare_layer
from dialog_jax.model.rotary import Rotary

_ALL_ANCESTORS = np.iinfo(np.int32).max  # a window that reaches every token


class LayerRun(NamedTuple):
    """Consecutive layers with the same parts, and what they have in common."""

    start: int
    stop: int
    """Layers from `start` to `stop` of a period."""
    attention: str
    """The name of their attention."""
    heads: Heads
    rotary: tuple[Rotary | None, ...]
    """The kinds of RoPE that they have."""
    graph: nnx.GraphDef
    """Of a layer."""
    window: Any
    """None if none of them has a window, a number if all have the same, and otherwise those of all layers of the model,
    [L]."""
    kind: Any
    """Index in `rotary`, as `window`."""


def list_runs(config: DecoderConfig) -> list[LayerRun]:
    """Returns the runs of a period."""
    parts = [
        tuple(name for name, layers in config.parts.items() if number in layers) for number in range(config.layers)
    ]
    period = _find_period(parts)
    windows = np.array([window or _ALL_ANCESTORS for window in config.windows or (0,) * config.layers], np.int32)
    kinds = np.array(config.layer_rotary or (0,) * config.layers, np.int32)
    runs = []
    for names, group in itertools.groupby(range(period), parts.__getitem__):
        numbers = list(group)
        start, stop = numbers[0], numbers[-1] + 1
        layers = [number for number in range(config.layers) if start <= number % period < stop]
        attention = next(name for name in names if name in config.attention_heads)
        window = None if min(windows[layers]) == _ALL_ANCESTORS else _reduce(windows, layers)
        kind, rotary = _reduce(kinds, layers), config.rotary
        if isinstance(kind, int):
            kind, rotary = 0, (rotary[kind],)
        heads, graph = config.attention_heads[attention], declare_layer(config, start)
        runs.append(LayerRun(start, stop, attention, heads, rotary, graph, window, kind))
    return runs


def _find_period(parts: list) -> int:
    """Returns after how many layers they repeat; if all are alike, all are one run."""
    if len(set(parts)) == 1:
        return len(parts)
    return next(size for size in range(1, len(parts) + 1) if parts[:size] * (len(parts) // size) == parts)


def _reduce(values: np.ndarray, layers: list[int]) -> int | np.ndarray:
    """Returns the value that all of `layers` have, or else the values."""
    return int(values[layers[0]]) if len(set(values[layers].tolist())) == 1 else values


def find_setting(values: Any, number: Int[Array, ""]) -> Any:
    """Returns that of a layer, of `LayerRun.window` or `kind`."""
    return jnp.asarray(values)[number] if isinstance(values, np.ndarray) else values


def _slice(array: Array, *, start: int, size: int) -> Array:
    return array if size == len(array) else array[start : start + size]


def scan_layers(config: DecoderConfig, model: Decoder, make_body: Callable[[LayerRun], Callable], carry: Any) -> Any:
    """Returns `carry` after all layers.

    Args:
      make_body: a run to (carry, (parameters of a layer, its number)) to (carry, None), as `jax.lax.scan` calls it.
    """
    runs = list_runs(config)
    bodies = [make_body(run) for run in runs]
    stacked = dict(nnx.split(model.layers)[1].items())
    numbers = np.arange(config.layers, dtype=np.int32)

    def select(run, stacked):
        """Returns the parameters of a run from those of its period; all of them are not copied."""
        take = functools.partial(_slice, size=run.stop - run.start)
        parts = {}
        for name, part in stacked.items():
            layers = config.parts.get(name, range(config.layers))
            if run.start in layers:
                parts[name] = jax.tree.map(functools.partial(take, start=layers.index(run.start)), part)
        return nnx.State(parts)

    def scan_period(carry, arrays):
        stacked, numbers = arrays
        for run, body in zip(runs, bodies, strict=True):
            carry, _ = jax.lax.scan(body, carry, (select(run, stacked), numbers[run.start : run.stop]))
        return carry, None

    periods = config.layers // runs[-1].stop
    if periods == 1:
        return scan_period(carry, (stacked, numbers))[0]
    # Sliced period by period: a slice of the parameters of all layers would be a copy.
    divided = jax.tree.map(lambda array: array.reshape(periods, -1, *array.shape[1:]), (stacked, numbers))
    return jax.lax.scan(scan_period, carry, divided)[0]
