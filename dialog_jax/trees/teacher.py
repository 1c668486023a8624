"""What a teacher says of responses, in a file: written while it scores dialogues, read while a student trains on them.

For each token of each response the file holds the N tokens that the teacher finds likeliest in its place, with their
log-probabilities. It is one safetensors file; R responses of n tokens in all, in the order of the dialogues:

    response_dialogue    int32 [R]       number of its dialogue, which is a place in the list `ids` of the metadata
    response_message     int32 [R]       index in the dialogue's messages
    response_prompt      int64 [R]       checksum of the tokens before it
    response_offset      int64 [R + 1]   where its tokens begin, and where the last one's end
    token                int32 [n]       the response as the teacher read it
    top_token            int32 [n, N]    the likeliest first
    top_log_probability  float32 [n, N]  in nats

They are float32 because what they leave of 1 is an outcome too, and half the digits would blur it where the teacher is
nearly sure. Knows tokens and files, and nothing of how a teacher is run or how a student learns.
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

from dialog_jax.dialogues.dialogue import Dialogue
from dialog_jax.errors import UserError
from dialog_jax.trees import prefix_tree
from dialog_jax.trees.prefix_tree import Tree
from dialog_jax.trees.weighting import SupervisedSequence

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
_BLOCK = 1 << 14  # tokens that are checked at once
_MASS = 1e-3  # by which rounding may carry a sum of probabilities beyond 1


class Signal(NamedTuple):
    """What a teacher says of one response."""

    message: int
    prompt: int
    """`checksum` of the tokens before the response."""
    token: Int32[np.ndarray, " n"]
    top_token: Int32[np.ndarray, "n N"]
    top_log_probability: Float32[np.ndarray, "n N"]


@dataclasses.dataclass(frozen=True)
class TeacherFile:
    """A file of signals. The arrays are the file's own and lie there until they are read."""

    path: str
    name: str
    digest: str
    same_tokenizer: bool
    """Whether the teacher's tokenizer has the fingerprint of the data's."""
    largest: int
    """Of all token ids that the teacher names."""
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
        """N."""
        return self.top_token.shape[1]


def checksum(tokens: Int[np.ndarray, " n"]) -> int:
    """Returns a number that other tokens are not likely to have."""
    return zlib.crc32(tokens.astype("<i4").tobytes())


