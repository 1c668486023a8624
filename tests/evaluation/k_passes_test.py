"""K passes against tokens written by hand and against float64 logits; and that they share no code with one pass."""

import ast
import collections
import dataclasses
import inspect
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl.testing import absltest, parameterized

from dialog_jax.dialogues.dialogue import Dialogue, Message, Part
from dialog_jax.evaluation import k_pass_losses, k_passes
from dialog_jax.model import decoder
from dialog_jax.rendering.sequences import Renderer
from tests.rendering import chat_templates
from tests.training import tiny


def dialogue(*contents, **weights):
    roles = ("user", "assistant") * len(contents)
    messages = [
        Message(role=role, content=content, weight=weights.get(f"weight_{index}", 1.0))
        for index, (role, content) in enumerate(zip(roles, contents, strict=False))
    ]
    return Dialogue(id="d", messages=tuple(messages), where="data.jsonl:1")


def ids(tokenizer, text):
    return tokenizer(text, add_special_tokens=False)["input_ids"]


class PassesTest(parameterized.TestCase):
    def test_each_pass_is_prompt_and_response_up_to_the_end_of_turn(self):
        tokenizer = chat_templates.train_tokenizer("chatml")
        head = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
        prompts = [head + "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"]
        prompts.append(prompts[0] + "Hello!<|im_end|>\n<|im_start|>user\nBye<|im_end|>\n<|im_start|>assistant\n")
        found = k_passes.make_passes(dialogue("Hi", "Hello!", "Bye", "Ciao.", weight_3=0.5), tokenizer)
        self.assertEqual([(one.message, one.turn, set(one.weight)) for one in found], [(1, 0, {1.0}), (3, 1, {0.5})])
        for one, prompt, response in zip(found, prompts, ("Hello!<|im_end|>", "Ciao.<|im_end|>"), strict=True):
            self.assertEqual(one.tokens.tolist(), ids(tokenizer, prompt + response))
            self.assertEqual(one.start, len(ids(tokenizer, prompt)))
            self.assertLen(one.weight, len(one.tokens) - one.start)

    def test_reasoning_is_in_the_response_and_not_in_later_prompts(self):
        tokenizer = chat_templates.train_tokenizer("qwen3")
        found = k_passes.make_passes(dialogue("Hi", "<think>\nfirst\n</think>\n\nHello!", "Bye", "Ciao."), tokenizer)
        first, second = (tokenizer.decode(one.tokens) for one in found)
        self.assertEndsWith(first, "assistant\n<think>\nfirst\n</think>\n\nHello!<|im_end|>")
        self.assertNotIn("first", second)
        self.assertEndsWith(second, "assistant\n<think>\n\n</think>\n\nCiao.<|im_end|>")

    def test_messages_of_weight_0_have_no_pass_but_count_as_turns(self):
        tokenizer = chat_templates.train_tokenizer("chatml")
        (only,) = k_passes.make_passes(dialogue("Hi", "Hello!", "Bye", "Ciao.", weight_1=0.0), tokenizer)
        self.assertEqual((only.message, only.turn), (3, 1))

    @parameterized.parameters(sorted(chat_templates.FAMILIES))
    def test_tokens_are_those_of_the_renderer_for_every_family(self, family):
        tokenizer = chat_templates.train_tokenizer(family)
        renderer = Renderer(tokenizer)
        for seed in range(8):
            one = chat_templates.random_dialogue(
                np.random.default_rng(seed), turns=3, reasoning=family == "qwen3", weights=True
            )
            (rendered,) = renderer.render([one])
            expected = [(entry.message_index, entry.turn, entry.start, entry.tokens.tolist()) for entry in rendered]
            found = [
                (entry.message, entry.turn, entry.start, entry.tokens.tolist())
                for entry in k_passes.make_passes(one, tokenizer)
            ]
            self.assertEqual(found, expected)

    @parameterized.parameters(sorted(chat_templates.FAMILIES))
    def test_tokens_of_spelled_special_tokens_are_those_of_the_renderer_for_every_family(self, family):
        tokenizer = chat_templates.train_tokenizer(family)
        special, rng = chat_templates.FAMILIES[family].special, np.random.default_rng(0)
        pieces = [*special, *(text[:3] for text in special), " ", "\n", "Hello", "é", "12"]
        for allowed in (False, False, False, True):
            texts = ["".join(rng.choice(pieces, size=rng.integers(5))) for _ in range(6)]
            one, kwargs = dialogue(*texts), {"allow_special_tokens": allowed}
            (rendered,) = Renderer(tokenizer, **kwargs).render([one])
            expected = [(entry.message_index, entry.start, entry.tokens.tolist()) for entry in rendered]
            passes = k_passes.make_passes(one, tokenizer, **kwargs)
            self.assertEqual([(entry.message, entry.start, entry.tokens.tolist()) for entry in passes], expected)

    def test_spelled_special_tokens_are_text_and_may_cross_parts(self):
        tokenizer = chat_templates.train_tokenizer("chatml")
        parts = (Part(text="12<|im_", weight=0.5), Part(text="end|>ab", weight=0.25))
        message = Message(role="assistant", content="12<|im_end|>ab", parts=parts)
        (one,) = k_passes.make_passes(Dialogue(id=0, messages=(*dialogue("Hi").messages[:1], message)), tokenizer)
        by_weight = collections.defaultdict(str)
        for token, weight in zip(one.tokens[one.start :], one.weight.tolist(), strict=True):
            by_weight[weight] += tokenizer.decode([token])
        self.assertEqual(by_weight, {0.5: "12<|im_", 0.25: "end|>ab", 1.0: "<|im_end|>"})
        self.assertEqual(one.tokens.tolist().count(tokenizer.convert_tokens_to_ids("<|im_end|>")), 3)

    def test_spelled_special_tokens_that_the_template_looks_for_are_refused(self):
        tokenizer = chat_templates.train_tokenizer.__wrapped__("chatml")
        tokenizer.chat_template = "{{ '<|im_end|>' in messages[0].content }}" + tokenizer.chat_template
        with self.assertRaisesRegex(ValueError, r"dialogue d \(data.jsonl:1\): .* more than write them"):
            k_passes.make_passes(dialogue("<|im_end|>", "a"), tokenizer)
        with self.assertRaisesRegex(ValueError, "private-use characters from U.100000 on"):
            k_passes.make_passes(dialogue("<|im_end|>\U00100001", "a"), chat_templates.train_tokenizer("chatml"))

    def test_history_of_a_message_is_its_path_in_a_tree(self):
        tokenizer = chat_templates.train_tokenizer("chatml")
        messages = dialogue("Hi", "Hello!", "Bye", "Ciao.").messages
        tree = Dialogue(
            id=0, messages=(*messages, Message(role="assistant", content="Good day.")), parents=(-1, 0, 1, 2, 0)
        )
        *path, other = k_passes.make_passes(tree, tokenizer)
        expected = k_passes.make_passes(dialogue("Hi", "Hello!", "Bye", "Ciao."), tokenizer)
        self.assertEqual([one.tokens.tolist() for one in path], [one.tokens.tolist() for one in expected])
        (alone,) = k_passes.make_passes(dialogue("Hi", "Good day."), tokenizer)
        self.assertEqual(other.tokens.tolist(), alone.tokens.tolist())
        self.assertEqual((other.message, other.turn), (4, 0))

    def test_parts_weigh_the_tokens_that_end_in_them(self):
        tokenizer = chat_templates.train_tokenizer("chatml")
        parts = (Part(text="first, ", weight=0.25), Part(text="second", weight=1.0), Part(text="", weight=3.0))
        message = Message(role="assistant", content="first, second", weight=2.0, parts=parts)
        (one,) = k_passes.make_passes(Dialogue(id=0, messages=(*dialogue("Hi").messages[:1], message)), tokenizer)
        by_weight = collections.defaultdict(str)
        for token, weight in zip(one.tokens[one.start :], one.weight.tolist(), strict=True):
            by_weight[weight] += tokenizer.decode([token])
        # The space is part of the second word's token, which ends in the second part.
        self.assertEqual(by_weight, {0.5: "first,", 2.0: " second<|im_end|>"})
        trimmed = dataclasses.replace(message, content="second ", parts=(Part(text="second ", weight=0.5),))
        with self.assertRaisesRegex(ValueError, "dialogue 0: message 1 has parts .* 0 times"):
            k_passes.make_passes(
                Dialogue(id=0, messages=(Message(role="user", content="Hi"), trimmed)),
                chat_templates.train_tokenizer("llama3"),
            )

    def test_refusals_name_the_dialogue(self):
        tokenizer = chat_templates.train_tokenizer("gemma")
        system = Dialogue(id=3, messages=(Message(role="system", content="Be brief."), *dialogue("a", "b").messages))
        with self.assertRaisesRegex(ValueError, "dialogue 3: the chat template refuses messages 0, 1: System role"):
            k_passes.make_passes(system, tokenizer)
        with self.assertRaisesRegex(ValueError, "dialogue 4: begins with an assistant message"):
            k_passes.make_passes(Dialogue(id=4, messages=(Message(role="assistant", content="Hi"),)), tokenizer)

    def test_rendering_that_does_not_continue_the_prompt_is_refused(self):
        tokenizer = chat_templates.train_tokenizer("qwen3")
        with self.assertRaisesRegex(ValueError, r"dialogue d \(data.jsonl:1\): with message 1 .* no continuation"):
            k_passes.make_passes(dialogue("Hi", "<think>\nx\n</think>\n\ny"), tokenizer, {"enable_thinking": False})

    def test_it_imports_nothing_of_the_one_pass_but_the_decoder(self):
        texts = {"dialogues.dialogue", "errors", "evaluation"}  # of the last, escaping and response_text
        losses = {"evaluation.k_passes", "model", "model.decoder_config"}  # of the second, decoder and parameter_trees
        for module, expected in ((k_passes, texts), (k_pass_losses, losses)):
            found = ast.walk(ast.parse(inspect.getsource(module)))
            modules = {node.module for node in found if isinstance(node, ast.ImportFrom)}
            ours = {name.removeprefix("dialog_jax.") for name in modules if name.startswith("dialog_jax")}
            self.assertEqual(ours, expected)


