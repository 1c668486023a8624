"""Rows to batches: the arrays of a step, in an order that is a pure function of (seed, step).

Arrays are NumPy's; sharding is decided in the step. Resuming needs only the number of the step.
"""

import functools
import math
from collections.abc import Callable, Iterator, Sequence
from fractions import Fraction
from typing import Any, NamedTuple

import grain
import numpy as np
from jaxtyping import Float32, Int

from dialog_jax.batching import load_balance, mixture, row_stream
from dialog_jax.batching.mixture import Mixture
from dialog_jax.batching.row_stream import RowStream
from dialog_jax.trees import prefix_tree
from dialog_jax.trees import teacher as teacher_lib
from dialog_jax.trees.dataset import Trees


class Batch(NamedTuple):
    """Packed rows: B rows of T tokens and S = T targets, for M micro-batches. Arrays are NumPy's here, JAX's in a step.

    Padding tokens have segment 0, position 0 and see only themselves; padding targets have weight 0, source 0, turn -1.
    In a row, targets come before padding targets.
    """

    tokens: Int[Any, "*M B T"]
    position: Int[Any, "*M B T"]
    """Index of the token in its sequence, for rotary embeddings."""
    subtree_end: Int[Any, "*M B T"]
    """Key j is visible to query i iff j <= i < subtree_end[j]."""
    segment: Int[Any, "*M B T"]
    """1, 2, ... for the trees of a row, 0 for padding."""
    source: Int[Any, "*M B S"]
    """Index in the row of the token whose hidden state predicts the target."""
    target: Int[Any, "*M B S"]
    """Token id to predict."""
    weight: Float32[Any, "*M B S"]
    turn: Int[Any, "*M B S"]
    """Which response of its dialogue the target belongs to, -1 outside responses."""
    teacher_token: Int[Any, "*M B S N"] | None = None
    """A teacher's likeliest tokens for each target, if there is a teacher."""
    teacher_log_probability: Float32[Any, "*M B S N"] | None = None
    """Log-probabilities of `teacher_token`, in nats; -inf in an empty slot. A target without a teacher has none."""

    def map(self, function: Callable[[Any], Any]) -> "Batch":
        """Returns the batch with `function` applied to each array that is not None."""
        return Batch(*(None if array is None else function(array) for array in self))


def fill_rows(trees: Trees | Mixture, rows: Sequence[Sequence[int]], *, max_length: int) -> Batch:
    """Returns the arrays of `rows`, lists of tree numbers, with B = len(rows); an empty list is a row of padding.

    Two trees, a path of 3 tokens (a response of 2) and one of 2, in a row of 6 tokens:

        tokens       7  8  9  5  6  0        source  0  1  3  0  0  0
        position     0  1  2  0  1  0        target  8  9  6  0  0  0
        subtree_end  3  3  3  5  5  6        weight  1  1  1  0  0  0
        segment      1  1  1  2  2  0        turn    0  0  0 -1 -1 -1

    Trees of a row with the same shared prefix become one tree that has the prefix once, and so one segment. For 7 8 9
    and 7 8 5, which share 7 8:

        tokens       7  8  9  5  0  0
        position     0  1  2  2  0  0
        subtree_end  4  4  3  4  5  6
        segment      1  1  1  1  0  0
    """
    batch = _make_padding(len(rows), max_length, trees.teacher.top_k if trees.teacher is not None else 0)
    for b, row in enumerate(rows):
        start, filled = 0, 0  # tokens and targets of the row so far
        for segment, numbers in enumerate(row_stream.group_by_shared_prefix(trees, row), 1):
            length = trees.shared_prefix(numbers[0])[1]
            tree = prefix_tree.join_trees([trees.tree(number) for number in numbers], length)
            source, target = prefix_tree.find_targets(tree)
            stop, end = start + len(tree.tokens), filled + len(target)
            batch.tokens[b, start:stop] = tree.tokens
            batch.position[b, start:stop] = tree.position
            batch.subtree_end[b, start:stop] = tree.subtree_end + start
            batch.segment[b, start:stop] = segment
            batch.source[b, filled:end] = source + start
            batch.target[b, filled:end] = tree.tokens[target]
            batch.weight[b, filled:end] = tree.weight[target]
            batch.turn[b, filled:end] = tree.turn[target]
            if batch.teacher_token is not None and batch.teacher_log_probability is not None:
                assert isinstance(trees, Trees) and trees.teacher is not None
                first, *others = [trees.teacher_rows(number) for number in numbers]
                teacher_rows = np.concatenate([first, *(rows_of_tree[length:] for rows_of_tree in others)])
                token, log_probability = teacher_lib.read_rows(trees.teacher, teacher_rows[target])
                batch.teacher_token[b, filled:end] = token
                batch.teacher_log_probability[b, filled:end] = log_probability
            start, filled = stop, end
    return batch


def _make_padding(rows: int, length: int, top_k: int) -> Batch:
    """Returns a batch of padding; with a teacher's arrays where `top_k` > 0."""
    shape = (rows, length)
    batch = Batch(
        tokens=np.zeros(shape, np.int32),
        position=np.zeros(shape, np.int32),
        subtree_end=np.broadcast_to(np.arange(1, length + 1, dtype=np.int32), shape).copy(),
        segment=np.zeros(shape, np.int32),
        source=np.zeros(shape, np.int32),
        target=np.zeros(shape, np.int32),
        weight=np.zeros(shape, np.float32),
        turn=np.full(shape, -1, np.int32),
    )
    if not top_k:
        return batch
    return batch._replace(
        teacher_token=np.zeros((*shape, top_k), np.int32),
        teacher_log_probability=np.full((*shape, top_k), -np.inf, np.float32),
    )


