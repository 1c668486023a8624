"""Score files to weights: which responses to train on, by a number for each.

In: files of `dialog_jax score`. Out: lines for `dialogues.weight_file`. Only weights change: a dialogue stays whole, so
that every response keeps its history. Knows no models and no data.
"""

import hashlib
import math
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Float64, Int

from dialog_jax.dialogues import json_files
from dialog_jax.errors import UserError

_Turn = Mapping[str, Any]
Scores = Mapping[str | int, Mapping[str, Any]]
"""Records of `scoring.make_record` by the id of their dialogue, in the order of the file."""


class Criterion(NamedTuple):
    """What responses are chosen by."""

    measure: Callable[[_Turn, _Turn], float]
    """Of a turn of the first file and the same turn of the last one; nan if it is not defined."""
    prefer: str
    """Which values are kept unless the user says otherwise: `high` or `low`."""
    meaning: str
    needs: str = ""
    """The field of turns that --context has to write."""
    limit: float = math.inf
    """Responses of larger values are never kept."""


def _per_token(nats: float, turn: _Turn) -> float:
    return nats / turn["tokens"] if turn["tokens"] else math.nan


CRITERIA = {
    "perplexity": Criterion(
        lambda turn, _: math.exp(min(_per_token(turn["nll"], turn), 700.0)), "low", "exp(nats per token)"
    ),
    "ifd": Criterion(
        lambda turn, _: turn["nll"] / turn["nll_none"] if turn["nll_none"] else math.nan,
        "high",
        "nats with full history / nats behind the bare generation prompt",
        needs="nll_none",
        limit=1.0,
    ),
    "history_gain": Criterion(
        lambda turn, _: _per_token(turn["nll_last"] - turn["nll"], turn),
        "high",
        "nats per token behind the last user message - with full history",
        needs="nll_last",
    ),
    "rho": Criterion(
        lambda turn, tuned: _per_token(turn["nll"] - tuned["nll"], turn),
        "high",
        "nats per token of the first model - of the second",
    ),
    "length": Criterion(lambda turn, _: float(turn["tokens"]), "high", "tokens"),
    "longest": Criterion(lambda turn, _: float(turn["tokens"]), "high", "tokens"),
    "random": Criterion(lambda turn, _: math.nan, "high", "a hash of seed, id and message"),
}
BASELINES = ("random", "longest")
"""Criteria of which the direction is given."""


class Selection(NamedTuple):
    """The responses of score files in the order of the file, each with the number that it was chosen by."""

    tokens: Int[np.ndarray, " n"]
    value: Float64[np.ndarray, " n"]
    eligible: Bool[np.ndarray, " n"]
    """Whether the number is defined and within the criterion's limit."""
    weight: Float64[np.ndarray, " n"]


def read_scores(path: str) -> Scores:
    """Returns the records of a file of `dialog_jax score`.

    Raises:
      UserError: there is no such file, a line has not the fields of a record, or two dialogues have the same id.
    """
    file = pathlib.Path(path).expanduser()
    if not file.is_file():
        raise UserError(f"--scores={path}: is not a file. Make it with dialog_jax score.")
    scores: dict[str | int, Mapping[str, Any]] = {}
    for where, record in json_files.read_lines(file):
        if isinstance(record, UserError):
            raise record
        fields = {"id", "content", "turns"}
        turn_fields = {"turn", "message", "tokens", "nll"}
        if not isinstance(record, Mapping) or not fields <= record.keys():
            raise UserError(f"{where}: lacks id, content or turns of a line of scores. Score the data again.")
        if not all(isinstance(turn, Mapping) and turn_fields <= turn.keys() for turn in record["turns"]):
            raise UserError(f"{where}: a turn lacks turn, message, tokens or nll. Score the data again.")
        if record["id"] in scores:
            raise UserError(
                f"{where}: has the id {record['id']!r} of an earlier line. Give each dialogue another id, or omit the "
                "ids, and score the data again."
            )
        scores[record["id"]] = record
    if not any(record["turns"] for record in scores.values()):
        raise UserError(f"{file.name}: has no scored response. Score data with responses.")
    return scores


def measure(name: str, files: Sequence[Scores], *, seed: int = 0) -> Float64[np.ndarray, " n"]:
    """Returns the number of each response, nan where it is not defined.

    Args:
      name: of the criterion.
      files: one, or for `rho` those of two models.
      seed: of `random`.

    Raises:
      UserError: the files have not what the criterion needs, or are not of the same data.
    """
    criterion = CRITERIA[name]
    needed = 2 if name == "rho" else 1
    if len(files) != needed:
        raise UserError(f"--criterion={name} needs {needed} file{'s' * (needed > 1)} in --scores; got {len(files)}.")
    first, last = files[0], files[-1]
    if first is not last:
        _check_same_responses(first, last)
    if name == "random":
        return np.array([_draw(seed, identifier, turn) for identifier, turn, _ in _pair_turns(first, last)])
    for identifier, turn, _ in _pair_turns(first, last):
        if criterion.needs and criterion.needs not in turn:
            raise UserError(
                f"--criterion={name} needs {criterion.needs}, which turn {turn['turn']} of dialogue {identifier} has "
                f"not. Score with --context={criterion.needs.removeprefix('nll_')} or all."
            )
    return np.array([criterion.measure(turn, other) for _, turn, other in _pair_turns(first, last)])


