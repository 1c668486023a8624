"""Files and directories that are either complete or as they were before, whatever interrupts the writing.

They are written under another name in the same directory, forced to the disk and then renamed, which replaces an older
file in one step. The only place that does so.
"""

import contextlib
import os
import pathlib
import shutil
from collections.abc import Iterator

from dialog_jax.errors import UserError

UNFINISHED = ".unfinished."  # begins the name of a file that is being written; a killed process leaves it


@contextlib.contextmanager
def replace(file: pathlib.Path) -> Iterator[pathlib.Path]:
    """Yields a path to write to; the file there becomes `file` if the block ends without an exception.

    with replace(directory / "plot.png") as unfinished:
        figure.savefig(unfinished)

    The path ends as `file` does, since some libraries choose a format by it. After an exception `file` is as before.
    """
    unfinished = file.with_name(f"{UNFINISHED}{file.name}")
    try:
        yield unfinished
        with unfinished.open("rb") as stream:
            os.fsync(stream.fileno())
        unfinished.replace(file)
    finally:
        unfinished.unlink(missing_ok=True)


@contextlib.contextmanager
def new_directory(directory: pathlib.Path) -> Iterator[pathlib.Path]:
    """Yields an empty directory to fill; it becomes `directory` if the block ends without an exception.

    `directory` must not exist or be empty. After an exception there is none.
    """
    unfinished = directory.with_name(f"{UNFINISHED}{directory.name}")
    shutil.rmtree(unfinished, ignore_errors=True)  # a killed process leaves it
    unfinished.mkdir(parents=True)
    try:
        yield unfinished
        for path in [*unfinished.rglob("*"), unfinished]:
            _sync(path)
        unfinished.replace(directory)
        sync_directory(directory.parent)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def write_text(file: pathlib.Path, text: str) -> None:
    """Writes text to a file in UTF-8."""
    with replace(file) as unfinished:
        unfinished.write_text(text, encoding="utf-8")


def expand_home(path: str | os.PathLike[str]) -> pathlib.Path:
    """Returns the path with a leading `~`, which shells leave alone after `--flag=`, as the home directory."""
    path = pathlib.Path(path)
    return path.expanduser() if path.parts[:1] == ("~",) else path


def check_parents(path: pathlib.Path, name: str) -> None:
    """Raises UserError, with the path's name in messages, if something above `path` exists and is not a directory."""
    for parent in path.parents:
        if parent.exists() and not parent.is_dir():
            raise UserError(
                f"{name}: {parent} is not a directory, so nothing can be written below it. Name another path."
            )


def sync_directory(directory: pathlib.Path) -> None:
    """Waits until the names of the files in a directory are on the disk."""
    _sync(directory)


def _sync(path: pathlib.Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
