"""dialog_jax check on tiny models in directories: what it prints, and what it exits with."""

import json
import pathlib
import tempfile
from unittest import mock

import pytest
from absl.testing import absltest

from dialog_jax.batching import batches
from dialog_jax.model import saving
from tests.commands import running
from tests.rendering import chat_templates
from tests.training import tiny

_THOUGHT = "<think>\nten and nine\n</think>\n\n"


def record(number, turns=2, **extra):
    messages = []
    for turn in range(turns):
        messages.append({"role": "user", "content": f"What is {number} plus {turn}?"})
        messages.append({"role": "assistant", "content": f"{_THOUGHT}{number + turn}."})
    return {"id": f"d{number}", "messages": messages, **extra}


class CheckTest(absltest.TestCase):
    def setUp(self):
        super().setUp()
        self.directory = pathlib.Path(self.enter_context(tempfile.TemporaryDirectory()))

    def check(self, records, *arguments, family="qwen3"):
        """(exit code, standard output, standard error)."""
        if not (self.directory / "model").exists():
            tokenizer = chat_templates.train_tokenizer(family)
            model = tiny.config(len(tokenizer), max_length=512)
            saving.save_pretrained(self.directory / "model", model, tiny.parameters(model), tokenizer=tokenizer)
        data = self.directory / "data.jsonl"
        data.write_text("".join(json.dumps(each) + "\n" for each in records))
        told, error = running.run(
            "check",
            f"--config.model={self.directory / 'model'}",
            f"--config.data.train={data}",
            "--config.data.max_length=512",
            *arguments,
        )
        code = int(error.rpartition("[exit code ")[2].rstrip("]")) if "[exit code " in error else 0
        return code, told, error

    @pytest.mark.full
    def test_dialogues_that_spell_special_tokens_agree(self):
        spelled = record(1)
        for message in spelled["messages"]:
            message["content"] += "<|im_end|>\n<|im_start|>user\n<|im_end"
        code, told, error = self.check([record(0), spelled])
        self.assertEqual((code, error), (0, ""), told)

    def test_agreement_is_told_with_what_was_compared(self):
        code, told, _ = self.check([record(n) for n in range(12)], "--dialogues=3")
        self.assertEqual(code, 0)
        lines = told.splitlines()
        self.assertEqual(lines[0], "sample     3 of the 12 dialogues of data.jsonl, seed 0")
        self.assertRegex(
            lines[1], r"^compared   dialogues 3 \(3 branch\), responses 6, their tokens \d+, rows 1 of 256$"
        )
        self.assertRegex(lines[2], r"^tokens     one pass \d+, K passes \d+: 1\.\d\d times as many")
        self.assertEqual(lines[-1], "PASSED: one pass equals K passes (dialogues 3, responses 6; left out none)")
        self.assertIn("left out   none", told)

    @pytest.mark.full
    def test_the_seed_chooses_the_dialogues(self):
        records = [record(n) for n in range(12)]
        first, again, other = (
            self.check(records, "--dialogues=3", f"--seed={seed}")[1].splitlines() for seed in (0, 0, 1)
        )
        self.assertEqual(again, first)
        self.assertNotEqual(other[3], first[3])

    def test_disagreement_exits_with_2_and_says_where(self):
        fill_rows = batches.fill_rows

        def without_a_weight(*args, **kwargs):
            batch = fill_rows(*args, **kwargs)
            batch.weight[0, 2] = 0
            return batch

        with mock.patch.object(batches, "fill_rows", without_a_weight):
            code, told, _ = self.check([record(1)])
        self.assertEqual(code, 2)
        self.assertRegex(told, r"dialogue d1 \(data.jsonl:1\), message 1 \(turn 0\),\s+token 2 ")
        self.assertRegex(told.splitlines()[-1], r"^FAILED: one pass and K passes differ in token ids \(1 of \d+\), ")

    def test_nothing_compared_is_a_failure(self):
        code, told, _ = self.check([record(1)], "--config.data.max_length=16")
        self.assertEqual(code, 2)
        self.assertIn("dialogue d1 (data.jsonl:1): 2 of 2 responses, which exceed 16 tokens", told)
        self.assertEqual(told.splitlines()[-1], "FAILED: nothing was compared")

    def test_template_that_refuses_is_named(self):
        first = record(1)
        first["messages"].insert(0, {"role": "system", "content": "Be brief."})
        template = chat_templates.TEMPLATES["gemma"].replace("{{- bos_token -}}", "")
        template = template.replace("<end_of_turn>", "<|im_end|>")
        code, told, _ = self.check([first, record(2)], f"--config.data.chat_template={template}")
        self.assertEqual(code, 0, told)
        self.assertRegex(told, r"left out   1\n +refused: dialogue d1 \(data.jsonl:1\): .*System role not supported")
        self.assertEndsWith(told.splitlines()[-1], "(dialogues 1, responses 2; left out 1, see above)")

    def test_variables_of_the_template_reach_both_sides(self):
        # Without thinking, the prompt ends in an empty block, which no response with reasoning continues.
        plain = record(2)
        for message in plain["messages"]:
            message["content"] = message["content"].removeprefix(_THOUGHT)
        code, told, _ = self.check([record(1), plain], '--config.data.chat_template_kwargs={"enable_thinking": False}')
        self.assertEqual(code, 0, told)
        self.assertIn("refused: dialogue d1", told)

    def test_user_errors_exit_with_1_and_a_sentence(self):
        code, told, error = self.check([record(1)], f"--config.data.train={self.directory / 'none.jsonl'}")
        self.assertEqual((code, told), (1, ""))
        self.assertIn("dialog_jax check: none.jsonl: no such file.", error)
        code, _, error = self.check([record(1)], f"--config.model={self.directory / 'none'}")
        self.assertEqual(code, 1)
        self.assertStartsWith(error, "dialog_jax check: ")
        code, _, error = self.check([record(1)], "--config.data.chat_template_kwargs={")
        self.assertEqual(code, 1)
        self.assertIn("--config.data.chat_template_kwargs is ", error)


if __name__ == "__main__":
    absltest.main()
