"""The profile of an update, against times and matrix products counted by hand."""

import gzip
import json
import pathlib
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
from dialog_jax.training.config import MeshConfig
from dialog_jax.training.optimizer_config import OptimizerConfig
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
    def test_attribute_time_counts_each_moment_once_and_products_first(self):
        product, other, last = Kind(_LAYERS, True), Kind(_LAYERS, False), Kind(_OPTIMIZER, False)
        kinds = {"dot": product, "add": other, "update": last}
        # fmt: off
        events = [           #  0 1 2 3 4 5 6 7 8 9
            Event("dot", 0, 4),    # p p p p
            Event("add", 3, 6),    #       o o o
            Event("dot", 4.5, 5),  #         (p)
            Event("update", 7, 9), #               u u
            Event("loop", 0, 9),   # a loop: its body is counted instead
        ]
        # fmt: on
        seconds = step_profile.attribute_time(events, kinds)
        unrecorded = Kind(step_profile.UNRECORDED, False)
        self.assertEqual(seconds, {product: 4.5, other: 1.5, unrecorded: 1.0, last: 2.0})

    def test_count_flops_counts_products_as_often_as_they_ran(self):
        program = hlo.parse(_TEXT)
        events = [Event("product", t, t + 1) for t in range(3)] + [Event("sum", 5, 6), Event("loop", 0, 4)]
        counts = step_profile.count_runs(program, events)
        self.assertEqual({name: counts[name] for name in ("fused", "body", "main")}, {"fused": 3, "body": 3, "main": 1})
        flops = step_profile.count_flops(program, counts)
        self.assertEqual(flops[_LAYERS], 3 * 2 * 4 * 8 * 2)
        self.assertEqual(flops[_LOSS], 2 * 4 * 4 * 8)
        self.assertEqual(sum(flops.values()), flops[_LAYERS] + flops[_LOSS])

    def test_classify_instructions_finds_part_and_products(self):
        kinds = step_profile.classify_instructions(hlo.parse(_TEXT))
        self.assertEqual(kinds["product"], Kind(_LAYERS, True))
        self.assertEqual(kinds["add.1"], Kind(_LAYERS, False))
        self.assertEqual(kinds["sum"], Kind(_OPTIMIZER, False))
        self.assertEqual(kinds["square"], Kind(_LOSS, True))
        self.assertNotIn("loop", kinds)

    def test_make_page_lists_parts_products_and_bound(self):
        # fmt: off
        events = [                      # 0 1 2 3 4 5 6 7 8 9
            Event("product", 0, 2),     # p p
            Event("product", 2, 4),     #     p p
            Event("add.1", 4, 5),       #         o
            Event("square", 6, 8),      #           - l l
            Event("sum", 8, 10),        #                 u u
        ]
        # fmt: on
        page = step_profile.make_page(
            program=hlo.parse(_TEXT),
            events=events,
            step_seconds=20.0,
            product_speed=64.0,
            tokens=60,
            figures={"a_name": 3},
        )
        self.assertStartsWith(page, "a name: 3\n\nAn update takes 20 s, or 3.0 real tokens/s.")
        self.assertIn("would take 8 s, or 7.5 real tokens/s. The update reaches 40 % of this bound.", page)
        rows = read_table(page)
        self.assertEqual(rows[_LAYERS][1:], ["4", "8", "2", "0"])  # 2 x 128 FLOPs at 64 a second
        self.assertEqual(rows[_LOSS][1:], ["4", "4", "0", "0"])
        self.assertEqual(rows[_OPTIMIZER][1:], ["0", "0", "4", "0"])
        self.assertEqual(rows[step_profile.UNRECORDED][1:], ["0", "0", "0", "2"])
        self.assertEqual(rows["all"][1:], ["8", "12", "6", "2"])

    def test_read_trace_without_instructions_is_an_error(self):
        directory = pathlib.Path(self.enter_context(tempfile.TemporaryDirectory()))
        with self.assertRaisesRegex(ValueError, "0 traces"):
            step_profile.read_trace(directory)
        with gzip.open(directory / "a.trace.json.gz", "wt") as stream:
            json.dump({"traceEvents": [{"ph": "X", "ts": 0, "dur": 1, "args": {}}]}, stream)
        with self.assertRaisesRegex(ValueError, "no instruction"):
            step_profile.read_trace(directory)

    def test_count_flops_of_an_update_follow_from_its_shapes(self):
        length, rows = 512, 2
        rng = np.random.default_rng(0)
        dialogues = [chat_templates.random_dialogue(rng, turns=8) for _ in range(12)]
        tokenizer = chat_templates.train_tokenizer("chatml")
        model = tiny.config(len(tokenizer))
        trees = tiny.trees(dialogues, tokenizer)
        plan = batches.Plan(trees, max_length=length, rows=rows, micro_batches=1, seed=0)
        batch = plan.batch(0)
        mesh = sharding.make_mesh(MeshConfig(), jax.devices()[:1])
        events, compiled = _traced(model, mesh, batch)
        program = hlo.parse(compiled.as_text())
        flops = step_profile.count_flops(program, step_profile.count_runs(program, events))
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


def read_table(page):
    """Returns {first cell: other cells} for the rows of a Markdown table."""
    lines = [line.strip("| ").split(" | ") for line in page.splitlines() if line.startswith("|")]
    return {first: rest for first, *rest in lines}


def _traced(model, mesh: Mesh, batch):
    """Returns (events of an update, compiled update)."""
    transform = optimizer.make_optimizer(OptimizerConfig(), 2)
    state = train_step.initialize_state(mesh, decoder.init_parameters(model, jax.random.key(0)), transform)
    update = train_step.make_train_step(model, transform, mesh, compute_dtype="float32", remat="dots")
    compiled = update.lower(state, batch).compile()
    placed = jax.device_put(batch, sharding.batch_sharding(mesh))
    return step_profile.record(lambda: compiled(state, placed)), compiled


if __name__ == "__main__":
    absltest.main()
