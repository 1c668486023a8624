"""Figures of an audit to Vega-Lite charts, as `charts` draws those of runs."""

from typing import Any

from dialog_jax.audit import sentences
from dialog_jax.audit.figures import Audit
from dialog_jax.report.charts import BLUE, GRAY, ORANGE, Chart, start_spec


def draw_lengths(audit: Audit, max_length: int) -> Chart:
    """Returns the share of dialogues up to each length, and `max_length`."""
    percentiles = audit.token_percentiles
    values: list[dict[str, Any]] = [{"x": size, "y": share / 100} for share, size in enumerate(percentiles)]
    fitting = max(0, sum(size <= max_length - audit.soft_prompt for size in percentiles) - 1)
    share = f"{fitting} %" if fitting < 100 else "all"
    spec = {
        **start_spec(f"Tokens of a dialogue: the share of dialogues up to each length; {share} fit a row", values),
        "layer": [
            {
                "mark": {"type": "area", "interpolate": "step-after", "opacity": 0.25, "color": BLUE, "line": True},
                "encoding": {
                    "x": {
                        "field": "x",
                        "type": "quantitative",
                        "title": "tokens",
                        "scale": {"type": "log", "nice": False},
                        "axis": {"format": ",d", "tickCount": 8, "grid": False},
                    },
                    "y": {
                        "field": "y",
                        "type": "quantitative",
                        "title": "share of dialogues with at most as many",
                        "stack": None,
                        "axis": {"format": ".0%", "tickCount": 5},
                    },
                    "tooltip": [
                        {"field": "y", "type": "quantitative", "title": "share", "format": ".0%"},
                        {"field": "x", "type": "quantitative", "title": "have at most, tokens", "format": ",d"},
                    ],
                },
            },
            {
                "data": {"values": [{"x": max_length}]},
                "mark": {"type": "rule", "color": ORANGE, "strokeWidth": 2, "strokeDash": [6, 3]},
                "encoding": {"x": {"field": "x", "type": "quantitative"}},
            },
        ],
    }
    sentence = f"The dashed line is max_length = {max_length:,}: of {audit.trees:,} dialogues, {share} fit a row whole."
    return Chart("Lengths of dialogues", sentence, spec, [("y", "share of dialogues"), ("x", "have at most, tokens")])


def draw_roles(audit: Audit) -> Chart:
    """Returns the number of tokens by origin."""
    values: list[dict[str, Any]] = [
        {"origin": origin, "tokens": tokens, "share": tokens / audit.tokens}
        for origin, tokens in sentences.name_roles(audit).items()
    ]
    position = {"field": "origin", "type": "nominal", "sort": None, "title": None, "axis": {"labelLimit": 280}}
    spec = {
        **start_spec("Tokens by origin", values),
        "height": 34 * len(values),
        "encoding": {
            "y": position,
            "x": {
                "field": "tokens",
                "type": "quantitative",
                "title": "tokens",
                "scale": {"domainMax": 1.2 * max(value["tokens"] for value in values)},  # room for the labels
                "axis": {"format": "~s", "tickCount": 4},
            },
            "tooltip": [
                {"field": "origin", "type": "nominal", "title": " "},
                {"field": "tokens", "type": "quantitative", "title": "tokens", "format": ",d"},
                {"field": "share", "type": "quantitative", "title": "share", "format": ".1%"},
            ],
        },
        "layer": [
            {
                "mark": {"type": "bar", "cornerRadiusEnd": 3},
                "encoding": {
                    "color": {
                        "condition": {"test": "indexof(datum.origin, 'trained') == 0", "value": BLUE},
                        "value": GRAY,
                    }
                },
            },
            {
                "mark": {"type": "text", "align": "left", "dx": 5},
                "encoding": {"text": {"field": "share", "type": "quantitative", "format": ".1%"}},
            },
        ],
    }
    columns = [("origin", "tokens of"), ("tokens", "tokens"), ("share", "share")]
    return Chart("Whose tokens", "Only trained responses have a loss; everything else is context.", spec, columns)


def draw_fills(audit: Audit, max_length: int) -> Chart:
    """Returns how full rows of several lengths are."""
    values: list[dict[str, Any]] = [
        {"length": f"{fill.max_length:,}", "used": fill.used, "rows": fill.rows, "lost": fill.targets_lost}
        for fill in audit.fills
    ]
    tooltip = [
        {"field": "length", "type": "nominal", "title": "max_length"},
        {"field": "used", "type": "quantitative", "title": "used", "format": ".1%"},
        {"field": "rows", "type": "quantitative", "title": "rows", "format": ",d"},
        {"field": "lost", "type": "quantitative", "title": "targets lost", "format": ".2%"},
    ]
    spec = {
        **start_spec("Share of the tokens of a row that are used, by max_length", values),
        "encoding": {
            "x": {"field": "length", "type": "ordinal", "sort": None, "title": "max_length", "axis": {"labelAngle": 0}},
            "y": {
                "field": "used",
                "type": "quantitative",
                "title": "share of a row that is no padding",
                "scale": {"domain": [0, 1]},
                "axis": {"format": ".0%", "tickCount": 5},
            },
            "tooltip": tooltip,
        },
        "layer": [
            {
                "mark": {"type": "bar", "cornerRadiusEnd": 3},
                "encoding": {
                    "color": {
                        "condition": {"test": f"datum.length == '{max_length:,}'", "value": BLUE},
                        "value": GRAY,
                    }
                },
            },
            {
                "mark": {"type": "text", "baseline": "bottom", "dy": -3},
                "encoding": {"text": {"field": "used", "type": "quantitative", "format": ".0%"}},
            },
        ],
    }
    columns = [("length", "max_length"), ("used", "used"), ("rows", "rows"), ("lost", "targets lost")]
    note = f"The blue bar is max_length = {max_length:,} of this config, with truncate = {audit.truncate}."
    return Chart("How full rows are", note, spec, columns)
