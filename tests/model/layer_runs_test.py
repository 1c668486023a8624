"""Layers that have not all the same parts: which runs they are, and that runs compute what a loop over layers does."""

import dataclasses
import functools
import pathlib
import tempfile
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl.testing import absltest, parameterized
from flax import nnx

from dialog_jax.errors import UserError
from dialog_jax.model import (
    adapters,
    decoder,
    layer_runs,
    layers,
    parameter_trees,
    peft_files,
    peft_reading,
    rotary,
    tensor_names,
)
from dialog_jax.model.decoder_config import Experts, Heads
from dialog_jax.model.lora_config import LoraConfig
from dialog_jax.model.rotary import ProportionalScaling, Rotary
from dialog_jax.training import metrics, trainable
from dialog_jax.training.config import MeshConfig, TrainConfig
from tests.model import adapters_test
from tests.planning import compiling_test
from tests.training import tiny

_TWO = {
    "family": "gemma4_text",
    "norms": "both",
    "qk_norm": "head",
    "value_norm": True,
    "layer_scales": True,
    "full_attention": Heads(kv_heads=1, head_dim=16, values_are_keys=True),
    "rotary": (Rotary(theta=100.0), Rotary(theta=1000.0, scaling=ProportionalScaling(fraction=0.25))),
    "attention_scale": 1.0,
}


def two_attentions(windows, **changes):
    """Layers with windows, and layers without one and with heads of another size."""
    kinds = tuple(int(not window) for window in windows)
    fields = {"layers": len(windows), "windows": windows, "layer_rotary": kinds, **_TWO, **changes}
    return tiny.config(61, **fields)


_PERIODIC = two_attentions((5, 5, 0, 5, 5, 0))
_MODELS = {
    "periodic": _PERIODIC,
    "without a period": two_attentions((5, 0, 5, 7)),
    "alternating experts": tiny.config(61, layers=4, experts=Experts(count=4, active=2, width=8, dense_layers=(0, 2))),
    "experts and two attentions": two_attentions(
        (5, 5, 0, 5, 9, 0), experts=Experts(count=4, active=2, width=8, dense_layers=(1, 4), shared_width=8)
    ),
}


def make_parameters(model):
    """Random parameters, in which layers cannot be exchanged."""
    parameters = tiny.parameters(model)
    if model.layer_scales:
        parameters["layers"]["scale"] = jnp.linspace(0.5, 1.5, model.layers)[:, None]
    return parameters


@functools.partial(jax.jit, static_argnums=0)
def run_in_scans(model, parameters, tokens):
    """The hidden states of a path."""
    position = jnp.arange(tokens.shape[1])[None]
    return decoder.hidden_states(model, parameters, tokens, position, jnp.full(tokens.shape, tokens.shape[1]))