def choose(
    name: str,
    files: Sequence[Scores],
    *,
    keep: float | None = None,
    threshold: float | None = None,
    prefer: str = "",
    seed: int = 0,
) -> Selection:
    """Returns the responses with their weights: 1 and 0, or numbers by rank if neither a share nor a threshold is kept.

    Args:
      keep: share of the responses to keep, above 0 and at most 1. Equal values are in a random order.
      threshold: the smallest value to keep, or the largest one if low values are preferred.
      prefer: `high` or `low`; empty for the criterion's own.

    Raises:
      UserError: what `measure` raises, or nothing is kept.
    """
    criterion = CRITERIA[name]
    value = measure(name, files, seed=seed)
    turns = [(identifier, turn) for identifier, turn, _ in _pair_turns(files[0], files[-1])]
    sign = -1.0 if (prefer or criterion.prefer) == "low" else 1.0
    eligible = np.isfinite(value) & ~(value > criterion.limit)
    weight = np.zeros(len(value))
    candidates = np.flatnonzero(eligible)
    if threshold is not None:
        weight[candidates] = sign * value[candidates] >= sign * threshold
    elif keep is not None:
        ties = np.array([_draw(seed, *turn) for turn in turns])
        order = candidates[np.lexsort((ties[candidates], -sign * value[candidates]))]
        weight[order[: max(1, round(keep * len(value)))]] = 1
    else:
        weight[candidates] = weigh_by_rank(sign * value[candidates])
    if not weight.any():
        within = (
            f"values are {value[candidates].min():.4g} to {value[candidates].max():.4g}"
            if len(candidates)
            else ("no value is defined and within the limit")
        )
        raise UserError(f"--criterion={name} keeps no response: {within}. Change --threshold, or the criterion.")
    return Selection(np.array([turn["tokens"] for _, turn in turns]), value, eligible, weight)


def weigh_by_rank(value: Float64[np.ndarray, " n"]) -> Float64[np.ndarray, " n"]:
    """Returns weights that grow evenly from the smallest value to the largest and have the mean 1; equal values share.

    [0.1, 30.0, 0.2, 0.2]   ->   [0.25, 1.75, 1.0, 1.0]
    """
    _, inverse, counts = np.unique(value, return_inverse=True, return_counts=True)
    rank = np.cumsum(counts) - (counts + 1) / 2  # from 0, the mean of equal values
    return (2 * rank[inverse] + 1) / max(len(value), 1)


def make_lines(scores: Scores, selection: Selection) -> list[dict[str, Any]]:
    """Returns the lines of a weight file, one for each dialogue, in the order of the score file."""
    lines, start = [], 0
    for identifier, record in scores.items():
        stop = start + len(record["turns"])
        line: dict[str, Any] = {
            "id": identifier,
            "content": record["content"],
            "turns": [
                {
                    "turn": turn["turn"],
                    "message": turn["message"],
                    "weight": float(f"{weight:.6g}"),
                    "value": float(f"{value:.6g}") if math.isfinite(value) else None,
                }
                for turn, weight, value in zip(
                    record["turns"], selection.weight[start:stop], selection.value[start:stop], strict=True
                )
            ],
        }
        if "turns_cut" in record:
            line["turns_cut"] = record["turns_cut"]
        lines.append(line)
        start = stop
    return lines


def _pair_turns(first: Scores, last: Scores) -> list[tuple[str | int, _Turn, _Turn]]:
    """Returns (id of the dialogue, its turn in the first file, the same turn in the last file) of each response."""
    return [
        (identifier, turn, other)
        for identifier, record in first.items()
        for turn, other in zip(record["turns"], last[identifier]["turns"], strict=True)
    ]


def _check_same_responses(first: Scores, last: Scores) -> None:
    """Raises UserError unless both files have scores of the same responses, in the same tokens."""
    if different := first.keys() ^ last.keys():
        raise UserError(
            f"--scores: {len(different):,} dialogues are in only one of the files, such as "
            f"{min(different, key=str)!r}. Score the same data with both models."
        )
    for identifier, record in first.items():
        other = last[identifier]
        if record["content"] != other["content"]:
            raise UserError(f"--scores: dialogue {identifier} differs between the files. Score the same data.")
        one, two = ([(turn["message"], turn["tokens"]) for turn in each["turns"]] for each in (record, other))
        if one != two:
            raise UserError(
                f"--scores: dialogue {identifier} has the messages and numbers of tokens {one} in the first file and "
                f"{two} in the second. Score with models of the same tokenizer, template and context."
            )


def _draw(seed: int, identifier: str | int, turn: _Turn) -> float:
    """Returns a number in [0, 1) that depends on the seed, the dialogue's id and the message only."""
    digest = hashlib.sha256(f"{seed}\0{identifier}\0{turn['message']}".encode("utf-8", errors="surrogatepass")).digest()
    return int.from_bytes(digest[:8], "big") / 2.0**64
