"""The README.md of an exported model: how it was made, and the front matter that the Hugging Face Hub reads."""

import importlib.metadata
import json
import pathlib
from collections.abc import Mapping
from typing import Any

import yaml

from dialog_jax.training import run_directory
from dialog_jax.training.run_directory import BaseModel

_RATE_FIELDS = ("learning_rate", "schedule", "weight_decay")


def make_card(
    run: pathlib.Path,
    base: BaseModel,
    step: int,
    losses: Mapping[int, float],
    weights: str,
    *,
    is_adapter: bool = False,
) -> str:
    """Returns the text of the model card.

    Args:
      run: the directory of the run.
      step: of the checkpoint.
      losses: held-out loss by step.
      weights: what they are: their type.
      is_adapter: whether these are those of an adapter for the base model, and not of a model.
    """
    config = json.loads((run / "config.json").read_text(encoding="utf-8"))
    steps = max(step, run_directory.read_hashes(run).get("steps", step))  # a later config may have fewer
    data, optimizer = config["data"], config["optimizer"]
    sets = [data["train"], *(entry["train"] for entry in data["mix"].values())]
    rows = config["rows"] * config["gradient_accumulation"]
    facts = {
        "base model": base.hub_name or config["model"],
        "training data": ", ".join(filter(None, sets)),
        "held-out data": data["validation"] or f"{100 * data['validation_share']:g}% of the training data",
        "trained": _describe_trained(config),
        "objective": _list_fields(config["objective"]),
        "steps": f"{step:,} of {steps:,}, each of {rows:,} rows of {data['max_length']:,} tokens",
        "held-out loss": _describe_losses(losses, step),
        "optimizer": f"{optimizer['name']}: {_list_fields({name: optimizer[name] for name in _RATE_FIELDS})}",
        "weights": f"{weights} (computed in {run_directory.read_hashes(run).get('compute_dtype', 'float32')})",
        "version": f"dialog_jax {_find_version()}",
    }
    licence = f"\nThe licence of the base model is in {_list_names(base)}.\n" if base.licences else ""
    table = "".join(f"| {name} | {_escape(value)} |\n" for name, value in facts.items())
    return (
        f"---\n{yaml.safe_dump(_make_front_matter(base, facts['base model'], is_adapter), sort_keys=False)}---\n\n"
        f"# {_escape(facts['base model'])}, fine-tuned on dialogues{': an adapter' if is_adapter else ''}\n\n"
        f"| | |\n|---|---|\n{table}{licence}"
    )


def _make_front_matter(base: BaseModel, name: str, is_adapter: bool) -> dict[str, Any]:
    """Returns the front matter; an adapter always names its base model, since it is of no use without."""
    front_matter: dict[str, Any] = {"base_model": name} if base.hub_name or is_adapter else {}
    library = "peft" if is_adapter else "transformers"
    return front_matter | dict(base.licence) | {"library_name": library, "pipeline_tag": "text-generation"}


def _find_version() -> str:
    try:
        return importlib.metadata.version("dialog_jax")
    except importlib.metadata.PackageNotFoundError:
        return "(not installed)"


def _list_names(base: BaseModel) -> str:
    return ", ".join(file.name for file in base.licences)


def _list_fields(fields: Mapping[str, Any]) -> str:
    """Returns "name conditional, turn_discount 1.0", without empty fields."""
    return ", ".join(f"{name} {value}" for name, value in fields.items() if value not in ("", [], {}))


def _describe_trained(config: Mapping[str, Any]) -> str:
    """Returns "lora: rank 32, alpha 32.0, ...", or what else of the parameters was trained."""
    parts = [
        f"{name}: {_list_fields(config[name])}"
        for name, size in (("lora", "rank"), ("soft_prompt", "tokens"))
        if config.get(name, {}).get(size)
    ]
    parts += [f"{name}: {_list(config[name])}" for name in ("adapter", "freeze", "train_only") if config.get(name)]
    return "; ".join(parts) or "all parameters"


def _list(value: str | list[str]) -> str:
    return value if isinstance(value, str) else ", ".join(value)


def _describe_losses(losses: Mapping[int, float], step: int) -> str:
    known = [(0, "before training"), (step, f"after step {step:,}")]
    return ", ".join(f"{losses[number]:.4f} {when}" for number, when in known if number in losses) or "not evaluated"


def _escape(value: str) -> str:
    """Returns a text that stays in its cell of a table."""
    return value.replace("|", "\\|").replace("\n", " ")
