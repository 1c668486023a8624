"""Which dialogues a config names, and the two sides of the division when it names no held-out ones."""

import json
import pathlib
import tempfile

from absl.testing import absltest

from dialog_jax.errors import UserError
from dialog_jax.training import data_sources
from dialog_jax.training.config import DataConfig, TrainConfig


class DataSourcesTest(absltest.TestCase):
    def setUp(self):
        super().setUp()
        self.directory = pathlib.Path(self.enter_context(tempfile.TemporaryDirectory()))

    def write(self, name, numbers):
        file = self.directory / name
        file.write_text("".join(json.dumps({"prompt": f"{n}?", "completion": f"{n}!"}) + "\n" for n in numbers))
        return str(file)

    def contents(self, source):
        return [dialogue.messages[0].content for dialogue in source.read()]

    def sides(self, **data):
        config = TrainConfig(data=DataConfig(**data))
        training = [self.contents(source) for source in data_sources.training_sources(config).values()]
        return training, self.contents(data_sources.validation_source(config))

    def test_sides_of_one_file_are_disjoint_and_complete(self):
        ((training,), held_out) = self.sides(train=self.write("train.jsonl", range(200)), validation_share=0.2)
        self.assertCountEqual([*training, *held_out], [f"{n}?" for n in range(200)])
        self.assertBetween(len(held_out), 20, 60)

    def test_equal_dialogues_are_on_one_side(self):
        ((training,), held_out) = self.sides(train=self.write("train.jsonl", [*range(50)] * 2), validation_share=0.2)
        self.assertEmpty(set(training) & set(held_out))
        self.assertLen(training, 2 * len(set(training)))

    def test_validation_file_leaves_the_training_file_undivided(self):
        train, validation = self.write("train.jsonl", range(20)), self.write("validation.jsonl", range(20, 25))
        ((training,), held_out) = self.sides(train=train, validation=validation)
        self.assertEqual((len(training), len(held_out)), (20, 5))

    def test_every_set_of_a_mixture_is_divided(self):
        mix = {
            "a": {"train": self.write("a.jsonl", range(100)), "weight": 1},
            "b": {"train": self.write("b.jsonl", range(100, 200)), "weight": 1},
        }
        (a, b), held_out = self.sides(mix=mix, validation_share=0.2)
        self.assertCountEqual([*a, *b, *held_out], [f"{n}?" for n in range(200)])
        self.assertGreater(len(set(held_out) & {f"{n}?" for n in range(100)}), 5)
        self.assertGreater(len(set(held_out) & {f"{n}?" for n in range(100, 200)}), 5)

    def test_side_without_dialogues_is_an_error_with_the_remedy(self):
        for share, side in ((1e-9, "to hold out"), (1 - 1e-9, "to train on")):
            with self.assertRaisesRegex(UserError, f"none of the 3 dialogues of .*one.jsonl {side}. Change data.valid"):
                self.sides(train=self.write("one.jsonl", range(3)), validation_share=share)

    def test_command_looks_at_all_of_the_training_data(self):
        mix = {"a": {"train": self.write("a.jsonl", range(30)), "weight": 1}}
        for config, name in (
            (TrainConfig(data=DataConfig(train=self.write("train.jsonl", range(30)))), "train"),
            (TrainConfig(data=DataConfig(mix=mix)), "a"),
        ):
            self.assertLen(self.contents(data_sources.find_source(config, name)), 30)
            with self.assertRaisesRegex(UserError, f"--data=test: .* it names {name} and validation"):
                data_sources.find_source(config, "test")
        with self.assertRaisesRegex(UserError, "data.train is empty"):
            data_sources.find_source(TrainConfig(), "train")


if __name__ == "__main__":
    absltest.main()
