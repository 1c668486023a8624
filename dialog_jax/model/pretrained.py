"""Published checkpoints to parameters and back.

In: a Hugging Face model directory (config.json and safetensors), a GGUF file, or a hub name. Out: a `DecoderConfig` and
the nested dict of parameters; in the other direction, a directory that Hugging Face transformers and vLLM open. One
table of names serves both directions.
"""

import hashlib
import json
import math
import os
import pathlib
import shutil
from collections.abc import Callable, Collection, Mapping
from typing import Any, NamedTuple

import huggingface_hub
import jax
import ml_dtypes
import numpy as np
import safetensors.numpy

from dialog_jax.errors import UserError
from dialog_jax.formats import gguf_file, tokenizer_files
from dialog_jax.model import decoder, hf_config, tensor_files

_SHARD_BYTES = 5 * 10**9

Path = tuple[str, ...]
Sharding = Callable[[Path, tuple[int, ...]], jax.sharding.Sharding]


class _Name(NamedTuple):
    published: str  # Hugging Face's name; {} is the layer
    gguf: str
    transposed: bool = False  # published matrices are [out, in], ours [in, out]


_NAMES: dict[str, _Name] = {
    "embedding": _Name("model.embed_tokens.weight", "token_embd.weight"),
    "final_norm": _Name("model.norm.weight", "output_norm.weight"),
    "lm_head": _Name("lm_head.weight", "output.weight"),
    "layers/attention_norm": _Name("model.layers.{}.input_layernorm.weight", "blk.{}.attn_norm.weight"),
    "layers/attention/w_query": _Name("model.layers.{}.self_attn.q_proj.weight", "blk.{}.attn_q.weight", True),
    "layers/attention/w_key": _Name("model.layers.{}.self_attn.k_proj.weight", "blk.{}.attn_k.weight", True),
    "layers/attention/w_value": _Name("model.layers.{}.self_attn.v_proj.weight", "blk.{}.attn_v.weight", True),
    "layers/attention/w_output": _Name("model.layers.{}.self_attn.o_proj.weight", "blk.{}.attn_output.weight", True),
    "layers/attention/b_query": _Name("model.layers.{}.self_attn.q_proj.bias", "blk.{}.attn_q.bias"),
    "layers/attention/b_key": _Name("model.layers.{}.self_attn.k_proj.bias", "blk.{}.attn_k.bias"),
    "layers/attention/b_value": _Name("model.layers.{}.self_attn.v_proj.bias", "blk.{}.attn_v.bias"),
    "layers/attention/b_output": _Name("model.layers.{}.self_attn.o_proj.bias", "blk.{}.attn_output.bias"),
    "layers/attention/query_norm": _Name("model.layers.{}.self_attn.q_norm.weight", "blk.{}.attn_q_norm.weight"),
    "layers/attention/key_norm": _Name("model.layers.{}.self_attn.k_norm.weight", "blk.{}.attn_k_norm.weight"),
    "layers/feed_forward_norm": _Name("model.layers.{}.post_attention_layernorm.weight", "blk.{}.ffn_norm.weight"),
    "layers/feed_forward/w_gate": _Name("model.layers.{}.mlp.gate_proj.weight", "blk.{}.ffn_gate.weight", True),
    "layers/feed_forward/w_up": _Name("model.layers.{}.mlp.up_proj.weight", "blk.{}.ffn_up.weight", True),
    "layers/feed_forward/w_down": _Name("model.layers.{}.mlp.down_proj.weight", "blk.{}.ffn_down.weight", True),
}


def resolve(name_or_path: str | os.PathLike[str]) -> pathlib.Path:
    """Returns a local directory or .gguf file as it is, otherwise the local copy of a Hub model, downloaded if needed.

    Raises:
      UserError: there is no such file, and no such model on the Hub.
    """
    path = pathlib.Path(name_or_path).expanduser()
    if path.exists():
        return path
    patterns = ["*.json", "*.safetensors", "*.txt", "*.model", "*.jinja"]
    try:
        return pathlib.Path(huggingface_hub.snapshot_download(str(name_or_path), allow_patterns=patterns))
    except (OSError, ValueError, huggingface_hub.errors.HfHubHTTPError) as error:
        raise UserError(
            f"model {str(name_or_path)!r} is no local directory or .gguf file and no model on the Hugging Face Hub "
            f"({type(error).__name__}: {str(error).partition(chr(10))[0]}). Check the spelling; offline, give "
            "the path of a downloaded model."
        ) from error


