"""Laws of weights: what they sum to, and what one objective has in common with another."""

import hypothesis
import numpy as np
from absl.testing import absltest, parameterized
from hypothesis import strategies as st

from tests.laws import budget, oracles, strategies
from tests.laws.targets_test import prepare
from tests.rendering import chat_templates

_NAMES = ("conditional", "joint", "last", "roles")
_FAMILIES = ("chatml", "llama3", "qwen3", "gemma")


def weights_of(tree, *, responses):
    """{prefix: weight} of the targets in responses, or outside of them."""
    return {
        (*context, token): weight
        for context, token, weight, turn in oracles.tree_targets(tree)
        if (turn >= 0) == responses
    }


class SumsTest(parameterized.TestCase):
    @parameterized.parameters(*_FAMILIES)
    @budget.cases(12)
    @hypothesis.given(data=st.data())
    def test_each_dialogue_sums_to_one(self, family, data):
        dialogues = strategies.parsed(
            data.draw(st.lists(strategies.records(family, kind="words"), max_size=3, min_size=1))
        )
        objective = data.draw(strategies.objectives) | {"normalize": "dialogue"}
        trees = prepare(dialogues, family, **objective | {"name": data.draw(st.sampled_from(_NAMES))})
        for number in range(0 if trees is None else len(trees)):
            self.assertAlmostEqual(float(trees.tree(number).weight.sum(dtype=np.float64)), 1, places=5)

    @parameterized.parameters(*_FAMILIES)
    @budget.cases(12)
    @hypothesis.given(data=st.data())
    def test_each_response_sums_to_its_weight_and_the_rest_to_one(self, family, data):
        dialogues = strategies.parsed([data.draw(strategies.lists(family, kind="words"))])
        name = data.draw(st.sampled_from(_NAMES))
        trees = prepare(dialogues, family, name=name, roles=("user", "assistant"), normalize="turn")
        if trees is None:
            return
        turns = oracles.trained_turns(dialogues[0], range(len(dialogues[0].messages)))
        expected = {turn: dialogues[0].messages[m].weight for m, turn in turns.items()}
        if name == "last":
            expected = {turn: weight for turn, weight in expected.items() if turn == max(expected)}
        tree = trees.tree(0)
        for turn, weight in expected.items():
            self.assertAlmostEqual(float(tree.weight[tree.turn == turn].sum()), weight, places=4)
        if (outside := float(tree.weight[tree.turn < 0].sum())) or name == "joint":
            self.assertAlmostEqual(outside, 1, places=4)


class JointTest(parameterized.TestCase):
    @parameterized.parameters(*_FAMILIES)
    @budget.cases(15)
    @hypothesis.given(data=st.data())
    def test_joint_less_the_rest_is_conditional(self, family, data):
        dialogues = strategies.parsed([data.draw(strategies.records(family))])
        joint = prepare(dialogues, family, name="joint")
        conditional = prepare(dialogues, family)
        of_responses = {} if conditional is None else weights_of(conditional.tree(0), responses=True)
        self.assertEqual({} if joint is None else weights_of(joint.tree(0), responses=True), of_responses)

    @parameterized.parameters(*chat_templates.FAMILIES)
    @budget.cases(10)
    @hypothesis.given(data=st.data())
    def test_joint_trains_every_token_but_the_first(self, family, data):
        record = data.draw(strategies.lists(family, weighted=False))
        tree = prepare(strategies.parsed([record]), family, name="joint").tree(0)
        np.testing.assert_array_equal(tree.weight, tree.parent >= 0)

    @parameterized.parameters(*_FAMILIES)
    @budget.cases(10)
    @hypothesis.given(data=st.data())
    def test_conditional_is_the_role_of_the_assistant(self, family, data):
        dialogues = strategies.parsed([data.draw(strategies.records(family))])
        first, second = prepare(dialogues, family), prepare(dialogues, family, name="roles", roles=("assistant",))
        self.assertEqual(first is None, second is None)
        if first is not None:
            np.testing.assert_array_equal(first.tokens, second.tokens)
            np.testing.assert_array_equal(first.weight, second.weight)


class MessagesTest(absltest.TestCase):
    """Of ChatML, whose text is written out here: what each of its bytes weighs under `joint` and `roles`."""

    @budget.cases(120)
    @hypothesis.given(data=st.data())
    def test_each_message_has_its_own_weight(self, data):
        record = data.draw(strategies.lists("chatml", kind="parts"))
        (dialogue,) = strategies.parsed([record])
        objective = data.draw(st.sampled_from([{"name": "joint"}, {"name": "roles", "roles": ("user", "tool")}]))
        objective |= data.draw(st.sampled_from([{}, {"turn_discount": 0.5}, {"turn_weights": (0.25, 0.0, 2.0)}]))
        trees = prepare([dialogue], "chatml", **objective)
        weights = byte_weights(dialogue, objective)
        text = chat_templates.train_tokenizer("chatml").apply_chat_template(record_messages(dialogue), tokenize=False)
        tokens, ends = tokens_and_ends(text)
        self.assertEqual(ends[-1], len(weights))
        expected = [0.0, *(weights[end - 1] for end in ends[1:])]
        if trees is None:
            self.assertFalse(any(expected))
            return
        tree = trees.tree(0)
        last = max(place for place, weight in enumerate(expected) if weight) + 1
        np.testing.assert_array_equal(tree.tokens[:last], tokens[:last])
        np.testing.assert_allclose(tree.weight, [*expected, 0.0][: len(tree.weight)], rtol=1e-6)


def record_messages(dialogue):
    return [{"role": message.role, "content": message.content} for message in dialogue.messages]


def byte_weights(dialogue, objective):
    """The weight of each byte of a ChatML rendering."""
    around = float(objective["name"] == "joint")
    turns = oracles.trained_turns(dialogue, range(len(dialogue.messages)))
    weights = []
    if dialogue.messages[0].role != "system":
        weights += [around] * len("<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n")
    for index, message in enumerate(dialogue.messages):
        weight = message.weight
        if index in turns:
            weight *= oracles.schedule(objective, turns[index], max(turns.values()))
        if objective["name"] == "roles" and message.role not in objective["roles"]:
            weight = 0.0
        weights += [around] * len(f"<|im_start|>{message.role}\n")
        for text, factor in [(part.text, part.weight) for part in message.parts] or [(message.content, 1.0)]:
            weights += [weight * factor] * len(text.encode())
        weights += [weight] * len("<|im_end|>") + [around]
    return weights


def tokens_and_ends(text):
    """(token ids, the byte at which each ends)."""
    tokenizer = chat_templates.train_tokenizer("chatml")
    ids = tokenizer.encode(text, add_special_tokens=False)
    return ids, np.cumsum([len(token) for token in tokenizer.convert_ids_to_tokens(ids)]).tolist()


if __name__ == "__main__":
    absltest.main()
