"""Rows to batches: the arrays a step is given, in an order that is a pure function of (seed, step).

Knows no JAX: arrays are NumPy's, and sharding is the step's affair. Resuming needs only the number of the step.
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
from dialog_jax.trees.dataset import Trees


class Batch(NamedTuple):
    """Packed rows: B rows of T tokens and S targets, for M micro-batches. Arrays are NumPy's here and JAX's in a step.

    Padding tokens have segment 0, position 0 and see only themselves; padding targets have weight 0, source 0, turn -1.
    Targets stand before their padding.
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
    """Theirs, in nats; -inf is an empty slot, and a target without teacher has only such."""

    def map(self, function: Callable[[Any], Any]) -> "Batch":
        """The batch of what `function` makes of each array that there is."""
        return Batch(*(None if array is None else function(array) for array in self))


def fill_rows(trees: Trees | Mixture, rows: Sequence[Sequence[int]], *, max_length: int, max_targets: int) -> Batch:
    """Returns the arrays of `rows`, lists of tree numbers, with B = len(rows); an empty list is a row of padding.

    Two trees, a path of 3 tokens (a response of 2) and one of 2, in a row of 6 tokens and 4 targets:

        tokens       7  8  9  5  6  0        source  0  1  3  0
        position     0  1  2  0  1  0        target  8  9  6  0
        subtree_end  3  3  3  5  5  6        weight  1  1  1  0
        segment      1  1  1  2  2  0        turn    0  0  0 -1

    Trees of a row with the same shared prefix are one segment that holds the prefix once. For 7 8 9 and 7 8 5, which
    share 7 8:

        tokens       7  8  9  5  0  0
        position     0  1  2  2  0  0
        subtree_end  4  4  3  4  5  6
        segment      1  1  1  1  0  0
    """
    shape, target_shape = (len(rows), max_length), (len(rows), max_targets)
    batch = Batch(
        tokens=np.zeros(shape, np.int32),
        position=np.zeros(shape, np.int32),
        subtree_end=np.broadcast_to(np.arange(1, max_length + 1, dtype=np.int32), shape).copy(),
        segment=np.zeros(shape, np.int32),
        source=np.zeros(target_shape, np.int32),
        target=np.zeros(target_shape, np.int32),
        weight=np.zeros(target_shape, np.float32),
        turn=np.full(target_shape, -1, np.int32),
    )
    if trees.teacher is not None:
        slots = (*target_shape, trees.teacher.top_k)
        batch = batch._replace(
            teacher_token=np.zeros(slots, np.int32), teacher_log_probability=np.full(slots, -np.inf, np.float32)
        )
    for b, row in enumerate(rows):
        start, filled = 0, 0
        for segment, numbers in enumerate(row_stream.group_by_shared_prefix(trees, row), 1):
            root, skipped = start, 0
            shared = trees.shared_prefix(numbers[0])[1] if len(numbers) > 1 else 0
            for number, weight in zip(numbers, _merged(trees, numbers, shared), strict=True):
                tree = trees.tree(number)._replace(weight=weight)
                shift = start - skipped  # of a node's number to its place in the row, except in the shared prefix
                stop = shift + len(tree.tokens)
                batch.tokens[b, start:stop] = tree.tokens[skipped:]
                batch.position[b, start:stop] = tree.position[skipped:]
                batch.subtree_end[b, start:stop] = tree.subtree_end[skipped:] + shift
                batch.segment[b, start:stop] = segment
                sources, nodes = prefix_tree.find_targets(tree)
                end = filled + len(nodes)
                batch.source[b, filled:end] = sources + np.where(sources < shared, root, shift)
                batch.target[b, filled:end] = tree.tokens[nodes]
                batch.weight[b, filled:end] = tree.weight[nodes]
                batch.turn[b, filled:end] = tree.turn[nodes]
                if batch.teacher_token is not None and batch.teacher_log_probability is not None:
                    assert isinstance(trees, Trees)
                    token, log_probability = trees.signal(number, nodes)
                    batch.teacher_token[b, filled:end] = token
                    batch.teacher_log_probability[b, filled:end] = log_probability
                start, filled, skipped = stop, end, shared  # the shared prefix is stored once
            batch.subtree_end[b, root : root + shared] = start
    return batch


def _merged(trees: Trees | Mixture, numbers: Sequence[int], shared: int) -> list[Float32[np.ndarray, " _"]]:
    """The weights of trees that share their first tokens, there added up in the first tree."""
    weights = [trees.tree(number).weight for number in numbers]
    common = np.sum([weight[:shared] for weight in weights], axis=0, dtype=np.float32)
    heads = [common, *[np.zeros(shared, np.float32)] * (len(weights) - 1)]
    return [np.concatenate([head, weight[shared:]]) for head, weight in zip(heads, weights, strict=True)]


