"""Flags of dialog_jax train: every field can be set, an unknown one lists those there are, bad values are explained."""

import pathlib
import tempfile
from unittest import mock

from absl.testing import absltest, parameterized

import tests.experiments  # noqa: F401 - lets experiments find each other
from dialog_jax.training import run as run_lib
from tests.commands import running

_EXPERIMENTS = pathlib.Path(__file__).parents[2] / "experiments"


class TrainFlagsTest(parameterized.TestCase):
    def setUp(self):
        super().setUp()
        self.output_dir = pathlib.Path(self.enter_context(tempfile.TemporaryDirectory())) / "run"

    def configured(self, *flags, experiment="quickstart"):
        """The TrainConfig that a run is started with."""
        result = run_lib.RunResult(3, {"loss": 2.0}, {"loss": 1.5})
        with mock.patch.object(run_lib, "run", return_value=result) as run:
            told, error = self.run_script(f"--config={_EXPERIMENTS / experiment}.py", *flags)
        self.assertEmpty(error)
        self.assertIn("2.0000 before, 1.5000 after 3 steps", told)
        return run.call_args.args[0]

    def run_script(self, *flags):
        return running.run("train", *flags, f"--output_dir={self.output_dir}")

    def test_fields_are_set_by_flags(self):
        config = self.configured(
            "--config.optimizer.learning_rate=0.5",
            "--config.data.train=mine.jsonl",
            "--config.objective.roles=('user', 'assistant')",
            "--config.data.chat_template_kwargs={'enable_thinking': False}",
            "--config.lora.rank=4",
            r"--config.lora.rank_pattern={'layers\\.0\\..*q_proj': 2, 'up_proj': 1}",
        )
        self.assertEqual(config.optimizer.learning_rate, 0.5)
        self.assertEqual(config.data.train, "mine.jsonl")
        self.assertEqual(config.objective.roles, ("user", "assistant"))
        self.assertEqual(dict(config.data.chat_template_kwargs), {"enable_thinking": False})
        self.assertEqual(dict(config.lora.rank_pattern), {r"layers\.0\..*q_proj": 2, "up_proj": 1})

    def test_every_experiment_is_a_config(self):
        experiments = [path.stem for path in _EXPERIMENTS.glob("*.py") if "def get_config(" in path.read_text()]
        self.assertContainsSubset({"quickstart", "chitchat"}, experiments)
        for experiment in experiments:
            with self.subTest(experiment):
                self.assertTrue(self.configured(experiment=experiment).model)

    @parameterized.parameters(
        ("optimizer.lr=1", "config.optimizer has no field 'lr'; it has b1, b2, clip_norm, "),
        (
            "optimzer.learning_rate=1",
            "config has no field 'optimzer'; it has adapter, attention, checkpoint_every, ",
        ),
        ("lr=1", "config has no field 'lr'; it has adapter, attention, checkpoint_every, "),
        ("rows.x=1", "config.rows has no field 'x'; it has none"),
        ("data.chat_template_kwargs.x=1", "config.data.chat_template_kwargs has no field 'x'; it has none"),
    )
    def test_unknown_field_lists_the_valid_ones(self, flag, message):
        for experiment in ([f"--config={_EXPERIMENTS / 'quickstart.py'}"], []):
            told, error = self.run_script(*experiment, f"--config.{flag}")
            self.assertEmpty(told)
            self.assertStartsWith(error, f"dialog_jax train: --config.{flag.partition('=')[0]}: {message}")
            self.assertLen(error.splitlines(), 2)

    @parameterized.parameters(
        ("--config.rows=0", "rows is 0; it must be at least 1"),
        ("--config.compute_dtype=float16", "compute_dtype is 'float16'; it must be auto, float32 or bfloat16"),
        ("--config.objective.name=all", "objective.name is 'all'; it must be one of conditional"),
        ("--config.optimizer.schedule=step", "optimizer.schedule is 'step'; it must be one of cosine"),
        ("--config.data.train=./nowhere.jsonl", "nowhere.jsonl: no such file"),
    )
    def test_bad_value_is_explained(self, flag, message):
        experiment = f"--config={_EXPERIMENTS / 'quickstart.py'}"
        told, error = self.run_script(experiment, f"--config.model={self.model()}", "--config.rows=8", flag)
        self.assertEmpty(told.replace("preparing nowhere.jsonl", "").strip())
        self.assertStartsWith(error, f"dialog_jax train: {message}")

    def model(self):
        """A model directory whose weights are never read here."""
        from dialog_jax.model import saving
        from tests.rendering import chat_templates
        from tests.training import tiny

        path = self.output_dir.with_name("model")
        tokenizer = chat_templates.train_tokenizer("chatml")
        config = tiny.config(len(tokenizer))
        saving.save_pretrained(path, config, tiny.parameters(config), tokenizer=tokenizer)
        return path

    def test_value_of_the_wrong_type_is_an_error_that_says_what_was_needed(self):
        _, error = self.run_script("--config.rows=many")
        self.assertStartsWith(error, "dialog_jax train: --config.rows is 'many'; needed an integer. ")
        self.assertEndsWith(error, "[exit code 1]")

    def test_experiment_that_is_not_there_is_named(self):
        _, error = self.run_script("--config=experiments/nope.py")
        self.assertStartsWith(error, "dialog_jax train: --config=experiments/nope.py: no such file.")


if __name__ == "__main__":
    absltest.main()
