"""The test templates render what the published ones do, and each family's tokens are what its name says."""

import itertools

import jinja2
import numpy as np
from absl.testing import absltest, parameterized

from tests.rendering import chat_templates

_DIALOGUE = [
    {"role": "user", "content": " Hi"},
    {"role": "assistant", "content": "Hello "},
    {"role": "user", "content": "1 + 1?"},
    {"role": "assistant", "content": "2"},
]
_TOOL = {"type": "function", "function": {"name": "add", "parameters": {}}}


def _render(family, messages, **arguments):
    return chat_templates.train_tokenizer(family).apply_chat_template(messages, tokenize=False, **arguments)


# fmt: off
_RENDERINGS = (
    ("chatml",
     "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
     "<|im_start|>user\n Hi<|im_end|>\n<|im_start|>assistant\nHello <|im_end|>\n"
     "<|im_start|>user\n1 + 1?<|im_end|>\n", "<|im_start|>assistant\n", "2<|im_end|>\n"),
    ("llama3",
     "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\nHi<|eot_id|>"
     "<|start_header_id|>assistant<|end_header_id|>\n\nHello<|eot_id|>"
     "<|start_header_id|>user<|end_header_id|>\n\n1 + 1?<|eot_id|>",
     "<|start_header_id|>assistant<|end_header_id|>\n\n", "2<|eot_id|>"),
    ("gemma",
     "<bos><start_of_turn>user\nHi<end_of_turn>\n<start_of_turn>model\nHello<end_of_turn>\n"
     "<start_of_turn>user\n1 + 1?<end_of_turn>\n", "<start_of_turn>model\n", "2<end_of_turn>\n"),
    ("mistral", "<s>[INST]  Hi [/INST] Hello</s>[INST] 1 + 1? [/INST]", "", " 2</s>"),
    ("qwen3",
     "<|im_start|>user\n Hi<|im_end|>\n<|im_start|>assistant\nHello <|im_end|>\n"
     "<|im_start|>user\n1 + 1?<|im_end|>\n", "<|im_start|>assistant\n", "<think>\n\n</think>\n\n2<|im_end|>\n"),
    ("plain", "User:  Hi\nAssistant: Hello \nUser: 1 + 1?\n", "Assistant: ", "2\n"),
    ("phi3",
     "<|user|>\n Hi<|end|>\n<|assistant|>\nHello <|end|>\n<|user|>\n1 + 1?<|end|>\n",
     "<|assistant|>\n", "2<|end|>\n<|endoftext|>"),
)
# fmt: on


class TemplatesTest(parameterized.TestCase):
    @parameterized.parameters(*_RENDERINGS)
    def test_dialogue_and_generation_prompt(self, family, history, prompt, response):
        self.assertEqual(_render(family, _DIALOGUE), history + prompt + response)
        self.assertEqual(_render(family, _DIALOGUE[:3], add_generation_prompt=True), history + prompt)

    @parameterized.parameters("gemma", "mistral")
    def test_roles_that_do_not_alternate_are_refused(self, family):
        for messages in (_DIALOGUE[1:], _DIALOGUE[:1] * 2, _DIALOGUE[:2] + _DIALOGUE[1:2]):
            with self.assertRaisesRegex(jinja2.TemplateError, "alternate"):
                _render(family, messages)

    def test_system_message(self):
        messages = [{"role": "system", "content": "Be kind."}, *_DIALOGUE[:1]]
        with self.assertRaisesRegex(jinja2.TemplateError, "System role"):
            _render("gemma", messages)
        self.assertEqual(_render("mistral", messages), "<s>[INST] Be kind.\n\n Hi [/INST]")
        self.assertEqual(
            _render("chatml", messages), "<|im_start|>system\nBe kind.<|im_end|>\n<|im_start|>user\n Hi<|im_end|>\n"
        )

    def test_qwen3_reasoning_is_kept_after_the_last_query_only(self):
        first = {"role": "assistant", "content": "A", "reasoning_content": "\nR1\n"}
        second = {"role": "assistant", "content": "<think>\nR2\n</think>\n\nB"}
        user = {"role": "user", "content": "Q"}
        one = "<|im_start|>user\nQ<|im_end|>\n<|im_start|>assistant\n"
        self.assertEqual(_render("qwen3", [user, first]), one + "<think>\nR1\n</think>\n\nA<|im_end|>\n")
        self.assertEqual(
            _render("qwen3", [user, first, user, second]),
            one + "A<|im_end|>\n" + one + "<think>\nR2\n</think>\n\nB<|im_end|>\n",
        )
        self.assertEqual(_render("qwen3", [user, second, user]), one + "B<|im_end|>\n<|im_start|>user\nQ<|im_end|>\n")

    def test_qwen3_without_thinking_closes_an_empty_block_in_the_prompt(self):
        rendered = _render("qwen3", _DIALOGUE[:1], add_generation_prompt=True, enable_thinking=False)
        self.assertEndsWith(rendered, "<|im_start|>assistant\n<think>\n\n</think>\n\n")

    def test_qwen3_tools_and_their_answers(self):
        call = {"type": "function", "function": {"name": "add", "arguments": {"x": 1}}}
        messages = [
            {"role": "user", "content": "Q"},
            {"role": "assistant", "content": "", "tool_calls": [call, call], "reasoning_content": "R"},
            {"role": "tool", "content": "2"},
            {"role": "tool", "content": "3"},
            {"role": "assistant", "content": "5"},
        ]
        rendered = _render("qwen3", messages, tools=[_TOOL])
        self.assertStartsWith(rendered, "<|im_start|>system\n# Tools\n\n")
        self.assertIn(
            '<tools>\n{"type": "function", "function": {"name": "add", "parameters": {}}}\n</tools>', rendered
        )
        one_call = '<tool_call>\n{"name": "add", "arguments": {"x": 1}}\n</tool_call>'
        self.assertEndsWith(
            rendered,
            "<|im_start|>user\nQ<|im_end|>\n"
            f"<|im_start|>assistant\n<think>\nR\n</think>\n\n{one_call}\n{one_call}<|im_end|>\n"
            "<|im_start|>user\n<tool_response>\n2\n</tool_response>\n<tool_response>\n3\n</tool_response><|im_end|>\n"
            "<|im_start|>assistant\n<think>\n\n</think>\n\n5<|im_end|>\n",
        )


