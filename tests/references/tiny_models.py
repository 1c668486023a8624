"""The configs of the tiny models whose reference files make_references.py writes, one entry per directory `tiny_NAME/`.

Each model has every feature that tells its family from a plain decoder, at a size where the feature changes the logits
of 96 tokens: windows hold 16 to 24 tokens, rotary scaling starts from an original context below 96 tokens, caps are
about as large as what they cap, and head_dim differs from hidden_size / num_attention_heads where the family allows it.
"""

import transformers

# `pad_token_id` None: torch leaves the padding token's row out of the gradient of the embedding.
_SHAPE = {
    "vocab_size": 131,
    "hidden_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 80,
    "max_position_embeddings": 256,
    "pad_token_id": None,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
# For models whose layers follow a pattern.
_DEEP = {**_SHAPE, "hidden_size": 32, "num_hidden_layers": 4, "intermediate_size": 48}
_NARROW = {**_DEEP, "num_hidden_layers": 6, "head_dim": 12, "intermediate_size": 24}


def _default(rope_theta: float) -> dict:
    return {"rope_type": "default", "rope_theta": rope_theta}


def _yarn(rope_theta: float, **parameters) -> dict:
    scaling = {"factor": 4.0, "original_max_position_embeddings": 32} | parameters
    return {"rope_type": "yarn", "rope_theta": rope_theta} | scaling


_GRANITE = {
    "tie_word_embeddings": True,
    "embedding_multiplier": 3.0,
    "residual_multiplier": 0.4,
    "attention_multiplier": 0.2,
    "logits_scaling": 2.0,
}
# Granite 4.0's dense sizes without state-space layers.
_GRANITE_4 = {
    "layer_types": ["full_attention"] * 2,
    "num_local_experts": 0,
    "num_experts_per_tok": 0,
    "shared_intermediate_size": 80,
    "mamba_n_heads": 4,
}
# The dense sizes: full layers have heads of their own size and number, and their values are their keys.
_GEMMA4 = {
    **_DEEP,
    "head_dim": 12,
    "global_head_dim": 16,
    "num_global_key_value_heads": 1,
    "attention_k_eq_v": True,
    "sliding_window": 24,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
    "final_logit_softcapping": 3.0,
    "rope_parameters": {
        "sliding_attention": _default(1e3),
        "full_attention": {**_default(1e4), "rope_type": "proportional", "partial_rotary_factor": 0.25},
    },
}
_LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}

# Their weights come from one stream of random numbers, in this order: an entry added here changes those after it.
ONE_STREAM = {
    "llama": transformers.LlamaConfig(
        **_SHAPE, head_dim=20, rope_parameters=_LLAMA3, rms_norm_eps=1e-5, tie_word_embeddings=False
    ),
    "llama_bias": transformers.LlamaConfig(**_SHAPE, attention_bias=True, tie_word_embeddings=True),
    "qwen2": transformers.Qwen2Config(
        **(_SHAPE | {"bos_token_id": None, "eos_token_id": None}),
        tie_word_embeddings=True,
        rope_parameters=_default(1e6),
    ),
    "qwen3": transformers.Qwen3Config(
        **(_SHAPE | {"bos_token_id": None, "eos_token_id": None}),
        head_dim=16,
        tie_word_embeddings=False,
        rope_parameters=_default(1e6),
    ),
}

