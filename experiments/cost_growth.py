"""How does cost grow: with the row, with the turns of a dialogue, with the data set, and with the vocabulary?

Question:  Packed short dialogues should cost the same in long rows as in short ones, a dialogue of many turns the same
           as one of few that is as long, a data set should be prepared in time proportional to it and in bounded
           memory, and no array of rows x tokens x vocabulary should ever exist. Do they?
Command:   python experiments/cost_growth.py
Hardware:  two cores of an AMD EPYC with AVX-512.
Time:      3.7 min.
Result:    a token's time grows as T^0.09 from rows of 512 to 8,192; an update's as K^0.03 in one pass and K^0.74 in K;
           1,000 to 16,000 dialogues take 4.1 to 25.7 s and 0.29 GB; with a vocabulary of 262,144, temporaries are
           0.87 GB where the logits alone would be 4.3.
"""

import dataclasses
import itertools
import json
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import report
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from report import Options

from dialog_jax.batching import batches
from dialog_jax.batching.batches import Batch
from dialog_jax.dialogues.parsing import read_dialogues
from dialog_jax.model import decoder
from dialog_jax.model.decoder import DecoderConfig
from dialog_jax.rendering.sequences import Renderer
from dialog_jax.rendering.tokenizers import load_tokenizer
from dialog_jax.training import optimizer, sharding, train_step
from dialog_jax.training.config import MeshConfig, OptimizerConfig
from dialog_jax.trees import dataset, prefix_tree
from dialog_jax.trees.dataset import Trees
from dialog_jax.trees.objectives import ObjectiveConfig
from dialog_jax.trees.prefix_tree import Span

_BENCHMARK = pathlib.Path(__file__).parents[1] / "scripts" / "benchmarks" / "data.py"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sizes:
    """What is varied, and what stays."""

    lengths: Sequence[int] = (512, 1024, 2048, 4096, 8192)
    """Of a row; dialogues are no longer than the first of them, and a step has the tokens of the last."""
    turns: Sequence[int] = (1, 2, 4, 8, 16, 32)
    dialogue: int = 2048
    """Tokens of the dialogue that has so many turns."""
    data_sets: Sequence[int] = (1000, 2000, 4000, 8000, 16000)
    """Dialogues."""
    vocabularies: Sequence[int] = (8192, 16384, 32768, 65536, 131072, 262144)
    rows: tuple[int, int] = (1, 4096)
    """B and T of the step whose memory is looked at; the loss holds the logits of a tile of targets of each row."""
    width: int = 128
    """Of the model: two layers, so that attention and the loss are most of the work."""
    repeats: int = 5
    """Steps that are timed, of which the median is told."""

    def model(self, vocabulary: int = 2048) -> DecoderConfig:
        """Returns a small decoder."""
        return DecoderConfig(
            family="llama",
            vocab_size=vocabulary,
            width=self.width,
            layers=2,
            heads=4,
            kv_heads=2,
            head_dim=self.width // 4,
            feed_forward=3 * self.width,
            max_length=max(*self.lengths, self.dialogue, self.rows[1]),
            rope_theta=10000.0,
            tie_embeddings=True,
        )


class Point(NamedTuple):
    """One measurement: what was varied, and what it cost."""

    x: int
    costs: dict[str, float]


def step_seconds(model: DecoderConfig, batch: Batch, *, repeats: int) -> float:
    """Returns the median seconds of an update on `batch`, [M, B, ...], compilation and the first one left out."""
    mesh = sharding.make_mesh(MeshConfig(), jax.devices()[:1])
    transform = optimizer.make_optimizer(OptimizerConfig(), repeats + 1)
    state, shardings = train_step.initialize_state(mesh, decoder.init_parameters(model, jax.random.key(0)), transform)
    update = train_step.make_train_step(model, transform, mesh, shardings, compute_dtype=jnp.float32, remat="dots")
    placed = jax.device_put(batch, sharding.batch_sharding(mesh))
    seconds = []
    for _ in range(repeats + 1):
        began = time.perf_counter()
        state, _ = jax.block_until_ready(update(state, placed))
        seconds.append(time.perf_counter() - began)
    return statistics.median(seconds[1:])


def of_lengths(sizes: Sizes, trees: Trees) -> Iterator[Point]:
    """Yields the cost of a step of about as many tokens, of the same dialogues, in rows of each length."""
    model = sizes.model()
    for length in sizes.lengths:
        count = sizes.lengths[-1] // length
        plan = batches.Plan(trees, max_length=length, max_targets=length, rows=1, micro_batches=count, seed=0)
        # An epoch's last row may be half empty. The vocabulary is not what is asked about, so a small one will do.
        batch = max(map(plan.batch, range(3)), key=lambda batch: int((batch.segment > 0).sum()))
        batch = batch._replace(tokens=batch.tokens % model.vocab_size, target=batch.target % model.vocab_size)
        seconds = step_seconds(model, batch, repeats=sizes.repeats)
        tokens = int((batch.segment > 0).sum())
        yield Point(length, {"seconds": seconds, "tokens": tokens, "microseconds a token": 1e6 * seconds / tokens})


