"""Weights of objectives, token by token, on dialogues small enough to write out."""

import numpy as np
from absl.testing import absltest, parameterized

from dialog_jax.dialogues.dialogue import Dialogue, Message, Part
from dialog_jax.rendering import sequences
from dialog_jax.trees import dataset
from dialog_jax.trees.dialogue_trees import TreeConfig
from dialog_jax.trees.objectives import ObjectiveConfig
from tests.rendering import chat_templates


def said(*messages):
    made = [Message(role=role, content=content, weight=float(*weight or [1])) for role, content, *weight in messages]
    return Dialogue(id=0, messages=tuple(made), where="said.jsonl:1")


_DIALOGUE = (("user", "a"), ("assistant", "bb"), ("user", "c"), ("assistant", "ddd"), ("user", "e"))
# A letter a token: U and A open a message, E ends its turn, n is the line break behind it. Under it weights, h is 0.5.
# fmt: off
_TOKENS =      "UaEnAbbEnUcEnAdddEnUeEn"
_CONDITIONAL = "00000111000000111100000"
_JOINT =       "01111111111111111111111"
_LAST =        "00000000000000111100000"
_USER =        "01100000001100000000110"
_BOTH =        "01100111001100111100110"
_TURN =        "-----000------1111-----"
# fmt: on
_TEMPLATE = (
    "{% for m in messages %}{{ '<|im_start|>' if m.role == 'user' else '<|endoftext|>' }}{{ m.content }}<|im_end|>"
    "{{ '\\n' }}{% endfor %}{{ '<|endoftext|>' if add_generation_prompt }}"
)


def renderer():
    """Of a tokenizer that has a token for each letter, and of a template with one token before a message."""
    tokenizer = chat_templates.train_tokenizer.__wrapped__("chatml")
    tokenizer.backend_tokenizer.model.dropout = 1.0  # no merge is ever made
    tokenizer.chat_template = _TEMPLATE
    return sequences.Renderer(tokenizer)


def tree_of(messages, **objective):
    config = ObjectiveConfig(**objective)
    trees = dataset.prepare([said(*messages)], renderer(), TreeConfig(objective=config, max_length=64))
    return trees.tree(0)


def numbers(picture):
    return np.array([{"h": 0.5, "-": -1}.get(letter) or int(letter) for letter in picture])


def padded(weights):
    """Trees end with their last target, pictures with the dialogue."""
    return np.pad(np.asarray(weights, np.float64), (0, len(_TOKENS) - len(weights)))


