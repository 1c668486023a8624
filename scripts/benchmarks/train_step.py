"""Measures full fine-tuning, or LoRA: real tokens per second, response tokens per second, peak memory, compile time.

    python scripts/benchmarks/train_step.py --max_length=1024 --remat=dots

The step is the one that training runs, on the first `--dialogues` dialogues of the file. Real tokens are all tokens but
padding. A step's time runs from the end of the previous step to its own end and includes building and placing its
batch; figures are medians over all steps but the first. `--profile=FILE.md` also writes where the time goes (on a CPU
only, see step_profile.py).
"""

import json
import pathlib
import platform
import resource
import statistics
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
from dialog_jax.inference import loading
from dialog_jax.model import decoder, pretrained
from dialog_jax.model.lora_config import LoraConfig
from dialog_jax.planning import hlo
from dialog_jax.rendering.sequences import Renderer
from dialog_jax.training import metrics, optimizer, sharding, trainable
from dialog_jax.training import train_step as train_step_lib
from dialog_jax.training.config import MeshConfig, TrainConfig
from dialog_jax.trees import dataset
from dialog_jax.trees.dialogue_trees import TreeConfig

_MODEL = flags.DEFINE_string("model", "assets/smollm2-135m-instruct", "Model directory.")
_DATA = flags.DEFINE_string("data", "assets/chitchat/train.jsonl", "File of dialogues.")
_DIALOGUES = flags.DEFINE_integer("dialogues", 256, "Number of dialogues, from the start of the file.", lower_bound=1)
_MAX_LENGTH = flags.DEFINE_integer("max_length", 1024, "Tokens per row.", lower_bound=2)
_ROWS = flags.DEFINE_integer("rows", 2, "Rows per micro-batch.", lower_bound=1)
_ACCUMULATION = flags.DEFINE_integer("gradient_accumulation", 4, "Micro-batches per step.", lower_bound=1)
_STEPS = flags.DEFINE_integer("steps", 8, "Measured steps, after one warm-up step.", lower_bound=1)
_REMAT = flags.DEFINE_enum("remat", "dots", list(decoder.REMAT), "Recomputation in the backward pass.")
_LORA_RANK = flags.DEFINE_integer("lora_rank", 0, "Rank of LoRA on all linear layers; 0 trains all.", lower_bound=0)
_OUT = flags.DEFINE_string("out", "", "JSON file to write the figures to, including those of each step.")
_PROFILE = flags.DEFINE_string("profile", "", "Markdown file to write the profile of one more step to.")

_FLAGS = _MODEL, _DATA, _DIALOGUES, _MAX_LENGTH, _ROWS, _ACCUMULATION, _STEPS, _REMAT, _LORA_RANK, _OUT, _PROFILE


def main(arguments: list[str]) -> None:
    if len(arguments) > 1:
        raise app.UsageError(f"got {' '.join(arguments[1:])!r}; this script takes flags only, see --help")
    logging.set_verbosity(logging.WARNING)
    shown_flags = [f"--{flag.name}={flag.value}" for flag in _FLAGS if flag.present]
    try:
        for path in filter(None, (_OUT.value, _PROFILE.value)):
            pathlib.Path(path).touch()
        if _PROFILE.value and jax.default_backend() != "cpu":
            raise UserError(
                f"--profile works on CPUs only, but the backend is {jax.default_backend()}; use jax.profiler.trace."
            )
        _measure(" ".join(["python", "scripts/benchmarks/train_step.py", *shown_flags]))
    except (UserError, OSError) as error:
        sys.exit(f"train_step.py: {error}")


def _measure(command: str) -> None:
    """Prints the figures and writes the files that were asked for."""
    opened = loading.open_model(_MODEL.value)
    model = opened.config
    trees, plan, figures = _prepare(opened.renderer)
    mesh = sharding.make_mesh(MeshConfig(), jax.devices()[:1])
    compiled, state, selection = _compile(model, mesh, plan.batch(0), trees.branching, figures)
    seconds, token_counts, flop_rates = [], [], []
    end = time.perf_counter()
    for step, batch in enumerate(plan.batches(0, _STEPS.value + 1)):
        placed = jax.device_put(batch, sharding.batch_sharding(mesh))
        state, step_metrics = compiled(state, placed)
        values = jax.device_get(step_metrics)
        start, end = end, time.perf_counter()
        elapsed = end - start
        print(f"step {step}: loss {values.loss:.4f}, {elapsed:.2f} s, {values.tokens / elapsed:.1f} real tokens/s")
        if step == 0:
            figures["first_loss"] = round(float(values.loss), 5)
            continue
        seconds.append(elapsed)
        token_counts.append((int(values.tokens), int(values.response_tokens)))
        flops = metrics.count_flops(
            model,
            tokens=int(values.tokens),
            attention_pairs=int(values.attention_pairs),
            targets=int(values.targets),
            selection=selection,
        )
        flop_rates.append(flops / elapsed)
    figures |= _summarize(seconds, token_counts, flop_rates)
    for name, value in figures.items():
        print(f"{name:28} {value}")
    if _OUT.value:
        real, response = zip(*token_counts, strict=True)
        steps = {"seconds": seconds, "real_tokens": real, "response_tokens": response}
        pathlib.Path(_OUT.value).write_text(json.dumps(figures | steps, indent=1), encoding="utf-8")
    if _PROFILE.value:
        placed = jax.device_put(plan.batch(_STEPS.value + 1), sharding.batch_sharding(mesh))
        page = step_profile.make_page(
            program=hlo.parse(compiled.as_text()),
            events=step_profile.record(lambda: compiled(state, placed)),
            step_seconds=statistics.median(seconds),
            product_speed=step_profile.measure_product_speed(model, _ROWS.value * _MAX_LENGTH.value),
            tokens=statistics.median(real for real, _ in token_counts),
            figures={"command": f"`{command}`", **figures},
        )
        pathlib.Path(_PROFILE.value).write_text(page, encoding="utf-8")


