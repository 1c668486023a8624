"""Sequences to a tree: the prefix trie of a dialogue, written out in depth-first order.

Enters: the token strings of a dialogue's sequences, each with the spans of it that are supervised. Leaves: a `Tree`, in
which every shared prefix stands once. Knows nothing of roles, templates or rows.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float32, Int, Int32


class Span(NamedTuple):
    """Tokens `start` to `stop` (exclusive) of a sequence, supervised with `weight`; `turn` is -1 outside responses."""

    start: int
    stop: int
    weight: float
    turn: int


class Tree(NamedTuple):
    """A prefix trie in depth-first order: the context of node i is its ancestors, which stand before it.

    Node j is an ancestor of node i, or i itself, iff `j <= i < subtree_end[j]`. Its target is its own token, predicted
    from its parent, so a node has at most one; `weight` 0 means none, and a root has none.
    """

    tokens: Int32[np.ndarray, " N"]
    parent: Int32[np.ndarray, " N"]
    """Index of the token before this one in its sequence; -1 at a root."""
    position: Int32[np.ndarray, " N"]
    """Number of proper ancestors, which is the token's index in its own sequence."""
    subtree_end: Int32[np.ndarray, " N"]
    weight: Float32[np.ndarray, " N"]
    turn: Int32[np.ndarray, " N"]


class _Path(NamedTuple):
    """A root-to-leaf path of the trie under construction; nodes are numbered in order of insertion."""

    tokens: Int[np.ndarray, " n"]
    nodes: Int[np.ndarray, " n"]


def build_tree(
    sequences: Sequence[tuple[Int[np.ndarray, " _"], Sequence[Span]]], paths: Sequence[int] | None = None
) -> Tree:
    """Returns the prefix trie of `sequences`; a token that several share is one node.

    As in K separate passes, the weights of responses that share a token add up there; a token that belongs to no
    response (turn -1) has the largest of its weights. A token of several responses counts for the last one's turn.

    Two responses to one history, and a later turn whose template renders the first answer `a b` as `b`:

        sequences                   tree        0   1   2   3   4   5   6
        h x a b                     tokens      h   x   a   b   b   u   c
        h x b u c                   parent     -1   0   1   2   1   4   5
                                    position    0   1   2   3   2   3   4
                                    subtree_end 7   7   4   4   7   7   7

    Args:
      sequences: at least one (tokens, spans); tokens int [n] with n > 0, spans within [0, n).
      paths: for each sequence a number, in ascending order; all this is so for each number by itself, and the weights
        of different numbers add up.
    """
    tree, nodes = build_trie([tokens for tokens, _ in sequences])
    size = len(tree.tokens)
    weight, responses, others = np.zeros(size), np.zeros(size), np.zeros(size)
    turn = np.full(size, -1, np.int32)
    path = 0
    for number, ((_, spans), own) in enumerate(zip(sequences, nodes, strict=True)):
        if paths is not None and paths[number] != path:
            path = paths[number]
            weight += np.maximum(responses, others)
            responses[:], others[:] = 0, 0
        for span in spans:
            supervised = own[span.start : span.stop]
            if span.turn >= 0:
                responses[supervised] += span.weight
            else:
                others[supervised] = np.maximum(others[supervised], span.weight)
            turn[supervised] = np.maximum(turn[supervised], span.turn)
    weight = np.where(tree.parent < 0, 0, weight + np.maximum(responses, others)).astype(np.float32)
    return tree._replace(weight=weight, turn=turn)


def build_trie(sequences: Sequence[Int[np.ndarray, " _"]]) -> tuple[Tree, list[Int[np.ndarray, " _"]]]:
    """Returns (the trie of token strings, with weight 0 and turn -1; for each string, the nodes of its tokens)."""
    assert sequences, "a tree needs a sequence"
    paths: list[_Path] = []
    parents: list[np.ndarray] = []
    size = 0
    placed = []  # for each sequence, the node of each of its tokens
    for tokens in sequences:
        shared, depth, extends = None, 0, -1
        for number, path in enumerate(paths):
            common = common_prefix_length(path.tokens, tokens)
            if shared is None or common > depth:
                shared, depth, extends = path, common, number
        new = np.arange(size, size + len(tokens) - depth, dtype=np.int32)
        nodes = new if shared is None else np.concatenate([shared.nodes[:depth], new])
        placed.append(nodes)
        if not len(new):
            continue
        parents.append(np.concatenate([nodes[depth - 1 : depth] if depth else [-1], new[:-1]]).astype(np.int32))
        size += len(new)
        grown = _Path(tokens, nodes)
        if shared is not None and depth == len(shared.tokens):
            paths[extends] = grown
        else:
            paths.append(grown)

    parent = np.concatenate(parents)
    value, position = np.zeros(size, np.int32), np.zeros(size, np.int32)
    for tokens, nodes in zip(sequences, placed, strict=True):
        value[nodes] = tokens
        position[nodes] = np.arange(len(nodes), dtype=np.int32)
    weight, turn = np.zeros(size, np.float32), np.full(size, -1, np.int32)
    if len(paths) == 1:  # a single path: insertion order is depth-first order
        return Tree(value, parent, position, np.full(size, size, np.int32), weight, turn), placed
    order, subtree_end = _depth_first([path.nodes for path in paths], parent)
    rank = np.empty(size, np.int32)
    rank[order] = np.arange(size, dtype=np.int32)
    renumbered = np.where(parent < 0, -1, rank[parent])
    tree = Tree(value[order], renumbered[order], position[order], subtree_end, weight, turn)
    return tree, [rank[nodes] for nodes in placed]


