"""The seconds before the first step and those left, by a clock that the test moves, and what is printed."""

import io
import re
import subprocess
import sys
import time
from unittest import mock

import rich.console
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


class ProgressTest(absltest.TestCase):
    def show(self, *steps, total, **console_options):
        """What is shown of steps that take 2 s each."""
        output = io.StringIO()
        terminal = rich.console.Console(file=output, soft_wrap=True, highlight=False, **console_options)
        figures = {"loss": 2.34567, "tokens_per_second": 1234567.8, "peak_memory_gb": 123.45}
        with console.Progress(terminal, total, 0) as progress:
            with progress.evaluating():
                self.refresh(progress, terminal)
            progress.print("step 0: held-out loss 3.1")
            for step in steps:
                with mock.patch.object(time, "monotonic", lambda step=step: 100.0 + 2 * step):
                    progress.show(step, figures)
                self.refresh(progress, terminal)
        return output.getvalue()

    def refresh(self, progress, terminal):
        if terminal.is_terminal:
            progress._bar.refresh()

    def test_pipe_has_plain_lines_with_the_time_left_after_the_first_step(self):
        shown = self.show(1, 2, 3, 6, total=121)
        line = "loss 2.346  1,234,568 tokens/s  123.5 GB"
        self.assertEqual(
            shown.splitlines(),
            [
                "step 0: held-out loss 3.1",
                f"step 1 of 121  {line}",
                f"step 2 of 121  {line}  0:03:58 left",
                f"step 6 of 121  {line}  0:03:50 left",
            ],
        )

    def test_bar_of_80_columns_has_all_figures_in_one_line(self):
        shown = self.show(1, 2, total=50_000, force_terminal=True, width=80, color_system=None, legacy_windows=False)
        lines = [line.rstrip() for line in re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", shown).replace("\r", "\n").split("\n")]
        self.assertNotEmpty([line for line in lines if re.search(r"^ +0/50000 .* evaluating 0:00:00$", line)])
        self.assertIn("step 0: held-out loss 3.1", lines)
        self.assertRegex(
            lines[-1] or lines[-2],
            r"^ +2/50000 .*loss 2\.346  1,234,568 tokens/s  123\.5 GB \d:\d\d:\d\d 27:46:36 left$",
        )
        self.assertLessEqual(max(map(len, lines)), 80)


class QuietTest(absltest.TestCase):
    def test_libraries_print_nothing_while_they_are_imported_and_used(self):
        code = (
            "import sys; sys.path[:] = eval(sys.argv[1]); from dialog_jax.training import console; "
            "console.quiet_libraries(); import transformers; from absl import logging; "
            "logging.set_verbosity(logging.INFO); logging.info('saving'); logging.warning('read only'); print('ours')"
        )
        done = subprocess.run([sys.executable, "-c", code, repr(sys.path)], capture_output=True, text=True, check=True)
        self.assertEqual((done.stdout, done.stderr), ("ours\n", ""))


class ConsoleTest(absltest.TestCase):
    def test_console_in_a_notebook_prints_plain_lines(self):
        with mock.patch("rich.console._is_jupyter", return_value=True), mock.patch("sys.stdout.isatty", lambda: True):
            self.assertTrue(rich.console.Console().is_jupyter)
            made = console.make_console(quiet=False)
        self.assertEqual((made.is_jupyter, made.is_terminal), (False, False))


if __name__ == "__main__":
    absltest.main()
