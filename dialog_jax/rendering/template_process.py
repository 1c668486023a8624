"""Chat templates, which are programs that anyone may have written, rendered in a process of limited memory and time.

A process that renders has one such child: a fresh interpreter, which starts with the first request and ends after a
while without requests. The operating system limits its memory and CPU time and keeps it from writing files; the parent
limits the time it waits for a text, and then kills it. Templates and messages go there through a socket that no other
process can open, and only JSON comes back. A process that only renders, and that another process limits and watches,
needs no child (`render_in_this_process`).

Jinja's sandbox, which transformers uses, keeps templates from Python's objects. Knows messages as dictionaries; knows
no tokens.
"""

import contextlib
import copy
import dataclasses
import functools
import itertools
import json
import os
import resource
import signal
import socket
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Mapping, Sequence
from multiprocessing.connection import Connection
from typing import Any

import transformers

from dialog_jax.errors import UserError
from dialog_jax.rendering import template_rendering
from dialog_jax.rendering.template_rendering import Job, Rendering

SECONDS = 30.0
"""Time limit of a request."""
BYTES = 1 << 30
"""Memory limit of the process."""
_INSTRUCTION_SECONDS = 30.0  # of CPU for one instruction of Python; copying a gigabyte can take a second
_START_SECONDS = 300.0  # generous, for a busy machine
_IDLE_SECONDS = 600.0  # after which the process ends
_READY = b"ready"
_is_limited = False  # whether this process renders by itself


class TemplateStopped(UserError):
    """A template exceeded the limit of time or memory."""


class _TimeExceeded(BaseException):
    """Raised by a signal handler; not an `Exception`, so that it is not taken for an error of the template."""


def limit_template(
    tokenizer: transformers.PreTrainedTokenizerFast, template_time: str
) -> transformers.PreTrainedTokenizerFast:
    """Returns the tokenizer with an `apply_chat_template` that renders text, not tokens, in the limited process.

    Args:
      template_time: `Renderer.template_time`.
    """
    time_variable = {template_rendering.TIME: template_time} if template_time else {}

    def apply_chat_template(
        messages: Sequence[Mapping[str, Any]], *, tools: Any = None, add_generation_prompt: bool = False, **kwargs: Any
    ) -> str:
        assert kwargs.pop("tokenize") is False
        variables = {"tools": tools, **tokenizer.special_tokens_map, **kwargs, **time_variable}
        job = Job(len(messages), add_generation_prompt)
        texts, refusal = render(tokenizer.get_chat_template(tools=tools), messages, [job], variables)
        if not texts:
            raise UserError(refusal)
        return texts[0]

    limited = copy.copy(tokenizer)
    setattr(limited, "apply_chat_template", apply_chat_template)  # noqa: B010
    return limited


def render(
    template: str, messages: Sequence[Mapping[str, Any]], jobs: Sequence[Job], variables: Mapping[str, Any]
) -> Rendering:
    """Returns what `template_rendering.render_jobs` does, rendered in the limited process.

    Raises:
      TemplateStopped: the jobs take more than `SECONDS` or `BYTES`, or the process was killed.
      RuntimeError: there is a bug; the message ends with the traceback of the process.
    """
    request = (template, messages, jobs, variables)
    return _render_limited(request) if _is_limited else _client(os.getpid()).render(request)


def render_in_this_process() -> None:
    """Makes this process render templates by itself, within the same limits; it must do so in its main thread."""
    global _is_limited
    _is_limited = True

    def stop(number: int, frame: Any) -> None:
        raise _TimeExceeded

    signal.signal(signal.SIGPROF, stop)
    _set_soft_limit(resource.RLIMIT_CORE, 0)


def _render_limited(request: tuple[Any, ...]) -> Rendering:
    """Returns what `template_rendering.render_jobs` does; limits the CPU time and the memory that this takes."""
    memory, _ = resource.getrlimit(resource.RLIMIT_DATA)
    _set_soft_limit(resource.RLIMIT_DATA, _measure_data() + BYTES)
    # A handler runs between two instructions of Python; a template that stays within one is ended by the system.
    _set_soft_limit(resource.RLIMIT_CPU, int(time.process_time() + SECONDS + _INSTRUCTION_SECONDS))
    signal.setitimer(signal.ITIMER_PROF, SECONDS)
    try:
        return template_rendering.render_jobs(*request)
    except _TimeExceeded:
        raise TemplateStopped(f"it ran for more than {SECONDS:g} s") from None
    except MemoryError:
        raise TemplateStopped(f"it needs more than {BYTES / 2**20:,.0f} MiB of memory") from None
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        _set_soft_limit(resource.RLIMIT_CPU, resource.RLIM_INFINITY)
        _set_soft_limit(resource.RLIMIT_DATA, memory)


def _measure_data() -> int:
    """Returns the bytes of this process that count against RLIMIT_DATA."""
    try:
        with open("/proc/self/statm", encoding="ascii") as file:
            return int(file.read().split()[5]) * resource.getpagesize()
    except OSError:  # not Linux
        return 0


@functools.cache
def _client(process: int) -> "_Client":
    """Returns the client of this process; a forked process has another."""
    del process
    return _Client()


@dataclasses.dataclass(frozen=True)
class _Child:
    process: subprocess.Popen
    connection: Connection

    def stop(self) -> None:
        self.connection.close()
        self.process.kill()
        self.process.wait()


