"""Every experiment from its files to its results, on a tiny model, and what report.py writes around them."""

import os
import pathlib
import platform
import subprocess
import sys
import tempfile
from unittest import mock

import causality
import joint_vs_conditional
import matplotlib.pyplot as plt
import normalization
import report
import which_turns
from absl.testing import absltest, parameterized
from report import Options

from tests.experiments import tiny_run

_ROOT = pathlib.Path(__file__).parents[2]


class RunTest(parameterized.TestCase):
    @classmethod
    def setUpClass(cls):
        super().setUpClass()
        cls.directory = pathlib.Path(cls.enterClassContext(tempfile.TemporaryDirectory()))
        tiny_run.save_model(cls.directory)
        tiny_run.save_dialogues(cls.directory)

    def options(self, name, **changes):
        files = {field: str(self.directory / f"{field}.jsonl") for field in ("train", "validation")}
        results = str(self.directory / "results")
        return Options(name=name, model=str(self.directory / "model"), results_dir=results, **files, **changes)

    @parameterized.parameters(
        (joint_vs_conditional, 2, ["frozen copy", "messages of users", "joint - conditional"]),
        (which_turns, 2, ["discount 0.7", "last response - all responses", "| all |"]),
        (normalization, 2, ["12 training dialogues and 6 held-out ones", "dialogue mean", "33 and more"]),
        (causality, 0, ["equal in all bits", "reasoning stripped from history"]),
    )
    def test_experiment_writes_table_and_picture(self, module, steps, expected):
        name = module.__name__
        module.main(self.options(name, steps=steps))
        text = (self.directory / "results" / f"{name}.md").read_text()
        self.assertStartsWith(text, f"Command: `python experiments/{name}.py")
        for part in [*expected, f"![{name}]({name}.png)"]:
            self.assertIn(part, text)
        image = plt.imread(self.directory / "results" / f"{name}.png")
        self.assertGreater(image.shape[1], 1000)
        self.assertGreater(image.std(), 0.02)

    def test_experiment_runs_from_the_command_line(self):
        options = self.options("causality")
        flags = [f"--{field}={getattr(options, field)}" for field in ("model", "validation", "results_dir")]
        ran = subprocess.run(
            [sys.executable, "experiments/causality.py", *flags],
            cwd=_ROOT,
            env=os.environ | {"PYTHONPATH": str(_ROOT)},
            capture_output=True,
            text=True,
        )
        self.assertEqual(ran.returncode, 0, ran.stderr)
        self.assertTrue((self.directory / "results" / "causality.md").exists())

    def test_dialogue_that_is_missing_is_explained(self):
        few = self.directory / "few.jsonl"
        few.write_text('{"prompt": "Hi", "completion": "Hello"}\n')
        with self.assertRaisesRegex(ValueError, "no dialogue of 6 responses"):
            causality._choose_dialogue(str(few))


class ReportTest(absltest.TestCase):
    def test_command_names_what_is_not_as_usual_and_no_path_of_the_machine(self):
        options = Options(name="x", steps=3, seed=1, model="/data/someone/model/", train="my/train.jsonl")
        self.assertEqual(
            options.command, "python experiments/x.py --steps=3 --seed=1 --model=model --train=my/train.jsonl"
        )
        self.assertEqual(Options(name="causality").command, "python experiments/causality.py")

    def test_results_begin_with_how_they_came_to_be(self):
        directory = pathlib.Path(self.enter_context(tempfile.TemporaryDirectory()))
        figure, _ = plt.subplots()
        written = report.write(Options(name="x", results_dir=str(directory)), figure, ["One.", "Two."], seconds=90)
        self.assertEqual([file.name for file in written], ["x.md", "x.png"])
        self.assertCountEqual([file.name for file in directory.iterdir()], ["x.md", "x.png"])
        head, *rest = written[0].read_text().split("\n\n")
        names = [line.partition(":")[0] for line in head.splitlines()]
        self.assertEqual(names, ["Command", "Date", "Versions", "Machine", "Time"])
        self.assertIn("Time: 1.5 min, ", head)
        self.assertIn(f"Python {platform.python_version()}, jax ", head)
        self.assertNotIn(platform.node(), head)
        self.assertEqual(rest, ["One.", "Two.", "![x](x.png)\n"])

    def test_table_is_markdown(self):
        shown = report.table(["turn", "loss"], [["0", "1.5"]])
        self.assertEqual(shown, "| turn | loss |\n| --- | ---: |\n| 0 | 1.5 |")

    def test_machine_is_told_in_words(self):
        described = "model name\t: AMD EPYC\nflags\t\t: fpu avx512f\n"
        with (
            mock.patch.object(pathlib.Path, "read_text", return_value=described),
            mock.patch.object(pathlib.Path, "exists", return_value=True),
            mock.patch.object(os, "sched_getaffinity", return_value={0, 1}),
        ):
            self.assertEqual(report.machine(), "two cores of an AMD EPYC with AVX-512")

    def test_labels_of_lines_that_end_together_stand_apart(self):
        figure, axes = plt.subplots()
        self.addCleanup(plt.close, figure)
        axes.set_ylim(0, 10)
        report.label_ends(axes, [(5, 3.0, "a", "k"), (4, 3.1, "b", "k")])
        places = {text.get_text(): text.xy for text in axes.texts}
        self.assertEqual(places["a"], (5, 3.0))
        self.assertGreater(places["b"][1], 3.5)


if __name__ == "__main__":
    absltest.main()
