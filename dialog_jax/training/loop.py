"""A run: from a config to checkpoints and figures in one directory. Composes all other modules.

`training.run_directory` says what lies in that directory.
"""

import contextlib
import functools
import math
import os
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import rich.console
from jax.sharding import Mesh
from orbax.checkpoint import CheckpointManager

from dialog_jax.data import batches
from dialog_jax.data.batches import Batch, Plan
from dialog_jax.data.dataset import Trees
from dialog_jax.data.mixing import Mixture
from dialog_jax.model import decoder, pretrained
from dialog_jax.model.decoder import DecoderConfig
from dialog_jax.training import checkpoints, inputs, interruption, metrics, optimizer, run_directory, sharding
from dialog_jax.training import step as step_lib
from dialog_jax.training.checkpoints import DamagedError
from dialog_jax.training.config import TrainConfig
from dialog_jax.training.inputs import Inputs
from dialog_jax.training.interruption import Listener, StoppedError
from dialog_jax.training.progress import Clock, Progress
from dialog_jax.training.step import EvaluationSums, StepMetrics, TrainState

_TURNS_SHOWN = 32  # turns that held-out figures list one by one
_STEPS_WEIGHED = 50  # of which the balance is told at the beginning


class RunResult(NamedTuple):
    """Where a run stands at its end."""

    step: int
    first: dict[str, Any]
    """Held-out figures before training, as `metrics.Evaluation.figures` gives them."""
    last: dict[str, Any]


class _Run(NamedTuple):
    """What stays the same while a run goes on."""

    config: TrainConfig
    mesh: Mesh
    model: DecoderConfig
    plan: Plan
    train: Trees | Mixture
    held_out: Trees
    steps: int
    schedule: optax.Schedule
    train_step: Callable[[TrainState, Batch], tuple[TrainState, StepMetrics]]
    evaluation_step: Callable[[dict, Batch], EvaluationSums]
    losses: dict[int, float]
    """Held-out loss by step, as far as the run has come."""
    writer: metrics.Writer
    listener: Listener


class _Update(NamedTuple):
    """An update that the device may still be working on."""

    step: int
    batch: Batch
    measured: StepMetrics


def run(
    config: TrainConfig,
    output_dir: str | os.PathLike,
    *,
    allow_changes: bool = False,
    console: rich.console.Console | None = None,
) -> RunResult:
    """Trains as `config` says, or goes on from the newest checkpoint in `output_dir`; a finished run is left alone.

    Args:
      allow_changes: go on with the run in `output_dir` even if its config or data were others.

    Raises:
      ValueError: the directory belongs to another config or is in use, or model, tokenizer and data do not go together.
      FloatingPointError: loss or gradient were not finite too often in a row; the checkpoints before stay.
      SaveError: a checkpoint could not be written; those before stay.
      StoppedError: SIGINT or SIGTERM arrived; the last step is saved.
    """
    console = console or rich.console.Console(highlight=False, soft_wrap=True)
    directory = pathlib.Path(output_dir)
    if jax.process_count() > 1:
        raise ValueError(f"{jax.process_count()} processes: runs on several hosts are not supported yet. Use one.")
    mesh = sharding.make_mesh(config.mesh)
    _check_rows(config, mesh)
    run_directory.check(directory)
    with interruption.listening() as listener, run_directory.locked(directory):
        changes = run_directory.differences(directory, config)
        _refuse(directory, "another config", changes, allow_changes)
        given = inputs.read(config, directory, console)
        plan, steps = _planned(config, given.train, _shards(mesh), console)
        hashes = {**given.hashes, "steps": steps}
        changed = run_directory.changed_inputs(directory, hashes)
        _refuse(directory, "another content", changed, allow_changes)
        # A fresh run loads its weights before it claims the directory: that is when errors in them are found.
        loaded = None if (directory / "checkpoints").exists() else _load(given, mesh)
        run_directory.claim(
            directory,
            config,
            hashes,
            given.model,
            given.tokenizer,
            stop_tokens=given.stop_tokens,
            changes=changes + changed,
        )
        for change in changes + changed:
            console.print(f"changed: {change}")
        _train(config, directory, mesh, given, plan, steps, loaded, listener, console)
    lines = metrics.read_lines(directory / "evaluation.jsonl")
    return RunResult(steps, lines[0], lines[-1])


def _refuse(directory: pathlib.Path, what: str, differences: Sequence[str], allowed: bool) -> None:
    if differences and not allowed:
        raise ValueError(
            f"{directory.name} belongs to a run with {what} ({'; '.join(differences)}), so going on would not give the "
            "same run. Put back what it began with, choose another --output_dir, or say --allow_changes."
        )


