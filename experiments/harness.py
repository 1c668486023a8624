"""Several trainings from one start, on the same rows, and what each says of the same held-out dialogues.

Enters: a loaded model, a set of trees for each training, held-out trees. Leaves: the loss of every held-out target, by
itself, at some steps of each training; and weighted means of these with their spread over dialogues. The step of a
training is that of `dialog_jax.training`; trainings differ in nothing but the weights in their trees.
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
from dialog_jax.training import optimizer, sharding
from dialog_jax.training import train_step as train_step_lib
from dialog_jax.training.config import MeshConfig, OptimizerConfig
from dialog_jax.trees import prefix_tree
from dialog_jax.trees.dataset import Trees

MAX_LENGTH = 512  # tokens of a row
ROWS = 2  # of an update, one a micro-batch
HELD_OUT_ROWS = 16
LEARNING_RATE = 1e-4
WARMUP_STEPS = 3

# What stands below a table of differences.
SPREAD = (
    "± is 1.96 standard errors of the paired difference over held-out dialogues; what another order of the training "
    "data would change is not in it."
)


class Losses(NamedTuple):
    """The loss of every target of some trees, in an order that depends on the trees alone."""

    tree: Int[np.ndarray, " n"]
    """Its number among the held-out trees."""
    node: Int[np.ndarray, " n"]
    """The target's place in its tree."""
    turn: Int[np.ndarray, " n"]
    """-1 outside responses."""
    nll: Float[np.ndarray, " n"]
    """-log p(target | ancestors), in nats."""


class Training(NamedTuple):
    """One training."""

    targets: int
    """Trained on, counted once for every time that they were."""
    losses: dict[int, Losses]
    """Of the held-out trees after so many steps; 0 is before training."""


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
    tell: Callable[[str], None] = print,
) -> dict[str, Training]:
    """Trains `model` once for each of `trainings`, always from the same start and on the same rows.

    Args:
      trainings: trees of the same dialogues under several objectives. The rows are those that the first one's sizes
        give, so no other may have more tokens in a tree.
      evaluate_every: steps between evaluations; 0 for one before and one after. The one before is made once.
      tell: given a line at every evaluation.

    Raises:
      UserError: the trainings are of different dialogues.
      FloatingPointError: a held-out loss is not finite.
    """
    first = next(iter(trainings.values()))
    _check_same_dialogues(trainings)
    plan = plan_of(first, seed)
    mesh = sharding.make_mesh(MeshConfig(), jax.devices()[:1])
    adam = OptimizerConfig(learning_rate=LEARNING_RATE, warmup_steps=min(WARMUP_STEPS, steps - 1))
    transform = optimizer.make_optimizer(adam, steps)
    score_step = train_step_lib.make_score_step(model.config, compute_dtype=jnp.float32)
    train_step = None

    def evaluate(name: str, number: int, parameters: dict) -> Losses:
        losses = held_out_losses(score_step, parameters, held_out)
        mean = losses.nll[losses.turn >= 0].mean()
        tell(f"{name}, step {number}: held-out response loss {mean:.4f}")
        if not math.isfinite(losses.nll.sum()):
            raise FloatingPointError(f"{name}, step {number}: a held-out loss is not finite. Lower the learning rate.")
        return losses

    before = evaluate("before training", 0, model.parameters)
    done = {}
    for name, trees in trainings.items():
        state, shardings = train_step_lib.initialize_state(mesh, jax.tree.map(jnp.copy, model.parameters), transform)
        if train_step is None:
            train_step = train_step_lib.make_train_step(
                model.config, transform, mesh, shardings, compute_dtype=jnp.float32, remat="dots"
            )
        targets, losses = 0, {0: before}
        for number in range(1, steps + 1):
            batch = rows_of(trees, plan, number - 1)
            state, measured = train_step(state, jax.device_put(batch, sharding.batch_sharding(mesh)))
            targets += int(measured.targets)
            if number == steps or (evaluate_every and number % evaluate_every == 0):
                losses[number] = evaluate(name, number, state.parameters)
        done[name] = Training(targets, losses)
        del state
    return done


def _check_same_dialogues(trainings: Mapping[str, Trees]) -> None:
    first_name, first = next(iter(trainings.items()))
    for name, trees in trainings.items():
        if trees.ids != first.ids or (trees.sizes()[0] > first.sizes()[0]).any():
            raise UserError(
                f"the trees of {name!r} are not of the same dialogues as those of {first_name!r}, or larger. Prepare "
                "both from one list, and name the objective with the largest trees first."
            )


def plan_of(trees: Trees, seed: int) -> batches.Plan:
    """Which trees share a row, and which rows a step."""
    return batches.Plan(trees, max_length=MAX_LENGTH, max_targets=MAX_LENGTH, rows=1, micro_batches=ROWS, seed=seed)


def rows_of(trees: Trees, plan: batches.Plan, number: int) -> Batch:
    """The batch [M, 1, ...] of step `number`: the rows of `plan`, filled with `trees`, which need not be the plan's."""
    filled = batches.fill_rows(trees, plan.rows(number), max_length=MAX_LENGTH, max_targets=MAX_LENGTH)
    return filled.map(lambda array: array[:, None])


def held_out_losses(score_step: Callable, parameters: dict, trees: Trees, *, rows: int = HELD_OUT_ROWS) -> Losses:
    """The loss of every target of the first `rows` rows of `trees`; which these are depends on the trees alone.

    Args:
      score_step: what `step.make_score_step` returns.
    """
    parts = []
    for batch, (numbers,) in batches.evaluation_batches(
        trees, max_length=MAX_LENGTH, max_targets=MAX_LENGTH, rows=1, limit=rows
    ):
        scores = score_step(parameters, batch.map(lambda array: array[0]))
        nll = np.asarray(scores.nll[0], np.float64)
        filled = 0
        for number in numbers:
            tree = trees.tree(number)
            _, nodes = prefix_tree.find_targets(tree)
            own = nll[filled : filled + len(nodes)]
            parts.append(Losses(np.full(len(nodes), number), nodes, tree.turn[nodes], own))
            filled += len(nodes)
    return Losses(*(np.concatenate(columns) for columns in zip(*parts, strict=True)))


def mean_over(values: Float[np.ndarray, " n"], weight: Float[np.ndarray, " n"], cluster: Int[np.ndarray, " n"]) -> Mean:
    """sum(weight * values) / sum(weight), with its standard error if the clusters (dialogues) were drawn at random.

    Given the differences of two models' losses of the same targets, the error is that of the paired difference. How
    much another order of the training data would have changed is not in it.

    Source: the linearised variance of a ratio of sums over clusters, as in Cochran, Sampling Techniques, chapter 6.
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


def seen(losses: Losses) -> str:
    """How much a held-out loss is a mean of, as a sentence."""
    return (
        f"Evaluated are {HELD_OUT_ROWS} rows of {MAX_LENGTH} tokens: {len(np.unique(losses.tree))} held-out dialogues."
    )


def response_sizes(losses: Losses) -> Int[np.ndarray, " n"]:
    """For each target, how many targets its response has (for one outside responses: how many there are outside)."""
    _, which, count = np.unique(np.stack([losses.tree, losses.turn]), axis=1, return_inverse=True, return_counts=True)
    return count[which.ravel()]


def dialogue_sizes(losses: Losses) -> Int[np.ndarray, " n"]:
    """For each target, how many targets its dialogue has."""
    _, which, count = np.unique(losses.tree, return_inverse=True, return_counts=True)
    return count[which]
