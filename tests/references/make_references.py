"""Writes the reference files of this directory: what Hugging Face transformers computes, in PyTorch and float32.

Run once, in an environment with torch, accelerate, transformers 5 and gguf; the tests need no torch:

    python tests/references/make_references.py --gguf=SmolLM2-135M-Instruct.Q4_1.gguf
    python tests/references/make_references.py --only gemma2 gpt_oss

Leaves a directory `tiny_NAME/` for each model of tiny_models.py: config.json and model.safetensors as transformers
saves them, and reference.npz with
    tokens [2, 96] and logits [2, 96, V];
    gradient/TENSOR: at most 64 strided values of the flat gradient of each published tensor; the loss is the mean over
        rows and the positions t < 95 of the negative log-likelihood of token t + 1. Buffers (tensors that transformers
        loads and does not train) and tensors without influence on text have none;
    norm/TENSOR: the norm of the whole gradient, float64;
    short_logits [2, original context, V], of longrope alone: of the same tokens as far as the original context, where
        the rotary frequencies are others.
And `smollm2.npz`: `tokens` [T], `vocabulary` [a strided subset of token ids], `logits` [T, subset] and `logsumexp` [T]
over the whole vocabulary, of SmolLM2-135M-Instruct as transformers itself reads the GGUF.
"""

import argparse
import json
import pathlib
import tempfile

import numpy as np
import safetensors.numpy
import tiny_models
import torch
import transformers

_HERE = pathlib.Path(__file__).parent
_MAX_VALUES = 64


def _move_from_initial_values(model: transformers.PreTrainedModel) -> None:
    """Draws all matrices, and adds noise to all vectors and to the buffers that are saved.

    Fresh models have zero biases and unit norms: moved, or a reader that dropped them would pass. Matrices are large
    enough that attention is not uniform and logits are of the order of one. Buffers move by less, or the correction of
    the router's scores would send every token to the same group of experts.
    """
    saved = model.state_dict()
    with torch.no_grad():
        for weight in model.parameters():
            scale = 0.3 if weight.ndim == 1 else 0.15
            weight.copy_((weight if weight.ndim == 1 else 0) + scale * torch.randn_like(weight))
        for name, buffer in model.named_buffers():
            if name in saved and buffer.is_floating_point():
                buffer.add_(0.1 * torch.randn_like(buffer))


def _published_gradients(model: transformers.PreTrainedModel) -> dict[str, np.ndarray]:
    """The gradients by name of the published tensor, in its layout.

    transformers renames, splits and transposes weights when it saves a model, so that the gradients take the weights'
    places and are saved. NaN marks what has no gradient. The model is of no use afterwards.
    """
    with torch.no_grad(), tempfile.TemporaryDirectory() as directory:
        for weight in model.parameters():
            weight.copy_(torch.full_like(weight, torch.nan) if weight.grad is None else weight.grad)
        for buffer in filter(torch.is_floating_point, model.buffers()):
            buffer.fill_(torch.nan)
        model.save_pretrained(directory)
        saved = safetensors.numpy.load_file(pathlib.Path(directory) / "model.safetensors")
    return {name: gradient for name, gradient in sorted(saved.items()) if not np.isnan(gradient).any()}


def _write_tiny(name: str, config: transformers.PreTrainedConfig, attention: str) -> None:
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation=attention).float().eval()
    _move_from_initial_values(model)
    vocabulary_size = config.get_text_config().vocab_size
    tokens = np.random.default_rng(0).integers(0, vocabulary_size, (2, 96)).astype(np.int32)
    ids = torch.from_numpy(tokens).long()
    logits = model(ids).logits
    torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).backward()

    directory = _HERE / f"tiny_{name}"
    model.save_pretrained(directory)
    (directory / "generation_config.json").unlink(missing_ok=True)
    arrays = {"tokens": tokens, "logits": logits.detach().numpy()}
    if (getattr(config, "rope_parameters", None) or {}).get("rope_type") == "longrope":
        with torch.no_grad():
            arrays["short_logits"] = model(ids[:, : config.original_max_position_embeddings]).logits.numpy()
    for tensor, gradient in _published_gradients(model).items():
        stride = -(-gradient.size // _MAX_VALUES)
        arrays[f"gradient/{tensor}"] = gradient.reshape(-1)[::stride]
        arrays[f"norm/{tensor}"] = np.linalg.norm(gradient.astype(np.float64))
    np.savez_compressed(directory / "reference.npz", **arrays)
    size = sum(path.stat().st_size for path in directory.iterdir())
    print(f"{name}: {size / 1000:.0f} kB, logits {float(logits.detach().std()):.2f}", flush=True)


def _write_smollm2(gguf: pathlib.Path) -> None:
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
    parser.add_argument("--gguf", type=pathlib.Path, help="SmolLM2-135M-Instruct.Q4_1.gguf; without it no smollm2.npz")
    parser.add_argument("--only", nargs="+", choices=tiny_models.OWN_STREAM, help="write only these models")
    arguments = parser.parse_args()
    if arguments.only is None:
        torch.manual_seed(0)
        for name, config in tiny_models.ONE_STREAM.items():
            _write_tiny(name, config, attention="sdpa")
    for name in arguments.only or tiny_models.OWN_STREAM:
        torch.manual_seed(0)
        _write_tiny(name, tiny_models.OWN_STREAM[name], attention="eager")
    if arguments.gguf is not None:
        _write_smollm2(arguments.gguf)


if __name__ == "__main__":
    main()
