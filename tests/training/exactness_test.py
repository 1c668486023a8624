"""The laws of loss and gradient on chosen dialogues; `tests/laws/model_test.py` has the same of random ones."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest, parameterized

from dialog_jax.batching import batches
from dialog_jax.dialogues.dialogue import Dialogue, Message
from dialog_jax.dialogues.parsing import parse_records
from dialog_jax.model import decoder
from dialog_jax.rendering.sequences import Renderer
from dialog_jax.training import loss
from dialog_jax.trees import dataset
from dialog_jax.trees.dialogue_trees import TreeConfig
from dialog_jax.trees.objectives import ObjectiveConfig
from tests.laws import oracles
from tests.rendering import chat_templates
from tests.training import tiny

_LENGTH = 768


@functools.cache
def tokenizer_and_model(family):
    tokenizer = chat_templates.train_tokenizer(family)
    model = tiny.config(len(tokenizer))
    return tokenizer, model, tiny.parameters(model)


def reasoning_dialogue():
    return Dialogue(
        id="r",
        messages=(
            Message(role="user", content="What is 12 plus 7?"),
            Message(role="assistant", content="<think>\nten and nine\n</think>\n\n19."),
            Message(role="user", content="And twice that?"),
            Message(role="assistant", content="<think>\n19 and 19\n</think>\n\n38."),
            Message(role="user", content="Thanks"),
            Message(role="assistant", content="<think>\npolite\n</think>\n\nYou are welcome."),
        ),
    )


def message_tree():
    """Three responses to one message, two of which begin alike, and two ways to go on after the second."""
    messages = [
        (-1, "user", "What is 12 plus 7?", 1.0),
        (0, "assistant", "<think>\nten and nine\n</think>\n\n19.", 1.0),
        (0, "assistant", "<think>\nten and ten\n</think>\n\n20.", 0.5),
        (0, "assistant", "I do not know.", 0.25),
        (2, "user", "Are you sure?", 1.0),
        (4, "assistant", "<think>\ncount again\n</think>\n\n19, sorry.", 1.0),
        (2, "user", "Thanks", 1.0),
        (6, "assistant", "You are welcome.", 2.0),
    ]
    return Dialogue(
        id="t",
        messages=tuple(Message(role=role, content=content, weight=weight) for _, role, content, weight in messages),
        parents=tuple(parent for parent, *_ in messages),
    )


def plain_dialogue(seed=0, turns=4):
    return chat_templates.random_dialogue(np.random.default_rng(seed), turns=turns)


class OnePassTest(parameterized.TestCase):
    def check(self, family, dialogues, **objective):
        """The trees of dialogues, after one pass over them in one row was found equal to K passes."""
        tokenizer, model, parameters = tokenizer_and_model(family)
        trees = tiny.trees(dialogues, tokenizer, **objective)
        batch = tiny.rows(trees, [list(range(len(trees)))[::-1]], max_length=_LENGTH)
        value, gradient = tiny.loss_and_gradient(model, parameters, batch)
        weighted = [pair for one in dialogues for pair in oracles.response_weights(one, objective, family)]
        expected, expected_gradient = oracles.k_passes(model, parameters, weighted)
        np.testing.assert_allclose(value, expected, rtol=1e-5)
        self.assertLess(tiny.largest_difference(gradient, expected_gradient), 1e-4)
        total = sum(weights.sum() for _, weights in weighted)
        np.testing.assert_allclose(
            sum(trees.tree(number).weight.sum() for number in range(len(trees))), total, rtol=1e-5
        )
        return trees, weighted

    def test_template_that_keeps_its_prefixes_gives_one_path(self):
        trees, weighted = self.check("chatml", [plain_dialogue()])
        tree = trees.tree(0)
        self.assertTrue((tree.subtree_end == len(tree.tokens)).all())
        last, _ = weighted[-1]
        self.assertEqual(tree.tokens.tolist(), last.prompt + last.tokens)

    def test_reasoning_stripped_from_history_branches_and_saves_tokens(self):
        trees, weighted = self.check("qwen3", [reasoning_dialogue()])
        tree = trees.tree(0)
        self.assertFalse((tree.subtree_end == len(tree.tokens)).all())
        self.assertLess(len(tree.tokens), sum(len(one.prompt + one.tokens) for one, _ in weighted))

    @parameterized.parameters("chatml", "qwen3")
    def test_message_tree_shares_what_its_responses_share(self, family):
        trees, weighted = self.check(family, [message_tree()])
        self.assertLen(weighted, 5)
        self.assertLess(len(trees.tree(0).tokens), sum(len(one.prompt + one.tokens) for one, _ in weighted))

    @parameterized.parameters(
        {"turn_discount": 0.5},
        {"turn_weights": (0.25, 2.0), "normalize": "turn"},
        {"turn_discount": 2.0, "normalize": "dialogue"},
        {"name": "last", "normalize": "turn"},
        {"name": "roles", "normalize": "dialogue", "turn_weights": (1.0, 0.0, 3.0)},
    )
    def test_weightings_of_packed_dialogues(self, **objective):
        reasoning = reasoning_dialogue()
        messages = [dataclasses.replace(m, weight=0.5) if i == 3 else m for i, m in enumerate(reasoning.messages)]
        weighted_dialogue = dataclasses.replace(reasoning, messages=tuple(messages))
        self.check("qwen3", [weighted_dialogue, plain_dialogue(1, turns=2)], **objective)


class SharedPrefixTest(parameterized.TestCase):
    @parameterized.parameters(("chatml", "conditional"), ("qwen3", "conditional"), ("qwen3", "joint"))
    def test_a_shared_system_prompt_changes_nothing_but_the_tokens(self, family, name):
        tokenizer, model, parameters = tokenizer_and_model(family)
        kind = Message(role="system", content="Be kind and answer in one sentence, please.", weight=0.5)
        terse = Message(role="system", content="No.", weight=1.0)
        dialogues = [
            Dialogue(id=n, messages=(system, *dialogue.messages))
            for n, (system, dialogue) in enumerate(
                [
                    (kind, plain_dialogue(1, turns=1)),
                    (terse, plain_dialogue(2, turns=1)),
                    (kind, reasoning_dialogue()),
                    (kind, plain_dialogue(3, turns=2)),
                ]
            )
        ]
        results = []
        for share in (False, True):
            prepared = dataset.prepare(
                dialogues,
                Renderer(tokenizer),
                TreeConfig(objective=ObjectiveConfig(name=name), max_length=512, share_prefixes=share),
            )
            batch = tiny.rows(prepared, [[0, 1, 2, 3]], max_length=_LENGTH)
            results.append((int((batch.segment > 0).sum()), *tiny.loss_and_gradient(model, parameters, batch)))
        (tokens, value, gradient), (fewer, shared_value, shared_gradient) = results
        preamble = tokenizer.apply_chat_template([kind.as_dict()], tokenize=True)["input_ids"]
        self.assertGreaterEqual(tokens - fewer, 2 * len(preamble))
        np.testing.assert_allclose(shared_value, value, rtol=1e-5)
        self.assertLess(tiny.largest_difference(shared_gradient, gradient), 1e-4)


class CausalityTest(absltest.TestCase):
    def test_the_last_user_message_does_not_move_the_first_response(self):
        tokenizer, model, parameters = tokenizer_and_model("chatml")
        records = [
            {
                "messages": [
                    {"role": "user", "content": "Hello there"},
                    {"role": "assistant", "content": "Good morning"},
                    {"role": "user", "content": last},
                    {"role": "assistant", "content": "Yes"},
                ]
            }
            for last in ("Is it raining today?", "Is it snowing today?")
        ]
        prepared = tiny.trees(parse_records(records), tokenizer)
        lengths, _ = prepared.sizes()

        def by_turn(tree):
            batch = tiny.rows(prepared, [[tree]], max_length=_LENGTH)
            hidden = decoder.hidden_states(model, parameters, batch.tokens, batch.position, batch.subtree_end)
            targets = loss.Targets(batch.source, batch.target, batch.weight)
            scores = loss.score_targets(hidden, decoder.unembedding(model, parameters), targets)
            return [scores.nll[0][(batch.turn[0] == turn) & (batch.weight[0] > 0)] for turn in (0, 1)]

        first, second = by_turn(0), by_turn(1)
        np.testing.assert_array_equal(first[0], second[0])
        self.assertGreater(float(np.abs(first[1] - second[1]).max()), 1e-3)
        self.assertGreater(int(lengths[0]), 20)

    def test_no_gradient_reaches_a_token_that_is_no_ancestor(self):
        tokenizer, _, parameters = tokenizer_and_model("qwen3")
        prepared = tiny.trees([reasoning_dialogue(), plain_dialogue()], tokenizer)
        batch = tiny.rows(prepared, [[1, 0]], max_length=_LENGTH)
        length = _LENGTH
        tree = prepared.tree(0)
        offset = len(prepared.tree(1).tokens)
        tokens = jnp.asarray(batch.tokens)

        def one_target(embedded, target):
            # A row-sized table of embeddings makes each token's own input a separate row.
            own = parameters | {"embedding": embedded}
            hidden = decoder.hidden_states(
                tiny.config(length), own, jnp.arange(length)[None], batch.position, batch.subtree_end
            )
            return jnp.sum(hidden[0, offset + jnp.asarray(tree.parent)[target]])

        embedded = parameters["embedding"][tokens[0]]
        reach = jax.jit(jax.grad(one_target))
        for target in np.flatnonzero(tree.weight > 0)[::7]:
            gradient = reach(embedded, target)
            reached = np.flatnonzero(np.abs(gradient).sum(axis=1))
            context, node = [], int(tree.parent[target])
            while node >= 0:
                context.append(offset + node)
                node = int(tree.parent[node])
            np.testing.assert_array_equal(reached, context[::-1])


class JointTest(absltest.TestCase):
    def test_joint_minus_the_prompt_equals_conditional(self):
        tokenizer, model, parameters = tokenizer_and_model("chatml")
        dialogue = plain_dialogue(3)
        joint = tiny.rows(tiny.trees([dialogue], tokenizer, name="joint"), [[0]], max_length=_LENGTH)
        conditional = tiny.rows(tiny.trees([dialogue], tokenizer), [[0]], max_length=_LENGTH)
        prompt = batches.Batch(*joint)._replace(weight=np.where(joint.turn < 0, joint.weight, 0))
        order = np.argsort(prompt.weight == 0, axis=1, kind="stable")
        prompt = prompt._replace(
            **{
                name: np.take_along_axis(getattr(prompt, name), order, axis=1)
                for name in ("source", "target", "weight", "turn")
            }
        )
        (all_value, all_gradient), (prompt_value, prompt_gradient) = (
            tiny.loss_and_gradient(model, parameters, batch) for batch in (joint, prompt)
        )
        value, gradient = tiny.loss_and_gradient(model, parameters, conditional)
        np.testing.assert_allclose(all_value - prompt_value, value, rtol=1e-5)
        self.assertLess(
            tiny.largest_difference(jax.tree.map(jnp.subtract, all_gradient, prompt_gradient), gradient), 1e-4
        )


if __name__ == "__main__":
    absltest.main()
