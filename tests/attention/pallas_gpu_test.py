import functools

import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest, parameterized

from dialog_jax.attention import pallas_gpu
from dialog_jax.attention.mask import Mask
from dialog_jax.attention.pallas_gpu import Blocks, Tiling
from tests.attention import lowering, oracle

_EVEN = Tiling(Blocks(32, 32, 4, 1), Blocks(32, 32, 4, 1), Blocks(32, 32, 4, 1))
_UNEVEN = Tiling(Blocks(32, 16, 4, 1), Blocks(16, 32, 4, 1), Blocks(16, 32, 4, 1))


@functools.partial(jax.jit, static_argnames="blocks")
def _attend(q, k, v, subtree_end, d_output, blocks):
    """(output, dq, dk, dv), the gradients of sum(output * d_output)."""
    attend = functools.partial(pallas_gpu.attend, blocks=blocks, interpret=True)
    output, pull = jax.vjp(lambda q, k, v: attend(q, k, v, Mask(subtree_end)), q, k, v)
    return output, *pull(d_output)


class PallasGpuTest(parameterized.TestCase):
    @parameterized.named_parameters(
        dict(testcase_name="trees", blocks=_EVEN, length=96, branching=True, heads=2, kv_heads=1),
        dict(testcase_name="paths", blocks=_EVEN, length=96, branching=False, heads=2, kv_heads=2),
        dict(testcase_name="uneven_blocks", blocks=_UNEVEN, length=70, branching=True, heads=6, kv_heads=2),
        dict(testcase_name="one_block", blocks=_UNEVEN, length=9, branching=True, heads=1, kv_heads=1),
    )
    def test_output_and_gradients_equal_those_over_lineages(self, blocks, length, branching, heads, kv_heads):
        rng = np.random.default_rng(length)
        rows = oracle.rows_of(rng, length, branching=branching, padding=length // 3)
        given = oracle.inputs(rng, rows, heads=heads, kv_heads=kv_heads, head_dim=16)
        needed = oracle.attention(*given[:3], rows, given[4])
        for got, exact in zip(_attend(*given, blocks), needed, strict=True):
            np.testing.assert_allclose(got, exact, atol=3e-6)

    def test_bfloat16_is_off_by_its_rounding_only(self):
        rng = np.random.default_rng(0)
        rows = oracle.rows_of(rng, 64, branching=True)
        given = oracle.inputs(rng, rows, heads=4, kv_heads=2, head_dim=64, dtype=jnp.bfloat16)
        needed = oracle.attention(*given[:3], rows, given[4])
        for got, exact in zip(_attend(*given, _EVEN), needed, strict=True):
            self.assertEqual(got.dtype, jnp.bfloat16)
            self.assertLess(np.linalg.norm(np.asarray(got, np.float64) - exact) / np.linalg.norm(exact), 6e-3)

    def test_huge_scores_give_no_nan(self):
        rng = np.random.default_rng(0)
        rows = oracle.rows_of(rng, 64, branching=True, padding=20)
        q, k, v, subtree_end, d_output = oracle.inputs(rng, rows, heads=2, kv_heads=1, head_dim=16)
        for got in _attend(300 * q, 300 * k, v, subtree_end, d_output, _EVEN):
            self.assertTrue(np.all(np.isfinite(got)))

    def test_blocks_without_a_visible_pair_are_not_read(self):
        # The trunk 0-31 with branches 32-63 and 64-95, then a dialogue 96-127: queries of the last three see nothing of
        # each other, so what is not a number in one must not reach another, not even times 0.
        parents = [*range(-1, 63), 31, *range(64, 95), -1, *range(96, 127)]
        rng = np.random.default_rng(0)
        q, k, v, subtree_end, d_output = oracle.inputs(rng, [parents], heads=2, kv_heads=1, head_dim=16)
        for spoilt in (slice(32, 64), slice(64, 96), slice(96, 128)):
            fine = [token for token in range(32, 128) if token not in range(128)[spoilt]]
            given = [x.copy() for x in (q, k, v)]
            for array in given:
                array[:, spoilt] = np.nan
            got = _attend(*given, subtree_end, d_output, _UNEVEN)
            exact = oracle.attention(q, k, v, [parents], d_output)
            for array, needed in zip(map(np.asarray, got), exact, strict=True):
                np.testing.assert_allclose(array[:, fine], needed[:, fine], atol=3e-6)
                self.assertTrue(np.all(np.isnan(array[:, spoilt])))  # what is visible was read

    def test_visible_blocks_are_those_of_the_picture(self):
        # fmt: off
        subtree_end = jnp.asarray([[6, 6, 6, 6,  6, 6, 12, 12,  12, 12, 12, 12]], jnp.int32)
        # fmt: on
        listed, count = pallas_gpu.list_visible_blocks(subtree_end, Blocks(4, 4, 4, 1))
        np.testing.assert_array_equal(count, [[1, 2, 2]])
        np.testing.assert_array_equal(listed, [[[0, 3, 3], [0, 1, 3], [1, 2, 3]]])

    @parameterized.parameters(dict(queries=8, keys=8), dict(queries=16, keys=4), dict(queries=4, keys=16))
    def test_visible_blocks_are_exactly_those_with_a_visible_pair(self, queries, keys):
        rng = np.random.default_rng(queries)
        rows = oracle.rows_of(rng, 64, branching=True, padding=16)
        *_, subtree_end, _ = oracle.inputs(rng, rows, heads=1, kv_heads=1, head_dim=2)
        listed, count = pallas_gpu.list_visible_blocks(jnp.asarray(subtree_end), Blocks(queries, keys, 4, 1))
        for row, parents in enumerate(rows):
            pairs = oracle.visible(parents).reshape(64 // queries, queries, 64 // keys, keys).any(axis=(1, 3))
            for i, seen in enumerate(pairs):
                np.testing.assert_array_equal(listed[row, i, : count[row, i]], np.flatnonzero(seen))

    @parameterized.product(heads=((9, 3, 64), (32, 8, 128)), dtype=(jnp.bfloat16, jnp.float32))
    def test_kernels_lower_to_triton_for_an_h200(self, heads, dtype):
        sizes = dict(zip(("heads", "kv_heads", "head_dim"), heads, strict=True))
        shapes = lowering.shapes(length=8192, dtype=dtype, **sizes)
        function = lowering.with_gradients(pallas_gpu.attend)
        text = lowering.lowered(function, *shapes, kind="NVIDIA H200", platform="cuda")
        self.assertEqual(text.count("xla.gpu.triton"), 3)

    @parameterized.parameters(dict(head_dim=80), dict(head_dim=64, dtype=jnp.float16))
    def test_shape_or_type_without_blocks_is_an_error(self, head_dim, dtype=jnp.bfloat16):
        x = jnp.zeros((1, 16, 1, head_dim), dtype)
        with self.assertRaisesRegex(NotImplementedError, "head_dim is 80" if head_dim == 80 else "the type is float16"):
            pallas_gpu.attend(x, x, x, Mask(jnp.ones((1, 16), jnp.int32)))


if __name__ == "__main__":
    absltest.main()
