"""Published checkpoints to parameters. The other direction is `model.saving`.

In: a Hugging Face model directory (config.json and safetensors), a GGUF file, or a hub name. Out: a `DecoderConfig` and
the nested dict of parameters, float or quantized.
"""

import dataclasses
import math
import os
import pathlib
from collections.abc import Callable, Mapping

import huggingface_hub
import jax
import ml_dtypes
import numpy as np

from dialog_jax.errors import UserError
from dialog_jax.formats import gguf_file
from dialog_jax.model import (
    decoder,
    gguf_config,
    hf_config,
    model_files,
    parameter_trees,
    quantization,
    tensor_files,
    tensor_names,
)
from dialog_jax.model.decoder_config import DecoderConfig
from dialog_jax.model.quantization import RoundingError

_BY_TOKEN = ("embedding", "lm_head")  # parameters with a row for each token

Path = tuple[str, ...]
Sharding = Callable[[Path, tuple[int, ...]], jax.sharding.Sharding]


def resolve(name_or_path: str | os.PathLike[str]) -> pathlib.Path:
    """Returns a local directory or .gguf file as it is, otherwise the local copy of a Hub model, downloaded if needed.

    Raises:
      UserError: there is no such file, and no such model on the Hub.
    """
    path = pathlib.Path(name_or_path).expanduser()
    if path.exists():
        return path
    patterns = ["*.json", "*.safetensors", "*.txt", "*.model", "*.jinja", *model_files.DOCUMENTS]
    try:
        return pathlib.Path(huggingface_hub.snapshot_download(str(name_or_path), allow_patterns=patterns))
    except (OSError, ValueError, huggingface_hub.errors.HfHubHTTPError) as error:
        raise UserError(
            f"model {str(name_or_path)!r} is no local directory or .gguf file and no model on the Hugging Face Hub "
            f"({type(error).__name__}: {str(error).partition(chr(10))[0]}). Check the spelling; offline, give "
            "the path of a downloaded model."
        ) from error


def load_config(path: str | os.PathLike[str]) -> DecoderConfig:
    """Returns the structure of the model in a Hugging Face directory or a .gguf file.

    Raises:
      UserError: config.json is missing or broken, the model type is unknown, or a setting is not supported.
    """
    path = pathlib.Path(path)
    if gguf_file.is_gguf(path):
        return gguf_config.from_gguf(path, gguf_file.open_gguf(path))
    if (path / "model.json").exists():
        raise UserError(
            f"{path} is a run, not a model. Export it first: dialog_jax export --run={path} --out={path}/model"
        )
    config = hf_config.from_json(path / "config.json", tensor_files.read_json(path / "config.json"))
    if config.tie_embeddings and tensor_files.has_safetensors(path) and model_files.is_untied(path):
        return dataclasses.replace(config, tie_embeddings=False)
    return config


def load_parameters(
    path: str | os.PathLike[str],
    config: DecoderConfig,
    *,
    sharding: Sharding | None = None,
    dtype: jax.typing.DTypeLike | Callable[[str], jax.typing.DTypeLike] = np.float32,
    added_rows: int = 0,
    find_kind: Callable[[str], str] = lambda path: "",
    report_error: Callable[[str, RoundingError], None] = lambda name, error: None,
) -> dict:
    """Returns the parameters in a Hugging Face directory or a .gguf file, read one stacked parameter at a time.

    Quantized matrices are read and quantized one layer at a time.

    Args:
      sharding: (path of a parameter, its shape) to its sharding; None for JAX's default device.
      dtype: of all parameters, or (path of a parameter, such as "layers/attention/w_query") to its type.
      added_rows: how many rows of the embedding, at its end, the files do not have. They, and those of the unembedding,
        are the mean of the others.
      find_kind: (path of a parameter) to the kind of `model.quantization`, or "" if it is not quantized.
      report_error: called with the published name of each quantized matrix and what quantization changed of it.

    Raises:
      UserError: a tensor is missing, unexpected or misshapen, or a file is truncated.
    """
    path = pathlib.Path(path)
    from_gguf = gguf_file.is_gguf(path)
    with model_files.open_tensors(path, config) as tensors:
        if config.layers > len(tensors.shapes):
            raise UserError(
                f"{tensors.where}: tensors are missing: it has {len(tensors.shapes):,}, and its config says "
                f"{config.layers:,} layers; they belong to different models"
            )
        flat = parameter_trees.flatten(decoder.abstract_parameters(config))
        published = {key: tensor_names.list_names(config, key, from_gguf) for key in flat}
        if config.tie_embeddings and not tensors.shapes.keys() & set(published["embedding"]) and not from_gguf:
            published["embedding"] = [tensor_names.UNEMBEDDING]  # one of the two is enough
        _check_tensors(tensors, config, flat, published, added_rows)

        def place(key: str, parameter: np.ndarray) -> jax.Array:
            if sharding is None:
                return jax.device_put(parameter)
            placement = sharding(tuple(key.split("/")), parameter.shape)
            return jax.make_array_from_callback(parameter.shape, placement, lambda index: parameter[index])

        def load(key: str) -> jax.Array | dict[str, jax.Array]:
            if kind := find_kind(key):
                arrays = _read_quantized(tensors, kind, flat[key].shape, published[key], report_error)
                return {name: place(f"{key}/{name}", array) for name, array in arrays.items()}
            key_dtype = dtype(key) if callable(dtype) and not isinstance(dtype, type) else dtype
            return place(
                key, _read_parameter(tensors, config, key, flat[key].shape, published[key], key_dtype, added_rows)
            )

        return parameter_trees.unflatten({key: load(key) for key in flat})


