"""What a page says of a run is what its files say, and what they do not say is not made up."""

import hashlib
import json
import pathlib
import tempfile

from absl.testing import absltest

from dialog_jax.report import run_facts
from dialog_jax.training.config import DataConfig, TrainConfig
from dialog_jax.training.optimizer_config import OptimizerConfig
from dialog_jax.training.trained_models import Checkpoint

_COUNTS = {
    **dict.fromkeys(("dialogues", "trees", "branching", "divided", "tokens", "targets", "turns"), 9),
    **dict.fromkeys(("turns_shortened", "turns_cut", "dropped_too_long", "dropped_no_target", "skipped"), 2),
}


class RunFactsTest(absltest.TestCase):
    def setUp(self):
        super().setUp()
        self.directory = pathlib.Path(self.enterContext(tempfile.TemporaryDirectory()))
        self.config = TrainConfig(model="m", data=DataConfig(train="a.jsonl"))
        (self.directory / "config.json").write_text("{}")
        (self.directory / "inputs.json").write_text("{}")

    def make_run(self, **changes):
        run = run_facts.Run("run", self.directory, self.config, None, Checkpoint(2, {}, 2), [], [], [])
        return run._replace(**changes)

    def write_trees(self, name, key, **report):
        directory = self.directory / "trees" / name
        directory.mkdir(parents=True)
        (directory / "key.json").write_text(json.dumps({**key, "format": 3}))
        (directory / "report.json").write_text(json.dumps({**_COUNTS, "named": {}, **report}))
        return hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()

    def test_sets_are_found_by_their_hash_and_others_are_left_out(self):
        held_out = self.write_trees("1", {"dialogues": ["b"]}, tokens=50)
        train = self.write_trees("2", {"dialogues": ["a"]}, tokens=500, named={"dropped": [f"d{i}" for i in range(60)]})
        self.write_trees("3", {"dialogues": ["of an earlier config"]})
        hashes = {"model": "x", "data.train": train, "data.validation": held_out, "steps": 3}
        (self.directory / "inputs.json").write_text(json.dumps(hashes))
        sets = run_facts.read_sets(self.make_run())
        self.assertEqual([one.field for one in sets], ["data.train", "data.validation"])
        self.assertEqual([dict(one.figures)["tokens"] for one in sets], [500, 50])
        ((reason, count, names),) = sets[0].named
        self.assertEqual((reason, count, names), ("dropped", 60, [f"d{i}" for i in range(50)]))

    def test_config_is_a_difference_from_the_defaults_and_between_runs(self):
        other = TrainConfig(model="m", optimizer=OptimizerConfig(learning_rate=1e-3), freeze=("embedding",))
        table = run_facts.compare_configs({"one": self.config, "two": other})
        self.assertEqual(table.headings, ["field", "default", "one", "two"])
        rows = {row[0]: row[1:] for row in table.rows}
        self.assertEqual(
            rows,
            {
                "model": ["(empty)", "m", "m"],
                "data.train": ["(empty)", "a.jsonl", "(empty)"],
                "optimizer.learning_rate": ["2e-05", "2e-05", "0.001"],
                "freeze": ["[]", "[]", '["embedding"]'],
            },
        )

    def test_times_are_readable(self):
        for seconds, text in ((0.42, "0.4 s"), (75, "1 min 15 s"), (7261, "2 h 1 min")):
            self.assertEqual(run_facts.format_seconds(seconds), text)

    def test_run_without_sessions_has_an_empty_table(self):
        self.assertEmpty(run_facts.tabulate_sessions(self.make_run()).rows)


if __name__ == "__main__":
    absltest.main()
