"""Windows, caps and sinks: what some families add to attention, on random forests, against loops in float64."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl.testing import absltest, parameterized

from dialog_jax.attention import blockwise, cached, dispatch
from dialog_jax.training import sharding
from dialog_jax.training.config import MeshConfig
from tests.attention import oracle
from tests.model import forests


def attention(q, k, v, rows, *, window=None, cap=None, sinks=None):
    """The attention output in float64: token by token over the last `window` of its lineage."""
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    output, group = np.zeros(q.shape), q.shape[2] // k.shape[2]
    for b, parents in enumerate(rows):
        for i in range(q.shape[1]):
            seen = forests.lineage(parents, i)
            seen = seen if window is None else seen[-window:]
            for n in range(q.shape[2]):
                score = k[b, seen, n // group] @ q[b, i, n] / np.sqrt(q.shape[3])
                if cap is not None:
                    score = cap * np.tanh(score / cap)
                weight = np.exp(score)
                total = weight.sum() + (0 if sinks is None else np.exp(np.float64(sinks[n])))
                output[b, i, n] = weight @ v[b, seen, n // group] / total
    return output


_ADDITIONS = (
    dict(window=1),
    dict(window=5),
    dict(window=40),
    dict(window=1000),
    dict(cap=0.7),
    dict(sinks=True),
    dict(window=12, cap=1.5, sinks=True),
)


def _inputs(rng, length, rows, *, heads=4, kv_heads=2, head_dim=8):
    q, k, v, direction = (
        rng.standard_normal((rows, length, size, head_dim)).astype(np.float32)
        for size in (heads, kv_heads, kv_heads, heads)
    )
    return 1.5 * q, k, v, direction


class AdditionsTest(parameterized.TestCase):
    @parameterized.product(additions=_ADDITIONS, branch=(0.0, 0.15))
    @pytest.mark.quick_every(3)
    def test_output_and_gradients_are_those_of_loops_in_float64(self, additions, branch):
        rng = np.random.default_rng(3)
        rows = [forests.random_parents(rng, 90, root=0.02, branch=branch) for _ in range(2)]
        q, k, v, direction = _inputs(rng, 90, 2)
        window, cap = additions.get("window"), additions.get("cap")
        sinks = rng.standard_normal(4).astype(np.float32) if "sinks" in additions else None
        mask = oracle.make_mask(rows, window)

        @jax.jit
        def run(q, k, v, sinks):
            output = blockwise.attend(q, k, v, mask, sinks, cap=cap, block=16)
            return jnp.sum(output * direction), output

        gradients, output = jax.grad(run, argnums=(0, 1, 2) if sinks is None else (0, 1, 2, 3), has_aux=True)(
            q, k, v, sinks
        )
        needed = functools.partial(attention, rows=rows, window=window, cap=cap)
        np.testing.assert_allclose(output, needed(q, k, v, sinks=sinks), atol=3e-6)
        arrays = [q, k, v] if sinks is None else [q, k, v, sinks]
        for index, gradient in enumerate(gradients):
            step = rng.standard_normal(arrays[index].shape)
            values = []
            for size in (1e-5, -1e-5):
                moved = [np.asarray(x, np.float64) for x in arrays]
                moved[index] = moved[index] + size * step
                values.append(np.sum(needed(*moved[:3], sinks=moved[3] if sinks is not None else None) * direction))
            slope = (values[0] - values[1]) / 2e-5
            self.assertAlmostEqual(np.sum(np.asarray(gradient, np.float64) * step), slope, delta=2e-4)

    @parameterized.parameters(*_ADDITIONS)
    def test_cached_attention_gives_the_same_for_the_last_tokens(self, **additions):
        rng = np.random.default_rng(4)
        q, k, v, _ = _inputs(rng, 60, 1)
        window, cap = additions.get("window"), additions.get("cap")
        sinks = rng.standard_normal(4).astype(np.float32) if "sinks" in additions else None
        distance = np.arange(50, 60)[:, None] - np.arange(60)[None]
        visible = (distance >= 0) & (distance < (window or 60))
        got = jax.jit(functools.partial(cached.attend, cap=cap))(q[:, 50:], k, v, visible[None], sinks)
        needed = attention(q, k, v, [list(range(-1, 59))], window=window, cap=cap, sinks=sinks)
        np.testing.assert_allclose(got, needed[:, 50:], atol=3e-6)

    def test_window_may_differ_from_layer_to_layer_of_one_compiled_program(self):
        rng = np.random.default_rng(5)
        rows = [forests.random_parents(rng, 90, root=0.02)]
        q, k, v, _ = _inputs(rng, 90, 1)
        run = jax.jit(lambda q, k, v, window: blockwise.attend(q, k, v, oracle.make_mask(rows, window), block=16))
        for window in (3, 30, np.iinfo(np.int32).max):
            needed = attention(q, k, v, rows, window=min(window, 1000))
            np.testing.assert_allclose(run(q, k, v, jnp.int32(window)), needed, atol=3e-6)

    @parameterized.parameters(
        (256, None, 36), (256, 16, 15), (256, 33, 15), (256, 34, 21), (256, 1, 8), (256, 1000, 36)
    )
    def test_pairs_of_blocks_outside_the_window_are_not_visited(self, length, window, visited):
        """Of 8 blocks of 32: a window of up to 33 needs each block and the one before, one of 34 two before."""
        mask = oracle.make_mask([list(range(-1, length - 1))], window)
        self.assertEqual(int(blockwise._list_pairs(mask, 32).total), visited)

    def test_devices_of_a_mesh_give_the_output_and_gradients_of_one(self):
        rng = np.random.default_rng(6)
        rows = [forests.random_parents(rng, 64, root=0.03, branch=0.1) for _ in range(4)]
        q, k, v, direction = _inputs(rng, 64, 4)
        sinks, mask = rng.standard_normal(4).astype(np.float32), oracle.make_mask(rows, 7)
        mesh = sharding.make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))

        def run(attend):
            def total(q, k, v, sinks):
                return jnp.sum(attend(q, k, v, mask, sinks, cap=2.0) * direction)

            return jax.jit(jax.value_and_grad(total, argnums=(0, 1, 2, 3)))(q, k, v, sinks)

        one, many = run(blockwise.attend), run(dispatch.shard_attention(blockwise.attend, mesh))
        jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5), many, one)


if __name__ == "__main__":
    absltest.main()
