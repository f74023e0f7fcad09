"""The page of a report: its sections, and what its script draws."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from html import escape
from importlib.resources import files
from pathlib import Path
from string import Template
from typing import Any

from lightning_nc.extras import needed
from lightning_nc.history import History
from lightning_nc.plotting.curves import RunCurves, read_curves
from lightning_nc.report.figures import HEAT, color_at, curves, depth, heat_map, places_of, run_color
from lightning_nc.report.geometry import moving
from lightning_nc.report.parts import (
    buttons,
    classes,
    details,
    dot,
    figure,
    grid,
    heading,
    plot,
    scale,
    settings,
    table,
    text_of,
    words,
)
from lightning_nc.report.series import (
    by_layer,
    course_of,
    in_words,
    layer_name,
    layers_of,
    metrics_shown,
    number,
    series_of,
    stage_name,
    without_twins,
)
from lightning_nc.runs import in_one_step
from lightning_nc.scenes import first_middle_last, pictured

__all__ = ["report", "write_report"]

_AT_SIGHT = 6  # panels of curves; the rest is behind a click
_KEEP_SAMPLES = "`NeuralCollapseCallback(geometry=(0, 1, 2))` keeps a few samples of two to four classes."
_COSINES = "Cosines between class means"
_GEOMETRY = (
    "At collapse every cloud of samples (small dots) is a single point at its class mean (large dot), and class means and rows "
    "of the weight (arrows) lie on the corners of the dashed frame. The unit of each epoch is the root mean square distance of "
    "the class means from their center."
)


def write_report(runs: Mapping[str, History], path: str | Path) -> Path:
    """Write :func:`report` to a file, whose directory is created; returns its path."""
    path = Path(path)
    text = report(runs)
    path.parent.mkdir(parents=True, exist_ok=True)
    with in_one_step(path) as scratch:
        scratch.write_text(text, encoding="utf-8")
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
    with needed("a report", '"lightning-neural-collapse[report]"'):
        from plotly.offline import get_plotlyjs
    if not runs:
        raise ValueError("runs is empty; pass at least one run as {name: history}")
    page = _Page(runs)
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
    """The HTML of the sections; what its script draws is collected beside it."""

    def __init__(self, runs: Mapping[str, History]) -> None:
        self.runs, self.found = runs, {name: read_curves(history) for name, history in runs.items()}
        over = {found.over for found in self.found.values()}
        self.over = over.pop() if len(over) == 1 else "epoch"
        self.figures: dict[str, Any] = {}
        self.moving: dict[str, Any] = {}

    def parts(self) -> Iterator[str]:
        """The sections: the curves of all runs together, the rest of each run by itself."""
        several = len(self.runs) > 1
        if several:
            links = [f'<a href="#run{place}">{escape(name)}</a>' for place, name in enumerate(self.runs)]
            yield f'<nav aria-label="runs">{"".join(links)}</nav><h2>Last values of all runs</h2>'
            yield self.last_values()
            yield "<h2>Curves of all runs</h2>"
            yield from self.curves()
        for place, (name, history) in enumerate(self.runs.items()):
            yield f'<section id="run{place}"><h2>{escape(name)}</h2>{words(history)}'
            if not several:
                yield heading(3, "Curves")
                yield from self.curves()
            yield self.geometry(history)
            yield self.cosines(history)
            table_of = history.per_class
            yield heading(3, "Classes")
            yield classes(table_of) if table_of else text_of("p", [_missing(history, "table of the classes")])
            yield self.depth(self.found[name])
            yield settings({"run": name, "measurements": len(history), **history.about}) + "</section>"

    def last_values(self) -> str:
        """A row per run: each metric at its deepest layer, when it was measured last."""
        found = {name: course_of(series_of(run.metrics)) for name, run in self.found.items()}
        deepest = {name: layers_of(course)[-1] for name, course in found.items()}
        last = {
            name: {key.metric: points[-1] for key, points in course.items() if key.layer == deepest[name]}
            for name, course in found.items()
        }
        asked = {metric for run in self.found.values() for metric in run.asked}
        shown = metrics_shown((key for course in found.values() for key in course), asked)
        columns: dict[str, list[Any]] = {
            "run": list(found),
            **({"layer": [layer_name(layer) for layer in deepest.values()]} if any(deepest.values()) else {}),
            self.over: [f"{max(epoch for epoch, _ in values.values()):g}" for values in last.values()],
            **{
                metric: [values[metric][1] if metric in values else None for values in last.values()]
                for metric in shown
                if any(metric in values for values in last.values())
            },
        }
        where = "the deepest measured layer" if any(deepest.values()) else "the classifier's input"
        return figure(
            table(columns), f"Each metric at {where}, as it was measured last; smaller is closer to collapse."
        )

    def curves(self) -> Iterator[str]:
        """Buttons, and a panel for each metric."""
        drawn, names = without_twins(self.found)
        objectives = {name: series_of(found.objectives) for name, found in self.found.items()}
        drawn = {name: {**series, **objectives[name]} for name, series in drawn.items()}
        layers, stages = places_of(drawn.values())
        several = len(self.runs) > 1
        if several:
            yield buttons("run", {name: dot(run_color(place)) for place, name in enumerate(self.runs)})
        if len(layers) > 1:
            dots = ["" if several else dot(color_at(at / (len(layers) - 1))) for at in range(len(layers))]
            yield buttons("layer", {names[layer]: mark for layer, mark in zip(layers, dots, strict=True)}, several)
        if len(stages) > 1:
            yield buttons("stage", {stage_name(*stage): f'<span class="swatch {stage[0]}"></span>' for stage in stages})
        asked = {metric for found in self.found.values() for metric in found.asked}
        shown = metrics_shown((key for series in drawn.values() for key in series), asked)
        first = list(dict.fromkeys(key.metric for series in objectives.values() for key in series))
        panels = [
            self.panel(name, curves(drawn, name, names, self.over), f"{name} over {self.over}s")
            for name in first + shown
        ]
        caption = (
            f"Each metric over {self.over}s: curves that fall toward 0 approach collapse. A triangle is an exact 0. A drag "
            "zooms, and a double click returns."
        )
        most = _AT_SIGHT + len(first)
        yield figure(grid(panels[:most]), caption) + details(panels[most:])

    def panel(self, metric: str, spec: Any, label: str) -> str:
        """A figure of one metric under its name."""
        head = f"<h4><code>{escape(metric)}</code> <small>{escape(in_words(metric))}</small></h4>"
        return f"<figure>{head}{self.plot(spec, label)}</figure>"

    def plot(self, spec: Any, label: str) -> str:
        """A figure without words."""
        name = f"figure{len(self.figures)}"
        self.figures[name] = spec
        return plot(name, label)

    def geometry(self, history: History) -> str:
        """The chosen classes, with a slider over the epochs."""
        found = moving(history.scenes)
        if found is None:
            return heading(3, "Geometry") + text_of("p", [f"{_missing(history, 'samples')} {_KEEP_SAMPLES}"])
        name, last = f"moving{len(self.moving)}", len(found["frames"]) - 1
        self.moving[name] = found
        where = {2: "on the line", 3: "in the plane", 4: "in the space"}[len(found["classes"])]
        label = f"samples, means and rows of the weight of {', '.join(found['classes'])} {where} of the class means"
        slider = (
            '<div class="slide"><button type="button">Play</button><input type="range" min="0" '
            f'max="{last}" value="0" aria-label="epoch"><output></output></div>'
        )
        shown = figure(plot(f"{name}-plot", label) + slider, _GEOMETRY, f' class="turn" data-moving="{name}"')
        return heading(3, "Geometry") + shown

    def cosines(self, history: History) -> str:
        """Heat maps of the first, middle and last measurement."""
        scenes = first_middle_last([scene for scene in pictured(history.scenes) if len(scene.labels) > 1])
        if not scenes:
            return heading(3, _COSINES) + text_of("p", [_missing(history, "cosines")])
        count, shown = scenes[-1].classes, len(scenes[-1].labels)
        panels = []
        for scene in scenes:
            label = f"cosines between the class means at epoch {scene.epoch:g}"
            panels.append(f"<figure><h4>epoch {scene.epoch:g}</h4>{self.plot(heat_map(scene), label)}</figure>")
        ideal = -1 / (count - 1)
        bar = scale(HEAT, ["−1", "0", "1"], mark=(1 + ideal) / 2)
        caption = (
            f"At a simplex ETF of {count} classes all cosines off the diagonal are {number(ideal)}, the mark on the scale, so "
            f"all squares off the diagonal have one color.{f' The first {shown} classes are shown.' * (shown < count)}"
        )
        return heading(3, _COSINES) + figure(grid(panels, "square") + bar, caption)

    def depth(self, run: RunCurves) -> str:
        """Metrics against depth."""
        course = course_of(series_of(run.metrics))
        shown = [metric for metric in metrics_shown(course, run.asked) if by_layer(course, metric)]
        found = {metric: depth(course, metric, run.over) for metric in shown}
        if not found:
            return ""
        panels = [self.panel(metric, spec, f"{metric} against depth") for metric, spec in found.items()]
        epochs = [epoch for points in course.values() for epoch, _ in points]
        colors = [color_at(at / 5) for at in range(6)]
        bar = scale(colors, [f"{run.over} {min(epochs):g}", f"{run.over} {max(epochs):g}"])
        caption = (
            f"Each metric against depth, a curve for each of at most twelve {run.over}s: where a curve falls to the right, "
            "deeper layers are more collapsed."
        )
        return heading(3, "Depth") + figure(grid(panels[:4]) + bar, caption) + details(panels[4:])


def _missing(history: History, what: str) -> str:
    """Why a run shows none of something: only a checkpoint holds more than rows."""
    if history.about or history.scenes or history.per_class:
        return f"The run has no {what}."
    return f"The log has no {what}. Pass the directory that also holds the checkpoint."


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
