"""The laws of loss and gradient on random dialogues, by a tiny decoder; rows have one length, so as to compile once."""

import functools

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl.testing import absltest, parameterized
from hypothesis import strategies as st

from dialog_jax.batching import batches
from dialog_jax.inference import generation
from dialog_jax.model import decoder
from dialog_jax.training import optimizer, sharding, train_step
from dialog_jax.training.config import MeshConfig
from dialog_jax.training.optimizer_config import OptimizerConfig
from tests.laws import budget, oracles, strategies
from tests.laws.targets_test import prepare
from tests.laws.truncation_test import fitting
from tests.training import tiny

_LENGTH = 256
_ROWS = 4
_MODEL = tiny.config(512)


@functools.cache
def parameters():
    return tiny.parameters(_MODEL)


def packed(batch):
    """(sum of weighted loss, its gradient) of [B, ...] rows."""
    return tiny.loss_and_gradient(_MODEL, parameters(), batch)


@st.composite
def assignments(draw, sizes, length):
    """Rows of trees in any order, as full as chance makes them; at most `_ROWS` where that is easy."""
    rows = [[] for _ in range(_ROWS)]
    for tree in draw(st.permutations(range(len(sizes)))):
        room = [row for row in rows if sum(sizes[t] for t in row) + sizes[tree] <= length]
        hypothesis.assume(room)
        draw(st.sampled_from(room)).append(tree)
    return rows


def assert_close(test, got, expected):
    np.testing.assert_allclose(got[0], expected[0], rtol=1e-5)
    test.assertLess(tiny.largest_difference(got[1], expected[1]), 1e-4)


class OnePassTest(parameterized.TestCase):
    @parameterized.parameters("chatml", "qwen3")
    @budget.cases(10)
    @hypothesis.given(data=st.data())
    def test_one_pass_equals_k_passes(self, family, data):
        records = data.draw(st.lists(strategies.records(family), min_size=1, max_size=3))
        dialogues, objective = strategies.parsed(records), data.draw(strategies.objectives)
        # Which response of a dialogue that is cut is the last, or is trained twice, is told without a model elsewhere.
        objective = {key: value for key, value in objective.items() if key not in ("name", "merge_weights")}
        weighted = [
            pair
            for dialogue in dialogues
            for pair in oracles.response_weights(dialogue, objective, family, kept=fitting(dialogue, family, _LENGTH))
        ]
        trees = prepare(dialogues, family, max_length=_LENGTH, **objective)
        hypothesis.assume(trees is not None)
        given = batches.evaluation_batches(trees, max_length=_LENGTH, rows=_ROWS)
        got = oracles.add_results([packed(batch.map(lambda array: array[0])) for batch, _ in given])
        assert_close(self, got, oracles.k_passes(_MODEL, parameters(), weighted))


