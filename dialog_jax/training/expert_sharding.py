"""Experts over the devices of a mesh: which device computes which rows with which experts."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec

from dialog_jax.model import adapters, experts, parameter_trees
from dialog_jax.training import sharding


def shard_experts(mesh: Mesh, run: Callable = experts.run) -> Callable:
    """Returns `experts.run` for arrays over all devices of `mesh`: each computes its own rows, with its own experts.

    Under automatic partitioning the tokens of all rows would be sorted as one array, on every device. Experts are
    divided over `tensor` if their number is divisible by it, otherwise the width of each if that is, and otherwise each
    of its devices computes all of them. What the devices of `tensor` compute of a row is added.
    """
    if mesh.size == 1:
        return run
    tensor = mesh.shape["tensor"]

    def over_devices(config, x, choice, weights, parameters):
        by_expert, by_width = config.count % tensor == 0, config.width % tensor == 0
        flat = parameter_trees.flatten(parameters)
        layouts = {path: _find_expert_layout(path, by_expert, by_width) for path in flat}
        gathers = {}
        for path, layout in layouts.items():
            stored = tuple(sharding.parameter_sharding(mesh, ("experts", *path.split("/")), flat[path].shape).spec)
            if stored and tuple(axis if axis == "tensor" else None for axis in stored) == layout and "fsdp" in stored:
                layouts[path], gathers[path] = stored, stored.index("fsdp")

        def on_device(x, choice, weights, flat):
            # An explicit gather, so that the gradient is scattered as it is reduced.
            gathered = {
                path: jax.lax.all_gather(flat[path], "fsdp", axis=axis, tiled=True) for path, axis in gathers.items()
            }
            parameters = parameter_trees.unflatten({**flat, **gathered})
            index = jax.lax.axis_index("tensor")
            if by_expert:
                return run(config, x, choice, weights, parameters, first=index * (config.count // tensor))[None]
            if "b_down" in parameters:  # once, not on each device
                parameters["b_down"] = jnp.where(index == 0, parameters["b_down"], 0)
            output = run(config, x, choice, weights, parameters)
            return (output if by_width else jnp.where(index == 0, output, 0))[None]

        rows = PartitionSpec(sharding.ROW_AXES)
        parts = jax.shard_map(
            jax.checkpoint(on_device, policy=_save_all_but_gathered, prevent_cse=False),
            mesh=mesh,
            in_specs=(rows, rows, rows, {path: PartitionSpec(*layout) for path, layout in layouts.items()}),
            out_specs=PartitionSpec("tensor", sharding.ROW_AXES),
            check_vma=False,
        )(x, choice, weights, flat)
        return jnp.sum(parts, axis=0)

    return over_devices


def _save_all_but_gathered(primitive: Any, *_: Any, **__: Any) -> bool:
    """Returns whether the backward pass keeps a value: not the gathered matrices of all layers, in any type."""
    return primitive.name not in ("all_gather", "convert_element_type")


def _find_expert_layout(path: str, by_expert: bool, by_width: bool) -> tuple[str | None, ...]:
    """Returns the mesh axes of a matrix [E, in, out], of its factors and scale, or of a bias [E, out] as it is used."""
    name, _, part = path.partition("/")
    if part == adapters.SCALE:
        return (None,)
    layout: list[str | None] = [None] * (3 if name.startswith("w_") else 2)
    if by_expert:
        layout[0] = "tensor"
    elif by_width and name == "w_down" and part != "lora_b":
        layout[1] = "tensor"
    elif by_width and name not in ("w_down", "b_down") and part != "lora_a":
        layout[-1] = "tensor"
    return tuple(layout)
