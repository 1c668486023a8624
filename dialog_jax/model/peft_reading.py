"""Reads the adapters that PEFT and `peft_files` write: the factors of LoRA and their scales, or a soft prompt.

In: a directory and the structure of the model that it belongs to. What a directory asks for and is not supported is an
error that names it: of the fields of adapter_config.json, only those that are known here may have a value.

Source: `LoraConfig`, `PromptTuningConfig` and `set_peft_model_state_dict` of PEFT 0.21.
"""

import hashlib
import pathlib
from collections.abc import Mapping
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
import safetensors.numpy
from jaxtyping import Float32

from dialog_jax.errors import UserError
from dialog_jax.model import model_files, peft_lora, peft_modules, tensor_files
from dialog_jax.model.adapters import Scales
from dialog_jax.model.decoder_config import DecoderConfig
from dialog_jax.model.peft_files import CONFIG, ORIGIN, PROMPT, WEIGHTS
from dialog_jax.model.peft_modules import PREFIX

# Fields that are read here, that the tensors make redundant, or that concern training alone.
_KNOWN = {
    "LORA": {
        "r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern", "init_lora_weights", "target_modules",
        "target_parameters", "exclude_modules", "layers_to_transform", "layers_pattern", "lora_dropout",
        "loftq_config", "eva_config", "corda_config", "lora_ga_config", "runtime_config", "qalora_group_size",
        "megatron_core",
    },
    "PROMPT_TUNING": {
        "num_virtual_tokens", "token_dim", "num_transformer_submodules", "num_attention_heads", "num_layers",
        "prompt_tuning_init", "prompt_tuning_init_text", "tokenizer_name_or_path", "tokenizer_kwargs",
    },
}  # fmt: skip
_SHARED = {
    "peft_type", "task_type", "auto_mapping", "base_model_name_or_path", "revision", "inference_mode", "peft_version",
}  # fmt: skip
_EMPTY: tuple[Any, ...] = (None, False, "none", "", [], {})  # values of other fields that change nothing


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


def read_adapter(directory: pathlib.Path, model: DecoderConfig, *, base: pathlib.Path | None = None) -> Adapter:
    """Returns the adapter in a directory, with the soft prompt that was trained with it if there is one.

    Args:
      model: the structure of the model that it adapts.
      base: the files of that model, if they are there. Compared with what the directory says of the model that it was
        trained on: a hash in our exports, a copy of embeddings in PEFT's.

    Raises:
      UserError: a file is missing or broken, the adapter belongs to another model, or uses what is not supported.
    """
    if not is_adapter(directory):
        raise UserError(f"{directory}: {CONFIG} is missing. Name a directory that PEFT or dialog_jax export wrote.")
    fields = tensor_files.read_json(directory / CONFIG)
    kind = fields.get("peft_type")
    if kind not in _KNOWN:
        raise UserError(f"{directory / CONFIG}: peft_type is {kind!r}; {' and '.join(_KNOWN)} are supported.")
    for field, value in fields.items():
        if field not in _SHARED | _KNOWN[kind] and value not in _EMPTY:
            raise UserError(f"{directory / CONFIG}: {field} is {value!r}, which is not supported.")
    if base is not None:
        _check_origin(directory, base)
    tensors = _read_tensors(directory / WEIGHTS)
    if kind == "LORA":
        adapter = Adapter(*peft_lora.read_lora(directory, fields, tensors, model, base), None)
    else:
        adapter = Adapter({}, {}, _read_prompt(directory, tensors, model))
    if is_adapter(directory / PROMPT):
        adapter = adapter._replace(soft_prompt=read_adapter(directory / PROMPT, model, base=base).soft_prompt)
    return adapter


def fingerprint(directory: pathlib.Path) -> str:
    """Returns a hash of the files that determine an adapter."""
    digest = hashlib.sha256()
    for place in (directory, directory / PROMPT):
        for file in (place / CONFIG, place / WEIGHTS):
            if file.is_file():
                digest.update(f"{file.relative_to(directory)} {file.stat().st_size}\n".encode())
                digest.update(file.read_bytes())
    return digest.hexdigest()


def _check_origin(directory: pathlib.Path, base: pathlib.Path) -> None:
    """Raises UserError if export.json says that the adapter was trained on another model than that in `base`."""
    file = directory / ORIGIN
    trained_on = tensor_files.read_json(file).get("base") if file.is_file() else None
    if trained_on and trained_on != (found := model_files.fingerprint(base)):
        raise UserError(
            f"{directory} was trained on another model than {base.name}: its {ORIGIN} names {str(trained_on)[:12]}..., "
            f"and the hash of this model is {found[:12]}... Name the model that it was trained on."
        )


def _read_tensors(file: pathlib.Path) -> dict[str, np.ndarray]:
    """Returns the tensors by their names in a causal language model, without what PEFT puts before them.

    base_model.model.model.language_model.layers.0.mlp.up_proj.lora_A.weight
                    model.layers.0.mlp.up_proj.lora_A.weight
    """
    if not file.is_file():
        raise UserError(f"{file}: no such file. An adapter is {CONFIG} with {WEIGHTS}; save it as safetensors.")
    try:
        tensors = safetensors.numpy.load_file(file)
    except (safetensors.SafetensorError, ValueError, KeyError) as error:
        raise UserError(f"{file} is no safetensors file, or is cut off: {error}") from error
    standard = {}
    for name, tensor in tensors.items():
        if not np.issubdtype(tensor.dtype, np.floating) and tensor.dtype != ml_dtypes.bfloat16:
            raise UserError(f"{file}: tensor {name} is {tensor.dtype}; float32, float16 or bfloat16 is needed.")
        new = peft_modules.standardize_name(name.removeprefix(PREFIX))
        if new in standard:
            raise UserError(f"{file}: two tensors are {new}; save the adapter again.")
        standard[new] = tensor
    return standard


def _read_prompt(
    directory: pathlib.Path, tensors: Mapping[str, np.ndarray], model: DecoderConfig
) -> Float32[np.ndarray, "P D"]:
    if set(tensors) != {"prompt_embeddings"}:
        raise UserError(
            f"{directory / WEIGHTS}: needed one tensor, prompt_embeddings; got {', '.join(sorted(tensors)) or 'none'}."
        )
    prompt = tensors["prompt_embeddings"].astype(np.float32)
    if prompt.ndim != 2 or prompt.shape[1] != model.width or not len(prompt):
        raise UserError(
            f"{directory / WEIGHTS}: prompt_embeddings has shape {list(prompt.shape)}, but the model's width is "
            f"{model.width:,}. Name the model that it was trained on."
        )
    return prompt