def _prepare(renderer: Renderer) -> tuple[dataset.Trees, batches.Plan, dict[str, Any]]:
    """Returns (trees, rows of all steps, figures so far)."""
    dialogues = [dialogue for _, dialogue in zip(range(_DIALOGUES.value), read_dialogues(_DATA.value), strict=False)]
    start = time.perf_counter()
    trees = dataset.prepare(dialogues, renderer, TreeConfig(max_length=_MAX_LENGTH.value, truncate="turns"))
    prepare_seconds = time.perf_counter() - start
    plan = batches.Plan(
        trees,
        max_length=_MAX_LENGTH.value,
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
        "lora_rank": _LORA_RANK.value,
        "prepare_seconds": round(prepare_seconds, 2),
    }
    return trees, plan, figures


def _compile(model, mesh, batch, branching, figures):
    """Returns (compiled step, initial state, what is trained); adds to `figures` what was compiled and how long."""
    dtype = jnp.float32 if jax.default_backend() == "cpu" else jnp.bfloat16
    choice = dispatch.select_kernel(
        mesh,
        heads=model.heads,
        sizes=model.attention_sizes,
        length=_MAX_LENGTH.value,
        dtype=dtype,
        branching=branching,
        additions=model.attention_additions,
    )
    config = TrainConfig(lora=LoraConfig(rank=_LORA_RANK.value)).resolve()
    transform = optimizer.make_optimizer(config.optimizer, _STEPS.value + 1)
    selection = trainable.select(config, model, dtype)
    base = pretrained.load_parameters(
        _MODEL.value,
        model,
        sharding=lambda path, shape: sharding.parameter_sharding(mesh, path, shape),
        dtype=selection.dtype,
        find_kind=selection.find_kind,
    )
    parameters = trainable.make_parameters(selection, base, jax.random.key(0))
    state = train_step_lib.initialize_state(mesh, parameters.trained, transform, parameters.frozen)
    train_step = train_step_lib.make_train_step(
        model,
        transform,
        mesh,
        compute_dtype=dtype,
        remat=_REMAT.value,
        attend=choice.attend,
        shapes=trainable.abstract_parameters(selection),
    )
    start = time.perf_counter()
    compiled = train_step.lower(state, batch).compile()
    figures |= {"dtype": jnp.dtype(dtype).name, "attention": choice.name}
    figures["compile_seconds"] = round(time.perf_counter() - start, 2)
    memory = compiled.memory_analysis()
    if memory is not None:
        figures["temporaries_gb"] = round(memory.temp_size_in_bytes / 1e9, 2)
    return compiled, state, selection


def _summarize(seconds: list[float], token_counts: list[tuple[int, int]], flop_rates: list[float]) -> dict[str, Any]:
    """Returns medians over the measured steps.

    Args:
      seconds: of each step.
      token_counts: (real tokens, response tokens) of each step.
      flop_rates: useful FLOP/s of each step.
    """
    figures: dict[str, Any] = {
        "seconds_a_step": round(statistics.median(seconds), 3),
        "seconds_spread": [round(min(seconds), 3), round(max(seconds), 3)],
    }
    for column, name in enumerate(("real_tokens_per_second", "response_tokens_per_second")):
        rates = [counts[column] / elapsed for counts, elapsed in zip(token_counts, seconds, strict=True)]
        figures[name] = round(statistics.median(rates), 1)
    figures["useful_gflops_per_second"] = round(statistics.median(flop_rates) / 1e9, 1)
    unit = 1 if sys.platform == "darwin" else 1024
    figures["peak_memory_gb"] = round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9, 2)
    peak = metrics.find_peak_flops(jax.devices()[0])
    if peak is not None:
        figures["mfu"] = round(statistics.median(flop_rates) / peak, 4)
        stats = jax.devices()[0].memory_stats() or {}
        figures["peak_device_memory_gb"] = round(stats.get("peak_bytes_in_use", 0) / 1e9, 2)
    return figures


if __name__ == "__main__":
    app.run(main)
