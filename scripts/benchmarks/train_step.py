"""Measures full fine-tuning: real tokens a second, response tokens a second, peak memory, compile time.

    python scripts/benchmarks/train_step.py --max_length=1024 --remat=dots
    python scripts/benchmarks/train_step.py --suite=gpu     # numerics, attention and steps on a GPU: see gpu.py

Real means: tokens of dialogues, padding not counted. The step is the one that scripts/train.py runs, on the first
`--dialogues` dialogues of the file. A step lasts from the end of the one before to its own, with what making and
placing its batch adds; times are medians over the steps after the first. With --profile=FILE.md also where the time
goes, on a CPU: scripts/benchmarks/step_profile.py.
"""

import json
import pathlib
import platform
import resource
import statistics
import subprocess
import sys
import time
from typing import Any

import jax
import jax.numpy as jnp
import step_profile
from absl import app, flags, logging

from dialog_jax.attention import dispatch
from dialog_jax.batching import batches
from dialog_jax.dialogues.parsing import read_dialogues
from dialog_jax.errors import UserError
from dialog_jax.model import decoder, pretrained
from dialog_jax.planning import hlo
from dialog_jax.rendering.sequences import Renderer
from dialog_jax.rendering.tokenizers import load_tokenizer
from dialog_jax.training import metrics, optimizer, sharding
from dialog_jax.training import train_step as train_step_lib
from dialog_jax.training.config import MeshConfig, OptimizerConfig
from dialog_jax.trees import dataset
from dialog_jax.trees.objectives import ObjectiveConfig

_SUITE = flags.DEFINE_enum("suite", "step", ["step", "gpu"], "One model's step, or all that only a GPU can tell.")
_MODEL = flags.DEFINE_string("model", "assets/smollm2-135m-instruct", "Model directory.")
_DATA = flags.DEFINE_string("data", "assets/chitchat/train.jsonl", "Dialogues.")
_DIALOGUES = flags.DEFINE_integer("dialogues", 256, "How many of them, from the first on.", lower_bound=1)
_MAX_LENGTH = flags.DEFINE_integer("max_length", 1024, "Tokens of a row.", lower_bound=2)
_ROWS = flags.DEFINE_integer("rows", 2, "Rows of a micro-batch.", lower_bound=1)
_ACCUMULATION = flags.DEFINE_integer("gradient_accumulation", 4, "Micro-batches of a step.", lower_bound=1)
_STEPS = flags.DEFINE_integer("steps", 8, "Measured steps, after one that is not.", lower_bound=1)
_REMAT = flags.DEFINE_enum("remat", "dots", list(decoder.REMAT), "What the backward pass computes again.")
_OUT = flags.DEFINE_string("out", "", "A JSON file for the figures, and those of each step.")
_PROFILE = flags.DEFINE_string("profile", "", "A Markdown file for where the time of one more step goes.")

_FLAGS = _SUITE, _MODEL, _DATA, _DIALOGUES, _MAX_LENGTH, _ROWS, _ACCUMULATION, _STEPS, _REMAT, _OUT, _PROFILE


def main(arguments: list[str]) -> None:
    if len(arguments) > 1:
        raise app.UsageError(f"got {' '.join(arguments[1:])!r}; this script takes flags only, see --help")
    logging.set_verbosity(logging.WARNING)
    shown = [flag for flag in _FLAGS if flag.present]
    if _SUITE.value == "gpu":
        if len(shown) > 1:
            raise app.UsageError(f"--suite=gpu takes no other flags, got {', '.join('--' + f.name for f in shown)}")
        sys.exit(subprocess.run([sys.executable, pathlib.Path(__file__).with_name("gpu.py")]).returncode)
    try:
        for path in filter(None, (_OUT.value, _PROFILE.value)):
            pathlib.Path(path).touch()
        if _PROFILE.value and jax.default_backend() != "cpu":
            raise UserError(
                f"--profile is for CPUs, this is a {jax.default_backend()}; jax.profiler.trace serves there."
            )
        _measure(
            " ".join(["python", "scripts/benchmarks/train_step.py", *(f"--{flag.name}={flag.value}" for flag in shown)])
        )
    except (ValueError, OSError) as error:
        sys.exit(f"train_step.py: {error}")


