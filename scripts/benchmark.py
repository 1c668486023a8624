"""Measures full fine-tuning: real tokens a second, response tokens a second, peak memory, compile time.

    python scripts/benchmark.py --max_length=1024 --remat=dots
    python scripts/benchmark.py --suite=gpu         # numerics, attention and steps on a GPU: scripts/benchmark_gpu.py

Real means: tokens of dialogues, padding not counted. The step is the one that scripts/train.py runs, on the first
`--dialogues` dialogues of the file; times are medians over the steps after the first.
"""

import json
import pathlib
import platform
import resource
import statistics
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
from absl import app, flags, logging

from dialog_jax.data import batches, dataset
from dialog_jax.data.dialogues import read_dialogues
from dialog_jax.data.objectives import ObjectiveConfig
from dialog_jax.data.rendering import Renderer
from dialog_jax.data.tokenizers import load_tokenizer
from dialog_jax.model import pretrained
from dialog_jax.training import metrics, optimizer, sharding, step
from dialog_jax.training.optimizer import OptimizerConfig
from dialog_jax.training.sharding import MeshConfig

_SUITE = flags.DEFINE_enum("suite", "step", ["step", "gpu"], "One model's step, or all that only a GPU can tell.")
_MODEL = flags.DEFINE_string("model", "assets/smollm2-135m-instruct", "Model directory.")
_DATA = flags.DEFINE_string("data", "assets/chitchat/train.jsonl", "Dialogues.")
_DIALOGUES = flags.DEFINE_integer("dialogues", 256, "How many of them, from the first on.", lower_bound=1)
_MAX_LENGTH = flags.DEFINE_integer("max_length", 1024, "Tokens of a row.", lower_bound=2)
_ROWS = flags.DEFINE_integer("rows", 1, "Rows of a micro-batch.", lower_bound=1)
_ACCUMULATION = flags.DEFINE_integer("gradient_accumulation", 8, "Micro-batches of a step.", lower_bound=1)
_STEPS = flags.DEFINE_integer("steps", 8, "Measured steps, after one that is not.", lower_bound=1)
_REMAT = flags.DEFINE_string("remat", "dots", "none, attention, dots or full.")
_OUT = flags.DEFINE_string("out", "", "A JSON file for the figures.")


def main(argv):
    del argv
    logging.set_verbosity(logging.WARNING)
    if _SUITE.value == "gpu":
        sys.exit(subprocess.run([sys.executable, pathlib.Path(__file__).with_name("benchmark_gpu.py")]).returncode)
    mesh = sharding.make_mesh(MeshConfig(), jax.devices()[:1])
    dtype = jnp.float32 if jax.default_backend() == "cpu" else jnp.bfloat16
    model = pretrained.load_config(_MODEL.value)
    renderer = Renderer(load_tokenizer(_MODEL.value))
    dialogues = [dialogue for _, dialogue in zip(range(_DIALOGUES.value), read_dialogues(_DATA.value), strict=False)]
    started = time.perf_counter()
    trees = dataset.prepare(dialogues, renderer, objective=ObjectiveConfig(), max_length=_MAX_LENGTH.value)
    prepared = time.perf_counter() - started
    plan = batches.Plan(
        trees,
        max_length=_MAX_LENGTH.value,
        max_targets=_MAX_LENGTH.value,
        rows=_ROWS.value,
        micro_batches=_ACCUMULATION.value,
        seed=0,
    )
    transform = optimizer.make_optimizer(OptimizerConfig(), _STEPS.value + 1)
    parameters = pretrained.load_parameters(
        _MODEL.value, model, sharding=lambda path, shape: sharding.parameter_sharding(mesh, path, shape)
    )
    state, shardings = step.initial_state(mesh, parameters, transform)
    del parameters
    train_step = step.make_train_step(model, transform, mesh, shardings, compute_dtype=dtype, remat=_REMAT.value)
    started = time.perf_counter()
    compiled = train_step.lower(state, plan.batch(0)).compile()
    figures = {
        "machine": f"{jax.devices()[0].device_kind}, {platform.machine()}",
        "jax": jax.__version__,
        "max_length": _MAX_LENGTH.value,
        "rows": _ROWS.value,
        "gradient_accumulation": _ACCUMULATION.value,
        "remat": _REMAT.value,
        "dtype": jnp.dtype(dtype).name,
        "prepare_seconds": round(prepared, 2),
        "compile_seconds": round(time.perf_counter() - started, 2),
    }
    memory = compiled.memory_analysis()
    if memory is not None:
        figures["temporaries_gb"] = round(memory.temp_size_in_bytes / 1e9, 2)
    seconds, rates, response_rates, useful = [], [], [], []
    for number, batch in enumerate(plan.batches(0, _STEPS.value + 1)):
        placed = jax.device_put(batch, sharding.batch_sharding(mesh))
        started = time.perf_counter()
        state, measured = compiled(state, placed)
        values = jax.device_get(measured)
        elapsed = time.perf_counter() - started
        print(f"step {number}: loss {values.loss:.4f}, {elapsed:.2f} s, {values.tokens / elapsed:.1f} real tokens/s")
        if number == 0:
            figures["first_loss"] = round(float(values.loss), 5)
            continue
        seconds.append(elapsed)
        rates.append(float(values.tokens) / elapsed)
        response_rates.append(float(values.response_tokens) / elapsed)
        useful.append(metrics.useful_flops(model, batch) / elapsed)
    figures |= {
        "seconds_a_step": round(statistics.median(seconds), 3),
        "seconds_spread": [round(min(seconds), 3), round(max(seconds), 3)],
        "real_tokens_per_second": round(statistics.median(rates), 1),
        "response_tokens_per_second": round(statistics.median(response_rates), 1),
        "useful_gflops_per_second": round(statistics.median(useful) / 1e9, 1),
        "peak_memory_gb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6, 2),
    }
    peak = metrics.peak_flops(jax.devices()[0])
    if peak is not None:
        figures["mfu"] = round(statistics.median(useful) / peak, 4)
        stats = jax.devices()[0].memory_stats() or {}
        figures["peak_device_memory_gb"] = round(stats.get("peak_bytes_in_use", 0) / 1e9, 2)
    for name, value in figures.items():
        print(f"{name:28} {value}")
    if _OUT.value:
        with open(_OUT.value, "w", encoding="utf-8") as file:
            json.dump(figures, file, indent=1)


if __name__ == "__main__":
    app.run(main)
