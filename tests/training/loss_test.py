"""The fused loss against NumPy in float64, which writes out every logit."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl.testing import absltest, parameterized

from dialog_jax.training import loss
from dialog_jax.training.config import LossConfig


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


def reference(hidden, unembedding, source, target, weight):
    """(loss, gradient for hidden, gradient for unembedding, nll [B, S], best token [B, S]), target by target."""
    hidden, unembedding = hidden.astype(np.float64), unembedding.astype(np.float64)
    total, d_hidden, d_unembedding = 0.0, np.zeros_like(hidden), np.zeros_like(unembedding)
    nll, best = np.zeros(source.shape), np.zeros(source.shape, int)
    for b in range(source.shape[0]):
        for s in range(source.shape[1]):
            h = hidden[b, source[b, s]]
            logits = unembedding @ h
            p = np.exp(logits - logits.max())
            p /= p.sum()
            nll[b, s], best[b, s] = -np.log(p[target[b, s]]), int(p.argmax())
            total += weight[b, s] * nll[b, s]
            error = weight[b, s] * (p - np.eye(len(p))[target[b, s]])
            d_hidden[b, source[b, s]] += error @ unembedding
            d_unembedding += np.outer(error, h)
    return total, d_hidden, d_unembedding, nll, best


def teacher_of(seed, *, vocabulary=53, slots=6, shape=(2, 40), taught=0.7, mass=(0.2, 1.0)):
    """Random teachers: distinct tokens with a random total mass, some slots empty, some targets without a teacher."""
    rng = np.random.default_rng(seed)
    token = np.zeros((*shape, slots), np.int32)
    log_probability = np.full((*shape, slots), -np.inf, np.float32)
    for place in np.ndindex(*shape):
        if rng.random() < taught:
            count = int(rng.integers(1, slots + 1))
            token[place][:count] = rng.permutation(vocabulary)[:count]
            share = rng.dirichlet(np.ones(count)) * rng.uniform(*mass)
            log_probability[place][:count] = np.log(share)
    return loss.Teacher(token, log_probability)


def reference_loss(config, hidden, unembedding, source, target, weight, teacher=None, cap=None):
    """sum(weight * loss) in float64, by the definition: whole distributions, outcome by outcome."""
    total = 0.0
    for b, s in zip(*np.nonzero(weight), strict=True):
        logits = unembedding @ hidden[b, source[b, s]]
        logits = logits if cap is None else cap * np.tanh(logits / cap)
        log_z = np.log(np.sum(np.exp(logits)))
        log_q = logits - log_z
        goal = np.full(len(logits), config.label_smoothing / len(logits))
        goal[target[b, s]] += 1 - config.label_smoothing
        value = -np.sum(goal * log_q)
        if config.distillation and np.isfinite(teacher.log_probability[b, s, 0]):
            probabilities = np.exp(teacher.log_probability[b, s], dtype=np.float64)
            divergence = coarse_divergence(teacher.token[b, s], probabilities, log_q)
            value = (1 - config.distillation) * value + config.distillation * divergence
        total += weight[b, s] * (value + config.z_loss * log_z**2)
    return total


def coarse_divergence(tokens, probabilities, log_q):
    """KL over the outcomes "token i" for each of the teacher's and "any other token"."""
    p = {token: value for token, value in zip(tokens, probabilities, strict=True) if value > 0}
    q_others = np.sum([np.exp(value) for token, value in enumerate(log_q) if token not in p])
    outcomes = [(p[token], np.exp(log_q[token])) for token in p] + [(1 - sum(p.values()), q_others)]
    return sum(a * np.log(a / b) for a, b in outcomes if a > 1e-12)


def slopes(function, array, places, step=1e-5):
    """Derivatives of a float64 function at some places of an array, by central differences."""
    found = []
    for place in places:
        ends = []
        for sign in (1, -1):
            moved = array.copy()
            moved[place] += sign * step
            ends.append(function(moved))
        found.append((ends[0] - ends[1]) / (2 * step))
    return np.array(found)


EXTRAS = tuple(
    LossConfig(z_loss=z, label_smoothing=smoothing, distillation=share)
    for z, smoothing, share in itertools.product((0.0, 0.02), (0.0, 0.15), (0.0, 0.4, 1.0))
)


def on_device(arrays):
    return jax.tree.map(jnp.asarray, arrays)


