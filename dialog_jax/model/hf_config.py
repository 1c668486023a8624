"""The structure of a published model: config.json or a GGUF header to `DecoderConfig`, and back to config.json.

A setting that is not supported is an error that names it; none is ignored.
"""

import pathlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from dialog_jax.errors import UserError
from dialog_jax.formats import gguf_file
from dialog_jax.model import decoder, rotary

_ARCHITECTURES = {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM"}

# Defaults of each family's configuration class in transformers, for fields that config.json omits.
_DEFAULT_BIAS = {"llama": False, "qwen2": True, "qwen3": False}
# The same for a text_config, which is often saved without them; a whole config.json has them.
_DEFAULT_SHAPES = {
    "llama": {"vocab_size": 32000, "intermediate_size": 11008, "max_position_embeddings": 2048},
    "qwen2": {"vocab_size": 151936, "intermediate_size": 22016, "max_position_embeddings": 32768},
    "qwen3": {"vocab_size": 151936, "intermediate_size": 22016, "max_position_embeddings": 32768},
}
for _shapes in _DEFAULT_SHAPES.values():
    _shapes.update(hidden_size=4096, num_hidden_layers=32, num_attention_heads=32)


def is_wrapper(fields: Mapping[str, Any]) -> bool:
    """Returns whether config.json describes a model, for instance of images and text, that contains a decoder."""
    return isinstance(fields.get("text_config"), Mapping)


def _unwrap(file: pathlib.Path, fields: Mapping[str, Any]) -> Mapping[str, Any]:
    """Returns the fields of the decoder: those of `text_config`, with transformers' defaults, if there is one."""
    if not is_wrapper(fields):
        return fields
    text = fields["text_config"]
    family = text.get("model_type")
    if family not in decoder.FAMILIES:
        raise UserError(
            f"{file}: model_type is {fields.get('model_type')!r} with a text_config of model_type {family!r}; "
            f"supported there are {', '.join(decoder.FAMILIES)}"
        )
    tied = bool(text.get("tie_word_embeddings") or fields.get("tie_word_embeddings"))
    shared = {"quantization_config": fields.get("quantization_config")}
    return _DEFAULT_SHAPES[family] | shared | text | {"tie_word_embeddings": tied}


def from_json(file: pathlib.Path, fields: Mapping[str, Any]) -> decoder.DecoderConfig:
    """Returns the structure that the `fields` of config.json describe; errors name `file`."""

    def need(name):
        if fields.get(name) is None:
            raise UserError(f"{file}: {name} is missing; is this the config.json of a {family} model?")
        return fields[name]

    fields = _unwrap(file, fields)
    family = fields.get("model_type")
    if family not in decoder.FAMILIES:
        raise UserError(f"{file}: model_type is {family!r}; supported are {', '.join(decoder.FAMILIES)}")
    _refuse_unsupported(file, fields)
    theta, scaling = _parse_rope(file, fields)
    bias = True if family == "qwen2" else bool(fields.get("attention_bias", _DEFAULT_BIAS[family]))
    heads = need("num_attention_heads")
    default_head_dim = 128 if family == "qwen3" else need("hidden_size") // heads
    try:
        return decoder.DecoderConfig(
            family=family,
            vocab_size=need("vocab_size"),
            width=need("hidden_size"),
            layers=need("num_hidden_layers"),
            heads=heads,
            kv_heads=fields.get("num_key_value_heads") or heads,
            head_dim=fields.get("head_dim") or default_head_dim,
            feed_forward=need("intermediate_size"),
            max_length=need("max_position_embeddings"),
            rope_theta=theta,
            rope_scaling=scaling,
            norm_epsilon=fields.get("rms_norm_eps", 1e-6),
            tie_embeddings=bool(fields.get("tie_word_embeddings", False)),
            qkv_bias=bias,
            output_bias=bias and family != "qwen2",
            qk_norm=family == "qwen3",
        )
    except (ValueError, TypeError) as error:
        raise UserError(f"{file}: {error}") from error


def _refuse_unsupported(file: pathlib.Path, fields: Mapping[str, Any]) -> None:
    sliding = (
        fields.get("sliding_window") if fields.get("use_sliding_window", fields["model_type"] == "llama") else None
    )
    partial = (fields.get("rope_parameters") or {}).get("partial_rotary_factor", fields.get("partial_rotary_factor", 1))
    other_layers = sorted(set(fields.get("layer_types") or []) - {"full_attention"})
    bias = fields.get("attention_bias", True)
    checks = [
        ("hidden_act", fields.get("hidden_act", "silu"), "silu"),
        ("mlp_bias", fields.get("mlp_bias") or False, False),
        ("attention_bias", bias if fields["model_type"] == "qwen2" else True, True),
        ("attention_dropout", fields.get("attention_dropout") or 0, 0),
        ("quantization_config", fields.get("quantization_config"), None),
        ("sliding_window", sliding, None),
        ("use_sliding_window", fields.get("use_sliding_window") or False, False),
        ("layer_types", other_layers, []),
        ("partial_rotary_factor", partial, 1),
    ]
    for name, got, needed in checks:
        if got != needed:
            raise UserError(f"{file}: {name} is {got!r}, which is not supported (only {needed!r} is)")


def _parse_rope(file: pathlib.Path, fields: Mapping[str, Any]) -> tuple[float, rotary.Llama3Scaling | None]:
    # transformers 5 writes everything to rope_parameters; earlier releases write rope_theta and rope_scaling.
    rope = {**(fields.get("rope_scaling") or {}), **(fields.get("rope_parameters") or {})}
    theta = rope.get("rope_theta", fields.get("rope_theta", 10000.0))
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "default":
        return float(theta), None
    if kind != "llama3":
        raise UserError(f"{file}: rope_type is {kind!r}, which is not supported (only 'default' and 'llama3' are)")
    try:
        return float(theta), rotary.Llama3Scaling(
            factor=float(rope["factor"]),
            low_frequency_factor=float(rope["low_freq_factor"]),
            high_frequency_factor=float(rope["high_freq_factor"]),
            original_max_length=int(rope["original_max_position_embeddings"]),
        )
    except KeyError as error:
        raise UserError(f"{file}: rope scaling of type llama3 lacks {error.args[0]}") from None


def from_gguf(path: pathlib.Path, reader: gguf_file.Gguf) -> decoder.DecoderConfig:
    """Returns the structure that the header of a GGUF file describes; errors name `path`."""
    shapes = {tensor.name: tuple(int(size) for size in reversed(tensor.shape)) for tensor in reader.tensors}
    family = gguf_file.contents(path, reader, "general.architecture", str)
    if family not in decoder.FAMILIES:
        raise UserError(f"{path}: general.architecture is {family!r}; supported are {', '.join(decoder.FAMILIES)}")

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
    return decoder.DecoderConfig(
        family=family,
        vocab_size=shapes["token_embd.weight"][0],
        width=width,
        layers=get("block_count"),
        heads=heads,
        kv_heads=get("attention.head_count_kv", heads),
        head_dim=head_dim,
        feed_forward=get("feed_forward_length"),
        max_length=get("context_length"),
        rope_theta=float(get("rope.freq_base", 10000.0, float)),
        # Stored as the float32 nearest to a short decimal; read back as that decimal.
        norm_epsilon=float(np.format_float_scientific(np.float32(get("attention.layer_norm_rms_epsilon", kind=float)))),
        tie_embeddings="output.weight" not in shapes,
        qkv_bias="blk.0.attn_q.bias" in shapes,
        output_bias="blk.0.attn_output.bias" in shapes,
        qk_norm="blk.0.attn_q_norm.weight" in shapes,
    )


def to_json(config: decoder.DecoderConfig, dtype: str = "float32") -> dict[str, Any]:
    """Returns the fields of config.json, with weights of `dtype`, as Hugging Face transformers and vLLM read them."""
    rope: dict[str, Any] = {"rope_type": "default"}
    if (scaling := config.rope_scaling) is not None:
        rope = {
            "rope_type": "llama3",
            "factor": scaling.factor,
            "low_freq_factor": scaling.low_frequency_factor,
            "high_freq_factor": scaling.high_frequency_factor,
            "original_max_position_embeddings": scaling.original_max_length,
        }
    fields = {
        "architectures": [_ARCHITECTURES[config.family]],
        "model_type": config.family,
        "vocab_size": config.vocab_size,
        "hidden_size": config.width,
        "num_hidden_layers": config.layers,
        "num_attention_heads": config.heads,
        "num_key_value_heads": config.kv_heads,
        "head_dim": config.head_dim,
        "intermediate_size": config.feed_forward,
        "hidden_act": "silu",
        "max_position_embeddings": config.max_length,
        "rms_norm_eps": config.norm_epsilon,
        "tie_word_embeddings": config.tie_embeddings,
        "attention_dropout": 0.0,
        "initializer_range": 0.02,
        "use_cache": True,
        "dtype": dtype,
        # Both spellings: transformers 5 reads rope_parameters, earlier releases and vLLM the other two.
        "rope_parameters": rope | {"rope_theta": config.rope_theta},
        "rope_theta": config.rope_theta,
        "rope_scaling": None if config.rope_scaling is None else rope,
        "torch_dtype": dtype,
    }
    if config.family == "llama":
        fields["mlp_bias"] = False
    if config.family == "qwen2":
        # Qwen2 in transformers derives head_dim from width and heads, so no other value would load.
        if config.head_dim * config.heads != config.width:
            raise UserError(
                f"qwen2 needs width = heads * head_dim, got {config.width}, {config.heads}, {config.head_dim}"
            )
    else:
        fields["attention_bias"] = config.qkv_bias
    if config.family != "llama":
        fields["use_sliding_window"] = False
    return fields
