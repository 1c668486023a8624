"""The laws of DESIGN.md section 6 that concern loss and gradient, against K separate passes.

The oracle renders and tokenises every turn by `apply_chat_template`, runs it alone as a plain causal sequence and
takes the whole vocabulary's log-softmax at every position: no trie, no packing, no list of targets.
"""

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
from dialog_jax.trees.chunks import TreeConfig
from dialog_jax.trees.objectives import ObjectiveConfig
from tests.rendering import chat_templates
from tests.training import tiny

_LENGTH = 256


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


def alone_dialogue(dialogue, index):
    """The message and what leads to it."""
    return Dialogue(id="a", messages=tuple(dialogue.messages[i] for i in (*dialogue.ancestors(index), index)))


def plain_dialogue(seed=0, turns=4):
    return chat_templates.random_dialogue(np.random.default_rng(seed), turns=turns)


@functools.partial(jax.jit, static_argnums=0)
def packed_loss(model, parameters, batch):
    """Sum of weighted loss of [B, ...] rows."""
    hidden = decoder.hidden_states(model, parameters, batch.tokens, batch.position, batch.subtree_end)
    targets = loss.Targets(batch.source, batch.target, batch.weight)
    return loss.weighted_loss(hidden, decoder.unembedding(model, parameters), targets)[0]


def alone_nll(model, parameters, tokens):
    """-log p of every token but the first, of one sequence by itself under the causal mask.

    Zeros after its end, which it cannot see, keep the number of compilations down.
    """
    padded = jnp.zeros((1, 256), jnp.int32).at[0, : len(tokens)].set(jnp.asarray(tokens))
    return _causal_nll(model, parameters, padded)[: len(tokens) - 1]


@functools.partial(jax.jit, static_argnums=0)
def _causal_nll(model, parameters, tokens):
    length = tokens.shape[1]
    hidden = decoder.hidden_states(
        model, parameters, tokens, jnp.arange(length)[None], jnp.full((1, length), length, jnp.int32)
    )
    logits = jnp.einsum("td,vd->tv", hidden[0, :-1], decoder.unembedding(model, parameters))
    return -jnp.take_along_axis(jax.nn.log_softmax(logits), tokens[0, 1:, None], axis=1)[:, 0]


def turns_of(dialogue, tokenizer):
    """(prompt ids, response ids) of every assistant message, from the tokenizer's own chat interface."""
    found = []
    for index, message in enumerate(dialogue.messages):
        if message.role != "assistant":
            continue
        dicts = [entry.as_dict() for entry in dialogue.messages]
        prompt = tokenizer.apply_chat_template(dicts[:index], add_generation_prompt=True, tokenize=False)
        whole = tokenizer.apply_chat_template(dicts[: index + 1], tokenize=False)
        prompt_ids = tokenizer(prompt, add_special_tokens=False)["input_ids"]
        response_ids = tokenizer(whole, add_special_tokens=False)["input_ids"][len(prompt_ids) :]
        stop = tokenizer.convert_tokens_to_ids("<|im_end|>")
        found.append((prompt_ids, response_ids[: response_ids.index(stop) + 1]))
    return found


def k_pass_loss(model, tokenizer, dialogues, parameters):
    total = 0.0
    for dialogue in dialogues:
        for prompt, response in turns_of(dialogue, tokenizer):
            total += alone_nll(model, parameters, prompt + response)[len(prompt) - 1 :].sum()
    return total


class OnePassTest(parameterized.TestCase):
    @parameterized.named_parameters(
        ("prefix_preserving_template", "chatml", plain_dialogue()),
        ("reasoning_stripped_from_history", "qwen3", reasoning_dialogue()),
    )
    def test_one_pass_equals_k_passes(self, family, dialogue):
        tokenizer, model, parameters = tokenizer_and_model(family)
        prepared = tiny.trees([dialogue], tokenizer)
        batch = tiny.rows(prepared, [[0]], max_length=_LENGTH)
        value, gradient = jax.value_and_grad(functools.partial(packed_loss, model))(parameters, batch)
        expected, expected_gradient = jax.value_and_grad(
            lambda parameters: k_pass_loss(model, tokenizer, [dialogue], parameters)
        )(parameters)
        np.testing.assert_allclose(value, expected, rtol=1e-5)
        self.assertLess(tiny.largest_difference(gradient, expected_gradient), 1e-4)

    def test_reasoning_branches_and_saves_tokens(self):
        tokenizer, _, _ = tokenizer_and_model("qwen3")
        prepared = tiny.trees([reasoning_dialogue()], tokenizer)
        tree = prepared.tree(0)
        self.assertFalse((tree.subtree_end == len(tree.tokens)).all())
        separate = sum(len(prompt) + len(response) for prompt, response in turns_of(reasoning_dialogue(), tokenizer))
        self.assertLess(len(tree.tokens), separate)

    @parameterized.parameters("chatml", "qwen3")
    def test_message_tree_equals_its_responses_one_by_one(self, family):
        tokenizer, model, parameters = tokenizer_and_model(family)
        dialogue = message_tree()
        prepared = tiny.trees([dialogue], tokenizer)
        batch = tiny.rows(prepared, [[0]], max_length=_LENGTH)
        value, gradient = jax.value_and_grad(functools.partial(packed_loss, model))(parameters, batch)
        alone = [
            (alone_dialogue(dialogue, index), message.weight)
            for index, message in enumerate(dialogue.messages)
            if message.role == "assistant"
        ]
        self.assertLess(
            len(prepared.tree(0).tokens),
            sum(len(prompt + response) for one, _ in alone for prompt, response in turns_of(one, tokenizer)[-1:]),
        )

        def separately(parameters):
            total = 0.0
            for one, weight in alone:
                prompt, response = turns_of(one, tokenizer)[-1]
                total += weight * alone_nll(model, parameters, prompt + response)[len(prompt) - 1 :].sum()
            return total

        expected, expected_gradient = jax.value_and_grad(separately)(parameters)
        np.testing.assert_allclose(value, expected, rtol=1e-5)
        self.assertLess(tiny.largest_difference(gradient, expected_gradient), 1e-4)