def of_turns(sizes: Sizes) -> Iterator[Point]:
    """Yields the cost of a dialogue of one length with more and more turns: in one pass, and in one for each turn."""
    model, length = sizes.model(), sizes.dialogue
    tokens = np.random.default_rng(0).integers(0, model.vocab_size, length).astype(np.int32)
    for count in sizes.turns:
        stops = [length * (turn + 1) // count for turn in range(count)]
        starts = [stop - length // count // 2 for stop in stops]  # half of a turn is its response
        sequences = [
            (tokens[:stop], [Span(start, stop, 1.0, turn)])
            for turn, (start, stop) in enumerate(zip(starts, stops, strict=True))
        ]
        ways = {
            "one pass": dataset.concatenate_trees([prefix_tree.build_tree(sequences)]),
            "K passes": dataset.concatenate_trees([prefix_tree.build_tree([sequence]) for sequence in sequences]),
        }
        costs = {}
        for way, trees in ways.items():
            rows = batches.Plan(trees, max_length=length, max_targets=length, rows=1, micro_batches=1, seed=0)
            filled = [rows.batch(number) for number in range(rows.rows_per_epoch)]
            batch = Batch(
                *(None if arrays[0] is None else np.concatenate(arrays) for arrays in zip(*filled, strict=True))
            )
            costs[way] = step_seconds(model, batch, repeats=sizes.repeats)
        yield Point(count, costs)


def of_data_sets(sizes: Sizes, options: Options) -> Iterator[Point]:
    """Yields what preparing so many dialogues takes: those of the data, again and again under new ids."""
    lines = [line for line in pathlib.Path(options.train).read_text(encoding="utf-8").splitlines() if line.strip()]
    for count in sizes.data_sets:
        with tempfile.TemporaryDirectory() as directory:
            file = pathlib.Path(directory) / "dialogues.jsonl"
            with file.open("w", encoding="utf-8") as stream:
                for number, line in enumerate(itertools.islice(itertools.cycle(lines), count)):
                    stream.write(json.dumps({**json.loads(line), "id": str(number)}) + "\n")
            told = subprocess.run(
                [
                    *(sys.executable, str(_BENCHMARK), f"--data={file}", f"--tokenizer={options.model}"),
                    *(f"--max_length={sizes.lengths[0]}", "--steps=1"),
                ],
                check=True,
                capture_output=True,
                text=True,
            )
        figures = json.loads(told.stdout)
        names = {"seconds": "prepare_seconds", "GB": "peak_memory_gb", "GB of a worker": "peak_memory_of_a_worker_gb"}
        yield Point(count, {name: figures[key] for name, key in names.items()})


def of_vocabularies(sizes: Sizes) -> Iterator[Point]:
    """Yields the temporaries of a compiled update, and what the logits of all its tokens would take, in bytes."""
    mesh = sharding.make_mesh(MeshConfig(), jax.devices()[:1])
    transform = optimizer.make_optimizer(OptimizerConfig(), 2)
    shape = (1, *sizes.rows)
    integer, real = jax.ShapeDtypeStruct(shape, jnp.int32), jax.ShapeDtypeStruct(shape, jnp.float32)
    batch = Batch(*(integer,) * 6, weight=real, turn=integer)
    for vocabulary in sizes.vocabularies:
        model = sizes.model(vocabulary)
        state, shardings = train_step.abstract_state(model, mesh, transform)
        update = train_step.make_train_step(model, transform, mesh, shardings, compute_dtype=jnp.float32, remat="dots")
        memory = update.lower(state, batch).compile().memory_analysis()
        assert memory is not None
        costs = {
            "temporaries": memory.temp_size_in_bytes,
            "gradient of the embedding": 4 * vocabulary * sizes.width,
            "logits of B x T": 4 * vocabulary * sizes.rows[0] * sizes.rows[1],
        }
        yield Point(vocabulary, costs)


def exponent(points: Sequence[Point], name: str) -> float:
    """Returns the slope of log(cost) over log(x), by least squares: 0 is flat, 1 linear."""
    x, y = np.log([(point.x, point.costs[name]) for point in points]).T
    return float(np.polyfit(x, y, 1)[0])


def _table(what: str, points: Sequence[Point], styles: dict[str, tuple[str, float]]) -> str:
    """Styles: for each cost its format, and what it is divided by."""
    lines = [
        [f"{point.x:,}", *(format(point.costs[name] / unit, style) for name, (style, unit) in styles.items())]
        for point in points
    ]
    fitted = ["exponent", *(f"{exponent(points, name):.2f}" for name in styles)]
    return report.table([what, *styles], [*lines, fitted])


def _lines(axes: Axes, points: Sequence[Point], lines: dict[str, tuple[str, str]], unit: float = 1.0) -> None:
    """Lines: for each cost its colour and its words."""
    x = [point.x for point in points]
    for name, (color, words) in lines.items():
        axes.plot(x, [point.costs[name] / unit for point in points], color=color, marker="o", ms=3.5, label=words)
    axes.set_xscale("log", base=2)
    axes.set_xticks(x, [f"{value // 1000}k" if value >= 10000 else f"{value:,}" for value in x])
    axes.minorticks_off()
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.25)
    axes.legend(frameon=False, fontsize=9)


def _draw(measured: dict[str, list[Point]], sizes: Sizes) -> Figure:
    with report.style():
        figure, ((first, second), (third, fourth)) = plt.subplots(2, 2, figsize=(11, 7.6), layout="constrained")
        _lines(first, measured["lengths"], {"microseconds a token": (report.BLUE, "an update")})
        title = f"Short dialogues, {sizes.lengths[-1]:,} tokens a step, in rows of T"
        first.set(xlabel="T", ylabel="microseconds a token", title=title)
        ways = {"one pass": (report.BLUE, "one pass"), "K passes": (report.ORANGE, "K passes, packed")}
        _lines(second, measured["turns"], ways)
        second.set(xlabel="turns K", ylabel="seconds", title=f"A dialogue of {sizes.dialogue:,} tokens")
        _lines(third, measured["data"], {"seconds": (report.BLUE, "seconds")})
        third.set(xlabel="dialogues", title="Preparing a data set")
        third.set_xscale("linear")
        third.get_legend().remove()  # the axes say it, in the lines' colours
        third.set_ylabel("seconds", color=report.BLUE)
        memory = third.twinx()
        x = [point.x for point in measured["data"]]
        for name, style, words in (("GB", "-", "the process"), ("GB of a worker", "--", "the largest worker")):
            values = [point.costs[name] for point in measured["data"]]
            memory.plot(x, values, style, color=report.ORANGE, marker="o", ms=3.5, label=words)
        memory.set_ylabel("peak memory in GB", color=report.ORANGE)
        memory.set_ylim(bottom=0)
        memory.spines["right"].set_visible(True)
        memory.legend(frameon=False, fontsize=9, loc="lower right")
        held = {
            "logits of B x T": (report.GREY, "logits of B x T, which are never made"),
            "temporaries": (report.BLUE, "temporaries of the update"),
            "gradient of the embedding": (report.GREEN, "of these, gradient of the embedding"),
        }
        _lines(fourth, measured["vocabularies"], held, unit=1e9)
        b, t = sizes.rows
        fourth.set(xlabel="vocabulary", ylabel="GB", title=f"Memory of an update, {b} x {t:,} tokens, each a target")
        return figure


def main(options: Options, sizes: Sizes | None = None) -> None:
    sizes = sizes or Sizes()
    started = time.perf_counter()
    renderer = Renderer(load_tokenizer(options.model))
    needed = 2 * sizes.lengths[-1] // 100  # dialogues of a hundred tokens and more
    dialogues = list(itertools.islice(read_dialogues(options.train), needed))
    trees = dataset.prepare(dialogues, renderer, objective=ObjectiveConfig(), max_length=sizes.lengths[0])
    ways = {
        "vocabularies": of_vocabularies(sizes),
        "lengths": of_lengths(sizes, trees),
        "turns": of_turns(sizes),
        "data": of_data_sets(sizes, options),
    }
    measured: dict[str, list[Point]] = {}
    for name, points in ways.items():
        measured[name] = []
        for point in points:
            print(f"{name}: {point.x:,}: {point.costs}", flush=True)
            measured[name].append(point)
    gigabytes = {name: (".3f", 1e9) for name in measured["vocabularies"][0].costs}
    report.write(
        options,
        _draw(measured, sizes),
        [
            f"The model has random parameters, two layers of width {sizes.width} and a vocabulary of 2,048 where that "
            f"is not what is varied; seconds are the median of {sizes.repeats} updates in float32. The last line of "
            "each table has the exponent p of cost ~ x^p: 0 is flat, 1 is linear.",
            "## The row: the same dialogues, as many tokens a step, in longer rows",
            _table(
                "T",
                measured["lengths"],
                {"seconds": (".3f", 1), "tokens": (",.0f", 1), "microseconds a token": (".1f", 1)},
            ),
            "## Turns: a dialogue of the same length, half of it responses",
            _table("turns K", measured["turns"], {"one pass": (".3f", 1), "K passes": (".3f", 1)}),
            f"## The data set: prepared in as many processes as there are processors, to {sizes.lengths[0]:,} tokens",
            _table(
                "dialogues",
                measured["data"],
                {"seconds": (".1f", 1), "GB": (".3f", 1), "GB of a worker": (".3f", 1)},
            ),
            "## The vocabulary: what XLA sets aside for an update besides parameters and moments, in GB",
            _table("vocabulary", measured["vocabularies"], gigabytes),
        ],
        seconds=time.perf_counter() - started,
    )


if __name__ == "__main__":
    report.run_script(main, "cost_growth")
