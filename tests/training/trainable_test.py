"""What a config trains and freezes, and in which type."""

import jax
import jax.numpy as jnp
from absl.testing import absltest, parameterized

from dialog_jax.errors import UserError
from dialog_jax.model import decoder, parameter_trees
from dialog_jax.model.lora_config import LoraConfig
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


if __name__ == "__main__":
    absltest.main()
