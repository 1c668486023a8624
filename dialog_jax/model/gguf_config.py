"""The structure of the model in a GGUF file: its header to `DecoderConfig`.

A setting that is not supported is an error that names it; none is ignored.
"""

import pathlib
from collections.abc import Callable
from typing import Any

import numpy as np

from dialog_jax.errors import UserError
from dialog_jax.formats import gguf_file
from dialog_jax.model.decoder_config import DecoderConfig
from dialog_jax.model.rotary import LinearScaling, Rotary

# llama.cpp's names of architectures: the families of `model.families`.
ARCHITECTURES = {"llama": "llama", "qwen2": "qwen2", "qwen3": "qwen3", "gemma3": "gemma3_text"}
# What llama.cpp knows of gemma3 and no file says. Source: its `load_arch_hparams`.
_GEMMA3_PERIOD = 6
_GEMMA3_LOCAL_THETA = 10_000.0
_GEMMA3_LARGEST = 62  # layers of the 27B model, whose attention scale is not that of the others


def from_gguf(path: pathlib.Path, reader: gguf_file.Gguf) -> DecoderConfig:
    """Returns the structure that the header of a GGUF file describes; errors name `path`."""
    shapes = {tensor.name: tuple(int(size) for size in reversed(tensor.shape)) for tensor in reader.tensors}
    architecture = gguf_file.contents(path, reader, "general.architecture", str)
    if architecture not in ARCHITECTURES:
        raise UserError(f"{path}: general.architecture is {architecture!r}; supported are {', '.join(ARCHITECTURES)}")

    def get(name, default=None, kind=int):
        value = gguf_file.contents(path, reader, f"{architecture}.{name}", kind)
        if value is None and default is None:
            raise UserError(f"{path}: {architecture}.{name} is missing; download the file again")
        return default if value is None else value

    width, heads, layers = get("embedding_length"), get("attention.head_count"), get("block_count")
    if heads < 1:
        raise UserError(f"{path}: {architecture}.attention.head_count is {heads}; needed a number above 0")
    if layers > len(shapes):
        raise UserError(f"{path}: {architecture}.block_count is {layers:,}, and it has only {len(shapes):,} tensors")
    head_dim = get("attention.key_length", width // heads)
    if head_dim < 1:
        raise UserError(f"{path}: {architecture}.attention.key_length is {head_dim}; needed a number above 0")
    scaling = get("rope.scaling.type", "none", str)
    for name, got, needed in [
        ("rope.scaling.type", "none" if architecture == "gemma3" and scaling == "linear" else scaling, "none"),
        ("rope.dimension_count", get("rope.dimension_count", head_dim), head_dim),
        ("attention.value_length", get("attention.value_length", head_dim), head_dim),
        ("expert_count", get("expert_count", 0), 0),
    ]:
        if got != needed:
            raise UserError(f"{path}: {architecture}.{name} is {got!r}, which is not supported (only {needed!r} is)")
    if "rope_freqs.weight" in shapes:
        raise UserError(
            f"{path}: scaled RoPE (rope_freqs.weight) is read from safetensors only; use the model's safetensors"
        )
    if "token_embd.weight" not in shapes:
        raise UserError(f"{path}: tensor token_embd.weight is missing; download the file again")
    settings = {
        "family": ARCHITECTURES[architecture],
        "vocab_size": shapes["token_embd.weight"][0],
        "width": width,
        "layers": layers,
        "heads": heads,
        "kv_heads": get("attention.head_count_kv", heads),
        "head_dim": head_dim,
        "feed_forward": get("feed_forward_length"),
        "max_length": get("context_length"),
        "rotary": (Rotary(theta=float(get("rope.freq_base", 10000.0, float))),),
        # Stored as the float32 nearest to a short decimal; read back as that decimal.
        "norm_epsilon": float(
            np.format_float_scientific(np.float32(get("attention.layer_norm_rms_epsilon", kind=float)))
        ),
        "tie_embeddings": "output.weight" not in shapes,
        "qkv_bias": "blk.0.attn_q.bias" in shapes,
        "output_bias": "blk.0.attn_output.bias" in shapes,
        "qk_norm": "head" if "blk.0.attn_q_norm.weight" in shapes else "none",
    }
    if architecture == "gemma3":
        settings |= _read_gemma3(get, width, heads, layers, head_dim, scaling)
    try:
        return DecoderConfig(**settings)
    except ValueError as error:
        raise UserError(f"{path}: {error}") from error


def _read_gemma3(
    get: Callable[..., Any], width: int, heads: int, layers: int, head_dim: int, scaling: str
) -> dict[str, Any]:
    """Returns the settings of gemma3; the last of every six layers, or as many as the header says, has no window.

    Only those layers have the base and the scaling of RoPE that the header says.
    """
    window, period = get("attention.sliding_window"), get("attention.sliding_window_pattern", _GEMMA3_PERIOD)
    is_full = [period > 0 and layer % period == period - 1 for layer in range(layers)]
    linear = LinearScaling(factor=float(get("rope.scaling.factor", kind=float))) if scaling == "linear" else None
    return {
        "rotary": (
            Rotary(theta=float(get("rope.freq_base_swa", _GEMMA3_LOCAL_THETA, float))),
            Rotary(theta=float(get("rope.freq_base", kind=float)), scaling=linear),
        ),
        "layer_rotary": tuple(map(int, is_full)),
        "windows": tuple(0 if full else window for full in is_full),
        "norms": "both",
        "norm_offset": 1.0,
        "attention_scale": (width // heads if layers == _GEMMA3_LARGEST else head_dim) ** -0.5,
        "logit_cap": get("final_logit_softcapping", 0.0, float) or None,
        "activation": "gelu_tanh",
        "embedding_scale": width**0.5,
    }
