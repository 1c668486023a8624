"""Runs of several real processes on this machine against runs of one: JAX's runtime, CPU collectives, shared files.

All have four devices in all, so that a mesh means the same in each. Processes are started seldom and do several runs
each, because their start takes seconds.
"""

import contextlib
import dataclasses
import functools
import importlib.util
import io
import json
import os
import pathlib
import re
import shutil
import sys
import tempfile
import time

import jax
import numpy as np
import pytest
from absl.testing import absltest, parameterized

import tests
from dialog_jax.model import decoder
from dialog_jax.training import checkpoints, config, metrics, run, run_directory
from dialog_jax.training.config import MeshConfig
from dialog_jax.training.optimizer_config import OptimizerConfig
from tests.training import tiny

_LAUNCHER = pathlib.Path(__file__).parents[3] / "experiments" / "launch" / "local.py"
_WORKER = pathlib.Path(__file__).with_name("worker.py")
_DEVICES = 4
# Sums over devices are taken in another order. With Adam's usual epsilon its division would turn rounding in tiny
# gradients into parts of a step; with 1e-2, four steps of 1e-2 differ by rounding alone.
_TOLERANCE = 1e-6

# `fsdp` across processes is the mesh of the longer runs, one of which goes on in one process.
_MESHES = {
    "dcn_data": MeshConfig(dcn_data=2, data=1, fsdp=2),
    "tensor_across_processes": MeshConfig(data=1, tensor=4),
}


_LONG = 12  # steps of a run that is long enough to be stopped on its way
_PATIENCE = 10  # seconds


@functools.cache
def launcher():
    spec = importlib.util.spec_from_file_location("local_launcher", _LAUNCHER)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def start(directory, processes, runs, *, patience=100, devices=_DEVICES):
    """(exit code, what all printed, seconds) of so many processes that do these runs."""
    job = directory / f"job{time.monotonic_ns()}.json"
    job.write_text(json.dumps({"patience": patience, "runs": runs}))
    environment = os.environ | {
        "XLA_FLAGS": tests.xla_flags(devices=devices // processes),
        "JAX_COMPILATION_CACHE_DIR": str(directory / "compiled"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
        "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
    }
    began = time.monotonic()
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        code = launcher().launch([sys.executable, str(_WORKER), str(job)], processes, environment=environment)
    return code, printed.getvalue(), time.monotonic() - began


def parameters(directory, step):
    """The parameters of a checkpoint, on one device of this process."""
    model = run_directory.read_model(directory).decoder
    one = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    like = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=one), decoder.abstract_parameters(model)
    )
    return jax.device_get(checkpoints.restore_trained(directory / "checkpoints", step, like))


class RunTest(parameterized.TestCase):
    def assert_same(self, name, other="one", steps=4):
        """Parameters and figures of two runs are equal to rounding."""
        a, b = (parameters(self.directory / run, steps) for run in (name, other))
        gap = max(float(np.abs(x - y).max()) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True))
        print(f"{name}: largest difference of a parameter {gap:.1e}")
        self.assertLess(gap, _TOLERANCE)
        for file in ("metrics.jsonl", "evaluation.jsonl"):
            lines, wanted = (metrics.read_records(self.directory / run / file) for run in (name, other))
            self.assertEqual([line["step"] for line in lines], [line["step"] for line in wanted])
            for line, want in zip(lines, wanted, strict=True):
                of_a_start = {"startup_seconds"}  # the first step after it has that
                self.assertEqual(line.keys() - of_a_start, want.keys() - of_a_start)
                for key in ("loss", "gradient_norm", "learning_rate", "accuracy"):
                    np.testing.assert_allclose(line.get(key, 0), want.get(key, 0), rtol=1e-5, err_msg=f"{name} {key}")
                for key in ("tokens", "targets", "row_tokens_used"):
                    self.assertEqual(line.get(key), want.get(key))


class TwoProcessesTest(RunTest):
    @pytest.mark.full
    def test_two_processes_give_the_run_of_one_on_a_mesh_of_all_axes(self):
        """The one process is that of the test, with eight devices."""
        self.directory = pathlib.Path(self.enter_context(tempfile.TemporaryDirectory()))
        run_config = tiny.run_config(
            self.directory, steps=2, optimizer=OptimizerConfig(learning_rate=1e-2, epsilon=1e-2), remat="none"
        )
        self.assertEqual(run_config.mesh, MeshConfig(data=2, fsdp=2, tensor=2))
        job = {"output_dir": str(self.directory / "two"), "config": config.to_config_dict(run_config).to_dict()}
        code, printed, _ = start(self.directory, 2, [job], devices=8)
        self.assertEqual(code, 0, printed)
        run.run(run_config, self.directory / "one")
        self.assert_same("two", steps=2)


