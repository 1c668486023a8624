"""Fitting: the worked examples of its docstrings, with messages of exactly 10 tokens."""

import copy
import dataclasses
import functools

import tokenizers
import transformers
from absl.testing import absltest, parameterized

from dialog_jax.dialogues.dialogue import Dialogue, Message, Part
from dialog_jax.errors import UserError
from dialog_jax.rendering.sequences import Renderer
from dialog_jax.trees import fitting
from dialog_jax.trees.objectives import ObjectiveConfig

_TEMPLATE = (
    "{% for m in messages %}{{ m.role + ' ' + m.content + ' <end> ' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant ' }}{% endif %}"
)
_OBJECTIVE = ObjectiveConfig()


@functools.cache
def renderer():
    names = ["<end>", "other", "system", "user", "assistant", *(f"{letter}{n}" for letter in "sua" for n in range(9))]
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({name: n for n, name in enumerate(names)}, "other"))
    words.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    words.add_special_tokens(["<end>"])
    return Renderer(transformers.PreTrainedTokenizerFast(tokenizer_object=words, chat_template=_TEMPLATE))


def ten_tokens(role, word):
    return Message(role=role, content=" ".join([word] * 8))


def call_message(word):
    return dataclasses.replace(ten_tokens("assistant", word), fields={"tool_calls": [{"function": {"name": word}}]})


def dialogue(turns, *, system=True):
    """s0 u0 a0 u1 a1 ..., 10 tokens each."""
    messages = [ten_tokens("system", "s0")] if system else []
    for turn in range(turns):
        messages += [ten_tokens("user", f"u{turn}"), ten_tokens("assistant", f"a{turn}")]
    return Dialogue(id=0, messages=tuple(messages))


def fitted(turns, max_length, *, system=True):
    """The excerpt of a dialogue with the sequences that fit a tree."""
    (excerpt,) = fitting.unfold(dialogue(turns, system=system), _OBJECTIVE)
    (sequences,) = renderer().render([excerpt.dialogue], max_length=max_length)
    return excerpt._replace(sequences=list(sequences))


def words(excerpt):
    return [message.content.split()[0] for message in excerpt.dialogue.messages]


