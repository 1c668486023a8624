"""Signals that ask a run to stop: SIGINT (Ctrl-C) and SIGTERM (a scheduler's, before it takes the machine).

Until there is something to save, a signal stops at once. From then on it is kept until the loop asks for it, between
two steps; a second SIGINT stops at once all the same.
"""

import contextlib
import signal
import threading
from collections.abc import Iterator


class StoppedError(Exception):
    """A run that stopped because a signal asked it to.

    Args:
      number: of the signal.
      step: the last step, which is saved; None if there was nothing to save yet.
    """

    def __init__(self, number: signal.Signals, step: int | None = None):
        self.signal, self.step = number, step
        what = "before its first step" if step is None else f"after step {step:,}, which is saved"
        super().__init__(f"stopped by {number.name} {what}; the same command goes on from there")


class Listener:
    """What arrived since `listening` began."""

    def __init__(self) -> None:
        self.received: signal.Signals | None = None
        """The first signal since `keep`."""
        self._keeping = False

    def keep(self) -> None:
        """From now on signals are kept, for there is something to save."""
        self._keeping = True

    def hear(self, number: int, frame: object) -> None:
        """Handles a signal."""
        del frame
        arrived = signal.Signals(number)
        if not self._keeping:
            raise StoppedError(arrived)
        if self.received is not None and arrived == signal.SIGINT:
            raise KeyboardInterrupt
        self.received = self.received or arrived


@contextlib.contextmanager
def listening() -> Iterator[Listener]:
    """Hears SIGINT and SIGTERM; outside the main thread, where Python hears none, nothing changes."""
    listener = Listener()
    if threading.current_thread() is not threading.main_thread():
        yield listener
        return
    before = {number: signal.signal(number, listener.hear) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield listener
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
