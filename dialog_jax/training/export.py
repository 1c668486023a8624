"""A checkpoint of a run in, a Hugging Face model or a PEFT adapter out."""

import hashlib
import json
import os
import pathlib
import shutil
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from dialog_jax import atomic_files
from dialog_jax.errors import UserError
from dialog_jax.model import adapters, decoder, model_files, peft_files, saving
from dialog_jax.rendering.tokenizers import load_tokenizer
from dialog_jax.training import checkpoints, model_card, run_directory, trained_models
from dialog_jax.training.run_directory import RunModel

_PROMPT_INITS = {"vocabulary": "SAMPLE_VOCAB", "text": "TEXT", "random": "RANDOM"}  # in PEFT's words


def export_model(
    run: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    step: str = "best",
    dtype: str = "",
    merge: bool = False,
    base: str = "",
    average: bool = False,
) -> str:
    """Writes what a run has trained as a directory, which appears when it is complete; returns a summary.

    That is a Hugging Face model, or a PEFT adapter if the run trained one.

    Args:
      run: the directory of a run.
      out: must not exist, be empty, or hold this export already.
      step: `best` by held-out loss, `latest`, or the number of a step that has a checkpoint.
      dtype: of the weights: float32, bfloat16 or float16; empty for the type of the model that the run began with, or
        for float32 in an adapter.
      merge: add an adapter to the model that the run began with, and write the sum as a model. A soft prompt that was
        trained with it becomes an adapter of that model, in its directory.
      base: that model, where it is needed; empty for what the run's config names.
      average: write the exponential moving average of the trained weights in their place.

    Raises:
      UserError: there is no run, no such step, no base model, one that is not needed, or something else is in `out`.
    """
    run, out = atomic_files.expand_home(run), atomic_files.expand_home(out)
    checkpoints.check_path(run)
    _check_out(run, out)
    model = run_directory.read_model(run)
    is_adapter = _check_kind(run, model, merge)
    needs_base = not is_adapter and (model.base.wrapped or not trained_models.is_whole(model))
    if base and not needs_base:
        reason = "an adapter is exported without its base model" if is_adapter else "the run has all parameters"
        raise UserError(f"--base is {base}, and {reason}. Leave --base out.")
    dtype = dtype or ("float32" if is_adapter else model.base.dtype)
    checkpoint = trained_models.choose_checkpoint(run, step)
    number = checkpoint.step
    source = _identify_checkpoint(run, number) | {"dtype": dtype}
    if is_adapter or merge:
        source["base"] = run_directory.read_hashes(run)["model"]
    source |= {name: True for name, value in (("merged", merge), ("average", average)) if value}
    if out.exists() and not out.is_dir():
        raise UserError(f"{out} is a file; give a directory.")
    if out.exists() and any(out.iterdir()):
        if _is_export_of(out, source):
            return f"{out}: already there, exported from step {number:,} in {dtype}"
        raise UserError(
            f"{out} is not empty and holds no export of step {number:,} of {run} in {dtype}. Choose another --out."
        )
    path = trained_models.find_base(run, model, base) if needs_base else None
    trained = trained_models.read_trained(run, model, number, average=average)
    with atomic_files.new_directory(out.resolve()) as unfinished:  # a link to a directory stays a link
        if is_adapter:
            size = _write_adapter(unfinished, run, model, trained, dtype)
        else:
            parameters = trained_models.assemble(model, trained, path)
            prompt = parameters.pop(decoder.SOFT_PROMPT, None)
            size = _write_model(unfinished, run, model, parameters, dtype, path if model.base.wrapped else None)
            if prompt is not None:
                _write_prompt(unfinished / peft_files.PROMPT, run, model, prompt, out.name)
                merged = {"base": model_files.fingerprint(unfinished)}
                atomic_files.write_text(
                    unfinished / peft_files.PROMPT / peft_files.ORIGIN, json.dumps(merged, indent=1) + "\n"
                )
        for file in model.base.licences:
            shutil.copyfile(file, unfinished / file.name)
        kind = f"{dtype}, exponential moving average" if average else dtype
        card = model_card.make_card(run, model.base, number, checkpoint.losses, kind, is_adapter=is_adapter)
        atomic_files.write_text(unfinished / "README.md", card)
        atomic_files.write_text(unfinished / peft_files.ORIGIN, json.dumps(source, indent=1) + "\n")
    kind = "parameters of an adapter" if is_adapter else "parameters"
    return f"{out}: step {number:,}, {size:,} {kind} in {dtype}"


