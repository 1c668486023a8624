"""Runs of several real processes on this machine against runs of one: JAX's runtime, CPU collectives, shared files.

All have four devices in all, so that a mesh means the same in each. Processes are started seldom and do several runs
each, because their start takes seconds.
"""

import contextlib
import functools
import importlib.util
import io
import json
import os
import pathlib
import sys
import tempfile
import time

import jax
import numpy as np
from absl.testing import absltest, parameterized

from dialog_jax.model import decoder, pretrained
from dialog_jax.training import checkpoints, metrics, run_directory
from tests.data import chat_templates
from tests.training import tiny

_LAUNCHER = pathlib.Path(__file__).parents[2] / "experiments" / "launch" / "local.py"
_WORKER = pathlib.Path(__file__).with_name("worker.py")
_DEVICES = 4
# Sums over devices are taken in another order, and Adam's division turns rounding in tiny gradients into parts of a
# step: 4e-4 is a hundredth of the 4e-2 that four steps of 1e-2 can move a parameter.
_TOLERANCE = 4e-4

_MESHES = {
    "data": {},
    "fsdp_across_processes": {"mesh.data": 1, "mesh.fsdp": 4},
    "dcn_data": {"mesh.dcn_data": 2, "mesh.data": 1, "mesh.fsdp": 2},
    "tensor_within_processes": {"mesh.data": 1, "mesh.fsdp": 2, "mesh.tensor": 2},
    "tensor_across_processes": {"mesh.data": 1, "mesh.tensor": 4},
}


@functools.cache
def launcher():
    spec = importlib.util.spec_from_file_location("local_launcher", _LAUNCHER)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def prepare(directory):
    """Writes a model and two files of dialogues; returns the fields of a run of four steps on them."""
    tokenizer = chat_templates.train_tokenizer("chatml")
    model = tiny.config(len(tokenizer))
    pretrained.save_pretrained(directory / "model", model, tiny.parameters(model), tokenizer=tokenizer)
    rng = np.random.default_rng(0)
    for name, count in (("train", 24), ("validation", 5)):
        dialogues = [chat_templates.random_dialogue(rng, turns=1 + i % 3) for i in range(count)]
        lines = [json.dumps({"messages": [message.as_dict() for message in one.messages]}) for one in dialogues]
        (directory / f"{name}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return {
        "model": str(directory / "model"),
        "data.train": str(directory / "train.jsonl"),
        "data.validation": str(directory / "validation.jsonl"),
        "data.max_length": 256,
        "optimizer.learning_rate": 1e-2,
        "rows": 4,
        "gradient_accumulation": 2,
        "steps": 4,
        "evaluate_every": 2,
        "checkpoint_every": 2,
    }


def start(directory, processes, runs, patience=100):
    """(exit code, what all printed, seconds) of so many processes that do these runs."""
    job = directory / f"job{time.monotonic_ns()}.json"
    job.write_text(json.dumps({"patience": patience, "runs": runs}))
    environment = os.environ | {
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={_DEVICES // processes}",
        "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
    }
    began = time.monotonic()
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        code = launcher().launch([sys.executable, str(_WORKER), str(job)], processes, environment=environment)
    return code, printed.getvalue(), time.monotonic() - began


def parameters(directory, step):
    """The parameters of a checkpoint, on one device of this process."""
    with checkpoints.open_manager(directory / "checkpoints") as manager:
        model, _ = run_directory.read_model(directory)
        one = jax.sharding.SingleDeviceSharding(jax.devices()[0])
        like = jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=one), decoder.abstract_parameters(model)
        )
        return jax.device_get(checkpoints.restore_parameters(manager, step, like))


class ManyProcessesTest(parameterized.TestCase):
    @classmethod
    def setUpClass(cls):
        super().setUpClass()
        cls.directory = pathlib.Path(cls.enterClassContext(tempfile.TemporaryDirectory()))
        cls.fields = prepare(cls.directory)
        cls.start(1, cls.run_in("one"))
        cls.start(2, *(cls.run_in(f"two_{name}", **mesh) for name, mesh in _MESHES.items()))
        cls.start(4, *(cls.run_in(f"four_{name}", **_MESHES[name]) for name in ("data", "tensor_within_processes")))

    @classmethod
    def run_in(cls, name, **fields):
        return {"output_dir": str(cls.directory / name), "fields": cls.fields | fields}

    @classmethod
    def start(cls, processes, *runs):
        code, printed, _ = start(cls.directory, processes, runs)
        assert code == 0, printed
        return printed

    def assert_same(self, name, other="one"):
        """Parameters and figures of two runs are equal to rounding."""
        a, b = (parameters(self.directory / run, 4) for run in (name, other))
        gap = max(float(np.abs(x - y).max()) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True))
        print(f"{name}: largest difference of a parameter {gap:.1e}")
        self.assertLess(gap, _TOLERANCE)
        for file in ("metrics.jsonl", "evaluation.jsonl"):
            lines, wanted = (metrics.read_lines(self.directory / run / file) for run in (name, other))
            self.assertEqual([line["step"] for line in lines], [line["step"] for line in wanted])
            for line, want in zip(lines, wanted, strict=True):
                self.assertEqual(line.keys(), want.keys())
                for key in ("loss", "gradient_norm", "learning_rate", "accuracy"):
                    np.testing.assert_allclose(line.get(key, 0), want.get(key, 0), rtol=2e-3, err_msg=f"{name} {key}")
                for key in ("tokens", "targets", "row_tokens_used"):
                    self.assertEqual(line.get(key), want.get(key))

    @parameterized.parameters(*(f"two_{name}" for name in _MESHES), "four_data", "four_tensor_within_processes")
    def test_any_processes_and_mesh_give_the_run_of_one_process(self, name):
        self.assert_same(name)


if __name__ == "__main__":
    absltest.main()
