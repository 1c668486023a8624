"""The mesh, and one table of rules from a parameter's path and shape to its PartitionSpec."""

import math
from collections.abc import Callable, Sequence

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from dialog_jax.errors import UserError
from dialog_jax.model import quantization
from dialog_jax.training.config import MESH_AXES, MeshConfig

ROW_AXES = MESH_AXES[:3]

_Rule = tuple[str | tuple[str, ...] | None, ...]

# Mesh axes for the trailing axes of each parameter; leading axes, such as that of layers, are not divided. The first
# rule that divides a shape evenly is used. All rules are correct; the first is the fastest.
_BOTH = ("fsdp", "tensor")
# fmt: off
_INTO_TENSOR: tuple[_Rule, ...] = (
    ("fsdp", "tensor"), ("tensor", "fsdp"), (_BOTH, None), (None, _BOTH),
    ("fsdp", None), (None, "fsdp"), (None, "tensor"), ("tensor", None), (None, None),
)
_FROM_TENSOR: tuple[_Rule, ...] = (
    ("tensor", "fsdp"), ("fsdp", "tensor"), (None, _BOTH), (_BOTH, None),
    (None, "fsdp"), ("fsdp", None), ("tensor", None), (None, "tensor"), (None, None),
)
# fmt: on
_RULES: dict[str, tuple[_Rule, ...]] = {
    "embedding": _FROM_TENSOR,
    "lm_head": _FROM_TENSOR,
    "w_query": _INTO_TENSOR,
    "w_key": _INTO_TENSOR,
    "w_value": _INTO_TENSOR,
    "w_output": _FROM_TENSOR,
    "w_gate": _INTO_TENSOR,
    "w_up": _INTO_TENSOR,
    "w_down": _FROM_TENSOR,
}
# Of experts [E, in, out]: whole experts over `tensor` where their number allows, then parts of each.
_EXPERT_RULES: dict[str, tuple[_Rule, ...]] = {
    "w_gate": (("tensor", "fsdp", None), ("tensor", None, "fsdp"), *((None, *rule) for rule in _INTO_TENSOR)),
    "w_up": (("tensor", "fsdp", None), ("tensor", None, "fsdp"), *((None, *rule) for rule in _INTO_TENSOR)),
    "w_down": (("tensor", None, "fsdp"), ("tensor", "fsdp", None), *((None, *rule) for rule in _FROM_TENSOR)),
}
_REPLICATED: tuple[_Rule, ...] = ((),)


