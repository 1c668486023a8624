"""Training mixtures of experts: one pass equals K passes, and what counts, decays and is frozen."""

import dataclasses
from unittest import mock

import jax.numpy as jnp
import numpy as np
import pytest
from absl.testing import absltest, parameterized

from dialog_jax.model.decoder_config import Experts
from dialog_jax.model.lora_config import LoraConfig
from dialog_jax.training import metrics, optimizer, trainable
from dialog_jax.training.config import MeshConfig, TrainConfig
from tests.laws import oracles
from tests.planning import compiling_test
from tests.training import exactness_test, tiny

_EXPERTS = Experts(
    count=4, active=2, width=24, dense_layers=(0,), shared_width=16, scoring="softmax_of_top", biases=True, clamp=2.0
)


class OnePassTest(absltest.TestCase):
    @pytest.mark.full
    def test_one_pass_over_branching_trees_equals_k_passes(self):
        tokenizer, model, _ = exactness_test.tokenizer_and_model("qwen3")
        model = dataclasses.replace(model, layers=3, experts=_EXPERTS, sinks=True)
        parameters = tiny.parameters(model)
        dialogues = [exactness_test.reasoning_dialogue(), exactness_test.plain_dialogue(1, turns=2)]
        trees = tiny.trees(dialogues, tokenizer)
        batch = tiny.rows(trees, [[1, 0]], max_length=768)
        value, gradient = tiny.loss_and_gradient(model, parameters, batch)
        weighted = [pair for one in dialogues for pair in oracles.response_weights(one, {}, "qwen3")]
        expected, expected_gradient = oracles.k_passes(model, parameters, weighted)
        np.testing.assert_allclose(value, expected, rtol=1e-5)
        self.assertLess(tiny.largest_difference(gradient, expected_gradient), 1e-4)
        for name in ("w_router", "w_up", "b_down"):
            self.assertGreater(np.abs(gradient["layers"]["experts"][name]).max(), 0, name)


class SelectionTest(parameterized.TestCase):
    @parameterized.parameters("int8", "nf4")
    def test_frozen_experts_are_not_quantized(self, kind):
        model = tiny.config(61, experts=_EXPERTS)
        selection = trainable.select(TrainConfig(lora=LoraConfig(rank=2), frozen_dtype=kind), model, jnp.float32)
        frozen = trainable.abstract_parameters(selection).frozen["layers"]["experts"]
        self.assertEqual(frozen["w_up"].dtype, jnp.bfloat16)
        self.assertEqual(frozen["w_router"].dtype, jnp.float32)
        self.assertEqual(selection.find_kind("layers/experts/shared/w_up"), kind)

    def test_flops_are_those_of_active_experts(self):
        layer = 3 * 32 * 32 + 2 * 32 * 16 - 32 * 32
        dense, sparse = 3 * 32 * 48, 32 * 4 + 2 * 3 * 32 * 24 + 3 * 32 * 16
        flops = metrics.count_flops(tiny.config(61, experts=_EXPERTS), tokens=10, attention_pairs=0, targets=0)
        self.assertEqual(flops, 6 * 10 * (2 * layer + dense + sparse))

    def test_biases_of_experts_do_not_decay(self):
        mask = optimizer.decay_mask(tiny.parameters(tiny.config(61, experts=_EXPERTS)))
        own = mask["layers"]["experts"]
        self.assertEqual({name for name in own if own[name] is True}, {"w_router", "w_gate", "w_up", "w_down"})


class PlanTest(absltest.TestCase):
    @pytest.mark.full
    def test_a_plan_counts_the_products_of_active_experts(self):
        def count(model):
            self.enter_context(mock.patch.object(compiling_test, "_MODEL", model))
            return compiling_test.compiled(MeshConfig(), compiling_test.run_config(), devices=1).products.flops

        plain = compiling_test._MODEL
        alike = Experts(count=4, active=2, width=plain.feed_forward // 2)
        ratio = count(dataclasses.replace(plain, experts=alike)) / count(plain)
        self.assertBetween(ratio, 1.0, 1.25)


if __name__ == "__main__":
    absltest.main()
