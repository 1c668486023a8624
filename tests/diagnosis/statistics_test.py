"""Estimates against closed forms, and their rates of false alarms."""

import numpy as np
from absl.testing import absltest

from dialog_jax.diagnosis import statistics


class StatisticsTest(absltest.TestCase):
    def test_change_and_error_are_those_of_a_straight_line(self):
        rng = np.random.default_rng(0)
        values = 2 - 0.5 * np.linspace(0, 1, 40) + 0.1 * rng.standard_normal(40)
        found = statistics.fit_change(values)
        # The textbook's formulas, with the abscissa centered.
        x = np.linspace(0, 1, 40) - 0.5
        slope = (x * values).sum() / (x**2).sum()
        residuals = values - values.mean() - slope * x
        self.assertAlmostEqual(found.value, slope, places=12)
        self.assertAlmostEqual(found.error, np.sqrt((residuals**2).sum() / 38 / (x**2).sum()), places=12)

    def test_two_standard_errors_hold_the_truth_in_19_of_20_cases(self):
        rng = np.random.default_rng(0)
        changes = [statistics.fit_change(rng.standard_normal(30)) for _ in range(1000)]
        self.assertBetween(np.mean([abs(change.ratio) > 2 for change in changes]), 0.03, 0.08)

    def test_jump_is_what_a_slope_does_not_explain(self):
        epoch = np.arange(1, 31) / 10
        number = np.repeat([0, 1, 2], 10)
        self.assertAlmostEqual(statistics.fit_jump(epoch, 3 - 0.2 * epoch).value, 0, places=10)
        jump = statistics.fit_jump(epoch, 3 - 0.2 * epoch - 0.7 * number)
        self.assertAlmostEqual(jump.value, -0.7, places=10)
        self.assertLess(jump.ratio, -1e6)

    def test_period_of_a_pattern_and_of_none(self):
        epoch, rng = np.arange(1, 81) / 20, np.random.default_rng(0)
        pattern = 0.3 * np.cos(2 * np.pi * epoch)
        amplitude, p = statistics.measure_period(epoch, 3 - 0.1 * epoch + pattern + 0.05 * rng.standard_normal(80))
        self.assertBetween(amplitude, 0.2, 0.35)
        self.assertLess(p, 0.005)
        alarms = 0
        for _ in range(12):
            falling = 3 - 0.4 * epoch - 0.5 * np.floor(epoch) + 0.1 * rng.standard_normal(80)
            alarms += statistics.measure_period(epoch, falling)[1] < 0.01
        self.assertLessEqual(alarms, 1)


if __name__ == "__main__":
    absltest.main()