class TokenizersTest(parameterized.TestCase):
    @parameterized.parameters(*chat_templates.FAMILIES)
    def test_special_and_added_tokens_are_single_ids(self, family):
        made, tokenizer = chat_templates.FAMILIES[family], chat_templates.train_tokenizer(family)
        for text in made.special + made.added:
            (number,) = tokenizer.encode(text, add_special_tokens=False)
            self.assertEqual(tokenizer.decode([number]), text)
            self.assertEqual(tokenizer.decode([number], skip_special_tokens=True), "" if text in made.special else text)
        self.assertEqual((tokenizer.eos_token, tokenizer.bos_token), (made.eos, made.bos))

    @parameterized.parameters(*itertools.product(chat_templates.FAMILIES, (False, True)))
    def test_random_dialogues_render_encode_and_decode_to_the_same_text(self, family, reasoning):
        tokenizer, rng = chat_templates.train_tokenizer(family), np.random.default_rng(0)
        system = chat_templates.FAMILIES[family].system_role
        for turns in range(1, 12):
            dialogue = chat_templates.random_dialogue(rng, turns=turns, system=system, reasoning=reasoning)
            self.assertLen(dialogue.messages, 2 * turns + system)
            text = _render(family, [message.as_dict() for message in dialogue.messages])
            ids = tokenizer.encode(text, add_special_tokens=False)
            self.assertEqual(tokenizer.decode(ids), text)
            if "<unk>" in chat_templates.FAMILIES[family].special:
                self.assertNotIn(tokenizer.convert_tokens_to_ids("<unk>"), ids)

    @parameterized.parameters("gemma", "mistral")
    def test_sentencepiece_falls_back_to_bytes(self, family):
        tokenizer = chat_templates.train_tokenizer(family)
        self.assertEqual(tokenizer.tokenize("ŋ")[-2:], ["<0xC5>", "<0x8B>"])

    def test_prepended_space_only_where_the_family_has_it(self):
        self.assertStartsWith(chat_templates.train_tokenizer("mistral").tokenize("x")[0], "▁")
        self.assertEqual(chat_templates.train_tokenizer("gemma").tokenize("x"), ["x"])
        self.assertEqual(chat_templates.train_tokenizer("mistral").tokenize("<s>x"), ["<s>", "x"])

    @parameterized.parameters(*chat_templates.FAMILIES)
    def test_training_is_deterministic(self, family):
        made = chat_templates.train_tokenizer(family).backend_tokenizer.to_str()
        again = chat_templates.train_tokenizer.__wrapped__(family).backend_tokenizer.to_str()
        self.assertTrue(made == again)


if __name__ == "__main__":
    absltest.main()