def load_config(path: str | os.PathLike[str]) -> decoder.DecoderConfig:
    """Returns the structure of the model in a Hugging Face directory or a .gguf file.

    Raises:
      UserError: config.json is missing or broken, the model type is unknown, or a setting is not supported.
    """
    path = pathlib.Path(path)
    if path.suffix == ".gguf":
        return hf_config.from_gguf(path, gguf_file.open_gguf(path))
    if (path / "model.json").exists():
        raise UserError(
            f"{path} is a run, not a model. Export it first: dialog_jax export --run={path} --out={path}/model"
        )
    return hf_config.from_json(path / "config.json", tensor_files.read_json(path / "config.json"))


def load_parameters(
    path: str | os.PathLike[str],
    config: decoder.DecoderConfig,
    *,
    sharding: Sharding | None = None,
    dtype: jax.typing.DTypeLike = np.float32,
) -> dict:
    """Returns the parameters in a Hugging Face directory or a .gguf file, read one stacked parameter at a time.

    Args:
      sharding: (path of a parameter, its shape) to its sharding; None for JAX's default device.

    Raises:
      UserError: a tensor is missing, unexpected or misshapen, or a file is truncated.
    """
    path = pathlib.Path(path)
    from_gguf = path.suffix == ".gguf"
    with tensor_files.gguf_tensors(path, config) if from_gguf else tensor_files.open_safetensors(path) as tensors:
        if config.layers > len(tensors.shapes):
            raise UserError(
                f"{tensors.where}: tensors are missing: it has {len(tensors.shapes):,}, and its config says "
                f"{config.layers:,} layers; they belong to different models"
            )
        flat = _flatten(decoder.abstract_parameters(config))
        published = {key: _list_names(key, config, from_gguf) for key in flat}
        _check_tensors(tensors, config, flat, published)
        return _unflatten({key: _load(tensors, key, flat[key].shape, published[key], sharding, dtype) for key in flat})


def _flatten(parameters: Mapping[str, Any]) -> dict[str, Any]:
    flat, _ = jax.tree.flatten_with_path(parameters)
    return {"/".join(entry.key for entry in path): leaf for path, leaf in flat}


def _unflatten(flat: Mapping[str, Any]) -> dict:
    parameters: dict = {}
    for key, leaf in flat.items():
        *parents, last = key.split("/")
        node = parameters
        for parent in parents:
            node = node.setdefault(parent, {})
        node[last] = leaf
    return parameters


def _list_names(key: str, config: decoder.DecoderConfig, from_gguf: bool = False) -> list[str]:
    """Returns the published names of a parameter: one per layer if it is stacked, otherwise one."""
    name = _NAMES[key].gguf if from_gguf else _NAMES[key].published
    return [name.format(layer) for layer in range(config.layers)] if "{}" in name else [name]


def _check_tensors(
    tensors: tensor_files.Tensors, config: decoder.DecoderConfig, flat: Mapping, published: Mapping[str, list[str]]
) -> None:
    expected: dict[str, tuple[int, ...]] = {}
    for key, names in published.items():
        shape = flat[key].shape[1:] if key.startswith("layers/") else flat[key].shape
        expected.update(dict.fromkeys(names, shape[::-1] if _NAMES[key].transposed else shape))
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


def _load(
    tensors: tensor_files.Tensors, key: str, shape, names: list[str], sharding: Sharding | None, dtype
) -> jax.Array:
    parameter = np.empty(shape, dtype)
    slots = parameter if key.startswith("layers/") else parameter[None]
    for slot, name in zip(slots, names, strict=True):
        array = tensors.read(name)
        if not np.issubdtype(array.dtype, np.floating) and array.dtype != ml_dtypes.bfloat16:
            raise UserError(
                f"{tensors.files[name]}: tensor {name} is {array.dtype}; float32, float16 or bfloat16 is needed. "
                "Quantized safetensors are not supported."
            )
        slot[...] = array.T if _NAMES[key].transposed else array
    if sharding is None:
        return jax.device_put(parameter)
    placement = sharding(tuple(key.split("/")), shape)
    return jax.make_array_from_callback(shape, placement, lambda index: parameter[index])


def stop_tokens(path: pathlib.Path) -> set[int]:
    """Returns the ids at which generation ends, from a model's config.json and generation_config.json."""
    ids: set[int] = set()
    for file in ("config.json", "generation_config.json"):
        if (path / file).is_file():
            ends = tensor_files.read_json(path / file).get("eos_token_id")
            ids.update(ends if isinstance(ends, list) else [] if ends is None else [ends])
    return ids


