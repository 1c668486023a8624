"""What PEFT adapts in a model, by its names, and what it has of the matrices here.

PEFT sees the modules of transformers: some hold several of the matrices here, one below the other in their output, and
the experts of a layer are one parameter. Its factors of such a module and those of the matrices are the same update:

    qkv_proj = [q; k; v]     A = [A_q A_k A_v], B = | B_q  0   0  |     A [in, r_q + r_k + r_v]
                                                    |  0  B_k  0  |
                                                    |  0   0  B_v |     B [r_q + r_k + r_v, out_q + out_k + out_v]

Knows names and arrays, no files. Source: `ParamWrapper` of PEFT 0.21 for experts.
"""

import re
from collections.abc import Collection, Mapping, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float32

from dialog_jax.model import adapters, tensor_names
from dialog_jax.model.decoder_config import DecoderConfig
from dialog_jax.model.families import FAMILIES

PREFIX = "base_model.model."
"""What PEFT puts before the name of a module."""

FirstFactor = Float32[np.ndarray, "... _in _r"]  # with an axis of experts, or without
SecondFactor = Float32[np.ndarray, "... _r _out"]
Factors = tuple[FirstFactor, SecondFactor]

# Of these families PEFT takes the names in target_modules for those of experts, whatever module they name: with
# transformers 5, `_convert_peft_config_moe` of PEFT 0.21.
_FAMILIES_WITH_OLD_NAMES, _OLD_NAMES = ("qwen3_moe", "glm4_moe"), ("gate_proj", "up_proj", "down_proj")

# Names of modules in models that also read images, and in their language model.
_WRAPPERS = re.compile(r"^(?:model\.language_model\.|language_model\.model\.)(?=layers\.|embed_tokens)")


class Part(NamedTuple):
    """One of the matrices in a module."""

    path: str
    position: int
    """In the stack of the parameter; 0 if it is not stacked."""
    outputs: slice
    """Its outputs among those of the module."""


class PeftModule(NamedTuple):
    """A module that PEFT adapts, or the parameter of all experts of a layer."""

    name: str
    """model.layers.0.self_attn.qkv_proj, or of experts model.layers.0.mlp.experts.gate_up_proj"""
    parts: tuple[Part, ...]
    inputs: int
    outputs: int
    experts: int
    """Their number; 0 for a matrix."""
    parameter: str
    """The name by which `target_parameters` must name it; empty for what `target_modules` names."""


def standardize_name(name: str) -> str:
    """Returns the name of a module or tensor as it is in a causal language model.

    model.language_model.layers.0.mlp.up_proj               model.layers.0.mlp.up_proj
    """
    return _WRAPPERS.sub("model.", name).removeprefix("language_model.")


def list_modules(model: DecoderConfig) -> list[PeftModule]:
    """Returns all modules that may be adapted."""
    places = {
        name: (path, index) for path, names in adapters.list_modules(model).items() for index, name in enumerate(names)
    }
    joined = tensor_names.find_joined_modules(model)
    members = {name for names in joined.values() for name in names}
    modules = joined | {name: [name] for name in places if name not in members}
    return [_make_module(model, name, [places[part] for part in parts]) for name, parts in modules.items()]


def _make_module(model: DecoderConfig, name: str, places: Sequence[tuple[str, int]]) -> PeftModule:
    shapes = [adapters.find_matrix_shape(model, path) for path, _ in places]
    total = sum(outputs for _, outputs in shapes)
    is_expert = places[0][0] in tensor_names.EXPERT_MATRICES
    alternates = is_expert and bool(FAMILIES[model.family].interleaved)
    parts, first = [], 0
    for number, ((path, index), (_, outputs)) in enumerate(zip(places, shapes, strict=True)):
        columns = slice(number, None, len(places)) if alternates else slice(first, first + outputs)
        parts.append(Part(path, index, columns))
        first += outputs
    parameter = name if is_expert else ""
    if not is_expert and model.family in _FAMILIES_WITH_OLD_NAMES and name.rpartition(".")[2] in _OLD_NAMES:
        parameter = f"{name}.weight"
    count = model.experts.count if model.experts and is_expert else 0
    return PeftModule(name, tuple(parts), shapes[0][0], total, count, parameter)


