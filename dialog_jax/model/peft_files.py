"""Adapters as directories that PEFT and vLLM open: adapter_config.json and adapter_model.safetensors.

In: the factors of LoRA and their scales, or the embeddings of a soft prompt. Out: a directory; `peft_reading` reads
one. A directory that is written has one rank and alpha = rank: vLLM ignores patterns of either, so that every scale is
multiplied into B, and a smaller rank is filled up with zeros. Where a module of transformers holds several adapted
matrices, its rank is the sum of theirs (see `model.peft_modules`).

Source: `LoraConfig`, `PromptTuningConfig` and `get_peft_model_state_dict` of PEFT 0.21.
"""

import json
import pathlib
import re
from collections.abc import Collection, Iterable, Mapping
from typing import Any

import ml_dtypes
import numpy as np
import safetensors.numpy
from jaxtyping import Float32

from dialog_jax.model import adapters, parameter_trees, peft_modules
from dialog_jax.model.adapters import Scales
from dialog_jax.model.decoder_config import DecoderConfig
from dialog_jax.model.peft_modules import PREFIX, Factors, Part, PeftModule

CONFIG, WEIGHTS, ORIGIN = "adapter_config.json", "adapter_model.safetensors", "export.json"
PROMPT = "soft_prompt"
"""The directory within that of LoRA that has the soft prompt trained with it: PEFT has no directory for both."""

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
    """
    flat = {path: np.asarray(leaf, np.float32) for path, leaf in parameter_trees.flatten(factors).items()}
    modules = peft_modules.list_modules(model)
    adapted: dict[str, Factors] = {}
    for module in modules:
        joined = peft_modules.join_factors(module, [_find_factors(part, scales, flat) for part in module.parts])
        if joined is not None:
            adapted[module.name] = joined
    rank = max(a.shape[-1] for a, _ in adapted.values())
    tensors: dict[str, np.ndarray] = {}
    for module in modules:
        if module.name not in adapted:
            continue
        a, b = adapted[module.name]
        missing, lead = rank - a.shape[-1], [(0, 0)] * (a.ndim - 2)
        a, b = np.pad(a, [*lead, (0, 0), (0, missing)]), np.pad(b, [*lead, (0, missing), (0, 0)])
        names = peft_modules.list_tensor_names(module, adapted)
        for name, tensor in zip(names, peft_modules.pack(module, a, b), strict=True):
            tensors[PREFIX + _serving_name(name, wrapped)] = tensor.astype(_numpy_dtype(dtype))
    fields = {
        **_COMMON,
        **_LORA,
        "base_model_name_or_path": base_name,
        "r": rank,
        "lora_alpha": rank,
        "target_modules": _list_targets(modules, adapted, wrapped),
    }
    if parameters := _list_parameters(modules, adapted, wrapped):
        fields["target_parameters"] = parameters
    _write(directory, tensors, fields)


def _find_factors(part: Part, scales: Scales, flat: Mapping[str, np.ndarray]) -> Factors | None:
    """Returns the factors of a matrix with its scale multiplied into B; None if it is not adapted."""
    if part.path not in scales:
        return None
    a, b, scale = (*(flat[f"{part.path}/{name}"] for name in adapters.TRAINED), scales[part.path])
    if part.path.startswith("layers/"):
        a, b, scale = a[part.position], b[part.position], scale[part.position]
    used = scale != 0
    return (a[..., used], b[..., used, :] * scale[used, None]) if used.any() else None


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


def _list_targets(modules: Iterable[PeftModule], adapted: Collection[str], wrapped: bool) -> list[str]:
    """Returns the ends of the names if all modules with these ends are adapted, otherwise the names.

    A model that also reads images has other modules with the same ends, and PEFT would adapt them too.
    """
    every = [module.name for module in modules if not module.parameter]
    targets = [name for name in every if name in adapted]
    ends = {name.rpartition(".")[2] for name in targets}
    if not wrapped and [name for name in every if name.rpartition(".")[2] in ends] == targets:
        return sorted(ends)
    return sorted(_serving_name(name, wrapped) for name in targets)


def _list_parameters(modules: Iterable[PeftModule], adapted: Collection[str], wrapped: bool) -> list[str]:
    """Returns what `target_parameters` names: ends of names behind the layer if that says the same, or names."""
    every = {module.parameter: module.name in adapted for module in modules if module.parameter}
    ends = {name: re.sub(r"^model\.layers\.\d+\.", "", name) for name in every}
    incomplete = {ends[name] for name, is_adapted in every.items() if not is_adapted}
    return sorted(
        {
            _serving_name(name, wrapped) if ends[name] in incomplete else ends[name]
            for name, is_adapted in every.items()
            if is_adapted
        }
    )
