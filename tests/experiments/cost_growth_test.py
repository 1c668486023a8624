"""A whole measurement at tiny sizes, and the exponents and batches behind it against what can be counted."""

import pathlib
import tempfile
from unittest import mock

import cost_growth as experiment
import matplotlib.pyplot as plt
from absl.testing import absltest
from cost_growth import Point, Sizes
from report import Options

from tests.experiments import tiny_run

_SIZES = Sizes(
    lengths=(64, 128),
    turns=(1, 4),
    dialogue=64,
    data_sets=(6, 30),
    vocabularies=(2048, 8192),
    rows=(2, 64),
    width=16,
    repeats=1,
)


class CostGrowthTest(absltest.TestCase):
    def test_measurement_writes_tables_and_a_picture(self):
        directory = pathlib.Path(self.enter_context(tempfile.TemporaryDirectory()))
        tiny_run.save_model(directory)
        tiny_run.save_dialogues(directory)
        options = Options(
            name="cost_growth",
            model=str(directory / "model"),
            train=str(directory / "train.jsonl"),
            results_dir=str(directory / "results"),
        )
        first, real = [], experiment.step_seconds

        def timed(model, batch, repeats):  # one of them, for the sake of the test's own time
            first.append(first[0] if first else real(model, batch, repeats=repeats))
            return first[-1]

        with mock.patch.object(experiment, "step_seconds", timed):
            experiment.main(options, _SIZES)
        self.assertLen(first, 6)
        self.assertGreater(first[0], 0)
        text = (directory / "results" / "cost_growth.md").read_text()
        for part in ("| T | seconds |", "| turns K | one pass |", "| dialogues | seconds |", "| vocabulary |"):
            self.assertIn(part, text)
        self.assertEqual(text.count("| exponent |"), 4)
        self.assertGreater(plt.imread(directory / "results" / "cost_growth.png").std(), 0.02)

    def test_batches_of_turns_are_a_row_and_as_many_rows_as_the_passes_fill(self):
        seen = []
        with mock.patch.object(experiment, "step_seconds", lambda model, batch, repeats: seen.append(batch) or 1.0):
            points = list(experiment.measure_turns(_SIZES))
        self.assertEqual([point.x for point in points], [1, 4])
        tokens = [int((batch.segment > 0).sum()) for batch in seen]
        self.assertEqual(tokens, [64, 64, 64, 16 + 32 + 48 + 64])
        targets = [int((batch.weight > 0).sum()) for batch in seen]
        self.assertEqual(targets, [32] * 4)
        self.assertEqual(seen[3].tokens.shape, (3, 1, 64))

    def test_exponent_is_that_of_a_power(self):
        points = [Point(x, {"cost": 3 * x**1.5, "flat": 2.0}) for x in (1, 2, 4, 8)]
        self.assertAlmostEqual(experiment.exponent(points, "cost"), 1.5)
        self.assertAlmostEqual(experiment.exponent(points, "flat"), 0.0)


if __name__ == "__main__":
    absltest.main()
