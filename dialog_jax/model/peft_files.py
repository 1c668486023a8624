"""Adapters in the format of PEFT, which PEFT and vLLM open: adapter_config.json and adapter_model.safetensors.

In: a directory and the structure of the model that it belongs to. Out: the factors of LoRA and their scales, or the
embeddings of a soft prompt; and back. A directory that is written has one rank and alpha = rank: vLLM ignores patterns
of either, so that every scale is multiplied into B, and a smaller rank is filled up with zeros.

Source: `LoraConfig`, `PromptTuningConfig` and `get_peft_model_state_dict` of PEFT 0.21.
"""

import json
import pathlib
from collections.abc import Mapping
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
import safetensors.numpy
from jaxtyping import Float32

from dialog_jax.errors import UserError
from dialog_jax.model import adapters, parameter_trees, tensor_files
from dialog_jax.model.adapters import Scales
from dialog_jax.model.decoder import DecoderConfig
from dialog_jax.model.lora_config import LoraConfig

CONFIG, WEIGHTS, ORIGIN = "adapter_config.json", "adapter_model.safetensors", "export.json"
PROMPT = "soft_prompt"
"""The directory within that of LoRA that has the soft prompt trained with it: PEFT has no directory for both."""

_PREFIX = "base_model.model."
_WRAPPED = "model.language_model."  # where the modules of a model are within one that also reads images
# What changes the model otherwise than by factors beside its matrices, and the values that do not.
_UNSUPPORTED: dict[str, tuple[Any, ...]] = {
    "use_dora": (False, None),
    "modules_to_save": (None, []),
    "bias": ("none", None),
    "lora_bias": (False, None),
    "fan_in_fan_out": (False, None),
    "use_qalora": (False, None),
    "target_parameters": (None, []),
    "trainable_token_indices": (None, []),
    "alora_invocation_tokens": (None, []),
    "layer_replication": (None, []),
    "megatron_config": (None, {}),
}
_INITIALIZATIONS = (True, False, None, "gaussian", "eva", "orthogonal")  # others change the model's own weights


class Adapter(NamedTuple):
    """The content of a directory."""

    scales: Scales
    """Of LoRA; empty if there is none."""
    factors: dict[str, Any]
    """Tree of `lora_a` and `lora_b`, float32."""
    soft_prompt: Float32[np.ndarray, "P D"] | None


def is_adapter(directory: pathlib.Path) -> bool:
    """Returns whether a directory holds an adapter."""
    return (directory / CONFIG).is_file()


def read_adapter(directory: pathlib.Path, model: DecoderConfig, *, base: str = "") -> Adapter:
    """Returns the adapter in a directory, with the soft prompt that was trained with it if there is one.

    Args:
      model: the structure of the model that it adapts.
      base: `model_files.fingerprint` of that model; compared with that of the model that it was trained on, which our
        exports name.

    Raises:
      UserError: a file is missing or broken, the adapter belongs to another model, or uses what is not supported.
    """
    if not is_adapter(directory):
        raise UserError(f"{directory}: {CONFIG} is missing. Name a directory that PEFT or dialog_jax export wrote.")
    fields = tensor_files.read_json(directory / CONFIG)
    _check_base(directory, base)
    tensors = _read_tensors(directory / WEIGHTS)
    kind = fields.get("peft_type")
    if kind == "LORA":
        adapter = _read_lora(directory, fields, tensors, model)
    elif kind == "PROMPT_TUNING":
        adapter = Adapter({}, {}, _read_prompt(directory, tensors, model))
    else:
        raise UserError(f"{directory / CONFIG}: peft_type is {kind!r}; LORA and PROMPT_TUNING are supported.")
    if is_adapter(directory / PROMPT):
        adapter = adapter._replace(soft_prompt=read_adapter(directory / PROMPT, model, base=base).soft_prompt)
    return adapter


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
            first, second = _tensor_names(module, path)
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


def _tensor_names(module: str, path: str) -> tuple[str, str]:
    if path == "embedding":
        return f"{_PREFIX}{module}.lora_embedding_A", f"{_PREFIX}{module}.lora_embedding_B"
    return f"{_PREFIX}{module}.lora_A.weight", f"{_PREFIX}{module}.lora_B.weight"


def _list_targets(adapted: list[str], modules: Mapping[str, list[str]], wrapped: bool) -> list[str]:
    """Returns the ends of the names if all modules with these ends are adapted, otherwise the names."""
    ends = {name.rpartition(".")[2] for name in adapted}
    every = {_serving_name(name, wrapped) for names in modules.values() for name in names}
    complete = {name for name in every if name.rpartition(".")[2] in ends} == set(adapted)
    return sorted(ends) if complete else sorted(adapted)


def _check_base(directory: pathlib.Path, base: str) -> None:
    file = directory / ORIGIN
    if not base or not file.is_file():
        return
    trained_on = tensor_files.read_json(file).get("base")
    if trained_on and trained_on != base:
        raise UserError(
            f"{directory} was trained on another model: its {ORIGIN} names {str(trained_on)[:12]}..., and this model "
            f"is {base[:12]}... Name the model that it was trained on."
        )


