"""The factors of LoRA in the tensors that PEFT saves, as those of the matrices here, and their scales.

In: the fields of adapter_config.json and the tensors by their names. Out: arrays; `peft_reading` reads the files.

Source: `LoraConfig`, `ParamWrapper` and `set_peft_model_state_dict` of PEFT 0.21.
"""

import math
import pathlib
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from dialog_jax.errors import UserError
from dialog_jax.formats import gguf_file
from dialog_jax.model import adapters, model_files, parameter_trees, peft_modules, tensor_names
from dialog_jax.model.adapters import Scales
from dialog_jax.model.decoder_config import DecoderConfig
from dialog_jax.model.lora_config import LoraConfig
from dialog_jax.model.peft_files import CONFIG, WEIGHTS
from dialog_jax.model.peft_modules import Factors, PeftModule

_INITIALIZATIONS = (True, False, None, "gaussian", "eva", "orthogonal")  # others change the model's own weights


def read_lora(
    directory: pathlib.Path,
    fields: Mapping[str, Any],
    tensors: Mapping[str, np.ndarray],
    model: DecoderConfig,
    base: pathlib.Path | None,
) -> tuple[Scales, dict[str, Any]]:
    """Returns the scales and the tree of factors, float32.

    Args:
      directory: of the adapter; for errors.
      fields: of adapter_config.json.
      tensors: by their names in a causal language model.
      base: the files of the model, if they are there; copies of its embeddings are compared with them.

    Raises:
      UserError: a tensor is missing, unexpected or misshapen, or the fields say otherwise than the tensors.
    """
    lora = _parse_lora(directory / CONFIG, fields)
    targets = _read_target_parameters(directory / CONFIG, fields)
    remaining = dict(tensors)
    modules = peft_modules.list_modules(model)
    by_parameter = {module.name for module in modules if module.experts and peft_modules.is_named(module.name, targets)}
    found: dict[str, dict[int, tuple[Factors, float]]] = {}  # of each path, by the index in its stack
    for module in modules:
        if module.experts and module.name not in by_parameter:
            continue
        names = peft_modules.list_tensor_names(module, by_parameter)
        pair = _take_pair(directory / WEIGHTS, remaining, names)
        if pair is None:
            continue
        name = f"{module.name}.weight"
        name = name if not module.experts and peft_modules.is_named(name, targets) else module.name
        _check_shapes(directory, module, pair, lora.find_rank(name))
        split = peft_modules.split_factors(module, *peft_modules.unpack(module, *pair))
        for part, own in zip(module.parts, split, strict=True):
            if own is not None:
                found.setdefault(part.path, {})[part.position] = (own, lora.compute_scale(name))
    for path, index, own, scale in _take_single_experts(directory, lora, remaining, model):
        if index in found.setdefault(path, {}):
            raise UserError(
                f"{directory / WEIGHTS} adapts experts both one by one and together; save the adapter again."
            )
        found[path][index] = (own, scale)
    scales: dict[str, np.ndarray] = {}
    factors: dict[str, np.ndarray] = {}
    for path, layers in adapters.list_modules(model).items():
        if path in found:
            scales[path], stacked = peft_modules.stack_factors(
                found[path], len(layers), is_stacked=path.startswith("layers/")
            )
            factors.update(zip((f"{path}/{name}" for name in adapters.TRAINED), stacked, strict=True))
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
    return scales, parameter_trees.unflatten(factors)


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


def _take_single_experts(
    directory: pathlib.Path, lora: LoraConfig, tensors: dict[str, np.ndarray], model: DecoderConfig
) -> Iterator[tuple[str, int, Factors, float]]:
    """Yields (path, index, factors, scale) of matrices whose experts are modules of their own, as in transformers 4.

    model.layers.0.mlp.experts.7.up_proj.lora_A.weight
    """
    experts = model.experts.count if model.experts else 0
    for path, names in adapters.list_modules(model).items() if experts else ():
        for index, name in enumerate(names) if path in tensor_names.EXPERT_MATRICES else ():
            place, _, matrix = name.rpartition(".")
            own_names = [f"{place}.{expert}.{matrix}" for expert in range(experts)]
            pairs = [
                _take_pair(directory / WEIGHTS, tensors, (f"{own}.lora_A.weight", f"{own}.lora_B.weight"))
                for own in own_names
            ]
            if not any(pairs):
                continue
            inputs, outputs = adapters.find_matrix_shape(model, path)
            module = PeftModule(own_names[0], (), inputs, outputs, 0, "")
            for own, pair in zip(own_names, pairs, strict=True):
                if pair is None or lora.find_rank(own) != lora.find_rank(own_names[0]):
                    raise UserError(
                        f"{directory / WEIGHTS}: {own} has {'no factors' if pair is None else 'another rank'}, and "
                        "other experts of its layer have some. Experts can be adapted only together, with one rank."
                    )
                _check_shapes(directory, module._replace(name=own), pair, lora.find_rank(own))
                if lora.compute_scale(own) != lora.compute_scale(own_names[0]):
                    raise UserError(f"{directory / CONFIG}: {own} has another scale than {own_names[0]}.")
            a, b = (np.stack([factor.T for factor in group]) for group in zip(*filter(None, pairs), strict=True))
            yield path, index, (a, b), lora.compute_scale(own_names[0])


def _read_target_parameters(file: pathlib.Path, fields: Mapping[str, Any]) -> list[str]:
    """Returns the names in `target_parameters`, or their ends, as those of a causal language model."""
    targets = fields.get("target_parameters") or []
    if not isinstance(targets, list) or not all(isinstance(target, str) for target in targets):
        raise UserError(f"{file}: target_parameters is {targets!r}; a list of names is needed.")
    return [peft_modules.standardize_name(target) for target in targets]


def _take_pair(
    file: pathlib.Path, tensors: dict[str, np.ndarray], keys: tuple[str, str]
) -> tuple[np.ndarray, np.ndarray] | None:
    """Takes the factors of a module, [r, in] and [out, r], out of the tensors."""
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


def _check_shapes(
    directory: pathlib.Path, module: PeftModule, pair: tuple[np.ndarray, np.ndarray], expected_rank: int
) -> None:
    """Raises UserError if the factors of a module are not those of this model or of this rank."""
    a, b = pair
    experts = max(1, module.experts)
    rank = len(a) // experts
    expected = ((rank * experts, module.inputs), (module.outputs, rank * experts))
    if (a.shape, b.shape) != expected:
        remedy = "Name the model that the adapter was trained on."
        if module.experts:
            remedy += " Of experts, PEFT before 0.19.1 saved the factors of the transposed matrices."
        raise UserError(
            f"{directory / WEIGHTS}: the factors of {module.name} have shapes {list(a.shape)} and {list(b.shape)}; "
            f"{list(expected[0])} and {list(expected[1])} are needed. {remedy}"
        )
    if rank != expected_rank:
        raise UserError(
            f"{directory}: the rank of {module.name} is {rank} in {WEIGHTS} and {expected_rank} in {CONFIG}. "
            "The two files belong to different adapters."
        )


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
