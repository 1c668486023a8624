"""Schedules against their formulas, and what weight decay touches."""

import math

import jax
import numpy as np
import optax
from absl.testing import absltest, parameterized

from dialog_jax.model import decoder
from dialog_jax.training import optimizer
from dialog_jax.training.config import OptimizerConfig
from tests.training import tiny


class ScheduleTest(parameterized.TestCase):
    def rates(self, steps=20, **fields):
        schedule = optimizer.make_schedule(OptimizerConfig(learning_rate=1.0, final_fraction=0.1, **fields), steps)
        return np.array([float(schedule(step)) for step in range(steps)])

    def test_warmup_by_default_takes_three_percent_of_the_steps(self):
        schedule = optimizer.make_schedule(OptimizerConfig(learning_rate=1.0, schedule="constant"), 100)
        np.testing.assert_allclose([schedule(step) for step in range(5)], [1 / 3, 2 / 3, 1, 1, 1])
        self.assertEqual(self.rates(schedule="constant")[0], 1)  # of 20 steps none

    def test_warmup_rises_by_equal_parts_to_the_peak(self):
        np.testing.assert_allclose(self.rates(schedule="constant", warmup_steps=4)[:5], [0.25, 0.5, 0.75, 1, 1])

    def test_warmup_of_one_step_is_the_peak_at_once(self):
        np.testing.assert_allclose(self.rates(schedule="constant", warmup_steps=1), np.ones(20))

    def test_cosine_follows_its_formula(self):
        expected = [0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * step / 16)) for step in range(16)]
        np.testing.assert_allclose(self.rates(schedule="cosine", warmup_steps=4)[4:], expected, rtol=1e-5)

    def test_linear_falls_evenly(self):
        expected = [1 - 0.9 * step / 20 for step in range(20)]
        np.testing.assert_allclose(self.rates(schedule="linear"), expected, rtol=1e-5)

    def test_warmup_stable_decay_stays_and_falls_at_the_end(self):
        rates = self.rates(schedule="warmup_stable_decay", warmup_steps=2, decay_fraction=0.25)
        np.testing.assert_allclose(rates[1:16], np.ones(15))
        np.testing.assert_allclose(rates[15:], [1 - 0.9 * step / 5 for step in range(5)], rtol=1e-5)

    def test_warmup_as_long_as_the_run_is_refused(self):
        with self.assertRaisesRegex(ValueError, "warmup_steps is 20, but the run has only 20 steps"):
            self.rates(warmup_steps=20)

    @parameterized.parameters(
        {"schedule": "exponential"}, {"learning_rate": 0.0}, {"learning_rate": float("nan")}, {"b2": 1.5}
    )
    def test_bad_value_is_refused(self, **fields):
        with self.assertRaisesRegex(ValueError, f"optimizer.{next(iter(fields))} is"):
            OptimizerConfig(**fields)


class ChangeOfStepsTest(parameterized.TestCase):
    def test_extended_cosine_names_both_learning_rates(self):
        config = OptimizerConfig(learning_rate=1.0, warmup_steps=0, final_fraction=0.0)
        line = optimizer.describe_change_of_steps(config, 4, 8, 4)
        last, following = (0.5 * (1 + math.cos(math.pi * fraction)) for fraction in (3 / 4, 4 / 8))
        self.assertEqual((f"{last:.3g}", f"{following:.3g}"), ("0.146", "0.5"))
        self.assertIn("steps: 4 before, 8 now. From here on the cosine schedule is that of 8 steps", line)
        self.assertIn("the last update had learning rate 0.146, the next has 0.5", line)

    @parameterized.parameters((8, 8, 4), (4, 8, 0), (8, 4, 4))
    def test_nothing_is_said_without_a_change_or_an_update_on_both_sides(self, before, now, updates):
        self.assertEqual(optimizer.describe_change_of_steps(OptimizerConfig(), before, now, updates), "")


class ClippingTest(parameterized.TestCase):
    @parameterized.parameters(0.0, 0.5, 1e3)
    def test_updates_equal_optax_clipping_each_number(self, limit):
        fields = {"weight_decay": 0.1, "b1": 0.9, "b2": 0.99}
        config = OptimizerConfig(learning_rate=1.0, schedule="constant", clip_norm=limit, epsilon=1e-2, **fields)
        adamw = optax.adamw(1.0, eps=1e-2, mask=optimizer.decay_mask, **fields)
        theirs = optax.chain(optax.clip_by_global_norm(limit), adamw) if limit else adamw
        ours = optimizer.make_optimizer(config, 10)
        parameters = tiny.parameters(tiny.config(64))
        our_update = jax.jit(lambda gradient, state, norm: ours.update(gradient, state, parameters, norm=norm))
        their_update = jax.jit(lambda gradient, state: theirs.update(gradient, state, parameters))
        our_state, their_state = ours.init(parameters), theirs.init(parameters)
        rng = np.random.default_rng(0)
        for wanted in (0.1, 0.0, 3.0, 1e-6, 2000.0, 0.4):
            drawn = jax.tree.map(lambda leaf: rng.normal(size=leaf.shape), parameters)
            norm = np.sqrt(sum((leaf**2).sum() for leaf in jax.tree.leaves(drawn)))
            gradient = jax.tree.map(lambda leaf, scale=wanted / norm: (leaf * scale).astype(np.float32), drawn)
            updates, our_state = our_update(gradient, our_state, np.float32(wanted))
            expected, their_state = their_update(gradient, their_state)
            for got, want in zip(*map(jax.tree.leaves, (updates, expected)), strict=True):
                np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)


class DecayMaskTest(absltest.TestCase):
    def test_matrices_decay_and_norms_biases_and_embedding_do_not(self):
        model = tiny.config(64, family="qwen2", qkv_bias=True, tie_embeddings=False)
        mask = optimizer.decay_mask(decoder.init_parameters(model, jax.random.key(0)))
        decaying = {
            "/".join(key.key for key in keys) for keys, decays in jax.tree_util.tree_leaves_with_path(mask) if decays
        }
        attention = {f"layers/attention/w_{name}" for name in ("query", "key", "value", "output")}
        feed_forward = {f"layers/feed_forward/w_{name}" for name in ("gate", "up", "down")}
        self.assertEqual(decaying, attention | feed_forward | {"lm_head"})


if __name__ == "__main__":
    absltest.main()
