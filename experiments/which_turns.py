"""Which responses of a dialogue should be trained: all, the last one, or all with more weight on later ones?

Question:  what does each choice do to the held-out loss of each turn, for the same number of tokens read?
Command:   python experiments/which_turns.py
Hardware:  two cores of an AMD EPYC with AVX-512; 4.6 GB of memory.
Time:      22.8 min on a shared machine, 14.1 min of CPU time over both cores.
Result:    all; no turn has a lower loss with another choice. Held-out loss before: 3.985; after 20 steps: 3.564 with
           all responses, 3.592 with turn_discount 0.7 (+0.028 ± 0.015), 3.674 with the last response only
           (+0.110 ± 0.033). The last response only has a fifth of the targets (1,559 instead of 7,737) for the same
           cost, and loses most at the first turn (+0.21 ± 0.12). More weight on later turns does not help them: its
           differences at turns 9 to 11 are within the error, and none is below 0. One order of the training data.
           experiments/results/which_turns.md, which_turns.png
"""

import time
from collections.abc import Mapping, Sequence

import harness
import matplotlib.pyplot as plt
import numpy as np
import report
from harness import Losses, Mean
from jaxtyping import Int
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from report import Options

from dialog_jax.dialogues.parsing import read_dialogues
from dialog_jax.inference import loading
from dialog_jax.trees import dataset
from dialog_jax.trees.dialogue_trees import TreeConfig
from dialog_jax.trees.objectives import ObjectiveConfig

CHOICES = {
    "all responses": ObjectiveConfig(),
    "discount 0.7": ObjectiveConfig(turn_discount=0.7),
    "last response": ObjectiveConfig(name="last"),
}
_BASE = "all responses"
_COLORS = {
    "before": report.GREY,
    "all responses": report.BLUE,
    "discount 0.7": report.GREEN,
    "last response": report.ORANGE,
}
_ALL_TURNS = (0, 1_000_000)  # all turns
_FEWEST_TARGETS = 100  # turns with fewer held-out tokens are merged, since their mean is noisy


def turn_bins(turn: Int[np.ndarray, " n"]) -> list[tuple[int, int]]:
    """Returns [(first turn, last turn)]: one bin per turn, and one bin from the first rare turn on.

    With 300, 200, 80 and 30 targets in turns 0 to 3: [(0, 0), (1, 1), (2, 3)]. If the last bin has too few targets, it
    is merged with the turn before.
    """
    counts = np.bincount(turn[turn >= 0])
    last = len(counts) - 1
    rare = np.flatnonzero(counts < _FEWEST_TARGETS)
    single = int(rare[0]) if len(rare) else len(counts)
    if single and counts[single:].sum() < _FEWEST_TARGETS:
        single -= 1
    return [(turn, turn) for turn in range(single)] + [(single, last)]


def by_turn(losses: Losses, bins: Sequence[tuple[int, int]], other: Losses | None = None) -> list[Mean]:
    """Returns the mean loss of each bin, or its difference from another model's on the same targets."""
    values = losses.nll if other is None else losses.nll - other.nll
    means = []
    for first, last in bins:
        chosen = (losses.turn >= first) & (losses.turn <= last)
        means.append(harness.mean_over(values[chosen], np.ones(int(chosen.sum())), losses.tree[chosen]))
    return means


def _name(bin_: tuple[int, int]) -> str:
    return str(bin_[0]) if bin_[0] == bin_[1] else f"{bin_[0]}-{bin_[1]}"


def _draw(before: Losses, after: Mapping[str, Losses]) -> Figure:
    bins = turn_bins(before.turn)
    with report.style():
        figure, axes = plt.subplots(1, 2, figsize=(12, 4.4), layout="constrained")
        _draw_losses(axes[0], {"before": before, **after}, bins)
        _draw_differences(axes[1], after, bins)
        for one in axes:
            one.set_xlabel("turn (0 is the first response of a dialogue)")
            one.set_xticks(range(len(bins)), [_name(each) for each in bins])
            one.grid(axis="y", alpha=0.25)
    return figure