class _Client:
    """Sends requests to a child process, which it starts if there is none; thread-safe."""

    def __init__(self):
        self._lock = threading.Lock()
        self._child: _Child | None = None

    def render(self, request: tuple[Any, ...]) -> Rendering:
        with self._lock:
            try:
                while (answer := self._ask(request)) is None:
                    pass
            except BaseException:  # the child may still be working
                self._stop()
                raise
            if "stopped" in answer:
                self._stop()
                raise TemplateStopped(answer["stopped"])
            if "bug" in answer:
                raise RuntimeError(f"a bug in the process that renders chat templates:\n{answer['bug']}")
            return Rendering(_restore(answer["texts"]), answer["refusal"])

    def _ask(self, request: tuple[Any, ...]) -> dict[str, Any] | None:
        """Returns the child's answer; None if the child ended by itself before it received the request."""
        if self._child is None:
            self._child = _start()
        process, connection = self._child.process, self._child.connection
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # receiving fails below, too
            connection.send(request)
        if not connection.poll(SECONDS):
            return {"stopped": f"it ran for more than {SECONDS:g} s"}
        try:
            return json.loads(connection.recv_bytes())
        except (EOFError, ConnectionResetError):
            code = process.wait()
        self._stop()
        if code == 0:
            return None
        if code == -signal.SIGXCPU:
            return {"stopped": f"it ran for more than {SECONDS:g} s"}
        return {"stopped": f"its process was ended (exit code {code}), from outside or for want of memory"}

    def _stop(self) -> None:
        if self._child is not None:
            self._child.stop()
            self._child = None


def _start() -> _Child:
    parent_socket, child_socket = socket.socketpair()
    environment = {**os.environ, "OPENBLAS_NUM_THREADS": "1", "TRANSFORMERS_NO_ADVISORY_WARNINGS": "1"}
    with child_socket:
        descriptor = child_socket.fileno()
        code = f"import sys; sys.path[:] = {sys.path!r}; import {__name__} as child; child.serve({descriptor}, {BYTES})"
        process = subprocess.Popen(
            [sys.executable, "-c", code], pass_fds=[descriptor], env=environment, stdin=subprocess.DEVNULL
        )
    child = _Child(process, Connection(parent_socket.detach()))
    try:
        if child.connection.poll(_START_SECONDS) and child.connection.recv_bytes() == _READY:
            return child
    except (EOFError, ConnectionResetError):
        pass
    child.stop()
    raise UserError(
        f"the process that renders chat templates did not start (exit code {process.returncode}). It needs "
        f"{BYTES / 2**20:,.0f} MiB of memory: look for what the machine lacks."
    )


def serve(descriptor: int, memory: int) -> None:
    """Answers the requests of a socket until the other end closes or sends none for a while.

    Args:
      memory: limit of this process in bytes.
    """
    with (
        contextlib.suppress(EOFError, BrokenPipeError, ConnectionResetError),
        Connection(descriptor) as connection,
    ):
        template_rendering.render_jobs(
            "", [{"role": "user", "content": ""}], [Job(1)], {}
        )  # imports modules before memory is limited
        _limit_process(memory)
        connection.send_bytes(_READY)
        while connection.poll(_IDLE_SECONDS):
            _set_soft_limit(resource.RLIMIT_CPU, int(time.process_time() + SECONDS) + 1)
            connection.send_bytes(_answer(connection, memory))


def _answer(connection: Connection, memory: int) -> bytes:
    try:
        texts, refusal = template_rendering.render_jobs(*connection.recv())
        return json.dumps({"texts": _shorten(texts), "refusal": refusal}).encode()
    except MemoryError:
        return json.dumps({"stopped": f"it needs more than {memory / 2**20:,.0f} MiB of memory"}).encode()
    except (EOFError, BrokenPipeError, ConnectionResetError):  # there is no request: the other process ended
        raise
    except BaseException:  # a bug: the other process raises an error with the traceback
        return json.dumps({"bug": traceback.format_exc()}).encode()


def _shorten(texts: Sequence[str]) -> list[list[Any]]:
    """Returns for each text the number of characters that it shares with the one before, if it continues that.

    ["a", "ab", "abc", "x"]  ->  [[0, "a"], [1, "b"], [2, "c"], [0, "x"]]
    """
    shared = [len(before) if text.startswith(before) else 0 for before, text in itertools.pairwise(["", *texts])]
    return [[length, text[length:]] for length, text in zip(shared, texts, strict=True)]


def _restore(shortened: Sequence[Sequence[Any]]) -> list[str]:
    """Returns the texts that `_shorten` was given."""
    texts: list[str] = []
    for shared, rest in shortened:
        texts.append(texts[-1][:shared] + rest if shared else rest)
    return texts


def _limit_process(memory: int) -> None:
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):  # the process that started this one handles them
        signal.signal(number, signal.SIG_IGN)
    _set_soft_limit(resource.RLIMIT_DATA, memory)
    _set_soft_limit(resource.RLIMIT_FSIZE, 0)
    _set_soft_limit(resource.RLIMIT_CORE, 0)


def _set_soft_limit(kind: int, limit: int) -> None:
    _, hard = resource.getrlimit(kind)
    if hard != resource.RLIM_INFINITY:
        limit = hard if limit == resource.RLIM_INFINITY else min(limit, hard)
    resource.setrlimit(kind, (limit, hard))
