"""The experiment on adapters on a tiny model: three of its trainings, to table and picture."""

import os
import pathlib
import tempfile
from unittest import mock

import adapters
from absl.testing import absltest
from report import Options

import tests
from tests.experiments import tiny_run


class AdaptersTest(absltest.TestCase):
    def test_losses_of_grouped_turns_are_means_over_their_targets(self):
        turns = [
            {"turn": turn, "loss": loss, "targets": targets}
            for turn, loss, targets in [(0, 4.0, 5), (2, 1.0, 3), (3, 2.0, 1), (16, 3.0, 2), ("31+", 1.0, 2)]
        ]
        self.assertEqual(adapters.group_losses(turns), {"0": 4.0, "2-3": 1.25, "16+": 2.0})

    def test_experiment_writes_table_and_picture(self):
        directory = pathlib.Path(self.enterContext(tempfile.TemporaryDirectory()))
        tiny_run.save_model(directory)
        tiny_run.save_dialogues(directory)
        choices = {name: adapters.CHOICES[name] for name in ("full", "LoRA, rank 1", "soft prompt, 8")}
        files = {field: str(directory / f"{field}.jsonl") for field in ("train", "validation")}
        options = Options(
            name="adapters", model=str(directory / "model"), results_dir=str(directory / "results"), steps=2, **files
        )
        environment = {"XLA_FLAGS": tests.xla_flags(devices=1)}
        with mock.patch.object(adapters, "CHOICES", choices), mock.patch.dict(os.environ, environment):
            adapters.main(options)
        page = (directory / "results" / "adapters.md").read_text(encoding="utf-8")
        rows = [line.split(" | ") for line in page.splitlines() if line.startswith("| ")]
        losses = {row[0].removeprefix("| "): row[1] for row in rows}
        self.assertContainsSubset(["before training", *choices], losses)
        self.assertLess(float(losses["full"]), float(losses["before training"]))
        self.assertGreater((directory / "results" / "adapters.png").stat().st_size, 10_000)


if __name__ == "__main__":
    absltest.main()
