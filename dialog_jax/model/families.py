"""All model families as records (see `model.family`), by the `model_type` of their config.json.

Source: the configuration and modeling files of each family in Hugging Face transformers 5.24.
"""

from typing import Any

from dialog_jax.model import gemma_families, mixture_families
from dialog_jax.model.decoder_config import DecoderConfig
from dialog_jax.model.family import (
    BIAS,
    FULL,
    NO_BIAS,
    SLIDING,
    Family,
    Fields,
    read_bias,
    read_window_of_all,
    read_windows,
    tidy,
    write_bias,
    write_window_of_all,
    write_windows,
)

LLAMA = Family(
    architecture="LlamaForCausalLM",
    read=read_bias,
    write=lambda config: {**write_bias(config), "mlp_bias": False},
    fields=BIAS,
    needed=NO_BIAS,
)


def _write_qwen_windows(config: DecoderConfig) -> dict[str, Any]:
    return {"use_sliding_window": any(config.windows), **write_windows(config)}


_QWEN_WINDOWS = frozenset({"use_sliding_window", "sliding_window", "max_window_layers", "layer_types"})

QWEN2 = Family(
    architecture="Qwen2ForCausalLM",
    read=lambda fields: {"qkv_bias": True, **read_windows(fields)},
    write=_write_qwen_windows,
    fields=_QWEN_WINDOWS,
    needed={"attention_bias": (True,)},
)
QWEN3 = Family(
    architecture="Qwen3ForCausalLM",
    read=lambda fields: {"qk_norm": "head", **read_bias(fields), **read_windows(fields)},
    write=lambda config: {**write_bias(config), **_write_qwen_windows(config)},
    fields=BIAS | _QWEN_WINDOWS,
    needed=NO_BIAS,
)

MISTRAL = Family(
    architecture="MistralForCausalLM",
    read=read_window_of_all,
    write=write_window_of_all,
    fields=frozenset({"sliding_window"}),
    needed={},
)


def _read_granite(fields: Fields) -> dict[str, Any]:
    return {
        "attention_scale": float(fields["attention_multiplier"]),
        "embedding_scale": float(fields["embedding_multiplier"]),
        "scales_soft_prompt": True,
        "residual_scale": float(fields["residual_multiplier"]),
        "logit_scale": 1 / fields["logits_scaling"],
        **read_bias(fields),
    }


def _write_granite(config: DecoderConfig) -> dict[str, Any]:
    return {
        "attention_multiplier": config.attention_scale or config.head_dim**-0.5,
        "embedding_multiplier": config.embedding_scale,
        "residual_multiplier": config.residual_scale,
        "logits_scaling": tidy(1 / config.logit_scale),
        "mlp_bias": False,
        **write_bias(config),
    }


GRANITE = Family(
    architecture="GraniteForCausalLM",
    read=_read_granite,
    write=_write_granite,
    fields=BIAS | {"attention_multiplier", "embedding_multiplier", "residual_multiplier", "logits_scaling"},
    needed=NO_BIAS,
)

_GATE_AND_UP = ("layers/feed_forward/w_gate", "layers/feed_forward/w_up")

GRANITE_HYBRID = Family(
    architecture="GraniteMoeHybridForCausalLM",
    read=lambda fields: {**_read_granite(fields), "feed_forward": fields["shared_intermediate_size"]},
    write=lambda config: {
        **_write_granite(config),
        "shared_intermediate_size": config.feed_forward,
        "num_local_experts": 0,
        "num_experts_per_tok": 0,
        "position_embedding_type": "rope" if config.rotary[0] else None,
        "layer_types": ["attention"] * config.layers,
        # Of layers that the model does not have; the class of transformers 4 checks that these fit.
        "mamba_n_heads": 1,
        "mamba_d_head": 2 * config.width,
    },
    fields=GRANITE.fields | {"shared_intermediate_size", "position_embedding_type"},
    needed={"num_local_experts": (0,), "layer_types": (["attention"], [FULL])},
    layer_rotary=lambda fields: (int(fields["position_embedding_type"] != "rope"),) * fields["num_hidden_layers"],
    names={"layers/feed_forward/w_down": "model.layers.{}.shared_mlp.output_linear.weight"},
    fused={"model.layers.{}.shared_mlp.input_linear.weight": _GATE_AND_UP},
)

PHI3 = MISTRAL._replace(
    architecture="Phi3ForCausalLM",
    needed={"resid_pdrop": (0,), "embd_pdrop": (0,)},
    fields=MISTRAL.fields | {"partial_rotary_factor", "original_max_position_embeddings"},
    fused={
        "model.layers.{}.self_attn.qkv_proj.weight": tuple(
            f"layers/attention/w_{name}" for name in ("query", "key", "value")
        ),
        "model.layers.{}.mlp.gate_up_proj.weight": _GATE_AND_UP,
    },
)

_UNROTATED = 1  # the index of no RoPE in a family with one kind

SMOLLM3 = Family(
    architecture="SmolLM3ForCausalLM",
    read=lambda fields: {**read_bias(fields), **read_windows(fields)},
    write=lambda config: {
        "no_rope_layers": [int(kind != _UNROTATED) for kind in config.layer_rotary or (0,) * config.layers],
        "mlp_bias": False,
        **write_bias(config),
        **_write_qwen_windows(config),
    },
    fields=BIAS | _QWEN_WINDOWS | {"no_rope_layers", "no_rope_layer_interval"},
    needed=NO_BIAS,
    layer_rotary=lambda fields: tuple(0 if rotates else _UNROTATED for rotates in fields["no_rope_layers"]),
)

_OLMO = {"norms": "post", "qk_norm": "width"}

OLMO2 = Family(
    architecture="Olmo2ForCausalLM",
    read=lambda fields: {**_OLMO, **read_bias(fields)},
    write=write_bias,
    fields=BIAS,
    needed={},
)
OLMO3 = Family(
    architecture="Olmo3ForCausalLM",
    read=lambda fields: {**_OLMO, **read_bias(fields), **read_windows(fields)},
    write=lambda config: {**write_bias(config), **write_windows(config)},
    fields=BIAS | {"sliding_window", "layer_types"},
    needed={},
    rope_kinds=(SLIDING, FULL),
    layer_rotary=lambda fields: tuple(int(kind == FULL) for kind in fields["layer_types"]),
)

MINISTRAL3 = MISTRAL._replace(architecture="Ministral3ForCausalLM")


FAMILIES: dict[str, Family] = {
    "llama": LLAMA,
    "qwen2": QWEN2,
    "qwen3": QWEN3,
    "qwen3_moe": mixture_families.QWEN3_MOE,
    "mistral": MISTRAL,
    "ministral3": MINISTRAL3,
    "gemma2": gemma_families.GEMMA2,
    "gemma3_text": gemma_families.GEMMA3,
    "gemma4_text": gemma_families.GEMMA4,
    "gemma4_unified_text": gemma_families.GEMMA4_UNIFIED,
    "phi3": PHI3,
    "granite": GRANITE,
    "glm4_moe": mixture_families.GLM4_MOE,
    "gpt_oss": mixture_families.GPT_OSS,
    "granitemoehybrid": GRANITE_HYBRID,
    "smollm3": SMOLLM3,
    "olmo2": OLMO2,
    "olmo3": OLMO3,
}
