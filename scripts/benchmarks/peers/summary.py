"""Figures of all rounds -> medians, a Markdown table, a plot."""

import pathlib
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib

matplotlib.use("Agg")  # no display needed

import matplotlib.pyplot as plt

from dialog_jax.errors import UserError

OURS, BLUE, GREY = ("ours", "ours_untuned", "ours_lora"), "#1f5fa8", "#9aa3ab"
MAX_LOSS_DIFFERENCE = 1e-3  # nats per target; a contestant that differs more computes another loss
_MEDIANS = ("real_tokens_per_second", "response_tokens_per_second", "seconds_a_step", "tokens_a_step")


def summarize(
    rounds: Sequence[Mapping[str, Any]], compared: Mapping[str, Mapping[str, Any]]
) -> dict[str, dict[str, Any]]:
    """Returns {contestant: figures} in the order of their first round.

    Speeds are medians over the rounds, with the lowest and highest round as `spread`. Memory is the maximum over the
    rounds; so is compile time, since later rounds may hit a cache. The loss of the first step is that of the first
    round. A contestant has only `failed` if a round failed or if it computes another loss than dialog_jax.

    Args:
      rounds: `{"contestant": name, ...figures}` for each contestant and round.
      compared: `compared_loss` and `compared_targets` of each contestant, or `failed`.
    """
    summary: dict[str, dict[str, Any]] = {}
    for name in dict.fromkeys(one["contestant"] for one in rounds):
        runs = [one for one in rounds if one["contestant"] == name]
        if failures := [one["failed"] for one in [compared[name], *runs] if "failed" in one]:
            summary[name] = {"failed": failures[0]}
            continue
        if name not in OURS and (difference := _describe_other_loss(compared[name], compared[OURS[0]])):
            summary[name] = {"failed": difference}
            continue
        rates = [one["real_tokens_per_second"] for one in runs]
        summary[name] = {key: statistics.median(one[key] for one in runs) for key in _MEDIANS} | {
            "rounds": len(runs),
            "spread": [min(rates), max(rates)],
            "peak_memory_gb": max(one["peak_memory_gb"] for one in runs),
            "first_loss": runs[0]["first_loss"],
        }
        if "compile_seconds" in runs[0]:
            summary[name]["compile_seconds"] = max(one["compile_seconds"] for one in runs)
        summary[name] |= compared[name]
    return summary


def _describe_other_loss(peer: Mapping[str, Any], ours: Mapping[str, Any]) -> str:
    """Returns how the loss of a peer differs from ours; empty if it is the same within tolerance."""
    same = peer["compared_targets"] == ours["compared_targets"]
    if same and abs(peer["compared_loss"] - ours["compared_loss"]) <= MAX_LOSS_DIFFERENCE:
        return ""
    losses = [f"{one['compared_loss']:.5f} on {one['compared_targets']:,} targets" for one in (peer, ours)]
    return f"it computes another loss on the same dialogues: {losses[0]}; dialog_jax {losses[1]}"


def make_table(
    figures: Mapping[str, Mapping[str, Any]], labels: Mapping[str, str], unmeasured: Mapping[str, str]
) -> str:
    """Returns a Markdown table, fastest first, and a list of the contestants that were not measured with the reason."""
    header = [
        "",
        "real tokens/s",
        "lowest to highest round",
        "response tokens/s",
        "s per step",
        "real tokens per step",
        "peak memory, GB",
        "compile, s",
        "loss of step 1",
        "loss on the same dialogues",
    ]
    rows = [
        [
            labels[name],
            f"{one['real_tokens_per_second']:.1f}",
            f"{one['spread'][0]:.1f} to {one['spread'][1]:.1f}",
            f"{one['response_tokens_per_second']:.1f}",
            f"{one['seconds_a_step']:.1f}",
            f"{one['tokens_a_step']:,.0f}",
            f"{one['peak_memory_gb']:.2f}",
            f"{one['compile_seconds']:.1f}" if "compile_seconds" in one else "",
            f"{one['first_loss']:.4f}",
            f"{one['compared_loss']:.4f}",
        ]
        for name, one in rank(figures)
    ]
    lines = [header, ["---"] + ["---:"] * (len(header) - 1), *rows]
    text = "\n".join("| " + " | ".join(cells) + " |" for cells in lines)
    missing = [f"{labels[name]}: {one['failed']}" for name, one in figures.items() if "failed" in one]
    missing += [f"{name}: {why}" for name, why in unmeasured.items()]
    return text + "\n\nNot measured:\n\n" + "\n".join(f"* {line}" for line in missing) if missing else text


