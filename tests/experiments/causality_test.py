"""Replaced messages and influence, against passes of each response alone."""

import pathlib
import tempfile

import causality
import numpy as np
from absl.testing import absltest

from dialog_jax.dialogues.dialogue import Dialogue, Message
from dialog_jax.rendering.sequences import Renderer
from dialog_jax.rendering.tokenizers import load_tokenizer
from tests.experiments import tiny_run
from tests.laws import oracles


def dialogue(*contents):
    roles = ("user", "assistant")
    return Dialogue(id="d", messages=tuple(Message(role=roles[i % 2], content=text) for i, text in enumerate(contents)))


_PLAIN = dialogue("Hi", "Hello! How are you?", "fine, thank you", "yes", "And you?", "I am fine.")
_REASONED = dialogue("12 x 12", "<think>a b</think>144", "sure?", "<think>c d</think>Yes.")


class CausalityTest(absltest.TestCase):
    def setUp(self):
        super().setUp()
        self.directory = pathlib.Path(self.enter_context(tempfile.TemporaryDirectory()))
        # Not tied, so that the gradient of a line of the embedding is that of its tokens' inputs alone.
        self.model = tiny_run.save_model(self.directory, tie_embeddings=False)

    def alone(self, one):
        """The loss of each response, each a pass of its own."""
        tokens, weight = tiny_run.passes([one])
        return (np.asarray(tiny_run.losses(self.model.config, self.model.parameters, tokens)) * weight).sum(axis=1)

    def test_changes_equal_those_of_separate_passes(self):
        found = causality.replace_messages(self.model, _PLAIN, "What is this?")
        changed = (
            dialogue("What is this?", *[m.content for m in _PLAIN.messages[1:]]),
            dialogue(*[m.content for m in _PLAIN.messages[:2]], "What is this?", "yes", "And you?", "I am fine."),
            dialogue(*[m.content for m in _PLAIN.messages[:4]], "What is this?", "I am fine."),
        )
        expected = np.stack([self.alone(one) for one in changed]) - self.alone(_PLAIN)
        np.testing.assert_allclose(found.changes, expected, atol=2e-4)
        self.assertGreater(np.abs(np.diag(found.changes)).min(), 1e-3)
        np.testing.assert_array_equal(found.changes[np.tril_indices(3, -1)], 0)
        sizes = [len(one.tokens) for one in oracles.responses(_PLAIN, "chatml")]
        self.assertEqual(found.earlier, sizes[0] + sizes[0] + sizes[1])
        self.assertEqual(found.largest_earlier, 0)

    def influence_alone(self, renderer, one):
        """For each response {position in its own sequence: norm}, at tokens that occur once in the sequence."""
        (rendered,) = renderer.render([one])
        found = []
        for sequence in rendered:
            ids = sequence.tokens.tolist()
            tokens, weight = np.zeros((1, 256), np.int32), np.zeros((1, 255), np.float32)
            tokens[0, : len(ids)] = ids
            weight[0, sequence.start - 1 : len(ids) - 1] = 1
            gradient = tiny_run.gradient(self.model.config, self.model.parameters, tokens, weight)
            norms = np.linalg.norm(np.asarray(gradient["embedding"], np.float64), axis=-1)
            found.append({at: norms[token] for at, token in enumerate(ids) if ids.count(token) == 1})
        return found

    def assert_influence_is_that_of_passes_alone(self, renderer, one):
        trees = causality._one_tree(renderer, one)
        tree = trees.tree(0)
        found = causality.compute_influence(self.model.config, self.model.parameters, trees)
        self.assertEqual(found.outside, 0)
        self.assertGreater(found.norm[found.context].min(), 0)
        compared = 0
        for turn, alone in enumerate(self.influence_alone(renderer, one)):
            path = [int(np.flatnonzero(found.response[turn])[-1])]
            while tree.parent[path[-1]] >= 0:
                path.append(int(tree.parent[path[-1]]))
            path.reverse()  # the place in the tree of every token of the response's own sequence
            np.testing.assert_array_equal(np.flatnonzero(found.context[turn]), np.sort(path[:-1]))
            for at, norm in alone.items():
                np.testing.assert_allclose(found.norm[turn, path[at]], norm, rtol=1e-3, atol=1e-6)
                compared += 1
        self.assertGreater(compared, 20)
        return found

    def test_influence_on_a_dialogue(self):
        found = self.assert_influence_is_that_of_passes_alone(self.model.renderer, _PLAIN)
        self.assertEqual(found.norm.shape[0], 3)

    def test_influence_on_a_tree_with_branches(self):
        tokenizer = load_tokenizer(self.directory / "model", chat_template=causality._STRIPPING_TEMPLATE)
        found = self.assert_influence_is_that_of_passes_alone(Renderer(tokenizer), _REASONED)
        first, second = found.response
        self.assertFalse((found.context[1] & first).all())  # reasoning of turn 0 is before turn 1, and not its context
        self.assertLess(np.flatnonzero(first)[-1], np.flatnonzero(second)[0])


if __name__ == "__main__":
    absltest.main()
