"""Trees in files: built once, for a set of any size, and mapped into memory from then on.

A set of trees is a directory named by a hash of everything that determines them:

    tokens, parent, ...    one file per column, without header: those of `chunks.TOKEN_COLUMNS`, and per tree `offsets`
                           (one more than trees), `targets`, `shared_prefix_length`, `shared_prefix_id`
    ids, id_offsets        the id of each tree's dialogue as JSON, end to end, and the offset of each
    journal.json           the length of every column in bytes, and the counts so far
    report.json, key.json  for people to read

Until it is complete, the directory's name ends in `.unfinished`. The journal is written every few seconds, after the
columns have reached the disk; an interrupted build truncates the columns to the last journal and resumes there. A lock
on a file beside the directory lets one process build at a time; the system releases it when a process dies.
"""

import collections
import contextlib
import dataclasses
import fcntl
import functools
import hashlib
import itertools
import json
import os
import pathlib
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, BinaryIO

import numpy as np

from dialog_jax import atomic_files
from dialog_jax.dialogues.dialogue import Dialogue
from dialog_jax.errors import UserError
from dialog_jax.rendering.sequences import Renderer
from dialog_jax.trees import chunks, dataset, worker_pool
from dialog_jax.trees.chunks import Chunk
from dialog_jax.trees.dataset import Trees
from dialog_jax.trees.dialogue_trees import TreeConfig
from dialog_jax.trees.teacher_file import TeacherFile

FORMAT = 9  # raise when the same input gives different trees, or different files
MAX_WORKERS = 16  # by default; one reading process can keep about this many busy
_TYPES: dict[str, type[np.generic]] = {
    **chunks.TOKEN_COLUMNS,
    **{name: kind for name, kind in chunks.TREE_COLUMNS.items() if name != "size"},
    "offsets": np.int64,
    "ids": np.uint8,
    "id_offsets": np.int64,
    "teacher_row": np.int64,
}
_SKIPPED = "skipped.txt"  # the error of each skipped record, one per line
_SECONDS = 5.0  # between journals


class Ids(Sequence[str | int]):
    """Ids in a file, each read on access."""

    def __init__(self, text: np.ndarray, offsets: np.ndarray):
        self._text, self._offsets = text, offsets

    def __len__(self) -> int:
        return len(self._offsets) - 1

    def __getitem__(self, number: Any) -> Any:
        if isinstance(number, slice):
            return [self[index] for index in range(*number.indices(len(self)))]
        number = range(len(self))[number]  # negative and invalid indices behave as in a list
        start, stop = self._offsets[number : number + 2].tolist()
        return json.loads(self._text[start:stop].tobytes())


def load_or_build(
    cache_directory: str | os.PathLike,
    key: Mapping[str, Any],
    dialogues: Iterable[Dialogue | UserError],
    renderer: Renderer,
    config: TreeConfig,
    *,
    teacher: TeacherFile | None = None,
    workers: int = -1,
    seconds: float = _SECONDS,
) -> Trees:
    """Returns the stored trees of `key`; builds them, or resumes an interrupted build, if they are not complete.

    Args:
      cache_directory: has one directory for each key; created if missing.
      key: everything that determines the trees, as JSON values.
      dialogues: read only if there is something to build.
      workers: number of worker processes; 0 builds in this process, -1 starts one per processor but at most
        `MAX_WORKERS`. The trees do not depend on it.
      seconds: of work that an interruption may lose.

    Raises:
      UserError: nothing is left to train on; what `worker_pool.build_chunks` raises; a file does not have the length
        it was built with.
    """
    text = json.dumps({**key, "format": FORMAT}, sort_keys=True)
    directory = pathlib.Path(cache_directory) / hashlib.sha256(text.encode()).hexdigest()[:16]
    if not directory.exists():
        directory.parent.mkdir(parents=True, exist_ok=True)
        with _locked(directory.with_name(f"{directory.name}.lock")):
            if not directory.exists():  # another process may have built it while this one waited
                processes = workers if workers >= 0 else min(MAX_WORKERS, os.cpu_count() or 1)
                names = [name for name in _TYPES if name != "teacher_row" or teacher is not None]
                build = functools.partial(
                    worker_pool.build_chunks, renderer=renderer, config=config, teacher=teacher, workers=processes
                )
                _build(directory, text, dialogues, build, config, names, seconds)
    return _load(directory, teacher)