class SuperviseTest(parameterized.TestCase):
    def check(self, picture, messages=_DIALOGUE, **objective):
        np.testing.assert_allclose(padded(tree_of(messages, **objective).weight), numbers(picture), rtol=1e-6)

    def test_picture_is_of_the_tokens(self):
        letters = {"<|im_start|>": "U", "<|endoftext|>": "A", "<|im_end|>": "E", "\n": "n"}
        tokenizer = chat_templates.train_tokenizer("chatml")
        texts = [tokenizer.decode([token]) for token in tree_of(_DIALOGUE, name="joint").tokens]
        self.assertEqual("".join(letters.get(text, text) for text in texts), _TOKENS)

    def test_conditional_trains_responses_with_their_end_of_turn(self):
        self.check(_CONDITIONAL)

    def test_joint_trains_every_token_but_the_first(self):
        self.check(_JOINT, name="joint")

    def test_last_trains_the_last_response(self):
        self.check(_LAST, name="last")

    def test_roles_train_the_messages_named(self):
        self.check(_CONDITIONAL, name="roles")
        self.check(_USER, name="roles", roles=("user",))
        self.check(_BOTH, name="roles", roles=("user", "assistant"))

    def test_turns_are_counted_where_a_response_is(self):
        np.testing.assert_array_equal(tree_of(_DIALOGUE, name="joint").turn, numbers(_TURN))

    def test_joint_less_its_prompt_side_is_conditional(self):
        joint, conditional = tree_of(_DIALOGUE, name="joint"), tree_of(_DIALOGUE)
        np.testing.assert_array_equal(np.where(joint.turn >= 0, joint.weight, 0), padded(conditional.weight))

    def test_weights_of_messages_multiply(self):
        messages = (
            ("user", "a", 3),
            ("assistant", "bb", 0.5),
            ("user", "c", 0),
            ("assistant", "ddd", 2),
            ("user", "e"),
        )
        # fmt: off
        #           UaEnAbbEnUcEnAdddEnUeEn
        self.check("00000hhh000000222200000", messages)
        self.check("03311hhh110011222211111", messages, name="joint")
        self.check("03300000000000000000110", messages, name="roles", roles=("user",))
        # fmt: on

    def test_an_untrained_response_weighs_nothing_whatever_the_objective(self):
        messages = (("user", "a"), ("assistant", "bb"), ("user", "c"), ("assistant", "ddd", 0), ("user", "e"))
        # fmt: off
        #           UaEnAbbEnUcEnAdddEnUeEn
        self.check("00000111000000000000000", messages)
        self.check("01111111111111000011111", messages, name="joint")
        self.check("01100111001100000000110", messages, name="roles", roles=("user", "assistant"))
        self.check("00000111000000000000000", messages, name="last")
        # fmt: on

    def test_turn_discount_leaves_the_last_turn_and_discounts_those_before(self):
        three = (*_DIALOGUE, ("assistant", "f"))
        weight = tree_of(three, turn_discount=0.5).weight
        np.testing.assert_array_equal(weight[weight > 0], [0.25] * 3 + [0.5] * 4 + [1] * 2)

    @parameterized.parameters(
        ((0.25,), [0.25] * 3 + [0.25] * 4 + [0.25] * 2),
        ((1.0, 0.5), [1] * 3 + [0.5] * 4 + [0.5] * 2),
        ((0.0, 2.0, 3.0, 4.0), [2] * 4 + [3] * 2),
    )
    def test_turn_weights_are_of_turns_from_the_first_and_the_last_one_goes_on(self, schedule, expected):
        weight = tree_of((*_DIALOGUE, ("assistant", "f")), turn_weights=schedule).weight
        np.testing.assert_array_equal(weight[weight > 0], expected)

    @parameterized.parameters(
        ({}, "00000hhh000000011h00000"),
        ({"name": "joint"}, "01111hhh111111011h11211"),
        ({"name": "roles", "roles": ("user",)}, "01100000001100000000210"),
    )
    def test_weights_of_parts_multiply(self, objective, picture):
        tree = self.tree_with_parts(**objective)
        np.testing.assert_allclose(padded(tree.weight), numbers(picture), rtol=1e-6)

    def test_normalize_turn_makes_what_is_outside_responses_sum_to_one(self):
        weight = tree_of(_DIALOGUE, name="joint", normalize="turn").weight
        outside = numbers(_JOINT) - numbers(_CONDITIONAL)
        expected = outside / outside.sum()
        expected[5:8], expected[14:18] = 1 / 3, 1 / 4
        np.testing.assert_allclose(padded(weight), expected, rtol=1e-6)

    def test_normalize_turn_keeps_the_ratio_of_parts(self):
        weight = self.tree_with_parts(normalize="turn").weight
        expected = [0.5 / 3] * 3 + [0.5 / 2.5, 0.5 / 2.5, 0.25 / 2.5]
        np.testing.assert_allclose(weight[weight > 0], expected, rtol=1e-6)

    def tree_with_parts(self, **objective):
        messages = list(said(("user", "a"), ("assistant", "bb", 0.5), ("user", "c")).messages)
        parts = (Part(text="d", weight=0.0), Part(text="dd", weight=2.0))
        messages.append(Message(role="assistant", content="ddd", weight=0.5, parts=parts))
        messages.append(Message(role="user", content="e", parts=(Part(text="e", weight=2.0),)))
        dialogue = Dialogue(id=0, messages=tuple(messages))
        config = ObjectiveConfig(**objective)
        return dataset.prepare([dialogue], renderer(), TreeConfig(objective=config, max_length=64)).tree(0)

    @parameterized.parameters(
        ("turn", {}, [1 / 3] * 3 + [1 / 4] * 4),
        ("turn", {"turn_discount": 0.5}, [0.5 / 3] * 3 + [1 / 4] * 4),
        ("dialogue", {}, [1 / 7] * 7),
        ("dialogue", {"turn_discount": 0.5}, [0.5 / 5.5] * 3 + [1 / 5.5] * 4),
        ("dialogue", {"name": "last"}, [1 / 4] * 4),
    )
    def test_normalize_rescales(self, unit, objective, expected):
        weight = tree_of(_DIALOGUE, normalize=unit, **objective).weight
        np.testing.assert_allclose(weight[weight > 0], expected, rtol=1e-6)

    def test_normalize_turn_keeps_the_message_s_weight_as_the_sum(self):
        weighted = (("user", "a"), ("assistant", "bb", 0.5), ("user", "c"), ("assistant", "ddd", 2))
        weight = tree_of(weighted, normalize="turn").weight
        np.testing.assert_allclose(weight[weight > 0], [0.5 / 3] * 3 + [2 / 4] * 4, rtol=1e-6)


