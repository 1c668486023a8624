"""Fitting: the worked examples of its docstrings, with messages of exactly 10 tokens."""

import functools

import tokenizers
import transformers
from absl.testing import absltest, parameterized

from dialog_jax.dialogues.dialogue import Dialogue, Message
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
    (selected,) = fitting.select_fitting([sequences], _OBJECTIVE, max_length)
    return excerpt._replace(sequences=selected)


def words(excerpt):
    return [message.content.split()[0] for message in excerpt.dialogue.messages]


class SplitExcerptTest(parameterized.TestCase):
    def test_picture(self):
        excerpt = fitted(6, 100)
        first, second = fitting.split_excerpt(excerpt, renderer(), _OBJECTIVE, 100)
        self.assertEqual(first, excerpt)
        self.assertEqual(list(first.response_turns.values()), [0, 1, 2, 3])
        self.assertEqual(words(second), ["s0", "u3", "a3", "u4", "a4", "u5", "a5"])
        self.assertEqual([message.weight for message in second.dialogue.messages], [0, 0, 0, 1, 1, 1, 1])
        self.assertEqual(second.original_indices, (0, 7, 8, 9, 10, 11, 12))
        self.assertEqual(second.context_messages, 3)
        self.assertEqual(second.response_turns, {10: 4, 12: 5})
        self.assertEqual(len(second.sequences[-1].tokens), 70)

    @parameterized.product(turns=(3, 7, 12), max_length=(45, 70, 100), system=(False, True))
    def test_every_response_is_trained_once_within_the_length(self, turns, max_length, system):
        parts = fitting.split_excerpt(fitted(turns, max_length, system=system), renderer(), _OBJECTIVE, max_length)
        trained = [turn for part in parts for turn in part.response_turns.values()]
        self.assertEqual(trained, list(range(turns)))
        for part in parts:
            self.assertLessEqual(len(part.sequences[-1].tokens), max_length)
        for part in parts[1:]:  # the prompt of the first new response
            self.assertLessEqual(part.sequences[0].start, max(max_length // 2, 10 * system + 10 + 1))

    def test_a_response_that_fits_nowhere_is_left_out(self):
        self.assertEmpty(fitting.split_excerpt(fitted(2, 15), renderer(), _OBJECTIVE, 15))


class SelectFittingTest(absltest.TestCase):
    def test_sequences_are_a_prefix_of_those_of_their_path(self):
        self.assertLen(fitted(6, 100).sequences, 4)
        self.assertLen(fitted(6, 89).sequences, 3)
        self.assertLen(fitted(6, 130).sequences, 6)

    def test_paths_share_what_they_have_in_common(self):
        (sequences,) = renderer().render([dialogue(2)])
        first, second = list(sequences)
        self.assertEqual((len(first.tokens), len(second.tokens)), (30, 50))
        self.assertEqual(fitting.count_new_tokens(second, [first]), 20)
        selected = fitting.select_fitting([[first], [first, second]], _OBJECTIVE, 50)
        self.assertEqual([len(some) for some in selected], [1, 2])
        selected = fitting.select_fitting([[first], [first, second]], _OBJECTIVE, 49)
        self.assertEqual([len(some) for some in selected], [1, 1])


class UnfoldTest(absltest.TestCase):
    def test_picture(self):
        messages = [ten_tokens(role, word) for role, word in (("user", "u0"), ("assistant", "a0"), ("user", "u1"))]
        messages += [ten_tokens("assistant", "a2"), ten_tokens("user", "u2")]
        tree = Dialogue(id=0, messages=tuple(messages), parents=(-1, 0, 1, 0, 3))
        first, second = fitting.unfold(tree, _OBJECTIVE)
        self.assertEqual((words(first), words(second)), (["u0", "a0", "u1"], ["u0", "a2", "u2"]))
        self.assertEqual((first.original_indices, second.original_indices), ((0, 1, 2), (0, 3, 4)))
        self.assertEqual((first.context_messages, second.context_messages), (0, 1))
        self.assertEqual([message.weight for message in second.dialogue.messages], [0, 1, 1])


if __name__ == "__main__":
    absltest.main()
