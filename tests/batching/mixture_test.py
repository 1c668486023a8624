"""Mixtures: whose row comes when, each set without loss or repetition, and what epochs and weights mean."""

import collections
import itertools
from fractions import Fraction

import numpy as np
from absl.testing import absltest, parameterized

from dialog_jax.batching import mixture as mixture_lib
from dialog_jax.batching.mixture import Mixture
from tests.batching.batches_test import assert_equal, plan_of, random_trees, trees_of


def mixture(counts, kind, amounts):
    sets = {name: random_trees(seed, count) for seed, (name, count) in enumerate(counts.items())}
    return Mixture(sets, {name: {"train": name, kind: amount} for name, amount in zip(counts, amounts, strict=True)})


def by_set(mixed, rows):
    """{set: its trees in order} of rows of numbers."""
    names, starts = list(mixed.sets), [*mixed.starts, sum(map(len, mixed.sets.values()))]
    found = collections.defaultdict(list)
    for row in rows:
        (place,) = {int(np.searchsorted(starts, tree, side="right")) - 1 for tree in row}  # a row is of one set
        found[names[place]].append([tree - starts[place] for tree in row])
    return found


class DrawTest(parameterized.TestCase):
    def test_picture(self):
        parts = [Fraction(2), Fraction(1), Fraction(1)]
        self.assertEqual(
            mixture_lib.interleave(parts, 0, 8), [(0, 0), (1, 0), (2, 0), (0, 1), (0, 2), (1, 1), (2, 1), (0, 3)]
        )

    @parameterized.parameters(([1],), ([1, 1],), ([5, 1, 1],), ([100, 3, 7, 29],), ([0.3, 0.3, 0.4, 1.7, 2],))
    def test_rows_are_in_the_order_of_their_places_from_anywhere(self, parts):
        parts = [Fraction(str(part)) for part in parts]
        shares = [part / sum(parts) for part in parts]
        places = sorted(
            ((number + Fraction(1, 2)) / share, index, number)
            for index, share in enumerate(shares)
            for number in range(int(400 * share) + 3)
        )
        straight = [(index, number) for _, index, number in places][:400]
        self.assertEqual(mixture_lib.interleave(parts, 0, 400), straight)
        for start, count in ((0, 1), (1, 1), (17, 30), (200, 7), (399, 1)):
            self.assertEqual(mixture_lib.interleave(parts, start, count), straight[start : start + count])

    @parameterized.parameters(range(8))
    def test_every_stretch_has_near_its_share(self, seed):
        rng = np.random.default_rng(seed)
        parts = [Fraction(int(part)) for part in rng.integers(1, 1000, int(rng.integers(2, 7)))]
        for start, count in rng.integers(1, 5000, (20, 2)).tolist():
            given = collections.Counter(index for index, _ in mixture_lib.interleave(parts, start, count))
            for index, part in enumerate(parts):
                share = part / sum(parts)
                self.assertLessEqual(abs(given[index] - count * share), 1 + len(parts) * share)

    def test_far_rows_are_as_near_as_the_first(self):
        parts = [Fraction(1, 3), Fraction(1, 7)]
        (first, second) = mixture_lib.interleave(parts, 10**12, 2)
        self.assertEqual(mixture_lib.interleave(parts, 10**12 + 1, 1), [second])
        self.assertAlmostEqual(first[1] / 10**12, 0.7 if first[0] == 0 else 0.3, places=9)


