"""Train states on disk, by orbax: saved in the background, the newest few kept and the best by held-out loss.

A checkpoint holds, beside the arrays, a checksum of each, computed where the array lives. Orbax notices files that are
missing or cut off, but not a byte of an array that has changed; the checksums do, on any mesh.
"""

import contextlib
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from jaxtyping import Array, UInt32

from dialog_jax.errors import UserError
from dialog_jax.training import distributed
from dialog_jax.training.train_step import TrainState

# What orbax raises for a file that is missing, cut off or changed; a plain Exception besides.
_BROKEN = (ValueError, LookupError, AttributeError, TypeError, FileNotFoundError)


class DamagedError(UserError):
    """A checkpoint that cannot be read, or not as it was written."""


class SaveError(OSError):
    """A checkpoint that could not be written."""


def find_best_step(losses: Mapping[int, float], steps: Sequence[int]) -> int | None:
    """Returns the first of `steps` with the lowest held-out loss; None if none of them has one."""
    evaluated = [step for step in sorted(steps) if step in losses]
    return min(evaluated, key=lambda step: losses[step], default=None)


def open_manager(directory: pathlib.Path) -> ocp.CheckpointManager:
    """Returns orbax's manager of the checkpoints in `directory`, less what a killed process left half-written.

    Close it, or use it in a `with` statement, so that the last save is finished.
    """
    # Which of them stay is not left to orbax 0.11: where `check` is told first that a save has failed, orbax's own
    # thread takes the save for done and removes an older checkpoint for it.
    options = ocp.CheckpointManagerOptions(enable_async_checkpointing=True, cleanup_tmp_directories=True)
    return ocp.CheckpointManager(directory.absolute(), options=options)


def open_reader(directory: pathlib.Path) -> ocp.CheckpointManager:
    """Returns orbax's manager for reading alone, also while a run goes on there.

    It waits for no other process, so that one which cannot read its part can tell the others.
    """
    me = jax.process_index()
    alone = ocp.options.MultiprocessingOptions(primary_host=me, active_processes={me})
    options = ocp.CheckpointManagerOptions(read_only=True, create=False, multiprocessing_options=alone)
    return ocp.CheckpointManager(directory.absolute(), options=options)


def save(manager: ocp.CheckpointManager, state: TrainState, *, keep: int, losses: Mapping[int, float]) -> None:
    """Starts saving the state under its step, after the save before it is finished; see `finish`.

    Raises:
      SaveError: this save, or the one before, failed.
    """
    finish_save(manager, keep=keep, losses=losses)
    counts = {name: int(getattr(state, name)) for name in ("step", "skipped", "skipped_in_a_row")}
    record = {
        **counts,
        "parameters": compute_checksums(state.parameters),
        "optimizer_state": compute_checksums(state.optimizer_state),
    }
    with _saving():
        saved = manager.save(
            counts["step"],
            args=ocp.args.Composite(
                parameters=ocp.args.StandardSave(state.parameters),
                optimizer_state=ocp.args.StandardSave(state.optimizer_state),
                record=ocp.args.JsonSave(record),
            ),
        )
    assert saved, counts


def raise_save_errors(manager: ocp.CheckpointManager) -> None:
    """Raises SaveError if the save in the background has failed."""
    with _saving():
        manager.check_for_errors()


def finish_save(manager: ocp.CheckpointManager, *, keep: int, losses: Mapping[int, float]) -> None:
    """Waits for the save in the background, and then removes what need not stay. All processes call it together.

    Args:
      keep: how many of the newest checkpoints stay; the best one does besides.
      losses: held-out loss by step.

    Raises:
      SaveError: the save failed; nothing is removed.
    """
    with _saving():
        manager.wait_until_finished()
        steps = sorted(manager.all_steps())
        for step in steps[:-keep]:
            if step != find_best_step(losses, steps):
                manager.delete(step)


