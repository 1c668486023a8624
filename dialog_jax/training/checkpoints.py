"""Train states on disk, written by orbax in the background. The newest few and the best by held-out loss are kept.

A checkpoint also holds a checksum of each array, computed where the array lives. Orbax detects files that are missing
or cut off, but not a changed byte of an array; the checksums do, on any mesh. Of frozen parameters it holds the
checksums only: they are those of the model that the run began with.
"""

import contextlib
import logging
import os
import pathlib
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp

from dialog_jax.errors import UserError
from dialog_jax.training import checksums, distributed, optimizer
from dialog_jax.training.train_step import TrainState

_COUNTS = ("step", "skipped", "skipped_in_a_row")  # of TrainState: kept in the record, with the checksums

# What orbax raises for damaged files: ValueError for array data and for JSON that does not parse, KeyError and
# AttributeError for a changed name within its JSON, FileNotFoundError for a missing record. See also `_read`.
_DAMAGE = (ValueError, KeyError, AttributeError, FileNotFoundError)

# In a path, orbax and tensorstore read these as patterns, escapes and the start of an address: checkpoints would be
# written in pieces that nobody finds again, or mixed with those of a directory beside it.
_SPECIAL_IN_PATHS = re.compile(r"[\[\]*?\\]|\w:(?=/|$)|[\ud800-\udfff]")


class DamagedError(UserError):
    """A checkpoint that cannot be read, or that differs from what was written."""


def check_path(run: pathlib.Path) -> None:
    """Raises UserError if checkpoints below the directory of a run could be written but not read."""
    path = os.path.abspath(run)
    if match := _SPECIAL_IN_PATHS.search(path):
        raise UserError(
            f"{path!r} has {match[0]!r} in it, which the library that writes checkpoints does not take literally. "
            "Choose a path without [ ] * ? \\ and without names that end in a colon, or rename the run's directory."
        )


def find_best_step(losses: Mapping[int, float], steps: Sequence[int]) -> int | None:
    """Returns the first of `steps` with the lowest held-out loss; None if none of them has one."""
    evaluated = [step for step in sorted(steps) if step in losses]
    return min(evaluated, key=lambda step: losses[step], default=None)


def open_manager(directory: pathlib.Path) -> ocp.CheckpointManager:
    """Returns orbax's manager of the checkpoints in `directory`; removes what a killed process left half-written.

    Close it, or use it in a `with` statement, so that the last save is finished.
    """
    # `finish_save` decides which checkpoints stay, not orbax: when the caller learns of a failed save first, orbax 0.11
    # counts that save as done and removes an older checkpoint for it.
    options = ocp.CheckpointManagerOptions(enable_async_checkpointing=True, cleanup_tmp_directories=True)
    return ocp.CheckpointManager(directory.absolute(), options=options)


def _open_reader(directory: pathlib.Path) -> ocp.CheckpointManager:
    """Returns orbax's manager for reading only, also while a run continues there.

    It waits for no other process, so that a process which cannot read its part can report that to the others.
    """
    process = jax.process_index()
    single_process = ocp.options.MultiprocessingOptions(primary_host=process, active_processes={process})
    with _without_warnings():  # that it is read-only
        options = ocp.CheckpointManagerOptions(read_only=True, create=False, multiprocessing_options=single_process)
        return ocp.CheckpointManager(directory.absolute(), options=options)


@contextlib.contextmanager
def _without_warnings() -> Iterator[None]:
    logger = logging.getLogger("absl")

    def is_error(record: logging.LogRecord) -> bool:
        return record.levelno >= logging.ERROR

    logger.addFilter(is_error)
    try:
        yield
    finally:
        logger.removeFilter(is_error)


def list_steps(directory: pathlib.Path) -> list[int]:
    """Returns the steps that have a complete checkpoint in `directory`, in order."""
    if not directory.exists():
        return []
    with _open_reader(directory) as reader:
        return sorted(reader.all_steps())


