"""Figures of runs to Vega-Lite charts, each with the columns of its table.

A page draws them with Vega-Lite's JavaScript, which is part of the page. Colors and dashes are chosen so that lines can
be told apart on a light and on a dark background, and without colors. Knows no HTML.
"""

import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

_MAX_POINTS = 1500  # of a curve; more are averaged
BLUE, ORANGE, GREEN, GRAY = "#2f78c4", "#c9701a", "#1f8f63", "#7d8797"
_DASHES = {BLUE: [1, 0], ORANGE: [6, 3], GREEN: [2, 2], GRAY: [1, 0]}
_HEIGHT = 220  # pixels
_WHOLE = "datum.value % 1 ? '' : format(datum.value, ',d')"  # there is no step 1.5
_Point = tuple[int | float | str, int | float]  # x, y


class Chart(NamedTuple):
    """A chart and what stands beside it."""

    title: str
    note: str
    spec: dict[str, Any]
    columns: list[tuple[str, str]]
    """(field of the spec's data, heading) of each column of the chart's table."""
    zoom: tuple[int | float, int | float] | None = None
    """The ends of the horizontal axis, if it can be zoomed."""


class Line(NamedTuple):
    """A curve: (x, y) points under a name."""

    name: str
    color: str
    points: Sequence[_Point]
    marked: bool = False
    """Whether each point has a mark."""


def draw_steps(runs: Mapping[str, tuple[list[dict[str, Any]], list[dict[str, Any]]]]) -> list[Chart]:
    """Returns the curves of runs over their steps; a figure that no run recorded has no chart.

    Args:
      runs: (metrics, evaluations) by the name of the run.
    """
    several = len(runs) > 1
    loss = []
    for (name, (steps, evaluations)), colors in zip(runs.items(), ((GRAY, BLUE), (GREEN, ORANGE)), strict=False):
        label = f"{name}: " if several else ""
        loss.append(Line(f"{label}the step's own batch", colors[0], _read_points(steps, "loss")))
        loss.append(Line(f"{label}held-out dialogues", colors[1], _read_points(evaluations, "loss"), marked=True))
    charts = [_draw_lines("Loss", "loss, nats per token", loss)]
    for title, unit, fields in (
        ("Learning rate", "learning rate", {"learning_rate": ""}),
        ("Gradient norm", "norm before clipping", {"gradient_norm": ""}),
        (
            "Speed",
            "tokens per second",
            {"tokens_per_second": "all tokens", "response_tokens_per_second": "response tokens"},
        ),
        ("Peak memory of a device", "GB", {"peak_memory_gb": ""}),
    ):
        lines = []
        palette = itertools.cycle((BLUE, ORANGE, GREEN, GRAY))
        for name, (steps, _) in runs.items():
            for field, label in fields.items():
                names = [name] * (several or not label) + [label] * bool(label)
                lines.append(Line(", ".join(names), next(palette), _read_points(steps, field)))
        charts.append(_draw_lines(title, unit, lines))
    return [chart for chart in charts if chart.spec["data"]["values"]]


def _read_points(records: Iterable[Mapping[str, Any]], field: str) -> list[_Point]:
    return [(one["step"], one[field]) for one in records if one.get(field) is not None]


def _draw_lines(title: str, unit: str, lines: Sequence[Line]) -> Chart:
    lines = [line for line in lines if line.points]
    longest = max((len(line.points) for line in lines), default=0)
    bucket = max(1, math.ceil(longest / _MAX_POINTS))
    lines = [line if line.marked else line._replace(points=_average(line.points, bucket)) for line in lines]
    note = f"Each point is the mean of {bucket} steps." if bucket > 1 else ""
    places = [float(x) for line in lines for x, _ in line.points]
    spec = _make_line_spec(title, lines, x="step", x_type="quantitative", y=unit)
    zoom = (min(places), max(places)) if len(set(places)) > 1 else None
    return Chart(title, note, spec, [("line", "line"), ("x", "step"), ("y", unit)], zoom)


def _average(points: Sequence[_Point], size: int) -> list[_Point]:
    """Returns the means of `size` points each, at the place of the last of them."""
    if size == 1:
        return list(points)
    parts = [points[start : start + size] for start in range(0, len(points), size)]
    return [(part[-1][0], sum(y for _, y in part) / len(part)) for part in parts]


