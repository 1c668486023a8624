"""A run: from a config to checkpoints and figures in one directory. Composes all other modules.

`training.run_directory` says what lies in that directory.
"""

import dataclasses
import hashlib
import json
import math
import os
import pathlib
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import rich.console
import transformers
from jax.sharding import Mesh

from dialog_jax.data import batches, dataset
from dialog_jax.data import teacher as teacher_lib
from dialog_jax.data.batches import Batch
from dialog_jax.data.dataset import Trees
from dialog_jax.data.dialogues import read_dialogues
from dialog_jax.data.rendering import Renderer
from dialog_jax.data.teacher import TeacherFile
from dialog_jax.data.tokenizers import check_vocabulary, fingerprint, load_tokenizer
from dialog_jax.model import decoder, pretrained
from dialog_jax.model.decoder import DecoderConfig
from dialog_jax.training import checkpoints, metrics, optimizer, run_directory, sharding
from dialog_jax.training import step as step_lib
from dialog_jax.training.config import TrainConfig
from dialog_jax.training.progress import Clock, Progress

# Of DataConfig: what does not change trees, or is in their key by its content.
_NOT_IN_TREES = {
    "train",
    "validation",
    "train_split",
    "validation_split",
    "max_targets",
    "chat_template",
    "cache_dir",
    "teacher",
}
_TURNS_SHOWN = 32  # turns that held-out figures list one by one