@contextlib.contextmanager
def write_file(
    path: pathlib.Path, *, top_k: int, tokenizer: str, vocabulary: int
) -> Iterator[Callable[[str | int, Sequence[Signal]], None]]:
    """Gives a function to call with each dialogue's id and signals; afterwards the file is there, whole, or nothing is.

    Signals go to disk as they come, so memory holds one dialogue's; until the end, they lie beside the file.

    Args:
      top_k: N.
      tokenizer: fingerprint of the teacher's.
      vocabulary: number of the teacher's logits.

    Raises:
      UserError: two dialogues have the same id.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    numbers: dict[str | int, int] = {}
    end = 0
    with tempfile.TemporaryDirectory(prefix=f".{path.name}.", dir=path.parent) as made, contextlib.ExitStack() as stack:
        directory = pathlib.Path(made)
        columns = {name: stack.enter_context((directory / name).open("w+b")) for name in _TYPES}

        def put(**values: Any) -> None:
            for name, value in values.items():
                columns[name].write(np.asarray(value, _NUMPY[_TYPES[name]]).tobytes())

        def add(dialogue: str | int, signals: Sequence[Signal]) -> None:
            nonlocal end
            if dialogue in numbers:
                raise UserError(
                    f"two dialogues have the id {dialogue!r}, so {path.name} could not tell them apart. Give each its "
                    "own id, or leave ids out."
                )
            number = numbers[dialogue] = len(numbers)
            for signal in signals:
                assert signal.top_token.shape == signal.top_log_probability.shape == (len(signal.token), top_k)
                end += len(signal.token)
                put(response_dialogue=number, response_message=signal.message, response_prompt=signal.prompt)
                put(response_offset=end, token=signal.token)
                put(top_token=signal.top_token, top_log_probability=signal.top_log_probability)

        put(response_offset=0)
        yield add
        metadata = {"ids": json.dumps(list(numbers)), "tokenizer": tokenizer, "vocabulary": str(vocabulary)}
        with (directory / "whole").open("wb") as whole:
            whole.write(_header({name: column.tell() for name, column in columns.items()}, top_k, metadata))
            for column in columns.values():
                column.seek(0)
                shutil.copyfileobj(column, whole)
        (directory / "whole").replace(path)


def read_file(path: str | os.PathLike[str], *, tokenizer: str) -> TeacherFile:
    """Returns a file that `write_file` left, checked, its large arrays mapped rather than read.

    Args:
      tokenizer: fingerprint of the tokenizer of the data.

    Raises:
      UserError: there is no such file, or it is none of these, or cut short, or holds what are no probabilities.
    """
    file = pathlib.Path(path).expanduser()
    if not file.is_file():
        raise UserError(f"{file.name} is no file. Make it with dialog_jax score --top_k=N --top_k_out=FILE.")
    try:
        with safetensors.safe_open(file, framework="numpy") as checked:
            metadata = checked.metadata() or {}
            if {*checked.keys()} != {*_TYPES} or "ids" not in metadata:
                raise UserError(f"{file.name} holds no teacher's signals. Make it with dialog_jax score --top_k=N.")
    except (OSError, safetensors.SafetensorError) as error:
        raise UserError(f"{file.name} is not a whole safetensors file: {error}. Make it again.") from error
    arrays = _mapped(file)
    ids = _ids(file.name, metadata["ids"])
    if not len(arrays["token"]):
        raise UserError(f"{file.name} holds no response. Score the dialogues that are to be trained on.")
    _check_places(file.name, len(ids), arrays)
    digest = hashlib.sha256()
    with file.open("rb") as stream:
        while block := stream.read(1 << 20):
            digest.update(block)
    return TeacherFile(
        path=str(file.resolve()),
        name=file.name,
        digest=digest.hexdigest(),
        same_tokenizer=metadata.get("tokenizer") == tokenizer,
        largest=_check(file.name, arrays["top_token"], arrays["top_log_probability"]),
        numbers={name: number for number, name in enumerate(ids)},
        **arrays,
    )


def find_rows(
    file: TeacherFile, dialogue: Dialogue, tree: Tree, trained: Sequence[SupervisedSequence]
) -> Int64[np.ndarray, " N"]:
    """Returns for each node of a tree its row in the file; -1 where it is no target in a response.

    Args:
      trained: what the tree was built from.

    Raises:
      UserError: the file has nothing of a response, or other tokens. Names the dialogue, the message and the token.
    """
    rows = np.full(len(tree.tokens), -1, np.int64)
    _, nodes = prefix_tree.build_trie([one.tokens for one in trained])
    for one, own in zip(trained, nodes, strict=True):
        sequence, message = one.sequence, one.message
        start = max(sequence.start, 1)
        if sequence.turn >= 0 and tree.weight[own[start:]].any():
            # Where a dialogue that is too long was divided, some messages that lead to a response are left out.
            whole = one.piece.messages[: sequence.message_index] == dialogue.ancestors(message)
            found = _find(file, dialogue, message, sequence.tokens, start, whole=whole)
            rows[own[start:]] = found[: len(own) - start]
    rows[tree.weight == 0] = -1
    return rows


def read_rows(
    file: TeacherFile, rows: Int64[np.ndarray, " s"]
) -> tuple[Int32[np.ndarray, "s N"], Float32[np.ndarray, "s N"]]:
    """Returns (likeliest tokens, their log-probabilities) of some rows; row -1 has 0 and -inf."""
    known = rows >= 0
    token = np.zeros((len(rows), file.top_k), np.int32)
    log_probability = np.full(token.shape, -np.inf, np.float32)
    token[known], log_probability[known] = file.top_token[rows[known]], file.top_log_probability[rows[known]]
    return token, log_probability


def _find(
    file: TeacherFile, dialogue: Dialogue, message: int, tokens: Int32[np.ndarray, " n"], start: int, *, whole: bool
) -> Int64[np.ndarray, " response"]:
    """The rows of a response, `tokens[start:]`."""
    where = f"{dialogue.name}: message {message}"
    number = file.numbers.get(dialogue.id)
    if number is None:
        raise UserError(f"{where} has no teacher: {file.name} holds no dialogue of this id. Score it, or leave it out.")
    first, last = np.searchsorted(file.response_dialogue, [number, number + 1])
    found = first + np.flatnonzero(file.response_message[first:last] == message)
    if not len(found):
        raise UserError(
            f"{where} has no teacher: {file.name} holds other messages of the dialogue only. Its weight was 0 when the "
            "teacher scored it, or it exceeds the teacher's context. Score it, or give it weight 0."
        )
    response = int(found[0])
    begin, end = file.response_offset[response : response + 2].tolist()
    own, taught = tokens[start:], file.token[begin:end]
    changed = "the chat template or the dialogue is not what it was" if file.same_tokenizer else "the tokenizer differs"
    remedy = f"since the teacher scored it, {changed}. Score again with what is trained on."
    at = prefix_tree.common_prefix_length(own, taught)
    if at < max(len(own), len(taught)):
        here, there = (f"is {ids[at]}" if at < len(ids) else "is missing" for ids in (own, taught))
        raise UserError(f"{where}, token {at}: its id {here} here, but {there} in {file.name}; {remedy}")
    if whole and file.response_prompt[response] != checksum(tokens[:start]):
        raise UserError(f"{where}: {file.name} has the same response after another prompt; {remedy}")
    return np.arange(begin, end)


def _header(sizes: Mapping[str, int], top_k: int, metadata: Mapping[str, str]) -> bytes:
    """What stands before the arrays in a safetensors file, from how many bytes each of them has."""
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


def _mapped(file: pathlib.Path) -> dict[str, np.ndarray]:
    """The arrays of a safetensors file, which is known to be one; mapped, since the library reads them whole."""
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


def _ids(name: str, text: str) -> list[str | int]:
    """The ids of a file's dialogues."""
    try:
        ids = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{name}: its list of dialogues is not JSON ({error}). Make it again.") from None
    if not isinstance(ids, list) or not all(isinstance(one, str | int) for one in ids) or len(set(ids)) < len(ids):
        raise UserError(f"{name}: its list of dialogues holds what are no ids, or one of them twice. Make it again.")
    return ids


