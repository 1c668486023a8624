"""dialog_jax export on a run directory made by hand: the chosen step's parameters, bit for bit, and no overwriting."""

import contextlib
import importlib.metadata
import json
import pathlib
import shutil
import tempfile

import huggingface_hub
import jax
import jax.numpy as jnp
import numpy as np
import optax
import safetensors
from absl.testing import absltest, parameterized

from dialog_jax.model import model_files, pretrained
from dialog_jax.rendering.tokenizers import load_tokenizer
from dialog_jax.training import checkpoints, run_directory
from dialog_jax.training.config import DataConfig, TrainConfig
from dialog_jax.training.train_step import make_state
from dialog_jax.trees.objectives import ObjectiveConfig
from tests.commands import running
from tests.rendering import chat_templates
from tests.training import tiny

_GENERATION = {"eos_token_id": 2, "temperature": 0.6, "top_p": 0.9, "bos_token_id": 7, "custom": {"a": [1]}}


class ExportTest(parameterized.TestCase):
    def setUp(self):
        super().setUp()
        self.directory = pathlib.Path(self.enter_context(tempfile.TemporaryDirectory()))
        self.run_directory, self.out = self.directory / "run", self.directory / "model"
        self.tokenizer = chat_templates.train_tokenizer("chatml")
        self.model = tiny.config(len(self.tokenizer))
        config = TrainConfig(model="some", data=DataConfig(train="a.jsonl", validation="b.jsonl"))
        self.base = self.directory / "base"
        self.base.mkdir()
        (self.base / "LICENSE").write_text("Do as you like.")
        (self.base / "Notice.txt").write_text("We made it.")
        (self.base / "generation_config.json").write_text(json.dumps(_GENERATION))
        (self.base / "README.md").write_text("---\nlicense: other\nlicense_name: likeable\ntags: [a]\n---\n# Some\n")
        self.claim(config)
        # Step 1 is the best by held-out loss, step 2 the latest.
        self.parameters = {step: tiny.parameters(self.model, seed=step) for step in (1, 2)}
        losses = {0: 1.0, 1: 2.0, 2: 3.0}
        with checkpoints.open_manager(self.run_directory / "checkpoints") as manager:
            for step in (1, 2):
                state = make_state(self.parameters[step], optax.adam(1e-3))._replace(step=jnp.int32(step))
                checkpoints.save(manager, state, keep=1, losses=losses)
        lines = [json.dumps({"step": step, "loss": loss}) + "\n" for step, loss in losses.items()]
        (self.run_directory / "evaluation.jsonl").write_text("".join(lines))

    def claim(self, config, **fields):
        base = {
            "generation": model_files.read_generation_config(self.base),
            "licence": model_files.read_licence(self.base),
            "licences": model_files.list_licences(self.base),
        }
        run_directory.claim(
            self.run_directory,
            config.resolve(),
            {"steps": 6, "compute_dtype": "bfloat16"},
            self.model,
            self.tokenizer,
            stop_tokens={1, 2},
            base=run_directory.BaseModel(**(base | fields)),
        )

    def export(self, *flags):
        return running.run("export", f"--run={self.run_directory}", f"--out={self.out}", *flags)

    def assert_holds(self, step):
        self.assertEqual(pretrained.load_config(self.out), self.model)
        loaded = pretrained.load_parameters(self.out, self.model)
        jax.tree.map(np.testing.assert_array_equal, loaded, self.parameters[step])

    def test_best_step_goes_there_and_back_bit_for_bit(self):
        told, error = self.export()
        self.assertEmpty(error)
        self.assertIn("step 1,", told)
        self.assert_holds(1)
        tokenizer = load_tokenizer(self.out)
        self.assertEqual(tokenizer.chat_template, self.tokenizer.chat_template)
        self.assertEqual(tokenizer.get_vocab(), self.tokenizer.get_vocab())
        generation = json.loads((self.out / "generation_config.json").read_text())
        self.assertEqual(generation, _GENERATION | {"eos_token_id": [1, 2], "pad_token_id": 2})
        self.assertEqual(sorted(path.name for path in self.directory.iterdir()), ["base", "model", "run"])

    def test_licences_and_a_card_with_the_facts_of_the_run_are_written(self):
        (self.run_directory / "config.json").unlink()
        config = TrainConfig(
            model="owner/some",
            data=DataConfig(train="a|b.jsonl", validation="b.jsonl"),
            objective=ObjectiveConfig(name="roles", roles=("assistant", "tool")),
        )
        self.claim(config, hub_name="owner/some")
        shutil.rmtree(self.base)
        self.export()
        self.assertEqual((self.out / "LICENSE").read_text(), "Do as you like.")
        self.assertEqual((self.out / "Notice.txt").read_text(), "We made it.")
        card = (self.out / "README.md").read_text()
        self.assertEqual(
            huggingface_hub.metadata_load(self.out / "README.md"),
            {
                "base_model": "owner/some",
                "license": "other",
                "license_name": "likeable",
                "library_name": "transformers",
                "pipeline_tag": "text-generation",
            },
        )
        for fact in (
            "| base model | owner/some |",
            "| training data | a\\|b.jsonl |",
            "| held-out data | b.jsonl |",
            "| trained | all parameters |",
            "| objective | name roles, roles ['assistant', 'tool'], turn_discount 1.0, normalize token",
            "| steps | 1 of 6, each of 8 rows of 1,024 tokens |",
            "| held-out loss | 1.0000 before training, 2.0000 after step 1 |",
            "| optimizer | adamw: learning_rate 2e-05, schedule cosine, weight_decay 0.0 |",
            "| weights | float32 (computed in bfloat16) |",
            f"| version | dialog_jax {importlib.metadata.version('dialog_jax')} |",
            "The licence of the base model is in LICENSE, Notice.txt.",
        ):
            self.assertIn(fact, card)

    def test_card_of_a_run_whose_steps_were_lowered_later(self):
        inputs = self.run_directory / "inputs.json"
        inputs.write_text(json.dumps(json.loads(inputs.read_text()) | {"steps": 1}))
        self.export("--step=2")
        self.assertIn("| steps | 2 of 2, each of", (self.out / "README.md").read_text())

    @parameterized.parameters((None, "bfloat16"), ("float16", "float16"), ("float32", "float32"))
    def test_type_of_the_weights_is_that_of_the_base_model_unless_another_is_named(self, flag, name):
        (self.run_directory / "config.json").unlink()
        self.claim(TrainConfig(model="some", data=DataConfig(train="a.jsonl")), dtype="bfloat16")
        told, _ = self.export(*([f"--dtype={flag}"] if flag else []))
        self.assertIn(f"parameters in {name}", told)
        fields = json.loads((self.out / "config.json").read_text())
        self.assertEqual((fields["dtype"], fields["torch_dtype"]), (name, name))
        with safetensors.safe_open(self.out / "model.safetensors", "numpy") as file:
            self.assertEqual({str(file.get_tensor(key).dtype) for key in file.keys()}, {name})  # noqa: SIM118
        rounded = jax.tree.map(lambda leaf: leaf.astype(name).astype(np.float32), jax.device_get(self.parameters[1]))
        jax.tree.map(np.testing.assert_array_equal, pretrained.load_parameters(self.out, self.model), rounded)
        other = "float16" if name == "float32" else "float32"
        self.assertIn("holds no export of step 1", self.export(f"--dtype={other}")[1])

    def test_latest_and_numbered_steps_can_be_had(self):
        self.export("--step=latest")
        self.assert_holds(2)
        told, _ = self.export("--step=2")
        self.assertIn("already there", told)

    def test_latest_can_be_had_before_any_was_evaluated(self):
        (self.run_directory / "evaluation.jsonl").unlink()
        _, error = self.export()
        self.assertIn("has no evaluated checkpoint yet", error)
        self.export("--step=latest")
        self.assert_holds(2)

    def test_same_export_is_left_alone_and_another_is_refused(self):
        self.export()
        weights = self.out / "model.safetensors"
        before = weights.stat().st_mtime_ns
        told, error = self.export()
        self.assertIn("already there, exported from step 1", told)
        self.assertEmpty(error)
        told, error = self.export("--step=latest")
        self.assertEmpty(told)
        self.assertRegex(error, "model is not empty and holds no export of step 2")
        self.assertEqual(weights.stat().st_mtime_ns, before)

    def test_directory_with_other_files_is_refused_and_kept(self):
        self.out.mkdir()
        (self.out / "config.json").write_text("mine")
        _, error = self.export()
        self.assertIn("not empty", error)
        self.assertEqual([path.name for path in self.out.iterdir()], ["config.json"])

    def test_directory_in_use_is_refused_by_name(self):
        for out, place in ((".", self.directory), ("..", self.out), ("/", self.out), (self.run_directory, self.out)):
            place.mkdir(exist_ok=True)
            with contextlib.chdir(place):
                told, error = running.run("export", f"--run={self.run_directory}", f"--out={out}")
            self.assertEmpty(told)
            name = "the run" if out == self.run_directory else "the current directory"
            self.assertIn(f"--out={out} is {name}", error)
            self.assertIn(f"Name a new one, for instance --out={self.run_directory}/model", error)
        self.assertEqual(sorted(path.name for path in self.directory.iterdir()), ["base", "model", "run"])
        self.assertEmpty(list(self.out.iterdir()))

    def test_run_in_a_directory_that_cannot_be_read_is_refused_with_the_remedy(self):
        self.run_directory = self.run_directory.rename(self.directory / "lr[1e-5]")
        told, error = self.export()
        self.assertEmpty(told)
        self.assertIn("rename the run's directory", error)
        self.run_directory = self.run_directory.rename(self.directory / "lr 1e-5")
        self.export()
        self.assert_holds(1)

    def test_link_to_an_empty_directory_stays_a_link(self):
        (self.directory / "elsewhere").mkdir()
        self.out.symlink_to("elsewhere")
        self.export()
        self.assertTrue(self.out.is_symlink())
        self.assert_holds(1)

    def test_checkpoint_with_a_changed_byte_is_not_exported(self):
        largest = max((self.run_directory / "checkpoints" / "1").rglob("*"), key=lambda file: file.stat().st_size)
        data = bytearray(largest.read_bytes())
        data[len(data) // 2] ^= 4
        largest.write_bytes(data)
        told, error = self.export()
        self.assertEmpty(told)
        self.assertRegex(error, "checkpoint 1 is not what was written: trained.* has another checksum")
        self.assertFalse(self.out.exists())
        self.export("--step=latest")
        self.assert_holds(2)

    def test_unknown_step_and_missing_run_are_explained(self):
        _, error = self.export("--step=7")
        self.assertIn("must be best, latest or one of 1, 2", error)
        _, error = running.run("export", f"--run={self.directory}", f"--out={self.out}")
        self.assertIn("holds no run", error)
        self.assertFalse(self.out.exists())
        self.assertEqual(json.loads((self.run_directory / "config.json").read_text())["model"], "some")


if __name__ == "__main__":
    absltest.main()
