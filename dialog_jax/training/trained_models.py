"""The model that a run has trained: from a checkpoint, and from the model that the run began with where it is frozen.

In: the directory of a run. Out: its parameters, as one tree, or a `loading.Model` for the commands that read a model.
"""

import pathlib
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from dialog_jax import atomic_files
from dialog_jax.errors import UserError
from dialog_jax.formats import tokenizer_files
from dialog_jax.inference import loading
from dialog_jax.model import adapters, model_files, parameter_trees, peft_reading, pretrained
from dialog_jax.rendering.tokenizers import load_tokenizer
from dialog_jax.training import checkpoints, metrics, optimizer, run_directory, trainable
from dialog_jax.training.run_directory import RunModel


class Checkpoint(NamedTuple):
    """One checkpoint of a run, chosen but not read."""

    step: int
    losses: Mapping[int, float]
    """Held-out loss by step, of the whole run."""
    best: int | None
    """The step of the best checkpoint by held-out loss; None if none was evaluated."""


def choose_checkpoint(run: pathlib.Path, step: str) -> Checkpoint:
    """Returns a checkpoint of a run.

    Args:
      step: `best` by held-out loss, `latest`, or the number of a step.

    Raises:
      UserError: there is none of this step, or none that was evaluated.
    """
    checkpoints.check_path(run)
    steps = checkpoints.list_steps(run / "checkpoints")
    losses = {line["step"]: line["loss"] for line in metrics.read_records(run / "evaluation.jsonl")}
    best = checkpoints.find_best_step(losses, steps)
    if not steps or (step == "best" and best is None):
        raise UserError(
            f"{run} has no evaluated checkpoint yet. Continue the run until its first one (checkpoint_every)."
        )
    steps_by_name = {"latest": max(steps)} if best is None else {"best": best, "latest": max(steps)}
    if step not in steps_by_name and not (step.isdecimal() and int(step) in steps):
        raise UserError(f"--step is {step}; it must be best, latest or one of {', '.join(map(str, sorted(steps)))}.")
    number = steps_by_name[step] if step in steps_by_name else int(step)
    return Checkpoint(number, losses, best)


def read_trained(run: pathlib.Path, model: RunModel, step: int, *, average: bool = False) -> dict[str, Any]:
    """Returns the trained parameters of a checkpoint.

    Args:
      average: whether to return their exponential moving average instead.

    Raises:
      UserError: the checkpoint is damaged, or the run keeps no average.
    """
    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])

    def place(leaf: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=device)

    like = jax.tree.map(place, trainable.abstract_parameters(model.selection).trained)
    if not average:
        return checkpoints.restore_trained(run / "checkpoints", step, like)
    config = run_directory.read_config(run)
    if not config.optimizer.ema_decay:
        raise UserError(
            f"{run} keeps no average of its weights (optimizer.ema_decay is 0). Train with --config.optimizer."
            "ema_decay=0.999, or leave --ema out."
        )
    steps = run_directory.read_hashes(run)["steps"]
    ratios = trainable.find_rate_ratios(config, model.selection)
    rule = optimizer.make_optimizer(config.optimizer, steps, rate_ratios=ratios)
    return checkpoints.restore_average(run / "checkpoints", step, jax.tree.map(place, jax.eval_shape(rule.init, like)))


def find_base(run: pathlib.Path, model: RunModel, base: str = "") -> pathlib.Path:
    """Returns the files of the model that a run began with.

    Args:
      base: its path or name; empty for what the run's config names.

    Raises:
      UserError: it is not there, or is another model.
    """
    name = base or model.base.hub_name or run_directory.read_config(run).model
    if not base and not model.base.hub_name and not pathlib.Path(name).expanduser().exists():
        raise UserError(
            f"{run} began with the model {name!r}, which is not here; of an absolute path, a run keeps only the last "
            "part. Name it: --base=PATH."
        )
    path = pretrained.resolve(name)
    if model_files.fingerprint(path) != run_directory.read_hashes(run)["model"]:
        raise UserError(f"{path} is another model than {run} began with. Name that one: --base=PATH.")
    return path


