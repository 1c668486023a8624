"""Measures the cases of gpu.py that it is given, in this process; prints each as JSON as soon as it is measured.

    python scripts/benchmarks/gpu_case.py --cases='[{"part": "device"}]'

A case's `part` names a function of this file, its other fields are the arguments. If the device or this version of JAX
does not support a case, its line is {"failed": reason}. A crash ends the process but keeps the lines before it.
"""

import functools
import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from typing import Any, Literal

import gpu_inputs
import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags

from dialog_jax.attention import blockwise, dispatch, pallas_gpu, probing
from dialog_jax.attention.mask import Mask
from dialog_jax.model import decoder
from dialog_jax.training import metrics, optimizer, sharding
from dialog_jax.training import train_step as train_step_lib
from dialog_jax.training.config import MeshConfig
from dialog_jax.training.optimizer_config import OptimizerConfig

_CASES = flags.DEFINE_string("cases", None, "JSON list of the cases to measure.", required=True)


def measure_device() -> dict[str, Any]:
    """Returns the device and the versions."""
    first = jax.devices()[0]
    return {
        "platform": first.platform,
        "kind": first.device_kind,
        "count": jax.device_count(),
        "versions": f"Python {platform.python_version()}, jax {jax.__version__}, numpy {np.__version__}",
    }


def measure_numerics(
    path: str, rows: str, dtype: str, heads: int, kv_heads: int, head_dim: int, length: int
) -> dict[str, float]:
    """Returns the errors of an attention path against float64 on one row, relative to the norm of the exact result."""
    return probing.probe(
        attention_path(path), jax.devices()[0], length, heads, kv_heads, head_dim, jnp.dtype(dtype), rows == "trees"
    )


def measure_attention(
    path: str, rows: str, dtype: str, heads: int, kv_heads: int, head_dim: int, length: int, tokens: int
) -> dict[str, float]:
    """Returns times of an attention path on `tokens` tokens in rows of `length`, and its share of causal pairs."""
    rng = np.random.default_rng(length)
    count = tokens // length
    forest = [gpu_inputs.random_row(rng, length, rows) for _ in range(count)]
    pairs = sum(float(np.sum(position + 1.0)) for position, _, _ in forest)
    mask = Mask(jnp.asarray(np.stack([ends for _, ends, _ in forest])))
    sizes = (heads, kv_heads, kv_heads, heads)
    keys = jax.random.split(jax.random.key(0), 4)
    q, k, v, d_out = (
        jax.random.normal(key, (count, length, size, head_dim), dtype) for key, size in zip(keys, sizes, strict=True)
    )
    attend = attention_path(path)

    def gradients(q, k, v, mask, d_out):
        return jax.vjp(lambda q, k, v: attend(q, k, v, mask), q, k, v)[1](d_out)

    forward = median_seconds(jax.jit(attend), q, k, v, mask)
    both = median_seconds(jax.jit(gradients), q, k, v, mask, d_out)
    flops = 4.0 * heads * head_dim * pairs  # two products of 2 FLOPs per multiply-add; the backward pass has twice that
    return {
        "forward_ms": 1e3 * forward,
        "both_ms": 1e3 * both,
        "forward_tflops": flops / forward / 1e12,
        "both_tflops": 3.0 * flops / both / 1e12,
        "share": pairs / (count * length * (length + 1) / 2),
    }


def measure_training(
    model: str, length: int, rows: int, remat: str, parameter_dtype: str, compute_dtype: str, steps: int
) -> dict[str, Any]:
    """Returns medians over `steps` updates of random weights on rows of paths."""
    config = gpu_inputs.model_config(model)
    mesh = sharding.make_mesh(MeshConfig(), jax.devices()[:1])
    transform = optimizer.make_optimizer(OptimizerConfig(), steps + 2)

    def draw(key):
        return jax.tree.map(lambda leaf: leaf.astype(parameter_dtype), decoder.init_parameters(config, key))

    parameters = jax.jit(draw, out_shardings=sharding.replicated_sharding(mesh))(jax.random.key(0))
    state = train_step_lib.initialize_state(mesh, parameters, transform)
    del parameters
    choice = dispatch.select_kernel(
        mesh,
        heads=config.heads,
        sizes=config.attention_sizes,
        length=length,
        dtype=compute_dtype,
        branching=False,
        additions=config.attention_additions,
    )
    train_step = train_step_lib.make_train_step(
        config,
        transform,
        mesh,
        compute_dtype=jnp.dtype(compute_dtype),
        remat=remat,
        attend=choice.attend,
    )
    rng = np.random.default_rng(0)
    batches = [gpu_inputs.random_batch(rng, config, rows, length) for _ in range(steps + 2)]
    start = time.perf_counter()
    compiled = train_step.lower(state, batches[0]).compile()
    compile_seconds = time.perf_counter() - start
    seconds, flop_rates, token_rates = [], [], []
    for step, batch in enumerate(batches):
        placed = jax.device_put(batch, sharding.batch_sharding(mesh))
        jax.block_until_ready(placed)
        start = time.perf_counter()
        state, step_metrics = compiled(state, placed)
        values = jax.device_get(step_metrics)
        if step >= 2:
            seconds.append(time.perf_counter() - start)
            flops = metrics.count_flops(
                config,
                tokens=int(values.tokens),
                attention_pairs=int(values.attention_pairs),
                targets=int(values.targets),
            )
            flop_rates.append(flops / seconds[-1])
            token_rates.append(float(values.tokens) / seconds[-1])
    peak, stats = metrics.find_peak_flops(jax.devices()[0]), jax.devices()[0].memory_stats() or {}
    return {
        "attention": choice.name,
        "tokens_per_second": statistics.median(token_rates),
        "tflops": statistics.median(flop_rates) / 1e12,
        "mfu": None if peak is None else statistics.median(flop_rates) / peak,
        "seconds_a_step": statistics.median(seconds),
        "peak_memory_gb": stats["peak_bytes_in_use"] / 1e9 if "peak_bytes_in_use" in stats else None,
        "compile_seconds": compile_seconds,
        "last_loss": float(values.loss),
    }