# Each from a stream of its own.
OWN_STREAM = {
    # Mistral 7B v0.1 and Mistral NeMo.
    "mistral": transformers.MistralConfig(**_SHAPE, sliding_window=24, rope_parameters=_default(1e4)),
    "mistral_nemo": transformers.MistralConfig(
        **_SHAPE, head_dim=20, sliding_window=None, rope_parameters=_default(1e6), rms_norm_eps=1e-5
    ),
    "llama_yarn": transformers.LlamaConfig(
        **_SHAPE,
        head_dim=20,
        rope_parameters=_yarn(500.0, beta_fast=2.0, beta_slow=0.25, mscale=1.5, mscale_all_dim=0.5),
    ),
    "llama_linear": transformers.LlamaConfig(
        **_SHAPE, tie_word_embeddings=True, rope_parameters={**_default(1e4), "rope_type": "linear", "factor": 4.0}
    ),
    # As Qwen's model cards advise for long contexts.
    "qwen3_yarn": transformers.Qwen3Config(
        **_SHAPE, head_dim=16, rope_parameters=_yarn(1e6, original_max_position_embeddings=64)
    ),
    "qwen2_window": transformers.Qwen2Config(
        **_DEEP, use_sliding_window=True, sliding_window=24, max_window_layers=2, rope_parameters=_default(1e6)
    ),
    "gemma2": transformers.Gemma2Config(
        **_DEEP,
        head_dim=12,
        query_pre_attn_scalar=4,
        sliding_window=24,
        attn_logit_softcapping=5.0,
        final_logit_softcapping=3.0,
        rope_parameters=_default(1e4),
    ),
    "gemma3_text": transformers.Gemma3TextConfig(
        **_NARROW,
        query_pre_attn_scalar=10,
        sliding_window=24,
        rope_parameters={
            "sliding_attention": _default(1e3),
            "full_attention": {**_default(1e5), "rope_type": "linear", "factor": 8.0},
        },
    ),
    # The wrapper of the sizes from 4B on; the reference is of text alone.
    "gemma3": transformers.Gemma3Config(
        text_config={
            **_DEEP,
            "head_dim": 12,
            "query_pre_attn_scalar": 10,
            "sliding_window": 16,
            "layer_types": ["sliding_attention", "full_attention"] * 2,
            "rope_parameters": {
                "sliding_attention": _default(1e3),
                "full_attention": {**_default(1e5), "rope_type": "linear", "factor": 8.0},
            },
        },
        vision_config={
            "hidden_size": 8,
            "intermediate_size": 8,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "image_size": 8,
            "patch_size": 4,
            "vision_use_head": False,
        },
        mm_tokens_per_image=4,
    ),
    # 96 tokens are beyond the original context: `logits` go by the long factors, `short_logits` by the short ones.
    "phi3": transformers.Phi3Config(
        **{**_SHAPE, "num_attention_heads": 3, "num_key_value_heads": 1},
        original_max_position_embeddings=32,
        rope_parameters={
            "rope_type": "longrope",
            "rope_theta": 1e4,
            "partial_rotary_factor": 0.75,
            "short_factor": [1.0, 1.1, 1.3, 1.6, 2.0, 2.5],
            "long_factor": [1.5, 2.0, 3.0, 5.0, 7.0, 9.0],
        },
    ),
    "phi3_plain": transformers.Phi3Config(
        **_SHAPE, original_max_position_embeddings=256, sliding_window=24, rope_parameters=_default(1e4)
    ),
    "smollm3": transformers.SmolLM3Config(**_DEEP, no_rope_layers=[1, 0, 1, 1], rope_parameters=_default(2e6)),
    "granite": transformers.GraniteConfig(**_SHAPE, **_GRANITE, rope_parameters=_default(1e4)),
    "granitemoehybrid": transformers.GraniteMoeHybridConfig(
        **_SHAPE, **_GRANITE, **_GRANITE_4, position_embedding_type="rope", rope_parameters=_default(1e4)
    ),
    "granitemoehybrid_nope": transformers.GraniteMoeHybridConfig(
        **_SHAPE, **_GRANITE, **_GRANITE_4, position_embedding_type=None
    ),
    "olmo2": transformers.Olmo2Config(**_SHAPE, rope_parameters=_default(5e5)),
    "olmo3": transformers.Olmo3Config(
        **_DEEP,
        sliding_window=24,
        rope_parameters={
            "sliding_attention": _default(100.0),
            "full_attention": _yarn(100.0, beta_fast=1.0, beta_slow=0.25),
        },
    ),
    "ministral3": transformers.Ministral3Config(
        **_SHAPE,
        head_dim=20,
        tie_word_embeddings=True,
        rope_parameters=_yarn(1e3, mscale=1.0, mscale_all_dim=1.0, llama_4_scaling_beta=0.3),
    ),
    # Layer 1 is dense. Of the numbers of experts tried, one where no token's choice of experts is close.
    "qwen3_moe": transformers.Qwen3MoeConfig(
        **{**_DEEP, "num_hidden_layers": 3},
        head_dim=12,
        num_experts=8,
        num_experts_per_tok=2,
        moe_intermediate_size=12,
        norm_topk_prob=True,
        mlp_only_layers=[1],
        rope_parameters=_default(1e6),
    ),
    "gpt_oss": transformers.GptOssConfig(
        **{**_DEEP, "num_hidden_layers": 3, "intermediate_size": 16},
        head_dim=16,
        sliding_window=16,
        num_local_experts=4,
        num_experts_per_tok=2,
        swiglu_limit=1.5,
        rope_parameters=_yarn(1e3, original_max_position_embeddings=64, truncate=False),
    ),
    "glm4_moe": transformers.Glm4MoeConfig(
        **{**_DEEP, "num_hidden_layers": 2},
        head_dim=16,
        attention_bias=True,
        use_qk_norm=True,
        n_routed_experts=8,
        num_experts_per_tok=2,
        n_group=2,
        topk_group=1,
        n_shared_experts=1,
        moe_intermediate_size=16,
        routed_scaling_factor=1.5,
        first_k_dense_replace=1,
        num_mtp_layers=0,
        rope_parameters={**_default(1e4), "partial_rotary_factor": 0.5},
    ),
    "gemma4_text": transformers.Gemma4TextConfig(**_GEMMA4, hidden_size_per_layer_input=0),
    # The wrapper of the 31B; the reference is of text alone, without the padding token, which this model needs.
    "gemma4": transformers.Gemma4Config(
        text_config={
            **_GEMMA4,
            "hidden_size_per_layer_input": 0,
            "use_bidirectional_attention": "vision",
            "pad_token_id": 8,
        },
        vision_config={
            "hidden_size": 8,
            "intermediate_size": 8,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "num_key_value_heads": 2,
            "head_dim": 4,
            "patch_size": 4,
            "position_embedding_size": 16,
        },
        audio_config=None,
    ),
    "gemma4_unified_text": transformers.Gemma4UnifiedTextConfig(
        **{**_GEMMA4, "num_hidden_layers": 3, "layer_types": ["sliding_attention"] * 2 + ["full_attention"]}
    ),
}
