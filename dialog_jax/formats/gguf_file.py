"""GGUF files, opened only if the lengths in their header are consistent with their size.

The published reader trusts every length in a file, so one flipped bit can make it loop without end. Here the header is
checked first, in time and memory bounded by the file's size. Tokenizers and weights are both read from such files. A
model that llama.cpp has split into several files is read as one.
"""

import math
import mmap
import pathlib
import re
import struct
from collections.abc import Mapping
from typing import Any, NamedTuple

import gguf

from dialog_jax.errors import UserError

_SCALARS = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}  # size in bytes of each scalar type
_STRING, _ARRAY = 8, 9
_MAX_ENTRIES = 1 << 22  # of all arrays together (tokens, scores, types, merges): the reader keeps an object for each
_MAX_DIMENSIONS = 4
_MAX_ELEMENTS_PER_BYTE = 8  # more than in the densest of quantized types


_SPLIT = re.compile(r"(.*)-(\d{5})-of-(\d{5})(\.gguf)", re.IGNORECASE)


class Gguf(NamedTuple):
    """The content of a file, or of all files of a model that was split."""

    fields: Mapping[str, gguf.ReaderField]
    """Of the first file; the others have only fields about the split."""
    tensors: list[gguf.ReaderTensor]


def is_gguf(path: pathlib.Path) -> bool:
    """Returns whether the name of a path is that of a GGUF file."""
    return path.suffix.lower() == ".gguf"


def list_files(path: pathlib.Path) -> list[pathlib.Path]:
    """Returns the files of the model of which `path` is one: m-00001-of-00002.gguf and m-00002-of-00002.gguf, or it."""
    match = _SPLIT.fullmatch(path.name)
    if not match:
        return [path]
    stem, _, count, suffix = match.groups()
    return [path.with_name(f"{stem}-{number:05d}-of-{count}{suffix}") for number in range(1, int(count) + 1)]


def open_gguf(path: pathlib.Path) -> Gguf:
    """Returns the content of a model; its tensors are read on request.

    Args:
      path: the file, or any file of a model that was split.

    Raises:
      UserError: there is no such file, its header and its size disagree, or files of a split model are missing or do
        not belong together.
    """
    files = list_files(path)
    missing = [file.name for file in files if not file.exists()]
    if missing and path.exists():
        raise UserError(
            f"{path.name} is one of {len(files):,} files of a model, and {', '.join(missing)} "
            f"{'is' if len(missing) == 1 else 'are'} not beside it. Download all of them into one directory."
        )
    readers = [_open_file(file) for file in (files if path.exists() else [path])]
    tensors = [tensor for reader in readers for tensor in reader.tensors]
    counts = [contents(file, reader, "split.count", int) for file, reader in zip(files, readers, strict=False)]
    if len({tensor.name for tensor in tensors}) < len(tensors) or any(
        count not in (None, len(files)) for count in counts
    ):
        raise UserError(f"{path.name}: its {len(files):,} files do not belong together. Download all of them again.")
    return Gguf(readers[0].fields, tensors)


def _open_file(path: pathlib.Path) -> gguf.GGUFReader:
    try:
        with path.open("rb") as stream, mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as content:
            _Header(content).check()
        reader = gguf.GGUFReader(path)
        _check_places(reader)
    except FileNotFoundError:
        raise UserError(f"{path.name}: no such file. Check the path.") from None
    except (OSError, ValueError, IndexError, KeyError, OverflowError, struct.error) as error:
        raise UserError(f"{path.name} is not a complete GGUF file: {error}. Download it again.") from error
    return reader


def contents(path: pathlib.Path, reader: Gguf | gguf.GGUFReader, name: str, kind: type, *, many: bool = False) -> Any:
    """Returns the value of a field, or None if there is no such field.

    Args:
      kind: type of the value: str, int or float.
      many: the value is a list with entries of that type.

    Raises:
      UserError: the value has another type, or is not valid text; names the file and the field.
    """
    field = reader.fields.get(name)
    if field is None:
        return None
    try:
        value = field.contents()
    except (ValueError, IndexError) as error:
        raise UserError(f"{path.name}: field {name} cannot be read: {error}. Download the file again.") from None
    if isinstance(value, list) != many or not all(isinstance(entry, kind) for entry in (value if many else [value])):
        needed = f"{'a list of ' if many else ''}{kind.__name__}"
        raise UserError(f"{path.name}: field {name} is {str(value)[:40]}; needed {needed}. Download the file again.")
    return value


def _check_places(reader: gguf.GGUFReader) -> None:
    """Raises UserError where two tensors share bytes."""
    end = 0
    for tensor in sorted(reader.tensors, key=lambda tensor: tensor.data_offset):
        if tensor.data_offset < end:
            raise UserError(f"tensor {tensor.name} overlaps another")
        end = tensor.data_offset + tensor.n_bytes


class _Header:
    """A cursor in the header, which advances as values are read."""

    def __init__(self, content: mmap.mmap):
        self._content = content
        self._position = 4  # after the magic bytes
        self._order = "<"
        self._entries = 0

    def check(self) -> None:
        """Raises UserError if a length in the header goes beyond the file."""
        if self._content[:4] != b"GGUF":
            raise UserError("it does not begin with GGUF")
        if self._number("I") & 0xFFFF == 0:  # the version, written in big-endian order
            self._order = ">"
        tensors, fields = self._number("Q"), self._number("Q")
        for _ in range(fields):
            self._text()
            self._value(self._number("I"))
        for _ in range(tensors):
            self._tensor()

    def _skip(self, count: int) -> None:
        if count > len(self._content) - self._position:
            raise UserError(
                f"at byte {self._position:,} it announces {count:,} bytes, and ends after {len(self._content):,}"
            )
        self._position += count

    def _number(self, kind: str) -> int:
        start = self._position
        self._skip(struct.calcsize(kind))
        return struct.unpack_from(self._order + kind, self._content, start)[0]

    def _text(self) -> None:
        self._skip(self._number("Q"))

    def _value(self, kind: int) -> None:
        if kind in _SCALARS:
            self._skip(_SCALARS[kind])
        elif kind == _STRING:
            self._text()
        elif kind == _ARRAY:
            inner, count = self._number("I"), self._number("Q")
            self._entries += count
            if self._entries > _MAX_ENTRIES:
                raise UserError(f"its fields have at least {self._entries:,} entries, the limit is {_MAX_ENTRIES:,}")
            if inner == _ARRAY:
                raise UserError("it has an array of arrays, which is not supported")
            if inner in _SCALARS:
                self._skip(_SCALARS[inner] * count)
            else:
                for _ in range(count):
                    self._value(inner)
        else:
            raise UserError(f"at byte {self._position:,} is a value of the unknown type {kind}")

    def _tensor(self) -> None:
        self._text()
        dimensions = self._number("I")
        if dimensions > _MAX_DIMENSIONS:
            raise UserError(f"at byte {self._position:,} is a tensor of {dimensions:,} dimensions")
        elements = math.prod(self._number("Q") for _ in range(dimensions))
        if elements > len(self._content) * _MAX_ELEMENTS_PER_BYTE:
            raise UserError(
                f"at byte {self._position:,} is a tensor of {elements:,} elements, more than the file can hold"
            )
        self._number("I")
        if self._number("Q") > len(self._content):
            raise UserError(f"before byte {self._position:,} is a tensor that lies beyond the end")
