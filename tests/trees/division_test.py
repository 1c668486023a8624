"""Division of trees against all partitions of their leaves, and its worked example."""

import functools
import operator

import numpy as np
import pytest
from absl.testing import absltest, parameterized

from dialog_jax.trees import division, prefix_tree


def tree_of(*words):
    """The prefix tree of words, whose letters are the tokens; every token but the roots has weight 1."""
    tree, _ = prefix_tree.build_trie([np.array([ord(letter) for letter in word], np.int32) for word in words])
    return tree._replace(weight=(tree.parent >= 0).astype(np.float32))


def random_tree(rng, *, spine):
    """A few sequences: responses that branch off a growing history, or from anywhere in one another."""
    sequences, history, new = [], [0], 1
    for _ in range(rng.integers(2, 8)):
        if spine:
            grown = int(rng.integers(1, 8))
            history = [*history, *range(new, new + grown)]
            new += grown
            start = history
        else:
            other = sequences[rng.integers(len(sequences))] if sequences else [0]
            start = other[: rng.integers(1, len(other) + 1)]
        length = int(rng.integers(1, 30))
        sequences.append([*start, *range(new, new + length)])
        new += length
    tree, _ = prefix_tree.build_trie([np.array(tokens, np.int32) for tokens in sequences])
    return tree._replace(weight=(tree.parent >= 0).astype(np.float32))


def lineage(tree, node):
    """A node and its ancestors, by walking up."""
    path = [node]
    while tree.parent[path[-1]] >= 0:
        path.append(int(tree.parent[path[-1]]))
    return path


def contexts(tree):
    """{the tokens from the root to a node: its weight and turn} of the nodes of weight above 0."""
    return {
        tuple(tree.tokens[lineage(tree, node)[::-1]].tolist()): (float(tree.weight[node]), int(tree.turn[node]))
        for node in np.flatnonzero(tree.weight > 0).tolist()
    }


def partitions(items):
    if not items:
        yield []
        return
    for rest in partitions(items[1:]):
        yield [[items[0]], *rest]
        for number in range(len(rest)):
            yield [*rest[:number], [items[0], *rest[number]], *rest[number + 1 :]]


def best_division(tree, max_length):
    """(fewest parts, fewest nodes of so many parts) over all partitions of the leaves."""
    leaves = [node for node in range(len(tree.tokens)) if node not in tree.parent]
    paths = {leaf: frozenset(lineage(tree, leaf)) for leaf in leaves}
    size = functools.cache(lambda group: len(functools.reduce(operator.or_, (paths[leaf] for leaf in group))))
    sizes = ([size(tuple(sorted(group))) for group in partition] for partition in partitions(leaves))
    return min((len(some), sum(some)) for some in sizes if max(some) <= max_length)


class DivisionTest(parameterized.TestCase):
    def test_picture(self):
        tree = tree_of("hxabc", "hxde", "hxf")
        self.assertEqual("".join(map(chr, tree.tokens)), "hxabcdef")
        parts = division.divide_tree(tree, 6)
        self.assertEqual([part.tolist() for part in parts], [[0, 1, 2, 3, 4, 7], [0, 1, 5, 6]])
        first, second = division.select_nodes(tree, parts)
        # fmt: off
        self.assertEqual("".join(map(chr, first.tokens)), "hxabcf")
        self.assertEqual(first.parent.tolist(),      [-1, 0, 1, 2, 3, 1])
        self.assertEqual(first.position.tolist(),    [ 0, 1, 2, 3, 4, 2])
        self.assertEqual(first.subtree_end.tolist(), [ 6, 6, 5, 5, 5, 6])
        self.assertEqual(first.weight.tolist(),      [ 0, 1, 1, 1, 1, 1])
        self.assertEqual("".join(map(chr, second.tokens)), "hxde")
        self.assertEqual(second.parent.tolist(),      [-1, 0, 1, 2])
        self.assertEqual(second.subtree_end.tolist(), [ 4, 4, 4, 4])
        self.assertEqual(second.weight.tolist(),      [ 0, 0, 1, 1])
        # fmt: on

    def test_tree_that_fits_is_one_part(self):
        tree = tree_of("hxabc", "hxde")
        (part,) = division.divide_tree(tree, 7)
        self.assertEqual(part.tolist(), list(range(7)))
        (same,) = division.select_nodes(tree, [part])
        for field, other in zip(tree, same, strict=True):
            np.testing.assert_array_equal(field, other)

    @parameterized.product(seed=tuple(range(30)), spine=(True, False))
    @pytest.mark.quick_every(7)
    def test_parts_fit_and_keep_every_target_once_in_its_context(self, seed, spine):
        rng = np.random.default_rng(seed)
        tree = random_tree(rng, spine=spine)
        longest = int(tree.position.max()) + 1
        for max_length in {longest, int(rng.integers(longest, len(tree.tokens) + 1)), len(tree.tokens)}:
            trees = division.select_nodes(tree, division.divide_tree(tree, max_length))
            found = {}
            for part in trees:
                self.assertLessEqual(len(part.tokens), max_length)
                self.assertTrue((part.weight > 0).any())
                of_part = contexts(part)
                self.assertEmpty(of_part.keys() & found.keys())
                found |= of_part
                below = [{n for n in range(len(part.tokens)) if j in lineage(part, n)} for j in range(len(part.tokens))]
                self.assertEqual([set(range(j, end)) for j, end in enumerate(part.subtree_end.tolist())], below)
            self.assertEqual(found, contexts(tree))

    @parameterized.parameters(True, False)
    def test_parts_are_nearly_as_few_and_as_small_as_they_can_be(self, spine):
        """Of 60 random trees at most 2 have a part too many; of the others 3 % more nodes than need be, together."""
        rng = np.random.default_rng(0)
        more, nodes, fewest = 0, 0, 0
        for _ in range(60):
            tree = random_tree(rng, spine=spine)
            max_length = int(rng.integers(tree.position.max() + 1, len(tree.tokens) + 1))
            parts = division.divide_tree(tree, max_length)
            count, size = best_division(tree, max_length)
            self.assertLessEqual(division.count_parts_needed(tree, max_length), count)
            self.assertLessEqual(len(parts), count + 1)
            if len(parts) > count:
                more += 1
            else:
                nodes, fewest = nodes + sum(map(len, parts)), fewest + size
        self.assertLessEqual(more, 2)
        self.assertLessEqual(nodes, 1.03 * fewest)

    def test_bound_is_reached_by_leaves_that_fill_their_parts(self):
        tree = tree_of(*(f"h{letter * 4}" for letter in "abcdef"))
        self.assertEqual(division.count_parts_needed(tree, 9), 3)
        self.assertLen(division.divide_tree(tree, 9), 3)


if __name__ == "__main__":
    absltest.main()
