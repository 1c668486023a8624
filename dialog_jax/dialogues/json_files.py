"""JSON files and files of one JSON object per line, compressed or not, to records with their places for errors.

Knows what bytes may be, and nothing of dialogues.
"""

import bz2
import gzip
import io
import json
import lzma
import pathlib
import zlib
from collections.abc import Callable, Iterator
from typing import Any

from dialog_jax.errors import UserError

LINES = (".jsonl", ".ndjson")
_PROGRAMS = {".gz": "gzip", ".bz2": "bzip2", ".xz": "xz", ".zst": "zstd"}
COMPRESSIONS = tuple(_PROGRAMS)
_BOM = b"\xef\xbb\xbf"
# How files begin that a name does not announce: (first bytes, what the file is, remedy).
_BEGINNINGS = (
    (b"\x1f\x8b", "compressed by gzip", "Name it .gz"),
    (b"BZh", "compressed by bzip2", "Name it .bz2"),
    (b"\xfd7zXZ\x00", "compressed by xz", "Name it .xz"),
    (b"\x28\xb5\x2f\xfd", "compressed by zstd", "Name it .zst"),
    (b"\x04\x22\x4d\x18", "compressed by lz4", "Decompress it: lz4 -d FILE"),
    (b"PK\x03\x04", "a zip archive", "Extract the file in it: unzip FILE"),
    (b"7z\xbc\xaf\x27\x1c", "a 7z archive", "Extract the file in it"),
    (b"PAR1", "a Parquet file", "Name it .parquet"),
)


def read_lines(path: pathlib.Path) -> Iterator[tuple[str, Any]]:
    """Yields (`train.jsonl:413`, record) of each line that is not empty; a line that is not JSON is its `UserError`.

    Raises:
      UserError: the file is damaged, or not what its name says.
    """
    # Bytes, so that only a newline ends a line: text mode would also split at a lone carriage return.
    for number, line in enumerate(_iterate_lines(path), start=1):
        if not line.strip():
            continue
        where = f"{path.name}:{number}"
        try:
            record = _decode_json(line.rstrip(b"\r\n"), where, "Write one complete JSON object per line.")
        except UserError as error:
            record = error
        yield where, record


def read_list(path: pathlib.Path) -> Iterator[tuple[str, Any]]:
    """Yields (`train.json[412]`, record) of each entry of a file's list, or the file's only object.

    Raises:
      UserError: the file is not JSON, damaged, or not what its name says.
    """
    data = b"".join(_iterate_lines(path))
    if not data.strip():
        return
    value = _decode_json(
        data, path.name, "Write a list of records; if the file has one object per line, name it .jsonl."
    )
    if isinstance(value, list):
        for index, record in enumerate(value):
            yield f"{path.name}[{index}]", record
    else:
        yield path.name, value


def _iterate_lines(path: pathlib.Path) -> Iterator[bytes]:
    """Yields the lines of the decompressed file, without the mark of UTF-8 at its beginning."""
    opener = _OPENERS.get(path.suffix.lower())
    if opener is None:
        with path.open("rb") as file:
            yield from _check_first(file, path.name)
        return
    number = 0
    try:
        with opener(path) as file:
            for number, line in enumerate(_check_first(file, path.name), start=1):  # noqa: B007
                yield line
    except (OSError, EOFError, zlib.error, lzma.LZMAError) as error:
        what = f"damaged after line {number:,}" if number else f"damaged, or not compressed as {path.suffix} says"
        raise UserError(f"{path.name}: {what} ({error}). Write it again, or rename it.") from None


def _check_first(lines: io.BufferedIOBase, name: str) -> Iterator[bytes]:
    """Yields the lines; raises UserError if the first one shows that the file is not UTF-8 text."""
    for number, line in enumerate(lines):
        if not number:
            for beginning, what, remedy in _BEGINNINGS:
                if line.startswith(beginning):
                    raise UserError(f"{name}: is {what}, which its name does not say. {remedy}.")
            encoding = _detect_encoding(line)
            if encoding:
                command = _describe_conversion(name, encoding)
                raise UserError(f"{name}: is {encoding} text; dialogues are UTF-8. Convert it: {command}")
            line = line.removeprefix(_BOM)
        yield line


def _describe_conversion(name: str, encoding: str) -> str:
    """Returns the command that converts a file, compressed or not, to UTF-8."""
    path = pathlib.PurePath(name)
    if program := _PROGRAMS.get(path.suffix.lower()):
        return f"{program} -dc {name} | iconv -f {encoding} -t UTF-8 > utf8-{path.stem}"
    return f"iconv -f {encoding} -t UTF-8 {name} > utf8-{name}"


def _detect_encoding(line: bytes) -> str:
    """Returns iconv's name of UTF-16 or UTF-32 if a file with this first line is JSON in it; otherwise "".

    "UTF-16" begins with a byte order mark. "UTF-16LE" and "UTF-16BE" do not: the zero bytes of the first characters,
    which are ASCII in JSON, show them (RFC 4627).
    """
    encoding = json.detect_encoding(line[:4])
    if encoding.startswith("utf-8") or len(line) < 4:
        return ""
    try:
        text = line[:4].decode(encoding)
    except UnicodeDecodeError:
        return ""
    if encoding not in ("utf-16", "utf-32") and text.lstrip()[:1] not in ("{", "[", ""):
        return ""
    return encoding.upper().replace("-BE", "BE").replace("-LE", "LE")


def _decode_json(data: bytes, where: str, remedy: str) -> Any:
    try:
        text = data.decode()
    except UnicodeDecodeError as error:
        raise UserError(
            f"{where}: byte {error.start + 1} is not UTF-8; dialogues are UTF-8 text. Save the file as UTF-8."
        ) from None
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        # For a line of a .jsonl file, `where` has the number of the line already.
        place = f"line {error.lineno}, column {error.colno}" if "\n" in text else f"column {error.colno}"
        raise UserError(f"{where}: not JSON at {place}: {error.msg}. {remedy}") from None
    except RecursionError:
        raise UserError(f"{where}: nests lists and objects too deeply to be read. Write a dialogue flat.") from None
    except ValueError as error:
        raise UserError(f"{where}: has a number that is too long ({error}). Write it shorter, or as text.") from None


def _open_zstd(path: pathlib.Path) -> io.BufferedIOBase:
    try:
        import pyarrow
    except ImportError:
        raise UserError(
            f"{path.name}: reading .zst needs pyarrow. Run: pip install pyarrow; or decompress it: zstd -d {path.name}"
        ) from None
    stream = pyarrow.CompressedInputStream(pyarrow.OSFile(str(path)), "zstd")
    return io.BufferedReader(stream)


_OPENERS: dict[str, Callable[[pathlib.Path], io.BufferedIOBase]] = {
    ".gz": gzip.GzipFile,
    ".bz2": bz2.BZ2File,
    ".xz": lzma.LZMAFile,
    ".zst": _open_zstd,
}
