"""Mixtures of experts: products of groups against NumPy, padding, and what is read, adapted and refused."""

import dataclasses
import functools
import json
import pathlib
import tempfile
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from absl.testing import absltest, parameterized

from dialog_jax.errors import UserError
from dialog_jax.model import (
    adapters,
    decoder,
    experts,
    grouped_products,
    hf_config,
    model_files,
    parameter_trees,
    pretrained,
    saving,
)
from dialog_jax.model.decoder_config import Experts
from dialog_jax.model.lora_config import LoraConfig
from dialog_jax.model.rotary import Rotary
from tests.training import tiny

_EXPERTS = Experts(count=4, active=2, width=24, dense_layers=(1,))
_MODEL = tiny.config(61, family="qwen3_moe", qk_norm="head", layers=3, tie_embeddings=False, experts=_EXPERTS)
_GLM = tiny.config(
    61,
    family="glm4_moe",
    rotary=(Rotary(theta=10000.0, fraction=0.5),),
    layers=2,
    tie_embeddings=False,
    experts=Experts(
        count=4, active=2, width=24, dense_layers=(0,), shared_width=24, scoring="sigmoid", router_bias=True
    ),
)


class GroupedProductsTest(parameterized.TestCase):
    @parameterized.parameters(([3, 0, 40, 50, 7],), ([100, 0, 0, 0, 0],), ([0, 0, 0, 0, 60],), ([9, 8, 7, 1, 0],))
    def test_products_and_gradients_are_those_of_each_group(self, sizes):
        rng = np.random.default_rng(0)
        x, matrices, out = (
            rng.standard_normal(shape).astype(np.float32) for shape in [(100, 12), (5, 12, 7), (100, 7)]
        )
        used = sum(sizes)
        out[used:] = 0  # of rows beyond the groups, whose product is unspecified

        def total(x, matrices):
            product = grouped_products.multiply(x, matrices, jnp.asarray(sizes, jnp.int32))[:used]
            return jnp.sum(product * out[:used]), product

        (dx, dm), product = jax.jit(jax.grad(total, argnums=(0, 1), has_aux=True))(x, matrices)
        start = 0
        for group, size in enumerate(sizes):
            rows = slice(start, start + size)
            own, own_out, matrix = (array.astype(np.float64) for array in (x[rows], out[rows], matrices[group]))
            np.testing.assert_allclose(product[rows], own @ matrix, atol=1e-5)
            np.testing.assert_allclose(dx[rows], own_out @ matrix.T, atol=1e-5)
            np.testing.assert_allclose(dm[group], own.T @ own_out, atol=2e-5)
            start += size

    def test_blocks_are_a_quarter_of_a_group_within_limits(self):
        sizes = [grouped_products.find_block(rows, 8) for rows in (1, 1024, 4096, 1 << 20)]
        self.assertEqual(sizes, [8, 32, 128, 256])


@jax.custom_vjp
def _spoil_gradient(rows, is_computed):
    """The rows; the gradient of those that belong to no group is NaN."""
    return rows


_spoil_gradient.defvjp(
    lambda rows, is_computed: (rows, is_computed),
    lambda is_computed, d: (jnp.where(is_computed, d, jnp.nan), None),
)


