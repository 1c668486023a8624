import math

import jax.numpy as jnp
import numpy as np
from absl.testing import absltest, parameterized

from dialog_jax.model import rotary
from dialog_jax.model.rotary import Rotary


def _random(rng, *shape):
    return rng.standard_normal(shape).astype(np.float32)


class RotaryTest(parameterized.TestCase):
    def test_rotation_is_complex_multiplication_of_halves(self):
        rng = np.random.default_rng(0)
        x, position = _random(rng, 2, 5, 3, 8), rng.integers(0, 500, (2, 5)).astype(np.int32)
        got = rotary.rotate(jnp.asarray(x), *Rotary(theta=10000.0).rotation(jnp.asarray(position), 8))
        angle = position[..., None, None] * 10000.0 ** (-np.arange(4) / 4)
        turned = (x[..., :4].astype(np.float64) + 1j * x[..., 4:]) * np.exp(1j * angle)
        np.testing.assert_allclose(got, np.concatenate([turned.real, turned.imag], axis=-1), atol=1e-4)

    def test_rotation_depends_on_distance_only(self):
        rng = np.random.default_rng(0)
        q, k = jnp.asarray(_random(rng, 1, 1, 1, 16)), jnp.asarray(_random(rng, 1, 1, 1, 16))
        plain = Rotary(theta=10000.0)

        def score(i, j):
            turned = [rotary.rotate(x, *plain.rotation(jnp.asarray([[at]]), 16)) for x, at in ((q, i), (k, j))]
            return float(jnp.sum(turned[0] * turned[1]))

        self.assertAlmostEqual(score(7, 3), score(107, 103), places=4)
        self.assertNotAlmostEqual(score(7, 3), score(7, 4), places=4)

    def test_llama3_scaling_equals_its_three_cases(self):
        scaling = rotary.Llama3Scaling(
            factor=8.0, low_frequency_factor=1.0, high_frequency_factor=4.0, original_max_length=8192
        )
        got = Rotary(theta=500000.0, scaling=scaling).frequencies(128)
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

    def test_fraction_of_a_head_is_rotated_and_the_rest_passes(self):
        rng = np.random.default_rng(0)
        x, position = jnp.asarray(_random(rng, 1, 5, 2, 16)), jnp.arange(5)[None]
        got = rotary.rotate(x, *Rotary(theta=100.0, fraction=0.5).rotation(position, 16))
        rotated = rotary.rotate(x[..., :8], *Rotary(theta=100.0).rotation(position, 8))
        np.testing.assert_array_equal(got, jnp.concatenate([rotated, x[..., 8:]], axis=-1))

    def test_yarn_keeps_fast_pairs_divides_slow_ones_and_interpolates_between(self):
        """Frequencies that transformers computes for theta 500, factor 4 and an original length of 32 (head_dim 20)."""
        scaling = rotary.YarnScaling(
            factor=4.0, original_max_length=32, beta_fast=2.0, beta_slow=0.25, mscale=1.5, mscale_all_dim=0.5
        )
        needed = [1, 0.53715914, 0.23443872, 0.096869931, 0.036424205, 0.01118034]
        needed += [0.0060056215, 0.0032259754, 0.001732862, 0.00093082286]
        yarn = Rotary(theta=500.0, scaling=scaling)
        np.testing.assert_allclose(yarn.frequencies(20), needed, rtol=1e-6)
        self.assertAlmostEqual(yarn.amplitude, 1.1296432507391427, places=12)
        self.assertAlmostEqual(rotary.YarnScaling(factor=4.0, original_max_length=32).amplitude, 1.138629436111989)

    @parameterized.parameters(
        dict(factor=0.5), dict(low_frequency_factor=0.0), dict(high_frequency_factor=1.0), dict(original_max_length=0)
    )
    def test_llama3_scaling_out_of_range_is_an_error(self, **wrong):
        right = dict(factor=8.0, low_frequency_factor=1.0, high_frequency_factor=4.0, original_max_length=8192)
        with self.assertRaisesRegex(ValueError, next(iter(wrong))):
            rotary.Llama3Scaling(**(right | wrong))


if __name__ == "__main__":
    absltest.main()
