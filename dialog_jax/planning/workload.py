"""Tokens, targets and attention pairs of a step before the run: measured on a part of its data, or assumed."""

import math
import pathlib
from typing import NamedTuple

import numpy as np

from dialog_jax.batching import batches
from dialog_jax.formats import tokenizer_files
from dialog_jax.model.decoder_config import DecoderConfig
from dialog_jax.rendering.sequences import Renderer
from dialog_jax.rendering.tokenizers import largest_token, load_tokenizer
from dialog_jax.rendering.virtual_tokens import VirtualTokens
from dialog_jax.training import data_sources
from dialog_jax.training.config import TrainConfig
from dialog_jax.trees import dataset

_LARGEST_FILE = 1 << 30  # bytes; a larger file is not read to count its dialogues


class Workload(NamedTuple):
    """Means per step."""

    tokens: int
    """Tokens that are not padding."""
    attention_pairs: int
    """Pairs of a token and a token that it sees; the mean over the layers."""
    targets: int
    steps: int | None
    """Steps of the whole run; None if unknown."""
    source: str
    """Sentence that says where these figures come from."""


def measure_workload(
    config: TrainConfig, model: DecoderConfig, *, dialogues: int, virtual_tokens: int
) -> Workload | None:
    """Returns the workload of data.train; None if it or the tokenizer is not a local file, or the data is too large.

    Args:
      dialogues: prepare at most this many, evenly spaced.
      virtual_tokens: length of the soft prompt, which the config or its adapter has; 0 without.

    Raises:
      UserError: what `read_dialogues`, `load_tokenizer` and `prepare` raise.
    """
    file = pathlib.Path(config.data.train).expanduser()
    source = data_sources.training_sources(config).get("data.train")
    place = config.tokenizer or tokenizer_files.find_tokenizer(config.model, config.adapter)
    tokenizer_path = pathlib.Path(place).expanduser()
    readable = tokenizer_path.suffix.lower() == ".gguf" or (tokenizer_path / "tokenizer.json").exists()
    if source is None or not (file.is_file() and readable and file.stat().st_size <= _LARGEST_FILE):
        return None
    tokenizer = load_tokenizer(tokenizer_path, chat_template=config.data.chat_template, model=config.model)
    count = sum(1 for _ in source.iterate())
    stride = -(-count // dialogues)
    trees = dataset.prepare(
        (record for number, record in enumerate(source.iterate()) if number % stride == 0),
        Renderer(
            tokenizer,
            chat_template_kwargs=config.data.chat_template_kwargs,
            template_time=config.data.template_time,
            allow_special_tokens=config.data.allow_special_tokens,
            responses=config.data.responses,
            virtual_tokens=VirtualTokens(largest_token(tokenizer) + 1, virtual_tokens),
        ),
        config.make_tree_config(),
    )
    plan = batches.Plan(
        trees,
        max_length=config.data.max_length,
        rows=config.rows,
        micro_batches=config.gradient_accumulation,
        seed=config.seed,
    )
    rows = config.rows * config.gradient_accumulation
    steps = -(-plan.rows_per_epoch // rows)
    tokens = attention_pairs = targets = 0
    for step in range(steps):
        batch = plan.batch(step)
        used = batch.segment > 0
        tokens += int(used.sum())
        attention_pairs += _count_pairs(model, batch.position[used])
        targets += int(np.sum(batch.weight > 0))
    prepared = -(-count // stride)
    run_steps = math.ceil(config.epochs * plan.rows_per_epoch * count / prepared / rows)
    return Workload(
        tokens // steps,
        attention_pairs // steps,
        targets // steps,
        config.steps or run_steps,
        f"measured on {prepared:,} of the {count:,} dialogues of {file.name}",
    )


def assume_workload(config: TrainConfig, model: DecoderConfig, *, tokens: float, targets: float) -> Workload:
    """Returns the workload of rows with one dialogue each.

    Args:
      tokens: share of a row that is not padding.
      targets: share of these tokens that are targets.
    """
    rows = config.rows * config.gradient_accumulation
    length = round(tokens * config.data.max_length)
    row_targets = round(targets * length)
    return Workload(
        rows * length,
        rows * _count_pairs(model, np.arange(length)),
        rows * row_targets,
        config.steps or None,
        f"ASSUMED: one dialogue per row, {tokens:.0%} of the row used, {targets:.0%} of that trained on",
    )


def _count_pairs(model: DecoderConfig, position: np.ndarray) -> int:
    visible = position.astype(np.int64) + 1
    return round(sum(share * int(np.minimum(visible, window).sum()) for window, share in model.window_shares.items()))
