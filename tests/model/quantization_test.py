"""Quantized matrices against loops in NumPy float64, and products with them against products with plain arrays."""

import functools

import jax
import jax.extend
import jax.numpy as jnp
import numpy as np
import pytest
from absl.testing import absltest, parameterized

from dialog_jax.model import adapters, decoder, parameter_trees, quantization
from dialog_jax.model.lora_config import LoraConfig
from tests.training import tiny

# Appendix E of the QLoRA paper (arXiv 2305.14314), version 1.
# fmt: off
_PAPER = np.array([
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
])
# fmt: on
_SIZES = ((64, 256), (128, 300), (100, 7), (33, 5), (1, 1), (192, 513))


def quantize(kind, matrix):
    return quantization.quantize(kind, matrix)[0]


def dequantize(arrays, inputs, dtype=jnp.float32):
    return np.asarray(quantization.dequantize(jax.tree.map(jnp.asarray, arrays), inputs, dtype))


def dequantize_scale(arrays):
    return np.asarray(quantization._dequantize_scale(jax.tree.map(jnp.asarray, arrays)), np.float64)


def draw(size, seed=0):
    return np.random.default_rng(seed).standard_normal(size).astype(np.float32)


def unpack(packed, inputs):
    return np.stack([packed >> 4, packed & 15], axis=1).reshape(-1, packed.shape[1])[:inputs]