def weighted_loss(hidden, unembedding, source, target, weight, teacher=None, config=loss.PLAIN, cap=None):
    targets = loss.Targets(source, target, weight, teacher)
    return loss.weighted_loss(hidden, unembedding, targets, config, logit_cap=cap)


def weighted_nll(*arrays):
    return weighted_loss(*arrays)[0]


def score_targets(hidden, unembedding, source, target, weight, *, top_k=0):
    return loss.score_targets(hidden, unembedding, loss.Targets(source, target, weight), top_k=top_k)


def value_and_gradient(arrays, teacher, config, cap=None):
    """((loss, cross-entropy), (gradient for hidden, gradient for unembedding))."""
    run = jax.jit(jax.value_and_grad(weighted_loss, argnums=(0, 1), has_aux=True), static_argnums=(6, 7))
    return jax.device_get(run(*on_device(arrays), on_device(teacher), config, cap))


class LossConfigTest(parameterized.TestCase):
    @parameterized.parameters(
        ({"z_loss": -0.1}, "loss.z_loss is -0.1; it must be at least 0"),
        ({"z_loss": float("nan")}, "loss.z_loss is nan"),
        ({"z_loss": float("inf")}, "loss.z_loss is inf"),
        ({"label_smoothing": 1.0}, "loss.label_smoothing is 1.0; it must be at least 0 and below 1"),
        ({"label_smoothing": -0.1}, "loss.label_smoothing is -0.1"),
        ({"distillation": 1.1}, "loss.distillation is 1.1; it must be between 0 and 1"),
        ({"distillation": float("nan")}, "loss.distillation is nan"),
    )
    def test_bad_value_is_refused(self, fields, message):
        with self.assertRaisesRegex(ValueError, message):
            LossConfig(**fields)


class ExtrasTest(parameterized.TestCase):
    """Every extra alone and with the others."""

    @parameterized.product(config=EXTRAS, tile_and_cap=((7, None), (256, None), (7, 1.5)))
    @pytest.mark.quick_every(5)
    def test_value_and_gradient_equal_float64_and_its_finite_differences(self, config, tile_and_cap):
        tile, cap = tile_and_cap
        arrays, teacher = problem(7), teacher_of(8)
        self.enter_context(absltest.mock.patch.object(loss, "TILE", tile))
        (value, nll), (d_hidden, d_unembedding) = value_and_gradient(arrays, teacher, config, cap)
        hidden, unembedding, *targets = arrays
        hidden, unembedding = hidden.astype(np.float64), unembedding.astype(np.float64)
        exact = functools.partial(reference_loss, cap=cap)
        np.testing.assert_allclose(value, exact(config, hidden, unembedding, *targets, teacher), rtol=2e-6)
        np.testing.assert_allclose(nll, exact(loss.PLAIN, hidden, unembedding, *targets), rtol=1e-6)

        rng = np.random.default_rng(9)
        places = [(row, targets[0][row, rng.integers(12)], rng.integers(8)) for row in (0, 1) * 6]
        wanted = slopes(lambda moved: exact(config, moved, unembedding, *targets, teacher), hidden, places)
        np.testing.assert_allclose([d_hidden[place] for place in places], wanted, atol=3e-5)
        places = [(rng.integers(53), rng.integers(8)) for _ in range(12)]
        wanted = slopes(lambda moved: exact(config, hidden, moved, *targets, teacher), unembedding, places)
        np.testing.assert_allclose([d_unembedding[place] for place in places], wanted, atol=3e-5)

    @parameterized.parameters(*EXTRAS)
    @pytest.mark.quick_every(5)
    def test_value_without_gradient_is_the_same(self, config):
        arrays, teacher = problem(10), teacher_of(11)
        alone = weighted_loss(*on_device(arrays), on_device(teacher), config)
        np.testing.assert_allclose(alone, value_and_gradient(arrays, teacher, config)[0], rtol=1e-6)

    def test_plain_loss_is_cross_entropy_and_reads_no_teacher(self):
        arrays = problem(12)
        (value, nll), gradient = value_and_gradient(arrays, teacher_of(13), loss.PLAIN)
        self.assertEqual(value, nll)
        np.testing.assert_allclose(value, weighted_nll(*on_device(arrays)), rtol=1e-6)
        (alone, _), gradient_alone = value_and_gradient(arrays, None, loss.PLAIN)
        self.assertEqual(value, alone)
        jax.tree.map(np.testing.assert_array_equal, gradient, gradient_alone)

    def test_the_cross_entropy_that_is_reported_has_no_gradient(self):
        arrays = on_device(problem(14))
        for gradient in jax.grad(lambda *args: weighted_loss(*args)[1], argnums=(0, 1))(*arrays):
            np.testing.assert_array_equal(gradient, 0)

    def test_padding_and_rows_without_targets_add_nothing(self):
        config = LossConfig(z_loss=0.1, label_smoothing=0.1, distillation=0.5)
        value, gradients = value_and_gradient(problem(15, filled=(0, 0)), teacher_of(16), config)
        self.assertEqual(value, (0, 0))
        for gradient in gradients:
            np.testing.assert_array_equal(gradient, 0)


