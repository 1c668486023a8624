"""Which criterion of `dialog_jax select` chooses the responses that teach most, for the same number of response tokens?

Question:  train on 10, 30 and 100 % of the responses of a pool, chosen by each criterion, for the same number of
           response tokens: is the held-out loss below that with random responses? Which criteria rank wrong responses
           low?
Command:   python experiments/selection.py
Hardware:  two cores of an Intel Xeon with AVX-512; 3.1 GB of memory.
Time:      45 min: 27 min for the updates of 39 runs, the rest for scores of the pools and of the held-out dialogues.
Result:    no. Random responses lower the held-out loss from 4.320 to 3.784 (10 %) and 3.769 (30 %). All criteria are
           above them: ifd by 0.026 ± 0.025 nats per token at 10 % and 0.023 ± 0.022 at 30 %, longest by 0.059 ± 0.029
           and 0.042 ± 0.025, history_gain by 0.083 ± 0.027 and 0.026 ± 0.025, perplexity by 0.232 ± 0.046 and 0.074 ±
           0.032, rho by 0.279 ± 0.042 and 0.096 ± 0.033; rho's 10 % have 4.5 tokens each and are seen 7.3 times.
           Everything does not differ from 30 % of random responses (-0.005 ± 0.022). Wrong responses are ranked low by
           perplexity (area under the ROC curve 0.61 ± 0.07), perhaps by history_gain (0.58 ± 0.07), and high by rho
           (0.42 ± 0.08). Of the ten comparisons with random responses, those of ifd and that of history_gain at 30 %
           are near their own error.
           experiments/results/selection.md, selection.png
"""

import dataclasses
import math
from collections.abc import Callable, Iterable, Mapping, Sequence, Set
from typing import NamedTuple

import harness
import matplotlib.pyplot as plt
import numpy as np
import planted
import report
import selection_runs
import short_runs
from harness import Mean
from jaxtyping import Float64
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from planted import Area
from report import Options
from selection_runs import BASELINE, CRITERIA, EVERYTHING, Choice, Experiment, Outcome, Sizes

from dialog_jax.evaluation import selection as selection_lib
from dialog_jax.inference import loading

_COLORS = {0.1: report.ORANGE, 0.3: report.BLUE, 1.0: report.GREY}
_OFFSETS = {0.1: 0.14, 0.3: -0.14, 1.0: 0.0}
_KEPT = 0.3  # share of the second pool that is kept, of which the wrong ones are counted


class Row(NamedTuple):
    """All runs of a criterion and a share, one for each seed."""

    criterion: str
    share: float
    outcomes: Mapping[int, Outcome]
    """By seed."""

    def average(self, value: Callable[[Outcome], float]) -> float:
        """Returns the mean of a number over the runs."""
        return float(np.mean([value(outcome) for outcome in self.outcomes.values()]))


class Difference(NamedTuple):
    """By how much the held-out loss of a row is above that of another one, in nats per token."""

    by_seed: list[float]
    mean: Mean
    """With the standard error over held-out dialogues and seeds."""


class Ranking(NamedTuple):
    """How a criterion ranks wrong responses."""

    area: Area
    wrong_kept: float
    """Share of wrong responses among those that are kept."""


def compare_rows(row: Row, other: Row, tokens: Float64[np.ndarray, " n"], seed_deviation: float) -> Difference:
    """Returns the difference of two rows over the seeds that both have.

    Args:
      tokens: response tokens of each held-out dialogue.
      seed_deviation: standard deviation over seeds of the difference of two runs.
    """
    seeds = sorted(row.outcomes.keys() & other.outcomes.keys())
    differences = [row.outcomes[seed].nll - other.outcomes[seed].nll for seed in seeds]
    mean = harness.mean_over(np.mean(differences, axis=0) / tokens, tokens, np.arange(len(tokens)))
    error = math.hypot(mean.error, seed_deviation / math.sqrt(len(seeds)))
    return Difference([float(one.sum() / tokens.sum()) for one in differences], Mean(mean.value, error))


def pool_deviations(by_seed: Iterable[Sequence[float]]) -> float:
    """Returns the standard deviation over seeds, pooled over rows of which each has its own mean; nan for one seed."""
    squares, freedom = 0.0, 0
    for values in by_seed:
        squares += float(np.var(values)) * len(values)
        freedom += len(values) - 1
    return math.sqrt(squares / freedom) if freedom else math.nan


def read_rows(experiment: Experiment) -> list[Row]:
    """Returns the rows of which there are runs."""
    outcomes: dict[tuple[str, float], dict[int, Outcome]] = {}
    for choice in selection_runs.list_choices(experiment.sizes):
        if outcome := selection_runs.read_outcome(experiment, choice):
            outcomes.setdefault((choice.criterion, choice.share), {})[choice.seed] = outcome
    return [Row(*key, by_seed) for key, by_seed in outcomes.items()]


