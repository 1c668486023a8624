"""What a listener makes of signals, one by one."""

import asyncio
import signal

from absl.testing import absltest

from dialog_jax.training.signals import Listener, StoppedError


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
