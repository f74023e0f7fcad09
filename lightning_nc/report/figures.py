"""The figures of a report as plotly.js reads them: plain lists of traces, and layouts.

A color is a pair, ``"#0072B2/#56B4E9"``: of light pages and of dark ones. The script of the page chooses.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from lightning_nc.functional import METRICS
from lightning_nc.keys import DEPTH, STAGES, base_name
from lightning_nc.plotting.curves import is_accuracy, is_chance
from lightning_nc.report.series import Points, Series, by_layer, layer_name, layers_of, stage_name
from lightning_nc.runs import is_objective
from lightning_nc.scenes import Scene

__all__ = ["CLASS_COLORS", "HEAT", "color_at", "curves", "depth", "heat_map", "run_color", "spread"]

# The colors of Okabe and Ito, each with a lighter or darker one that stands out from a dark page.
CLASS_COLORS = ("#0072B2/#56B4E9", "#D55E00/#E69F00", "#009E73/#2FD6A5", "#CC79A7/#E9A6C8")
_MORE = ("#E69F00/#F0E442", "#56B4E9/#0072B2", "#8C510A/#C98A4B", "#555555/#BBBBBB")
# The colors of viridis in ten steps.
_VIRIDIS = (
    "#440154",
    "#482878",
    "#3E4989",
    "#31688E",
    "#26828E",
    "#1F9E89",
    "#35B779",
    "#6DCD59",
    "#B4DE2C",
    "#FDE725",
)
HEAT = ("#2166AC", "#92C5DE", "#F7F7F7", "#F4A582", "#B2182B")
_DASHES = {"train": "solid", "validate": "dash", "test": "dot"}

Figure = dict[str, Any]


def color_at(share: float) -> str:
    """A color of viridis from 0 to 1 that goes away from the page: darker on light pages, lighter on dark ones."""

    def mixed(place: float) -> str:
        before = min(int(place * 9), 8)
        pair = [[int(color[at : at + 2], 16) for at in (1, 3, 5)] for color in _VIRIDIS[before : before + 2]]
        rest = place * 9 - before
        return "#" + "".join(f"{round((1 - rest) * low + rest * high):02X}" for low, high in zip(*pair, strict=True))

    return f"{mixed(0.75 * (1 - share))}/{mixed(0.25 + 0.75 * share)}"


def run_color(index: int) -> str:
    """The color of a run."""
    colors = CLASS_COLORS + _MORE
    return colors[index % len(colors)]


def spread(count: int, most: int = 12) -> list[int]:
    """At most so many places among ``count``, evenly, the first and the last among them."""
    return sorted({round(at * (count - 1) / (most - 1)) for at in range(most)}) if count > most else list(range(count))


def curves(runs: Mapping[str, Series], metric: str, names: Mapping[str, str], over: str) -> Figure:
    """One metric over epochs, or ``over`` iterations: a curve per run, layer, stage and dataloader.

    ``names`` are those of the layers.

    ``meta`` has the places of run, layer and stage, by which the buttons of the page show and hide curves.
    """
    layers, stages = places_of(runs.values())
    traces: list[Any] = []
    values = [
        y for series in runs.values() for key, points in series.items() if key.metric == metric for _, y in points
    ]
    linear = _is_linear(values, metric)
    for place, (run, series) in enumerate(runs.items()):
        for key, points in series.items():
            chance = is_chance(key.metric)
            if key.metric != metric and not (chance and base_name(key.metric) == metric):
                continue
            whole = is_objective(key.metric)  # a loss is of no layer, so no button of a layer hides it
            at = -1 if whole else layers.index(key.layer)
            color = run_color(place) if len(runs) > 1 else color_at(1 if whole else at / max(1, len(layers) - 1))
            layer = [] if whole else [names[key.layer]]
            parts = [run] * (len(runs) > 1) + layer + [stage_name(*key[:2])] + ["by chance"] * chance
            dash = "dot" if chance else _DASHES[key.stage]
            style = {
                "name": escape(" · ".join(parts)),
                "meta": [place, at, stages.index(key[:2])],
                "opacity": 0.5 if chance else 1,
            }
            traces += _lines(points, {"color": color, "dash": dash, "width": 1 if chance else 2}, style, linear, over)
    layout = {"xaxis": {"title": {"text": over}}, "yaxis": _values_axis(values, linear)}
    return {"data": traces, "layout": layout}


def places_of(many: Any) -> tuple[list[str], list[tuple[str, int]]]:
    """The layers of metrics, and the stages with their dataloaders, of several runs, in order."""
    keys = [key for series in many for key in series]
    stages = sorted({key[:2] for key in keys}, key=lambda stage: (list(STAGES).index(stage[0]), stage[1]))
    return layers_of(key for key in keys if not is_objective(key.metric)), stages


def _is_linear(values: Sequence[float], metric: str) -> bool:
    spec = METRICS.get(base_name(metric))
    counts = metric == DEPTH or is_accuracy(metric) or (spec is not None and spec.direction == "approaches")
    return counts or any(value < 0 for value in values) or not any(value > 0 for value in values)


def _lines(points: Points, line: Figure, style: Figure, linear: bool, over: str) -> list[Figure]:
    """A curve, and on a log axis its zeros as triangles at the least positive value, which hover by their value."""
    hover = f"{over} %{{x}}<br>%{{customdata}}<extra>%{{fullData.name}}</extra>"
    shown = [(x, y) for x, y in points if linear or y != 0]
    alone = len(shown) == 1
    found = [
        {
            "type": "scatter",
            "mode": "markers" if alone else "lines",
            "x": [x for x, _ in shown],
            "y": [y for _, y in shown],
            "customdata": [f"{y:.4g}" for _, y in shown],
            "line": line,
            "marker": {"color": line["color"], "size": 7},
            "hovertemplate": hover,
            **style,
        }
    ]
    zeros = [] if linear else [x for x, y in points if y == 0]
    if zeros:
        least = min((y for _, y in shown if y > 0 and math.isfinite(y)), default=1)
        marker = {"color": line["color"], "size": 8, "symbol": "triangle-down"}
        zero = {"x": zeros, "y": [least] * len(zeros), "customdata": ["0"] * len(zeros), "marker": marker}
        found.append({"type": "scatter", "mode": "markers", "hovertemplate": hover, **zero, **style})
    return found


def _values_axis(values: Sequence[float], linear: bool) -> Figure:
    """Log axes over one or two decades have ticks at 1, 2 and 5, over more at the powers of ten."""
    known = [value for value in values if value > 0 and math.isfinite(value)]
    if linear or not known:
        return {"type": "linear"}
    ratio = max(known) / min(known)
    ticks = {"nticks": 6} if not 4 < ratio < 1e6 else {"dtick": "D2" if ratio < 300 else 1}
    return {"type": "log", "tickformat": ".3~g", **ticks}


def depth(series: Series, metric: str, over: str) -> Figure | None:
    """One metric against depth, a curve for each of at most twelve epochs; None if one layer alone has it."""
    layers = by_layer(series, metric)
    if not layers:
        return None
    epochs = sorted({epoch for points in layers.values() for epoch, _ in points})
    drawn = [value for points in layers.values() for _, value in points]
    linear, values = _is_linear(drawn, metric), {layer: dict(points) for layer, points in layers.items()}
    names = [escape(layer_name(layer)) for layer in layers]
    traces = []
    for at in spread(len(epochs)):
        column = [values[layer].get(epochs[at], math.nan) for layer in layers]
        color = color_at(at / max(1, len(epochs) - 1))
        traces.append(
            {
                "type": "scatter",
                "mode": "lines+markers",
                "x": names,
                "y": [value if linear or value > 0 else math.nan for value in column],
                "customdata": [f"{value:.4g}" for value in column],
                "line": {"color": color, "width": 2},
                "name": f"{over} {epochs[at]:g}",
                "hovertemplate": "%{x}<br>%{customdata}<extra>%{fullData.name}</extra>",
            }
        )
    return {"data": traces, "layout": {"xaxis": {"type": "category"}, "yaxis": _values_axis(drawn, linear)}}


def heat_map(scene: Scene) -> Figure:
    """The cosines between the centered class means, from -1 to 1."""
    names = [f"class {label}" for label in scene.labels]
    few = len(names) <= 12
    axis = {"type": "category", "showticklabels": few, "tickmode": "array", "showgrid": False, "constrain": "domain"}
    axis |= {"tickvals": names, "ticktext": list(map(str, scene.labels))}
    trace = {
        "type": "heatmap",
        "x": names,
        "y": names,
        "z": scene.cosines,
        "zmin": -1,
        "zmax": 1,
        "showscale": False,
        "colorscale": [[at / (len(HEAT) - 1), color] for at, color in enumerate(HEAT)],
        "hovertemplate": "%{x}, %{y}<br>cosine %{z:.3f}<extra></extra>",
    }
    return {"data": [trace], "layout": {"xaxis": axis, "yaxis": {**axis, "autorange": "reversed", "scaleanchor": "x"}}}