class Nf4Test(parameterized.TestCase):
    @parameterized.parameters(*_SIZES)
    def test_codes_are_the_nearest_levels_of_each_block(self, inputs, outputs):
        matrix = draw((inputs, outputs))
        codes = unpack(quantize("nf4", matrix)["nf4_codes"], inputs)
        for start in range(0, inputs, 64):
            block = matrix[start : start + 64].astype(np.float64)
            scaled = block / np.abs(block).max(axis=0)
            distance = np.abs(scaled[..., None] - _PAPER)
            chosen = np.take_along_axis(distance, codes[start : start + 64, :, None].astype(int), axis=-1)[..., 0]
            np.testing.assert_allclose(chosen, distance.min(axis=-1), rtol=0, atol=1e-6)

    @parameterized.parameters(*_SIZES)
    def test_scales_are_the_largest_weights_of_each_block_to_a_255th_of_their_range(self, inputs, outputs):
        matrix = draw((inputs, outputs))
        scale = dequantize_scale(quantize("nf4", matrix))
        for block in range(-(-inputs // 64)):
            largest = np.abs(matrix[64 * block : 64 * block + 64]).max(axis=0).astype(np.float64)
            for start in range(0, outputs, 256):
                group = largest[start : start + 256]
                error = np.abs(scale[block, start : start + 256] - group)
                self.assertLessEqual(error.max(), np.ptp(group) / 255 / 2 * 1.0001 + 1e-6)

    def test_weights_are_levels_times_scales(self):
        arrays = quantize("nf4", draw((100, 7)))
        scale = np.repeat(dequantize_scale(arrays), 64, axis=0)[:100]
        expected = _PAPER[unpack(arrays["nf4_codes"], 100)] * scale
        np.testing.assert_allclose(dequantize(arrays, 100), expected, rtol=1e-6)

    def test_one_column_by_hand(self):
        arrays = quantize("nf4", np.float32([[1.0], [-2.0], [0.5], [0.0]]))
        np.testing.assert_array_equal(arrays["nf4_codes"], [[12 << 4 | 0], [10 << 4 | 7]])
        self.assertEqual((int(arrays["scale_codes"][0, 0]), float(arrays["scale_minimum"][0, 0])), (0, 2.0))
        np.testing.assert_allclose(dequantize(arrays, 4)[:, 0], [2 * _PAPER[12], -2, 2 * _PAPER[10], 0], rtol=1e-6)

    def test_bits_per_weight_are_those_of_the_paper(self):
        arrays = quantization.abstract_quantized("nf4", (4096, 4096))
        bits = 8 * sum(leaf.size * leaf.dtype.itemsize for leaf in arrays.values()) / 4096**2
        self.assertAlmostEqual(bits, 4.127, delta=0.003)  # and 0.002 for the least scale of each group

    def test_error_of_normal_weights_is_that_of_sixteen_levels(self):
        matrix = draw((1024, 64))
        arrays, error = quantization.quantize("nf4", matrix)
        difference = dequantize(arrays, 1024).astype(np.float64) - matrix
        self.assertAlmostEqual(error.relative, np.linalg.norm(difference) / np.linalg.norm(matrix), places=5)
        self.assertBetween(error.relative, 0.08, 0.1)


class Int8Test(parameterized.TestCase):
    @parameterized.parameters(*_SIZES)
    def test_weights_differ_by_half_a_step_of_their_output_at_most(self, inputs, outputs):
        matrix = draw((inputs, outputs))
        arrays = quantize("int8", matrix)
        np.testing.assert_array_equal(np.abs(arrays["int8_codes"]).max(axis=0), 127)
        step = np.abs(matrix).max(axis=0) / 127
        self.assertLessEqual((np.abs(dequantize(arrays, inputs) - matrix) / step).max(), 0.5001)


class MatrixTest(parameterized.TestCase):
    @parameterized.parameters(*quantization.KINDS)
    def test_zeros_stay_zeros(self, kind):
        matrix = draw((128, 3))
        matrix[:64, 1] = matrix[:, 2] = 0
        weights = dequantize(quantize(kind, matrix), 128)
        np.testing.assert_array_equal(weights[:, 2], 0)
        np.testing.assert_array_equal(weights[:64, 1], 0)

    @parameterized.parameters(*quantization.KINDS)
    def test_stacked_matrices_are_dequantized_one_by_one(self, kind):
        stack = draw((2, 100, 7))
        together = tiny.quantize(kind, stack)
        declared = quantization.abstract_quantized(kind, stack.shape)
        self.assertEqual(
            {name: (array.shape, array.dtype) for name, array in together.items()},
            {name: (leaf.shape, leaf.dtype) for name, leaf in declared.items()},
        )
        for weights, matrix in zip(dequantize(together, 100), stack, strict=True):
            np.testing.assert_allclose(dequantize(quantize(kind, matrix), 100), weights, rtol=1e-6)

    @parameterized.product(kind=quantization.KINDS, dtype=("float32", "bfloat16"), inputs=(64, 33))
    def test_product_and_its_gradient_are_those_of_the_dequantized_matrix(self, kind, dtype, inputs):
        arrays = jax.tree.map(jnp.asarray, quantize(kind, draw((inputs, 40))))
        x = jnp.asarray(draw((5, inputs), 1), dtype)

        @jax.jit
        def both(x):
            plain = quantization.dequantize(arrays, inputs, dtype)
            products = (lambda x: quantization.multiply(x, arrays), lambda x: x @ plain)
            return [(y, pull(y)[0]) for y, pull in (jax.vjp(product, x) for product in products)]

        (y, dx), (plain_y, plain_dx) = both(x)
        tolerance = 10 * float(jnp.finfo(dtype).eps)
        self.assertLess(tiny.largest_difference(jnp.float32(y), jnp.float32(plain_y)), tolerance)
        self.assertLess(tiny.largest_difference(jnp.float32(dx), jnp.float32(plain_dx)), tolerance)
        self.assertEqual(y.dtype, jnp.dtype(dtype))

    def test_errors_are_described_in_one_line(self):
        errors = {"a": quantization.RoundingError(1.0, 100.0), "b": quantization.RoundingError(3.0, 200.0)}
        self.assertEqual(
            quantization.describe_errors("nf4", errors),
            "quantized to nf4: 2 matrices, relative error 11.547% (root mean square); the largest is 12.247%, of b",
        )


def quantize_layers(kind, base):
    """The parameters of a model with the matrices of its layers quantized."""
    flat = parameter_trees.flatten(base)
    return parameter_trees.unflatten(
        {path: tiny.quantize(kind, leaf) if "/w_" in path else leaf for path, leaf in flat.items()}
    )


def adapted(model, kind, rank):
    """(quantized parameters with the scales of LoRA, its factors)."""
    scales = adapters.find_scales(model, LoraConfig(rank=rank))
    factors = jax.tree.map(lambda leaf: leaf + 0.1, adapters.init_factors(model, scales, jax.random.key(0)))
    base = adapters.attach_scales(quantize_layers(kind, tiny.parameters(model)), scales)
    return jax.tree.map(jnp.asarray, base), factors


def dequantize_layers(model, base):
    return parameter_trees.unflatten(adapters._dequantize(model, parameter_trees.flatten(base)))


def loss(factors, base, *, model, remat="none"):
    tokens = jnp.arange(8, dtype=jnp.int32)[None]
    parameters = parameter_trees.merge(base, factors)
    hidden = decoder.hidden_states(model, parameters, tokens, tokens, jnp.full_like(tokens, 8), remat=remat)
    return jnp.sum(hidden**2)


def list_scan_outputs(jaxpr):
    """The arrays that the loops of a program return."""
    for equation in jaxpr.eqns:
        if equation.primitive.name == "scan":
            yield from (variable.aval for variable in equation.outvars)
        for inner in jax.extend.core.jaxprs_in_params(equation.params):
            yield from list_scan_outputs(inner)


class DecoderTest(parameterized.TestCase):
    @parameterized.parameters(*quantization.KINDS)
    @pytest.mark.quick_every(2)
    def test_gradient_of_the_factors_is_that_with_plain_matrices(self, kind):
        model = tiny.config(96)
        base, factors = adapted(model, kind, rank=3)
        plain = dequantize_layers(model, base)
        gradient = jax.jit(jax.value_and_grad(functools.partial(loss, model=model)))
        (value, with_codes), (plain_value, with_plain) = gradient(factors, base), gradient(factors, plain)
        np.testing.assert_allclose(value, plain_value, rtol=1e-5)
        self.assertLess(tiny.largest_difference(with_codes, with_plain), 1e-4)

    @parameterized.product(kind=quantization.KINDS, remat=sorted(decoder.REMAT))
    @pytest.mark.quick_every(3)
    def test_loop_over_layers_stores_neither_weights_nor_codes(self, kind, remat):
        model = tiny.config(32, width=128, head_dim=32, kv_heads=4, feed_forward=192)
        base, factors = adapted(model, kind, rank=1)
        gradient = jax.grad(functools.partial(loss, model=model, remat=remat))
        outputs = list(list_scan_outputs(jax.make_jaxpr(gradient)(factors, base).jaxpr))
        self.assertNotEmpty(outputs)
        for output in outputs:
            self.assertLess(output.size, 2 * 128 * 128 / 2, output)  # layers, and half a byte per weight

    @parameterized.parameters("none", "full")
    @pytest.mark.full
    def test_temporaries_grow_with_layers_as_with_plain_matrices(self, remat):
        def temporaries(layers, plain):
            model = tiny.config(32, layers=layers)
            base, factors = adapted(model, "nf4", rank=1)
            base = dequantize_layers(model, base) if plain else base
            gradient = jax.jit(jax.grad(functools.partial(loss, model=model, remat=remat)))
            return gradient.lower(factors, base).compile().memory_analysis().temp_size_in_bytes

        growths = [temporaries(8, plain) - temporaries(4, plain) for plain in (False, True)]
        self.assertEqual(*growths)
        self.assertGreater(growths[0], 0)


if __name__ == "__main__":
    absltest.main()