class DistillationTest(parameterized.TestCase):
    """What the divergence from a teacher has to be, whatever the formula."""

    def divergence(self, arrays, teacher):
        """(value, gradient for hidden, gradient for unembedding) of the divergence alone."""
        (value, _), gradients = value_and_gradient(arrays, teacher, LossConfig(distillation=1.0))
        return float(value), *gradients

    def log_softmax(self, arrays):
        hidden, unembedding, source, _, _ = arrays
        logits = np.take_along_axis(hidden, source[..., None], axis=1).astype(np.float64) @ unembedding.T.astype(
            np.float64
        )
        return logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))

    @parameterized.parameters(1, 4, 52, 53)
    def test_student_that_equals_its_teacher_has_no_loss_and_no_gradient(self, slots):
        arrays = problem(17)
        log_q = self.log_softmax(arrays)
        token = np.argsort(-log_q, axis=-1)[..., :slots]
        teacher = loss.Teacher(token.astype(np.int32), np.take_along_axis(log_q, token, axis=-1).astype(np.float32))
        value, d_hidden, d_unembedding = self.divergence(arrays, teacher)
        self.assertLess(abs(value), 1e-4)
        np.testing.assert_allclose(d_hidden, 0, atol=1e-5)
        np.testing.assert_allclose(d_unembedding, 0, atol=1e-5)

    def test_any_other_student_has_a_loss(self):
        for seed in range(5):
            arrays = problem(18 + seed, filled=(1, 0))
            self.assertGreater(self.divergence(arrays, teacher_of(30 + seed, taught=1.0))[0], 0)

    def test_support_of_the_whole_vocabulary_is_the_whole_divergence(self):
        arrays = problem(19)
        rng = np.random.default_rng(20)
        p = rng.dirichlet(np.ones(53), arrays[3].shape)
        order = rng.permuted(np.broadcast_to(np.arange(53), p.shape), axis=-1)
        teacher = loss.Teacher(order.astype(np.int32), np.log(np.take_along_axis(p, order, axis=-1)).astype(np.float32))
        value, d_hidden, _ = self.divergence(arrays, teacher)
        hidden, unembedding, source, _, weight = arrays
        log_q = self.log_softmax(arrays)
        np.testing.assert_allclose(value, np.sum(weight * np.sum(p * (np.log(p) - log_q), axis=-1)), rtol=1e-5)
        wanted = np.zeros(hidden.shape)
        for b, s in np.ndindex(*weight.shape):
            wanted[b, source[b, s]] += weight[b, s] * ((np.exp(log_q[b, s]) - p[b, s]) @ unembedding)
        np.testing.assert_allclose(d_hidden, wanted, atol=1e-5)

    def test_a_sure_student_keeps_its_digits(self):
        """The model's mass outside the support is about 1e-17: 1 - sum(q) would be 0, and its logarithm -inf."""
        logits = np.zeros(53, np.float32)
        logits[5] = 43.0
        hidden, unembedding = logits[None, None, :], np.eye(53, dtype=np.float32)
        one = np.zeros((1, 1), np.int32)
        teacher = loss.Teacher(np.full((1, 1, 1), 5, np.int32), np.full((1, 1, 1), np.log(0.75), np.float32))
        value, d_hidden, _ = self.divergence((hidden, unembedding, one, one, np.ones((1, 1), np.float32)), teacher)
        log_z = np.log(np.exp(43.0) + 52)
        wanted = 0.75 * (np.log(0.75) - 43 + log_z) + 0.25 * (np.log(0.25) - np.log(52) + log_z)
        np.testing.assert_allclose(value, wanted, rtol=1e-6)
        self.assertGreater(wanted, 9)
        goal = np.full(53, 0.25 / 52)
        goal[5] = 0.75
        np.testing.assert_allclose(d_hidden[0, 0], np.exp(logits - log_z) - goal, atol=1e-6)

    def test_empty_slots_hide_no_token(self):
        arrays = problem(21)
        teacher = teacher_of(22, slots=3, taught=1.0)
        padded = loss.Teacher(
            np.concatenate([teacher.token, np.broadcast_to(np.arange(4, dtype=np.int32), (2, 40, 4))], axis=-1),
            np.concatenate([teacher.log_probability, np.full((2, 40, 4), -np.inf, np.float32)], axis=-1),
        )
        for a, b in zip(self.divergence(arrays, teacher), self.divergence(arrays, padded), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-6)

    def test_targets_without_a_teacher_are_plain_cross_entropy(self):
        arrays = problem(23)
        got = value_and_gradient(arrays, teacher_of(24, taught=0.0), LossConfig(distillation=0.3))
        plain = value_and_gradient(arrays, None, loss.PLAIN)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-6), got, plain)

    def test_masses_that_rounding_carries_beyond_one_stay_finite(self):
        arrays = problem(25, filled=(3, 0))
        teacher = teacher_of(26, taught=1.0, mass=(1.0, 1.0 + 1e-6))
        value, d_hidden, d_unembedding = self.divergence(arrays, teacher)
        self.assertTrue(np.isfinite(value))
        for gradient in (d_hidden, d_unembedding):
            self.assertTrue(np.isfinite(gradient).all())


