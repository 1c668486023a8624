"""The distillation experiment on a tiny model, from its files to its results."""

import pathlib
import tempfile

import distillation
import jax
import matplotlib.pyplot as plt
import numpy as np
from absl.testing import absltest
from report import Options

from dialog_jax.dialogues.parsing import read_dialogues
from tests.experiments import tiny_run


class DistillationTest(absltest.TestCase):
    @classmethod
    def setUpClass(cls):
        super().setUpClass()
        cls.directory = pathlib.Path(cls.enterClassContext(tempfile.TemporaryDirectory()))
        cls.model = tiny_run.save_model(cls.directory, layers=7)
        tiny_run.save_dialogues(cls.directory)

    def test_student_is_every_fifth_layer(self):
        student = distillation.make_student(self.model)
        self.assertEqual(student.config.layers, 2)
        for leaf, whole in zip(*(jax.tree.leaves(m.parameters["layers"]) for m in (student, self.model)), strict=True):
            np.testing.assert_array_equal(leaf, np.stack([whole[0], whole[5]]))
        self.assertIs(student.parameters["embedding"], self.model.parameters["embedding"])

    def test_dialogues_that_exceed_a_row_are_left_out(self):
        path = self.directory / "train.jsonl"
        fitting = distillation.select_fitting_dialogues(self.model, str(path))
        whole = [
            dialogue.id
            for dialogue in read_dialogues(path)
            if len(self.model.renderer.encode_prompt(dialogue)) <= distillation.harness.MAX_LENGTH
        ]
        self.assertEqual([dialogue.id for dialogue in fitting], whole)

    def test_experiment_writes_table_and_picture(self):
        files = {field: str(self.directory / f"{field}.jsonl") for field in ("train", "validation")}
        results = self.directory / "results"
        model = str(self.directory / "model")
        distillation.main(Options(name="distillation", model=model, results_dir=str(results), steps=5, **files))
        text = (results / "distillation.md").read_text()
        self.assertStartsWith(text, "Command: `python experiments/distillation.py --steps=5 --seed=0")
        for part in ("| step | tokens alone | half and half | teacher alone |", "\n| 5 | ", "The student has 2 layers"):
            self.assertIn(part, text)
        image = plt.imread(results / "distillation.png")
        self.assertGreater(image.shape[1], 1000)
        self.assertGreater(image.std(), 0.02)


if __name__ == "__main__":
    absltest.main()
