"""From one step of a run to the next: updates, figures, evaluations, saves and stops, until the last step.

Knows a run as it is prepared: no files but those of figures and checkpoints, and no way to begin one.
"""

import contextlib
import math
import pathlib
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np
import optax
import rich.console
from jax.sharding import Mesh
from orbax.checkpoint import CheckpointManager

from dialog_jax.batching import batches
from dialog_jax.batching.batches import Batch, Plan
from dialog_jax.batching.mixture import Mixture
from dialog_jax.model.decoder import DecoderConfig
from dialog_jax.training import checkpoints, distributed, metrics, sharding
from dialog_jax.training.config import TrainConfig
from dialog_jax.training.console import Clock, Progress, Startup
from dialog_jax.training.signals import Listener, StoppedError
from dialog_jax.training.train_step import EvaluationSums, StepMetrics, TrainState
from dialog_jax.trees.dataset import Trees


class Run(NamedTuple):
    """What stays the same while a run goes on."""

    config: TrainConfig
    mesh: Mesh
    model: DecoderConfig
    plan: Plan
    train: Trees | Mixture
    held_out: Trees
    own: list[int]
    """The rows of a micro-batch that this process fills."""
    steps: int
    schedule: optax.Schedule
    train_step: Callable[[TrainState, Batch], tuple[TrainState, StepMetrics]]
    evaluation_step: Callable[[dict, Batch], EvaluationSums]
    losses: dict[int, float]
    """Held-out loss by step, as far as the run has come."""
    listener: Listener


class _Update(NamedTuple):
    """An update that the device may still be working on."""

    step: int
    measured: StepMetrics


def train(
    this: Run,
    directory: pathlib.Path,
    state: TrainState,
    manager: CheckpointManager,
    console: rich.console.Console,
    startup: Startup,
) -> None:
    """Goes from the state that there is to the last step; the first one ends `startup`."""
    start = int(state.step)
    if start >= this.steps and start in this.losses:
        console.print(f"The run is finished: step {start:,}. Nothing to do.")
        return
    if start:
        console.print(f"going on from step {start:,}")
    for later in [step for step in this.losses if not start or step > start]:
        del this.losses[later]  # of steps to come again
    for line in sharding.describe_uneven_layouts(this.mesh, state.parameters):
        console.print(f"on the mesh: {line}")
    writer = metrics.Writer(directory, step=start) if distributed.is_primary() else metrics.NullWriter()
    with contextlib.closing(writer), Progress(console, this.steps, start) as progress:
        _go_on(this, state, manager, writer, progress, startup)


def _go_on(
    this: Run,
    state: TrainState,
    manager: CheckpointManager,
    writer: metrics.Writer | metrics.NullWriter,
    progress: Progress,
    startup: Startup,
) -> None:
    """Trains from the step of `state` to the end, or until a signal arrives."""
    start, keep = int(state.step), this.config.keep_checkpoints
    this.listener.defer_signals(start)
    if _is_evaluated(this, start) and start not in this.losses:
        _evaluate(this, start, state, writer, progress)
    if this.listener.received:  # what was restored is still there
        raise StoppedError(this.listener.received, start or None)
    startup.done("evaluating")
    clock = Clock()
    previous: _Update | None = None

    def report(figures: dict[str, float]) -> None:
        assert previous is not None
        if previous.step == start + 1:
            figures["startup_seconds"] = startup.seconds
        writer.train(previous.step, figures)
        progress.show(previous.step, figures)

    for number, batch in enumerate(this.plan.batches(start, this.steps, this.own), start + 1):
        placed = _place(this, batch)
        figures = _checked(this, previous, clock, progress) if previous else {}
        state, measured = this.train_step(state, placed)  # returns once it is compiled
        if number == start + 1:
            startup.done("compiling")
            progress.print(startup.line)
        if previous:
            report(figures)  # while the device works on
        previous = _Update(number, measured)
        checkpoints.raise_save_errors(manager)
        stopped = this.listener.agree_on_signal(number)
        if not _is_evaluated(this, number) and not stopped:
            continue
        report(_checked(this, previous, clock, progress))
        previous = None
        if _is_evaluated(this, number):
            _evaluate(this, number, state, writer, progress)
        stopped = stopped or this.listener.received
        if stopped or number % this.config.checkpoint_every == 0 or number == this.steps:
            writer.sync()
            checkpoints.save(manager, state, keep=keep, losses=this.losses)
        if stopped:
            checkpoints.finish_save(manager, keep=keep, losses=this.losses)
            raise StoppedError(stopped, number)
        clock.restart()
    checkpoints.finish_save(manager, keep=keep, losses=this.losses)


