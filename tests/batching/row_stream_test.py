"""Rows without end: every tree once an epoch, in windows of any size, and the same from any place."""

import itertools
from unittest import mock

import numpy as np
from absl.testing import absltest, parameterized

from dialog_jax.batching import row_stream
from tests.batching.batches_test import random_trees, stored, tree_with_shared_prefix


def stream_of(trees, *, window=1 << 16, length=32, seed=0):
    with mock.patch.object(row_stream, "_WINDOW", window):
        return row_stream.RowStream(trees, max_length=length, seed=seed)


def epoch_of(stream, epoch):
    return [stream.row(epoch * stream.rows_per_epoch + number) for number in range(stream.rows_per_epoch)]


class StreamTest(parameterized.TestCase):
    @parameterized.parameters(1, 7, 50, 1000)
    def test_every_tree_comes_once_in_every_epoch(self, window):
        trees = random_trees(0, 100)
        stream = stream_of(trees, window=window)
        for epoch in range(4):
            rows = epoch_of(stream, epoch)
            self.assertCountEqual(itertools.chain(*rows), range(len(trees)))
            self.assertEqual(sum(trees.size(tree) for row in rows for tree in row), stream.tokens_per_epoch)

    @parameterized.parameters(range(5))
    def test_every_tree_comes_once_in_every_epoch_where_beginnings_are_shared(self, seed):
        made = [tree_with_shared_prefix(n % 5, (seed, n)) for n in range(120)]
        trees = stored(*made, shared_prefix_length=3)
        stream = stream_of(trees, window=50, length=24, seed=seed)
        for epoch in range(6):
            self.assertCountEqual(itertools.chain(*epoch_of(stream, epoch)), range(120))

    def test_windows_hold_the_same_trees_in_every_epoch_and_come_in_another_order(self):
        stream = stream_of(random_trees(1, 90), window=30)
        parts = []
        for epoch in range(6):
            rows = epoch_of(stream, epoch)
            trees = list(itertools.chain(*rows))
            parts.append([frozenset(trees[start : start + 30]) for start in (0, 30, 60)])
            self.assertEqual(set(parts[-1]), set(parts[0]))
        self.assertGreater(len({tuple(part) for part in parts}), 1)
        other = stream_of(random_trees(1, 90), window=30, seed=1)
        self.assertNotEqual({frozenset(itertools.chain(*epoch_of(other, 0)[:5]))} & set(parts[0]), set(parts[0]))

    def test_a_row_is_the_same_from_wherever_it_is_asked_for(self):
        trees = random_trees(2, 80)
        first, second = (stream_of(trees, window=20) for _ in range(2))
        numbers = np.random.default_rng(0).integers(0, 5 * first.rows_per_epoch, 60).tolist()
        straight = [first.row(number) for number in range(5 * first.rows_per_epoch)]
        self.assertEqual([second.row(number) for number in numbers], [straight[number] for number in numbers])
        self.assertNotEqual(straight, [stream_of(trees, window=20, seed=1).row(n) for n in range(len(straight))])

    def test_two_windows_are_in_memory(self):
        stream = stream_of(random_trees(3, 200), window=20)
        with mock.patch.object(row_stream.packing, "pack_trees", wraps=row_stream.packing.pack_trees) as pack:
            epoch_of(stream, 1)
        self.assertEqual(pack.call_count, 10)
        self.assertEqual(stream._pack_window.cache_info().maxsize, 2)

    def test_windows_cost_few_rows(self):
        trees = random_trees(4, 2000)
        one, many = stream_of(trees), stream_of(trees, window=250)
        self.assertLess(many.rows_per_epoch, 1.02 * one.rows_per_epoch + 8)


if __name__ == "__main__":
    absltest.main()
