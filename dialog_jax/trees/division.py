"""Divides a prefix tree that is larger than a row into trees that fit, each with the full context of its targets.

In: a tree in depth-first order. Out: trees of at most a number of nodes. Knows no sequences, templates or dialogues.
"""

import bisect
from collections.abc import Iterable, Sequence

import numpy as np
from jaxtyping import Int

from dialog_jax.trees.prefix_tree import Tree


def divide_tree(tree: Tree, max_length: int) -> list[Int[np.ndarray, " n"]]:
    """Returns the nodes of each part of a tree, in ascending order; a tree of at most `max_length` nodes has one part.

    Every leaf is in one part, together with all its ancestors, so that a part is a prefix tree in depth-first order. To
    find few parts that repeat few nodes, leaves are assigned greedily in two orders, and the better result is taken.
    Answers `a b c`, `d e` and `f` to the history `h x`, and max_length 6:

        tree    h x a b c d e f
        parts   [0, 1, 2, 3, 4, 7] and [0, 1, 5, 6], which are h x a b c f and h x d e

    Args:
      max_length: at least the number of nodes of the longest path.
    """
    if len(tree.tokens) <= max_length:
        return [np.arange(len(tree.tokens))]
    leaves = _find_leaves(tree)
    depths: list[int] = (tree.position[leaves] + 1).tolist()
    assert max(depths) <= max_length, "a path is longer than max_length"
    # The node after a leaf is the first on the path of the next leaf that the two do not share.
    shared = tree.position[leaves[:-1] + 1]
    orders = range(len(leaves)), sorted(range(len(leaves)), key=lambda leaf: -depths[leaf])
    divisions = [_assign_leaves(order, depths, shared, max_length) for order in orders]
    groups, _ = min(divisions, key=lambda division: (len(division[0]), division[1]))
    return [_select_paths(tree, leaves[group]) for group in groups]


def select_nodes(tree: Tree, parts: Sequence[Int[np.ndarray, " _"]]) -> list[Tree]:
    """Returns the tree of each part. A node of several parts has its weight in the first of them and 0 in the others.

    Args:
      parts: as `divide_tree` returns them.
    """
    trees = []
    weight = tree.weight.copy()
    for nodes in parts:
        parent = tree.parent[nodes]
        trees.append(
            Tree(
                tokens=tree.tokens[nodes],
                parent=np.where(parent < 0, -1, np.searchsorted(nodes, parent)).astype(np.int32),
                position=tree.position[nodes],
                subtree_end=np.searchsorted(nodes, tree.subtree_end[nodes]).astype(np.int32),
                weight=weight[nodes],
                turn=tree.turn[nodes],
            )
        )
        weight[nodes] = 0
    return trees


def count_parts_needed(tree: Tree, max_length: int) -> int:
    """Returns a lower bound on the number of parts of at most `max_length` nodes.

    A part that contains a node with p ancestors has at most max_length - p nodes at and below it. So a subtree of n
    nodes needs n / (max_length - p) parts. And the n nodes that only one leaf has as ancestors take up at least
    n / (max_length - p) of a part, shares that sum to at most 1 over the leaves of a part.
    """
    size = len(tree.tokens)
    sizes = tree.subtree_end - np.arange(size)
    children = np.bincount(tree.parent[tree.parent >= 0], minlength=size)
    begins_chain = (tree.parent < 0) | (children[tree.parent] > 1)
    leaves = _find_leaves(tree)
    first = np.maximum.accumulate(np.where(begins_chain, np.arange(size), 0))[leaves]
    shares = (leaves - first + 1) / (max_length - tree.position[first])
    bound = max(float((sizes / (max_length - tree.position)).max()), float(shares.sum()))
    return int(np.ceil(bound - 1e-6))


def _find_leaves(tree: Tree) -> Int[np.ndarray, " leaves"]:
    return np.flatnonzero(tree.subtree_end == np.arange(1, len(tree.tokens) + 1))


def _assign_leaves(
    order: Iterable[int], depths: Sequence[int], shared: Int[np.ndarray, " n"], max_length: int
) -> tuple[list[list[int]], int]:
    """Returns (groups of leaves whose paths have at most `max_length` nodes together, number of nodes of all groups).

    A leaf joins the group in which its path adds the fewest nodes, of those in which it fits.

    Args:
      depths: number of nodes on the path of each leaf.
      shared: number of nodes that the paths of each leaf and the next have in common.
    """
    groups: list[list[int]] = []
    sizes: list[int] = []
    for leaf in order:
        added = [depths[leaf] - _count_shared(leaf, group, shared) for group in groups]
        candidates = [number for number, size in enumerate(sizes) if size + added[number] <= max_length]
        if candidates:
            number = min(candidates, key=lambda number: (added[number], -sizes[number]))
            bisect.insort(groups[number], leaf)
            sizes[number] += added[number]
        else:
            groups.append([leaf])
            sizes.append(depths[leaf])
    return groups, sum(sizes)


def _count_shared(leaf: int, group: list[int], shared: Int[np.ndarray, " n"]) -> int:
    """Returns how many nodes of a leaf's path are on the path of some leaf of a group, whose leaves ascend."""
    place = bisect.bisect(group, leaf)
    before = int(shared[group[place - 1] : leaf].min()) if place else 0
    after = int(shared[leaf : group[place]].min()) if place < len(group) else 0
    return max(before, after)


def _select_paths(tree: Tree, leaves: Int[np.ndarray, " n"]) -> Int[np.ndarray, " m"]:
    """Returns the nodes on the paths to some leaves, both in ascending order."""
    leaves_before = np.searchsorted(leaves, np.arange(len(tree.tokens)))
    return np.flatnonzero(leaves_before < np.searchsorted(leaves, tree.subtree_end))
