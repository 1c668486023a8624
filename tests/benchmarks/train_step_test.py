"""scripts/benchmarks/train_step.py on a tiny model."""

import json
import pathlib
import re
import statistics
import sys
import tempfile

from absl.testing import absltest

from tests.benchmarks.step_profile_test import read_table
from tests.experiments import tiny_run
from tests.scripts import running

sys.path.insert(0, str(running.SCRIPTS / "benchmarks"))

_LAYERS, _LOSS, _OPTIMIZER = "layers without attention", "loss", "optimizer"


class BenchmarkTest(absltest.TestCase):
    def test_figures_and_a_profile_are_written(self):
        directory = pathlib.Path(self.enter_context(tempfile.TemporaryDirectory()))
        tiny_run.save_model(directory)
        tiny_run.save_dialogues(directory)
        out, error = running.run(
            "benchmarks/train_step",
            *(f"--model={directory / 'model'}", f"--data={directory / 'train.jsonl'}", "--max_length=128"),
            *("--rows=2", "--gradient_accumulation=1", "--steps=2"),
            *(f"--out={directory / 'figures.json'}", f"--profile={directory / 'profile.md'}"),
        )
        self.assertEqual(error, "")
        self.assertLen(re.findall(r"^step \d: loss", out, re.MULTILINE), 3)
        figures = json.loads((directory / "figures.json").read_text())
        self.assertGreater(figures["real_tokens_per_second"], figures["response_tokens_per_second"])
        self.assertEqual((figures["rows"], figures["gradient_accumulation"]), (2, 1))
        page = (directory / "profile.md").read_text()
        self.assertIn("--max_length=128 --rows=2 --gradient_accumulation=1 --steps=2", page)
        rows = read_table(page)
        self.assertContainsSubset(["attention", _LAYERS, _LOSS, _OPTIMIZER, "all"], rows)
        for part in ("attention", _LAYERS, _LOSS, "all"):
            self.assertGreater(float(rows[part][0]), 0, part)
        total = sum(map(float, rows["all"][2:]))
        self.assertAlmostEqual(total / statistics.median(figures["seconds"]), 1, delta=0.02)

    def test_errors_come_before_the_work(self):
        for flag, why in (
            ("--model=nowhere", "nowhere"),
            ("--profile=/nowhere/profile.md", "No such file or directory"),
        ):
            out, error = running.run("benchmarks/train_step", flag)
            self.assertStartsWith(error, "train_step.py: ")
            self.assertIn(why, error)
            self.assertEqual(out, "")


if __name__ == "__main__":
    absltest.main()
