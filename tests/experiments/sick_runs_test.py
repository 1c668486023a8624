"""The experiment on sick runs on a tiny model: to table and picture, and what is there is not made again."""

import dataclasses
import os
import pathlib
import tempfile
from unittest import mock

import short_runs
import sick_runs
from absl.testing import absltest

import tests
from dialog_jax.errors import UserError
from tests.experiments import tiny_run


class SickRunsTest(absltest.TestCase):
    def test_experiment_writes_table_and_picture_and_trains_once(self):
        directory = pathlib.Path(self.enterContext(tempfile.TemporaryDirectory()))
        options = tiny_run.experiment_options(directory, "sick_runs")
        sizes = sick_runs.Sizes(train=10, few=2, held_out=3, updates=4, evaluate_every=2, rank=2)
        chosen = {name: sick_runs.SICKNESSES[name] for name in ("contaminated",)}
        environment = {"XLA_FLAGS": tests.xla_flags(devices=1)}
        with (
            mock.patch.object(sick_runs, "SICKNESSES", chosen),
            mock.patch.dict(os.environ, environment),
            tiny_run.one_device(),
        ):
            sick_runs.main(options, sizes)
            with mock.patch.object(short_runs, "train", side_effect=AssertionError):
                sick_runs.main(options, sizes)
            with self.assertRaisesRegex(UserError, "do not have the settings .* another --runs_dir"):
                sick_runs.main(options, dataclasses.replace(sizes, rank=3))
        page = (directory / "results_dir" / "sick_runs.md").read_text(encoding="utf-8")
        self.assertRegex(page, r"\| contaminated \| the held-out dialogues are .*`contaminated` \(certain\)")
        self.assertIn("held-out responses are in the training data", page)
        self.assertGreater((directory / "results_dir" / "sick_runs.png").stat().st_size, 10_000)

    def test_findings_are_those_printed(self):
        text = "findings: 2\nfew_targets (certain): 0.1%.\n    Look (likely): at.\nmemorizing (possible): x."
        outcome = sick_runs.Outcome([], [], text)
        self.assertEqual(outcome.findings, {"few_targets": "certain", "memorizing": "possible"})


if __name__ == "__main__":
    absltest.main()
