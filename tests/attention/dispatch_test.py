import functools
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest, parameterized

from dialog_jax.attention import blockwise, dispatch, pallas_gpu, splash
from dialog_jax.attention.pallas_gpu import Blocks, Tiling
from dialog_jax.training import sharding
from dialog_jax.training.config import MeshConfig
from tests.attention import oracle

_SMALL = Blocks(32, 32, 4, 1)
_SHAPE = dict(heads=4, kv_heads=2, head_dim=16, length=64, dtype=jnp.float32)


def _interpreted(q, k, v, subtree_end):
    blocks = Tiling(_SMALL, _SMALL, _SMALL)
    return pallas_gpu.attend(q, k, v, subtree_end, blocks=blocks, interpret=True)


def _chosen(*candidates, branching=True, for_trees=True, **changes):
    """What is chosen on one CPU if these, each a name and a function, were kernels for CPUs."""
    mesh = sharding.make_mesh(MeshConfig(), jax.devices()[:1])
    listed = tuple(dispatch._Candidate(name, "cpu", for_trees, lambda f=attend: f) for name, attend in candidates)
    with mock.patch.object(dispatch, "_CANDIDATES", listed):
        return dispatch.select_kernel(mesh, branching=branching, **(_SHAPE | changes))


def _value_and_gradients(attend, q, k, v, subtree_end, d_read):
    read, pull = jax.vjp(lambda q, k, v: attend(q, k, v, subtree_end), q, k, v)
    return read, *pull(d_read)


class ChooseTest(parameterized.TestCase):
    def test_cpus_take_blockwise_untried(self):
        mesh = sharding.make_mesh(MeshConfig())
        with mock.patch.object(dispatch, "probe") as probe:
            choice = dispatch.select_kernel(mesh, branching=True, **_SHAPE)
        probe.assert_not_called()
        self.assertEqual((choice.name, choice.reason), ("blockwise", "there is no kernel for cpu"))

    @parameterized.parameters(True, False)
    def test_first_candidate_that_is_right_is_taken(self, branching):
        choice = _chosen(("right", _interpreted), ("second", blockwise.attend), branching=branching)
        self.assertEqual(choice.name, "right")
        self.assertIs(choice.attend, _interpreted)
        self.assertRegex(choice.reason, r"^equal to float64 on cpu to \d\.\de-0[67]$")

    def test_causal_attention_over_the_whole_row_is_passed_over(self):
        def blind(q, k, v, subtree_end):
            return blockwise.attend(q, k, v, jnp.full_like(subtree_end, q.shape[1]))

        choice = _chosen(("blind", blind), ("right", _interpreted))
        self.assertEqual(choice.name, "right")
        self.assertRegex(choice.reason, r"; blind: off by \S+ \(read\), \S+ \(to queries\), .* \(to values\)$")

    def test_attention_that_takes_trees_for_paths_is_passed_over_for_trees_only(self):
        def paths(q, k, v, subtree_end):  # all that stands in between belongs to the token's own path
            ends = jax.lax.cummax(subtree_end, axis=1)
            return blockwise.attend(q, k, v, ends)

        self.assertEqual(_chosen(("paths", paths), branching=False).name, "paths")
        self.assertEqual(_chosen(("paths", paths), branching=True).name, "blockwise")

    @parameterized.parameters("gradient", "nan")
    def test_right_value_with_wrong_gradient_or_nan_is_passed_over(self, kind):
        def wrong(q, k, v, subtree_end):
            if kind == "nan":
                return blockwise.attend(q, k, v, subtree_end).at[0, 3].set(jnp.nan)
            return blockwise.attend(q, jax.lax.stop_gradient(k), v, subtree_end)

        choice = _chosen(("wrong", wrong))
        self.assertEqual(choice.name, "blockwise")
        self.assertIn("1.0e+00 (to keys)" if kind == "gradient" else "nan (read)", choice.reason)

    def test_products_in_bfloat16_are_passed_over_for_float32(self):
        def coarse(q, k, v, subtree_end):
            q, k, v = (x.astype(jnp.bfloat16) for x in (q, k, v))
            return blockwise.attend(q, k, v, subtree_end).astype(jnp.float32)

        self.assertEqual(_chosen(("coarse", coarse)).name, "blockwise")
        self.assertEqual(_chosen(("coarse", blockwise.attend), dtype=jnp.bfloat16).name, "coarse")

    @parameterized.parameters(
        jax.errors.JaxRuntimeError("INTERNAL: no\nsecond line"), NotImplementedError("no"), ImportError("no")
    )
    def test_candidate_that_fails_is_passed_over_with_its_first_line(self, error):
        def failing(q, k, v, subtree_end):
            raise error

        choice = _chosen(("failing", failing))
        self.assertEqual(choice.name, "blockwise")
        self.assertEqual(choice.reason, f"failing: {type(error).__name__}: {str(error).splitlines()[0]}")

    def test_fault_of_another_kind_is_not_hidden(self):
        def broken(q, k, v, subtree_end):
            raise ZeroDivisionError

        with self.assertRaises(ZeroDivisionError):
            _chosen(("broken", broken))

    @parameterized.parameters(100, 511, 512, 700, 1024, 2048, 100_000)
    def test_kernel_is_tried_with_the_blocks_of_the_run(self, length):
        with mock.patch.object(dispatch, "probe", return_value={"read": 0.0}) as probe:
            self.assertEqual(_chosen(("splash", splash.attend), length=length, branching=False).name, "splash")
        _, _, tried, *_ = probe.call_args.args
        self.assertEqual(splash.block_of(tried), splash.block_of(length))
        self.assertGreaterEqual(tried, min(length, 2 * splash.LARGEST_BLOCK + 1))  # three blocks: one can be skipped

    def test_candidate_for_paths_is_not_tried_on_trees(self):
        choice = _chosen(("paths", _interpreted), for_trees=False)
        self.assertEqual((choice.name, choice.reason), ("blockwise", "paths is for rows whose trees are all paths"))
        self.assertEqual(_chosen(("paths", _interpreted), for_trees=False, branching=False).name, "paths")

    def test_kernel_without_its_device_is_passed_over(self):
        mesh = sharding.make_mesh(MeshConfig(), jax.devices()[:1])
        self.assertEqual([candidate.name for candidate in dispatch._CANDIDATES], ["pallas_gpu", "splash"])
        for candidate in dispatch._CANDIDATES:
            attend, wrong = dispatch._tried(candidate, mesh, 4, 2, 64, 64, jnp.bfloat16, False)
            self.assertIsNone(attend)
            self.assertIn("Only interpret mode is supported on CPU", wrong)


