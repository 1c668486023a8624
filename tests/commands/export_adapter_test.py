"""dialog_jax export of runs that trained an adapter or a part of a model: PEFT directories and merged models."""

import dataclasses
import json
import pathlib
import shutil
import tempfile
from unittest import mock

import huggingface_hub
import numpy as np
import pytest
from absl.testing import absltest, parameterized

from dialog_jax.errors import UserError
from dialog_jax.model import model_files, parameter_trees, peft_files, peft_reading, pretrained
from dialog_jax.model.lora_config import LoraConfig
from dialog_jax.model.soft_prompt_config import SoftPromptConfig
from dialog_jax.rendering.tokenizers import load_tokenizer
from dialog_jax.training.config import TrainConfig
from dialog_jax.training.optimizer_config import OptimizerConfig
from tests.commands import running
from tests.training import hand_made, tiny

_LORA = LoraConfig(rank=3, alpha=5.0, targets=("q_proj", "down_proj"), rank_pattern={"down_proj": 2})
_LOSSES = {0: 1.0, 1: 2.0, 2: 3.0}


class ExportAdapterTest(parameterized.TestCase):
    def setUp(self):
        super().setUp()
        self.directory = pathlib.Path(self.enter_context(tempfile.TemporaryDirectory()))
        self.base, self.run_directory = self.directory / "base", self.directory / "run"
        self.out = self.directory / "out"

    def make(self, config=None, *, losses=_LOSSES, **fields):
        self.model = hand_made.save_model(self.base)
        config = dataclasses.replace(config or TrainConfig(lora=_LORA), model=str(self.base))
        return hand_made.make_run(self.run_directory, config, self.base, losses=losses, **fields)

    def export(self, *flags):
        return running.run("export", f"--run={self.run_directory}", f"--out={self.out}", *flags)

    def test_adapter_is_a_directory_of_peft_with_tokenizer_card_and_the_hash_of_its_base(self):
        parts = self.make(hub_name="owner/some", licence={"license": "mit"}, dtype="bfloat16")[1]
        told, error = self.export()
        self.assertEmpty(error)
        self.assertRegex(told, r"step 1, [\d,]+ parameters of an adapter in float32")
        names = {path.name for path in self.out.iterdir()}
        self.assertContainsSubset(
            {"adapter_config.json", "adapter_model.safetensors", "tokenizer.json", "README.md", "export.json"}, names
        )
        self.assertNoCommonElements({"config.json", "model.safetensors"}, names)
        fields = json.loads((self.out / "adapter_config.json").read_text())
        self.assertEqual((fields["base_model_name_or_path"], fields["r"]), ("owner/some", 3))
        self.assertEqual(
            huggingface_hub.metadata_load(self.out / "README.md"),
            {
                "base_model": "owner/some",
                "license": "mit",
                "library_name": "peft",
                "pipeline_tag": "text-generation",
            },
        )
        self.assertIn("fine-tuned on dialogues: an adapter", (self.out / "README.md").read_text())
        self.assertIn("| trained | lora: rank 3, alpha 5.0, targets [", (self.out / "README.md").read_text())
        origin = json.loads((self.out / "export.json").read_text())
        self.assertEqual((origin["step"], origin["base"]), (1, model_files.fingerprint(self.base)))
        self.assertTrue(load_tokenizer(self.out).chat_template)
        adapter = peft_reading.read_adapter(self.out, self.model, base=self.base)
        a = parameter_trees.flatten(adapter.factors)["layers/attention/w_query/lora_a"]
        np.testing.assert_array_equal(a, parts.trained["layers"]["attention"]["w_query"]["lora_a"])
        self.assertIn("already there, exported from step 1", self.export()[0])
        self.assertIn(f"--base is {self.base}, and an adapter is exported", self.export(f"--base={self.base}")[1])
        self.assertIn("holds no export of step 1", self.export("--merge", f"--base={self.base}")[1])

    def test_names_are_those_of_the_model_that_contains_the_base(self):
        self.make(losses={1: 1.0}, wrapped=True)
        self.export()
        fields = peft_reading.read_adapter(self.out, self.model).scales
        self.assertLen(fields, 2)
        with open(self.out / peft_files.WEIGHTS, "rb") as file:
            self.assertIn(b"base_model.model.model.language_model.layers.0.self_attn.q_proj.lora_A", file.read(4096))

    @parameterized.parameters(((), True), (("embed_tokens",), False), (("lm_head",), False))
    @pytest.mark.quick_every(3)
    def test_merged_model_is_base_plus_update_in_the_type_of_the_base(self, more, tied):
        lora = LoraConfig(rank=2, alpha=3.0, targets=("v_proj", *more))
        parts = self.make(TrainConfig(lora=lora), dtype="bfloat16")[1]
        told, error = self.export("--merge", f"--base={self.base}")
        self.assertEmpty(error)
        self.assertIn("parameters in bfloat16", told)
        merged = pretrained.load_config(self.out)
        self.assertEqual(merged.tie_embeddings, tied)
        self.assertEqual(json.loads((self.out / "config.json").read_text())["dtype"], "bfloat16")
        loaded = parameter_trees.flatten(pretrained.load_parameters(self.out, merged))
        base = parameter_trees.flatten(pretrained.load_parameters(self.base, self.model))
        factors = parameter_trees.flatten(parts.trained)
        base["lm_head"] = base["embedding"]
        for path, leaf in loaded.items():
            expected = np.float64(base[path])
            if f"{path}/lora_a" in factors:
                a, b = (np.float64(factors[f"{path}/{name}"]) for name in ("lora_a", "lora_b"))
                update = 1.5 * a @ b
                expected = expected + (update.T if path == "lm_head" else update)
            np.testing.assert_allclose(leaf, expected, rtol=2**-8, atol=1e-6)
        self.assertNotIn("peft", (self.out / "README.md").read_text())

    def test_run_that_froze_a_part_gives_a_whole_model(self):
        parts = self.make(TrainConfig(freeze=("embedding", "layers/feed_forward/*")))[1]
        _, error = self.export()
        self.assertRegex(error, "began with the model 'base', which is not here; .*Name it: --base=PATH")
        self.export(f"--base={self.base}")
        self.assertIn("| trained | freeze: embedding, layers/feed_forward/* |", (self.out / "README.md").read_text())
        loaded = parameter_trees.flatten(pretrained.load_parameters(self.out, self.model))
        expected = parameter_trees.flatten(parameter_trees.merge(parts.trained, parts.frozen))
        for path, leaf in loaded.items():
            np.testing.assert_array_equal(leaf, expected[path], path)

    def test_average_is_exported_in_place_of_the_weights(self):
        config = TrainConfig(lora=_LORA, optimizer=OptimizerConfig(ema_decay=0.9))
        parts = self.make(config, losses={1: 1.0})[1]
        self.export("--ema")
        adapter = peft_reading.read_adapter(self.out, self.model)
        a = parameter_trees.flatten(adapter.factors)["layers/attention/w_query/lora_a"]
        np.testing.assert_array_equal(a, 2 * parts.trained["layers"]["attention"]["w_query"]["lora_a"])
        self.assertIn("float32, exponential moving average (computed", (self.out / "README.md").read_text())
        self.assertIn("holds no export of step 1", self.export()[1])

    def test_soft_prompt_is_a_directory_of_peft_by_itself_or_within_that_of_lora(self):
        prompt = SoftPromptConfig(tokens=5, init="text", text="Hello there")
        parts = self.make(TrainConfig(soft_prompt=prompt), losses={1: 1.0})[1]
        self.export()
        adapter = peft_reading.read_adapter(self.out, self.model, base=self.base)
        np.testing.assert_array_equal(adapter.soft_prompt, parts.trained["soft_prompt"])
        fields = json.loads((self.out / "adapter_config.json").read_text())
        expected = ("PROMPT_TUNING", 5, "TEXT", "Hello there")
        names = ("peft_type", "num_virtual_tokens", "prompt_tuning_init", "prompt_tuning_init_text")
        self.assertEqual(tuple(fields[name] for name in names), expected)
        self.assertIn("a soft prompt, which is part of no matrix", self.export("--merge")[1])
        for path in (self.out, self.run_directory, self.base):
            shutil.rmtree(path)
        parts = self.make(TrainConfig(soft_prompt=prompt, lora=_LORA), losses={1: 1.0})[1]
        self.export()
        adapter = peft_reading.read_adapter(self.out, self.model, base=self.base)
        np.testing.assert_array_equal(adapter.soft_prompt, parts.trained["soft_prompt"])
        self.assertLen(adapter.scales, 2)
        shutil.rmtree(self.out)
        self.export("--merge", f"--base={self.base}")
        merged = pretrained.load_config(self.out)
        pretrained.load_parameters(self.out, merged)
        beside = peft_reading.read_adapter(self.out / peft_files.PROMPT, merged, base=self.out)
        np.testing.assert_array_equal(beside.soft_prompt, parts.trained["soft_prompt"])
        with self.assertRaisesRegex(UserError, "trained on another model than base"):
            peft_reading.read_adapter(self.out / peft_files.PROMPT, merged, base=self.base)

    def test_rows_that_a_run_added_are_exported_with_its_soft_prompt(self):
        self.make(TrainConfig(soft_prompt=SoftPromptConfig(tokens=2)), losses={1: 1.0}, added_rows=3)
        self.assertRegex(self.export()[1], "added 3 rows to the embedding .*--merge")
        with mock.patch.object(pretrained, "load_parameters", return_value=tiny.parameters(self.model)):
            self.export("--merge", f"--base={self.base}")
        merged = pretrained.load_config(self.out)
        self.assertLen(peft_reading.read_adapter(self.out / peft_files.PROMPT, merged, base=self.out).soft_prompt, 2)

    def test_what_cannot_be_exported_is_explained(self):
        self.make(losses={1: 1.0}, added_rows=3)
        self.assertRegex(self.export()[1], "added 3 rows to the embedding .*--merge")
        self.assertRegex(self.export("--merge", "--ema", f"--base={self.base}")[1], "keeps no average")
        hand_made.save_model(self.directory / "other", norm_epsilon=1e-5)
        error = self.export("--merge", f"--base={self.directory / 'other'}")[1]
        self.assertRegex(error, "other is another model than .*run began with")
        self.assertFalse(self.out.exists())
        shutil.rmtree(self.run_directory)
        shutil.rmtree(self.base)
        self.make(TrainConfig(), losses={1: 1.0})
        self.assertRegex(self.export("--merge")[1], "trained no adapter, so there is nothing to merge")


if __name__ == "__main__":
    absltest.main()
