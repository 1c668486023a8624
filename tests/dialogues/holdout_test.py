"""The division into training and held-out dialogues: a law of each dialogue alone."""

import dataclasses

from absl.testing import absltest, parameterized

from dialog_jax.dialogues.dialogue import Dialogue, Message
from dialog_jax.dialogues.holdout import find_limit, hash_dialogue
from dialog_jax.errors import UserError


def dialogue(number, **fields):
    messages = (Message(role="user", content=f"{number}?"), Message(role="assistant", content=f"{number}!"))
    return Dialogue(id=number, messages=messages, **fields)


def held_out(dialogues, share):
    dialogues = list(dialogues)
    limit = find_limit(dialogues, share)
    return [each.messages[0].content for each in dialogues if hash_dialogue(each) < limit]


class HoldoutTest(parameterized.TestCase):
    @parameterized.parameters(0.05, 0.3)
    def test_share_of_many_dialogues_is_held_out(self, share):
        count = 2000
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

    def test_adding_dialogues_moves_none_once_both_sides_have_one(self):
        for seed in range(0, 400, 20):
            few = [dialogue(number) for number in range(seed, seed + 12)]
            more = [dialogue(number) for number in range(1000, 1100)]
            below = [hash_dialogue(each) < 0.3 * 2**64 for each in few]
            if any(below) and not all(below):
                self.assertEqual(held_out([*few, *more], 0.3)[: sum(below)], held_out(few, 0.3))

    @parameterized.parameters(0.05, 0.5, 0.95)
    def test_two_dialogues_are_one_on_each_side_in_either_order(self, share):
        for number in range(0, 60, 2):
            pair = [dialogue(number), dialogue(number + 1)]
            self.assertLen(held_out(pair, share), 1)
            self.assertEqual(held_out(pair, share), held_out(reversed(pair), share))

    @parameterized.parameters((1e-9, min), (1 - 1e-9, max))
    def test_side_that_would_be_empty_gets_the_dialogue_nearest_to_the_share(self, share, nearest):
        few = [dialogue(number) for number in range(9)]
        alone = nearest(few, key=hash_dialogue).messages[0].content
        expected = [f"{n}?" for n in range(9) if (f"{n}?" == alone) == (nearest is min)]
        self.assertEqual(held_out(few, share), expected)
        self.assertCountEqual(held_out(few * 2, share), expected * 2)

    def test_equal_dialogues_cannot_be_divided(self):
        with self.assertRaisesRegex(UserError, "^it has a single dialogue; needed two different ones"):
            find_limit([dialogue(3)], 0.05)
        with self.assertRaisesRegex(UserError, "^its 4 dialogues are all equal; needed two different ones"):
            find_limit([dialogue(3)] * 4, 0.05)

    def test_limit_of_a_large_set_is_found_from_its_beginning(self):
        numbers = iter(range(100_000))
        self.assertEqual(find_limit(map(dialogue, numbers), 0.05), int(0.05 * 2**64))
        self.assertLess(next(numbers), 1000)

    def test_hash_depends_on_the_content_and_not_on_names_or_weights(self):
        one = dialogue(7)
        same = dataclasses.replace(one, id="x", where="other.jsonl:1", metadata={"a": 1})
        weighted = tuple(dataclasses.replace(message, weight=0.5) for message in one.messages)
        self.assertEqual(hash_dialogue(one), hash_dialogue(same))
        self.assertEqual(hash_dialogue(one), hash_dialogue(dataclasses.replace(one, messages=weighted)))
        self.assertNotEqual(hash_dialogue(one), hash_dialogue(dialogue(7, tools=({"name": "f"},))))
        self.assertNotEqual(hash_dialogue(one), hash_dialogue(dialogue(8)))

    def test_choice_is_the_same_in_every_version_and_process(self):
        # Literal: a change of the hash would move dialogues of data sets that have been trained on.
        self.assertEqual(held_out(map(dialogue, range(40)), 0.1), ["6?", "7?", "10?", "28?"])

    def test_text_that_is_no_unicode_has_a_hash(self):
        broken = Dialogue(id=0, messages=(Message(role="user", content="\ud800"),))
        self.assertBetween(hash_dialogue(broken), 0, 2**64 - 1)


if __name__ == "__main__":
    absltest.main()
