"""Measures the host's part of training: dialogues prepared a second, memory, and what making a step's batch takes.

    python scripts/benchmarks/data.py --workers=2 --step_seconds=0.3

Prepares the dialogues of --data anew, in a directory that is removed afterwards, and then makes batches as a run does.
The figures are printed as JSON. Needs no accelerator, and loads no weights: a step is --step_seconds of sleep, during
which the processors are free, as while an accelerator computes.
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
from dialog_jax.rendering.tokenizers import load_tokenizer
from dialog_jax.trees import disk_cache
from dialog_jax.trees.chunks import Recipe
from dialog_jax.trees.dataset import Trees
from dialog_jax.trees.objectives import ObjectiveConfig
from dialog_jax.trees.worker_pool import Preparation

_TOKENIZER = flags.DEFINE_string("tokenizer", "assets/smollm2-135m-instruct", "A model directory, GGUF file or name.")
_DATA = flags.DEFINE_string("data", "assets/chitchat/train.jsonl", "Dialogues.")
_DIALOGUES = flags.DEFINE_integer("dialogues", 0, "How many of them, from the first on; 0 for all.", lower_bound=0)
_MAX_LENGTH = flags.DEFINE_integer("max_length", 1024, "Tokens of a row, and at most of a dialogue.", lower_bound=2)
_WORKERS = flags.DEFINE_integer("workers", -1, "Processes that prepare, as data.workers of a run.", lower_bound=-1)
_ROWS = flags.DEFINE_integer("rows", 8, "Rows of a step.", lower_bound=1)
_STEPS = flags.DEFINE_integer("steps", 50, "Steps whose batches are made.", lower_bound=1)
_STEP_SECONDS = flags.DEFINE_float("step_seconds", 0.0, "What a step takes, for the loader's share; 0 if not known.")


def prepared(directory: str) -> tuple[Trees, dict[str, float | int]]:
    """Returns (the trees, what it took to prepare them), stored below `directory`."""
    began, before = time.perf_counter(), os.times()
    preparation = Preparation(
        Recipe(objective=ObjectiveConfig(), max_length=_MAX_LENGTH.value), load_tokenizer(_TOKENIZER.value)
    )
    dialogues = itertools.islice(read_dialogues(_DATA.value), _DIALOGUES.value or None)
    trees = disk_cache.load_or_build(directory, {}, dialogues, preparation, workers=_WORKERS.value)
    seconds, after = time.perf_counter() - began, os.times()
    spent = sum(after[:4]) - sum(before[:4])
    return trees, {
        "dialogues": trees.report.dialogues,
        "tokens": trees.report.tokens,
        "prepare_seconds": round(seconds, 2),
        "prepare_cpu_seconds": round(spent, 2),
        "dialogues_per_second": round(trees.report.dialogues / seconds, 1),
        "peak_memory_gb": _peak(),
        "peak_memory_of_a_worker_gb": _largest(resource.RUSAGE_CHILDREN),
    }


def loading(trees: Trees) -> dict[str, float]:
    """Returns what planning an epoch, and making the batch of a step, take."""
    began = time.perf_counter()
    length = _MAX_LENGTH.value
    plan = Plan(trees, max_length=length, max_targets=length, rows=_ROWS.value, micro_batches=1, seed=0)
    planned = time.perf_counter() - began
    began = time.perf_counter()
    made = sum(1 for _ in plan.batches(0, _STEPS.value))
    figures = {"plan_seconds": round(planned, 3), "batch_seconds": round((time.perf_counter() - began) / made, 6)}
    if not _STEP_SECONDS.value:
        return figures
    waited, batches = 0.0, plan.batches(0, _STEPS.value)
    for number in range(made):
        began = time.perf_counter()
        next(batches)
        waited += (time.perf_counter() - began) * (number > 0)  # the first is waited for once a run
        time.sleep(_STEP_SECONDS.value)
    share = waited / max(1, made - 1) / _STEP_SECONDS.value
    return figures | {"step_seconds": _STEP_SECONDS.value, "share_of_a_step_waited": round(share, 6)}


def _peak() -> float:
    """Of this process, in gigabytes. On Linux, what getrusage tells of it begins with who started it."""
    status = pathlib.Path("/proc/self/status")
    if not status.exists():
        return _largest(resource.RUSAGE_SELF)
    (line,) = (line for line in status.read_text(encoding="utf-8").splitlines() if line.startswith("VmHWM"))
    return round(int(line.split()[1]) * 1024 / 1e9, 3)


def _largest(whose: int) -> float:
    """Gigabytes."""
    unit = 1 if sys.platform == "darwin" else 1024
    return round(resource.getrusage(whose).ru_maxrss * unit / 1e9, 3)


def main(arguments: Sequence[str]) -> None:
    if len(arguments) > 1:
        raise app.UsageError(f"got {' '.join(arguments[1:])!r}; this script takes flags only, see --help")
    try:
        with tempfile.TemporaryDirectory() as directory:
            trees, figures = prepared(directory)
            asked = {"data": os.path.basename(_DATA.value), "max_length": _MAX_LENGTH.value, "rows": _ROWS.value}
            workers = {"workers": _WORKERS.value, "processors": os.cpu_count()}
            print(json.dumps({**asked, **workers, **figures, **loading(trees)}, indent=1))
    except (ValueError, OSError) as error:
        sys.exit(f"data.py: {error}")


if __name__ == "__main__":
    app.run(main)