class PackingTest(absltest.TestCase):
    def trees(self, data):
        records = data.draw(st.lists(strategies.records("qwen3", kind="words"), min_size=2, max_size=5))
        trees = prepare(strategies.parsed(records), "qwen3", max_length=_LENGTH)
        hypothesis.assume(trees is not None)
        return trees

    def filled(self, data, trees):
        rows = data.draw(assignments(trees.sizes()[0].tolist(), _LENGTH))
        return batches.fill_rows(trees, rows, max_length=_LENGTH)

    @budget.cases(10)
    @hypothesis.given(data=st.data())
    def test_packing_changes_nothing(self, data):
        trees = self.trees(data)
        by_itself = []
        for tree in range(len(trees)):
            rows = [[tree], *[[]] * (_ROWS - 1)]
            by_itself.append(packed(batches.fill_rows(trees, rows, max_length=_LENGTH)))
        assert_close(self, packed(self.filled(data, trees)), oracles.add_results(by_itself))

    @pytest.mark.full
    @budget.cases(6)
    @hypothesis.given(data=st.data())
    def test_any_split_into_rows_and_micro_batches_gives_the_same_update(self, data):
        trees = self.trees(data)
        results = []
        for micro_batches in (1, 4):
            batch = self.filled(data, trees).map(
                lambda array, m=micro_batches: array.reshape(m, _ROWS // m, *array.shape[1:])
            )
            results.append(updated(batch))
        (first, metrics), (other, own) = results
        np.testing.assert_allclose(own.loss, metrics.loss, rtol=1e-5)
        np.testing.assert_allclose(own.gradient_norm, metrics.gradient_norm, rtol=1e-4)
        self.assertEqual((own.tokens, own.targets), (metrics.tokens, metrics.targets))
        gap = jax.tree.map(lambda a, b: float(np.abs(a - b).max()), other, first)
        self.assertLess(max(jax.tree.leaves(gap)), 1e-5)


@functools.cache
def update():
    """(the jitted update on one device, the state before it)."""
    mesh = sharding.make_mesh(MeshConfig(), jax.devices()[:1])
    # The large epsilon keeps Adam from turning the rounding of gradients near 0 into steps.
    config = OptimizerConfig(learning_rate=1e-2, schedule="constant", weight_decay=0.1, clip_norm=0.5, epsilon=1e-2)
    transform = optimizer.make_optimizer(config, 10)
    state = train_step.initialize_state(mesh, jax.tree.map(jnp.copy, parameters()), transform)
    return train_step.make_train_step(_MODEL, transform, mesh, compute_dtype=jnp.float32, remat="none"), state


def updated(batch):
    """(parameters, metrics) after one update."""
    run, state = update()
    state, metrics = run(jax.tree.map(jnp.copy, state), batch)  # a copy, since the step takes over what it is given
    return jax.device_get(state.parameters), jax.device_get(metrics)


class CausalityTest(absltest.TestCase):
    @budget.cases(25)
    @hypothesis.given(data=st.data())
    def test_another_token_moves_its_descendants_only(self, data):
        trees = strategies.stored(data.draw(strategies.forests(max_trees=5, shared_prefixes=True)))
        row = list(range(len(trees)))
        batch = batches.fill_rows(trees, [row], max_length=_LENGTH)
        used = int((batch.segment > 0).sum())
        at = data.draw(st.integers(0, used - 1))
        changed = batch.tokens.copy()
        changed[0, at] += 100
        first, second = (
            np.asarray(hidden(tokens, batch.position, batch.subtree_end)[0]) for tokens in (batch.tokens, changed)
        )
        moved = np.flatnonzero((first != second).any(axis=1)).tolist()
        # With shared beginnings a descendant is a token whose string goes through the changed one.
        expected = [query for query in range(at, used) if at in lineage(batch, query)]
        self.assertEqual(moved, expected)


@jax.jit
def hidden(tokens, position, subtree_end):
    return decoder.hidden_states(_MODEL, parameters(), tokens, position, subtree_end)


def lineage(batch, query):
    """The places of a token's ancestors and itself: of each depth the nearest before it, by positions alone."""
    depth = int(batch.position[0, query])
    places = [query]
    for place in range(query - 1, -1, -1):
        if depth == 0:
            break
        if batch.position[0, place] == depth - 1:
            places.append(place)
            depth -= 1
    return places


class CacheTest(absltest.TestCase):
    @budget.cases(10)
    @hypothesis.given(data=st.data())
    def test_cached_logits_equal_those_of_a_full_pass(self, data):
        """A chat that goes on, goes back and starts again, in any order, with one cache."""
        session = generation.Session(_MODEL, parameters())
        history = []
        for _ in range(data.draw(st.integers(1, 5))):
            kept = history[: data.draw(st.integers(0, len(history)))]
            more = data.draw(st.integers(0 if kept else 1, _LENGTH // 5))
            history = kept + np.random.default_rng(data.draw(st.integers(0, 99))).integers(0, 512, more).tolist()
            tokens = np.zeros((1, _LENGTH), np.int32)
            tokens[0, : len(history)] = history
            path = np.arange(_LENGTH, dtype=np.int32)[None], np.full((1, _LENGTH), _LENGTH, np.int32)
            last = hidden(tokens, *path)[0, len(history) - 1]
            expected = np.asarray(decoder.unembedding(_MODEL, parameters())) @ np.asarray(last)
            np.testing.assert_allclose(session.read(history), expected, atol=1e-4)


if __name__ == "__main__":
    absltest.main()