@pytest.mark.full
class ManyProcessesTest(RunTest):
    @classmethod
    def setUpClass(cls):
        super().setUpClass()
        cls.directory = pathlib.Path(cls.enterClassContext(tempfile.TemporaryDirectory()))
        cls.config = tiny.run_config(
            cls.directory,
            mesh=MeshConfig(),
            steps=4,
            optimizer=OptimizerConfig(learning_rate=1e-2, epsilon=1e-2),
            remat="none",
        )
        across = MeshConfig(data=1, fsdp=4)
        long = {"mesh": across, "steps": _LONG, "evaluate_every": _LONG, "checkpoint_every": _LONG}
        cls.stopping = cls.succeed(
            2,
            *(cls.a_run(f"two_{name}", mesh=mesh) for name, mesh in _MESHES.items()),
            cls.a_run("undisturbed", **long),
            cls.a_run("stopped", trouble={"process": 1, "step": 3, "kind": "terminated"}, **long),
        )
        for name in ("on_1", "on_2", "on_4", "damaged"):
            shutil.copytree(cls.directory / "stopped", cls.directory / name)
        written = (cls.directory / "damaged" / "checkpoints").glob("*/trained/ocdbt.process_1/d/*")
        max(written, key=lambda file: file.stat().st_size).unlink()
        cls.succeed(1, cls.a_run("one"), cls.a_run("on_1", **long))
        four = MeshConfig(data=1, fsdp=2, tensor=2)  # TwoProcessesTest has these axes within and across processes
        cls.succeed(4, cls.a_run("four_tensor_across_processes", mesh=four), cls.a_run("on_4", **long))
        lines = (cls.directory / "train.jsonl").read_text().splitlines(keepends=True)
        for name, text in (("shorter", "".join(lines[:20])), ("broken", "{")):
            (cls.directory / name).mkdir()
            (cls.directory / name / "train.jsonl").write_text(text)
        cls.code, cls.refused, cls.seconds = start(
            cls.directory,
            2,
            [
                cls.a_run("on_2", **long),
                cls.a_run("other_data", other=cls.another("train", str(cls.directory / "shorter" / "train.jsonl"))),
                cls.a_run("other_flags", other=cls.another("max_length", 128)),
                cls.a_run("broken_file", other=cls.another("train", str(cls.directory / "broken" / "train.jsonl"))),
                cls.a_run("damaged", **long),
                cls.a_run("failed", trouble={"process": 1, "step": 2, "kind": "failed"}),
            ],
            patience=_PATIENCE,
        )

    @staticmethod
    def another(field, value):
        return {"process": 1, "field": field, "value": value}

    @classmethod
    def a_run(cls, name, **changes):
        extras = {key: changes.pop(key) for key in ("trouble", "other") if key in changes}
        fields = config.to_config_dict(dataclasses.replace(cls.config, **changes)).to_dict()
        return {"output_dir": str(cls.directory / name), "config": fields, **extras}

    @classmethod
    def succeed(cls, processes, *runs):
        code, printed, _ = start(cls.directory, processes, runs)
        assert code == 0, printed
        return printed

    @parameterized.parameters(*(f"two_{name}" for name in _MESHES), "four_tensor_across_processes")
    def test_any_processes_and_mesh_give_the_run_of_one_process(self, name):
        self.assert_same(name)

    def test_only_the_first_process_prints(self):
        self.assertRegex(self.stopping, r"(?m)^\[0\] step 4: held-out loss")
        self.assertNotRegex(self.stopping, r"(?m)^\[1\] step")

    def test_sigterm_to_one_process_saves_the_same_step_on_all(self):
        steps = re.findall(r"^\[(\d)\] stopped by SIGTERM after step (\d+), which is saved", self.stopping, re.M)
        self.assertEqual([process for process, _ in sorted(steps)], ["0", "1"])
        self.assertLen({step for _, step in steps}, 1)
        step = int(steps[0][1])
        self.assertBetween(step, 3, _LONG - 1)
        self.assertEqual(checkpoints.list_steps(self.directory / "stopped" / "checkpoints")[-1], step)

    def test_same_processes_go_on_to_the_same_bits(self):
        a, b = (parameters(self.directory / name, _LONG) for name in ("on_2", "undisturbed"))
        for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
            np.testing.assert_array_equal(x, y)
        a, b = (metrics.read_records(self.directory / name / "metrics.jsonl") for name in ("on_2", "undisturbed"))
        self.assertEqual([(line["step"], line["loss"]) for line in a], [(line["step"], line["loss"]) for line in b])

    @parameterized.parameters(1, 4)
    def test_checkpoint_of_two_goes_on_in_one_and_in_four_to_the_same_parameters(self, processes):
        self.assert_same(f"on_{processes}", "undisturbed", _LONG)

    def assert_refused(self, message):
        for process in range(2):
            self.assertRegex(self.refused, rf"(?m)^\[{process}\] refused: .*{message}")

    def test_other_data_on_one_process_is_refused_by_all(self):
        self.assert_refused("process 1 has another content of data.train than process 0")
        self.assertFalse((self.directory / "other_data" / "config.json").exists())

    def test_other_flags_on_one_process_are_refused_by_all(self):
        self.assert_refused("process 1 has another config of data.max_length than process 0")

    def test_broken_file_of_one_process_is_an_error_on_all(self):
        self.assert_refused("process 1: train.jsonl:1: not JSON")

    def test_part_of_a_checkpoint_that_one_process_misses_is_an_error_on_all(self):
        self.assertRegex(self.refused, r"(?m)^\[0\] process 1: checkpoint \d+ cannot be read")
        self.assert_refused("damaged: none of the checkpoints .* can be read")

    def test_process_that_fails_while_training_ends_all(self):
        self.assertIn("[1] RuntimeError: trouble", self.refused)
        self.assertNotEqual(self.code, 0)
        self.assertLess(self.seconds, 300)  # with the runs before; a process that waited for ever would not come here

    def test_process_that_is_killed_ends_all(self):
        run = self.a_run("killed", trouble={"process": 1, "step": 2, "kind": "killed"})
        code, printed, seconds = start(self.directory, 2, [run], patience=_PATIENCE)
        self.assertEqual(code, 128 + 9, printed)
        self.assertLess(seconds, 60)


if __name__ == "__main__":
    absltest.main()
