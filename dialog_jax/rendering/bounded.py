"""Calls that are ended when they take too long or too much memory, in any thread: for templates, which are programs.

A thread looks at the calls in progress and raises an exception in theirs. It ends them between two operations of the
interpreter, not within one, such as a single huge allocation.
"""

import contextlib
import ctypes
import os
import pathlib
import threading
import time
from collections.abc import Callable
from typing import Any

from dialog_jax.errors import UserError

SECONDS = 30.0
"""A call may take so long."""
BYTES = 1 << 30
"""And the process may grow by so much meanwhile."""
_LOOK_EVERY = 0.05  # seconds
_STATM = pathlib.Path("/proc/self/statm")


class Exceeded(UserError):
    """A call was over its limits."""


class _Stopped(BaseException):
    """Raised in a call that is over its limits. No `except Exception` inside it takes it for its own."""


class _Call:
    """One call in progress."""

    def __init__(self):
        self.thread = threading.get_ident()
        self.began = time.monotonic()
        self.seen = False
        self.resident = -1  # bytes that the process had when the call was seen for the second time; most never are
        self.over = ""  # which limit, once it is told to stop


class _Watch:
    """The calls of one process; a fork inherits neither its thread nor a lock that some thread holds."""

    def __init__(self):
        self.lock = threading.Lock()
        self.calls: set[_Call] = set()
        self.begun = threading.Event()

    def look(self) -> None:
        """Ends calls that are over their limits, for ever."""
        while True:
            with self.lock:
                if not self.calls:
                    self.begun.clear()
            self.begun.wait()
            time.sleep(_LOOK_EVERY)
            resident = _resident() if any(call.seen for call in list(self.calls)) else -1
            with self.lock:
                for call in self.calls:
                    if call.seen and call.resident < 0:
                        call.resident = resident
                    call.seen = True
                    if not call.over and (over := _over(call, resident)):
                        call.over = over
                        _raise_in(call.thread, _Stopped)


_watches: dict[int, _Watch] = {}  # by process


def run(function: Callable[..., Any], *arguments: Any, **keywords: Any) -> Any:
    """What the function returns. Calls must not be nested.

    Raises:
      Exceeded: it took longer than `SECONDS`, or the process grew by more than `BYTES`; says how much.
    """
    watch, call = _watch(), _Call()
    try:
        try:
            with watch.lock:
                watch.calls.add(call)
            watch.begun.set()
            return function(*arguments, **keywords)
        finally:
            _end(watch, call)
    except _Stopped:
        _end(watch, call)  # it may have come before the call was ended
    raise Exceeded(call.over)  # out here, so that it does not keep what the call had


def _watch() -> _Watch:
    process = os.getpid()
    if process not in _watches:
        made = _Watch()
        if _watches.setdefault(process, made) is made:
            threading.Thread(target=made.look, name="bounded", daemon=True).start()
    return _watches[process]


def _end(watch: _Watch, call: _Call) -> None:
    """From here on nothing is raised in the call's thread, nor what was asked for and has not happened yet."""
    with watch.lock:
        watch.calls.discard(call)
    if call.over:
        # What may be on its way is not taken back but replaced, and waited for: Python 3.11 would go on looking for it,
        # and never get into the first function that it calls under a profiler or debugger. Again and again, since from
        # Python 3.12 on it may strike in what the garbage collector calls, and is lost there.
        with contextlib.suppress(_Stopped):
            while True:
                _raise_in(call.thread, _Stopped)


def _over(call: _Call, resident: int) -> str:
    seconds, grown = time.monotonic() - call.began, resident - call.resident if call.resident >= 0 else 0
    if seconds > SECONDS:
        return f"it ran for {seconds:.1f} s, the limit is {SECONDS:g} s"
    if grown > BYTES:
        return f"it took {grown / 2**20:,.0f} MiB of memory, the limit is {BYTES / 2**20:,.0f} MiB"
    return ""


def _raise_in(thread: int, kind: type[BaseException]) -> None:
    ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread), ctypes.py_object(kind))


def _resident() -> int:
    """Bytes of memory that the process has; 0 where that is not told."""
    try:
        return int(_STATM.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return 0
