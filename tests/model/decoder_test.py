import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl.testing import absltest, parameterized

from dialog_jax.attention import blockwise
from dialog_jax.model import decoder
from dialog_jax.model.decoder_config import DecoderConfig
from dialog_jax.model.rotary import Llama3Scaling, Rotary
from tests.model import forests

_PLAIN = (Rotary(theta=1e4),)
_LLAMA = DecoderConfig(
    family="llama",
    vocab_size=64,
    width=24,
    layers=2,
    heads=4,
    kv_heads=2,
    head_dim=8,
    feed_forward=40,
    max_length=64,
    rotary=(
        Rotary(
            theta=1e4,
            scaling=Llama3Scaling(
                factor=4.0, low_frequency_factor=1.0, high_frequency_factor=4.0, original_max_length=16
            ),
        ),
    ),
)
_QWEN2 = dataclasses.replace(_LLAMA, family="qwen2", rotary=_PLAIN, qkv_bias=True, tie_embeddings=True)
_QWEN3 = dataclasses.replace(_LLAMA, family="qwen3", rotary=_PLAIN, qk_norm="head")
_FAMILIES = dict(llama=_LLAMA, qwen2=_QWEN2, qwen3=_QWEN3)


def _parameters(config, scale=0.3):
    """Random everywhere: fresh biases are zero and norms one, which would hide that they are not used."""
    leaves, tree = jax.tree.flatten(decoder.abstract_parameters(config))
    rng = np.random.default_rng(0)
    return jax.tree.unflatten(
        tree, [jnp.asarray(scale * rng.standard_normal(leaf.shape), jnp.float32) for leaf in leaves]
    )


def _path(length):
    return jnp.arange(length)[None], jnp.full((1, length), length)


