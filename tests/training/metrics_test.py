"""FLOPs by hand, held-out sums, and files that survive an interruption."""

import pathlib
import resource
import subprocess
import sys
from unittest import mock

import jax
import numpy as np
import pytest
from absl.testing import absltest

from dialog_jax.errors import UserError
from dialog_jax.model.lora_config import LoraConfig
from dialog_jax.training import metrics, trainable
from dialog_jax.training.config import TrainConfig
from dialog_jax.training.score_steps import EvaluationSums
from tests.rendering import chat_templates
from tests.training import tiny


class FlopsTest(absltest.TestCase):
    def test_flops_are_counted_token_by_token(self):
        tokenizer = chat_templates.train_tokenizer("chatml")
        model = tiny.config(len(tokenizer))
        rng = np.random.default_rng(0)
        prepared = tiny.trees([chat_templates.random_dialogue(rng, turns=2) for _ in range(2)], tokenizer)
        multiplies, tokens, attention_pairs, targets = 0, 0, 0, 0
        for number in (0, 1):
            tree = prepared.tree(number)
            tokens += len(tree.tokens)
            attention_pairs += int((tree.position + 1).sum())
            targets += int((tree.weight > 0).sum())
            for node in range(len(tree.tokens)):
                projections = 32 * 32 + 2 * 32 * 16 + 32 * 32 + 3 * 32 * 48
                visible = int(((np.arange(len(tree.tokens)) <= node) & (node < tree.subtree_end)).sum())
                multiplies += model.layers * (projections + 2 * visible * 32)
                multiplies += len(tokenizer) * 32 if tree.weight[node] > 0 else 0
        flops = metrics.count_flops(model, tokens=tokens, attention_pairs=attention_pairs, targets=targets)
        self.assertEqual(flops, 3 * 2 * multiplies)

    def test_frozen_matrices_have_no_gradient(self):
        model = tiny.config(100, tie_embeddings=False)
        layers, head, attention = 2 * (3 * 32 * 32 + 2 * 32 * 48 + 32 * 48), 100 * 32, 2 * 2 * 32
        query, factors = 2 * 32 * 32, 2 * 3 * (32 + 32)

        def count(**fields):
            selection = trainable.select(TrainConfig(**fields), model, np.float32)
            return metrics.count_flops(model, tokens=10, attention_pairs=55, targets=4, selection=selection) / 2

        everything = 3 * (10 * layers + 55 * attention + 4 * head)
        self.assertEqual(count(), everything)
        self.assertEqual(count(freeze=("layers/attention/w_query",)), everything - 10 * query)
        self.assertEqual(count(freeze=("lm_head",)), everything - 4 * head)
        only_head = 10 * layers + 55 * attention
        self.assertEqual(count(train_only=("lm_head",)), only_head + 2 * 4 * head)
        self.assertEqual(count(train_only=("final_norm",)), only_head + 2 * 4 * head)
        frozen = everything - 10 * layers - 4 * head
        lora = LoraConfig(rank=3, targets=("q_proj",), rank_pattern={"layers.1.self_attn.q_proj": 1})
        self.assertEqual(count(lora=lora), frozen + 3 * 10 * factors * 4 / 6)
        self.assertEqual(count(lora=lora, frozen_dtype="nf4"), frozen + 3 * 10 * factors * 4 / 6)
        everywhere = LoraConfig(rank=1, targets=("embed_tokens", "lm_head"))
        self.assertEqual(count(lora=everywhere), frozen + 3 * (10 * 32 + 4 * (32 + 100)))


