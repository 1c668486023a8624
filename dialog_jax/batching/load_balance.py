"""The rows of a step, dealt to devices so that none waits long for another.

What a row costs grows with the squares of its trees' sizes, as attention does. Knows costs only; which rows a step has
is not decided here.
"""

import heapq
from collections.abc import Sequence

import numpy as np
from jaxtyping import Int


def assign_rows(costs: Sequence[int], *, rows: int, shards: int) -> list[int]:
    """Returns the rows of a step in an order that gives every shard of a micro-batch about the same cost.

    The most expensive `rows` rows are one micro-batch, the next ones another; of a micro-batch each row, the most
    expensive first, goes to the shard with the least cost that has room. Two shards, micro-batches of four rows:

        costs  [1, 8, 2, 7, 3, 6, 4, 5]   ->   rows [1, 7, 3, 5,  6, 0, 4, 2]      costs 8 5 | 7 6   4 1 | 3 2

    Args:
      costs: of each row of the step.
      rows: of a micro-batch; a multiple of `shards`.
      shards: devices that have rows of their own; each has `rows / shards` rows that follow each other.
    """
    assert rows % shards == 0 and len(costs) % rows == 0, (len(costs), rows, shards)
    expensive = sorted(range(len(costs)), key=lambda row: -costs[row])
    order: list[int] = []
    for start in range(0, len(costs), rows):
        held: list[list[int]] = [[] for _ in range(shards)]
        open_shards = [(0, shard) for shard in range(shards)]  # a heap of (cost so far, shard)
        for row in expensive[start : start + rows]:
            load, shard = heapq.heappop(open_shards)
            held[shard].append(row)
            if len(held[shard]) < rows // shards:
                heapq.heappush(open_shards, (load + costs[row], shard))
        order += [row for own in held for row in own]
    return order


def compute_imbalance(costs: Sequence[int], *, rows: int, shards: int) -> float:
    """Returns the largest cost of a shard over the mean, of each micro-batch, weighted by its cost: 1 is balanced.

    Args:
      costs: of each row of the step, in the order of the step.
    """
    by_shard: Int[np.ndarray, "M shards"] = np.array(costs, np.int64).reshape(-1, shards, rows // shards).sum(axis=-1)
    return float(by_shard.max(axis=-1).sum() * shards / by_shard.sum())
