"""Where arrays live: the mesh, and one rule from a parameter's path and shape to its PartitionSpec."""

import dataclasses
import math
from collections.abc import Sequence

import jax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

AXES = ("data", "fsdp", "tensor")

# Axes of the mesh for the trailing axes of each parameter; axes that are not named, such as that of layers, are whole.
_RULES: dict[str, tuple[str | None, ...]] = {
    "embedding": ("tensor", "fsdp"),
    "lm_head": ("tensor", "fsdp"),
    "w_query": ("fsdp", "tensor"),
    "w_key": ("fsdp", "tensor"),
    "w_value": ("fsdp", "tensor"),
    "w_output": ("tensor", "fsdp"),
    "w_gate": ("fsdp", "tensor"),
    "w_up": ("fsdp", "tensor"),
    "w_down": ("tensor", "fsdp"),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class MeshConfig:
    """Sizes of the mesh's axes; one may be -1, for all devices that the others leave.

    `data` replicates parameters and divides rows; `fsdp` divides rows, parameters and moments; `tensor` divides
    parameters and the work of a row.
    """

    data: int = -1
    fsdp: int = 1
    tensor: int = 1

    def __post_init__(self):
        sizes = [getattr(self, axis) for axis in AXES]
        if sizes.count(-1) > 1 or any(size < 1 and size != -1 for size in sizes):
            asked = dict(zip(AXES, sizes, strict=True))
            raise ValueError(f"mesh sizes are {asked}; each must be at least 1, and one may be -1.")


def make_mesh(config: MeshConfig, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """Returns the mesh over `devices` (all by default).

    Raises:
      ValueError: the sizes do not multiply to the number of devices.
    """
    devices = jax.devices() if devices is None else devices
    sizes = [getattr(config, axis) for axis in AXES]
    if -1 in sizes:
        sizes[sizes.index(-1)] = len(devices) // math.prod(size for size in sizes if size != -1)
    if math.prod(sizes) != len(devices):
        asked = {axis: getattr(config, axis) for axis in AXES}
        raise ValueError(f"mesh sizes {asked} do not multiply to the {len(devices)} devices that there are.")
    return jax.make_mesh(tuple(sizes), AXES, axis_types=(AxisType.Auto,) * len(AXES), devices=devices)


def parameter_sharding(mesh: Mesh, path: Sequence[str], shape: Sequence[int]) -> NamedSharding:
    """Returns how the parameter at `path` is laid out; an axis that the mesh does not divide evenly stays whole."""
    rule = _RULES.get(path[-1], ())
    axes = (None,) * (len(shape) - len(rule)) + rule
    divided = [axis if axis and size % mesh.shape[axis] == 0 else None for axis, size in zip(axes, shape, strict=True)]
    return NamedSharding(mesh, PartitionSpec(*divided))


def undivided(mesh: Mesh, parameters: dict) -> list[str]:
    """Returns the parameters that a mesh axis should divide but does not, each with the reason."""
    found = []
    for keys, leaf in jax.tree_util.tree_leaves_with_path(parameters):
        path = [key.key for key in keys]
        rule = _RULES.get(path[-1], ())
        for axis, size in zip(rule, leaf.shape[len(leaf.shape) - len(rule) :], strict=True):
            if axis and size % mesh.shape[axis]:
                found.append(f"{'/'.join(path)}: {size} is not divisible by {axis}={mesh.shape[axis]}")
    return found


def state_sharding(mesh: Mesh, state):
    """Returns shardings for a train state: an array whose path ends like a parameter's is laid out as that is.

    Optimizer moments are trees of the parameters' form, so they follow their parameters.
    """

    def place(keys, leaf):
        path = [str(key.key) for key in keys if isinstance(key, jax.tree_util.DictKey)]
        return parameter_sharding(mesh, path or [""], leaf.shape)

    return jax.tree_util.tree_map_with_path(place, state)


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Returns how arrays [M, B, ...] are laid out: rows over `data` and `fsdp`."""
    return NamedSharding(mesh, PartitionSpec(None, ("data", "fsdp")))


def replicated(mesh: Mesh) -> NamedSharding:
    """Returns the layout of what every device holds whole."""
    return NamedSharding(mesh, PartitionSpec())