def list_tensor_names(module: PeftModule, adapted: Collection[str]) -> tuple[str, str]:
    """Returns the names of the factors of a module in the layout of `pack`, without PEFT's prefix.

    Args:
      adapted: names of all modules that are adapted. Of two parameters of the same experts, PEFT wraps the first, then
        the whole with the second.
    """
    if module.experts:
        experts, _, name = module.name.rpartition(".")
        inner = ".base_layer" if name == "gate_up_proj" and f"{experts}.down_proj" in adapted else ""
        return f"{experts}{inner}.lora_A.weight", f"{experts}{inner}.lora_B.weight"
    if module.parts[0].path == "embedding":
        return f"{module.name}.lora_embedding_A", f"{module.name}.lora_embedding_B"
    return f"{module.name}.lora_A.weight", f"{module.name}.lora_B.weight"


def is_named(name: str, targets: Collection[str]) -> bool:
    """Returns whether a list of targets has a name or its end."""
    return any(name == target or name.endswith(f".{target}") for target in targets)


def join_factors(module: PeftModule, factors: Sequence[Factors | None]) -> Factors | None:
    """Returns the factors of a module from those of its parts; None if no part has any."""
    pairs = [(part, *pair) for part, pair in zip(module.parts, factors, strict=True) if pair is not None]
    if not pairs:
        return None
    a = np.concatenate([a for _, a, _ in pairs], axis=-1)
    b = np.zeros((*a.shape[:-2], a.shape[-1], module.outputs), np.float32)
    first = 0
    for part, _, own in pairs:
        b[..., first : first + own.shape[-2], part.outputs] = own
        first += own.shape[-2]
    return a, b


def split_factors(module: PeftModule, a: FirstFactor, b: SecondFactor) -> list[Factors | None]:
    """Returns the factors of the parts of a module; None for a part that has no update.

    Left out are columns of A that change nothing and have no gradient, as those with which a smaller rank is filled up;
    and of a module with several parts, for each of them, columns of A that only change others. If B is zero, as before
    training, all parts have all columns of A.
    """
    used = np.any(a, axis=_all_but(a, -1)) | np.any(b, axis=_all_but(b, -2))
    a, b = a[..., used], b[..., used, :]
    factors: list[Factors | None] = []
    for part in module.parts:
        own = b[..., part.outputs]
        changes = np.any(own, axis=_all_but(own, -2)) if len(module.parts) > 1 and b.any() else np.ones(len(a.T), bool)
        factors.append((a[..., changes], own[..., changes, :]) if changes.any() else None)
    return factors


def _all_but(array: np.ndarray, axis: int) -> tuple[int, ...]:
    return tuple(number for number in range(array.ndim) if number != array.ndim + axis)


def stack_factors(
    layers: Mapping[int, tuple[Factors, float]], count: int, *, is_stacked: bool
) -> tuple[np.ndarray, tuple[np.ndarray, np.ndarray]]:
    """Returns the scales and the factors of a parameter, stacked; a layer with a smaller rank is filled up with zeros.

    Args:
      layers: by index, the factors of a layer and their scale.
      count: number of layers that have the parameter; 1 if it is not stacked.
    """
    rank = max(a.shape[-1] for (a, _), _ in layers.values())
    (first_a, first_b), _ = next(iter(layers.values()))
    scale = np.zeros((count, rank), np.float32)
    a = np.zeros((count, *first_a.shape[:-1], rank), np.float32)
    b = np.zeros((count, *first_b.shape[:-2], rank, first_b.shape[-1]), np.float32)
    for index, ((own_a, own_b), own_scale) in layers.items():
        own_rank = own_a.shape[-1]
        a[index, ..., :own_rank], b[index, ..., :own_rank, :], scale[index, :own_rank] = own_a, own_b, own_scale
    return (scale, (a, b)) if is_stacked else (scale[0], (a[0], b[0]))


def pack(module: PeftModule, a: FirstFactor, b: SecondFactor) -> tuple[np.ndarray, np.ndarray]:
    """Returns the factors in PEFT's layout: [r, in] and [out, r].

    Those of E experts of rank r are [E * r, in], with the experts one after the other, and [out, r * E], in which they
    alternate.
    """
    if not module.experts:
        return a.T, b.T
    return a.swapaxes(1, 2).reshape(-1, module.inputs), b.transpose(2, 1, 0).reshape(module.outputs, -1)


def unpack(module: PeftModule, a: np.ndarray, b: np.ndarray) -> Factors:
    """The inverse of `pack`."""
    if not module.experts:
        return a.T, b.T
    experts = module.experts
    return (
        a.reshape(experts, -1, module.inputs).swapaxes(1, 2),
        b.reshape(module.outputs, -1, experts).transpose(2, 1, 0),
    )
