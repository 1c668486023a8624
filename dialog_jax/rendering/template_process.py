"""Chat templates, which are programs that anyone may have written, rendered in a process of limited memory and time.

A process that renders has one such child: a fresh interpreter, started with the first text, which ends when it has been
idle. The operating system limits its memory and CPU time and keeps it from writing files; the parent limits the time it
waits for a text, and then kills it. Templates and messages go there through a socket that no other process can open,
and only JSON comes back.

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
from collections.abc import Mapping, Sequence
from multiprocessing.connection import Connection
from typing import Any, NamedTuple

import jinja2
import tokenizers
import transformers

from dialog_jax.errors import UserError

SECONDS = 30.0
"""Time that a request may take."""
BYTES = 1 << 30
"""Memory that the process may have."""
LONGEST = 64 << 20
"""Characters of a text that a template may write."""
_START_SECONDS = 300.0  # on a machine with much else to do
_IDLE_SECONDS = 600.0  # after which the process ends
_LARGEST_SHOWN = 500  # characters of a template's reason
_READY = b"ready"
# What running a template raises, whether it means to or not.
_REFUSALS = (jinja2.TemplateError, ValueError, TypeError, LookupError, AttributeError, ArithmeticError, RecursionError)
_MARK = "\ue000text\ue000"  # behind each text of one call
# A template around the given one. The line break behind the first tag goes with it (trim_blocks); the empty output
# before the second keeps white space at the template's end (lstrip_blocks).
_TOGETHER = """\
{%% macro one_rendering(messages, add_generation_prompt) %%}
%s{{ '' }}{%% endmacro %%}
{%%- for job in rendered_jobs -%%}
{{ one_rendering(messages[:job[0]], job[1]) }}{{ rendered_mark }}
{%%- endfor -%%}"""
_equal_in_macro: dict[str, bool] = {}  # whether a template renders the same in a macro, once that has been seen


class TemplateStopped(UserError):
    """A template took more time or memory than it may have."""


class Job(NamedTuple):
    """A text to render: of the first `messages` messages, perhaps with the generation prompt."""

    messages: int
    add_generation_prompt: bool = False


class Rendering(NamedTuple):
    """The texts of some jobs, in order, up to the first that the template refuses."""

    texts: list[str]
    refusal: str = ""
    """Why the job after the last text was refused; empty if none was."""


def render_here(
    template: str, messages: Sequence[Mapping[str, Any]], jobs: Sequence[Job], variables: Mapping[str, Any]
) -> Rendering:
    """Returns the texts of the jobs, rendered in this process, without limits of time and memory.

    Args:
      template: Jinja text.
      messages: as the template sees them.
      variables: of the template, `tools` and the names of special tokens among them.
    """
    together = _render_together(template, messages, jobs, variables)
    if together:
        return Rendering(together)
    texts: list[str] = []
    for job in jobs:
        try:
            texts.append(_apply(template, messages[: job.messages], job.add_generation_prompt, variables))
        except jinja2.TemplateSyntaxError as error:
            return Rendering(texts, f"it is not Jinja at line {error.lineno}: {error.message}")
        except _REFUSALS as error:
            return Rendering(texts, (str(error) or type(error).__name__)[:_LARGEST_SHOWN])
    return Rendering(texts)


def _render_together(
    template: str, messages: Sequence[Mapping[str, Any]], jobs: Sequence[Job], variables: Mapping[str, Any]
) -> list[str]:
    """Returns the texts of the jobs from one call of the template's macro for each; empty where that is not reliable.

    A call of `apply_chat_template` for each job would copy all messages before it each time.
    """
    if len(jobs) == 1 or not _equal_in_macro.get(template, True):
        return []
    # Jinja removes a line break at the end of a template, too.
    try:
        texts = _apply(
            _TOGETHER % template.removesuffix("\n"),
            messages,
            False,
            {**variables, "rendered_jobs": [list(job) for job in jobs], "rendered_mark": _MARK},
        ).split(_MARK)
    except _REFUSALS:
        return []
    if len(texts) != len(jobs) + 1:  # a message contains the mark
        return []
    if template not in _equal_in_macro:
        _equal_in_macro[template] = texts[:-1] == [
            _apply(template, messages[: job.messages], job.add_generation_prompt, variables) for job in jobs
        ]
    return texts[:-1] if _equal_in_macro[template] else []


def _apply(
    template: str, messages: Sequence[Mapping[str, Any]], add_generation_prompt: bool, variables: Mapping[str, Any]
) -> str:
    text = _make_tokenizer().apply_chat_template(
        [dict(message) for message in messages],
        chat_template=template,
        tokenize=False,
        add_generation_prompt=add_generation_prompt,
        **variables,
    )
    assert isinstance(text, str)
    if len(text) > LONGEST:
        raise UserError(f"it wrote {len(text):,} characters, the limit is {LONGEST:,}")
    return text


def limit_template(tokenizer: transformers.PreTrainedTokenizerFast) -> transformers.PreTrainedTokenizerFast:
    """Returns the tokenizer with an `apply_chat_template` that renders in the limited process, and makes text only."""

    def apply_chat_template(
        messages: Sequence[Mapping[str, Any]], *, tools: Any = None, add_generation_prompt: bool = False, **kwargs: Any
    ) -> str:
        assert kwargs.pop("tokenize") is False
        variables = {"tools": tools, **tokenizer.special_tokens_map, **kwargs}
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
    """Returns what `render_here` does, rendered in the limited process.

    Raises:
      TemplateStopped: the jobs take more than `SECONDS` or `BYTES`, or the process was ended from outside.
    """
    return _client(os.getpid()).render((template, messages, jobs, variables))


@functools.cache
def _make_tokenizer() -> transformers.PreTrainedTokenizerFast:
    """A tokenizer without tokens, whose `apply_chat_template` renders the template that it is given."""
    return transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizers.Tokenizer(tokenizers.models.BPE()))


@functools.cache
def _client(process: int) -> "_Client":
    """The client of this process; a fork has another."""
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
    """Sends requests to a child process, which it starts when there is none; safe for threads."""

    def __init__(self):
        self._lock = threading.Lock()
        self._child: _Child | None = None

    def render(self, request: tuple[Any, ...]) -> Rendering:
        with self._lock:
            try:
                while (answer := self._ask(request)) is None:
                    pass
            except BaseException:  # the child may be at work still
                self._stop()
                raise
            if "stopped" in answer:
                self._stop()
                raise TemplateStopped(answer["stopped"])
            return Rendering(_restore(answer["texts"]), answer["refusal"])

    def _ask(self, request: tuple[Any, ...]) -> dict[str, Any] | None:
        """The child's answer; None if it had ended by itself before it saw the request."""
        if self._child is None:
            self._child = _start()
        process, connection = self._child.process, self._child.connection
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # then there is nothing to receive either
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
    ours, theirs = socket.socketpair()
    environment = {**os.environ, "OPENBLAS_NUM_THREADS": "1", "TRANSFORMERS_NO_ADVISORY_WARNINGS": "1"}
    with theirs:
        code = f"import sys; sys.path[:] = {sys.path!r}; import {__name__} as it; it.serve({theirs.fileno()}, {BYTES})"
        process = subprocess.Popen(
            [sys.executable, "-c", code], pass_fds=[theirs.fileno()], env=environment, stdin=subprocess.DEVNULL
        )
    child = _Child(process, Connection(ours.detach()))
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
    """Answers the requests of a socket until the other end closes, or is silent.

    Args:
      memory: bytes that this process may have.
    """
    with (
        contextlib.suppress(EOFError, BrokenPipeError, ConnectionResetError),
        Connection(descriptor) as connection,
    ):
        render_here("", [{"role": "user", "content": ""}], [Job(1)], {})  # imports what it needs
        _limit_process(memory)
        connection.send_bytes(_READY)
        while connection.poll(_IDLE_SECONDS):
            _set_soft_limit(resource.RLIMIT_CPU, int(time.process_time() + SECONDS) + 1)
            connection.send_bytes(_answer(connection, memory))


def _answer(connection: Connection, memory: int) -> bytes:
    try:
        texts, refusal = render_here(*connection.recv())
        return json.dumps({"texts": _shorten(texts), "refusal": refusal}).encode()
    except MemoryError:
        return json.dumps({"stopped": f"it needs more than {memory / 2**20:,.0f} MiB of memory"}).encode()


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
    for number in (signal.SIGINT, signal.SIGTERM):  # these are for the process that started this one
        signal.signal(number, signal.SIG_IGN)
    _set_soft_limit(resource.RLIMIT_DATA, memory)
    _set_soft_limit(resource.RLIMIT_FSIZE, 0)
    _set_soft_limit(resource.RLIMIT_CORE, 0)


def _set_soft_limit(kind: int, limit: int) -> None:
    _, hard = resource.getrlimit(kind)
    resource.setrlimit(kind, (limit if hard == resource.RLIM_INFINITY else min(limit, hard), hard))
