"""Sequences to a prefix tree in depth-first order.

In: the token strings of a dialogue's sequences, each with its supervised spans. Out: a `Tree`, which has every shared
prefix once. Knows no roles, templates or rows.
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
    """A prefix tree in depth-first order: the context of node i is its ancestors, which come before it.

    Node j is an ancestor of node i, or i itself, iff `j <= i < subtree_end[j]`. A node of weight above 0 is a target:
    its token is predicted from its parent. A root is never a target.
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
    """A root-to-leaf path of the tree under construction; nodes are numbered in order of insertion."""

    tokens: Int[np.ndarray, " n"]
    nodes: Int[np.ndarray, " n"]


def build_tree(
    sequences: Sequence[tuple[Int[np.ndarray, " _"], Sequence[Span]]], paths: Sequence[int] | None = None
) -> Tree:
    """Returns the prefix tree of `sequences`; a token that several share is one node.

    As in K separate passes, the weights of responses that share a token add up; a token outside responses (turn -1) has
    the largest of its weights. A token of several responses has the turn of the last one.

    Two responses to one history, and a later turn whose template renders the first answer `a b` as `b`:

        sequences                   tree        0   1   2   3   4   5   6
        h x a b                     tokens      h   x   a   b   b   u   c
        h x b u c                   parent     -1   0   1   2   1   4   5
                                    position    0   1   2   3   2   3   4
                                    subtree_end 7   7   4   4   7   7   7

    Args:
      sequences: at least one (tokens, spans); tokens int [n] with n > 0, spans within [0, n).
      paths: the path of each sequence, in ascending order. The rules above hold within a path; the weights of
        different paths add up. One path if omitted.
    """
    tree, nodes = build_trie([tokens for tokens, _ in sequences])
    size = len(tree.tokens)
    weight, responses, others = np.zeros(size), np.zeros(size), np.zeros(size)
    turn = np.full(size, -1, np.int32)
    path = 0
    for number, ((_, spans), sequence_nodes) in enumerate(zip(sequences, nodes, strict=True)):
        if paths is not None and paths[number] != path:
            path = paths[number]
            weight += np.maximum(responses, others)
            responses[:], others[:] = 0, 0
        for span in spans:
            supervised = sequence_nodes[span.start : span.stop]
            if span.turn >= 0:
                responses[supervised] += span.weight
            else:
                others[supervised] = np.maximum(others[supervised], span.weight)
            turn[supervised] = np.maximum(turn[supervised], span.turn)
    weight = np.where(tree.parent < 0, 0, weight + np.maximum(responses, others)).astype(np.float32)
    return tree._replace(weight=weight, turn=turn)


def build_trie(sequences: Sequence[Int[np.ndarray, " _"]]) -> tuple[Tree, list[Int[np.ndarray, " _"]]]:
    """Returns (the prefix tree of token strings, with weight 0 and turn -1; the nodes of each string's tokens).

    For `h x a b` and `h x b u c`, as in `build_tree`: (tree, [[0, 1, 2, 3], [0, 1, 4, 5, 6]]).
    """
    assert sequences, "a tree needs a sequence"
    paths: list[_Path] = []
    parents: list[np.ndarray] = []
    values: list[np.ndarray] = []
    positions: list[np.ndarray] = []
    size = 0
    all_nodes = []  # for each sequence, the node of each of its tokens
    for tokens in sequences:
        shared, depth, extends = None, 0, -1
        for number, path in reversed(list(enumerate(paths))):  # the most recent one usually shares most
            if depth < min(len(path.tokens), len(tokens)) and path.tokens[depth] == tokens[depth]:
                common = common_prefix_length(path.tokens, tokens)
                if common > depth:
                    shared, depth, extends = path, common, number
        new = np.arange(size, size + len(tokens) - depth, dtype=np.int32)
        nodes = new if shared is None else np.concatenate([shared.nodes[:depth], new])
        all_nodes.append(nodes)
        if not len(new):
            continue
        parents.append(np.concatenate([nodes[depth - 1 : depth] if depth else [-1], new[:-1]]).astype(np.int32))
        values.append(tokens[depth:])
        positions.append(np.arange(depth, len(tokens), dtype=np.int32))
        size += len(new)
        path = _Path(tokens, nodes)
        if shared is not None and depth == len(shared.tokens):
            paths[extends] = path
        else:
            paths.append(path)

    parent, position = np.concatenate(parents), np.concatenate(positions)
    value = np.concatenate(values).astype(np.int32)
    weight, turn = np.zeros(size, np.float32), np.full(size, -1, np.int32)
    if len(paths) == 1:  # a single path: insertion order is depth-first order
        return Tree(value, parent, position, np.full(size, size, np.int32), weight, turn), all_nodes
    order, subtree_end = _depth_first([path.nodes for path in paths], parent)
    rank = np.empty(size, np.int32)
    rank[order] = np.arange(size, dtype=np.int32)
    renumbered = np.where(parent < 0, -1, rank[parent])
    tree = Tree(value[order], renumbered[order], position[order], subtree_end, weight, turn)
    return tree, [rank[nodes] for nodes in all_nodes]


