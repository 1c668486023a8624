"""Measures the host's part of training: dialogues prepared per second, memory, and the time to build a batch.

    python scripts/benchmarks/data.py --workers=2 --step_seconds=0.3
    python scripts/benchmarks/data.py --workers=0 --dialogues=300 --chat_template=qwen3.jinja

Prepares the dialogues of `--data` from scratch in a temporary directory, then builds batches as training does, and
prints the figures as JSON. Needs no accelerator and loads no weights: a step is `--step_seconds` of sleep, so the
processors are free meanwhile, as they are while an accelerator computes.
"""

import itertools
import json
import os
import pathlib
import resource
import sys
import tempfile
import time
from collections.abc import Sequence

from absl import app, flags

from dialog_jax.batching.batches import Plan
from dialog_jax.dialogues.parsing import read_dialogues
from dialog_jax.errors import UserError
from dialog_jax.rendering.sequences import Renderer
from dialog_jax.rendering.tokenizers import load_tokenizer
from dialog_jax.trees import disk_cache
from dialog_jax.trees.dataset import Trees
from dialog_jax.trees.dialogue_trees import TreeConfig

_TOKENIZER = flags.DEFINE_string("tokenizer", "assets/smollm2-135m-instruct", "Model directory, GGUF file or Hub name.")
_TEMPLATE = flags.DEFINE_string("chat_template", "", "Jinja file or its text; empty for the tokenizer's own.")
_DATA = flags.DEFINE_string("data", "assets/chitchat/train.jsonl", "File of dialogues.")
_DIALOGUES = flags.DEFINE_integer("dialogues", 0, "Number of dialogues from the start; 0 for all.", lower_bound=0)
_MAX_LENGTH = flags.DEFINE_integer("max_length", 1024, "Tokens per row, and at most per dialogue.", lower_bound=2)
_WORKERS = flags.DEFINE_integer("workers", -1, "Worker processes, as data.workers in training.", lower_bound=-1)
_ROWS = flags.DEFINE_integer("rows", 8, "Rows per step.", lower_bound=1)
_STEPS = flags.DEFINE_integer("steps", 50, "Steps whose batches are built.", lower_bound=1)
_STEP_SECONDS = flags.DEFINE_float("step_seconds", 0.0, "Seconds per step, to measure waiting for batches; 0 to skip.")


def prepare(directory: str) -> tuple[Trees, dict[str, float | int]]:
    """Returns (trees stored under `directory`, figures of their preparation)."""
    start, start_times = time.perf_counter(), os.times()
    renderer = Renderer(load_tokenizer(_TOKENIZER.value, chat_template=_TEMPLATE.value))
    config = TreeConfig(max_length=_MAX_LENGTH.value, truncate="turns")
    dialogues = itertools.islice(read_dialogues(_DATA.value), _DIALOGUES.value or None)
    trees = disk_cache.load_or_build(directory, {}, dialogues, renderer, config, workers=_WORKERS.value)
    seconds, end_times = time.perf_counter() - start, os.times()
    cpu_seconds = sum(end_times[:4]) - sum(start_times[:4])
    return trees, {
        "dialogues": trees.report.dialogues,
        "tokens": trees.report.tokens,
        "prepare_seconds": round(seconds, 2),
        "prepare_cpu_seconds": round(cpu_seconds, 2),
        "dialogues_per_second": round(trees.report.dialogues / seconds, 1),
        "peak_memory_gb": _peak_memory_gb(),
        "peak_memory_of_a_worker_gb": _rusage_memory_gb(resource.RUSAGE_CHILDREN),
    }


def measure_loading(trees: Trees) -> dict[str, float]:
    """Returns the seconds to plan an epoch and to build a step's batch, and the share of a step spent waiting."""
    start = time.perf_counter()
    length = _MAX_LENGTH.value
    plan = Plan(trees, max_length=length, rows=_ROWS.value, micro_batches=1, seed=0)
    plan_seconds = time.perf_counter() - start
    start = time.perf_counter()
    steps = sum(1 for _ in plan.batches(0, _STEPS.value))
    figures = {
        "plan_seconds": round(plan_seconds, 3),
        "batch_seconds": round((time.perf_counter() - start) / steps, 6),
    }
    if not _STEP_SECONDS.value:
        return figures
    wait_seconds, batches = 0.0, plan.batches(0, _STEPS.value)
    for step in range(steps):
        start = time.perf_counter()
        next(batches)
        if step > 0:  # waiting for the first batch happens once per run
            wait_seconds += time.perf_counter() - start
        time.sleep(_STEP_SECONDS.value)
    share = wait_seconds / max(1, steps - 1) / _STEP_SECONDS.value
    return figures | {"step_seconds": _STEP_SECONDS.value, "share_of_a_step_waited": round(share, 6)}


def _peak_memory_gb() -> float:
    """Returns the peak of this process. On Linux, getrusage would include the peak of the parent before exec."""
    status = pathlib.Path("/proc/self/status")
    if not status.exists():
        return _rusage_memory_gb(resource.RUSAGE_SELF)
    (line,) = (line for line in status.read_text(encoding="utf-8").splitlines() if line.startswith("VmHWM"))
    return round(int(line.split()[1]) * 1024 / 1e9, 3)


def _rusage_memory_gb(who: int) -> float:
    unit = 1 if sys.platform == "darwin" else 1024
    return round(resource.getrusage(who).ru_maxrss * unit / 1e9, 3)


def main(arguments: Sequence[str]) -> None:
    if len(arguments) > 1:
        raise app.UsageError(f"got {' '.join(arguments[1:])!r}; this script takes flags only, see --help")
    try:
        with tempfile.TemporaryDirectory() as directory:
            trees, figures = prepare(directory)
            settings = {"data": os.path.basename(_DATA.value), "max_length": _MAX_LENGTH.value, "rows": _ROWS.value}
            workers = {"workers": _WORKERS.value, "processors": os.cpu_count()}
            print(json.dumps({**settings, **workers, **figures, **measure_loading(trees)}, indent=1))
    except (UserError, OSError) as error:
        sys.exit(f"data.py: {error}")


if __name__ == "__main__":
    app.run(main)
