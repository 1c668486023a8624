"""Schedules and optimizers against their formulas, and what weight decay touches."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl.testing import absltest, parameterized

from dialog_jax.model import decoder
from dialog_jax.training import optimizer
from dialog_jax.training.optimizer_config import OptimizerConfig
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


def updates_of(config, parameters, gradients):
    """The updates of each step, in NumPy, and the last state."""
    rule = optimizer.make_optimizer(config, 100)
    state = rule.init(parameters)
    updates = []
    for gradient in gradients:
        update, state = rule.update(gradient, state, parameters, norm=optax.tree.norm(gradient))
        updates.append(jax.device_get(update))
        parameters = optax.apply_updates(parameters, update)
    return updates, state


class RulesTest(parameterized.TestCase):
    def setUp(self):
        super().setUp()
        rng = np.random.default_rng(0)
        shapes = {"layers": {"w_up": (3, 12, 20), "norm": (3, 12)}, "embedding": (30, 12)}
        draw = functools.partial(jax.tree.map, lambda shape: jnp.float32(rng.normal(size=shape)))
        is_shape = {"is_leaf": lambda node: isinstance(node, tuple)}
        self.parameters = draw(shapes, **is_shape)
        self.gradients = [draw(shapes, **is_shape) for _ in range(4)]
        self.config = OptimizerConfig(learning_rate=0.1, schedule="constant", warmup_steps=0, clip_norm=0.0)

    def test_muon_orthogonalizes_the_matrix_of_each_layer_at_the_size_of_adam(self):
        (update,), _ = updates_of(dataclasses.replace(self.config, name="muon"), self.parameters, self.gradients[:1])
        for layer in update["layers"]["w_up"]:
            singular = np.linalg.svd(layer.astype(np.float64), compute_uv=False)
            self.assertLess(singular.max() / singular.min(), 2)  # those of the gradient differ by a factor of 8
            self.assertAlmostEqual(float(np.sqrt(np.mean(layer**2))), 0.1 * 0.2, delta=0.006)

    def test_muon_leaves_embedding_and_norms_to_adam(self):
        config = dataclasses.replace(self.config, b2=0.999)
        muon, _ = updates_of(dataclasses.replace(config, name="muon"), self.parameters, self.gradients)
        adamw, _ = updates_of(config, self.parameters, self.gradients)
        for first, second in zip(muon, adamw, strict=True):
            np.testing.assert_allclose(first["embedding"], second["embedding"], rtol=1e-5)
            np.testing.assert_allclose(first["layers"]["norm"], second["layers"]["norm"], rtol=1e-5)

    def test_adafactor_follows_its_formula_with_decay(self):
        config = dataclasses.replace(self.config, name="adafactor", weight_decay=0.5)
        rng = np.random.default_rng(1)
        weight, gradients = rng.normal(size=(128, 160)), rng.normal(size=(3, 128, 160))
        tree = {"w_up": jnp.float32(weight)}
        updates, state = updates_of(config, tree, [{"w_up": jnp.float32(gradient)} for gradient in gradients])
        rows, columns = np.zeros(128), np.zeros(160)
        for step, (gradient, update) in enumerate(zip(gradients, updates, strict=True), 1):
            decay = 1 - step**-0.8
            rows = decay * rows + (1 - decay) * (gradient**2).mean(axis=1)
            columns = decay * columns + (1 - decay) * (gradient**2).mean(axis=0)
            expected = gradient / np.sqrt(rows[:, None] * columns[None, :] / rows.mean())
            expected /= max(1.0, np.sqrt(np.mean(expected**2)))
            np.testing.assert_allclose(update["w_up"], -0.1 * (expected + 0.5 * weight), rtol=1e-4, atol=1e-6)
            weight = weight + update["w_up"]
        self.assertLess(sum(leaf.size for leaf in jax.tree.leaves(state)), 2 * (128 + 160))

    @parameterized.parameters(("adamw", 0.02), ("muon", 0.1))
    def test_narrow_moments_have_half_the_bytes_and_nearly_the_same_updates(self, name, tolerance):
        config = dataclasses.replace(self.config, name=name)
        wide, wide_state = updates_of(config, self.parameters, self.gradients)
        narrow, state = updates_of(
            dataclasses.replace(config, moments_dtype="bfloat16"), self.parameters, self.gradients
        )
        half, full = (
            sum(leaf.nbytes for leaf in jax.tree.leaves(tree) if leaf.ndim > 1) for tree in (state, wide_state)
        )
        self.assertEqual(2 * half, full)
        for first, second in zip(jax.tree.leaves(narrow), jax.tree.leaves(wide), strict=True):
            np.testing.assert_allclose(first, second, atol=tolerance * np.abs(second).max())

    def test_narrow_second_moment_falls_where_rounding_to_the_nearest_would_stop_it(self):
        config = dataclasses.replace(self.config, b2=0.999, moments_dtype="bfloat16")
        parameters = {"w_up": jnp.zeros((64, 64))}
        gradients = [{"w_up": jnp.ones((64, 64))}] + [{"w_up": jnp.full((64, 64), 1e-3)}] * 400
        rule = optimizer.make_optimizer(config, 1000)
        state = rule.init(parameters)
        update = jax.jit(lambda gradient, state: rule.update(gradient, state, parameters, norm=jnp.float32(1))[1])
        for gradient in gradients:
            state = update(gradient, state)
        (second,) = (leaf for leaf in jax.tree.leaves(state) if leaf.dtype == jnp.bfloat16 and float(leaf.min()) < 9e-4)
        expected = 0.001 * 0.999**400 + 1e-6 * (1 - 0.999**400)
        self.assertAlmostEqual(float(jnp.mean(second.astype(jnp.float32))) / expected, 1, delta=0.02)

    def test_rounding_at_random_keeps_the_expectation(self):
        x = jnp.full(100_000, 1.0 + 2**-9, jnp.float32)
        rounded = optimizer._round_at_random(x, jax.random.key(0)).astype(jnp.float32)
        self.assertEqual(set(np.unique(rounded).tolist()), {1.0, 1.0 + 2**-7})
        self.assertAlmostEqual(float(rounded.mean()), 1.0 + 2**-9, delta=1e-4)

    def test_average_follows_the_parameters(self):
        config = dataclasses.replace(self.config, ema_decay=0.75)
        updates, state = updates_of(config, self.parameters, self.gradients)
        plain, _ = updates_of(self.config, self.parameters, self.gradients)
        expected = value = np.asarray(self.parameters["embedding"], np.float64)
        for update, plain_update in zip(updates, plain, strict=True):
            np.testing.assert_array_equal(update["embedding"], plain_update["embedding"])
            value = value + update["embedding"]
            expected = 0.75 * expected + 0.25 * value
        np.testing.assert_allclose(optimizer.find_average(state)["embedding"], expected, rtol=1e-5, atol=1e-6)
        self.assertIsNone(optimizer.find_average(updates_of(self.config, self.parameters, self.gradients)[1]))

    def test_ratios_multiply_the_updates_of_the_parameters_that_they_name(self):
        tree = {"layers": {"lora_a": jnp.ones((4, 2)), "lora_b": jnp.ones((2, 4))}, "soft_prompt": jnp.ones((3, 4))}
        updates = []
        for ratios in ({}, {"lora_b": 16.0, "soft_prompt": 100.0}):
            rule = optimizer.make_optimizer(self.config, 100, rate_ratios=ratios)
            updates.append(rule.update(tree, rule.init(tree), tree, norm=jnp.float32(1))[0])
        plain, scaled = updates
        np.testing.assert_allclose(scaled["layers"]["lora_b"], 16 * plain["layers"]["lora_b"])
        np.testing.assert_allclose(scaled["soft_prompt"], 100 * plain["soft_prompt"])
        np.testing.assert_array_equal(scaled["layers"]["lora_a"], plain["layers"]["lora_a"])


class DecayMaskTest(absltest.TestCase):
    def test_a_soft_prompt_does_not_decay(self):
        self.assertEqual(optimizer.decay_mask({"soft_prompt": jnp.ones((3, 4))}), {"soft_prompt": False})

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
