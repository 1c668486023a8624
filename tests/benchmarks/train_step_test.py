"""scripts/benchmarks/train_step.py on a tiny model; the profile against times and products counted by hand."""

import gzip
import json
import pathlib
import re
import statistics
import sys
import tempfile

import jax
import numpy as np
from absl.testing import absltest
from jax.sharding import Mesh

from dialog_jax.batching import batches
from dialog_jax.model import decoder
from dialog_jax.planning import hlo
from dialog_jax.training import loss, optimizer, sharding, train_step
from dialog_jax.training.config import MeshConfig, OptimizerConfig
from tests.experiments import tiny_run
from tests.rendering import chat_templates
from tests.scripts import running
from tests.training import tiny

sys.path.insert(0, str(running.SCRIPTS / "benchmarks"))

import step_profile
from step_profile import Event, Kind

_TEXT = """HloModule made_by_hand

%fused (p: f32[4,8], q: f32[8,2]) -> f32[4,2] {
  %p = f32[4,8]{1,0} parameter(0)
  %q = f32[8,2]{1,0} parameter(1)
  ROOT %dot.1 = f32[4,2]{1,0} dot(%p, %q), lhs_contracting_dims={1}, rhs_contracting_dims={0}, metadata={op_name="jit(f)/layers/while/body/dot"}
}

%body (r: f32[4,8]) -> f32[4,8] {
  %r = f32[4,8]{1,0} parameter(0)
  %w = f32[8,2]{1,0} constant({...})
  %product = f32[4,2]{1,0} fusion(%r, %w), kind=kCustom, calls=%fused, metadata={op_name="jit(f)/layers/while/body/dot"}
  ROOT %add.1 = f32[4,8]{1,0} add(%r, %r), metadata={op_name="jit(f)/layers/while/body/add"}
}

%until (r: f32[4,8]) -> pred[] {
  %r = f32[4,8]{1,0} parameter(0)
  ROOT %yes = pred[] constant(true)
}

ENTRY %main (x: f32[4,8]) -> f32[4,8] {
  %x = f32[4,8]{1,0} parameter(0)
  %loop = f32[4,8]{1,0} while(%x), condition=%until, body=%body, metadata={op_name="jit(f)/layers/while"}
  %sum = f32[4,8]{1,0} add(%loop, %x), metadata={op_name="jit(f)/optimizer/add"}
  ROOT %square = f32[4,4]{1,0} dot(%sum, %sum), lhs_contracting_dims={1}, rhs_contracting_dims={1}, metadata={op_name="jit(f)/jvp(tiles)/dot"}
}
"""  # noqa: E501
_LAYERS, _LOSS, _OPTIMIZER = "layers without attention", "loss", "optimizer"


