"""Trees in files: built once, for a set of any size, and mapped into memory from then on.

A set of trees is a directory named by a hash of all that determines them:

    tokens, parent, ...    a column each, without header: those of `building.TOKEN_COLUMNS`, and per tree `offsets` (one
                           more than trees), `targets`, `shared_prefix_length`, `shared_prefix_id`
    ids, id_offsets        the JSON of each tree's dialogue's id, end to end, and where each begins
    journal.json           the length of every column in bytes, and what was counted
    report.json, key.json  for people to read

Until it is whole its name ends in `.unfinished`. There the journal is written anew every few seconds, after the columns
have reached the disk: a build that was interrupted cuts them to the last journal and goes on behind it. One process
builds at a time, by a lock on the file beside it, which the system takes from a process that dies; others wait.
"""

import collections
import contextlib
import dataclasses
import fcntl
import hashlib
import itertools
import json
import os
import pathlib
import shutil
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, BinaryIO

import numpy as np

from dialog_jax.dialogues.dialogue import Dialogue
from dialog_jax.errors import UserError
from dialog_jax.trees import chunks, dataset, worker_pool
from dialog_jax.trees.chunks import Chunk
from dialog_jax.trees.dataset import Trees
from dialog_jax.trees.teacher import TeacherFile
from dialog_jax.trees.worker_pool import Preparation

FORMAT = 6  # raise whenever the same input gives other trees, or other files
MAX_WORKERS = 16  # started unless more are asked for; so many are given work by one process that reads
_TYPES: dict[str, type[np.generic]] = {
    **chunks.TOKEN_COLUMNS,
    **{name: kind for name, kind in chunks.TREE_COLUMNS.items() if name != "size"},
    "offsets": np.int64,
    "ids": np.uint8,
    "id_offsets": np.int64,
    "teacher_row": np.int64,
}
_SECONDS = 5.0  # between journals


class Ids(Sequence[str | int]):
    """Ids that lie in files and are read one by one."""

    def __init__(self, text: np.ndarray, offsets: np.ndarray):
        self._text, self._offsets = text, offsets

    def __len__(self) -> int:
        return len(self._offsets) - 1

    def __getitem__(self, number: Any) -> Any:
        if isinstance(number, slice):
            return [self[one] for one in range(*number.indices(len(self)))]
        number = range(len(self))[number]  # negative ones, and those out of range
        start, stop = self._offsets[number : number + 2].tolist()
        return json.loads(self._text[start:stop].tobytes())


def load_or_build(
    cache_directory: str | os.PathLike,
    key: Mapping[str, Any],
    dialogues: Iterable[Dialogue],
    preparation: Preparation,
    *,
    workers: int = -1,
    seconds: float = _SECONDS,
) -> Trees:
    """Returns the stored trees of `key`, built first, or built to the end, if they are not there.

    Args:
      cache_directory: holds one directory for each key; made if missing.
      key: all that determines the trees, as JSON values.
      dialogues: read only if there is something to build.
      workers: processes that build; 0 for none but this one, -1 for as many as there are processors, but at most
        `MAX_WORKERS`. The trees are the same.
      seconds: of work that an interruption may cost.

    Raises:
      UserError: nothing is left to train on; what `workers.build` raises; files have not the length they were built
        with.
    """
    text = json.dumps({**key, "format": FORMAT}, sort_keys=True)
    directory = pathlib.Path(cache_directory) / hashlib.sha256(text.encode()).hexdigest()[:16]
    if not directory.exists():
        directory.parent.mkdir(parents=True, exist_ok=True)
        with _locked(directory.with_name(f"{directory.name}.lock")):
            if not directory.exists():  # another process may have built it while this one waited
                _build(directory, text, dialogues, preparation, _processes(workers), seconds)
    return _load(directory, preparation.teacher)


def _processes(workers: int) -> int:
    return workers if workers >= 0 else min(MAX_WORKERS, os.cpu_count() or 1)