class Plan:
    """The rows of every step.

    Epoch e packs and shuffles all trees anew, from (seed, e). Epochs follow each other without a gap, and step n has
    the next `micro_batches * rows` rows. Every tree is in exactly one row of an epoch. In a mixture this holds for each
    set by itself, and the rows of its sets are interleaved (see `mixture.interleave`).

    Args:
      trees: the data set, or a mixture of several.
      max_length: tokens of a row.
      rows: rows of a micro-batch, over all devices and hosts.
      micro_batches: micro-batches of a step.
      seed: determines every row, together with the step.
      shards: devices that the rows of a micro-batch are divided over; with several, the rows of a step are assigned by
        cost (see `load_balance.assign_rows`).
    """

    rows_per_epoch: int
    tokens_per_epoch: int
    """Tokens of an epoch's rows that are not padding; rounded in a mixture that takes parts of sets."""
    mixture_summary: list[str]
    """A line per set of a mixture."""

    def __init__(
        self, trees: Trees | Mixture, *, max_length: int, rows: int, micro_batches: int, seed: int, shards: int = 1
    ):
        assert rows % shards == 0, (rows, shards)
        self._trees, self._max_length = trees, max_length
        self._rows, self._micro_batches, self._shards = rows, micro_batches, shards
        sets = trees.sets if isinstance(trees, Mixture) else {"": trees}
        self._streams = {
            name: RowStream(set_trees, max_length=max_length, seed=seed) for name, set_trees in sets.items()
        }
        counts = {name: stream.rows_per_epoch for name, stream in self._streams.items()}
        self._quotas = (
            mixture.compute_quotas(trees.mix, counts)
            if isinstance(trees, Mixture)
            else {name: Fraction(count) for name, count in counts.items()}
        )
        self.rows_per_epoch = math.ceil(sum(self._quotas.values()))
        tokens = {name: stream.tokens_per_epoch for name, stream in self._streams.items()}
        self.tokens_per_epoch = round(sum(quota * tokens[name] / counts[name] for name, quota in self._quotas.items()))
        self.mixture_summary = (
            mixture.describe_mixture(trees, self._quotas, counts, tokens) if isinstance(trees, Mixture) else []
        )
        self._step_rows = functools.lru_cache(maxsize=8)(self._assign_rows)

    def rows(self, step: int) -> list[list[int]]:
        """Returns the tree numbers of all rows of a step, micro-batch by micro-batch, over all hosts."""
        return self._step_rows(step)

    def imbalance(self, step: int, *, balanced: bool = True) -> float:
        """Returns the largest cost of a device over the mean cost (see `load_balance.compute_imbalance`).

        Args:
          balanced: whether rows are assigned to devices by cost, as in `rows`; otherwise in the order of their streams.
        """
        rows = self.rows(step) if balanced else self._next_rows(step)
        return load_balance.compute_imbalance(self._costs(rows), rows=self._rows, shards=self._shards)

    def batch(self, step: int, local_rows: Sequence[int] | None = None) -> Batch:
        """Returns the arrays [M, B, ...] of a step; with `local_rows`, of these rows of each micro-batch only."""
        rows = self.rows(step)
        selected = range(self._rows) if local_rows is None else local_rows
        flat = [rows[m * self._rows + row] for m in range(self._micro_batches) for row in selected]
        batch = fill_rows(self._trees, flat, max_length=self._max_length)
        return batch.map(lambda array: array.reshape(self._micro_batches, -1, *array.shape[1:]))

    def batches(self, start: int, stop: int, local_rows: Sequence[int] | None = None) -> Iterator[Batch]:
        """Returns the batches of steps `start` to `stop` (exclusive), prefetched by a thread."""
        steps = grain.MapDataset.range(start, stop).map(lambda step: self.batch(step, local_rows))
        return iter(steps.to_iter_dataset(grain.ReadOptions(num_threads=1, prefetch_buffer_size=2)))

    def _next_rows(self, step: int) -> list[list[int]]:
        """Returns the rows of a step in the order of their streams."""
        count = self._rows * self._micro_batches
        streams = list(self._streams.values())
        starts = self._trees.starts if isinstance(self._trees, Mixture) else [0]
        places = mixture.interleave(list(self._quotas.values()), step * count, count)
        return [[starts[index] + tree for tree in streams[index].row(number)] for index, number in places]

    def _assign_rows(self, step: int) -> list[list[int]]:
        rows = self._next_rows(step)
        if self._shards == 1:
            return rows
        return [rows[row] for row in load_balance.assign_rows(self._costs(rows), rows=self._rows, shards=self._shards)]

    def _costs(self, rows: Sequence[Sequence[int]]) -> list[int]:
        return [sum(self._trees.size(tree) ** 2 for tree in row) for row in rows]


def evaluation_batches(
    trees: Trees, *, max_length: int, rows: int, limit: int = 0, local_rows: Sequence[int] | None = None
) -> Iterator[tuple[Batch, list[list[int]]]]:
    """Yields ([1, B, ...] batch, its rows); together they hold every tree once, in a fixed order.

    Rows of padding complete the last batch.

    Args:
      rows: rows of a batch.
      limit: number of rows after which to stop, 0 for all; which rows these are depends on nothing but the trees.
      local_rows: indices of the rows of each batch to return; None for all.
    """
    stream = RowStream(trees, max_length=max_length, seed=0)
    stop = min(limit or stream.rows_per_epoch, stream.rows_per_epoch)
    for start in range(0, stop, rows):
        batch_rows = [stream.row(number) if number < stop else [] for number in range(start, start + rows)]
        selected = batch_rows if local_rows is None else [batch_rows[row] for row in local_rows]
        yield fill_rows(trees, selected, max_length=max_length).map(lambda array: array[None]), batch_rows
