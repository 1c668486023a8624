"""Measures what needs a GPU, in one command: numerics, attention alone, training steps; writes a page and JSON.

    python scripts/benchmarks/gpu.py            # on one H200 with JAX 0.11.2: under 8 minutes, to experiments/results/
    python scripts/benchmarks/gpu.py --tiny     # tiny shapes on any device: not a measurement, printed only

gpu_case.py measures the cases in separate processes: a crash or a time limit costs only the case it occurs in, and a
new process continues with the next one. Cases that were not measured are listed with the reason.
"""

import itertools
import json
import pathlib
import subprocess
import sys
import threading
import time
from collections.abc import Sequence

import gpu_report
from absl import app, flags
from gpu_report import Case, Figures

_TINY = flags.DEFINE_bool("tiny", False, "Tiny shapes, on any device.")
_RESULTS_DIR = flags.DEFINE_string("results_dir", None, "Directory for gpu.md and gpu.json [experiments/results].")
_CASE_SCRIPT = pathlib.Path(__file__).with_name("gpu_case.py")

_BUDGET = 465.0  # seconds for all cases
_STARTUP = 40.0  # seconds until a process begins its first case
_LIMITS = {"device": 20.0, "numerics": 30.0, "attention": 20.0, "train": 110.0}  # seconds per case, with compilation

_HEADS = (dict(heads=32, kv_heads=8, head_dim=128), dict(heads=9, kv_heads=3, head_dim=64))
_LENGTHS = (2048, 8192, 32768)
_PATHS = (("cudnn_causal", "causal"), ("pallas_gpu", "paths"), ("pallas_gpu", "trees"), ("cudnn_packed", "paths"))
_SLOW_PATHS = (("blockwise", "paths"), ("blockwise", "trees"))

# Weights and moments are float32, as in training, except at 8B, where they would take 128 GB.
_TRAININGS = (
    dict(model="Llama-3.2-1B-Instruct", length=4096, rows=4, remat="dots", parameter_dtype="float32"),
    dict(model="Llama-3.1-8B-Instruct", length=8192, rows=1, remat="dots", parameter_dtype="bfloat16"),
    dict(model="SmolLM2-135M", length=4096, rows=16, remat="dots", parameter_dtype="float32"),
)


def full_groups() -> list[list[Case]]:
    """Returns groups of cases that share a process, the most important first."""
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
    fast, slow = (
        [
            dict(part="attention", path=path, rows=rows, dtype="bfloat16", **heads, length=length, tokens=32768)
            for heads, (path, rows), length in itertools.product(_HEADS, paths, _LENGTHS)
        ]
        for paths in (_PATHS, _SLOW_PATHS)
    )
    return [numerics["pallas_gpu"], *trainings, packed, fast, numerics["blockwise"], slow]


def tiny_groups() -> list[list[Case]]:
    """Returns one case of each kind, for any device."""
    heads = dict(heads=4, kv_heads=2, head_dim=16)
    paths = (("cudnn_causal", "causal"), ("blockwise", "trees"), ("cudnn_packed", "paths"))
    training = dict(model="tiny", length=64, rows=2, remat="none", parameter_dtype="float32", compute_dtype="float32")
    return [
        [dict(part="numerics", path="pallas_gpu", rows="trees", dtype="float32", **heads, length=64)],
        [
            dict(part="attention", path=path, rows=rows, dtype="float32", **heads, length=64, tokens=128)
            for path, rows in paths
        ],
        [dict(part="train", **training, steps=2)],
    ]


def measure(cases: Sequence[Case], budget: float, command: Sequence[str]) -> list[Figures]:
    """Returns the figures of each case, or {"failed": reason}, within `budget` seconds.

    Args:
      command: called with `--cases=...`; prints "LINE " and the figures in JSON for each case in turn.
    """
    end = time.monotonic() + budget
    figures: list[Figures] = []
    while len(figures) < len(cases):
        remaining = end - time.monotonic()
        if remaining < 5:
            figures.append({"failed": "the time budget of the benchmark was used up"})
            continue
        pending = cases[len(figures) :]
        limits = [_LIMITS[case["part"]] for case in pending]
        lines, reason = _run_process([*command, f"--cases={json.dumps(pending)}"], limits, remaining)
        figures += lines[: len(pending)]
        if len(lines) < len(pending):
            figures.append({"failed": reason})
    return figures


def _run_process(command: Sequence[str], limits: Sequence[float], budget: float) -> tuple[list[Figures], str]:
    """Returns (figures that the process printed, reason why there are no more).

    Args:
      limits: seconds per case.
      budget: seconds for all of them.
    """
    start = time.monotonic()
    lines: list[Figures] = []
    errors: list[str] = []
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        stdout, stderr = process.stdout, process.stderr
        assert stdout is not None and stderr is not None
        deadlines = [start + min(budget, _STARTUP + sum(limits[: count + 1])) for count in range(len(limits))]
        timed_out = threading.Event()

        def watch():
            while process.poll() is None:
                if time.monotonic() > deadlines[min(len(lines), len(deadlines) - 1)]:
                    timed_out.set()
                    process.kill()
                time.sleep(0.1)

        threads = [threading.Thread(target=watch), threading.Thread(target=lambda: errors.extend(stderr))]
        for thread in threads:
            thread.start()
        for line in stdout:
            if line.startswith("LINE "):
                lines.append(json.loads(line.removeprefix("LINE ")))
        for thread in threads:
            thread.join()
    if timed_out.is_set():
        return lines, f"stopped after {time.monotonic() - start:.0f} s"
    error = next((line.strip()[:160] for line in reversed(errors) if "Error" in line), "")
    return lines, f"its process ended with code {process.returncode}" + (f": {error}" if error else "")


def run_suite(*, tiny: bool, command: Sequence[str]) -> tuple[Figures, list[tuple[Case, Figures]]]:
    """Returns (device and versions, every case with its figures or the reason why there are none)."""
    end = time.monotonic() + _BUDGET
    device = measure([{"part": "device"}], 60.0, command)[0]
    if "failed" in device:
        sys.exit(f"gpu.py: the device could not be queried: {device['failed']}")
    if not tiny and device["platform"] != "gpu":
        sys.exit(f"gpu.py: needs an NVIDIA GPU, found {device['count']} x {device['kind']}. Nothing was written.")
    results: list[tuple[Case, Figures]] = []
    for group in tiny_groups() if tiny else full_groups():
        for case, figures in zip(group, measure(group, end - time.monotonic(), command), strict=True):
            results.append((case, figures))
            print(f"{' '.join(map(str, case.values()))}: {figures.get('failed', figures)}", flush=True)
    return device, results


def main(argv):
    del argv
    start = time.monotonic()
    device, results = run_suite(tiny=_TINY.value, command=[sys.executable, str(_CASE_SCRIPT)])
    shown_command = "python scripts/benchmarks/gpu.py" + (" --tiny" if _TINY.value else "")
    page = gpu_report.make_page(device, results, time.monotonic() - start, shown_command)
    print("\n" + page)
    directory = _RESULTS_DIR.value or ("" if _TINY.value else "experiments/results")
    if directory:
        path = pathlib.Path(directory)
        path.mkdir(parents=True, exist_ok=True)
        (path / "gpu.md").write_text(page, encoding="utf-8")
        lines = [{**case, "figures": figures} for case, figures in results]
        (path / "gpu.json").write_text(
            json.dumps({"device": device, "lines": lines}, indent=1) + "\n", encoding="utf-8"
        )


if __name__ == "__main__":
    app.run(main)
