"""Packing of many trees: each once, within max_length, and as many rows in each epoch."""

import hypothesis
import numpy as np
from absl.testing import absltest, parameterized
from hypothesis import strategies as st

from dialog_jax.batching import packing
from tests.laws import budget


class PackTest(parameterized.TestCase):
    @parameterized.parameters(False, True)
    @budget.cases(150)
    @hypothesis.given(data=st.data())
    def test_each_tree_once_within_max_length_in_as_many_rows_each_epoch(self, grouped, data):
        rng = np.random.default_rng(data.draw(st.integers(0, 2**32 - 1)))
        count, length = int(rng.integers(1, 40)), int(rng.integers(8, 40))
        tokens = rng.integers(2, length + 1, count)
        targets = np.minimum(rng.integers(1, length + 1, count), tokens)
        shared_prefix_id = rng.integers(-1, 3, count) if grouped else np.full(count, -1)
        shared_prefix_length = np.where(shared_prefix_id >= 0, rng.integers(1, 6, 3)[shared_prefix_id], 0)
        shared_prefix_id[shared_prefix_length >= tokens] = -1
        shared_prefix_length[shared_prefix_id < 0] = 0
        counts = set()
        for epoch in range(3):
            rows = packing.pack_trees(
                tokens,
                targets,
                max_length=length,
                rng=np.random.default_rng(epoch),
                shared_prefix_length=shared_prefix_length,
                shared_prefix_id=shared_prefix_id,
            )
            self.assertCountEqual([tree for row in rows for tree in row], range(count))
            for row in rows:
                shared = {
                    int(shared_prefix_id[tree]): int(shared_prefix_length[tree])
                    for tree in row
                    if shared_prefix_id[tree] >= 0
                }
                own = sum(int(tokens[tree] - shared_prefix_length[tree]) for tree in row)
                self.assertLessEqual(own + sum(shared.values()), length)
            counts.add(len(rows))
        self.assertLen(counts, 1)


if __name__ == "__main__":
    absltest.main()
