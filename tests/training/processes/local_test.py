"""The launcher for one machine, with processes that do nothing but what is looked at."""

import contextlib
import importlib.util
import io
import os
import pathlib
import signal
import subprocess
import sys
import time

import pytest
from absl.testing import absltest, parameterized

_FILE = pathlib.Path(__file__).parents[3] / "experiments" / "launch" / "local.py"


def launched(code, processes=2):
    """(exit code, what was printed, seconds) of processes that run `code` with `me`, their number."""
    spec = importlib.util.spec_from_file_location("local_launcher", _FILE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    head = "import os, signal, sys, time\nme = int(sys.argv[-1].partition('=')[2])\n"
    began = time.monotonic()
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        result = module.launch([sys.executable, "-c", head + code], processes)
    return result, printed.getvalue(), time.monotonic() - began


class LaunchTest(parameterized.TestCase):
    def test_each_process_is_told_who_it_is(self):
        code, printed, _ = launched("print(*sys.argv[1:])", 3)
        self.assertEqual(code, 0)
        lines = sorted(printed.splitlines())
        address = lines[0].split()[2]
        self.assertRegex(address, r"--coordinator_address=127\.0\.0\.1:\d+")
        self.assertEqual(lines, [f"[{i}] --distributed {address} --num_processes=3 --process_id={i}" for i in range(3)])

    def test_both_streams_are_shown_with_the_number_of_their_process(self):
        _, printed, _ = launched("print('out', me); print('error', me, file=sys.stderr)")
        self.assertEqual(sorted(printed.splitlines()), ["[0] error 0", "[0] out 0", "[1] error 1", "[1] out 1"])

    @parameterized.parameters(("sys.exit(7)", 7), ("os.kill(os.getpid(), signal.SIGKILL)", 137))
    @pytest.mark.full
    def test_first_failure_ends_all_and_is_the_exit_code(self, failure, wanted):
        code, _, seconds = launched(f"time.sleep(0.5)\nif me: {failure}\ntime.sleep(60)")
        self.assertEqual(code, wanted)
        self.assertLess(seconds, 30)

    @parameterized.parameters((signal.SIGINT, 130), (signal.SIGTERM, 0))
    def test_signals_are_passed_on_to_all(self, number, wanted):
        code = (
            "import os, signal, sys, time\n"
            f"signal.signal({int(number)}, lambda *_: (os.write(1, b'heard\\n'), sys.exit({wanted})))\n"
            "print('ready', flush=True)\n"
            "time.sleep(60)\n"
        )
        launch = (
            f"import runpy, sys; local = runpy.run_path({str(_FILE)!r}); "
            f"sys.exit(local['launch']([sys.executable, '-c', {code!r}], 2))"
        )
        with subprocess.Popen([sys.executable, "-c", launch], stdout=subprocess.PIPE, text=True) as process:
            ready = [process.stdout.readline() for _ in range(2)]
            self.assertEqual(sorted(ready), ["[0] ready\n", "[1] ready\n"])
            os.kill(process.pid, number)
            rest, _ = process.communicate(timeout=60)
        self.assertEqual(sorted(rest.splitlines()), ["[0] heard", "[1] heard"])
        self.assertEqual(process.returncode, wanted)


if __name__ == "__main__":
    absltest.main()
