"""Runs that continue an adapter begin with the adapted model, and resume with the same adapter and base only."""

import dataclasses
import io
import pathlib
import tempfile

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import rich.console
from absl.testing import absltest

from dialog_jax.errors import UserError
from dialog_jax.evaluation import scoring
from dialog_jax.inference import loading
from dialog_jax.model import adapters, peft_files, peft_reading, pretrained, saving
from dialog_jax.model.lora_config import LoraConfig
from dialog_jax.model.soft_prompt_config import SoftPromptConfig
from dialog_jax.training import config as config_lib
from dialog_jax.training import data_sources, export, run, run_directory, run_inputs, trainable
from dialog_jax.training.config import TrainConfig
from dialog_jax.training.optimizer_config import OptimizerConfig
from tests.training import hand_made, tiny

_LORA = LoraConfig(rank=3, alpha=5.0, targets=("q_proj", "down_proj", "embed_tokens"), rank_pattern={"down_proj": 2})


def write_adapter(directory, model, *, seed=0):
    """Writes an adapter with random factors."""
    scales = adapters.find_scales(model, _LORA)
    rng = np.random.default_rng(seed)
    factors = jax.tree.map(
        lambda leaf: rng.normal(size=leaf.shape).astype(np.float32) / 3, adapters.abstract_factors(model, scales)
    )
    directory.mkdir()
    peft_files.write_lora(directory, model, scales, factors, base_name="some")
    return str(directory)


