"""An endless sequence of rows from one set of trees, one epoch after another; a row follows from its number alone.

Large sets are packed in windows, so that memory holds the rows of at most two windows. Knows no steps and no other
sets.
"""

import functools
from collections.abc import Sequence

import numpy as np
from jaxtyping import Int

from dialog_jax.batching import packing
from dialog_jax.batching.mixture import Mixture
from dialog_jax.trees.dataset import Trees

_WINDOW = 1 << 16  # largest number of trees that are packed together


class RowStream:
    """The rows of a set. Each epoch packs and shuffles all trees anew, from (seed, epoch).

    The seed alone decides which trees are packed together. The windows of an epoch are in a random order, and so are
    the rows of a window. A window has the same number of rows in every epoch (see `packing.pack_trees`), so the place
    of a row follows by counting. Besides two windows of rows, memory holds one number per tree.

    Args:
      trees: the set.
      max_length: tokens of a row.
      seed: determines every row, together with the row's number.
    """

    rows_per_epoch: int
    tokens_per_epoch: int
    """Tokens of an epoch's rows that are not padding."""

    def __init__(self, trees: Trees, *, max_length: int, seed: int):
        self._trees, self._max_length, self._seed = trees, max_length, seed
        self._windows = -(-len(trees) // _WINDOW)
        self._shuffled = np.arange(len(trees))
        if self._windows > 1:
            self._shuffled = np.random.default_rng([seed, 0, 0, 1]).permutation(len(trees))
        self._pack_window = functools.lru_cache(maxsize=2)(self._compute_rows)
        self._order_windows = functools.lru_cache(maxsize=2)(self._compute_order)
        self.tokens_per_epoch, counts = 0, []
        for window in range(self._windows):
            rows = self._pack_window(0, window)
            counts.append(len(rows))
            self.tokens_per_epoch += sum(_count_tokens(trees, row) for row in rows)
        self._rows_per_window = np.array(counts)
        self.rows_per_epoch = int(self._rows_per_window.sum())

    def row(self, number: int) -> list[int]:
        """Returns the tree numbers of a row."""
        epoch, index = divmod(number, self.rows_per_epoch)
        order, ends = self._order_windows(epoch)
        place = int(np.searchsorted(ends, index, side="right"))
        window = int(order[place])
        rows = self._pack_window(epoch, window)
        assert len(rows) == self._rows_per_window[window], (epoch, window, len(rows))
        return rows[index - int(ends[place])]

    def _compute_order(self, epoch: int) -> tuple[Int[np.ndarray, " windows"], Int[np.ndarray, " windows"]]:
        """Returns (the windows in the order of an epoch, the number of rows up to the end of each)."""
        order = np.random.default_rng([self._seed, epoch, 0, 2]).permutation(self._windows)
        return order, np.cumsum(self._rows_per_window[order])

    def _compute_rows(self, epoch: int, window: int) -> list[list[int]]:
        """Returns the rows of a window in the order of an epoch."""
        trees = self._trees
        first, last = (len(trees) * number // self._windows for number in (window, window + 1))
        numbers = np.sort(self._shuffled[first:last])
        rng = np.random.default_rng([self._seed, epoch, window])
        rows = packing.pack_trees(
            trees.offsets[numbers + 1] - trees.offsets[numbers],
            trees.targets[numbers].astype(np.int64),
            max_length=self._max_length,
            rng=rng,
            shared_prefix_length=trees.shared_prefix_length[numbers],
            shared_prefix_id=trees.shared_prefix_id[numbers],
        )
        return [numbers[rows[i]].tolist() for i in rng.permutation(len(rows))]


def group_by_shared_prefix(trees: Trees | Mixture, row: Sequence[int]) -> list[list[int]]:
    """Returns the trees of a row in lists of those with the same shared prefix, in the order of the first of each.

    shared_prefix_id [5, -1, 5, -1], row [0, 1, 2, 3]   ->   [[0, 2], [1], [3]]
    """
    groups: dict[int, list[int]] = {}
    for number in row:
        prefix_id, _ = trees.shared_prefix(number)
        groups.setdefault(prefix_id if prefix_id >= 0 else -1 - number, []).append(number)
    return list(groups.values())


def _count_tokens(trees: Trees, row: list[int]) -> int:
    """Returns the tokens of a row that are not padding."""
    groups = group_by_shared_prefix(trees, row)
    repeated = sum((len(group) - 1) * trees.shared_prefix(group[0])[1] for group in groups)
    return sum(trees.size(number) for number in row) - repeated
