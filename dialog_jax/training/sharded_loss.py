"""The loss over a mesh: each device works through the targets of its own rows, and what it learns is added up once.

Left to itself, XLA keeps one loop over tiles for all devices: it is as long as the fullest row of all needs, and
exchanges the gradient of the vocabulary matrix in every turn. Here each device has a loop of its own, and the matrix is
gathered before it and its gradient reduced after it. Over `tensor` the matrix stays divided by vocabulary.
"""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array, Float, Int

from dialog_jax.training import loss
from dialog_jax.training.config import LossConfig
from dialog_jax.training.loss import TargetScores, Teacher
from dialog_jax.training.sharding import ROW_AXES, parameter_sharding


def weighted_loss(
    mesh: Mesh,
    hidden: Float[Array, "B T D"],
    matrix: Float[Array, "V D"],
    source: Int[Array, "B S"],
    target: Int[Array, "B S"],
    weight: Float[Array, "B S"],
    teacher: Teacher | None,
    config: LossConfig,
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """Returns what `loss.weighted_loss` returns, of rows that are divided over `mesh`."""

    def own(hidden, matrix, source, target, weight, teacher):
        sums = loss.weighted_loss(hidden, matrix, source, target, weight, teacher, config)
        return tuple(each[None] for each in sums)

    sums = _over_rows(mesh, own)(hidden, matrix, source, target, weight, teacher)
    return jnp.sum(sums[0]), jnp.sum(sums[1])


def score_targets(
    mesh: Mesh,
    hidden: Float[Array, "B T D"],
    matrix: Float[Array, "V D"],
    source: Int[Array, "B S"],
    target: Int[Array, "B S"],
    weight: Float[Array, "B S"],
) -> TargetScores:
    """Returns what `loss.score_targets` returns, of rows that are divided over `mesh`."""
    return _over_rows(mesh, loss.score_targets)(hidden, matrix, source, target, weight)


def _over_rows(mesh: Mesh, function: Callable) -> Callable:
    """`function` of (hidden, matrix, arrays of rows ...), which returns arrays of rows, for each device's own rows."""
    axes = tuple(axis for axis in ROW_AXES if mesh.shape[axis] > 1)
    if not axes:
        return function
    rows = PartitionSpec(axes)

    def divided(hidden, matrix, *arrays):
        held = _held(mesh, matrix.shape, axes)

        def own(hidden, matrix, *arrays):
            for axis, parts in enumerate(held):
                if parts:  # said outright, so that the gradient is scattered as it is reduced
                    matrix = jax.lax.all_gather(matrix, parts, axis=axis, tiled=True)
            return function(hidden, matrix, *arrays)

        return jax.shard_map(
            own,
            mesh=mesh,
            in_specs=(rows, PartitionSpec(*held), *(rows,) * len(arrays)),
            out_specs=rows,
            axis_names=set(axes),
            check_vma=False,
        )(hidden, matrix, *arrays)

    return divided


def _held(mesh: Mesh, shape: Sequence[int], axes: Sequence[str]) -> list[tuple[str, ...]]:
    """For each axis of the vocabulary matrix, the `axes` of the mesh over which it is divided."""
    spec = parameter_sharding(mesh, ["lm_head"], shape).spec
    parts = [(part,) if isinstance(part, str) else tuple(part or ()) for part in spec]
    return [tuple(axis for axis in part if axis in axes) for part in parts]
