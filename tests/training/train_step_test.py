"""The update: the same however a batch is cut up, one compilation, one division, and against optax by hand."""

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from absl.testing import absltest, parameterized

from dialog_jax.batching import batches
from dialog_jax.model import decoder
from dialog_jax.training import loss, optimizer, score_steps, sharding, train_step
from dialog_jax.training.config import LossConfig, MeshConfig
from dialog_jax.training.optimizer_config import OptimizerConfig
from dialog_jax.training.trainable import Parameters
from tests.rendering import chat_templates
from tests.training import tiny

_LENGTH = 256
# So large an epsilon keeps Adam's division from turning the rounding of gradients near 0 into steps, on any CPU.
_OPTIMIZER = OptimizerConfig(learning_rate=1e-2, schedule="constant", weight_decay=0.1, clip_norm=0.5, epsilon=1e-2)
# Keeps the gradient of the last step in the optimizer's state and changes nothing.
_RECORD_GRADIENT = optax.GradientTransformation(
    init=lambda parameters: {"gradient": jax.tree.map(jnp.zeros_like, parameters)},
    update=lambda gradient, state, parameters=None: (gradient, {"gradient": gradient}),
)


@functools.cache
def prepared():
    """(model, eight trees of very different sizes)."""
    tokenizer = chat_templates.train_tokenizer("chatml")
    rng = np.random.default_rng(0)
    dialogues = [chat_templates.random_dialogue(rng, turns=1 + seed % 3) for seed in range(8)]
    return tiny.config(len(tokenizer)), tiny.trees(dialogues, tokenizer, max_length=_LENGTH)


def batch_of(micro_batches, rows, length=_LENGTH):
    """All eight trees in [M, B] rows, as evenly as they come."""
    _, trees = prepared()
    count = micro_batches * rows
    assignment = [[tree for tree in range(8) if tree % count == row] for row in range(count)]
    filled = batches.fill_rows(trees, assignment, max_length=length)
    return filled.map(lambda array: array.reshape(micro_batches, rows, -1))


def taught(batch, slots=5):
    """The batch with a random teacher, which depends on a target and the token it stands on alone."""
    vocabulary = prepared()[0].vocab_size
    token = np.zeros((*batch.target.shape, slots), np.int32)
    log_probability = np.full(token.shape, -np.inf, np.float32)
    for place in zip(*np.nonzero(batch.weight), strict=True):
        row = place[:-1]
        before = batch.tokens[row][batch.source[place]]
        rng = np.random.default_rng([before, batch.position[row][batch.source[place]], batch.target[place]])
        if rng.random() < 0.8:
            token[place] = rng.permutation(vocabulary)[:slots]
            log_probability[place] = np.log(rng.dirichlet(np.ones(slots)) * 0.9)
    return batch._replace(teacher_token=token, teacher_log_probability=log_probability)


def start(mesh_config, *, devices=8, compute_dtype=jnp.float32, remat="none", loss_config=loss.PLAIN):
    """(the jitted step on so many devices, the state before the first step)."""
    model, _ = prepared()
    mesh = sharding.make_mesh(mesh_config, jax.devices()[:devices])
    transform = optax.chain(_RECORD_GRADIENT, optimizer.make_optimizer(_OPTIMIZER, 10))
    place = functools.partial(
        jax.tree_util.tree_map_with_path,
        lambda keys, leaf: jax.device_put(
            leaf, sharding.parameter_sharding(mesh, [key.key for key in keys], leaf.shape)
        ),
    )
    state = train_step.initialize_state(mesh, place(tiny.parameters(model)), transform)
    run = train_step.make_train_step(
        model, transform, mesh, compute_dtype=compute_dtype, remat=remat, loss_config=loss_config
    )
    return run, state


@functools.cache
def start_once(mesh_config, devices, remat, loss_config):
    """(the same step for all tests, its first state on the host, the state's shardings)."""
    run, state = start(mesh_config, devices=devices, remat=remat, loss_config=loss_config)
    return run, jax.device_get(state), jax.tree.map(lambda leaf: leaf.sharding, state)


class Updated(NamedTuple):
    """What updates with one batch led to."""

    state: train_step.TrainState
    metrics: list[train_step.StepMetrics]
    """Of each update."""


