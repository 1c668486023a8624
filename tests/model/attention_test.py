import math

import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest, parameterized

from dialog_jax.model import attention
from tests.model import forests


def _random(rng, *shape):
    return rng.standard_normal(shape).astype(np.float32)


def _oracle(q, k, v, rows):
    """Token by token over its lineage, in float64."""
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    read = np.zeros(q.shape)
    for b, parents in enumerate(rows):
        for i in range(q.shape[1]):
            seen = forests.lineage(parents, i)
            for n in range(q.shape[2]):
                shared = n // (q.shape[2] // k.shape[2])
                score = k[b, seen, shared] @ q[b, i, n] / math.sqrt(q.shape[3])
                weight = np.exp(score - score.max())
                read[b, i, n] = weight @ v[b, seen, shared] / weight.sum()
    return read


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
        got = jax.jit(attention.attention)(q, k, v, subtree_end)
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
        got = attention.attention(zeros, zeros, jnp.eye(8)[None, :, None], jnp.asarray([subtree_end]))
        np.testing.assert_allclose(got[0, :, 0], np.array(seen) / np.sum(seen, axis=1, keepdims=True), atol=1e-6)

    def test_gradient_reaches_ancestors_and_no_other_token(self):
        rng = np.random.default_rng(0)
        length = 300  # two blocks
        parents = forests.random_parents(rng, length, root=0.03)
        subtree_end = jnp.asarray(forests.arrays(parents)[1])[None]
        q, k, v = (jnp.asarray(_random(rng, 1, length, 2, 4)) for _ in range(3))
        direction = jnp.asarray(_random(rng, 2, 4))
        for query in (0, 100, 255, 256, 299):

            def read(k, v, query=query):
                return jnp.sum(attention.attention(q, k, v, subtree_end)[0, query] * direction)

            to_key, to_value = jax.jit(jax.grad(read, argnums=(0, 1)))(k, v)
            seen = forests.lineage(parents, query)
            reached = np.flatnonzero(np.any(np.asarray(to_value[0]) != 0, axis=(1, 2)))
            np.testing.assert_array_equal(reached, seen)
            self.assertContainsSubset(np.flatnonzero(np.any(np.asarray(to_key[0]) != 0, axis=(1, 2))), seen)

    def test_gradient_equals_finite_differences_of_the_oracle(self):
        rng = np.random.default_rng(1)
        rows = [forests.random_parents(rng, 20)]
        subtree_end = jnp.asarray(forests.arrays(rows[0])[1])[None]
        q, k, v = _random(rng, 1, 20, 4, 6), _random(rng, 1, 20, 2, 6), _random(rng, 1, 20, 2, 6)
        out = _random(rng, 1, 20, 4, 6)
        steps = [_random(rng, *x.shape).astype(np.float64) for x in (q, k, v)]
        ahead, behind = (
            np.sum(_oracle(*(x + sign * 1e-5 * step for x, step in zip((q, k, v), steps, strict=True)), rows) * out)
            for sign in (1, -1)
        )
        gradient = jax.grad(lambda q, k, v: jnp.sum(attention.attention(q, k, v, subtree_end) * out), argnums=(0, 1, 2))
        got = sum(np.sum(np.asarray(g) * step) for g, step in zip(gradient(q, k, v), steps, strict=True))
        np.testing.assert_allclose(got, (ahead - behind) / 2e-5, rtol=1e-4)

    def test_padding_and_huge_scores_give_no_nan(self):
        length = 40
        subtree_end = jnp.arange(1, length + 1)[None]  # all padding
        q = jnp.full((1, length, 2, 4), 1e4)
        v = jnp.asarray(_random(np.random.default_rng(2), 1, length, 2, 4))
        got, gradient = jax.value_and_grad(lambda q: jnp.sum(attention.attention(q, q, v, subtree_end)))(q)
        np.testing.assert_allclose(got, jnp.sum(v), rtol=1e-5)
        self.assertTrue(bool(jnp.all(jnp.isfinite(gradient))))

    def test_no_array_of_row_by_row_is_made(self):
        length, heads = 4096, 2
        q = jax.ShapeDtypeStruct((1, length, heads, 8), jnp.float32)
        subtree_end = jax.ShapeDtypeStruct((1, length), jnp.int32)

        def largest(jaxpr):
            inner = [getattr(value, "jaxpr", value) for eqn in jaxpr.eqns for value in eqn.params.values()]
            own = [var.aval.size for eqn in jaxpr.eqns for var in eqn.outvars]
            return max(own + [largest(sub) for sub in inner if hasattr(sub, "eqns")], default=0)

        def loss(q, subtree_end):
            return jnp.sum(attention.attention(q, q, q, subtree_end))

        got = largest(jax.make_jaxpr(jax.grad(loss))(q, subtree_end).jaxpr)
        self.assertEqual(got, heads * 256 * length)  # the last block's scores: the walk did see them


