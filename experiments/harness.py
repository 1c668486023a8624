"""Runs several trainings from one start on the same rows, and evaluates them on the same held-out dialogues.

In: a loaded model, a set of trees for each training, held-out trees. Out: the loss of every held-out target at some
steps of each training, and weighted means of these losses with their standard error over dialogues. The step is
that of `dialog_jax.training`; trainings differ only in the weights in their trees.
"""

import math
from collections.abc import Callable, Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int

from dialog_jax.batching import batches
from dialog_jax.batching.batches import Batch
from dialog_jax.errors import UserError
from dialog_jax.inference.loading import Model
from dialog_jax.training import optimizer, score_steps, sharding
from dialog_jax.training import train_step as train_step_lib
from dialog_jax.training.config import MeshConfig
from dialog_jax.training.optimizer_config import OptimizerConfig
from dialog_jax.trees import prefix_tree
from dialog_jax.trees.dataset import Trees

MAX_LENGTH = 512  # tokens per row
ROWS = 2  # per update, one per micro-batch
HELD_OUT_ROWS = 16
LEARNING_RATE = 1e-4
WARMUP_STEPS = 3

# Explains the errors in a table of differences.
SPREAD = (
    "± is 1.96 standard errors of the paired difference over held-out dialogues; it does not include the variation "
    "between orders of the training data."
)


class Losses(NamedTuple):
    """The loss of every target of some trees, in an order that depends only on the trees."""

    tree: Int[np.ndarray, " n"]
    """Index among the held-out trees."""
    node: Int[np.ndarray, " n"]
    """Index of the target in its tree."""
    turn: Int[np.ndarray, " n"]
    """-1 outside responses."""
    nll: Float[np.ndarray, " n"]
    """-log p(target | ancestors), in nats."""


class Training(NamedTuple):
    """The outcome of one training."""

    targets: int
    """Number of targets over all steps."""
    losses: dict[int, Losses]
    """{step: losses of the held-out trees}; step 0 is before training."""


class Mean(NamedTuple):
    """A weighted mean over targets and its standard error over dialogues."""

    value: float
    error: float

    @property
    def signed(self) -> str:
        """`+0.021 ± 0.008`: with 1.96 standard errors."""
        return f"{self.value:+.3f} ± {1.96 * self.error:.3f}"


def compare(
    model: Model,
    trainings: Mapping[str, Trees],
    held_out: Trees,
    *,
    steps: int,
    seed: int,
    evaluate_every: int = 0,
    log: Callable[[str], None] = print,
) -> dict[str, Training]:
    """Trains `model` once for each of `trainings`, from the same start and on the same rows.

    Args:
      trainings: trees of the same dialogues under several objectives. The first one determines the rows, so no tree of
        the others may have more tokens.
      evaluate_every: steps between evaluations; 0 for one before and one after training.
      log: called with a line at every evaluation.

    Raises:
      UserError: the trainings have different dialogues, or a held-out loss is not finite.
    """
    first = next(iter(trainings.values()))
    _check_same_dialogues(trainings)
    plan = make_plan(first, seed)
    mesh = sharding.make_mesh(MeshConfig(), jax.devices()[:1])
    adam = OptimizerConfig(learning_rate=LEARNING_RATE, warmup_steps=min(WARMUP_STEPS, steps - 1))
    transform = optimizer.make_optimizer(adam, steps)
    score_step = score_steps.make_score_step(model.config, compute_dtype=jnp.float32)
    train_step = None

    def evaluate(name: str, number: int, parameters: dict) -> Losses:
        losses = held_out_losses(score_step, parameters, held_out)
        mean = losses.nll[losses.turn >= 0].mean()
        log(f"{name}, step {number}: held-out response loss {mean:.4f}")
        if not math.isfinite(losses.nll.sum()):
            raise UserError(f"{name}, step {number}: a held-out loss is not finite. Lower the learning rate.")
        return losses

    before = evaluate("before training", 0, model.parameters)
    results = {}
    for name, trees in trainings.items():
        state = train_step_lib.initialize_state(mesh, jax.tree.map(jnp.copy, model.parameters), transform)
        if train_step is None:
            train_step = train_step_lib.make_train_step(
                model.config, transform, mesh, compute_dtype=jnp.float32, remat="dots"
            )
        targets, losses = 0, {0: before}
        for number in range(1, steps + 1):
            batch = fill_step(trees, plan, number - 1)
            state, measured = train_step(state, jax.device_put(batch, sharding.batch_sharding(mesh)))
            targets += int(measured.targets)
            if number == steps or (evaluate_every and number % evaluate_every == 0):
                losses[number] = evaluate(name, number, state.parameters)
        results[name] = Training(targets, losses)
        del state
    return results


