"""A teacher's predictions for responses, in a file: written when it scores dialogues, read when a student trains.

For each token of each response the file has the N likeliest tokens at its place, with their log-probabilities. It is a
safetensors file of R responses with n tokens in all, in the order of the dialogues:

    response_dialogue    int32 [R]       number of its dialogue, an index into the list `ids` of the metadata
    response_message     int32 [R]       index in the dialogue's messages
    response_prompt      int64 [R]       checksum of the tokens before it
    response_offset      int64 [R + 1]   where its tokens begin, and where those of the last response end
    token                int32 [n]       the tokens of the responses as the teacher read them
    top_token            int32 [n, N]    the likeliest first
    top_log_probability  float32 [n, N]  in nats

Log-probabilities are float32 because the probability that they leave to all other tokens is used too; bfloat16 would
lose it where the teacher is nearly certain. Knows neither how a teacher is run nor how a student learns.
"""

import contextlib
import dataclasses
import hashlib
import json
import os
import pathlib
import shutil
import tempfile
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import safetensors
from jaxtyping import Float32, Int, Int32, Int64

from dialog_jax import atomic_files
from dialog_jax.errors import UserError

_TYPES = {
    "response_prompt": "I64",
    "response_offset": "I64",
    "response_dialogue": "I32",
    "response_message": "I32",
    "token": "I32",
    "top_token": "I32",
    "top_log_probability": "F32",
}
_NUMPY: dict[str, np.dtype] = {"I64": np.dtype("<i8"), "I32": np.dtype("<i4"), "F32": np.dtype("<f4")}
_BLOCK = 1 << 14  # tokens that are checked at a time
_TOLERANCE = 1e-3  # by which rounding may raise a sum of probabilities above 1


class Signal(NamedTuple):
    """A teacher's predictions for one response."""

    message: int
    prompt: int
    """`checksum` of the tokens before the response."""
    token: Int32[np.ndarray, " n"]
    top_token: Int32[np.ndarray, "n N"]
    top_log_probability: Float32[np.ndarray, "n N"]


@dataclasses.dataclass(frozen=True)
class TeacherFile:
    """A file of signals. The arrays are mapped from the file."""

    path: str
    name: str
    digest: str
    same_tokenizer: bool
    """Whether the teacher's tokenizer has the fingerprint of the data's."""
    template_time: str
    """The time that the teacher's chat template took for the current one; empty if it reads no clock."""
    largest: int
    """The largest token id in `top_token`."""
    numbers: Mapping[str | int, int]
    """The number of each dialogue, by its id."""
    response_prompt: Int64[np.ndarray, " R"]
    response_offset: Int64[np.ndarray, " R+1"]
    response_dialogue: Int32[np.ndarray, " R"]
    response_message: Int32[np.ndarray, " R"]
    token: Int32[np.ndarray, " n"]
    top_token: Int32[np.ndarray, "n N"]
    top_log_probability: Float32[np.ndarray, "n N"]

    @property
    def top_k(self) -> int:
        """Number of likeliest tokens per token of a response (N)."""
        return self.top_token.shape[1]


def checksum(tokens: Int[np.ndarray, " n"]) -> int:
    """Returns a number that other tokens are unlikely to have."""
    return zlib.crc32(tokens.astype("<i4").tobytes())


