"""Names of parameters: ours, Hugging Face's and llama.cpp's; and what savers and wrappers put before Hugging Face's.

One table serves loading and saving. Knows no file and no array.
"""

import re
from collections.abc import Collection, Iterable
from typing import NamedTuple

from dialog_jax.errors import UserError
from dialog_jax.model.decoder_config import DecoderConfig
from dialog_jax.model.families import FAMILIES

EMBEDDING, UNEMBEDDING = "model.embed_tokens.weight", "lm_head.weight"


class _Name(NamedTuple):
    published: str  # Hugging Face's name; {} is the layer, and a second one the expert
    gguf: str  # empty where no family that has it is read from GGUF
    transposed: bool = False  # published matrices are [out, in], ours [in, out]


NAMES: dict[str, _Name] = {
    "embedding": _Name(EMBEDDING, "token_embd.weight"),
    "final_norm": _Name("model.norm.weight", "output_norm.weight"),
    "lm_head": _Name(UNEMBEDDING, "output.weight"),
    "layers/attention_norm": _Name("model.layers.{}.input_layernorm.weight", "blk.{}.attn_norm.weight"),
    "layers/attention/w_query": _Name("model.layers.{}.self_attn.q_proj.weight", "blk.{}.attn_q.weight", True),
    "layers/attention/w_key": _Name("model.layers.{}.self_attn.k_proj.weight", "blk.{}.attn_k.weight", True),
    "layers/attention/w_value": _Name("model.layers.{}.self_attn.v_proj.weight", "blk.{}.attn_v.weight", True),
    "layers/attention/w_output": _Name("model.layers.{}.self_attn.o_proj.weight", "blk.{}.attn_output.weight", True),
    "layers/attention/b_query": _Name("model.layers.{}.self_attn.q_proj.bias", "blk.{}.attn_q.bias"),
    "layers/attention/b_key": _Name("model.layers.{}.self_attn.k_proj.bias", "blk.{}.attn_k.bias"),
    "layers/attention/b_value": _Name("model.layers.{}.self_attn.v_proj.bias", "blk.{}.attn_v.bias"),
    "layers/attention/b_output": _Name("model.layers.{}.self_attn.o_proj.bias", "blk.{}.attn_output.bias"),
    "layers/attention/query_norm": _Name("model.layers.{}.self_attn.q_norm.weight", "blk.{}.attn_q_norm.weight"),
    "layers/attention/key_norm": _Name("model.layers.{}.self_attn.k_norm.weight", "blk.{}.attn_k_norm.weight"),
    "layers/attention_post_norm": _Name(
        "model.layers.{}.post_attention_layernorm.weight", "blk.{}.post_attention_norm.weight"
    ),
    "layers/feed_forward_post_norm": _Name(
        "model.layers.{}.post_feedforward_layernorm.weight", "blk.{}.post_ffw_norm.weight"
    ),
    "layers/feed_forward_norm": _Name("model.layers.{}.post_attention_layernorm.weight", "blk.{}.ffn_norm.weight"),
    "layers/feed_forward/w_gate": _Name("model.layers.{}.mlp.gate_proj.weight", "blk.{}.ffn_gate.weight", True),
    "layers/feed_forward/w_up": _Name("model.layers.{}.mlp.up_proj.weight", "blk.{}.ffn_up.weight", True),
    "layers/feed_forward/w_down": _Name("model.layers.{}.mlp.down_proj.weight", "blk.{}.ffn_down.weight", True),
    "layers/attention/sinks": _Name("model.layers.{}.self_attn.sinks", ""),
    "layers/experts/w_router": _Name("model.layers.{}.mlp.gate.weight", "", True),
    "layers/experts/w_gate": _Name("model.layers.{}.mlp.experts.{}.gate_proj.weight", "", True),
    "layers/experts/w_up": _Name("model.layers.{}.mlp.experts.{}.up_proj.weight", "", True),
    "layers/experts/w_down": _Name("model.layers.{}.mlp.experts.{}.down_proj.weight", "", True),
    "layers/experts/shared/w_gate": _Name("model.layers.{}.mlp.shared_experts.gate_proj.weight", "", True),
    "layers/experts/shared/w_up": _Name("model.layers.{}.mlp.shared_experts.up_proj.weight", "", True),
    "layers/experts/shared/w_down": _Name("model.layers.{}.mlp.shared_experts.down_proj.weight", "", True),
    "layers/experts/b_router": _Name("model.layers.{}.mlp.router.bias", ""),
    "layers/experts/b_gate": _Name("model.layers.{}.mlp.experts.gate_proj_bias", ""),
    "layers/experts/b_up": _Name("model.layers.{}.mlp.experts.up_proj_bias", ""),
    "layers/experts/b_down": _Name("model.layers.{}.mlp.experts.down_proj_bias", ""),
    "layers/scale": _Name("model.layers.{}.layer_scalar", ""),
}
NAMES |= {
    key.replace("/attention/", "/full_attention/"): name._replace(gguf="")
    for key, name in NAMES.items()
    if "/attention/" in key
}
# [layers, experts, in, out]
EXPERT_MATRICES = ("layers/experts/w_gate", "layers/experts/w_up", "layers/experts/w_down")
EXPERT_BIASES = ("layers/experts/b_gate", "layers/experts/b_up", "layers/experts/b_down")
_ROUTER = "layers/experts/w_router"