def compare_all(rows: Sequence[Row], tokens: Float64[np.ndarray, " n"]) -> tuple[list[Difference], float]:
    """Returns (the difference of each row to random responses of the same share, its standard deviation over seeds).

    All responses are compared with the larger share of random ones.
    """
    baselines = {row.share: row for row in rows if row.criterion == BASELINE}
    pairs = [(row, baselines.get(row.share, baselines[max(baselines)])) for row in rows]
    by_seed = [compare_rows(row, other, tokens, 0.0).by_seed for row, other in pairs if row is not other]
    deviation = pool_deviations(by_seed)
    known = 0.0 if math.isnan(deviation) else deviation  # one seed has the errors of held-out dialogues only
    return [compare_rows(row, other, tokens, known) for row, other in pairs], deviation


def rank_wrong(experiment: Experiment, wrong: Set[tuple[str, int]]) -> dict[str, Ranking]:
    """Returns how each criterion ranks the wrong responses of the second pool."""
    turns = [
        (number, (identifier, turn["message"]))
        for number, (identifier, record) in enumerate(selection_runs.read_scores(experiment, "planted", "base").items())
        for turn in record["turns"]
    ]
    dialogue = np.array([number for number, _ in turns])
    is_wrong = np.array([key in wrong for _, key in turns])
    rankings = {}
    for criterion in CRITERIA:
        selection = selection_runs.choose(experiment, Choice(criterion, _KEPT, 0), "planted")
        is_low = selection_lib.CRITERIA[criterion].prefer == "low"
        rank = np.where(selection.eligible, -selection.value if is_low else selection.value, -np.inf)
        area = planted.measure_area(rank, is_wrong, dialogue)
        rankings[criterion] = Ranking(area, float(is_wrong[selection.weight > 0].mean()))
    return rankings


def make_table(rows: Sequence[Row], differences: Sequence[Difference], tokens: Float64[np.ndarray, " n"]) -> str:
    """Returns the table of all rows."""
    cells = []
    for row, difference in zip(rows, differences, strict=True):
        loss = row.average(lambda outcome: outcome.nll.sum() / tokens.sum())
        cells.append(
            [
                f"{row.share:.0%} {row.criterion}",
                f"{row.average(lambda outcome: outcome.responses):.0f}",
                f"{row.average(lambda outcome: outcome.kept_tokens / outcome.responses):.1f}",
                f"{row.average(lambda outcome: outcome.targets):,.0f}",
                f"{row.average(lambda outcome: outcome.targets / outcome.kept_tokens):.1f}",
                f"{row.average(lambda outcome: outcome.tokens):,.0f}",
                f"{row.average(lambda outcome: outcome.updates):.1f}",
                f"{row.average(lambda outcome: outcome.seconds) / 60:.1f}",
                f"{len(row.outcomes)}",
                f"{loss:.3f}",
                "" if _is_baseline(row) else difference.mean.signed,
            ]
        )
    header = ["chosen", "responses", "tokens each", "trained on", "times seen", "tokens read", "updates", "min"]
    return report.table([*header, "seeds", "held-out loss", "above random"], cells)


def _is_baseline(row: Row) -> bool:
    return row.criterion == BASELINE


def describe_noise(deviation: float, differences: Sequence[Difference], rows: Sequence[Row]) -> str:
    """Returns how large a difference has to be, and which are.

    Args:
      deviation: nan if there is one seed.
    """
    errors = [one.mean.error for row, one in zip(rows, differences, strict=True) if not _is_baseline(row)]
    large = [
        f"{row.share:.0%} {row.criterion} ({one.mean.value:+.3f})"
        for row, one in zip(rows, differences, strict=True)
        if not _is_baseline(row) and abs(one.mean.value) > 1.96 * one.mean.error
    ]
    seeds = (
        "There is one seed, so that the errors are those of held-out dialogues alone."
        if math.isnan(deviation)
        else f"The standard deviation over seeds of the difference of two runs is {deviation:.3f}."
    )
    return (
        f"{seeds} Differences below "
        f"{1.96 * float(np.median(errors)):.3f} (1.96 standard errors, the median of the rows) are noise; larger than "
        f"their own error are {', '.join(large) or 'none'}."
    )


def _draw_differences(axes: Axes, rows: Sequence[Row], differences: Sequence[Difference]) -> None:
    names = [criterion for criterion in (EVERYTHING, *CRITERIA) if criterion != BASELINE]
    places = {name: -number for number, name in enumerate(names)}
    labelled = set()
    for row, difference in zip(rows, differences, strict=True):
        if _is_baseline(row):
            continue
        color, y = _COLORS[row.share], places[row.criterion] + _OFFSETS[row.share]
        label = "" if row.share in labelled else f"{row.share:.0%} of the responses"
        labelled.add(row.share)
        axes.errorbar(
            difference.mean.value, y, xerr=1.96 * difference.mean.error, color=color, marker="o", capsize=3, label=label
        )
        axes.plot(difference.by_seed, [y] * len(difference.by_seed), "|", color=color, markersize=9, alpha=0.6)
    axes.axvline(0, color=report.GREY, linewidth=1.0)
    axes.set_yticks(list(places.values()), list(places))
    axes.set_ylim(0.5 - len(places), 0.5)
    axes.set(
        title="Held-out loss above that after training on as many random responses",
        xlabel="nats per token (below 0 is better); bars: 95 % intervals, ticks: seeds",
    )
    axes.legend(frameon=False)