def rank(figures: Mapping[str, Mapping[str, Any]]) -> list[tuple[str, Mapping[str, Any]]]:
    """Returns (name, figures) of the measured contestants, fastest first."""
    measured = [(name, one) for name, one in figures.items() if "failed" not in one]
    return sorted(measured, key=lambda item: -item[1]["real_tokens_per_second"])


def make_verdict(figures: Mapping[str, Mapping[str, Any]], labels: Mapping[str, str]) -> str:
    """Returns how dialog_jax compares with the fastest peer, of full fine-tuning and of LoRA, as far as both have one.

    Raises:
      UserError: dialog_jax, or every peer, is missing in both.
    """
    measured = rank(figures)
    sentences = []
    for method, ours_name, is_method in (
        ("Full fine-tuning", OURS[0], lambda name: not name.endswith("_lora")),
        ("LoRA", "ours_lora", lambda name: name.endswith("_lora")),
    ):
        ours = next((one for name, one in measured if name == ours_name), None)
        peers = [(name, one) for name, one in measured if name not in OURS and is_method(name)]
        if ours is None or not peers:
            continue
        name, best = peers[0]
        difference = max(abs(one["compared_loss"] - ours["compared_loss"]) for _, one in peers)
        sentences.append(
            f"{method}: dialog_jax trains {ours['real_tokens_per_second'] / best['real_tokens_per_second']:.2f} times "
            f"as many real tokens per second as the fastest peer ({labels[name]}), with "
            f"{ours['peak_memory_gb'] / best['peak_memory_gb']:.2f} times its memory. Before any update, all losses on "
            f"the same {ours['compared_targets']:,} targets are within {difference:.1e} nats of ours."
        )
    if not sentences:
        raise UserError("dialog_jax, or every peer, could not be measured, so there is nothing to compare.")
    return " ".join(sentences)


def plot(figures: Mapping[str, Mapping[str, Any]], labels: Mapping[str, str], path: pathlib.Path) -> None:
    """Writes bars of speed and memory, with dialog_jax in another color."""
    shown = rank(figures)[::-1]
    panels = {
        "real_tokens_per_second": "real tokens/s",
        "response_tokens_per_second": "response tokens/s",
        "peak_memory_gb": "peak memory, GB",
    }
    with plt.rc_context({"font.size": 9, "axes.titlesize": 10, "axes.spines.top": False, "axes.spines.right": False}):
        figure, axes = plt.subplots(1, 3, figsize=(11, 1.1 + 0.42 * len(shown)), sharey=True, layout="constrained")
        for axis, (key, title) in zip(axes, panels.items(), strict=True):
            values = [one[key] for _, one in shown]
            colors = [BLUE if name in OURS else GREY for name, _ in shown]
            bars = axis.barh([labels[name] for name, _ in shown], values, color=colors, height=0.62)
            axis.bar_label(bars, [f"{value:.3g}" for value in values], padding=3)
            axis.set_title(title, loc="left")
            axis.margins(x=0.16)
        spread = [one["spread"] for _, one in shown]
        for number, (low, high) in enumerate(spread):
            axes[0].plot([low, high], [number - 0.4] * 2, color="black", linewidth=1)
        figure.savefig(path, dpi=120)
        plt.close(figure)
