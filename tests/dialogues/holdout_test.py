"""The division into training and held-out dialogues: a law of each dialogue alone."""

import dataclasses

from absl.testing import absltest, parameterized

from dialog_jax.dialogues.dialogue import Dialogue, Message
from dialog_jax.dialogues.holdout import is_held_out


def dialogue(number, **fields):
    messages = (Message(role="user", content=f"{number}?"), Message(role="assistant", content=f"{number}!"))
    return Dialogue(id=number, messages=messages, **fields)


def held_out(dialogues, share):
    return [each.messages[0].content for each in dialogues if is_held_out(each, share)]


class HoldoutTest(parameterized.TestCase):
    @parameterized.parameters(0.05, 0.3)
    def test_share_of_many_dialogues_is_held_out(self, share):
        count = 4000
        deviation = (count * share * (1 - share)) ** 0.5
        self.assertBetween(
            len(held_out(map(dialogue, range(count)), share)),
            share * count - 4 * deviation,
            share * count + 4 * deviation,
        )

    def test_reordering_and_adding_dialogues_moves_none(self):
        few, many = [dialogue(number) for number in range(200)], [dialogue(number) for number in range(1000)]
        self.assertEqual(held_out(many, 0.1)[: len(held_out(few, 0.1))], held_out(few, 0.1))
        self.assertCountEqual(held_out(reversed(many), 0.1), held_out(many, 0.1))

    def test_smaller_share_holds_out_a_subset(self):
        many = [dialogue(number) for number in range(1000)]
        self.assertContainsSubset(held_out(many, 0.05), held_out(many, 0.1))

    def test_choice_depends_on_the_content_and_not_on_names_or_weights(self):
        for number in range(50):
            one = dialogue(number)
            same = dataclasses.replace(one, id="x", where="other.jsonl:1", metadata={"a": 1})
            weighted = tuple(dataclasses.replace(message, weight=0.5) for message in one.messages)
            self.assertEqual(is_held_out(one, 0.5), is_held_out(same, 0.5))
            self.assertEqual(is_held_out(one, 0.5), is_held_out(dataclasses.replace(one, messages=weighted), 0.5))
        with_tools = [is_held_out(dialogue(number, tools=({"name": "f"},)), 0.5) for number in range(50)]
        self.assertNotEqual(with_tools, [is_held_out(dialogue(number), 0.5) for number in range(50)])

    def test_choice_is_the_same_in_every_version_and_process(self):
        # Literal: a change of the hash would move dialogues of data sets that have been trained on.
        self.assertEqual(held_out(map(dialogue, range(40)), 0.1), ["6?", "7?", "10?", "28?"])

    def test_text_that_is_no_unicode_has_a_side(self):
        broken = Dialogue(id=0, messages=(Message(role="user", content="\ud800"),))
        self.assertIn(is_held_out(broken, 0.5), (True, False))


if __name__ == "__main__":
    absltest.main()
