import functools

import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest, parameterized

from dialog_jax.attention import splash
from dialog_jax.attention.mask import Mask
from tests.attention import lowering, oracle


@functools.partial(jax.jit, static_argnames="largest_block")
def _attend(q, k, v, subtree_end, d_output, largest_block):
    """(output, dq, dk, dv), the gradients of sum(output * d_output)."""
    attend = functools.partial(splash.attend, largest_block=largest_block, interpret=True)
    output, pull = jax.vjp(lambda q, k, v: attend(q, k, v, Mask(subtree_end)), q, k, v)
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

    @parameterized.product(heads=((9, 3, 64), (32, 8, 128)), dtype=(jnp.bfloat16, jnp.float32))
    def test_kernels_lower_for_a_tpu(self, heads, dtype):
        sizes = dict(zip(("heads", "kv_heads", "head_dim"), heads, strict=True))
        shapes = lowering.shapes(length=2048, dtype=dtype, **sizes)
        function = lowering.with_gradients(splash.attend)
        text = lowering.lowered(function, *shapes, kind="TPU v5 lite", platform="tpu")
        self.assertEqual(text.count("custom_call @tpu_custom_call"), 3)


if __name__ == "__main__":
    absltest.main()
