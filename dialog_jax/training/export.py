"""A checkpoint of a run in, a Hugging Face directory out."""

import hashlib
import json
import os
import pathlib
import shutil
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from dialog_jax import atomic_files
from dialog_jax.errors import UserError
from dialog_jax.model import decoder, pretrained
from dialog_jax.rendering.tokenizers import load_tokenizer
from dialog_jax.training import checkpoints, metrics, model_card, run_directory


def export_model(
    run: str | os.PathLike[str], out: str | os.PathLike[str], *, step: str = "best", dtype: str = ""
) -> str:
    """Writes the trained model as a Hugging Face directory, which appears when it is complete; returns a summary.

    Args:
      run: the directory of a run.
      out: must not exist, be empty, or hold this export already.
      step: `best` by held-out loss, `latest`, or the number of a step that has a checkpoint.
      dtype: of the weights: float32, bfloat16 or float16; empty for the type that the run loaded.

    Raises:
      UserError: there is no run, or no such step, or something else is in `out`.
    """
    run, out = atomic_files.expand_home(run), atomic_files.expand_home(out)
    checkpoints.check_path(run)
    _check_out(run, out)
    model = run_directory.read_model(run)
    dtype = dtype or model.base.dtype
    losses = {line["step"]: line["loss"] for line in metrics.read_records(run / "evaluation.jsonl")}
    number = _choose_step(run, step, checkpoints.list_steps(run / "checkpoints"), losses)
    source = _identify_checkpoint(run, number) | {"dtype": dtype}
    if out.exists() and not out.is_dir():
        raise UserError(f"{out} is a file; give a directory.")
    if out.exists() and any(out.iterdir()):
        if _is_export_of(out, source):
            return f"{out}: already there, exported from step {number:,} in {dtype}"
        raise UserError(
            f"{out} is not empty and holds no export of step {number:,} of {run} in {dtype}. Choose another --out."
        )
    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    like = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, jnp.float32, sharding=device),
        decoder.abstract_parameters(model.decoder),
    )
    parameters = checkpoints.restore_trained(run / "checkpoints", number, like)
    with atomic_files.new_directory(out.resolve()) as unfinished:  # a link to a directory stays a link
        pretrained.write_model(
            unfinished,
            model.decoder,
            parameters,
            tokenizer=load_tokenizer(run / "tokenizer"),
            stop_tokens=model.stop_tokens,
            generation=model.base.generation,
            dtype=dtype,
        )
        for file in model.base.licences:
            shutil.copyfile(file, unfinished / file.name)
        card = model_card.make_card(run, model.base, number, losses, dtype)
        atomic_files.write_text(unfinished / "README.md", card)
        atomic_files.write_text(unfinished / "export.json", json.dumps(source, indent=1) + "\n")
    size = sum(leaf.size for leaf in jax.tree.leaves(parameters))
    return f"{out}: step {number:,}, {size:,} parameters in {dtype}"


def _check_out(run: pathlib.Path, out: pathlib.Path) -> None:
    """Raises UserError if a directory at `out` would replace something that is in use, or cannot be made."""
    target = out.resolve()
    for name, used in (("the current directory", pathlib.Path.cwd()), ("the run", run.resolve())):
        if used.is_relative_to(target):
            raise UserError(
                f"--out={out} is {name}{'' if used == target else ', or contains it'}; an export is a directory of its "
                f"own. Name a new one, for instance --out={run / 'model'}."
            )
    atomic_files.check_parents(out, str(out))


def _choose_step(run: pathlib.Path, step: str, steps: list[int], losses: Mapping[int, float]) -> int:
    best = checkpoints.find_best_step(losses, steps)
    if not steps or (step == "best" and best is None):
        raise UserError(
            f"{run} has no evaluated checkpoint yet. Continue the run until its first one (checkpoint_every)."
        )
    steps_by_name = {"latest": max(steps)} if best is None else {"best": best, "latest": max(steps)}
    if step not in steps_by_name and not (step.isdecimal() and int(step) in steps):
        raise UserError(f"--step is {step}; it must be best, latest or one of {', '.join(map(str, sorted(steps)))}.")
    return steps_by_name[step] if step in steps_by_name else int(step)


def _identify_checkpoint(run: pathlib.Path, step: int) -> dict[str, Any]:
    """Returns what identifies a checkpoint: its step and a hash of the run's config and of the time of saving."""
    digest = hashlib.sha256((run / "config.json").read_bytes())
    file = run / "checkpoints" / str(step) / "_CHECKPOINT_METADATA"
    if not file.exists():
        raise UserError(f"the checkpoint of step {step} is incomplete: {file.name} is missing. Choose another --step.")
    digest.update(file.read_bytes())
    return {"step": step, "checkpoint": digest.hexdigest()}


def _is_export_of(out: pathlib.Path, source: dict[str, Any]) -> bool:
    file = out / "export.json"
    return file.is_file() and json.loads(file.read_text(encoding="utf-8")) == source
