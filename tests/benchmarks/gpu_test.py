"""scripts/benchmarks/gpu*.py: inputs, figures, and the reasons given for cases that were not measured."""

import contextlib
import io
import pathlib
import sys
import tempfile
from unittest import mock

import jax.numpy as jnp
import numpy as np
from absl.testing import absltest, parameterized

from dialog_jax.attention.mask import Mask
from tests.scripts import running

sys.path.insert(0, str(running.SCRIPTS / "benchmarks"))

import gpu_inputs
import gpu_report

# Replaces gpu_case.py: prints one line per case; `do` is what it does before.
_STAND_IN = """
import json, os, sys, time
for case in json.loads(sys.argv[1].removeprefix("--cases=")):
    if case["do"] == "crash":
        print("InternalError: the device is gone", file=sys.stderr, flush=True)
        os._exit(9)
    if case["do"] == "hang":
        time.sleep(60)
    print("LINE " + json.dumps({"got": case["do"]}), flush=True)
"""


# fmt: off
_TRAINED = {
    "tokens_per_second": 71234.0, "tflops": 412.0, "mfu": 0.4166, "seconds_a_step": 0.25, "peak_memory_gb": 91.26,
    "compile_seconds": 20.0, "last_loss": 4.9, "attention": "pallas_gpu",
}
# fmt: on


class CaseTest(parameterized.TestCase):
    def setUp(self):
        super().setUp()
        self.case = self.enterContext(running.loaded("benchmarks/gpu_case"))

    def test_branching_tree_is_the_one_in_the_docstring(self):
        position, subtree_end = gpu_inputs.branching_tree(8, turns=2)
        self.assertEqual(position.tolist(), [0, 1, 2, 3, 2, 3, 4, 5])
        self.assertEqual(subtree_end.tolist(), [8, 8, 4, 4, 8, 8, 8, 8])

    @parameterized.parameters("causal", "paths", "trees")
    def test_random_row_tokens_see_position_plus_one_keys(self, kind):
        position, subtree_end, segment = gpu_inputs.random_row(np.random.default_rng(0), 1500, kind)
        token = np.arange(1500)
        seen = (token[None] <= token[:, None]) & (token[:, None] < subtree_end[None])
        np.testing.assert_array_equal(seen.sum(axis=1), position + 1)
        np.testing.assert_array_equal(np.unique(segment), np.arange(1, segment[-1] + 1))
        self.assertTrue(np.all(segment[:, None][seen.nonzero()[0], 0] == segment[seen.nonzero()[1]]))
        self.assertEqual(segment[-1] > 1, kind != "causal")
        self.assertEqual(bool(np.all(np.diff(segment) == (position[1:] == 0))), True)

    def test_random_batch_targets_follow_their_sources(self):
        batch = gpu_inputs.random_batch(np.random.default_rng(0), gpu_inputs.model_config("tiny"), rows=2, length=300)
        for row in range(2):
            valid = batch.weight[0, row] > 0
            self.assertBetween(valid.mean(), 0.3, 0.5)
            self.assertTrue(np.all(np.diff(valid.astype(int)) <= 0))  # before their padding
            source = batch.source[0, row]
            np.testing.assert_array_equal(batch.tokens[0, row, source[valid] + 1], batch.target[0, row, valid])
            self.assertTrue(
                np.all(batch.position[0, row, source[valid] + 1] == batch.position[0, row, source[valid]] + 1)
            )
            self.assertEqual(set(source[~valid]) | set(batch.turn[0, row, ~valid] + 1), {0})

    def test_cudnn_packed_passes_the_segments_of_the_row(self):
        with mock.patch("jax._src.cudnn.fused_attention_stablehlo.dot_product_attention") as called:
            ends = jnp.asarray([[3, 3, 3, 5, 5, *[64] * 59], [64] * 64], jnp.int32)
            q = jnp.zeros((2, 64, 1, 16))
            self.case.cudnn_packed(q, q, q, Mask(ends))
        lengths, starts = called.call_args.args[5], called.call_args.args[7]
        np.testing.assert_array_equal(lengths, [[3, 2, 59, -1, -1], [64, -1, -1, -1, -1]])
        np.testing.assert_array_equal(starts, [[0, 3, 5, -1, -1, -1], [0, -1, -1, -1, -1, -1]])

    def test_measure_training_returns_all_figures(self):
        with running.loaded("benchmarks/gpu") as suite:
            case = suite.tiny_groups()[-1][0]
        figures = self.case.measure(case)
        self.assertEqual(set(figures), set(_TRAINED))
        self.assertGreater(figures["tokens_per_second"] * figures["seconds_a_step"], 127)  # 128 if steps take the same
        self.assertBetween(figures["last_loss"], 4, 6)  # of 128 tokens by chance: 4.85 nats

    def test_model_config_reads_published_shapes(self):
        for name, width in (("SmolLM2-135M", 576), ("Llama-3.2-1B-Instruct", 2048), ("Llama-3.1-8B-Instruct", 4096)):
            self.assertEqual(gpu_inputs.model_config(name).width, width)

    def test_measure_unsupported_case_is_a_line_but_a_bug_raises(self):
        def raising(error):
            def part():
                raise error

            return mock.patch.dict(self.case.PARTS, device=part)

        with raising(NotImplementedError("no\nmore")):
            self.assertEqual(self.case.measure({"part": "device"}), {"failed": "NotImplementedError: no"})
        with raising(KeyError("no")), self.assertRaises(KeyError):
            self.case.measure({"part": "device"})


