"""The steps of a run: updates, metrics, evaluations, checkpoints and stops, up to the last step.

Takes a prepared run and its state. Writes metrics and checkpoints, and knows no other file of the run's directory.
"""

import contextlib
import math
import pathlib
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np
import rich.console
from jax.sharding import Mesh
from orbax.checkpoint import CheckpointManager

from dialog_jax.batching import batches
from dialog_jax.batching.batches import Batch, Plan
from dialog_jax.errors import UserError
from dialog_jax.training import checkpoints, distributed, metrics, optimizer, sharding, trackers
from dialog_jax.training.config import TrainConfig
from dialog_jax.training.console import Clock, Progress, Startup
from dialog_jax.training.run_inputs import Inputs
from dialog_jax.training.score_steps import EvaluationSums
from dialog_jax.training.signals import Listener, StoppedError
from dialog_jax.training.trackers import Trackers
from dialog_jax.training.train_step import StepMetrics, TrainState
from dialog_jax.training.trainable import Selection

_DIALOGUES_NAMED = 20  # per skipped step


class Run(NamedTuple):
    """A prepared run: what does not change from step to step."""

    config: TrainConfig
    mesh: Mesh
    inputs: Inputs
    plan: Plan
    steps: int
    train_step: Callable[[TrainState, Batch], tuple[TrainState, StepMetrics]]
    evaluation_step: Callable[[dict, Batch], EvaluationSums]
    listener: Listener
    selection: Selection


class _Outputs(NamedTuple):
    """Where the loop writes."""

    manager: CheckpointManager
    directory: pathlib.Path
    """Of the checkpoints."""
    writer: metrics.Writer | metrics.NullWriter
    trackers: Trackers
    progress: Progress
    losses: dict[int, float]
    """Held-out loss by step, up to the current one."""


class _Update(NamedTuple):
    """An update that the device may still be computing."""

    step: int
    metrics: StepMetrics
    startup_seconds: float | None
    """Seconds to the first step, with the first update of the process."""


def train(
    run: Run, state: TrainState, directory: pathlib.Path, console: rich.console.Console, startup: Startup
) -> None:
    """Trains from `state` to the last step, or until a signal arrives; ends `startup` with the first step.

    Raises:
      UserError: loss or gradient were not finite too often in a row, or a file could not be written.
      StoppedError: a signal arrived; the last step is saved.
    """
    start = int(state.step)
    losses = {record["step"]: record["loss"] for record in metrics.read_records(directory / "evaluation.jsonl")}
    distributed.check_same("state", {"evaluation.jsonl": losses})
    if start >= run.steps and start in losses:
        beyond = f", beyond the {run.steps:,} of the config" if start > run.steps else ""
        console.print(
            f"The run is finished: step {start:,}{beyond}. Nothing to do. To extend it, raise steps or epochs and add "
            "--allow_changes."
        )
        return
    if start:
        console.print(f"resuming from step {start:,}")
    # An interrupted run may have evaluated steps after its last checkpoint; they are trained and evaluated again.
    losses = {step: loss for step, loss in losses.items() if start and step <= start}
    for line in sharding.describe_uneven_layouts(run.mesh, state.parameters):
        console.print(f"on the mesh: {line}")
    with contextlib.ExitStack() as stack:
        place = directory / "checkpoints"
        manager = stack.enter_context(checkpoints.open_manager(place))
        open_trackers = stack.enter_context(trackers.open_trackers(run.config, directory, start, console.print))
        writer = metrics.Writer(directory, step=start) if distributed.is_primary() else metrics.NullWriter()
        stack.enter_context(contextlib.closing(writer))
        progress = stack.enter_context(Progress(console, run.steps, start))
        _train_steps(run, state, _Outputs(manager, place, writer, open_trackers, progress, losses), startup)


def _train_steps(run: Run, state: TrainState, outputs: _Outputs, startup: Startup) -> None:
    """Trains from the step of `state`.

    The host is one step behind: it reports the metrics of step n while the device computes step n + 1. Before an
    evaluation or a save it catches up.
    """
    start, keep = int(state.step), run.config.keep_checkpoints
    run.listener.defer_signals(start)
    if _is_evaluated(run, start) and start not in outputs.losses:
        _evaluate(run, start, state, outputs)
    if run.listener.received:  # the restored checkpoint is still there
        raise StoppedError(run.listener.received, start or None)
    startup.done("evaluating")
    local_rows = sharding.find_local_rows(run.mesh, run.config.rows)
    clock = Clock()
    pending: _Update | None = None
    saved = False

    for step, batch in enumerate(run.plan.batches(start, run.steps, local_rows), start + 1):
        global_batch = _place_batch(run, batch)
        figures = _wait_for_figures(run, pending, clock, outputs) if pending else {}
        state, step_metrics = run.train_step(state, global_batch)  # returns once it is compiled, before it is computed
        if pending:
            _report(pending.step, figures, outputs)
        if step == start + 1:
            startup.done("compiling")
            outputs.progress.print(startup.line)
        pending = _Update(step, step_metrics, startup.seconds if step == start + 1 else None)
        checkpoints.raise_save_errors(outputs.manager)

        stop_signal = run.listener.agree_on_signal(step)
        if not (stop_signal or _is_evaluated(run, step)):
            continue
        _report(step, _wait_for_figures(run, pending, clock, outputs), outputs)
        pending = None
        if _is_evaluated(run, step):
            _evaluate(run, step, state, outputs)
        stop_signal = stop_signal or run.listener.received
        if stop_signal or step % run.config.checkpoint_every == 0 or step == run.steps:
            outputs.writer.sync()
            checkpoints.save(outputs.manager, state, keep=keep, losses=outputs.losses)
            if not saved and not start:
                checkpoints.finish_save(outputs.manager, keep=keep, losses=outputs.losses)
                checkpoints.check_saved(outputs.directory, state)
            saved = True
        if stop_signal:
            checkpoints.finish_save(outputs.manager, keep=keep, losses=outputs.losses)
            raise StoppedError(stop_signal, step)
        clock.restart()
    checkpoints.finish_save(outputs.manager, keep=keep, losses=outputs.losses)


