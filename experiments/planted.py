"""Responses that are known to be wrong: those of other dialogues, and how far scores rank them below the right ones.

In: records of dialogues, and the value of each response by a criterion. Out: records with wrong responses, and the area
under the ROC curve. Does not know how responses are scored.
"""

import copy
import random
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Float64, Int


class Area(NamedTuple):
    """The probability that a right response ranks above a wrong one, 0.5 by chance, and its standard error."""

    value: float
    error: float

    @property
    def text(self) -> str:
        """`0.71 ± 0.06`: with 1.96 standard errors."""
        return f"{self.value:.2f} ± {1.96 * self.error:.2f}"


def plant(
    records: Sequence[dict[str, Any]], *, share: float, seed: int = 0
) -> tuple[list[dict[str, Any]], set[tuple[str, int]]]:
    """Returns (records in which a share of the responses is wrong, the id and message index of each of these).

    At most one response of a dialogue is wrong. The wrong responses are the right ones of the same places in another
    order, so that neither their length nor their style tells them from the others:

        [u a] [u b] [u c] [u d]   ->   [u c] [u b] [u d] [u a]

    Args:
      share: of all responses; at most one per dialogue can be had.
    """
    chance = random.Random(seed)
    planted = copy.deepcopy(list(records))
    responses = sum(len(_list_responses(record)) for record in planted)
    chosen = chance.sample(planted, round(share * responses))
    places = [(record, chance.choice(_list_responses(record))) for record in chosen]
    contents = [record["messages"][index]["content"] for record, index in places]
    for (record, index), content in zip(places, contents[1:] + contents[:1], strict=True):
        record["messages"][index]["content"] = content
    return planted, {(record["id"], index) for record, index in places}


def _list_responses(record: dict[str, Any]) -> list[int]:
    return [index for index, message in enumerate(record["messages"]) if message["role"] == "assistant"]


def measure_area(
    rank: Float64[np.ndarray, " n"], is_wrong: Bool[np.ndarray, " n"], dialogue: Int[np.ndarray, " n"]
) -> Area:
    """Returns the area under the ROC curve, with the standard error of 500 bootstrap samples of dialogues.

    Args:
      rank: of each response, higher is better; equal ones count half.
      dialogue: the number of the dialogue of each response.
    """
    numbers = np.unique(dialogue)
    members = [np.flatnonzero(dialogue == number) for number in numbers]
    rng = np.random.default_rng(0)
    samples = []
    for _ in range(500):
        drawn = np.concatenate([members[index] for index in rng.integers(0, len(members), len(members))])
        if 0 < is_wrong[drawn].sum() < len(drawn):
            samples.append(_compute_area(rank[drawn], is_wrong[drawn]))
    return Area(_compute_area(rank, is_wrong), float(np.std(samples)))


def _compute_area(rank: Float64[np.ndarray, " n"], is_wrong: Bool[np.ndarray, " n"]) -> float:
    right, wrong = rank[~is_wrong][:, None], rank[is_wrong][None, :]
    return float(((right > wrong) + 0.5 * (right == wrong)).mean())