def updated(mesh_config, batch, *, updates=2, devices=8, remat="none", loss_config=loss.PLAIN):
    """The result of `updates` updates with the same batch."""
    run, state, shardings = start_once(mesh_config, devices, remat, loss_config)
    state, metrics = jax.device_put(state, shardings), []
    for _ in range(updates):
        state, figures = run(state, batch)
        metrics.append(jax.device_get(figures))
    return Updated(state, metrics)


def assert_same_update(test, got, expected):
    """Two results are equal to rounding: figures, the gradient of the last update, and parameters after it."""
    for metrics, want in zip(got.metrics, expected.metrics, strict=True):
        np.testing.assert_allclose(metrics.loss, want.loss, rtol=1e-5)
        np.testing.assert_allclose(metrics.nll, want.nll, rtol=1e-5)
        np.testing.assert_allclose(metrics.gradient_norm, want.gradient_norm, rtol=1e-4)
    states = jax.device_get((got.state, expected.state))
    test.assertLess(tiny.largest_difference(*(state.optimizer_state[0]["gradient"] for state in states)), 1e-4)
    for a, b in zip(*(jax.tree.leaves(state.parameters) for state in states), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-5)  # updates of up to 1e-2


class SplitTest(parameterized.TestCase):
    @classmethod
    def setUpClass(cls):
        super().setUpClass()
        cls.expected = updated(MeshConfig(), batch_of(1, 8), devices=1)

    def check(self, mesh_config, micro_batches, rows, devices, length):
        batch = batch_of(micro_batches, rows, length)
        assert_same_update(self, updated(mesh_config, batch, devices=devices), self.expected)

    @parameterized.named_parameters(
        ("one_row_of_all", MeshConfig(), 1, 1, 1, 2048),
        ("two_micro_batches_of_four", MeshConfig(), 2, 4, 1, _LENGTH),
        ("two_slices", MeshConfig(dcn_data=2, data=1, fsdp=2, tensor=2), 2, 4, 8, _LENGTH),
    )
    def test_split_over_rows_micro_batches_or_devices_gives_the_same_update(self, *split):
        self.check(*split)

    @parameterized.named_parameters(
        ("eight_data", MeshConfig(data=8), 1, 8, 8, _LENGTH),
        ("eight_fsdp", MeshConfig(data=1, fsdp=8), 1, 8, 8, _LENGTH),
        ("four_tensor", MeshConfig(data=2, tensor=4), 2, 4, 8, _LENGTH),
        ("uneven", MeshConfig(dcn_data=2, data=1, fsdp=1, tensor=3), 2, 4, 6, _LENGTH),
    )
    @pytest.mark.full
    def test_every_other_split_gives_the_same_update(self, *split):
        self.check(*split)

    def test_pairs_are_those_that_the_mask_lets_through(self):
        batch = batch_of(1, 8)
        pairs = 0
        for segment, end in zip(batch.segment[0], batch.subtree_end[0], strict=True):
            i, j = np.mgrid[:_LENGTH, :_LENGTH]
            pairs += np.sum((j <= i) & (i < end[j]) & (segment[i] > 0))
        self.assertEqual(self.expected.metrics[0].attention_pairs, pairs)

    def test_plain_loss_is_the_cross_entropy(self):
        self.assertEqual(self.expected.metrics[0].loss, self.expected.metrics[0].nll)

    @parameterized.parameters("attention", "dots", "full")
    @pytest.mark.full
    def test_any_remat_gives_the_same_update(self, remat):
        got = updated(MeshConfig(), batch_of(1, 8), devices=1, remat=remat)
        assert_same_update(self, got, self.expected)

    def test_an_unlucky_split_is_not_a_mean_of_means(self):
        """The rows differ so much in targets that averaging their means would be seen."""
        batch = batch_of(8, 1)
        counts = batch.weight.sum(axis=(1, 2))
        self.assertGreater(counts.max(), 2 * counts.min())