class PeakMemoryTest(absltest.TestCase):
    def test_peak_is_that_of_the_fullest_device(self):
        devices = [
            mock.Mock(spec=jax.Device, memory_stats=lambda peak=peak: {"peak_bytes_in_use": peak, "bytes_in_use": 1})
            for peak in (3, 7, 5)
        ]
        self.assertEqual(metrics.measure_peak_memory(devices), 7)
        self.assertIsNone(metrics.measure_peak_memory([mock.Mock(spec=jax.Device, memory_stats=lambda: None)]))

    @pytest.mark.full
    def test_peak_of_cpus_is_that_of_this_process_and_not_of_the_one_that_started_it(self):
        program = """
import jax, numpy as np
from dialog_jax.training import metrics
print(before := metrics.measure_peak_memory(jax.devices()))
np.ones(2**27 + before, np.uint8)  # more than there was ever
print(metrics.measure_peak_memory(jax.devices()) - before)
"""
        np.ones(2**30, np.uint8)
        ran = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True)
        before, grown = map(int, ran.stdout.split())
        self.assertBetween(before, 2**26, 2**30)
        self.assertBetween(grown, 2**27, 2**28 + before)


class EvaluationTest(absltest.TestCase):
    def test_figures_are_means_over_all_batches(self):
        evaluation = metrics.Evaluation()
        for nll, targets in ((6.0, 3), (4.0, 1)):
            evaluation.add(
                EvaluationSums(
                    nll=np.array([0, nll, 1, 0]),
                    weight=np.array([0, targets, 0.5, 0]),
                    targets=np.array([0, targets, 2, 0]),
                    correct=np.array([0, 1, 2, 0]),
                )
            )
        self.assertEqual(
            evaluation.figures(),
            {
                "loss": 12 / 5,
                "accuracy": 6 / 8,
                "targets": 8,
                "turns": [
                    {"turn": 0, "loss": 10 / 4, "accuracy": 2 / 4, "targets": 4},
                    {"turn": 1, "loss": 2 / 1, "accuracy": 1.0, "targets": 4},
                ],
            },
        )


class WriterTest(absltest.TestCase):
    def test_lines_after_the_step_gone_on_from_and_a_torn_line_are_dropped(self):
        directory = pathlib.Path(self.create_tempdir().full_path)
        writer = metrics.Writer(directory, step=0)
        for step in (1, 2, 3):
            writer.train(step, {"loss": float(step)})
        writer.close()
        with (directory / "metrics.jsonl").open("a") as file:
            file.write('{"step": 4, "lo')
        writer = metrics.Writer(directory, step=2)
        writer.train(3, {"loss": 30.0})
        writer.close()
        lines = metrics.read_records(directory / "metrics.jsonl")
        self.assertEqual([(line["step"], line["loss"]) for line in lines], [(1, 1.0), (2, 2.0), (3, 30.0)])

    def test_what_is_not_finite_is_null(self):
        directory = pathlib.Path(self.create_tempdir().full_path)
        writer = metrics.Writer(directory, step=0)
        writer.train(1, {"loss": float("nan"), "gradient_norm": float("inf"), "seconds": 0.5})
        writer.close()
        text = (directory / "metrics.jsonl").read_text()
        self.assertEqual(text, '{"step": 1, "loss": null, "gradient_norm": null, "seconds": 0.5}\n')

    def test_a_line_that_is_no_record_is_named(self):
        file = pathlib.Path(self.create_tempdir().full_path) / "metrics.jsonl"
        for line in ("no JSON", "[1]", '{"loss": 1}', '{"step": Infinity}', "[" * 5000):
            file.write_text('{"step": 1}\n' + line + '\n{"step": 3}\n')
            with self.assertRaisesRegex(ValueError, r"^metrics.jsonl:2: not a record of a step"):
                metrics.read_records(file)

    def test_full_disk_is_an_error_with_a_remedy_and_nobody_waits(self):
        writer = metrics.Writer(pathlib.Path(self.create_tempdir().full_path), step=0)
        before = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, before[1]))
        try:
            with self.assertRaisesRegex(
                UserError, "metrics could not be written: File too large. Make room on the disk"
            ):
                for step in range(1, 1000):
                    writer.train(step, {f"figure{number}": 1.0 for number in range(20)})
            with self.assertRaisesRegex(UserError, "metrics could not be written"):
                writer.close()
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)


if __name__ == "__main__":
    absltest.main()