def k_pass_weights(dialogue, responses, objective):
    """The weight of each token of each response, as the README says it."""
    weights = []
    count = len(responses)
    messages = [message for message in dialogue.messages if message.role == "assistant"]
    for k, (message, response) in enumerate(zip(messages, responses, strict=True)):
        weight = message.weight * objective.get("turn_discount", 1.0) ** (count - 1 - k)
        if schedule := objective.get("turn_weights"):
            weight *= schedule[min(k, len(schedule) - 1)]
        if objective.get("name") == "last" and k < count - 1:
            weight = 0.0
        if objective.get("normalise") == "turn":
            weight /= len(response)
        weights.append(np.full(len(response), weight))
    if objective.get("normalise") == "dialogue":
        total = sum(weight.sum() for weight in weights)
        weights = [weight / total for weight in weights]
    return weights


class WeightsTest(parameterized.TestCase):
    @parameterized.product(
        family=("chatml", "qwen3"),
        objective=(
            {"turn_discount": 0.5},
            {"turn_weights": (0.25, 2.0), "normalise": "turn"},
            {"turn_discount": 2.0, "normalise": "dialogue"},
            {"name": "last", "normalise": "turn"},
            {"name": "roles", "normalise": "dialogue", "turn_weights": (1.0, 0.0, 3.0)},
        ),
    )
    def test_every_weighting_of_packed_dialogues_equals_k_passes(self, family, objective):
        tokenizer, model, parameters = tokenizer_and_model(family)
        reasoning = reasoning_dialogue()
        messages = [dataclasses.replace(m, weight=0.5) if i == 3 else m for i, m in enumerate(reasoning.messages)]
        dialogues = [dataclasses.replace(reasoning, messages=tuple(messages)), plain_dialogue(1, turns=2)]
        prepared = tiny.trees(dialogues, tokenizer, **objective)
        value = packed_loss(model, parameters, tiny.rows(prepared, [[1, 0]], max_length=768))
        expected, total = 0.0, 0.0
        for dialogue in dialogues:
            turns = turns_of(dialogue, tokenizer)
            for (prompt, response), weight in zip(
                turns, k_pass_weights(dialogue, [response for _, response in turns], objective), strict=True
            ):
                expected += weight @ alone_nll(model, parameters, prompt + response)[len(prompt) - 1 :]
                total += weight.sum()
        np.testing.assert_allclose(value, expected, rtol=1e-5)
        weights = [prepared.tree(number).weight.sum() for number in range(2)]
        np.testing.assert_allclose(sum(weights), total, rtol=1e-5)


class PackingTest(absltest.TestCase):
    def test_a_row_equals_its_dialogues_alone(self):
        tokenizer, model, parameters = tokenizer_and_model("chatml")
        prepared = tiny.trees([plain_dialogue(seed, turns=2) for seed in range(4)], tokenizer)
        together = tiny.rows(prepared, [[2, 0, 3], [1]], max_length=768)
        run = jax.jit(jax.value_and_grad(functools.partial(packed_loss, model)))
        value, gradient = run(parameters, together)
        alone = [run(parameters, tiny.rows(prepared, [[tree]], max_length=_LENGTH)) for tree in range(4)]
        np.testing.assert_allclose(value, sum(part[0] for part in alone), rtol=1e-5)
        summed = jax.tree.map(lambda *leaves: sum(leaves), *[part[1] for part in alone])
        self.assertLess(tiny.largest_difference(gradient, summed), 1e-4)


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
        run = jax.jit(jax.value_and_grad(functools.partial(packed_loss, model)))
        results = []
        for share in (False, True):
            prepared = dataset.prepare(
                dialogues,
                Renderer(tokenizer),
                TreeConfig(objective=ObjectiveConfig(name=name), max_length=512, share_prefixes=share),
            )
            batch = tiny.rows(prepared, [[0, 1, 2, 3]], max_length=768)
            results.append((int((batch.segment > 0).sum()), *run(parameters, batch)))
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
        batch = tiny.rows(prepared, [[1, 0]], max_length=768)
        length = 768
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
        run = jax.jit(jax.value_and_grad(functools.partial(packed_loss, model)))
        (all_value, all_gradient), (prompt_value, prompt_gradient) = run(parameters, joint), run(parameters, prompt)
        value, gradient = run(parameters, conditional)
        np.testing.assert_allclose(all_value - prompt_value, value, rtol=1e-5)
        self.assertLess(
            tiny.largest_difference(jax.tree.map(jnp.subtract, all_gradient, prompt_gradient), gradient), 1e-4
        )


if __name__ == "__main__":
    absltest.main()
