"""What is trained, all weights or an adapter, by what fits in the memory of the devices that are here.

Steps are compiled for simulated devices, as `dialog_jax plan` does; nothing is allocated.
"""

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

from dialog_jax.drafting import config_text
from dialog_jax.drafting.config_text import Entry
from dialog_jax.errors import UserError
from dialog_jax.model.decoder_config import DecoderConfig
from dialog_jax.planning import compiling, simulated_devices
from dialog_jax.training import metrics, sharding

SHARE = 0.8
"""Of the memory of a device that a step may take; the rest is for what the estimate does not see."""
_RANK = 16

# Run in a process of its own: this one simulates devices, and memory that JAX takes on an accelerator is free again.
_QUERY = """
import json, jax
devices = jax.local_devices()
memory = (devices[0].memory_stats() or {}).get("bytes_limit")
print(json.dumps([devices[0].platform, devices[0].device_kind, len(devices), memory]))
"""


class Devices(NamedTuple):
    """The devices that training here would use."""

    platform: str
    kind: str
    number: int
    memory: int
    """Bytes of each that JAX may use; of the CPU, those of the machine."""

    @property
    def description(self) -> str:
        """The memory, and what has it."""
        each = f" of each of {self.number} x {self.kind}" if self.number > 1 else ""
        return f"{self.memory / 1e9:.1f} GB{each}"


class Way(NamedTuple):
    """A way to train."""

    name: str
    """What is trained, such as "LoRA"; it begins a sentence."""
    state_bytes: float
    """Per parameter of the model, at least; what a device holds between steps, and gradients."""
    entries: tuple[Entry, ...]


class Trial(NamedTuple):
    """A way, and whether it fits."""

    way: Way
    needed: int
    """Bytes of a device for one row per device. On accelerators what any compiler needs: the CPU's, which makes the
    estimate, keeps float32 copies of bfloat16 arrays."""
    per_row: int
    """Bytes of a device for a further row; 0 if only the state was counted."""
    is_bound: bool
    """Whether `needed` is only what any compiler needs."""
    fits: bool

    @property
    def size(self) -> str:
        return f"{'at least ' if self.is_bound else ''}{self.needed / 1e9:.1f} GB"


def find_devices() -> Devices:
    """Returns the devices of this machine.

    Raises:
      UserError: JAX cannot use what it finds.
    """
    ran = subprocess.run([sys.executable, "-c", _QUERY], capture_output=True, text=True)
    if ran.returncode:
        reason = (ran.stderr.strip().splitlines() or ["no output"])[-1]
        raise UserError(f"JAX finds no device ({reason}). Install JAX for your accelerator, or set JAX_PLATFORMS=cpu.")
    platform, kind, count, memory = json.loads(ran.stdout.splitlines()[-1])
    if platform == "cpu":
        return Devices(platform, kind, 1, os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    if memory is None:
        raise UserError(
            f"JAX does not know the memory of {kind}. Copy experiments/finetune.py, and try dialog_jax plan."
        )
    return Devices(platform, kind, count, memory)


def list_ways(devices: Devices) -> list[Way]:
    """Returns the ways to train, in the order in which they are tried."""
    narrow = 4 if devices.platform == "cpu" else 2  # bytes of the compute type
    lora = Entry("lora.rank", _RANK)
    nf4 = Entry("frozen_dtype", "nf4")
    ways = [
        Way("all weights", 16, (Entry("lora.rank", 0),)),
        Way("LoRA", narrow, (lora,)),
        Way("LoRA on an NF4 base", 0.5, (lora, nf4)),
        Way("LoRA on an NF4 base, with everything recomputed", 0.5, (lora, nf4, Entry("remat", "full"))),
    ]
    if devices.number == 1:
        return ways
    fsdp = (Entry("mesh.data", 1), Entry("mesh.fsdp", devices.number))
    where = f", divided over {devices.number} devices"
    divided = [Way(name + where, state / devices.number, (*fields, *fsdp)) for name, state, fields in ways]
    return [way for pair in zip(ways, divided, strict=True) for way in pair]


def try_ways(entries: Sequence[Entry], model: DecoderConfig, devices: Devices) -> list[Trial]:
    """Returns the ways that were tried, up to the first that fits; if none does, all of them.

    Args:
      entries: of the config, without what a way adds and without `rows`.
    """
    simulated = simulated_devices.simulate_devices(devices.number)
    parameters, _ = metrics.count_parameters(model)
    limit = SHARE * devices.memory
    trials: list[Trial] = []
    for way in list_ways(devices):
        state = round(way.state_bytes * parameters)
        if state > limit:
            trials.append(Trial(way, state, 0, is_bound=True, fits=False))
            continue
        memory = _measure([*entries, *way.entries], model, devices, simulated)
        if devices.platform == "cpu":
            needed, per_row = memory.compiled, memory.temporaries
        else:
            needed, per_row = memory.lower_bound, memory.activations + memory.batch
        is_bound = devices.platform != "cpu"
        trials.append(Trial(way, needed, per_row, is_bound=is_bound, fits=needed <= limit))
        if trials[-1].fits:
            break
    return trials


def choose_rows(trial: Trial, devices: Devices, *, rows_per_update: int) -> int:
    """Returns the rows of a micro-batch: a power of two per device, as many as fit; one on a CPU."""
    rows = 1
    if devices.platform != "cpu" and trial.fits:
        while (
            2 * rows * devices.number <= rows_per_update
            and trial.needed + (2 * rows - 1) * trial.per_row <= SHARE * devices.memory
        ):
            rows *= 2
    return rows * devices.number


def _measure(
    entries: Sequence[Entry], model: DecoderConfig, devices: Devices, simulated: Sequence[jax.Device]
) -> compiling.Memory:
    config = config_text.build_config([*entries, Entry("rows", devices.number)])
    length = config.data.max_length
    step = compiling.compile_step(
        config,
        model.for_length(length),
        sharding.make_mesh(config.mesh, simulated),
        compute_dtype=jnp.float32 if devices.platform == "cpu" else jnp.bfloat16,
        # These determine operations, not memory.
        tokens=length,
        targets=length,
        attention_pairs=length * (length + 1) // 2,
    )
    return step.memory
