"""Writes the references of `peft_*/`: adapters that PEFT saved, and the logits of its models, in float32.

Run once, in an environment with torch, transformers and peft (0.21), after make_references.py; the tests need no torch:

    python tests/references/make_peft_references.py

Leaves a directory `peft_NAME/` for each adapter: adapter_config.json and adapter_model.safetensors as PEFT saves them,
and reference.npz with `base` (the directory of the model), `tokens` and `logits`. Of a soft prompt, the logits are
those of the real tokens, which follow the virtual ones.
"""

import os
import pathlib

import numpy as np
import peft
import torch
import transformers

_HERE = pathlib.Path(__file__).parent

_EVERY_LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
_EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
# Their factors come from one stream of random numbers, in this order: an entry added here changes those after it.
_ONE_STREAM: dict[str, tuple[str, peft.PeftConfig]] = {
    "patterns": (
        "tiny_llama",
        peft.LoraConfig(
            task_type="CAUSAL_LM",
            r=4,
            lora_alpha=6,
            target_modules=["q_proj", "v_proj", "up_proj", "down_proj"],
            rank_pattern={"layers.0.self_attn.q_proj": 7, "up_proj": 2},
            alpha_pattern={r"layers\.1\.mlp\.(up|down)_proj": 3, "self_attn.v_proj": 11},
        ),
    ),
    "rslora": (
        "tiny_qwen3",
        peft.LoraConfig(
            task_type="CAUSAL_LM",
            r=3,
            lora_alpha=4,
            use_rslora=True,
            target_modules=[*_EVERY_LINEAR, "embed_tokens", "lm_head"],
        ),
    ),
    "tied": (
        "tiny_llama_bias",
        peft.LoraConfig(task_type="CAUSAL_LM", r=3, lora_alpha=5, target_modules=["o_proj", "embed_tokens"]),
    ),
    "prompt_llama": ("tiny_llama", peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=7)),
    "prompt_qwen3": ("tiny_qwen3", peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)),
}
# Each from a stream of its own.
_OWN_STREAM: dict[str, tuple[str, peft.PeftConfig]] = {
    "fused": (
        "tiny_phi3_plain",
        peft.LoraConfig(
            task_type="CAUSAL_LM",
            r=4,
            lora_alpha=6,
            target_modules=["qkv_proj", "o_proj", "gate_up_proj", "down_proj"],
            rank_pattern={"qkv_proj": 5, r"layers\.1\.mlp\.gate_up_proj": 3},
            alpha_pattern={"layers.0.self_attn.qkv_proj": 9, "gate_up_proj": 2},
        ),
    ),
    "experts": (
        "tiny_qwen3_moe",
        peft.LoraConfig(
            task_type="CAUSAL_LM",
            r=2,
            lora_alpha=3,
            target_modules=["q_proj", "o_proj"],
            target_parameters=[*_EXPERTS, "mlp.up_proj.weight"],
            rank_pattern={"experts.down_proj": 3, "layers.2.mlp.experts.gate_up_proj": 4},
            alpha_pattern={"gate_up_proj": 5, "mlp.up_proj.weight": 7},
        ),
    ),
    "experts_transposed": (
        "tiny_gpt_oss",
        peft.LoraConfig(task_type="CAUSAL_LM", r=2, lora_alpha=3, target_modules=[], target_parameters=_EXPERTS),
    ),
    "experts_down": (
        "tiny_glm4_moe",
        peft.LoraConfig(
            task_type="CAUSAL_LM",
            r=2,
            lora_alpha=3,
            target_modules=["v_proj"],
            target_parameters=["experts.down_proj", "shared_experts.gate_proj.weight"],
        ),
    ),
}


def _write(name: str, base: str, config: peft.PeftConfig) -> None:
    model = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    adapted = peft.get_peft_model(model, config).eval()
    with torch.no_grad():
        for path, weight in adapted.named_parameters():
            if weight.requires_grad:  # fresh factors have a product of zero
                weight.copy_(0.25 * torch.randn_like(weight))
            else:
                assert "lora" not in path and "prompt" not in path, path
        tokens = np.random.default_rng(0).integers(0, model.config.vocab_size, (2, 24)).astype(np.int32)
        logits = adapted(torch.from_numpy(tokens).long()).logits[:, -tokens.shape[1] :]
        distance = (logits - _compute_base_logits(base, tokens)).abs().max()
    directory = _HERE / f"peft_{name}"
    adapted.save_pretrained(directory)
    (directory / "README.md").unlink(missing_ok=True)
    np.savez_compressed(directory / "reference.npz", base=base, tokens=tokens, logits=logits.numpy())
    print(name, float(logits.std()), float(distance), sum(file.stat().st_size for file in directory.iterdir()))


def _compute_base_logits(base: str, tokens: np.ndarray) -> torch.Tensor:
    model = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()
    return model(torch.from_numpy(tokens).long()).logits


def main() -> None:
    torch.manual_seed(0)
    os.chdir(_HERE)  # PEFT writes the path of the model
    for name, (base, config) in _ONE_STREAM.items():
        _write(name, base, config)
    for name, (base, config) in _OWN_STREAM.items():
        torch.manual_seed(0)
        _write(name, base, config)


if __name__ == "__main__":
    main()