def _build(
    directory: pathlib.Path,
    key: str,
    dialogues: Iterable[Dialogue | UserError],
    build_chunks: Callable[[Iterable[list[Dialogue | UserError]]], Iterator[Chunk]],
    config: TreeConfig,
    columns: Sequence[str],
    seconds: float,
) -> None:
    """Builds the columns of a set in `directory`, or resumes an interrupted build."""
    unfinished = directory.with_name(f"{directory.name}.unfinished")
    unfinished.mkdir(exist_ok=True)
    with contextlib.ExitStack() as stack:
        files = {name: stack.enter_context((unfinished / name).open("ab")) for name in (*columns, _SKIPPED)}
        counts, named = _resume(unfinished, files)
        rest = itertools.islice(dialogues, counts["records"], None)
        written = time.monotonic()
        try:
            for chunk in build_chunks(chunks.batch_dialogues(rest)):
                chunks.add_counts(counts, named, chunk)
                _append(files, chunk)
                if time.monotonic() - written >= seconds:
                    _write_journal(unfinished, files, counts, named)
                    written = time.monotonic()
            report = dataset.make_report(counts, named)
            dataset.check_not_empty(report, config)
        except worker_pool.WorkerError:
            raise
        except UserError:  # an error of the data, which has another key once it is corrected
            shutil.rmtree(unfinished)
            raise
        _write_journal(unfinished, files, counts, named)
    atomic_files.write_text(
        unfinished / "report.json", json.dumps(dataclasses.asdict(report), indent=1, sort_keys=True)
    )
    atomic_files.write_text(unfinished / "key.json", key)
    unfinished.rename(directory)
    atomic_files.sync_directory(directory.parent)


def _resume(
    unfinished: pathlib.Path, files: Mapping[str, BinaryIO]
) -> tuple[collections.Counter[str], dict[str, list[str]]]:
    """Truncates the columns to the last journal, or to nothing; returns the journal's counts and names."""
    file = unfinished / "journal.json"
    journal = json.loads(file.read_text(encoding="utf-8")) if file.exists() else None
    if journal is not None and any(
        os.fstat(files[name].fileno()).st_size < size for name, size in journal["bytes"].items()
    ):
        journal = None  # the disk lost what it had reported as written: build from the beginning
    for name, column in files.items():
        column.truncate(journal["bytes"][name] if journal else 0)
        column.seek(0, os.SEEK_END)
    if journal is None:
        for name in ("offsets", "id_offsets"):
            files[name].write(np.zeros(1, _TYPES[name]).tobytes())
        return collections.Counter(), {}
    return collections.Counter(journal["counts"]), journal["named"]


def _append(files: Mapping[str, BinaryIO], chunk: Chunk) -> None:
    """Appends a chunk to the columns."""
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
    for error in chunk.skipped:
        files[_SKIPPED].write(" ".join(error.splitlines()).encode("utf-8", errors="backslashreplace") + b"\n")


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
    atomic_files.write_text(
        directory / "journal.json", json.dumps({"bytes": sizes, "counts": counts, "named": named}, sort_keys=True)
    )
    atomic_files.sync_directory(directory)


def _load(directory: pathlib.Path, teacher: TeacherFile | None) -> Trees:
    """Returns the trees of a complete directory."""
    journal = json.loads((directory / "journal.json").read_text(encoding="utf-8"))
    columns = {}
    for name, size in journal["bytes"].items():
        file = directory / name
        length = file.stat().st_size if file.exists() else 0
        if length != size:
            raise UserError(
                f"{directory.name}/{name}: has {length:,} bytes; needed {size:,}, as it was built. Remove the "
                f"directory {directory}, so that it is built again."
            )
        if name != _SKIPPED:
            columns[name] = np.memmap(file, _TYPES[name], "r")
    ids = Ids(columns.pop("ids"), columns.pop("id_offsets"))
    report = dataset.make_report(journal["counts"], journal["named"])
    skipped = (directory / _SKIPPED).read_text(encoding="utf-8").splitlines()
    return Trees(**columns, ids=ids, report=report, teacher=teacher, skipped=tuple(skipped))


@contextlib.contextmanager
def _locked(file: pathlib.Path) -> Iterator[None]:
    """Waits until no other process has the lock of this file."""
    with file.open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
        # Whoever waits for the removed file, or locks a new one, finds the finished directory.
        file.unlink(missing_ok=True)