class RunResult(NamedTuple):
    """Where a run stands at its end."""

    step: int
    first: dict[str, Any]
    """Held-out figures before training, as `metrics.Evaluation.figures` gives them."""
    last: dict[str, Any]


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

    model_path = pretrained.resolve(config.model)
    model = pretrained.load_config(model_path)
    tokenizer = load_tokenizer(config.tokenizer or str(model_path), chat_template=config.data.chat_template)
    check_vocabulary(tokenizer, model.vocab_size)
    if config.data.max_length > model.max_length:
        raise ValueError(
            f"data.max_length is {config.data.max_length:,}, but the model's context is {model.max_length:,} tokens."
        )
    renderer = Renderer(
        tokenizer,
        chat_template_kwargs=config.data.chat_template_kwargs,
        allow_special_tokens=config.data.allow_special_tokens,
    )
    teacher = _teacher(config, tokenizer, model)
    train, train_hash = _trees(
        config, config.data.train, config.data.train_split, tokenizer, renderer, directory, console, teacher
    )
    held_out, held_out_hash = _trees(
        config, config.data.validation, config.data.validation_split, tokenizer, renderer, directory, console
    )
    plan = batches.Plan(
        train,
        max_length=config.data.max_length,
        max_targets=config.data.max_targets or config.data.max_length,
        rows=config.rows,
        micro_batches=config.gradient_accumulation,
        seed=config.seed,
    )
    rows_per_step = config.rows * config.gradient_accumulation
    steps = config.steps or max(1, math.ceil(config.epochs * plan.rows_per_epoch / rows_per_step))
    used = plan.tokens_per_epoch / (plan.rows_per_epoch * config.data.max_length)
    console.print(
        f"{plan.rows_per_epoch:,} rows of {config.data.max_length:,} tokens an epoch, {used:.1%} of them used; "
        f"{steps:,} steps of {rows_per_step} rows are {steps * rows_per_step / plan.rows_per_epoch:.2f} epochs"
    )
    transform = optimizer.make_optimizer(config.optimizer, steps)
    schedule = optimizer.make_schedule(config.optimizer, steps)
    inputs = {
        "model": pretrained.fingerprint(model_path),
        "data.train": train_hash,
        "data.validation": held_out_hash,
        "steps": steps,
    }
    run_directory.check_inputs(directory, inputs)
    # A fresh run loads its weights before it claims the directory: that is when errors in them are found.
    loaded = None if (directory / "checkpoints").exists() else _load(model_path, model, mesh)
    stop_tokens = pretrained.stop_tokens(model_path) | {renderer.end_of_turn, tokenizer.eos_token_id}
    run_directory.claim(directory, config, inputs, model, tokenizer, stop_tokens=stop_tokens - {None})

    with checkpoints.open_manager(directory / "checkpoints", keep=config.keep_checkpoints) as manager:
        start = manager.latest_step() or 0
        if start >= steps:
            lines = metrics.read_lines(directory / "evaluation.jsonl")
            console.print(f"The run is finished: step {start:,}. Nothing to do.")
            return RunResult(start, lines[0], lines[-1])
        if start:
            state, shardings = _restored(model, mesh, transform, manager, start)
        else:
            state, shardings = step_lib.initial_state(mesh, loaded or _load(model_path, model, mesh), transform)
        del loaded  # donated to the state
        for line in sharding.undivided(mesh, state.parameters):
            console.print(f"not divided over the mesh: {line}")
        dtype = _compute_dtype(config, mesh)
        train_step = step_lib.make_train_step(
            model,
            transform,
            mesh,
            shardings,
            compute_dtype=dtype,
            remat=config.remat,
            loss_config=config.loss,
        )
        evaluation_step = step_lib.make_evaluation_step(
            model, mesh, shardings.parameters, compute_dtype=dtype, turns=_TURNS_SHOWN
        )

        def evaluate(number: int, state: step_lib.TrainState) -> dict[str, Any]:
            evaluation = metrics.Evaluation()
            for batch, _ in batches.evaluation_batches(
                held_out,
                max_length=config.data.max_length,
                max_targets=config.data.max_targets or config.data.max_length,
                rows=config.rows,
                limit=config.evaluate_rows,
            ):
                evaluation.add(evaluation_step(state.parameters, _place(mesh, batch)))
            figures = evaluation.figures()
            if not math.isfinite(figures["loss"]):
                raise FloatingPointError(
                    f"step {number}: held-out loss {figures['loss']}. The run stops; the checkpoints before stay. "
                    "Lower optimizer.learning_rate."
                )
            return figures

        writer = metrics.Writer(directory, step=start)
        if start:
            console.print(f"going on from step {start:,}")
        else:
            figures = evaluate(0, state)
            writer.evaluation(0, figures)
            console.print(_held_out_line(0, figures))
        peak = metrics.peak_flops(mesh.devices.flat[0])
        clock = Clock()
        previous: _Update | None = None

        def check(update: _Update) -> dict[str, float]:
            """Waits for the update; its figures, if they are finite."""
            figures = _figures(update, clock, model, mesh, peak, float(schedule(update.step - 1)))
            if not (math.isfinite(figures["loss"]) and math.isfinite(figures["gradient_norm"])):
                ids = sorted({str(train.ids[tree]) for row in plan.rows(update.step - 1) for tree in row})
                raise FloatingPointError(
                    f"step {update.step}: loss {figures['loss']}, gradient norm {figures['gradient_norm']}. The run "
                    f"stops; the checkpoints before stay. Its dialogues: {', '.join(ids[:20])}"
                    f"{' and more' if len(ids) > 20 else ''}. Lower optimizer.learning_rate, or look at them."
                )
            return figures

        def report(figures: dict[str, float]) -> None:
            assert previous is not None
            writer.train(previous.step, figures)
            progress.show(previous.step, figures)

        with Progress(console, steps, start) as progress:
            for number, batch in enumerate(plan.batches(start, steps), start + 1):
                placed = _place(mesh, batch)
                figures = check(previous) if previous else {}
                state, measured = train_step(state, placed)
                if previous:
                    report(figures)  # while the device works on
                previous = _Update(number, batch, measured)
                if number % config.evaluate_every and number != steps:
                    continue
                report(check(previous))
                previous = None
                held_out_figures = evaluate(number, state)
                writer.evaluation(number, held_out_figures)
                progress.print(_held_out_line(number, held_out_figures))
                if number % config.checkpoint_every == 0 or number == steps:
                    checkpoints.save(manager, state, loss=held_out_figures["loss"])
                clock.restart()
        writer.close()
    lines = metrics.read_lines(directory / "evaluation.jsonl")
    return RunResult(steps, lines[0], lines[-1])


class _Update(NamedTuple):
    """An update that the device may still be working on."""

    step: int
    batch: Batch
    measured: step_lib.StepMetrics


def _check_rows(config: TrainConfig, mesh: Mesh) -> None:
    divided = mesh.shape["data"] * mesh.shape["fsdp"]
    if config.rows % divided:
        raise ValueError(
            f"rows is {config.rows}; it must be a multiple of data * fsdp = {divided}, so that every device has rows."
        )


