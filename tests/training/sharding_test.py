"""Meshes and the rule from a parameter to its layout."""

import jax
from absl.testing import absltest, parameterized
from jax.sharding import PartitionSpec

from dialog_jax.model import decoder
from dialog_jax.training import sharding
from dialog_jax.training.sharding import MeshConfig
from tests.training import tiny


class MeshTest(parameterized.TestCase):
    @parameterized.parameters(
        (MeshConfig(), (8, 1, 1)),
        (MeshConfig(data=2, fsdp=-1, tensor=2), (2, 2, 2)),
        (MeshConfig(data=1, fsdp=1, tensor=-1), (1, 1, 8)),
    )
    def test_minus_one_takes_the_rest(self, config, shape):
        self.assertEqual(tuple(sharding.make_mesh(config).shape.values()), shape)

    @parameterized.parameters(MeshConfig(data=3), MeshConfig(data=-1, fsdp=3), MeshConfig(data=16))
    def test_sizes_that_do_not_multiply_to_the_devices_are_refused(self, config):
        with self.assertRaisesRegex(ValueError, "do not multiply to the 8 devices"):
            sharding.make_mesh(config)

    def test_two_free_axes_are_refused(self):
        with self.assertRaisesRegex(ValueError, "one may be -1"):
            MeshConfig(data=-1, fsdp=-1)


class RuleTest(parameterized.TestCase):
    @parameterized.parameters(
        (("embedding",), (512, 32), PartitionSpec("tensor", "fsdp")),
        (("layers", "attention", "w_query"), (2, 32, 32), PartitionSpec(None, "fsdp", "tensor")),
        (("layers", "attention", "w_output"), (2, 32, 32), PartitionSpec(None, "tensor", "fsdp")),
        (("layers", "feed_forward", "w_down"), (2, 48, 32), PartitionSpec(None, "tensor", "fsdp")),
        (("layers", "attention_norm"), (2, 32), PartitionSpec(None, None)),
        (("embedding",), (511, 32), PartitionSpec(None, "fsdp")),
    )
    def test_parameter_is_divided_as_the_table_says(self, path, shape, spec):
        mesh = sharding.make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
        self.assertEqual(sharding.parameter_sharding(mesh, path, shape).spec, spec)

    def test_shape_that_does_not_divide_is_listed(self):
        mesh = sharding.make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
        parameters = decoder.abstract_parameters(tiny.config(511))
        self.assertEqual(sharding.undivided(mesh, parameters), ["embedding: 511 is not divisible by tensor=2"])

    def test_every_matrix_has_a_rule(self):
        mesh = sharding.make_mesh(MeshConfig(data=1, fsdp=8))
        for keys, leaf in jax.tree_util.tree_leaves_with_path(decoder.abstract_parameters(tiny.config(512))):
            spec = sharding.parameter_sharding(mesh, [key.key for key in keys], leaf.shape).spec
            is_matrix = leaf.ndim - (keys[0].key == "layers") == 2
            self.assertEqual("fsdp" in spec, is_matrix, keys)


if __name__ == "__main__":
    absltest.main()
