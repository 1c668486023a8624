"""Measures some lines of scripts/benchmarks/gpu.py in this process; prints each, as JSON, as soon as it is known.

    python scripts/benchmarks/gpu_case.py --records='[{"part": "device"}]'

A record is what gpu.py lists: `part` is a function here, the other fields its arguments. What the device or
this version of JAX cannot do is a line {"failed": reason}; a crash ends the process, and leaves the lines before it.
"""

import functools
import json
import math
import os
import pathlib
import platform
import statistics
import time
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags

from dialog_jax.attention import blockwise, dispatch, pallas_gpu
from dialog_jax.batching.batches import Batch
from dialog_jax.model import decoder, hf_config
from dialog_jax.training import metrics, optimizer, sharding
from dialog_jax.training import train_step as train_step_lib
from dialog_jax.training.config import MeshConfig, OptimizerConfig

_RECORDS = flags.DEFINE_string("records", None, "What to measure: a list of records in JSON.", required=True)
_SHAPES = pathlib.Path(__file__).parents[2] / "experiments" / "shapes"

# As of ChitChat's dialogues in tokens: mean 400, few above 2,000.
_MEAN, _DEVIATION, _SHORTEST, _LONGEST = 400.0, 0.8, 16, 2048

# fmt: off
_OTHER_MODELS: dict[str, dict[str, Any]] = {
    "SmolLM2-135M": dict(
        family="llama", vocab_size=49152, width=576, layers=30, heads=9, kv_heads=3, head_dim=64, feed_forward=1536,
        max_length=8192, rope_theta=100000.0, tie_embeddings=True,
    ),
    "tiny": dict(
        family="llama", vocab_size=128, width=32, layers=2, heads=4, kv_heads=2, head_dim=8, feed_forward=48,
        max_length=512, rope_theta=10000.0, tie_embeddings=True,
    ),
}
# fmt: on


def device() -> dict[str, Any]:
    """Which device and versions these are."""
    first = jax.devices()[0]
    return {
        "platform": first.platform,
        "kind": first.device_kind,
        "count": jax.device_count(),
        "versions": f"Python {platform.python_version()}, jax {jax.__version__}, numpy {np.__version__}",
    }


def numerics(
    path: str, rows: str, dtype: str, heads: int, kv_heads: int, head_dim: int, length: int
) -> dict[str, float]:
    """How far a path is off from float64 in a row of trees or paths, relative to the norm of what is right."""
    return dispatch.probe(
        path_named(path), jax.devices()[0], length, heads, kv_heads, head_dim, jnp.dtype(dtype), rows == "trees"
    )


def attention(
    path: str, rows: str, dtype: str, heads: int, kv_heads: int, head_dim: int, length: int, tokens: int
) -> dict[str, float]:
    """Milliseconds of a path over `tokens` tokens in rows of `length`, and their share of a causal mask's pairs."""
    rng = np.random.default_rng(length)
    count = tokens // length
    forest = [forest_row(rng, length, rows) for _ in range(count)]
    pairs = sum(float(np.sum(position + 1.0)) for position, _, _ in forest)
    subtree_end = jnp.asarray(np.stack([ends for _, ends, _ in forest]))
    sizes = (heads, kv_heads, kv_heads, heads)
    keys = jax.random.split(jax.random.key(0), 4)
    q, k, v, d_read = (
        jax.random.normal(key, (count, length, size, head_dim), dtype) for key, size in zip(keys, sizes, strict=True)
    )
    attend = path_named(path)

    def gradients(q, k, v, subtree_end, d_read):
        return jax.vjp(lambda q, k, v: attend(q, k, v, subtree_end), q, k, v)[1](d_read)

    forward = seconds(jax.jit(attend), q, k, v, subtree_end)
    both = seconds(jax.jit(gradients), q, k, v, subtree_end, d_read)
    useful = 4.0 * heads * head_dim * pairs  # two products, a multiply-add is two; twice that in the backward pass
    return {
        "forward_ms": 1e3 * forward,
        "both_ms": 1e3 * both,
        "forward_tflops": useful / forward / 1e12,
        "both_tflops": 3.0 * useful / both / 1e12,
        "share": pairs / (count * length * (length + 1) / 2),
    }


