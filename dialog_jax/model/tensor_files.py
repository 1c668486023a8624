"""Files of tensors, read lazily: safetensors (one file or shards, with an index or without) and GGUF.

A file that is missing, truncated or inconsistent is an error that names it. Yields tensors by Hugging Face's names or
llama.cpp's; knows no parameter of ours.
"""

import collections
import contextlib
import json
import math
import pathlib
import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import gguf
import numpy as np
import safetensors

from dialog_jax.errors import UserError
from dialog_jax.formats import gguf_file, mxfp4
from dialog_jax.model import tensor_names
from dialog_jax.model.decoder_config import DecoderConfig

_SINGLE, _INDEX_SUFFIX = "model.safetensors", ".safetensors.index.json"
_SHARD = re.compile(r"(.*)-(\d{5})-of-(\d{5})\.safetensors")
_DTYPES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}  # in both formats


class Tensors(NamedTuple):
    """The tensors of a model, read on request."""

    where: pathlib.Path  # for errors
    shapes: Mapping[str, tuple[int, ...]]
    files: Mapping[str, pathlib.Path]
    dtypes: Mapping[str, str]
    """As the files spell them: F32, BF16, Q4_1."""
    read: Callable[[str], np.ndarray]
    others: tuple[str, ...] = ()
    """Names of tensors that belong to other parts than the decoder."""
    stored_names: Mapping[str, str] = {}
    """The name in the file of each tensor of a safetensors file."""

    def leave_out(self, names: Collection[str]) -> "Tensors":
        """Returns the tensors without some, which are listed in `others`."""
        if not names:
            return self
        return self._replace(
            shapes={name: shape for name, shape in self.shapes.items() if name not in names},
            files={name: file for name, file in self.files.items() if name not in names},
            dtypes={name: dtype for name, dtype in self.dtypes.items() if name not in names},
            others=(*self.others, *sorted(names)),
        )

    def split(self, fused: Mapping[str, Sequence[str]], rows: Mapping[str, int]) -> "Tensors":
        """Returns the tensors with parts in the place of those that hold several parameters, one below the other.

        Args:
          fused: {name of such a tensor: names of its parts, from the top}; a tensor that is missing is skipped.
          rows: of each part.
        """
        places = {}  # of each part: (tensor, first row)
        for name, parts in fused.items():
            first = 0
            for part in parts if name in self.shapes else ():
                places[part] = (name, first)
                first += rows[part]
            if name in self.shapes and first != self.shapes[name][0]:
                raise UserError(
                    f"{self.files[name]}: tensor {name} has {self.shapes[name][0]} rows, but its config needs {first}; "
                    "config.json and weights belong to different models"
                )

        def pick(table):
            kept = {name: value for name, value in table.items() if name not in fused}
            return kept | {part: table[name] for part, (name, _) in places.items()}

        def read(name):
            if name not in places:
                return self.read(name)
            whole, first = places[name]
            return self.read(whole)[first : first + rows[name]]

        shapes = pick(self.shapes)
        shapes |= {part: (rows[part], *shapes[part][1:]) for part in places}
        return self._replace(shapes=shapes, files=pick(self.files), dtypes=pick(self.dtypes), read=read)

    def deinterleave(self, interleaved: Mapping[str, Sequence[str]]) -> "Tensors":
        """Returns the tensors with parts in the place of those in whose last axis several parameters alternate.

        Args:
          interleaved: {name of such a tensor: names of its parts}; a tensor that is missing is skipped.
        """
        places = {  # of each part: (tensor, first index, number of parts)
            part: (name, first, len(parts))
            for name, parts in interleaved.items()
            if name in self.shapes
            for first, part in enumerate(parts)
        }
        if not places:
            return self

        def pick(table):
            kept = {name: value for name, value in table.items() if name not in interleaved}
            return kept | {part: table[name] for part, (name, *_) in places.items()}

        def read(name):
            if name not in places:
                return self.read(name)
            whole, first, count = places[name]
            return self.read(whole)[..., first::count]

        shapes = pick(self.shapes)
        for part, (_, first, count) in places.items():
            shapes[part] = (*shapes[part][:-1], len(range(first, shapes[part][-1], count)))
        return self._replace(shapes=shapes, files=pick(self.files), dtypes=pick(self.dtypes), read=read)

    def decode_mxfp4(self) -> "Tensors":
        """Returns the tensors with bfloat16 matrices of experts in the place of their blocks and scales."""
        names = {name.removesuffix(mxfp4.BLOCKS) for name in self.shapes if name.endswith(mxfp4.BLOCKS)}
        parts = {name: (f"{name}{mxfp4.BLOCKS}", f"{name}{mxfp4.SCALES}") for name in names}
        for blocks, scales in parts.values():
            shape = self.shapes[blocks]
            if self.shapes.get(scales) != shape[:-1] or len(shape) != 4 or self.dtypes[blocks] != "U8":
                raise UserError(
                    f"{self.files[blocks]}: {blocks} has shape {list(shape)}, which does not fit {scales}; bytes "
                    "[experts, out, groups, 16] and scales [experts, out, groups] are needed. Download it again."
                )

        def replace(table, make):
            kept = {name: value for name, value in table.items() if not name.endswith((mxfp4.BLOCKS, mxfp4.SCALES))}
            return kept | {name: make(blocks) for name, (blocks, _) in parts.items()}

        def read(name):
            return mxfp4.decode(*map(self.read, parts[name])) if name in parts else self.read(name)

        return self._replace(
            shapes=replace(self.shapes, lambda blocks: mxfp4.find_shape(self.shapes[blocks])),
            files=replace(self.files, self.files.get),
            dtypes=replace(self.dtypes, lambda _: "BF16"),
            read=read,
        )

    def count_bytes(self, name: str) -> int:
        """Returns the bytes of a tensor of a safetensors file."""
        bits = int(re.sub(r"\D", "", self.dtypes[name].partition("_")[0]) or 8)  # BF16, F8_E4M3, U8, BOOL
        return math.prod(self.shapes[name]) * bits // 8

    def find_dtype(self) -> str:
        """Returns the type of most of the numbers: float32, float16 or bfloat16; float32 if they are quantized."""
        counts: collections.Counter[str] = collections.Counter()
        for name, shape in self.shapes.items():
            counts[self.dtypes[name]] += math.prod(shape)
        return _DTYPES.get(counts.most_common(1)[0][0], "float32") if counts else "float32"