class ProfileTest(absltest.TestCase):
    def test_a_moment_counts_once_and_for_products_first(self):
        product, other, last = Kind(_LAYERS, True), Kind(_LAYERS, False), Kind(_OPTIMIZER, False)
        kind = {"dot": product, "add": other, "update": last}
        # fmt: off
        events = [           #  0 1 2 3 4 5 6 7 8 9
            Event("dot", 0, 4),    # p p p p
            Event("add", 3, 6),    #       o o o
            Event("dot", 4.5, 5),  #         (p)
            Event("update", 7, 9), #               u u
            Event("loop", 0, 9),   # what contains others is nobody's
        ]
        # fmt: on
        seconds = step_profile.timeline(events, kind)
        unrecorded = Kind(step_profile.UNRECORDED, False)
        self.assertEqual(seconds, {product: 4.5, other: 1.5, unrecorded: 1.0, last: 2.0})

    def test_products_run_as_often_as_they_were_seen(self):
        program = hlo.parse(_TEXT)
        events = [Event("product", t, t + 1) for t in range(3)] + [Event("sum", 5, 6), Event("loop", 0, 4)]
        counts = step_profile.runs(program, events)
        self.assertEqual({name: counts[name] for name in ("fused", "body", "main")}, {"fused": 3, "body": 3, "main": 1})
        flops = step_profile.flops(program, counts)
        self.assertEqual(flops[_LAYERS], 3 * 2 * 4 * 8 * 2)
        self.assertEqual(flops[_LOSS], 2 * 4 * 4 * 8)
        self.assertEqual(sum(flops.values()), flops[_LAYERS] + flops[_LOSS])

    def test_instructions_belong_to_the_part_they_come_from(self):
        kinds = step_profile.kinds(hlo.parse(_TEXT))
        self.assertEqual(kinds["product"], Kind(_LAYERS, True))
        self.assertEqual(kinds["add.1"], Kind(_LAYERS, False))
        self.assertEqual(kinds["sum"], Kind(_OPTIMIZER, False))
        self.assertEqual(kinds["square"], Kind(_LOSS, True))
        self.assertNotIn("loop", kinds)

    def test_text_has_each_part_its_products_and_the_bound(self):
        # fmt: off
        events = [                      # 0 1 2 3 4 5 6 7 8 9
            Event("product", 0, 2),     # p p
            Event("product", 2, 4),     #     p p
            Event("add.1", 4, 5),       #         o
            Event("square", 6, 8),      #           - l l
            Event("sum", 8, 10),        #                 u u
        ]
        # fmt: on
        told = step_profile.text(
            program=hlo.parse(_TEXT), events=events, seconds=20.0, speed=64.0, tokens=60, figures={"a_name": 3}
        )
        self.assertStartsWith(told, "a name: 3\n\nAn update takes 20 s: 3.0 real tokens a second.")
        self.assertIn("it would take 8 s, 7.5 real tokens a second. It is at 40 % of that.", told)
        rows = _rows(told)
        self.assertEqual(rows[_LAYERS][1:], ["4", "8", "2", "0"])  # 2 x 128 FLOPs at 64 a second
        self.assertEqual(rows[_LOSS][1:], ["4", "4", "0", "0"])
        self.assertEqual(rows[_OPTIMIZER][1:], ["0", "0", "4", "0"])
        self.assertEqual(rows[step_profile.UNRECORDED][1:], ["0", "0", "0", "2"])
        self.assertEqual(rows["all"][1:], ["8", "12", "6", "2"])

    def test_a_trace_without_instructions_is_an_error(self):
        directory = pathlib.Path(self.enter_context(tempfile.TemporaryDirectory()))
        with self.assertRaisesRegex(ValueError, "0 traces"):
            step_profile.read(directory)
        with gzip.open(directory / "a.trace.json.gz", "wt") as stream:
            json.dump({"traceEvents": [{"ph": "X", "ts": 0, "dur": 1, "args": {}}]}, stream)
        with self.assertRaisesRegex(ValueError, "no instruction"):
            step_profile.read(directory)

    def test_products_of_an_update_are_those_of_its_shapes(self):
        length, rows = 512, 2
        rng = np.random.default_rng(0)
        dialogues = [chat_templates.random_dialogue(rng, turns=8) for _ in range(12)]
        tokenizer = chat_templates.train_tokenizer("chatml")
        model = tiny.config(len(tokenizer))
        trees = tiny.trees(dialogues, tokenizer)
        plan = batches.Plan(trees, max_length=length, max_targets=length, rows=rows, micro_batches=1, seed=0)
        batch = plan.batch(0)
        mesh = sharding.make_mesh(MeshConfig(), jax.devices()[:1])
        events, compiled = _traced(model, mesh, batch)
        program = hlo.parse(compiled.as_text())
        flops = step_profile.flops(program, step_profile.runs(program, events))
        matrices = model.width * (2 * model.heads * model.head_dim + 2 * model.kv_heads * model.head_dim)
        matrices += 3 * model.width * model.feed_forward
        self.assertEqual(flops[_LAYERS], 6 * matrices * model.layers * rows * length)
        block = 256
        ends = np.asarray(batch.subtree_end).reshape(rows, length)
        pairs = 2 + bool((ends[:, :block] > block).any())
        product = 2 * block * block * model.heads * model.head_dim * rows
        self.assertEqual(flops["attention"], 7 * product * model.layers * pairs)
        tiles = -(-int((np.asarray(batch.weight) > 0).sum(-1).max()) // loss.TILE)
        self.assertEqual(flops[_LOSS], 3 * 2 * tiles * rows * loss.TILE * model.vocab_size * model.width)


def _rows(told):
    """The cells of a table in Markdown by the first of each row."""
    lines = [line.strip("| ").split(" | ") for line in told.splitlines() if line.startswith("|")]
    return {first: rest for first, *rest in lines}


def _traced(model, mesh: Mesh, batch):
    """(events of an update, the compiled update)."""
    transform = optimizer.make_optimizer(OptimizerConfig(), 2)
    state, shardings = train_step.initial_state(mesh, decoder.init_parameters(model, jax.random.key(0)), transform)
    update = train_step.make_train_step(model, transform, mesh, shardings, compute_dtype="float32", remat="dots")
    compiled = update.lower(state, batch).compile()
    placed = jax.device_put(batch, sharding.batch_sharding(mesh))
    return step_profile.record(lambda: compiled(state, placed)), compiled


class BenchmarkTest(absltest.TestCase):
    def test_figures_and_a_profile_are_written(self):
        directory = pathlib.Path(self.enter_context(tempfile.TemporaryDirectory()))
        tiny_run.save_model(directory)
        tiny_run.save_dialogues(directory)
        out, error = running.run(
            "benchmarks/train_step",
            *(f"--model={directory / 'model'}", f"--data={directory / 'train.jsonl'}", "--max_length=128"),
            *("--rows=2", "--gradient_accumulation=1", "--steps=2"),
            *(f"--out={directory / 'figures.json'}", f"--profile={directory / 'profile.md'}"),
        )
        self.assertEqual(error, "")
        self.assertLen(re.findall(r"^step \d: loss", out, re.MULTILINE), 3)
        figures = json.loads((directory / "figures.json").read_text())
        self.assertGreater(figures["real_tokens_per_second"], figures["response_tokens_per_second"])
        self.assertEqual((figures["rows"], figures["gradient_accumulation"]), (2, 1))
        told = (directory / "profile.md").read_text()
        self.assertIn("--max_length=128 --rows=2 --gradient_accumulation=1 --steps=2", told)
        rows = _rows(told)
        self.assertContainsSubset(["attention", _LAYERS, _LOSS, _OPTIMIZER, "all"], rows)
        for part in ("attention", _LAYERS, _LOSS, "all"):
            self.assertGreater(float(rows[part][0]), 0, part)
        spent = sum(map(float, rows["all"][2:]))
        self.assertAlmostEqual(spent / statistics.median(figures["seconds"]), 1, delta=0.02)

    def test_errors_come_before_the_work(self):
        for flag, why in (
            ("--model=nowhere", "nowhere"),
            ("--profile=/nowhere/profile.md", "No such file or directory"),
        ):
            out, error = running.run("benchmarks/train_step", flag)
            self.assertStartsWith(error, "train_step.py: ")
            self.assertIn(why, error)
            self.assertEqual(out, "")


if __name__ == "__main__":
    absltest.main()
