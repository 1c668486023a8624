import math

import jax.numpy as jnp
import numpy as np
from absl.testing import absltest, parameterized

from dialog_jax.model import rotary


def _random(rng, *shape):
    return rng.standard_normal(shape).astype(np.float32)


class RotaryTest(parameterized.TestCase):
    def test_rotation_is_complex_multiplication_of_halves(self):
        rng = np.random.default_rng(0)
        x, position = _random(rng, 2, 5, 3, 8), rng.integers(0, 500, (2, 5)).astype(np.int32)
        frequency = rotary.rotary_frequencies(8, 10000.0, None)
        got = rotary.rotate(jnp.asarray(x), *rotary.rotation(jnp.asarray(position), frequency))
        angle = position[..., None, None] * 10000.0 ** (-np.arange(4) / 4)
        turned = (x[..., :4].astype(np.float64) + 1j * x[..., 4:]) * np.exp(1j * angle)
        np.testing.assert_allclose(got, np.concatenate([turned.real, turned.imag], axis=-1), atol=1e-4)

    def test_rotation_depends_on_distance_only(self):
        rng = np.random.default_rng(0)
        q, k = jnp.asarray(_random(rng, 1, 1, 1, 16)), jnp.asarray(_random(rng, 1, 1, 1, 16))
        frequency = rotary.rotary_frequencies(16, 10000.0, None)

        def score(i, j):
            turned = [rotary.rotate(x, *rotary.rotation(jnp.asarray([[at]]), frequency)) for x, at in ((q, i), (k, j))]
            return float(jnp.sum(turned[0] * turned[1]))

        self.assertAlmostEqual(score(7, 3), score(107, 103), places=4)
        self.assertNotAlmostEqual(score(7, 3), score(7, 4), places=4)

    def test_llama3_scaling_equals_its_three_cases(self):
        scaling = rotary.Llama3Scaling(
            factor=8.0, low_frequency_factor=1.0, high_frequency_factor=4.0, original_max_length=8192
        )
        got = rotary.rotary_frequencies(128, 500000.0, scaling)
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
            rotary.Llama3Scaling(**(right | wrong))


if __name__ == "__main__":
    absltest.main()