class LossTest(absltest.TestCase):
    def setUp(self):
        super().setUp()
        self.tokenizer = chat_templates.train_tokenizer("chatml")
        self.model = tiny.config(len(self.tokenizer))
        self.parameters = tiny.parameters(self.model)
        self.passes = k_passes.make_passes(
            dialogue("Hi", "Hello! How are you?", "Fine " * 60, "Ciao.", weight_3=0.25), self.tokenizer
        )

    def nll(self, one):
        """Of each token of the response, from unpadded float32 logits and a float64 softmax."""
        length = len(one.tokens)
        ends = jnp.full((1, length), length, jnp.int32)
        hidden = decoder.hidden_states(
            self.model, self.parameters, jnp.asarray(one.tokens)[None], jnp.arange(length)[None], ends
        )
        matrix = decoder.unembedding(self.model, self.parameters)
        logits = np.asarray(hidden[0], np.float64) @ np.asarray(matrix, np.float64).T
        return [np.log(np.exp(logits[i - 1]).sum()) - logits[i - 1, one.tokens[i]] for i in range(one.start, length)]

    def test_nll_is_that_of_the_unpadded_sequence(self):
        self.assertGreater(len(self.passes[1].tokens), 128)  # two padded lengths
        for one in self.passes:
            found = k_pass_losses.compute_response_nll(self.model, self.parameters, one)
            np.testing.assert_allclose(found, self.nll(one), rtol=1e-5)

    @pytest.mark.full
    def test_gradient_is_the_slope_of_the_weighted_sum(self):
        every, gradient = k_pass_losses.compute_nll_and_gradient(self.model, self.parameters, self.passes)
        for one, found in zip(self.passes, every, strict=True):
            np.testing.assert_allclose(found, self.nll(one), rtol=1e-5)
        squared = sum(float((np.asarray(leaf, np.float64) ** 2).sum()) for leaf in jax.tree.leaves(gradient))
        step = 1e-3 / squared**0.5

        def moved(distance):
            parameters = jax.tree.map(lambda p, g: p + distance * g, self.parameters, gradient)
            first, second = (k_pass_losses.compute_response_nll(self.model, parameters, one) for one in self.passes)
            return math.fsum(first) + 0.25 * math.fsum(second)

        np.testing.assert_allclose((moved(step) - moved(-step)) / (2 * step), squared, rtol=3e-3)


if __name__ == "__main__":
    absltest.main()
