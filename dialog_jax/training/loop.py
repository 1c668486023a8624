"""A run: from a config to checkpoints and figures in one directory. Composes all other modules.

`training.run_directory` says what lies in that directory.
"""

import contextlib
import math
import os
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

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
from dialog_jax.model import pretrained
from dialog_jax.model.decoder import DecoderConfig
from dialog_jax.training import checkpoints, hosts, inputs, interruption, metrics, optimizer, run_directory, sharding
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
    console = console or rich.console.Console(highlight=False, soft_wrap=True, quiet=not hosts.is_first())
    directory = pathlib.Path(output_dir)
    hosts.check_same("config", run_directory.fields(config))
    mesh = sharding.make_mesh(config.mesh)
    _check_rows(config, mesh)
    with interruption.listening() as listener, contextlib.ExitStack() as stack:
        hosts.in_turn(lambda: _enter(directory, stack))
        changes = run_directory.differences(directory, config)
        _refuse(directory, "another config", changes, allow_changes)
        given = hosts.in_turn(lambda: inputs.read(config, directory, console))
        plan, steps = _planned(config, given.train, sharding.shards(mesh), console)
        dtype = _compute_dtype(config, mesh)
        hashes = {**given.hashes, "steps": steps, "compute_dtype": dtype.name}
        hosts.check_same("content", hashes)
        changes += (changed := run_directory.changed_inputs(directory, hashes))
        _refuse(directory, "another content", changed, allow_changes)
        for change in changes:
            console.print(f"changed: {change}")
        # A fresh run loads its weights before it claims the directory: that is when errors in them are found.
        loaded = hosts.together(lambda: None if (directory / "checkpoints").exists() else _load(given, mesh))
        if not changes:
            hosts.in_turn(lambda: _claim(directory, config, hashes, given, changes))
        losses = {line["step"]: line["loss"] for line in metrics.read_lines(directory / "evaluation.jsonl")}
        kept = config.keep_checkpoints
        with checkpoints.open_manager(directory / "checkpoints", keep=kept, losses=losses) as manager:
            hosts.check_same("state", {"checkpoints": manager.all_steps(), "evaluation.jsonl": losses})
            transform = optimizer.make_optimizer(config.optimizer, steps)
            if manager.latest_step():
                state, shardings = _restored(given.model, mesh, transform, manager, directory, console)
            else:
                state, shardings = step_lib.initial_state(mesh, loaded or _load(given, mesh), transform)
            del loaded  # donated to the state
            if changes:  # what is there goes with them
                hosts.in_turn(lambda: _claim(directory, config, hashes, given, changes))
            this = _prepared(config, mesh, given, plan, steps, dtype, transform, shardings, losses, listener)
            _train(this, directory, state, manager, console)
        hosts.together(lambda: None)  # what the first process wrote is there for all
    lines = metrics.read_lines(directory / "evaluation.jsonl")
    return RunResult(steps, lines[0], lines[-1])


def _enter(directory: pathlib.Path, stack: contextlib.ExitStack) -> None:
    """Called in turn: the first process holds the lock for all."""
    run_directory.check(directory)
    if hosts.is_first():
        stack.enter_context(run_directory.locked(directory))


def _claim(
    directory: pathlib.Path, config: TrainConfig, hashes: Mapping[str, Any], given: Inputs, changes: Sequence[str]
) -> None:
    """Called in turn: the first process claims the directory, and the others must see that."""
    if hosts.is_first():
        run_directory.claim(
            directory,
            config,
            hashes,
            given.model,
            given.tokenizer,
            stop_tokens=given.stop_tokens,
            changes=changes,
        )
    elif not (directory / "config.json").exists():
        raise ValueError(
            f"{directory.name} is not what process 0 sees under that name. Put --output_dir on a file system that all "
            "processes share."
        )


def _refuse(directory: pathlib.Path, what: str, differences: Sequence[str], allowed: bool) -> None:
    if differences and not allowed:
        raise ValueError(
            f"{directory.name} belongs to a run with {what} ({'; '.join(differences)}), so going on would not give the "
            "same run. Put back what it began with, choose another --output_dir, or say --allow_changes."
        )


def _prepared(
    config: TrainConfig,
    mesh: Mesh,
    given: Inputs,
    plan: Plan,
    steps: int,
    dtype: np.dtype,
    transform: optax.GradientTransformation,
    shardings: TrainState,
    losses: dict[int, float],
    listener: Listener,
) -> _Run:
    return _Run(
        config=config,
        mesh=mesh,
        model=given.model,
        plan=plan,
        train=given.train,
        held_out=given.held_out,
        own=sharding.own_rows(mesh, config.rows),
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
        listener=listener,
    )