class BranchingTest(parameterized.TestCase):
    def trees(self, seed, **objective):
        rng = np.random.default_rng(seed)
        dialogue = chat_templates.random_dialogue(rng, turns=5, system=True, reasoning=True)
        made = sequences.Renderer(chat_templates.train_tokenizer("qwen3"))
        trees = dataset.prepare([dialogue], made, TreeConfig(objective=ObjectiveConfig(**objective), max_length=10_000))
        return dialogue, trees.tree(0)

    @parameterized.parameters(range(5))
    def test_conditional_supervises_no_history_that_is_rendered_anew(self, seed):
        dialogue, tree = self.trees(seed)
        tokenizer = chat_templates.train_tokenizer("qwen3")
        self.assertFalse((tree.subtree_end == len(tree.tokens)).all())
        messages = [message.as_dict() for message in dialogue.messages]
        responses = [k for k, message in enumerate(messages) if message["role"] == "assistant"]
        for turn, k in enumerate(responses):
            prompt = tokenizer.apply_chat_template(messages[:k], add_generation_prompt=True)["input_ids"]
            text = tokenizer.apply_chat_template(messages[: k + 1], tokenize=False)
            nodes = np.flatnonzero(tree.turn == turn)
            self.assertEqual(tree.position[nodes[0]], len(prompt))
            np.testing.assert_array_equal(tree.weight[nodes], 1)
            own = tokenizer.decode(tree.tokens[nodes])
            self.assertEndsWith(text.removesuffix("\n"), own)
            self.assertStartsWith(own, "<think>")
        np.testing.assert_array_equal(tree.weight[tree.turn < 0], 0)

    @parameterized.parameters(range(3))
    def test_joint_trains_every_token_of_the_tree_but_its_root(self, seed):
        _, tree = self.trees(seed, name="joint")
        np.testing.assert_array_equal(tree.weight, tree.parent >= 0)

    def test_joint_trains_history_rendered_anew_with_its_message_s_weight(self):
        def response(word, weight):
            return Message(role="assistant", content=f"<think>\nhm {word}\n</think>\n\n{word}.", weight=weight)

        messages = []
        for number, word, weight in ((1, "twelve", 0.5), (2, "thirteen", 0.0), (3, "fourteen", 1.0)):
            messages += [Message(role="user", content=f"What is {number}?"), response(word, weight)]
        dialogue = Dialogue(id=0, messages=tuple(messages))
        made = sequences.Renderer(chat_templates.train_tokenizer("qwen3"))
        config = ObjectiveConfig(name="joint")
        tree = dataset.prepare([dialogue], made, TreeConfig(objective=config, max_length=1000)).tree(0)

        tokenizer = chat_templates.train_tokenizer("qwen3")
        dicts = [message.as_dict() for message in messages]
        text = tokenizer.apply_chat_template(dicts, tokenize=False)
        expected = np.ones(len(text))
        expected[0] = 0
        for word, weight in (("twelve", 0.5), ("thirteen", 0.0)):
            begin = text.index(f"{word}.<")
            expected[begin : begin + len(f"{word}.<|im_end|>")] = weight
        node, walked = -1, ""
        for token in tokenizer(text, add_special_tokens=False)["input_ids"]:
            node = int(np.flatnonzero((tree.parent == node) & (tree.tokens == token))[0])
            begin = len(walked)
            walked += tokenizer.decode([token])
            self.assertEqual(tree.weight[node], expected[begin], walked)
        self.assertEqual(walked, text)


class ConfigTest(parameterized.TestCase):
    @parameterized.parameters(
        ({"name": "all"}, "name is 'all'.*conditional, joint, last, roles"),
        ({"normalize": "batch"}, "normalize is 'batch'.*token, turn, dialogue"),
        ({"roles": ("user", "bot")}, "roles is .*'bot'.*system, user, assistant, tool"),
        ({"roles": ()}, "roles is"),
        ({"turn_discount": 0.0}, "turn_discount is 0.0.*above 0"),
        ({"turn_discount": float("inf")}, "turn_discount is inf.*finite"),
        ({"turn_weights": (1.0, -1.0)}, "turn_weights is .*-1.0.*>= 0"),
        ({"turn_weights": (float("nan"),)}, "turn_weights is .*nan.*>= 0"),
        ({"turn_weights": (1.0,), "turn_discount": 0.5}, "turn_discount and .*two schedules"),
        ({"merge_weights": "mean"}, "merge_weights is 'mean'.*max, sum"),
        ({"turn_discount": float("nan")}, "turn_discount is nan"),
    )
    def test_a_wrong_value_names_itself_and_the_right_ones(self, values, message):
        with self.assertRaisesRegex(ValueError, "objective." + message):
            ObjectiveConfig(**values)


if __name__ == "__main__":
    absltest.main()