def assemble(
    model: RunModel, trained: Mapping[str, Any], base: pathlib.Path | None, *, dtype: jax.typing.DTypeLike = jnp.float32
) -> dict[str, Any]:
    """Returns all parameters of a run's model, as one tree; frozen ones are those of the model that it began with.

    Args:
      base: the files of that model; None if the run trains all parameters.
      dtype: of the model's own parameters.
    """
    selection = model.selection
    own, added = parameter_trees.split(trained, lambda path: path in selection.trained_paths)
    own = jax.tree.map(lambda leaf: leaf.astype(dtype), own)
    if base is not None:
        flat = parameter_trees.flatten(
            pretrained.load_parameters(base, model.decoder, dtype=dtype, added_rows=model.base.added_rows)
        )
        own = parameter_trees.unflatten(flat | parameter_trees.flatten(own))
    scales = {path: jnp.asarray(scale) for path, scale in selection.scales.items()}
    return parameter_trees.merge(adapters.attach_scales(own, scales), added)


def load_initial(run: pathlib.Path, model: RunModel, base: pathlib.Path, *, adapter: str) -> dict[str, Any]:
    """Returns all parameters of a run's model before its first update, float32, as one tree.

    Args:
      base: the files of the model that the run began with.
      adapter: directory of the adapter that the run continued; empty if it began without.

    Raises:
      UserError: the adapter is not there.
    """
    config = run_directory.read_config(run)
    continued = None
    if adapter:
        continued = peft_reading.read_adapter(atomic_files.expand_home(adapter), model.decoder, base=base)
    tokenizer = load_tokenizer(tokenizer_files.find_tokenizer(run))
    parts = trainable.make_parameters(
        model.selection if continued else model.selection._replace(soft_prompt=config.soft_prompt),
        pretrained.load_parameters(base, model.decoder, added_rows=model.base.added_rows),
        jax.random.key(config.seed),
        soft_prompt_text=tokenizer(config.soft_prompt.text)["input_ids"],
        adapter=continued,
    )
    return parameter_trees.merge(*parts)


def is_whole(model: RunModel) -> bool:
    """Returns whether the checkpoints of a run have all parameters of its model."""
    return not trainable.abstract_parameters(model.selection).frozen


def needs_base(name: str) -> bool:
    """Returns whether a model is a run of which the checkpoints have a part: the rest is that of its base model."""
    run = atomic_files.expand_home(name)
    return run_directory.is_run(run) and not is_whole(run_directory.read_model(run))


def load_model(
    name: str,
    *,
    base: str = "",
    adapter: str = "",
    dtype: jax.typing.DTypeLike = jnp.float32,
    report: Callable[[str], None] = print,
    **options: Any,
) -> loading.Model:
    """Returns a model with its parameters: that of a run, or a published one, with an adapter if one is named.

    Of a run it is the best checkpoint by held-out loss, or the latest if none was evaluated.

    Args:
      name: the directory of a run, or what `loading.load_model` takes.
      base: the model that the run began with, where the run needs it; empty for what its config names.
      dtype: of the model's own parameters in memory.
      options: those of `loading.open_model`.

    Raises:
      UserError: the run has no checkpoint, `base` is not needed, or what `loading.load_model` raises.
    """
    run = atomic_files.expand_home(name)
    if base and not needs_base(name):
        raise UserError(
            f"--base is {base}, and {name} needs no other model: it is "
            + ("a run that has all of its parameters." if run_directory.is_run(run) else "no run.")
            + " Leave --base out."
        )
    if not run_directory.is_run(run):
        return loading.load_model(name, adapter=adapter, dtype=dtype, report=report, **options)
    if adapter:
        raise UserError(f"{run} is a run, and --adapter={adapter} is for a model. Name one of the two.")
    return _load_run(run, base, dtype, report, **options)


def _load_run(
    run: pathlib.Path,
    base: str,
    dtype: jax.typing.DTypeLike,
    report: Callable[[str], None],
    *,
    tokenizer: str = "",
    chat_template: str = "",
    resize_embedding: bool = False,  # the run's model has its rows
    row_length: int = 1,  # that of the run counts
    **options: Any,
) -> loading.Model:
    model = run_directory.read_model(run)
    latest = choose_checkpoint(run, "latest")
    step = latest.step if latest.best is None else latest.best
    report(f"{run}: step {step:,}, the {'latest' if latest.best is None else 'best by held-out loss'}")
    path = None if is_whole(model) else find_base(run, model, base)
    source = tokenizer or tokenizer_files.find_tokenizer(run)
    return loading.make_model(
        run,
        model.decoder.for_length(run_directory.read_config(run).data.max_length),
        load_tokenizer(source, chat_template=chat_template),
        stop_tokens=model.stop_tokens,
        dtype=model.base.dtype,
        soft_prompt_tokens=model.selection.soft_prompt.tokens,
        parameters=assemble(model, read_trained(run, model, step), path, dtype=dtype),
        **options,
    )