class PlainLossTest(parameterized.TestCase):
    @parameterized.parameters(1, 8, 16, 256)
    def test_value_and_gradient_equal_float64_for_any_tile(self, tile):
        arrays = problem(0)
        expected, d_hidden, d_unembedding, _, _ = reference(*arrays)
        self.enter_context(absltest.mock.patch.object(loss, "TILE", tile))
        value, (got_hidden, got_unembedding) = jax.value_and_grad(weighted_nll, argnums=(0, 1))(
            *map(jnp.asarray, arrays)
        )
        np.testing.assert_allclose(value, expected, rtol=1e-6)
        np.testing.assert_allclose(got_hidden, d_hidden, atol=1e-5)
        np.testing.assert_allclose(got_unembedding, d_unembedding, atol=1e-5)

    def test_value_without_gradient_is_the_same(self):
        arrays = list(map(jnp.asarray, problem(1)))
        with_gradient, _ = jax.value_and_grad(weighted_nll)(*arrays)
        np.testing.assert_allclose(weighted_nll(*arrays), with_gradient, rtol=1e-6)

    def test_scale_of_the_cotangent_reaches_both_gradients(self):
        arrays = list(map(jnp.asarray, problem(2)))
        once = jax.grad(weighted_nll, argnums=(0, 1))(*arrays)
        thrice = jax.grad(lambda *args: 3 * weighted_nll(*args), argnums=(0, 1))(*arrays)
        for a, b in zip(once, thrice, strict=True):
            np.testing.assert_allclose(3 * a, b, rtol=1e-6)

    def test_rows_without_targets_have_no_loss_and_no_gradient(self):
        arrays = list(map(jnp.asarray, problem(3, filled=(0, 0))))
        value, (d_hidden, d_unembedding) = jax.value_and_grad(weighted_nll, argnums=(0, 1))(*arrays)
        self.assertEqual(value, 0)
        self.assertEqual(float(jnp.abs(d_hidden).max()), 0)
        self.assertEqual(float(jnp.abs(d_unembedding).max()), 0)

    def test_bfloat16_hidden_states_keep_a_float32_loss(self):
        hidden, *rest = problem(4)
        expected = reference(np.asarray(jnp.asarray(hidden, jnp.bfloat16).astype(jnp.float32)), *rest)[0]
        value = weighted_nll(jnp.asarray(hidden, jnp.bfloat16), *map(jnp.asarray, rest))
        self.assertEqual(value.dtype, jnp.float32)
        np.testing.assert_allclose(value, expected, rtol=1e-2)

    def test_bfloat16_unembedding_has_a_bfloat16_gradient(self):
        hidden, unembedding, *rest = (jnp.asarray(array) for array in problem(4))
        gradient = jax.grad(weighted_nll, argnums=1)
        needed = gradient(hidden, unembedding, *rest)
        got = gradient(hidden, unembedding.astype(jnp.bfloat16), *rest)
        self.assertEqual(got.dtype, jnp.bfloat16)
        apart = jnp.linalg.norm(got.astype(jnp.float32) - needed) / jnp.linalg.norm(needed)
        self.assertLess(float(apart), 2e-2)

    @parameterized.parameters(1, 2, 37)
    def test_bfloat16_gradients_are_float64_s_to_its_rounding(self, sources):
        """A number of 8 bits is off by at most 2^-8 of itself, and by 0.4 of that in the root mean square.

        On its way to a gradient a number is rounded three times: the gradient to a logit, its product with the
        unembedding, the sum of the targets of one source. These are independent, so 0.7 * 2^-8; twelve tiles or 96
        targets add no rounding.
        """
        hidden, unembedding, source, target, weight = problem(28, targets=96, filled=(96, 61))
        hidden, unembedding = hidden.astype(jnp.bfloat16), unembedding.astype(jnp.bfloat16)
        arrays = hidden, unembedding, source % sources, target, weight
        self.enter_context(absltest.mock.patch.object(loss, "TILE", 8))
        got = jax.jit(jax.grad(weighted_nll, argnums=(0, 1)))(*arrays)
        for gradient, needed in zip(got, reference(*arrays)[1:3], strict=True):
            self.assertEqual(gradient.dtype, jnp.bfloat16)
            apart = np.linalg.norm(np.asarray(gradient, np.float64) - needed) / np.linalg.norm(needed)
            self.assertLess(apart, 2**-8)

    def test_logits_of_all_positions_are_never_made(self):
        """The largest array holds a tile of logits, not [B, T, V]."""
        length, vocabulary = 2048, 4096
        arrays = problem(5, rows=1, length=length, vocabulary=vocabulary, targets=length, filled=(900,))
        compiled = jax.jit(jax.grad(weighted_nll, argnums=(0, 1))).lower(*arrays).compile()
        self.assertLess(compiled.memory_analysis().temp_size_in_bytes, length * vocabulary * 4)
        teacher = teacher_of(6, vocabulary=vocabulary, shape=(1, length))

        def with_extras(hidden, unembedding):
            config = LossConfig(z_loss=0.1, label_smoothing=0.1, distillation=0.5)
            return weighted_loss(hidden, unembedding, *on_device(arrays[2:]), on_device(teacher), config)[0]

        compiled = jax.jit(jax.grad(with_extras, argnums=(0, 1))).lower(*arrays[:2]).compile()
        self.assertLess(compiled.memory_analysis().temp_size_in_bytes, length * vocabulary * 4)


