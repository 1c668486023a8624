"""What rows of several lengths hold, against trees prepared for each length by itself."""

import numpy as np
import pytest
from absl.testing import absltest, parameterized

from dialog_jax.audit import inspection, row_lengths
from dialog_jax.dialogues.parsing import parse_dialogue
from dialog_jax.rendering import sequences
from dialog_jax.trees import dataset, weighting
from dialog_jax.trees.chunks import TreeConfig
from dialog_jax.trees.objectives import ObjectiveConfig
from tests.rendering import chat_templates


def looked_at(dialogues, renderer, objective, lengths):
    """The `fits` of each dialogue with a tree."""
    made = []
    for dialogue, pieces in zip(dialogues, inspection.render_dialogues(dialogues, renderer, objective), strict=True):
        tree = weighting.build_trees(weighting.select_supervised(dialogue, [pieces], objective), objective)[0]
        if tree is not None:
            made.append(row_lengths.measure_fits(dialogue, pieces, tree, objective, lengths))
    return made


class FillsTest(parameterized.TestCase):
    @parameterized.parameters(
        ("chatml", {}),
        ("qwen3", {}),
        ("qwen3", {"name": "joint"}),
        ("chatml", {"name": "last"}),
        ("qwen3", {"name": "roles", "roles": ("user", "assistant")}),
    )
    @pytest.mark.full
    def test_every_length_loses_what_training_at_that_length_loses(self, family, options):
        objective, rng = ObjectiveConfig(**options), np.random.default_rng(2)
        dialogues = [chat_templates.random_dialogue(rng, turns=1 + i % 7, reasoning=True, id=i) for i in range(25)]
        dialogues.append(parse_dialogue({"prompt": "Hi", "continuations": ["a" * 90, "b", "c"]}, index=25, where=""))
        renderer = sequences.Renderer(chat_templates.train_tokenizer(family))
        lengths = [64, 100, 200, 400, 100_000]
        made = row_lengths.measure_fills(looked_at(dialogues, renderer, objective, lengths), lengths, 100)
        whole = dataset.prepare(dialogues, renderer, TreeConfig(objective=objective, max_length=100_000)).report
        self.assertGreater(len(made), 3)
        for fill in made:
            trees = dataset.prepare(dialogues, renderer, TreeConfig(objective=objective, max_length=fill.max_length))
            report = trees.report
            self.assertEqual(fill.too_long, report.shortened + report.dropped_too_long)
            self.assertEqual(fill.dropped, report.dropped_too_long)
            self.assertEqual(fill.responses_cut, report.turns_cut)
            self.assertAlmostEqual(fill.targets_lost, 1 - report.targets / whole.targets)
            self.assertAlmostEqual(fill.used, report.tokens / (fill.rows * fill.max_length))
            self.assertGreaterEqual(fill.rows * fill.max_length, report.tokens)

    def test_lengths_end_with_the_first_that_cuts_nothing_and_have_the_one_asked_for(self):
        dialogue = parse_dialogue({"prompt": "Hi", "completion": "yes " * 150}, index=0, where="")
        renderer = sequences.Renderer(chat_templates.train_tokenizer("chatml"))
        lengths = [64, 128, 512, 1024, 2048, 4096]
        all_fits = looked_at([dialogue], renderer, ObjectiveConfig(), lengths)
        self.assertEqual([fill.max_length for fill in row_lengths.measure_fills(all_fits, lengths, 64)], [64, 128, 512])
        self.assertEqual(
            [fill.max_length for fill in row_lengths.measure_fills(all_fits, lengths, 2048)], [64, 128, 512, 2048]
        )
        self.assertEqual([fill.rows for fill in row_lengths.measure_fills(all_fits, lengths, 64)], [0, 0, 1])

    def test_dialogue_longer_than_every_length_counts_as_cut(self):
        dialogue = parse_dialogue({"prompt": "Hi", "completion": "yes " * 150}, index=0, where="")
        renderer = sequences.Renderer(chat_templates.train_tokenizer("chatml"))
        (fill,) = row_lengths.measure_fills(looked_at([dialogue], renderer, ObjectiveConfig(), [64]), [64], 64)
        self.assertEqual((fill.dropped, fill.responses_cut, fill.targets_lost, fill.used), (1, 1, 1.0, 0.0))


class SpreadTest(absltest.TestCase):
    def test_spread_is_of_values_that_occur(self):
        values = [(size, f"thing {size}") for size in (5, 1, 9, 3)]
        self.assertEqual(
            row_lengths.measure_spread(values), row_lengths.Spread(median=3, most=9, longest=9, where="thing 9")
        )
        self.assertIsNone(row_lengths.measure_spread([]))


if __name__ == "__main__":
    absltest.main()
