"""Worker processes that build chunks of trees: batches of dialogues in, their chunks out, in the same order.

Each worker is a fresh interpreter that imports this module and not the program that started it, so that it does not
load JAX. This process holds one batch and one chunk per worker, whatever the size of the set; a worker's memory and the
time for a batch are limited. Batches and chunks go through a socket that no other process can open.
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
import traceback
from collections.abc import Iterable, Iterator, Sequence
from multiprocessing.connection import Connection
from typing import NoReturn

from dialog_jax.dialogues.dialogue import Dialogue
from dialog_jax.errors import UserError
from dialog_jax.rendering import template_process
from dialog_jax.rendering.sequences import Renderer
from dialog_jax.trees import chunks, teacher_file
from dialog_jax.trees.chunks import Chunk
from dialog_jax.trees.dialogue_trees import TreeConfig
from dialog_jax.trees.teacher_file import TeacherFile

MEMORY = 8 << 30  # bytes of a worker, besides the files it maps
SECONDS = 600.0  # to wait for a chunk


class WorkerError(UserError):
    """A worker needs too much time or memory, or was killed; a build can resume from the chunks before it."""


def build_chunks(
    batches: Iterable[list[Dialogue | UserError]],
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
        templates are never rendered in this process.
      memory: limit of a worker's memory in bytes, where the system supports one.
      seconds: to wait for a chunk.

    Raises:
      UserError: what `chunks.build_chunk` raises.
      WorkerError: a batch takes too much memory or time, or its worker was killed. Names the dialogues.
      RuntimeError: there is a bug; the message ends with the worker's traceback.
    """
    batches = iter(batches)
    first = list(itertools.islice(batches, 2))
    batches = itertools.chain(first, batches)
    if not workers or len(first) < 2:
        yield from chunks.build_chunks(batches, renderer, config, teacher)
        return
    with contextlib.ExitStack() as stack:
        busy_workers: collections.deque[_Worker] = collections.deque()  # in the order of their chunks
        for batch in batches:  # read while the workers work
            if len(busy_workers) < workers:
                worker, chunk = stack.enter_context(_start(renderer, config, teacher, memory)), None
            else:
                worker = busy_workers.popleft()
                chunk = worker.receive(seconds)
            worker.send(batch)
            busy_workers.append(worker)
            if chunk is not None:
                yield chunk
        for worker in busy_workers:
            yield worker.receive(seconds)


@dataclasses.dataclass
class _Worker:
    """A worker process, idle or with a batch."""

    process: subprocess.Popen
    connection: Connection
    batch: Sequence[Dialogue | UserError] = ()

    def send(self, batch: Sequence[Dialogue | UserError]) -> None:
        """Sends a batch to an idle worker."""
        self.batch = batch
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # `receive` raises the error
            self.connection.send(batch)

    def receive(self, seconds: float) -> Chunk:
        """Waits for the chunk of the worker's batch and returns it; the worker is idle afterwards."""
        dialogues = [one.name for one in self.batch if isinstance(one, Dialogue)]
        names = " to ".join(dict.fromkeys([dialogues[0], dialogues[-1]])) if dialogues else "skipped records"
        if not self.connection.poll(seconds):
            raise WorkerError(
                f"{names}: not rendered after {seconds:,.0f} seconds. One of them may be very long, or the chat "
                "template may loop on it. Remove it, or correct the template."
            )
        try:
            answer = self.connection.recv()
        except (EOFError, ConnectionResetError):
            raise WorkerError(
                f"{names}: the process that rendered them ended (exit code {self.process.wait()}): it was killed, had "
                "too little memory, or the chat template ran too long. Lower data.workers, remove dialogues that are "
                "very long, or correct the template."
            ) from None
        if isinstance(answer, MemoryError):
            raise WorkerError(f"{names}: need more memory than a worker may have. Remove dialogues that are very long.")
        if isinstance(answer, UserError):
            raise answer
        if isinstance(answer, str):
            raise RuntimeError(f"{names}: a bug in the process that rendered them:\n{answer}")
        return answer


@contextlib.contextmanager
def _start(renderer: Renderer, config: TreeConfig, teacher: TeacherFile | None, memory: int) -> Iterator[_Worker]:
    """Yields a new worker; ends it after the block."""
    parent_socket, child_socket = socket.socketpair()
    environment = {
        **os.environ,
        "TOKENIZERS_PARALLELISM": "false",  # there is one worker per processor
        "OPENBLAS_NUM_THREADS": "1",
        "TRANSFORMERS_NO_ADVISORY_WARNINGS": "1",
    }
    with child_socket:
        descriptor = child_socket.fileno()
        code = f"import sys; sys.path[:] = {sys.path!r}; import {__name__} as pool; pool.serve({descriptor}, {memory})"
        process = subprocess.Popen(
            [sys.executable, "-c", code], pass_fds=[descriptor], env=environment, stdin=subprocess.DEVNULL
        )
    connection = Connection(parent_socket.detach())
    worker = _Worker(process, connection)
    try:
        file = ("", False) if teacher is None else (teacher.path, teacher.same_tokenizer)
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            connection.send((renderer, config, *file))  # the teacher's path, since pickling would copy its arrays
        yield worker
    finally:
        connection.close()
        process.kill()
        process.wait()


def serve(descriptor: int, memory: int) -> None:
    """Runs a worker: answers each batch from a socket with its chunk, or its error, until the other end closes.

    Args:
      memory: limit in bytes.
    """
    with (
        contextlib.suppress(EOFError, BrokenPipeError, ConnectionResetError),
        Connection(descriptor) as connection,
    ):
        _serve(connection, memory)


def _serve(connection: Connection, memory: int) -> NoReturn:
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):  # the process that started this one handles them
        signal.signal(number, signal.SIG_IGN)
    _, hard_limit = resource.getrlimit(resource.RLIMIT_DATA)
    limit = memory if hard_limit == resource.RLIM_INFINITY else min(memory, hard_limit)
    resource.setrlimit(resource.RLIMIT_DATA, (limit, hard_limit))
    template_process.render_in_this_process()
    renderer, config, path, same_tokenizer = connection.recv()
    teacher = None
    if path:
        teacher = dataclasses.replace(teacher_file.read_file(path, tokenizer=""), same_tokenizer=same_tokenizer)
    while True:
        batch = connection.recv()
        answer: Chunk | UserError | MemoryError | str
        try:
            answer = chunks.build_chunk(batch, renderer, config, teacher)
        except UserError as error:
            answer = UserError(str(error))
        except MemoryError:
            answer = MemoryError()
        except BaseException:  # a bug: the other process raises an error with the traceback, and ends this one
            answer = traceback.format_exc()
        del batch
        connection.send(answer)
