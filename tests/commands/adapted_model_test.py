"""Commands that read a model take a run, or a model with an adapter: each does what it does with the merged model."""

import json
import pathlib
import tempfile
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl.testing import absltest, parameterized

from dialog_jax.evaluation import agreement
from dialog_jax.model import parameter_trees, peft_files
from dialog_jax.model.lora_config import LoraConfig
from dialog_jax.model.soft_prompt_config import SoftPromptConfig
from dialog_jax.training import export, trainable
from dialog_jax.training.config import TrainConfig
from tests.commands import running
from tests.training import hand_made, tiny

_MESSAGES = [
    {"role": "user", "content": "Hello"},
    {"role": "assistant", "content": "I am fine"},
    {"role": "user", "content": "And the first question?"},
    {"role": "assistant", "content": "This is the answer"},
]
_LORA = LoraConfig(rank=3, alpha=5.0, targets=("q_proj", "down_proj"))


class AdaptedModelTest(parameterized.TestCase):
    @classmethod
    def setUpClass(cls):
        super().setUpClass()
        directory = tempfile.TemporaryDirectory()
        cls.addClassCleanup(directory.cleanup)
        cls.directory = pathlib.Path(directory.name)
        cls.base, cls.run_directory = cls.directory / "base", cls.directory / "run"
        hand_made.save_model(cls.base, max_length=256)
        config = TrainConfig(model=str(cls.base), lora=_LORA, soft_prompt=SoftPromptConfig(tokens=3))
        hand_made.make_run(cls.run_directory, config, cls.base, losses={1: 2.0, 2: 3.0})
        export.export_model(cls.run_directory, cls.directory / "adapter")
        export.export_model(cls.run_directory, cls.directory / "merged", merge=True, base=str(cls.base))
        cls.data = cls.directory / "data.jsonl"
        cls.data.write_text(json.dumps({"id": "a", "messages": _MESSAGES}) + "\n")
        cls.models = {
            "merged": [
                f"--config.model={cls.directory / 'merged'}",
                f"--adapter={cls.directory / 'merged' / peft_files.PROMPT}",
            ],
            "adapter": [f"--config.model={cls.base}", f"--adapter={cls.directory / 'adapter'}"],
            "run": [f"--config.model={cls.run_directory}", f"--base={cls.base}"],
        }

    @pytest.mark.full
    def test_replies_are_those_of_the_merged_model_and_the_checkpoint_of_a_run_is_told(self):
        flags = ("--message=Hello", "--temperature=0", "--max_new_tokens=8")
        outcomes = {name: running.run("chat", *model, *flags) for name, model in self.models.items()}
        self.assertLen({reply for reply, _ in outcomes.values()}, 1)
        self.assertNotEqual(running.run("chat", f"--config.model={self.base}", *flags)[0], outcomes["run"][0])
        self.assertIn("run: step 1, the best by held-out loss", outcomes["run"][1])
        self.assertNotIn("step", outcomes["adapter"][1])

    @pytest.mark.full
    def test_scores_are_those_of_the_merged_model(self):
        nll = {}
        for name, model in self.models.items():
            out = self.directory / f"{name}.jsonl"
            running.run("score", *model, f"--config.data.train={self.data}", f"--out={out}")
            nll[name] = json.loads(out.read_text())["nll"]
        np.testing.assert_allclose(list(nll.values()), nll["merged"], rtol=1e-5)

    @pytest.mark.full
    def test_runs_are_compared_with_models(self):
        told, error = running.run(
            "compare",
            f"--models={self.base},{self.run_directory}",
            f"--base={self.base}",
            f"--config.data.train={self.data}",
            "--max_new_tokens=4",
        )
        self.assertIn("base writes", told)
        self.assertIn("run writes", told)
        self.assertIn("step 1, the best by held-out loss", error)

    def test_tokenizer_is_that_of_the_run_or_of_the_adapter(self):
        shown = [
            running.run("show", *model, f"--config.data.train={self.data}")
            for model in (self.models["run"][:1], self.models["adapter"])
        ]
        self.assertEqual(shown[0], shown[1])
        self.assertIn("⟦This is the answer", shown[0][0])
        self.assertIn("<soft prompt: 3 tokens>", shown[0][0])

    def test_two_adapters_are_refused(self):
        for command in ("chat", "show"):
            _, error = running.run(command, *self.models["adapter"], "--config.adapter=other")
            self.assertIn("adapter and config.adapter is other. Name one of the two", error)

    @pytest.mark.full
    def test_check_compares_the_gradient_of_the_adapter_alone(self):
        for flags, trained, count in (
            (self.models["adapter"], "lora_|soft_prompt", 5),
            ([f"--config.model={self.base}", "--config.lora.rank=2"], "lora_", 14),
            ([f"--config.model={self.base}", "--config.lora.rank=2", "--config.frozen_dtype=nf4"], "lora_", 14),
            ([f"--config.model={self.base}", "--config.train_only=*norm"], "norm", 3),
        ):
            with mock.patch.object(agreement, "compare", side_effect=agreement.compare) as compare:
                told, error = running.run(
                    "check", *flags, f"--config.data.train={self.data}", "--config.data.max_length=256"
                )
            self.assertIn("PASSED", told, error)
            paths = parameter_trees.flatten(compare.call_args.args[3].trained)
            self.assertLen(paths, count)
            for path in paths:
                self.assertRegex(path, trained)

    @parameterized.parameters("auto", "bfloat16", "int8", "nf4")
    def test_frozen_matrices_have_the_type_of_training(self, frozen_dtype):
        model = tiny.config(96)
        config = TrainConfig(lora=LoraConfig(rank=2), frozen_dtype=frozen_dtype)
        parts = trainable.divide(config, model, tiny.parameters(model))
        float32 = trainable.divide(TrainConfig(lora=config.lora), model, tiny.parameters(model))
        again = trainable.divide(TrainConfig(frozen_dtype=frozen_dtype), model, parameter_trees.merge(*float32))
        declared = trainable.abstract_parameters(trainable.select(config, model, jnp.float32))
        for one in (parts, again):
            described = jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), one)
            self.assertEqual(described, jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), declared))

    def test_factors_that_are_zero_are_drawn_so_that_all_have_a_gradient(self):
        model = tiny.config(96)
        fresh = trainable.divide(TrainConfig(lora=LoraConfig(rank=2)), model, tiny.parameters(model))
        tree = parameter_trees.merge(fresh.trained, fresh.frozen)
        tree["layers"]["attention"]["w_query"]["lora_b"] = jnp.zeros((2, 2, 32))
        again = trainable.divide(TrainConfig(), model, tree)
        for parts in (fresh, again):
            for path, leaf in parameter_trees.flatten(parts.trained).items():
                self.assertTrue(leaf.any(), path)
        kept = [parameter_trees.flatten(parts.trained)["layers/attention/w_key/lora_a"] for parts in (fresh, again)]
        np.testing.assert_array_equal(*kept)
        jax.tree.map(np.testing.assert_array_equal, again.frozen, fresh.frozen)


if __name__ == "__main__":
    absltest.main()