class PaddingTest(absltest.TestCase):
    @pytest.mark.full
    def test_padding_changes_no_other_token(self):
        parameters = tiny.parameters(_MODEL)
        tokens = np.random.default_rng(0).integers(0, 61, 40)

        run_row = jax.jit(functools.partial(decoder.hidden_states, _MODEL))

        def run(padding, is_padding):
            row = jnp.asarray(np.append(tokens, padding))[None]
            position = jnp.asarray(np.append(np.arange(40), np.zeros(len(padding), np.int64)))[None]
            ends = jnp.asarray(np.append(np.full(40, 40), np.arange(40, 40 + len(padding)) + 1))[None]
            segment = jnp.asarray(np.append(np.ones(40, np.int64), np.full(len(padding), int(not is_padding))))[None]
            return run_row(parameters, row, position, ends, segment=segment)[0, :40]

        alone = run(np.zeros(0, np.int64), True)
        for padding in (np.zeros(24, np.int64), np.full(24, 7), np.arange(24)):
            for is_padding in (True, False):
                np.testing.assert_allclose(run(padding, is_padding), alone, atol=1e-5)

    def test_padding_is_given_to_no_expert_and_has_output_and_gradient_0(self):
        config = Experts(count=4, active=2, width=24, biases=True)
        rng = np.random.default_rng(0)
        shapes = {"w_gate": (4, 8, 24), "w_up": (4, 8, 24), "w_down": (4, 24, 8)}
        shapes |= {"b_gate": (4, 24), "b_up": (4, 24), "b_down": (4, 8)}
        matrices = {name: rng.standard_normal(shape, np.float32) for name, shape in shapes.items()}
        x, out = rng.standard_normal((2, 2, 10, 8), np.float32)
        weights = rng.random((2, 10, 2), np.float32)
        choice = np.argsort(rng.random((2, 10, 4)), axis=-1)[..., :2]
        segment = np.ones((2, 10), np.int64)
        segment[0, 6:] = 0
        used = segment > 0
        sizes, plain_multiply = [], grouped_products.multiply

        def multiply(rows, matrices, group_sizes):
            jax.debug.callback(lambda own: sizes.append(own.tolist()), group_sizes)
            is_computed = jnp.arange(len(rows))[:, None] < jnp.sum(group_sizes)
            product = plain_multiply(_spoil_gradient(rows, is_computed), matrices, group_sizes)
            return jnp.where(is_computed, product, jnp.nan)

        def compute(run, x, choice, weights, out):
            def total(x, weights, matrices):
                output = run(config, x, jnp.asarray(choice), weights, matrices)
                return jnp.sum(output * out), output

            result = jax.jit(jax.grad(total, argnums=(0, 1, 2), has_aux=True))(x, weights, matrices)
            jax.effects_barrier()
            return result

        # The tokens that are not padding alone, as one row.
        (dx, dw, dm), output = compute(
            experts.run, x[used][None], choice[used][None], weights[used][None], out[used][None]
        )
        with mock.patch.object(grouped_products, "multiply", multiply):
            run = experts.leave_out_padding(experts.run, jnp.asarray(segment))
            (got_dx, got_dw, got_dm), got = compute(run, x, choice, weights, out)
        self.assertEqual(sizes, 3 * [np.bincount(choice[used].ravel(), minlength=4).tolist()])
        for whole, part in ((got, output), (got_dx, dx), (got_dw, dw)):
            np.testing.assert_allclose(whole[used], part[0], atol=1e-5)
            self.assertEqual(np.abs(whole[~used]).max(), 0)
        for name in matrices:
            np.testing.assert_allclose(got_dm[name], dm[name], atol=1e-5, err_msg=name)

    def test_groups_without_rows_are_not_multiplied(self):
        def total(rows, matrices):
            return jnp.sum(grouped_products.multiply(rows, matrices, jnp.zeros(5, jnp.int32)))

        nothing = jnp.full((64, 12), jnp.nan), jnp.full((5, 12, 7), jnp.nan)
        value, gradients = jax.jit(jax.value_and_grad(total, argnums=(0, 1)))(*nothing)
        self.assertEqual([float(jnp.abs(array).max()) for array in (value, *gradients)], [0, 0, 0])


class RouterTest(absltest.TestCase):
    def test_groups_leave_out_experts_with_higher_scores(self):
        config = Experts(count=4, active=2, width=8, scoring="sigmoid", groups=2, scale=2.5, normalize=True)
        scores = jnp.array([[3.0, -9.0, 2.0, 1.0]])  # the best expert is in the worse group
        choice, weights = experts.route(config, scores, jnp.eye(4), None)
        self.assertEqual(choice.tolist(), [[2, 3]])
        chances = 1 / (1 + np.exp([-2.0, -1.0]))
        np.testing.assert_allclose(weights[0], 2.5 * chances / chances.sum(), rtol=1e-6)

    def test_a_bias_of_the_choice_has_no_gradient(self):
        config = Experts(count=4, active=2, width=8, scoring="sigmoid", router_bias=True)

        def total(x, bias):
            return jnp.sum(experts.route(config, x, jnp.eye(4), bias)[1])

        by_x, by_bias = jax.grad(total, argnums=(0, 1))(jnp.array([[3.0, 2.0, 1.0, 0.0]]), jnp.array([0.0, 0, 9, 0]))
        self.assertEqual(np.flatnonzero(by_x[0]).tolist(), [0, 2])
        self.assertEqual(np.abs(by_bias).max(), 0)


