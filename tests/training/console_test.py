"""The seconds before the first step, against a clock that the test moves, and what libraries print."""

import subprocess
import sys
import time
from unittest import mock

from absl.testing import absltest

from dialog_jax.training import console
from dialog_jax.training.console import Startup


class StartupTest(absltest.TestCase):
    def test_startup_parts_are_consecutive_from_the_start_time(self):
        with mock.patch.object(time, "monotonic", side_effect=[10.0, 11.5, 11.5, 14.0, 14.25]):
            startup = Startup(start_time=8.0)
            for part in ("preparing", "evaluating", "compiling", "evaluating"):
                startup.done(part)
        self.assertEqual(startup.parts, {"loading": 2.0, "preparing": 1.5, "evaluating": 0.25, "compiling": 2.5})
        self.assertEqual(startup.seconds, 6.25)
        self.assertEqual(
            startup.line,
            "first step after 6.2 s: 2.0 s loading, 1.5 s preparing, 0.2 s evaluating, 2.5 s compiling",
        )

    def test_startup_without_a_start_time_starts_now(self):
        with mock.patch.object(time, "monotonic", side_effect=[10.0, 11.0]):
            startup = Startup()
            startup.done("preparing")
        self.assertEqual(startup.parts, {"preparing": 1.0})

    def test_process_start_is_when_it_was_started(self):
        code = (
            "import sys, time; time.sleep(0.5); sys.path[:] = eval(sys.argv[1]); "
            "from dialog_jax.training import console; print(console.find_process_start())"
        )
        before = time.monotonic()
        done = subprocess.run([sys.executable, "-c", code, repr(sys.path)], capture_output=True, text=True, check=True)
        self.assertBetween(float(done.stdout), before - 0.1, before + 0.4)
        self.assertLess(console.find_process_start(), before)


class QuietTest(absltest.TestCase):
    def test_libraries_print_nothing_while_they_are_imported_and_used(self):
        code = (
            "import sys; sys.path[:] = eval(sys.argv[1]); from dialog_jax.training import console; "
            "console.quiet_libraries(); import transformers; from absl import logging; "
            "logging.set_verbosity(logging.INFO); logging.info('saving'); logging.warning('read only'); print('ours')"
        )
        done = subprocess.run([sys.executable, "-c", code, repr(sys.path)], capture_output=True, text=True, check=True)
        self.assertEqual((done.stdout, done.stderr), ("ours\n", ""))


if __name__ == "__main__":
    absltest.main()
