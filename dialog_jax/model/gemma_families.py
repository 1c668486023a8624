"""The families of Gemma (see `model.family`), from Gemma 2 on.

Source: their configuration and modeling files in Hugging Face transformers 5.24.
"""

from typing import Any

from dialog_jax.errors import UserError
from dialog_jax.model.decoder_config import DecoderConfig, Heads
from dialog_jax.model.family import (
    BIAS,
    FULL,
    SLIDING,
    Family,
    Fields,
    read_bias,
    read_windows,
    write_bias,
    write_windows,
)


def _read_gemma(fields: Fields) -> dict[str, Any]:
    return {
        "norms": "both",
        "norm_offset": 1.0,
        "attention_scale": fields["query_pre_attn_scalar"] ** -0.5,
        "logit_cap": fields["final_logit_softcapping"],
        "embedding_scale": fields["hidden_size"] ** 0.5,
        **read_bias(fields),
        **read_windows(fields),
    }


def _write_gemma(config: DecoderConfig) -> dict[str, Any]:
    return {
        "query_pre_attn_scalar": round((config.attention_scale or config.head_dim**-0.5) ** -2),
        "attn_logit_softcapping": config.attention_cap,
        "final_logit_softcapping": config.logit_cap,
        "hidden_act": "gelu_pytorch_tanh",
        "hidden_activation": "gelu_pytorch_tanh",
        "use_bidirectional_attention": False,
        **write_bias(config),
        **write_windows(config),
    }


def _find_theta(config: DecoderConfig) -> float:
    """Returns the base of the RoPE of the first kind, that of layers with a window, as transformers 4 names it."""
    return config.rotary[0].theta if config.rotary[0] else 10000.0


_NAMES_OF_BOTH_NORMS = {"layers/feed_forward_norm": "model.layers.{}.pre_feedforward_layernorm.weight"}
_GEMMA_FIELDS = BIAS | {
    *("query_pre_attn_scalar", "final_logit_softcapping"),
    *("sliding_window", "layer_types", "_sliding_window_pattern"),
}
_GEMMA_NEEDED = {"use_bidirectional_attention": (False, None)}

GEMMA2 = Family(
    architecture="Gemma2ForCausalLM",
    read=lambda fields: {**_read_gemma(fields), "attention_cap": fields["attn_logit_softcapping"]},
    write=_write_gemma,
    fields=_GEMMA_FIELDS | {"attn_logit_softcapping"},
    needed=_GEMMA_NEEDED,
    names=_NAMES_OF_BOTH_NORMS,
)
GEMMA3 = Family(
    architecture="Gemma3ForCausalLM",
    read=lambda fields: {**_read_gemma(fields), "qk_norm": "head"},
    write=lambda config: {**_write_gemma(config), "rope_local_base_freq": _find_theta(config)},
    fields=_GEMMA_FIELDS,
    needed={**_GEMMA_NEEDED, "attn_logit_softcapping": (None,)},
    rope_kinds=(SLIDING, FULL),
    layer_rotary=lambda fields: tuple(int(kind == FULL) for kind in fields["layer_types"]),
    names=_NAMES_OF_BOTH_NORMS,
)


def _read_gemma4(fields: Fields) -> dict[str, Any]:
    return {
        "norms": "both",
        "qk_norm": "head",
        "value_norm": True,
        "layer_scales": True,
        "attention_scale": 1.0,
        "logit_cap": fields["final_logit_softcapping"],
        "embedding_scale": fields["hidden_size"] ** 0.5,
        "full_attention": _read_full_attention(fields),
        **read_bias(fields),
        **read_windows(fields),
    }


def _read_full_attention(fields: Fields) -> Heads:
    """Returns the heads of layers without a window.

    Raises:
      UserError: these layers differ, or others have heads of their own.
    """
    common = {"num_key_value_heads": fields["num_key_value_heads"], "head_dim": fields["head_dim"]}
    own = {int(layer): dict(settings) for layer, settings in (fields["per_layer_config"] or {}).items()}
    layers = [common | own.get(layer, {}) for layer in range(fields["num_hidden_layers"])]
    full = layers[fields["layer_types"].index(FULL)]
    expected = [full if kind == FULL else common for kind in fields["layer_types"]]
    if layers != expected or full.keys() != common.keys():
        raise UserError(
            f"per_layer_config is {fields['per_layer_config']!r}; supported are {' and '.join(common)}, the same for "
            f"all layers of type {FULL!r}"
        )
    return Heads(
        kv_heads=full["num_key_value_heads"],
        head_dim=full["head_dim"],
        values_are_keys=bool(fields["attention_k_eq_v"]),
    )


def _write_gemma4(config: DecoderConfig) -> dict[str, Any]:
    full = config.full_attention
    assert full is not None
    return {
        "global_head_dim": full.head_dim,
        "num_global_key_value_heads": full.kv_heads,
        "attention_k_eq_v": full.values_are_keys,
        "final_logit_softcapping": config.logit_cap,
        "hidden_act": "gelu_pytorch_tanh",
        "hidden_activation": "gelu_pytorch_tanh",
        "num_kv_shared_layers": 0,
        "use_double_wide_mlp": False,
        **write_bias(config),
        **write_windows(config),
    }


# 12B. In images, which are not read, tokens see later ones.
GEMMA4_UNIFIED = Family(
    architecture="Gemma4UnifiedForCausalLM",
    read=_read_gemma4,
    write=_write_gemma4,
    fields=BIAS | {"final_logit_softcapping", "sliding_window", "layer_types", "per_layer_config", "attention_k_eq_v"},
    needed={"use_bidirectional_attention": (None, False, "vision"), "num_kv_shared_layers": (0,)},
    rope_kinds=(SLIDING, FULL),
    layer_rotary=lambda fields: tuple(int(kind == FULL) for kind in fields["layer_types"]),
    names=_NAMES_OF_BOTH_NORMS,
)
# 31B. Smaller sizes have inputs of each layer, keys of other layers, or experts beside the feed-forward.
GEMMA4 = GEMMA4_UNIFIED._replace(
    architecture="Gemma4ForCausalLM",
    write=lambda config: {**_write_gemma4(config), "hidden_size_per_layer_input": 0, "enable_moe_block": False},
    needed={**GEMMA4_UNIFIED.needed, "hidden_size_per_layer_input": (0, None), "enable_moe_block": (False,)},
)
