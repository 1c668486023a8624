import functools
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest, parameterized

from dialog_jax.attention import blockwise, dispatch, pallas_gpu, probing, splash
from dialog_jax.attention.mask import Mask
from dialog_jax.attention.pallas_gpu import Tiling
from dialog_jax.attention.pallas_gpu_kernels import Blocks
from dialog_jax.errors import UserError
from dialog_jax.training import sharding
from dialog_jax.training.config import MeshConfig
from tests.attention import oracle

_SMALL = Blocks(32, 32, 4, 1)
_SHAPE = dict(heads=4, sizes=[(2, 16)], length=64, dtype=jnp.float32)


def _interpreted(q, k, v, mask, sinks=None, *, cap=None):
    blocks = Tiling(_SMALL, _SMALL, _SMALL)
    return pallas_gpu.attend(q, k, v, mask, sinks, cap=cap, blocks=blocks, interpret=True)


def _select(*candidates, branching=True, for_trees=True, name="auto", **changes):
    """The kernel selected on one CPU if `candidates`, pairs of a name and a function, were kernels for CPUs."""
    mesh = sharding.make_mesh(MeshConfig(), jax.devices()[:1])
    for_cpu = tuple(dispatch._Candidate(label, "cpu", for_trees, lambda f=attend: f) for label, attend in candidates)
    with mock.patch.object(dispatch, "_CANDIDATES", for_cpu):
        return dispatch.select_kernel(mesh, branching=branching, name=name, **(_SHAPE | changes))


def _value_and_gradients(attend, q, k, v, subtree_end, d_output):
    output, pull = jax.vjp(lambda q, k, v: attend(q, k, v, Mask(subtree_end)), q, k, v)
    return output, *pull(d_output)


class SelectKernelTest(parameterized.TestCase):
    def test_auto_on_cpu_is_blockwise_without_a_probe(self):
        mesh = sharding.make_mesh(MeshConfig())
        with mock.patch.object(probing, "probe") as probe:
            kernel = dispatch.select_kernel(mesh, branching=True, **_SHAPE)
        probe.assert_not_called()
        self.assertEqual((kernel.name, kernel.reason), ("blockwise", "there is no other kernel for cpu"))

    def test_blockwise_by_name_is_taken_without_a_probe(self):
        with mock.patch.object(probing, "probe") as probe:
            kernel = _select(("right", _interpreted), name="blockwise")
        probe.assert_not_called()
        self.assertEqual((kernel.name, kernel.reason), ("blockwise", "as configured"))
        self.assertIs(kernel.attend, blockwise.attend)

    @parameterized.product(branching=(True, False), name=("auto", "right"))
    def test_first_supported_candidate_is_selected(self, branching, name):
        kernel = _select(("right", _interpreted), ("second", blockwise.attend), branching=branching, name=name)
        self.assertEqual(kernel.name, "right")
        self.assertIs(kernel.attend, _interpreted)
        self.assertRegex(kernel.reason, r"^equal to float64 on cpu to \d\.\de-0[67]$")

    def test_named_candidate_is_selected_though_another_comes_first(self):
        kernel = _select(("first", _interpreted), ("second", blockwise.attend), name="second")
        self.assertEqual(kernel.name, "second")

    def test_kernel_is_probed_with_what_the_model_adds(self):
        additions = ("windows", "caps", "sinks")
        kernel = _select(("right", _interpreted), additions=additions)
        self.assertEqual(kernel.name, "right")
        device = jax.devices()[0]
        errors = probing.probe(blockwise.attend, device, 64, 4, 2, 16, jnp.float32, True, additions)
        self.assertEqual(list(errors), ["output", "dq", "dk", "dv", "d_sinks"])
        self.assertLess(max(errors.values()), 2e-6)

    def test_splash_is_for_windows_in_rows_up_to_its_limit(self):
        candidate = next(candidate for candidate in dispatch._CANDIDATES if candidate.name == "splash")
        limit = splash.LONGEST_WINDOWED_ROW
        self.assertEqual(candidate.windowed_length, limit)
        with (
            mock.patch.object(dispatch, "_CANDIDATES", (candidate._replace(platform="cpu"),)),
            mock.patch.object(probing, "probe", return_value={"output": 0.0}),
        ):
            mesh = sharding.make_mesh(MeshConfig(), jax.devices()[:1])
            for length, additions, needed in (
                (limit, ("windows",), "splash"),
                (limit + 1, ("windows",), "blockwise"),
                (limit + 1, ("caps", "sinks"), "splash"),
            ):
                shape = _SHAPE | {"length": length}
                kernel = dispatch.select_kernel(mesh, branching=False, additions=additions, **shape)
                self.assertEqual(kernel.name, needed)
                if needed == "blockwise":
                    self.assertEqual(kernel.reason, "splash has windows for rows of up to 65536 tokens, not 65537")
            with self.assertRaisesRegex(UserError, "attention=splash does not work here: splash has windows for rows"):
                shape = _SHAPE | {"length": limit + 1}
                dispatch.select_kernel(mesh, branching=False, additions=("windows",), name="splash", **shape)

    def test_kernel_is_probed_on_trees_that_share_a_root_only_if_it_supports_them(self):
        for for_trees in (True, False):
            with mock.patch.object(probing, "probe", return_value={"output": 0.0}) as probe:
                kernel = _select(("k", _interpreted), branching=False, shares_root=True, for_trees=for_trees)
            self.assertEqual((kernel.name, kernel.branching), ("k", for_trees))
            self.assertEqual(probe.call_args.args[-1], for_trees)
        self.assertTrue(_select(("paths", _interpreted), branching=True, for_trees=False).branching)  # blockwise

    @parameterized.parameters(100, 511, 512, 700, 1024, 2048, 100_000)
    def test_probe_uses_the_block_length_of_the_run(self, length):
        with mock.patch.object(probing, "probe", return_value={"output": 0.0}) as probe:
            self.assertEqual(_select(("splash", splash.attend), length=length).name, "splash")
        _, _, probe_length, *_ = probe.call_args.args
        self.assertEqual(splash.block_length(probe_length), splash.block_length(length))
        # Three blocks, so that one can be skipped.
        self.assertGreaterEqual(probe_length, min(length, 2 * splash.LARGEST_BLOCK + 1))