class QuotasTest(absltest.TestCase):
    def test_weights_end_with_the_set_that_runs_out_first(self):
        mix = {"a": {"train": "a", "weight": 1}, "b": {"train": "b", "weight": 0.5}}
        self.assertEqual(mixture_lib.compute_quotas(mix, {"a": 10, "b": 30}), {"a": 10, "b": 5})
        self.assertEqual(mixture_lib.compute_quotas(mix, {"a": 100, "b": 30}), {"a": 60, "b": 30})

    def test_epochs_are_passes(self):
        mix = {"a": {"train": "a", "epochs": 1.5}, "b": {"train": "b", "epochs": 2}}
        self.assertEqual(mixture_lib.compute_quotas(mix, {"a": 10, "b": 30}), {"a": 15, "b": 60})

    def test_what_is_no_mixture_is_refused(self):
        for mix, message in (
            ({"a": {"train": "a", "weight": 1}, "b": {"train": "b", "epochs": 1}}, "has epochs and weight; give every"),
            ({"a": {"train": "a"}}, "neither weight nor epochs"),
            ({"a": {"weight": 1}}, "data.mix.a has weight; needed train"),
            (
                {"a": {"train": "a", "weight": 1}, "b": {"train": "b"}},
                "data.mix.b has train; needed train .* and weight",
            ),
            ({"a": {"train": "a", "weight": 0}}, "data.mix.a.weight is 0; it must be a number above 0"),
            ({"a": {"train": "a", "epochs": "2"}}, "data.mix.a.epochs is '2'"),
            ({"a": {"train": "a", "epochs": 2, "x": 1}}, "data.mix.a has epochs, train, x"),
        ):
            with self.assertRaisesRegex(ValueError, message):
                mixture_lib.check_mix(mix)
        mixture_lib.check_mix({})
        mixture_lib.check_mix({"a": {"train": "a", "weight": 1}, "b": {"train": "b", "weight": 0.5}})


class PlanTest(parameterized.TestCase):
    def test_whole_passes_hold_every_tree_so_often(self):
        mixed = mixture({"a": 40, "b": 17, "c": 5}, "epochs", (1, 2, 5))
        plan = plan_of(mixed, rows=1)
        rows = [plan.rows(step)[0] for step in range(2 * plan.rows_per_epoch)]
        for epoch in range(2):
            found = by_set(mixed, rows[epoch * plan.rows_per_epoch : (epoch + 1) * plan.rows_per_epoch])
            for name, passes in (("a", 1), ("b", 2), ("c", 5)):
                trees = sorted(itertools.chain(*found[name]))
                self.assertEqual(trees, sorted([*range(len(mixed.sets[name]))] * passes))

    def test_each_set_has_the_rows_that_it_has_alone_and_half_a_pass_goes_on_in_the_next_epoch(self):
        mixed = mixture({"a": 40, "b": 30}, "epochs", (1, 0.5))
        plan = plan_of(mixed, rows=2, micro_batches=3)
        rows = list(itertools.chain(*(plan.rows(step) for step in range(20))))
        found = by_set(mixed, rows)
        for name, trees in mixed.sets.items():
            alone = plan_of(trees, rows=1)
            self.assertEqual(found[name], [alone.rows(n)[0] for n in range(len(found[name]))])

    def test_weights_give_rows_in_proportion(self):
        mixed = mixture({"a": 300, "b": 60}, "weight", (3, 1))
        plan = plan_of(mixed, rows=4)
        found = by_set(mixed, itertools.chain(*(plan.rows(step) for step in range(50))))
        self.assertAlmostEqual(len(found["a"]) / 200, 0.75, delta=0.01)
        self.assertEqual(plan.rows_per_epoch, 4 * plan_of(mixed.sets["b"]).rows_per_epoch)

    def test_batches_hold_the_trees_of_their_sets_and_depend_on_seed_and_step_only(self):
        mixed = mixture({"a": 40, "b": 17}, "weight", (1, 1))
        plan, again = (plan_of(mixed, rows=2, micro_batches=2) for _ in range(2))
        for step in (30, 0, 7):
            assert_equal(plan.batch(step), again.batch(step))
            own = [
                [number - mixed.starts[1] * (number >= mixed.starts[1]) for number in row] for row in plan.rows(step)
            ]
            self.assertEqual(trees_of(plan.batch(step)), own)  # tokens of these trees are their number in their set
        self.assertNotEqual(plan.rows(0), plan_of(mixed, rows=2, micro_batches=2, seed=1).rows(0))

    def test_a_mixture_names_set_and_dialogue_and_reports_its_sets(self):
        mixed = mixture({"a": 40, "b": 20}, "epochs", (1, 3))
        self.assertEqual(mixed.dialogue(0), "a: 0")
        self.assertEqual(mixed.dialogue(41), "b: 1")
        plan = plan_of(mixed)
        tokens = [passes * len(mixed.sets[name].tokens) for name, passes in (("a", 1), ("b", 3))]
        self.assertEqual(plan.tokens_per_epoch, sum(tokens))
        self.assertIn(
            f"3.00 passes over 20 trees, {tokens[1] / sum(tokens):.1%} of the tokens", plan.mixture_summary[1]
        )


if __name__ == "__main__":
    absltest.main()