def _is_evaluated(run: Run, step: int) -> bool:
    return step % run.config.evaluate_every == 0 or step == run.steps


def _place_batch(run: Run, batch: Batch) -> Batch:
    """Returns the global batch of which `batch` holds the rows of this process."""
    local_rows = sharding.find_local_rows(run.mesh, run.config.rows)
    return batch.map(lambda array: sharding.place_rows(run.mesh, array, local_rows, run.config.rows))


def _report(step: int, figures: Mapping[str, float], outputs: _Outputs) -> None:
    outputs.writer.train(step, figures)
    outputs.trackers.train(step, figures)
    outputs.progress.show(step, figures)


def _evaluate(run: Run, step: int, state: TrainState, outputs: _Outputs) -> None:
    """Writes and shows held-out figures after `step`; returns early and without figures if a signal arrives."""
    data = run.config.data
    evaluation = metrics.Evaluation()
    with outputs.progress.evaluating():
        for batch, _ in batches.evaluation_batches(
            run.inputs.held_out,
            max_length=data.max_length,
            rows=run.config.rows,
            limit=run.config.evaluate_rows,
            local_rows=sharding.find_local_rows(run.mesh, run.config.rows),
        ):
            evaluation.add(run.evaluation_step(state.parameters, _place_batch(run, batch)))
            if run.listener.received:
                return
    figures = evaluation.figures()
    loss = figures["loss"]
    if not math.isfinite(loss):
        raise UserError(
            f"step {step}: held-out loss {loss}. The run stops; earlier checkpoints stay. Lower "
            "optimizer.learning_rate."
        )
    outputs.writer.evaluation(step, figures)
    outputs.trackers.evaluation(step, figures)
    outputs.losses[step] = loss
    outputs.progress.print(
        f"step {step:,}: held-out loss {loss:.4f}, accuracy {figures['accuracy']:.2%} on {figures['targets']:,} targets"
    )


def _wait_for_figures(run: Run, update: _Update, clock: Clock, outputs: _Outputs) -> dict[str, float]:
    """Returns the figures of an update once the device has computed it.

    Prints a line if the update was skipped; raises UserError after too many in a row.
    """
    values = StepMetrics(*(np.asarray(value).item() for value in update.metrics))
    figures = _make_figures(run, update, values, clock.lap())
    if values.skipped_in_a_row:
        rows = run.plan.rows(update.step - 1)
        dialogues = sorted({run.inputs.train.dialogue(tree) for row in rows for tree in row})
        more = len(dialogues) - _DIALOGUES_NAMED
        message = (
            f"step {update.step}: loss {values.loss}, gradient norm {values.gradient_norm}: no update. Its {len(rows)} "
            f"rows hold {', '.join(dialogues[:_DIALOGUES_NAMED])}{f' and {more} more' if more > 0 else ''}"
        )
        if values.skipped_in_a_row >= run.config.max_bad_steps:
            raise UserError(
                f"{message}. That is max_bad_steps = {values.skipped_in_a_row} in a row, so the run stops; earlier "
                "checkpoints stay. Lower optimizer.learning_rate, or inspect the dialogues."
            )
        outputs.progress.print(message)
    return figures


def _make_figures(run: Run, update: _Update, values: StepMetrics, seconds: float) -> dict[str, float]:
    """Returns what metrics.jsonl lists of an update that took `seconds`."""
    config = run.config
    previous_updates = update.step - 1 - values.skipped + bool(values.skipped_in_a_row)
    schedule = optimizer.make_schedule(config.optimizer, run.steps)
    figures: dict[str, Any] = {
        "epoch": update.step * config.rows * config.gradient_accumulation / run.plan.rows_per_epoch,
        "loss": values.loss,
        "nll": values.nll,
        "gradient_norm": values.gradient_norm,
        "learning_rate": float(schedule(previous_updates)),
        "skipped": values.skipped,
        "seconds": seconds,
        "tokens_per_second": values.tokens / seconds,
        "response_tokens_per_second": values.response_tokens / seconds,
        "tokens": values.tokens,
        "targets": values.targets,
        "imbalance": run.plan.imbalance(update.step - 1),
        "row_tokens_used": values.tokens / (config.rows * config.gradient_accumulation * config.data.max_length),
    }
    peak = metrics.find_peak_flops(run.mesh.devices.flat[0])
    if peak is not None:
        flops = metrics.count_flops(
            run.inputs.model,
            tokens=float(values.tokens),
            attention_pairs=float(values.attention_pairs),
            targets=float(values.targets),
            selection=run.selection,
        )
        figures["mfu"] = flops / seconds / (peak * run.mesh.devices.size)
    memory = metrics.measure_peak_memory(run.mesh.local_devices)
    if memory is not None:
        figures["peak_memory_gb"] = memory / 1e9
    if update.startup_seconds is not None:
        figures["startup_seconds"] = update.startup_seconds
    return figures
