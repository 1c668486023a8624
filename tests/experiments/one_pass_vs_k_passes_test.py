"""Cutting and counting against what can be read; and a whole run on a tiny model."""

import json
import math
import pathlib
import tempfile
from unittest import mock

import matplotlib.pyplot as plt
import numpy as np
import one_pass_vs_k_passes as experiment
from absl.testing import absltest
from report import Options

from dialog_jax.dialogues.parsing import parse_records, read_dialogues
from dialog_jax.evaluation import k_passes
from dialog_jax.rendering.sequences import Renderer
from dialog_jax.rendering.tokenizers import load_tokenizer
from tests.experiments import tiny_run


class OnePassVsKPassesTest(absltest.TestCase):
    @classmethod
    def setUpClass(cls):
        super().setUpClass()
        cls.directory = pathlib.Path(cls.enterClassContext(tempfile.TemporaryDirectory()))
        cls.model = tiny_run.save_model(cls.directory)
        tiny_run.save_dialogues(cls.directory)

    def dialogue(self):
        return list(parse_records(tiny_run.records(3)))[2]

    def test_cut_dialogue_ends_with_its_last_response(self):
        shorter = experiment.truncate(self.dialogue(), 4)
        self.assertEqual(shorter.messages, self.dialogue().messages[:8])

    def test_rows_alone_are_the_passes(self):
        found = experiment.fill_rows(experiment.separate_responses(self.dialogue()), self.model.renderer)
        expected = k_passes.make_passes(self.dialogue(), self.model.tokenizer)
        self.assertLen(found, 6)
        for batch, one in zip(found, expected, strict=True):
            length = len(one.tokens)
            np.testing.assert_array_equal(batch.tokens[0, :length], one.tokens)
            self.assertEqual(int((batch.segment > 0).sum()), length)
            self.assertEqual(int((batch.weight > 0).sum()), length - one.start)
            self.assertEqual((batch.tokens.shape[1] % 64, batch.source.shape[1] % 64), (0, 0))

    def test_reasoning_is_in_its_own_turn_only(self):
        thinking = experiment.with_reasoning(self.dialogue())
        tokenizer = load_tokenizer(self.directory / "model", chat_template=str(experiment._REASONING))
        *_, last = Renderer(tokenizer).render([thinking])[0]
        text = tokenizer.decode(last.tokens)
        self.assertEqual(text.count("<think>"), 1)
        response = thinking.messages[-1].content
        self.assertRegex(response, r"^<think>\nI was told: .*\nI could answer in \d+ words, from .* on.\n</think>\n\n")
        self.assertEndsWith(text, f"<|im_start|>assistant\n{response}<|im_end|>")

    def test_exponent_is_that_of_a_power(self):
        turns = [1, 2, 4, 8, 16]
        self.assertAlmostEqual(experiment.exponent(turns, [9, 9, 3 * 4**1.5, 3 * 8**1.5, 3 * 16**1.5]), 1.5)
        self.assertTrue(math.isnan(experiment.exponent([1, 2, 4], [1, 2, 4])))

    def test_experiment_writes_tables_and_a_picture(self):
        name = "one_pass_vs_k_passes"
        options = Options(
            name=name,
            model=str(self.directory / "model"),
            train=str(self.directory / "train.jsonl"),
            results_dir=str(self.directory / "results"),
        )
        with mock.patch.object(experiment, "_REPEATED_FOR", 0.01):
            experiment.main(options, turns=(2, 4, 6))
        text = (self.directory / "results" / f"{name}.md").read_text()
        for part in ("the 12 dialogues with at least 6 responses", "history kept", "strips reasoning", "| exponent |"):
            self.assertIn(part, text)
        differences = [line.split("|")[-3:-1] for line in text.splitlines() if line.startswith(("| 2 |", "| 4 |"))]
        self.assertLen(differences, 6)
        for loss, gradient in (map(float, pair) for pair in differences[:4]):
            self.assertLess(loss, 1e-5)
            self.assertLess(gradient, 1e-4)
        self.assertGreater(plt.imread(self.directory / "results" / f"{name}.png").std(), 0.02)

    def test_dialogues_that_are_too_short_are_explained(self):
        options = Options(name="x", model=str(self.directory / "model"), train=str(self.directory / "train.jsonl"))
        with self.assertRaisesRegex(ValueError, "no dialogue of 32 responses"):
            experiment.main(options)

    def test_dialogues_with_reasoning_are_written_for_the_check(self):
        out = self.directory / "thinking.jsonl"
        experiment._write_reasoning(str(self.directory / "train.jsonl"), str(out))
        written = [json.loads(line) for line in out.read_text().splitlines()]
        expected = [experiment.with_reasoning(d) for d in read_dialogues(self.directory / "train.jsonl")]
        self.assertEqual([record["id"] for record in written], [dialogue.id for dialogue in expected])
        self.assertEqual(written[1]["messages"][1]["content"], expected[1].messages[1].content)


if __name__ == "__main__":
    absltest.main()
