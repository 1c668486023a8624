"""Runs opened as models: which checkpoint, with which base model, and that their parameters are those of the run."""

import pathlib
import tempfile

import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest, parameterized

from dialog_jax.errors import UserError
from dialog_jax.model import adapters, parameter_trees, pretrained
from dialog_jax.model.lora_config import LoraConfig
from dialog_jax.training import export, run_directory, trained_models
from dialog_jax.training.config import TrainConfig
from dialog_jax.training.optimizer_config import OptimizerConfig
from tests.training import hand_made

_LOSSES = {0: 1.0, 1: 2.0, 2: 3.0}


class OpenedRunTest(parameterized.TestCase):
    def setUp(self):
        super().setUp()
        self.directory = pathlib.Path(self.enter_context(tempfile.TemporaryDirectory()))
        self.base, self.run_directory = self.directory / "base", self.directory / "run"
        self.model = hand_made.save_model(self.base)
        self.notes = []

    def make(self, losses=_LOSSES, **fields):
        config = TrainConfig(model=str(self.base), **fields)
        return hand_made.make_run(self.run_directory, config, self.base, losses=losses)

    def load(self, base="", **options):
        options = {"allow_special_tokens": False, "chat_template_kwargs": {}, "template_time": ""} | options
        return trained_models.load_model(
            str(self.run_directory), base=base, report=self.notes.append, responses="rendered", **options
        )

    @parameterized.parameters(
        {}, {"lora": LoraConfig(rank=2, targets=("q_proj", "embed_tokens"))}, {"freeze": ("embedding", "layers/*norm")}
    )
    def test_parameters_are_those_of_the_best_checkpoint_and_of_the_model_it_began_with(self, **fields):
        parts = self.make(**fields)[1]
        model = self.load(str(self.base) if fields else "")
        expected = parameter_trees.merge(parts.trained, parts.frozen)
        jax.tree.map(np.testing.assert_array_equal, model.parameters, expected)
        self.assertEqual(self.notes, [f"{self.run_directory}: step 1, the best by held-out loss"])
        self.assertEqual(model.config, self.model)
        self.assertContainsSubset({1, 2}, model.stop_tokens)
        self.assertEqual(model.tokenizer.name_or_path, str(self.run_directory / "tokenizer"))

    def test_latest_is_taken_where_none_was_evaluated(self):
        parts = self.make()[2]
        (self.run_directory / "evaluation.jsonl").unlink()
        model = self.load()
        jax.tree.map(np.testing.assert_array_equal, model.parameters, parts.trained)
        self.assertEqual(self.notes, [f"{self.run_directory}: step 2, the latest"])

    def test_base_that_cannot_be_found_or_is_another_is_explained(self):
        self.make(lora=LoraConfig(rank=2))
        with self.assertRaisesRegex(UserError, "began with the model 'base', which is not here; .*--base=PATH"):
            self.load()
        other = self.directory / "other"
        hand_made.save_model(other, norm_epsilon=1e-5)
        with self.assertRaisesRegex(UserError, "other is another model than .*run began with"):
            self.load(str(other))

    def test_base_that_is_not_needed_is_an_error(self):
        self.make()
        with self.assertRaisesRegex(
            UserError, "--base is .*base, and .*run needs no other model: it is a run that has"
        ):
            self.load(str(self.base))
        with self.assertRaisesRegex(UserError, "--base is b, and .*base needs no other model: it is no run. Leave"):
            trained_models.load_model(str(self.base), base="b", report=self.notes.append)

    def test_run_takes_no_adapter(self):
        self.make()
        with self.assertRaisesRegex(UserError, "run is a run, and --adapter=a is for a model"):
            self.load(adapter="a")

    def test_exported_adapter_gives_the_parameters_of_the_run(self):
        lora = LoraConfig(rank=3, alpha=5.0, rslora=True, rank_pattern={"v_proj": 1}, targets=("v_proj", "up_proj"))
        parts = self.make(lora=lora)[1]
        out = self.directory / "adapter"
        export.export_model(self.run_directory, out)
        model = trained_models.load_model(str(self.base), adapter=str(out), report=self.notes.append)
        _, merged = adapters.merge_factors(self.model, model.parameters)
        parameters = jax.tree.map(jnp.asarray, parameter_trees.merge(parts.trained, parts.frozen))
        _, expected = adapters.merge_factors(self.model, parameters)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), merged, expected)
        self.assertEqual(model.tokenizer.name_or_path, str(out))
        self.assertEmpty(self.notes)

    def test_model_that_was_trained_before_runs_said_what_they_train_is_whole(self):
        self.make()
        file = self.run_directory / "model.json"
        text = file.read_text()
        start, end = text.index(' "trained"'), text.index(' "stop_tokens"')
        file.write_text(text[:start] + text[end:])
        self.assertEqual(
            run_directory.read_model(self.run_directory).selection.trained_paths,
            frozenset(parameter_trees.flatten(pretrained.load_parameters(self.base, self.model))),
        )

    def test_average_is_that_of_the_checkpoint_and_an_error_where_none_is_kept(self):
        lora = LoraConfig(rank=2, targets=("q_proj",), learning_rate_ratio=2.0)
        parts = self.make(losses={2: 1.0}, optimizer=OptimizerConfig(ema_decay=0.9, clip_norm=0.0), lora=lora)
        model = run_directory.read_model(self.run_directory)
        average = trained_models.read_trained(self.run_directory, model, 2, average=True)
        jax.tree.map(np.testing.assert_array_equal, average, jax.tree.map(lambda leaf: 2 * leaf, parts[2].trained))
        file = self.run_directory / "config.json"
        file.write_text(file.read_text().replace('"ema_decay": 0.9', '"ema_decay": 0.0'))
        with self.assertRaisesRegex(UserError, "keeps no average of its weights .*ema_decay"):
            trained_models.read_trained(self.run_directory, model, 2, average=True)


if __name__ == "__main__":
    absltest.main()
