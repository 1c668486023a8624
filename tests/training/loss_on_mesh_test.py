import re
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest, parameterized
from jax.sharding import NamedSharding, PartitionSpec

from dialog_jax.training import loss, sharding
from dialog_jax.training.config import LossConfig, MeshConfig
from dialog_jax.training.loss import Targets, Teacher
from dialog_jax.training.sharding import ROW_AXES

_MESHES = {
    "data": MeshConfig(data=8),
    "fsdp": MeshConfig(data=1, fsdp=8),
    "tensor": MeshConfig(data=1, tensor=8),
    "all": MeshConfig(data=2, fsdp=2, tensor=2),
    "hosts": MeshConfig(dcn_data=2, data=2, fsdp=2),
}


def problem(teacher=False, vocabulary=64, width=16):
    """Rows with 1 to 48 targets, so with one to three tiles of 16: (hidden, unembedding, targets)."""
    rng = np.random.default_rng(0)
    rows, length, most = 8, 32, 48
    hidden = rng.standard_normal((rows, length, width)).astype(np.float32)
    unembedding = rng.standard_normal((vocabulary, width)).astype(np.float32)
    source = rng.integers(0, length, (rows, most)).astype(np.int32)
    target = rng.integers(0, vocabulary, (rows, most)).astype(np.int32)
    weight = rng.random((rows, most)).astype(np.float32) + 0.1
    for row, count in enumerate((1, 48, 5, 17, 16, 33, 2, 40)):
        weight[row, count:] = 0
    targets = Targets(source, target, weight)
    if teacher:
        likely = np.argsort(rng.random((rows, most, vocabulary)))[..., :3].astype(np.int32)
        targets = targets._replace(teacher=Teacher(likely, np.log(np.full(likely.shape, 0.3, np.float32))))
    return jax.tree.map(jnp.asarray, (hidden, unembedding, targets))


def numpy_loss(hidden, unembedding, targets):
    """Target by target in float64, without a teacher."""
    assert targets.teacher is None
    source, target, weight = (np.asarray(array) for array in targets[:3])
    hidden, unembedding = np.asarray(hidden, np.float64), np.asarray(unembedding, np.float64)
    total = 0.0
    for row, slot in np.argwhere(weight > 0):
        logits = unembedding @ hidden[row, source[row, slot]]
        peak = logits.max()
        nll = peak + np.log(np.exp(logits - peak).sum()) - logits[target[row, slot]]
        total += weight[row, slot] * nll
    return total


def on_mesh(name, teacher=False, config=loss.PLAIN, **sizes):
    """(the jitted value and gradients of the first two arguments, the arguments) laid out as in training."""
    mesh = sharding.make_mesh(_MESHES[name])
    rows = NamedSharding(mesh, PartitionSpec(ROW_AXES))
    hidden, unembedding, targets = problem(teacher, **sizes)
    places = rows, sharding.parameter_sharding(mesh, ["embedding"], unembedding.shape)

    def value(hidden, unembedding, targets):
        return loss.weighted_loss(hidden, unembedding, targets, config, mesh)

    both = jax.jit(jax.value_and_grad(value, argnums=(0, 1), has_aux=True), out_shardings=(None, places))
    return both, jax.device_put((hidden, unembedding, targets), (*places, rows))


class LossOnMeshTest(parameterized.TestCase):
    def setUp(self):
        super().setUp()
        self.enter_context(mock.patch.object(loss, "TILE", 16))

    @parameterized.parameters(*_MESHES)
    def test_any_mesh_gives_the_value_of_numpy_and_the_gradient_of_one_device(self, mesh):
        both, arrays = on_mesh(mesh)
        (value, nll), gradients = both(*arrays)
        np.testing.assert_allclose(value, numpy_loss(*problem()), rtol=1e-5)
        np.testing.assert_allclose(nll, value, rtol=1e-6)
        alone = jax.grad(lambda *arrays: loss.weighted_loss(*arrays)[0], argnums=(0, 1))
        for got, needed in zip(gradients, alone(*problem()), strict=True):
            np.testing.assert_allclose(got, needed, atol=1e-5)

    @parameterized.product(
        mesh=("fsdp", "all"), sizes=(dict(width=15), dict(vocabulary=63), dict(width=15, vocabulary=63))
    )
    def test_unembedding_that_does_not_divide_evenly_is_right(self, mesh, sizes):
        both, arrays = on_mesh(mesh, **sizes)
        (value, _), gradients = both(*arrays)
        np.testing.assert_allclose(value, numpy_loss(*problem(**sizes)), rtol=1e-5)
        needed = jax.grad(lambda *arrays: loss.weighted_loss(*arrays)[0], argnums=(0, 1))(*problem(**sizes))
        for got, wanted in zip(gradients, needed, strict=True):
            np.testing.assert_allclose(got, wanted, atol=1e-5)

    @parameterized.parameters("fsdp", "all")
    def test_teacher_goes_with_its_rows(self, mesh):
        config = LossConfig(distillation=0.5, z_loss=1e-3, label_smoothing=0.1)
        both, arrays = on_mesh(mesh, teacher=True, config=config)
        (value, _), gradients = both(*arrays)
        alone = jax.value_and_grad(lambda *arrays: loss.weighted_loss(*arrays, config)[0], argnums=(0, 1))
        expected, of_one = alone(*problem(teacher=True))
        np.testing.assert_allclose(value, expected, rtol=1e-5)
        for got, wanted in zip(gradients, of_one, strict=True):
            np.testing.assert_allclose(got, wanted, atol=1e-5)

    @parameterized.parameters(*_MESHES)
    def test_scores_are_those_of_one_device(self, mesh):
        built = sharding.make_mesh(_MESHES[mesh])
        got = jax.jit(lambda *arrays: loss.score_targets(*arrays, mesh=built))(*problem())
        needed = loss.score_targets(*problem())
        np.testing.assert_allclose(got.nll, needed.nll, atol=1e-5)
        np.testing.assert_array_equal(got.correct, needed.correct)

    @parameterized.parameters("data", "fsdp")
    def test_nothing_is_exchanged_within_the_loop(self, mesh):
        both, arrays = on_mesh(mesh)
        text = both.lower(*arrays).compile().as_text()
        bodies = set(re.findall(r"body=%?([\w.\-]+)", text))
        self.assertNotEmpty(bodies)
        exchanged = re.compile(r" (all-reduce|all-gather|reduce-scatter|all-to-all)(-start)?\(")
        self.assertRegex(text, exchanged)  # after it
        for body in re.split(r"\n(?=%|ENTRY)", text):
            if re.match(r"%?([\w.\-]+)", body).group(1) in bodies:
                self.assertNotRegex(body, exchanged)


if __name__ == "__main__":
    absltest.main()
