"""Measures what only a GPU can tell, in one command: numerics, attention alone, training steps; a table and JSON.

    python scripts/benchmarks/gpu.py            # on one H200 with JAX 0.11.2: under 8 minutes, to experiments/results/
    python scripts/benchmarks/gpu.py --tiny     # the same on a CPU with tiny shapes: says nothing of speed, is printed

Lines are measured by gpu_case.py in processes of their own: a crash or a time limit costs the line it
befalls, and the next process goes on after it. What was not measured says so, and why. Nothing is measured without an
NVIDIA GPU, unless `--tiny` is given.
"""

import datetime
import itertools
import json
import pathlib
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from absl import app, flags

_TINY = flags.DEFINE_bool("tiny", False, "Tiny shapes, on any device.")
_RESULTS_DIR = flags.DEFINE_string("results_dir", None, "Where gpu.md and gpu.json go [experiments/results].")
_CASE = pathlib.Path(__file__).with_name("gpu_case.py")

Record = dict[str, Any]

_BUDGET = 465.0  # seconds of the whole
_STARTING = 40.0  # of a process, until its first line has begun
_LIMITS = {"device": 20.0, "numerics": 30.0, "attention": 20.0, "train": 110.0}  # of a line, compilation included

_HEADS = (dict(heads=32, kv_heads=8, head_dim=128), dict(heads=9, kv_heads=3, head_dim=64))
_LENGTHS = (2048, 8192, 32768)
_PATHS = (("cudnn_causal", "causal"), ("pallas_gpu", "paths"), ("pallas_gpu", "trees"), ("cudnn_packed", "paths"))
_SLOW_PATHS = (("blockwise", "paths"), ("blockwise", "trees"))

# Weights and moments are float32, as scripts/train.py keeps them, but for 8B: with theirs, 128 GB, nothing else fits.
_TRAININGS = (
    dict(model="Llama-3.2-1B-Instruct", length=4096, rows=4, remat="dots", parameter_dtype="float32"),
    dict(model="Llama-3.1-8B-Instruct", length=8192, rows=1, remat="dots", parameter_dtype="bfloat16"),
    dict(model="SmolLM2-135M", length=4096, rows=16, remat="dots", parameter_dtype="float32"),
)


def full_groups() -> list[list[Record]]:
    """Lists of lines that share a process, the most wanted first."""
    kinds = (("trees", "bfloat16"), ("paths", "bfloat16"), ("trees", "float32"))
    numerics = {
        path: [
            dict(part="numerics", path=path, rows=rows, dtype=dtype, **heads, length=500)
            for heads, (rows, dtype) in itertools.product(_HEADS, kinds)
        ]
        for path in ("pallas_gpu", "blockwise")
    }
    packed = [
        dict(part="numerics", path="cudnn_packed", rows="paths", dtype="bfloat16", **heads, length=500)
        for heads in _HEADS
    ]
    trainings = [[dict(part="train", **shape, compute_dtype="bfloat16", steps=6)] for shape in _TRAININGS]
    first, second = (
        [
            dict(part="attention", path=path, rows=rows, dtype="bfloat16", **heads, length=length, tokens=32768)
            for heads, (path, rows), length in itertools.product(_HEADS, paths, _LENGTHS)
        ]
        for paths in (_PATHS, _SLOW_PATHS)
    )
    return [numerics["pallas_gpu"], *trainings, packed, first, numerics["blockwise"], second]


def tiny_groups() -> list[list[Record]]:
    """A line of each kind, for any device."""
    heads = dict(heads=4, kv_heads=2, head_dim=16)
    paths = (("cudnn_causal", "causal"), ("blockwise", "trees"), ("cudnn_packed", "paths"))
    return [
        [dict(part="numerics", path="pallas_gpu", rows="trees", dtype="float32", **heads, length=64)],
        [
            dict(part="attention", path=path, rows=rows, dtype="float32", **heads, length=64, tokens=128)
            for path, rows in paths
        ],
        [
            dict(
                part="train",
                model="tiny",
                length=64,
                rows=2,
                remat="none",
                parameter_dtype="float32",
                compute_dtype="float32",
                steps=2,
            )
        ],
    ]