def has_safetensors(directory: pathlib.Path) -> bool:
    """Returns whether a directory has weights that `open_safetensors` looks for."""
    return any(directory.glob("*.safetensors"))


@contextlib.contextmanager
def open_safetensors(directory: pathlib.Path, *, wrapped: bool = False) -> Iterator[Tensors]:
    """Yields the tensors of a Hugging Face directory, by their names in a causal language model.

    Args:
      wrapped: the decoder is part of another model; tensors of its other parts are listed in `others`.

    Raises:
      UserError: a file is missing, broken, or outside the directory.
    """
    index, shards = _find_shards(directory)
    weight_map = _read_weight_map(index) if index else {}
    with contextlib.ExitStack() as stack:
        handles, files, shapes, dtypes = {}, {}, {}, {}
        for shard in shards:
            file = directory / shard
            if not file.exists():
                raise UserError(f"{file} does not exist; weights are read from safetensors (or a .gguf file) only")
            try:
                handle = stack.enter_context(safetensors.safe_open(file, framework="numpy"))
                for name in handle.keys():  # noqa: SIM118  (not a dict)
                    entry = handle.get_slice(name)
                    handles[name], files[name] = handle, file
                    shapes[name], dtypes[name] = tuple(entry.get_shape()), entry.get_dtype()
            except (OSError, safetensors.SafetensorError) as error:
                raise UserError(f"{file} is not a complete safetensors file: {error}. Download it again.") from error
        for name in weight_map.keys() - shapes.keys():
            assert index is not None
            raise UserError(
                f"{directory / weight_map[name]}: tensor {name} of {index.name} is missing; download it again"
            )
        try:
            standard = tensor_names.standardize_names(shapes.keys())
        except UserError as error:
            raise UserError(f"{directory}: {error}") from None
        others = tuple(sorted(shapes.keys() - standard.keys()))
        if not wrapped:  # then they are unexpected
            standard |= {name: name for name in others}
        original = {new: old for old, new in standard.items()}
        if len(original) < len(standard):
            twice = collections.Counter(standard.values()).most_common(1)[0][0]
            names = " and ".join(old for old, new in standard.items() if new == twice)
            raise UserError(f"{directory}: {names} name the same tensor; save the model again")
        yield Tensors(
            directory,
            {new: shapes[old] for new, old in original.items()},
            {new: files[old] for new, old in original.items()},
            {new: dtypes[old] for new, old in original.items()},
            lambda name: handles[original[name]].get_tensor(original[name]),
            others if wrapped else (),
            original,
        )


