"""The page of a report: its sections, and what its script draws."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping
from html import escape
from importlib.resources import files
from pathlib import Path
from string import Template
from typing import Any

from lightning_nc.history import History
from lightning_nc.report.figures import HEAT, color_at, curves, depth, heat_map, places_of, run_color
from lightning_nc.report.geometry import moving
from lightning_nc.report.series import (
    Series,
    by_layer,
    course_of,
    in_words,
    layer_name,
    layers_of,
    metrics_shown,
    number,
    series_of,
)
from lightning_nc.report.words import cautions, summary
from lightning_nc.scenes import first_middle_last, pictured

__all__ = ["report", "write_report"]

_AT_SIGHT = 6  # panels of curves; the rest is behind a click
_COLUMNS = {
    "nc1_trace_share": "share of the scatter within classes",
    "mean_norm": "norm of the centered class mean",
    "weight_cosine": "cosine of the mean with its row of the weight",
    "nearest": "the class whose mean is nearest",
    "nearest_cdnv": "variance within over squared distance to that class",
}


def write_report(runs: Mapping[str, History], path: str | Path) -> Path:
    """Write :func:`report` to a file, whose directory is created; returns its path."""
    path = Path(path)
    text = report(runs)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return path


def report(runs: Mapping[str, History]) -> str:
    """One or more runs as an HTML page that needs no other file and no network.

    It has a summary in words, the curves, the geometry of a few classes with a slider over epochs, the cosines between class
    means, a table of the classes, metrics against depth, and settings and versions, as far as a run holds them.

    Args:
        runs: histories by name.

    Raises:
        ValueError: if there is no run, or a run has no metric.
        ImportError: without plotly.
    """
    try:
        from plotly.offline import get_plotlyjs
    except ModuleNotFoundError as error:
        raise ImportError('a report needs plotly: pip install "lightning-neural-collapse[report]"') from error
    series = {name: series_of(history) for name, history in runs.items()}
    if not series or not all(series.values()):
        empty = [name for name, found in series.items() if not found]
        raise ValueError(f"a report needs runs with metrics such as 'nc/nc1'; {empty!r:.300} have none")
    page = _Page(runs, series)
    here = files("lightning_nc.report")
    return Template(here.joinpath("page.html").read_text(encoding="utf-8")).substitute(
        title="Neural collapse",
        style=here.joinpath("page.css").read_text(encoding="utf-8"),
        body="\n".join(page.parts()),
        data=_json({"figures": page.figures, "moving": page.moving}),
        plotly=get_plotlyjs(),
        script=here.joinpath("page.js").read_text(encoding="utf-8"),
    )


class _Page:
    """The HTML of the sections; the figures that they name are collected beside it."""

    def __init__(self, runs: Mapping[str, History], series: Mapping[str, Series]) -> None:
        self.runs, self.series = runs, series
        self.figures: dict[str, Any] = {}
        self.moving: dict[str, Any] = {}

    def parts(self) -> Iterable[str]:
        if len(self.runs) > 1:
            links = [f'<a href="#run{place}">{escape(name)}</a>' for place, name in enumerate(self.runs)]
            yield f'<nav aria-label="runs">{"".join(links)}</nav><h2>Curves of all runs</h2>'
            yield from self.curves()
        for place, (name, history) in enumerate(self.runs.items()):
            course = course_of(self.series[name])
            yield f'<section id="run{place}"><h2>{escape(name)}</h2>'
            yield from _words(history)
            if len(self.runs) == 1:
                yield "<h3>Curves</h3>"
                yield from self.curves()
            yield from self.geometry(history)
            yield from self.cosines(history)
            yield from _table(history)
            yield from self.depth(course, history)
            yield from _settings(name, history)
            yield "</section>"

    def curves(self) -> Iterable[str]:
        layers, stages = places_of(self.series.values())
        asked = {history.about.get("metrics", "") for history in self.runs.values()}
        shown = metrics_shown((key for each in self.series.values() for key in each), "" if "" in asked else ", ".join(asked))
        several = len(self.runs) > 1
        if several:
            yield _buttons("run", [(escape(name), _dot(run_color(place))) for place, name in enumerate(self.runs)])
        if len(layers) > 1:
            dots = ["" if several else _dot(color_at(at / (len(layers) - 1))) for at in range(len(layers))]
            yield _buttons("layer", [(escape(layer_name(layer)), dot) for layer, dot in zip(layers, dots, strict=True)], several)
        if len(stages) > 1:
            lines = {"train": "solid", "validate": "dash", "test": "dot"}
            names = [f"{stage}_{loader}" if loader else stage for stage, loader in stages]
            yield _buttons("stage", [(name, f'<span class="swatch {lines[name.split("_")[0]]}"></span>') for name in names])
        panels = [self.panel(metric, curves(self.series, metric), f"{metric} over epochs") for metric in shown]
        yield f'<figure><div class="grid">{"".join(panels[:_AT_SIGHT])}</div><figcaption>Each metric over the epochs: curves that '
        yield "fall toward 0 approach collapse; a triangle is an exact 0.</figcaption></figure>"
        if rest := panels[_AT_SIGHT:]:
            yield f'<details><summary>{len(rest)} more metrics</summary><div class="grid">{"".join(rest)}</div></details>'

    def panel(self, metric: str, figure: Any, label: str) -> str:
        name = self.add(figure)
        head = f"<h4><code>{escape(metric)}</code> <small>{escape(in_words(metric))}</small></h4>"
        return f'<figure>{head}<div class="plot" id="{name}" role="img" aria-label="{escape(label)}"></div></figure>'

    def add(self, figure: Any) -> str:
        name = f"figure{len(self.figures)}"
        self.figures[name] = figure
        return name

    def geometry(self, history: History) -> Iterable[str]:
        yield "<h3>Geometry</h3>"
        found = moving(history.scenes)
        if found is None:
            yield (
                "<p>No samples were kept. <code>NeuralCollapseCallback(geometry=(0, 1, 2))</code> keeps a few of two to four classes, "
                "and the checkpoint of the run holds them.</p>"
            )
            return
        name, last = f"moving{len(self.moving)}", len(found["frames"]) - 1
        self.moving[name] = found
        where = {2: "on the line", 3: "in the plane", 4: "in the space"}[len(found["classes"])]
        label = f"samples, class means and rows of the weight of {', '.join(found['classes'])} {where} of their class means"
        yield (
            f'<figure class="turn" data-moving="{name}"><div class="plot" role="img" aria-label="{escape(label)}"></div>'
            f'<div class="slide"><button type="button">Play</button><input type="range" min="0" max="{last}" value="{last}" '
            'aria-label="epoch"><output></output></div>'
            "<figcaption>At collapse every cloud of samples (small dots) is a single point at its class mean (large dot), and class "
            "means and rows of the weight (arrows) lie on the corners of the dashed frame. The unit of each epoch is the root mean "
            "square distance of the class means from their center.</figcaption></figure>"
        )

    def cosines(self, history: History) -> Iterable[str]:
        scenes = first_middle_last([scene for scene in pictured(history.scenes) if len(scene.labels) > 1])
        if not scenes:
            return
        classes, shown = scenes[-1].classes, len(scenes[-1].labels)
        ideal = -1 / (classes - 1)
        panels = []
        for scene in scenes:
            text = f"cosines between the class means at epoch {scene.epoch:g}"
            plot = f'<div class="plot" id="{self.add(heat_map(scene))}" role="img" aria-label="{text}"></div>'
            panels.append(f"<figure><h4>epoch {scene.epoch:g}</h4>{plot}</figure>")
        some = f" The first {shown} of {classes} classes are shown." if shown < classes else ""
        gradient = f"linear-gradient(90deg, {', '.join(HEAT)})"
        yield (
            f'<h3>Cosines between class means</h3><figure><div class="grid square">{"".join(panels)}</div>'
            f'<div class="scale" style="background: {gradient}"><b style="left: {50 + 50 * ideal:.2f}%"></b></div>'
            f'<div class="ends"><span>−1</span><span>0</span><span>1</span></div><figcaption>At a simplex ETF of {classes} classes all '
            f"cosines off the diagonal are {number(ideal)} (the mark on the scale), so the squares off the diagonal have one "
            f"color.{some}</figcaption></figure>"
        )

    def depth(self, course: Series, history: History) -> Iterable[str]:
        shown = metrics_shown(course, history.about.get("metrics", ""))
        figures = {metric: depth(course, metric) for metric in shown if by_layer(course, metric)}
        if not figures:
            return
        panels = [self.panel(metric, figure, f"{metric} against depth") for metric, figure in figures.items()]
        epochs = [epoch for points in course.values() for epoch, _ in points]
        light, dark = ([color_at(at / 5).split("/")[mode] for at in range(6)] for mode in (0, 1))
        scale = f"--scale-light: linear-gradient(90deg, {', '.join(light)}); --scale-dark: linear-gradient(90deg, {', '.join(dark)})"
        more = f'<details><summary>{len(panels[4:])} more metrics</summary><div class="grid">{"".join(panels[4:])}</div></details>'
        yield (
            f'<h3>Depth</h3><figure><div class="grid">{"".join(panels[:4])}</div><div class="scale" style="{scale}"></div>'
            f'<div class="ends"><span>epoch {min(epochs):g}</span><span>epoch {max(epochs):g}</span></div><figcaption>Each metric '
            f"against depth, a curve per epoch: the layers from {escape(layer_name(layers_of(course)[0]))} to the classifier's input "
            f"collapse one after another where the curves bend down.</figcaption></figure>{more if panels[4:] else ''}"
        )


def _words(history: History) -> Iterable[str]:
    terms = [(question, " ".join(map(_sentence, found))) for question, found in summary(history).items()]
    yield f"<h3>Summary</h3><dl>{''.join(f'<dt>{question}</dt><dd>{text}</dd>' for question, text in terms)}</dl>"
    found = cautions(history)
    yield "<h3>Not to be trusted</h3>" + (
        f'<ul class="caution">{"".join(f"<li>{_sentence(text)}</li>" for text in found)}</ul>'
        if found
        else "<p>The data of the run show no reason for doubt.</p>"
    )


def _sentence(text: str) -> str:
    """A sentence as HTML, with code in backticks."""
    return re.sub("`([^`]*)`", r"<code>\1</code>", escape(text))


def _dot(color: str) -> str:
    light, dark = color.split("/")
    return f'<span class="swatch" style="--light: {light}; --dark: {dark}"></span>'


def _buttons(group: str, entries: Iterable[tuple[str, str]], one: bool = False) -> str:
    """Buttons that show and hide curves; of ``one``, the last is pressed and only one can be."""
    found = list(entries)
    buttons = [
        f'<button type="button" value="{place}" aria-pressed="{str(not one or place == len(found) - 1).lower()}">{mark}{name}</button>'
        for place, (name, mark) in enumerate(found)
    ]
    return f'<fieldset data-group="{group}"{" data-one" * one}><legend>{group.capitalize()}</legend>{"".join(buttons)}</fieldset>'


def _table(history: History) -> Iterable[str]:
    table = history.per_class
    if not table:
        return
    heads = [
        f'<th scope="col"><button type="button" title="{escape(_COLUMNS.get(name, name))}">{escape(name)}</button></th>' for name in table
    ]
    rows = ["".join(map(_cell, row)) for row in zip(*table.values(), strict=False)]
    legend = "; ".join(f"<code>{name}</code>: {text}" for name, text in _COLUMNS.items() if name in table)
    yield (
        f'<h3>Classes</h3><figure><div class="wide" tabindex="0"><table><thead><tr>{"".join(heads)}</tr></thead>'
        f"<tbody>{''.join(f'<tr>{row}</tr>' for row in rows)}</tbody></table></div><figcaption>The classes as they were measured last; "
        f"a click on a column sorts by it, and the largest <code>nearest_cdnv</code> lags most. {legend}.</figcaption></figure>"
    )


def _cell(value: Any) -> str:
    known = isinstance(value, int | float) and math.isfinite(value)
    text = number(value, 4) if isinstance(value, float) else "" if value is None else str(value)
    return f'<td data-value="{value if known else ""}">{escape(text)}</td>'


def _settings(name: str, history: History) -> Iterable[str]:
    about = {"run": name, "measurements": len(history), **history.about}
    rows = [f'<tr><th scope="row">{escape(str(key))}</th><td>{escape(str(value))}</td></tr>' for key, value in about.items()]
    yield f'<h3>Settings and versions</h3><div class="wide"><table class="about"><tbody>{"".join(rows)}</tbody></table></div>'


def _json(value: Any) -> str:
    """JSON that may stand inside a script: floats have six digits, nan and infinity are null, and no tag can begin or end."""
    text = json.dumps(_rounded(value), allow_nan=False, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _rounded(value: Any) -> Any:
    if isinstance(value, float):
        return float(f"{value:.6g}") if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: _rounded(part) for key, part in value.items()}
    return [_rounded(part) for part in value] if isinstance(value, list | tuple) else value
