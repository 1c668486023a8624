"""Signals that ask a run to stop: SIGINT (Ctrl-C) and SIGTERM (a scheduler's, before it takes the machine).

Until there is something to save, a signal stops at once. From then on it is kept until the loop asks for it, between
two steps; a second SIGINT stops at once all the same.
"""

import contextlib
import os
import signal
import threading
from collections.abc import Iterator

import jax

from dialog_jax.training import distributed


class StoppedError(KeyboardInterrupt):
    """A run that stopped because a signal asked it to.

    A KeyboardInterrupt, so that no library takes it for an error of its own and goes on, as `except Exception` and
    asyncio, in which orbax reads, would.

    Args:
      number: of the signal.
      step: the last step, which is saved; None if there was nothing to save yet.
    """

    def __init__(self, number: signal.Signals, step: int | None = None):
        self.signal, self.step = number, step
        what = "before its first step" if step is None else f"after step {step:,}, which is saved"
        super().__init__(f"stopped by {number.name} {what}; the same command goes on from there")


class Listener:
    """What arrived since `listening` began.

    Of many processes each must save the same step, so none may act on a signal of its own: JAX's runtime takes SIGTERM,
    and SIGINT is handed to it as SIGTERM; all learn of it in `agree_on_signal`.

    Args:
      alone: whether this process is the only one of its run.
    """

    def __init__(self, *, alone: bool = True) -> None:
        self.received: signal.Signals | None = None
        """The first signal since `defer_signals`; of many processes, once all have received it."""
        self._alone, self._own = alone, signal.SIGTERM
        self._deferring = self._interrupted = False

    def defer_signals(self, step: int) -> None:
        """From now on signals are kept, for there is something to save: the state after `step`, or soon a later one."""
        self._deferring = True
        if not self._alone and distributed.announce_past_steps(step):
            self.received = self._own

    def handle(self, number: int, frame: object) -> None:
        """Handles a signal."""
        del frame
        arrived = signal.Signals(number)
        if not self._deferring:
            raise StoppedError(arrived)
        if self._interrupted and arrived == signal.SIGINT:
            raise KeyboardInterrupt
        self._interrupted = True
        if self._alone:
            self.received = self.received or arrived
        else:
            self._own = arrived
            os.kill(os.getpid(), signal.SIGTERM)

    def agree_on_signal(self, step: int) -> signal.Signals | None:
        """What is to stop the run after `step`, the same on all processes. To be called after every step."""
        if not self._alone and distributed.stop_requested(step):
            self.received = self._own
        return self.received


@contextlib.contextmanager
def listen() -> Iterator[Listener]:
    """Hears SIGINT and SIGTERM; outside the main thread, where Python hears none, nothing changes."""
    alone = jax.process_count() == 1
    listener = Listener(alone=alone)
    if threading.current_thread() is not threading.main_thread():
        yield listener
        return
    heard = (signal.SIGINT, signal.SIGTERM) if alone else (signal.SIGINT,)
    before = {number: signal.signal(number, listener.handle) for number in heard}
    try:
        yield listener
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