@contextlib.contextmanager
def _saving() -> Iterator[None]:
    try:
        yield
    except (ValueError, OSError) as error:
        raise SaveError(
            f"a checkpoint could not be written: {str(error).partition(chr(10))[0]}. Those before it stay. Make "
            "room on the disk, or the directory writable; the same command goes on from the last one."
        ) from error


def restore(manager: ocp.CheckpointManager, step: int, like: TrainState) -> TrainState:
    """Returns the state saved at `step`, laid out as `like` (arrays, or their shapes with shardings).

    Raises:
      DamagedError: a file is missing, or has changed since it was written.
    """
    record, trees = _restore(manager, step, parameters=like.parameters, optimizer_state=like.optimizer_state)

    def count(name: str) -> jax.Array:
        place = getattr(like, name)
        return jax.device_put(jnp.asarray(record[name], place.dtype), place.sharding)

    return TrainState(count("step"), count("skipped"), count("skipped_in_a_row"), **trees)


def restore_parameters(manager: ocp.CheckpointManager, step: int, like: dict) -> dict:
    """Returns the parameters alone of the state saved at `step`.

    Raises:
      DamagedError: a file is missing, or has changed since it was written.
    """
    return _restore(manager, step, parameters=like)[1]["parameters"]


def _restore(manager: ocp.CheckpointManager, step: int, **like: Any) -> tuple[Mapping[str, Any], dict[str, Any]]:
    wanted = {name: ocp.args.StandardRestore(tree) for name, tree in like.items()}

    def read() -> Any:
        try:
            with open_reader(pathlib.Path(manager.directory)) as reader:
                return reader.restore(step, args=ocp.args.Composite(record=ocp.args.JsonRestore(), **wanted))
        except Exception as error:
            if not isinstance(error, _BROKEN) and type(error) is not Exception:
                raise
            whose = "" if jax.process_count() == 1 else f"process {jax.process_index()}: "
            return DamagedError(f"{whose}checkpoint {step} cannot be read: {str(error).partition(chr(10))[0]}")

    found = distributed.run_on_all_hosts(read)  # where reading fails for another reason, the checkpoint may be whole
    # A file that one process needs may be there for the others.
    if damage := [
        text for text in distributed.all_gather_strings(str(found) if isinstance(found, DamagedError) else "") if text
    ]:
        raise DamagedError(damage[0])
    record = found["record"]
    for name in like:
        changed = [path for path, value in compute_checksums(found[name]).items() if record[name].get(path) != value]
        if changed:
            raise DamagedError(
                f"checkpoint {step} is not what was written: {name}{changed[0]} has another checksum "
                f"({len(changed)} arrays in all)"
            )
    return record, {name: found[name] for name in like}


def compute_checksums(tree: Any) -> dict[str, int]:
    """Returns a checksum of each array by its path; whatever its layout, and different if one of its bits is.

    All processes call it together. Source: the finaliser of MurmurHash3 (Appleby, public domain) on each word mixed
    with its index, added up modulo 2**32; adding in any order gives the same.
    """
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    sums = _checksums([leaf for _, leaf in leaves])
    return {jax.tree_util.keystr(path): int(value) for (path, _), value in zip(leaves, sums, strict=True)}


@jax.jit
def _checksums(arrays: Sequence[Array]) -> list[UInt32[Array, ""]]:
    return [_checksum(array) for array in arrays]


def _checksum(array: Array) -> UInt32[Array, ""]:
    assert array.dtype.itemsize == 4, array.dtype
    index, stride = jnp.zeros(array.shape, jnp.uint32), 1
    for axis in reversed(range(array.ndim)):
        index += jax.lax.broadcasted_iota(jnp.uint32, array.shape, axis) * np.uint32(stride % 2**32)
        stride *= array.shape[axis]
    word = jax.lax.bitcast_convert_type(array, jnp.uint32) ^ (index * np.uint32(0x9E3779B9))
    word = (word ^ (word >> 16)) * np.uint32(0x85EBCA6B)
    word = (word ^ (word >> 13)) * np.uint32(0xC2B2AE35)
    return jnp.sum(word ^ (word >> 16), dtype=jnp.uint32)
