"""Which device has which rows of a step, so that no device waits long for another.

The cost of a row grows with the squares of its trees' sizes, as attention does. Knows costs only; which rows a
step has is decided elsewhere.
"""

import heapq
from collections.abc import Sequence

import numpy as np
from jaxtyping import Int


def assign_rows(costs: Sequence[int], *, rows: int, shards: int) -> list[int]:
    """Returns the rows of a step in an order that gives every shard of a micro-batch about the same cost.

    The most expensive `rows` rows form one micro-batch, the next ones another. Within a micro-batch, each row, starting
    with the most expensive, goes to the cheapest shard that has room. Two shards, micro-batches of four rows:

        costs  [1, 8, 2, 7, 3, 6, 4, 5]   ->   rows [1, 7, 3, 5,  6, 0, 4, 2]      costs 8 5 | 7 6   4 1 | 3 2

    Args:
      costs: cost of each row of the step.
      rows: rows of a micro-batch; a multiple of `shards`.
      shards: number of device groups that have the same rows; each has `rows / shards` consecutive rows.
    """
    assert rows % shards == 0 and len(costs) % rows == 0, (len(costs), rows, shards)
    by_cost = sorted(range(len(costs)), key=lambda row: -costs[row])
    order: list[int] = []
    for start in range(0, len(costs), rows):
        shard_rows: list[list[int]] = [[] for _ in range(shards)]
        open_shards = [(0, shard) for shard in range(shards)]  # a heap of (cost so far, shard)
        for row in by_cost[start : start + rows]:
            cost, shard = heapq.heappop(open_shards)
            shard_rows[shard].append(row)
            if len(shard_rows[shard]) < rows // shards:
                heapq.heappush(open_shards, (cost + costs[row], shard))
        order += [row for numbers in shard_rows for row in numbers]
    return order


def compute_imbalance(costs: Sequence[int], *, rows: int, shards: int) -> float:
    """Returns the largest cost of a shard over the mean, averaged over micro-batches by their cost: 1 is balanced.

    Two shards with costs 8 + 5 and 4 + 1: the largest is 13, the mean 9, so the imbalance is 13 / 9.

    Args:
      costs: cost of each row of the step, in the order of the step.
      rows, shards: as in `assign_rows`.
    """
    by_shard: Int[np.ndarray, "M shards"] = np.array(costs, np.int64).reshape(-1, shards, rows // shards).sum(axis=-1)
    return float(by_shard.max(axis=-1).sum() * shards / by_shard.sum())
