"""A run: from a config to checkpoints and metrics in one directory. Composes all other modules.

`run` opens the directory, prepares data and model, restores a checkpoint or loads the published weights, and hands over
to `training.loop`. `training.run_directory` describes the files in the directory.
"""

import contextlib
import datetime
import math
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
import rich.console
from jax.sharding import Mesh

from dialog_jax import atomic_files
from dialog_jax.attention import dispatch
from dialog_jax.attention.dispatch import Kernel
from dialog_jax.batching.batches import Plan
from dialog_jax.batching.mixture import Mixture
from dialog_jax.errors import UserError
from dialog_jax.model import model_files
from dialog_jax.training import (
    checkpoints,
    distributed,
    initial_state,
    loop,
    metrics,
    optimizer,
    run_directory,
    run_inputs,
    score_steps,
    sessions,
    sharding,
    signals,
    trackers,
    train_step,
    trainable,
)
from dialog_jax.training.config import TrainConfig, require_fields, set_template_time
from dialog_jax.training.console import Startup, make_console
from dialog_jax.training.loop import Run
from dialog_jax.training.run_inputs import Inputs
from dialog_jax.training.trainable import Selection
from dialog_jax.trees.dataset import Trees

_TURNS_LISTED = 32  # turns that held-out figures list one by one
_FEW_STEPS = 20  # a run of fewer steps warns
_STEPS_AVERAGED = 50  # for the printed load balance


class RunResult(NamedTuple):
    """The outcome of a finished run."""

    step: int
    """Of the last checkpoint; beyond the last step of the config if that was lowered later."""
    initial: dict[str, Any]
    """Held-out figures before training, as `metrics.Evaluation.figures` returns them."""
    final: dict[str, Any]