def _read_tensors(file: pathlib.Path) -> dict[str, np.ndarray]:
    if not file.is_file():
        raise UserError(f"{file}: no such file. An adapter is {CONFIG} with {WEIGHTS}; save it as safetensors.")
    try:
        tensors = safetensors.numpy.load_file(file)
    except (safetensors.SafetensorError, ValueError, KeyError) as error:
        raise UserError(f"{file} is no safetensors file, or is cut off: {error}") from error
    for name, tensor in tensors.items():
        if not np.issubdtype(tensor.dtype, np.floating) and tensor.dtype != ml_dtypes.bfloat16:
            raise UserError(f"{file}: tensor {name} is {tensor.dtype}; float32, float16 or bfloat16 is needed.")
    return tensors


def _read_prompt(
    directory: pathlib.Path, tensors: Mapping[str, np.ndarray], model: DecoderConfig
) -> Float32[np.ndarray, "P D"]:
    if set(tensors) != {"prompt_embeddings"}:
        raise UserError(
            f"{directory / WEIGHTS}: needed one tensor, prompt_embeddings; got {', '.join(sorted(tensors))}."
        )
    prompt = tensors["prompt_embeddings"].astype(np.float32)
    if prompt.ndim != 2 or prompt.shape[1] != model.width:
        raise UserError(
            f"{directory / WEIGHTS}: prompt_embeddings has shape {list(prompt.shape)}, but the model's width is "
            f"{model.width:,}. Name the model that it was trained on."
        )
    return prompt


def _read_lora(
    directory: pathlib.Path, fields: Mapping[str, Any], tensors: Mapping[str, np.ndarray], model: DecoderConfig
) -> Adapter:
    for field, neutral in _UNSUPPORTED.items():
        if field in fields and fields[field] not in neutral:
            raise UserError(f"{directory / CONFIG}: {field} is {fields[field]!r}, which is not supported.")
    if fields.get("init_lora_weights", True) not in _INITIALIZATIONS:
        raise UserError(
            f"{directory / CONFIG}: init_lora_weights is {fields['init_lora_weights']!r}, which changes the "
            "model's own weights. Convert it to plain LoRA: path_initial_model_for_weight_conversion in PEFT's "
            "save_pretrained."
        )
    lora = LoraConfig(
        rank=fields["r"],
        alpha=float(fields["lora_alpha"]),
        rslora=bool(fields.get("use_rslora")),
        rank_pattern=fields.get("rank_pattern") or {},
        alpha_pattern=fields.get("alpha_pattern") or {},
    )
    remaining = dict(tensors)
    scales: dict[str, np.ndarray] = {}
    factors: dict[str, np.ndarray] = {}
    for path, names in adapters.list_modules(model).items():
        pairs = [_find_pair(directory, remaining, name, path) for name in names]
        ranks = [0 if pair is None else len(pair[0]) for pair in pairs]
        if not max(ranks):
            continue
        shapes = adapters.abstract_factors(
            model, {path: np.zeros((*([len(names)] * path.startswith("layers/")), max(ranks)))}
        )
        flat = {
            key.rpartition("/")[2]: np.zeros(leaf.shape, np.float32)
            for key, leaf in parameter_trees.flatten(shapes).items()
        }
        a, b = (flat[name] if path.startswith("layers/") else flat[name][None] for name in adapters.TRAINED)
        scale = np.zeros((len(names), max(ranks)), np.float32)
        for layer, (name, pair, rank) in enumerate(zip(names, pairs, ranks, strict=True)):
            if pair is None:
                continue
            expected = ((rank, a.shape[1]), (b.shape[2], rank))
            if (pair[0].shape, pair[1].shape) != expected:
                raise UserError(
                    f"{directory / WEIGHTS}: the factors of {name} have shapes {list(pair[0].shape)} and "
                    f"{list(pair[1].shape)}; {list(expected[0])} and {list(expected[1])} are needed. Name the model "
                    "that the adapter was trained on."
                )
            if lora.find_rank(name) != rank:
                raise UserError(
                    f"{directory}: the rank of {name} is {rank} in {WEIGHTS} and {lora.find_rank(name)} in {CONFIG}."
                )
            a[layer, :, :rank], b[layer, :rank] = pair[0].T, pair[1].T
            scale[layer, :rank] = lora.compute_scale(name)
        factors.update({f"{path}/{name}": flat[name] for name in adapters.TRAINED})
        scales[path] = scale if path.startswith("layers/") else scale[0]
    if remaining:
        raise UserError(
            f"{directory / WEIGHTS}: tensor {min(remaining)} is of no matrix of this model ({len(remaining)} in all). "
            "Name the model that the adapter was trained on."
        )
    if not scales:
        raise UserError(f"{directory / WEIGHTS} has no tensors.")
    return Adapter(scales, parameter_trees.unflatten(factors), None)


def _find_pair(
    directory: pathlib.Path, tensors: dict[str, np.ndarray], module: str, path: str
) -> tuple[np.ndarray, np.ndarray] | None:
    """Takes the factors of a module, [r, in] and [out, r], out of the tensors."""
    for name in dict.fromkeys((module, _serving_name(module, True))):
        keys = _tensor_names(name, path)
        present = [key for key in keys if key in tensors]
        if len(present) == 1:
            raise UserError(f"{directory / WEIGHTS}: {present[0]} is there without its other factor.")
        if present:
            a, b = (tensors.pop(key).astype(np.float32) for key in keys)
            if a.ndim != 2 or b.ndim != 2:
                raise UserError(f"{directory / WEIGHTS}: {keys[0]} and {keys[1]} must be matrices.")
            return a, b
    return None