class ConfigTest(parameterized.TestCase):
    @parameterized.parameters(
        ({"active": 5}, "experts.active is 5"), ({"count": 0}, "experts.count"), ({"groups": 3}, "3 groups"),
        ({"scoring": "max"}, "experts.scoring is 'max'"), ({"active_groups": 2}, "2 active groups"),
    )  # fmt: skip
    def test_values_out_of_range_are_refused(self, fields, message):
        with self.assertRaisesRegex(UserError, message):
            Experts(**({"count": 4, "active": 2, "width": 8} | fields))

    @parameterized.parameters((1, 0), (3,), (0, 0), (0, 1, 2))
    def test_dense_layers_that_do_not_fit_are_refused(self, *dense):
        with self.assertRaisesRegex(UserError, "dense_layers|no layer has experts"):
            dataclasses.replace(_MODEL, experts=dataclasses.replace(_EXPERTS, dense_layers=dense))

    def test_an_auxiliary_loss_is_refused(self):
        fields = hf_config.to_json(_MODEL) | {"output_router_logits": True}
        with self.assertRaisesRegex(UserError, "output_router_logits is True"):
            hf_config.from_json(pathlib.Path("config.json"), fields)


class FilesTest(absltest.TestCase):
    def test_layers_that_predict_further_tokens_are_not_read(self):
        parameters = tiny.parameters(_GLM)
        with tempfile.TemporaryDirectory() as directory:
            path = pathlib.Path(directory) / "model"
            saving.save_pretrained(path, _GLM, parameters)
            tensors = safetensors.numpy.load_file(path / "model.safetensors")
            tensors["model.layers.2.eh_proj.weight"] = np.zeros((32, 64), np.float32)
            safetensors.numpy.save_file(tensors, path / "model.safetensors")
            fields = json.loads((path / "config.json").read_text())
            (path / "config.json").write_text(json.dumps(fields | {"num_nextn_predict_layers": 1}))
            config = pretrained.load_config(path)
            loaded = pretrained.load_parameters(path, config)
            notes = model_files.describe_weights(path, config).notes
        self.assertEqual(config, _GLM)
        jax.tree.map(np.testing.assert_array_equal, loaded, parameters)
        self.assertRegex(notes[0], r"1 tensors \(model.layers.2\) are not read")


