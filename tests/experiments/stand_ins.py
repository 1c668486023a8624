"""A directory in which a launch script runs with stand-ins for programs that are not here.

A stand-in is a few lines of bash, first on PATH, that notes how it was called; that of the training can go on until it
is told to end.
"""

import contextlib
import os
import pathlib
import signal
import subprocess
import tempfile
import time

from absl.testing import parameterized

_ROOT = pathlib.Path(__file__).parents[2]

# Notes its arguments; with LASTS set it goes on until SIGTERM, then takes a moment to save.
TRAINING = """
printf '%s\\0' "$@" >"$NOTES/train.${SLURM_PROCID:-0}"
if [[ ${LASTS:-} ]]; then
  trap 'sleep 0.3; touch "$NOTES/saved.${SLURM_PROCID:-0}"; echo saved; exit "${CODE:-0}"' TERM
  touch "$NOTES/started.${SLURM_PROCID:-0}"
  while :; do sleep 0.05; done
fi
exit "${CODE:-0}"
"""
# As srun: a process a task, with Slurm's variables; a signal goes to all of them.
SRUN = """
echo $$ >"$NOTES/srun.pid"
options=()
while [[ $1 == --* ]]; do options+=("$1"); shift; done
printf '%s\\n' "${options[@]}" >"$NOTES/srun.options"
export SLURM_STEP_NODELIST=127.0.0.1 SLURM_NTASKS=2 SLURM_PROCID SLURM_LOCALID
for SLURM_PROCID in 0 1; do SLURM_LOCALID=$SLURM_PROCID; "$@" & tasks+=($!); done
trap 'kill -TERM "${tasks[@]}"' TERM
code=0
for task in "${tasks[@]}"; do
  while :; do wait "$task"; ended=$?; kill -0 "$task" 2>/dev/null || break; done
  ((ended > code)) && code=$ended
done
exit "$code"
"""


class StandInsTest(parameterized.TestCase):
    """Scripts run in a directory of their own, with stand-ins on PATH that write to `notes`."""

    def setUp(self):
        super().setUp()
        self.directory = pathlib.Path(self.enter_context(tempfile.TemporaryDirectory()))
        self.notes, self.bin = self.directory / "notes", self.directory / "bin"
        self.notes.mkdir()
        self.bin.mkdir()
        self.training = self.stand_in("training", TRAINING)
        self.environment = os.environ | {
            "PATH": f"{self.bin}:{os.environ['PATH']}",
            "NOTES": str(self.notes),
            "PYTHON": str(self.training),
        }

    def stand_in(self, name, body, directory=None):
        file = (directory or self.bin) / name
        file.write_text("#!/usr/bin/env bash\n" + body)
        file.chmod(0o755)
        return file

    def start(self, script, *arguments, cwd=_ROOT, **variables):
        process = subprocess.Popen(
            ["bash", _ROOT / "experiments" / "launch" / script, *arguments],
            cwd=cwd,
            env=self.environment | variables,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        self.addCleanup(process.stdout.close)
        self.addCleanup(self.end, process)
        return process

    def end(self, process):
        """Kills the script, and all that it started, if anything is left of them."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()

    def run_script(self, script, *arguments, **others):
        process = self.start(script, *arguments, **others)
        told, _ = process.communicate(timeout=60)
        return process.returncode, told

    def wait_for(self, *names):
        end = time.monotonic() + 30
        while not all((self.notes / name).exists() for name in names):
            self.assertLess(time.monotonic(), end, f"no {' and '.join(names)}")
            time.sleep(0.02)

    def noted(self, name):
        return (self.notes / name).read_text().split("\0")[:-1]
