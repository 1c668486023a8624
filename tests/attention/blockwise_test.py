import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl.testing import absltest, parameterized

from dialog_jax.attention import blockwise
from dialog_jax.attention.mask import Mask
from tests.attention import oracle
from tests.model import forests


def _random(rng, *shape):
    return rng.standard_normal(shape).astype(np.float32)


def _oracle(q, k, v, rows):
    """Token by token over its lineage, in float64."""
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    output = np.zeros(q.shape)
    for b, parents in enumerate(rows):
        for i in range(q.shape[1]):
            seen = forests.lineage(parents, i)
            for n in range(q.shape[2]):
                shared = n // (q.shape[2] // k.shape[2])
                score = k[b, seen, shared] @ q[b, i, n] / math.sqrt(q.shape[3])
                weight = np.exp(score - score.max())
                output[b, i, n] = weight @ v[b, seen, shared] / weight.sum()
    return output


class AttentionTest(parameterized.TestCase):
    @parameterized.parameters(
        dict(length=1, heads=2, kv_heads=2),
        dict(length=37, heads=6, kv_heads=2),
        dict(length=256, heads=2, kv_heads=1),
        dict(length=300, heads=3, kv_heads=3),
        dict(length=700, heads=4, kv_heads=2),
    )
    def test_attention_on_random_forests_equals_loop_over_lineages(self, length, heads, kv_heads):
        rng = np.random.default_rng(length)
        rows = [forests.random_parents(rng, length, root=0.02) for _ in range(2)]
        subtree_end = np.stack([forests.arrays(parents)[1] for parents in rows])
        q = _random(rng, 2, length, heads, 8)
        k, v = _random(rng, 2, length, kv_heads, 8), _random(rng, 2, length, kv_heads, 8)
        got = jax.jit(blockwise.attend)(q, k, v, Mask(subtree_end))
        np.testing.assert_allclose(got, _oracle(q, k, v, rows), atol=2e-6)

    def test_attention_reads_the_pictured_mask(self):
        # fmt: off
        subtree_end = [5, 5, 4, 4, 5, 7, 7, 8]  # the tree 0 1 (2 3 | 4), the path 5 6, padding 7
        seen = [
            [1, 0, 0, 0, 0, 0, 0, 0],
            [1, 1, 0, 0, 0, 0, 0, 0],
            [1, 1, 1, 0, 0, 0, 0, 0],
            [1, 1, 1, 1, 0, 0, 0, 0],
            [1, 1, 0, 0, 1, 0, 0, 0],
            [0, 0, 0, 0, 0, 1, 0, 0],
            [0, 0, 0, 0, 0, 1, 1, 0],
            [0, 0, 0, 0, 0, 0, 0, 1],
        ]
        # fmt: on
        zeros = jnp.zeros((1, 8, 1, 8))  # equal scores: each query reads the mean of what it sees
        got = blockwise.attend(zeros, zeros, jnp.eye(8)[None, :, None], Mask(jnp.asarray([subtree_end])))
        np.testing.assert_allclose(got[0, :, 0], np.array(seen) / np.sum(seen, axis=1, keepdims=True), atol=1e-6)

    def test_gradient_reaches_ancestors_and_no_other_token(self):
        rng = np.random.default_rng(0)
        length = 300  # two blocks
        parents = forests.random_parents(rng, length, root=0.03)
        subtree_end = jnp.asarray(forests.arrays(parents)[1])[None]
        q, k, v = (jnp.asarray(_random(rng, 1, length, 2, 4)) for _ in range(3))
        direction = jnp.asarray(_random(rng, 2, 4))
        for query in (0, 100, 255, 256, 299):

            def component(k, v, query=query):
                return jnp.sum(blockwise.attend(q, k, v, Mask(subtree_end))[0, query] * direction)

            to_key, to_value = jax.jit(jax.grad(component, argnums=(0, 1)))(k, v)
            seen = forests.lineage(parents, query)
            reached = np.flatnonzero(np.any(np.asarray(to_value[0]) != 0, axis=(1, 2)))
            np.testing.assert_array_equal(reached, seen)
            self.assertContainsSubset(np.flatnonzero(np.any(np.asarray(to_key[0]) != 0, axis=(1, 2))), seen)

    def test_gradient_equals_finite_differences_of_the_oracle(self):
        rng = np.random.default_rng(1)
        rows = [forests.random_parents(rng, 20)]
        subtree_end = jnp.asarray(forests.arrays(rows[0])[1])[None]
        q, k, v = (_random(rng, 1, 20, heads, 6) for heads in (4, 2, 2))
        out = _random(rng, 1, 20, 4, 6)
        steps = [_random(rng, *x.shape).astype(np.float64) for x in (q, k, v)]
        ahead, behind = (
            np.sum(_oracle(*(x + sign * 1e-5 * step for x, step in zip((q, k, v), steps, strict=True)), rows) * out)
            for sign in (1, -1)
        )
        gradient = jax.grad(
            lambda q, k, v: jnp.sum(blockwise.attend(q, k, v, Mask(subtree_end)) * out), argnums=(0, 1, 2)
        )
        found = gradient(*(jnp.asarray(x) for x in (q, k, v)))
        got = sum(np.sum(np.asarray(g) * step) for g, step in zip(found, steps, strict=True))
        np.testing.assert_allclose(got, (ahead - behind) / 2e-5, rtol=1e-4)

    def test_padding_and_huge_scores_give_no_nan(self):
        length = 40
        subtree_end = jnp.arange(1, length + 1)[None]  # all padding
        q = jnp.full((1, length, 2, 4), 1e4)
        v = jnp.asarray(_random(np.random.default_rng(2), 1, length, 2, 4))
        got, gradient = jax.value_and_grad(lambda q: jnp.sum(blockwise.attend(q, q, v, Mask(subtree_end))))(q)
        np.testing.assert_allclose(got, jnp.sum(v), rtol=1e-5)
        self.assertTrue(bool(jnp.all(jnp.isfinite(gradient))))

    def test_no_array_of_row_by_row_is_made(self):
        length, heads = 8192, 2
        q = jax.ShapeDtypeStruct((1, length, heads, 8), jnp.float32)
        subtree_end = jax.ShapeDtypeStruct((1, length), jnp.int32)

        def largest(jaxpr):
            inner = [getattr(value, "jaxpr", value) for eqn in jaxpr.eqns for value in eqn.params.values()]
            own = [var.aval.size for eqn in jaxpr.eqns for var in eqn.outvars]
            return max(own + [largest(sub) for sub in inner if hasattr(sub, "eqns")], default=0)

        def loss(q, subtree_end):
            return jnp.sum(blockwise.attend(q, q, q, Mask(subtree_end), block=128))

        got = largest(jax.make_jaxpr(jax.grad(loss))(q, subtree_end).jaxpr)
        self.assertEqual(got, heads * length * 8)  # queries: the walk did see them

    @pytest.mark.full
    def test_block_that_does_not_divide_the_row_gives_the_same_value_and_gradient(self):
        self.check_block(100)

    @parameterized.parameters(32, 128, 256, 1000)
    @pytest.mark.full
    def test_any_block_gives_the_same_value_and_gradient(self, block):
        self.check_block(block)

    def check_block(self, block):
        rng = np.random.default_rng(3)
        rows = [forests.random_parents(rng, 300, root=0.02) for _ in range(2)]
        subtree_end = jnp.asarray(np.stack([forests.arrays(parents)[1] for parents in rows]))
        q, k, v, out = (jnp.asarray(_random(rng, 2, 300, heads, 8)) for heads in (4, 2, 2, 4))
        np.testing.assert_allclose(
            blockwise.attend(q, k, v, Mask(subtree_end), block=block), _oracle(q, k, v, rows), atol=2e-6
        )

        def of(attend):
            return jax.grad(lambda q, k, v: jnp.sum(attend(q, k, v) * out), argnums=(0, 1, 2))(q, k, v)

        def dense(q, k, v):
            place = jnp.arange(300)
            seen = (place[None, None, :] <= place[None, :, None]) & (place[None, :, None] < subtree_end[:, None, :])
            k, v = (jnp.repeat(x, 2, axis=2) for x in (k, v))
            score = jnp.einsum("bqnh,bknh->bnqk", q, k) / math.sqrt(8)
            return jnp.einsum("bnqk,bknh->bqnh", jax.nn.softmax(jnp.where(seen[:, None], score, -jnp.inf)), v)

        got = of(lambda q, k, v: blockwise.attend(q, k, v, Mask(subtree_end), block=block))
        for ours, needed in zip(got, of(dense), strict=True):
            np.testing.assert_allclose(ours, needed, atol=2e-5)

    @pytest.mark.full
    def test_blocks_that_nobody_sees_are_not_read(self):
        subtree_end = np.concatenate([np.full(64, 64), np.full(64, 128), np.full(64, 192), np.full(64, 192 + 64)])
        subtree_end[64:192] = 192  # dialogues of 64, 128 and 64 tokens
        rng = np.random.default_rng(4)
        q, k, v = (_random(rng, 1, 256, 2, 4) for _ in range(3))
        k[:, 64:192] = np.nan
        attend = functools.partial(blockwise.attend, mask=Mask(jnp.asarray(subtree_end)[None]), block=32)
        got = attend(jnp.asarray(q), jnp.asarray(k), jnp.asarray(v))
        finite = np.all(np.isfinite(got[0]), axis=(1, 2))
        np.testing.assert_array_equal(finite, np.repeat([True, False, True], (64, 128, 64)))
        gradients = jax.grad(lambda *x: jnp.sum(attend(*x)[:, :64]), argnums=(0, 1, 2))(
            jnp.asarray(q), jnp.asarray(k), jnp.asarray(v)
        )
        for gradient in gradients:
            self.assertTrue(bool(jnp.all(jnp.isfinite(gradient[:, :64]))))
            self.assertTrue(bool(jnp.all(jnp.isfinite(gradient[:, 192:]))))

    def test_branches_do_not_see_each_other_s_blocks(self):
        # A history of 32 tokens and two continuations of 64: the second does not read the first.
        subtree_end = np.concatenate([np.full(32, 160), np.full(64, 96), np.full(64, 160)])
        rng = np.random.default_rng(5)
        q, k, v = (_random(rng, 1, 160, 2, 4) for _ in range(3))
        k[:, 32:96] = np.nan
        got = blockwise.attend(
            jnp.asarray(q), jnp.asarray(k), jnp.asarray(v), Mask(jnp.asarray(subtree_end)[None]), block=32
        )
        finite = np.all(np.isfinite(got[0]), axis=(1, 2))
        np.testing.assert_array_equal(finite, np.repeat([True, False, True], (32, 64, 64)))

    def test_bfloat16_is_as_near_as_bfloat16_can_be(self):
        rng = np.random.default_rng(6)
        parents = forests.random_parents(rng, 200, root=0.02)
        subtree_end = jnp.asarray(forests.arrays(parents)[1])[None]
        q, k, v = (jnp.asarray(_random(rng, 1, 200, 2, 16), jnp.bfloat16) for _ in range(3))
        got = blockwise.attend(q, k, v, Mask(subtree_end), block=64)
        self.assertEqual(got.dtype, jnp.bfloat16)
        np.testing.assert_allclose(got.astype(jnp.float32), _oracle(q, k, v, [parents]), atol=2e-2)

    @parameterized.parameters(8, 64)
    @pytest.mark.full
    def test_bfloat16_gradients_over_many_blocks_are_float64_s_to_its_rounding(self, block):
        """A number of 8 bits is off by at most 2^-8 of itself, and by 0.4 of that in the root mean square.

        On its way to a gradient a number is rounded twice or thrice: the probability or the gradient of the score, what
        was read, the sum over all blocks. These are independent, so 0.7 * 2^-8; thirty-eight blocks add no rounding.
        """
        rng = np.random.default_rng(7)
        rows = [list(range(-1, 299)), forests.random_parents(rng, 300, root=0.01, branch=0.02)]
        given = oracle.inputs(rng, rows, heads=4, kv_heads=2, head_dim=16, dtype=jnp.bfloat16)
        q, k, v, subtree_end, d_output = map(jnp.asarray, given)
        _, pull = jax.vjp(lambda q, k, v: blockwise.attend(q, k, v, Mask(subtree_end), block=block), q, k, v)
        for gradient, needed in zip(pull(d_output), oracle.attention(*given[:3], rows, given[4])[1:], strict=True):
            self.assertEqual(gradient.dtype, jnp.bfloat16)
            apart = np.linalg.norm(np.asarray(gradient, np.float64) - needed) / np.linalg.norm(needed)
            self.assertLess(apart, 0.8 * 2**-8)


if __name__ == "__main__":
    absltest.main()
