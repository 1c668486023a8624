"""Processes that build chunks of trees: batches of dialogues in, their chunks out, in the same order.

Each is a fresh interpreter with this module and not the program that started it, so that none loads what that one has
loaded, JAX above all. Memory is bounded by one batch and one chunk a worker, whatever the size of the set; a worker is
bounded too, in memory and in the time a batch may take. Batches and chunks go through a socket that no other process
can open.
"""

import collections
import contextlib
import dataclasses
import itertools
import os
import resource
import signal
import socket
import subprocess
import sys
from collections.abc import Iterable, Iterator, Sequence
from multiprocessing.connection import Connection
from typing import NoReturn

from dialog_jax.dialogues.dialogue import Dialogue
from dialog_jax.errors import UserError
from dialog_jax.rendering.sequences import Renderer
from dialog_jax.trees import chunks, teacher_file
from dialog_jax.trees.chunks import Chunk, TreeConfig
from dialog_jax.trees.teacher_file import TeacherFile

MEMORY = 8 << 30  # bytes that a worker may have, besides the files it reads
SECONDS = 600.0  # that a chunk is waited for


class WorkerError(UserError):
    """A worker needs too much time or memory, or was ended: what was built before it may be gone on with."""


def build_chunks(
    batches: Iterable[list[Dialogue]],
    renderer: Renderer,
    config: TreeConfig,
    teacher: TeacherFile | None = None,
    *,
    workers: int,
    memory: int = MEMORY,
    seconds: float = SECONDS,
) -> Iterator[Chunk]:
    """Yields the chunk of each batch, in order.

    Args:
      workers: processes; 0 for this one only, whose memory and time are not limited, as for a single batch. Chat
        templates are rendered in processes of their own in any case.
      memory: bytes a worker may have, where the system can bound them.
      seconds: that this process waits for a chunk.

    Raises:
      UserError: what `chunks.build_chunk` raises.
      WorkerError: a batch takes too much memory or time, or its worker was ended. Names the dialogues.
    """
    batches = iter(batches)
    first = list(itertools.islice(batches, 2))
    batches = itertools.chain(first, batches)
    if not workers or len(first) < 2:
        yield from chunks.build_chunks(batches, renderer, config, teacher)
        return
    with contextlib.ExitStack() as stack:
        working: collections.deque[_Worker] = collections.deque()  # the one whose chunk is next stands first
        for batch in batches:  # read while the workers work
            if len(working) < workers:
                worker, chunk = stack.enter_context(_start(renderer, config, teacher, memory)), None
            else:
                worker = working.popleft()
                chunk = worker.chunk(seconds)
            worker.give(batch)
            working.append(worker)
            if chunk is not None:
                yield chunk
        for worker in working:
            yield worker.chunk(seconds)


@dataclasses.dataclass
class _Worker:
    """A process that waits for a batch, or works on one."""

    process: subprocess.Popen
    connection: Connection
    batch: Sequence[Dialogue] = ()

    def give(self, batch: Sequence[Dialogue]) -> None:
        """Hands a batch to a process that has none."""
        self.batch = batch
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # `chunk` says that it has ended
            self.connection.send(batch)

    def chunk(self, seconds: float) -> Chunk:
        """What the process has made of its batch."""
        first, last = self.batch[0].name, self.batch[-1].name
        among = first if len(self.batch) == 1 else f"{first} to {last}"
        if not self.connection.poll(seconds):
            raise WorkerError(
                f"{among}: not rendered after {seconds:,.0f} seconds. Look for a loop in the chat template that one of "
                "them does not end, or for one that is very long."
            )
        try:
            answer = self.connection.recv()
        except (EOFError, ConnectionResetError):
            raise WorkerError(
                f"{among}: the process that rendered them ended (exit code {self.process.wait()}): it was ended from "
                "outside, or had too little memory. Set data.workers to fewer, or look for what is very long."
            ) from None
        if isinstance(answer, MemoryError):
            raise WorkerError(f"{among}: need more memory than a worker may have. Look for what is very long.")
        if isinstance(answer, UserError):
            raise answer
        return answer


@contextlib.contextmanager
def _start(renderer: Renderer, config: TreeConfig, teacher: TeacherFile | None, memory: int) -> Iterator[_Worker]:
    """Gives a worker, which is gone afterwards."""
    ours, theirs = socket.socketpair()
    environment = {
        **os.environ,
        "TOKENIZERS_PARALLELISM": "false",  # the workers are the threads
        "OPENBLAS_NUM_THREADS": "1",
        "TRANSFORMERS_NO_ADVISORY_WARNINGS": "1",
    }
    with theirs:
        code = f"import sys; sys.path[:] = {sys.path!r}; import {__name__} as it; it.serve({theirs.fileno()}, {memory})"
        process = subprocess.Popen(
            [sys.executable, "-c", code], pass_fds=[theirs.fileno()], env=environment, stdin=subprocess.DEVNULL
        )
    connection = Connection(ours.detach())
    worker = _Worker(process, connection)
    try:
        file = ("", False) if teacher is None else (teacher.path, teacher.same_tokenizer)
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            connection.send((renderer, config, *file))  # of the teacher its path, since its arrays would be copied
        yield worker
    finally:
        connection.close()
        process.kill()
        process.wait()


def serve(descriptor: int, memory: int) -> None:
    """What a worker does: answers each batch from a socket with its chunk, or its error, until the other end closes.

    Args:
      memory: bytes that it may have.
    """
    with (
        contextlib.suppress(EOFError, BrokenPipeError, ConnectionResetError),
        Connection(descriptor) as connection,
    ):
        _serve(connection, memory)


def _serve(connection: Connection, memory: int) -> NoReturn:
    for number in (signal.SIGINT, signal.SIGTERM):  # these are for the process that started this one, and ends it
        signal.signal(number, signal.SIG_IGN)
    _, most = resource.getrlimit(resource.RLIMIT_DATA)
    limit = memory if most == resource.RLIM_INFINITY else min(memory, most)
    resource.setrlimit(resource.RLIMIT_DATA, (limit, most))
    renderer, config, path, same_tokenizer = connection.recv()
    teacher = None
    if path:
        teacher = dataclasses.replace(teacher_file.read_file(path, tokenizer=""), same_tokenizer=same_tokenizer)
    while True:
        batch = connection.recv()
        answer: Chunk | UserError | MemoryError
        try:
            answer = chunks.build_chunk(batch, renderer, config, teacher)
        except UserError as error:
            answer = UserError(str(error))
        except MemoryError:
            answer = MemoryError()
        del batch
        connection.send(answer)
