"""The loss of every token of a tree is that of separate passes; division, contexts and soft prompts change nothing."""

import dataclasses
import functools
import pathlib
import tempfile

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl.testing import absltest

from dialog_jax.errors import UserError
from dialog_jax.evaluation import token_scores
from dialog_jax.model import decoder
from dialog_jax.rendering.virtual_tokens import VirtualTokens
from dialog_jax.trees import prefix_tree
from tests.experiments import tiny_run


def _paths(tree):
    """The nodes of each path from the root to a leaf."""
    for leaf in set(range(len(tree.tokens))) - set(tree.parent.tolist()):
        path = [leaf]
        while tree.parent[path[0]] >= 0:
            path.insert(0, int(tree.parent[path[0]]))
        yield path


@functools.partial(jax.jit, static_argnums=0)
def _predict(config, parameters, tokens):
    """The probabilities of the four likeliest tokens after each token of a line, and these tokens."""
    length = tokens.shape[1]
    hidden = decoder.hidden_states(
        config, parameters, tokens, jnp.arange(length)[None], jnp.full((1, length), length, jnp.int32)
    )
    return jax.lax.top_k(jax.nn.softmax(hidden[0] @ decoder.unembedding(config, parameters).T), 4)


class TokenScoresTest(absltest.TestCase):
    @classmethod
    def setUpClass(cls):
        super().setUpClass()
        directory = pathlib.Path(cls.enterClassContext(tempfile.TemporaryDirectory()))
        cls.model = tiny_run.save_model(directory, max_length=256)
        rng = np.random.default_rng(0)
        history = rng.integers(3, 500, 40)
        strings = [np.concatenate([history[:size], rng.integers(3, 500, 30)]) for size in (10, 25, 40, 40)]
        strings = [string.astype(np.int32) for string in strings]
        cls.trees = [prefix_tree.build_trie(strings)[0], prefix_tree.build_trie(strings[2:3])[0]]

    def score(self, model=None, **changes):
        return token_scores.score_tokens(
            self.trees, model or self.model, **({"compute_dtype": jnp.float32, "top_k": 4} | changes)
        )

    @pytest.mark.full
    def test_losses_and_alternatives_are_those_of_separate_passes(self):
        model = self.model
        for tree, scores in zip(self.trees, self.score(), strict=True):
            self.assertEqual(np.flatnonzero(np.isnan(scores.nll)).tolist(), [0])
            for path in _paths(tree):
                tokens = np.zeros((1, 256), np.int32)
                tokens[0, : len(path)] = tree.tokens[path]
                expected = tiny_run.losses(model.config, model.parameters, tokens)[0, : len(path) - 1]
                np.testing.assert_allclose(scores.nll[path[1:]], expected, atol=2e-5)
                probability, token = _predict(model.config, model.parameters, tokens)
                np.testing.assert_array_equal(scores.top_token[path[1:]], token[: len(path) - 1])
                np.testing.assert_allclose(scores.top_probability[path[1:]], probability[: len(path) - 1], atol=1e-5)

    @pytest.mark.full
    def test_tree_that_is_divided_has_the_same_losses_and_tokens_beyond_the_context_have_none(self):
        whole = self.score()
        for context in (80, 60):
            divided = self.score(self.model._replace(config=dataclasses.replace(self.model.config, max_length=context)))
            for tree, one, other in zip(self.trees, whole, divided, strict=True):
                within = tree.position < context
                np.testing.assert_allclose(other.nll[within], one.nll[within], atol=2e-5)
                self.assertTrue(np.isnan(other.nll[~within]).all())
        self.assertLess(context, max(tree.position.max() for tree in self.trees))

    @pytest.mark.full
    def test_soft_prompt_is_in_front_of_every_path(self):
        prompt = jax.random.normal(jax.random.key(1), (3, self.model.config.width))
        virtual = VirtualTokens(self.model.config.vocab_size, 3)
        model = self.model._replace(
            renderer=self.model.renderer.with_virtual_tokens(virtual),
            parameters={**self.model.parameters, decoder.SOFT_PROMPT: prompt},
        )
        scores = self.score(model)
        tree = self.trees[0]
        for path in _paths(tree):
            tokens = np.zeros((1, 256), np.int32)
            tokens[0, : 3 + len(path)] = [*virtual.ids(), *tree.tokens[path]]
            expected = tiny_run.losses(model.config, model.parameters, tokens)[0, 3 : len(path) + 2]
            np.testing.assert_allclose(scores[0].nll[path[1:]], expected, atol=2e-5)

    def test_more_alternatives_than_tokens_are_refused(self):
        with self.assertRaisesRegex(UserError, "top_k is 0; it must be 1 to 512"):
            self.score(top_k=0)

    @pytest.mark.full
    def test_loss_that_is_not_finite_is_explained(self):
        broken = jax.tree.map(lambda leaf: leaf * jnp.nan, self.model.parameters)
        with self.assertRaisesRegex(UserError, "the loss of a token is not finite"):
            self.score(self.model._replace(parameters=broken))


if __name__ == "__main__":
    absltest.main()
