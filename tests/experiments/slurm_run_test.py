"""Real processes of dialog_jax train under experiments/launch/slurm.sh, with a stand-in for srun that starts two."""

import os
import pathlib
import signal
import sys
import threading

from absl.testing import absltest

import tests
from dialog_jax.training import metrics
from tests.experiments import tiny_run
from tests.experiments.stand_ins import SRUN, StandInsTest

_ROOT = pathlib.Path(__file__).parents[2]
_PATIENCE = 240  # seconds


class SlurmRunTest(StandInsTest):
    def setUp(self):
        super().setUp()
        tiny_run.save_model(self.directory)
        tiny_run.save_dialogues(self.directory)
        self.output_dir = self.directory / "run"
        self.stand_in("srun", SRUN)
        self.stand_in("scontrol", 'echo "$*" >>"$NOTES/scontrol"')
        self.environment |= {
            "SLURM_JOB_ID": str(os.getpid()),  # JAX makes its port of it
            "PYTHON": sys.executable,
            "PYTHONPATH": str(_ROOT),
            "XLA_FLAGS": tests.xla_flags(devices=1),
        }

    def submit(self):
        return self.start(
            "slurm.sh",
            "--config=experiments/quickstart.py",
            f"--output_dir={self.output_dir}",
            f"--config.model={self.directory / 'model'}",
            f"--config.data.train={self.directory / 'train.jsonl'}",
            f"--config.data.validation={self.directory / 'validation.jsonl'}",
            "--config.rows=2",
            "--config.steps=100000",
            "--config.evaluate_every=100000",
            "--config.checkpoint_every=100000",
        )

    def stop_at(self, process, part):
        """All that the job prints; when a line has `part`, its time is up."""
        watch = threading.Timer(_PATIENCE, self.end, [process])  # a job that does not stop prints on for ever
        watch.start()
        self.addCleanup(watch.cancel)
        told = []
        for line in process.stdout:
            told.append(line)
            if part in line:
                process.send_signal(signal.SIGUSR1)
                part = "\0"
        self.assertEqual(process.wait(60), 0, "".join(told))
        return "".join(told)

    def test_job_whose_time_is_up_goes_on_where_it_was_when_it_is_queued_again(self):
        first = self.stop_at(self.submit(), "step 2 of 100,000")
        steps = [line["step"] for line in metrics.read_records(self.output_dir / "metrics.jsonl")]
        self.assertGreaterEqual(len(steps), 2, first)
        told = self.stop_at(self.submit(), "resuming from step")
        self.assertIn(f"resuming from step {steps[-1]:,}\n", told)
        again = [line["step"] for line in metrics.read_records(self.output_dir / "metrics.jsonl")]
        self.assertEqual(again, list(range(1, again[-1] + 1)))
        self.assertGreaterEqual(len(again), len(steps))
        requeued = (self.notes / "scontrol").read_text().splitlines()
        self.assertEqual(requeued, [f"requeue {os.getpid()}"] * 2)


if __name__ == "__main__":
    absltest.main()