class SuiteTest(absltest.TestCase):
    def setUp(self):
        super().setUp()
        self.suite = self.enterContext(running.loaded("benchmarks/gpu"))
        self.enterContext(mock.patch.multiple(self.suite, _STARTUP=2.0, _LIMITS={"fake": 0.5}))

    def measure(self, *does, budget=30.0):
        cases = [{"part": "fake", "do": do} for do in does]
        return self.suite.measure(cases, budget, [sys.executable, "-c", _STAND_IN])

    def test_measure_crash_costs_one_case(self):
        first, crashed, last = self.measure("a", "crash", "b")
        self.assertEqual((first, last), ({"got": "a"}, {"got": "b"}))
        self.assertEqual(crashed, {"failed": "its process ended with code 9: InternalError: the device is gone"})

    def test_measure_case_over_its_limit_is_stopped_and_the_next_one_measured(self):
        hanging, after = self.measure("hang", "b")
        self.assertRegex(hanging["failed"], r"^stopped after \d s$")
        self.assertEqual(after, {"got": "b"})

    def test_measure_after_the_budget_starts_nothing(self):
        self.assertEqual(self.measure("a", budget=1.0), [{"failed": "the time budget of the benchmark was used up"}])

    def test_suite_without_a_gpu_exits_and_writes_nothing(self):
        device = {"platform": "cpu", "kind": "cpu", "count": 1, "versions": "jax 0"}
        with (
            mock.patch.object(self.suite, "measure", return_value=[device]) as measure,
            self.assertRaisesRegex(SystemExit, "needs an NVIDIA GPU, found 1 x cpu"),
        ):
            self.suite.run_suite(tiny=False, command=[])
        self.assertEqual(measure.call_count, 1)  # of the device

    def test_page_names_the_reason_of_every_case_without_figures(self):
        results = [(case, {"failed": "no memory"}) for group in self.suite.full_groups() for case in group]
        device = {"platform": "gpu", "kind": "H200", "count": 1, "versions": "jax 0"}
        page = gpu_report.make_page(device, results, 1.0, "x")
        self.assertEqual(page.count("| not measured: no memory |"), len(results))
        self.assertGreater(len(results), 50)

    def test_tiny_suite_fills_its_tables(self):
        directory = pathlib.Path(self.enterContext(tempfile.TemporaryDirectory()))
        argv = ["gpu.py", "--tiny", f"--results_dir={directory}"]
        self.suite.flags.FLAGS(argv)
        script = self.enterContext(running.loaded("benchmarks/gpu_case"))
        self.enterContext(mock.patch.dict(script.PARTS, train=lambda **shape: _TRAINED))  # has a test of its own
        self.suite.measure = lambda cases, budget, command: [script.measure(case) for case in cases]
        with contextlib.redirect_stdout(io.StringIO()):
            self.suite.main(argv[:1])
        page = (directory / "gpu.md").read_text(encoding="utf-8")
        self.assertRegex(page, r"\| pallas_gpu \| trees \| float32 \| 4/2 x 16 \| \d\.\de-0[78] \|")
        self.assertRegex(
            page, r"\| cudnn_causal \| causal \| 4/2 x 16 \| 64 \| [\d.]+ \| [\d.]+ \| .* \| 1.000 \| 1.000 \|"
        )
        self.assertRegex(page, r"\| blockwise \| trees \| 4/2 x 16 \| 64 \| .* \| 0\.\d+ \| [\d.]+ \|")
        self.assertRegex(page, r"\| cudnn_packed .* not measured: \w+")
        self.assertRegex(page, r"\| tiny \| 64 \| 2 \| none \| float32 \| 71,234 \| 412 \| 41.7 \| 91.3 \| 20.0 \|")


if __name__ == "__main__":
    absltest.main()
