"""A run: from a config to checkpoints and figures in one directory. Composes all other modules.

`training.run_directory` says what lies in that directory.
"""

import math
import os
import pathlib
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import rich.console
from jax.sharding import Mesh

from dialog_jax.data import batches
from dialog_jax.data.batches import Batch, Plan
from dialog_jax.data.dataset import Trees
from dialog_jax.data.mixing import Mixture
from dialog_jax.model import decoder, pretrained
from dialog_jax.model.decoder import DecoderConfig
from dialog_jax.training import checkpoints, inputs, metrics, optimizer, run_directory, sharding
from dialog_jax.training import step as step_lib
from dialog_jax.training.config import TrainConfig
from dialog_jax.training.inputs import Inputs
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


class _Update(NamedTuple):
    """An update that the device may still be working on."""

    step: int
    batch: Batch
    measured: StepMetrics


def run(
    config: TrainConfig, output_dir: str | os.PathLike, *, console: rich.console.Console | None = None
) -> RunResult:
    """Trains as `config` says, or goes on from the newest checkpoint in `output_dir`; a finished run is left alone.

    Raises:
      ValueError: the directory belongs to another config, or model, tokenizer and data do not go together.
      FloatingPointError: the loss or the gradient is not finite; the checkpoints before stay.
    """
    console = console or rich.console.Console(highlight=False, soft_wrap=True)
    directory = pathlib.Path(output_dir)
    if jax.process_count() > 1:
        raise ValueError(f"{jax.process_count()} processes: runs on several hosts are not supported yet. Use one.")
    mesh = sharding.make_mesh(config.mesh)
    _check_rows(config, mesh)
    run_directory.check(directory, config)
    given = inputs.read(config, directory, console)
    plan, steps = _planned(config, given.train, _shards(mesh), console)
    transform = optimizer.make_optimizer(config.optimizer, steps)
    hashes = {**given.hashes, "steps": steps}
    run_directory.check_inputs(directory, hashes)
    # A fresh run loads its weights before it claims the directory: that is when errors in them are found.
    loaded = None if (directory / "checkpoints").exists() else _load(given, mesh)
    run_directory.claim(directory, config, hashes, given.model, given.tokenizer, stop_tokens=given.stop_tokens)

    with checkpoints.open_manager(directory / "checkpoints", keep=config.keep_checkpoints) as manager:
        start = manager.latest_step() or 0
        if start >= steps:
            console.print(f"The run is finished: step {start:,}. Nothing to do.")
            return _result(directory, start)
        if start:
            state, shardings = _restored(given.model, mesh, transform, manager, start)
            console.print(f"going on from step {start:,}")
        else:
            state, shardings = step_lib.initial_state(mesh, loaded or _load(given, mesh), transform)
        del loaded  # donated to the state
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
        )
        writer = metrics.Writer(directory, step=start)
        with Progress(console, steps, start) as progress:
            _go_on(this, state, start, manager, writer, progress)
        writer.close()
    return _result(directory, steps)


def _go_on(this: _Run, state: TrainState, start: int, manager, writer: metrics.Writer, progress: Progress) -> None:
    """Trains from step `start` to the end."""
    config = this.config
    if not start:
        _evaluate(this, 0, state, writer, progress)
    clock = Clock()
    previous: _Update | None = None

    def report(figures: dict[str, float]) -> None:
        assert previous is not None
        writer.train(previous.step, figures)
        progress.show(previous.step, figures)

    for number, batch in enumerate(this.plan.batches(start, this.steps), start + 1):
        placed = _place(this.mesh, batch)
        figures = _checked(this, previous, clock) if previous else {}
        state, measured = this.train_step(state, placed)
        if previous:
            report(figures)  # while the device works on
        previous = _Update(number, batch, measured)
        if number % config.evaluate_every and number != this.steps:
            continue
        report(_checked(this, previous, clock))
        previous = None
        held_out = _evaluate(this, number, state, writer, progress)
        if number % config.checkpoint_every == 0 or number == this.steps:
            checkpoints.save(manager, state, loss=held_out["loss"])
        clock.restart()


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


def _restored(model: DecoderConfig, mesh: Mesh, transform, manager, start: int):
    """(the state saved at step `start`, its shardings)."""
    abstract = jax.eval_shape(
        lambda parameters: TrainState(jnp.zeros((), jnp.int32), parameters, transform.init(parameters)),
        decoder.abstract_parameters(model),
    )
    shardings = sharding.state_sharding(mesh, abstract)
    like = jax.tree.map(
        lambda leaf, place: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place), abstract, shardings
    )
    return checkpoints.restore(manager, start, like), shardings


def _compute_dtype(config: TrainConfig, mesh: Mesh):
    if config.compute_dtype == "auto":
        return jnp.float32 if mesh.devices.flat[0].platform == "cpu" else jnp.bfloat16
    return jnp.dtype(config.compute_dtype)


def _place(mesh: Mesh, batch: Batch) -> Batch:
    rows = sharding.batch_sharding(mesh)
    return jax.tree.map(lambda array: jax.make_array_from_process_local_data(rows, array), batch)


def _evaluate(this: _Run, number: int, state: TrainState, writer: metrics.Writer, progress: Progress) -> dict[str, Any]:
    """Held-out figures after step `number`, written and shown."""
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
    figures = evaluation.figures()
    if not math.isfinite(figures["loss"]):
        raise FloatingPointError(
            f"step {number}: held-out loss {figures['loss']}. The run stops; the checkpoints before stay. "
            "Lower optimizer.learning_rate."
        )
    writer.evaluation(number, figures)
    progress.print(_held_out_line(number, figures))
    return figures


def _checked(this: _Run, update: _Update, clock: Clock) -> dict[str, float]:
    """Waits for the update; its figures, if they are finite."""
    figures = _figures(this, update, clock)
    if not (math.isfinite(figures["loss"]) and math.isfinite(figures["gradient_norm"])):
        ids = sorted({this.train.dialogue(tree) for row in this.plan.rows(update.step - 1) for tree in row})
        raise FloatingPointError(
            f"step {update.step}: loss {figures['loss']}, gradient norm {figures['gradient_norm']}. The run "
            f"stops; the checkpoints before stay. Its dialogues: {', '.join(ids[:20])}"
            f"{' and more' if len(ids) > 20 else ''}. Lower optimizer.learning_rate, or look at them."
        )
    return figures


def _figures(this: _Run, update: _Update, clock: Clock) -> dict[str, float]:
    """The figures of one update; waits for it."""
    values = StepMetrics(*(np.asarray(value).item() for value in update.measured))
    seconds = clock.lap()
    figures = {
        "loss": values.loss,
        "nll": values.nll,
        "gradient_norm": values.gradient_norm,
        "learning_rate": float(this.schedule(update.step - 1)),
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


def _result(directory: pathlib.Path, step: int) -> RunResult:
    lines = metrics.read_lines(directory / "evaluation.jsonl")
    return RunResult(step, lines[0], lines[-1])
