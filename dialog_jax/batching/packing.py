"""Trees to rows: which trees share a row, under a budget of tokens and one of targets.

Knows lengths and counts only. A row is a list of tree numbers; nothing is copied here.
"""

import collections

import numpy as np
from jaxtyping import Int

_SEARCHES = 32  # open rows looked at before a tree opens a new one, when the target budget refuses rows


def pack_trees(
    tokens: Int[np.ndarray, " trees"],
    targets: Int[np.ndarray, " trees"],
    *,
    max_length: int,
    max_targets: int,
    rng: np.random.Generator,
    shared_prefix_length: Int[np.ndarray, " trees"] | None = None,
    shared_prefix_id: Int[np.ndarray, " trees"] | None = None,
) -> list[list[int]]:
    """Returns rows of tree numbers: best-fit decreasing, every tree in exactly one row.

    The largest tree goes first; each goes to the open row that it fills best. With room for 10 tokens:

        tokens  [3, 6, 4, 7]   ->   rows [[3, 0], [1, 2]]

    Trees of equal size (tokens, targets and shared prefix) are taken in an order drawn from `rng`: each epoch has
    other neighbours, but the same number of rows of the same sizes, because nothing but sizes decides.

    Args:
      tokens: size of each tree, in tokens, each in [1, max_length].
      targets: supervised tokens of each tree, each in [0, max_targets].
      shared_prefix_length, shared_prefix_id: trees with the same id (>= 0; -1 is none) begin with the same
        `shared_prefix_length` tokens, which a row holds once. A tree goes to a row that holds them already if there is
        one with room.

    Source: Dosa and Sgall 2013 for the bound of best-fit decreasing, 11/9 of the optimum; on dialogues, whose short
    ones fill the gaps, it is within 2 % of full rows.
    """
    assert len(tokens) == len(targets), (len(tokens), len(targets))
    assert not len(tokens) or (tokens.max() <= max_length and targets.max() <= max_targets)
    shuffled = rng.permutation(len(tokens))
    if shared_prefix_length is None or shared_prefix_id is None:
        shared_prefix_length, shared_prefix_id = np.zeros_like(tokens), np.full_like(tokens, -1)
    else:
        known, numbers = np.unique(shared_prefix_id, return_inverse=True)
        shared_prefix_id = numbers - int(np.searchsorted(known, 0))  # in the same order, without gaps
        shared_prefix_id = np.maximum(shared_prefix_id, -1)
    keys = (shared_prefix_id, shared_prefix_length, -targets, -tokens)  # the last one first
    order = shuffled[np.lexsort([key[shuffled] for key in keys])]
    columns = (order, tokens[order], targets[order], shared_prefix_length[order], shared_prefix_id[order])
    rows: list[list[int]] = []
    targets_left: list[int] = []
    tokens_left: list[int] = []
    everywhere = _OpenRows()
    with_shared_prefix: dict[int, _OpenRows] = collections.defaultdict(_OpenRows)
    held: list[list[int]] = []  # shared_prefix_id of each row
    grouped = shared_prefix_id >= 0
    # Tokens of each group that are not placed yet.
    to_come = np.bincount(shared_prefix_id[grouped], (tokens - shared_prefix_length)[grouped]).tolist()
    for tree, size, count, shared, group in zip(*(column.tolist() for column in columns), strict=True):
        row = with_shared_prefix[group].tightest(size - shared, count, targets_left) if group >= 0 else -1
        if row < 0 and (group < 0 or to_come[group] < max_length):  # a group that can fill a row of its own begins one
            row = everywhere.tightest(size, count, targets_left)
        if row < 0:
            row = len(rows)
            rows.append([])
            held.append([])
            targets_left.append(max_targets)
            tokens_left.append(max_length)
        else:
            everywhere.remove(row, tokens_left[row])
            for other in held[row]:
                with_shared_prefix[other].remove(row, tokens_left[row])
        if group >= 0:
            to_come[group] -= size - shared
        rows[row].append(tree)
        targets_left[row] -= count
        tokens_left[row] -= size - (shared if group in held[row] else 0)
        if group >= 0 and group not in held[row]:
            held[row].append(group)
        everywhere.add(row, tokens_left[row])
        for other in held[row]:
            with_shared_prefix[other].add(row, tokens_left[row])
    return rows


class _OpenRows:
    """Rows by the tokens they have left."""

    def __init__(self) -> None:
        self._by_room: dict[int, dict[int, None]] = collections.defaultdict(dict)
        self._rooms = 0  # bit r is set iff a row has r tokens left

    def add(self, row: int, room: int) -> None:
        """Takes up a row; one without room is never looked for."""
        if room:
            self._by_room[room][row] = None
            self._rooms |= 1 << room

    def remove(self, row: int, room: int) -> None:
        """Takes out a row."""
        del self._by_room[room][row]
        if not self._by_room[room]:
            self._rooms ^= 1 << room

    def tightest(self, size: int, count: int, targets_left: list[int]) -> int:
        """The row with the least room for `size` tokens and `count` targets; -1 if none is found."""
        fitting = self._rooms >> size << size
        for _ in range(_SEARCHES):
            if not fitting:
                break
            lowest = fitting & -fitting
            candidate = next(reversed(self._by_room[lowest.bit_length() - 1]))
            if targets_left[candidate] >= count:
                return candidate
            fitting ^= lowest
        return -1
