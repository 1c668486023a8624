"""Trees to the scores of their nodes: trees packed into rows, each row read once.

In: prefix trees in which every node of weight above 0 is scored. Out: the scores of each tree, in any order. Rows have
one of a few lengths, so that short trees are cheap, memory is bounded by the longest row, and few programs are
compiled. Knows no dialogues.
"""

import collections
import itertools
from collections.abc import Callable, Iterator

import jax
import numpy as np

from dialog_jax.batching import batches, packing
from dialog_jax.training.loss import TargetScores
from dialog_jax.trees.dataset import Trees

_SHORTEST_ROW = 256
_PACKED_ROW = 1024  # rows of shorter trees are filled up to this length
_BATCH_TOKENS = 8192  # of a batch of several rows, on accelerators; on CPU a batch is one row


def score_trees(
    trees: Trees, context: int, score_step: Callable[[dict, batches.Batch], TargetScores], parameters: dict
) -> Iterator[tuple[int, TargetScores]]:
    """Yields (number of a tree, the scores of its nodes, 0 where a node has weight 0).

    A row of two trees with three nodes each, of which nodes 1 and 2 and node 2 are targets, has nll [5, 6, 7, 0, ...].
    The first tree gets [0, 5, 6] and the second [0, 0, 7].

    Args:
      trees: of at most `context` tokens. A row has their shared prefix, a soft prompt, once.
      score_step: from `score_steps.make_score_step`.
    """
    if not len(trees):
        return
    on_cpu = all(device.platform == "cpu" for device in jax.tree.leaves(parameters)[0].devices())

    def start(length: int, rows: list[list[int]]) -> tuple[list[list[int]], TargetScores]:
        return rows, score_step(parameters, batches.fill_rows(trees, rows, max_length=length))

    def finish(rows: list[list[int]], scores: TargetScores) -> Iterator[tuple[int, TargetScores]]:
        scores = jax.device_get(scores)
        for b, row in enumerate(rows):
            yield from _split_row(trees, row, jax.tree.map(lambda array, b=b: array[b], scores))

    # One batch ahead: the device works on the next batch while this one is read back.
    running = None
    for length, rows in make_batches(trees, context, 1 if on_cpu else _BATCH_TOKENS):
        started = start(length, rows)
        if running is not None:
            yield from finish(*running)
        running = started
    assert running is not None
    yield from finish(*running)


def make_batches(trees: Trees, context: int, batch_tokens: int) -> Iterator[tuple[int, list[list[int]]]]:
    """Yields (length of the rows, the rows of a batch), longest rows first, so that a lack of memory shows at once.

    Trees longer than half of a row get rows of that length, filled up with shorter trees; row lengths halve from the
    context down to `_PACKED_ROW`. A row that is not full runs at the shortest length that holds it.
    """
    tokens, targets = trees.sizes()
    shared_prefix = int(trees.shared_prefix_length[0])
    remaining = np.arange(len(trees))
    length = context
    rows_by_length: dict[int, list[list[int]]] = collections.defaultdict(list)
    while len(remaining):
        next_length = length // 2 if length // 2 >= _PACKED_ROW else 0
        packed = packing.pack_trees(
            tokens[remaining],
            targets[remaining],
            max_length=length,
            rng=np.random.default_rng(0),
            shared_prefix_length=trees.shared_prefix_length[remaining],
            shared_prefix_id=trees.shared_prefix_id[remaining],
        )
        rows = [remaining[indices].tolist() for indices in packed]
        rows = [row for row in rows if tokens[row].max() > next_length]
        for row in rows:
            size = int(tokens[row].sum()) - (len(row) - 1) * shared_prefix
            rows_by_length[_find_row_length(size, length)].append(row)
        remaining = np.setdiff1d(remaining, list(itertools.chain(*rows)))
        length = next_length
    for length, rows in sorted(rows_by_length.items(), reverse=True):
        batch_size = max(1, batch_tokens // length)
        for start in range(0, len(rows), batch_size):
            batch = rows[start : start + batch_size]
            yield length, batch + [[] for _ in range(batch_size - len(batch))]


def _find_row_length(tokens: int, longest: int) -> int:
    """Returns the shortest of `longest`, half of it, a quarter, ... down to `_SHORTEST_ROW` that holds the tokens."""
    length = longest
    while length // 2 >= max(tokens, _SHORTEST_ROW):
        length //= 2
    return length


def _split_row(trees: Trees, row: list[int], scores: TargetScores) -> Iterator[tuple[int, TargetScores]]:
    """Yields (each tree of a row, the scores of its nodes). None of a shared prefix's tokens is a target."""
    start = 0
    for number in row:
        weight = trees.weight[trees.offsets[number] : trees.offsets[number + 1]]
        nodes = np.flatnonzero(weight > 0)
        node_count, stop = len(weight), start + len(nodes)

        def spread(array, node_count=node_count, nodes=nodes, part=slice(start, stop)):
            values = np.zeros((node_count, *array.shape[1:]), array.dtype)
            values[nodes] = array[part]
            return values

        yield number, jax.tree.map(spread, scores)
        start = stop
