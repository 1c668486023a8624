"""The fused loss against NumPy in float64, which writes out every logit."""

import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest, parameterized

from dialog_jax.training import loss


def problem(seed, *, rows=2, length=37, width=8, vocabulary=53, targets=40, filled=(29, 12)):
    """Random rows; a source may serve several targets, as in a tree."""
    rng = np.random.default_rng(seed)
    weight = np.zeros((rows, targets), np.float32)
    for row, count in enumerate(filled):
        weight[row, :count] = rng.uniform(0.1, 2, count)
    return (
        rng.normal(size=(rows, length, width)).astype(np.float32),
        rng.normal(size=(vocabulary, width)).astype(np.float32),
        rng.integers(0, length, (rows, targets)).astype(np.int32),
        rng.integers(0, vocabulary, (rows, targets)).astype(np.int32),
        weight,
    )


def reference(hidden, matrix, source, target, weight):
    """(loss, gradient for hidden, gradient for matrix, nll [B, S], best token [B, S]), target by target."""
    hidden, matrix = hidden.astype(np.float64), matrix.astype(np.float64)
    total, d_hidden, d_matrix = 0.0, np.zeros_like(hidden), np.zeros_like(matrix)
    nll, best = np.zeros(source.shape), np.zeros(source.shape, int)
    for b in range(source.shape[0]):
        for s in range(source.shape[1]):
            h = hidden[b, source[b, s]]
            logits = matrix @ h
            p = np.exp(logits - logits.max())
            p /= p.sum()
            nll[b, s], best[b, s] = -np.log(p[target[b, s]]), int(p.argmax())
            total += weight[b, s] * nll[b, s]
            error = weight[b, s] * (p - np.eye(len(p))[target[b, s]])
            d_hidden[b, source[b, s]] += error @ matrix
            d_matrix += np.outer(error, h)
    return total, d_hidden, d_matrix, nll, best


class WeightedNllTest(parameterized.TestCase):
    @parameterized.parameters(1, 8, 16, 256)
    def test_value_and_gradient_equal_float64_for_any_tile(self, tile):
        arrays = problem(0)
        expected, d_hidden, d_matrix, _, _ = reference(*arrays)
        self.enter_context(absltest.mock.patch.object(loss, "TILE", tile))
        value, (got_hidden, got_matrix) = jax.value_and_grad(loss.weighted_nll, argnums=(0, 1))(
            *map(jnp.asarray, arrays)
        )
        np.testing.assert_allclose(value, expected, rtol=1e-6)
        np.testing.assert_allclose(got_hidden, d_hidden, atol=1e-5)
        np.testing.assert_allclose(got_matrix, d_matrix, atol=1e-5)

    def test_value_without_gradient_is_the_same(self):
        arrays = list(map(jnp.asarray, problem(1)))
        with_gradient, _ = jax.value_and_grad(loss.weighted_nll)(*arrays)
        np.testing.assert_allclose(loss.weighted_nll(*arrays), with_gradient, rtol=1e-6)

    def test_scale_of_the_cotangent_reaches_both_gradients(self):
        arrays = list(map(jnp.asarray, problem(2)))
        once = jax.grad(loss.weighted_nll, argnums=(0, 1))(*arrays)
        thrice = jax.grad(lambda *args: 3 * loss.weighted_nll(*args), argnums=(0, 1))(*arrays)
        for a, b in zip(once, thrice, strict=True):
            np.testing.assert_allclose(3 * a, b, rtol=1e-6)

    def test_rows_without_targets_have_no_loss_and_no_gradient(self):
        arrays = list(map(jnp.asarray, problem(3, filled=(0, 0))))
        value, (d_hidden, d_matrix) = jax.value_and_grad(loss.weighted_nll, argnums=(0, 1))(*arrays)
        self.assertEqual(value, 0)
        self.assertEqual(float(jnp.abs(d_hidden).max()), 0)
        self.assertEqual(float(jnp.abs(d_matrix).max()), 0)

    def test_bfloat16_hidden_states_keep_a_float32_loss(self):
        hidden, *rest = problem(4)
        expected = reference(np.asarray(jnp.asarray(hidden, jnp.bfloat16).astype(jnp.float32)), *rest)[0]
        value = loss.weighted_nll(jnp.asarray(hidden, jnp.bfloat16), *map(jnp.asarray, rest))
        self.assertEqual(value.dtype, jnp.float32)
        np.testing.assert_allclose(value, expected, rtol=1e-2)

    def test_logits_of_all_positions_are_never_made(self):
        """The largest array holds a tile of logits, not [B, T, V]."""
        length, vocabulary = 2048, 4096
        arrays = problem(5, rows=1, length=length, vocabulary=vocabulary, targets=length, filled=(900,))
        compiled = jax.jit(jax.grad(loss.weighted_nll, argnums=(0, 1))).lower(*arrays).compile()
        self.assertLess(compiled.memory_analysis().temp_size_in_bytes, length * vocabulary * 4)


class ScoreTargetsTest(absltest.TestCase):
    def test_nll_and_hits_equal_float64_and_padding_is_empty(self):
        arrays = problem(6)
        _, _, _, nll, best = reference(*arrays)
        self.enter_context(absltest.mock.patch.object(loss, "TILE", 16))
        scores = loss.score_targets(*map(jnp.asarray, arrays))
        valid = arrays[4] > 0
        np.testing.assert_allclose(scores.nll, np.where(valid, nll, 0), rtol=1e-5, atol=1e-5)
        np.testing.assert_array_equal(scores.correct, (best == arrays[3]) & valid)


if __name__ == "__main__":
    absltest.main()
