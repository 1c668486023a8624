"""A soft prompt that a packed row has once equals the soft prompt in front of each response's sequence alone.

The oracle knows no virtual ids: it puts the embeddings of the soft prompt and of the tokens one behind the other, under
the plain causal mask, with positions that run on.
"""

import dataclasses
import functools
from unittest import mock

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest, parameterized
from flax import nnx
from hypothesis import strategies as st

from dialog_jax.batching import batches
from dialog_jax.evaluation import k_pass_scores, scoring
from dialog_jax.inference import generation
from dialog_jax.model import decoder
from dialog_jax.rendering.sequences import Renderer
from dialog_jax.rendering.virtual_tokens import VirtualTokens
from dialog_jax.trees import dataset
from dialog_jax.trees.dialogue_trees import TreeConfig
from tests.laws import budget, oracles, strategies
from tests.laws.truncation_test import distinct
from tests.rendering import chat_templates
from tests.training import tiny

_LENGTH, _PROMPT = 256, 6


@functools.cache
def setup(family):
    """(model, parameters with a soft prompt, its virtual tokens)."""
    model = tiny.config(len(chat_templates.train_tokenizer(family)))
    prompt = jax.random.normal(jax.random.key(3), (_PROMPT, model.width))
    return model, {**tiny.parameters(model), "soft_prompt": prompt}, VirtualTokens(model.vocab_size, _PROMPT)


