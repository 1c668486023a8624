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
        return [dialogue.messages[0].content for dialogue in source.read([])]

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

    def test_small_file_has_dialogues_on_both_sides(self):
        for count in (2, 3, 10):
            for share in (1e-9, 0.05, 1 - 1e-9):
                ((training,), held_out) = self.sides(
                    train=self.write("few.jsonl", range(count)), validation_share=share
                )
                self.assertCountEqual([*training, *held_out], [f"{n}?" for n in range(count)])
                self.assertNotEmpty(training)
                self.assertNotEmpty(held_out)

    def test_small_file_is_divided_for_commands_as_for_training_although_a_record_is_broken(self):
        file = pathlib.Path(self.write("few.jsonl", range(4)))
        config = TrainConfig(data=DataConfig(train=str(file)))
        trained_on = self.contents(data_sources.find_source(config, "validation"))
        file.write_text("{\n" + file.read_text())
        validation = data_sources.find_source(config, "validation")
        records = list(validation.iterate_records())
        self.assertIsInstance(records[0], UserError)
        self.assertEqual([record.messages[0].content for record in records[1:]], trained_on)
        with self.assertRaisesRegex(UserError, "few.jsonl:1: not JSON"):
            self.contents(validation)

    def test_file_that_cannot_be_divided_is_an_error_with_place_and_remedy(self):
        for numbers, reason in (([1], "it has a single dialogue"), ([1, 1, 1], "its 3 dialogues are all equal")):
            with self.assertRaisesRegex(UserError, f"one.jsonl: data.validation is empty, and {reason}; .*validation="):
                self.sides(train=self.write("one.jsonl", numbers))
        file = pathlib.Path(self.write("one.jsonl", [1]))
        file.write_text(file.read_text() + "{\n")
        with self.assertRaisesRegex(UserError, "one.jsonl:2: not JSON"):
            self.sides(train=str(file))
        file.write_text("")
        with self.assertRaisesRegex(UserError, "one.jsonl: holds no dialogue"):
            self.sides(train=str(file))

    def test_set_of_a_mixture_that_is_all_held_out_is_an_error_with_the_remedy(self):
        paths = {name: self.write(f"{name}.jsonl", numbers) for name, numbers in (("a", range(100)), ("b", [6]))}
        mix = {name: {"train": path, "weight": 1} for name, path in paths.items()}
        with self.assertRaisesRegex(
            UserError, "b.jsonl: data.validation is empty, .* all of the 1 dialogues of this set"
        ):
            self.sides(mix=mix, validation_share=0.9)

    def test_command_looks_at_all_of_the_training_data(self):
        mix = {"a": {"train": self.write("a.jsonl", range(30)), "weight": 1}}
        for config, name in (
            (TrainConfig(data=DataConfig(train=self.write("train.jsonl", range(30)))), "train"),
            (TrainConfig(data=DataConfig(mix=mix)), "a"),
        ):
            self.assertLen(self.contents(data_sources.find_source(config, name)), 30)
            with self.assertRaisesRegex(UserError, f"data 'test': .* name one of {name} or validation"):
                data_sources.find_source(config, "test")
        with self.assertRaisesRegex(UserError, "data.train is empty"):
            data_sources.find_source(TrainConfig(), "train")


if __name__ == "__main__":
    absltest.main()
