"""LoRA: which matrices of a model have a low-rank update, and its arrays before training.

In: a model's structure and a `LoraConfig`. Out: paths, shapes and arrays in the layout that `model.matrices` multiplies
by. Knows no files.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float32, Key

from dialog_jax.errors import UserError
from dialog_jax.model import decoder, matrices, parameter_trees, quantization, tensor_names
from dialog_jax.model.decoder_config import DecoderConfig
from dialog_jax.model.lora_config import ALL_LINEAR, LoraConfig

TRAINED, SCALE = ("lora_a", "lora_b"), "lora_scale"

Scales = Mapping[str, Float32[np.ndarray, "*L r"]]
"""By the path of each adapted parameter, the factor of each column of `lora_a`, by layer where it is stacked."""


def find_scales(model: DecoderConfig, lora: LoraConfig) -> Scales:
    """Returns the scales of the updates that a config asks for.

    A layer whose rank is smaller than that of others has scale 0 beyond it, and one that is no target has scale 0
    everywhere. With rank 2, alpha 2 and a rank_pattern of 1 for layer 0, `w_up` of two layers has [[2, 0], [1, 1]].

    Raises:
      UserError: a target or a pattern matches no matrix, or a rank exceeds its matrix.
    """
    modules = list_modules(model)
    names = [name for path in modules for name in modules[path]]
    for target in lora.targets:
        if target != ALL_LINEAR and not any(_matches(name, target) for name in names):
            raise UserError(f"lora.targets names {target!r}, which matches none of {_list_kinds(names)}.")
    for field in ("rank_pattern", "alpha_pattern"):
        for pattern in getattr(lora, field):
            if not any(LoraConfig(rank=1, rank_pattern={pattern: 2}).find_rank(name) == 2 for name in names):
                raise UserError(f"lora.{field} has {pattern!r}, which matches none of {_list_kinds(names)}.")
    scales = {}
    for path, path_names in modules.items():
        ranks = [lora.find_rank(name) if _is_target(path, name, lora) else 0 for name in path_names]
        if not max(ranks):
            continue
        limit = min(find_matrix_shape(model, path))
        if max(ranks) > limit:
            raise UserError(
                f"the rank of {path_names[ranks.index(max(ranks))]} is {max(ranks):,}, but its smaller side is "
                f"{limit:,}. Lower lora.rank or lora.rank_pattern."
            )
        scale = np.zeros((len(ranks), max(ranks)), np.float32)
        for layer, (rank, name) in enumerate(zip(ranks, path_names, strict=True)):
            if rank:
                scale[layer, :rank] = lora.compute_scale(name)
        scales[path] = scale if path.startswith("layers/") else scale[0]
    return scales


def list_modules(model: DecoderConfig) -> dict[str, list[str]]:
    """Returns Hugging Face's name of each module that LoRA can adapt, by path: one per layer, or one.

    Where the files have several of them in one tensor, or transformers in one module, it is the name that each would
    have; the experts of a layer have one name, as model.layers.0.mlp.experts.up_proj.
    """
    paths = tensor_names.list_adaptable(parameter_trees.flatten(decoder.abstract_parameters(model)))
    return {path: tensor_names.list_modules(model, path) for path in (*paths, "embedding", "lm_head")}


def list_quantizable(model: DecoderConfig) -> list[str]:
    """Returns the paths of the matrices of layers that compute every token: those of `all-linear`."""
    return [
        path for path in list_modules(model) if path.startswith("layers/") and path not in tensor_names.EXPERT_MATRICES
    ]


def init_factors(model: DecoderConfig, scales: Scales, key: Key[Array, ""]) -> dict[str, Any]:
    """Returns the tree of factors before training, float32, with which the model is unchanged.

    A is uniform in ±1 / sqrt(in) and B is zero; of an embedding, A is zero and B normal. Columns beyond the rank of a
    layer are zero. Source: `LoraLayer.reset_lora_parameters` of PEFT 0.21.
    """
    factors: dict[str, Array] = {}
    for index, (path, scale) in enumerate(sorted(scales.items())):
        path_key = jax.random.fold_in(key, index)
        a, b = (shape.shape for shape in _factor_shapes(model, path, scale))
        used = jnp.asarray(scale > 0, jnp.float32)
        if path == "embedding":
            factors[f"{path}/lora_a"] = jnp.zeros(a)
            factors[f"{path}/lora_b"] = jax.random.normal(path_key, b) * used[..., :, None]
        else:
            limit = 1 / np.sqrt(a[-2])
            drawn = jax.random.uniform(path_key, a, minval=-limit, maxval=limit)
            factors[f"{path}/lora_a"] = drawn * matrices.align_scale(used, len(a))
            factors[f"{path}/lora_b"] = jnp.zeros(b)
    return parameter_trees.unflatten(factors)


def abstract_factors(model: DecoderConfig, scales: Scales) -> dict[str, Any]:
    """Returns the tree of factors as `jax.ShapeDtypeStruct`."""
    return parameter_trees.unflatten(
        {
            f"{path}/{name}": shape
            for path, scale in scales.items()
            for name, shape in zip(TRAINED, _factor_shapes(model, path, scale), strict=True)
        }
    )


def attach_scales(parameters: Mapping[str, Any], scales: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the parameters with each adapted matrix at `PATH/weight` and its scale at `PATH/lora_scale`."""
    flat = {}
    for path, leaf in parameter_trees.flatten(parameters).items():
        adapted = next((prefix for prefix in scales if path == prefix or path.startswith(f"{prefix}/")), None)
        flat[path if adapted is None else f"{adapted}/weight{path.removeprefix(adapted)}"] = leaf
    return parameter_trees.unflatten({**flat, **{f"{path}/{SCALE}": scale for path, scale in scales.items()}})


