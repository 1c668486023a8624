import functools

import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest, parameterized

from dialog_jax.attention import splash
from dialog_jax.attention.mask import Mask
from tests.attention import lowering, oracle


@functools.partial(jax.jit, static_argnames=("largest_block", "cap"))
def _attend(q, k, v, subtree_end, d_output, largest_block, window=None, sinks=None, cap=None):
    """(output, dq, dk, dv), the gradients of sum(output * d_output); d_sinks if there are sinks."""
    attend = functools.partial(splash.attend, cap=cap, largest_block=largest_block, interpret=True)
    mask = Mask(subtree_end, None, window)  # a path's indices are as far apart as its positions
    arrays = (q, k, v) if sinks is None else (q, k, v, sinks)
    output, pull = jax.vjp(lambda q, k, v, *sinks: attend(q, k, v, mask, *sinks), *arrays)
    return output, *pull(d_output)


class SplashTest(parameterized.TestCase):
    @parameterized.named_parameters(
        dict(testcase_name="three_blocks", length=384, heads=4, kv_heads=2, largest_block=512),
        dict(testcase_name="of_512_tokens", length=1100, heads=2, kv_heads=1, largest_block=splash.LARGEST_BLOCK),
        dict(testcase_name="padded", length=300, heads=2, kv_heads=2, largest_block=256),
    )
    def test_output_and_gradients_equal_those_over_lineages(self, length, heads, kv_heads, largest_block):
        rng = np.random.default_rng(length)
        rows = oracle.rows_of(rng, length, branching=False, padding=length // 3)
        given = oracle.inputs(rng, rows, heads=heads, kv_heads=kv_heads, head_dim=16)
        needed = oracle.attention(*given[:3], rows, given[4])
        for got, exact in zip(_attend(*given, largest_block), needed, strict=True):
            np.testing.assert_allclose(got, exact, atol=1e-5)

    @parameterized.named_parameters(
        dict(testcase_name="window", window=50),
        dict(testcase_name="window_of_several_blocks", window=200),
        dict(testcase_name="window_beyond_all", window=np.iinfo(np.int32).max),
        dict(testcase_name="cap", cap=0.7),
        dict(testcase_name="sinks", sinks=True),
        dict(testcase_name="all", window=130, cap=1.5, sinks=True),
    )
    def test_windows_caps_and_sinks_equal_those_over_lineages(self, window=None, cap=None, sinks=False):
        rng = np.random.default_rng(7)
        rows = [list(range(-1, 383)), oracle.rows_of(rng, 384, branching=False)[0]]
        given = oracle.inputs(rng, rows, heads=4, kv_heads=2, head_dim=16)
        additions = dict(cap=cap, sinks=3 * rng.standard_normal(4).astype(np.float32) if sinks else None)
        reach = None if window is None else min(window, 1000)
        needed = oracle.attention(*given[:3], rows, given[4], window=reach, **additions)
        traced = None if window is None else jnp.int32(window)
        for got, exact in zip(_attend(*given, 512, traced, **additions), needed, strict=True):
            np.testing.assert_allclose(got, exact, atol=2e-5)

    def test_blocks_beyond_the_window_are_not_computed(self):
        parents = list(range(-1, 383))
        rng = np.random.default_rng(0)
        q, k, v, subtree_end, d_output = oracle.inputs(rng, [parents], heads=2, kv_heads=1, head_dim=16)
        needed = oracle.attention(q, k, v, [parents], d_output, window=100)
        for array in (q, k, v):
            array[:, :128] = np.nan
        for got, exact in zip(_attend(q, k, v, subtree_end, d_output, 512, jnp.int32(100)), needed, strict=True):
            np.testing.assert_allclose(got[:, 256:], exact[:, 256:], atol=1e-5)

    def test_largest_windowed_row_has_the_first_and_the_last_key_of_its_windows(self):
        query, window = jnp.array([[0, 65535, 65535, 40000]]), jnp.array([[1, 65536, 1, 30000]])
        number = (query << 16) | (window - 1)  # as `_add_window`
        np.testing.assert_array_equal(splash._is_visible(number, query), [[True] * 4])
        np.testing.assert_array_equal(splash._is_visible(number, query + 1), [[False] * 4])
        np.testing.assert_array_equal(splash._is_visible(number, query - window + 1), [[True] * 4])
        np.testing.assert_array_equal(splash._is_visible(number, query - window), [[False] * 4])
        x = jax.ShapeDtypeStruct((1, splash.LONGEST_WINDOWED_ROW + 512, 1, 64), jnp.float32)
        ends = jax.ShapeDtypeStruct(x.shape[:2], jnp.int32)
        with self.assertRaisesRegex(NotImplementedError, "rows have 66048 tokens; with windows, 65536 at most"):
            jax.eval_shape(lambda x, ends: splash.attend(x, x, x, Mask(ends, None, 5)), x, ends)

    def test_blocks_of_other_paths_are_not_read(self):
        parents = [*range(-1, 127), -1, *range(128, 383)]  # 0-127 and 128-383
        rng = np.random.default_rng(0)
        q, k, v, subtree_end, d_output = oracle.inputs(rng, [parents], heads=2, kv_heads=1, head_dim=16)
        needed = oracle.attention(q, k, v, [parents], d_output)
        for array in (q, k, v):
            array[:, :128] = np.nan
        for got, exact in zip(_attend(q, k, v, subtree_end, d_output, 512), needed, strict=True):
            np.testing.assert_allclose(got[:, 128:], exact[:, 128:], atol=1e-5)
            self.assertTrue(np.all(np.isnan(got[:, :128])))

    @parameterized.product(heads=((9, 3, 64), (32, 8, 128)), dtype=(jnp.bfloat16, jnp.float32), additions=(False, True))
    def test_kernels_lower_for_a_tpu(self, heads, dtype, additions):
        sizes = dict(zip(("heads", "kv_heads", "head_dim"), heads, strict=True))
        shapes = lowering.shapes(length=2048, dtype=dtype, additions=additions, **sizes)
        function = lowering.with_gradients(splash.attend, additions)
        text = lowering.lowered(function, *shapes, kind="TPU v5 lite", platform="tpu")
        self.assertEqual(text.count("custom_call @tpu_custom_call"), 3)


if __name__ == "__main__":
    absltest.main()
