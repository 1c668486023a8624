"""dialog_jax diagnose on a tiny run: what was planted there, and what cannot be checked."""

import io
import pathlib
import shutil

import pytest
import rich.console
from absl.testing import absltest

from dialog_jax.model.lora_config import LoraConfig
from dialog_jax.training import run
from dialog_jax.training.optimizer_config import OptimizerConfig
from tests.commands import running
from tests.training import tiny


@pytest.mark.full
class DiagnoseTest(absltest.TestCase):
    def setUp(self):
        super().setUp()
        self.directory = pathlib.Path(self.create_tempdir().full_path)

    def diagnose(self, *flags):
        places = {"base": "model", "train": "train.jsonl", "validation": "validation.jsonl"}
        named = [f"--{flag}={self.directory / name}" for flag, name in places.items()]
        return running.run("diagnose", f"--run={self.directory / 'run'}", *named, *flags)

    def test_what_is_planted_in_a_run_is_found_and_what_is_not_here_is_listed(self):
        fields = {"steps": 12, "evaluate_every": 12, "checkpoint_every": 12, "gradient_accumulation": 1}
        slow = OptimizerConfig(learning_rate=1e-10, schedule="constant", warmup_steps=0)
        config = tiny.run_config(self.directory, **fields, optimizer=slow, lora=LoraConfig(rank=4))
        shutil.copyfile(self.directory / "train.jsonl", self.directory / "validation.jsonl")
        run.run(config, self.directory / "run", console=rich.console.Console(file=io.StringIO()))
        before = sorted(self.directory.rglob("*"))
        out, error = self.diagnose("--overfit")
        self.assertRegex(out, r"run: step 12 of 12, training loss \d\.\d+ to")
        self.assertRegex(out, r"learning_rate_low \(likely\): the training loss changes by .*, which is noise")
        self.assertRegex(out, r"contaminated \(certain\): (\d+) of \1 held-out responses")
        self.assertRegex(out, r"overfit: the loss of 8 dialogues went from \d.\d+ to \d.\d+ in 50 steps at a constant")
        for other in ("not checked", "unmoved", "learning_rate_high", "memorizing", "skipped"):
            self.assertNotIn(other, out)
        self.assertIn("[exit code 1]", error)
        self.assertEqual(sorted(self.directory.rglob("*")), before)
        (self.directory / "model").rename(self.directory / "moved")
        out, _ = self.diagnose()
        self.assertRegex(out, "not checked: learning_rate_low, unmoved_parameters, template_mismatch, .*: .*model")
        self.assertIn("contaminated", out)

    def test_a_run_that_trained_all_weights_is_measured_too(self):
        config = tiny.run_config(self.directory, steps=1, evaluate_every=1, checkpoint_every=1)
        shutil.copyfile(self.directory / "train.jsonl", self.directory / "validation.jsonl")
        run.run(config, self.directory / "run", console=rich.console.Console(file=io.StringIO()))
        out, _ = self.diagnose()
        self.assertIn("contaminated", out)
        self.assertNotIn("not checked", out)

    def test_what_is_no_run_is_an_error(self):
        tiny.run_config(self.directory)
        out, error = running.run("diagnose", f"--run={self.directory}")
        self.assertEmpty(out)
        self.assertIn("holds no run. Name the --output_dir", error)


if __name__ == "__main__":
    absltest.main()
