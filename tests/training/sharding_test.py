"""Meshes, and the table from a parameter to its layout."""

import dataclasses

import jax
import numpy as np
from absl.testing import absltest, parameterized
from jax.sharding import PartitionSpec

from dialog_jax.model import decoder
from dialog_jax.training import sharding
from dialog_jax.training.config import MeshConfig
from tests.training import tiny

BOTH = ("fsdp", "tensor")


class MeshTest(parameterized.TestCase):
    @parameterized.parameters(
        (MeshConfig(), (1, 8, 1, 1)),
        (MeshConfig(data=2, fsdp=-1, tensor=2), (1, 2, 2, 2)),
        (MeshConfig(data=1, fsdp=1, tensor=-1), (1, 1, 1, 8)),
        (MeshConfig(dcn_data=2, fsdp=2), (2, 2, 2, 1)),
        (MeshConfig(dcn_data=-1, data=1, fsdp=2, tensor=2), (2, 1, 2, 2)),
    )
    def test_minus_one_takes_the_rest(self, config, shape):
        mesh = sharding.make_mesh(config)
        self.assertEqual(
            tuple(mesh.shape.items()), tuple(zip(("dcn_data", "data", "fsdp", "tensor"), shape, strict=True))
        )

    @parameterized.parameters(
        MeshConfig(data=3), MeshConfig(data=-1, fsdp=3), MeshConfig(data=16), MeshConfig(dcn_data=3)
    )
    def test_sizes_that_do_not_multiply_to_the_devices_are_refused(self, config):
        with self.assertRaisesRegex(ValueError, "do not multiply to the number of devices, 8"):
            sharding.make_mesh(config)

    def test_two_free_axes_are_refused(self):
        with self.assertRaisesRegex(ValueError, "one may be -1"):
            MeshConfig(data=-1, fsdp=-1)

    def test_devices_of_one_process_are_divided_in_their_order(self):
        mesh = sharding.make_mesh(MeshConfig(dcn_data=2, data=2, tensor=2))
        np.testing.assert_array_equal(
            np.vectorize(lambda device: device.id)(mesh.devices), np.arange(8).reshape(2, 2, 1, 2)
        )


@dataclasses.dataclass(frozen=True)
class _Device:
    id: int
    process_index: int
    slice_index: int
    platform: str = "cpu"
    device_kind: str = "cpu"


def far_devices(slices, processes):
    """Eight devices that come in an order which mixes their slices and processes."""
    return [_Device(i, i % processes, i % slices) for i in range(8)]


