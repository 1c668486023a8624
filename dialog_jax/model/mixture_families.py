"""The families with mixtures of experts (see `model.family`): qwen3_moe, gpt_oss and glm4_moe.

Source: their configuration and modeling files in Hugging Face transformers 5.24.
"""

from typing import Any

from dialog_jax.model.decoder_config import DecoderConfig, Experts
from dialog_jax.model.family import (
    BIAS,
    NO_BIAS,
    Family,
    Fields,
    read_bias,
    read_window_of_all,
    read_windows,
    write_bias,
    write_window_of_all,
    write_windows,
)

_NO_AUXILIARY_LOSS = {"output_router_logits": (False, None)}


def _read_qwen_experts(fields: Fields) -> dict[str, Any]:
    """Returns the experts of qwen3_moe; a model in which all layers are dense has none."""
    layers = fields["num_hidden_layers"]
    count = fields["num_local_experts"]
    sparse = {
        layer
        for layer in range(layers)
        if count and (layer + 1) % fields["decoder_sparse_step"] == 0 and layer not in fields["mlp_only_layers"]
    }
    if not sparse:
        return {}
    return {
        "experts": Experts(
            count=count,
            active=fields["num_experts_per_tok"],
            width=fields["moe_intermediate_size"],
            dense_layers=tuple(sorted(set(range(layers)) - sparse)),
            normalize=bool(fields["norm_topk_prob"]),
        )
    }


def _write_qwen_experts(config: DecoderConfig) -> dict[str, Any]:
    experts = config.experts
    fields: dict[str, Any] = {"decoder_sparse_step": 1, "mlp_only_layers": list(config.dense_layers)}
    if experts is not None:
        fields |= {
            "num_experts": experts.count,
            "num_experts_per_tok": experts.active,
            "moe_intermediate_size": experts.width,
            "norm_topk_prob": experts.normalize,
        }
    return fields | {"output_router_logits": False}


QWEN3_MOE = Family(
    architecture="Qwen3MoeForCausalLM",
    read=lambda fields: {
        "qk_norm": "head",
        **read_bias(fields),
        **read_window_of_all(fields),
        **_read_qwen_experts(fields),
    },
    write=lambda config: {
        "use_sliding_window": any(config.windows),
        **write_bias(config),
        **write_window_of_all(config),
        **_write_qwen_experts(config),
    },
    fields=BIAS | {"use_sliding_window", "sliding_window"},
    needed=NO_BIAS | _NO_AUXILIARY_LOSS,
)

_GPT_OSS_EXPERTS = "model.layers.{}.mlp.experts."


def _write_gpt_oss_experts(config: DecoderConfig) -> dict[str, Any]:
    experts = config.experts
    assert experts is not None
    return {
        "num_local_experts": experts.count,
        "num_experts_per_tok": experts.active,
        "swiglu_limit": experts.clamp,
        "swiglu_alpha": experts.gate_slope,
        "output_router_logits": False,
    }


GPT_OSS = Family(
    architecture="GptOssForCausalLM",
    read=lambda fields: {
        **read_bias(fields),
        **read_windows(fields),
        "sinks": True,
        "experts": Experts(
            count=fields["num_local_experts"],
            active=fields["num_experts_per_tok"],
            width=fields["intermediate_size"],
            scoring="softmax_of_top",
            router_bias=True,
            biases=True,
            clamp=float(fields["swiglu_limit"]),
            gate_slope=float(fields["swiglu_alpha"]),
        ),
    },
    write=lambda config: {
        **write_bias(config),
        **write_windows(config),
        **_write_gpt_oss_experts(config),
    },
    fields=BIAS | {"sliding_window", "layer_types"},
    needed=_NO_AUXILIARY_LOSS,
    names={
        "layers/experts/w_router": "model.layers.{}.mlp.router.weight",
        "layers/experts/w_gate": f"{_GPT_OSS_EXPERTS}gate_proj",
        "layers/experts/w_up": f"{_GPT_OSS_EXPERTS}up_proj",
        "layers/experts/w_down": f"{_GPT_OSS_EXPERTS}down_proj",
    },
    interleaved={
        f"{_GPT_OSS_EXPERTS}gate_up_proj": ("layers/experts/w_gate", "layers/experts/w_up"),
        f"{_GPT_OSS_EXPERTS}gate_up_proj_bias": ("layers/experts/b_gate", "layers/experts/b_up"),
    },
    not_transposed=frozenset(f"layers/experts/{name}" for name in ("w_gate", "w_up", "w_down")),
    quant_methods=("mxfp4",),
)


def _read_glm(fields: Fields) -> dict[str, Any]:
    """Returns the settings of glm4_moe; its output projection never has a bias."""
    settings: dict[str, Any] = {
        "qkv_bias": bool(fields["attention_bias"]),
        "qk_norm": "head" if fields["use_qk_norm"] else "none",
    }
    dense = min(fields["first_k_dense_replace"], fields["num_hidden_layers"])
    if dense < fields["num_hidden_layers"]:
        settings["experts"] = Experts(
            count=fields["n_routed_experts"],
            active=fields["num_experts_per_tok"],
            width=fields["moe_intermediate_size"],
            dense_layers=tuple(range(dense)),
            shared_width=fields["moe_intermediate_size"] * fields["n_shared_experts"],
            scoring="sigmoid",
            normalize=bool(fields["norm_topk_prob"]),
            scale=float(fields["routed_scaling_factor"]),
            groups=fields["n_group"],
            active_groups=fields["topk_group"],
            router_bias=True,
        )
    return settings


def _write_glm(config: DecoderConfig) -> dict[str, Any]:
    fields = {
        **write_bias(config),
        "use_qk_norm": config.qk_norm == "head",
        "first_k_dense_replace": len(config.dense_layers),
        "num_nextn_predict_layers": 0,
        "output_router_logits": False,
    }
    if experts := config.experts:
        fields |= {
            "n_routed_experts": experts.count,
            "num_experts_per_tok": experts.active,
            "moe_intermediate_size": experts.width,
            "n_shared_experts": experts.shared_width // experts.width,
            "norm_topk_prob": experts.normalize,
            "routed_scaling_factor": experts.scale,
            "n_group": experts.groups,
            "topk_group": experts.active_groups,
        }
    return fields


GLM4_MOE = Family(
    architecture="Glm4MoeForCausalLM",
    read=_read_glm,
    write=_write_glm,
    fields=BIAS | {"partial_rotary_factor"},
    needed=_NO_AUXILIARY_LOSS,
    names={"layers/experts/b_router": "model.layers.{}.mlp.gate.e_score_correction_bias"},
    has_extra_layers=True,
)