def run(
    config: TrainConfig,
    output_dir: str | os.PathLike,
    *,
    allow_changes: bool = False,
    console: rich.console.Console | None = None,
    start_time: float | None = None,
) -> RunResult:
    """Trains as `config` says, or resumes from the newest checkpoint in `output_dir`; a finished run stays as it is.

    Args:
      allow_changes: resume the run in `output_dir` even if its config or data have changed.
      start_time: of the process, on the clock of `time.monotonic`, from which the seconds to the first step are
        counted; None for now.

    Raises:
      UserError: the directory belongs to another config or is in use; model, tokenizer and data do not fit together;
        loss or gradient were not finite too often in a row; or a file could not be written. Checkpoints stay.
      StoppedError: SIGINT, SIGTERM or SIGHUP arrived; the last step is saved.
    """
    config = config.resolve()
    require_fields(config, "training", "model", "data.train")
    startup = Startup(start_time)
    console = console or make_console(quiet=not distributed.is_primary())
    directory = atomic_files.expand_home(output_dir)
    distributed.check_same("config", run_directory.flatten_config(config))
    mesh = sharding.make_mesh(config.mesh)
    _check_rows(config, mesh)
    distributed.run_on_all_hosts(lambda: trackers.check(config) if distributed.is_primary() else None)
    with signals.listen() as listener, contextlib.ExitStack() as stack:
        # Open: the directory is empty, or holds this run and no other process trains there.
        distributed.run_primary_first(lambda: _lock(directory, stack))
        config = run_directory.keep_template_time(directory, config)
        changes = run_directory.find_config_changes(directory, config)
        _check_changes(directory, changes, allow_changes)

        # Prepare: read model config, tokenizer and data, and plan which rows each step trains on.
        now = distributed.all_gather_strings(datetime.datetime.now().isoformat(timespec="seconds"))[0]
        inputs = distributed.run_primary_first(lambda: run_inputs.read_inputs(config, directory, console, now))
        if inputs.template_time:
            config = set_template_time(config, inputs.template_time)
        dtype = _compute_dtype(config, mesh)
        selection = trainable.select(config, inputs.model, dtype, inputs.adapter)
        kernel = _select_kernel(config, mesh, inputs, dtype, shares_root=selection.soft_prompt.tokens > 0)
        console.print(f"attention: {kernel.name} ({kernel.reason})")
        if selection.soft_prompt.tokens and not kernel.branching:
            console.print(f"the soft prompt precedes each dialogue of a row: {kernel.name} is for rows of paths")
            inputs = inputs.without_shared_prefixes()
        plan, steps = _plan_steps(config, inputs.train, sharding.count_row_shards(mesh), console)
        hashes = {**inputs.hashes, "steps": steps, "compute_dtype": dtype.name}
        distributed.check_same("content", hashes)
        changes += run_directory.find_input_changes(directory, hashes)
        planned_steps = run_directory.read_hashes(directory).get("steps", steps)
        _check_changes(directory, changes, allow_changes)
        changes = list(dict.fromkeys(changes))  # a number of steps is a field of the config, and of the inputs
        for change in changes:
            console.print(f"changed: {change}")

        # Restore or load. Only then is the directory claimed, so that a run which cannot start leaves no trace.
        update_rule = optimizer.make_optimizer(
            config.optimizer, steps, rate_ratios=trainable.find_rate_ratios(config, selection)
        )
        shapes = trainable.abstract_parameters(selection)
        for described in trainable.describe(selection):
            console.print(described)
        state = initial_state.restore_or_load(inputs, selection, config.seed, mesh, update_rule, directory, console)
        start = int(state.step)  # the first update takes the state
        line = optimizer.describe_change_of_steps(config.optimizer, planned_steps, steps, start - int(state.skipped))
        if line:
            console.print(line)
        distributed.run_primary_first(lambda: _claim(directory, config, inputs, selection, hashes, changes))
        if distributed.is_primary() and start < steps:
            sessions.add_session(directory, start)

        # Train.
        training = Run(
            config=config,
            mesh=mesh,
            inputs=inputs,
            plan=plan,
            steps=steps,
            train_step=train_step.make_train_step(
                inputs.model,
                update_rule,
                mesh,
                compute_dtype=dtype,
                remat=config.remat,
                loss_config=config.loss,
                attend=kernel.attend,
                shapes=shapes,
                lora_dropout=config.lora.dropout if selection.scales else 0.0,
                seed=config.seed,
            ),
            evaluation_step=score_steps.make_evaluation_step(
                inputs.model,
                mesh,
                compute_dtype=dtype,
                turns=_TURNS_LISTED,
                attend=kernel.attend,
                shapes=shapes,
            ),
            listener=listener,
            selection=selection,
        )
        startup.done("preparing")
        loop.train(training, state, directory, console, startup)
        distributed.run_on_all_hosts(lambda: None)  # wait until process 0 has written everything
    evaluations = metrics.read_records(directory / "evaluation.jsonl")
    return RunResult(max(steps, start), evaluations[0], evaluations[-1])


def _check_rows(config: TrainConfig, mesh: Mesh) -> None:
    shards = sharding.count_row_shards(mesh)
    if config.rows % shards:
        raise UserError(
            f"rows is {config.rows}; it must be a multiple of {' * '.join(sharding.ROW_AXES)} = {shards}, so that "
            "every device has rows."
        )


def _lock(directory: pathlib.Path, stack: contextlib.ExitStack) -> None:
    """Checks the directory; process 0 locks it for all until `stack` is closed."""
    checkpoints.check_path(directory)
    run_directory.check_directory(directory)
    if distributed.is_primary():
        stack.enter_context(run_directory.lock(directory))


def _check_changes(directory: pathlib.Path, changes: Sequence[str], allowed: bool) -> None:
    if changes and not allowed:
        raise UserError(
            f"{directory.name} belongs to a run with another config or data ({'; '.join(changes)}), so resuming it "
            "would not give the same run. Restore what it started with, choose another --output_dir, or pass "
            "--allow_changes."
        )