def _draw_losses(axes: Axes, losses: Mapping[str, Losses], bins: Sequence[tuple[int, int]]) -> None:
    ends = []
    for name, each in losses.items():
        means = [mean.value for mean in by_turn(each, bins)]
        axes.plot(means, color=_COLORS[name], marker="o", markersize=3.5, linewidth=1.6)
        ends.append((len(bins) - 1.0, means[-1], name, _COLORS[name]))
    before, after = (by_turn(losses[name], [_ALL_TURNS])[0].value for name in ("before", _BASE))
    axes.set(
        title=f"Held-out loss by turn.\nOver all turns: {before:.3f} before, {after:.3f} after {_BASE}",
        ylabel="held-out loss (nats per token)",
    )
    report.label_ends(axes, ends)


def _draw_differences(axes: Axes, after: Mapping[str, Losses], bins: Sequence[tuple[int, int]]) -> None:
    others = [name for name in after if name != _BASE]
    right = len(bins) - 0.8
    axes.plot([-0.2, right], [0, 0], color=_COLORS[_BASE], linewidth=1.4)
    ends = [(right, 0.0, _BASE, _COLORS[_BASE])]
    for place, name in enumerate(others):
        means = by_turn(after[name], bins, after[_BASE])
        axes.errorbar(
            np.arange(len(bins)) + 0.14 * (place - 0.5),
            [mean.value for mean in means],
            [1.96 * mean.error for mean in means],
            color=_COLORS[name],
            marker="o",
            markersize=3.5,
            linewidth=1.2,
            capsize=2,
        )
        ends.append((right, means[-1].value, name, _COLORS[name]))
    overall = [f"{name} {by_turn(after[name], [_ALL_TURNS], after[_BASE])[0].signed}" for name in others]
    axes.set(
        title=f"Loss above that after training on {_BASE}.\nOver all turns: {', '.join(overall)}",
        ylabel="difference of loss (nats per token)\nabove 0 is worse; bars: 95 % intervals",
    )
    report.label_ends(axes, ends)


def _table(before: Losses, after: Mapping[str, Losses]) -> str:
    others = [name for name in after if name != _BASE]
    rows = []
    for each in [*turn_bins(before.turn), _ALL_TURNS]:
        targets = int(((before.turn >= each[0]) & (before.turn <= each[1])).sum())
        cells = ["all" if each == _ALL_TURNS else _name(each), f"{targets:,}"]
        cells += [f"{by_turn(losses, [each])[0].value:.3f}" for losses in (before, *after.values())]
        cells += [by_turn(after[name], [each], after[_BASE])[0].signed for name in others]
        rows.append(cells)
    differences = [f"{name} - {_BASE}" for name in others]
    return report.table(["turn", "held-out tokens", "before", *after, *differences], rows)


def main(options: Options) -> None:
    started = time.perf_counter()
    model = loading.load_model(options.model)
    dialogues = list(read_dialogues(options.train))
    trees = {
        name: dataset.prepare(
            dialogues, model.renderer, TreeConfig(objective=objective, max_length=harness.MAX_LENGTH, truncate="turns")
        )
        for name, objective in CHOICES.items()
    }
    held_out = dataset.prepare(
        read_dialogues(options.validation), model.renderer, TreeConfig(max_length=harness.MAX_LENGTH, truncate="turns")
    )
    trainings = harness.compare(model, trees, held_out, steps=options.steps, seed=options.seed)
    before = trainings[_BASE].losses[0]
    after = {name: training.losses[options.steps] for name, training in trainings.items()}
    targets = [[name, f"{training.targets:,}"] for name, training in trainings.items()]
    report.write(
        options,
        _draw(before, after),
        [
            f"Three trainings from the same start on the same rows, {options.steps} steps of {harness.ROWS} rows of "
            f"{harness.MAX_LENGTH} tokens; they differ in the weights of the responses only.",
            report.table(["trained on", "targets over all steps"], targets),
            f"Held-out loss in nats per token. {harness.describe_evaluation(before)} {harness.SPREAD}",
            _table(before, after),
        ],
        seconds=time.perf_counter() - started,
    )


if __name__ == "__main__":
    report.run_script(main, "which_turns", steps=20)