def _trees(
    config: TrainConfig,
    source: str,
    split: str,
    tokenizer: transformers.PreTrainedTokenizerFast,
    renderer: Renderer,
    directory: pathlib.Path,
    console: rich.console.Console,
    teacher: TeacherFile | None = None,
) -> tuple[Trees, str]:
    """(the prepared trees of one source, from the cache if they are there; a hash of all that determines them)."""
    file = pathlib.Path(source).expanduser()
    digest = hashlib.sha256()
    if file.is_file():
        with file.open("rb") as stream:
            while block := stream.read(1 << 20):
                digest.update(block)
    else:
        for dialogue in read_dialogues(source, split=split):
            digest.update(json.dumps(dataclasses.asdict(dialogue), sort_keys=True, default=str).encode())
    key = {
        "dialogues": digest.hexdigest(),
        "tokenizer": fingerprint(tokenizer),
        "chat_template": tokenizer.chat_template,
        "objective": dataclasses.asdict(config.objective),
        # All other fields, so that a new one is not forgotten.
        **{name: value for name, value in dataclasses.asdict(config.data).items() if name not in _NOT_IN_TREES},
    }
    if teacher is not None:
        key["teacher"] = teacher.digest

    def make() -> Trees:
        with console.status(f"preparing {os.path.basename(source)}"):
            return dataset.prepare(
                read_dialogues(source, split=split),
                renderer,
                objective=config.objective,
                max_length=config.data.max_length,
                truncate=config.data.truncate,
                share_prefixes=config.data.share_prefixes,
                teacher=teacher,
            )

    trees = dataset.load_or_prepare(config.data.cache_dir or directory / "trees", key, make, teacher)
    console.print(f"{os.path.basename(source)}: {trees.report}")
    targets = trees.sizes()[1]
    if config.data.max_targets and targets.max() > config.data.max_targets:
        raise ValueError(
            f"dialogue {trees.ids[int(targets.argmax())]} ({os.path.basename(source)}) has {targets.max():,} targets, "
            f"but data.max_targets is {config.data.max_targets:,}. Raise it, or set it to 0 for as many as tokens."
        )
    return trees, hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()


def _teacher(
    config: TrainConfig, tokenizer: transformers.PreTrainedTokenizerFast, model: DecoderConfig
) -> TeacherFile | None:
    """The file of data.teacher, if there is one."""
    if not config.data.teacher:
        return None
    teacher = teacher_lib.read_file(config.data.teacher, tokenizer=fingerprint(tokenizer))
    if teacher.largest >= model.vocab_size:
        raise ValueError(
            f"{teacher.name} names token {teacher.largest:,}, but the model's vocabulary has {model.vocab_size:,}. "
            "Choose a teacher with the model's tokenizer."
        )
    return teacher


def _load(model_path: pathlib.Path, model: DecoderConfig, mesh: Mesh) -> dict:
    """The published parameters, laid out over the mesh."""
    return pretrained.load_parameters(
        model_path, model, sharding=lambda path, shape: sharding.parameter_sharding(mesh, path, shape)
    )


def _restored(model: DecoderConfig, mesh: Mesh, transform, manager, start: int):
    """(the state saved at step `start`, its shardings)."""
    abstract = jax.eval_shape(
        lambda parameters: step_lib.TrainState(jnp.zeros((), jnp.int32), parameters, transform.init(parameters)),
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


def _figures(
    update: _Update,
    clock: Clock,
    model: DecoderConfig,
    mesh: Mesh,
    peak: float | None,
    learning_rate: float,
) -> dict[str, float]:
    """The figures of one update; waits for it."""
    values = step_lib.StepMetrics(*(np.asarray(value).item() for value in update.measured))
    seconds = clock.lap()
    figures = {
        "loss": values.loss,
        "nll": values.nll,
        "gradient_norm": values.gradient_norm,
        "learning_rate": learning_rate,
        "seconds": seconds,
        "tokens_per_second": values.tokens / seconds,
        "response_tokens_per_second": values.response_tokens / seconds,
        "tokens": values.tokens,
        "targets": values.targets,
        "row_tokens_used": values.tokens / update.batch.tokens.size,
    }
    if peak is not None:
        figures["mfu"] = metrics.useful_flops(model, update.batch) / seconds / (peak * mesh.devices.size)
    return figures


def _held_out_line(step: int, figures: Mapping[str, Any]) -> str:
    return (
        f"step {step:,}: held-out loss {figures['loss']:.4f}, accuracy {figures['accuracy']:.2%} "
        f"on {figures['targets']:,} targets"
    )
