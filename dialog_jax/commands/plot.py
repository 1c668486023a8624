"""Draws a run: loss over steps, and held-out loss by turn before and after.

    dialog_jax plot --run=runs/quickstart

Writes plot.png into the directory of the run, which is the --output_dir of dialog_jax train.
"""

import pathlib
from typing import Any

import matplotlib
from absl import flags

matplotlib.use("Agg")  # draws to files, without a display

import matplotlib.pyplot as plt
from matplotlib import ticker
from matplotlib.axes import Axes

from dialog_jax import atomic_files
from dialog_jax.commands import entry
from dialog_jax.errors import UserError
from dialog_jax.training import metrics

_RUN = flags.DEFINE_string("run", None, "Directory of a run: the --output_dir of dialog_jax train.")

_TRAIN, _HELD_OUT, _BEFORE, _AFTER = "#9aa5b1", "#3d4852", "#c2681f", "#1f5fa8"
_FEWEST_TARGETS = 100  # a turn with fewer held-out tokens is not drawn: its mean says little


def plot(run: pathlib.Path) -> pathlib.Path:
    """Returns the plot's file, drawn from `metrics.jsonl` and `evaluation.jsonl`.

    Raises:
      UserError: the run has written no figures yet.
    """
    steps = metrics.read_records(run / "metrics.jsonl")
    evaluations = metrics.read_records(run / "evaluation.jsonl")
    if not steps or not evaluations:
        raise UserError(f"{run} has no figures to draw. Name the --output_dir of dialog_jax train, after a step.")
    with plt.rc_context({"font.size": 10, "axes.spines.top": False, "axes.spines.right": False}):
        figure, (left, right) = plt.subplots(1, 2, figsize=(12, 4.2), dpi=150, layout="constrained")
        _draw_steps(left, steps, evaluations)
        _draw_turns(right, evaluations)
        file = run / "plot.png"
        with atomic_files.replace(file) as unfinished:
            figure.savefig(unfinished)
        plt.close(figure)
    return file


def _draw_steps(axes: Axes, steps: list[dict[str, Any]], evaluations: list[dict[str, Any]]) -> None:
    axes.plot([line["step"] for line in steps], [line["loss"] for line in steps], color=_TRAIN, linewidth=1.2)
    evaluated_steps, loss = [line["step"] for line in evaluations], [line["loss"] for line in evaluations]
    axes.plot(evaluated_steps, loss, color=_HELD_OUT, marker="o", markersize=4, linewidth=1.4, linestyle="--")
    title = f"Held-out loss {loss[0]:.2f}"
    axes.plot(evaluated_steps[0], loss[0], color=_BEFORE, marker="o", markersize=7)
    if len(evaluations) > 1:
        axes.plot(evaluated_steps[-1], loss[-1], color=_AFTER, marker="o", markersize=7)
        title += f" before, {loss[-1]:.2f} after {evaluated_steps[-1]:,} steps"
    axes.set(xlabel="step (updates of the weights)", ylabel="loss (nats per token)", title=title)
    _frame(axes)
    held_out = (evaluated_steps[-1], loss[-1], "held-out dialogues", _HELD_OUT)
    _label(axes, [(steps[-1]["step"], steps[-1]["loss"], "the step's own batch", "#6b7682"), held_out])


def _draw_turns(axes: Axes, evaluations: list[dict[str, Any]]) -> None:
    curves = [(evaluations[0], _BEFORE, "before")]
    if len(evaluations) > 1:
        curves.append((evaluations[-1], _AFTER, "after"))
    labels = []
    title = "Held-out loss by turn"
    for line, color, word in curves:
        single = [turn for turn in line["turns"] if isinstance(turn["turn"], int)]  # the last may be "32+"
        large = [turn for turn in single if turn["targets"] >= _FEWEST_TARGETS]
        if large:
            title = f"Held-out loss by turn, where it has {_FEWEST_TARGETS} tokens or more"
        turns = large or single
        if not turns:  # an objective that trains on no response
            axes.text(0.5, 0.5, "no response is trained on", transform=axes.transAxes, ha="center")
            return
        axes.plot(
            [turn["turn"] for turn in turns],
            [turn["loss"] for turn in turns],
            color=color,
            marker="o",
            markersize=3.5,
            linewidth=1.6,
        )
        labels.append((turns[-1]["turn"], turns[-1]["loss"], word, color))
    axes.set(
        xlabel="turn (0 is the first response of a dialogue)",
        ylabel="held-out loss (nats per token)",
        title=title,
    )
    _frame(axes)
    _label(axes, labels)


def _frame(axes: Axes) -> None:
    axes.xaxis.set_major_locator(ticker.MaxNLocator(integer=True))
    axes.margins(x=0.02, y=0.08)
    axes.grid(axis="y", alpha=0.25)


def _label(axes: Axes, ends: list[tuple[int | float, float, str, str]]) -> None:
    """Writes labels (x, y, text, color) to the right of line ends, spaced so that they do not overlap."""
    low, high = axes.get_ylim()
    spacing = 0.06 * (high - low)
    right = max(x for x, _, _, _ in ends)
    lowest = float("-inf")
    for _, y, text, color in sorted(ends, key=lambda end: end[1]):
        lowest = max(y, lowest + spacing)
        axes.annotate(
            text, (right, lowest), (9, 0), textcoords="offset points", va="center", color=color, annotation_clip=False
        )


def main() -> None:
    print(plot(pathlib.Path(entry.required(_RUN, "runs/mine"))))
