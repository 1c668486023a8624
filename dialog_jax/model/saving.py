"""Parameters to a directory that Hugging Face transformers and vLLM open. The other direction is `model.pretrained`."""

import functools
import json
import math
import os
import pathlib
import shutil
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any, NamedTuple

import numpy as np
import safetensors.numpy

from dialog_jax import atomic_files
from dialog_jax.errors import UserError
from dialog_jax.formats import tokenizer_files
from dialog_jax.model import (
    decoder,
    hf_config,
    model_files,
    parameter_trees,
    tensor_files,
    tensor_names,
)
from dialog_jax.model.decoder_config import DecoderConfig

_SHARD_BYTES = 5 * 10**9


def save_pretrained(
    directory: str | os.PathLike[str], config: DecoderConfig, parameters: Mapping[str, Any], **options: Any
) -> None:
    """Writes what `write_model` writes to a directory that appears when it is complete.

    Args:
      options: those of `write_model`.

    Raises:
      UserError: `directory` exists and is not empty, or what `write_model` raises.
    """
    directory = pathlib.Path(os.path.abspath(directory))
    if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        raise UserError(f"{directory} exists already; give a new directory, or remove this one")
    with atomic_files.new_directory(directory) as unfinished:
        write_model(unfinished, config, parameters, **options)


def write_model(
    directory: pathlib.Path,
    config: DecoderConfig,
    parameters: Mapping[str, Any],
    *,
    tokenizer: Any = None,
    stop_tokens: Collection[int] = (),
    generation: Mapping[str, Any] | None = None,
    dtype: str = "float32",
    shard_bytes: int = _SHARD_BYTES,
    wrapper: pathlib.Path | None = None,
) -> None:
    """Writes files that Hugging Face transformers and vLLM open: weights, config, generation config and tokenizer.

    Args:
      directory: empty.
      stop_tokens: ids at which generation ends; empty for those of `generation`, or else the tokenizer's end token.
      generation: further fields of generation_config.json.
      dtype: of the weights: float32, float16 or bfloat16.
      wrapper: directory of the model that contains this decoder, for instance beside a vision tower: all its other
        tensors, fields and processors are written as they are there. None if there is none.

    Raises:
      UserError: parameters and config do not fit, or a parameter is too large for float16.
    """
    flat, needed = parameter_trees.flatten(parameters), parameter_trees.flatten(decoder.abstract_parameters(config))
    for key in sorted(flat.keys() | needed.keys()):
        got = tuple(flat[key].shape) if key in flat else None
        if key not in needed or got != needed[key].shape:
            raise UserError(
                f"parameter {key} has shape {got}, but its config needs {needed[key].shape if key in needed else None}"
            )
    weights, fields = _list_weights(config, flat, np.dtype(dtype)), hf_config.to_json(config, dtype)
    if wrapper is None:
        _save_weights(directory, weights, shard_bytes)
        fields |= _list_token_ids(tokenizer)
    else:
        with tensor_files.open_safetensors(wrapper) as tensors:
            _save_weights(directory, _wrap_weights(weights, tensors, config), shard_bytes)
        fields = hf_config.wrap_json(tensor_files.read_json(wrapper / "config.json"), fields)
        for file in wrapper.glob("*processor_config.json"):
            shutil.copyfile(file, directory / file.name)
    _write_json(directory / "config.json", fields)
    for file in directory.glob("*.safetensors"):
        shutil.copymode(directory / "config.json", file)  # safetensors makes its files readable only by their owner
    write_tokenizer(directory, tokenizer, stop_tokens=stop_tokens, generation=generation)


def write_tokenizer(
    directory: pathlib.Path,
    tokenizer: Any,
    *,
    stop_tokens: Collection[int] = (),
    generation: Mapping[str, Any] | None = None,
) -> None:
    """Writes a tokenizer, if it is not None, and generation_config.json.

    Args:
      stop_tokens: ids at which generation ends; empty for those of `generation`, or else the tokenizer's end token.
      generation: further fields of generation_config.json.
    """
    ids = {name: value for name, value in _list_token_ids(tokenizer).items() if value is not None}
    fields = ids | dict(generation or {})
    if stop_tokens and {*stop_tokens} != model_files.list_ids(fields.get("eos_token_id")):
        fields["eos_token_id"] = sorted(stop_tokens)
    _write_json(directory / "generation_config.json", fields)
    if tokenizer is not None:
        tokenizer_files.save_tokenizer(tokenizer, directory)