def find_targets(tree: Tree) -> tuple[Int[np.ndarray, " s"], Int[np.ndarray, " s"]]:
    """Returns (source, target) nodes: the hidden state of node `source` predicts the token of node `target`.

    parent [-1, 0, 1, 2, 1], weight [0, 0, 1, 1, 1]   ->   ([1, 2, 1], [2, 3, 4])
    """
    target = np.flatnonzero(tree.weight > 0).astype(np.int32)
    return tree.parent[target], target


def join_trees(trees: Sequence[Tree], length: int) -> Tree:
    """Returns one tree of trees that begin with the same `length` tokens; the joined tree has these once.

    The weights of the common tokens add up. The paths `h x a` and `h x b c` with length 2:

        tokens       h   x   a   b   c
        parent      -1   0   1   1   3
        position     0   1   2   2   3
        subtree_end  5   5   3   5   5

    Args:
      length: at least 1; none of the trees branches before its token number `length`.
    """
    if len(trees) == 1:
        return trees[0]
    # Node n >= length of a tree is node n + shift of the joined tree.
    shifts = np.cumsum([0, *(len(tree.tokens) - length for tree in trees)]).tolist()
    size = length + shifts.pop()
    shifted = [
        tree._replace(
            parent=np.where(tree.parent < length, tree.parent, tree.parent + shift).astype(np.int32),
            subtree_end=tree.subtree_end + np.int32(shift),
        )
        for tree, shift in zip(trees, shifts, strict=True)
    ]
    head = Tree(*(column[:length] for column in trees[0]))._replace(
        subtree_end=np.full(length, size, np.int32),
        weight=np.stack([tree.weight[:length] for tree in trees]).sum(axis=0),
    )
    return Tree(
        *(
            np.concatenate([first, *(column[length:] for column in columns)])
            for first, *columns in zip(head, *shifted, strict=True)
        )
    )


def normalize(trees: Sequence[Tree], unit: str) -> list[Tree]:
    """Returns the trees of one dialogue with rescaled weights; a dialogue has several trees if it was split.

    One tree with weights [0, 1, 1, 2]   ->   [0, 0.25, 0.25, 0.5] for the unit `dialogue`

    Args:
      unit: `token` leaves the weights as they are; `turn` makes those outside responses (turn -1) sum to 1 (those of
        each response already sum to what they should); `dialogue` makes all sum to 1.
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
    """Returns the number of leading tokens that two strings share: 2 for `a b c` and `a b d e`."""
    length = min(len(a), len(b))
    differs = a[:length] != b[:length]
    return int(differs.argmax()) if differs.any() else length


def _depth_first(
    paths: list[Int[np.ndarray, " _"]], parent: Int[np.ndarray, " N"]
) -> tuple[Int[np.ndarray, " N"], Int32[np.ndarray, " N"]]:
    """Returns (order, subtree_end): the nodes in depth-first order, and the end of the subtree at each place in it.

    Paths are in order of insertion: path p follows an earlier path for a while and then branches off into new nodes,
    its chain. In depth-first order a chain that branches off deeper comes first; of two at one node, the older.
    Nodes 0 1 2 3 and 0 1 4 5 6   ->   order [0, 1, 2, 3, 4, 5, 6], subtree_end [7, 7, 4, 4, 7, 7, 7]
    """
    count = len(parent)
    chains = [paths[0]]  # the nodes that each path adds
    children: list[list[tuple[int, int]]] = [[]]  # for each chain: (offset at which another branches off, that chain)
    chain_of_node = np.full(count, -1, np.int32)
    offset = np.zeros(count, np.int32)  # of each node in its chain
    roots = [0]
    for number, nodes in enumerate(paths):
        new = nodes[chain_of_node[nodes] < 0]
        if number:
            chains.append(new)
            children.append([])
            fork = parent[new[0]]
            if fork < 0:
                roots.append(number)
            else:
                children[chain_of_node[fork]].append((int(offset[fork]), number))
        chain_of_node[new] = number
        offset[new] = np.arange(len(new))

    order: list[np.ndarray] = []
    subtree_end = np.empty(count, np.int32)
    placed = 0  # nodes in the order so far
    stack = [(chain, False) for chain in reversed(roots)]
    begins = [0] * len(chains)
    ends = [0] * len(chains)
    while stack:
        chain, closing = stack.pop()
        nodes = chains[chain]
        branches = sorted(children[chain], key=lambda branch: (-branch[0], branch[1]))
        if not closing:
            begins[chain] = placed
            order.append(nodes)
            placed += len(nodes)
            stack.append((chain, True))
            stack.extend((branch, False) for _, branch in reversed(branches))
            continue
        # The subtree of a node ends with the last chain that branches off at it or deeper.
        end, stop = begins[chain] + len(nodes), len(nodes)
        for fork_offset, branch in branches:
            subtree_end[begins[chain] + fork_offset + 1 : begins[chain] + stop] = end
            end, stop = ends[branch], fork_offset + 1
        subtree_end[begins[chain] : begins[chain] + stop] = end
        ends[chain] = end
    return np.concatenate(order), subtree_end
