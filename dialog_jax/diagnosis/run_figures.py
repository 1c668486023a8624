"""What a diagnosis is made from: the figures that a run has written, and what is measured on its model and data.

In: the directory of a run. Out: columns of numbers. Knows no findings, and loads no model.
"""

import dataclasses
import math
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float64

from dialog_jax.errors import UserError
from dialog_jax.training import metrics, run_directory

_UPDATES = (
    *("step", "epoch", "nll", "gradient_norm", "learning_rate", "skipped"),
    *("tokens", "targets", "imbalance", "row_tokens_used"),
)
_EVALUATIONS = ("step", "loss", "targets")
Columns = Mapping[str, Float64[np.ndarray, " _"]]


class ParameterChange(NamedTuple):
    """How far training has moved a parameter: a leaf, or the product of the factors of LoRA beside it."""

    path: str
    norm: float
    """Of the parameter before training; of LoRA, of the matrix that it adapts."""
    change: float
    """Norm of the difference."""


class ResponseLosses(NamedTuple):
    """Mean loss of parts of held-out responses before training, nats per token."""

    responses: int
    first: float
    """Of their first tokens."""
    middle: float
    """Of the tokens between."""
    end: float
    """Of their last tokens, if the template ends responses with a special token; otherwise nan."""


class HeldOutChange(NamedTuple):
    """The change of the loss on a sample of held-out dialogues, from before training to the best checkpoint."""

    dialogues: int
    tokens: int
    change: float
    """Nats per token."""
    error: float
    """Standard error of the change, between dialogues."""


class Overlap(NamedTuple):
    """Held-out responses that are in the training data too, behind the same user message."""

    responses: int
    """That are long enough to be compared."""
    shared: int
    first: Sequence[str]
    """Names of the first dialogues with one."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Figures:
    """The figures of a run. What could not be measured is None, and `missing` says why by the name of the field."""

    updates: Columns
    """Of metrics.jsonl; nan where a line has none."""
    evaluations: Columns
    """Of evaluation.jsonl."""
    steps: int
    """That the run is planned to have."""
    learning_rate: float
    """Peak of the schedule."""
    clip_norm: float
    changes: Sequence[ParameterChange] | None = None
    responses: ResponseLosses | None = None
    held_out: HeldOutChange | None = None
    overlap: Overlap | None = None
    missing: Mapping[str, str] = dataclasses.field(default_factory=dict)


def read_figures(run: pathlib.Path) -> Figures:
    """Returns the figures that a run has written so far.

    Raises:
      UserError: there is no run in the directory, or it has made no update yet.
    """
    if not run_directory.is_run(run):
        raise UserError(f"--run={run} holds no run. Name the --output_dir of dialog_jax train.")
    updates = metrics.read_records(run / "metrics.jsonl")
    if not updates:
        raise UserError(f"{run} has made no update yet. Diagnose it after some steps.")
    config = run_directory.read_config(run).resolve()
    return Figures(
        updates=make_columns(updates, _UPDATES),
        evaluations=make_columns(metrics.read_records(run / "evaluation.jsonl"), _EVALUATIONS),
        steps=run_directory.read_hashes(run)["steps"],
        learning_rate=config.optimizer.learning_rate,
        clip_norm=config.optimizer.clip_norm,
    )


def make_columns(records: Sequence[Mapping[str, Any]], names: Sequence[str]) -> Columns:
    """Returns one array per name; nan where a record has null or no such field."""

    def read(record: Mapping[str, Any], name: str) -> float:
        value = record.get(name)
        return math.nan if value is None else float(value)

    return {name: np.array([read(record, name) for record in records], np.float64) for name in names}
