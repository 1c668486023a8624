"""The runs of the experiment on `dialog_jax select`: data, scores, and one training for each choice of responses.

In: files of dialogues. Out: a directory with scores of the pool by two models, and for each choice a run and the losses
of the held-out dialogues. What is there is not made again. Knows no tables.
"""

import dataclasses
import pathlib
import time
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
import planted
import short_runs
from jaxtyping import Float64
from report import Options

from dialog_jax.batching.batches import Plan
from dialog_jax.dialogues import weight_file
from dialog_jax.dialogues.parsing import read_dialogues
from dialog_jax.evaluation import contexts as contexts_lib
from dialog_jax.evaluation import scoring
from dialog_jax.evaluation import selection as selection_lib
from dialog_jax.evaluation.selection import Scores, Selection
from dialog_jax.inference.loading import Model
from dialog_jax.model.lora_config import LoraConfig
from dialog_jax.training.config import DataConfig, TrainConfig
from dialog_jax.training.optimizer_config import OptimizerConfig
from dialog_jax.trees import dataset
from dialog_jax.trees.dialogue_trees import TreeConfig

BASELINE, EVERYTHING = "random", "everything"
CRITERIA = (BASELINE, "perplexity", "ifd", "history_gain", "rho", "longest")
SHARES = (0.1, 0.3)
POOLS = ("clean", "planted")
"""The dialogues to choose from, and some of them with wrong responses."""
MAX_LENGTH = 512


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sizes:
    """Numbers of dialogues, and what a run has."""

    pool: int = 200
    planted: int = 120
    """Dialogues of the pool of which a share of the responses is exchanged for those of others, in a second pool."""
    tuning: int = 120
    """Other dialogues, on which the second model of `rho` is tuned."""
    held_out: int = 96
    tokens: int = 2000
    """Response tokens that each run is trained on."""
    updates: int = 8
    """About how many each run has; what differs is the number of rows of an update."""
    tuning_updates: int = 8
    learning_rate: float = 1e-3
    rank: int = 16
    """Of LoRA."""
    seeds: Sequence[int] = (0, 1, 2)
    wrong: float = 0.2
    """Share of the responses of the second pool that are exchanged."""


class Choice(NamedTuple):
    """What one run trains on."""

    criterion: str
    share: float
    seed: int

    @property
    def name(self) -> str:
        return f"{self.criterion}-{self.share:.0%}-{self.seed}".replace("%", "")


class Outcome(NamedTuple):
    """What one run gave."""

    responses: int
    """Responses that were kept."""
    kept_tokens: int
    """Their tokens."""
    targets: int
    """Response tokens over all updates."""
    tokens: int
    """Tokens that were read, histories included."""
    updates: int
    seconds: float
    nll: Float64[np.ndarray, " dialogues"]
    """Of each held-out dialogue, summed over its responses."""


class Experiment(NamedTuple):
    """Where everything is, and how much of it."""

    options: Options
    sizes: Sizes

    @property
    def directory(self) -> pathlib.Path:
        return pathlib.Path(self.options.runs_dir)

    def file(self, *names: str) -> pathlib.Path:
        """Dialogues (`clean`, `planted`, `tuning`, `held_out`), or scores of them by a model (`clean`, `tuned`)."""
        return self.directory / f"{'.'.join(names)}.jsonl"


def write_data(experiment: Experiment) -> set[tuple[str, int]]:
    """Writes the pools, the dialogues of the tuned model and the held-out ones; returns the wrong responses."""
    options, sizes = experiment.options, experiment.sizes
    pool = short_runs.read_short(options.train, first=0, count=sizes.pool)
    changed, wrong = planted.plant(pool[: sizes.planted], share=sizes.wrong)
    tuning = short_runs.read_short(options.train, first=sizes.pool, count=sizes.tuning)
    held_out = short_runs.read_short(options.validation, first=0, count=sizes.held_out)
    for name, records in zip((*POOLS, "tuning", "held_out"), (pool, changed, tuning, held_out), strict=True):
        short_runs.write_lines(experiment.file(name), records)
    return wrong


def score(model: Model, data: pathlib.Path, out: pathlib.Path, context: str = "full") -> None:
    """Writes the scores of a file of dialogues, as `dialog_jax score --context=...` does."""
    started = time.perf_counter()
    scores = list(
        scoring.score_dialogues(
            read_dialogues(str(data)),
            model.renderer,
            model.config,
            model.parameters,
            compute_dtype=jnp.float32,
            contexts=contexts_lib.CONTEXTS[context],
        )
    )
    short_runs.write_lines(out, [score.record for score in scores])
    tokens, nll = (sum(score.record[field] for score in scores) for field in ("tokens", "nll"))
    read, seconds = sum(score.tokens_read for score in scores), time.perf_counter() - started
    print(f"{out}: {nll / tokens:.4f} nats per token; {read:,} tokens read in {seconds:.0f} s", flush=True)