def causal_attention(q, k, v):
    """Softmax over all earlier tokens, with each key and value repeated for the heads that share it."""
    k, v = (jnp.repeat(x, q.shape[2] // x.shape[2], axis=2) for x in (k, v))
    scores = jnp.einsum("btnh,bsnh->bnts", q, k) / np.sqrt(q.shape[3])
    visible = np.tril(np.ones(scores.shape[2:], bool))
    return jnp.einsum("bnts,bsnh->btnh", jax.nn.softmax(jnp.where(visible, scores, -jnp.inf)), v), None


@functools.partial(jax.jit, static_argnums=0)
@functools.partial(jax.value_and_grad, argnums=1)
def concatenated_loss(model, parameters, tokens, weight):
    """Sum of weighted loss of one sequence [T] behind the soft prompt; `weight` is of each of its tokens."""
    x = jnp.concatenate([parameters["soft_prompt"], parameters["embedding"][tokens]])[None]
    module = decoder.bind(model, parameters)
    graph, layers = nnx.split(module.layers)
    rotate = decoder.rotations(model.rotary, model.head_dim, jnp.arange(x.shape[1], dtype=jnp.int32)[None])(0)
    for number in range(model.layers):
        layer = nnx.merge(graph, jax.tree.map(lambda leaf, number=number: leaf[number], layers))
        x, _ = layer(x, rotate, causal_attention)
    hidden = decoder.finish(model, module, x)[0]
    # The last token of the soft prompt predicts the first of the sequence.
    logits = hidden[_PROMPT - 1 : -1] @ decoder.unembedding(model, parameters).T
    nll = -jnp.take_along_axis(jax.nn.log_softmax(logits), tokens[:, None], axis=1)[:, 0]
    return jnp.sum(weight * nll)


def each_alone(model, parameters, weighted):
    """(sum of weighted loss, its gradient) of [(tokens, the weight of each)]."""
    results = []
    for ids, weights in weighted:
        tokens, weight = np.zeros(_LENGTH, np.int32), np.zeros(_LENGTH, np.float32)
        tokens[: len(ids)], weight[: len(ids)] = ids, weights
        results.append(concatenated_loss(model, parameters, tokens, weight))
    return oracles.add_results(results)


def random_dialogues(count):
    rng = np.random.default_rng(1)
    return [chat_templates.random_dialogue(rng, turns=1 + i % 2, id=i) for i in range(count)]


def in_rows(trees, model, parameters):
    """((sum of weighted loss, its gradient), number of rows) of all trees, packed."""
    filled = [batch for batch, _ in batches.evaluation_batches(trees, max_length=_LENGTH, rows=2)]
    results = [tiny.loss_and_gradient(model, parameters, batch.map(lambda array: array[0])) for batch in filled]
    return oracles.add_results(results), sum(int((batch.segment[0, :, 0] > 0).sum()) for batch in filled)


class PackingTest(parameterized.TestCase):
    @parameterized.parameters("chatml", "qwen3")
    def test_one_prompt_per_row_equals_the_prompt_in_front_of_each_response(self, family):
        model, parameters, virtual_tokens = setup(family)
        dialogues = random_dialogues(6)
        trees = tiny.trees(
            dialogues, chat_templates.train_tokenizer(family), max_length=_LENGTH, virtual_tokens=virtual_tokens
        )
        got, rows = in_rows(trees, model, parameters)
        self.assertLess(rows, len(trees))
        # For kernels that support only paths, each dialogue has the prompt for itself.
        repeated, _ = in_rows(trees.without_shared_prefixes(), model, parameters)
        for batch, assignment in batches.evaluation_batches(trees, max_length=_LENGTH, rows=1):
            self.assertEqual((batch.tokens >= model.vocab_size).sum(), _PROMPT * bool(assignment[0]))
            self.assertEqual(batch.segment.max(), 1)
            self.assertFalse(np.isin(batch.target, virtual_tokens.ids()).any())
        weighted = [
            (one.prompt + one.tokens, np.concatenate([np.zeros(len(one.prompt)), weights]))
            for dialogue in dialogues
            for one, weights in oracles.response_weights(dialogue, {}, family)
        ]
        expected = each_alone(model, parameters, weighted)
        for one in (got, repeated):
            np.testing.assert_allclose(one[0], expected[0], rtol=1e-5)
            self.assertLess(tiny.largest_difference(one[1], expected[1]), 1e-4)
        self.assertGreater(float(jnp.abs(got[1]["soft_prompt"]).min(axis=1).max()), 0)

    def test_joint_trains_the_first_token_behind_the_prompt(self):
        model, parameters, virtual_tokens = setup("chatml")
        dialogues, tokenizer = random_dialogues(4), chat_templates.train_tokenizer("chatml")
        trees = tiny.trees(dialogues, tokenizer, max_length=_LENGTH, virtual_tokens=virtual_tokens, name="joint")
        texts = [
            tokenizer.apply_chat_template([message.as_dict() for message in dialogue.messages], tokenize=False)
            for dialogue in dialogues
        ]
        weighted = [(ids, np.ones(len(ids))) for ids in (tokenizer.encode(text) for text in texts)]
        self.assertEqual(trees.report.targets, sum(len(ids) for ids, _ in weighted))
        got, _ = in_rows(trees, model, parameters)
        expected = each_alone(model, parameters, weighted)
        np.testing.assert_allclose(got[0], expected[0], rtol=1e-5)
        self.assertLess(tiny.largest_difference(got[1], expected[1]), 1e-4)

    def test_another_embedding_changes_the_loss_of_every_response(self):
        model, parameters, virtual_tokens = setup("qwen3")
        trees = tiny.trees(
            random_dialogues(4),
            chat_templates.train_tokenizer("qwen3"),
            max_length=_LENGTH,
            virtual_tokens=virtual_tokens,
        )
        batch = batches.fill_rows(trees, [list(range(len(trees)))], max_length=512).map(jnp.asarray)

        @jax.jit
        def score(parameters):
            hidden = decoder.hidden_states(model, parameters, batch.tokens, batch.position, batch.subtree_end)
            logits = hidden[0, batch.source[0]] @ decoder.unembedding(model, parameters).T
            nll = -jax.nn.log_softmax(logits)[jnp.arange(len(batch.target[0])), batch.target[0]]
            return jax.ops.segment_sum(nll[: len(response)], response, trees.report.turns)

        tree = np.repeat(np.arange(len(trees)), trees.targets)
        _, response = np.unique(np.stack([tree, batch.turn[0, : len(tree)]]), axis=1, return_inverse=True)
        self.assertEqual(response.max() + 1, trees.report.turns)
        for row in (0, _PROMPT - 1):
            other = {**parameters, "soft_prompt": parameters["soft_prompt"].at[row].multiply(-1.0)}
            self.assertGreater(np.abs(score(other) - score(parameters)).min(), 1e-3)


class TruncationTest(parameterized.TestCase):
    @parameterized.parameters("chatml", "qwen3")
    @budget.cases(15)
    @hypothesis.given(data=st.data())
    def test_rows_longer_by_the_prompt_have_the_same_parts_each_behind_it(self, family, data):
        kinds = st.one_of(
            strategies.lists(family, max_turns=6, kind="words"), strategies.message_trees(family, kind="words")
        )
        (dialogue,) = strategies.parsed([data.draw(distinct(kinds))])
        max_length = data.draw(st.integers(16, max(16, len(oracles.nodes(dialogue, family)))), label="max_length")
        virtual_tokens = VirtualTokens(1000, data.draw(st.integers(1, 40), label="tokens"))
        prepared = []
        for virtual in (VirtualTokens(), virtual_tokens):
            renderer = Renderer(chat_templates.train_tokenizer(family), virtual_tokens=virtual)
            try:
                prepared.append(
                    dataset.prepare([dialogue], renderer, TreeConfig(max_length=max_length + virtual.count))
                )
            except ValueError as error:
                self.assertRegex(str(error), "has a target")
                prepared.append(None)
        without, trees = prepared
        self.assertEqual(without is None, trees is None)
        if trees is None:
            return
        self.assertLen(trees, len(without))
        count = virtual_tokens.count
        for number in range(len(trees)):
            tree, other = trees.tree(number), without.tree(number)
            np.testing.assert_array_equal(tree.tokens, virtual_tokens.prepend(other.tokens))
            np.testing.assert_array_equal(tree.position[count:], other.position + count)
            np.testing.assert_array_equal(tree.subtree_end[count:], other.subtree_end + count)
            np.testing.assert_array_equal(tree.weight, np.pad(other.weight, (count, 0)))
            self.assertEqual(trees.shared_prefix(number)[1], count)
        self.assertEqual(
            dataclasses.replace(trees.report, tokens=0, repeated=0),
            dataclasses.replace(without.report, tokens=0, repeated=0),
        )


class ScoringTest(absltest.TestCase):
    def test_scores_of_rows_that_share_the_prompt_equal_those_of_k_passes(self):
        model, parameters, virtual_tokens = setup("qwen3")
        tokenizer, dialogues = chat_templates.train_tokenizer("qwen3"), random_dialogues(6)
        renderer = Renderer(tokenizer, virtual_tokens=virtual_tokens)
        options = {"compute_dtype": jnp.float32, "contexts": ("last", "none")}
        with mock.patch.object(batches, "fill_rows", wraps=batches.fill_rows) as fill:
            scores = list(scoring.score_dialogues(dialogues, renderer, model, parameters, **options))
        self.assertLess(fill.call_count, len(dialogues))
        for call in fill.call_args_list:
            batch = batches.fill_rows(*call.args, **call.kwargs)
            self.assertEqual((batch.tokens >= model.vocab_size).sum(), _PROMPT)
        expected = k_pass_scores.score_dialogues(dialogues, tokenizer, model, parameters, **options)
        for score, other in zip(scores, expected, strict=True):
            np.testing.assert_allclose(score.record.pop("nll"), other.record.pop("nll"), rtol=1e-5)
            for turn, other_turn in zip(score.record["turns"], other.record["turns"], strict=True):
                for name in ("nll", "nll_last", "nll_none"):
                    np.testing.assert_allclose(turn.pop(name), other_turn.pop(name), rtol=1e-4)
            self.assertEqual(score.record, other.record)


class DecodingTest(absltest.TestCase):
    def test_cached_logits_equal_those_of_the_full_forward(self):
        model, parameters, virtual_tokens = setup("chatml")
        (dialogue,) = random_dialogues(1)
        tokens = Renderer(chat_templates.train_tokenizer("chatml"), virtual_tokens=virtual_tokens).encode_prompt(
            dialogue
        )
        self.assertEqual(tokens[:_PROMPT].tolist(), virtual_tokens.ids().tolist())
        position, end = jnp.arange(len(tokens)), jnp.full(len(tokens), len(tokens))
        hidden = decoder.hidden_states(model, parameters, jnp.asarray(tokens)[None], position[None], end[None])
        expected = hidden[0] @ decoder.unembedding(model, parameters).T
        session = generation.Session(model, parameters)
        for length in (3, _PROMPT, len(tokens) - 1, len(tokens)):
            np.testing.assert_allclose(session.read(tokens[:length].tolist()), expected[length - 1], atol=1e-4)

    def test_ids_beyond_the_prompt_are_refused(self):
        model, parameters, virtual_tokens = setup("chatml")
        with self.assertRaisesRegex(ValueError, "the prompt holds token ids"):
            generation.generate(model, parameters, [virtual_tokens.first + _PROMPT], max_new_tokens=1)
        without = {name: leaf for name, leaf in parameters.items() if name != "soft_prompt"}
        with self.assertRaisesRegex(ValueError, "the prompt holds token ids"):
            generation.generate(model, without, [virtual_tokens.first], max_new_tokens=1)


if __name__ == "__main__":
    absltest.main()