def _check_same_dialogues(trainings: Mapping[str, Trees]) -> None:
    first_name, first = next(iter(trainings.items()))
    for name, trees in trainings.items():
        if trees.ids != first.ids or (trees.sizes()[0] > first.sizes()[0]).any():
            raise UserError(
                f"the trees of {name!r} have other dialogues than those of {first_name!r}, or more tokens. Prepare "
                "both from one list, and put the objective with the largest trees first."
            )


def make_plan(trees: Trees, seed: int) -> batches.Plan:
    """Returns the assignment of trees to rows and of rows to steps."""
    return batches.Plan(trees, max_length=MAX_LENGTH, rows=1, micro_batches=ROWS, seed=seed)


def fill_step(trees: Trees, plan: batches.Plan, number: int) -> Batch:
    """Returns the batch [M, 1, ...] of a step: the rows of `plan`, filled with `trees` instead of the plan's trees."""
    filled = batches.fill_rows(trees, plan.rows(number), max_length=MAX_LENGTH)
    return filled.map(lambda array: array[:, None])


def held_out_losses(score_step: Callable, parameters: dict, trees: Trees, *, rows: int = HELD_OUT_ROWS) -> Losses:
    """Returns the loss of every target in the first `rows` rows of `trees`, which depend only on the trees.

    Args:
      score_step: returned by `score_steps.make_score_step`.
    """
    parts = []
    for batch, (numbers,) in batches.evaluation_batches(trees, max_length=MAX_LENGTH, rows=1, limit=rows):
        scores = score_step(parameters, batch.map(lambda array: array[0]))
        nll = np.asarray(scores.nll[0], np.float64)
        filled = 0
        for number in numbers:
            tree = trees.tree(number)
            _, nodes = prefix_tree.find_targets(tree)
            tree_nll = nll[filled : filled + len(nodes)]
            parts.append(Losses(np.full(len(nodes), number), nodes, tree.turn[nodes], tree_nll))
            filled += len(nodes)
    return Losses(*(np.concatenate(columns) for columns in zip(*parts, strict=True)))


def mean_over(values: Float[np.ndarray, " n"], weight: Float[np.ndarray, " n"], cluster: Int[np.ndarray, " n"]) -> Mean:
    """Returns sum(weight * values) / sum(weight) and its standard error over clusters (dialogues) drawn at random.

    For differences of two models' losses on the same targets, this is the error of the paired difference. It does not
    include the variation between orders of the training data.

    Source: linearized variance of a ratio of sums over clusters, as in Cochran, Sampling Techniques, chapter 6.
    """
    if not len(values):
        return Mean(math.nan, math.nan)
    total = weight.sum()
    mean = float((weight * values).sum() / total)
    _, which = np.unique(cluster, return_inverse=True)
    residual = np.bincount(which, weight * (values - mean))
    count = len(residual)
    error = math.sqrt(float((residual**2).sum()) * count / (count - 1)) / total if count > 1 else math.nan
    return Mean(mean, float(error))


def describe_evaluation(losses: Losses) -> str:
    """Returns a sentence about the number of held-out rows and dialogues."""
    return (
        f"Evaluated on {HELD_OUT_ROWS} rows of {MAX_LENGTH} tokens: {len(np.unique(losses.tree))} held-out dialogues."
    )


def response_sizes(losses: Losses) -> Int[np.ndarray, " n"]:
    """Returns, for each target, the number of targets in its response, or outside of responses in its dialogue."""
    _, which, count = np.unique(np.stack([losses.tree, losses.turn]), axis=1, return_inverse=True, return_counts=True)
    return count[which.ravel()]


def dialogue_sizes(losses: Losses) -> Int[np.ndarray, " n"]:
    """Returns, for each target, the number of targets in its dialogue."""
    _, which, count = np.unique(losses.tree, return_inverse=True, return_counts=True)
    return count[which]