class WrongNumbersTest(parameterized.TestCase):
    """A kernel that runs and is wrong is an error, named or not: never a slower path."""

    def assert_wrong(self, attend, *patterns, **changes):
        for name in ("auto", "wrong"):
            with self.assertRaisesRegex(UserError, "kernel wrong computes wrong numbers on cpu: off by") as caught:
                _select(("wrong", attend), ("right", _interpreted), name=name, **changes)
            for pattern in (*patterns, "Set attention=blockwise, and report this"):
                self.assertRegex(str(caught.exception), pattern)

    def test_causal_attention_over_the_whole_row_is_an_error(self):
        def blind(q, k, v, mask):
            return blockwise.attend(q, k, v, Mask(jnp.full_like(mask.subtree_end, q.shape[1])))

        self.assert_wrong(blind, r"\S+ \(output\), \S+ \(dq\), \S+ \(dk\), \S+ \(dv\)")

    def test_attention_that_takes_trees_for_paths_is_an_error_for_trees_only(self):
        def paths(q, k, v, mask):  # every token in between belongs to the token's own path
            return blockwise.attend(q, k, v, Mask(jax.lax.cummax(mask.subtree_end, axis=1)))

        self.assertEqual(_select(("paths", paths), branching=False).name, "paths")
        self.assert_wrong(paths, branching=True)

    @parameterized.parameters("windows", "caps", "sinks")
    def test_attention_without_what_the_model_adds_is_an_error(self, addition):
        def without(q, k, v, mask, sinks=None, *, cap=None):
            if addition == "windows":
                mask = Mask(mask.subtree_end)
            return blockwise.attend(
                q, k, v, mask, None if addition == "sinks" else sinks, cap=None if addition == "caps" else cap
            )

        self.assert_wrong(without, r"\S+ \(output\)", additions=(addition,))

    @parameterized.parameters("gradient", "nan")
    def test_right_output_with_wrong_gradient_or_nan_is_an_error(self, kind):
        def wrong(q, k, v, mask):
            if kind == "nan":
                return blockwise.attend(q, k, v, mask).at[0, 3].set(jnp.nan)
            return blockwise.attend(q, jax.lax.stop_gradient(k), v, mask)

        self.assert_wrong(wrong, r"1\.0e\+00 \(dk\)" if kind == "gradient" else r"nan \(output\)")

    def test_bfloat16_products_are_an_error_for_float32_only(self):
        def coarse(q, k, v, mask):
            q, k, v = (x.astype(jnp.bfloat16) for x in (q, k, v))
            return blockwise.attend(q, k, v, mask).astype(jnp.float32)

        self.assert_wrong(coarse)
        self.assertEqual(_select(("coarse", blockwise.attend), dtype=jnp.bfloat16).name, "coarse")


