"""Facts, charts and dialogues to one HTML file that loads nothing from elsewhere.

Texts of the data go through jinja2's escaping, into JSON without `<`, or into base64. The Vega libraries and the
page's own scripts and styles are part of the file; its policy forbids every request.
"""

import functools
import importlib.metadata
import importlib.resources
import json
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jinja2
import markupsafe
import numpy as np

from dialog_jax.audit import sentences
from dialog_jax.audit.figures import Audit
from dialog_jax.errors import UserError
from dialog_jax.evaluation.token_scores import TokenScores
from dialog_jax.rendering.sequences import Renderer
from dialog_jax.report import charts, data_charts, run_facts, token_columns
from dialog_jax.report.charts import Chart
from dialog_jax.report.dialogue_views import DialogueView
from dialog_jax.report.run_facts import Run, Table

ALTERNATIVES = 3
"""Number of likeliest tokens that are shown of each token."""
_SCRIPTS = ("tokens.js", "charts.js", "list.js", "dialogue.js", "hover.js", "page.js")
_VEGA_LITE = "6.4"
_SNIPPET = 200  # characters
_CURVES = {
    "Learning rate": "learning rate",
    "Gradient norm": "gradient norm",
    "Speed": "tokens per second",
    "Peak memory of a device": "peak memory",
}
"""What is said to be missing, by the title of its chart."""


class ScoredModel(NamedTuple):
    """A model of the page and what it says about each dialogue."""

    name: str
    scores: list[TokenScores]


@functools.cache
def bundle_vega() -> str:
    """Returns the JavaScript of Vega-Lite, Vega and vega-embed.

    Raises:
      UserError: the package that has it is not installed.
    """
    try:
        import vl_convert
    except ImportError:
        raise UserError(
            "the charts of a report need the package vl-convert-python, which is not installed. Run: pip install "
            "'dialog_jax[report]', or pip install vl-convert-python"
        ) from None
    return vl_convert.javascript_bundle("window.vegaEmbed = vegaEmbed;", vl_version=_VEGA_LITE)


def render(
    *,
    title: str,
    runs: Sequence[Run],
    audit: Audit,
    data_name: str,
    max_length: int,
    views: Sequence[DialogueView],
    models: Sequence[ScoredModel],
    renderer: Renderer,
    notes: Sequence[str],
    remarks: Sequence[str],
) -> str:
    """Returns the page.

    Args:
      runs: none, the run, or the run and the one it is compared with.
      models: none, or that before training and that of each run.
      notes: about the page as a whole.
      remarks: about dialogues that are not shown, or not completely.
    """
    texts = token_columns.Texts(renderer)
    packed = [
        token_columns.pack_dialogue(view, [model.scores[number] for model in models], texts)
        for number, view in enumerate(views)
    ]
    step_charts = charts.draw_steps({run.name: (run.metrics, run.evaluations) for run in runs}) if runs else []
    turn_charts = charts.draw_turns(_list_evaluations(runs))
    audit_charts = (
        [
            data_charts.draw_lengths(audit, max_length),
            data_charts.draw_fills(audit, max_length),
            data_charts.draw_roles(audit),
        ]
        if audit.trees
        else []
    )
    named = {f"chart-{number}": chart for number, chart in enumerate([*step_charts, *turn_charts, *audit_charts])}
    names = iter(named)
    report = {
        "models": [model.name for model in models],
        "differences": [[after, 0] for after in range(1, len(models))] + ([[1, 2]] if len(models) > 2 else []),
        "alternatives": ALTERNATIVES,
        "nats": token_columns.NATS,
        "shares": token_columns.SHARES,
        "dialogues": [
            describe_view(view, place, [model.scores[place] for model in models]) for place, view in enumerate(views)
        ],
        "charts": {name: chart._asdict() for name, chart in named.items()},
    }
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("dialog_jax.report"), autoescape=True, undefined=jinja2.StrictUndefined
    )
    return environment.get_template("report.html.jinja").render(
        title=title,
        subtitle=_describe_page(runs, models),
        tiles=_list_tiles(runs, audit),
        notes=notes,
        run=_describe_runs(runs, _take(names, step_charts), _take(names, turn_charts), step_charts),
        data={
            "name": data_name,
            "findings": audit.findings,
            "figures": sentences.describe_figures(audit),
            "charts": _take(names, audit_charts),
            "rows": Table(list(sentences.FILL_HEADINGS), sentences.list_fills(audit)),
        },
        dialogues={"note": _describe_dialogues(views, models), "hidden": remarks},
        footer=f"Made by dialog_jax {_find_version()}. This file is complete: it loads nothing from elsewhere.",
        report=report,
        texts=texts.pack(),
        search=token_columns.pack_json([_join_messages(view) for view in views]),
        packed_dialogues=packed,
        css=_read_source("report.css"),
        vega=_escape_script(bundle_vega()),
        scripts=[_read_source(name) for name in _SCRIPTS],
    )


def describe_view(view: DialogueView, place: int, scores: Sequence[TokenScores]) -> dict[str, Any]:
    """Returns what the list of dialogues holds of one."""
    tree = view.tree
    parents = tree.parent[tree.parent >= 0]
    leaves = len(tree.tokens) - len(np.unique(parents))
    first = next((message.content for message in view.dialogue.messages if message.role == "user"), "")
    return {
        "place": place,
        "name": view.dialogue.name,
        "group": view.group,
        "tokens": len(tree.tokens),
        "targets": int(np.count_nonzero(tree.weight > 0)),
        "turns": len(np.unique(tree.turn[tree.turn >= 0])),
        "branches": leaves,
        "losses": [mean_loss(tree.weight, one.nll) for one in scores],
        "roles": [message.role for message in view.dialogue.messages],
        "snippet": first if len(first) <= _SNIPPET else f"{first[:_SNIPPET]}…",
    }