def add_dropout(parameters: Mapping[str, Any], rate: float, key: Key[Array, ""]) -> dict[str, Any]:
    """Returns the parameters with a key for each matrix that has an update, so that `matrices` drops out its input."""
    flat = parameter_trees.flatten(parameters)
    paths = sorted(path.removesuffix(f"/{SCALE}") for path in flat if path.endswith(f"/{SCALE}"))
    for index, path in enumerate(path for path in paths if path.startswith("layers/")):
        layers = flat[f"{path}/{SCALE}"].shape[0]
        flat[f"{path}/dropout_key"] = jax.random.split(jax.random.fold_in(key, index), layers)
        flat[f"{path}/dropout_rate"] = jnp.full(layers, rate, jnp.float32)
    return parameter_trees.unflatten(flat)


def merge_factors(model: DecoderConfig, parameters: Mapping[str, Any]) -> tuple[DecoderConfig, dict[str, Any]]:
    """Returns (config, parameters) of the same model without adapters: each update is added to its matrix, in float32.

    An update of one of two tied embeddings unties them. Quantized matrices are dequantized.
    """
    flat = _dequantize(model, parameter_trees.flatten(parameters))
    paths = {path.removesuffix(f"/{SCALE}") for path in flat if path.endswith(f"/{SCALE}")}
    if model.tie_embeddings and paths & {"embedding", "lm_head"}:
        model = _untie(model)
        weight = flat.get("embedding", flat.get("embedding/weight"))
        flat["lm_head/weight" if "lm_head" in paths else "lm_head"] = weight
    for path in paths:
        factors = {name: flat.pop(f"{path}/{name}") for name in (*TRAINED, SCALE)}
        weight = flat.pop(f"{path}/weight")
        if path == "lm_head":
            flat[path] = matrices.add_update(weight.T, factors).T
        else:
            flat[path] = matrices.add_update(weight, factors)
    return model, parameter_trees.unflatten(flat)


def _dequantize(model: DecoderConfig, flat: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the parameters by path, with each quantized matrix as one array, float32."""
    arrays: dict[str, Any] = {}
    quantized: dict[str, dict[str, Any]] = {}
    for path, leaf in flat.items():
        parent, _, name = path.rpartition("/")
        if name in quantization.ARRAYS:
            quantized.setdefault(parent, {})[name] = leaf
        else:
            arrays[path] = leaf
    for path, matrix in quantized.items():
        inputs, _ = find_matrix_shape(model, path.removesuffix("/weight"))
        arrays[path] = quantization.dequantize(matrix, inputs, jnp.float32)
    return arrays


def _untie(model: DecoderConfig) -> DecoderConfig:
    return dataclasses.replace(model, tie_embeddings=False)


def _matches(name: str, target: str) -> bool:
    return name == target or name.endswith(f".{target}")


def _is_target(path: str, name: str, lora: LoraConfig) -> bool:
    if ALL_LINEAR in lora.targets and path.startswith("layers/") and path not in tensor_names.EXPERT_MATRICES:
        return True
    return any(_matches(name, target) for target in lora.targets)


def _list_kinds(names: list[str]) -> str:
    return ", ".join(dict.fromkeys(name.rpartition(".")[2] for name in names))


def find_matrix_shape(model: DecoderConfig, path: str) -> tuple[int, ...]:
    """Returns (in, out) of a parameter; of the embedding (V, D)."""
    if path in ("embedding", "lm_head"):
        return (model.vocab_size, model.width) if path == "embedding" else (model.width, model.vocab_size)
    return parameter_trees.flatten(decoder.abstract_parameters(model))[path].shape[-2:]


def _factor_shapes(model: DecoderConfig, path: str, scale: np.ndarray) -> tuple[jax.ShapeDtypeStruct, ...]:
    rank = scale.shape[-1]
    first, second = find_matrix_shape(model, path)
    lead = (
        parameter_trees.flatten(decoder.abstract_parameters(model))[path].shape[:-2]
        if path.startswith("layers/")
        else ()
    )
    shapes = ((*lead, first, rank), (*lead, rank, second))
    return tuple(jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes)
