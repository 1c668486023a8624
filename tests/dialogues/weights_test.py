"""What each spelling of a weight does to the messages of a record, and the keys of this kind that are refused."""

import json

import hypothesis
from absl.testing import absltest, parameterized
from hypothesis import strategies as st

from dialog_jax.dialogues import parsing, weights
from dialog_jax.errors import UserError
from tests.laws import budget


def message_weights(record):
    (dialogue,) = parsing.parse_records([record])
    return [message.weight for message in dialogue.messages]


def with_fields(**fields):
    return {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", **fields}]}


class WeightsTest(parameterized.TestCase):
    def assert_refused(self, record, *parts):
        with self.assertRaises(UserError) as caught:
            message_weights(record)
        for part in ("records[0]", *parts):
            self.assertIn(part, str(caught.exception))

    @parameterized.product(
        key=("train", "training", "trainable", "loss", "loss_mask"), value=(False, 0, 0.0, True, 1, 1.0, None)
    )
    def test_switch_trains_on_a_message_or_not(self, key, value):
        expected = 1.0 if value is None or value else 0.0
        self.assertEqual(message_weights(with_fields(**{key: value})), [1.0, expected])
        if value:
            self.assertEqual(message_weights(with_fields(**{key: value, "weight": 0.5})), [1.0, 0.5])

    def test_masked_is_the_opposite(self):
        self.assertEqual(message_weights(with_fields(masked=True)), [1.0, 0.0])
        self.assertEqual(message_weights(with_fields(masked=False)), [1.0, 1.0])

    @parameterized.parameters("weight", "loss_weight", "loss_scale")
    def test_number_is_the_weight_of_a_message_and_factor_of_a_record(self, key):
        self.assertEqual(message_weights(with_fields(**{key: 0.25})), [1.0, 0.25])
        self.assertEqual(message_weights({**with_fields(weight=0.5), key: 3}), [3.0, 1.5])
        prompt = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
        self.assertEqual(message_weights({"prompt": prompt, "completion": "c", key: 2}), [2.0, 0.0, 2.0])

    @parameterized.parameters("train", "loss", "loss_mask")
    def test_record_that_is_not_trained_on_has_weight_0_in_every_message(self, key):
        self.assertEqual(message_weights({**with_fields(weight=5), key: False}), [0.0, 0.0])
        self.assertEqual(message_weights({**with_fields(weight=5), key: 1}), [1.0, 5.0])

    @parameterized.parameters(*sorted(weights.KEYS))
    def test_response_in_a_prompt_is_trained_on_if_it_says_so(self, key):
        value = 2.0 if key in weights.WEIGHTS else key not in weights.OPPOSITES
        prompt = [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b", key: value}]
        self.assertEqual(message_weights({"prompt": prompt, "completion": "c"}), [1.0, float(value) or 1.0, 1.0])

    def test_spellings_are_of_parts_too(self):
        parts = [{"text": "a", "loss": False}, {"text": "b", "loss_weight": 0.5}, {"text": "c", "loss_mask": 1}]
        (dialogue,) = parsing.parse_records([{"messages": [{"role": "assistant", "content": parts}]}])
        self.assertEqual([part.weight for part in dialogue.messages[0].parts], [0.0, 0.5, 1.0])

    # Of Axolotl, TRL, LLaMA-Factory, verl, NeMo, ms-swift and torchtune, and others of their kind.
    @parameterized.parameters(
        ("train_detail", [{"begin_offset": 0, "end_offset": 3, "train": False}]),
        ("weights", [0, 1]),
        ("loss_masks", [0, 1]),
        ("assistant_masks", [0, 1]),
        ("completion_mask", [0, 1]),
        ("mask", "User"),
        ("mask_history", True),
        ("train_on_input", False),
        ("trainOnTurn", False),
        ("no_loss", True),
        ("compute_loss", False),
        ("ignore_loss", True),
        ("is_masked", 1),
        ("sample_weight", 0.5),
        ("calculate_loss", False),
        ("train_message_indices", [1]),
        ("LossWeight", 0.5),
        ("token-weights", "1 0"),
        ("supervised", False),
    )
    def test_other_key_about_the_loss_is_refused_by_name(self, key, value):
        self.assert_refused(with_fields(**{key: value}), f"message 1 (assistant) has {key!r}", "Write weight", "rename")
        self.assert_refused({**with_fields(), key: value}, f"dialogue 0 (records[0]) has {key!r}", "rename")
        self.assertEqual(message_weights({**with_fields(**{key: None}), key: None}), [1.0, 1.0])

    def test_labels_of_tokens_are_refused_and_other_labels_are_metadata(self):
        self.assert_refused({**with_fields(), "labels": [-100, 5]}, "dialogue 0 (records[0]) has 'labels'", "rename")
        for value in (["kind"], [], "kind", 3):
            (dialogue,) = parsing.parse_records([{**with_fields(), "labels": value}])
            self.assertEqual(dialogue.metadata, {"labels": value})

    @parameterized.parameters("loss_mask", "train", "loss", "training")
    def test_switch_that_is_no_truth_value_is_refused(self, key):
        for value in ([0, 1], "false", 0.5, 2, {}):
            self.assert_refused(
                with_fields(**{key: value}), f"message 1 (assistant) has {key} ", "true or false", "weight"
            )

    def test_keys_that_contradict_each_other_are_refused(self):
        self.assert_refused(with_fields(train=True, loss=False), "train True and loss False", "contradict", "Remove")
        self.assert_refused(with_fields(weight=1, loss_weight=0.5), "weight 1 and loss_weight 0.5", "contradict")
        self.assertEqual(message_weights(with_fields(train=False, loss=0, masked=1)), [1.0, 0.0])

    def test_product_of_weights_stays_in_the_range_of_float32(self):
        self.assert_refused({**with_fields(weight=1e20), "weight": 1e20}, "weight 1e+20 in a record of weight 1e+20")
        self.assert_refused({**with_fields(weight=1e-20), "weight": 1e-20}, "Scale")

    @parameterized.parameters("training_set", "weight_kg", "trained_by", "train_split", "mask_type", "losses_2020_eur")
    def test_metadata_of_a_record_may_have_such_words(self, key):
        (dialogue,) = parsing.parse_records([{**with_fields(), key: "x"}])
        self.assertEqual(dialogue.metadata, {key: "x"})

    def test_arguments_of_tools_may_have_such_names(self):
        tool = {"type": "function", "function": {"name": "f", "parameters": {"weight": {"type": "number"}}}}
        call = {"type": "function", "function": {"name": "f", "arguments": {"train": False, "loss_mask": [1]}}}
        (dialogue,) = parsing.parse_records([{**with_fields(tool_calls=[call]), "tools": [tool]}])
        self.assertEqual(dialogue.messages[1].fields, {"tool_calls": [call]})
        self.assertEqual(dialogue.tools, (tool,))

    @budget.cases(300)
    @hypothesis.given(
        st.dictionaries(
            st.sampled_from([*sorted(weights.KEYS), "x"]),
            st.sampled_from([0, 1, True, False, 0.5, 2, None, "1"]),
            max_size=4,
        ),
        st.dictionaries(
            st.sampled_from([*sorted(weights.KEYS), "x"]),
            st.sampled_from([0, 1, True, False, 0.5, 2, None, "1"]),
            max_size=2,
        ),
    )
    def test_any_keys_give_the_product_of_their_meanings_or_are_refused(self, fields, record_fields):
        def meaning(values):
            switches = {
                bool(v) != (k == "masked")
                for k, v in values.items()
                if k in (*weights.SWITCHES, "masked") and v is not None
            }
            numbers = {float(v) for k, v in values.items() if k in weights.WEIGHTS and v is not None}
            return (min(numbers) if numbers else 1.0) * (False not in switches)

        record = json.loads(json.dumps({**with_fields(**fields), **record_fields}))
        try:
            found = message_weights(record)
        except UserError:
            return
        self.assertEqual(found, [meaning(record_fields), meaning(fields) * meaning(record_fields)])


if __name__ == "__main__":
    absltest.main()
