"""A finding of a diagnosis, and what all kinds of findings share."""

from typing import NamedTuple

CONFIDENCES = ("certain", "likely", "possible")
NOISE = 2.0
"""Standard errors that an estimate has to exceed."""
FEW_STEPS = 10
"""Fewer updates have no slope worth a test."""
NAMES = 5
"""How many of many names are shown."""


class Finding(NamedTuple):
    """A reason why a run does not learn, or does less than it could."""

    confidence: str
    """`certain` for what was counted; `likely` or `possible` for what figures suggest."""
    what: str
    """With the figures."""
    remedy: str