class RotaryTest(parameterized.TestCase):
    def test_rotation_is_complex_multiplication_of_halves(self):
        rng = np.random.default_rng(0)
        x, position = _random(rng, 2, 5, 3, 8), rng.integers(0, 500, (2, 5)).astype(np.int32)
        frequency = attention.rotary_frequencies(8, 10000.0, None)
        got = attention.rotate(jnp.asarray(x), *attention.rotation(jnp.asarray(position), frequency))
        angle = position[..., None, None] * 10000.0 ** (-np.arange(4) / 4)
        turned = (x[..., :4].astype(np.float64) + 1j * x[..., 4:]) * np.exp(1j * angle)
        np.testing.assert_allclose(got, np.concatenate([turned.real, turned.imag], axis=-1), atol=1e-4)

    def test_rotation_depends_on_distance_only(self):
        rng = np.random.default_rng(0)
        q, k = jnp.asarray(_random(rng, 1, 1, 1, 16)), jnp.asarray(_random(rng, 1, 1, 1, 16))
        frequency = attention.rotary_frequencies(16, 10000.0, None)

        def score(i, j):
            turned = [
                attention.rotate(x, *attention.rotation(jnp.asarray([[at]]), frequency)) for x, at in ((q, i), (k, j))
            ]
            return float(jnp.sum(turned[0] * turned[1]))

        self.assertAlmostEqual(score(7, 3), score(107, 103), places=4)
        self.assertNotAlmostEqual(score(7, 3), score(7, 4), places=4)

    def test_llama3_scaling_equals_its_three_cases(self):
        scaling = attention.Llama3Scaling(
            factor=8.0, low_frequency_factor=1.0, high_frequency_factor=4.0, original_max_length=8192
        )
        got = attention.rotary_frequencies(128, 500000.0, scaling)
        needed = []
        for i in range(64):
            frequency = 500000.0 ** (-2 * i / 128)
            wavelength = 2 * math.pi / frequency
            if wavelength < 8192 / 4:
                needed.append(frequency)
            elif wavelength > 8192:
                needed.append(frequency / 8)
            else:
                smooth = (8192 / wavelength - 1) / (4 - 1)
                needed.append((1 - smooth) * frequency / 8 + smooth * frequency)
        np.testing.assert_allclose(got, needed, rtol=1e-6)

    @parameterized.parameters(
        dict(factor=0.5), dict(low_frequency_factor=0.0), dict(high_frequency_factor=1.0), dict(original_max_length=0)
    )
    def test_llama3_scaling_out_of_range_is_an_error(self, **wrong):
        right = dict(factor=8.0, low_frequency_factor=1.0, high_frequency_factor=4.0, original_max_length=8192)
        with self.assertRaisesRegex(ValueError, next(iter(wrong))):
            attention.Llama3Scaling(**(right | wrong))


if __name__ == "__main__":
    absltest.main()