def _train(
    config: TrainConfig,
    directory: pathlib.Path,
    mesh: Mesh,
    given: Inputs,
    plan: Plan,
    steps: int,
    loaded: dict | None,
    listener: Listener,
    console: rich.console.Console,
) -> None:
    """Goes from the newest checkpoint, or from the first step, to the last."""
    transform = optimizer.make_optimizer(config.optimizer, steps)
    losses = {line["step"]: line["loss"] for line in metrics.read_lines(directory / "evaluation.jsonl")}
    keep = config.keep_checkpoints
    with checkpoints.open_manager(directory / "checkpoints", keep=keep, losses=losses) as manager:
        start = manager.latest_step() or 0
        if start >= steps and start in losses:
            console.print(f"The run is finished: step {start:,}. Nothing to do.")
            return
        if start:
            state, shardings = _restored(given.model, mesh, transform, manager, directory, console)
            start = int(state.step)
            console.print(f"going on from step {start:,}")
        else:
            state, shardings = step_lib.initial_state(mesh, loaded or _load(given, mesh), transform)
        del loaded  # donated to the state
        for later in [step for step in losses if not start or step > start]:
            del losses[later]  # of steps to come again
        for line in sharding.undivided(mesh, state.parameters):
            console.print(f"not divided over the mesh: {line}")
        dtype = _compute_dtype(config, mesh)
        this = _Run(
            config=config,
            mesh=mesh,
            model=given.model,
            plan=plan,
            train=given.train,
            held_out=given.held_out,
            steps=steps,
            schedule=optimizer.make_schedule(config.optimizer, steps),
            train_step=step_lib.make_train_step(
                given.model,
                transform,
                mesh,
                shardings,
                compute_dtype=dtype,
                remat=config.remat,
                loss_config=config.loss,
            ),
            evaluation_step=step_lib.make_evaluation_step(
                given.model, mesh, shardings.parameters, compute_dtype=dtype, turns=_TURNS_SHOWN
            ),
            losses=losses,
            writer=metrics.Writer(directory, step=start),
            listener=listener,
        )
        with contextlib.closing(this.writer), Progress(console, steps, start) as progress:
            _go_on(this, state, start, manager, progress)


def _go_on(this: _Run, state: TrainState, start: int, manager: CheckpointManager, progress: Progress) -> None:
    """Trains from step `start` to the end, or until a signal arrives."""
    this.listener.keep()
    if _is_evaluated(this, start) and start not in this.losses:
        _evaluate(this, start, state, progress)
    if this.listener.received:  # what was restored is still there
        raise StoppedError(this.listener.received, start or None)
    clock = Clock()
    previous: _Update | None = None

    def report(figures: dict[str, float]) -> None:
        assert previous is not None
        this.writer.train(previous.step, figures)
        progress.show(previous.step, figures)

    for number, batch in enumerate(this.plan.batches(start, this.steps), start + 1):
        placed = _place(this.mesh, batch)
        figures = _checked(this, previous, clock, progress) if previous else {}
        state, measured = this.train_step(state, placed)
        if previous:
            report(figures)  # while the device works on
        previous = _Update(number, batch, measured)
        checkpoints.check(manager)
        if not _is_evaluated(this, number) and not this.listener.received:
            continue
        report(_checked(this, previous, clock, progress))
        previous = None
        if _is_evaluated(this, number):
            _evaluate(this, number, state, progress)
        stopped = this.listener.received
        if stopped or number % this.config.checkpoint_every == 0 or number == this.steps:
            this.writer.sync()
            checkpoints.save(manager, state)
        if stopped:
            checkpoints.wait(manager)
            raise StoppedError(stopped, number)
        clock.restart()
    checkpoints.wait(manager)


def _is_evaluated(this: _Run, step: int) -> bool:
    return step % this.config.evaluate_every == 0 or step == this.steps


def _planned(
    config: TrainConfig, train: Trees | Mixture, shards: int, console: rich.console.Console
) -> tuple[Plan, int]:
    """(which rows each step is given, number of steps)."""
    plan = Plan(
        train,
        max_length=config.data.max_length,
        max_targets=config.data.max_targets or config.data.max_length,
        rows=config.rows,
        micro_batches=config.gradient_accumulation,
        seed=config.seed,
        shards=shards,
    )
    for line in plan.mixed:
        console.print(line)
    rows_per_step = config.rows * config.gradient_accumulation
    steps = config.steps or max(1, math.ceil(config.epochs * plan.rows_per_epoch / rows_per_step))
    used = plan.tokens_per_epoch / (plan.rows_per_epoch * config.data.max_length)
    console.print(
        f"{plan.rows_per_epoch:,} rows of {config.data.max_length:,} tokens an epoch, {used:.1%} of them used; "
        f"{steps:,} steps of {rows_per_step} rows are {steps * rows_per_step / plan.rows_per_epoch:.2f} epochs"
    )
    if shards > 1:
        looked_at = range(min(steps, _STEPS_WEIGHED))
        dealt, drawn = (np.mean([plan.imbalance(step, dealt=way) for step in looked_at]) for way in (True, False))
        console.print(
            f"attention costs the busiest of {shards} shards {dealt:.3f} times the mean, its rows dealt by cost; "
            f"{drawn:.3f} times as they come ({len(looked_at)} steps)"
        )
    return plan, steps


