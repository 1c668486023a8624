"""What do token, turn and dialogue means favor, on dialogues with very uneven turns?

Question:  `normalize` gives the same total weight to every token, every response or every dialogue. On data with very
           short and very long responses, and with dialogues of one or two turns next to dialogues of a dozen, which
           held-out responses gain from which choice?
Command:   python experiments/normalization.py
Hardware:  two cores of an AMD EPYC with AVX-512; 4.6 GB of memory.
Time:      26.4 min on a shared machine, 14.0 min of CPU time over both cores.
Result:    `turn` favors short responses, `token` long ones. After 20 steps, `turn` has, compared with `token`, a lower
           loss on responses of at most 4 tokens (-0.51 ± 0.33 nats per token, on 55 tokens only) and a higher one on
           those of 17 and more (+0.04 ± 0.02, ± 0.03); a lower mean over responses (-0.047 ± 0.042) and a higher one
           over tokens (+0.024 ± 0.015). `dialogue` also has a higher mean over tokens (+0.030 ± 0.014); 39 held-out
           dialogues are too few to distinguish its mean over dialogues, which it optimizes, from that of `token`
           (-0.005 ± 0.073). One order of the training data.
           experiments/results/normalization.md, normalization.png
"""

import itertools
import time
from collections.abc import Iterable, Mapping

import harness
import matplotlib.pyplot as plt
import numpy as np
import report
from harness import Losses, Mean
from jaxtyping import Float
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from report import Options

from dialog_jax.dialogues.dialogue import Dialogue
from dialog_jax.dialogues.parsing import read_dialogues
from dialog_jax.inference import loading
from dialog_jax.trees import dataset
from dialog_jax.trees.dialogue_trees import TreeConfig
from dialog_jax.trees.objectives import UNITS, ObjectiveConfig

_COLORS = {"token": report.BLUE, "turn": report.ORANGE, "dialogue": report.GREEN}
# Tokens of a response, end of turn included: the smallest and largest number in each bucket.
BUCKETS = ((1, 4), (5, 8), (9, 16), (17, 32), (33, harness.MAX_LENGTH))
_FEW_RESPONSES, _MANY_RESPONSES = 2, 12
_SHORT_RESPONSE, _LONG_RESPONSE = 3, 20  # words


def select_uneven(dialogues: Iterable[Dialogue]) -> list[Dialogue]:
    """Returns equal numbers of dialogues with few responses and with many uneven ones, alternating.

    Few is one or two. Many is a dozen or more, of which one has at most 3 words and one at least 20. Other dialogues
    are left out, as is the surplus of the more frequent kind.
    """
    few: list[Dialogue] = []
    many: list[Dialogue] = []
    for dialogue in dialogues:
        words = [len(message.content.split()) for message in dialogue.messages if message.role == "assistant"]
        if len(words) <= _FEW_RESPONSES:
            few.append(dialogue)
        elif len(words) >= _MANY_RESPONSES and min(words) <= _SHORT_RESPONSE and max(words) >= _LONG_RESPONSE:
            many.append(dialogue)
    return list(itertools.chain(*zip(few, many, strict=False)))


def weights(losses: Losses, unit: str) -> Float[np.ndarray, " n"]:
    """Returns the weight of each target in the mean over tokens, over response means or over dialogue means."""
    if unit == "token":
        return np.ones(len(losses.nll))
    return 1.0 / (harness.response_sizes(losses) if unit == "turn" else harness.dialogue_sizes(losses))


def by_unit(losses: Losses, other: Losses | None = None) -> dict[str, Mean]:
    """Returns the token, turn and dialogue mean of the loss, or of its difference from another model's."""
    values = losses.nll if other is None else losses.nll - other.nll
    return {unit: harness.mean_over(values, weights(losses, unit), losses.tree) for unit in UNITS}


def by_length(losses: Losses, other: Losses | None = None) -> list[Mean]:
    """Returns the token mean in each of `BUCKETS`, by the length of the target's response."""
    values = losses.nll if other is None else losses.nll - other.nll
    sizes = harness.response_sizes(losses)
    means = []
    for first, last in BUCKETS:
        chosen = (sizes >= first) & (sizes <= last)
        means.append(harness.mean_over(values[chosen], np.ones(int(chosen.sum())), losses.tree[chosen]))
    return means


def _bucket(first: int, last: int) -> str:
    return f"{first}-{last}" if last < harness.MAX_LENGTH else f"{first} and more"


