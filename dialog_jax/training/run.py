"""A run: from a config to checkpoints and figures in one directory. Composes all other modules.

Here is what begins a run, or finds it again; `training.steps` goes from step to step, and `training.run_directory` says
what lies in the directory.
"""

import contextlib
import math
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
import optax
import rich.console
from jax.sharding import Mesh
from orbax.checkpoint import CheckpointManager

from dialog_jax.attention import dispatch
from dialog_jax.attention.dispatch import Kernel
from dialog_jax.batching.batches import Plan
from dialog_jax.batching.mixture import Mixture
from dialog_jax.errors import UserError
from dialog_jax.model import pretrained
from dialog_jax.model.decoder import DecoderConfig
from dialog_jax.training import (
    checkpoints,
    distributed,
    metrics,
    optimizer,
    run_directory,
    run_inputs,
    sharding,
    signals,
)
from dialog_jax.training import loop as steps_lib
from dialog_jax.training import train_step as step_lib
from dialog_jax.training.checkpoints import DamagedError
from dialog_jax.training.config import TrainConfig, require_fields
from dialog_jax.training.console import Startup
from dialog_jax.training.loop import Run
from dialog_jax.training.run_inputs import Inputs
from dialog_jax.training.signals import Listener
from dialog_jax.training.train_step import TrainState
from dialog_jax.trees.dataset import Trees

_TURNS_SHOWN = 32  # turns that held-out figures list one by one
_STEPS_WEIGHED = 50  # of which the balance is told at the beginning


class RunResult(NamedTuple):
    """The outcome of a finished run."""

    step: int
    initial: dict[str, Any]
    """Held-out figures before training, as `metrics.Evaluation.figures` gives them."""
    final: dict[str, Any]


def run(
    config: TrainConfig,
    output_dir: str | os.PathLike,
    *,
    allow_changes: bool = False,
    console: rich.console.Console | None = None,
    start_time: float | None = None,
) -> RunResult:
    """Trains as `config` says, or goes on from the newest checkpoint in `output_dir`; a finished run is left alone.

    Args:
      allow_changes: go on with the run in `output_dir` even if its config or data were others.
      start_time: of the process, on the clock of `time.monotonic`, from which the seconds to the first step are
        counted; None for now.

    Raises:
      UserError: the directory belongs to another config or is in use, or model, tokenizer and data do not go together.
      FloatingPointError: loss or gradient were not finite too often in a row; the checkpoints before stay.
      SaveError: a checkpoint could not be written; those before stay.
      StoppedError: SIGINT or SIGTERM arrived; the last step is saved.
    """
    require_fields(config, "training", "model", "data.train", "data.validation")
    startup = Startup(start_time)
    console = console or rich.console.Console(highlight=False, soft_wrap=True, quiet=not distributed.is_primary())
    directory = pathlib.Path(output_dir)
    distributed.check_same("config", run_directory.flatten_config(config))
    mesh = sharding.make_mesh(config.mesh)
    _check_rows(config, mesh)
    with signals.listen() as listener, contextlib.ExitStack() as stack:
        distributed.run_primary_first(lambda: _enter(directory, stack))
        changes = run_directory.find_config_changes(directory, config)
        _refuse(directory, "another config", changes, allow_changes)
        given = distributed.run_primary_first(lambda: run_inputs.read_inputs(config, directory, console))
        plan, steps = _planned(config, given.train, sharding.count_row_shards(mesh), console)
        dtype = _compute_dtype(config, mesh)
        hashes = {**given.hashes, "steps": steps, "compute_dtype": dtype.name}
        distributed.check_same("content", hashes)
        changes += (changed := run_directory.find_input_changes(directory, hashes))
        _refuse(directory, "another content", changed, allow_changes)
        for change in changes:
            console.print(f"changed: {change}")
        choice = _attention(config, mesh, given, dtype)
        console.print(f"attention: {choice.name} ({choice.reason})")
        # A fresh run loads its weights before it claims the directory: that is when errors in them are found.
        loaded = distributed.run_on_all_hosts(
            lambda: None if (directory / "checkpoints").exists() else _load(given, mesh)
        )
        if not changes:
            distributed.run_primary_first(lambda: _claim(directory, config, hashes, given, changes))
        losses = {line["step"]: line["loss"] for line in metrics.read_records(directory / "evaluation.jsonl")}
        with checkpoints.open_manager(directory / "checkpoints") as manager:
            distributed.check_same("state", {"checkpoints": manager.all_steps(), "evaluation.jsonl": losses})
            transform = optimizer.make_optimizer(config.optimizer, steps)
            if manager.latest_step():
                state, shardings = _restored(given.model, mesh, transform, manager, directory, console)
            else:
                state, shardings = step_lib.initialize_state(mesh, loaded or _load(given, mesh), transform)
            del loaded  # donated to the state
            if changes:  # what is there goes with them
                distributed.run_primary_first(lambda: _claim(directory, config, hashes, given, changes))
            this = _prepared(config, mesh, given, plan, steps, dtype, choice, transform, shardings, losses, listener)
            startup.done("preparing")
            steps_lib.train(this, directory, state, manager, console, startup)
        distributed.run_on_all_hosts(lambda: None)  # what the first process wrote is there for all
    lines = metrics.read_records(directory / "evaluation.jsonl")
    return RunResult(steps, lines[0], lines[-1])