def _shards(mesh: Mesh) -> int:
    """Parts that the rows of a micro-batch are divided into."""
    return math.prod(mesh.shape[axis] for axis in ("dcn_data", "data", "fsdp") if axis in mesh.shape)


def _check_rows(config: TrainConfig, mesh: Mesh) -> None:
    divided = _shards(mesh)
    if config.rows % divided:
        raise ValueError(
            f"rows is {config.rows}; it must be a multiple of data * fsdp = {divided}, so that every device has rows."
        )


def _load(given: Inputs, mesh: Mesh) -> dict:
    """The published parameters, laid out over the mesh."""
    return pretrained.load_parameters(
        given.model_path, given.model, sharding=lambda path, shape: sharding.parameter_sharding(mesh, path, shape)
    )


def _restored(
    model: DecoderConfig,
    mesh: Mesh,
    transform: optax.GradientTransformation,
    manager: CheckpointManager,
    directory: pathlib.Path,
    console: rich.console.Console,
) -> tuple[TrainState, TrainState]:
    """(the newest state that can be read, its shardings); damaged ones after it are moved out of the way."""
    abstract = jax.eval_shape(
        functools.partial(step_lib.first_state, optimizer=transform), decoder.abstract_parameters(model)
    )
    shardings = sharding.state_sharding(mesh, abstract)
    like = jax.tree.map(
        lambda leaf, place: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place), abstract, shardings
    )
    damaged: list[int] = []
    for step in sorted(manager.all_steps(), reverse=True):
        try:
            state = checkpoints.restore(manager, step, like)
        except DamagedError as error:
            console.print(f"{error}")
            damaged.append(step)
            continue
        for moved in damaged:
            place = run_directory.set_aside(directory, moved)
            console.print(f"checkpoint {moved} was moved to {place}")
        if damaged:
            manager.reload()
        return state, shardings
    raise ValueError(
        f"{directory.name}: none of the checkpoints {', '.join(map(str, damaged))} can be read. Put one back from a "
        "copy, or choose another --output_dir to begin anew."
    )


def _compute_dtype(config: TrainConfig, mesh: Mesh):
    if config.compute_dtype == "auto":
        return jnp.float32 if mesh.devices.flat[0].platform == "cpu" else jnp.bfloat16
    return jnp.dtype(config.compute_dtype)


def _place(mesh: Mesh, batch: Batch) -> Batch:
    rows = sharding.batch_sharding(mesh)
    return jax.tree.map(lambda array: jax.make_array_from_process_local_data(rows, array), batch)


def _evaluate(this: _Run, number: int, state: TrainState, progress: Progress) -> None:
    """Writes and shows held-out figures after step `number`; leaves off, with none, if a signal arrives."""
    data = this.config.data
    evaluation = metrics.Evaluation()
    for batch, _ in batches.evaluation_batches(
        this.held_out,
        max_length=data.max_length,
        max_targets=data.max_targets or data.max_length,
        rows=this.config.rows,
        limit=this.config.evaluate_rows,
    ):
        evaluation.add(this.evaluation_step(state.parameters, _place(this.mesh, batch)))
        if this.listener.received:
            return
    figures = evaluation.figures()
    if not math.isfinite(figures["loss"]):
        raise FloatingPointError(
            f"step {number}: held-out loss {figures['loss']}. The run stops; the checkpoints before stay. "
            "Lower optimizer.learning_rate."
        )
    this.writer.evaluation(number, figures)
    this.losses[number] = figures["loss"]
    progress.print(_held_out_line(number, figures))


def _checked(this: _Run, update: _Update, clock: Clock, progress: Progress) -> dict[str, float]:
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


def _figures(this: _Run, update: _Update, clock: Clock) -> dict[str, float]:
    """The figures of one update; waits for it."""
    values = StepMetrics(*(np.asarray(value).item() for value in update.measured))
    seconds = clock.lap()
    updates_before = update.step - 1 - values.skipped + bool(values.skipped_in_a_row)
    figures = {
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
        "row_tokens_used": values.tokens / update.batch.tokens.size,
    }
    peak = metrics.peak_flops(this.mesh.devices.flat[0])
    if peak is not None:
        figures["mfu"] = metrics.useful_flops(this.model, update.batch) / seconds / (peak * this.mesh.devices.size)
    return figures


def _held_out_line(step: int, figures: Mapping[str, Any]) -> str:
    return (
        f"step {step:,}: held-out loss {figures['loss']:.4f}, accuracy {figures['accuracy']:.2%} "
        f"on {figures['targets']:,} targets"
    )
