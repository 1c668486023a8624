import dataclasses
import functools
import itertools
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl.testing import absltest, parameterized

from dialog_jax.inference import generation
from dialog_jax.model import decoder
from dialog_jax.model.decoder_config import DecoderConfig
from dialog_jax.model.rotary import Rotary

_CONFIG = DecoderConfig(
    family="qwen3",
    vocab_size=61,
    width=24,
    layers=2,
    heads=4,
    kv_heads=2,
    head_dim=8,
    feed_forward=40,
    max_length=700,
    rotary=(Rotary(theta=1e4),),
    qk_norm="head",
)


def _random_parameters(config):
    leaves, tree = jax.tree.flatten(decoder.abstract_parameters(config))
    rng = np.random.default_rng(0)
    return jax.tree.unflatten(
        tree, [jnp.asarray(0.3 * rng.standard_normal(leaf.shape), jnp.float32) for leaf in leaves]
    )


_PARAMETERS = _random_parameters(_CONFIG)
_WINDOWED = dataclasses.replace(_CONFIG, layers=4, windows=(16, 0, 4, 16), max_length=2000)


def _full_logits(tokens, config=_CONFIG, parameters=_PARAMETERS):
    """Logits after every token, from one forward pass without a cache."""
    padded = -(-len(tokens) // 128) * 128  # few shapes, few compilations; what follows is seen by nothing before it
    tokens_and_padding = jnp.asarray([[*tokens, *[0] * (padded - len(tokens))]])
    return np.asarray(_padded_logits(config, parameters, tokens_and_padding))[: len(tokens)]


@functools.partial(jax.jit, static_argnums=0)
def _padded_logits(config, parameters, tokens):
    path = jnp.arange(tokens.shape[1])[None], jnp.full(tokens.shape, tokens.shape[1])
    hidden = decoder.hidden_states(config, parameters, tokens, *path)[0]
    return hidden @ decoder.unembedding(config, parameters).T


def _prompt(length, seed=0):
    return np.random.default_rng(seed).integers(0, _CONFIG.vocab_size, length).tolist()


def _generate(tokens, **options):
    return list(generation.generate(_CONFIG, _PARAMETERS, tokens, **options))


class SessionTest(parameterized.TestCase):
    @parameterized.parameters(1, 2, 8, 9, 33, 512, 513, 650)
    @pytest.mark.quick_every(2)
    def test_cached_logits_equal_those_of_the_full_forward(self, length):
        tokens = _prompt(length)
        got = generation.Session(_CONFIG, _PARAMETERS).read(tokens)
        np.testing.assert_allclose(got, _full_logits(tokens)[-1], atol=1e-4)

    def test_cached_logits_token_by_token_equal_those_of_the_full_forward(self):
        tokens = _prompt(40)
        session = generation.Session(_CONFIG, _PARAMETERS)
        got = [session.read(tokens[: k + 1]) for k in range(40)]
        np.testing.assert_allclose(got, _full_logits(tokens), atol=1e-4)

    def test_session_keeps_the_shared_prefix_and_rolls_back_the_rest(self):
        session = generation.Session(_CONFIG, _PARAMETERS)
        history = _prompt(50)
        prompts = [
            history,
            history + _prompt(20, seed=1),  # the next turn
            history + _prompt(30, seed=2),  # another reply to the same history
            history[:10],  # back to an early turn
            history[:10],  # the same prompt again
            _prompt(5, seed=3),  # something else altogether
        ]
        for prompt in prompts:
            np.testing.assert_allclose(session.read(prompt), _full_logits(prompt)[-1], atol=1e-4)
            self.assertEqual(session.tokens, prompt)

    def test_session_computes_only_new_tokens_and_compiles_once_a_shape(self):
        session = generation.Session(_CONFIG, _PARAMETERS)
        session.read(_prompt(100))
        session.read([*_prompt(100), 3])
        compiled = generation._extend._cache_size()
        for length in range(102, 140):  # single tokens now, whatever the length of the history
            session.read(_prompt(100) + _prompt(length - 100, seed=4))
        self.assertLessEqual(generation._extend._cache_size() - compiled, 1)  # one chunk of 8 at the first
        before = session._cache[0].keys
        session.read(session.tokens)
        self.assertTrue(before.is_deleted())  # the cache is updated in place, not copied


class WindowedSessionTest(absltest.TestCase):
    """Layers with windows keep the last tokens only: 528 and 516 slots for windows of 16 and 4."""

    def setUp(self):
        self.parameters = _random_parameters(_WINDOWED)
        self.session = generation.Session(_WINDOWED, self.parameters)

    def check(self, prompt):
        needed = _full_logits(prompt, _WINDOWED, self.parameters)[-1]
        np.testing.assert_allclose(self.session.read(prompt), needed, atol=1e-4)

    @pytest.mark.full
    def test_cached_logits_equal_those_of_the_full_forward_after_several_rounds_of_the_slots(self):
        tokens = [token for seed in range(3) for token in _prompt(550, seed=seed)]
        self.check(tokens[:530])
        self.check(tokens[:1300])
        needed = _full_logits(tokens[:1330], _WINDOWED, self.parameters)
        got = [self.session.read(tokens[:length]) for length in range(1301, 1331)]
        np.testing.assert_allclose(got, needed[1300:], atol=1e-4)
        self.check(tokens)

    @pytest.mark.full
    def test_cache_of_layers_with_windows_stops_growing(self):
        slots = []
        for length in (10, 520, 1030):
            self.session.read(_prompt(length))
            slots.append([stack.keys.shape for stack in self.session._cache])
        self.assertEqual(
            slots,
            [
                [(layers, 1, count, 2, 8) for layers, count in zip((1, 1, 2), counts, strict=True)]
                for counts in ((512, 512, 512), (1024, 516, 528), (2048, 516, 528))
            ],
        )

    @pytest.mark.full
    def test_prompt_that_goes_back_is_computed_from_its_start_only_if_tokens_are_lost(self):
        history = [*_prompt(550), *_prompt(550, seed=1)]
        self.check(history)
        with mock.patch.object(generation, "_extend", wraps=generation._extend) as extend:
            for length, starts in ((1000, [1000]), (639, [639]), (638, [0, 512]), (638, [638])):
                extend.reset_mock()
                self.check(history[:length] + _prompt(1, seed=2))
                self.assertEqual([int(call.args[4]) for call in extend.call_args_list], starts)
            self.check(_prompt(600, seed=3))


class GenerateTest(parameterized.TestCase):
    def test_generate_greedily_equals_argmax_of_full_forwards(self):
        needed = _prompt(13)
        for _ in range(12):
            needed.append(int(np.argmax(_full_logits(needed)[-1])))
        self.assertEqual(_generate(_prompt(13), max_new_tokens=12), needed[13:])

    def test_generate_yields_the_stop_token_last(self):
        whole = _generate(_prompt(13), max_new_tokens=30)
        stop = whole[4]
        self.assertEqual(_generate(_prompt(13), max_new_tokens=30, stop_tokens=[stop]), whole[: whole.index(stop) + 1])

    def test_generate_streams_before_the_reply_is_complete(self):
        session = generation.Session(_CONFIG, _PARAMETERS)
        stream = generation.generate(_CONFIG, _PARAMETERS, _prompt(13), max_new_tokens=100, session=session)
        first = list(itertools.islice(stream, 2))
        self.assertEqual(session.tokens, _prompt(13) + first[:1])

    def test_generate_turn_after_turn_in_one_session_equals_new_sessions(self):
        session = generation.Session(_CONFIG, _PARAMETERS)
        history = _prompt(10)
        for turn in range(3):
            history = history + _prompt(6, seed=turn)
            reply = _generate(history, max_new_tokens=9, temperature=0.8, seed=turn, session=session)
            self.assertEqual(reply, _generate(history, max_new_tokens=9, temperature=0.8, seed=turn))
            history = history + reply

    def test_generate_with_a_seed_repeats_and_with_another_differs(self):
        options = dict(max_new_tokens=20, temperature=1.0)
        first = _generate(_prompt(13), seed=1, **options)
        self.assertEqual(first, _generate(_prompt(13), seed=1, **options))
        self.assertNotEqual(first, _generate(_prompt(13), seed=2, **options))

    @parameterized.parameters(
        (dict(tokens=[]), "no tokens"),
        (dict(tokens=[61]), "token ids 61 to 61.*vocabulary of 61"),
        (dict(tokens=[-1]), "token ids -1"),
        (dict(tokens=[1] * 699, max_new_tokens=2), "699 tokens and max_new_tokens=2 exceed.*700"),
        (dict(max_new_tokens=0), "max_new_tokens"),
        (dict(temperature=-1.0), "temperature"),
        (dict(temperature=float("nan")), "temperature"),
        (dict(top_p=0.0), "top_p"),
        (dict(top_p=1.5), "top_p"),
    )
    def test_generate_out_of_range_is_an_error_before_the_first_token(self, wrong, message):
        options = dict(tokens=[1, 2], max_new_tokens=2) | wrong
        with self.assertRaisesRegex(ValueError, message):
            generation.generate(_CONFIG, _PARAMETERS, options.pop("tokens"), **options)

    def test_generate_with_a_session_of_other_parameters_is_an_error(self):
        session = generation.Session(_CONFIG, jax.tree.map(jnp.zeros_like, _PARAMETERS))
        with self.assertRaisesRegex(ValueError, "session"):
            _generate([1], max_new_tokens=1, session=session)

    def test_generate_fills_the_context_to_its_last_token(self):
        self.assertLen(_generate(_prompt(690), max_new_tokens=10), 10)


class ChooseTest(parameterized.TestCase):
    @parameterized.parameters(0.05, 0.3, 0.6, 0.9, 0.999, 1.0)
    def test_choose_draws_from_the_nucleus_in_its_proportions(self, top_p):
        temperature = 0.7
        logits = np.random.default_rng(0).standard_normal(12)
        probability = np.exp(logits / temperature) / np.sum(np.exp(logits / temperature))
        nucleus: list[int] = []
        for token in np.argsort(-probability):  # likeliest first, until they add up to top_p
            nucleus.append(int(token))
            if sum(probability[nucleus]) >= top_p:
                break
        keys = jax.random.split(jax.random.key(0), 20000)
        drawn = jax.vmap(
            lambda key: generation.sample_token(jnp.asarray(logits, jnp.float32), key, temperature, top_p)
        )(keys)
        share = np.bincount(np.asarray(drawn), minlength=12) / len(keys)
        needed = np.zeros(12)
        needed[nucleus] = probability[nucleus] / sum(probability[nucleus])
        self.assertContainsSubset(np.flatnonzero(share), nucleus)
        np.testing.assert_allclose(share, needed, atol=0.015)

    def test_choose_at_temperature_zero_takes_the_likeliest(self):
        logits = jnp.asarray([0.0, 3.0, 2.9])
        got = {int(generation.sample_token(logits, jax.random.key(seed), 0.0, 0.5)) for seed in range(20)}
        self.assertEqual(got, {1})


if __name__ == "__main__":
    absltest.main()
