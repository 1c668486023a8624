"""The experiment on select on a tiny model: to table and picture; and its differences and errors."""

import pathlib
import tempfile
from unittest import mock

import numpy as np
import selection
import selection_runs
import short_runs
from absl.testing import absltest
from selection import Row
from selection_runs import Outcome, Sizes

from tests.experiments import tiny_run

_TOKENS = np.array([10.0, 30.0])


def _row(criterion, *nll):
    outcomes = {seed: Outcome(3, 30, 60, 200, 2, 1.0, np.array(one)) for seed, one in enumerate(nll)}
    return Row(criterion, 0.3, outcomes)


class DifferencesTest(absltest.TestCase):
    def test_differences_are_paired_by_seed_and_per_token(self):
        random, other = _row("random", [40, 90], [50, 90], [0, 0]), _row("ifd", [44, 94], [50, 86])
        difference = selection.compare_rows(other, random, _TOKENS, 0.0)
        np.testing.assert_allclose(difference.by_seed, [8 / 40, -4 / 40])
        self.assertAlmostEqual(difference.mean.value, 2 / 40)
        # Dialogues differ by 2 and 0 nats in the mean of the seeds: residuals of ±1.5.
        self.assertAlmostEqual(difference.mean.error, np.sqrt(2 * 1.5**2 * 2) / 40)
        with_seeds = selection.compare_rows(other, random, _TOKENS, 0.3)
        self.assertAlmostEqual(with_seeds.mean.error, np.hypot(difference.mean.error, 0.3 / np.sqrt(2)))

    def test_deviation_is_pooled(self):
        deviation = selection.pool_deviations([[1.0, 3.0], [10.0, 10.0, 16.0]])
        self.assertAlmostEqual(deviation, np.sqrt((2 + 24) / 3))
        self.assertTrue(np.isnan(selection.pool_deviations([[1.0], [2.0]])))


class PlanTest(absltest.TestCase):
    def test_updates_have_the_tokens_asked_for_whatever_a_row_has(self):
        sizes = Sizes(tokens=2400, updates=8)
        self.assertEqual(selection_runs.plan_updates(1500, 10, sizes), (2, 8))
        self.assertEqual(selection_runs.plan_updates(750, 10, sizes), (4, 8))
        self.assertEqual(selection_runs.plan_updates(8000, 10, sizes), (1, 3))


class SelectionTest(absltest.TestCase):
    def test_experiment_writes_table_and_picture_and_trains_once(self):
        directory = pathlib.Path(self.enterContext(tempfile.TemporaryDirectory()))
        options = tiny_run.experiment_options(directory, "selection")
        sizes = Sizes(pool=6, tuning=4, held_out=4, tokens=60, updates=2, tuning_updates=2, rank=2, seeds=(0,))
        with (
            mock.patch.object(selection_runs, "CRITERIA", ("random",)),
            mock.patch.object(selection_runs, "SHARES", (0.3,)),
            mock.patch.object(selection, "CRITERIA", ("random", "rho", "history_gain")),
            tiny_run.one_device(),
        ):
            selection.main(options, sizes)
            with mock.patch.object(short_runs, "train", side_effect=AssertionError):
                selection.main(options, sizes)
        page = (directory / "results_dir" / "selection.md").read_text(encoding="utf-8")
        for row in (r"100% everything \| 18", r"30% random \| 5"):
            self.assertRegex(page, rf"\| {row} \| [\d.]+ \| \d+ \| ")
        self.assertRegex(page, r"\| history_gain \| 0\.\d\d ± \d\.\d\d \| \d+% \|")
        self.assertGreater((directory / "results_dir" / "selection.png").stat().st_size, 10_000)


if __name__ == "__main__":
    absltest.main()
