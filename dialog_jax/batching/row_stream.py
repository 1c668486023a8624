"""Trees to rows without end: one epoch after another, each row under a number, whatever the size of the set.

Large sets are packed in windows, so that memory holds the rows of two windows at most. Knows nothing of steps, or of
other sets.
"""

import functools
from collections.abc import Sequence

import numpy as np
from jaxtyping import Int

from dialog_jax.batching import packing
from dialog_jax.batching.mixture import Mixture
from dialog_jax.trees.dataset import Trees

_WINDOW = 1 << 16  # trees that are packed together, at most


class RowStream:
    """The rows of a set. Each epoch packs and shuffles all trees anew, from (seed, epoch).

    Which trees are packed together depends on the seed alone; the windows of an epoch come in an order of its own, and
    so do the rows of a window. A window has the same number of rows in every epoch (see `packing.pack_trees`),
    so the place of a row follows by counting. Besides two windows of rows, memory holds a number for each tree.

    Args:
      trees: the set.
      max_length, max_targets: of a row, in tokens.
      seed: with the number of a row, all that determines it.
    """

    rows_per_epoch: int
    tokens_per_epoch: int
    """Those of its rows that are not padding."""

    def __init__(self, trees: Trees, *, max_length: int, max_targets: int, seed: int):
        self._trees, self._seed = trees, seed
        self._max_length, self._max_targets = max_length, max_targets
        self._windows = -(-len(trees) // _WINDOW)
        self._shuffled = np.arange(len(trees))
        if self._windows > 1:
            self._shuffled = np.random.default_rng([seed, 0, 0, 1]).permutation(len(trees))
        self._packed = functools.lru_cache(maxsize=2)(self._pack)
        self._order = functools.lru_cache(maxsize=2)(self._order_of)
        self.tokens_per_epoch, counts = 0, []
        for window in range(self._windows):
            rows = self._packed(0, window)
            counts.append(len(rows))
            self.tokens_per_epoch += sum(_row_tokens(trees, row) for row in rows)
        self._counts = np.array(counts)
        self.rows_per_epoch = int(self._counts.sum())

    def row(self, number: int) -> list[int]:
        """The tree numbers of a row."""
        epoch, place = divmod(number, self.rows_per_epoch)
        order, ends = self._order(epoch)
        at = int(np.searchsorted(ends, place, side="right"))
        window = int(order[at])
        rows = self._packed(epoch, window)
        assert len(rows) == self._counts[window], (epoch, window, len(rows))
        return rows[place - int(ends[at])]

    def _order_of(self, epoch: int) -> tuple[Int[np.ndarray, " windows"], Int[np.ndarray, " windows"]]:
        """(the windows in the order of an epoch, the number of rows up to the end of each)."""
        order = np.random.default_rng([self._seed, epoch, 0, 2]).permutation(self._windows)
        return order, np.cumsum(self._counts[order])

    def _pack(self, epoch: int, window: int) -> list[list[int]]:
        trees = self._trees
        first, last = (len(trees) * number // self._windows for number in (window, window + 1))
        numbers = np.sort(self._shuffled[first:last])
        rng = np.random.default_rng([self._seed, epoch, window])
        rows = packing.pack_trees(
            trees.offsets[numbers + 1] - trees.offsets[numbers],
            trees.targets[numbers].astype(np.int64),
            max_length=self._max_length,
            max_targets=self._max_targets,
            rng=rng,
            shared_prefix_length=trees.shared_prefix_length[numbers],
            shared_prefix_id=trees.shared_prefix_id[numbers],
        )
        return [numbers[rows[i]].tolist() for i in rng.permutation(len(rows))]


def group_by_shared_prefix(trees: Trees | Mixture, row: Sequence[int]) -> list[list[int]]:
    """The trees of a row, those in one list that have the same shared prefix; in the order of the first of each."""
    found: dict[int, list[int]] = {}
    for number in row:
        group, _ = trees.shared_prefix(number)
        found.setdefault(group if group >= 0 else -1 - number, []).append(number)
    return list(found.values())


def _row_tokens(trees: Trees, row: list[int]) -> int:
    shared = [(len(some) - 1) * trees.shared_prefix(some[0])[1] for some in group_by_shared_prefix(trees, row)]
    return sum(trees.size(number) for number in row) - sum(shared)
