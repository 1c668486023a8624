"""The structure of the model in a GGUF file: its header to `DecoderConfig`.

A setting that is not supported is an error that names it; none is ignored.
"""

import pathlib

import numpy as np

from dialog_jax.errors import UserError
from dialog_jax.formats import gguf_file
from dialog_jax.model.decoder_config import DecoderConfig
from dialog_jax.model.rotary import Rotary

ARCHITECTURES = ("llama", "qwen2", "qwen3")


def from_gguf(path: pathlib.Path, reader: gguf_file.Gguf) -> DecoderConfig:
    """Returns the structure that the header of a GGUF file describes; errors name `path`."""
    shapes = {tensor.name: tuple(int(size) for size in reversed(tensor.shape)) for tensor in reader.tensors}
    family = gguf_file.contents(path, reader, "general.architecture", str)
    if family not in ARCHITECTURES:
        raise UserError(f"{path}: general.architecture is {family!r}; supported are {', '.join(ARCHITECTURES)}")

    def get(name, default=None, kind=int):
        value = gguf_file.contents(path, reader, f"{family}.{name}", kind)
        if value is None and default is None:
            raise UserError(f"{path}: {family}.{name} is missing; download the file again")
        return default if value is None else value

    width, heads = get("embedding_length"), get("attention.head_count")
    if heads < 1:
        raise UserError(f"{path}: {family}.attention.head_count is {heads}; needed a number above 0")
    head_dim = get("attention.key_length", width // heads)
    for name, got, needed in [
        ("rope.scaling.type", get("rope.scaling.type", "none", str), "none"),
        ("rope.dimension_count", get("rope.dimension_count", head_dim), head_dim),
        ("attention.value_length", get("attention.value_length", head_dim), head_dim),
        ("expert_count", get("expert_count", 0), 0),
    ]:
        if got != needed:
            raise UserError(f"{path}: {family}.{name} is {got!r}, which is not supported (only {needed!r} is)")
    if "rope_freqs.weight" in shapes:
        raise UserError(
            f"{path}: scaled RoPE (rope_freqs.weight) is read from safetensors only; use the model's safetensors"
        )
    if "token_embd.weight" not in shapes:
        raise UserError(f"{path}: tensor token_embd.weight is missing; download the file again")
    return DecoderConfig(
        family=family,
        vocab_size=shapes["token_embd.weight"][0],
        width=width,
        layers=get("block_count"),
        heads=heads,
        kv_heads=get("attention.head_count_kv", heads),
        head_dim=head_dim,
        feed_forward=get("feed_forward_length"),
        max_length=get("context_length"),
        rotary=(Rotary(theta=float(get("rope.freq_base", 10000.0, float))),),
        # Stored as the float32 nearest to a short decimal; read back as that decimal.
        norm_epsilon=float(np.format_float_scientific(np.float32(get("attention.layer_norm_rms_epsilon", kind=float)))),
        tie_embeddings="output.weight" not in shapes,
        qkv_bias="blk.0.attn_q.bias" in shapes,
        output_bias="blk.0.attn_output.bias" in shapes,
        qk_norm="head" if "blk.0.attn_q_norm.weight" in shapes else "none",
    )
