"""Signals of one process among many: handed to JAX's runtime, acted on when all act."""

import os
import signal
from unittest import mock

from absl.testing import absltest

from dialog_jax.training import hosts
from dialog_jax.training.interruption import Listener, StoppedError


class SharedSignalTest(absltest.TestCase):
    def setUp(self):
        super().setUp()
        self.kill = self.enter_context(mock.patch.object(os, "kill"))
        self.reached = self.enter_context(mock.patch.object(hosts, "stop_requested", lambda step: step == 7))
        self.begun = self.enter_context(mock.patch.object(hosts, "begin_steps"))
        self.listener = Listener(alone=False)

    def test_before_there_is_anything_to_save_it_stops_at_once(self):
        with self.assertRaises(StoppedError):
            self.listener.hear(signal.SIGINT, None)
        self.kill.assert_not_called()

    def test_interrupt_is_handed_on_and_kept_until_all_stop(self):
        self.listener.keep(4)
        self.begun.assert_called_once_with(4)
        self.listener.hear(signal.SIGINT, None)
        self.kill.assert_called_once_with(os.getpid(), signal.SIGTERM)
        self.assertIsNone(self.listener.received_by_all(6))
        self.assertIsNone(self.listener.received)
        self.assertEqual(self.listener.received_by_all(7), signal.SIGINT)
        self.assertEqual(self.listener.received, signal.SIGINT)

    def test_process_that_got_no_signal_stops_with_the_others_as_by_sigterm(self):
        self.listener.keep(4)
        self.assertEqual(self.listener.received_by_all(7), signal.SIGTERM)

    def test_second_interrupt_stops_at_once(self):
        self.listener.keep(4)
        self.listener.hear(signal.SIGINT, None)
        with self.assertRaises(KeyboardInterrupt):
            self.listener.hear(signal.SIGINT, None)


if __name__ == "__main__":
    absltest.main()
