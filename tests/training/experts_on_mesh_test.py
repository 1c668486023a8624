"""Mixtures of experts over several devices: what one device computes, however experts are divided."""

import dataclasses
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from absl.testing import absltest, parameterized
from jax.sharding import PartitionSpec

from dialog_jax.model import decoder, experts, grouped_products
from dialog_jax.model.decoder_config import Experts
from dialog_jax.training import expert_sharding, optimizer, score_steps, sharding, train_step
from dialog_jax.training.config import MeshConfig
from tests.training import tiny, train_step_test

_EXPERTS = Experts(count=6, active=2, width=24, shared_width=16, dense_layers=(1,), normalize=True)
_MESH = MeshConfig(data=2, fsdp=2, tensor=2)

FULL_PARAMETERS = ("none", "full", "uneven over fsdp", "by neither")  # of the full tier: see tests/conftest.py


def _mixture():
    model, _ = train_step_test.prepared()
    return dataclasses.replace(model, family="qwen3_moe", layers=3, experts=_EXPERTS, sinks=True)


def _update(mesh_config, devices, batch, remat):
    """The result of two updates of a mixture."""
    model = _mixture()
    mesh = sharding.make_mesh(mesh_config, jax.devices()[:devices])
    transform = optax.chain(train_step_test._RECORD_GRADIENT, optimizer.make_optimizer(train_step_test._OPTIMIZER, 10))
    parameters = tiny.parameters(model)
    layouts = sharding.state_sharding(mesh, parameters)
    state = train_step.initialize_state(mesh, jax.device_put(parameters, layouts), transform)
    run = train_step.make_train_step(model, transform, mesh, compute_dtype=jnp.float32, remat=remat)
    metrics = []
    for _ in range(2):
        state, figures = run(state, batch)
        metrics.append(jax.device_get(figures))
    return train_step_test.Updated(state, metrics)


class TrainStepTest(parameterized.TestCase):
    @classmethod
    def setUpClass(cls):
        super().setUpClass()
        cls.batch = train_step_test.batch_of(1, 8)
        cls.expected = _update(MeshConfig(), 1, cls.batch, "none")

    @parameterized.parameters("none", "dots", "full")
    @pytest.mark.full
    def test_update_over_a_mesh_is_that_of_one_device(self, remat):
        got = _update(_MESH, 8, self.batch, remat)
        train_step_test.assert_same_update(self, got, self.expected)
        layers = got.state.trained["layers"]["experts"]
        self.assertEqual(layers["w_up"].sharding.spec, PartitionSpec(None, "tensor", "fsdp", None))
        router = jax.device_get(got.state.optimizer_state[0]["gradient"])["layers"]["experts"]["w_router"]
        self.assertGreater(np.abs(router).max(axis=(1, 2)).min(), 0)


