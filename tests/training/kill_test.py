"""The command `dialog_jax train` in processes that are killed, asked to stop, or find the disk full; and started again.

All start from one server process that has imported the package, which saves seconds a start; each is a process of its
own from before JAX finds its devices.
"""

import functools
import multiprocessing
import os
import pathlib
import resource
import shutil
import signal
import sys
import tempfile
import time
from unittest import mock

import jax
import numpy as np
import pytest
from absl.testing import absltest

from dialog_jax.commands import entry
from dialog_jax.model import decoder
from dialog_jax.training import checkpoints, metrics, optimizer, run_directory
from dialog_jax.training import train_step as step_lib
from dialog_jax.training.optimizer_config import OptimizerConfig
from tests.training import tiny

_ROOT = pathlib.Path(__file__).parents[2]
_KILLS = 1  # at each kind of moment
_STEPS = 20
# What a run imports on its way.
_IMPORTED_LATER = (
    "ml_collections.config_flags",
    "transformers.models.auto.tokenization_auto",
    "transformers.models.llama.configuration_llama",
)


def _train(argv, log, file_limit):
    """Runs in the new process: the script with its flags, on two devices."""
    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # the tests may run under nohup
    with open(log, "a", encoding="utf-8") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", 2)
    if file_limit:
        resource.setrlimit(resource.RLIMIT_FSIZE, (file_limit, file_limit))
    sys.exit(entry.run("train", argv))


def _lock(directory, answer):
    """Runs in the new process, as nobody in particular: tries to train in a directory."""
    if os.getuid() == 0:
        os.setuid(65534)
    try:
        with run_directory.lock(pathlib.Path(directory)):
            answer.put("locked")
    except ValueError as error:
        answer.put(str(error))