@contextlib.contextmanager
def write_file(
    path: pathlib.Path, *, top_k: int, tokenizer: str, vocabulary: int, template_time: str = ""
) -> Iterator[Callable[[str | int, Sequence[Signal]], None]]:
    """Yields a function to call with the id and signals of each dialogue; the file appears at the end, complete.

    Signals are written as they come, to temporary files beside `path`, so that memory holds those of one dialogue.

    Args:
      top_k: N.
      tokenizer: fingerprint of the teacher's tokenizer.
      vocabulary: size of the teacher's vocabulary.
      template_time: the time that the chat template took for the current one; empty if it reads no clock.

    Raises:
      UserError: two dialogues have the same id.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    numbers: dict[str | int, int] = {}
    end = 0
    with tempfile.TemporaryDirectory(prefix=f".{path.name}.", dir=path.parent) as name, contextlib.ExitStack() as stack:
        directory = pathlib.Path(name)
        columns = {name: stack.enter_context((directory / name).open("w+b")) for name in _TYPES}

        def append(**values: Any) -> None:
            for name, value in values.items():
                columns[name].write(np.asarray(value, _NUMPY[_TYPES[name]]).tobytes())

        def add(dialogue: str | int, signals: Sequence[Signal]) -> None:
            nonlocal end
            if dialogue in numbers:
                raise UserError(
                    f"two dialogues have the id {dialogue!r}, which {path.name} could not tell apart. Give each "
                    "another id, or omit the ids."
                )
            number = numbers[dialogue] = len(numbers)
            for signal in signals:
                assert signal.top_token.shape == signal.top_log_probability.shape == (len(signal.token), top_k)
                end += len(signal.token)
                append(response_dialogue=number, response_message=signal.message, response_prompt=signal.prompt)
                append(response_offset=end, token=signal.token)
                append(top_token=signal.top_token, top_log_probability=signal.top_log_probability)

        append(response_offset=0)
        yield add
        metadata = {
            "ids": json.dumps(list(numbers)),
            "tokenizer": tokenizer,
            "vocabulary": str(vocabulary),
            "template_time": template_time,
        }
        with atomic_files.replace(path) as unfinished, unfinished.open("wb") as stream:
            stream.write(_make_header({name: column.tell() for name, column in columns.items()}, top_k, metadata))
            for column in columns.values():
                column.seek(0)
                shutil.copyfileobj(column, stream)


def read_file(path: str | os.PathLike[str], *, tokenizer: str) -> TeacherFile:
    """Returns a file that `write_file` wrote, checked; its arrays are mapped, not read.

    Args:
      tokenizer: fingerprint of the tokenizer of the data.

    Raises:
      UserError: there is no such file, or it is of another kind, truncated, or has invalid probabilities.
    """
    file = pathlib.Path(path).expanduser()
    if not file.is_file():
        raise UserError(f"{file.name} is not a file. Make it with dialog_jax score --top_k=N --top_k_out=FILE.")
    try:
        with safetensors.safe_open(file, framework="numpy") as checked:
            metadata = checked.metadata() or {}
            if {*checked.keys()} != {*_TYPES} or "ids" not in metadata:
                raise UserError(f"{file.name} is not a teacher's file. Make it with dialog_jax score --top_k=N.")
    except (OSError, safetensors.SafetensorError) as error:
        raise UserError(f"{file.name} is not a complete safetensors file: {error}. Make it again.") from error
    arrays = _map_arrays(file)
    ids = _parse_ids(file.name, metadata["ids"])
    if not len(arrays["token"]):
        raise UserError(f"{file.name} has no response. Score the dialogues to train on.")
    _check_shapes(file.name, len(ids), arrays)
    digest = hashlib.sha256()
    with file.open("rb") as stream:
        while block := stream.read(1 << 20):
            digest.update(block)
    return TeacherFile(
        path=str(file.resolve()),
        name=file.name,
        digest=digest.hexdigest(),
        same_tokenizer=metadata.get("tokenizer") == tokenizer,
        template_time=metadata.get("template_time", ""),
        largest=_check_values(file.name, arrays["top_token"], arrays["top_log_probability"]),
        numbers={name: number for number, name in enumerate(ids)},
        **arrays,
    )


def _make_header(sizes: Mapping[str, int], top_k: int, metadata: Mapping[str, str]) -> bytes:
    """Returns the header of a safetensors file from the size of each array in bytes."""
    header: dict[str, Any] = {"__metadata__": metadata}
    offset = 0
    for name, size in sizes.items():
        kind = _TYPES[name]
        width = top_k if name.startswith("top_") else 1
        count = size // (_NUMPY[kind].itemsize * width)
        shape = [count, top_k] if name.startswith("top_") else [count]
        header[name] = {"dtype": kind, "shape": shape, "data_offsets": [offset, offset + size]}
        offset += size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _map_arrays(file: pathlib.Path) -> dict[str, np.ndarray]:
    """Returns the arrays of a safetensors file, mapped; the library would read them into memory."""
    with file.open("rb") as stream:
        size = int.from_bytes(stream.read(8), "little")
        header = json.loads(stream.read(size))
    arrays: dict[str, np.ndarray] = {}
    for name, kind in _TYPES.items():
        entry = header[name]
        if entry["dtype"] != kind:
            raise UserError(f"{file.name}: {name} is {entry['dtype']}, not {kind}. Make it with dialog_jax score.")
        shape, offset = tuple(entry["shape"]), 8 + size + entry["data_offsets"][0]
        if 0 in shape:  # cannot be mapped
            arrays[name] = np.empty(shape, _NUMPY[kind])
        else:
            arrays[name] = np.memmap(file, _NUMPY[kind], "r", offset, shape)
    return arrays


def _parse_ids(name: str, text: str) -> list[str | int]:
    """Returns the ids of a file's dialogues."""
    try:
        ids = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{name}: its list of dialogues is not JSON ({error}). Make it again.") from None
    if not isinstance(ids, list) or not all(isinstance(one, str | int) for one in ids) or len(set(ids)) < len(ids):
        raise UserError(f"{name}: its list of dialogues has invalid or repeated ids. Make it again.")
    return ids


def _check_shapes(name: str, dialogues: int, arrays: Mapping[str, np.ndarray]) -> None:
    """Raises UserError unless the arrays of a file have consistent shapes and indices."""
    dialogue, offset, top = arrays["response_dialogue"], arrays["response_offset"], arrays["top_token"]
    responses, tokens = len(dialogue), len(arrays["token"])
    shapes = {key: (tokens, *top.shape[1:2]) if key.startswith("top_") else (responses,) for key in _TYPES}
    shapes |= {"response_offset": (responses + 1,), "token": (tokens,)}
    consistent = (
        responses > 0
        and all(arrays[key].shape == shape for key, shape in shapes.items())
        and top.ndim == 2
        and top.shape[1] > 0
        and (offset[0], offset[-1]) == (0, tokens)
        and (offset[:-1] <= offset[1:]).all()
        and (dialogue[:-1] <= dialogue[1:]).all()
        and 0 <= dialogue[0] <= dialogue[-1] < dialogues
    )
    if not consistent:
        raise UserError(f"{name}: its arrays have inconsistent shapes or indices. Make it again.")


def _check_values(name: str, token: Int32[np.ndarray, "n N"], log_probability: Float32[np.ndarray, "n N"]) -> int:
    """Returns the largest token id; raises UserError where ids or probabilities are invalid."""
    largest = 0
    for start in range(0, len(token), _BLOCK):
        largest = max(largest, int(token[start : start + _BLOCK].max()))
        if (lowest := int(token[start : start + _BLOCK].min())) < 0:
            raise UserError(f"{name} has the token id {lowest}; ids start at 0. Make it again.")
        sums = np.exp(log_probability[start : start + _BLOCK].astype(np.float64)).sum(axis=-1)
        wrong = ~((sums > 0) & (sums <= 1 + _TOLERANCE))  # so that nan is wrong
        if wrong.any():
            place = int(wrong.argmax())
            raise UserError(
                f"{name}: the probabilities at token {start + place:,} sum to {sums[place]:.4g}; needed more than 0 "
                "and at most 1. Score again, with weights in float32."
            )
    return largest
