"""Model families as data: how each reads and writes its config.json, and the names of its tensors.

A family is a record: `read` turns the fields of config.json, with every default of transformers' configuration class
filled in, into the structural settings of a `DecoderConfig`; `write` is the inverse. Sizes, RoPE and everything that
all families share is in `model.hf_config`.

Source: the configuration and modeling files of each family in Hugging Face transformers 5.24.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from dialog_jax.errors import UserError
from dialog_jax.model.decoder_config import DecoderConfig, Experts

Fields = Mapping[str, Any]

SLIDING, FULL = "sliding_attention", "full_attention"


class Family(NamedTuple):
    """How a family is published."""

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


def _read_windows(fields: Fields) -> dict[str, Any]:
    """Returns the windows by type of layer."""
    types = fields["layer_types"]
    if unknown := sorted(set(types) - {SLIDING, FULL}):
        raise UserError(f"layer_types has {unknown[0]!r}; supported are {SLIDING!r} and {FULL!r}")
    window = fields.get("sliding_window")
    if SLIDING in types and not window:
        raise UserError(f"layer_types has {SLIDING!r} and sliding_window is {window!r}; a number of tokens is needed")
    return {"windows": tuple(window if kind == SLIDING else 0 for kind in types) if SLIDING in types else ()}


def _write_windows(config: DecoderConfig) -> dict[str, Any]:
    windows = config.windows or (0,) * config.layers
    return {
        "sliding_window": max(windows) or None,
        "layer_types": [SLIDING if window else FULL for window in windows],
    }


def _tidy(number: float) -> float:
    """Returns the short decimal that a computed number stands for: 10.000000000000002 -> 10.0."""
    return float(f"{number:.12g}")


_BIAS = frozenset({"attention_bias"})
_NO_BIAS = {"mlp_bias": (False, None)}


def _read_bias(fields: Fields) -> dict[str, Any]:
    bias = bool(fields["attention_bias"])
    return {"qkv_bias": bias, "output_bias": bias}


def _write_bias(config: DecoderConfig) -> dict[str, Any]:
    return {"attention_bias": config.qkv_bias}


LLAMA = Family(
    architecture="LlamaForCausalLM",
    read=_read_bias,
    write=lambda config: {**_write_bias(config), "mlp_bias": False},
    fields=_BIAS,
    needed=_NO_BIAS,
)


def _write_qwen_windows(config: DecoderConfig) -> dict[str, Any]:
    return {"use_sliding_window": any(config.windows), **_write_windows(config)}


_QWEN_WINDOWS = frozenset({"use_sliding_window", "sliding_window", "max_window_layers", "layer_types"})

QWEN2 = Family(
    architecture="Qwen2ForCausalLM",
    read=lambda fields: {"qkv_bias": True, **_read_windows(fields)},
    write=_write_qwen_windows,
    fields=_QWEN_WINDOWS,
    needed={"attention_bias": (True,)},
)
QWEN3 = Family(
    architecture="Qwen3ForCausalLM",
    read=lambda fields: {"qk_norm": "head", **_read_bias(fields), **_read_windows(fields)},
    write=lambda config: {**_write_bias(config), **_write_qwen_windows(config)},
    fields=_BIAS | _QWEN_WINDOWS,
    needed=_NO_BIAS,
)

MISTRAL = Family(
    architecture="MistralForCausalLM",
    read=lambda fields: {"windows": (fields["sliding_window"] or 0,) * fields["num_hidden_layers"]},
    write=lambda config: {"sliding_window": max(config.windows, default=0) or None},
    fields=frozenset({"sliding_window"}),
    needed={},
)


def _read_gemma(fields: Fields) -> dict[str, Any]:
    return {
        "norms": "both",
        "norm_offset": 1.0,
        "attention_scale": fields["query_pre_attn_scalar"] ** -0.5,
        "logit_cap": fields["final_logit_softcapping"],
        "embedding_scale": fields["hidden_size"] ** 0.5,
        **_read_bias(fields),
        **_read_windows(fields),
    }


def _write_gemma(config: DecoderConfig) -> dict[str, Any]:
    return {
        "query_pre_attn_scalar": round((config.attention_scale or config.head_dim**-0.5) ** -2),
        "attn_logit_softcapping": config.attention_cap,
        "final_logit_softcapping": config.logit_cap,
        "hidden_act": "gelu_pytorch_tanh",
        "hidden_activation": "gelu_pytorch_tanh",
        "use_bidirectional_attention": False,
        **_write_bias(config),
        **_write_windows(config),
    }


def _find_theta(config: DecoderConfig) -> float:
    """Returns the base of the RoPE of the first kind, that of layers with a window, as transformers 4 names it."""
    return config.rotary[0].theta if config.rotary[0] else 10000.0


_NAMES_OF_BOTH_NORMS = {"layers/feed_forward_norm": "model.layers.{}.pre_feedforward_layernorm.weight"}
_GEMMA_FIELDS = _BIAS | {
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


def _read_granite(fields: Fields) -> dict[str, Any]:
    return {
        "attention_scale": fields["attention_multiplier"],
        "embedding_scale": fields["embedding_multiplier"],
        "scales_soft_prompt": True,
        "residual_scale": fields["residual_multiplier"],
        "logit_scale": 1 / fields["logits_scaling"],
        **_read_bias(fields),
    }


def _write_granite(config: DecoderConfig) -> dict[str, Any]:
    return {
        "attention_multiplier": config.attention_scale or config.head_dim**-0.5,
        "embedding_multiplier": config.embedding_scale,
        "residual_multiplier": config.residual_scale,
        "logits_scaling": _tidy(1 / config.logit_scale),
        "mlp_bias": False,
        **_write_bias(config),
    }


GRANITE = Family(
    architecture="GraniteForCausalLM",
    read=_read_granite,
    write=_write_granite,
    fields=_BIAS | {"attention_multiplier", "embedding_multiplier", "residual_multiplier", "logits_scaling"},
    needed=_NO_BIAS,
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
    read=lambda fields: {**_read_bias(fields), **_read_windows(fields)},
    write=lambda config: {
        "no_rope_layers": [int(kind != _UNROTATED) for kind in config.layer_rotary or (0,) * config.layers],
        "mlp_bias": False,
        **_write_bias(config),
        **_write_qwen_windows(config),
    },
    fields=_BIAS | _QWEN_WINDOWS | {"no_rope_layers", "no_rope_layer_interval"},
    needed=_NO_BIAS,
    layer_rotary=lambda fields: tuple(0 if rotates else _UNROTATED for rotates in fields["no_rope_layers"]),
)

_OLMO = {"norms": "post", "qk_norm": "width"}

OLMO2 = Family(
    architecture="Olmo2ForCausalLM",
    read=lambda fields: {**_OLMO, **_read_bias(fields)},
    write=_write_bias,
    fields=_BIAS,
    needed={},
)
OLMO3 = Family(
    architecture="Olmo3ForCausalLM",
    read=lambda fields: {**_OLMO, **_read_bias(fields), **_read_windows(fields)},
    write=lambda config: {**_write_bias(config), **_write_windows(config)},
    fields=_BIAS | {"sliding_window", "layer_types"},
    needed={},
    rope_kinds=(SLIDING, FULL),
    layer_rotary=lambda fields: tuple(int(kind == FULL) for kind in fields["layer_types"]),
)

MINISTRAL3 = MISTRAL._replace(architecture="Ministral3ForCausalLM")

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


def _write_window_of_all(config: DecoderConfig) -> dict[str, Any]:
    return {"use_sliding_window": any(config.windows), "sliding_window": max(config.windows, default=0) or None}


QWEN3_MOE = Family(
    architecture="Qwen3MoeForCausalLM",
    read=lambda fields: {
        "qk_norm": "head",
        **_read_bias(fields),
        "windows": (fields["sliding_window"],) * fields["num_hidden_layers"] if fields["sliding_window"] else (),
        **_read_qwen_experts(fields),
    },
    write=lambda config: {**_write_bias(config), **_write_window_of_all(config), **_write_qwen_experts(config)},
    fields=_BIAS | {"use_sliding_window", "sliding_window"},
    needed=_NO_BIAS | _NO_AUXILIARY_LOSS,
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
        **_read_bias(fields),
        **_read_windows(fields),
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
        **_write_bias(config),
        **_write_windows(config),
        **_write_gpt_oss_experts(config),
    },
    fields=_BIAS | {"sliding_window", "layer_types"},
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
        **_write_bias(config),
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
    fields=_BIAS | {"partial_rotary_factor"},
    needed=_NO_AUXILIARY_LOSS,
    names={"layers/experts/b_router": "model.layers.{}.mlp.gate.e_score_correction_bias"},
    has_extra_layers=True,
)


FAMILIES: dict[str, Family] = {
    "llama": LLAMA,
    "qwen2": QWEN2,
    "qwen3": QWEN3,
    "qwen3_moe": QWEN3_MOE,
    "mistral": MISTRAL,
    "ministral3": MINISTRAL3,
    "gemma2": GEMMA2,
    "gemma3_text": GEMMA3,
    "phi3": PHI3,
    "granite": GRANITE,
    "glm4_moe": GLM4_MOE,
    "gpt_oss": GPT_OSS,
    "granitemoehybrid": GRANITE_HYBRID,
    "smollm3": SMOLLM3,
    "olmo2": OLMO2,
    "olmo3": OLMO3,
}