def save(manager: ocp.CheckpointManager, state: TrainState, *, keep: int, losses: Mapping[int, float]) -> None:
    """Finishes the previous save as `finish_save` does and starts to save the state under its step.

    Raises:
      UserError: this save or the previous one failed.
    """
    finish_save(manager, keep=keep, losses=losses)
    counts = {name: int(getattr(state, name)) for name in _COUNTS}
    record = {
        **counts,
        "trained": checksums.compute_checksums(state.trained),
        "optimizer_state": checksums.compute_checksums(state.optimizer_state),
        "frozen": checksums.compute_checksums(state.frozen),
    }
    with _save_errors():
        saved = manager.save(
            counts["step"],
            args=ocp.args.Composite(
                trained=ocp.args.StandardSave(state.trained),
                optimizer_state=ocp.args.StandardSave(state.optimizer_state),
                record=ocp.args.JsonSave(record),
            ),
        )
    assert saved, counts


def raise_save_errors(manager: ocp.CheckpointManager) -> None:
    """Raises UserError if the save in the background has failed."""
    with _save_errors():
        manager.check_for_errors()


def finish_save(manager: ocp.CheckpointManager, *, keep: int, losses: Mapping[int, float]) -> None:
    """Waits for the save in the background, then removes older checkpoints. All processes call it together.

    Args:
      keep: how many of the newest checkpoints stay; the best one stays too.
      losses: held-out loss by step.

    Raises:
      UserError: the save failed; nothing is removed.
    """
    with _save_errors():
        manager.wait_until_finished()
        steps = sorted(manager.all_steps())
        for step in steps[:-keep]:
            if step != find_best_step(losses, steps):
                manager.delete(step)


@contextlib.contextmanager
def _save_errors() -> Iterator[None]:
    try:
        yield
    except (ValueError, OSError) as error:
        raise UserError(
            f"a checkpoint could not be written: {_first_line(error)}. Earlier ones stay. Make room on the disk, or "
            "the directory writable; the same command resumes from the last one."
        ) from error


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0]


def restore(directory: pathlib.Path, step: int, like: TrainState) -> TrainState:
    """Returns the state saved at `step`, laid out as `like` (arrays, or their shapes with shardings).

    Args:
      like: with the frozen parameters themselves.

    Raises:
      DamagedError: a file is missing, has changed since it was written, or holds other arrays than `like`.
      UserError: the frozen parameters are not those of the run.
    """
    trees_like = {"trained": like.trained, "optimizer_state": like.optimizer_state}
    record, trees = _restore(directory, step, trees_like, ocp.args.StandardRestore)
    changed = sorted(set(record.get("frozen", {}).items()) ^ set(checksums.compute_checksums(like.frozen).items()))
    if changed:
        raise UserError(
            f"the frozen parameters are not those of checkpoint {step}: {changed[0][0]} differs. Resume with the model "
            "and the frozen_dtype that the run began with."
        )

    counts = {}
    for name in _COUNTS:
        leaf = getattr(like, name)
        counts[name] = jax.device_put(jnp.asarray(record[name], leaf.dtype), leaf.sharding)
    return TrainState(**counts, trained=trees["trained"], frozen=like.frozen, optimizer_state=trees["optimizer_state"])


def restore_trained(directory: pathlib.Path, step: int, like: dict) -> dict:
    """Returns only the trained parameters of the state saved at `step`; raises DamagedError as `restore` does."""
    return _restore(directory, step, {"trained": like}, ocp.args.StandardRestore)[1]["trained"]


def restore_average(directory: pathlib.Path, step: int, like: Any) -> dict:
    """Returns the moving average of the trained parameters at `step`; raises DamagedError as `restore` does.

    Args:
      like: the optimizer's state, as shapes with shardings. It has an average.
    """

    def is_average(node: Any) -> bool:
        return isinstance(node, optimizer.Average)

    needed = jax.tree.map(lambda node: node if is_average(node) else ocp.PLACEHOLDER, like, is_leaf=is_average)
    _, trees = _restore(directory, step, {"optimizer_state": needed}, _restore_some)
    average = optimizer.find_average(trees["optimizer_state"])
    assert average is not None
    return average