@pytest.mark.full
class ExtrasSplitTest(parameterized.TestCase):
    """The same law with all that LossConfig adds, for which the targets' teachers travel with them."""

    config = LossConfig(z_loss=0.01, label_smoothing=0.1, distillation=0.6)

    @classmethod
    def setUpClass(cls):
        super().setUpClass()
        cls.expected = updated(MeshConfig(), taught(batch_of(1, 8)), devices=1, loss_config=cls.config)

    def check(self, mesh_config, micro_batches, rows, devices, length):
        batch = taught(batch_of(micro_batches, rows, length))
        got = updated(mesh_config, batch, devices=devices, loss_config=self.config)
        assert_same_update(self, got, self.expected)

    def test_split_over_micro_batches_and_devices_gives_the_same_update(self):
        self.check(MeshConfig(data=2, fsdp=2, tensor=2), 2, 4, 8, _LENGTH)

    @parameterized.named_parameters(
        ("one_row_of_all", MeshConfig(), 1, 1, 1, 2048),
        ("eight_micro_batches_of_one", MeshConfig(), 8, 1, 1, _LENGTH),
    )
    @pytest.mark.full
    def test_every_other_split_gives_the_same_update(self, *split):
        self.check(*split)

    def test_extras_and_the_teacher_change_the_update(self):
        plain = updated(MeshConfig(), batch_of(1, 8), devices=1).metrics[0]
        config = LossConfig(z_loss=0.01, label_smoothing=0.1)
        untaught = updated(MeshConfig(), batch_of(1, 8), devices=1, loss_config=config).metrics[0]
        one = self.expected.metrics[0]
        np.testing.assert_allclose([plain.nll, untaught.nll], one.nll, rtol=1e-6)  # before the update: the same model
        for a, b in ((plain, untaught), (untaught, one)):
            self.assertGreater(abs(a.loss - b.loss), 1e-2)
            self.assertGreater(abs(a.gradient_norm - b.gradient_norm), 1e-2)