def _draw(after: Mapping[str, Losses]) -> Figure:
    others = {name: losses for name, losses in after.items() if name != "token"}
    with report.style():
        figure, (left, right) = plt.subplots(1, 2, figsize=(12, 4.4), layout="constrained", width_ratios=[1, 1.2])
        _draw_bars(left, {name: list(by_unit(losses, after["token"]).values()) for name, losses in others.items()})
        trained_means = [f"{unit} {by_unit(after[unit], after['token'])[unit].signed}" for unit in others]
        left.set(
            title=f"Held-out means against normalize=token.\nEach at its own mean: {', '.join(trained_means)}",
            xlabel="what is averaged",
            ylabel="loss above that with normalize=token (nats)\nbelow 0 is better; bars: 95 % intervals",
        )
        left.set_xticks(range(len(UNITS)), ["tokens", "responses", "dialogues"])
        gaps = {name: by_length(losses, after["token"]) for name, losses in others.items()}
        _draw_bars(right, gaps)
        right.set_xticks(range(len(BUCKETS)), [_bucket(*bucket) for bucket in BUCKETS])
        shortest = ", ".join(f"{name} {means[0].signed}" for name, means in gaps.items())
        right.set(
            title=f"By length of the response.\n{_bucket(*BUCKETS[0])} tokens: {shortest}",
            xlabel="length of the response (tokens)",
            ylabel="loss above that with normalize=token\n(nats per token)",
        )
        right.legend(frameon=False, loc="lower right")
    return figure


def _draw_bars(axes: Axes, groups: Mapping[str, list[Mean]]) -> None:
    width = 0.8 / len(groups)
    for place, (name, means) in enumerate(groups.items()):
        x = np.arange(len(means)) + width * (place - (len(groups) - 1) / 2)
        heights = [mean.value for mean in means]
        errors = [1.96 * mean.error for mean in means]
        axes.bar(x, heights, 0.9 * width, yerr=errors, color=_COLORS[name], capsize=2, label=f"normalize={name}")
    axes.axhline(0, color=_COLORS["token"], linewidth=1.4, label="normalize=token")
    axes.grid(axis="y", alpha=0.25)


def _means_table(before: Losses, after: Mapping[str, Losses]) -> str:
    rows = [["before", *(f"{mean.value:.3f}" for mean in by_unit(before).values())]]
    for name, losses in after.items():
        rows.append([f"normalize={name}", *(f"{mean.value:.3f}" for mean in by_unit(losses).values())])
    for name in UNITS[1:]:
        rows.append([f"{name} - token", *(gap.signed for gap in by_unit(after[name], after["token"]).values())])
    return report.table(["held-out loss, nats", *(f"{unit} mean" for unit in UNITS)], rows)


def _lengths_table(before: Losses, after: Mapping[str, Losses]) -> str:
    sizes = harness.response_sizes(before)
    columns = [[f"{mean.value:.3f}" for mean in by_length(losses)] for losses in (before, *after.values())]
    columns += [[gap.signed for gap in by_length(after[name], after["token"])] for name in UNITS[1:]]
    rows = []
    for (first, last), cells in zip(BUCKETS, zip(*columns, strict=True), strict=True):
        tokens = int(((sizes >= first) & (sizes <= last)).sum())
        rows.append([_bucket(first, last), f"{tokens:,}", *cells])
    return report.table(
        ["tokens of the response", "held-out tokens", "before", *after, "turn - token", "dialogue - token"], rows
    )


def main(options: Options) -> None:
    started = time.perf_counter()
    model = loading.load_model(options.model)
    train, validation = select_uneven(read_dialogues(options.train)), select_uneven(read_dialogues(options.validation))
    trees = {
        unit: dataset.prepare(
            train,
            model.renderer,
            TreeConfig(objective=ObjectiveConfig(normalize=unit), max_length=harness.MAX_LENGTH, truncate="turns"),
        )
        for unit in UNITS
    }
    held_out = dataset.prepare(validation, model.renderer, TreeConfig(max_length=harness.MAX_LENGTH, truncate="turns"))
    trainings = harness.compare(model, trees, held_out, steps=options.steps, seed=options.seed)
    before = trainings["token"].losses[0]
    after = {name: training.losses[options.steps] for name, training in trainings.items()}
    report.write(
        options,
        _draw(after),
        [
            f"{len(train):,} training dialogues and {len(validation):,} held-out ones. Half of them have one or two "
            "responses, the other half a dozen or more, of which one has at most 3 words and one at least 20.",
            f"Three trainings from the same start on the same rows, {options.steps} steps of {harness.ROWS} rows of "
            f"{harness.MAX_LENGTH} tokens, {trainings['token'].targets:,} targets each; they differ in `normalize` "
            f"only. {harness.describe_evaluation(before)} {harness.SPREAD}",
            _means_table(before, after),
            "By length of the response, nats per token:",
            _lengths_table(before, after),
        ],
        seconds=time.perf_counter() - started,
    )


if __name__ == "__main__":
    report.run_script(main, "normalization", steps=20)