@functools.partial(jax.jit, static_argnums=0)
def run_layer_by_layer(model, parameters, tokens):
    """The same, with each layer's own parameters and a plain softmax."""
    position = jnp.arange(tokens.shape[1])[None]
    x = decoder.embed(model, parameters, tokens, jnp.float32)
    for number in range(model.layers):
        own = {}
        for name, part in parameters["layers"].items():
            having = model.parts.get(name, range(model.layers))
            if number in having:
                place = having.index(number)
                own[name] = jax.tree.map(lambda array, place=place: nnx.Param(array[place]), part)
        module = nnx.merge(layers.declare_layer(model, number), nnx.State(own))
        kind = model.rotary[model.layer_rotary[number] if model.layer_rotary else 0]
        window = (model.windows[number] if model.windows else 0) or tokens.shape[1]

        def rotate(q, k, kind=kind):
            return tuple(rotary.rotate(x, *kind.rotation(position, x.shape[-1])) for x in (q, k))

        def attend(q, k, v, window=window):
            k, v = (jnp.repeat(x, q.shape[2] // x.shape[2], axis=2) for x in (k, v))
            distance = position[0][:, None] - position
            scores = jnp.einsum("btnh,bsnh->bnts", q, k) / np.sqrt(q.shape[-1])
            scores = jnp.where(((distance >= 0) & (distance < window))[None, None], scores, -jnp.inf)
            return jnp.einsum("bnts,bsnh->btnh", jax.nn.softmax(scores), v), None

        x, _ = module(x, rotate, attend)
    return layers.normalize(x, parameters["final_norm"], model)


class RunsTest(parameterized.TestCase):
    @parameterized.parameters(
        ("periodic", [(0, 1, "attention", 5), (1, 2, "attention", 5), (2, 3, "full_attention", None)]),
        (
            "without a period",
            [(0, 1, "attention", 5), (1, 2, "full_attention", None), (2, 4, "attention", "differ")],
        ),
        ("alternating experts", [(0, 1, "attention", None), (1, 2, "attention", None)]),
    )
    def test_runs_are_those_of_a_period(self, name, expected):
        runs = layer_runs.list_runs(_MODELS[name])
        windows = ["differ" if np.ndim(run.window) else run.window for run in runs]
        got = [(run.start, run.stop, run.attention, window) for run, window in zip(runs, windows, strict=True)]
        self.assertEqual(got, expected)
        self.assertEqual({run.kind for run in runs}, {0})

    @parameterized.parameters(*_MODELS)
    @pytest.mark.full
    def test_hidden_states_are_those_of_a_loop_over_layers(self, name):
        model = _MODELS[name]
        parameters = make_parameters(model)
        tokens = jnp.asarray(np.random.default_rng(0).integers(0, 61, (1, 17)))
        got, needed = (run(model, parameters, tokens) for run in (run_in_scans, run_layer_by_layer))
        np.testing.assert_allclose(got, needed, rtol=2e-4, atol=2e-5)

    @pytest.mark.full
    def test_scale_of_a_layer_has_no_gradient(self):
        def total(parameters):
            return jnp.sum(run_in_scans(_PERIODIC, parameters, jnp.arange(9)[None]) ** 3)

        gradient = jax.jit(jax.grad(total))(make_parameters(_PERIODIC))["layers"]
        self.assertEqual(np.abs(gradient["scale"]).max(), 0)
        self.assertGreater(np.abs(gradient["full_attention"]["w_key"]).max(axis=(1, 2)).min(), 0)


class ConfigTest(parameterized.TestCase):
    @parameterized.parameters(
        ({"windows": (5, 5)}, "both are needed"),
        ({"windows": ()}, "both are needed"),
        ({"full_attention": Heads(kv_heads=3, head_dim=16)}, r"heads \(4\) must be a multiple of kv_heads \(3\)"),
        ({"full_attention": Heads(kv_heads=1, head_dim=15)}, "head_dim is 15"),
    )
    def test_values_that_do_not_fit_are_refused(self, changes, message):
        with self.assertRaisesRegex(UserError, message):
            dataclasses.replace(two_attentions((5, 0)), **changes)

    def test_attention_counts_by_the_size_of_heads(self):
        # A query with 20 tokens before it; 4 layers with a window of 5 and heads of 8, 2 layers with heads of 16.
        pairs = sum(share * min(window, 21) for window, share in _PERIODIC.window_shares.items())
        multiply_adds = 2 * 4 * (4 * 8 * 5 + 2 * 16 * 21)  # scores and weighted sum, of 4 heads
        got, without = (
            metrics.count_flops(_PERIODIC, tokens=1, attention_pairs=some, targets=1) for some in (pairs, 0)
        )
        self.assertAlmostEqual(got - without, 3 * 2 * multiply_adds, delta=1e-6)


class PlanTest(absltest.TestCase):
    @pytest.mark.full
    def test_scan_over_periods_keeps_the_input_of_each_layer_and_no_parameters(self):
        model = two_attentions((5, 5, 0, 5, 5, 0), width=64, heads=8, kv_heads=4)
        with mock.patch.object(compiling_test, "_MODEL", model):
            config = compiling_test.run_config(remat="full")
            plan = compiling_test.compiled(MeshConfig(), config, dtype=jnp.bfloat16, devices=1)
        self.assertEqual(plan.memory.activations, 6 * 8 * 128 * 64 * 2)  # layers, rows, tokens, width, bytes


class AdaptersTest(absltest.TestCase):
    @pytest.mark.full
    def test_lora_adapts_both_attentions_and_is_read_back(self):
        lora = LoraConfig(rank=2, rank_pattern={r"layers\.[25]\.self_attn\.k_proj": 1})
        parameters, _, scales = adapters_test.adapted(_PERIODIC, lora)
        matrices = {path: len(scale) for path, scale in scales.items()}
        attention = {f"layers/attention/w_{name}": 4 for name in ("query", "key", "value", "output")}
        full = {f"layers/full_attention/w_{name}": 2 for name in ("query", "key", "output")}
        feed_forward = {f"layers/feed_forward/w_{name}": 6 for name in ("gate", "up", "down")}
        self.assertEqual(matrices, attention | full | feed_forward)
        self.assertEqual(
            tensor_names.list_names(_PERIODIC, "layers/full_attention/w_key"),
            [f"model.layers.{layer}.self_attn.k_proj.weight" for layer in (2, 5)],
        )
        factors = parameter_trees.split(parameters, lambda path: path.endswith(adapters.TRAINED))[0]
        with tempfile.TemporaryDirectory() as directory:
            peft_files.write_lora(pathlib.Path(directory), _PERIODIC, scales, factors, base_name="some/model")
            adapter = peft_reading.read_adapter(pathlib.Path(directory), _PERIODIC)
        again = parameter_trees.merge(adapters_test.attach(tiny.parameters(_PERIODIC), adapter.scales), adapter.factors)
        merged = adapters.merge_factors(_PERIODIC, parameters)[1]
        needed, *others = (run_in_scans(_PERIODIC, some, jnp.arange(19)[None]) for some in (parameters, again, merged))
        # Rounding is relative to the largest hidden state, on each CPU in its own way.
        atol = 2e-5 * float(jnp.abs(needed).max())
        for other in others:
            np.testing.assert_allclose(other, needed, rtol=2e-5, atol=atol)

    def test_matrices_of_both_attentions_are_quantized(self):
        config = TrainConfig(lora=LoraConfig(rank=2), frozen_dtype="nf4")
        selection = trainable.select(config, _PERIODIC, jnp.float32)
        frozen = trainable.abstract_parameters(selection).frozen["layers"]
        for part, size in (("attention", 4), ("full_attention", 2)):
            self.assertEqual(frozen[part]["w_key"]["weight"]["nf4_codes"].shape[0], size)
        self.assertEqual(frozen["scale"].dtype, jnp.float32)


if __name__ == "__main__":
    absltest.main()