def _measure(command: str) -> None:
    """Prints the figures, and writes what is asked for."""
    model = pretrained.load_config(_MODEL.value)
    trees, plan, figures = _prepared()
    mesh = sharding.make_mesh(MeshConfig(), jax.devices()[:1])
    compiled, state = _compiled(model, mesh, plan.batch(0), trees.branching, figures)
    seconds, counts, useful = [], [], []
    ended = time.perf_counter()
    for number, batch in enumerate(plan.batches(0, _STEPS.value + 1)):
        placed = jax.device_put(batch, sharding.batch_sharding(mesh))
        state, measured = compiled(state, placed)
        values = jax.device_get(measured)
        began, ended = ended, time.perf_counter()
        elapsed = ended - began
        print(f"step {number}: loss {values.loss:.4f}, {elapsed:.2f} s, {values.tokens / elapsed:.1f} real tokens/s")
        if number == 0:
            figures["first_loss"] = round(float(values.loss), 5)
            continue
        seconds.append(elapsed)
        counts.append((int(values.tokens), int(values.response_tokens)))
        useful.append(metrics.useful_flops(model, batch) / elapsed)
    figures |= _speeds(seconds, counts, useful)
    for name, value in figures.items():
        print(f"{name:28} {value}")
    if _OUT.value:
        real, response = zip(*counts, strict=True)
        steps = {"seconds": seconds, "real_tokens": real, "response_tokens": response}
        pathlib.Path(_OUT.value).write_text(json.dumps(figures | steps, indent=1), encoding="utf-8")
    if _PROFILE.value:
        placed = jax.device_put(plan.batch(_STEPS.value + 1), sharding.batch_sharding(mesh))
        events = step_profile.record(lambda: compiled(state, placed))
        told = step_profile.text(
            program=hlo.parse(compiled.as_text()),
            events=events,
            seconds=statistics.median(seconds),
            speed=step_profile.product_speed(model, _ROWS.value * _MAX_LENGTH.value),
            tokens=statistics.median(real for real, _ in counts),
            figures={"command": f"`{command}`", **figures},
        )
        pathlib.Path(_PROFILE.value).write_text(told, encoding="utf-8")


def _prepared() -> tuple[dataset.Trees, batches.Plan, dict[str, Any]]:
    """(trees, the rows of all steps, figures so far)."""
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
    figures = {
        "machine": f"{jax.devices()[0].device_kind}, {platform.machine()}",
        "jax": jax.__version__,
        "max_length": _MAX_LENGTH.value,
        "rows": _ROWS.value,
        "gradient_accumulation": _ACCUMULATION.value,
        "remat": _REMAT.value,
        "prepare_seconds": round(prepared, 2),
    }
    return trees, plan, figures


def _compiled(model, mesh, batch, branching, figures):
    """(the compiled update, the first state); tells `figures` what they are and what that took."""
    dtype = jnp.float32 if jax.default_backend() == "cpu" else jnp.bfloat16
    choice = dispatch.select_kernel(
        mesh,
        heads=model.heads,
        kv_heads=model.kv_heads,
        head_dim=model.head_dim,
        length=_MAX_LENGTH.value,
        dtype=dtype,
        branching=branching,
    )
    transform = optimizer.make_optimizer(OptimizerConfig(), _STEPS.value + 1)
    parameters = pretrained.load_parameters(
        _MODEL.value, model, sharding=lambda path, shape: sharding.parameter_sharding(mesh, path, shape)
    )
    state, shardings = train_step_lib.initial_state(mesh, parameters, transform)
    train_step = train_step_lib.make_train_step(
        model, transform, mesh, shardings, compute_dtype=dtype, remat=_REMAT.value, attend=choice.attend
    )
    started = time.perf_counter()
    compiled = train_step.lower(state, batch).compile()
    figures |= {"dtype": jnp.dtype(dtype).name, "attention": choice.name}
    figures["compile_seconds"] = round(time.perf_counter() - started, 2)
    memory = compiled.memory_analysis()
    if memory is not None:
        figures["temporaries_gb"] = round(memory.temp_size_in_bytes / 1e9, 2)
    return compiled, state


def _speeds(seconds: list[float], counts: list[tuple[int, int]], useful: list[float]) -> dict[str, Any]:
    """Medians over the measured steps. `counts`: real and response tokens of each; `useful`: its FLOP/s."""
    figures: dict[str, Any] = {
        "seconds_a_step": round(statistics.median(seconds), 3),
        "seconds_spread": [round(min(seconds), 3), round(max(seconds), 3)],
    }
    for column, name in enumerate(("real_tokens_per_second", "response_tokens_per_second")):
        rates = [tokens[column] / elapsed for tokens, elapsed in zip(counts, seconds, strict=True)]
        figures[name] = round(statistics.median(rates), 1)
    figures["useful_gflops_per_second"] = round(statistics.median(useful) / 1e9, 1)
    unit = 1 if sys.platform == "darwin" else 1024
    figures["peak_memory_gb"] = round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9, 2)
    peak = metrics.peak_flops(jax.devices()[0])
    if peak is not None:
        figures["mfu"] = round(statistics.median(useful) / peak, 4)
        stats = jax.devices()[0].memory_stats() or {}
        figures["peak_device_memory_gb"] = round(stats.get("peak_bytes_in_use", 0) / 1e9, 2)
    return figures


if __name__ == "__main__":
    app.run(main)
