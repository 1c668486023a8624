"""GGUF files, opened only if what their header says fits what they hold.

The published reader believes every length in a file, so that one flipped bit can keep it busy for ever. Here the header
is walked first, in time and memory that the file's size bounds. Both tokenizers and weights are read from such files.
"""

import math
import mmap
import pathlib
import struct
from typing import Any

import gguf

from dialog_jax.errors import UserError

_SCALARS = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}  # bytes of each type of value
_STRING, _ARRAY = 8, 9
_MOST_ENTRIES = 1 << 22  # of all arrays; the reader keeps an object for each. Tokens, scores, types and merges count.
_MOST_DIMENSIONS = 4
_MOST_PER_BYTE = 8  # elements, in the densest of quantised types and more


def open_gguf(path: pathlib.Path) -> gguf.GGUFReader:
    """The published reader of the file; its tensors are read when asked for.

    Raises:
      UserError: there is no such file, or it is not what its header says.
    """
    try:
        with path.open("rb") as stream, mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as content:
            _Header(content).check()
        reader = gguf.GGUFReader(path)
        _check_places(reader)
    except FileNotFoundError:
        raise UserError(f"{path.name}: no such file. Check the path.") from None
    except (OSError, ValueError, IndexError, KeyError, OverflowError, struct.error) as error:
        raise UserError(f"{path.name} is not a whole GGUF file: {error}. Download it again.") from error
    return reader


def contents(path: pathlib.Path, reader: gguf.GGUFReader, name: str, kind: type, *, many: bool = False) -> Any:
    """The value of a field, or None where there is no such field.

    Args:
      kind: str, int or float; of each entry, with `many`, where the value is a list.

    Raises:
      UserError: it is of another kind, or no text; names the file and the field.
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
    """A place in the header, which moves on as it is read."""

    def __init__(self, content: mmap.mmap):
        self._content = content
        self._at = 4
        self._order = "<"
        self._entries = 0

    def check(self) -> None:
        """Raises UserError if a length in the header goes beyond the file."""
        if self._content[:4] != b"GGUF":
            raise UserError("it does not begin with GGUF")
        if self._number("I") & 0xFFFF == 0:  # written where the larger byte comes first
            self._order = ">"
        tensors, fields = self._number("Q"), self._number("Q")
        for _ in range(fields):
            self._text()
            self._value(self._number("I"))
        for _ in range(tensors):
            self._tensor()

    def _skip(self, count: int) -> None:
        if count > len(self._content) - self._at:
            raise UserError(f"at byte {self._at:,} it announces {count:,} bytes, and ends after {len(self._content):,}")
        self._at += count

    def _number(self, kind: str) -> int:
        at = self._at
        self._skip(struct.calcsize(kind))
        return struct.unpack_from(self._order + kind, self._content, at)[0]

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
            if self._entries > _MOST_ENTRIES:
                raise UserError(f"its fields have {self._entries:,} entries and more, the limit is {_MOST_ENTRIES:,}")
            if inner == _ARRAY:
                raise UserError("it has an array of arrays, which is not read")
            for _ in range(count):
                self._value(inner)
        else:
            raise UserError(f"at byte {self._at:,} is a value of the unknown type {kind}")

    def _tensor(self) -> None:
        self._text()
        dimensions = self._number("I")
        if dimensions > _MOST_DIMENSIONS:
            raise UserError(f"at byte {self._at:,} is a tensor of {dimensions:,} dimensions")
        elements = math.prod(self._number("Q") for _ in range(dimensions))
        if elements > len(self._content) * _MOST_PER_BYTE:
            raise UserError(f"at byte {self._at:,} is a tensor of {elements:,} elements, more than the file can hold")
        self._number("I")
        if self._number("Q") > len(self._content):
            raise UserError(f"before byte {self._at:,} is a tensor that lies beyond the end")
