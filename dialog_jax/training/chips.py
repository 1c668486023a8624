"""What makers publish of their chips. Figures are peaks: no program reaches them."""

from typing import NamedTuple


class Chip(NamedTuple):
    """One device as JAX counts them. Units are FLOP, bytes and seconds."""

    kind: str
    """The beginning of `jax.Device.device_kind`."""
    flops: float
    """Dense bfloat16 products, FLOP/s."""
    memory: float
    bandwidth: float
    """Of its memory, bytes/s."""
    link: float
    """To the other devices of its node or slice, bytes/s in each direction."""
    network: float | None
    """Its part of its host's network cards, bytes/s in each direction; None where it is not published."""
    together: int
    """Devices of a node (GPU) or of the largest slice (TPU): those that `link` joins."""


# Sources.
# TPU: the "TPU v4", "v5e", "v5p" and "v6e" pages of docs.cloud.google.com/tpu/docs. ICI is given there in both
# directions together: 400 (v5e), 1200 (v5p) and 800 GB/s (v6e). The network of v5e is 2 x 100 Gbit/s for 8 chips, of
# v5p 50 Gbit/s a chip; of v6e none is given.
# GPU: NVIDIA's data sheets of A100 80GB SXM, H100 SXM and H200 SXM, whose products are given with sparsity, twice the
# dense ones, and whose NVLink (600, 900 and 900 GB/s) is both directions together. The network is that of NVIDIA's own
# DGX systems: for each GPU one card of 200 (A100) or 400 Gbit/s (H100, H200). Eight GPUs a node.
CHIPS = {
    "tpu-v5e": Chip("TPU v5 lite", 197e12, 16e9, 819e9, 200e9, 3.125e9, 256),
    "tpu-v5p": Chip("TPU v5", 459e12, 95e9, 2765e9, 600e9, 6.25e9, 6144),
    "tpu-v6e": Chip("TPU v6 lite", 918e12, 32e9, 1638e9, 400e9, None, 256),
    "a100": Chip("NVIDIA A100", 312e12, 80e9, 2039e9, 300e9, 25e9, 8),
    "h100": Chip("NVIDIA H100", 989e12, 80e9, 3350e9, 450e9, 50e9, 8),
    "h200": Chip("NVIDIA H200", 989e12, 141e9, 4800e9, 450e9, 50e9, 8),
}

# By the beginning of `jax.Device.device_kind`: of what a plan is made for, and of what only needs its peak known.
PEAK_FLOPS = {"TPU v4": 275e12, **{chip.kind: chip.flops for chip in CHIPS.values()}}