# Every decoder of our families has it, and no vision or audio tower; norms have other names in some.
_ANCHOR = "layers.0.self_attn.o_proj.weight"
_LAYER = re.compile(r"model\.layers\.(\d+)\.")


def list_names(config: DecoderConfig, key: str, from_gguf: bool = False) -> list[str]:
    """Returns the published names of a parameter, one for each part of which it is stacked.

    final_norm                  [model.norm.weight]
    layers/feed_forward/w_up    [model.layers.0.mlp.up_proj.weight, ...], of the layers that have one
    layers/experts/w_up         [model.layers.0.mlp.experts.0.up_proj.weight, ...], of the experts of all layers
    """
    name = NAMES[key].gguf if from_gguf else _find_name(config, key)
    if name.count("{}") == 2:
        assert config.experts is not None
        return [name.format(layer, i) for layer in list_layers(config, key) for i in range(config.experts.count)]
    return [name.format(layer) for layer in list_layers(config, key)] if "{}" in name else [name]


def list_layers(config: DecoderConfig, key: str) -> tuple[int, ...]:
    """Returns the layers that have a parameter, in the order in which it is stacked."""
    return config.parts.get(key.split("/")[1], tuple(range(config.layers)))


def list_adaptable(keys: Iterable[str]) -> list[str]:
    """Returns which of the parameters are matrices of layers that LoRA can adapt: all but the router."""
    return [key for key in keys if NAMES[key].transposed and key != _ROUTER]


def list_modules(config: DecoderConfig, key: str) -> list[str]:
    """Returns the names by which LoRA adapts a parameter, one for each layer that has it, or one.

    layers/feed_forward/w_up    [model.layers.0.mlp.up_proj, ...]
    layers/experts/w_up         [model.layers.0.mlp.experts.up_proj, ...], each of all experts of the layer
    """
    name = _find_name(config, key).removesuffix(".weight").replace(".experts.{}.", ".experts.")
    return [name.format(layer) for layer in list_layers(config, key)] if "{}" in name else [name]


def find_joined_modules(config: DecoderConfig) -> dict[str, list[str]]:
    """Returns {name of a module of transformers that holds several matrices: the names of `list_modules` for each}.

    model.layers.0.self_attn.qkv_proj           [model.layers.0.self_attn.q_proj, ...k_proj, ...v_proj]
    model.layers.0.mlp.experts.gate_up_proj     [model.layers.0.mlp.experts.gate_proj, ...up_proj]
    """
    joined = {
        name.removesuffix(".weight"): [part.removesuffix(".weight") for part in parts]
        for name, parts in find_fused(config).items()
    }
    gates, ups = (list_modules(config, key) if config.experts else [] for key in EXPERT_MATRICES[:2])
    return joined | {f"{gate.rpartition('.')[0]}.gate_up_proj": [gate, up] for gate, up in zip(gates, ups, strict=True)}


