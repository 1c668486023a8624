"""The update: the same however a batch is cut up, one compilation, one division, and against optax by hand."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl.testing import absltest, parameterized

from dialog_jax.batching import batches
from dialog_jax.model import decoder
from dialog_jax.training import loss, optimizer, sharding, train_step
from dialog_jax.training.config import LossConfig, MeshConfig, OptimizerConfig
from tests.rendering import chat_templates
from tests.training import tiny

_LENGTH = 256
_OPTIMIZER = OptimizerConfig(learning_rate=1e-2, schedule="constant", weight_decay=0.1, clip_norm=0.5)


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


def updated(
    mesh_config, batch, *, updates=2, devices=None, remat="none", loss_config=loss.PLAIN, optimizer_config=_OPTIMIZER
):
    """(parameters, metrics, the jitted step) after `updates` updates with the same batch."""
    model, _ = prepared()
    mesh = sharding.make_mesh(mesh_config, devices)
    transform = optimizer.make_optimizer(optimizer_config, 10)
    place = functools.partial(
        jax.tree_util.tree_map_with_path,
        lambda keys, leaf: jax.device_put(
            leaf, sharding.parameter_sharding(mesh, [key.key for key in keys], leaf.shape)
        ),
    )
    state = train_step.initialize_state(mesh, place(tiny.parameters(model)), transform)
    run = train_step.make_train_step(
        model, transform, mesh, compute_dtype=jnp.float32, remat=remat, loss_config=loss_config
    )
    for _ in range(updates):
        state, metrics = run(state, batch)
    return jax.device_get(state.parameters), jax.device_get(metrics), run, state


class SplitTest(parameterized.TestCase):
    @classmethod
    def setUpClass(cls):
        super().setUpClass()
        cls.parameters, cls.metrics, _, _ = updated(MeshConfig(), batch_of(1, 8), devices=jax.devices()[:1])

    @parameterized.named_parameters(
        ("one_row_of_all", MeshConfig(), 1, 1, 1, 2048),
        ("eight_micro_batches", MeshConfig(), 8, 1, 1, _LENGTH),
        ("two_micro_batches_of_four", MeshConfig(), 2, 4, 1, _LENGTH),
        ("eight_data", MeshConfig(data=8), 1, 8, 8, _LENGTH),
        ("eight_fsdp", MeshConfig(data=1, fsdp=8), 1, 8, 8, _LENGTH),
        ("two_each", MeshConfig(data=2, fsdp=2, tensor=2), 2, 4, 8, _LENGTH),
        ("four_tensor", MeshConfig(data=2, tensor=4), 2, 4, 8, _LENGTH),
        ("two_slices", MeshConfig(dcn_data=2, data=1, fsdp=2, tensor=2), 2, 4, 8, _LENGTH),
        ("uneven", MeshConfig(dcn_data=2, data=1, fsdp=1, tensor=3), 2, 4, 6, _LENGTH),
    )
    def test_any_split_gives_the_same_update(self, mesh_config, micro_batches, rows, devices, length):
        batch = batch_of(micro_batches, rows, length)
        parameters, metrics, _, _ = updated(mesh_config, batch, devices=jax.devices()[:devices])
        np.testing.assert_allclose(metrics.loss, self.metrics.loss, rtol=1e-5)
        np.testing.assert_allclose(metrics.gradient_norm, self.metrics.gradient_norm, rtol=1e-4)
        # Two Adam updates of 1e-2 turn rounding in tiny gradients into visible steps; 1e-4 is 1 % of one.
        gap = jax.tree.map(lambda a, b: float(np.abs(a - b).max()), parameters, self.parameters)
        self.assertLess(max(jax.tree.leaves(gap)), 1e-4)

    def test_pairs_are_those_that_the_mask_lets_through(self):
        batch = batch_of(1, 8)
        pairs = 0
        for segment, end in zip(batch.segment[0], batch.subtree_end[0], strict=True):
            i, j = np.mgrid[:_LENGTH, :_LENGTH]
            pairs += np.sum((j <= i) & (i < end[j]) & (segment[i] > 0))
        self.assertEqual(self.metrics.attention_pairs, pairs)

    def test_plain_loss_is_the_cross_entropy(self):
        self.assertEqual(self.metrics.loss, self.metrics.nll)

    @parameterized.parameters("attention", "dots", "full")
    def test_any_remat_gives_the_same_update(self, remat):
        _, metrics, _, _ = updated(MeshConfig(), batch_of(1, 8), devices=jax.devices()[:1], remat=remat)
        np.testing.assert_allclose(metrics.loss, self.metrics.loss, rtol=1e-5)
        np.testing.assert_allclose(metrics.gradient_norm, self.metrics.gradient_norm, rtol=1e-4)

    def test_an_unlucky_split_is_not_a_mean_of_means(self):
        """The rows differ so much in targets that averaging their means would be seen."""
        batch = batch_of(8, 1)
        counts = batch.weight.sum(axis=(1, 2))
        self.assertGreater(counts.max(), 2 * counts.min())


class ExtrasSplitTest(parameterized.TestCase):
    """The same law with all that LossConfig adds, for which the targets' teachers travel with them."""

    config = LossConfig(z_loss=0.01, label_smoothing=0.1, distillation=0.6)

    @classmethod
    def setUpClass(cls):
        super().setUpClass()
        cls.parameters, cls.metrics, _, _ = updated(
            MeshConfig(), taught(batch_of(1, 8)), devices=jax.devices()[:1], loss_config=cls.config
        )

    @parameterized.named_parameters(
        ("one_row_of_all", MeshConfig(), 1, 1, 1, 2048),
        ("four_micro_batches_of_two", MeshConfig(), 4, 2, 1, _LENGTH),
        ("four_data_two_fsdp", MeshConfig(data=4, fsdp=2), 1, 8, 8, _LENGTH),
        ("two_each", MeshConfig(data=2, fsdp=2, tensor=2), 2, 4, 8, _LENGTH),
    )
    def test_any_split_gives_the_same_update(self, mesh_config, micro_batches, rows, devices, length):
        parameters, metrics, _, _ = updated(
            mesh_config,
            taught(batch_of(micro_batches, rows, length)),
            devices=jax.devices()[:devices],
            loss_config=self.config,
        )
        np.testing.assert_allclose(metrics.loss, self.metrics.loss, rtol=1e-5)
        np.testing.assert_allclose(metrics.nll, self.metrics.nll, rtol=1e-5)
        np.testing.assert_allclose(metrics.gradient_norm, self.metrics.gradient_norm, rtol=1e-4)
        gap = jax.tree.map(lambda a, b: float(np.abs(a - b).max()), parameters, self.parameters)
        self.assertLess(max(jax.tree.leaves(gap)), 1e-4)

    def test_extras_and_the_teacher_change_the_update(self):
        plain = updated(MeshConfig(), batch_of(1, 8), updates=1, devices=jax.devices()[:1])[1]
        config = LossConfig(z_loss=0.01, label_smoothing=0.1)
        untaught = updated(MeshConfig(), batch_of(1, 8), updates=1, devices=jax.devices()[:1], loss_config=config)[1]
        one = updated(
            MeshConfig(), taught(batch_of(1, 8)), updates=1, devices=jax.devices()[:1], loss_config=self.config
        )[1]
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
        config = dataclasses.replace(_OPTIMIZER, epsilon=1e-3)  # so large that a wrong factor of clipping shows
        one = jax.devices()[:1]
        after, metrics, _, _ = updated(MeshConfig(), batch, updates=1, devices=one, optimizer_config=config)
        np.testing.assert_allclose(metrics.gradient_norm, norm, rtol=1e-4)
        decayed = optimizer.decay_mask(parameters)

        def expected(before, gradient, decays):
            g = gradient * (_OPTIMIZER.clip_norm / norm)
            step_of = g / (np.abs(g) + config.epsilon)  # after bias correction, the first step of Adam
            return before - _OPTIMIZER.learning_rate * (step_of + decays * _OPTIMIZER.weight_decay * before)

        wanted = jax.tree.map(expected, jax.device_get(parameters), gradient, decayed)
        solid = jax.tree.map(lambda leaf: np.abs(leaf) > 1e-5, gradient)  # where rounding does not decide the sign
        for got, want, where in zip(*map(jax.tree.leaves, (after, wanted, solid)), strict=True):
            np.testing.assert_allclose(got[where], want[where], atol=2e-5)

    def test_an_update_has_room_for_the_gradient_and_no_other_copy_of_the_parameters(self):
        small, _ = prepared()
        model = dataclasses.replace(small, width=2048, feed_forward=2048, layers=8)  # beside these, a row is little
        mesh = sharding.make_mesh(MeshConfig(), jax.devices()[:1])
        transform = optimizer.make_optimizer(_OPTIMIZER, 10)
        state = train_step.abstract_state(model, mesh, transform)
        run = train_step.make_train_step(model, transform, mesh, compute_dtype=jnp.float32, remat="full")
        size = sum(leaf.size for leaf in jax.tree.leaves(state.parameters)) * 4
        one_row = jax.tree.map(lambda array: array[:1], batch_of(8, 1))
        needed = run.lower(state, one_row).compile().memory_analysis()
        self.assertEqual(needed.alias_size_in_bytes // size, 3)
        self.assertBetween(needed.temp_size_in_bytes / size, 1, 1.5)

    def test_one_compilation_for_all_steps(self):
        _, _, run, state = updated(MeshConfig(data=2, fsdp=2, tensor=2), batch_of(2, 4), updates=3)
        self.assertEqual(run._cache_size(), 1)
        self.assertEqual(int(state.step), 3)

    def test_no_transfer_inside_a_step_but_the_batch(self):
        model, _ = prepared()
        mesh = sharding.make_mesh(MeshConfig(), jax.devices()[:1])
        transform = optimizer.make_optimizer(_OPTIMIZER, 10)
        state = train_step.initialize_state(mesh, tiny.parameters(model), transform)
        run = train_step.make_train_step(model, transform, mesh, compute_dtype=jnp.float32, remat="none")
        batch = jax.device_put(batch_of(2, 4), sharding.batch_sharding(mesh))
        state, _ = run(state, batch)
        with jax.transfer_guard("disallow"):
            run(state, batch)

    def test_moments_are_sharded_like_their_parameters_and_float32(self):
        _, _, _, state = updated(MeshConfig(data=1, fsdp=8), batch_of(1, 8))
        adam = next(part for part in jax.tree.leaves(state.optimizer_state, is_leaf=_is_adam) if _is_adam(part))
        for moment in (adam.mu, adam.nu):
            for leaf, parameter in zip(jax.tree.leaves(moment), jax.tree.leaves(state.parameters), strict=True):
                self.assertEqual(leaf.sharding, parameter.sharding)
                self.assertEqual(leaf.dtype, jnp.float32)
        embedding = state.parameters["embedding"]
        self.assertEqual(embedding.addressable_shards[0].data.shape, (embedding.shape[0], embedding.shape[1] // 8))

    def test_bfloat16_compute_keeps_float32_masters(self):
        model, _ = prepared()
        mesh = sharding.make_mesh(MeshConfig(), jax.devices()[:1])
        transform = optimizer.make_optimizer(_OPTIMIZER, 10)
        state = train_step.initialize_state(mesh, tiny.parameters(model), transform)
        run = train_step.make_train_step(model, transform, mesh, compute_dtype=jnp.bfloat16, remat="none")
        state, metrics = run(state, batch_of(1, 8))
        exact = updated(MeshConfig(), batch_of(1, 8), updates=1, devices=jax.devices()[:1])[1]
        np.testing.assert_allclose(metrics.loss, exact.loss, rtol=3e-2)
        self.assertTrue(all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(state.parameters)))


class EvaluationTest(absltest.TestCase):
    def test_sums_by_turn_equal_a_loop(self):
        model, _ = prepared()
        mesh = sharding.make_mesh(MeshConfig(), jax.devices()[:1])
        parameters = tiny.parameters(model)
        batch = batch_of(1, 8)
        sums = train_step.make_evaluation_step(model, mesh, compute_dtype=jnp.float32, turns=2)(parameters, batch)
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
