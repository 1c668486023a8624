"""dialog_jax init: the file that it writes is the config of a run, and says why."""

import copy
import json
import os
import pathlib
import tempfile
from unittest import mock

import jax
import pytest
from absl.testing import absltest

from dialog_jax.commands import config_flag
from dialog_jax.drafting import memory, survey
from dialog_jax.drafting.memory import Devices
from dialog_jax.model import hf_config
from dialog_jax.planning.compiling import Memory
from dialog_jax.training import config
from tests.commands import running
from tests.rendering import chat_templates
from tests.training import tiny

_CALL = {"type": "function", "function": {"name": "price", "arguments": {"item": "apple"}}}


def pair(*, length=1):
    reply = "fine, thank you " * length
    return [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": reply}]


class InitTest(absltest.TestCase):
    @classmethod
    def setUpClass(cls):
        super().setUpClass()
        cls.models = pathlib.Path(cls.enterClassContext(tempfile.TemporaryDirectory()))
        for name, family in (("chatml", "chatml"), ("qwen3", "qwen3"), ("base", "chatml")):
            tokenizer = copy.deepcopy(chat_templates.train_tokenizer(family))
            if name == "base":
                tokenizer.chat_template = None
            tokenizer.save_pretrained(cls.models / name)
            fields = hf_config.to_json(tiny.config(len(tokenizer)))
            (cls.models / name / "config.json").write_text(json.dumps(fields))  # without weights

    def setUp(self):
        super().setUp()
        self.directory = pathlib.Path(self.enter_context(tempfile.TemporaryDirectory()))
        self.out = self.directory / "my_config.py"

    def init(self, dialogues, *flags, family="chatml"):
        """(standard output, config of the written file, its text); nothing is compiled."""
        data = self.directory / "my.jsonl"
        records = [one if isinstance(one, dict) else {"messages": one} for one in dialogues]
        data.write_text("".join(json.dumps(record) + "\n" for record in records))
        with (
            mock.patch.object(memory, "find_devices", lambda: Devices("cpu", "cpu", 1, 8 * 10**9)),
            mock.patch.object(memory.simulated_devices, "simulate_devices"),
            mock.patch.object(memory, "_measure", lambda *_: Memory(0, 0, 0, 0, 0, 0, temporaries=10**9)),
        ):
            model = f"--model={self.models / family}"
            told, error = running.run("init", model, f"--data={data}", f"--out={self.out}", *flags)
        self.assertEmpty(error)
        values = config.from_config_dict(config_flag._load(self.out))
        self.assertEqual((values.model, values.data.train), (str(self.models / family), str(data)))
        return told, values, " ".join(self.out.read_text().replace("#", "").split())

    def test_one_long_dialogue_does_not_determine_the_row(self):
        told, values, text = self.init([pair() * 9] * 11 + [pair(length=150)])
        self.assertEqual(values.data.max_length, 512)
        self.assertIn("All but 1 of 100 responses keep all of their history.", text)
        self.assertIn("every dialogue is one path", text)
        self.assertEqual((values.lora.rank, values.frozen_dtype), (0, "auto"))
        self.assertIn(f"dialog_jax audit --config={self.out}", told)

    def test_many_long_dialogues_do_and_the_next_shorter_row_is_described(self):
        _, values, text = self.init([pair()] * 8 + [pair(length=150)] * 2)
        self.assertEqual(values.data.max_length, 1024)
        self.assertIn("With 512, 2 responses would lose a part.", text)

    def test_template_that_strips_reasoning_branches(self):
        turn = [
            {"role": "user", "content": "Price?"},
            {"role": "assistant", "content": "", "reasoning_content": "Look.", "tool_calls": [_CALL]},
            {"role": "tool", "content": "3"},
            {"role": "assistant", "content": "It is 3.", "reasoning_content": "So 3."},
        ]
        told, values, text = self.init([turn * 2] * 3 + [turn], family="qwen3")
        self.assertIn("differently from how it was generated in 3 of 4 dialogues", text)
        self.assertIn("these branch", told)
        self.assertEqual(dict(values.data.chat_template_kwargs), {})

    def test_unknown_roles_are_guessed_and_refused_records_skipped(self):
        named = [{"role": "The user", "content": "Hi"}, {"role": "AI assistant", "content": "Hello"}]
        told, values, text = self.init([named, pair(), {"nonsense": 1}])
        self.assertEqual(dict(values.data.roles), {"The user": "user", "AI assistant": "assistant"})
        self.assertEqual(values.data.on_error, "skip")
        self.assertIn("Refused: 1 of 3 records", text)
        self.assertIn("Sampled all of 3 records: 2 dialogues, 2 trained responses,", told)

    def test_speakers_of_unknown_roles_are_named_and_not_guessed(self):
        named = [{"role": "customer", "content": "Hi"}, {"role": "AI assistant", "content": "Hello"}]
        _, values, text = self.init([named, pair()])
        self.assertEqual((dict(values.data.roles), values.data.on_error), ({}, "skip"))
        speakers = "The roles of these speakers are not known: 'customer', 'AI assistant'."
        self.assertIn(f"SET THIS: {speakers} Give each its role in data.roles", text)
        data, other = self.directory / "other.jsonl", self.directory / "other.py"
        data.write_text(json.dumps({"messages": named}) + "\n")
        _, error = running.run("init", f"--model={self.models / 'chatml'}", f"--data={data}", f"--out={other}")
        self.assertIn(speakers, error)
        self.assertIn("Or rename them in the data", error)
        self.assertFalse(other.exists())

    def test_one_record_needs_held_out_data(self):
        _, _, text = self.init([pair()])
        self.assertIn("Sampled all of 1 record: 1 dialogue, 1 trained response,", text)
        self.assertIn("NAME A FILE in data.validation", text)
        self.assertIn("About 1 update per epoch", text)

    def test_large_data_is_looked_at_in_part(self):
        with mock.patch.object(survey, "LARGEST_SAMPLE", 10):
            _, _, text = self.init([pair()] * 39)
        self.assertIn("Sampled 10 of 39 records: 10 dialogues, 10 trained responses", text)

    def test_tokenizer_without_a_template_has_a_place_for_one(self):
        _, values, text = self.init([pair()], family="base")
        self.assertEqual((values.data.chat_template, values.data.max_length), ("", 1024))
        self.assertIn("SET THIS: the tokenizer has no chat template.", text)
        self.assertIn("run init again with --chat_template=FILE", text)

    def test_chat_template_of_a_file_is_looked_at(self):
        file = self.directory / "chatml.jinja"
        file.write_text(chat_templates.train_tokenizer("chatml").chat_template)
        _, values, text = self.init([pair()] * 10, f"--chat_template={file}", family="base")
        self.assertEqual((values.data.chat_template, values.data.max_length), (str(file), 512))
        self.assertNotIn("The tokenizer's own template.", text)
        self.assertIn("every dialogue is one path", text)

    @pytest.mark.full
    def test_memory_is_estimated_by_compiling_and_audit_takes_the_file_as_it_is(self):
        data = self.directory / "my.jsonl"
        data.write_text("".join(json.dumps({"messages": pair()}) + "\n" for _ in range(20)))
        self.assertLen(jax.devices(), 8)  # before one is simulated
        with mock.patch.dict(os.environ):
            told, error = running.run(
                "init", f"--model={self.models / 'chatml'}", f"--data={data}", f"--out={self.out}"
            )
        self.assertEmpty(error)
        self.assertRegex(told, r"All weights are trained: a step with one row takes 0\.\d GB of [\d.]+ GB")
        told, error = running.run("audit", f"--config={self.out}")
        self.assertEmpty(error)
        self.assertIn("20 records; 20 dialogues have something to train on", told)

    def test_file_of_axolotl_is_converted(self):
        file = self.directory / "axolotl.yml"
        file.write_text("base_model: m\nlearning_rate: 2e-5\nfrobnicate: 1\n")
        told, error = running.run("init", f"--from={file}", f"--out={self.out}")
        self.assertEmpty(error)
        self.assertIn("Carried over from axolotl.yml: base_model, learning_rate.", told)
        self.assertIn("Axolotl's defaults: sequence_len 512,", told)
        self.assertIn("multiply by the number of devices", told)
        self.assertRegex(told, r"Not carried over:\n  frobnicate +not recognized\n")
        self.assertIn("5 % are held out", told)
        values = config.from_config_dict(config_flag._load(self.out))
        self.assertEqual((values.model, values.optimizer.learning_rate), ("m", 2e-5))
        self.assertIn("Not carried over: frobnicate, ", self.out.read_text())

    def test_next_command_audits_a_set_of_several(self):
        file = self.directory / "axolotl.yml"
        file.write_text("base_model: m\ndatasets: [{path: a.jsonl}, {path: b.jsonl}]\n")
        told, _ = running.run("init", f"--from={file}", f"--out={self.out}")
        self.assertIn(f"dialog_jax audit --config={self.out} --data=set0\n", told)

    def test_nothing_is_overwritten_and_wrong_flags_are_explained(self):
        self.out.write_text("mine")
        model, data, out = "--model=m", "--data=d.jsonl", f"--out={self.out}"
        other = f"--out={self.directory / 'other.py'}"
        for flags, message in (
            ([model, data, out], "exists, and init overwrites nothing"),
            ([model, data, f"--out={self.directory / 'x.yml'}"], "Name one that ends in .py"),
            ([model, data], "--out is missing"),
            ([model, other], "--data is missing"),
            ([data, other], "--model is missing"),
            (["--from=a.yml", model, other], "--from is given with --model, --data or --chat_template"),
            (["--from=none.yml", other], "--from=none.yml: no such file"),
            ([f"--model={self.models / 'chatml'}", data, other], "d.jsonl: no such file"),
        ):
            _, error = running.run("init", *flags)
            self.assertIn(message, error)
        self.assertEqual(self.out.read_text(), "mine")
        self.assertEqual([file.name for file in self.directory.iterdir()], ["my_config.py"])


if __name__ == "__main__":
    absltest.main()
