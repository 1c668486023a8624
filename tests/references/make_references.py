"""Writes the reference files of this directory: what Hugging Face transformers computes, in PyTorch and float32.

Run once, in an environment with torch, accelerate, transformers and gguf; the tests need no torch:

    python tests/references/make_references.py --gguf=SmolLM2-135M-Instruct.Q4_1.gguf

Leaves a directory `tiny_NAME/` for each tiny model (config.json, model.safetensors, and reference.npz with `tokens` and
`logits`), and `smollm2.npz`: `tokens` [T], `vocabulary` [a strided subset of token ids], `logits` [T, subset] and
`logsumexp` [T] over the whole vocabulary, of SmolLM2-135M-Instruct as transformers itself reads the GGUF.
"""

import argparse
import json
import pathlib

import numpy as np
import torch
import transformers

_HERE = pathlib.Path(__file__).parent

_SHAPE = {
    "vocab_size": 131,
    "hidden_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 80,
    "max_position_embeddings": 256,
}
_LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
_TINY = {
    "llama": transformers.LlamaConfig(
        **_SHAPE, head_dim=20, rope_parameters=_LLAMA3, rms_norm_eps=1e-5, tie_word_embeddings=False
    ),
    "llama_bias": transformers.LlamaConfig(**_SHAPE, attention_bias=True, tie_word_embeddings=True),
    "qwen2": transformers.Qwen2Config(
        **_SHAPE, tie_word_embeddings=True, rope_parameters={"rope_type": "default", "rope_theta": 1e6}
    ),
    "qwen3": transformers.Qwen3Config(
        **_SHAPE, head_dim=16, tie_word_embeddings=False, rope_parameters={"rope_type": "default", "rope_theta": 1e6}
    ),
}


def _tiny(name: str, config: transformers.PretrainedConfig, rng: np.random.Generator) -> None:
    model = transformers.AutoModelForCausalLM.from_config(config).float().eval()
    with torch.no_grad():
        # Fresh models have zero biases and unit norms: moved, or a reader that dropped them would pass.
        # Matrices are large enough that attention is not uniform and logits are of the order of one.
        for weight in model.parameters():
            scale = 0.15 if weight.ndim == 2 else 0.3
            weight.copy_((weight if weight.ndim == 1 else 0) + scale * torch.randn_like(weight))
        tokens = rng.integers(0, config.vocab_size, (2, 96)).astype(np.int32)
        logits = model(torch.from_numpy(tokens).long()).logits
    directory = _HERE / f"tiny_{name}"
    model.save_pretrained(directory)
    (directory / "generation_config.json").unlink(missing_ok=True)
    np.savez_compressed(directory / "reference.npz", tokens=tokens, logits=logits.numpy())
    print(name, sum(weight.numel() for weight in model.parameters()), float(logits.std()))


def _smollm2(gguf: pathlib.Path) -> None:
    model = transformers.AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    # ChatML around an exchange, then ids far apart: 120 tokens that need no tokenizer.
    tokens = np.concatenate([[1, 4093, 198, 3726, 2, 198, 1, 520, 9531, 198], np.arange(110) * 443 % 49152])
    with torch.no_grad():
        logits = model.eval()(torch.from_numpy(tokens.astype(np.int64))[None]).logits[0]
    vocabulary = np.arange(0, logits.shape[1], 499)
    np.savez_compressed(
        _HERE / "smollm2.npz",
        tokens=tokens.astype(np.int32),
        vocabulary=vocabulary.astype(np.int32),
        logits=logits[:, vocabulary].numpy(),
        logsumexp=torch.logsumexp(logits.double(), -1).numpy(),
    )
    print("smollm2", json.dumps(model.config.to_dict(), default=str)[:400])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gguf", type=pathlib.Path, required=True, help="SmolLM2-135M-Instruct.Q4_1.gguf")
    gguf = parser.parse_args().gguf
    torch.manual_seed(0)
    for name, config in _TINY.items():
        _tiny(name, config, np.random.default_rng(0))
    _smollm2(gguf)


if __name__ == "__main__":
    main()
