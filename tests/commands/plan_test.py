"""dialog_jax plan from flags to text, and the shapes that it knows."""

import json
import os
import pathlib
import re
import subprocess
import sys
import tempfile
from unittest import mock

import jax
import numpy as np
import pytest
from absl.testing import absltest, parameterized

from dialog_jax.errors import UserError
from dialog_jax.model import decoder, families, hf_config, peft_files, saving
from dialog_jax.planning import model_shapes, workload
from dialog_jax.training import metrics
from dialog_jax.training.config import MeshConfig
from tests.commands import running
from tests.rendering import chat_templates
from tests.training import tiny

_ROOT = pathlib.Path(__file__).parents[2]


class PlanTest(absltest.TestCase):
    @classmethod
    def setUpClass(cls):
        super().setUpClass()
        cls.directory = pathlib.Path(cls.enterClassContext(tempfile.TemporaryDirectory()))
        tokenizer = chat_templates.train_tokenizer("chatml")
        cls.config = tiny.config(len(tokenizer))
        saving.save_pretrained(cls.directory / "model", cls.config, tiny.parameters(cls.config), tokenizer=tokenizer)
        (cls.directory / "model" / "model.safetensors").unlink()  # a plan needs no weights
        rng = np.random.default_rng(0)
        dialogues = [chat_templates.random_dialogue(rng, turns=2) for _ in range(12)]
        records = [{"messages": [message.as_dict() for message in dialogue.messages]} for dialogue in dialogues]
        (cls.directory / "train.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))

    def flags(self, *more):
        return [
            f"--config={_ROOT / 'experiments' / 'quickstart.py'}",
            f"--config.model={self.directory / 'model'}",
            f"--config.data.train={self.directory / 'train.jsonl'}",
            "--config.data.max_length=256",
            "--config.rows=8",
            "--config.gradient_accumulation=2",
            *more,
        ]

    def run_plan(self, *more):
        with mock.patch.dict(os.environ):
            return running.run("plan", *self.flags(*more))

    def test_soft_prompt_of_an_adapter_counts(self):
        adapter = self.directory / "adapter"
        adapter.mkdir()
        peft_files.write_prompt(adapter, self.config, np.ones((5, 32), np.float32), base_name="some")
        with mock.patch.object(workload, "measure_workload", side_effect=UserError("stop")) as measure:
            self.run_plan("--devices=8", "--kind=h100", f"--config.adapter={adapter}")
        self.assertEqual(measure.call_args.kwargs["virtual_tokens"], 5)

    @pytest.mark.full
    def test_run_is_planned_from_its_data(self):
        told, error = self.run_plan("--devices=8", "--kind=h100", "--config.mesh.data=2", "--config.mesh.fsdp=4")
        self.assertEmpty(error)
        self.assertRegex(told, r"on 8 x h100: .*data=2, fsdp=4, tensor=1;")
        size = sum(leaf.size for leaf in jax.tree.leaves(decoder.abstract_parameters(self.config)))
        self.assertIn(f"\n{size:,} parameters\n", told)
        self.assertIn("measured on 12 of the 12 dialogues of train.jsonl", told)
        self.assertIn("FITS, even in the layout of the CPU's compiler.", told)
        self.assertRegex(told, r"all-reduce +[\d,]+ +[\d.]+ +[\d.]+\n")
        self.assertRegex(told, r"ESTIMATE [\d.]+ s per step .* [\d.]+ s if no exchange does;")
        self.assertRegex(told, r"hours for [\d,]+ steps")
        self.assertNotIn("ASSUMED", told)

    @pytest.mark.full
    def test_what_is_assumed_is_marked_and_cpus_have_no_times(self):
        told, error = self.run_plan("--devices=8", "--kind=cpu", "--config.data.train=some/hub", "--assume_tokens=0.5")
        self.assertEmpty(error)
        self.assertRegex(told, r"ASSUMED: one dialogue per row, 50% of the row used")
        self.assertIn("2,048 of 4,096: 50.0% useful", told)
        self.assertIn("No times: no published figures hold for all CPUs.", told)
        self.assertNotIn("ESTIMATE", told)

    @pytest.mark.full
    def test_more_devices_than_this_process_has_are_simulated(self):
        ran = subprocess.run(
            [
                sys.executable,
                "-m",
                "dialog_jax",
                "plan",
                *self.flags("--devices=16", "--kind=tpu-v5e", "--config.rows=16"),
            ],
            cwd=_ROOT,
            env={name: value for name, value in os.environ.items() if name not in ("XLA_FLAGS", "JAX_PLATFORMS")}
            | {"PYTHONPATH": str(_ROOT)},
            capture_output=True,
            text=True,
        )
        self.assertEqual(ran.returncode, 0, ran.stderr)
        self.assertRegex(ran.stdout, r"on 16 x tpu-v5e: .*data=16, fsdp=1, tensor=1")
        size = sum(leaf.size * 4 for leaf in jax.tree.leaves(decoder.abstract_parameters(self.config)))
        self.assertRegex(ran.stdout, rf"parameters +{re.escape(f'{size / 1e9:.3f}')}\n")

    def test_errors_are_explained(self):
        for flags, message in (
            (["--devices=8", "--config.rows=3"], "dialog_jax plan: rows is 3, but rows are divided as"),
            (
                ["--devices=8", "--config.mesh.fsdp=3"],
                "dialog_jax plan: mesh sizes .* do not multiply to the number of devices, 8",
            ),
            (
                ["--devices=8", "--config.model=no/such"],
                "dialog_jax plan: model 'no/such' is no local directory or file",
            ),
            (["--devices=8", "--config.steps=-1"], "dialog_jax plan: steps is -1"),
        ):
            with self.subTest(flags):
                told, error = self.run_plan("--kind=h100", *flags)
                self.assertEmpty(told)
                self.assertRegex(error, message)

    def test_experiment_that_is_not_there_is_named(self):
        with mock.patch.dict(os.environ):
            _, error = running.run("plan", "--config=experiments/nope.py", "--devices=8", "--kind=cpu")
        self.assertRegex(error, r"--config=experiments/nope.py: no such file")


class ShapesTest(parameterized.TestCase):
    # Numbers of parameters as published with the weights.
    @parameterized.parameters(
        ("llama_1b", 1, 1_235_814_400), ("llama_8b", 8, 8_030_261_248), ("llama_70b", 256, 70_553_706_496)
    )
    def test_experiment_has_the_published_shape_and_a_mesh_that_divides_it(self, experiment, devices, parameters):
        namespace = {}
        exec((_ROOT / "experiments" / f"{experiment}.py").read_text(), namespace)
        config = namespace["get_config"]()
        model = model_shapes.load_shape(config.model)
        abstract = decoder.abstract_parameters(model)
        self.assertEqual(sum(leaf.size for leaf in jax.tree.leaves(abstract)), parameters)
        self.assertEqual(hf_config.to_json(model)["rope_parameters"]["rope_type"], "llama3")
        sizes = MeshConfig(**config.mesh).__dict__
        named = [size for size in sizes.values() if size > 0]
        self.assertEqual(devices % int(np.prod(named)), 0)
        self.assertEqual(config.rows % (config.mesh.fsdp * max(1, config.mesh.data)), 0)

    # Of the decoder alone: gemma-3 and Ministral have a vision tower, GLM-4.6 a layer that predicts a further token.
    @parameterized.parameters(
        ("GLM-4.6", "glm4_moe", 352_797_829_024, 33_632_266_144),
        ("Llama-3.1-405B-Instruct", "llama", 405_853_388_800),
        ("Ministral-3-14B-Instruct-2512", "ministral3", 13_506_073_600),
        ("Mistral-Large-Instruct-2407", "mistral", 122_610_069_504),
        ("OLMo-2-0325-32B-Instruct", "olmo2", 32_234_279_936),
        ("Olmo-3-32B-Think", "olmo3", 32_233_522_176),
        ("Qwen2.5-72B-Instruct", "qwen2", 72_706_203_648),
        ("Qwen3-32B", "qwen3", 32_762_123_264),
        ("Qwen3-Coder-480B-A35B-Instruct", "qwen3_moe", 480_154_875_392, 35_474_765_312),
        ("SmolLM3-3B", "smollm3", 3_075_098_624),
        ("gemma-2-27b-it", "gemma2", 27_227_128_320),
        ("gemma-3-27b-it", "gemma3_text", 27_009_346_304),
        ("gemma-4-31B-it", "gemma4_text", 30_697_345_340),
        ("gpt-oss-120b", "gpt_oss", 116_829_156_672, 5_711_982_912),
        ("granite-3.3-8b-instruct", "granite", 8_170_864_640),
        ("granite-4.0-micro", "granitemoehybrid", 3_402_836_480),
        ("phi-4", "phi3", 14_659_507_200),
    )
    def test_shape_has_the_published_number_of_parameters(self, name, family, parameters, active=None):
        model = model_shapes.load_shape(f"publisher/{name}")
        self.assertEqual(model.family, family)
        self.assertEqual(metrics.count_parameters(model), (parameters, active or parameters))

    def test_every_family_has_a_shape(self):
        files = (_ROOT / "dialog_jax" / "planning" / "shapes").glob("*.json")
        described = {json.loads(file.read_text())["model_type"] for file in files}
        # What is read of the 12B, alone of its family, is what is read of the 31B.
        self.assertEqual(families.FAMILIES.keys() - described, {"gemma4_unified_text"})


if __name__ == "__main__":
    absltest.main()