def train(
    model: str, length: int, rows: int, remat: str, parameter_dtype: str, compute_dtype: str, steps: int
) -> dict[str, Any]:
    """Figures of updates as scripts/train.py makes them, from random weights on rows of paths: medians of `steps`."""
    config = model_named(model)
    mesh = sharding.make_mesh(MeshConfig(), jax.devices()[:1])
    transform = optimizer.make_optimizer(OptimizerConfig(), steps + 2)

    def draw(key):
        return jax.tree.map(lambda leaf: leaf.astype(parameter_dtype), decoder.init_parameters(config, key))

    parameters = jax.jit(draw, out_shardings=sharding.replicated(mesh))(jax.random.key(0))
    state, shardings = train_step_lib.initial_state(mesh, parameters, transform)
    del parameters
    choice = dispatch.select_kernel(
        mesh,
        heads=config.heads,
        kv_heads=config.kv_heads,
        head_dim=config.head_dim,
        length=length,
        dtype=compute_dtype,
        branching=False,
    )
    train_step = train_step_lib.make_train_step(
        config,
        transform,
        mesh,
        shardings,
        compute_dtype=jnp.dtype(compute_dtype),
        remat=remat,
        attend=choice.attend,
    )
    rng = np.random.default_rng(0)
    batches = [drawn_batch(rng, config, rows, length) for _ in range(steps + 2)]
    started = time.perf_counter()
    compiled = train_step.lower(state, batches[0]).compile()
    compile_seconds = time.perf_counter() - started
    times, useful, tokens = [], [], []
    for number, batch in enumerate(batches):
        placed = jax.device_put(batch, sharding.batch_sharding(mesh))
        jax.block_until_ready(placed)
        started = time.perf_counter()
        state, measured = compiled(state, placed)
        values = jax.device_get(measured)
        if number >= 2:
            times.append(time.perf_counter() - started)
            useful.append(metrics.useful_flops(config, batch) / times[-1])
            tokens.append(float(values.tokens) / times[-1])
    peak, stats = metrics.peak_flops(jax.devices()[0]), jax.devices()[0].memory_stats() or {}
    return {
        "attention": choice.name,
        "tokens_per_second": statistics.median(tokens),
        "tflops": statistics.median(useful) / 1e12,
        "mfu": None if peak is None else statistics.median(useful) / peak,
        "seconds_a_step": statistics.median(times),
        "peak_memory_gb": stats["peak_bytes_in_use"] / 1e9 if "peak_bytes_in_use" in stats else None,
        "compile_seconds": compile_seconds,
        "last_loss": float(values.loss),
    }


def seconds(function: Callable, *arguments) -> float:
    """Of a call, the median of five groups of calls that keep the device busy for some 50 ms each."""
    for _ in range(2):
        jax.block_until_ready(function(*arguments))
    started = time.perf_counter()
    jax.block_until_ready(function(*arguments))
    calls = max(1, min(100, round(0.05 / (time.perf_counter() - started))))
    times = []
    for _ in range(5):
        started = time.perf_counter()
        for _ in range(calls):
            last = function(*arguments)
        jax.block_until_ready(last)
        times.append((time.perf_counter() - started) / calls)
    return statistics.median(times)


def path_named(name: str) -> dispatch.Attend:
    """A way to attend. Those of cuDNN are for comparison: the first sees no mask but the causal one."""
    if name == "pallas_gpu" and jax.default_backend() == "cpu":
        blocks = pallas_gpu.Blocks(32, 32, 4, 1)
        tiling = pallas_gpu.Tiling(blocks, blocks, blocks)
        return functools.partial(pallas_gpu.attend, blocks=tiling, interpret=True)
    ways: dict[str, dispatch.Attend] = {
        "pallas_gpu": pallas_gpu.attend,
        "blockwise": blockwise.attend,
        "cudnn_causal": cudnn_causal,
        "cudnn_packed": cudnn_packed,
    }
    return ways[name]


def cudnn_causal(q, k, v, subtree_end):
    """The public way into cuDNN."""
    del subtree_end
    way: Literal["xla", "cudnn"] = "xla" if jax.default_backend() == "cpu" else "cudnn"
    return jax.nn.dot_product_attention(q, k, v, is_causal=True, implementation=way)