def _check_tensors(
    tensors: tensor_files.Tensors,
    config: DecoderConfig,
    flat: Mapping,
    published: Mapping[str, list[str]],
    added_rows: int,
) -> None:
    expected: dict[str, tuple[int, ...]] = {}
    for key, names in published.items():
        shape = flat[key].shape[tensor_names.count_stacked_axes(config, key) :]
        if key in _BY_TOKEN:
            shape = (shape[0] - added_rows, *shape[1:])
        expected.update(dict.fromkeys(names, shape[::-1] if tensor_names.is_transposed(config, key) else shape))
    # Redundant: a copy of a tied unembedding, and the rotary buffers that old releases of transformers wrote.
    known = expected.keys() | ({"lm_head.weight"} if config.tie_embeddings else set())
    unexpected = sorted(name for name in tensors.shapes.keys() - known if not name.endswith("rotary_emb.inv_freq"))
    missing = sorted(expected.keys() - tensors.shapes.keys())
    if missing:
        raise UserError(
            f"{tensors.where}: tensor {missing[0]} is missing ({len(missing)} missing in all). The file is incomplete, "
            "or its config.json belongs to another model; download or save it again."
        )
    if unexpected:
        raise UserError(
            f"{tensors.files[unexpected[0]]}: tensor {unexpected[0]} is not part of a {config.family} model of this "
            f"config ({len(unexpected)} unexpected in all); check config.json (layers, biases, tie_word_embeddings)"
        )
    for name, needed in expected.items():
        if (got := tensors.shapes[name]) != needed:
            raise UserError(
                f"{tensors.files[name]}: tensor {name} has shape {list(got)}, but its config needs {list(needed)}; "
                "config.json and weights belong to different models"
            )


def _read_parameter(
    tensors: tensor_files.Tensors,
    config: DecoderConfig,
    key: str,
    shape: tuple[int, ...],
    names: list[str],
    dtype: jax.typing.DTypeLike,
    added_rows: int,
) -> np.ndarray:
    parameter = np.empty(shape, dtype)
    slots = parameter.reshape(-1, *shape[tensor_names.count_stacked_axes(config, key) :])
    for slot, name in zip(slots, names, strict=True):
        array = _read_tensor(tensors, name)
        if key in _BY_TOKEN and added_rows:
            slot[-added_rows:] = array.mean(axis=0, dtype=np.float64)
            slot = slot[:-added_rows]
        slot[...] = array.T if tensor_names.is_transposed(config, key) else array
    return parameter


def _read_tensor(tensors: tensor_files.Tensors, name: str) -> np.ndarray:
    array = tensors.read(name)
    if not np.issubdtype(array.dtype, np.floating) and array.dtype != ml_dtypes.bfloat16:
        raise UserError(
            f"{tensors.files[name]}: tensor {name} is {array.dtype}; float32, float16 or bfloat16 is needed. "
            "Quantized safetensors are not supported."
        )
    return array


def _read_quantized(
    tensors: tensor_files.Tensors,
    kind: str,
    shape: tuple[int, ...],
    names: list[str],
    report_error: Callable[[str, RoundingError], None],
) -> dict[str, np.ndarray]:
    """Returns the arrays of a quantized matrix of all layers; one layer at a time is in memory as it is published."""
    arrays = {
        name: np.empty(leaf.shape, leaf.dtype) for name, leaf in quantization.abstract_quantized(kind, shape).items()
    }
    for layer, tensor in enumerate(names):
        quantized, error = quantization.quantize(kind, _read_tensor(tensors, tensor).T)
        if not math.isfinite(error.squared_error):
            raise UserError(
                f"{tensors.files[tensor]}: tensor {tensor} has weights that are not finite, which cannot be quantized. "
                "Set frozen_dtype=float32, or use another model."
            )
        for name, array in quantized.items():
            arrays[name][layer] = array
        report_error(tensor, error)
    return arrays