class Mxfp4Test(absltest.TestCase):
    def test_published_blocks_are_read_as_the_numbers_they_stand_for(self):
        model = tiny.config(
            61, family="gpt_oss", feed_forward=64, qkv_bias=True, output_bias=True, sinks=True, tie_embeddings=False,
            experts=Experts(
                count=3, active=2, width=64, scoring="softmax_of_top", router_bias=True, biases=True, clamp=7.0,
                gate_slope=1.702,
            ),
        )  # fmt: skip
        rng = np.random.default_rng(0)
        decoded = {}
        with tempfile.TemporaryDirectory() as directory:
            path = pathlib.Path(directory) / "model"
            saving.save_pretrained(path, model, tiny.parameters(model))
            tensors = safetensors.numpy.load_file(path / "model.safetensors")
            for name in ("gate_up_proj", "down_proj"):
                for layer in range(2):
                    whole = f"model.layers.{layer}.mlp.experts.{name}"
                    experts_, inputs, outputs = tensors.pop(whole).shape
                    blocks = rng.integers(0, 256, (experts_, outputs, inputs // 32, 16), dtype=np.uint8)
                    scales = rng.integers(120, 132, blocks.shape[:-1], dtype=np.uint8)
                    tensors |= {f"{whole}_blocks": blocks, f"{whole}_scales": scales}
                    decoded[name, layer] = np.zeros((experts_, inputs, outputs))
                    for (e, o, g, i), byte in np.ndenumerate(blocks):
                        for half, code in enumerate((byte & 15, byte >> 4)):
                            exponent, mantissa = code >> 1 & 3, code & 1
                            size = 2.0 ** (exponent - 1.0) * (1 + mantissa / 2) if exponent else mantissa / 2
                            value = (-size if code & 8 else size) * 2.0 ** (int(scales[e, o, g]) - 127)
                            decoded[name, layer][e, 32 * g + 2 * i + half, o] = value
            safetensors.numpy.save_file(tensors, path / "model.safetensors")
            fields = json.loads((path / "config.json").read_text())
            quantization = {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]}
            (path / "config.json").write_text(json.dumps(fields | {"quantization_config": quantization}))
            config = pretrained.load_config(path)
            loaded = pretrained.load_parameters(path, config)["layers"]["experts"]
            self.assertIn("MXFP4", model_files.describe_weights(path, config).notes[0])
        self.assertEqual(config, model)
        for layer in range(2):
            np.testing.assert_array_equal(loaded["w_gate"][layer], decoded["gate_up_proj", layer][..., ::2])
            np.testing.assert_array_equal(loaded["w_up"][layer], decoded["gate_up_proj", layer][..., 1::2])
            np.testing.assert_array_equal(loaded["w_down"][layer], decoded["down_proj", layer])

    def test_other_quantizations_are_refused_by_name(self):
        fields = hf_config.to_json(_MODEL) | {"quantization_config": {"quant_method": "mxfp4"}}
        with self.assertRaisesRegex(UserError, "quantization_config is .*mxfp4"):
            hf_config.from_json(pathlib.Path("config.json"), fields)


class LoraTest(parameterized.TestCase):
    @pytest.mark.full
    def test_what_products_leave_in_rows_of_no_expert_reaches_no_gradient(self):
        exact = grouped_products.multiply

        def spoil(rows, sizes):
            return jnp.where((jnp.arange(len(rows)) < jnp.sum(sizes))[:, None], rows, jnp.nan)

        @jax.custom_vjp
        def multiply(x, matrices, sizes):
            return spoil(exact(x, matrices, sizes), sizes)

        def forward(x, matrices, sizes):
            return multiply(x, matrices, sizes), (x, matrices, sizes)

        def backward(residuals, gradient):
            x, matrices, sizes = residuals
            by_x, by_matrices = jax.vjp(lambda x, matrices: exact(x, matrices, sizes), x, matrices)[1](gradient)
            return spoil(by_x, sizes), by_matrices, None

        multiply.defvjp(forward, backward)
        rng = np.random.default_rng(0)

        def draw(*shape):
            return jnp.asarray(rng.standard_normal(shape), jnp.float32)

        shapes = {"w_gate": (8, 24), "w_up": (8, 24), "w_down": (24, 8)}
        matrices = {
            name: {"weight": draw(4, i, o), "lora_a": draw(4, i, 2), "lora_b": draw(4, 2, o), "lora_scale": jnp.ones(2)}
            for name, (i, o) in shapes.items()
        }
        choice = jnp.array([[[0, 2], [3, 1], [4, 4], [2, 0], [4, 4]]])  # two tokens are padding

        @jax.jit
        def gradients(x, matrices):
            def total(x, matrices):
                return jnp.sum(experts.run(_EXPERTS, x, choice, jnp.full(choice.shape, 0.5), matrices) ** 2)

            return jax.grad(total, argnums=(0, 1))(x, matrices)

        x = draw(1, 5, 8)
        expected = gradients(x, matrices)
        with mock.patch.object(grouped_products, "multiply", multiply):
            jax.clear_caches()
            spoiled = gradients(x, matrices)
        for tree in (spoiled, expected):
            for matrix in tree[1].values():
                del matrix["lora_scale"]  # which is frozen
        jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5), spoiled, expected)

    def test_all_linear_is_what_computes_every_token(self):
        scales = adapters.find_scales(_GLM, LoraConfig(rank=2))
        feed_forwards = {path: len(scale) for path, scale in scales.items() if "attention" not in path}
        names = ("w_gate", "w_up", "w_down")
        needed = [f"layers/feed_forward/{name}" for name in names] + [f"layers/experts/shared/{name}" for name in names]
        self.assertEqual(feed_forwards, dict.fromkeys(needed, 1))  # one dense layer, one with experts
        self.assertLen(scales, 10)

    def test_matrices_of_experts_are_named_as_one_for_each_layer(self):
        scales = adapters.find_scales(_GLM, LoraConfig(rank=2, targets=("down_proj",)))
        self.assertEqual({path: scale.shape for path, scale in scales.items()}, {
            "layers/feed_forward/w_down": (1, 2), "layers/experts/w_down": (1, 2),
            "layers/experts/shared/w_down": (1, 2),
        })  # fmt: skip
        lora = LoraConfig(rank=2, alpha=2.0, targets=("experts.up_proj",), rank_pattern={r"layers\.2\..*": 1})
        scales = adapters.find_scales(_MODEL, lora)
        self.assertEqual(list(scales), ["layers/experts/w_up"])
        np.testing.assert_array_equal(scales["layers/experts/w_up"], [[1, 1], [2, 0]])

    @parameterized.parameters("mlp.experts.3.up_proj", "mlp.gate", "layers.1.mlp.experts.up_proj")
    def test_what_is_no_matrix_of_experts_is_an_error(self, target):
        with self.assertRaisesRegex(UserError, f"names '{target}', which matches none of"):
            adapters.find_scales(_MODEL, LoraConfig(rank=2, targets=(target,)))

    @pytest.mark.full
    @parameterized.parameters(_MODEL, _GLM)
    @pytest.mark.full
    def test_model_with_updates_equals_the_merged_model_and_one_expert_after_the_other(self, model):
        lora = LoraConfig(rank=2, alpha=3.0, targets=("gate_proj", "up_proj", "down_proj"), rank_pattern={"up_proj": 3})
        scales = adapters.find_scales(model, lora)
        factors = adapters.init_factors(model, scales, jax.random.key(0))
        leaves, tree = jax.tree.flatten(factors)
        keys = jax.random.split(jax.random.key(1), len(leaves))
        drawn = [leaf + 0.1 * jax.random.normal(key, leaf.shape) for leaf, key in zip(leaves, keys, strict=True)]
        base = tiny.parameters(model)
        own = jax.tree.map(jnp.asarray, adapters.attach_scales(base, scales))
        parameters = parameter_trees.merge(own, jax.tree.unflatten(tree, drawn))
        tokens = jnp.arange(40, dtype=jnp.int32)[None]
        position, ends = tokens, jnp.full_like(tokens, 40)
        _, merged = adapters.merge_factors(model, parameters)
        for name in ("w_up", "w_down"):
            matrix = parameters["layers"]["experts"][name]
            for layer, expert in np.ndindex(merged["layers"]["experts"][name].shape[:2]):
                a, b = (np.float64(matrix[factor][layer, expert]) for factor in ("lora_a", "lora_b"))
                expected = (
                    base["layers"]["experts"][name][layer, expert] + a * np.float64(matrix["lora_scale"][layer]) @ b
                )
                np.testing.assert_allclose(
                    merged["layers"]["experts"][name][layer, expert], expected, rtol=1e-5, atol=1e-5
                )
        adapted, expected = (
            decoder.hidden_states(model, tree, tokens, position, ends) for tree in (parameters, merged)
        )
        np.testing.assert_allclose(adapted, expected, rtol=2e-5, atol=2e-5)
        self.assertGreater(np.abs(expected - decoder.hidden_states(model, base, tokens, position, ends)).max(), 0.1)


if __name__ == "__main__":
    absltest.main()
