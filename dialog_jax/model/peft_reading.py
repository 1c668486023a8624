"""Reads the adapters that PEFT and `peft_files` write: the factors of LoRA and their scales, or a soft prompt.

In: a directory and the structure of the model that it belongs to. What a directory asks for and is not supported is an
error that names it: of the fields of adapter_config.json, only those that are known here may have a value.

Source: `LoraConfig`, `PromptTuningConfig` and `set_peft_model_state_dict` of PEFT 0.21.
"""

import hashlib
import math
import pathlib
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
import safetensors.numpy
from jaxtyping import Float32

from dialog_jax.errors import UserError
from dialog_jax.formats import gguf_file
from dialog_jax.model import adapters, model_files, parameter_trees, peft_files, tensor_files, tensor_names
from dialog_jax.model.adapters import Scales
from dialog_jax.model.decoder_config import DecoderConfig
from dialog_jax.model.lora_config import LoraConfig
from dialog_jax.model.peft_files import CONFIG, ORIGIN, PREFIX, PROMPT, WEIGHTS

# Fields that are read here, that the tensors make redundant, or that concern training alone.
_KNOWN = {
    "LORA": {
        "r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern", "init_lora_weights", "target_modules",
        "exclude_modules", "layers_to_transform", "layers_pattern", "lora_dropout", "loftq_config", "eva_config",
        "corda_config", "lora_ga_config", "runtime_config", "qalora_group_size", "megatron_core",
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
_INITIALIZATIONS = (True, False, None, "gaussian", "eva", "orthogonal")  # others change the model's own weights
# Names of modules in models that also read images, and in their language model.
_WRAPPERS = re.compile(r"^(?:model\.language_model\.|language_model\.model\.)(?=layers\.|embed_tokens)")


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
        adapter = _read_lora(directory, fields, tensors, model, base)
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
        new = _WRAPPERS.sub("model.", name.removeprefix(PREFIX)).removeprefix("language_model.")
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


def _read_lora(
    directory: pathlib.Path,
    fields: Mapping[str, Any],
    tensors: Mapping[str, np.ndarray],
    model: DecoderConfig,
    base: pathlib.Path | None,
) -> Adapter:
    lora = _parse_lora(directory / CONFIG, fields)
    remaining = dict(tensors)
    scales: dict[str, np.ndarray] = {}
    factors: dict[str, np.ndarray] = {}
    for path, names in adapters.list_modules(model).items():
        pairs = [_take_pair(directory / WEIGHTS, remaining, name, path) for name in names]
        ranks = [0 if pair is None else len(pair[0]) for pair in pairs]
        if not max(ranks):
            continue
        scale = np.zeros((len(names), max(ranks)), np.float32)
        scales[path] = scale if path.startswith("layers/") else scale[0]
        shapes = parameter_trees.flatten(adapters.abstract_factors(model, {path: scales[path]}))
        arrays = {key: np.zeros(leaf.shape, np.float32) for key, leaf in shapes.items()}
        factors.update(arrays)
        a, b = (arrays[f"{path}/{name}"] for name in adapters.TRAINED)
        if not path.startswith("layers/"):
            a, b = a[None], b[None]
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
                    f"{directory}: the rank of {name} is {rank} in {WEIGHTS} and {lora.find_rank(name)} in {CONFIG}. "
                    "The two files belong to different adapters."
                )
            a[layer, :, :rank], b[layer, :rank] = pair[0].T, pair[1].T
            scale[layer, :rank] = lora.compute_scale(name)
    if not scales:
        raise UserError(
            f"{directory / WEIGHTS} has no factors of a matrix of this model; its target_modules are "
            f"{fields.get('target_modules')!r}. Name the model that the adapter was trained on."
        )
    _take_embeddings(directory / WEIGHTS, remaining, model, base)
    if remaining:
        raise UserError(
            f"{directory / WEIGHTS}: tensor {min(remaining)} is of no matrix of this model ({len(remaining)} in all). "
            "Name the model that the adapter was trained on."
        )
    return Adapter(scales, parameter_trees.unflatten(factors), None)


def _parse_lora(file: pathlib.Path, fields: Mapping[str, Any]) -> LoraConfig:
    initialization = fields.get("init_lora_weights", True)
    if initialization not in _INITIALIZATIONS:
        raise UserError(
            f"{file}: init_lora_weights is {initialization!r}, which changes the model's own weights. Convert it to "
            "plain LoRA: path_initial_model_for_weight_conversion in PEFT's save_pretrained."
        )
    rank, alpha = _read_number(file, fields, "r"), _read_number(file, fields, "lora_alpha")
    if rank != int(rank):
        raise UserError(f"{file}: r is {rank}; a whole number is needed.")
    try:
        return LoraConfig(
            rank=int(rank),
            alpha=alpha,
            rslora=bool(fields.get("use_rslora")),
            rank_pattern=fields.get("rank_pattern") or {},
            alpha_pattern=fields.get("alpha_pattern") or {},
        )
    except UserError as error:
        raise UserError(f"{file}: {error}") from None


def _read_number(file: pathlib.Path, fields: Mapping[str, Any], name: str) -> float:
    value = fields.get(name)
    if not isinstance(value, int | float) or isinstance(value, bool) or not math.isfinite(value):
        raise UserError(f"{file}: {name} is {value!r}; a number is needed.")
    return float(value)


def _take_pair(
    file: pathlib.Path, tensors: dict[str, np.ndarray], module: str, path: str
) -> tuple[np.ndarray, np.ndarray] | None:
    """Takes the factors of a module, [r, in] and [out, r], out of the tensors."""
    keys = [key.removeprefix(PREFIX) for key in peft_files.list_tensor_names(module, path)]
    present = [key for key in keys if key in tensors]
    if not present:
        return None
    if len(present) == 1:
        raise UserError(f"{file}: {present[0]} is there without its other factor; save the adapter again.")
    a, b = (tensors.pop(key).astype(np.float32) for key in keys)
    if a.ndim != 2 or b.ndim != 2 or not len(a):
        raise UserError(
            f"{file}: {keys[0]} and {keys[1]} have shapes {list(a.shape)} and {list(b.shape)}, not those of matrices."
        )
    return a, b


def _take_embeddings(
    file: pathlib.Path, tensors: dict[str, np.ndarray], model: DecoderConfig, base: pathlib.Path | None
) -> None:
    """Takes the copies of the model's own embeddings, which PEFT saves with their factors, out of the tensors.

    Raises:
      UserError: one is not that of the model.
    """
    for path, weight in (("embedding", tensor_names.EMBEDDING), ("lm_head", tensor_names.UNEMBEDDING)):
        for key in (weight, f"{weight.removesuffix('.weight')}.base_layer.weight"):
            if key not in tensors:
                continue
            copy = tensors.pop(key)
            if base is None:
                continue
            with model_files.open_tensors(base, model) as published:
                (name,) = tensor_names.list_names(model, path, gguf_file.is_gguf(base))
                if name not in published.shapes:  # of two tied embeddings, files may have either
                    name = tensor_names.EMBEDDING if path == "lm_head" else tensor_names.UNEMBEDDING
                own = published.read(name)
            if copy.shape != own.shape or not np.array_equal(copy, own.astype(copy.dtype)):
                raise UserError(
                    f"{file}: {key} is not the model's own. Name the model that the adapter was trained on; an adapter "
                    "that changes embeddings otherwise than by factors is not supported."
                )
