"""Signals of one process among many: handed to JAX's runtime, acted on when all act."""

import os
import signal
import socket
import subprocess
import sys
import time
from unittest import mock

import pytest
from absl.testing import absltest

from dialog_jax.training import distributed
from dialog_jax.training.signals import Listener, StoppedError


class SharedSignalTest(absltest.TestCase):
    def setUp(self):
        super().setUp()
        self.kill = self.enter_context(mock.patch.object(os, "kill"))
        self.reached = self.enter_context(mock.patch.object(distributed, "stop_requested", lambda step: step == 7))
        self.begun = self.enter_context(mock.patch.object(distributed, "announce_past_steps", return_value=False))
        self.listener = Listener(single_process=False)

    def test_before_there_is_anything_to_save_it_stops_at_once(self):
        with self.assertRaises(StoppedError):
            self.listener.handle(signal.SIGINT, None)
        self.kill.assert_not_called()

    def test_interrupt_is_handed_on_and_kept_until_all_stop(self):
        self.listener.defer_signals(4)
        self.begun.assert_called_once_with(4)
        self.listener.handle(signal.SIGINT, None)
        self.kill.assert_called_once_with(os.getpid(), signal.SIGTERM)
        self.assertIsNone(self.listener.agree_on_signal(6))
        self.assertIsNone(self.listener.received)
        self.assertEqual(self.listener.agree_on_signal(7), signal.SIGINT)
        self.assertEqual(self.listener.received, signal.SIGINT)

    def test_process_that_got_no_signal_stops_with_the_others_as_by_sigterm(self):
        self.listener.defer_signals(4)
        self.assertEqual(self.listener.agree_on_signal(7), signal.SIGTERM)

    def test_signal_that_came_before_the_first_step_is_received(self):
        self.begun.return_value = True
        self.listener.defer_signals(4)
        self.assertEqual(self.listener.received, signal.SIGTERM)

    def test_second_interrupt_stops_at_once(self):
        self.listener.defer_signals(4)
        self.listener.handle(signal.SIGINT, None)
        with self.assertRaises(KeyboardInterrupt):
            self.listener.handle(signal.SIGINT, None)


# Waits for a signal before it tells its first step, as a run that goes on from step 10 does.
_GOES_ON = """
import sys, time
import numpy  # its threads take signals that the main thread does not
from dialog_jax.training import distributed
number, port, late = int(sys.argv[1]), sys.argv[2], sys.argv[3] == "late"
distributed.start(f"127.0.0.1:{port}", 2, number)
distributed.run_on_all_hosts(lambda: None)
print("ready", flush=True)
distributed.run_on_all_hosts(lambda: time.sleep(0 if late else 3))
stop = distributed.announce_past_steps(10)
steps = iter(range(10, 100))
step = next(steps)
while not stop:
    time.sleep(0.1)
    step = next(steps)
    stop = distributed.stop_requested(step)
print(step, flush=True)
"""


class EarlySignalTest(absltest.TestCase):
    def stopped(self, when):
        """After which step each of two processes stops when the second gets SIGTERM."""
        with socket.socket() as taken:
            taken.bind(("127.0.0.1", 0))
            port = str(taken.getsockname()[1])
        environment = {**os.environ, "XLA_FLAGS": ""}
        command = [sys.executable, "-c", _GOES_ON]
        processes = [
            subprocess.Popen([*command, str(number), port, when], env=environment, stdout=subprocess.PIPE, text=True)
            for number in range(2)
        ]
        for process in processes:
            self.assertEqual(process.stdout.readline(), "ready\n")
        if when == "late":
            time.sleep(1)
        processes[1].send_signal(signal.SIGTERM)
        return [int(process.communicate()[0]) for process in processes]

    @pytest.mark.full
    def test_signal_before_the_first_step_stops_all_at_the_step_gone_on_from(self):
        self.assertEqual(self.stopped("early"), [10, 10])

    @pytest.mark.full
    def test_signal_among_the_steps_stops_all_after_the_same(self):
        first, second = self.stopped("late")
        self.assertEqual(first, second)
        self.assertBetween(first, 11, 98)


if __name__ == "__main__":
    absltest.main()
