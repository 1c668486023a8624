"""Checksums against a loop over Python's integers, on one device and on a mesh."""

import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest
from jax.sharding import PartitionSpec

from dialog_jax.training import checksums, sharding
from dialog_jax.training.config import MeshConfig


def checksum(array):
    """MurmurHash3's finaliser, word by word, in Python's integers."""
    total = 0
    for index, word in enumerate(np.asarray(array).ravel().view(np.uint32).tolist()):
        word ^= index * 0x9E3779B9 % 2**32
        word = (word ^ word >> 16) * 0x85EBCA6B % 2**32
        word = (word ^ word >> 13) * 0xC2B2AE35 % 2**32
        total += word ^ word >> 16
    return total % 2**32


class ChecksumTest(absltest.TestCase):
    def test_checksum_is_that_of_the_loop_on_any_mesh(self):
        array = jax.random.normal(jax.random.key(0), (3, 16, 8))
        count = jnp.int32(7)
        expected = {"['a']": checksum(array), "['n']": checksum(count)}
        self.assertEqual(checksums.compute_checksums({"a": array, "n": count}), expected)
        mesh = sharding.make_mesh(MeshConfig(data=1, fsdp=4, tensor=2))
        place = jax.sharding.NamedSharding(mesh, PartitionSpec(None, "fsdp", "tensor"))
        self.assertEqual(checksums.compute_checksums({"a": jax.device_put(array, place), "n": count}), expected)

    def test_checksum_of_narrow_arrays_is_that_of_their_bits_as_words(self):
        codes = np.arange(-6, 6, dtype=np.int8).reshape(3, 4)
        words = checksum(codes.view(np.uint8).astype(np.uint32))
        arrays = [jnp.asarray(codes), jnp.asarray(codes.view(np.uint8))]
        self.assertEqual(list(checksums.compute_checksums(arrays).values()), [words, words])

    def test_every_bit_and_every_place_counts(self):
        array = np.zeros((2, 3), np.float32)
        seen = {checksum(array)}
        for place in range(6):
            for bit in range(32):
                changed = array.view(np.uint32).copy()
                changed.flat[place] ^= np.uint32(1 << bit)
                (value,) = checksums.compute_checksums([jnp.asarray(changed.view(np.float32))]).values()
                seen.add(value)
        self.assertLen(seen, 1 + 6 * 32)


if __name__ == "__main__":
    absltest.main()