def _list_token_ids(tokenizer: Any) -> dict[str, int | None]:
    return {f"{kind}_token_id": getattr(tokenizer, f"{kind}_token_id", None) for kind in ("bos", "eos", "pad")}


def _write_json(file: pathlib.Path, fields: Mapping[str, Any]) -> None:
    file.write_text(json.dumps(fields, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _wrap_weights(
    weights: Mapping[str, "_Tensor"], tensors: tensor_files.Tensors, config: DecoderConfig
) -> dict[str, "_Tensor"]:
    """Returns the tensors of a decoder by the names that they have in a wrapper, and the wrapper's others."""
    own = {tensors.stored_names.get(name, name): weight for name, weight in weights.items()}
    decoders = weights.keys() | ({tensor_names.UNEMBEDDING} if config.tie_embeddings else set())
    others = {
        tensors.stored_names[name]: _Tensor(tensors.count_bytes(name), functools.partial(tensors.read, name))
        for name in tensors.shapes.keys() - decoders
    }
    return own | others


class _Tensor(NamedTuple):
    """A tensor to be written."""

    bytes: int
    read: Callable[[], np.ndarray]


def _list_weights(config: DecoderConfig, flat: Mapping[str, Any], dtype: np.dtype) -> dict[str, _Tensor]:
    """Returns the tensors of a decoder by their published names."""
    interleaved = tensor_names.find_interleaved(config)

    def describe(name, parts):
        size = sum(dtype.itemsize * math.prod(flat[key].shape) // _count_parts(config, key) for key, _ in parts)

        def read():
            arrays = [_to_published(config, flat[key], key, index, dtype) for key, index in parts]
            return _join(arrays, interleaved=name in interleaved)

        return _Tensor(size, read)

    return {name: describe(name, parts) for name, parts in _list_tensors(config, flat).items()}


def _save_weights(directory: pathlib.Path, tensors: Mapping[str, _Tensor], shard_bytes: int) -> None:
    shards: list[list[str]] = [[]]
    filled = 0
    for name in sorted(tensors):
        if shards[-1] and filled + tensors[name].bytes > shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += tensors[name].bytes
    files = [f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
    if len(shards) == 1:
        files = ["model.safetensors"]
    for file, names in zip(files, shards, strict=True):
        arrays = {name: np.ascontiguousarray(tensors[name].read()) for name in names}
        safetensors.numpy.save_file(arrays, directory / file, metadata={"format": "pt"})
    if len(shards) > 1:
        weight_map = {name: file for file, names in zip(files, shards, strict=True) for name in names}
        total = sum(tensor.bytes for tensor in tensors.values())
        _write_json(
            directory / "model.safetensors.index.json", {"metadata": {"total_size": total}, "weight_map": weight_map}
        )


def _list_tensors(config: DecoderConfig, keys: Iterable[str]) -> dict[str, list[tuple[str, int]]]:
    """Returns {published name: the (parameter, index of its part) that it holds, in order}."""
    places = {name: (key, index) for key in keys for index, name in enumerate(tensor_names.list_names(config, key))}
    shared = tensor_names.find_fused(config) | tensor_names.find_interleaved(config)
    alone = places.keys() - {part for parts in shared.values() for part in parts}
    joined = {name: [places[part] for part in parts] for name, parts in shared.items()}
    return joined | {name: [places[name]] for name in alone}


def _count_parts(config: DecoderConfig, key: str) -> int:
    return len(tensor_names.list_names(config, key))


def _join(arrays: list[np.ndarray], *, interleaved: bool) -> np.ndarray:
    if interleaved:
        return np.stack(arrays, axis=-1).reshape(*arrays[0].shape[:-1], -1)
    return arrays[0] if len(arrays) == 1 else np.concatenate(arrays)


def _to_published(config: DecoderConfig, leaf: Any, key: str, index: int, dtype: np.dtype) -> np.ndarray:
    stacked = leaf.shape[: tensor_names.count_stacked_axes(config, key)]
    array = np.asarray(leaf[np.unravel_index(index, stacked)] if stacked else leaf)
    with np.errstate(over="ignore"):
        converted = array.astype(dtype)
    if np.isfinite(array).all() and not np.isfinite(converted).all():
        raise UserError(
            f"parameter {key} has numbers up to {np.abs(array).max():.3g}, which are too large for {dtype.name}. "
            "Choose bfloat16 or float32."
        )
    return np.ascontiguousarray(converted.T if tensor_names.is_transposed(config, key) else converted)