def _train(
    this: _Run,
    directory: pathlib.Path,
    state: TrainState,
    manager: CheckpointManager,
    console: rich.console.Console,
) -> None:
    """Goes from the state that there is to the last step."""
    start = int(state.step)
    if start >= this.steps and start in this.losses:
        console.print(f"The run is finished: step {start:,}. Nothing to do.")
        return
    if start:
        console.print(f"going on from step {start:,}")
    for later in [step for step in this.losses if not start or step > start]:
        del this.losses[later]  # of steps to come again
    for line in sharding.listed(this.mesh, state.parameters):
        console.print(f"on the mesh: {line}")
    writer = metrics.Writer(directory, step=start) if hosts.is_first() else metrics.Silent()
    with contextlib.closing(writer), Progress(console, this.steps, start) as progress:
        _go_on(this, state, manager, writer, progress)


def _go_on(
    this: _Run,
    state: TrainState,
    manager: CheckpointManager,
    writer: metrics.Writer | metrics.Silent,
    progress: Progress,
) -> None:
    """Trains from the step of `state` to the end, or until a signal arrives."""
    start = int(state.step)
    this.listener.keep(start)
    if _is_evaluated(this, start) and start not in this.losses:
        _evaluate(this, start, state, writer, progress)
    if this.listener.received:  # what was restored is still there
        raise StoppedError(this.listener.received, start or None)
    clock = Clock()
    previous: _Update | None = None

    def report(figures: dict[str, float]) -> None:
        assert previous is not None
        writer.train(previous.step, figures)
        progress.show(previous.step, figures)

    for number, batch in enumerate(this.plan.batches(start, this.steps, this.own), start + 1):
        placed = _place(this, batch)
        figures = _checked(this, previous, clock, progress) if previous else {}
        state, measured = this.train_step(state, placed)
        if previous:
            report(figures)  # while the device works on
        previous = _Update(number, measured)
        checkpoints.check(manager)
        stopped = this.listener.received_by_all(number)
        if not _is_evaluated(this, number) and not stopped:
            continue
        report(_checked(this, previous, clock, progress))
        previous = None
        if _is_evaluated(this, number):
            _evaluate(this, number, state, writer, progress)
        stopped = stopped or this.listener.received
        if stopped or number % this.config.checkpoint_every == 0 or number == this.steps:
            writer.sync()
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


def _check_rows(config: TrainConfig, mesh: Mesh) -> None:
    divided = sharding.shards(mesh)
    if config.rows % divided:
        raise ValueError(
            f"rows is {config.rows}; it must be a multiple of {' * '.join(sharding.ROW_AXES)} = {divided}, so that "
            "every device has rows."
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
    like, shardings = step_lib.abstract_state(model, mesh, transform)
    damaged: list[int] = []
    for step in sorted(manager.all_steps(), reverse=True):
        try:
            state = checkpoints.restore(manager, step, like)
        except DamagedError as error:
            console.print(f"{error}")
            damaged.append(step)
            continue
        hosts.in_turn(lambda: _set_aside(directory, damaged, console))
        if damaged:
            manager.reload()
        return state, shardings
    raise ValueError(
        f"{directory.name}: none of the checkpoints {', '.join(map(str, damaged))} can be read. Put one back from a "
        "copy, take back what --allow_changes let change of model or optimizer, or begin anew in another --output_dir."
    )


def _set_aside(directory: pathlib.Path, damaged: Sequence[int], console: rich.console.Console) -> None:
    for step in damaged if hosts.is_first() else ():
        place = run_directory.set_aside(directory, step)
        console.print(f"checkpoint {step} was moved to {place}")


def _compute_dtype(config: TrainConfig, mesh: Mesh) -> np.dtype:
    if config.compute_dtype == "auto":
        return jnp.dtype(jnp.float32 if mesh.devices.flat[0].platform == "cpu" else jnp.bfloat16)
    return jnp.dtype(config.compute_dtype)


def _place(this: _Run, batch: Batch) -> Batch:
    """The global batch, of which `batch` holds the rows of this process."""
    return batch.map(lambda array: sharding.place_rows(this.mesh, array, this.own, this.config.rows))


def _evaluate(
    this: _Run, number: int, state: TrainState, writer: metrics.Writer | metrics.Silent, progress: Progress
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
    peak = metrics.peak_flops(this.mesh.devices.flat[0])
    if peak is not None:
        needed = metrics.flops(
            this.model, tokens=float(values.tokens), pairs=float(values.pairs), targets=float(values.targets)
        )
        figures["mfu"] = needed / seconds / (peak * this.mesh.devices.size)
    return figures


def _held_out_line(step: int, figures: Mapping[str, Any]) -> str:
    return (
        f"step {step:,}: held-out loss {figures['loss']:.4f}, accuracy {figures['accuracy']:.2%} "
        f"on {figures['targets']:,} targets"
    )