@pytest.mark.full
class KillTest(absltest.TestCase):
    @classmethod
    def setUpClass(cls):
        super().setUpClass()
        cls.directory = pathlib.Path(cls.enterClassContext(tempfile.TemporaryDirectory()))
        tiny.run_config(cls.directory)
        # The processes find their devices themselves, and compile once for all of them.
        environment = {
            "XLA_FLAGS": "",
            "PYTHONPATH": str(_ROOT),
            "JAX_COMPILATION_CACHE_DIR": f"{cls.directory}/cache",
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        }
        cls.enterClassContext(mock.patch.dict(os.environ, environment))
        cls.context = multiprocessing.get_context("forkserver")
        cls.context.set_forkserver_preload(["dialog_jax.training.run", *_IMPORTED_LATER, __name__])
        cls.run_whole("whole")

    @classmethod
    def start(cls, name, *flags, file_limit=0, log=None):
        """Starts the command; the same for every process that trains in directory `name`."""
        argv = [
            f"--config={_ROOT / 'experiments' / 'quickstart.py'}",
            f"--output_dir={cls.directory / name}",
            f"--config.model={cls.directory / 'model'}",
            f"--config.data.train={cls.directory / 'train.jsonl'}",
            f"--config.data.validation={cls.directory / 'validation.jsonl'}",
            "--config.data.max_length=192",
            "--config.optimizer.learning_rate=3e-3",
            "--config.optimizer.warmup_steps=0",
            "--config.mesh.fsdp=2",
            "--config.mesh.data=1",
            "--config.rows=2",
            "--config.gradient_accumulation=2",
            f"--config.steps={_STEPS}",
            "--config.evaluate_every=2",
            "--config.evaluate_rows=2",
            "--config.checkpoint_every=2",
            *flags,
        ]
        log = log or cls.directory / f"{name}.log"
        process = cls.context.Process(target=_train, args=(argv, log, file_limit))
        process.start()
        return process

    @classmethod
    def told(cls, name):
        return (cls.directory / f"{name}.log").read_text(encoding="utf-8")

    @classmethod
    def run_whole(cls, name, *flags):
        process = cls.start(name, *flags)
        process.join()
        assert process.exitcode == 0, cls.told(name)

    def state_of(self, name):
        """The last state of a run."""
        model = run_directory.read_model(self.directory / name).decoder
        transform = optimizer.make_optimizer(OptimizerConfig(), _STEPS)
        place = jax.sharding.SingleDeviceSharding(jax.devices()[0])
        like = jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place),
            jax.eval_shape(
                functools.partial(step_lib.make_state, optimizer=transform), decoder.abstract_parameters(model)
            ),
        )
        return jax.device_get(checkpoints.restore(self.directory / name / "checkpoints", _STEPS, like))

    def assert_like_whole(self, name):
        """A run ended in the bits of the undisturbed one, moments included, and wrote each line once."""
        jax.tree.map(np.testing.assert_array_equal, self.state_of(name), self.state_of("whole"))
        for file in ("metrics.jsonl", "evaluation.jsonl"):
            lines, whole = (metrics.read_records(self.directory / run / file) for run in (name, "whole"))
            self.assertEqual(
                [(line["step"], line["loss"]) for line in lines], [(line["step"], line["loss"]) for line in whole]
            )

    def moments(self, rng, run):
        """When to kill: functions that say whether the moment has come."""

        def after(low, high):
            wanted = time.monotonic() + rng.uniform(low, high)
            return lambda: time.monotonic() > wanted

        def names(pattern):
            return sorted(str(path) for path in run.glob(pattern))

        def during(pattern):
            before = names(pattern)
            return lambda: any(name not in before for name in names(pattern))

        def written(file, more):
            path = run / file
            before = path.stat().st_size if path.exists() else 0
            return lambda: path.exists() and path.stat().st_size > before + more

        return {
            "while the data is built": lambda: during("trees/*"),
            "at any moment": lambda: after(0.0, 4.0),
            "during a step": lambda: written("metrics.jsonl", int(rng.integers(0, 2000))),
            "during an evaluation or after it": lambda: written("evaluation.jsonl", int(rng.integers(0, 1000))),
            "as a save begins": lambda: during("checkpoints/*tmp*"),
            "between the files of a save": lambda: during("checkpoints/*tmp*/*/d"),
            "as a save ends": lambda: during("checkpoints/[0-9]"),
        }

    def test_run_killed_at_random_moments_ends_in_the_same_bits(self):
        rng = np.random.default_rng(int(os.environ.get("KILL_SEED", "0")))
        run = self.directory / "killed"
        kills = dict.fromkeys(self.moments(rng, run), 0)
        tried = 0
        while min(kills.values()) < _KILLS:
            tried += 1
            self.assertLess(tried, 3 * _KILLS * len(kills), kills)
            # A finished run cannot be killed: begin another, so that every moment has its turn.
            if run.exists() and "Nothing to do" in self.told("killed"):
                self.assert_like_whole("killed")
                shutil.rmtree(run)
                (self.directory / "killed.log").unlink()
            moments = self.moments(rng, run)
            fewest = min(kills.values())
            name = rng.choice([moment for moment, count in kills.items() if count == fewest])
            come = moments[name]()
            process = self.start("killed")
            while process.is_alive() and not come():
                time.sleep(0.001)
            if process.is_alive():
                time.sleep(rng.choice([0.0, rng.uniform(0, 0.05)]))
            process.kill()
            process.join()
            kills[name] += process.exitcode == -signal.SIGKILL
            self.assertIn(process.exitcode, (0, -signal.SIGKILL), self.told("killed"))
        self.run_whole("killed")
        self.assert_like_whole("killed")
        print(f"killed {kills} in {tried} starts", file=sys.stderr)

    def stopped(self, name, *signals, exit_code):
        """Starts a run and sends it signals once it has written three lines more than there were."""
        file = self.directory / name / "metrics.jsonl"

        def lines():
            return file.read_bytes().count(b"\n") if file.exists() else 0

        wanted = lines() + 3
        process = self.start(name)
        while process.is_alive() and lines() < wanted:
            time.sleep(0.001)
        for number in signals:
            os.kill(process.pid, number)
        process.join()
        self.assertEqual(process.exitcode, exit_code, self.told(name))

    def test_sigterm_and_sighup_exit_0_and_sigint_130_and_all_go_on_to_the_same_bits(self):
        self.stopped("asked", signal.SIGTERM, exit_code=0)
        self.assertRegex(
            self.told("asked"), r"stopped by SIGTERM after step \d+, which is saved; the same command resumes the run"
        )
        shutil.rmtree(self.directory / "asked" / "tensorboard")
        (self.directory / "asked" / "metrics.jsonl").open("a").write('{"step": 9, "lo')  # a torn line
        self.stopped("asked", signal.SIGHUP, exit_code=0)
        self.assertRegex(self.told("asked"), r"stopped by SIGHUP after step \d+, which is saved")
        self.stopped("asked", signal.SIGINT, exit_code=130)
        self.assertRegex(
            self.told("asked"), r"resuming from step \d+\n(.*\n)*dialog_jax train: stopped by SIGINT after step \d+"
        )
        self.run_whole("asked")
        self.assert_like_whole("asked")

    def test_full_disk_stops_with_a_remedy_and_loses_nothing(self):
        self.stopped("full", signal.SIGTERM, exit_code=0)
        before = sorted(path.name for path in (self.directory / "full" / "checkpoints").iterdir())
        # Files of at most 20 kB, less than the parameters need; what is told goes through a pipe, which has no limit.
        pipe = self.directory / "pipe"
        os.mkfifo(pipe)
        process = self.start("full", file_limit=20_000, log=pipe)
        told = pipe.read_text(encoding="utf-8")
        process.join()
        self.assertEqual(process.exitcode, 1, told)
        self.assertRegex(
            told, r"dialog_jax train: a checkpoint could not be written: .*\. Earlier ones stay\. Make room"
        )
        kept = [path.name for path in (self.directory / "full" / "checkpoints").iterdir() if "tmp" not in path.name]
        self.assertContainsSubset(before, kept)
        self.run_whole("full")
        self.assert_like_whole("full")

    def test_directory_that_cannot_be_written_is_refused(self):
        closed = self.directory / "closed"
        closed.mkdir(mode=0o555)
        self.directory.chmod(0o755)
        answer = self.context.Queue()
        for place in (closed, closed / "run"):
            process = self.context.Process(target=_lock, args=(str(place), answer))
            process.start()
            self.assertRegex(answer.get(timeout=60), rf"^{place.name} cannot be written \(Permission denied\)\. Choose")
            process.join()


if __name__ == "__main__":
    absltest.main()
