"""Where the time of an update goes: a trace of one and the text of its program -> seconds by part, and a bound.

    python scripts/benchmarks/train_step.py --profile=runs/profile.md

Several things may run at once. A moment counts for the matrix product that runs, if one does, otherwise for what else
runs, otherwise as not recorded: XLA's profiler on a CPU notes when some products begin and not when they end, so that
this is mostly waiting for them. The bound is what an update would take if it were these products and nothing else, as
fast as products of the model's largest matrices are by themselves.
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
from dialog_jax.model.decoder import DecoderConfig
from dialog_jax.planning import hlo
from dialog_jax.planning.hlo import Instruction, Program
from dialog_jax.training import loss, train_step

# The first whose scope is in an instruction's name has it.
PARTS = {
    blockwise.PAIRS: "attention",
    decoder.LAYERS: "layers without attention",
    loss.TILES: "loss",
    train_step.OPTIMIZER: "optimizer",
    "": "the rest",
}
UNRECORDED = "not recorded"
_CONTROL = ("while", "call", "conditional")


class Event(NamedTuple):
    """An instruction that ran, in seconds."""

    name: str
    start: float
    end: float


class Kind(NamedTuple):
    """What an instruction is."""

    part: str
    product: bool


def part(operation_name: str) -> str:
    """Which of `PARTS` an instruction belongs to, by where it comes from in the Python program."""
    return next(words for scope, words in PARTS.items() if scope in operation_name)


def kinds(program: Program) -> dict[str, Kind]:
    """What each instruction is, by name; loops and calls, whose own are listed, are left out."""
    found = {}
    for body in program.computations.values():
        for name, one in body.items():
            if one.operation in _CONTROL:
                continue
            inner = hlo.called(program, one).values() if one.operation == "fusion" else ()
            origins = [each.operation_name for each in (one, *inner) if each.operation_name]
            product = any(each.operation == "dot" for each in (one, *inner))
            found[name] = Kind(part(origins[0] if origins else ""), product)
    return found


def runs(program: Program, events: Iterable[Event]) -> dict[str, float]:
    """How often each computation ran: as often as that of its instructions that was seen most, or what calls it."""
    seen = collections.Counter(event.name for event in events)
    counts = {name: float(max((seen[one] for one in body), default=0)) for name, body in program.computations.items()}
    for body in program.computations.values():
        for one in body.values():
            for name in hlo.callees(one) if one.operation == "fusion" else ():
                counts[name] = max(counts[name], float(seen[one.name]))
    return counts


def timeline(events: Iterable[Event], kind: Mapping[str, Kind]) -> dict[Kind, float]:
    """Seconds of each kind, every moment counted once; they add up to the time from first to last."""
    marks = sorted(
        mark
        for number, event in enumerate(events)
        if event.name in kind
        for mark in ((event.start, number, event.name), (event.end, number, event.name))
    )
    seconds: dict[Kind, float] = collections.defaultdict(float)
    running: dict[int, Kind] = {}
    for (now, number, name), (after, *_) in itertools.pairwise(marks):
        if running.pop(number, None) is None:
            running[number] = kind[name]
        products = [one for one in running.values() if one.product]
        others = list(running.values())
        here = (products or others or [Kind(UNRECORDED, False)])[0]
        seconds[here] += after - now
    return dict(seconds)


def record(update: Callable[[], Any]) -> list[Event]:
    """The instructions that run in the call, until what it returns is there."""
    options = jax.profiler.ProfileOptions()
    options.python_tracer_level = 0  # Python's functions are not read here
    with tempfile.TemporaryDirectory() as directory:
        with jax.profiler.trace(directory, profiler_options=options):
            jax.block_until_ready(update())
        return read(pathlib.Path(directory))


def read(directory: pathlib.Path) -> list[Event]:
    """The instructions of a trace that `jax.profiler.trace` wrote.

    Raises:
      UserError: there is not one trace there, or it has no instruction, as where the profiler cannot see a device.
    """
    files = sorted(directory.rglob("*.trace.json.gz"))
    if len(files) != 1:
        raise UserError(f"{directory} has {len(files)} traces; one is needed.")
    with gzip.open(files[0], "rt", encoding="utf-8") as stream:
        written = json.load(stream)["traceEvents"]
    events = [
        Event(one["args"]["hlo_op"], one["ts"] / 1e6, (one["ts"] + one["dur"]) / 1e6)
        for one in written
        if one.get("ph") == "X" and "hlo_op" in one.get("args", {})
    ]
    if not events:
        raise UserError(f"{files[0]} names no instruction of a program.")
    return events


def flops(program: Program, counts: Mapping[str, float]) -> dict[str, float]:
    """FLOPs of the matrix products of each part."""
    return {words: hlo.products(_only(program, words), counts).flops for words in PARTS.values()}


def product_speed(model: DecoderConfig, tokens: int, repeats: int = 15) -> float:
    """FLOP/s, in float32, of the three products of a feed-forward matrix of `model`: forward, to input, to weight."""
    keys = jax.random.split(jax.random.key(0), 3)
    shapes = (tokens, model.width), (model.width, model.feed_forward), (tokens, model.feed_forward)
    x, w, dy = (jax.random.normal(key, shape) for key, shape in zip(keys, shapes, strict=True))
    ways: list[Callable] = [lambda x, w, dy: x @ w, lambda x, w, dy: dy @ w.T, lambda x, w, dy: x.T @ dy]
    total = 0.0
    for way in map(jax.jit, ways):
        jax.block_until_ready(way(x, w, dy))
        seconds = []
        for _ in range(repeats):
            began = time.perf_counter()
            jax.block_until_ready(way(x, w, dy))
            seconds.append(time.perf_counter() - began)
        total += statistics.median(seconds)
    return len(ways) * 2 * tokens * model.width * model.feed_forward / total


def text(
    *,
    program: Program,
    events: list[Event],
    seconds: float,
    speed: float,
    tokens: float,
    figures: Mapping[str, Any],
) -> str:
    """The profile in Markdown.

    Args:
      seconds: of the update without a profiler, to which the traced one is scaled.
      speed: FLOP/s of products alone.
      tokens: real ones of the update.
      figures: what else to tell, by name.
    """
    spent = timeline(events, kinds(program))
    work = flops(program, runs(program, events))
    scale = seconds / sum(spent.values())
    rows: list[tuple[str, list[float]]] = []
    for words in PARTS.values():
        product, other = (spent.get(Kind(words, one), 0.0) * scale for one in (True, False))
        if product or other or work[words]:
            rows.append((words, [work[words], product, other, 0.0]))
    rows.append((UNRECORDED, [0.0, 0.0, 0.0, spent.get(Kind(UNRECORDED, False), 0.0) * scale]))
    totals = [sum(column) for column in zip(*(numbers for _, numbers in rows), strict=True)]
    header = ["part", "GFLOP of products", "s they would take alone", "s in products", "s in others only", UNRECORDED]
    cells = [
        [words, *map(_number, (done / 1e9, done / speed, product, other, waiting))]
        for words, (done, product, other, waiting) in [*rows, ("all", totals)]
    ]
    table = "\n".join("| " + " | ".join(row) + " |" for row in [header, ["---"] + ["---:"] * 5, *cells])
    told = "  \n".join(f"{name.replace('_', ' ')}: {value}" for name, value in figures.items())
    bound = totals[0] / speed
    return (
        f"{told}\n\n"
        f"An update takes {seconds:.3g} s: {tokens / seconds:.1f} real tokens a second. Products of the model's "
        f"feed-forward matrices run at {speed / 1e9:.3g} GFLOP/s by themselves; were the update its products and "
        f"nothing else, at that speed, it would take {bound:.3g} s, {tokens / bound:.1f} real tokens a second. It is "
        f"at {100 * bound / seconds:.0f} % of that.\n\n{table}\n"
    )


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _only(program: Program, words: str) -> Program:
    """The program without the products of other parts."""

    def kept(one: Instruction) -> bool:
        return one.operation != "dot" or part(one.operation_name) == words

    bodies = {name: {key: one for key, one in body.items() if kept(one)} for name, body in program.computations.items()}
    return Program(bodies, program.entry)
