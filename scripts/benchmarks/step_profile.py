"""Breaks down the time of an update: a profiler trace and the compiled program -> seconds per part, and a bound.

    python scripts/benchmarks/train_step.py --profile=runs/profile.md

Instructions run in parallel. Each moment is attributed to the matrix product that is running, if there is one;
otherwise to another running instruction; otherwise to "not recorded". XLA's CPU profiler records the start of some
products but not their end, so "not recorded" is mostly time spent waiting for them. The bound is the time of an update
that consists of these products only and runs them as fast as isolated products of the model's largest matrices.
"""

import collections
import gzip
import itertools
import json
import pathlib
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import jax

from dialog_jax.attention import blockwise
from dialog_jax.errors import UserError
from dialog_jax.model import decoder
from dialog_jax.model.decoder_config import DecoderConfig
from dialog_jax.planning import hlo
from dialog_jax.planning.hlo import Instruction, Program
from dialog_jax.training import loss, train_step

# {scope: part}. An instruction belongs to the first part whose scope occurs in its name.
PARTS = {
    blockwise.PAIRS: "attention",
    decoder.LAYERS: "layers without attention",
    loss.TILES: "loss",
    train_step.OPTIMIZER_SCOPE: "optimizer",
    "": "the rest",
}
UNRECORDED = "not recorded"
_CONTROL_FLOW = ("while", "call", "conditional")


class Event(NamedTuple):
    """One execution of an instruction; times in seconds."""

    name: str
    start: float
    end: float


class Kind(NamedTuple):
    """The part an instruction belongs to, and whether it is a matrix product."""

    part: str
    product: bool


def find_part(operation_name: str) -> str:
    """Returns the entry of `PARTS` for an instruction, given its name in the Python program."""
    return next(part for scope, part in PARTS.items() if scope in operation_name)


def classify_instructions(program: Program) -> dict[str, Kind]:
    """Returns {instruction: kind}. Loops and calls are omitted because their bodies are listed."""
    kinds = {}
    for body in program.computations.values():
        for name, instruction in body.items():
            if instruction.operation in _CONTROL_FLOW:
                continue
            fused = (
                hlo.find_called_computation(program, instruction).values() if instruction.operation == "fusion" else ()
            )
            origins = [each.operation_name for each in (instruction, *fused) if each.operation_name]
            product = any(each.operation == "dot" for each in (instruction, *fused))
            kinds[name] = Kind(find_part(origins[0] if origins else ""), product)
    return kinds


def count_runs(program: Program, events: Iterable[Event]) -> dict[str, float]:
    """Returns {computation: runs}: the count of its most frequent instruction, or of the fusion that calls it."""
    seen = collections.Counter(event.name for event in events)
    counts = {name: float(max((seen[key] for key in body), default=0)) for name, body in program.computations.items()}
    for body in program.computations.values():
        for instruction in body.values():
            for name in hlo.list_callees(instruction) if instruction.operation == "fusion" else ():
                counts[name] = max(counts[name], float(seen[instruction.name]))
    return counts


def attribute_time(events: Iterable[Event], kinds: Mapping[str, Kind]) -> dict[Kind, float]:
    """Returns seconds per kind. Each moment counts once, so the values sum to the time from first start to last end."""
    marks = sorted(
        mark
        for index, event in enumerate(events)
        if event.name in kinds
        for mark in ((event.start, index, event.name), (event.end, index, event.name))
    )
    seconds: dict[Kind, float] = collections.defaultdict(float)
    running: dict[int, Kind] = {}
    for (now, index, name), (after, *_) in itertools.pairwise(marks):
        if running.pop(index, None) is None:
            running[index] = kinds[name]
        products = [kind for kind in running.values() if kind.product]
        kind = (products or list(running.values()) or [Kind(UNRECORDED, False)])[0]
        seconds[kind] += after - now
    return dict(seconds)


def record(update: Callable[[], Any]) -> list[Event]:
    """Returns the instructions that run during a call, until its result is ready."""
    options = jax.profiler.ProfileOptions()
    options.python_tracer_level = 0  # Python functions are not needed
    with tempfile.TemporaryDirectory() as directory:
        with jax.profiler.trace(directory, profiler_options=options):
            jax.block_until_ready(update())
        return read_trace(pathlib.Path(directory))