def cudnn_packed(q, k, v, subtree_end):
    """cuDNN's packed layout, for full rows of paths. JAX has it under a private name only: not for training."""
    from jax._src.cudnn import fused_attention_stablehlo as cudnn

    most = q.shape[1] // _SHORTEST + 1  # segments of a row

    def segments(ends):
        first = jnp.concatenate([jnp.ones(1, bool), ends[1:] != ends[:-1]])
        starts = jnp.nonzero(first, size=most, fill_value=-1)[0].astype(jnp.int32)
        return jnp.where(starts >= 0, ends[starts] - starts, -1), jnp.append(starts, -1)

    lengths, starts = jax.vmap(segments)(subtree_end)
    mask = cudnn.MaskType.PADDING_CAUSAL
    scale = q.shape[-1] ** -0.5
    return cudnn.dot_product_attention(
        q, k, v, None, None, lengths, lengths, starts, starts, scale=scale, mask_type=mask
    )


def model_named(name: str) -> decoder.DecoderConfig:
    """The shape of a model."""
    if name in _OTHER_MODELS:
        return decoder.DecoderConfig(**_OTHER_MODELS[name])
    file = _SHAPES / f"{name}.json"
    return hf_config.from_json(file, json.loads(file.read_text(encoding="utf-8")))


def forest_row(rng: np.random.Generator, length: int, kind: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(position, subtree_end, segment) of a full row: one path ("causal"), or dialogues as "paths" or "trees"."""
    position, subtree_end, segment = np.zeros((3, length), np.int32)
    filled = number = 0
    while filled < length:
        drawn = rng.lognormal(math.log(_MEAN) - _DEVIATION**2 / 2, _DEVIATION)
        size = length if kind == "causal" else min(length - filled, round(min(max(drawn, _SHORTEST), _LONGEST)))
        part, number = slice(filled, filled + size), number + 1
        place, end = tree(size, turns=4) if kind == "trees" else (np.arange(size), np.full(size, size))
        position[part], subtree_end[part], segment[part] = place, filled + end, number
        filled += size
    return position, subtree_end, segment


def tree(length: int, turns: int) -> tuple[np.ndarray, np.ndarray]:
    """(position, subtree_end) of a trunk with a leaf branch after each turn, as templates that strip reasoning make it.

    Of 8 tokens and 2 turns, 0 1 (2 3 | 4 5 6 7): position 0 1 2 3 2 3 4 5, subtree_end 8 8 4 4 8 8 8 8.
    """
    piece = max(1, length // (2 * turns))
    position, subtree_end = np.zeros(length, np.int64), np.full(length, length)
    depth = 0
    for start in range(0, length, 2 * piece):
        branch, after = start + piece, start + 2 * piece
        position[start:after] = depth + np.arange(len(position[start:after]))
        if after < length:  # what the last turn has is no branch: nothing comes after it
            subtree_end[branch:after] = after
        depth += piece
    return position, subtree_end


def drawn_batch(rng: np.random.Generator, config: decoder.DecoderConfig, rows: int, length: int) -> Batch:
    """A step of one micro-batch of full rows of paths, of which every second stretch of 24 tokens is trained on."""
    forest = [forest_row(rng, length, "paths") for _ in range(rows)]
    position, subtree_end, segment = (np.stack(parts)[None] for parts in zip(*forest, strict=True))  # [1, B, T]
    tokens = rng.integers(0, config.vocab_size, position.shape).astype(np.int32)
    trained = (position // 24) % 2 == 1
    order = np.argsort(~trained, axis=2, kind="stable")  # targets before their padding
    valid = np.take_along_axis(trained, order, axis=2)
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


PARTS: dict[str, Callable[..., dict[str, Any]]] = {
    "device": device,
    "numerics": numerics,
    "attention": attention,
    "train": train,
}


def measured(record: dict[str, Any]) -> dict[str, Any]:
    """The figures of a record, or {"failed": reason}."""
    arguments = {name: value for name, value in record.items() if name != "part"}
    try:
        return PARTS[record["part"]](**arguments)
    # What compilers and runtimes raise for what a device cannot do or hold; mistakes of this file are not among them.
    except (RuntimeError, NotImplementedError, ValueError, ImportError) as error:
        return {"failed": f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0][:160]}"}


def main(argv):
    del argv
    os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.92")  # read when the first device is asked for
    for record in json.loads(_RECORDS.value):
        print("LINE " + json.dumps(measured(record)), flush=True)


if __name__ == "__main__":
    app.run(main)