class Plan:
    """Which rows each step is given.

    Epoch e packs and shuffles all trees anew, from (seed, e); epochs follow each other without a gap, and step n has
    the next `micro_batches * rows` rows. No tree is left out, and none comes twice in an epoch. In a mixture this is so
    for each set by itself, and the rows of its sets come in turns (see `mixing.draw`).

    Args:
      trees: the data set, or a mixture of several.
      rows: rows of a micro-batch, over all devices and hosts.
      micro_batches: micro-batches of a step.
      shards: devices that the rows of a micro-batch are divided over; with several, the rows of a step are dealt to
        them by what they cost (see `dealing.deal`).
    """

    rows_per_epoch: int
    tokens_per_epoch: int
    """Those of an epoch's rows that are not padding; in a mixture of parts of sets, to rounding."""

    def __init__(
        self,
        trees: Trees | Mixture,
        *,
        max_length: int,
        max_targets: int,
        rows: int,
        micro_batches: int,
        seed: int,
        shards: int = 1,
    ):
        assert rows % shards == 0, (rows, shards)
        self._trees = trees
        self._max_length, self._max_targets = max_length, max_targets
        self._rows, self._micro_batches, self._shards = rows, micro_batches, shards
        sets = trees.sets if isinstance(trees, Mixture) else {"": trees}
        self._streams = {
            name: RowStream(one, max_length=max_length, max_targets=max_targets, seed=seed)
            for name, one in sets.items()
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
        self.mixed = mixture.describe_mixture(trees, self._quotas, counts, tokens) if isinstance(trees, Mixture) else []
        self._dealt = functools.lru_cache(maxsize=8)(self._deal)

    def rows(self, step: int) -> list[list[int]]:
        """The tree numbers of all rows of a step, micro-batch by micro-batch, over all hosts."""
        return self._dealt(step)

    def imbalance(self, step: int, *, dealt: bool = True) -> float:
        """How much longer the device with the most to do works than they do on average (see `dealing.imbalance`).

        Args:
          dealt: whether rows are given to devices by their cost, as `rows` does, or as they come.
        """
        rows = self.rows(step) if dealt else self._drawn(step)
        return load_balance.compute_imbalance(self._costs(rows), rows=self._rows, shards=self._shards)

    def batch(self, step: int, own: Sequence[int] | None = None) -> Batch:
        """The arrays [M, B, ...] of step `step`, or of each micro-batch the rows `own` only."""
        rows = self.rows(step)
        wanted = range(self._rows) if own is None else own
        filled = fill_rows(
            self._trees,
            [rows[m * self._rows + row] for m in range(self._micro_batches) for row in wanted],
            max_length=self._max_length,
            max_targets=self._max_targets,
        )
        return filled.map(lambda array: array.reshape(self._micro_batches, -1, *array.shape[1:]))

    def batches(self, start: int, stop: int, own: Sequence[int] | None = None) -> Iterator[Batch]:
        """The batches of steps `start` to `stop` (exclusive), made ahead of their use in a thread."""
        steps = grain.MapDataset.range(start, stop).map(lambda step: self.batch(step, own))
        return iter(steps.to_iter_dataset(grain.ReadOptions(num_threads=1, prefetch_buffer_size=2)))

    def _drawn(self, step: int) -> list[list[int]]:
        """The rows of a step as they come."""
        count = self._rows * self._micro_batches
        streams = list(self._streams.values())
        starts = self._trees.starts if isinstance(self._trees, Mixture) else [0]
        drawn = mixture.interleave(list(self._quotas.values()), step * count, count)
        return [[starts[index] + tree for tree in streams[index].row(number)] for index, number in drawn]

    def _deal(self, step: int) -> list[list[int]]:
        rows = self._drawn(step)
        if self._shards == 1:
            return rows
        return [rows[row] for row in load_balance.assign_rows(self._costs(rows), rows=self._rows, shards=self._shards)]

    def _costs(self, rows: Sequence[Sequence[int]]) -> list[int]:
        return [sum(self._trees.size(tree) ** 2 for tree in row) for row in rows]


def evaluation_batches(
    trees: Trees, *, max_length: int, max_targets: int, rows: int, limit: int = 0, own: Sequence[int] | None = None
) -> Iterator[tuple[Batch, list[list[int]]]]:
    """Yields ([1, B, ...] batches that hold every tree once, in a fixed order, and their rows).

    The last batch is filled up with rows of padding.

    Args:
      rows: rows of a batch.
      limit: number of rows after which to stop, 0 for all; which rows these are depends on nothing but the trees.
      own: the rows of each batch to fill; None for all of them.
    """
    stream = RowStream(trees, max_length=max_length, max_targets=max_targets, seed=0)
    stop = min(limit or stream.rows_per_epoch, stream.rows_per_epoch)
    for start in range(0, stop, rows):
        part = [stream.row(number) if number < stop else [] for number in range(start, start + rows)]
        wanted = part if own is None else [part[row] for row in own]
        filled = fill_rows(trees, wanted, max_length=max_length, max_targets=max_targets)
        yield filled.map(lambda array: array[None]), part
