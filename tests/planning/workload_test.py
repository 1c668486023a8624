"""Workloads against the trees themselves."""

import dataclasses
import json
import pathlib
import tempfile

import numpy as np
from absl.testing import absltest, parameterized

from dialog_jax.model import saving
from dialog_jax.planning import workload
from dialog_jax.training.config import DataConfig, TrainConfig
from tests.rendering import chat_templates
from tests.training import tiny

_MODEL = tiny.config(64)


class MeasuredTest(parameterized.TestCase):
    @classmethod
    def setUpClass(cls):
        super().setUpClass()
        cls.directory = pathlib.Path(cls.enterClassContext(tempfile.TemporaryDirectory()))
        cls.tokenizer = chat_templates.train_tokenizer("chatml")
        config = tiny.config(len(cls.tokenizer))
        saving.save_pretrained(cls.directory / "model", config, tiny.parameters(config), tokenizer=cls.tokenizer)
        rng = np.random.default_rng(0)
        cls.dialogues = [chat_templates.random_dialogue(rng, turns=2) for _ in range(40)]
        records = [{"messages": [message.as_dict() for message in dialogue.messages]} for dialogue in cls.dialogues]
        (cls.directory / "train.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))

    def config(self, **fields):
        data = DataConfig(train=str(self.directory / "train.jsonl"), validation="v.jsonl", max_length=256)
        usual = {"model": str(self.directory / "model"), "data": data, "rows": 2, "gradient_accumulation": 2}
        return TrainConfig(epochs=3.0, **{**usual, **fields})

    def test_sums_over_an_epoch_are_those_of_its_trees(self):
        trees = tiny.trees(self.dialogues, self.tokenizer, max_length=256)
        work = workload.measure_workload(
            self.config(rows=64, gradient_accumulation=1), _MODEL, dialogues=1000, virtual_tokens=0
        )
        # 64 rows hold all of them at least once, and the last epochs in part: means by row are compared.
        self.assertBetween(work.tokens / 64 / 256, 0.6, 1.0)
        tokens, targets = (int(sizes.sum()) for sizes in trees.sizes())
        self.assertAlmostEqual(work.targets / work.tokens, targets / tokens, delta=0.02)
        pairs = sum(int((trees.tree(number).position + 1).sum()) for number in range(len(trees)))
        self.assertAlmostEqual(work.attention_pairs / work.tokens / (pairs / tokens), 1, delta=0.1)
        self.assertEqual(work.source, "measured on 40 of the 40 dialogues of train.jsonl")

    def test_updates_of_a_part_are_scaled_to_the_whole(self):
        whole = workload.measure_workload(self.config(), _MODEL, dialogues=1000, virtual_tokens=0)
        part = workload.measure_workload(self.config(), _MODEL, dialogues=20, virtual_tokens=0)
        self.assertEqual(part.source, "measured on 20 of the 40 dialogues of train.jsonl")
        self.assertAlmostEqual(part.steps / whole.steps, 1, delta=0.2)
        self.assertEqual(
            workload.measure_workload(self.config(steps=7), _MODEL, dialogues=20, virtual_tokens=0).steps, 7
        )

    def test_virtual_tokens_take_room_of_each_row(self):
        config = self.config(rows=4, gradient_accumulation=1)
        without, with_some = (
            workload.measure_workload(config, _MODEL, dialogues=1000, virtual_tokens=count) for count in (0, 100)
        )
        self.assertGreater(with_some.steps, without.steps)
        self.assertLess(with_some.targets, 0.8 * without.targets)

    def test_nothing_is_measured_without_tokenizer_or_data(self):
        self.assertIsNone(
            workload.measure_workload(self.config(model="somebody/something"), _MODEL, dialogues=5, virtual_tokens=0)
        )
        data = DataConfig(train="somebody/dialogues", validation="v.jsonl")
        self.assertIsNone(workload.measure_workload(self.config(data=data), _MODEL, dialogues=5, virtual_tokens=0))


class AssumedTest(absltest.TestCase):
    def test_rows_are_one_dialogue_each(self):
        data = DataConfig(train="t.jsonl", validation="v.jsonl", max_length=10)
        config = TrainConfig(model="m", data=data, rows=2, gradient_accumulation=3)
        work = workload.assume_workload(config, _MODEL, tokens=0.8, targets=0.5)
        self.assertEqual(work[:4], (6 * 8, 6 * 36, 6 * 4, None))
        # Half of the layers see four tokens at most: 1 + 2 + 3 + 4 * 5 = 26 pairs of a row, where others have 36.
        windows = dataclasses.replace(_MODEL, windows=(4, 0))
        self.assertEqual(workload.assume_workload(config, windows, tokens=0.8, targets=0.5)[1], 6 * 31)
        self.assertStartsWith(work.source, "ASSUMED: one dialogue per row, 80% of the row used, 50%")


if __name__ == "__main__":
    absltest.main()