def _check_kind(run: pathlib.Path, model: RunModel, merge: bool) -> bool:
    """Returns whether the export is an adapter; raises UserError if the run has none to merge, or cannot go without."""
    trains_adapter = bool(model.selection.scales or model.selection.soft_prompt.tokens)
    if merge and not model.selection.scales and not (trains_adapter and model.base.added_rows):
        trained = "a soft prompt, which is part of no matrix" if trains_adapter else "no adapter"
        raise UserError(f"{run} trained {trained}, so there is nothing to merge. Leave --merge out.")
    if trains_adapter and not merge and model.base.added_rows:
        raise UserError(
            f"{run} added {model.base.added_rows:,} rows to the embedding (resize_embedding), which an adapter does "
            "not have. Export the whole model: --merge."
        )
    return trains_adapter and not merge


def _write_model(
    directory: pathlib.Path,
    run: pathlib.Path,
    model: RunModel,
    parameters: Mapping[str, Any],
    dtype: str,
    wrapper: pathlib.Path | None,
) -> int:
    """Writes the model with its adapter merged, if it has one; returns the number of its parameters."""
    config, merged = adapters.merge_factors(model.decoder, parameters)
    saving.write_model(
        directory,
        config,
        merged,
        tokenizer=load_tokenizer(run / "tokenizer"),
        stop_tokens=model.stop_tokens,
        generation=model.base.generation,
        dtype=dtype,
        wrapper=wrapper,
    )
    return sum(leaf.size for leaf in jax.tree.leaves(merged))


def _write_adapter(
    directory: pathlib.Path, run: pathlib.Path, model: RunModel, trained: Mapping[str, Any], dtype: str
) -> int:
    """Writes the adapter with the tokenizer that it was trained with; returns the number of its parameters."""
    base_name = model.base.hub_name or run_directory.read_config(run).model
    if model.selection.scales:
        peft_files.write_lora(
            directory,
            model.decoder,
            model.selection.scales,
            trained,
            base_name=base_name,
            dtype=dtype,
            wrapped=model.base.wrapped,
        )
    if model.selection.soft_prompt.tokens:
        place = directory / peft_files.PROMPT if model.selection.scales else directory
        _write_prompt(place, run, model, trained[decoder.SOFT_PROMPT], base_name)
    saving.write_tokenizer(
        directory,
        load_tokenizer(run / "tokenizer"),
        stop_tokens=model.stop_tokens,
        generation=model.base.generation,
    )
    return sum(leaf.size for leaf in jax.tree.leaves(trained))


def _write_prompt(directory: pathlib.Path, run: pathlib.Path, model: RunModel, prompt: Any, base_name: str) -> None:
    """Writes the soft prompt that a run has trained, by itself or beside the rest of the export."""
    directory.mkdir(exist_ok=True)
    config = run_directory.read_config(run).soft_prompt
    init = _PROMPT_INITS[config.init] if config.tokens else "RANDOM"
    peft_files.write_prompt(
        directory, model.decoder, np.asarray(prompt), base_name=base_name, init=init, text=config.text or None
    )


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


def _identify_checkpoint(run: pathlib.Path, step: int) -> dict[str, Any]:
    """Returns what identifies a checkpoint: its step and a hash of the run's config and of the time of saving."""
    digest = hashlib.sha256((run / "config.json").read_bytes())
    file = run / "checkpoints" / str(step) / "_CHECKPOINT_METADATA"
    if not file.exists():
        raise UserError(f"the checkpoint of step {step} is incomplete: {file.name} is missing. Choose another --step.")
    digest.update(file.read_bytes())
    return {"step": step, "checkpoint": digest.hexdigest()}


def _is_export_of(out: pathlib.Path, source: dict[str, Any]) -> bool:
    file = out / peft_files.ORIGIN
    return file.is_file() and json.loads(file.read_text(encoding="utf-8")) == source
