"""The tokens of a response behind less history: literal, and those of the K passes for every template family."""

import dataclasses

import numpy as np
from absl.testing import absltest, parameterized

from dialog_jax.dialogues.dialogue import Dialogue, Message
from dialog_jax.errors import UserError
from dialog_jax.evaluation import contexts, k_passes
from dialog_jax.rendering.sequences import Renderer
from tests.rendering import chat_templates


def dialogue(*messages):
    return Dialogue(id="d", messages=tuple(Message(role=role, content=content) for role, content in messages))


class ContextsTest(parameterized.TestCase):
    def texts(self, family, one, names=("last", "none")):
        """The text of every context of every response."""
        tokenizer = chat_templates.train_tokenizer(family)
        renderer = Renderer(tokenizer)
        (sequences,) = renderer.render([one])
        variants = contexts.add_contexts(one, list(sequences), renderer, names)
        return [{variant.context: tokenizer.decode(variant.sequence.tokens) for variant in each} for each in variants]

    def test_last_keeps_the_system_message_and_none_has_only_the_generation_prompt(self):
        one = dialogue(
            ("system", "Be brief."), ("user", "Hi"), ("assistant", "Hello!"), ("user", "Bye"), ("assistant", "Ciao.")
        )
        first, second = self.texts("chatml", one)
        system, reply = "<|im_start|>system\nBe brief.<|im_end|>\n", "<|im_start|>assistant\n"
        self.assertEqual(first["last"], first["full"])
        self.assertEqual(first["none"], f"{reply}Hello!<|im_end|>")
        self.assertEqual(second["last"], f"{system}<|im_start|>user\nBye<|im_end|>\n{reply}Ciao.<|im_end|>")
        self.assertEqual(second["none"], f"{reply}Ciao.<|im_end|>")

    def test_a_template_with_bos_keeps_it_and_one_without_generation_prompt_has_an_empty_user_message(self):
        one = dialogue(("user", "Hi"), ("assistant", "Hello!"))
        ((bare),) = self.texts("gemma", one, ("none",))
        self.assertEqual(bare["none"], "<bos><start_of_turn>model\nHello!<end_of_turn>")
        ((bare),) = self.texts("mistral", one, ("none",))
        self.assertEqual(bare["none"], "<s>[INST]  [/INST] Hello!</s>")

    def test_an_empty_user_message_is_not_told_of_tools(self):
        tokenizer = chat_templates.train_tokenizer.__wrapped__("mistral")
        tokenizer.chat_template = "{% if tools %}[TOOLS] {% endif %}" + tokenizer.chat_template
        one = dataclasses.replace(dialogue(("user", "Hi"), ("assistant", "Hello!")), tools=({"name": "clock"},))
        (sequences,) = Renderer(tokenizer).render([one])
        ((full, bare),) = contexts.add_contexts(one, list(sequences), Renderer(tokenizer), ("none",))
        self.assertIn("[TOOLS]", tokenizer.decode(full.sequence.tokens))
        self.assertNotIn("[TOOLS]", tokenizer.decode(bare.sequence.tokens))

    def test_without_a_user_message_last_is_the_full_history(self):
        one = dialogue(("system", "Greet."), ("assistant", "Hello!"), ("assistant", "Are you there?"))
        for index in (1, 2):
            self.assertEqual(contexts.select_last(one, index).messages, one.messages[:index])

    @parameterized.parameters(sorted(chat_templates.FAMILIES))
    def test_tokens_are_those_of_the_k_passes_for_every_family(self, family):
        tokenizer = chat_templates.train_tokenizer(family)
        renderer = Renderer(tokenizer)
        for seed in range(4):
            one = chat_templates.random_dialogue(np.random.default_rng(seed), turns=3, reasoning=family == "qwen3")
            (sequences,) = renderer.render([one])
            variants = contexts.add_contexts(one, list(sequences), renderer, ("last", "none"))
            for each, plain in zip(variants, k_passes.make_passes(one, tokenizer), strict=True):
                for variant in each[1:]:
                    expected, is_empty = k_passes.replace_prompt(plain, variant.context, one, tokenizer)
                    self.assertEqual(variant.sequence.tokens.tolist(), expected.tokens.tolist())
                    self.assertEqual(
                        (variant.sequence.start, variant.follows_empty_message), (expected.start, is_empty)
                    )
                    response = each[0].sequence.tokens[each[0].sequence.start :]
                    np.testing.assert_array_equal(variant.sequence.tokens[variant.sequence.start :], response)

    def test_a_history_that_the_template_refuses_is_an_error(self):
        tokenizer = chat_templates.train_tokenizer.__wrapped__("chatml")
        refusal = "{%- if messages[0].content == 'Bye' -%}{{ raise_exception('too abrupt') }}{%- endif -%}"
        tokenizer.chat_template = refusal + tokenizer.chat_template
        one = dialogue(("user", "Hi"), ("assistant", "Hello!"), ("user", "Bye"), ("assistant", "Ciao."))
        renderer = Renderer(tokenizer)
        (sequences,) = renderer.render([one])
        with self.assertRaisesRegex(UserError, "dialogue d: the chat template refuses .*too abrupt"):
            contexts.add_contexts(one, list(sequences), renderer, ("last",))


if __name__ == "__main__":
    absltest.main()
