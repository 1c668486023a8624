"""What is recorded of a model family, and what several families have in common in their config.json.

A record's `read` turns the fields of config.json, with every default of transformers' configuration class filled in,
into the structural settings of a `DecoderConfig`; `write` is the inverse. Sizes, RoPE and everything that all families
share is in `model.hf_config`.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from dialog_jax.errors import UserError
from dialog_jax.model.decoder_config import DecoderConfig

Fields = Mapping[str, Any]

SLIDING, FULL = "sliding_attention", "full_attention"


class Family(NamedTuple):
    """How a family is published; `model.families` lists all."""

    architecture: str
    """The class of transformers that serves it."""
    read: Callable[[Fields], dict[str, Any]]
    """Fields of config.json to arguments of `DecoderConfig`, beyond those of `hf_config`."""
    write: Callable[[DecoderConfig], dict[str, Any]]
    """The inverse."""
    fields: frozenset[str]
    """The fields that `read` reads."""
    needed: Mapping[str, Sequence[Any]]
    """Fields that would change the computation: the values with which they do not."""
    rope_kinds: tuple[str, ...] = ()
    """The types of layers that have a RoPE of their own, in the order of `DecoderConfig.rotary`; empty for one RoPE."""
    layer_rotary: Callable[[Fields], tuple[int, ...]] | None = None
    """Returns the index of each layer's RoPE; an index beyond `rope_kinds` stands for none."""
    names: Mapping[str, str] = {}
    """Published names of parameters where they are not those of llama; {} is the layer."""
    fused: Mapping[str, tuple[str, ...]] = {}
    """Published tensors that hold several parameters, one below the other: the parameters, from the top."""
    interleaved: Mapping[str, tuple[str, ...]] = {}
    """Published tensors in whose last axis several parameters alternate: the parameters."""
    not_transposed: frozenset[str] = frozenset()
    """Parameters published as [in, out], where others are published as [out, in]."""
    quant_methods: tuple[str, ...] = ()
    """Of `quantization_config`: what is decoded as it is read."""
    has_extra_layers: bool = False
    """Whether files may have layers behind the decoder's own, which are not read."""


def read_windows(fields: Fields) -> dict[str, Any]:
    """Returns the windows by type of layer."""
    types = fields["layer_types"]
    if unknown := sorted(set(types) - {SLIDING, FULL}):
        raise UserError(f"layer_types has {unknown[0]!r}; supported are {SLIDING!r} and {FULL!r}")
    window = fields.get("sliding_window")
    if SLIDING in types and not window:
        raise UserError(f"layer_types has {SLIDING!r} and sliding_window is {window!r}; a number of tokens is needed")
    return {"windows": tuple(window if kind == SLIDING else 0 for kind in types) if SLIDING in types else ()}


def write_windows(config: DecoderConfig) -> dict[str, Any]:
    """The inverse."""
    windows = config.windows or (0,) * config.layers
    return {
        "sliding_window": max(windows) or None,
        "layer_types": [SLIDING if window else FULL for window in windows],
    }


def read_window_of_all(fields: Fields) -> dict[str, Any]:
    """Returns the windows where all layers have the same, or none."""
    window = fields["sliding_window"]
    return {"windows": (window,) * fields["num_hidden_layers"] if window else ()}


def write_window_of_all(config: DecoderConfig) -> dict[str, Any]:
    """The inverse."""
    return {"sliding_window": max(config.windows, default=0) or None}


def tidy(number: float) -> float:
    """Returns the short decimal that a computed number stands for: 10.000000000000002 -> 10.0."""
    return float(f"{number:.12g}")


BIAS = frozenset({"attention_bias"})
NO_BIAS = {"mlp_bias": (False, None)}


def read_bias(fields: Fields) -> dict[str, Any]:
    """Returns the biases where all projections of attention have one, or none has."""
    bias = bool(fields["attention_bias"])
    return {"qkv_bias": bias, "output_bias": bias}


def write_bias(config: DecoderConfig) -> dict[str, Any]:
    """The inverse."""
    return {"attention_bias": config.qkv_bias}
