"""What rows of several lengths hold, against trees prepared for each length by itself."""

import numpy as np
import pytest
from absl.testing import absltest, parameterized

from dialog_jax.audit import inspection, row_lengths
from dialog_jax.dialogues.parsing import parse_dialogue
from dialog_jax.rendering import sequences
from dialog_jax.trees import dataset, weighting
from dialog_jax.trees.dialogue_trees import TreeConfig
from dialog_jax.trees.objectives import ObjectiveConfig
from tests.rendering import chat_templates


def measure(dialogues, renderer, lengths, max_length, **config):
    """The fills of dialogues at lengths."""
    config = TreeConfig(max_length=max_length, **config)
    measures, targets = [], 0
    for dialogue, excerpts in zip(
        dialogues, inspection.render_dialogues(dialogues, renderer, config.objective), strict=True
    ):
        tree = weighting.build_trees(
            weighting.select_supervised(dialogue, [excerpts], config.objective), config.objective
        )[0]
        if tree is not None:
            measures.append(row_lengths.measure_lengths(dialogue, excerpts, renderer, config, lengths))
            targets += int(np.count_nonzero(tree.weight > 0))
    return row_lengths.measure_fills(measures, targets, lengths, max_length)


class FillsTest(parameterized.TestCase):
    @parameterized.parameters(
        ("chatml", "split", {}),
        ("qwen3", "split", {}),
        ("qwen3", "turns", {}),
        ("qwen3", "drop", {"name": "joint"}),
        ("chatml", "turns", {"name": "last"}),
        ("qwen3", "split", {"name": "roles", "roles": ("user", "assistant")}),
    )
    @pytest.mark.full
    def test_every_length_has_what_training_at_that_length_has(self, family, truncate, options):
        objective, rng = ObjectiveConfig(**options), np.random.default_rng(2)
        dialogues = [
            chat_templates.random_dialogue(rng, turns=1 + i % 7, reasoning=family == "qwen3", id=i) for i in range(25)
        ]
        dialogues.append(parse_dialogue({"prompt": "Hi", "continuations": ["a" * 90, "b", "c"]}, index=25, where=""))
        renderer = sequences.Renderer(chat_templates.train_tokenizer(family))
        lengths = [64, 100, 200, 400, 100_000]
        fills = measure(dialogues, renderer, lengths, 100, objective=objective, truncate=truncate)
        complete = dataset.prepare(dialogues, renderer, TreeConfig(objective=objective, max_length=100_000)).report
        self.assertGreater(len(fills), 3)
        for fill in fills:
            config = TreeConfig(objective=objective, max_length=fill.max_length, truncate=truncate)
            report = dataset.prepare(dialogues, renderer, config).report
            self.assertEqual(
                (fill.divided, fill.repeated, fill.shortened, fill.cut),
                (report.divided, report.repeated, report.turns_shortened, report.turns_cut),
            )
            self.assertAlmostEqual(fill.targets_lost, 1 - report.targets / complete.targets)
            self.assertAlmostEqual(fill.used, report.tokens / (fill.rows * fill.max_length))

    def test_lengths_end_with_the_first_that_fits_all_and_have_the_one_asked_for(self):
        dialogue = parse_dialogue({"prompt": "Hi", "completion": "yes " * 150}, index=0, where="")
        renderer = sequences.Renderer(chat_templates.train_tokenizer("chatml"))
        lengths = [64, 128, 512, 1024, 2048, 4096]
        self.assertEqual([fill.max_length for fill in measure([dialogue], renderer, lengths, 64)], [64, 128, 512])
        fills = measure([dialogue], renderer, lengths, 2048)
        self.assertEqual([fill.max_length for fill in fills], [64, 128, 512, 2048])
        self.assertEqual([fill.rows for fill in fills], [0, 0, 1, 1])

    def test_dialogue_longer_than_every_length_counts_as_cut(self):
        dialogue = parse_dialogue({"prompt": "Hi", "completion": "yes " * 150}, index=0, where="")
        renderer = sequences.Renderer(chat_templates.train_tokenizer("chatml"))
        (fill,) = measure([dialogue], renderer, [64], 64)
        self.assertEqual((fill.cut, fill.targets_lost, fill.used), (1, 1.0, 0.0))

    def test_responses_whose_shortened_history_the_template_refuses_count_as_cut(self):
        messages = [{"role": role, "content": f"{n} " * 30} for n in range(4) for role in ("user", "assistant")]
        dialogue = parse_dialogue({"messages": messages}, index=0, where="")
        tokenizer = chat_templates.train_tokenizer.__wrapped__("chatml")
        refuses = "{% if messages[0].content[0] in '123' %}{{ raise_exception('no') }}{% endif %}"
        tokenizer.chat_template = refuses + tokenizer.chat_template
        first, second = measure([dialogue], sequences.Renderer(tokenizer), [200, 2000], 200)
        self.assertEqual((first.rows, first.cut, first.shortened), (1, 3, 0))
        self.assertEqual((second.rows, second.cut), (1, 0))


class SpreadTest(absltest.TestCase):
    def test_spread_is_of_values_that_occur(self):
        values = [(size, f"thing {size}") for size in (5, 1, 9, 3)]
        self.assertEqual(
            row_lengths.measure_spread(values), row_lengths.Spread(median=3, most=9, longest=9, where="thing 9")
        )
        self.assertIsNone(row_lengths.measure_spread([]))


if __name__ == "__main__":
    absltest.main()