_OUR_OWN_MODULE = ImportError("no module", name="dialog_jax.attention.gone")
_UNSUPPORTED = (
    NotImplementedError("Only 2-argument concatenate is supported."),
    ImportError("cannot import name 'triton'", name="jax.experimental.pallas"),
    ModuleNotFoundError("No module named 'jax.experimental.pallas.triton'", name="jax.experimental.pallas.triton"),
    ValueError("Cannot lower pallas_call on platform: gpu. To use Pallas on GPU, install jaxlib GPU."),
    jax.errors.JaxRuntimeError("UNIMPLEMENTED: no such custom call\nsecond line"),
    jax.errors.JaxRuntimeError("FAILED_PRECONDITION: Triton support is only enabled for Ampere GPUs and up"),
    jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Shared memory size limit exceeded: requested 110592"),
    jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Ran out of memory in memory space vmem. Used 20.0M of 16.0M."),
)
_BUGS = (
    TypeError("attend() takes 3 arguments"),
    ValueError("shapes (2, 3) and (4, 5) do not match"),
    AttributeError("module has no attribute 'CompilerParams'"),
    ZeroDivisionError("division by zero"),
    _OUR_OWN_MODULE,
)
_RUNTIME_ERRORS = (
    jax.errors.JaxRuntimeError("INTERNAL: ptxas exited with non-zero error code 139"),
    jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory while trying to allocate 2306867200 bytes."),
)


def _raiser(error):
    def attend(q, k, v, mask):
        raise error

    return attend


