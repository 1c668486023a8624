"""What an update of a run holds, before the run: measured on a part of its data, or assumed where there is none."""

import math
import pathlib
from typing import NamedTuple

import numpy as np

from dialog_jax.batching import batches
from dialog_jax.dialogues.parsing import read_dialogues
from dialog_jax.rendering.sequences import Renderer
from dialog_jax.rendering.tokenizers import load_tokenizer
from dialog_jax.training.config import TrainConfig
from dialog_jax.trees import dataset

_LARGEST = 1 << 30  # bytes of a file that is read whole to see how many dialogues it has


class Workload(NamedTuple):
    """Means over updates."""

    tokens: int
    """That are not padding."""
    attention_pairs: int
    """Of a token and one that it sees."""
    targets: int
    updates: int | None
    """Of the whole run; None if nobody knows."""
    source: str
    """Where these come from, in words."""


def measure_workload(config: TrainConfig, *, dialogues: int) -> Workload | None:
    """Returns the workload of data.train, or None if it or the tokenizer is no file here, or too large to look at.

    Args:
      dialogues: how many, evenly spaced, to prepare at most.

    Raises:
      UserError: what `read_dialogues`, `load_tokenizer` and `prepare` raise.
    """
    file = pathlib.Path(config.data.train).expanduser()
    tokens_of = pathlib.Path(config.tokenizer or config.model).expanduser()
    readable = tokens_of.suffix == ".gguf" or (tokens_of / "tokenizer.json").exists()
    if not (file.is_file() and readable and file.stat().st_size <= _LARGEST):
        return None
    tokenizer = load_tokenizer(tokens_of, chat_template=config.data.chat_template)
    count = sum(1 for _ in read_dialogues(file))
    every = -(-count // dialogues)
    trees = dataset.prepare(
        (dialogue for number, dialogue in enumerate(read_dialogues(file)) if number % every == 0),
        Renderer(
            tokenizer,
            chat_template_kwargs=config.data.chat_template_kwargs,
            allow_special_tokens=config.data.allow_special_tokens,
        ),
        objective=config.objective,
        max_length=config.data.max_length,
        truncate=config.data.truncate,
        share_prefixes=config.data.share_prefixes,
    )
    plan = batches.Plan(
        trees,
        max_length=config.data.max_length,
        max_targets=config.data.max_targets or config.data.max_length,
        rows=config.rows,
        micro_batches=config.gradient_accumulation,
        seed=config.seed,
    )
    rows = config.rows * config.gradient_accumulation
    steps = -(-plan.rows_per_epoch // rows)
    tokens = pairs = targets = 0
    for step in range(steps):
        batch = plan.batch(step)
        used = batch.segment > 0
        tokens += int(used.sum())
        pairs += int(np.sum(batch.position[used].astype(np.int64) + 1))
        targets += int(np.sum(batch.weight > 0))
    prepared = -(-count // every)
    updates = math.ceil(config.epochs * plan.rows_per_epoch * count / prepared / rows)
    return Workload(
        tokens // steps,
        pairs // steps,
        targets // steps,
        config.steps or updates,
        f"measured on {prepared:,} of the {count:,} dialogues of {file.name}",
    )


def assume_workload(config: TrainConfig, *, tokens: float, targets: float) -> Workload:
    """Returns the workload if each row were one dialogue.

    Args:
      tokens: share of a row that is not padding.
      targets: share of these tokens that is trained on.
    """
    rows = config.rows * config.gradient_accumulation
    length = round(tokens * config.data.max_length)
    trained = min(round(targets * length), config.data.max_targets or length)
    return Workload(
        rows * length,
        rows * length * (length + 1) // 2,
        rows * trained,
        config.steps or None,
        f"ASSUMED: every row one dialogue, {tokens:.0%} of it used, {targets:.0%} of that trained on",
    )