def _draw_areas(axes: Axes, rankings: Mapping[str, Ranking]) -> None:
    for number, ranking in enumerate(rankings.values()):
        axes.errorbar(
            ranking.area.value, -number, xerr=1.96 * ranking.area.error, color=report.BLUE, marker="o", capsize=3
        )
    axes.axvline(0.5, color=report.GREY, linewidth=1.0)
    axes.set_yticks([-number for number in range(len(rankings))], list(rankings))
    axes.set_ylim(0.5 - len(rankings), 0.5)
    axes.set_xlim(0, 1)
    axes.set(
        title="Are responses of other dialogues ranked below the right ones?",
        xlabel="area under the ROC curve (0.5 is chance); bars: 95 % intervals",
    )


def draw(rows: Sequence[Row], differences: Sequence[Difference], rankings: Mapping[str, Ranking]) -> Figure:
    """Returns the figure: differences to random responses, and how wrong responses are ranked."""
    with report.style():
        figure, (left, right) = plt.subplots(1, 2, figsize=(12, 4.6), layout="constrained")
        _draw_differences(left, rows, differences)
        _draw_areas(right, rankings)
        for axes in (left, right):
            axes.grid(axis="x", alpha=0.25)
    return figure


def main(options: Options, sizes: Sizes | None = None) -> None:
    """Writes the results after each run, so that an experiment that is stopped leaves those of the runs it has made."""
    experiment = Experiment(options, sizes or Sizes())
    settings = dataclasses.asdict(experiment.sizes)
    del settings["seeds"]  # more of them add runs to those that are there
    short_runs.claim_directory(options, settings)
    wrong = selection_runs.write_data(experiment)
    base = loading.load_model(options.model)
    selection_runs.score_pools(experiment, base)
    rankings = rank_wrong(experiment, wrong)
    for name, ranking in rankings.items():
        print(f"{name}: area {ranking.area.text}, {ranking.wrong_kept:.0%} of those kept are wrong", flush=True)
    for choice in selection_runs.train_all(experiment, base):
        if choice.criterion != BASELINE:  # there is something to compare
            write(experiment, rankings)
    write(experiment, rankings)


def write(experiment: Experiment, rankings: Mapping[str, Ranking]) -> None:
    """Writes table and plot of the runs that there are."""
    options, sizes = experiment.options, experiment.sizes
    held_out = short_runs.read_lines(experiment.file("held_out", "base"))
    before, tokens = (np.array([record[field] for record in held_out], np.float64) for field in ("nll", "tokens"))
    rows = read_rows(experiment)
    differences, deviation = compare_all(rows, tokens)
    report.write(
        options,
        draw(rows, differences, rankings),
        [
            f"LoRA of rank {sizes.rank} at a learning rate of {sizes.learning_rate:g}, on rows of "
            f"{sizes.max_length} tokens, {sizes.tokens:,} response tokens in about {sizes.updates} updates. "
            f"Dialogues are cut to {short_runs.MESSAGES} messages: a pool of {sizes.pool} dialogues with "
            f"{short_runs.MESSAGES // 2 * sizes.pool} responses, {sizes.held_out} held-out dialogues with "
            f"{tokens.sum():,.0f} response tokens, and {sizes.tuning} others on which the second model of `rho` was "
            "tuned.",
            f"Held-out loss in nats per token; before training it is {before.sum() / tokens.sum():.3f}. `above random` "
            "is the difference to random responses of the same share, of everything to the largest share, paired by "
            "seed and by held-out dialogue. A seed determines the random responses, the order of the data and the "
            "initial LoRA. ± is 1.96 standard errors over held-out dialogues and seeds, the deviation of seeds pooled "
            "over all rows. Runs end with a whole update, so that their response tokens are not quite equal. `min` is "
            "the time of the updates, on a machine that other work used as well.",
            make_table(rows, differences, tokens),
            describe_noise(deviation, differences, rows),
            f"In a second pool, {sizes.planted} dialogues, {sizes.wrong:.0%} of the responses are exchanged. How often "
            f"is a right response ranked above a wrong one, and how many of the {_KEPT:.0%} that are kept are wrong? "
            "What `select` never keeps ranks last. ± is 1.96 standard errors of a bootstrap over dialogues.",
            report.table(
                ["criterion", "area under the ROC curve", f"wrong among the {_KEPT:.0%} kept"],
                [[name, ranking.area.text, f"{ranking.wrong_kept:.0%}"] for name, ranking in rankings.items()],
            ),
        ],
        seconds=None,
    )


if __name__ == "__main__":
    report.run_script(main, "selection", runs_dir="runs/selection")