def _enter(directory: pathlib.Path, stack: contextlib.ExitStack) -> None:
    """Called in turn: the first process holds the lock for all."""
    run_directory.check_directory(directory)
    if distributed.is_primary():
        stack.enter_context(run_directory.lock(directory))


def _claim(
    directory: pathlib.Path, config: TrainConfig, hashes: Mapping[str, Any], given: Inputs, changes: Sequence[str]
) -> None:
    """Called in turn: the first process claims the directory, and the others must see that."""
    if distributed.is_primary():
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
        raise UserError(
            f"{directory.name} is not what process 0 sees under that name. Put --output_dir on a file system that all "
            "processes share."
        )


def _refuse(directory: pathlib.Path, what: str, differences: Sequence[str], allowed: bool) -> None:
    if differences and not allowed:
        raise UserError(
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
    choice: Kernel,
    transform: optax.GradientTransformation,
    shardings: TrainState,
    losses: dict[int, float],
    listener: Listener,
) -> Run:
    return Run(
        config=config,
        mesh=mesh,
        model=given.model,
        plan=plan,
        train=given.train,
        held_out=given.held_out,
        own=sharding.find_local_rows(mesh, config.rows),
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
            attend=choice.attend,
        ),
        evaluation_step=step_lib.make_evaluation_step(
            given.model,
            mesh,
            shardings.parameters,
            compute_dtype=dtype,
            turns=_TURNS_SHOWN,
            attend=choice.attend,
        ),
        losses=losses,
        listener=listener,
    )


def _attention(config: TrainConfig, mesh: Mesh, given: Inputs, dtype: np.dtype) -> Kernel:
    choice = dispatch.select_kernel(
        mesh,
        heads=given.model.heads,
        kv_heads=given.model.kv_heads,
        head_dim=given.model.head_dim,
        length=config.data.max_length,
        dtype=dtype,
        branching=config.data.share_prefixes or given.train.branching or given.held_out.branching,
    )
    distributed.check_same("attention", {"name": choice.name})
    return choice


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
    divided = sharding.count_row_shards(mesh)
    if config.rows % divided:
        raise UserError(
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
        distributed.run_primary_first(lambda: _set_aside(directory, damaged, console))
        if damaged:
            manager.reload()
        return state, shardings
    raise UserError(
        f"{directory.name}: none of the checkpoints {', '.join(map(str, damaged))} can be read. Put one back from a "
        "copy, take back what --allow_changes let change of model or optimizer, or begin anew in another --output_dir."
    )


def _set_aside(directory: pathlib.Path, damaged: Sequence[int], console: rich.console.Console) -> None:
    for step in damaged if distributed.is_primary() else ():
        place = run_directory.move_damaged_checkpoint(directory, step)
        console.print(f"checkpoint {step} was moved to {place}")


def _compute_dtype(config: TrainConfig, mesh: Mesh) -> np.dtype:
    if config.compute_dtype == "auto":
        return jnp.dtype(jnp.float32 if mesh.devices.flat[0].platform == "cpu" else jnp.bfloat16)
    return jnp.dtype(config.compute_dtype)
