"""Why a run does not learn: all kinds of findings, what each needs, and the findings of a run as text.

In: figures. Knows no files and no models.
"""

from collections.abc import Callable, Mapping
from typing import NamedTuple

from dialog_jax.diagnosis import loss_findings, update_findings
from dialog_jax.diagnosis.finding import CONFIDENCES, Finding
from dialog_jax.diagnosis.run_figures import Figures


class Check(NamedTuple):
    """A function that looks for one kind of finding."""

    find: Callable[[Figures], Finding | None]
    needs: str = ""
    """The field of `Figures` that must not be None."""


CHECKS: Mapping[str, Check] = {
    "few_targets": Check(update_findings.find_few_targets),
    "skipped_steps": Check(update_findings.find_skipped),
    "learning_rate_zero": Check(update_findings.find_low_peak),
    "learning_rate_exhausted": Check(update_findings.find_exhausted),
    "learning_rate_low": Check(update_findings.find_low_rate, "changes"),
    "learning_rate_high": Check(update_findings.find_high_rate),
    "always_clipped": Check(update_findings.find_clipped),
    "no_gradient": Check(update_findings.find_no_gradient),
    "unmoved_parameters": Check(update_findings.find_unmoved, "changes"),
    "template_mismatch": Check(loss_findings.find_template, "responses"),
    "data_known": Check(loss_findings.find_known),
    "contaminated": Check(loss_findings.find_contaminated, "overlap"),
    "memorizing": Check(loss_findings.find_memorizing),
    "held_out_small": Check(loss_findings.find_small_held_out, "held_out"),
    "waste_padding": Check(update_findings.find_empty_rows),
    "waste_imbalance": Check(update_findings.find_imbalance),
    "ordering": Check(loss_findings.find_ordering),
}


def diagnose(figures: Figures) -> tuple[dict[str, Finding], dict[str, str]]:
    """Returns (all findings by kind, the most certain first; why other kinds could not be looked for)."""
    findings: dict[str, Finding] = {}
    unchecked: dict[str, str] = {}
    for kind, check in CHECKS.items():
        if check.needs and getattr(figures, check.needs) is None:
            unchecked[kind] = figures.missing.get(check.needs, "not measured")
        elif finding := check.find(figures):
            findings[kind] = finding
    ordered = sorted(findings.items(), key=lambda item: CONFIDENCES.index(item[1].confidence))
    return dict(ordered), unchecked


def format_findings(findings: Mapping[str, Finding], unchecked: Mapping[str, str]) -> str:
    """Returns the findings as lines of text, and what could not be looked for."""
    lines = []
    for kind, finding in findings.items():
        lines += [f"{kind} ({finding.confidence}): {finding.what}.", f"    {finding.remedy}"]
    kinds_by_reason: dict[str, list[str]] = {}
    for kind, reason in unchecked.items():
        kinds_by_reason.setdefault(reason, []).append(kind)
    lines += [f"not checked: {', '.join(kinds)}: {reason}" for reason, kinds in kinds_by_reason.items()]
    return "\n".join(lines)
