"""Random inputs for the GPU benchmarks: model shapes, packed rows of paths or trees, batches."""

import json
import math
import pathlib
from typing import Any

import numpy as np

from dialog_jax.batching.batches import Batch
from dialog_jax.model import hf_config
from dialog_jax.model.decoder_config import DecoderConfig
from dialog_jax.model.rotary import Rotary

_SHAPES = pathlib.Path(__file__).parents[2] / "dialog_jax" / "planning" / "shapes"

# Dialogue lengths in tokens: log-normal, clipped.
MEAN_LENGTH, LOG_DEVIATION, MIN_LENGTH, MAX_LENGTH = 400.0, 0.8, 16, 2048

# fmt: off
_OTHER_MODELS: dict[str, dict[str, Any]] = {
    "SmolLM2-135M": dict(
        family="llama", vocab_size=49152, width=576, layers=30, heads=9, kv_heads=3, head_dim=64, feed_forward=1536,
        max_length=8192, rotary=(Rotary(theta=100000.0),), tie_embeddings=True,
    ),
    "tiny": dict(
        family="llama", vocab_size=128, width=32, layers=2, heads=4, kv_heads=2, head_dim=8, feed_forward=48,
        max_length=512, rotary=(Rotary(theta=10000.0),), tie_embeddings=True,
    ),
}
# fmt: on


def model_config(name: str) -> DecoderConfig:
    """Returns the shape of a published model in dialog_jax/planning/shapes, of SmolLM2-135M, or of a tiny one."""
    if name in _OTHER_MODELS:
        return DecoderConfig(**_OTHER_MODELS[name])
    file = _SHAPES / f"{name}.json"
    return hf_config.from_json(file, json.loads(file.read_text(encoding="utf-8")))


def random_row(rng: np.random.Generator, length: int, kind: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns (position, subtree_end, segment) of a row without padding.

    Args:
      kind: "causal" for one path as long as the row; "paths" or "trees" for dialogues of random lengths.
    """
    position, subtree_end, segment = np.zeros((3, length), np.int32)
    start = number = 0
    while start < length:
        drawn = rng.lognormal(math.log(MEAN_LENGTH) - LOG_DEVIATION**2 / 2, LOG_DEVIATION)
        size = length if kind == "causal" else min(length - start, round(min(max(drawn, MIN_LENGTH), MAX_LENGTH)))
        part, number = slice(start, start + size), number + 1
        tree = branching_tree(size, turns=4) if kind == "trees" else (np.arange(size), np.full(size, size))
        position[part], subtree_end[part], segment[part] = tree[0], start + tree[1], number
        start += size
    return position, subtree_end, segment


def branching_tree(length: int, turns: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns (position, subtree_end) of a trunk with a leaf branch after each turn but the last.

    Templates that strip reasoning from history produce such trees. With 8 tokens and 2 turns, 0 1 (2 3 | 4 5 6 7):

        position     0 1 2 3 2 3 4 5
        subtree_end  8 8 4 4 8 8 8 8
    """
    part_length = max(1, length // (2 * turns))
    position, subtree_end = np.zeros(length, np.int64), np.full(length, length)
    depth = 0
    for start in range(0, length, 2 * part_length):
        branch, end = start + part_length, start + 2 * part_length
        position[start:end] = depth + np.arange(len(position[start:end]))
        if end < length:  # nothing follows the last turn, so it does not branch
            subtree_end[branch:end] = end
        depth += part_length
    return position, subtree_end


def random_batch(rng: np.random.Generator, config: DecoderConfig, rows: int, length: int) -> Batch:
    """Returns a step of one micro-batch of full rows of paths, with targets in every second run of 24 tokens."""
    forest = [random_row(rng, length, "paths") for _ in range(rows)]
    position, subtree_end, segment = (np.stack(parts)[None] for parts in zip(*forest, strict=True))  # [1, B, T]
    tokens = rng.integers(0, config.vocab_size, position.shape).astype(np.int32)
    is_target = (position // 24) % 2 == 1
    order = np.argsort(~is_target, axis=2, kind="stable")  # targets first, then padding
    valid = np.take_along_axis(is_target, order, axis=2)
    turn = np.take_along_axis(position // 48, order, axis=2)
    return Batch(
        tokens=tokens,
        position=position,
        subtree_end=subtree_end,
        segment=segment,
        source=np.where(valid, order - 1, 0).astype(np.int32),
        target=np.where(valid, np.take_along_axis(tokens, order, axis=2), 0).astype(np.int32),
        weight=valid.astype(np.float32),
        turn=np.where(valid, turn, -1).astype(np.int32),
    )