class ShardExpertsTest(parameterized.TestCase):
    @parameterized.parameters(
        ("by expert", 6, 24, 32), ("by width", 5, 24, 32), ("by neither", 5, 7, 32), ("uneven over fsdp", 6, 24, 31)
    )
    @pytest.mark.full
    def test_output_and_gradients_are_those_of_one_device(self, _, count, width, depth):
        config = Experts(count=count, active=2, width=width, biases=True, clamp=1.5, gate_slope=1.7)
        keys = jax.random.split(jax.random.key(0), 12)
        shapes = {"w_gate": (depth, width), "w_up": (depth, width), "w_down": (width, depth)}
        shapes |= {"b_gate": (width,), "b_up": (width,), "b_down": (depth,)}
        parameters = {
            name: jax.random.normal(key, (count, *shape))
            for (name, shape), key in zip(shapes.items(), keys, strict=False)
        }
        for name in ("w_gate", "w_down"):  # with LoRA
            a, b = (jax.random.normal(key, (count, *shape)) for key, shape in zip(
                jax.random.split(keys[10]), ((shapes[name][0], 3), (3, shapes[name][1])), strict=True
            ))  # fmt: skip
            scale = jnp.array([0.5, 2.0, 0.0])
            parameters[name] = {"weight": parameters[name], "lora_a": a, "lora_b": b, "lora_scale": scale}
        x, out = (jax.random.normal(key, (4, 9, depth)) for key in keys[6:8])
        choice = jax.random.permutation(keys[8], jnp.broadcast_to(jnp.arange(count), (4, 9, count)), 2, True)[..., :2]
        weights = jax.random.uniform(keys[9], (4, 9, 2))
        mesh = sharding.make_mesh(_MESH)

        def compute(run):
            def total(x, weights, parameters):
                return jnp.sum(run(config, x, choice, weights, parameters) * out)

            return jax.jit(jax.value_and_grad(total, argnums=(0, 1, 2)))(x, weights, parameters)

        expected, got = compute(experts.run), compute(expert_sharding.shard_experts(mesh))
        for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4 * np.abs(b).max())

    @pytest.mark.full
    def test_steps_give_experts_no_padding(self):
        model, mesh = _mixture(), sharding.make_mesh(_MESH)
        batch = train_step_test.batch_of(1, 8)
        sizes, multiply = [], grouped_products.multiply

        def record(rows, matrices, group_sizes):
            jax.debug.callback(lambda own: sizes.append(int(own.sum())), group_sizes)
            return multiply(rows, matrices, group_sizes)

        with mock.patch.object(grouped_products, "multiply", record):
            evaluate = score_steps.make_evaluation_step(model, mesh, compute_dtype=jnp.float32, turns=2)
            jax.block_until_ready(evaluate(tiny.parameters(model), batch))
            jax.effects_barrier()
            evaluated, sizes = sizes, []
            transform = optimizer.make_optimizer(train_step_test._OPTIMIZER, 10)
            parameters = tiny.parameters(model)
            parameters = jax.device_put(parameters, sharding.state_sharding(mesh, parameters))
            state = train_step.initialize_state(mesh, parameters, transform)
            run = train_step.make_train_step(model, transform, mesh, compute_dtype=jnp.float32, remat="none")
            jax.block_until_ready(run(state, batch))
            jax.effects_barrier()
        # Two layers with three products and two experts for each token.
        needed = 2 * 3 * 2 * np.sum(batch.segment > 0)
        self.assertLess(needed, 2 * 3 * 2 * batch.segment.size)
        self.assertEqual((sum(evaluated), sum(sizes)), (needed, needed))

    def test_backward_pass_keeps_no_gathered_matrices(self):
        model = _mixture()
        mesh = sharding.make_mesh(_MESH)
        tokens = jnp.zeros((8, 16), jnp.int32)

        def loss(parameters):
            run = expert_sharding.shard_experts(mesh)
            return jnp.sum(decoder.hidden_states(model, parameters, tokens, tokens, tokens + 16, run_experts=run))

        parameters = tiny.parameters(model)
        _, pull = jax.eval_shape(lambda parameters: jax.vjp(loss, parameters), parameters)
        shapes = {leaf.shape[-3:] for leaf in jax.tree.leaves(pull)}
        self.assertIn((6, 24, 32), shapes)
        self.assertNotIn((8 * 3, 24, 32), shapes)  # three experts on each device

    @parameterized.parameters(
        ("w_gate", "lora_a", (6, 32, 3), ("tensor", "fsdp", None)),
        ("w_gate", "lora_b", (6, 3, 24), ("tensor", None, "fsdp")),
        ("w_down", "lora_a", (6, 24, 3), ("tensor", "fsdp", None)),
        ("w_down", "lora_b", (6, 3, 32), ("tensor", None, "fsdp")),
        ("w_down", "weight", (6, 24, 32), ("tensor", None, "fsdp")),
        ("w_down", "lora_b", (5, 3, 32), (None, None, "fsdp")),
    )
    def test_factors_are_divided_as_experts_are(self, name, part, shape, expected):
        layout = sharding.parameter_sharding(sharding.make_mesh(_MESH), ("layers", "experts", name, part), (2, *shape))
        self.assertEqual(tuple(layout.spec), (None, *expected))


if __name__ == "__main__":
    absltest.main()
