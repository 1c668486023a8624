"""Packing: every tree once, no row too long, rows full, the same for the same seed."""

import time

import numpy as np
from absl.testing import absltest, parameterized

from dialog_jax.batching import packing


def pack(tokens, targets, *, max_length, seed=0):
    tokens, targets = np.array(tokens), np.array(targets)
    rng = np.random.default_rng(seed)
    return packing.pack_trees(tokens, targets, max_length=max_length, rng=rng)


class PackTest(parameterized.TestCase):
    def test_picture(self):
        self.assertEqual(pack([3, 6, 4, 7], [1, 1, 1, 1], max_length=10), [[3, 0], [1, 2]])

    def test_a_tree_of_the_full_length_has_a_row_to_itself(self):
        self.assertCountEqual(pack([10, 1], [1, 1], max_length=10), [[0], [1]])

    @parameterized.parameters(range(20))
    def test_random_trees_each_stand_once_within_max_length(self, seed):
        rng = np.random.default_rng(seed)
        tokens = rng.integers(1, 65, 300)
        targets = rng.integers(0, tokens + 1).clip(max=40)
        rows = pack(tokens, targets, max_length=64, seed=seed)
        self.assertCountEqual([tree for row in rows for tree in row], range(300))
        for row in rows:
            self.assertLessEqual(tokens[row].sum(), 64)

    def test_seeds_change_the_neighbours_but_not_the_number_of_rows(self):
        tokens = np.random.default_rng(0).integers(1, 65, 1000)
        first, second = (pack(tokens, tokens // 2, max_length=64, seed=seed) for seed in (1, 2))
        self.assertNotEqual(first, second)
        self.assertLen(first, len(second))
        self.assertEqual(first, pack(tokens, tokens // 2, max_length=64, seed=1))

    def test_dialogue_sized_trees_fill_98_percent_at_100000_a_second(self):
        rng = np.random.default_rng(0)
        tokens = np.minimum(rng.lognormal(np.log(437), 1.1, 100_000).astype(int) + 20, 1024)
        started = time.process_time()
        rows = pack(tokens, tokens * 4 // 10, max_length=1024)
        seconds = time.process_time() - started
        self.assertGreater(tokens.sum() / (len(rows) * 1024), 0.98)
        self.assertLess(seconds, 30.0, "a fifth of a second, with room for checked types and a busy machine")


class SharedPrefixTest(parameterized.TestCase):
    """Trees with the same shared prefix; a row holds it once."""

    def pack(self, tokens, targets, shared_prefix_length, shared_prefix_id, *, max_length, seed=0):
        return packing.pack_trees(
            np.array(tokens),
            np.array(targets),
            max_length=max_length,
            rng=np.random.default_rng(seed),
            shared_prefix_length=np.array(shared_prefix_length),
            shared_prefix_id=np.array(shared_prefix_id),
        )

    def test_picture(self):
        rows = self.pack([6, 6, 6, 6], [1] * 4, [4] * 4, [0, 1, 0, 1], max_length=8)
        self.assertCountEqual(map(sorted, rows), [[0, 2], [1, 3]])

    def test_three_groups_share_a_row_where_there_is_room(self):
        rows = self.pack([4, 4, 4, 3], [1] * 4, [3, 3, 3, 0], [5, 5, 7, -1], max_length=12)
        self.assertLen(rows, 1)

    @parameterized.parameters(range(20))
    def test_random_trees_each_stand_once_within_max_length(self, seed):
        rng = np.random.default_rng(seed)
        shared_prefix_id = rng.integers(-1, 1 + seed, 300)
        shared_prefix_length = np.where(shared_prefix_id >= 0, 3 + shared_prefix_id % 9, 0)
        tokens = shared_prefix_length + rng.integers(1, 50, 300)
        targets = rng.integers(0, tokens - shared_prefix_length + 1).clip(max=40)
        rows = self.pack(tokens, targets, shared_prefix_length, shared_prefix_id, max_length=64, seed=seed)
        self.assertCountEqual([tree for row in rows for tree in row], range(300))
        for row in rows:
            heads = {int(shared_prefix_id[tree]): int(shared_prefix_length[tree]) for tree in row}
            self.assertLessEqual((tokens[row] - shared_prefix_length[row]).sum() + sum(heads.values()), 64)

    @parameterized.parameters(range(10))
    def test_seeds_change_the_neighbours_but_not_the_rows_sizes(self, seed):
        rng = np.random.default_rng(seed)
        shared_prefix_id = rng.integers(-1, 4, 300)
        shared_prefix_length = np.where(shared_prefix_id >= 0, 5 + shared_prefix_id % 2, 0)
        tokens = shared_prefix_length + rng.integers(1, 12, 300)  # many are of the same size
        targets = rng.integers(0, 4, 300)
        packed = [
            self.pack(
                tokens,
                targets,
                shared_prefix_length,
                shared_prefix_id * 10**15,
                max_length=40,
                seed=other,
            )
            for other in range(12)
        ]
        self.assertLen({tuple(map(tuple, rows)) for rows in packed}, 12)
        sizes = [
            [sorted(zip(tokens[row], targets[row], shared_prefix_id[row], strict=True)) for row in rows]
            for rows in packed
        ]
        for other in sizes[1:]:
            self.assertEqual(other, sizes[0])

    def test_fewer_rows_than_without(self):
        rng = np.random.default_rng(0)
        shared_prefix_id = rng.integers(0, 5, 2000)
        shared_prefix_length = np.full(2000, 30)
        tokens = shared_prefix_length + rng.integers(5, 200, 2000)
        shared = self.pack(tokens, tokens // 2, shared_prefix_length, shared_prefix_id, max_length=512)
        self.assertLess(len(shared), 0.85 * len(pack(tokens, tokens // 2, max_length=512)))


if __name__ == "__main__":
    absltest.main()
