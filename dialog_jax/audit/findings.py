"""Findings about dialogues as training data: how often each kind occurs, and the first places.

The caller decides what to count; `finding_kinds` has the sentences.
"""

import collections
import dataclasses
from collections.abc import Mapping

from dialog_jax.audit.finding_kinds import KINDS

LEVELS = ("error", "warning", "note")
_MAX_PLACES = 10  # of each kind


@dataclasses.dataclass(frozen=True, kw_only=True)
class Finding:
    """Something that an audit found in the data."""

    kind: str
    level: str
    what: str
    count: int
    among: int
    """The total that `count` is a part of; 0 for a finding that occurs at most once."""
    remedy: str
    first: list[str]
    """The first places."""

    def __str__(self) -> str:
        share = f": {self.count:,} of {self.among:,}" if self.among else ""
        return f"{self.what}{share}. {self.remedy}"


class FindingTally:
    """Counts and first places of each kind of finding."""

    def __init__(self):
        self._counts: collections.Counter[str] = collections.Counter()
        self._first: dict[str, list[str]] = collections.defaultdict(list)

    def has_room(self, kind: str) -> bool:
        """Whether a further place would be stored, so that it is worth describing."""
        return len(self._first[kind]) < _MAX_PLACES

    def add(self, kind: str, where: str = "", *, count: int = 1) -> None:
        """Adds `count` occurrences of a kind at one place."""
        self._counts[kind] += count
        if where and self.has_room(kind):
            self._first[kind].append(where)

    def make_findings(self, totals: Mapping[str, int]) -> list[Finding]:
        """Returns the findings, the worst first."""
        findings = [
            Finding(
                kind=kind,
                level=KINDS[kind].level,
                what=KINDS[kind].what,
                count=self._counts[kind],
                among=totals[KINDS[kind].total] if KINDS[kind].total else 0,
                remedy=KINDS[kind].remedy,
                first=self._first[kind],
            )
            for kind in KINDS
            if self._counts[kind]
        ]
        return sorted(findings, key=lambda finding: LEVELS.index(finding.level))
