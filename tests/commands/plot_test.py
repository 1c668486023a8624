"""What dialog_jax plot draws is what the run wrote."""

import json
import pathlib
import tempfile

import matplotlib.pyplot as plt
from absl.testing import absltest

from tests.commands import running


def _evaluation(step, losses, targets):
    turns = [
        {"turn": turn, "loss": loss, "accuracy": 0.5, "targets": count}
        for turn, (loss, count) in enumerate(zip(losses, targets, strict=True))
    ]
    return {"step": step, "loss": losses[0], "accuracy": 0.5, "targets": sum(targets), "turns": turns}


# Turn 2 has too few tokens to be drawn.
_EVALUATIONS = [_evaluation(0, [4.0, 3.5, 9.0], [500, 300, 20]), _evaluation(4, [3.0, 2.75, 1.0], [500, 300, 20])]
_STEPS = [{"step": step, "loss": 4.0 - step / 8} for step in range(1, 5)]


class PlotTest(absltest.TestCase):
    def setUp(self):
        super().setUp()
        self.directory = pathlib.Path(self.enter_context(tempfile.TemporaryDirectory()))

    def write(self, name, lines):
        (self.directory / name).write_text("".join(json.dumps(line) + "\n" for line in lines))

    def test_plot_is_a_readable_image_in_the_run(self):
        self.write("metrics.jsonl", _STEPS)
        self.write("evaluation.jsonl", _EVALUATIONS)
        told, error = running.run("plot", f"--run={self.directory}")
        self.assertEmpty(error)
        self.assertIn("plot.png", told)
        image = plt.imread(self.directory / "plot.png")
        self.assertGreater(image.shape[1], 1200)
        self.assertGreater(image.std(), 0.02)
        self.assertLen(list(self.directory.iterdir()), 3)

    def test_lines_are_the_figures_of_the_run(self):
        figure, (left, right) = plt.subplots(1, 2)
        self.addCleanup(plt.close, figure)
        with running.loaded("plot") as script:
            script._draw_steps(left, _STEPS, _EVALUATIONS)
            script._draw_turns(right, _EVALUATIONS)
        drawn = [line.get_xydata().tolist() for line in left.lines]
        self.assertIn([[line["step"], line["loss"]] for line in _STEPS], drawn)
        self.assertIn([[0, 4.0], [4, 3.0]], drawn)
        drawn = [line.get_xydata().tolist() for line in right.lines]
        self.assertEqual(drawn, [[[0, 4.0], [1, 3.5]], [[0, 3.0], [1, 2.75]]])
        self.assertCountEqual([text.get_text() for text in right.texts], ["before", "after"])
        self.assertIn("nats", right.get_ylabel())
        self.assertIn("4.00 before, 3.00 after 4 steps", left.get_title())

    def test_labels_of_lines_that_end_together_stand_apart(self):
        figure, axes = plt.subplots()
        self.addCleanup(plt.close, figure)
        axes.set_ylim(0, 10)
        with running.loaded("plot") as script:
            script._label(axes, [(5, 3.0, "a", "k"), (4, 3.1, "b", "k")])
        places = {text.get_text(): text.xy for text in axes.texts}
        self.assertEqual(places["a"], (5, 3.0))
        self.assertGreater(places["b"][1], 3.5)

    def test_run_without_figures_is_explained(self):
        _, error = running.run("plot", f"--run={self.directory}")
        self.assertIn("has no figures to draw", error)
        self.assertFalse((self.directory / "plot.png").exists())


if __name__ == "__main__":
    absltest.main()
