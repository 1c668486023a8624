"""Adapters as directories that PEFT and vLLM open: adapter_config.json and adapter_model.safetensors.

In: the factors of LoRA and their scales, or the embeddings of a soft prompt. Out: a directory; `peft_reading` reads
one. A directory that is written has one rank and alpha = rank: vLLM ignores patterns of either, so that every scale is
multiplied into B, and a smaller rank is filled up with zeros.

Source: `LoraConfig`, `PromptTuningConfig` and `get_peft_model_state_dict` of PEFT 0.21.
"""

import json
import pathlib
from collections.abc import Mapping
from typing import Any

import ml_dtypes
import numpy as np
import safetensors.numpy
from jaxtyping import Float32

from dialog_jax.errors import UserError
from dialog_jax.model import adapters, parameter_trees
from dialog_jax.model.adapters import Scales
from dialog_jax.model.decoder_config import DecoderConfig
from dialog_jax.model.families import FAMILIES

CONFIG, WEIGHTS, ORIGIN = "adapter_config.json", "adapter_model.safetensors", "export.json"
PROMPT = "soft_prompt"
"""The directory within that of LoRA that has the soft prompt trained with it: PEFT has no directory for both."""

PREFIX = "base_model.model."
"""What PEFT puts before the name of a module."""
_WRAPPED = "model.language_model."  # where the modules of a model are within one that also reads images


def write_lora(
    directory: pathlib.Path,
    model: DecoderConfig,
    scales: Scales,
    factors: Mapping[str, Any],
    *,
    base_name: str,
    dtype: str = "float32",
    wrapped: bool = False,
) -> None:
    """Writes the factors of LoRA.

    Args:
      directory: exists.
      base_name: the model's name on the Hub, or its path.
      dtype: of the factors: float32, bfloat16 or float16.
      wrapped: whether the model is served as a part of one that also reads images.

    Raises:
      UserError: the family's files hold several of the adapted matrices in one tensor, which has one adapter in PEFT.
    """
    if fused := FAMILIES[model.family].fused:
        names = ", ".join(name.rpartition(".weight")[0].rpartition(".")[2] for name in fused)
        raise UserError(
            f"{model.family} models hold several matrices in {names}, and PEFT adapts these as one. Export the merged "
            "model: dialog_jax export --merge."
        )
    modules = adapters.list_modules(model)
    rank = max(scale.shape[-1] for scale in scales.values())
    flat = parameter_trees.flatten(factors)
    tensors: dict[str, np.ndarray] = {}
    adapted: list[str] = []
    for path, scale in scales.items():
        a, b = (np.asarray(flat[f"{path}/{name}"], np.float32) for name in adapters.TRAINED)
        layers = zip(a, b, scale, strict=True) if path.startswith("layers/") else [(a, b, scale)]
        for name, (layer_a, layer_b, layer_scale) in zip(modules[path], layers, strict=True):
            if not layer_scale.any():
                continue
            missing = rank - len(layer_scale)
            layer_a = np.pad(layer_a, ((0, 0), (0, missing))).T  # [r, in]
            layer_b = np.pad(layer_b * layer_scale[:, None], ((0, missing), (0, 0))).T  # [out, r]
            module = _serving_name(name, wrapped)
            first, second = list_tensor_names(module, path)
            tensors[first], tensors[second] = layer_a.astype(_numpy_dtype(dtype)), layer_b.astype(_numpy_dtype(dtype))
            adapted.append(module)
    _write(
        directory,
        tensors,
        {
            **_COMMON,
            **_LORA,
            "base_model_name_or_path": base_name,
            "r": rank,
            "lora_alpha": rank,
            "target_modules": _list_targets(adapted, modules, wrapped),
        },
    )


def write_prompt(
    directory: pathlib.Path,
    model: DecoderConfig,
    prompt: Float32[np.ndarray, "P D"],
    *,
    base_name: str,
    init: str = "RANDOM",
    text: str | None = None,
) -> None:
    """Writes a soft prompt, float32.

    Args:
      directory: exists.
      base_name: the model's name on the Hub, or its path.
      init: how it was initialized, in PEFT's words: TEXT, SAMPLE_VOCAB or RANDOM.
      text: from which it was, with TEXT.
    """
    fields = {
        **_COMMON,
        "peft_type": "PROMPT_TUNING",
        "base_model_name_or_path": base_name,
        "num_virtual_tokens": len(prompt),
        "token_dim": model.width,
        "num_transformer_submodules": 1,
        "num_attention_heads": model.heads,
        "num_layers": model.layers,
        "prompt_tuning_init": init,
        "prompt_tuning_init_text": text,
        "tokenizer_name_or_path": base_name if init == "TEXT" else None,
    }
    _write(directory, {"prompt_embeddings": np.asarray(prompt, np.float32)}, fields)


_COMMON = {"task_type": "CAUSAL_LM", "inference_mode": True, "revision": None}
_LORA = {
    "peft_type": "LORA",
    "lora_dropout": 0.0,
    "bias": "none",
    "fan_in_fan_out": False,
    "use_rslora": False,
    "use_dora": False,
    "init_lora_weights": True,
    "modules_to_save": None,
    "exclude_modules": None,
    "layers_to_transform": None,
    "layers_pattern": None,
    "rank_pattern": {},
    "alpha_pattern": {},
}


def _write(directory: pathlib.Path, tensors: Mapping[str, np.ndarray], fields: Mapping[str, Any]) -> None:
    contiguous = {name: np.ascontiguousarray(tensor) for name, tensor in tensors.items()}
    safetensors.numpy.save_file(contiguous, directory / WEIGHTS, metadata={"format": "pt"})
    (directory / WEIGHTS).chmod(0o644)
    (directory / CONFIG).write_text(json.dumps(fields, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _numpy_dtype(name: str) -> np.dtype:
    return np.dtype(ml_dtypes.bfloat16 if name == "bfloat16" else name)


def _serving_name(module: str, wrapped: bool) -> str:
    return module.replace("model.", _WRAPPED, 1) if wrapped and module.startswith("model.") else module


def list_tensor_names(module: str, path: str) -> tuple[str, str]:
    """Returns the names of the factors of a module, [r, in] and [out, r]; `path` is that of its parameter."""
    if path == "embedding":
        return f"{PREFIX}{module}.lora_embedding_A", f"{PREFIX}{module}.lora_embedding_B"
    return f"{PREFIX}{module}.lora_A.weight", f"{PREFIX}{module}.lora_B.weight"


def _list_targets(adapted: list[str], modules: Mapping[str, list[str]], wrapped: bool) -> list[str]:
    """Returns the ends of the names if all modules with these ends are adapted, otherwise the names."""
    ends = {name.rpartition(".")[2] for name in adapted}
    every = {_serving_name(name, wrapped) for names in modules.values() for name in names}
    complete = {name for name in every if name.rpartition(".")[2] in ends} == set(adapted)
    return sorted(ends) if complete else sorted(adapted)
