"""What a listener makes of signals, one by one."""

import asyncio
import os
import pathlib
import pty
import signal
import sys

from absl.testing import absltest

from dialog_jax.training import signals
from dialog_jax.training.signals import Listener, StoppedError

_LISTENING = """
import pathlib, sys, time
from dialog_jax.training import signals
with signals.listen() as listener:
    listener.defer_signals(0)
    print("ready", flush=True)
    while not listener.received:
        time.sleep(0.01)
    print("a line to the closed terminal", flush=True)
    print("and another", file=sys.stderr, flush=True)
    pathlib.Path(sys.argv[1]).write_text(listener.received.name)
"""


class HangupTest(absltest.TestCase):
    def test_closed_terminal_is_deferred_like_sigterm_and_printing_goes_on(self):
        file = pathlib.Path(self.create_tempdir().full_path) / "received"
        process, terminal = pty.fork()
        if not process:
            signal.signal(signal.SIGHUP, signal.SIG_DFL)  # the tests may run under nohup
            os.execv(sys.executable, [sys.executable, "-c", _LISTENING, str(file)])
        output = b""
        while b"ready" not in output:
            output += os.read(terminal, 1000)
        os.close(terminal)
        self.assertEqual(os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]), 0, output)
        self.assertEqual(file.read_text(), "SIGHUP")

    def test_signal_that_nohup_ignores_stays_ignored(self):
        previous = signal.signal(signal.SIGHUP, signal.SIG_IGN)
        try:
            with signals.listen() as listener:
                listener.defer_signals(0)
                os.kill(os.getpid(), signal.SIGHUP)
                self.assertIsNone(listener.received)
                os.kill(os.getpid(), signal.SIGTERM)
                self.assertEqual(listener.received, signal.SIGTERM)
        finally:
            signal.signal(signal.SIGHUP, previous)


class ListenerTest(absltest.TestCase):
    def setUp(self):
        super().setUp()
        self.listener = Listener()

    def test_first_signal_is_kept(self):
        self.listener.defer_signals(0)
        self.assertIsNone(self.listener.received)
        self.listener.handle(signal.SIGTERM, None)
        self.listener.handle(signal.SIGTERM, None)
        self.assertEqual(self.listener.received, signal.SIGTERM)

    def test_second_interrupt_stops_at_once(self):
        self.listener.defer_signals(0)
        self.listener.handle(signal.SIGINT, None)
        with self.assertRaises(KeyboardInterrupt):
            self.listener.handle(signal.SIGINT, None)
        self.assertEqual(self.listener.received, signal.SIGINT)

    def test_with_nothing_to_save_the_first_stops_at_once(self):
        with self.assertRaisesRegex(StoppedError, "SIGINT before its first step; the same command resumes"):
            self.listener.handle(signal.SIGINT, None)

    def test_no_library_takes_it_for_an_error_of_its_own(self):
        with self.assertRaises(StoppedError):
            try:
                self.listener.handle(signal.SIGTERM, None)
            except Exception:
                self.fail("a signal was taken for an error")
        loop = asyncio.new_event_loop()
        loop.call_soon(self.listener.handle, signal.SIGTERM, None)
        loop.call_later(1.0, loop.stop)
        with self.assertRaises(StoppedError):
            loop.run_forever()
        loop.close()


if __name__ == "__main__":
    absltest.main()