def _find_shards(directory: pathlib.Path) -> tuple[pathlib.Path | None, list[str]]:
    """Returns (the index, if there is one; names of the weight files).

    As transformers does: model.safetensors, otherwise the files of model.safetensors.index.json. Without both, files of
    other names if there is no doubt about them.
    """
    names = sorted(file.name for file in directory.glob("*.safetensors"))
    indices = sorted(file for file in directory.iterdir() if file.name.endswith(_INDEX_SUFFIX))
    index = directory / f"model{_INDEX_SUFFIX}"
    if _SINGLE in names:
        return None, [_SINGLE]
    if index in indices or len(indices) == 1:
        index = index if index in indices else indices[0]
        return index, sorted(set(_read_weight_map(index).values()))
    if len(names) == 1 and not _SHARD.fullmatch(names[0]):
        return None, names
    shards = [match for match in map(_SHARD.fullmatch, names) if match]
    if shards and len({(match[1], match[3]) for match in shards}) == 1 and len(shards) == len(names):
        stem, count = shards[0][1], int(shards[0][3])
        return None, [f"{stem}-{number:05d}-of-{count:05d}.safetensors" for number in range(1, count + 1)]
    raise UserError(
        f"{directory / _SINGLE} does not exist, and there is no model{_INDEX_SUFFIX}; the directory has "
        f"{', '.join(names) or 'no .safetensors file'}. Weights are read from safetensors (or a .gguf file) only."
    )


def _read_weight_map(index: pathlib.Path) -> Mapping[str, str]:
    """Returns {tensor: file} of an index, whose files lie beside it."""
    weight_map = read_json(index).get("weight_map") or {}
    if not isinstance(weight_map, dict) or not all(isinstance(shard, str) for shard in weight_map.values()):
        raise UserError(f"{index}: weight_map does not map names to file names; download or save the model again")
    for shard in set(weight_map.values()):
        # Checked by name, since files in the Hub's cache are links to files elsewhere.
        if pathlib.PurePath(shard).name != shard or "\\" in shard or shard in ("", ".", ".."):
            raise UserError(f"{index}: {shard!r} is not a file name; shards must lie beside the index")
    if not weight_map:
        raise UserError(f"{index} lists no tensors; download or save the model again")
    return weight_map


@contextlib.contextmanager
def gguf_tensors(path: pathlib.Path, config: DecoderConfig) -> Iterator[Tensors]:
    """Yields the tensors of a .gguf file, dequantized, as Hugging Face publishes them.

    llama.cpp stores rotary components of llama in another order, and norms with the offset that the model adds.
    """
    tensors = {tensor.name: tensor for tensor in gguf_file.open_gguf(path).tensors}
    shapes = {name: tuple(int(size) for size in reversed(tensor.shape)) for name, tensor in tensors.items()}
    dtypes = {name: tensor.tensor_type.name for name, tensor in tensors.items()}
    # llama.cpp pairs rotary components (2i, 2i + 1) for llama only; Hugging Face pairs (i, i + H/2) for all families.
    interleaved = ("attn_q.weight", "attn_k.weight", "attn_q.bias", "attn_k.bias") if config.family == "llama" else ()

    def read(name):
        array = gguf.quants.dequantize(tensors[name].data, tensors[name].tensor_type).reshape(shapes[name])
        if name.endswith(interleaved):
            pairs = array.reshape(-1, config.head_dim // 2, 2, *array.shape[1:])
            array = pairs.swapaxes(1, 2).reshape(array.shape)
        if name.endswith("norm.weight"):
            array = array - np.float32(config.norm_offset)
        return array

    yield Tensors(path, shapes, dict.fromkeys(shapes, path), dtypes, read)


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