def count_stacked_axes(config: DecoderConfig, key: str) -> int:
    """Returns the number of leading axes along which a parameter is stacked: 0, 1 (layers) or 2 (and experts)."""
    return _find_name(config, key).count("{}")


def is_transposed(config: DecoderConfig, key: str) -> bool:
    """Returns whether the published parts of a parameter are its own transposed."""
    return NAMES[key].transposed and key not in FAMILIES[config.family].not_transposed


def _find_name(config: DecoderConfig, key: str) -> str:
    return FAMILIES[config.family].names.get(key, NAMES[key].published)


def find_fused(config: DecoderConfig) -> dict[str, list[str]]:
    """Returns {name of a published tensor that holds several parameters: the names of tensors for each of them}."""
    fused = FAMILIES[config.family].fused
    return {
        name.format(layer): [_find_name(config, key).format(layer) for key in keys]
        for name, keys in fused.items()
        for layer in range(config.layers)
    }


def find_interleaved(config: DecoderConfig) -> dict[str, list[str]]:
    """Returns {name of a published tensor in whose last axis parameters alternate: names, had they their own}."""
    return {
        name.format(layer): [_find_name(config, key).format(layer) for key in keys]
        for name, keys in FAMILIES[config.family].interleaved.items()
        for layer in config.sparse_layers
    }


def find_extra_layers(config: DecoderConfig, names: Iterable[str]) -> set[str]:
    """Returns which tensors belong to layers behind the decoder's own, which predict further tokens."""
    if not FAMILIES[config.family].has_extra_layers:
        return set()
    layers = {name: _LAYER.match(name) for name in names}
    return {name for name, layer in layers.items() if layer and int(layer[1]) >= config.layers}


def standardize_names(names: Collection[str]) -> dict[str, str]:
    """Returns {name in the file: Hugging Face's name in a causal language model} of the decoder's tensors.

        layers.0.mlp.up_proj.weight                             model.layers.0.mlp.up_proj.weight
        language_model.model.norm.weight                        model.norm.weight
        language_model.lm_head.weight                           lm_head.weight
        model.language_model.norm.weight, lm_head.weight        model.norm.weight, lm_head.weight
        vision_tower.patch_embedding.weight                     (none: part of something else)

    Raises:
      UserError: there are several decoders.
    """
    prefix = _find_prefix(names)
    if prefix is None:
        return {name: name for name in names}
    parts = prefix.split(".")[:-1]
    outer = "".join(f"{part}." for part in (parts[:-1] if parts[-1:] == ["model"] else parts))
    head = next((name for name in (f"{outer}lm_head.weight", UNEMBEDDING) if name in names), None)
    decoder_parts = tuple(f"{prefix}{part}." for part in ("embed_tokens", "layers", "norm"))
    standard = {name: f"model.{name.removeprefix(prefix)}" for name in names if name.startswith(decoder_parts)}
    return standard if head is None else standard | {head: UNEMBEDDING}


def _find_prefix(names: Collection[str]) -> str | None:
    prefixes = sorted(name.removesuffix(_ANCHOR) for name in names if f".{name}".endswith(f".{_ANCHOR}"))
    if len(prefixes) > 1:
        prefixes = [prefix for prefix in prefixes if "language_model." in prefix or "text_model." in prefix] or prefixes
    if len(prefixes) > 1:
        raise UserError(
            f"there are {len(prefixes)} decoders, with tensor names that begin with "
            f"{', '.join(map(repr, prefixes))}; one is needed. Save the language model alone."
        )
    return prefixes[0] if prefixes else None