def find_targets(tree: Tree) -> tuple[Int[np.ndarray, " s"], Int[np.ndarray, " s"]]:
    """Returns (source, target) nodes of the supervised tokens: hidden state `source` predicts token `target`."""
    target = np.flatnonzero(tree.weight > 0).astype(np.int32)
    return tree.parent[target], target


def normalise(trees: Sequence[Tree], unit: str) -> list[Tree]:
    """Returns the trees of one dialogue, most often one, with their weights rescaled.

    Args:
      unit: `token` leaves the weights as they are; `turn` makes those outside responses (turn -1) sum to 1, as those of
        each response do by their spans; `dialogue` makes all sum to 1.
    """
    if unit == "token":
        return list(trees)
    parts = [tree.turn < 0 if unit == "turn" else np.ones(len(tree.turn), bool) for tree in trees]
    total = sum(tree.weight[part].sum(dtype=np.float64) for tree, part in zip(trees, parts, strict=True))
    scale = 1 / total if total > 0 else 1.0
    return [
        tree._replace(weight=np.where(part, tree.weight * scale, tree.weight).astype(np.float32))
        for tree, part in zip(trees, parts, strict=True)
    ]


def common_prefix_length(a: Int[np.ndarray, " n"], b: Int[np.ndarray, " m"]) -> int:
    """Number of leading tokens that two strings share."""
    length = min(len(a), len(b))
    differs = a[:length] != b[:length]
    return int(differs.argmax()) if differs.any() else length


def _depth_first(
    paths: list[Int[np.ndarray, " _"]], parent: Int[np.ndarray, " N"]
) -> tuple[Int[np.ndarray, " N"], Int32[np.ndarray, " N"]]:
    """Returns (order, subtree_end): the nodes in depth-first order, and for each place in it where its subtree ends.

    Paths come in order of insertion, so path p follows an earlier path for a while and then leaves it for nodes of its
    own. In depth-first order a branch that leaves deeper comes first; of two that leave at one node, the older.
    """
    count = len(parent)
    chains = [paths[0]]  # the nodes that each path adds to the earlier ones
    children: list[list[tuple[int, int]]] = [[]]  # for each chain: (offset after which a branch leaves, its chain)
    owner = np.full(count, -1, np.int32)
    offset = np.zeros(count, np.int32)
    roots = [0]
    for number, nodes in enumerate(paths):
        own = nodes[owner[nodes] < 0]
        if number:
            chains.append(own)
            children.append([])
            leaves = parent[own[0]]
            if leaves < 0:
                roots.append(number)
            else:
                children[owner[leaves]].append((int(offset[leaves]), number))
        owner[own] = number
        offset[own] = np.arange(len(own))

    order: list[np.ndarray] = []
    subtree_end = np.empty(count, np.int32)
    written = 0
    stack = [(chain, False) for chain in reversed(roots)]
    begins = [0] * len(chains)
    ends = [0] * len(chains)
    while stack:
        chain, closing = stack.pop()
        nodes = chains[chain]
        branches = sorted(children[chain], key=lambda branch: (-branch[0], branch[1]))
        if not closing:
            begins[chain] = written
            order.append(nodes)
            written += len(nodes)
            stack.append((chain, True))
            stack.extend((branch, False) for _, branch in reversed(branches))
            continue
        # The subtree of a node closes with the last branch that leaves at it or deeper.
        end, stop = begins[chain] + len(nodes), len(nodes)
        for leaves, branch in branches:
            subtree_end[begins[chain] + leaves + 1 : begins[chain] + stop] = end
            end, stop = ends[branch], leaves + 1
        subtree_end[begins[chain] : begins[chain] + stop] = end
        ends[chain] = end
    return np.concatenate(order), subtree_end