def _is_evaluated(this: Run, step: int) -> bool:
    return step % this.config.evaluate_every == 0 or step == this.steps


def _place(this: Run, batch: Batch) -> Batch:
    """The global batch, of which `batch` holds the rows of this process."""
    return batch.map(lambda array: sharding.place_rows(this.mesh, array, this.own, this.config.rows))


def _evaluate(
    this: Run, number: int, state: TrainState, writer: metrics.Writer | metrics.NullWriter, progress: Progress
) -> None:
    """Writes and shows held-out figures after step `number`; leaves off, with none, if a signal arrives."""
    data = this.config.data
    evaluation = metrics.Evaluation()
    for batch, _ in batches.evaluation_batches(
        this.held_out,
        max_length=data.max_length,
        max_targets=data.max_targets or data.max_length,
        rows=this.config.rows,
        limit=this.config.evaluate_rows,
        own=this.own,
    ):
        evaluation.add(this.evaluation_step(state.parameters, _place(this, batch)))
        if this.listener.received:
            return
    figures = evaluation.figures()
    if not math.isfinite(figures["loss"]):
        raise FloatingPointError(
            f"step {number}: held-out loss {figures['loss']}. The run stops; the checkpoints before stay. "
            "Lower optimizer.learning_rate."
        )
    writer.evaluation(number, figures)
    this.losses[number] = figures["loss"]
    progress.print(_held_out_line(number, figures))


def _checked(this: Run, update: _Update, clock: Clock, progress: Progress) -> dict[str, float]:
    """Waits for the update; its figures. Tells of one that was skipped, and stops after too many in a row."""
    figures = _figures(this, update, clock)
    in_a_row = int(np.asarray(update.measured.skipped_in_a_row))
    if in_a_row:
        rows = this.plan.rows(update.step - 1)
        ids = sorted({this.train.dialogue(tree) for row in rows for tree in row})
        told = (
            f"step {update.step}: loss {figures['loss']}, gradient norm {figures['gradient_norm']}: no update. Its "
            f"{len(rows)} rows are of {', '.join(ids[:20])}{f' and {len(ids) - 20} more' if len(ids) > 20 else ''}"
        )
        if in_a_row >= this.config.max_bad_steps:
            raise FloatingPointError(
                f"{told}. That is max_bad_steps = {in_a_row} in a row, so the run stops; the checkpoints before stay. "
                "Lower optimizer.learning_rate, or look at the dialogues."
            )
        progress.print(told)
    return figures


def _figures(this: Run, update: _Update, clock: Clock) -> dict[str, float]:
    """The figures of one update; waits for it."""
    values = StepMetrics(*(np.asarray(value).item() for value in update.measured))
    seconds = clock.lap()
    updates_before = update.step - 1 - values.skipped + bool(values.skipped_in_a_row)
    figures: dict[str, Any] = {
        "loss": values.loss,
        "nll": values.nll,
        "gradient_norm": values.gradient_norm,
        "learning_rate": float(this.schedule(updates_before)),
        "skipped": values.skipped,
        "seconds": seconds,
        "tokens_per_second": values.tokens / seconds,
        "response_tokens_per_second": values.response_tokens / seconds,
        "tokens": values.tokens,
        "targets": values.targets,
        "imbalance": this.plan.imbalance(update.step - 1),
        "row_tokens_used": values.tokens
        / (this.config.rows * this.config.gradient_accumulation * this.config.data.max_length),
    }
    peak = metrics.find_peak_flops(this.mesh.devices.flat[0])
    if peak is not None:
        needed = metrics.count_flops(
            this.model,
            tokens=float(values.tokens),
            attention_pairs=float(values.attention_pairs),
            targets=float(values.targets),
        )
        figures["mfu"] = needed / seconds / (peak * this.mesh.devices.size)
    return figures


def _held_out_line(step: int, figures: Mapping[str, Any]) -> str:
    return (
        f"step {step:,}: held-out loss {figures['loss']:.4f}, accuracy {figures['accuracy']:.2%} "
        f"on {figures['targets']:,} targets"
    )
