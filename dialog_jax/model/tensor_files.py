"""Files of tensors, read lazily: safetensors (one file or shards with an index) and GGUF.

A file that is missing, truncated or inconsistent is an error that names it. Knows only published tensor names.
"""

import contextlib
import json
import pathlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import gguf
import numpy as np
import safetensors

from dialog_jax.errors import UserError
from dialog_jax.formats import gguf_file
from dialog_jax.model import decoder


class Tensors(NamedTuple):
    """The tensors of a model, read on request."""

    where: pathlib.Path  # for errors
    shapes: Mapping[str, tuple[int, ...]]
    files: Mapping[str, pathlib.Path]
    read: Callable[[str], np.ndarray]


@contextlib.contextmanager
def open_safetensors(directory: pathlib.Path) -> Iterator[Tensors]:
    """Yields the tensors of a Hugging Face directory.

    Raises:
      UserError: a file is missing, broken, or outside the directory.
    """
    index = directory / "model.safetensors.index.json"
    weight_map: Mapping[str, str] = {}
    if index.exists():
        weight_map = read_json(index).get("weight_map") or {}
        if not isinstance(weight_map, dict) or not all(isinstance(shard, str) for shard in weight_map.values()):
            raise UserError(f"{index}: weight_map does not map names to file names; download or save the model again")
        shards = sorted(set(weight_map.values()))
        for shard in shards:
            # Checked by name, since files in the Hub's cache are links to files elsewhere.
            if pathlib.PurePath(shard).name != shard or "\\" in shard or shard in ("", ".", ".."):
                raise UserError(f"{index}: {shard!r} is not a file name; shards must lie beside the index")
    else:
        shards = ["model.safetensors"]
    if not shards:
        raise UserError(f"{index} lists no tensors; download or save the model again")
    with contextlib.ExitStack() as stack:
        handles, files, shapes = {}, {}, {}
        for shard in shards:
            file = directory / shard
            if not file.exists():
                raise UserError(f"{file} does not exist; weights are read from safetensors (or a .gguf file) only")
            try:
                handle = stack.enter_context(safetensors.safe_open(file, framework="numpy"))
                for name in handle.keys():  # noqa: SIM118  (not a dict)
                    handles[name], files[name] = handle, file
                    shapes[name] = tuple(handle.get_slice(name).get_shape())
            except (OSError, safetensors.SafetensorError) as error:
                raise UserError(f"{file} is not a complete safetensors file: {error}. Download it again.") from error
        for name in weight_map.keys() - shapes.keys():
            raise UserError(
                f"{directory / weight_map[name]}: tensor {name} of {index.name} is missing; download it again"
            )
        yield Tensors(directory, shapes, files, lambda name: handles[name].get_tensor(name))


@contextlib.contextmanager
def gguf_tensors(path: pathlib.Path, config: decoder.DecoderConfig) -> Iterator[Tensors]:
    """Yields the tensors of a .gguf file, dequantized, with rotary components paired as Hugging Face does."""
    tensors = {tensor.name: tensor for tensor in gguf_file.open_gguf(path).tensors}
    shapes = {name: tuple(int(size) for size in reversed(tensor.shape)) for name, tensor in tensors.items()}
    # llama.cpp pairs rotary components (2i, 2i + 1) for llama only; Hugging Face pairs (i, i + H/2) for all families.
    interleaved = ("attn_q.weight", "attn_k.weight", "attn_q.bias", "attn_k.bias") if config.family == "llama" else ()

    def read(name):
        array = gguf.quants.dequantize(tensors[name].data, tensors[name].tensor_type).reshape(shapes[name])
        if name.endswith(interleaved):
            pairs = array.reshape(-1, config.head_dim // 2, 2, *array.shape[1:])
            array = pairs.swapaxes(1, 2).reshape(array.shape)
        return array

    yield Tensors(path, shapes, dict.fromkeys(shapes, path), read)


def read_json(file: pathlib.Path) -> dict[str, Any]:
    """Returns the object in a JSON file.

    Raises:
      UserError: the file is missing, is not JSON, or holds anything but an object.
    """
    try:
        fields = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{file} does not exist; a model is a directory with config.json, or a .gguf file") from None
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise UserError(f"{file} cannot be read as JSON: {error}. Download or save the model again.") from error
    if not isinstance(fields, dict):
        raise UserError(f"{file} holds a {type(fields).__name__}, not an object; download or save the model again")
    return fields