def measure(records: Sequence[Record], budget: float, command: Sequence[str]) -> list[Record]:
    """Returns the figures of each record, or {"failed": reason}, within `budget` seconds.

    Args:
      command: followed by `--records=...`, it prints "LINE " and the figures as JSON for one record after the other.
    """
    end = time.monotonic() + budget
    found: list[Record] = []
    while len(found) < len(records):
        left = end - time.monotonic()
        if left < 5:
            found.append({"failed": "the time of the whole was over"})
            continue
        rest = records[len(found) :]
        lines, reason = _lines([*command, f"--records={json.dumps(rest)}"], [_LIMITS[r["part"]] for r in rest], left)
        found += lines[: len(rest)]
        if len(lines) < len(rest):
            found.append({"failed": reason})
    return found


def _lines(command: Sequence[str], limits: Sequence[float], budget: float) -> tuple[list[Record], str]:
    """(the figures that a process printed, why there are no more): each line has its limit, and all a budget."""
    started = time.monotonic()
    lines: list[Record] = []
    errors: list[str] = []
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        out, complaints = process.stdout, process.stderr
        assert out is not None and complaints is not None
        ends = [started + min(budget, _STARTING + sum(limits[: count + 1])) for count in range(len(limits))]
        over = threading.Event()

        def watch():
            while process.poll() is None:
                if time.monotonic() > ends[min(len(lines), len(ends) - 1)]:
                    over.set()
                    process.kill()
                time.sleep(0.1)

        threads = [threading.Thread(target=watch), threading.Thread(target=lambda: errors.extend(complaints))]
        for thread in threads:
            thread.start()
        for line in out:
            if line.startswith("LINE "):
                lines.append(json.loads(line.removeprefix("LINE ")))
        for thread in threads:
            thread.join()
    if over.is_set():
        return lines, f"stopped after {time.monotonic() - started:.0f} s"
    said = next((line.strip()[:160] for line in reversed(errors) if "Error" in line), "")
    return lines, f"its process ended with code {process.returncode}" + (f": {said}" if said else "")


def suite(*, tiny: bool, command: Sequence[str]) -> tuple[Record, list[tuple[Record, Record]]]:
    """Returns (device and versions, every line with its figures or why it has none)."""
    end = time.monotonic() + _BUDGET
    here = measure([{"part": "device"}], 60.0, command)[0]
    results: list[tuple[Record, Record]] = []
    for group in tiny_groups() if tiny else full_groups():
        if "failed" in here:
            found = [here] * len(group)
        elif not tiny and here["platform"] != "gpu":
            found = [{"failed": f"there is no GPU, only {here['count']} x {here['kind']}"}] * len(group)
        else:
            found = measure(group, end - time.monotonic(), command)
        for record, figures in zip(group, found, strict=True):
            results.append((record, figures))
            print(f"{_title(record)}: {figures.get('failed', figures)}", flush=True)
    return here, results


def _title(record: Record) -> str:
    return " ".join(str(value) for value in record.values())


def table(columns: Sequence[str], rows: Iterable[tuple[Sequence[Any], Record, Callable[[Record], list[str]]]]) -> str:
    """A table in Markdown; a row is (what it is of, figures, figures to cells), or one cell that says why not."""
    lines = ["| " + " | ".join(columns) + " |", "|" + " --- |" * len(columns)]
    for names, figures, cells in rows:
        shown = [f"not measured: {figures['failed']}"] if "failed" in figures else cells(figures)
        shown = [cell.replace("|", "/") for cell in [*map(str, names), *shown]]
        lines.append("| " + " | ".join(shown + [""] * (len(columns) - len(shown))) + " |")
    return "\n".join(lines)


def _heads(record: Record) -> str:
    return f"{record['heads']}/{record['kv_heads']} x {record['head_dim']}"


def _numbers(*values: float | None, digits: int = 2) -> list[str]:
    return ["" if value is None else f"{value:,.{digits}f}" for value in values]


def _numerics_table(results: Sequence[tuple[Record, Record]]) -> str:
    def cells(figures):
        return [f"{figures[name]:.1e}" for name in ("read", "to queries", "to keys", "to values")]

    columns = ("path", "rows", "type", "heads", "read", "to queries", "to keys", "to values")
    rows = (((r["path"], r["rows"], r["dtype"], _heads(r)), f, cells) for r, f in results if r["part"] == "numerics")
    return table(columns, rows)