class AdapterRunTest(absltest.TestCase):
    def setUp(self):
        super().setUp()
        self.directory = pathlib.Path(self.enter_context(tempfile.TemporaryDirectory()))
        self.config = tiny.run_config(
            self.directory,
            gradient_accumulation=1,
            steps=2,
            optimizer=OptimizerConfig(warmup_steps=0, learning_rate=3e-4),
        )
        self.model = pretrained.load_config(self.config.model)
        self.adapter = write_adapter(self.directory / "adapter", self.model)
        self.log = io.StringIO()

    def run_training(self, **changes):
        console = rich.console.Console(file=self.log, highlight=False, soft_wrap=True)
        return run.run(dataclasses.replace(self.config, **changes), self.directory / "run", console=console)

    @pytest.mark.full
    def test_run_begins_with_the_adapted_model_trains_its_factors_and_resumes_with_the_same_files_only(self):
        result = self.run_training(adapter=self.adapter, lora=LoraConfig(dropout=0.1, learning_rate_ratio=2.0))
        self.assertEqual(result.step, 2)
        self.assertIn("layers/attention/w_query/lora_a 2x32x3 float32", self.log.getvalue())

        # Before training the loss is that of the merged model, and afterwards only the factors differ.
        adapted = loading.load_model(self.config.model, adapter=self.adapter)
        merged, parameters = adapters.merge_factors(self.model, adapted.parameters)
        source = data_sources.validation_source(self.config)
        scores = scoring.score_dialogues(
            source.iterate(), adapted.renderer, merged, parameters, compute_dtype=jnp.float32
        )
        records = [score.record for score in scores]
        mean = sum(record["nll"] for record in records) / sum(record["tokens"] for record in records)
        self.assertAlmostEqual(result.initial["loss"], mean, delta=1e-4 * mean)
        export.export_model(self.directory / "run", self.directory / "out", step="latest")
        before = peft_reading.read_adapter(pathlib.Path(self.adapter), self.model)
        after = peft_reading.read_adapter(self.directory / "out", self.model, base=pathlib.Path(self.config.model))
        jax.tree.map(np.testing.assert_array_equal, after.scales, dict(before.scales))
        changes = jax.tree.map(lambda a, b: float(np.abs(a - b).max()), after.factors, before.factors)
        self.assertBetween(min(jax.tree.leaves(changes)), 1e-7, 1e-2)

        # Resuming.
        lora = LoraConfig(dropout=0.1, learning_rate_ratio=2.0)
        self.assertEqual(self.run_training(adapter=self.adapter, lora=lora), result)
        other = write_adapter(self.directory / "other", self.model, seed=1)
        with self.assertRaisesRegex(UserError, r"another config or data \(adapter: \w+ before, \w+ now\)"):
            self.run_training(adapter=other, lora=lora)
        with self.assertRaisesRegex(UserError, r"lora.rank: 0 before, 3 now"):
            self.run_training(lora=dataclasses.replace(lora, rank=3))
        base = self.directory / "base" / "model"
        tensors = pretrained.load_parameters(self.config.model, self.model)
        tensors["final_norm"] = tensors["final_norm"] * 2
        saving.save_pretrained(base, self.model, tensors, tokenizer=adapted.tokenizer)
        with self.assertRaisesRegex(UserError, r"another config or data \(model: \w+ before, \w+ now\)"):
            self.run_training(adapter=self.adapter, lora=lora, model=str(base))

    def test_adapter_of_another_model_leaves_no_run(self):
        hand_made.save_model(self.directory / "wide", width=48)
        other = pretrained.load_config(self.directory / "wide")
        adapter = write_adapter(self.directory / "other", other)
        with self.assertRaisesRegex(UserError, "Name the model that the adapter was trained on"):
            self.run_training(adapter=adapter)
        with self.assertRaisesRegex(UserError, "nowhere: adapter_config.json is missing"):
            self.run_training(adapter=str(self.directory / "nowhere"))
        self.assertEqual(run_directory.read_hashes(self.directory / "run"), {})

    def test_soft_prompt_of_an_adapter_is_continued_if_it_leaves_room(self):
        prompt = np.random.default_rng(0).normal(size=(5, 32)).astype(np.float32)
        directory = self.directory / "prompt"
        directory.mkdir()
        peft_files.write_prompt(directory, self.model, prompt, base_name="some")
        config = dataclasses.replace(self.config, adapter=str(directory))
        (self.directory / "run").mkdir()
        inputs = run_inputs.read_inputs(config, self.directory / "run", rich.console.Console(file=self.log))
        np.testing.assert_array_equal(inputs.train.tokens[:5], self.model.vocab_size + np.arange(5))
        selection = trainable.select(config, self.model, jnp.float32, inputs.adapter)
        parts = trainable.make_parameters(
            selection, tiny.parameters(self.model), jax.random.key(0), adapter=inputs.adapter
        )
        self.assertEqual(list(parts.trained), ["soft_prompt"])
        np.testing.assert_array_equal(parts.trained["soft_prompt"], prompt)
        with self.assertRaisesRegex(UserError, "soft_prompt.tokens is 2 and the adapter .* soft prompt of 5"):
            self.run_training(adapter=str(directory), soft_prompt=SoftPromptConfig(tokens=2))
        data = dataclasses.replace(self.config.data, max_length=6)
        with self.assertRaisesRegex(UserError, "prompt has 5 tokens and data.max_length is 6, which leaves no room"):
            self.run_training(adapter=str(directory), data=data)


class ConfigTest(absltest.TestCase):
    def test_adapter_is_continued_with_its_own_ranks_and_the_learning_rate_of_lora(self):
        config = TrainConfig(adapter="some", lora=LoraConfig(dropout=0.1))
        self.assertEqual(config.resolve().optimizer.learning_rate, 3e-4)
        with self.assertRaisesRegex(UserError, "adapter is 'some' and lora.rank is 4; the adapter has its own"):
            TrainConfig(adapter="some", lora=LoraConfig(rank=4))
        with self.assertRaisesRegex(UserError, "train_only is set with adapter"):
            TrainConfig(adapter="some", train_only=("embedding",))

    def test_patterns_of_ranks_go_through_the_form_that_flags_override(self):
        lora = LoraConfig(rank=2, rank_pattern={r"layers\.0\.mlp.up_proj": 1}, alpha_pattern={"a.b": 2.0})
        config = TrainConfig(lora=lora)
        self.assertEqual(config_lib.from_config_dict(config_lib.to_config_dict(config)), config)


if __name__ == "__main__":
    absltest.main()