class UpdateTest(absltest.TestCase):
    def test_update_equals_optax_by_hand(self):
        """AdamW with clipping, written out in NumPy, on the gradient of a loss with all logits."""
        model, _ = prepared()
        batch = batch_of(1, 8)
        parameters = tiny.parameters(model)

        def mean_loss(parameters):
            one = jax.tree.map(lambda array: jnp.asarray(array[0]), batch)
            hidden = decoder.hidden_states(model, parameters, one.tokens, one.position, one.subtree_end)
            logits = jnp.einsum("btd,vd->btv", hidden, parameters["embedding"])
            logs = jax.nn.log_softmax(logits)
            picked = logs[jnp.arange(8)[:, None], one.source, one.target]
            return -jnp.sum(one.weight * picked) / jnp.sum(one.weight)

        gradient = jax.device_get(jax.jit(jax.grad(mean_loss))(parameters))
        norm = np.sqrt(sum((leaf.astype(np.float64) ** 2).sum() for leaf in jax.tree.leaves(gradient)))
        self.assertGreater(norm, _OPTIMIZER.clip_norm)
        after, (metrics,) = updated(MeshConfig(), batch, updates=1, devices=1)
        np.testing.assert_allclose(metrics.gradient_norm, norm, rtol=1e-4)
        decayed = optimizer.decay_mask(parameters)

        def expected(before, gradient, decays):
            g = gradient * (_OPTIMIZER.clip_norm / norm)
            step_of = g / (np.abs(g) + _OPTIMIZER.epsilon)  # after bias correction, the first step of Adam
            return before - _OPTIMIZER.learning_rate * (step_of + decays * _OPTIMIZER.weight_decay * before)

        wanted = jax.tree.map(expected, jax.device_get(parameters), gradient, decayed)
        for got, want in zip(*map(jax.tree.leaves, (after.parameters, wanted)), strict=True):
            np.testing.assert_allclose(got, want, atol=1e-5)

    def test_an_update_has_room_for_the_gradient_and_no_other_copy_of_the_parameters(self):
        small, _ = prepared()
        model = dataclasses.replace(small, width=2048, feed_forward=2048, layers=8)  # beside these, a row is little
        mesh = sharding.make_mesh(MeshConfig(), jax.devices()[:1])
        transform = optimizer.make_optimizer(_OPTIMIZER, 10)
        state = train_step.abstract_state(Parameters(decoder.abstract_parameters(model), {}), mesh, transform)
        run = train_step.make_train_step(model, transform, mesh, compute_dtype=jnp.float32, remat="full")
        size = sum(leaf.size for leaf in jax.tree.leaves(state.parameters)) * 4
        one_row = jax.tree.map(lambda array: array[:1], batch_of(8, 1))
        needed = run.lower(state, one_row).compile().memory_analysis()
        self.assertEqual(needed.alias_size_in_bytes // size, 3)
        self.assertBetween(needed.temp_size_in_bytes / size, 1, 1.5)

    def test_one_compilation_for_all_steps(self):
        run, state = start(MeshConfig(data=2, fsdp=2, tensor=2))
        for _ in range(3):
            state, _ = run(state, batch_of(2, 4))
        self.assertEqual(run._cache_size(), 1)
        self.assertEqual(int(state.step), 3)

    def test_no_transfer_inside_a_step_but_the_batch(self):
        run, state = start(MeshConfig(), devices=1)
        mesh = sharding.make_mesh(MeshConfig(), jax.devices()[:1])
        batch = jax.device_put(batch_of(2, 4), sharding.batch_sharding(mesh))
        state, _ = run(state, batch)
        with jax.transfer_guard("disallow"):
            run(state, batch)

    def test_moments_are_sharded_like_their_parameters_and_float32(self):
        state, _ = updated(MeshConfig(data=1, fsdp=8), batch_of(1, 8))
        adam = next(part for part in jax.tree.leaves(state.optimizer_state, is_leaf=_is_adam) if _is_adam(part))
        for moment in (adam.mu, adam.nu):
            for leaf, parameter in zip(jax.tree.leaves(moment), jax.tree.leaves(state.parameters), strict=True):
                self.assertEqual(leaf.sharding, parameter.sharding)
                self.assertEqual(leaf.dtype, jnp.float32)
        embedding = state.parameters["embedding"]
        self.assertEqual(embedding.addressable_shards[0].data.shape, (embedding.shape[0], embedding.shape[1] // 8))

    @pytest.mark.full
    def test_bfloat16_compute_keeps_float32_masters(self):
        run, state = start(MeshConfig(), devices=1, compute_dtype=jnp.bfloat16)
        state, metrics = run(state, batch_of(1, 8))
        exact = updated(MeshConfig(), batch_of(1, 8), devices=1).metrics[0]
        np.testing.assert_allclose(metrics.loss, exact.loss, rtol=3e-2)
        self.assertTrue(all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(state.parameters)))


class EvaluationTest(absltest.TestCase):
    def test_sums_by_turn_equal_a_loop(self):
        model, _ = prepared()
        mesh = sharding.make_mesh(MeshConfig(), jax.devices()[:1])
        parameters = tiny.parameters(model)
        batch = batch_of(1, 8)
        sums = score_steps.make_evaluation_step(model, mesh, compute_dtype=jnp.float32, turns=2)(parameters, batch)
        one = jax.tree.map(lambda array: jnp.asarray(array[0]), batch)
        hidden = decoder.hidden_states(model, parameters, one.tokens, one.position, one.subtree_end)
        logs = np.asarray(jax.nn.log_softmax(jnp.einsum("btd,vd->btv", hidden, parameters["embedding"])), np.float64)
        nll, targets, correct = np.zeros(4), np.zeros(4, int), np.zeros(4, int)
        for b in range(8):
            for s in np.flatnonzero(one.weight[b] > 0):
                place = min(int(one.turn[b, s]), 2) + 1  # turns from the third on share the last bin
                row = logs[b, one.source[b, s]]
                nll[place] -= row[one.target[b, s]]
                targets[place] += 1
                correct[place] += row.argmax() == one.target[b, s]
        self.assertTrue((targets[1:] > 0).all())
        np.testing.assert_allclose(sums.nll, nll, rtol=1e-4)
        np.testing.assert_array_equal(sums.targets, targets)
        np.testing.assert_array_equal(sums.correct, correct)


def _is_adam(part):
    return isinstance(part, optax.ScaleByAdamState)


if __name__ == "__main__":
    absltest.main()
