"""Does a window make the cost of a token independent of the length of its dialogue?

Question:  with windows, attention visits only the blocks of the last tokens. Is the time per token of one long dialogue
           per row, without packing, flat in its length, where without windows it grows?
Command:   python experiments/windows.py
Hardware:  two cores of an AMD EPYC with AVX-512.
Time:      3 min.
Result:    nearly: from 512 to 16,384 tokens the time per token grows 7.3 times without windows, 2.0 times with one of
           1,024 tokens and 1.5 times with one of 512.
"""

import dataclasses
import time
from collections.abc import Sequence

import cost_growth
import matplotlib.pyplot as plt
import numpy as np
import report
from cost_growth import Point
from report import Options

from dialog_jax.batching import batches
from dialog_jax.trees import dataset, prefix_tree
from dialog_jax.trees.prefix_tree import Span


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sizes:
    """Values of the varied sizes, and of the fixed ones."""

    lengths: Sequence[int] = (512, 1024, 2048, 4096, 8192, 16384)
    """Tokens of a dialogue and of a row. A step has as many tokens as the last of these."""
    windows: Sequence[int] = (0, 1024, 512)
    """Of both layers; 0 for none."""
    width: int = 128
    repeats: int = 3
    """Timed steps; the median is reported."""


def measure(sizes: Sizes) -> list[Point]:
    """Returns microseconds per token of an update for each length, under the name of each window."""
    longest = max(sizes.lengths)
    shape = cost_growth.Sizes(lengths=(longest,), width=sizes.width).model()
    tokens = np.random.default_rng(0).integers(0, shape.vocab_size, longest).astype(np.int32)
    points = []
    for length in sizes.lengths:
        trees = [
            prefix_tree.build_tree([(tokens[start : start + length], [Span(length // 2, length, 1.0, 0)])])
            for start in range(0, longest, length)
        ]
        plan = batches.Plan(
            dataset.concatenate_trees(trees), max_length=length, rows=1, micro_batches=len(trees), seed=0
        )
        costs = {}
        for window in sizes.windows:
            model = dataclasses.replace(shape, family="mistral", windows=(window,) * shape.layers if window else ())
            seconds = cost_growth.step_seconds(model, plan.batch(0), repeats=sizes.repeats)
            costs[name_window(window)] = 1e6 * seconds / longest
        print(f"{length:,}: {costs}", flush=True)
        points.append(Point(length, costs))
    return points


def name_window(window: int) -> str:
    """Returns the name of a window in tables."""
    return f"window {window:,}" if window else "no window"


def main(options: Options, sizes: Sizes | None = None) -> None:
    sizes = sizes or Sizes()
    started = time.perf_counter()
    points = measure(sizes)
    names = [name_window(window) for window in sizes.windows]
    with report.style():
        figure, axes = plt.subplots(figsize=(6.4, 4.2), layout="constrained")
        for name, color in zip(names, (report.GREY, report.BLUE, report.ORANGE), strict=False):
            axes.plot(
                [point.x for point in points],
                [point.costs[name] for point in points],
                color=color,
                marker="o",
                label=name,
            )
        axes.set_xscale("log", base=2)
        axes.set_xticks([point.x for point in points], [f"{point.x:,}" for point in points])
        axes.minorticks_off()
        axes.set_ylim(bottom=0)
        axes.set(xlabel="tokens of a dialogue, one per row", ylabel="microseconds per token of an update")
        axes.grid(alpha=0.25)
        axes.legend(frameon=False)
    rows = [[f"{point.x:,}", *(f"{point.costs[name]:.1f}" for name in names)] for point in points]
    report.write(
        options,
        figure,
        [
            f"Microseconds per token of an update in float32; a model of two layers of width {sizes.width} with random "
            f"parameters, medians of {sizes.repeats} updates of {max(sizes.lengths):,} tokens, half of them targets.",
            report.table(["tokens of a dialogue", *names], rows),
        ],
        seconds=time.perf_counter() - started,
    )


if __name__ == "__main__":
    report.run_script(main, "windows")
