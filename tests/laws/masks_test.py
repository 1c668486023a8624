"""A token sees its ancestors and nothing else, whatever shares its row; the oracle walks up parents."""

import hypothesis
import numpy as np
from absl.testing import absltest, parameterized
from hypothesis import strategies as st

from dialog_jax.batching import batches
from tests.laws import budget, oracles, strategies


class MaskTest(parameterized.TestCase):
    @budget.cases(80)
    @hypothesis.given(data=st.data())
    def test_a_row_of_trees_shows_each_token_its_ancestors_only(self, data):
        trees = strategies.stored(data.draw(strategies.forests(max_trees=5)))
        row = data.draw(st.permutations(range(len(trees))))
        length = int(trees.offsets[-1]) + data.draw(st.integers(0, 5))
        batch = batches.fill_rows(trees, [row, []], max_length=length)
        visible, depth, segments, tokens = [], [], [], []
        for segment, number in enumerate(row, 1):
            tree, start = trees.tree(number), len(visible)
            for node in range(len(tree.tokens)):
                visible.append([start + ancestor for ancestor in oracles.context(tree, node)])
                depth.append(len(visible[-1]) - 1)
                segments.append(segment)
                tokens.append(int(tree.tokens[node]))
        padding = length - len(visible)
        visible += [[place] for place in range(len(visible), length)]
        self.assertEqual([seen_by(batch, 0, query) for query in range(length)], visible)
        np.testing.assert_array_equal(batch.position[0], depth + [0] * padding)
        np.testing.assert_array_equal(batch.segment[0], segments + [0] * padding)
        np.testing.assert_array_equal(batch.tokens[0], tokens + [0] * padding)
        self.assertEqual([seen_by(batch, 1, query) for query in range(length)], [[place] for place in range(length)])
        self.assertFalse(batch.weight[1].any())

    @budget.cases(80)
    @hypothesis.given(data=st.data())
    def test_trees_that_share_a_beginning_see_it_and_not_each_other(self, data):
        trees = strategies.stored(data.draw(strategies.forests(max_trees=5, shared_prefixes=True)))
        length = int(trees.offsets[-1])
        batch = batches.fill_rows(trees, [range(len(trees))], max_length=length)
        # What a token sees is the string that it ends; the tokens of a shared beginning stand there once.
        expected, heads = [], set()
        for number in range(len(trees)):
            tree = trees.tree(number)
            head = tuple(tree.tokens[: trees.shared_prefix_length[number]].tolist())
            strings = [tuple(tree.tokens[oracles.context(tree, node)].tolist()) for node in range(len(tree.tokens))]
            expected += [string for string in strings if len(string) > len(head) or head not in heads]
            heads.add(head)
        found = []
        for query in np.flatnonzero(batch.segment[0]).tolist():
            seen = seen_by(batch, 0, query)
            self.assertEqual(batch.position[0, seen].tolist(), list(range(len(seen))))
            self.assertLen(set(batch.segment[0, seen].tolist()), 1)
            found.append(tuple(batch.tokens[0, seen].tolist()))
        self.assertCountEqual(found, expected)


def seen_by(batch, b, query):
    """The keys that a query sees by the one rule of the mask."""
    return [key for key in range(query + 1) if query < batch.subtree_end[b, key]]


if __name__ == "__main__":
    absltest.main()