class ScoreTargetsTest(parameterized.TestCase):
    def test_nll_and_hits_equal_float64_and_padding_is_empty(self):
        arrays = problem(6)
        _, _, _, nll, best = reference(*arrays)
        self.enter_context(absltest.mock.patch.object(loss, "TILE", 16))
        scores = score_targets(*map(jnp.asarray, arrays))
        valid = arrays[4] > 0
        np.testing.assert_allclose(scores.nll, np.where(valid, nll, 0), rtol=1e-5, atol=1e-5)
        np.testing.assert_array_equal(scores.correct, (best == arrays[3]) & valid)
        self.assertIsNone(scores.top_token)

    @parameterized.parameters((1, 16), (5, 7), (53, 256))
    def test_likeliest_tokens_equal_float64_and_padding_has_none(self, top_k, tile):
        hidden, unembedding, source, _, weight = arrays = problem(27)
        self.enter_context(absltest.mock.patch.object(loss, "TILE", tile))
        scores = score_targets(*on_device(arrays), top_k=top_k)
        self.assertEqual(scores.top_token.shape, (2, 40, top_k))
        for b, s in np.ndindex(*weight.shape):
            if weight[b, s]:
                logits = unembedding.astype(np.float64) @ hidden[b, source[b, s]]
                best = np.argsort(-logits)[:top_k]
                np.testing.assert_array_equal(scores.top_token[b, s], best)
                np.testing.assert_allclose(
                    scores.top_log_probability[b, s], logits[best] - np.log(np.exp(logits).sum()), rtol=1e-5, atol=1e-5
                )
            else:
                self.assertTrue((np.asarray(scores.top_log_probability[b, s]) == -np.inf).all())


if __name__ == "__main__":
    absltest.main()
