"""Signals that ask a run to stop: SIGINT (Ctrl-C), SIGTERM (from a scheduler, before it takes the machine) and SIGHUP
(the terminal was closed).

Until there is something to save, a signal stops the run immediately. From then on it is deferred to the end of a step,
but a second SIGINT still stops immediately.
"""

import contextlib
import os
import signal
import threading
from collections.abc import Iterator, Sequence

import jax

from dialog_jax.training import distributed


class StoppedError(KeyboardInterrupt):
    """A run that stopped because a signal asked it to.

    It is a KeyboardInterrupt, so that libraries do not catch it as an ordinary error and continue, as asyncio (which
    orbax uses) and any `except Exception` would.

    Args:
      number: of the signal.
      step: the last step, which is saved; None if there was nothing to save yet.
    """

    def __init__(self, number: signal.Signals, step: int | None = None):
        self.signal, self.step = number, step
        place = "before its first step" if step is None else f"after step {step:,}, which is saved"
        super().__init__(f"stopped by {number.name} {place}; the same command resumes the run")


class Listener:
    """Receives the signals of `listen`.

    All processes of a run must save the same step, so with several of them none acts on its own signal: JAX's runtime
    receives SIGTERM, the others are forwarded to it as SIGTERM, and all processes learn of it in `agree_on_signal`.

    Args:
      single_process: whether this process is the only one of its run.
    """

    def __init__(self, *, single_process: bool = True) -> None:
        self.received: signal.Signals | None = None
        """The first signal since `defer_signals`; with several processes, once all of them know of it."""
        self._single_process, self._local_signal = single_process, signal.SIGTERM
        self._deferring = self._interrupted = False
        self._terminals = [number for number in (1, 2) if os.isatty(number)]

    def defer_signals(self, step: int) -> None:
        """Defers signals from now on, because the state after `step` (or soon after a later one) can be saved."""
        self._deferring = True
        if not self._single_process and distributed.announce_past_steps(step):
            self.received = self._local_signal

    def handle(self, number: int, frame: object) -> None:
        """Handles a signal; installed by `listen`."""
        del frame
        received = signal.Signals(number)
        if received == signal.SIGHUP:
            _silence(self._terminals)
        if not self._deferring:
            raise StoppedError(received)
        if self._interrupted and received == signal.SIGINT:
            raise KeyboardInterrupt
        self._interrupted = True
        if self._single_process:
            self.received = self.received or received
        else:
            self._local_signal = received
            os.kill(os.getpid(), signal.SIGTERM)

    def agree_on_signal(self, step: int) -> signal.Signals | None:
        """Returns the signal that stops the run after `step`, on all processes or none. Call it after every step."""
        if not self._single_process and distributed.stop_requested(step):
            self.received = self._local_signal
        return self.received


def _silence(descriptors: Sequence[int]) -> None:
    """Discards what is written to a terminal that was closed, where writing would be an error."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for descriptor in descriptors:
        os.dup2(nowhere, descriptor)
    os.close(nowhere)


@contextlib.contextmanager
def listen() -> Iterator[Listener]:
    """Receives SIGINT, SIGTERM and SIGHUP; does nothing outside the main thread, where Python receives no signals.

    SIGHUP stays ignored under nohup. SIGINT is received even if a shell that started this process in the background had
    it ignored.
    """
    single_process = jax.process_count() == 1
    listener = Listener(single_process=single_process)
    if threading.current_thread() is not threading.main_thread():
        yield listener
        return
    numbers = [signal.SIGINT, *([signal.SIGTERM] if single_process else [])]
    if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:
        numbers.append(signal.SIGHUP)
    previous = {number: signal.signal(number, listener.handle) for number in numbers}
    try:
        yield listener
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