def check_saved(directory: pathlib.Path, state: TrainState) -> None:
    """Reads back the checkpoint of `state`, in groups of arrays that need no more memory than the largest array.

    All processes call it together, once the save is finished.

    Raises:
      UserError: an array is missing, or is not what was written.
    """
    for name in ("trained", "optimizer_state"):
        leaves, structure = jax.tree.flatten(getattr(state, name))
        for group in _group_by_size([leaf.nbytes for leaf in leaves]):
            like = [leaf if index in group else ocp.PLACEHOLDER for index, leaf in enumerate(leaves)]
            try:
                _restore(directory, int(state.step), {name: jax.tree.unflatten(structure, like)}, _restore_some)
            except DamagedError as error:
                raise UserError(
                    f"the first checkpoint, just written, cannot be read: {error}. The run stops before more work is "
                    "lost. Choose another --output_dir, on another disk."
                ) from error


def _group_by_size(sizes: Sequence[int]) -> list[list[int]]:
    """Returns consecutive indices in groups of the size of the largest, or 64 MiB if that is more.

    In MiB: [10, 60, 100, 30, 80]  ->  [[0, 1], [2], [3], [4]]
    """
    limit = max([1 << 26, *sizes])
    groups: list[list[int]] = []
    total = limit
    for index, size in enumerate(sizes):
        if total + size > limit:
            groups.append([])
            total = 0
        groups[-1].append(index)
        total += size
    return groups


def _restore_some(like: Any) -> ocp.args.PyTreeRestore:
    """Returns the arguments that restore the leaves of `like` that are not `ocp.PLACEHOLDER`."""
    return ocp.args.PyTreeRestore(like, ocp.checkpoint_utils.construct_restore_args(like))


def _restore(
    directory: pathlib.Path, step: int, like: Mapping[str, Any], make_arguments: Callable[[Any], Any]
) -> tuple[Mapping[str, Any], dict[str, Any]]:
    """Returns (record of a checkpoint, its trees that are named in `like`)."""

    def read() -> tuple[dict[str, Any], str]:
        with _open_reader(directory) as reader:
            content, damage = _read(reader, step, record=ocp.args.JsonRestore())
            damage = damage or _check_record(content["record"], step, like)
            if damage:
                return {}, damage
            arrays, damage = _read(reader, step, **{name: make_arguments(tree) for name, tree in like.items()})
            return content | arrays, damage

    # Any other exception on some process, such as a failing network disk, says nothing about the checkpoint.
    content, damage = distributed.run_on_all_hosts(read)
    # A file that one process needs may be missing for that process only.
    for text in distributed.all_gather_strings(damage):
        if text:
            raise DamagedError(text)
    record = content["record"]
    for name in like:
        sums = checksums.compute_checksums(content[name])
        changed = [path for path, value in sums.items() if record[name][path] != value]
        if changed:
            raise DamagedError(
                f"checkpoint {step} is not what was written: {name}{changed[0]} has another checksum "
                f"({len(changed)} arrays in all)"
            )
    return record, {name: content[name] for name in like}


def _read(reader: ocp.CheckpointManager, step: int, **items: Any) -> tuple[dict[str, Any], str]:
    """Returns (the items of a checkpoint, ""), or ({}, what is damaged)."""
    try:
        return dict(reader.restore(step, args=ocp.args.Composite(**items)).items()), ""
    except Exception as error:
        # Orbax raises a bare Exception where a file of array data is cut off. A TypeError is a bug; a MemoryError or
        # PermissionError says nothing about the files.
        if not isinstance(error, _DAMAGE) and type(error) is not Exception:
            raise
        process = "" if jax.process_count() == 1 else f"process {jax.process_index()}: "
        return {}, f"{process}checkpoint {step} cannot be read: {_first_line(error)}"


def _check_record(record: Any, step: int, like: Mapping[str, Any]) -> str:
    """Returns how the record of a checkpoint does not describe `like`; empty if it does."""
    if not isinstance(record, dict) or any(not isinstance(record.get(name), int) for name in _COUNTS):
        return f"checkpoint {step} cannot be read: its record is incomplete"
    if record["step"] != step:
        return f"checkpoint {step} is not what was written: its record is of step {record['step']}"
    for name, tree in like.items():
        needed = {jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(tree)}
        if differing := sorted(needed ^ set(record.get(name) or ())):
            return f"checkpoint {step} holds other arrays than this run: {name}{differing[0]} is in only one of the two"
    return ""