class DecoderTest(parameterized.TestCase):
    @parameterized.named_parameters(*_FAMILIES.items())
    def test_tree_gives_each_token_what_its_lineage_alone_gives(self, config):
        rng = np.random.default_rng(0)
        parents = forests.random_parents(rng, 30, root=0.1, branch=0.3)
        parameters, tokens = _parameters(config), jnp.asarray(rng.integers(0, config.vocab_size, 30))
        position, subtree_end = map(jnp.asarray, forests.arrays(parents))
        run = jax.jit(functools.partial(decoder.hidden_states, config, parameters))
        got = run(tokens[None], position[None], subtree_end[None])
        leaves = sorted(set(range(30)) - set(parents))
        for leaf in leaves:
            lineage = np.array(forests.lineage(parents, leaf))
            padded = jnp.zeros((1, 30), jnp.int32).at[0, : len(lineage)].set(tokens[lineage])
            alone = run(padded, *_path(30))  # causal: what follows the lineage is not seen
            np.testing.assert_allclose(got[0, lineage], alone[0, : len(lineage)], atol=2e-5)
        self.assertGreater(len(leaves), 3)

    @parameterized.named_parameters(*_FAMILIES.items())
    def test_gradient_reaches_ancestors_and_no_other_token(self, config):
        rng = np.random.default_rng(1)
        length = 30
        parents = forests.random_parents(rng, length, root=0.1, branch=0.3)
        position, subtree_end = map(jnp.asarray, forests.arrays(parents))
        tokens = jnp.asarray(
            rng.permutation(config.vocab_size)[:length]
        )  # all distinct: the embedding's rows tell tokens apart
        direction = jnp.asarray(rng.standard_normal(config.width), jnp.float32)
        parameters = _parameters(config)

        def read(embedding):
            changed = parameters | {"embedding": embedding}
            hidden = decoder.hidden_states(config, changed, tokens[None], position[None], subtree_end[None])
            return hidden[0] @ direction  # [T]

        jacobian = np.asarray(jax.jit(jax.jacrev(read))(parameters["embedding"]))[:, np.asarray(tokens)]  # [T, T, D]
        reached = np.any(jacobian != 0, axis=-1)
        for token in range(length):
            np.testing.assert_array_equal(np.flatnonzero(reached[token]), forests.lineage(parents, token))

    @parameterized.parameters("attention", "dots", "full")
    @pytest.mark.full
    def test_remat_leaves_values_and_gradients(self, remat):
        parameters, tokens = _parameters(_QWEN3), jnp.arange(20)[None]

        def loss(parameters, remat):
            return jnp.sum(jnp.sin(decoder.hidden_states(_QWEN3, parameters, tokens, *_path(20), remat=remat)))

        got, needed = (
            jax.jit(jax.value_and_grad(loss), static_argnums=1)(parameters, name) for name in (remat, "none")
        )
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), got, needed)

    @pytest.mark.full
    def test_remat_saves_memory_in_the_order_of_its_names(self):
        config = dataclasses.replace(_LLAMA, layers=8)
        parameters, tokens = decoder.abstract_parameters(config), jax.ShapeDtypeStruct((1, 256), jnp.int32)

        def bytes_of(remat):
            def loss(parameters, tokens):
                return jnp.sum(decoder.hidden_states(config, parameters, tokens, *_path(256), remat=remat))

            compiled = jax.jit(jax.grad(loss)).lower(parameters, tokens).compile()
            return compiled.memory_analysis().temp_size_in_bytes

        sizes = [bytes_of(remat) for remat in ("none", "attention", "dots", "full")]
        self.assertEqual(sizes, sorted(sizes, reverse=True))
        self.assertLess(sizes[3], sizes[2])
        self.assertLess(sizes[2], sizes[0])

    @parameterized.parameters("attention", "dots")
    def test_what_attention_read_is_kept_once_and_not_computed_again(self, remat):
        parameters, tokens = decoder.abstract_parameters(_LLAMA), jax.ShapeDtypeStruct((1, 300), jnp.int32)

        def loss(parameters, tokens):
            return jnp.sum(decoder.hidden_states(_LLAMA, parameters, tokens, *_path(300), remat=remat))

        traced = jax.jit(jax.grad(loss)).trace(parameters, tokens)
        # Forward comes first; its loop's results are what the backward pass is left.
        forward = next(equation for equation in traced.jaxpr.eqns if equation.primitive.name == "scan")
        heads = (_LLAMA.heads, _LLAMA.head_dim)
        self.assertLen([kept for kept in forward.outvars if kept.aval.shape[-2:] == heads], 1)
        text = traced.lower().compile().as_text()
        loops = [line for line in text.splitlines() if " while(" in line and f'{blockwise.PAIRS}/while"' in line]
        self.assertLen(loops, 2)  # forward and backward

    def test_remat_unknown_is_an_error_that_lists_the_known(self):
        with self.assertRaisesRegex(ValueError, "'some'.*none, attention, dots, full"):
            decoder.hidden_states(_LLAMA, _parameters(_LLAMA), jnp.zeros((1, 4), jnp.int32), *_path(4), remat="some")

    def test_compute_dtype_bfloat16_is_near_float32_and_keeps_float32_gradients(self):
        parameters, tokens = _parameters(_LLAMA, 0.1), jnp.arange(20)[None]

        def run(parameters, dtype):
            hidden = decoder.hidden_states(_LLAMA, parameters, tokens, *_path(20), compute_dtype=dtype)
            return jnp.sum(hidden.astype(jnp.float32)), hidden

        wide = jax.jit(run, static_argnums=1)(parameters, jnp.float32)[1]
        gradient, narrow = jax.jit(jax.grad(run, has_aux=True), static_argnums=1)(parameters, jnp.bfloat16)
        self.assertEqual(narrow.dtype, jnp.bfloat16)
        self.assertEqual({leaf.dtype for leaf in jax.tree.leaves(gradient)}, {jnp.dtype(jnp.float32)})
        self.assertLess(float(jnp.max(jnp.abs(narrow.astype(jnp.float32) - wide)) / jnp.max(jnp.abs(wide))), 0.05)

    def test_padding_gives_finite_states_and_no_gradient_to_others(self):
        parameters = _parameters(_LLAMA)
        tokens = jnp.asarray([[5, 6, 7, 0, 0]])
        position, subtree_end = jnp.asarray([[0, 1, 2, 0, 0]]), jnp.asarray([[3, 3, 3, 4, 5]])
        got = decoder.hidden_states(_LLAMA, parameters, tokens, position, subtree_end)
        alone = decoder.hidden_states(_LLAMA, parameters, tokens[:, :3], *_path(3))
        self.assertTrue(bool(jnp.all(jnp.isfinite(got))))
        np.testing.assert_allclose(got[:, :3], alone, atol=1e-5)

    @parameterized.named_parameters(*_FAMILIES.items())
    def test_init_has_the_declared_shapes_and_varies_over_layers(self, config):
        parameters = decoder.init_parameters(config, jax.random.key(0))
        described = jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), parameters)
        declared = jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), decoder.abstract_parameters(config))
        self.assertEqual(described, declared)
        stacked = parameters["layers"]["attention"]["w_query"]
        self.assertEqual(stacked.shape, (config.layers, config.width, config.heads * config.head_dim))
        self.assertTrue(bool(jnp.any(stacked[0] != stacked[1])))
        self.assertAlmostEqual(float(jnp.std(stacked)), 0.02, places=2)

    def test_unembedding_is_the_embedding_itself_when_tied(self):
        tied, untied = _parameters(_QWEN2), _parameters(_QWEN3)
        self.assertNotIn("lm_head", tied)
        self.assertIs(decoder.unembedding(_QWEN2, tied), tied["embedding"])
        self.assertIs(decoder.unembedding(_QWEN3, untied), untied["lm_head"])

    @parameterized.parameters(
        dict(vocab_size=0),
        dict(kv_heads=3),
        dict(head_dim=7),
        dict(rotary=()),
        dict(layer_rotary=(0, 1)),
        dict(windows=(4,)),
        dict(windows=(4, -1)),
        dict(norms="before"),
        dict(attention_cap=0.0),
        dict(norm_epsilon=0.0),
        dict(qk_norm="heads"),
    )
    def test_config_out_of_range_is_an_error_that_names_it(self, **wrong):
        with self.assertRaisesRegex(ValueError, next(iter(wrong))):
            dataclasses.replace(_LLAMA, **wrong)


if __name__ == "__main__":
    absltest.main()