def _make_line_spec(title: str, lines: Sequence[Line], *, x: str, x_type: str, y: str) -> dict[str, Any]:
    names = [line.name for line in lines]
    values = [
        {"x": place, "y": value, "line": line.name, "marked": line.marked}
        for line in lines
        for place, value in line.points
    ]
    legend = {
        "title": None,
        "orient": "top",
        "labelLimit": 320,
        "symbolType": "stroke",
        "symbolSize": 500,
        "symbolStrokeWidth": 3,
        "symbolOpacity": 1,
    }
    colors = {
        "field": "line",
        "type": "nominal",
        "scale": {"domain": names, "range": [line.color for line in lines]},
        "legend": legend if len(lines) > 1 else None,
    }
    dashes = {
        "field": "line",
        "type": "nominal",
        "scale": {"domain": names, "range": [_DASHES[line.color] for line in lines]},
        "legend": legend if len(lines) > 1 else None,
    }
    place: dict[str, Any] = {"field": "x", "type": x_type, "title": x}
    if x_type == "quantitative":
        place |= {"scale": {"nice": False}, "axis": {"labelExpr": _WHOLE, "grid": False}}
    else:
        place |= {"sort": None, "axis": {"labelAngle": 0, "labelOverlap": True, "grid": False}}
    tooltip = [
        {"field": "line", "type": "nominal", "title": " "},
        {"field": "x", "type": "nominal", "title": x},
        {"field": "y", "type": "quantitative", "title": y, "format": ".4~g"},
    ]
    hover = {
        "name": "hover",
        "select": {"type": "point", "on": "pointerover", "nearest": True, "clear": "pointerout", "toggle": False},
    }
    zoom = {
        "name": "zoom",
        "select": {"type": "interval", "encodings": ["x"], "zoom": "wheel![event.altKey || event.ctrlKey]"},
        "bind": "scales",
    }
    line = {"mark": {"type": "line", "clip": True, "strokeWidth": 2}, "encoding": {"strokeDash": dashes}}
    if x_type == "quantitative":
        line["params"] = [zoom]
    return {
        **start_spec(f"{title}: {', '.join(names)}", values),
        "encoding": {
            "x": place,
            "y": {
                "field": "y",
                "type": "quantitative",
                "title": y,
                "scale": {"zero": False},
                "axis": {"tickCount": 5, "labelExpr": "format(datum.value, '.4~g')"},
            },
            "color": colors,
        },
        "layer": [
            line,
            *[
                {"transform": [{"filter": "datum.marked"}], "mark": {"type": "point", "filled": True, "clip": True}}
                for _ in range(any(one.marked for one in lines))
            ],
            {
                "mark": {"type": "point", "filled": True, "size": 90, "clip": True},
                "params": [hover],
                "encoding": {
                    "tooltip": tooltip,
                    "opacity": {"condition": {"param": "hover", "empty": False, "value": 1}, "value": 0},
                },
            },
        ],
    }


def start_spec(description: str, values: list[dict[str, Any]]) -> dict[str, Any]:
    """Returns what every chart has.

    Args:
      description: what a screen reader says of it.
    """
    return {
        "$schema": "https://vega.github.io/schema/vega-lite/v6.json",
        "description": description,
        "width": "container",
        "height": _HEIGHT,
        "data": {"values": values},
    }


def draw_turns(evaluations: Mapping[str, Mapping[str, Any]]) -> list[Chart]:
    """Returns held-out loss and accuracy by turn; none if no response is trained on.

    Args:
      evaluations: figures by a name such as `before`.
    """
    charts = []
    for title, field, unit in (
        ("Held-out loss by turn", "loss", "loss, nats per token"),
        ("Held-out accuracy by turn", "accuracy", "share of targets predicted"),
    ):
        colors = (ORANGE, BLUE, GREEN)
        lines = [
            Line(name, color, [(str(turn["turn"]), turn[field]) for turn in one["turns"]], marked=True)
            for (name, one), color in zip(evaluations.items(), colors, strict=False)
        ]
        spec = _make_line_spec(title, lines, x="turn, from 0", x_type="ordinal", y=unit)
        targets = {str(turn["turn"]): turn["targets"] for one in evaluations.values() for turn in one["turns"]}
        for value in spec["data"]["values"]:
            value["targets"] = targets[value["x"]]
        hovered = spec["layer"][-1]["encoding"]["tooltip"]
        hovered.append({"field": "targets", "type": "quantitative", "title": "targets", "format": ",d"})
        columns = [("line", "line"), ("x", "turn"), ("y", unit), ("targets", "targets")]
        if targets:
            note = "A turn with few targets has a noisy mean: hover over a point, or open the table."
            charts.append(Chart(title, note, spec, columns))
    return charts