def _build(
    directory: pathlib.Path,
    key: str,
    dialogues: Iterable[Dialogue],
    preparation: Preparation,
    processes: int,
    seconds: float,
) -> None:
    unfinished = directory.with_name(f"{directory.name}.unfinished")
    unfinished.mkdir(exist_ok=True)
    names = [name for name in _TYPES if name != "teacher_row" or preparation.teacher is not None]
    with contextlib.ExitStack() as stack:
        files = {name: stack.enter_context((unfinished / name).open("ab")) for name in names}
        counts, named = _resume(unfinished, files)
        rest = itertools.islice(dialogues, counts["dialogues"], None)
        written = time.monotonic()
        try:
            for chunk in worker_pool.build_chunks(chunks.batch_dialogues(rest), preparation, workers=processes):
                chunks.add_counts(counts, named, chunk)
                _append(files, chunk)
                if time.monotonic() - written >= seconds:
                    _write_journal(unfinished, files, counts, named)
                    written = time.monotonic()
            report = dataset.make_report(counts, named)
            dataset.check_not_empty(report, preparation.recipe)
        except ValueError as error:
            if not isinstance(error, worker_pool.WorkerError):  # but of the data: once corrected, they have another key
                shutil.rmtree(unfinished)
            raise
        _write_journal(unfinished, files, counts, named)
    write_atomically(unfinished / "report.json", json.dumps(dataclasses.asdict(report), indent=1, sort_keys=True))
    write_atomically(unfinished / "key.json", key)
    unfinished.rename(directory)
    _fsync_directory(directory.parent)


def _resume(
    unfinished: pathlib.Path, files: Mapping[str, BinaryIO]
) -> tuple[collections.Counter[str], dict[str, list[str]]]:
    """Cuts the columns to the last journal, or to nothing; what had been counted and named there."""
    journal = unfinished / "journal.json"
    before = json.loads(journal.read_text(encoding="utf-8")) if journal.exists() else None
    if before is not None and any(
        os.fstat(files[name].fileno()).st_size < size for name, size in before["bytes"].items()
    ):
        before = None  # the disk lost what it had said it kept: from the beginning
    for name, file in files.items():
        file.truncate(before["bytes"][name] if before else 0)
        file.seek(0, os.SEEK_END)
    if before is None:
        for name in ("offsets", "id_offsets"):
            files[name].write(np.zeros(1, _TYPES[name]).tobytes())
        return collections.Counter(), {}
    return collections.Counter(before["counts"]), before["named"]


def _append(files: Mapping[str, BinaryIO], chunk: Chunk) -> None:
    """Writes a chunk behind those before it."""
    ids = [json.dumps(name).encode() for name in chunk.ids]
    columns = {
        **{name: column for name, column in chunk.columns.items() if name != "size"},
        "offsets": files["tokens"].tell() // 4 + np.cumsum(chunk.columns["size"]),
        "id_offsets": files["ids"].tell() + np.cumsum([len(name) for name in ids], dtype=np.int64),
    }
    for name, column in columns.items():
        assert column.dtype == _TYPES[name], (name, column.dtype)
        files[name].write(column.tobytes())
    files["ids"].write(b"".join(ids))


def _write_journal(
    directory: pathlib.Path,
    files: Mapping[str, BinaryIO],
    counts: Mapping[str, int],
    named: Mapping[str, Sequence[str]],
) -> None:
    for file in files.values():
        file.flush()
        os.fsync(file.fileno())
    sizes = {name: file.tell() for name, file in files.items()}
    write_atomically(
        directory / "journal.json", json.dumps({"bytes": sizes, "counts": counts, "named": named}, sort_keys=True)
    )
    _fsync_directory(directory)


def _load(directory: pathlib.Path, teacher: TeacherFile | None) -> Trees:
    """The trees of a whole directory."""
    journal = json.loads((directory / "journal.json").read_text(encoding="utf-8"))
    columns = {}
    for name, size in journal["bytes"].items():
        file = directory / name
        there = file.stat().st_size if file.exists() else 0
        if there != size:
            raise UserError(
                f"{directory.name}/{name}: has {there:,} bytes; needed {size:,}, as it was built. Remove the directory "
                f"{directory}, so that it is built again."
            )
        columns[name] = np.memmap(file, _TYPES[name], "r")
    ids = Ids(columns.pop("ids"), columns.pop("id_offsets"))
    report = dataset.make_report(journal["counts"], journal["named"])
    return Trees(**columns, ids=ids, report=report, teacher=teacher)


@contextlib.contextmanager
def _locked(file: pathlib.Path) -> Iterator[None]:
    """Waits until no other process is in here with the same file."""
    with file.open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
        # Whoever waits for the removed file, or locks a new one, finds the finished directory.
        file.unlink(missing_ok=True)


def write_atomically(file: pathlib.Path, text: str) -> None:
    """Writes a file that is whole or as it was before, even after a loss of power."""
    unfinished = file.with_name(f"{file.name}.unfinished")
    with unfinished.open("w", encoding="utf-8") as stream:
        stream.write(text)
        stream.flush()
        os.fsync(stream.fileno())
    unfinished.replace(file)


def _fsync_directory(directory: pathlib.Path) -> None:
    """Waits until the names in a directory are on the disk."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