def _attention_table(results: Sequence[tuple[Record, Record]]) -> str:
    chosen = [(record, figures) for record, figures in results if record["part"] == "attention"]
    causal = {
        (_heads(record), record["length"]): figures for record, figures in chosen if record["path"] == "cudnn_causal"
    }

    def rows():
        for record, figures in chosen:
            base = causal.get((_heads(record), record["length"]), {"failed": ""})

            def cells(figures, base=base):
                ratio = None if "failed" in base else figures["both_ms"] / base["both_ms"]
                return [
                    *_numbers(figures["forward_ms"], figures["both_ms"], digits=3),
                    *_numbers(figures["forward_tflops"], figures["both_tflops"], digits=0),
                    *_numbers(figures["share"], ratio, digits=3),
                ]

            yield (record["path"], record["rows"], _heads(record), record["length"]), figures, cells

    columns = ("path", "rows", "heads", "T", "forward, ms", "with backward, ms", "forward, TFLOP/s")
    return table((*columns, "with backward, TFLOP/s", "pairs / causal's", "time / cuDNN causal's"), rows())


def _training_table(results: Sequence[tuple[Record, Record]]) -> str:
    def cells(figures):
        mfu = None if figures["mfu"] is None else 100 * figures["mfu"]
        return [
            *_numbers(figures["tokens_per_second"], figures["tflops"], digits=0),
            *_numbers(mfu, figures["peak_memory_gb"], figures["compile_seconds"], digits=1),
        ]

    def rows():
        for record, figures in results:
            if record["part"] == "train":
                yield [record[n] for n in ("model", "length", "rows", "remat", "parameter_dtype")], figures, cells

    columns = ("model", "T", "rows", "remat", "weights and moments", "tokens/s", "TFLOP/s", "MFU, %")
    return table((*columns, "peak memory, GB", "compilation, s"), rows())


def report(here: Record, results: Sequence[tuple[Record, Record]], elapsed: float, shown_command: str) -> str:
    """The page."""
    head = {
        "Command": f"`{shown_command}`",
        "Date": datetime.date.today().isoformat(),
        "Versions": here.get("versions", "unknown"),
        "Device": here.get("failed") or f"{here['count']} x {here['kind']}",
        "Time": f"{elapsed / 60:.1f} min",
    }
    top = "  \n".join(f"{name}: {value}" for name, value in head.items())
    return f"""\
{top}

Lengths of dialogues are drawn log-normal, mean 400 tokens, from 16 to 2,048; rows are full. Weights are random.

**Numerics**: the norm of the difference from NumPy's float64 over the norm of the latter, in a row of 500 tokens.

{_numerics_table(results)}

**Attention alone**, 32,768 tokens in rows of T, bfloat16. TFLOP/s count visible pairs only. The goal: for packed rows
the last column, of forward and backward, is at most the one before.

{_attention_table(results)}

**Training steps**: one micro-batch, AdamW, bfloat16 products, the attention that the step takes by itself. MFU counts
no padding, no masked pair, no logit without a target and no recomputation. Where weights are bfloat16, so are gradients
and moments. Goals: 45 % at 1B and 8B, 35 % at 135M.

{_training_table(results)}
"""


def main(argv):
    del argv
    started = time.monotonic()
    here, results = suite(tiny=_TINY.value, command=[sys.executable, str(_CASE)])
    shown_command = "python scripts/benchmarks/gpu.py" + (" --tiny" if _TINY.value else "")
    page = report(here, results, time.monotonic() - started, shown_command)
    print("\n" + page)
    directory = _RESULTS_DIR.value or ("" if _TINY.value else "experiments/results")
    if directory:
        path = pathlib.Path(directory)
        path.mkdir(parents=True, exist_ok=True)
        (path / "gpu.md").write_text(page, encoding="utf-8")
        lines = [{**record, "figures": figures} for record, figures in results]
        (path / "gpu.json").write_text(json.dumps({"device": here, "lines": lines}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    app.run(main)
