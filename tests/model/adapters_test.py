"""LoRA in the decoder equals the same model with the updates added to its matrices; what a config adapts, and not."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl.testing import absltest, parameterized

from dialog_jax.errors import UserError
from dialog_jax.model import adapters, decoder, matrices, parameter_trees
from dialog_jax.model.lora_config import LoraConfig
from tests.training import tiny

_TIED = tiny.config(96)
_UNTIED = tiny.config(96, tie_embeddings=False)
_EVERYWHERE = ("all-linear", "embed_tokens", "lm_head")


def adapted(model, lora, seed=0):
    """(parameters of a model with random updates, those of the model, the scales)."""
    base = tiny.parameters(model)
    scales = adapters.find_scales(model, lora)
    factors = adapters.init_factors(model, scales, jax.random.key(seed))
    leaves, tree = jax.tree.flatten(factors)
    keys = jax.random.split(jax.random.key(seed + 1), len(leaves))
    drawn = [leaf + 0.1 * jax.random.normal(key, leaf.shape) for leaf, key in zip(leaves, keys, strict=True)]
    factors = jax.tree.unflatten(tree, drawn)
    return parameter_trees.merge(attach(base, scales), factors), base, scales


def attach(base, scales):
    return jax.tree.map(jnp.asarray, adapters.attach_scales(base, scales))


def logits(model, parameters, tokens):
    length = tokens.shape[1]
    position = jnp.broadcast_to(jnp.arange(length, dtype=jnp.int32), tokens.shape)
    hidden = decoder.hidden_states(model, parameters, tokens, position, jnp.full(tokens.shape, length, jnp.int32))
    return hidden @ decoder.unembedding(model, parameters).T


class UpdateTest(parameterized.TestCase):
    def test_product_is_that_of_the_sum_in_float64(self):
        rng = np.random.default_rng(0)
        x, weight, a, b = (rng.normal(size=size) for size in ((5, 7), (7, 4), (7, 3), (3, 4)))
        scale = np.array([0.5, 2.0, 0.0])
        matrix = {"weight": weight, "lora_a": a, "lora_b": b, "lora_scale": scale}
        product = matrices.multiply(jnp.float32(x), jax.tree.map(jnp.float32, matrix))
        np.testing.assert_allclose(product, x @ (weight + a @ np.diag(scale) @ b), rtol=1e-5, atol=1e-5)

    @parameterized.product(
        model=(_TIED, _UNTIED),
        lora=(
            LoraConfig(rank=3, alpha=5.0),
            LoraConfig(rank=2, alpha=3.0, rslora=True, targets=("q_proj", "mlp.down_proj")),
            LoraConfig(rank=2, targets=_EVERYWHERE),
            LoraConfig(
                rank=2, rank_pattern={r"layers\.1\.self_attn\.q_proj": 4, "up_proj": 1}, alpha_pattern={"up_proj": 7.0}
            ),
        ),
    )
    @pytest.mark.quick_every(3)
    def test_model_with_updates_equals_the_merged_model(self, model, lora):
        parameters, _, _ = adapted(model, lora)
        tokens = jnp.asarray(np.random.default_rng(0).integers(0, 96, (2, 19)), jnp.int32)
        merged_model, merged = adapters.merge_factors(model, parameters)
        declared = jax.tree.map(lambda leaf: leaf.shape, decoder.abstract_parameters(merged_model))
        self.assertEqual(jax.tree.map(lambda leaf: leaf.shape, merged), declared)
        np.testing.assert_allclose(
            logits(model, parameters, tokens), logits(merged_model, merged, tokens), rtol=2e-5, atol=2e-5
        )

    def test_model_is_unchanged_before_training(self):
        base = tiny.parameters(_UNTIED)
        scales = adapters.find_scales(_UNTIED, LoraConfig(rank=4, targets=_EVERYWHERE))
        factors = adapters.init_factors(_UNTIED, scales, jax.random.key(0))
        parameters = parameter_trees.merge(attach(base, scales), factors)
        tokens = jnp.arange(30, dtype=jnp.int32)[None]
        np.testing.assert_array_equal(logits(_UNTIED, parameters, tokens), logits(_UNTIED, base, tokens))

    def test_first_factor_is_uniform_up_to_the_root_of_its_inputs(self):
        model = tiny.config(96, width=256)
        scales = adapters.find_scales(model, LoraConfig(rank=32, targets=("q_proj",)))
        a = adapters.init_factors(model, scales, jax.random.key(0))["layers"]["attention"]["w_query"]["lora_a"]
        self.assertEqual(a.shape, (2, 256, 32))
        self.assertLessEqual(float(jnp.abs(a).max()), 1 / 16)
        self.assertAlmostEqual(float(jnp.std(a)), 1 / 16 / np.sqrt(3), delta=1e-3)

    @pytest.mark.full
    def test_columns_beyond_a_layers_rank_have_no_gradient(self):
        lora = LoraConfig(rank=4, targets=("v_proj",), rank_pattern={r"layers\.0\.self_attn\.v_proj": 1})
        parameters, _, _ = adapted(_TIED, lora)
        tokens = jnp.arange(20, dtype=jnp.int32)[None]
        gradient = jax.grad(lambda p: jnp.sum(logits(_TIED, p, tokens) ** 2))(parameters)
        factors = gradient["layers"]["attention"]["w_value"]
        self.assertEqual(np.count_nonzero(np.abs(factors["lora_a"][0]).sum(0)), 1)
        self.assertEqual(np.count_nonzero(np.abs(factors["lora_b"][0]).sum(1)), 1)
        self.assertEqual(np.count_nonzero(np.abs(factors["lora_a"][1]).sum(0)), 4)

    def test_dropout_keeps_the_expectation(self):
        x = jnp.ones((4, 50_000))
        matrix = {"dropout_key": jax.random.key(0), "dropout_rate": jnp.float32(0.25)}
        dropped = matrices._drop_out(x, matrix)
        self.assertAlmostEqual(float(jnp.mean(dropped == 0)), 0.25, delta=0.01)
        self.assertAlmostEqual(float(jnp.mean(dropped)), 1.0, delta=0.01)


class TargetsTest(parameterized.TestCase):
    def test_all_linear_is_the_seven_matrices_of_each_layer(self):
        scales = adapters.find_scales(_UNTIED, LoraConfig(rank=8, alpha=16.0))
        names = {path.rpartition("/")[2] for path in scales}
        self.assertEqual(names, {"w_query", "w_key", "w_value", "w_output", "w_gate", "w_up", "w_down"})
        np.testing.assert_array_equal(scales["layers/attention/w_query"], np.full((2, 8), 2.0))

    def test_one_layer_can_be_named(self):
        scales = adapters.find_scales(_TIED, LoraConfig(rank=2, alpha=2.0, targets=("layers.1.self_attn.q_proj",)))
        self.assertEqual(list(scales), ["layers/attention/w_query"])
        np.testing.assert_array_equal(scales["layers/attention/w_query"], [[0, 0], [1, 1]])

    @parameterized.parameters(
        ({"targets": ("q_porj",)}, "q_porj.*q_proj"),
        ({"rank_pattern": {"w_query": 3}}, "rank_pattern has 'w_query'"),
        ({"alpha_pattern": {"layers.7.mlp.up_proj": 3}}, "alpha_pattern"),
        ({"rank": 17}, r"rank of model.layers.0.self_attn.k_proj is 17.*16"),
    )
    def test_what_matches_nothing_or_is_too_large_is_refused(self, fields, message):
        with self.assertRaisesRegex(UserError, message):
            adapters.find_scales(_TIED, LoraConfig(**({"rank": 2} | fields)))

    @parameterized.parameters(
        {"rank": -1}, {"dropout": 1.0}, {"alpha": 0.0}, {"targets": ()}, {"rank_pattern": {"a": 0}},
        {"rank_pattern": {"a": 1.5}}, {"alpha_pattern": {"(": 2.0}}, {"learning_rate_ratio": 0.0},
    )  # fmt: skip
    def test_values_out_of_range_are_refused(self, **fields):
        with self.assertRaisesRegex(UserError, "lora."):
            LoraConfig(**fields)

    def test_config_is_immutable(self):
        with self.assertRaises(dataclasses.FrozenInstanceError):
            LoraConfig().rank = 3


if __name__ == "__main__":
    absltest.main()