class ShortenHistoriesTest(parameterized.TestCase):
    def test_picture(self):
        excerpt = fitted(6, 100)
        self.assertEqual(list(excerpt.response_turns.values()), [0, 1, 2, 3])
        (shorter,) = fitting.shorten_histories(excerpt, renderer(), _OBJECTIVE, 100)
        self.assertEqual(words(shorter), ["s0", "u3", "a3", "u4", "a4", "u5", "a5"])
        self.assertEqual([message.weight for message in shorter.dialogue.messages], [0, 0, 0, 1, 1, 1, 1])
        self.assertEqual(shorter.original_indices, (0, 7, 8, 9, 10, 11, 12))
        self.assertEqual(shorter.response_turns, {10: 4, 12: 5})
        self.assertEqual(len(shorter.sequences[-1].tokens), 70)

    def test_under_joint_messages_of_an_earlier_sequence_are_context(self):
        objective = ObjectiveConfig(name="joint")
        (shorter,) = fitting.shorten_histories(fitted(6, 100), renderer(), objective, 100)
        self.assertEqual(shorter.context, {0, 1, 2})  # s0 u3 a3; u4 is in no sequence that fits

    @parameterized.product(turns=(3, 7, 12), max_length=(45, 70, 100), system=(False, True))
    def test_every_response_is_trained_once_within_the_length(self, turns, max_length, system):
        excerpt = fitted(turns, max_length, system=system)
        shorter = fitting.shorten_histories(excerpt, renderer(), _OBJECTIVE, max_length)
        trained = [turn for part in (excerpt, *shorter) for turn in part.response_turns.values()]
        self.assertEqual(trained, list(range(turns)))
        for part in shorter:
            self.assertLessEqual(len(part.sequences[-1].tokens), max_length)
            # The prompt of the first response.
            self.assertLessEqual(part.sequences[0].start, max(max_length // 2, 10 * system + 10 + 1))

    def test_response_that_fits_nowhere_is_left_out(self):
        self.assertEmpty(fitting.shorten_histories(fitted(2, 15), renderer(), _OBJECTIVE, 15))

    def test_history_within_a_turn_keeps_the_user_message_and_whole_calls(self):
        """u0, then four times a call and its two results, and the answer: 160 tokens, and 110 fit."""
        messages = [ten_tokens("system", "s0"), ten_tokens("user", "u0")]
        for call in range(4):
            messages += [call_message(f"a{call}"), *[ten_tokens("tool", f"u{call + 1}")] * 2]
        messages.append(ten_tokens("assistant", "a8"))
        (excerpt,) = fitting.unfold(Dialogue(id=0, messages=tuple(messages)), _OBJECTIVE)
        (sequences,) = renderer().render([excerpt.dialogue], max_length=110)
        excerpt = excerpt._replace(sequences=list(sequences))
        self.assertEqual(list(excerpt.response_turns), [2, 5, 8])
        shorter = fitting.shorten_histories(excerpt, renderer(), _OBJECTIVE, 110)
        self.assertEqual(
            [words(part)[: part.sequences[-1].message_index + 1] for part in shorter],
            [
                ["s0", "u0", "a1", "u2", "u2", "a2", "u3", "u3", "a3"],
                ["s0", "u0", "a2", "u3", "u3", "a3", "u4", "u4", "a8"],
            ],
        )
        self.assertEqual([part.response_turns for part in shorter], [{11: 3}, {14: 4}])

    @parameterized.parameters("a", "call")
    def test_response_is_never_trained_without_the_results_before_it(self, last):
        """u0, two calls, their two results, another call, its result, and the response."""
        turn = [ten_tokens("user", "u0"), call_message("a0"), call_message("a1")]
        turn += [ten_tokens("tool", "u1"), ten_tokens("tool", "u2"), call_message("a2"), ten_tokens("tool", "u3")]
        turn += [ten_tokens("assistant", "a3") if last == "a" else call_message("a3")]
        for max_length, expected in ((75, ["u0", "a2", "u3", "a3"]), (40, ["u0", "a2", "u3", "a3"]), (39, None)):
            (excerpt,) = fitting.unfold(Dialogue(id=0, messages=tuple(turn)), _OBJECTIVE)
            (sequences,) = renderer().render([excerpt.dialogue], max_length=max_length)
            shorter = fitting.shorten_histories(
                excerpt._replace(sequences=list(sequences)), renderer(), _OBJECTIVE, max_length
            )
            trained = [words(part) for part in shorter if 7 in part.response_turns]
            self.assertEqual(trained, [expected] if expected else [])
            for part in shorter:  # the call before needs the results of both calls
                self.assertIn(words(part), [expected, ["u0", "a0", "a1", "u1", "u2", "a2"]])

    def refusing(self, condition, error="raise_exception('no')"):
        """A renderer whose template refuses some dialogues."""
        tokenizer = copy.deepcopy(renderer().tokenizer)
        tokenizer.chat_template = "{% if " + condition + " %}{{ " + error + " }}{% endif %}" + _TEMPLATE
        return Renderer(tokenizer)

    def test_response_whose_shortened_history_is_refused_is_left_out(self):
        excerpt = fitted(6, 100)
        without_first = self.refusing("messages[-1].content[:2] == 'a5' and messages[1].content[:2] != 'u0'")
        (shorter,) = fitting.shorten_histories(excerpt, without_first, _OBJECTIVE, 100)
        self.assertEqual(shorter.response_turns, {10: 4})  # and not 12, whose full history is accepted
        self.assertEmpty(
            fitting.shorten_histories(
                excerpt,
                self.refusing(
                    "messages | length > 1 and messages[1].content[0] == 'u' and messages[1].content[:2] != 'u0'"
                ),
                _OBJECTIVE,
                100,
            )
        )

    def test_error_behind_a_shortened_history_names_the_messages_of_the_dialogue(self):
        messages = list(dialogue(6).messages)
        parts = (Part(text="A5", weight=0.5), Part(text=" a5" * 7, weight=1.0))
        messages[-1] = Message(role="assistant", content="A5" + " a5" * 7, parts=parts)
        (excerpt,) = fitting.unfold(Dialogue(id=0, messages=tuple(messages)), _OBJECTIVE)
        tokenizer = copy.deepcopy(renderer().tokenizer)
        tokenizer.chat_template = _TEMPLATE.replace("m.content", "m.content | replace('A5', 'a5')")
        changing = Renderer(tokenizer)
        (sequences,) = changing.render([excerpt.dialogue], max_length=100)
        with self.assertRaisesRegex(UserError, r"message 6 has parts .* 5 is 11, 6 is 12 of the dialogue"):
            fitting.shorten_histories(excerpt._replace(sequences=list(sequences)), changing, _OBJECTIVE, 100)


class UnfoldTest(absltest.TestCase):
    def test_picture(self):
        messages = [ten_tokens(role, word) for role, word in (("user", "u0"), ("assistant", "a0"), ("user", "u1"))]
        messages += [ten_tokens("assistant", "a2"), ten_tokens("user", "u2")]
        tree = Dialogue(id=0, messages=tuple(messages), parents=(-1, 0, 1, 0, 3))
        first, second = fitting.unfold(tree, _OBJECTIVE)
        self.assertEqual((words(first), words(second)), (["u0", "a0", "u1"], ["u0", "a2", "u2"]))
        self.assertEqual((first.original_indices, second.original_indices), ((0, 1, 2), (0, 3, 4)))
        self.assertEqual((first.context, second.context), (frozenset(), {0}))
        self.assertEqual([message.weight for message in second.dialogue.messages], [0, 1, 1])


if __name__ == "__main__":
    absltest.main()
