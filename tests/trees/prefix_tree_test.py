"""Tries against a dictionary of prefixes, which shares no code with them."""

import numpy as np
import pytest
from absl.testing import absltest, parameterized

from dialog_jax.trees import prefix_tree


def random_sequences(rng, count):
    """Sequences over three tokens, so that they share prefixes, repeat and contain one another."""
    return [rng.integers(0, 3, rng.integers(1, 9)).astype(np.int32) for _ in range(count)]


def ancestors(tree, node):
    """The context of a node by walking up its parents."""
    path = [node]
    while tree.parent[path[-1]] >= 0:
        path.append(int(tree.parent[path[-1]]))
    return path[::-1]


class BuildTreeTest(parameterized.TestCase):
    def test_picture_of_a_branching_dialogue(self):
        h, x, a, b, u, c = range(6)
        tree = prefix_tree.build_tree(
            [
                (np.array([h, x, a, b]), [prefix_tree.Span(2, 4, 1.0, 0)]),
                (np.array([h, x, b, u, c]), [prefix_tree.Span(4, 5, 0.5, 1)]),
            ]
        )
        # fmt: off
        np.testing.assert_array_equal(tree.tokens,      [ h, x, a,  b,  b,  u, c])
        np.testing.assert_array_equal(tree.parent,      [-1, 0, 1,  2,  1,  4, 5])
        np.testing.assert_array_equal(tree.position,    [ 0, 1, 2,  3,  2,  3, 4])
        np.testing.assert_array_equal(tree.subtree_end, [ 7, 7, 4,  4,  7,  7, 7])
        np.testing.assert_array_equal(tree.weight,      [ 0, 0, 1,  1,  0,  0, 0.5])
        np.testing.assert_array_equal(tree.turn,        [-1,-1, 0,  0, -1, -1, 1])
        # fmt: on

    def test_text_outside_responses_that_sequences_share_counts_once(self):
        text = np.arange(6, dtype=np.int32)
        spans = [prefix_tree.Span(1, 4, 0.5, -1)], [prefix_tree.Span(1, 4, 1.0, -1), prefix_tree.Span(4, 6, 1.0, 0)]
        tree = prefix_tree.build_tree([(text[:5], spans[0]), (text, spans[1])])
        np.testing.assert_array_equal(tree.weight, [0, 1, 1, 1, 1, 1])

    def test_text_outside_responses_adds_up_over_paths(self):
        text = np.arange(6, dtype=np.int32)
        spans = [prefix_tree.Span(1, 4, 0.5, -1)], [prefix_tree.Span(1, 3, 1.0, -1)], [prefix_tree.Span(2, 6, 2.0, -1)]
        tree = prefix_tree.build_tree([(text, own) for own in spans], paths=[0, 0, 3])
        np.testing.assert_array_equal(tree.weight, [0, 1, 3, 2.5, 2, 2])

    def test_paths_are_weighed_one_by_one(self):
        text = np.arange(5, dtype=np.int32)
        spans = [prefix_tree.Span(1, 5, 1.0, 0)], [prefix_tree.Span(1, 3, 2.0, -1)]
        tree = prefix_tree.build_tree([(text, own) for own in spans], paths=[0, 1])
        np.testing.assert_array_equal(tree.weight, [0, 3, 3, 1, 1])
        together = prefix_tree.build_tree([(text, own) for own in spans])
        np.testing.assert_array_equal(together.weight, [0, 2, 2, 1, 1])

    def test_grow_says_where_the_tokens_of_each_sequence_are(self):
        rng = np.random.default_rng(0)
        for _ in range(50):
            sequences = random_sequences(rng, 6)
            tree, nodes = prefix_tree.build_trie(sequences)
            for tokens, own in zip(sequences, nodes, strict=True):
                np.testing.assert_array_equal(tree.tokens[own], tokens)
                np.testing.assert_array_equal(own, ancestors(tree, int(own[-1])))

    def test_prefixes_of_one_string_are_a_path(self):
        text = np.arange(10, dtype=np.int32)
        tree = prefix_tree.build_tree(
            [(text[:4], [prefix_tree.Span(2, 4, 1, 0)]), (text[:9], [prefix_tree.Span(7, 9, 1, 1)])]
        )
        np.testing.assert_array_equal(tree.tokens, text[:9])
        np.testing.assert_array_equal(tree.subtree_end, np.full(9, 9))
        np.testing.assert_array_equal(np.flatnonzero(tree.weight), [2, 3, 7, 8])

    @parameterized.parameters(range(60))
    def test_random_sequences_give_every_prefix_once_with_its_context(self, seed):
        rng = np.random.default_rng(seed)
        sequences = random_sequences(rng, 1 + seed % 12)
        spans = []
        for turn, tokens in enumerate(sequences):
            start = int(rng.integers(0, len(tokens)))
            spans.append([prefix_tree.Span(start, len(tokens), float(rng.integers(1, 5)), turn)])
        tree = prefix_tree.build_tree(list(zip(sequences, spans, strict=True)))

        prefixes: dict[tuple, tuple] = {}  # prefix -> (weight, turn)
        for tokens, (span,) in zip(sequences, spans, strict=True):
            for i in range(len(tokens)):
                weight, turn = prefixes.get(tuple(tokens[: i + 1]), (0.0, -1))
                if span.start <= i < span.stop:  # every sequence is a response of its own
                    weight, turn = weight + span.weight, max(turn, span.turn)
                prefixes[tuple(tokens[: i + 1])] = (weight if i else 0.0, turn)

        self.assertLen(tree.tokens, len(prefixes))
        indices = np.arange(len(tree.tokens))
        for node in indices:
            context = ancestors(tree, node)
            prefix = tuple(tree.tokens[context])
            self.assertEqual((tree.weight[node], tree.turn[node]), prefixes.pop(prefix))
            self.assertEqual(tree.position[node], len(context) - 1)
            visible = indices[(indices <= node) & (node < tree.subtree_end)]
            np.testing.assert_array_equal(visible, context)
        self.assertEmpty(prefixes)

    @pytest.mark.full
    def test_seven_hundred_turns_stay_within_the_stack_and_a_second(self):
        rng = np.random.default_rng(0)
        history = rng.integers(0, 100, 14_000).astype(np.int32)
        sequences = []
        for turn in range(1, 701):  # each response is a branch, as when reasoning is stripped
            response = np.full(5, 100 + turn, np.int32)
            sequences.append(
                (
                    np.concatenate([history[: turn * 20], response]),
                    [prefix_tree.Span(turn * 20, turn * 20 + 5, 1, turn)],
                )
            )
        tree = prefix_tree.build_tree(sequences)
        self.assertLen(tree.tokens, 14_000 + 700 * 5)
        self.assertEqual(int((tree.weight > 0).sum()), 3500)