def mean_loss(weight: np.ndarray, nll: np.ndarray) -> float | None:
    """Returns the weighted mean of the losses that are known, in nats; None if there is none."""
    known = np.isfinite(nll) & (weight > 0)
    if not known.any():
        return None
    return float(np.average(nll[known].astype(np.float64), weights=weight[known].astype(np.float64)))


def _take(names: Any, group: Sequence[Chart]) -> list[str]:
    return [next(names) for _ in group]


def _join_messages(view: DialogueView) -> str:
    """Returns what a search looks in: the id, and the content, tool calls and reasoning of each message."""
    texts = [str(view.dialogue.id)]
    for message in view.dialogue.messages:
        texts.append(message.content)
        if message.fields:
            texts.append(json.dumps(dict(message.fields), ensure_ascii=False, default=str))
    return "\n".join(texts)


def _list_evaluations(runs: Sequence[Run]) -> dict[str, Mapping[str, Any]]:
    """Returns held-out figures by name: before training, and of the checkpoint of each run."""
    several = len(runs) > 1
    evaluations: dict[str, Mapping[str, Any]] = {}
    for run in runs[:1]:
        if run.before:
            evaluations["before"] = run.before
    for run in runs:
        if run.after and run.after["step"]:
            name = run.name if several else "after"
            evaluations[f"{name} (step {run.checkpoint.step:,})"] = run.after
    return evaluations


def _describe_page(runs: Sequence[Run], models: Sequence[ScoredModel]) -> str:
    if not runs:
        return "Data and tokenizer, without a model: there are no losses."
    against = f", against {runs[1].name}" if len(runs) > 1 else ""
    return f"Step {runs[0].checkpoint.step:,} of {runs[0].name}{against}; models: {', '.join(m.name for m in models)}"


def _list_tiles(runs: Sequence[Run], audit: Audit) -> list[dict[str, str]]:
    """Returns the main figures, each with a label and a detail."""
    tiles = []
    for run in runs:
        prefix = f"{run.name}: " if len(runs) > 1 else ""
        for label, field, form in (("held-out loss", "loss", "{:.3f}"), ("held-out accuracy", "accuracy", "{:.1%}")):
            if run.after:
                before = f"{form.format(run.before[field])} before" if run.before else "not evaluated before"
                tiles.append(
                    {"label": prefix + label, "value": form.format(run.after[field]), "detail": before + " training"}
                )
        if run.metrics:
            seconds = run_facts.format_seconds(sum(line["seconds"] for line in run.metrics))
            value = f"{run.metrics[-1]['step']:,}"
            tiles.append({"label": f"{prefix}updates", "value": value, "detail": f"in {seconds}"})
    tiles.append(
        {
            "label": "dialogues",
            "value": f"{audit.trees:,}",
            "detail": f"with something to train on, of {audit.records:,}",
        }
    )
    if audit.tokens:
        share = f"{audit.targets / audit.tokens:.1%} of {audit.tokens:,} tokens"
        tiles.append({"label": "targets", "value": f"{audit.targets:,}", "detail": share})
    return tiles


def _describe_runs(
    runs: Sequence[Run], step_names: list[str], turn_names: list[str], step_charts: Sequence[Chart]
) -> dict[str, Any] | None:
    if not runs:
        return None
    drawn = {chart.title for chart in step_charts}
    missing = [name for title, name in _CURVES.items() if title not in drawn]
    described = []
    for run in runs:
        sets = run_facts.read_sets(run)
        headings = ["set", *(name for name, _ in sets[0].figures)] if sets else []
        described.append(
            {
                "name": run.name,
                "facts": run_facts.list_facts(run),
                "sets": Table(headings, [[one.field, *(f"{n:,}" for _, n in one.figures)] for one in sets])
                if sets
                else None,
                "named": [(one.field, named) for one in sets for named in one.named],
                "sessions": run_facts.tabulate_sessions(run),
            }
        )
    return {
        "runs": described,
        "config": run_facts.compare_configs({run.name: run.config for run in runs}),
        "step_charts": step_names,
        "turn_charts": turn_names,
        "missing": ", ".join(missing),
    }


def _describe_dialogues(views: Sequence[DialogueView], models: Sequence[ScoredModel]) -> str:
    """Returns which dialogues the page has."""
    counts: dict[str, int] = {}
    for view in views:
        counts[view.group] = counts.get(view.group, 0) + 1
    parts = ", ".join(f"the first {count:,} of the {group} data" for group, count in counts.items()) or "none"
    losses = (
        "A loss is the weighted mean over the targets of the dialogue, in nats per token."
        if models
        else "Without a model there are no losses; open a dialogue to see its tree and weights."
    )
    return f"Shown: {parts}, whole, whatever max_length is. {losses}"


def _find_version() -> str:
    try:
        return importlib.metadata.version("dialog_jax")
    except importlib.metadata.PackageNotFoundError:
        return "(not installed)"


@functools.cache
def _read_source(name: str) -> markupsafe.Markup:
    """Returns a style or a script of the page, which is not escaped."""
    source = importlib.resources.files("dialog_jax.report") / "templates" / name
    return markupsafe.Markup(source.read_text(encoding="utf-8"))


def _escape_script(source: str) -> markupsafe.Markup:
    """Returns a library's source with names of its own, and without what would end the element that it is in."""
    source = source.replace("</script", "<\\/script").replace("<!--", "<\\!--")
    return markupsafe.Markup(f"(() => {{\n{source}\n}})();")
