"""Rows assigned by cost: the same rows, in shards that cost about the same."""

import numpy as np
from absl.testing import absltest, parameterized

from dialog_jax.batching import load_balance
from tests.batching.batches_test import path, plan_of, stored


def figure(costs, rows, shards):
    """The imbalance by its definition, in loops."""
    total = weighted = 0.0
    for start in range(0, len(costs), rows):
        loads = [sum(costs[start + s * rows // shards : start + (s + 1) * rows // shards]) for s in range(shards)]
        weighted += sum(loads) * max(loads) / (sum(loads) / shards)
        total += sum(loads)
    return weighted / total


class DealTest(parameterized.TestCase):
    def test_picture(self):
        costs = [1, 8, 2, 7, 3, 6, 4, 5]
        order = load_balance.assign_rows(costs, rows=4, shards=2)
        self.assertEqual(order, [1, 7, 3, 5, 6, 0, 4, 2])
        self.assertEqual([costs[row] for row in order], [8, 5, 7, 6, 4, 1, 3, 2])
        self.assertEqual(load_balance.compute_imbalance([8, 5, 7, 6, 4, 1, 3, 2], rows=4, shards=2), 1.0)
        self.assertEqual(load_balance.compute_imbalance([3, 1], rows=2, shards=2), 1.5)

    @parameterized.product(rows=(4, 16, 64), shards=(2, 4), micro_batches=(1, 3))
    def test_random_costs_are_balanced_better_and_none_is_lost(self, rows, shards, micro_batches):
        rng = np.random.default_rng(rows + shards)
        before, after = [], []
        for _ in range(30):
            costs = rng.lognormal(10, 1, rows * micro_batches).astype(int).tolist()
            order = load_balance.assign_rows(costs, rows=rows, shards=shards)
            self.assertCountEqual(order, range(len(costs)))
            balanced = [costs[row] for row in order]
            for own, given in ((before, costs), (after, balanced)):
                own.append(load_balance.compute_imbalance(given, rows=rows, shards=shards))
                self.assertAlmostEqual(own[-1], figure(given, rows, shards), places=9)
        if (rows, micro_batches) == (shards, 1):  # each shard has a row, whichever it is
            self.assertEqual(np.mean(after), np.mean(before))
        else:
            self.assertLess(np.mean(after), np.mean(before))

    def test_one_shard_is_balanced(self):
        self.assertEqual(load_balance.compute_imbalance([5, 1, 9, 2], rows=2, shards=1), 1.0)


class PlanTest(parameterized.TestCase):
    @parameterized.parameters((2, 1), (4, 3), (8, 2))
    def test_a_step_has_the_same_rows_balanced_or_not(self, shards, micro_batches):
        rng = np.random.default_rng(0)
        lengths = np.minimum(rng.lognormal(3, 1, 600).astype(int) + 2, 128)
        trees = stored(*(path(np.full(length, 1), 1) for length in lengths))
        options = {"max_length": 128, "rows": 8, "micro_batches": micro_batches}
        balanced, plain = plan_of(trees, shards=shards, **options), plan_of(trees, **options)
        before, after = [], []
        for step in range(plain.rows_per_epoch // (8 * micro_batches)):
            self.assertCountEqual(map(tuple, balanced.rows(step)), map(tuple, plain.rows(step)))
            costs = [int((lengths[row] ** 2).sum()) for row in balanced.rows(step)]
            self.assertAlmostEqual(balanced.imbalance(step), figure(costs, 8, shards), places=9)
            after.append(balanced.imbalance(step))
            before.append(balanced.imbalance(step, balanced=False))
            self.assertEqual(plain.imbalance(step), 1.0)
        self.assertLess(np.mean(after) - 1, (1.0 if shards == 8 else 0.5) * (np.mean(before) - 1))


if __name__ == "__main__":
    absltest.main()
