import functools

import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest, parameterized

from dialog_jax.attention import pallas_gpu
from dialog_jax.attention.mask import Mask
from dialog_jax.attention.pallas_gpu import Tiling
from dialog_jax.attention.pallas_gpu_kernels import Blocks
from tests.attention import lowering, oracle

_EVEN = Tiling(Blocks(32, 32, 4, 1), Blocks(32, 32, 4, 1), Blocks(32, 32, 4, 1))
_UNEVEN = Tiling(Blocks(32, 16, 4, 1), Blocks(16, 32, 4, 1), Blocks(16, 32, 4, 1))


@functools.partial(jax.jit, static_argnames=("blocks", "cap"))
def _attend(q, k, v, subtree_end, d_output, blocks, position=None, window=None, sinks=None, cap=None):
    """(output, dq, dk, dv), the gradients of sum(output * d_output); d_sinks if there are sinks."""
    mask = Mask(subtree_end, position, window)
    attend = functools.partial(pallas_gpu.attend, cap=cap, blocks=blocks, interpret=True)
    arrays = (q, k, v) if sinks is None else (q, k, v, sinks)
    output, pull = jax.vjp(lambda q, k, v, *sinks: attend(q, k, v, mask, *sinks), *arrays)
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

    @parameterized.named_parameters(
        dict(testcase_name="window", blocks=_EVEN, window=9),
        dict(testcase_name="window_of_several_blocks", blocks=_UNEVEN, window=40),
        dict(testcase_name="window_of_one", blocks=_UNEVEN, window=1),
        dict(testcase_name="window_beyond_all", blocks=_UNEVEN, window=np.iinfo(np.int32).max),
        dict(testcase_name="window_on_paths", blocks=_UNEVEN, window=20, branching=False),
        dict(testcase_name="cap", blocks=_EVEN, cap=0.7),
        dict(testcase_name="sinks", blocks=_EVEN, sinks=True),
        dict(testcase_name="all", blocks=_UNEVEN, window=12, cap=1.5, sinks=True),
    )
    def test_windows_caps_and_sinks_equal_those_over_lineages(
        self, blocks, window=None, cap=None, sinks=False, branching=True
    ):
        rng = np.random.default_rng(7)
        rows = oracle.rows_of(rng, 120, branching=branching, padding=30)
        if not branching:
            rows[0] = list(range(-1, 119))  # longer than the window and several blocks
        given = oracle.inputs(rng, rows, heads=4, kv_heads=2, head_dim=16)
        additions = dict(cap=cap, sinks=3 * rng.standard_normal(4).astype(np.float32) if sinks else None)
        traced = {} if window is None else dict(position=oracle.make_mask(rows, 1).position, window=jnp.int32(window))
        reach = None if window is None else min(window, 1000)
        needed = oracle.attention(*given[:3], rows, given[4], window=reach, **additions)
        for got, exact in zip(_attend(*given, blocks, **traced, **additions), needed, strict=True):
            np.testing.assert_allclose(got, exact, atol=5e-6)

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

    def test_blocks_beyond_the_window_are_not_read(self):
        # One path of 128 tokens with a window of 20: what is not a number in the first block of 32 reaches none of the
        # last two, and what is in the last none of the first two.
        parents = list(range(-1, 127))
        rng = np.random.default_rng(0)
        q, k, v, subtree_end, d_output = oracle.inputs(rng, [parents], heads=2, kv_heads=1, head_dim=16)
        exact = oracle.attention(q, k, v, [parents], d_output, window=20)
        for spoilt, fine in ((slice(0, 32), slice(64, 128)), (slice(96, 128), slice(0, 64))):
            given = [x.copy() for x in (q, k, v)]
            for array in given:
                array[:, spoilt] = np.nan
            got = _attend(*given, subtree_end, d_output, _EVEN, np.arange(128, dtype=np.int32)[None], np.int32(20))
            for array, needed in zip(map(np.asarray, got), exact, strict=True):
                np.testing.assert_allclose(array[:, fine], needed[:, fine], atol=3e-6)

    def test_visible_blocks_are_those_of_the_picture(self):
        # fmt: off
        subtree_end = jnp.asarray([[6, 6, 6, 6,  6, 6, 12, 12,  12, 12, 12, 12]], jnp.int32)
        # fmt: on
        count, listed = pallas_gpu.list_blocks(Mask(subtree_end).find_visible_blocks(4, 4))
        np.testing.assert_array_equal(count, [[1, 2, 2]])
        np.testing.assert_array_equal(listed, [[[0, 3, 3], [0, 1, 3], [1, 2, 3]]])

    @parameterized.parameters(dict(queries=8, keys=8), dict(queries=16, keys=4), dict(queries=4, keys=16))
    def test_visible_blocks_are_exactly_those_with_a_visible_pair(self, queries, keys):
        rng = np.random.default_rng(queries)
        rows = oracle.rows_of(rng, 64, branching=True, padding=16)
        visible = oracle.make_mask(rows).find_visible_blocks(queries, keys)
        count, listed = pallas_gpu.list_blocks(visible)
        for row, parents in enumerate(rows):
            pairs = oracle.visible(parents).reshape(64 // queries, queries, 64 // keys, keys).any(axis=(1, 3))
            for i, seen in enumerate(pairs):
                np.testing.assert_array_equal(listed[row, i, : count[row, i]], np.flatnonzero(seen))

    @parameterized.product(size=((8, 8), (16, 4), (4, 16)), window=(1, 5, 20, 200), branching=(True, False))
    def test_no_block_with_a_pair_within_the_window_is_missing_and_on_a_path_there_is_no_other(
        self, size, window, branching
    ):
        rng = np.random.default_rng(window)
        rows = oracle.rows_of(rng, 64, branching=True, padding=16) if branching else [list(range(-1, 63))]
        queries, keys = size
        got = np.asarray(oracle.make_mask(rows, window).find_visible_blocks(queries, keys))
        pairs = np.stack([oracle.visible(parents, window) for parents in rows])
        pairs = pairs.reshape(len(rows), 64 // queries, queries, 64 // keys, keys).any(axis=(2, 4))
        np.testing.assert_array_equal(got & pairs, pairs)
        if not branching:
            np.testing.assert_array_equal(got, pairs)

    @parameterized.product(heads=((9, 3, 64), (32, 8, 128)), dtype=(jnp.bfloat16, jnp.float32), additions=(False, True))
    def test_kernels_lower_to_triton_for_an_h200(self, heads, dtype, additions):
        sizes = dict(zip(("heads", "kv_heads", "head_dim"), heads, strict=True))
        shapes = lowering.shapes(length=8192, dtype=dtype, additions=additions, **sizes)
        function = lowering.with_gradients(pallas_gpu.attend, additions)
        text = lowering.lowered(function, *shapes, kind="NVIDIA H200", platform="cuda")
        self.assertEqual(text.count("xla.gpu.triton"), 3)

    @parameterized.parameters(dict(head_dim=80), dict(head_dim=64, dtype=jnp.float16))
    def test_shape_or_type_without_blocks_is_an_error(self, head_dim, dtype=jnp.bfloat16):
        x = jnp.zeros((1, 16, 1, head_dim), dtype)
        with self.assertRaisesRegex(NotImplementedError, "head_dim is 80" if head_dim == 80 else "the type is float16"):
            pallas_gpu.attend(x, x, x, Mask(jnp.ones((1, 16), jnp.int32)))


if __name__ == "__main__":
    absltest.main()