class ReferenceTest(absltest.TestCase):
    def test_reference_equals_the_oracle_over_lineages(self):
        rng = np.random.default_rng(0)
        rows = oracle.rows_of(rng, 50, branching=True, padding=9)
        q, k, v, subtree_end, d_read = oracle.inputs(rng, rows, heads=4, kv_heads=2, head_dim=8)
        needed = oracle.attention(q, k, v, rows, d_read)
        for got, exact in zip(dispatch.reference(q, k, v, subtree_end, d_read), needed, strict=True):
            np.testing.assert_allclose(got, exact, atol=1e-12)


class ShardedTest(parameterized.TestCase):
    @parameterized.product(
        mesh=(dict(data=2, fsdp=2, tensor=2), dict(dcn_data=2, data=1, fsdp=1, tensor=4), dict(data=8)),
        name=("blockwise", "pallas"),
    )
    def test_value_and_gradients_equal_those_of_one_device(self, mesh, name):
        attend = {"blockwise": blockwise.attend, "pallas": _interpreted}[name]
        rng = np.random.default_rng(0)
        rows = [row for _ in range(4) for row in oracle.rows_of(rng, 64, branching=True, padding=10)]
        given = oracle.inputs(rng, rows, heads=4, kv_heads=2, head_dim=16)
        mesh = sharding.make_mesh(MeshConfig(**mesh))
        laid_out = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(sharding.ROW_AXES))
        run = jax.jit(functools.partial(_value_and_gradients, dispatch.sharded(attend, mesh)))
        for got, exact in zip(
            run(*jax.device_put(given, laid_out)), oracle.attention(*given[:3], rows, given[4]), strict=True
        ):
            np.testing.assert_allclose(got, exact, atol=3e-6)

    def test_each_device_attends_with_its_own_rows_and_heads(self):
        seen = []

        def attend(q, k, v, subtree_end):
            seen.append((q.shape, k.shape, subtree_end.shape))
            return q

        mesh = sharding.make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
        for heads, kv_heads in ((4, 2), (9, 3)):
            q, k = jnp.zeros((4, 8, heads, 2)), jnp.zeros((4, 8, kv_heads, 2))
            jax.eval_shape(dispatch.sharded(attend, mesh), q, k, k, jnp.ones((4, 8), jnp.int32))
        self.assertEqual(seen, [((1, 8, 2, 2), (1, 8, 1, 2), (1, 8)), ((1, 8, 9, 2), (1, 8, 3, 2), (1, 8))])

    def test_one_device_is_left_alone(self):
        mesh = sharding.make_mesh(MeshConfig(), jax.devices()[:1])
        self.assertIs(dispatch.sharded(_interpreted, mesh), _interpreted)


if __name__ == "__main__":
    absltest.main()
