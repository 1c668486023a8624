"""Trainings of the harness against a plain loop over separate passes, and its means against textbook formulas."""

import pathlib
import tempfile

import harness
import jax
import numpy as np
import optax
from absl.testing import absltest
from harness import Losses

from dialog_jax.dialogues.parsing import parse_records
from dialog_jax.trees import dataset
from dialog_jax.trees.dialogue_trees import TreeConfig
from dialog_jax.trees.objectives import ObjectiveConfig
from tests.experiments import tiny_run

_LOSSES = Losses(
    tree=np.array([3, 3, 3, 3, 3, 8, 8]),
    node=np.array([1, 2, 5, 6, 7, 1, 2]),
    turn=np.array([0, 0, 1, 1, 1, -1, 0]),
    nll=np.array([1.0, 3.0, 2.0, 4.0, 6.0, 9.0, 5.0]),
)


def trees(model, dialogues, **objective):
    return dataset.prepare(
        dialogues,
        model.renderer,
        TreeConfig(objective=ObjectiveConfig(**objective), max_length=harness.MAX_LENGTH),
    )


def dialogues(count, seed=0):
    """Short enough for the oracle's 256 tokens."""
    short = [record for record in tiny_run.records(2 * count + 2, seed) if len(record["messages"]) <= 4]
    return list(parse_records(short[:count]))


def in_order(training, expected):
    """Losses in order of dialogues, put in the order in which the harness gives them: by the rows they are in."""
    order = np.argsort(training.losses[0].tree, kind="stable")
    placed = np.empty(len(expected))
    placed[order] = expected
    return placed


class CompareTest(absltest.TestCase):
    def setUp(self):
        super().setUp()
        directory = pathlib.Path(self.enter_context(tempfile.TemporaryDirectory()))
        self.model = tiny_run.save_model(directory)

    def test_trainings_equal_a_plain_loop_of_separate_passes(self):
        config = self.model.config
        train, held_out = dialogues(4), dialogues(2, seed=1)
        weigh = {"all": lambda turn, turns: 1.0, "last": lambda turn, turns: float(turn == turns - 1)}
        prepared = {"all": trees(self.model, train), "last": trees(self.model, train, name="last")}
        done = harness.compare(
            self.model, prepared, trees(self.model, held_out), steps=2, seed=5, evaluate_every=1, log=lambda line: None
        )
        self.assertEqual(list(done), ["all", "last"])
        plan = harness.make_plan(prepared["all"], 5)
        expected_tokens, expected_weight = tiny_run.passes(held_out)
        adam = optax.chain(optax.clip_by_global_norm(1.0), optax.scale_by_adam(b1=0.9, b2=0.99, eps=1e-8))
        update = jax.jit(lambda gradient, state: adam.update(gradient, state))
        for name, training in done.items():
            self.assertEqual(list(training.losses), [0, 1, 2])
            parameters, state, targets = self.model.parameters, adam.init(self.model.parameters), 0
            for number in range(3):
                expected = np.asarray(tiny_run.losses(config, parameters, expected_tokens))[expected_weight > 0]
                np.testing.assert_allclose(training.losses[number].nll, in_order(training, expected), rtol=2e-4)
                if number == 2:
                    break
                seen = [train[tree] for row in plan.rows(number) for tree in row]
                tokens, weight = tiny_run.passes(seen, weigh[name])
                targets += int(weight.sum())
                gradient = tiny_run.gradient(config, parameters, tokens, weight / weight.sum())
                updates, state = update(gradient, state)
                # One step of warm-up, at the peak already, and the first one after it.
                parameters = jax.tree.map(lambda p, u: p - harness.LEARNING_RATE * u, parameters, updates)
            self.assertEqual(training.targets, targets)
        moved = np.abs(done["all"].losses[2].nll - done["last"].losses[2].nll).max()
        self.assertGreater(moved, 1e-3)

    def test_trees_of_other_dialogues_are_refused(self):
        prepared = {"a": trees(self.model, dialogues(8)), "b": trees(self.model, dialogues(4))}
        with self.assertRaisesRegex(ValueError, "the trees of 'b' have other dialogues than those of 'a'"):
            harness.compare(self.model, prepared, prepared["a"], steps=1, seed=0)

    def test_smaller_trees_may_not_come_first(self):
        prepared = {"a": trees(self.model, dialogues(8)), "b": trees(self.model, dialogues(8), name="joint")}
        with self.assertRaisesRegex(ValueError, "the largest trees first"):
            harness.compare(self.model, prepared, prepared["a"], steps=1, seed=0)


class MeansTest(absltest.TestCase):
    def test_mean_is_weighted(self):
        values, weight = np.array([1.0, 2.0, 6.0]), np.array([1.0, 3.0, 0.5])
        mean = harness.mean_over(values, weight, np.array([0, 1, 2]))
        self.assertAlmostEqual(mean.value, (1 + 6 + 3) / 4.5)

    def test_error_of_equal_clusters_is_that_of_their_means(self):
        rng = np.random.default_rng(0)
        values = rng.normal(size=(12, 7)) + rng.normal(size=(12, 1))
        cluster = np.repeat(np.arange(12) * 5, 7)
        mean = harness.mean_over(values.ravel(), np.full(84, 2.0), cluster)
        self.assertAlmostEqual(mean.error, values.mean(axis=1).std(ddof=1) / np.sqrt(12))

    def test_error_of_unequal_clusters_is_near_the_bootstrap(self):
        rng = np.random.default_rng(1)
        sizes = rng.integers(1, 30, 60)
        cluster = np.repeat(np.arange(60), sizes)
        values = rng.normal(size=len(cluster)) + rng.normal(size=60)[cluster]
        mean = harness.mean_over(values, np.ones(len(values)), cluster)
        drawn = []
        for _ in range(2000):
            chosen = rng.integers(0, 60, 60)
            drawn.append(sum(values[cluster == c].sum() for c in chosen) / sizes[chosen].sum())
        self.assertAlmostEqual(mean.error / np.std(drawn), 1.0, delta=0.1)

    def test_mean_of_nothing_is_not_a_number(self):
        empty = np.zeros(0)
        self.assertTrue(np.isnan(harness.mean_over(empty, empty, np.zeros(0, np.int64))).all())

    def test_sizes_of_responses_and_dialogues(self):
        np.testing.assert_array_equal(harness.response_sizes(_LOSSES), [2, 2, 3, 3, 3, 1, 1])
        np.testing.assert_array_equal(harness.dialogue_sizes(_LOSSES), [5, 5, 5, 5, 5, 2, 2])

    def test_signed_shows_two_sided_95_percent(self):
        self.assertEqual(harness.Mean(-0.01, 0.1).signed, "-0.010 ± 0.196")


if __name__ == "__main__":
    absltest.main()