class NormalizeTest(absltest.TestCase):
    def tree(self):
        tokens = np.arange(8, dtype=np.int32)
        spans = [
            prefix_tree.Span(1, 2, 2.0, -1),
            prefix_tree.Span(2, 5, 1.0, 0),
            prefix_tree.Span(6, 7, 2.0, -1),
            prefix_tree.Span(7, 8, 0.5, 1),
        ]
        return prefix_tree.build_tree([(tokens, spans)])

    def test_token_leaves_weights(self):
        np.testing.assert_array_equal(
            prefix_tree.normalize([self.tree()], "token")[0].weight, [0, 2, 1, 1, 1, 0, 2, 0.5]
        )

    def test_turn_makes_what_is_outside_responses_sum_to_one(self):
        np.testing.assert_array_equal(
            prefix_tree.normalize([self.tree()], "turn")[0].weight, [0, 0.5, 1, 1, 1, 0, 0.5, 0.5]
        )

    def test_dialogue_sums_to_one(self):
        weight = prefix_tree.normalize([self.tree()], "dialogue")[0].weight
        np.testing.assert_allclose(weight, np.array([0, 2, 1, 1, 1, 0, 2, 0.5]) / 7.5, rtol=1e-6)

    def test_without_weights_nothing_changes(self):
        tree, _ = prefix_tree.build_trie([np.arange(3, dtype=np.int32)])
        for unit in ("token", "turn", "dialogue"):
            np.testing.assert_array_equal(prefix_tree.normalize([tree], unit)[0].weight, [0, 0, 0])


class JoinTreesTest(absltest.TestCase):
    def test_picture(self):
        trees = [
            prefix_tree.build_tree([(np.array(tokens, np.int32), [prefix_tree.Span(1, len(tokens), 1.0, 0)])])
            for tokens in ([7, 8, 9], [7, 8, 5, 6])
        ]
        tree = prefix_tree.join_trees(trees, 2)
        # fmt: off
        np.testing.assert_array_equal(tree.tokens,      [ 7, 8, 9, 5, 6])
        np.testing.assert_array_equal(tree.parent,      [-1, 0, 1, 1, 3])
        np.testing.assert_array_equal(tree.position,    [ 0, 1, 2, 2, 3])
        np.testing.assert_array_equal(tree.subtree_end, [ 5, 5, 3, 5, 5])
        np.testing.assert_array_equal(tree.weight,      [ 0, 2, 1, 1, 1])
        # fmt: on

    def test_joined_trees_are_the_tree_of_all_sequences(self):
        """Where no two of them share more than the prefix."""
        sequences = [[1, 2, 3, 4], [1, 2, 3, 5], [1, 2, 6], [1, 2, 7, 7], [1, 2, 7, 8, 9]]
        parts = [sequences[:2], sequences[2:3], sequences[3:]]
        trees = [prefix_tree.build_trie([np.array(one, np.int32) for one in part])[0] for part in parts]
        wanted, _ = prefix_tree.build_trie([np.array(one, np.int32) for one in sequences])

        def sets(tree):
            return {
                tuple(tree.tokens[[j for j in range(i + 1) if i < tree.subtree_end[j]]].tolist())
                for i in range(len(tree.tokens))
            }

        joined = prefix_tree.join_trees(trees, 2)
        self.assertEqual(sets(joined), sets(wanted))
        self.assertLen(joined.tokens, len(wanted.tokens))
        self.assertEqual([column.dtype for column in joined], [column.dtype for column in wanted])


if __name__ == "__main__":
    absltest.main()