def fingerprint(path: pathlib.Path) -> str:
    """Returns a hash of a model's config and of its weight files' names, sizes, first and last MiB."""
    digest = hashlib.sha256()
    files = [path] if path.is_file() else [*sorted(path.glob("*.safetensors")), path / "config.json"]
    for file in files:
        digest.update(f"{file.name} {file.stat().st_size}\n".encode())
        with file.open("rb") as stream:
            digest.update(stream.read(1 << 20))
            stream.seek(max(0, file.stat().st_size - (1 << 20)))
            digest.update(stream.read())
    return digest.hexdigest()


def save_pretrained(
    directory: str | os.PathLike[str],
    config: decoder.DecoderConfig,
    parameters: Mapping[str, Any],
    *,
    tokenizer: Any = None,
    stop_tokens: Collection[int] = (),
    shard_bytes: int = _SHARD_BYTES,
) -> None:
    """Writes a directory that Hugging Face transformers and vLLM open: float32 weights, config and tokenizer.

    The directory appears by a rename when it is complete; an interrupted save leaves a directory `.NAME.partial`.

    Args:
      stop_tokens: ids at which generation ends; empty for the tokenizer's end token.

    Raises:
      UserError: `directory` exists and is not empty, or parameters and config do not fit.
    """
    directory = pathlib.Path(os.path.abspath(directory))
    if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        raise UserError(f"{directory} exists already; give a new directory, or remove this one")
    flat, needed = _flatten(parameters), _flatten(decoder.abstract_parameters(config))
    for key in sorted(flat.keys() | needed.keys()):
        got = tuple(flat[key].shape) if key in flat else None
        if key not in needed or got != needed[key].shape:
            raise UserError(
                f"parameter {key} has shape {got}, but its config needs {needed[key].shape if key in needed else None}"
            )
    partial = directory.with_name(f".{directory.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    _save_weights(partial, config, flat, shard_bytes)
    ids = {f"{kind}_token_id": getattr(tokenizer, f"{kind}_token_id", None) for kind in ("bos", "eos", "pad")}
    _write_json(partial / "config.json", hf_config.to_json(config) | ids)
    ends = {"eos_token_id": sorted(stop_tokens)} if stop_tokens else {}
    generation = {name: value for name, value in (ids | ends).items() if value is not None}
    _write_json(partial / "generation_config.json", generation)
    for file in partial.glob("*.safetensors"):
        shutil.copymode(partial / "config.json", file)  # safetensors makes its files readable only by their owner
    if tokenizer is not None:
        tokenizer_files.save_tokenizer(tokenizer, partial)
    partial.rename(directory)


def _write_json(file: pathlib.Path, fields: Mapping[str, Any]) -> None:
    file.write_text(json.dumps(fields, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _save_weights(
    directory: pathlib.Path, config: decoder.DecoderConfig, flat: Mapping[str, Any], shard_bytes: int
) -> None:
    plan = [(name, key, layer) for key in flat for layer, name in enumerate(_list_names(key, config))]
    sizes = {key: 4 * math.prod(leaf.shape) // len(_list_names(key, config)) for key, leaf in flat.items()}
    shards: list[list[tuple[str, str, int]]] = [[]]
    filled = 0
    for entry in sorted(plan):
        if shards[-1] and filled + sizes[entry[1]] > shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(entry)
        filled += sizes[entry[1]]
    files = [f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
    if len(shards) == 1:
        files = ["model.safetensors"]
    for file, entries in zip(files, shards, strict=True):
        arrays = {name: _to_published(flat[key], key, layer) for name, key, layer in entries}
        safetensors.numpy.save_file(arrays, directory / file, metadata={"format": "pt"})
    if len(shards) > 1:
        weight_map = {name: file for file, entries in zip(files, shards, strict=True) for name, _, _ in entries}
        index = {"metadata": {"total_size": sum(sizes[key] for _, key, _ in plan)}, "weight_map": weight_map}
        _write_json(directory / "model.safetensors.index.json", index)


def _to_published(leaf: Any, key: str, layer: int) -> np.ndarray:
    array = np.asarray(leaf[layer] if key.startswith("layers/") else leaf).astype(np.float32)
    return np.ascontiguousarray(array.T if _NAMES[key].transposed else array)
