"""Values for data of known lengths and for devices of a known memory."""

import os
from unittest import mock

import jax
import pytest
from absl.testing import absltest, parameterized

from dialog_jax.audit.row_lengths import Fill
from dialog_jax.drafting import memory, values
from dialog_jax.drafting.config_text import Entry, build_config
from dialog_jax.drafting.memory import Devices
from dialog_jax.planning import model_shapes
from dialog_jax.planning.compiling import Memory
from tests.training import tiny

_PARAMETERS = 1_000_000_000
_ENTRIES = [Entry("model", "m")]


def fill(max_length, *, shortened=0, cut=0):
    return Fill(
        max_length=max_length,
        rows=10,
        used=0.9,
        divided=0,
        repeated=0,
        shortened=shortened,
        cut=cut,
        targets_lost=0.0,
    )


class LengthTest(parameterized.TestCase):
    @parameterized.parameters(
        (8192, 1024),  # 1 % of 1,000 responses may lose a part
        (1024, 1024),
        (512, 512),  # the longest that the model has
    )
    def test_length_is_the_shortest_that_keeps_almost_all_histories(self, context, expected):
        fills = [fill(512, shortened=10, cut=1), fill(1024, shortened=9, cut=1), fill(2048)]
        chosen, shorter = values.choose_length(fills, 1000, context)
        self.assertEqual(chosen.max_length, expected)
        self.assertEqual(shorter and shorter.max_length, 512 if expected == 1024 else None)


class StepsTest(parameterized.TestCase):
    @parameterized.parameters(
        (1, 1024, 100_000.0, 16, 1.0, 50),
        (8, 1024, 100_000.0, 2, 1.0, 50),
        (1, 16384, 500.0, 1, 1.0, 50),
        (1, 1024, 320.0, 16, 3.0, 6),  # 20 updates per epoch, 60 in all
        (1, 1024, 40.0, 2, 3.0, 6),  # fewer rows per update
        (1, 1024, 3.0, 1, 3.0, 1),
        (1, 1024, None, 16, 1.0, 50),
    )
    def test_updates(self, rows, max_length, rows_per_epoch, accumulation, epochs, every):
        config = build_config(values.make_step_entries(rows, max_length, rows_per_epoch))
        self.assertEqual((config.rows, config.gradient_accumulation, config.epochs), (rows, accumulation, epochs))
        self.assertEqual((config.evaluate_every, config.checkpoint_every), (every, every))


class MemoryTest(parameterized.TestCase):
    def choose(self, gigabytes, *, number=1, platform="gpu", activations=1e9):
        """What fits, with compilation replaced by the bytes that parameters have."""

        def measure(entries, model, devices, simulated):
            config = build_config(entries)
            lora, nf4 = config.lora.rank > 0, config.frozen_dtype == "nf4"
            state = int(_PARAMETERS * ((0.53 if nf4 else 2) if lora else 12) / max(1, config.mesh.fsdp))
            gradients = 0 if lora else 4 * _PARAMETERS // max(1, config.mesh.fsdp)
            return Memory(state, 0, 0, 0, gradients, int(activations), temporaries=int(gradients + activations))

        devices = Devices(platform, "chip", number, int(gigabytes * 1e9))
        with (
            mock.patch.object(memory.simulated_devices, "simulate_devices"),
            mock.patch.object(memory, "_measure", measure),
            mock.patch.object(memory.metrics, "count_parameters", lambda model: (_PARAMETERS, _PARAMETERS)),
        ):
            return memory.try_ways(_ENTRIES, tiny.config(512), devices), devices

    @parameterized.parameters(
        (24, 1, "all weights"),  # 16 + 1 in 19.2 GB
        (18.5, 1, "LoRA"),  # all weights need 17, and 14.8 may be used
        (12, 8, "all weights, divided over 8 devices"),
        (4, 1, "LoRA"),  # 2 + 1 in 3.2
        (2, 4, "LoRA, divided over 4 devices"),  # 0.5 + 1 in 1.6
        (1.6, 2, "LoRA on an NF4 base, divided over 2 devices"),  # 0.27 + 1 in 1.28
        (3, 1, "LoRA on an NF4 base"),  # 0.53 + 1 in 2.4
    )
    def test_first_way_that_fits_is_chosen(self, gigabytes, number, name):
        trials, devices = self.choose(gigabytes, number=number)
        self.assertEqual([trial.fits for trial in trials], [False] * (len(trials) - 1) + [True])
        self.assertEqual(trials[-1].way.name, name)
        entries = values.make_way_entries(trials, devices)
        config = build_config(entries)
        self.assertEqual(config.lora.rank, 16 if "LoRA" in name else 0)
        self.assertEqual(config.frozen_dtype, "nf4" if "NF4" in name else "auto")
        self.assertEqual(config.mesh.fsdp, number if "divided" in name else 1)
        verb = "are" if name.startswith("all") else "is"
        self.assertIn(f"{name[0].upper()}{name[1:]} {verb} trained: a step with one row", entries[0].comment)
        for trial in trials[:-1]:
            self.assertIn(f"{trial.way.name} ({trial.size})", entries[0].comment)

    def test_what_does_not_fit_is_said(self):
        trials, devices = self.choose(1)
        self.assertEqual([trial.fits for trial in trials], [False] * 4)
        self.assertEqual((trials[0].way.name, trials[0].size), ("all weights", "at least 16.0 GB"))
        self.assertIn(
            "None of these fits in 80 % of a device's memory", values.make_way_entries(trials, devices)[0].comment
        )
        self.assertEqual(build_config(values.make_way_entries(trials, devices)).remat, "full")

    @parameterized.parameters(
        (24, "cpu", 1), (22, "gpu", 1), (24, "gpu", 2), (26, "gpu", 4), (31, "gpu", 8), (60, "gpu", 16)
    )
    def test_rows_are_as_many_as_fit(self, gigabytes, platform, rows):
        # 17 GB with one row, 1 GB for each further one.
        trials, devices = self.choose(gigabytes, platform=platform)
        self.assertEqual(memory.choose_rows(trials[-1], devices, rows_per_update=16), rows)

    @pytest.mark.full
    def test_model_of_70_billion_parameters_is_divided_over_devices_of_24_gigabytes(self):
        shape = model_shapes.load_shape("Llama-3.1-70B-Instruct")
        devices = Devices("gpu", "chip", 8, 24 * 10**9)
        entries = [*_ENTRIES, Entry("data.max_length", 1024)]
        self.assertLen(jax.devices(), 8)  # before some are simulated
        ways = memory.list_ways(devices)[-2:]  # to compile once
        with mock.patch.dict(os.environ), mock.patch.object(memory, "list_ways", lambda devices: ways):
            trials = memory.try_ways(entries, shape, devices)
        self.assertEqual([trial.fits for trial in trials], [False, True])
        self.assertEndsWith(trials[-1].way.name, "with everything recomputed, divided over 8 devices")
        self.assertEqual(build_config(values.make_way_entries(trials, devices)).mesh.fsdp, 8)

    def test_rows_are_a_multiple_of_the_devices(self):
        trials, devices = self.choose(40, number=4)
        rows = memory.choose_rows(trials[-1], devices, rows_per_update=16)
        self.assertEqual(rows, 16)


if __name__ == "__main__":
    absltest.main()