def read_trace(directory: pathlib.Path) -> list[Event]:
    """Returns the instructions in a trace written by `jax.profiler.trace`.

    Raises:
      UserError: the directory does not hold exactly one trace, or the trace has no instructions because the profiler
        does not support the device.
    """
    files = sorted(directory.rglob("*.trace.json.gz"))
    if len(files) != 1:
        raise UserError(f"{directory} has {len(files)} traces; exactly one is needed.")
    with gzip.open(files[0], "rt", encoding="utf-8") as stream:
        entries = json.load(stream)["traceEvents"]
    events = [
        Event(entry["args"]["hlo_op"], entry["ts"] / 1e6, (entry["ts"] + entry["dur"]) / 1e6)
        for entry in entries
        if entry.get("ph") == "X" and "hlo_op" in entry.get("args", {})
    ]
    if not events:
        raise UserError(f"{files[0]} contains no instruction of a compiled program.")
    return events


def count_flops(program: Program, run_counts: Mapping[str, float]) -> dict[str, float]:
    """Returns {part: FLOPs of its matrix products}."""
    return {part: hlo.sum_products(_select_products(program, part), run_counts).flops for part in PARTS.values()}


def _select_products(program: Program, part: str) -> Program:
    """Returns the program without the products of other parts."""

    def selected(instruction: Instruction) -> bool:
        return instruction.operation != "dot" or find_part(instruction.operation_name) == part

    bodies = {
        name: {key: instruction for key, instruction in body.items() if selected(instruction)}
        for name, body in program.computations.items()
    }
    return Program(bodies, program.entry)


def measure_product_speed(model: DecoderConfig, tokens: int, repeats: int = 15) -> float:
    """Returns float32 FLOP/s over the three products of a feed-forward matrix: forward, input and weight gradient."""
    keys = jax.random.split(jax.random.key(0), 3)
    shapes = (tokens, model.width), (model.width, model.feed_forward), (tokens, model.feed_forward)
    x, w, dy = (jax.random.normal(key, shape) for key, shape in zip(keys, shapes, strict=True))
    products: list[Callable] = [lambda x, w, dy: x @ w, lambda x, w, dy: dy @ w.T, lambda x, w, dy: x.T @ dy]
    total = 0.0
    for product in map(jax.jit, products):
        jax.block_until_ready(product(x, w, dy))
        seconds = []
        for _ in range(repeats):
            start = time.perf_counter()
            jax.block_until_ready(product(x, w, dy))
            seconds.append(time.perf_counter() - start)
        total += statistics.median(seconds)
    return len(products) * 2 * tokens * model.width * model.feed_forward / total


def make_page(
    *,
    program: Program,
    events: list[Event],
    step_seconds: float,
    product_speed: float,
    tokens: float,
    figures: Mapping[str, Any],
) -> str:
    """Returns the profile in Markdown.

    Args:
      program: the compiled update.
      events: of one traced update.
      step_seconds: of an update without the profiler; the traced times are scaled to it.
      product_speed: FLOP/s of isolated products.
      tokens: real tokens of the update.
      figures: further figures for the head of the page, by name.
    """
    seconds = attribute_time(events, classify_instructions(program))
    flops = count_flops(program, count_runs(program, events))
    scale = step_seconds / sum(seconds.values())
    rows: list[tuple[str, list[float]]] = []
    for part in PARTS.values():
        in_products, in_others = (seconds.get(Kind(part, product), 0.0) * scale for product in (True, False))
        if in_products or in_others or flops[part]:
            rows.append((part, [flops[part], in_products, in_others, 0.0]))
    rows.append((UNRECORDED, [0.0, 0.0, 0.0, seconds.get(Kind(UNRECORDED, False), 0.0) * scale]))
    totals = [sum(column) for column in zip(*(numbers for _, numbers in rows), strict=True)]
    header = ["part", "GFLOP of products", "s of these products alone", "s in products", "s in others only", UNRECORDED]
    cells = [
        [part, *map(_format, (work / 1e9, work / product_speed, in_products, in_others, unrecorded))]
        for part, (work, in_products, in_others, unrecorded) in [*rows, ("all", totals)]
    ]
    table = "\n".join("| " + " | ".join(row) + " |" for row in [header, ["---"] + ["---:"] * 5, *cells])
    head = "  \n".join(f"{name.replace('_', ' ')}: {value}" for name, value in figures.items())
    bound = totals[0] / product_speed
    return (
        f"{head}\n\n"
        f"An update takes {step_seconds:.3g} s, or {tokens / step_seconds:.1f} real tokens/s. Isolated products of the "
        f"model's feed-forward matrices run at {product_speed / 1e9:.3g} GFLOP/s. An update that consisted of its "
        f"matrix products only, at that speed, would take {bound:.3g} s, or {tokens / bound:.1f} real tokens/s. The "
        f"update reaches {100 * bound / step_seconds:.0f} % of this bound.\n\n{table}\n"
    )


def _format(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"