def median_seconds(function: Callable, *arguments) -> float:
    """Returns seconds per call: the median of five groups of calls, each about 50 ms long."""
    for _ in range(2):
        jax.block_until_ready(function(*arguments))
    start = time.perf_counter()
    jax.block_until_ready(function(*arguments))
    calls = max(1, min(100, round(0.05 / (time.perf_counter() - start))))
    seconds = []
    for _ in range(5):
        start = time.perf_counter()
        for _ in range(calls):
            result = function(*arguments)
        jax.block_until_ready(result)
        seconds.append((time.perf_counter() - start) / calls)
    return statistics.median(seconds)


def attention_path(name: str) -> dispatch.Attend:
    """Returns an attention function. The two cuDNN paths are baselines; the first applies a causal mask only."""
    if name == "pallas_gpu" and jax.default_backend() == "cpu":
        blocks = pallas_gpu.Blocks(32, 32, 4, 1)
        tiling = pallas_gpu.Tiling(blocks, blocks, blocks)
        return functools.partial(pallas_gpu.attend, blocks=tiling, interpret=True)
    paths: dict[str, dispatch.Attend] = {
        "pallas_gpu": pallas_gpu.attend,
        "blockwise": blockwise.attend,
        "cudnn_causal": cudnn_causal,
        "cudnn_packed": cudnn_packed,
    }
    return paths[name]


def cudnn_causal(q, k, v, mask):
    """Causal attention through JAX's public cuDNN interface."""
    del mask
    implementation: Literal["xla", "cudnn"] = "xla" if jax.default_backend() == "cpu" else "cudnn"
    return jax.nn.dot_product_attention(q, k, v, is_causal=True, implementation=implementation)


def cudnn_packed(q, k, v, mask):
    """cuDNN's packed layout for full rows of paths. It is private in JAX, so training does not use it."""
    from jax._src.cudnn import fused_attention_stablehlo as cudnn

    max_segments = q.shape[1] // gpu_inputs.MIN_LENGTH + 1

    def segments(ends):
        first = jnp.concatenate([jnp.ones(1, bool), ends[1:] != ends[:-1]])
        starts = jnp.nonzero(first, size=max_segments, fill_value=-1)[0].astype(jnp.int32)
        return jnp.where(starts >= 0, ends[starts] - starts, -1), jnp.append(starts, -1)

    lengths, starts = jax.vmap(segments)(mask.subtree_end)
    kind = cudnn.MaskType.PADDING_CAUSAL
    scale = q.shape[-1] ** -0.5
    return cudnn.dot_product_attention(
        q, k, v, None, None, lengths, lengths, starts, starts, scale=scale, mask_type=kind
    )


PARTS: dict[str, Callable[..., dict[str, Any]]] = {
    "device": measure_device,
    "numerics": measure_numerics,
    "attention": measure_attention,
    "train": measure_training,
}


def measure(case: dict[str, Any]) -> dict[str, Any]:
    """Returns the figures of a case, or {"failed": reason}."""
    arguments = {name: value for name, value in case.items() if name != "part"}
    try:
        return PARTS[case["part"]](**arguments)
    # Compilers and runtimes raise these for what a device cannot run or hold.
    except (RuntimeError, NotImplementedError, ValueError, ImportError) as error:
        return {"failed": f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0][:160]}"}


def main(argv):
    del argv
    os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.92")  # read when the first device is requested
    for case in json.loads(_CASES.value):
        print("LINE " + json.dumps(measure(case)), flush=True)


if __name__ == "__main__":
    app.run(main)