def _check_places(name: str, dialogues: int, arrays: Mapping[str, np.ndarray]) -> None:
    """Raises UserError where the arrays of a file do not belong together."""
    dialogue, offset, top = arrays["response_dialogue"], arrays["response_offset"], arrays["top_token"]
    responses, tokens = len(dialogue), len(arrays["token"])
    shapes = {key: (tokens, *top.shape[1:2]) if key.startswith("top_") else (responses,) for key in _TYPES}
    shapes |= {"response_offset": (responses + 1,), "token": (tokens,)}
    together = (
        responses > 0
        and all(arrays[key].shape == shape for key, shape in shapes.items())
        and top.ndim == 2
        and top.shape[1] > 0
        and (offset[0], offset[-1]) == (0, tokens)
        and (offset[:-1] <= offset[1:]).all()
        and (dialogue[:-1] <= dialogue[1:]).all()
        and 0 <= dialogue[0] <= dialogue[-1] < dialogues
    )
    if not together:
        raise UserError(f"{name}: its arrays do not belong together, as if written by something else. Make it again.")


def _check(name: str, token: Int32[np.ndarray, "n N"], log_probability: Float32[np.ndarray, "n N"]) -> int:
    """The largest token id; raises ValueError where there are no probabilities."""
    largest = 0
    for start in range(0, len(token), _BLOCK):
        largest = max(largest, int(token[start : start + _BLOCK].max()))
        if (least := int(token[start : start + _BLOCK].min())) < 0:
            raise UserError(f"{name} holds the token id {least}; ids start at 0. Make it again.")
        sums = np.exp(log_probability[start : start + _BLOCK].astype(np.float64)).sum(axis=-1)
        wrong = ~((sums > 0) & (sums <= 1 + _MASS))  # so that nan is wrong
        if wrong.any():
            at = int(wrong.argmax())
            raise UserError(
                f"{name}: the probabilities at token {start + at:,} sum to {sums[at]:.4g}; needed more than 0 and at "
                "most 1. Score again, with weights in float32."
            )
    return largest