class UnsupportedTest(parameterized.TestCase):
    @parameterized.parameters(*_UNSUPPORTED)
    def test_unsupported_candidate_is_passed_over_under_auto_with_the_reason(self, error):
        first_line = f"unsupported: {type(error).__name__}: {str(error).splitlines()[0]}"
        kernel = _select(("unsupported", _raiser(error)))
        self.assertEqual((kernel.name, kernel.reason), ("blockwise", first_line))
        kernel = _select(("unsupported", _raiser(error)), ("right", _interpreted))
        self.assertEqual(kernel.name, "right")
        self.assertEndsWith(kernel.reason, f"; {first_line}")

    @parameterized.parameters(*_UNSUPPORTED, *_RUNTIME_ERRORS)
    def test_named_kernel_that_cannot_run_is_a_user_error_with_the_reason(self, error):
        with self.assertRaises(UserError) as caught:
            _select(("asked", _raiser(error)), ("right", _interpreted), name="asked")
        message = str(caught.exception)
        self.assertStartsWith(message, "attention=asked does not work here: ")
        self.assertIn(str(error).splitlines()[0], message)
        self.assertEndsWith(message, "Set attention=auto or attention=blockwise.")

    @parameterized.product(error=_BUGS, name=("auto", "broken"))
    def test_bug_in_a_kernel_keeps_its_exception(self, error, name):
        with self.assertRaises(type(error)) as caught:
            _select(("broken", _raiser(error)), ("right", _interpreted), name=name)
        self.assertIs(caught.exception, error)

    @parameterized.parameters(*_RUNTIME_ERRORS)
    def test_other_runtime_error_under_auto_is_raised(self, error):
        with self.assertRaises(jax.errors.JaxRuntimeError) as caught:
            _select(("broken", _raiser(error)), ("right", _interpreted))
        self.assertIs(caught.exception, error)

    def test_candidate_for_paths_is_passed_over_for_trees(self):
        kernel = _select(("paths", _interpreted), for_trees=False)
        self.assertEqual((kernel.name, kernel.reason), ("blockwise", "paths is for rows whose trees are all paths"))
        self.assertEqual(_select(("paths", _interpreted), for_trees=False, branching=False).name, "paths")
        with self.assertRaisesRegex(UserError, "attention=paths does not work here: paths is for rows whose trees"):
            _select(("paths", _interpreted), for_trees=False, name="paths")

    @parameterized.parameters("pallas", "splash")
    def test_kernel_named_on_another_platform_is_a_user_error(self, name):
        mesh = sharding.make_mesh(MeshConfig(), jax.devices()[:1])
        with self.assertRaisesRegex(UserError, f"attention={name} does not work here: {name} is a kernel for .*pu"):
            dispatch.select_kernel(mesh, branching=False, name=name, **_SHAPE)

    def test_kernel_must_support_each_kind_of_attention_of_the_model(self):
        def attend(q, *arrays, **settings):
            return (_interpreted if q.shape[3] == 16 else pallas_gpu.attend)(q, *arrays, **settings)

        self.assertEqual(_select(("right", attend), sizes=[(2, 16)]).name, "right")
        kernel = _select(("right", attend), sizes=[(2, 16), (1, 80)])
        self.assertEqual(kernel.name, "blockwise")
        self.assertIn("head_dim is 80", kernel.reason)

    def test_head_dimension_without_blocks_is_unsupported(self):
        kernel = _select(("pallas", pallas_gpu.attend), sizes=[(2, 80)])
        self.assertRegex(kernel.reason, r"^pallas: NotImplementedError: head_dim is 80; the kernels have blocks for")


class ReferenceTest(parameterized.TestCase):
    @parameterized.parameters((None, None, False), (7, 1.5, True))
    def test_reference_equals_the_oracle_over_lineages(self, window, cap, has_sinks):
        rng = np.random.default_rng(0)
        rows = oracle.rows_of(rng, 50, branching=True, padding=9)
        q, k, v, _, d_output = oracle.inputs(rng, rows, heads=4, kv_heads=2, head_dim=8)
        sinks = rng.standard_normal(4) if has_sinks else None
        needed = oracle.attention(q, k, v, rows, d_output, window=window, cap=cap, sinks=sinks)
        reference = probing.reference(q, k, v, sinks, oracle.make_mask(rows, window), d_output, cap)
        for got, exact in zip(reference.values(), needed, strict=True):
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
        run = jax.jit(functools.partial(_value_and_gradients, dispatch.shard_attention(attend, mesh)))
        for got, exact in zip(
            run(*jax.device_put(given, laid_out)), oracle.attention(*given[:3], rows, given[4]), strict=True
        ):
            np.testing.assert_allclose(got, exact, atol=3e-6)

    def test_each_device_attends_with_its_own_rows_and_heads(self):
        seen = []

        def attend(q, k, v, mask):
            seen.append((q.shape, k.shape, mask.subtree_end.shape))
            return q

        mesh = sharding.make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
        for heads, kv_heads in ((4, 2), (9, 3)):
            q, k = jnp.zeros((4, 8, heads, 2)), jnp.zeros((4, 8, kv_heads, 2))
            jax.eval_shape(dispatch.shard_attention(attend, mesh), q, k, k, Mask(jnp.ones((4, 8), jnp.int32)))
        self.assertEqual(seen, [((1, 8, 2, 2), (1, 8, 1, 2), (1, 8)), ((1, 8, 9, 2), (1, 8, 3, 2), (1, 8))])

    def test_one_device_is_left_alone(self):
        mesh = sharding.make_mesh(MeshConfig(), jax.devices()[:1])
        self.assertIs(dispatch.shard_attention(_interpreted, mesh), _interpreted)


if __name__ == "__main__":
    absltest.main()
