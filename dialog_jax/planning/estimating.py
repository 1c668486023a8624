"""Estimates of the time of a step, and of whether it fits, from published peaks and one stated efficiency.

In: a compiled step and a chip. Out: seconds by resource, a verdict on memory, and remedies.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

from jax.sharding import Mesh

from dialog_jax.planning.compiling import Memory, StepPlan
from dialog_jax.planning.hlo import Collective
from dialog_jax.training import sharding
from dialog_jax.training.config import TrainConfig
from dialog_jax.training.metrics import PEAK_FLOPS


class Chip(NamedTuple):
    """One device in JAX's sense, with published peaks, which no program reaches. Units are FLOP, bytes and seconds."""

    kind: str
    """The beginning of `jax.Device.device_kind`."""
    flops: float
    """Dense bfloat16 products, FLOP/s."""
    memory: float
    bandwidth: float
    """Memory bandwidth, bytes/s."""
    link: float
    """Bandwidth to the other devices of the node or slice, bytes/s in each direction."""
    network: float | None
    """The device's share of its host's network cards, bytes/s in each direction; None if not published."""
    group_size: int
    """Devices of a node (GPU) or of the largest slice (TPU), which `link` connects."""


# Sources.
# TPU: the "TPU v4", "v5e", "v5p" and "v6e" pages of docs.cloud.google.com/tpu/docs. Their ICI
# bandwidth is the sum of both directions: 400 (v5e), 1200 (v5p) and 800 GB/s (v6e). The network is 2 x 100 Gbit/s for
# 8 chips of v5e and 50 Gbit/s per chip of v5p; for v6e it is not published.
# GPU: NVIDIA's data sheets of A100 80GB SXM, H100 SXM and H200 SXM. They state FLOP/s with sparsity, twice the dense
# value, and the sum of both directions of NVLink (600, 900 and 900 GB/s). The network is that of NVIDIA's DGX systems:
# one card of 200 (A100) or 400 Gbit/s (H100, H200) per GPU, and eight GPUs per node.
CHIPS = {
    "tpu-v5e": Chip("TPU v5 lite", PEAK_FLOPS["TPU v5 lite"], 16e9, 819e9, 200e9, 3.125e9, 256),
    "tpu-v5p": Chip("TPU v5", PEAK_FLOPS["TPU v5"], 95e9, 2765e9, 600e9, 6.25e9, 6144),
    "tpu-v6e": Chip("TPU v6 lite", PEAK_FLOPS["TPU v6 lite"], 32e9, 1638e9, 400e9, None, 256),
    "a100": Chip("NVIDIA A100", PEAK_FLOPS["NVIDIA A100"], 80e9, 2039e9, 300e9, 25e9, 8),
    "h100": Chip("NVIDIA H100", PEAK_FLOPS["NVIDIA H100"], 80e9, 3350e9, 450e9, 50e9, 8),
    "h200": Chip("NVIDIA H200", PEAK_FLOPS["NVIDIA H200"], 141e9, 4800e9, 450e9, 50e9, 8),
}

FITS, DOUBTFUL, DOES_NOT_FIT = "fits", "may not fit", "does not fit"


class Seconds(NamedTuple):
    """Time of a step on each resource of a device."""

    compute: float
    memory: float
    link: float
    """Within nodes or slices."""
    network: float
    """Between nodes or slices; infinite if it is used and the chip's network is not published."""

    @property
    def overlapped(self) -> float:
        """Time of a step in which everything overlaps with the slowest resource."""
        return max(self)

    @property
    def serialized(self) -> float:
        """Time of a step in which communication overlaps with nothing."""
        return max(self.compute, self.memory) + self.link + self.network


def estimate_seconds(step: StepPlan, chip: Chip, *, efficiency: float) -> Seconds:
    """Returns the time of a step by resource.

    Memory traffic is that of matrix products, as if everything between them were fused into them, and of the update,
    which reads gradients twice and reads and writes trained parameters and moments.

    Args:
      efficiency: share of the published peak that matrix products reach.
    """
    update = 4 * step.memory.trained + 2 * step.memory.moments
    exchanges = [estimate_exchange(collective, chip) for collective in step.collectives]
    return Seconds(
        compute=step.products.flops / (chip.flops * efficiency),
        memory=(step.products.bytes + update) / chip.bandwidth,
        link=sum(link for link, _ in exchanges),
        network=sum(network for _, network in exchanges),
    )


def estimate_exchange(collective: Collective, chip: Chip) -> tuple[float, float]:
    """Returns (seconds within nodes, seconds between nodes) of all runs of a collective at the published bandwidth.

    Each of g devices of a group sends and receives (g - 1) / g of the array, twice for an all-reduce. With n nodes in
    the group, (n - 1) / n of the array goes between nodes, over the network cards of all devices that a node has in the
    group, and the rest within nodes. Devices are numbered along the mesh, last axis fastest, and `chip.group_size`
    consecutive ones are a node or slice.
    """
    nodes = len({device // chip.group_size for device in collective.group})
    group, size = len(collective.group), float(collective.bytes)
    local = group / nodes
    if collective.kind == "collective-permute":
        inside, across = (size, 0.0) if nodes == 1 else (0.0, size)
    elif collective.kind == "all-to-all":
        inside, across = size * (local - 1) / group, size * (group - local) / group
    else:
        size *= 2 if collective.kind == "all-reduce" else 1
        inside, across = size * (local - 1) / local, size * (nodes - 1) / nodes / local
    network = across / chip.network if chip.network else math.inf if across else 0.0
    return collective.runs * inside / chip.link, collective.runs * network


def judge_memory(memory: Memory, chip: Chip) -> str:
    """Returns FITS, DOES_NOT_FIT, or DOUBTFUL if only a compiler that needs less than the CPU's makes it fit."""
    if memory.lower_bound > chip.memory:
        return DOES_NOT_FIT
    return FITS if memory.compiled <= chip.memory else DOUBTFUL


def list_remedies(step: StepPlan, chip: Chip, config: TrainConfig, mesh: Mesh, *, narrow: bool) -> Sequence[str]:
    """Returns sentences that say how to make a step smaller, in the order in which to try them.

    Args:
      narrow: whether the step computes in bfloat16.
    """
    memory, remedies = step.memory, []
    state = memory.parameters + memory.moments + memory.gradients
    if state > chip.memory / 2:
        # Enough parts to leave half of the memory to everything else.
        parts = math.ceil(2 * state * mesh.shape["fsdp"] * mesh.shape["tensor"] / chip.memory)
        remedies.append(
            f"Parameters, moments and gradients are {state / 1e9:.1f} GB per device: divide them further, to fsdp * "
            f"tensor of {parts} or more (now {mesh.shape['fsdp']} * {mesh.shape['tensor']})."
        )
    if config.remat != "full":
        remedies.append(f"Keep less for the backward pass: --config.remat=full (now {config.remat}).")
    device_rows = sharding.batch_sharding(mesh).shard_shape((1, config.rows))[1]
    if device_rows > 1:
        remedies.append(
            f"Fewer rows at once: --config.rows={config.rows // device_rows} (now {device_rows} per device), and "
            f"--config.gradient_accumulation={config.gradient_accumulation * device_rows} for the same update."
        )
    if not narrow:
        remedies.append("Compute in bfloat16: --config.compute_dtype=bfloat16.")
    remedies.append(
        f"Smaller rows: --config.data.max_length={config.data.max_length // 2} halves what grows with tokens."
    )
    return remedies
