"""Seconds and verdicts on chips whose figures are round."""

import math

import jax
from absl.testing import absltest, parameterized

from dialog_jax.planning import estimating
from dialog_jax.planning.compiling import LargestArray, Memory, StepPlan
from dialog_jax.planning.estimating import CHIPS, Chip
from dialog_jax.planning.hlo import Collective, Products
from dialog_jax.training import sharding, trainable
from dialog_jax.training.config import DataConfig, MeshConfig, TrainConfig
from dialog_jax.training.metrics import PEAK_FLOPS
from tests.training import tiny

# 100 FLOP/s, 1,000 bytes, 10 bytes/s to memory, 4 within nodes of 4 devices and 1 between them.
_CHIP = Chip("round", 100.0, 1000.0, 10.0, 4.0, 1.0, 4)
_MEMORY = Memory(trained=60, frozen=40, moments=200, batch=10, gradients=100, activations=90, temporaries=600)


def plan(**fields):
    selection = trainable.select_all(tiny.config(8))
    empty = StepPlan(_MEMORY, LargestArray(0, "", ""), Products(0.0, 0.0), [], [], 0.0, selection)
    return empty._replace(**fields)


class ExchangeTest(parameterized.TestCase):
    @parameterized.parameters(
        ("all-gather", range(4), 15.0, 0.0),  # 3/4 of 80 bytes
        ("reduce-scatter", range(4), 15.0, 0.0),
        ("all-reduce", range(4), 30.0, 0.0),
        ("all-to-all", range(4), 15.0, 0.0),
        ("collective-permute", (0, 1), 20.0, 0.0),
        ("collective-permute", (3, 4), 0.0, 80.0),
        # Two nodes: half of it between them over four cards, then as within one.
        ("all-gather", range(8), 15.0, 10.0),
        ("all-reduce", range(8), 30.0, 20.0),
        ("all-to-all", range(8), 7.5, 40.0),  # 3/8 stay in the node, 4/8 leave it over the device's own card
        # A device of each of two nodes: one card each.
        ("all-gather", (1, 5), 0.0, 40.0),
        ("all-reduce", (1, 5), 0.0, 80.0),
    )
    def test_bytes_become_seconds(self, kind, group, link, network):
        once = Collective(kind, 80, tuple(group), 1.0, "")
        self.assertEqual(estimating.estimate_exchange(once, _CHIP), (link, network))
        self.assertEqual(estimating.estimate_exchange(once._replace(runs=3.0), _CHIP), (3 * link, 3 * network))

    def test_network_that_is_not_published_is_needed_only_between_nodes(self):
        chip = _CHIP._replace(network=None)
        inside = Collective("all-gather", 80, (0, 1, 2, 3), 1.0, "")
        self.assertEqual(estimating.estimate_exchange(inside, chip), (15.0, 0.0))
        self.assertEqual(estimating.estimate_exchange(inside._replace(group=(0, 4)), chip), (0.0, math.inf))


class SecondsTest(absltest.TestCase):
    def test_resources_are_added_up(self):
        gather = Collective("all-gather", 80, tuple(range(8)), 2.0, "")
        step = plan(products=Products(1000.0, 200.0), collectives=[gather, gather])
        taken = estimating.estimate_seconds(step, _CHIP, efficiency=0.5)
        # Memory: products, gradients twice, trained parameters and moments read and written.
        self.assertEqual(taken, (20.0, (200 + 2 * 60 + 2 * 260) / 10, 60.0, 40.0))
        self.assertEqual(taken.overlapped, 84.0)
        self.assertEqual(taken.serialized, 184.0)


class VerdictTest(absltest.TestCase):
    def test_verdict_is_sure_or_says_that_it_is_not(self):
        self.assertEqual((_MEMORY.lower_bound, _MEMORY.compiled), (500, 910))
        for memory, verdict in ((910, "fits"), (909, "may not fit"), (500, "may not fit"), (499, "does not fit")):
            self.assertEqual(estimating.judge_memory(_MEMORY, _CHIP._replace(memory=float(memory))), verdict)

    def test_remedies_are_what_can_still_be_done(self):
        data = DataConfig(train="t.jsonl", validation="v.jsonl", max_length=64)
        config = TrainConfig(model="m", data=data, rows=16, gradient_accumulation=2, remat="dots")
        mesh = sharding.make_mesh(MeshConfig(data=1, fsdp=4, tensor=2), jax.devices())
        told = estimating.list_remedies(plan(), _CHIP._replace(memory=300.0), config, mesh, narrow=False)
        self.assertLen(told, 5)
        self.assertIn("fsdp * tensor of 22 or more (now 4 * 2)", told[0])  # 2 * 400 * 8 / 300
        self.assertIn("--config.remat=full (now dots)", told[1])
        self.assertIn("--config.rows=4 (now 4 per device), and --config.gradient_accumulation=8", told[2])
        self.assertIn("bfloat16", told[3])
        self.assertIn("--config.data.max_length=32", told[4])
        least = TrainConfig(model="m", data=data, rows=4, remat="full")
        self.assertLen(estimating.list_remedies(plan(), _CHIP, least, mesh, narrow=True), 1)


class ChipsTest(absltest.TestCase):
    def test_kinds_are_told_apart(self):
        self.assertEqual(PEAK_FLOPS["TPU v5 lite"], 197e12)
        self.assertEqual(PEAK_FLOPS["TPU v5"], 459e12)
        self.assertLen(set(PEAK_FLOPS), len(CHIPS) + 1)


if __name__ == "__main__":
    absltest.main()