class SlicesTest(parameterized.TestCase):
    @parameterized.parameters((2, 4), (4, 4), (2, 8))
    def test_each_place_of_dcn_data_is_one_slice(self, slices, processes):
        found = sharding.arrange_devices((slices, 4 // slices, 2, 1), far_devices(slices, processes))
        self.assertEqual(found.shape[:4], (slices, 4 // slices, 2, 1))
        for place in found:
            self.assertLen({device.slice_index for device in place.flat}, 1)

    def test_it_is_one_process_where_there_is_one_slice(self):
        for place in sharding.arrange_devices((4, 1, 2, 1), far_devices(1, 4)):
            self.assertLen({device.process_index for device in place.flat}, 1)

    @parameterized.parameters((4, 4, "4 slices. Set it to 4"), (1, 4, "4 processes. Set it to 4"))
    def test_other_number_than_there_are_is_refused(self, slices, processes, message):
        with self.assertRaisesRegex(ValueError, f"mesh.dcn_data is 2, but the devices are in {message}, or to 1"):
            sharding.arrange_devices((2, 4, 1, 1), far_devices(slices, processes))


class RuleTest(parameterized.TestCase):
    @parameterized.parameters(
        (("embedding",), (512, 32), PartitionSpec("tensor", "fsdp")),
        (("lm_head",), (512, 32), PartitionSpec("tensor", "fsdp")),
        (("layers", "attention", "w_query"), (2, 32, 32), PartitionSpec(None, "fsdp", "tensor")),
        (("layers", "attention", "w_key"), (2, 32, 16), PartitionSpec(None, "fsdp", "tensor")),
        (("layers", "attention", "w_output"), (2, 32, 32), PartitionSpec(None, "tensor", "fsdp")),
        (("layers", "feed_forward", "w_up"), (2, 32, 48), PartitionSpec(None, "fsdp", "tensor")),
        (("layers", "feed_forward", "w_down"), (2, 48, 32), PartitionSpec(None, "tensor", "fsdp")),
        (("layers", "attention_norm"), (2, 32), PartitionSpec(None, None)),
        (("layers", "attention", "b_query"), (2, 32), PartitionSpec(None, None)),
        (("final_norm",), (32,), PartitionSpec(None)),
        (("layers", "w_up", "nf4_codes"), (2, 32, 48), PartitionSpec(None, "fsdp", "tensor")),
        (("layers", "w_down", "weight", "nf4_codes"), (2, 32, 48), PartitionSpec(None, "tensor", "fsdp")),
        (("layers", "w_down", "weight", "int8_codes"), (2, 32, 48), PartitionSpec(None, "tensor", "fsdp")),
        (("layers", "w_up", "weight", "scale_codes"), (2, 1, 48), PartitionSpec(None, None, BOTH)),
        (("layers", "w_up", "weight", "scale_step"), (2, 4, 4), PartitionSpec(None, None, None)),
    )
    def test_parameter_is_divided_as_the_table_says(self, path, shape, spec):
        mesh = sharding.make_mesh(MeshConfig(dcn_data=2, data=1, fsdp=2, tensor=2))
        self.assertEqual(sharding.parameter_sharding(mesh, path, shape).spec, spec)

    # Of shapes that the rules before do not divide, with fsdp = a and tensor = b.
    @parameterized.parameters(
        (2, 4, (6, 4), ("fsdp", "tensor")),
        (2, 4, (4, 6), ("tensor", "fsdp")),
        (2, 4, (8, 3), (BOTH, None)),
        (2, 4, (3, 8), (None, BOTH)),
        (2, 4, (2, 3), ("fsdp", None)),
        (2, 4, (3, 6), (None, "fsdp")),
        (4, 2, (3, 2), (None, "tensor")),
        (4, 2, (6, 3), ("tensor", None)),
        (4, 2, (3, 5), (None, None)),
    )
    def test_first_rule_that_divides_is_taken(self, fsdp, tensor, shape, spec):
        mesh = sharding.make_mesh(MeshConfig(data=1, fsdp=fsdp, tensor=tensor))
        for name, turned in (("w_query", False), ("w_down", True)):
            with self.subTest(name):
                swap = reversed if turned else tuple
                found = sharding.parameter_sharding(mesh, ("layers", name), (2, *swap(shape)))
                self.assertEqual(found.spec, PartitionSpec(None, *swap(spec)))
                jax.device_put(np.zeros((2, *swap(shape))), found)

    def test_shape_that_its_first_rule_does_not_divide_is_listed(self):
        mesh = sharding.make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
        self.assertEmpty(sharding.describe_uneven_layouts(mesh, decoder.abstract_parameters(tiny.config(512))))
        self.assertEqual(
            sharding.describe_uneven_layouts(mesh, decoder.abstract_parameters(tiny.config(511))),
            ["embedding: 511 is not divisible by tensor=2; laid out as (whole, fsdp * tensor), not (tensor, fsdp)"],
        )
        mesh = sharding.make_mesh(MeshConfig(data=1, fsdp=8))
        parameters = {"layers": {"w_up": jax.ShapeDtypeStruct((8, 12, 4), np.float32)}}
        self.assertEqual(
            sharding.describe_uneven_layouts(mesh, parameters),
            ["layers/w_up: 12 is not divisible by fsdp=8; laid out as (whole, whole), not (fsdp, whole)"],
        )

    def test_every_matrix_has_a_rule(self):
        mesh = sharding.make_mesh(MeshConfig(data=1, fsdp=8))
        for keys, leaf in jax.tree_util.tree_leaves_with_path(decoder.abstract_parameters(tiny.config(512))):
            spec = sharding.parameter_sharding(mesh, [key.key for key in keys], leaf.shape).spec
            is_matrix = leaf.ndim - (keys[0].key == "layers") == 2
            self.assertEqual("fsdp" in spec, is_matrix, keys)

    def test_rows_are_over_all_axes_but_tensor(self):
        mesh = sharding.make_mesh(MeshConfig(dcn_data=2, data=2, tensor=2))
        shards = jax.device_put(np.arange(12).reshape(3, 4), sharding.batch_sharding(mesh)).addressable_shards
        rows = {shard.device.id: shard.data.tolist() for shard in shards}
        self.assertEqual([rows[i] for i in range(8)], [[[r], [4 + r], [8 + r]] for r in (0, 0, 1, 1, 2, 2, 3, 3)])

    def test_one_process_fills_all_rows(self):
        mesh = sharding.make_mesh(MeshConfig(dcn_data=2, data=2, tensor=2))
        self.assertEqual(sharding.find_local_rows(mesh, 8), list(range(8)))
        rows = np.arange(48).reshape(2, 8, 3)
        placed = sharding.place_rows(mesh, rows, range(8), 8)
        self.assertEqual(placed.sharding, sharding.batch_sharding(mesh))
        np.testing.assert_array_equal(placed, rows)


if __name__ == "__main__":
    absltest.main()