def _plan_steps(
    config: TrainConfig, train: Trees | Mixture, shards: int, console: rich.console.Console
) -> tuple[Plan, int]:
    """Returns (which rows each step trains on, number of steps)."""
    plan = Plan(
        train,
        max_length=config.data.max_length,
        rows=config.rows,
        micro_batches=config.gradient_accumulation,
        seed=config.seed,
        shards=shards,
    )
    for line in plan.mixture_summary:
        console.print(line)
    rows_per_step = config.rows * config.gradient_accumulation
    steps = config.steps or max(1, math.ceil(config.epochs * plan.rows_per_epoch / rows_per_step))
    used = plan.tokens_per_epoch / (plan.rows_per_epoch * config.data.max_length)
    epochs = steps * rows_per_step / plan.rows_per_epoch
    rounded = (
        "" if config.steps or epochs < config.epochs + 0.005 else f", rounded up from {config.epochs:g} to whole steps"
    )
    console.print(
        f"{plan.rows_per_epoch:,} rows of {config.data.max_length:,} tokens per epoch, {used:.1%} of them used; "
        f"{steps:,} steps of {rows_per_step} rows are {epochs:.2f} epochs{rounded}"
    )
    if not config.steps and steps < _FEW_STEPS:
        console.print(
            f"{steps:,} steps may be too few to learn from. Raise epochs, or lower gradient_accumulation for more and "
            "smaller steps."
        )
    if shards > 1:
        sample = range(min(steps, _STEPS_AVERAGED))
        balanced, unbalanced = (
            np.mean([plan.imbalance(step, balanced=way) for step in sample]) for way in (True, False)
        )
        console.print(
            f"attention costs the busiest of {shards} shards {balanced:.3f} times the mean with rows assigned by cost, "
            f"{unbalanced:.3f} times in their order ({len(sample)} steps)"
        )
    return plan, steps


def _compute_dtype(config: TrainConfig, mesh: Mesh) -> np.dtype:
    if config.compute_dtype == "auto":
        return jnp.dtype(jnp.float32 if mesh.devices.flat[0].platform == "cpu" else jnp.bfloat16)
    return jnp.dtype(config.compute_dtype)


def _select_kernel(config: TrainConfig, mesh: Mesh, inputs: Inputs, dtype: np.dtype, *, shares_root: bool) -> Kernel:
    kernel = dispatch.select_kernel(
        mesh,
        heads=inputs.model.heads,
        sizes=inputs.model.attention_sizes,
        length=config.data.max_length,
        dtype=dtype,
        branching=config.data.share_prefixes or inputs.train.branching or inputs.held_out.branching,
        shares_root=shares_root,
        additions=inputs.model.attention_additions,
        name=config.attention,
    )
    distributed.check_same("attention", {"name": kernel.name})
    return kernel


def _claim(
    directory: pathlib.Path,
    config: TrainConfig,
    inputs: Inputs,
    selection: Selection,
    hashes: Mapping[str, Any],
    changes: Sequence[str],
) -> None:
    """Claims the directory on process 0; checks that the others see it."""
    if distributed.is_primary():
        run_directory.claim(
            directory,
            config,
            hashes,
            inputs.model,
            inputs.tokenizer,
            stop_tokens=inputs.stop_tokens,
            base=run_directory.BaseModel(
                hub_name="" if pathlib.Path(config.model).expanduser().exists() else config.model,
                dtype=inputs.dtype,
                generation=model_files.read_generation_config(inputs.model_path),
                licence=model_files.read_licence(inputs.model_path),
                licences=model_files.list_licences(inputs.model_path),
                added_rows=inputs.added_rows,
                wrapped=model_files.is_wrapped(inputs.model_path),
            ),
            selection=selection,
            changes=changes,
        )
    elif not (directory / "config.json").exists():
        raise UserError(
            f"{directory.name} is another directory than that of process 0. Put --output_dir on a file system that "
            "all processes share."
        )