def make_mesh(config: MeshConfig, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """Returns the mesh over `devices` (all by default).

    With `dcn_data` above 1, each index of that axis is one slice, or one process if all devices are in one slice; the
    devices of a single process are divided in their order.

    Raises:
      UserError: the sizes do not multiply to the number of devices, or dcn_data is not the number of slices.
    """
    devices = jax.devices() if devices is None else devices
    sizes = [getattr(config, axis) for axis in MESH_AXES]
    if -1 in sizes:
        sizes[sizes.index(-1)] = len(devices) // math.prod(size for size in sizes if size != -1)
    if math.prod(sizes) != len(devices):
        configured = {axis: getattr(config, axis) for axis in MESH_AXES}
        raise UserError(
            f"mesh sizes {configured} do not multiply to the number of devices, {len(devices)}. Set one of them to -1."
        )
    return Mesh(arrange_devices(sizes, devices), MESH_AXES, axis_types=(AxisType.Auto,) * len(MESH_AXES))


def arrange_devices(sizes: Sequence[int], devices: Sequence) -> np.ndarray:
    """Returns the devices as an array of shape `sizes` with nearby devices along the last axes; see `make_mesh`."""
    slices = {getattr(device, "slice_index", None) for device in devices}
    processes = {device.process_index for device in devices}
    if sizes[0] == 1 or len(processes) == 1:
        return mesh_utils.create_device_mesh(sizes, devices)
    count, kind = (len(slices), "slices") if len(slices) > 1 else (len(processes), "processes")
    if sizes[0] != count:
        raise UserError(
            f"mesh.dcn_data is {sizes[0]}, but the devices are in {count} {kind}. Set it to {count}, or to 1."
        )
    return mesh_utils.create_hybrid_device_mesh(
        (1, *sizes[1:]), (sizes[0], 1, 1, 1), devices, process_is_granule=kind == "processes"
    )


def parameter_sharding(mesh: Mesh, path: Sequence[str], shape: Sequence[int]) -> NamedSharding:
    """Returns the layout of the parameter at `path`, from the first of its rules that divides `shape` evenly.

    On a mesh of fsdp=2 and tensor=4, w_up of shape [L, 64, 256] is laid out as (None, fsdp, tensor), and one of shape
    [L, 64, 258], which tensor does not divide, as (None, tensor, fsdp).
    """
    rule = next(rule for rule in _find_rules(path) if not _explain_uneven(mesh, rule, shape))
    return NamedSharding(mesh, PartitionSpec(*(None,) * (len(shape) - len(rule)), *rule))


def _find_rules(path: Sequence[str]) -> tuple[_Rule, ...]:
    """Returns the rules of a parameter.

    `lora_a` is divided by the input axis of its matrix, `lora_b` by the output, and both as experts are; the codes of a
    quantized matrix as it.
    """
    *parents, name = path
    if name in quantization.CODES or (name == "weight" and parents):
        return _find_rules(parents)
    if name in ("lora_a", "lora_b") and parents:
        return _find_factor_rules(parents, is_first=name == "lora_a")
    if parents[-1:] == ["experts"] and name in _EXPERT_RULES:
        return _EXPERT_RULES[name]
    return _RULES.get(name, _REPLICATED)


def _find_factor_rules(path: Sequence[str], *, is_first: bool) -> tuple[_Rule, ...]:
    """Returns the rules of `lora_a` or `lora_b` of the matrix at `path`."""
    rules = _find_rules(path)
    if path[-1] == "lm_head":  # [V, D], and the factors are those of its transpose
        rules = tuple(rule[::-1] for rule in rules)
    factors = [(*rule[:-1], None) if is_first else (*rule[:-2], None, rule[-1]) for rule in rules]
    if path[-2:-1] == ["experts"] and path[-1] in _EXPERT_RULES:  # there are as many factors as experts: divided first
        factors.sort(key=lambda rule: "fsdp" not in rule)
    return tuple(factors)


def describe_uneven_layouts(mesh: Mesh, parameters: dict) -> list[str]:
    """Returns a line for each parameter that its first rule does not divide evenly: why, and the rule used instead."""
    lines = []
    for keys, leaf in jax.tree_util.tree_leaves_with_path(parameters):
        path = [key.key for key in keys]
        rules = _find_rules(path)
        if reason := _explain_uneven(mesh, rules[0], leaf.shape):
            rule = parameter_sharding(mesh, path, leaf.shape).spec[leaf.ndim - len(rules[0]) :]
            layout, preferred = _format_rule(mesh, rule), _format_rule(mesh, rules[0])
            lines.append(f"{'/'.join(path)}: {reason}; laid out as {layout}, not {preferred}")
    return lines


def _explain_uneven(mesh: Mesh, rule: Sequence, shape: Sequence[int]) -> str:
    """Returns which size of `shape` the rule does not divide evenly; empty if it divides all."""
    for axes, size in zip(rule, shape[len(shape) - len(rule) :], strict=True):
        names = (axes,) if isinstance(axes, str) else axes or ()
        if size % math.prod(mesh.shape[name] for name in names):
            return f"{size} is not divisible by " + " * ".join(f"{name}={mesh.shape[name]}" for name in names)
    return ""


def _format_rule(mesh: Mesh, rule: Sequence) -> str:
    """Returns "(tensor, fsdp)", "(whole, fsdp * tensor)" and so on, without axes of size 1, which divide nothing."""
    named = [(axes,) if isinstance(axes, str) else axes or () for axes in rule]
    divided = [" * ".join(name for name in names if mesh.shape[name] > 1) for names in named]
    return f"({', '.join(axes or 'whole' for axes in divided)})"


def state_sharding(mesh: Mesh, state):
    """Returns the shardings of parameters or a train state, by the last part of each array's path.

    Optimizer moments are trees of the same structure as the parameters and get the same layouts.
    """

    def find_sharding(keys, leaf):
        names = [key.name for key in keys if isinstance(key, jax.tree_util.GetAttrKey)]
        if {"v_row", "v_col", "v"}.intersection(names):  # of Adafactor: means over an axis, or a placeholder
            return replicated_sharding(mesh)
        path = [str(key.key) for key in keys if isinstance(key, jax.tree_util.DictKey)]
        return parameter_sharding(mesh, path or [""], leaf.shape)

    return jax.tree_util.tree_map_with_path(find_sharding, state)


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Returns the layout of arrays [M, B, ...], rows over `ROW_AXES`."""
    return NamedSharding(mesh, PartitionSpec(None, ROW_AXES))


def count_row_shards(mesh: Mesh) -> int:
    """Returns the number of parts into which the rows of a micro-batch are divided."""
    return math.prod(mesh.shape[axis] for axis in ROW_AXES)


def find_local_rows(mesh: Mesh, rows: int) -> list[int]:
    """Returns which of the rows 0 to `rows` - 1 of a micro-batch this process fills, in order.

    Processes that share a position on all axes but `tensor` fill the same rows.
    """
    indices = [index for index in batch_sharding(mesh).addressable_devices_indices_map((1, rows)).values() if index]
    return sorted({row for index in indices for row in range(rows)[index[1]]})


def place_rows(mesh: Mesh, array: np.ndarray, local_rows: Sequence[int], rows: int) -> jax.Array:
    """Returns the global array [M, rows, ...] of which `array` holds `local_rows`; see `find_local_rows`."""

    def read_shard(index: tuple[slice, ...] | None) -> np.ndarray:
        assert index is not None
        start, stop, _ = index[1].indices(rows)
        first = local_rows.index(start)
        return array[:, first : first + stop - start]

    return jax.make_array_from_callback((array.shape[0], rows, *array.shape[2:]), batch_sharding(mesh), read_shard)


def replicated_sharding(mesh: Mesh) -> NamedSharding:
    """Returns the layout of arrays of which every device holds a copy."""
    return NamedSharding(mesh, PartitionSpec())


def map_local_rows(mesh: Mesh | None, function: Callable) -> Callable:
    """Returns function(hidden, unembedding, rows), called on each device with its own rows; it returns arrays of rows.

    Under automatic partitioning XLA runs one loop over tiles of targets on all devices, as long as the fullest row of
    the batch needs, and reduces the gradient of the unembedding in every iteration. With `shard_map` each device has
    its own loop; the unembedding is gathered before it, and its gradient reduced after it. Over `tensor` it stays
    sharded by vocabulary.

    Args:
      mesh: None for one device, on which `function` is called as it is.
      function: `rows` is a pytree of arrays whose first axis is that of rows, as it is in `hidden`.
    """
    axes = tuple(axis for axis in ROW_AXES if mesh.shape[axis] > 1) if mesh is not None else ()
    if mesh is None or not axes:
        return function
    by_row = PartitionSpec(axes)

    def over_devices(hidden, unembedding, rows):
        # For each axis of the unembedding, those of `axes` over which it is sharded.
        spec = parameter_sharding(mesh, ["lm_head"], unembedding.shape).spec
        parts = [(part,) if isinstance(part, str) else tuple(part or ()) for part in spec]
        shards = [tuple(axis for axis in part if axis in axes) for part in parts]

        def on_device(hidden, unembedding, rows):
            for axis, names in enumerate(shards):
                if names:  # an explicit gather, so that the gradient is scattered as it is reduced
                    unembedding = jax.lax.all_gather(unembedding, names, axis=axis, tiled=True)
            return function(hidden, unembedding, rows)

        return jax.shard_map(
            on_device,
            mesh=mesh,
            in_specs=(by_row, PartitionSpec(*shards), by_row),
            out_specs=by_row,
            axis_names=set(axes),
            check_vma=False,
        )(hidden, unembedding, rows)

    return over_devices