def score_pools(experiment: Experiment, base: Model) -> None:
    """Tunes the second model on other dialogues, and scores the pools with both, and the held-out dialogues."""
    held_out = experiment.file("held_out", "base")
    if not held_out.exists():
        score(base, experiment.file("held_out"), held_out)
    for pool in POOLS:
        if not experiment.file(pool, "base").exists():
            score(base, experiment.file(pool), experiment.file(pool, "base"), "all")
    missing = [pool for pool in POOLS if not experiment.file(pool, "tuned").exists()]
    if missing:
        steps = experiment.sizes.tuning_updates
        directory = experiment.directory / "tuned"
        short_runs.train(make_config(experiment, experiment.file("tuning"), steps=steps), directory)
        tuned = short_runs.load_trained(directory, base)
        for pool in missing:
            score(tuned, experiment.file(pool), experiment.file(pool, "tuned"))


def make_config(
    experiment: Experiment, data: pathlib.Path, *, steps: int, rows: int = 2, weights: str = "", seed: int = 0
) -> TrainConfig:
    """Returns the config of a run.

    Args:
      rows: per update.
      weights: a file of weights for `data`.
    """
    sizes = experiment.sizes
    return TrainConfig(
        model=experiment.options.model,
        data=DataConfig(
            train=str(data),
            validation=str(experiment.file("held_out")),
            weights=weights,
            max_length=MAX_LENGTH,
            workers=0,
        ),
        lora=LoraConfig(rank=sizes.rank),
        optimizer=OptimizerConfig(learning_rate=sizes.learning_rate, warmup_steps=1),
        rows=1,
        gradient_accumulation=rows,
        steps=steps,
        evaluate_every=steps,
        evaluate_rows=1,  # held-out dialogues are scored one by one after the run
        checkpoint_every=steps,
        seed=seed,
    )


def plan_updates(targets: int, rows: int, sizes: Sizes) -> tuple[int, int]:
    """Returns (rows per update, updates) that train on about `sizes.tokens` targets.

    Args:
      targets: of one pass over the data.
      rows: of one pass.
    """
    per_row = targets / rows
    rows_per_update = max(1, round(sizes.tokens / sizes.updates / per_row))
    return rows_per_update, max(2, round(sizes.tokens / per_row / rows_per_update))  # one of them warms up


def choose(experiment: Experiment, choice: Choice, pool: str = "clean") -> Selection:
    """Returns what a criterion keeps of a pool."""
    criterion = BASELINE if choice.criterion == EVERYTHING else choice.criterion
    models = ("base", "tuned") if criterion == "rho" else ("base",)
    scores = [read_scores(experiment, pool, model) for model in models]
    return selection_lib.choose(criterion, scores, keep=choice.share, seed=choice.seed)


def read_scores(experiment: Experiment, pool: str, model: str) -> Scores:
    """Returns the scores of a pool by a model."""
    return selection_lib.read_scores(str(experiment.file(pool, model)))


def train(experiment: Experiment, choice: Choice, base: Model) -> None:
    """Trains one run, and scores the held-out dialogues with it."""
    data, weights = experiment.file("clean"), experiment.file(choice.name, "weights")
    selection = choose(experiment, choice)
    weight_file.write_file(weights, selection_lib.make_lines(read_scores(experiment, "clean", "base"), selection))
    weighted = weight_file.read_file(weights).apply(read_dialogues(str(data)))
    trees = dataset.prepare(weighted, base.renderer, TreeConfig(max_length=MAX_LENGTH))
    plan = Plan(trees, max_length=MAX_LENGTH, rows=1, micro_batches=1, seed=choice.seed)
    rows, updates = plan_updates(int(trees.sizes()[1].sum()), plan.rows_per_epoch, experiment.sizes)
    config = make_config(experiment, data, steps=updates, rows=rows, weights=str(weights), seed=choice.seed)
    directory = experiment.directory / choice.name
    short_runs.train(config, directory)
    score(short_runs.load_trained(directory, base), experiment.file("held_out"), directory / "held_out.jsonl")


def list_choices(sizes: Sizes) -> list[Choice]:
    """Returns the choices of which there is a run, seed by seed, so that the first seeds can be compared early."""
    compared = [Choice(criterion, share, 0) for share in SHARES for criterion in CRITERIA]
    return [choice._replace(seed=seed) for seed in sizes.seeds for choice in (*compared, Choice(EVERYTHING, 1.0, 0))]


def train_all(experiment: Experiment, base: Model) -> Iterator[Choice]:
    """Trains the runs that are missing; yields the choice of each."""
    for choice in list_choices(experiment.sizes):
        if not (experiment.directory / choice.name / "held_out.jsonl").exists():
            train(experiment, choice, base)
            yield choice


def read_outcome(experiment: Experiment, choice: Choice) -> Outcome | None:
    """Returns the outcome of a run; None if it is not there."""
    directory = experiment.directory / choice.name
    if not (directory / "held_out.jsonl").exists():
        return None
    updates = short_runs.read_lines(directory / "metrics.jsonl")
    selection = choose(experiment, choice)
    return Outcome(
        responses=int((selection.weight > 0).sum()),
        kept_tokens=int(selection.tokens[selection.weight > 0].sum()),
        targets=round(sum(update["targets"] for update in updates)),
        tokens=round(sum(update["tokens"] for update in updates)),
        updates=len(updates),
        seconds=sum(update["seconds"] for update in updates),
        nll=np.array([record["nll"] for record in short_runs.read_lines(directory / "held_out.jsonl")]),
    )
