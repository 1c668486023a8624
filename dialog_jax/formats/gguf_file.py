"""GGUF files, opened only if the lengths in their header are consistent with their size.

The published reader trusts every length in a file, so one flipped bit can make it loop without end. Here the header is
checked first, in time and memory bounded by the file's size. Tokenizers and weights are both read from such files.
"""

import math
import mmap
import pathlib
import struct
from typing import Any

import gguf

from dialog_jax.errors import UserError

_SCALARS = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}  # size in bytes of each scalar type
_STRING, _ARRAY = 8, 9
_MAX_ENTRIES = 1 << 22  # of all arrays together (tokens, scores, types, merges): the reader keeps an object for each
_MAX_DIMENSIONS = 4
_MAX_ELEMENTS_PER_BYTE = 8  # more than in the densest of quantized types


def open_gguf(path: pathlib.Path) -> gguf.GGUFReader:
    """Returns the published reader of the file; its tensors are read on request.

    Raises:
      UserError: there is no such file, or its header and its size disagree.
    """
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


def contents(path: pathlib.Path, reader: gguf.GGUFReader, name: str, kind: type, *, many: bool = False) -> Any:
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
