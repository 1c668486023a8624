"""What a config trains and freezes, and in which type."""

import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest, parameterized

from dialog_jax.errors import UserError
from dialog_jax.model import adapters, decoder, parameter_trees
from dialog_jax.model.decoder_config import Experts
from dialog_jax.model.lora_config import LoraConfig
from dialog_jax.model.peft_reading import Adapter
from dialog_jax.model.soft_prompt_config import SoftPromptConfig
from dialog_jax.training import trainable
from dialog_jax.training.config import TrainConfig
from tests.training import tiny

_MODEL = tiny.config(96, tie_embeddings=False)


def select(**fields):
    return trainable.select(TrainConfig(**fields), _MODEL, jnp.float32)


class FrozenDtypeTest(parameterized.TestCase):
    @parameterized.parameters("int8", "nf4")
    def test_quantized_are_the_seven_matrices_of_each_layer(self, kind):
        selection = select(lora=LoraConfig(rank=2), frozen_dtype=kind)
        paths = parameter_trees.flatten(decoder.abstract_parameters(_MODEL))
        quantized = {path for path in paths if selection.find_kind(path) == kind}
        self.assertEqual(quantized, {path for path in paths if "/w_" in path})
        self.assertEqual(selection.dtype("embedding"), jnp.bfloat16)
        self.assertEqual(selection.dtype("lm_head"), jnp.bfloat16)
        self.assertEqual(selection.dtype("layers/attention_norm"), jnp.float32)

    def test_only_frozen_matrices_are_quantized(self):
        selection = select(freeze=("layers/attention/*", "embedding"), frozen_dtype="nf4")
        self.assertEqual(selection.find_kind("layers/attention/w_key"), "nf4")
        self.assertEqual(selection.find_kind("layers/feed_forward/w_up"), "")
        shapes = trainable.abstract_parameters(selection)
        self.assertIn("w_up", shapes.trained["layers"]["feed_forward"])
        self.assertEqual(shapes.frozen["layers"]["attention"]["w_key"]["nf4_codes"].shape, (2, 16, 16))

    def test_sizes_are_listed_as_those_of_the_matrices(self):
        plain, quantized = (
            trainable.describe(select(lora=LoraConfig(rank=2), frozen_dtype=dtype)) for dtype in ("bfloat16", "nf4")
        )
        self.assertEqual(
            [line for line in plain if "parameters" in line], [line for line in quantized if "parameters" in line]
        )
        self.assertIn("  layers/attention/w_query 2x32x32 nf4", quantized)
        size = sum(leaf.size for leaf in jax.tree.leaves(decoder.abstract_parameters(_MODEL)))
        self.assertIn(f"frozen: {size:,} parameters", plain)

    @parameterized.parameters({}, {"freeze": ("embedding",)}, {"train_only": ("layers/*",)})
    def test_quantization_of_nothing_is_an_error(self, **fields):
        with self.assertRaisesRegex(UserError, "frozen_dtype is nf4, but no matrix of a layer is frozen"):
            select(frozen_dtype="nf4", **fields)


class RateRatiosTest(parameterized.TestCase):
    @parameterized.parameters(
        ({}, {}),
        ({"soft_prompt": SoftPromptConfig(tokens=2)}, {}),
        ({"lora": LoraConfig(rank=2, learning_rate_ratio=4.0)}, {"lora_b": 4.0}),
        (
            {"lora": LoraConfig(rank=2), "soft_prompt": SoftPromptConfig(tokens=2, learning_rate_ratio=30.0)},
            {"lora_b": 1.0, "soft_prompt": 30.0},
        ),
    )
    def test_a_soft_prompt_has_a_rate_of_its_own_beside_lora(self, fields, expected):
        self.assertEqual(trainable.find_rate_ratios(TrainConfig(**fields), select(**fields)), expected)

    def test_an_adapter_has_those_of_the_config(self):
        config = TrainConfig(adapter="a", soft_prompt=SoftPromptConfig(learning_rate_ratio=30.0))
        scales = adapters.find_scales(_MODEL, LoraConfig(rank=2))
        adapter = Adapter(scales, {}, np.zeros((5, 32), np.float32))
        selection = trainable.select(config, _MODEL, jnp.float32, adapter)
        self.assertEqual(trainable.find_rate_ratios(config, selection), {"lora_b": 1.0, "soft_prompt": 30.0})

    def test_a_ratio_without_lora_is_an_error(self):
        with self.assertRaisesRegex(UserError, "learning_rate_ratio is 30.0, which has no effect without lora.rank"):
            TrainConfig(soft_prompt=SoftPromptConfig(tokens=2, learning_rate_ratio=30.0))


class ExpertsTest(absltest.TestCase):
    def test_matrices_of_experts_are_not_quantized_and_drop_out_nothing(self):
        experts = Experts(count=4, active=2, width=24)
        model = tiny.config(96, family="qwen3_moe", qk_norm="head", experts=experts)
        targets = ("q_proj", "up_proj")
        config = TrainConfig(lora=LoraConfig(rank=2, targets=targets), frozen_dtype="nf4")
        selection = trainable.select(config, model, jnp.float32)
        self.assertEqual(selection.find_kind("layers/experts/w_up"), "")
        self.assertEqual(selection.dtype("layers/experts/w_up"), jnp.bfloat16)
        self.assertEqual(selection.find_kind("layers/attention/w_query"), "nf4")
        shapes = trainable.abstract_parameters(selection)
        factors = shapes.trained["layers"]["experts"]["w_up"]
        self.assertEqual((factors["lora_a"].shape, factors["lora_b"].shape), ((2, 4, 32, 2), (2, 4, 2, 24)))
        with self.assertRaisesRegex(UserError, "lora.dropout is 0.5, and matrices of experts are adapted"):
            trainable.select(TrainConfig(lora=LoraConfig(rank=2, targets=targets, dropout=0.5)), model, jnp.float32)


if __name__ == "__main__":
    absltest.main()
