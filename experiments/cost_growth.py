"""How does cost grow with the row length, the turns of a dialogue, the size of the data and the vocabulary?

Question:  the time per token of packed short dialogues should not depend on the row length, the time of a dialogue
           should not depend on its number of turns, preparing data should take time proportional to its size in bounded
           memory, and no array of size rows x tokens x vocabulary should exist. Is that so?
Command:   python experiments/cost_growth.py
Hardware:  two cores of an AMD EPYC with AVX-512.
Time:      3.7 min.
Result:    the time per token grows as T^0.09 for rows of 512 to 8,192 tokens, the time of an update as K^0.03 in one
           pass and as K^0.74 in K passes; 1,000 to 16,000 dialogues are prepared in 4.1 to 25.7 s and 0.29 GB; with a
           vocabulary of 262,144, temporaries are 0.87 GB where the logits alone would be 4.3 GB.
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
from dialog_jax.model.decoder_config import DecoderConfig
from dialog_jax.model.rotary import Rotary
from dialog_jax.rendering.sequences import Renderer
from dialog_jax.rendering.tokenizers import load_tokenizer
from dialog_jax.training import optimizer, sharding, train_step
from dialog_jax.training.config import MeshConfig
from dialog_jax.training.optimizer_config import OptimizerConfig
from dialog_jax.training.trainable import Parameters
from dialog_jax.trees import dataset, prefix_tree
from dialog_jax.trees.dataset import Trees
from dialog_jax.trees.dialogue_trees import TreeConfig
from dialog_jax.trees.prefix_tree import Span

_BENCHMARK = pathlib.Path(__file__).parents[1] / "scripts" / "benchmarks" / "data.py"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sizes:
    """Values of the varied sizes, and of the fixed ones."""

    lengths: Sequence[int] = (512, 1024, 2048, 4096, 8192)
    """Tokens per row. Dialogues have at most the first of these lengths; a step has as many tokens as the last."""
    turns: Sequence[int] = (1, 2, 4, 8, 16, 32)
    dialogue: int = 2048
    """Tokens of the dialogue whose turns are varied."""
    data_sets: Sequence[int] = (1000, 2000, 4000, 8000, 16000)
    """Number of dialogues."""
    vocabularies: Sequence[int] = (8192, 16384, 32768, 65536, 131072, 262144)
    rows: tuple[int, int] = (1, 4096)
    """B and T of the step whose memory is measured; the loss holds the logits of one tile of targets per row."""
    width: int = 128
    """Width of the model, which has two layers, so that attention and the loss dominate."""
    repeats: int = 5
    """Timed steps; the median is reported."""

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
            rotary=(Rotary(theta=10000.0),),
            tie_embeddings=True,
        )


class Point(NamedTuple):
    """The costs at one value of the varied size."""

    x: int
    costs: dict[str, float]


def step_seconds(model: DecoderConfig, batch: Batch, *, repeats: int) -> float:
    """Returns the median seconds of an update on `batch`, [M, B, ...], without compilation and the first update."""
    mesh = sharding.make_mesh(MeshConfig(), jax.devices()[:1])
    transform = optimizer.make_optimizer(OptimizerConfig(), repeats + 1)
    state = train_step.initialize_state(mesh, decoder.init_parameters(model, jax.random.key(0)), transform)
    update = train_step.make_train_step(model, transform, mesh, compute_dtype=jnp.float32, remat="dots")
    placed = jax.device_put(batch, sharding.batch_sharding(mesh))
    seconds = []
    for _ in range(repeats + 1):
        began = time.perf_counter()
        state, _ = jax.block_until_ready(update(state, placed))
        seconds.append(time.perf_counter() - began)
    return statistics.median(seconds[1:])


def measure_lengths(sizes: Sizes, trees: Trees) -> Iterator[Point]:
    """Yields the cost of a step on the same dialogues, with about as many tokens, for each row length."""
    model = sizes.model()
    for length in sizes.lengths:
        count = sizes.lengths[-1] // length
        plan = batches.Plan(trees, max_length=length, rows=1, micro_batches=count, seed=0)
        # The last row of an epoch may be half empty. A small vocabulary is enough here.
        batch = max(map(plan.batch, range(3)), key=lambda batch: int((batch.segment > 0).sum()))
        batch = batch._replace(tokens=batch.tokens % model.vocab_size, target=batch.target % model.vocab_size)
        seconds = step_seconds(model, batch, repeats=sizes.repeats)
        tokens = int((batch.segment > 0).sum())
        yield Point(length, {"seconds": seconds, "tokens": tokens, "microseconds per token": 1e6 * seconds / tokens})


def measure_turns(sizes: Sizes) -> Iterator[Point]:
    """Yields the cost of a dialogue of fixed length for each number of turns, in one pass and in K passes."""
    model, length = sizes.model(), sizes.dialogue
    tokens = np.random.default_rng(0).integers(0, model.vocab_size, length).astype(np.int32)
    for count in sizes.turns:
        stops = [length * (turn + 1) // count for turn in range(count)]
        starts = [stop - length // count // 2 for stop in stops]  # half of each turn is the response
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
            rows = batches.Plan(trees, max_length=length, rows=1, micro_batches=1, seed=0)
            filled = [rows.batch(number) for number in range(rows.rows_per_epoch)]
            batch = Batch(
                *(None if arrays[0] is None else np.concatenate(arrays) for arrays in zip(*filled, strict=True))
            )
            costs[way] = step_seconds(model, batch, repeats=sizes.repeats)
        yield Point(count, costs)


def measure_data_sets(sizes: Sizes, options: Options) -> Iterator[Point]:
    """Yields the cost of preparing each number of dialogues: those of the data, repeated under new ids."""
    lines = [line for line in pathlib.Path(options.train).read_text(encoding="utf-8").splitlines() if line.strip()]
    for count in sizes.data_sets:
        with tempfile.TemporaryDirectory() as directory:
            file = pathlib.Path(directory) / "dialogues.jsonl"
            with file.open("w", encoding="utf-8") as stream:
                for number, line in enumerate(itertools.islice(itertools.cycle(lines), count)):
                    stream.write(json.dumps({**json.loads(line), "id": str(number)}) + "\n")
            process = subprocess.run(
                [
                    *(sys.executable, str(_BENCHMARK), f"--data={file}", f"--tokenizer={options.model}"),
                    *(f"--max_length={sizes.lengths[0]}", "--steps=1"),
                ],
                check=True,
                capture_output=True,
                text=True,
            )
        figures = json.loads(process.stdout)
        names = {"seconds": "prepare_seconds", "GB": "peak_memory_gb", "GB of a worker": "peak_memory_of_a_worker_gb"}
        yield Point(count, {name: figures[key] for name, key in names.items()})


def measure_vocabularies(sizes: Sizes) -> Iterator[Point]:
    """Yields bytes: the temporaries of a compiled update, and what the logits of all its tokens would take."""
    mesh = sharding.make_mesh(MeshConfig(), jax.devices()[:1])
    transform = optimizer.make_optimizer(OptimizerConfig(), 2)
    shape = (1, *sizes.rows)
    integer, real = jax.ShapeDtypeStruct(shape, jnp.int32), jax.ShapeDtypeStruct(shape, jnp.float32)
    batch = Batch(*(integer,) * 6, weight=real, turn=integer)
    for vocabulary in sizes.vocabularies:
        model = sizes.model(vocabulary)
        state = train_step.abstract_state(Parameters(decoder.abstract_parameters(model), {}), mesh, transform)
        update = train_step.make_train_step(model, transform, mesh, compute_dtype=jnp.float32, remat="dots")
        memory = update.lower(state, batch).compile().memory_analysis()
        assert memory is not None
        costs = {
            "temporaries": memory.temp_size_in_bytes,
            "gradient of the embedding": 4 * vocabulary * sizes.width,
            "logits of B x T": 4 * vocabulary * sizes.rows[0] * sizes.rows[1],
        }
        yield Point(vocabulary, costs)


def exponent(points: Sequence[Point], name: str) -> float:
    """Returns the least-squares slope of log(cost) over log(x): 0 is constant, 1 linear."""
    x, y = np.log([(point.x, point.costs[name]) for point in points]).T
    return float(np.polyfit(x, y, 1)[0])


def _table(what: str, points: Sequence[Point], styles: dict[str, tuple[str, float]]) -> str:
    """Returns a table; `styles` has the format and the unit of each cost."""
    lines = [
        [f"{point.x:,}", *(format(point.costs[name] / unit, style) for name, (style, unit) in styles.items())]
        for point in points
    ]
    fitted = ["exponent", *(f"{exponent(points, name):.2f}" for name in styles)]
    return report.table([what, *styles], [*lines, fitted])


def _lines(axes: Axes, points: Sequence[Point], lines: dict[str, tuple[str, str]], unit: float = 1.0) -> None:
    """Plots each cost with its color and label in `lines`."""
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
        _lines(first, measured["lengths"], {"microseconds per token": (report.BLUE, "an update")})
        title = f"Short dialogues, {sizes.lengths[-1]:,} tokens a step, in rows of T"
        first.set(xlabel="T", ylabel="microseconds per token", title=title)
        ways = {"one pass": (report.BLUE, "one pass"), "K passes": (report.ORANGE, "K passes, packed")}
        _lines(second, measured["turns"], ways)
        second.set(xlabel="turns K", ylabel="seconds", title=f"A dialogue of {sizes.dialogue:,} tokens")
        _lines(third, measured["data"], {"seconds": (report.BLUE, "seconds")})
        third.set(xlabel="dialogues", title="Preparing a data set")
        third.set_xscale("linear")
        third.get_legend().remove()  # the colors of the axis labels identify the lines
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
    needed = 2 * sizes.lengths[-1] // 100  # dialogues have a hundred tokens and more
    dialogues = list(itertools.islice(read_dialogues(options.train), needed))
    trees = dataset.prepare(dialogues, renderer, TreeConfig(max_length=sizes.lengths[0], truncate="turns"))
    ways = {
        "vocabularies": measure_vocabularies(sizes),
        "lengths": measure_lengths(sizes, trees),
        "turns": measure_turns(sizes),
        "data": measure_data_sets(sizes, options),
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
            f"The model has random parameters, two layers of width {sizes.width} and, unless it is varied, a "
            f"vocabulary of 2,048. Seconds are medians of {sizes.repeats} updates in float32. The last line of each "
            "table is the exponent p of cost ~ x^p: 0 is constant, 1 is linear.",
            "## Row length: the same dialogues, as many tokens per step, in longer rows",
            _table(
                "T",
                measured["lengths"],
                {"seconds": (".3f", 1), "tokens": (",.0f", 1), "microseconds per token": (".1f", 1)},
            ),
            "## Turns: a dialogue of fixed length, half of it responses",
            _table("turns K", measured["turns"], {"one pass": (".3f", 1), "K passes": (".3f", 1)}),
            f"## Data: prepared with one process per processor, at most {sizes.lengths[0]:,} tokens per dialogue",
            _table(
                "dialogues",
                measured["data"],
                {"seconds": (".1f", 1), "GB": (".3f", 1), "GB of a worker": (".3f", 1)},
            ),
            "## Vocabulary: memory that XLA reserves for an update besides parameters and moments, in GB",
            _table("vocabulary", measured["vocabularies"], gigabytes),
        ],
        seconds=time.perf_counter() - started,
    )


if __name__ == "__main__":
    report.run_script(main, "cost_growth")
