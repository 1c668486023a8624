"""Train states on disk, by orbax: saved in the background, the newest few kept and the best by held-out loss."""

import pathlib

import jax
import orbax.checkpoint as ocp
from orbax.checkpoint.checkpoint_managers import preservation_policy

from dialog_jax.training.step import TrainState


def open_manager(directory: pathlib.Path, *, keep: int = 1) -> ocp.CheckpointManager:
    """Returns orbax's manager of the checkpoints in `directory`: it keeps the newest `keep` and the best one.

    Close it, or use it in a `with` statement, so that the last save is finished.
    """
    options = ocp.CheckpointManagerOptions(
        preservation_policy=preservation_policy.AnyPreservationPolicy(
            [
                preservation_policy.LatestN(keep),
                preservation_policy.BestN(
                    get_metric_fn=lambda metrics: metrics["loss"],
                    reverse=True,
                    n=1,
                    keep_checkpoints_without_metrics=False,
                ),
            ]
        ),
        best_fn=lambda metrics: metrics["loss"],
        best_mode="min",
        enable_async_checkpointing=True,
    )
    return ocp.CheckpointManager(directory.absolute(), options=options)


def save(manager: ocp.CheckpointManager, state: TrainState, *, loss: float) -> None:
    """Starts saving the state under its step, with the held-out loss by which the best is chosen."""
    manager.save(
        int(state.step),
        args=ocp.args.Composite(
            parameters=ocp.args.StandardSave(state.parameters),
            optimizer_state=ocp.args.StandardSave(state.optimizer_state),
        ),
        metrics={"loss": loss},
    )


def restore(manager: ocp.CheckpointManager, step: int, like: TrainState) -> TrainState:
    """Returns the state saved at `step`, laid out as `like` (arrays, or their shapes with shardings)."""
    restored = manager.restore(
        step,
        args=ocp.args.Composite(
            parameters=ocp.args.StandardRestore(like.parameters),
            optimizer_state=ocp.args.StandardRestore(like.optimizer_state),
        ),
    )
    count = jax.device_put(jax.numpy.asarray(step, like.step.dtype), like.step.sharding)
    return TrainState(count, restored["parameters"], restored["optimizer_state"])


def restore_parameters(manager: ocp.CheckpointManager, step: int, like: dict) -> dict:
    """Returns the parameters alone of the state saved at `step`."""
    restored = manager.restore(step, args=ocp.args.Composite(parameters=ocp.args.StandardRestore(like)))
    return restored["parameters"]
