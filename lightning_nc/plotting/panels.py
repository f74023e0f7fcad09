"""Figures of metrics over epochs, in the layout of Tirer & Bruna (2022)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import ListedColormap, Normalize
from matplotlib.figure import Figure, SubFigure
from matplotlib.lines import Line2D

from lightning_nc.functional.geometry import FRAMES_IN_WORDS
from lightning_nc.keys import Key, base_name, natural_order, parse_key
from lightning_nc.plotting.curves import (
    Curves,
    RunCurves,
    chosen,
    drawn,
    heads_of,
    is_accuracy,
    is_chance,
    is_linear,
    left_out,
    other_frames,
    panels_of,
    read_curves,
    same,
)
from lightning_nc.plotting.style import (
    COLORS,
    LEVEL_STYLE,
    PANEL,
    WIDTH,
    color_of,
    columns_of,
    draw,
    legend_below,
    legend_under,
    sized_figure,
    stage_entries,
    style_of,
    wrapped,
)
from lightning_nc.runs import Run, epoch_of, metrics_of

__all__ = ["plot_history", "plot_runs"]

_MOST_NAMES = 16  # lines of text in a legend or beside a color bar
_LEFT, _RIGHT = [COLORS[index] for index in (0, 5, 6, 8)], [COLORS[index] for index in (1, 4, 3, 7)]
_CHANCE: dict[str, Any] = {"alpha": 0.35, "linewidth": 1, "marker": "_"}


class _Layout(NamedTuple):
    """What the panels of all runs have in common."""

    panels: list[list[str]]
    metrics: list[dict[str, str]]  # those that are drawn in each panel, and what they are called
    layers: dict[str, str]  # the layers, and what they are called; empty if only the classifier's input was measured
    linear: list[bool]
    levels: list[dict[str, float]]
    num_classes: int | None
    scores: list[str]  # "loss", "accuracy", or both
    bar: float  # inches for the color bar of many layers; 0 without
    width: float  # of a panel, in inches


def plot_history(
    history: Iterable[Mapping[str, Any]],
    objective: Mapping[str, Sequence[float]] | None = None,
    num_classes: int | None = None,
    metrics: str | Sequence[str] | None = None,
) -> Figure:
    """Plot metrics over epochs, on log axes that show zeros at their lower edge.

    NC1, NC2 and NC3 have one panel each. If layers were measured, each metric has a panel, and the color of a curve goes
    from light to dark with the depth of its layer; layers with the same numbers are one curve. Training data are solid,
    validation data dashed, test data dotted. Losses and accuracies that the rows hold share the first panel.

    Args:
        history: rows with ``epoch``, metrics by key, and optionally ``stage`` (``"train"`` by default), as in
            ``NeuralCollapseCallback.history``. Keys are as the callback logs them (``nc/val/nc1``) or as
            :func:`lightning_nc.measure` returns them (``layer3/nc1``); other entries but losses and accuracies are ignored.
        objective: the curves of the first panel, instead of those in the rows: label -> values, one per row of the training
            data.
        num_classes: K; marks the value of ``nc2_etf`` and ``nc2_of`` at an exact frame of the other kind,
            sqrt(2 - 2 sqrt((K - 1) / K)), where it is near the curves.
        metrics: ``"all"``, ``"paper"``, or one or more names. By default what was asked for in the measurement; if that needs
            more than twelve panels, the metrics of the paper.

    Raises:
        ValueError: if there is no metric, a row with metrics has no epoch, an unknown stage or a value twice, or a name in
            ``metrics`` was not measured.
    """
    return plot_runs({"": list(history)}, objective, num_classes, metrics)


def plot_runs(
    runs: Mapping[str, Run],
    objective: Mapping[str, Sequence[float]] | None = None,
    num_classes: int | None = None,
    metrics: str | Sequence[str] | None = None,
) -> Figure:
    """Plot several runs, one below the other, with the panels of :func:`plot_history` and shared axes limits.

    Args:
        runs: title -> rows.
        objective: see :func:`plot_history`; for a single run.
        num_classes: see :func:`plot_history`.
        metrics: see :func:`plot_history`.

    Raises:
        ValueError: see :func:`plot_history`.
    """
    if not runs:
        raise ValueError("runs is empty; pass at least one run as {title: rows}")
    found = {name: read_curves(rows) for name, rows in runs.items()}
    layered = any(key.layer for run in found.values() for key in run.metrics)
    names = chosen(found.values(), metrics, by_family=not layered)
    found = {name: run._replace(metrics=drawn(run.metrics, names)) for name, run in found.items()}
    if objective is not None or metrics is not None:
        curves = {name: _over_training(rows, objective or {}) for name, rows in runs.items()}
        found = {name: run._replace(objectives=curves[name]) for name, run in found.items()}
    layout = _layout(list(found.values()), names, num_classes)
    entries = _entries(found.values(), layout)
    count = len(layout.panels) + bool(layout.scores)
    columns = columns_of(count)
    figure = sized_figure(columns, -(-count // columns), len(runs), layout.width, layout.bar, entries)
    above: list[Axes] = []
    right: Axes | None = None
    # Constrained layout has no groups of axes, so each run is a subfigure.
    for (name, run), part in zip(found.items(), figure.subfigures(len(runs), 1, squeeze=False)[:, 0], strict=True):
        grid = list(part.subplots(-(-count // columns), columns, squeeze=False).ravel())
        for axis in grid[count:]:
            axis.remove()
        axes = grid[:count]
        for axis, other in zip(axes, above, strict=False):  # so that runs can be compared by eye
            axis.sharex(other)
            axis.sharey(other)
        above = above or axes
        if layout.scores:
            right = _draw_objectives(axes[0], run, layout.scores, right)
        for index, axis in enumerate(axes[count - len(layout.panels) :]):
            _draw_panel(axis, run, layout, index)
        if layout.bar:
            _color_bar(part, axes, layout.layers)
        legend_under(part, entries, layout.width * columns)
        heading = [wrapped(name, 40 * columns), _geometry(runs[name]), "" if metrics else left_out([run], names)]
        part.suptitle("\n".join(filter(None, heading)), fontsize=10)
    return figure


def _over_training(rows: Run, objective: Mapping[str, Sequence[float]]) -> Curves:
    epochs = [epoch_of(row) for row in rows if row.get("stage", "train") == "train"]
    return {Key("train", 0, "", label): (epochs, list(values)) for label, values in objective.items()}


def _layout(runs: Sequence[RunCurves], names: Sequence[str], num_classes: int | None) -> _Layout:
    layers = list(dict.fromkeys(key.layer for run in runs for key in run.metrics if key.layer))
    if len(runs) > 1:  # they may have different layers
        layers.sort(key=natural_order)
    layers += [""] * (bool(layers) and any(not key.layer for run in runs for key in run.metrics))
    curves = [run.metrics for run in runs]
    panels = panels_of(names, by_family=not layers)
    metrics = [same(curves, members, "metric") for members in panels]
    linear = [is_linear(members, curves) for members in panels]
    levels = [other_frames(members, curves, num_classes) for members in panels]
    called = {layer: wrapped(name, 36) for layer, name in same(curves, layers, "layer").items()}
    accurate = {is_accuracy(key.metric) for run in runs for key in run.objectives}
    scores = ["loss"] * (False in accurate) + ["accuracy"] * (True in accurate)
    texts = [line for name in called.values() for line in name.splitlines()]
    bar = 0.6 + 0.065 * max(map(len, texts)) if len(texts) > _MOST_NAMES else 0.0
    width = min(PANEL, (WIDTH - bar) / columns_of(len(panels) + bool(scores)))
    return _Layout(panels, metrics, called, linear, levels, num_classes, scores, bar, width)


def _geometry(rows: Run) -> str:
    """The frame that the class means were nearest to at last, in words; empty if none was near, or that is not known."""
    known = [row for row in rows if "geometry" in row]
    row = next((row for row in reversed(known) if row.get("stage", "train") == "train"), known[-1] if known else {})
    name = row.get("geometry")
    if name not in FRAMES_IN_WORDS:
        return ""
    value = next((value for key, value in metrics_of(row).items() if parse_key(key)[2:] == ("", name)), None)
    return f"nearest frame at the end: {FRAMES_IN_WORDS[name]}" + (
        f" ({name} {value:.2g})" if value is not None else ""
    )


def _draw_objectives(axis: Axes, run: RunCurves, scores: Sequence[str], above: Axes | None) -> Axes | None:
    """Losses on a log axis on the left, accuracies on a linear one on the right, or one of them alone on the left.

    The right axis has the limits of ``above``.
    """
    handles: list[Any] = []
    labels: list[str] = []
    right = None
    for kind, colors in zip(scores, (_LEFT, _RIGHT), strict=False):
        if kind == scores[0]:
            side, title = axis, " and ".join(scores).capitalize()
        else:
            side = right = axis.twinx()
            title = ""
            if above is not None:
                side.sharey(above)
        curves = {
            key: curve for key, curve in run.objectives.items() if is_accuracy(key.metric) == (kind == "accuracy")
        }
        names = list(dict.fromkeys(key.metric for key in curves))
        for key in curves or [Key("train", 0, "", "")]:
            shown = {wrapped(key.metric): curves[key]} if curves else {}
            color = colors[names.index(key.metric) % len(colors)] if curves else colors[0]
            draw(side, title, run.over, shown, [color], style_of(*key[:2]), legend=False, linear=kind == "accuracy")
        side.set_ylabel(kind, color=colors[0])
        found = side.get_legend_handles_labels()
        handles, labels = (
            handles + found[0],
            labels + [f"{name} (right)" if side is right else name for name in found[1]],
        )
    if right is not None:
        right.grid(False)  # the left axis has a grid
    if labels:
        legend_below(axis, handles, labels)
    return right


def _draw_panel(axis: Axes, run: RunCurves, layout: _Layout, index: int) -> None:
    members, called, layers = layout.panels[index], layout.metrics[index], list(layout.layers)
    heads = heads_of(members, layout.num_classes, layout.width)
    for group in dict.fromkeys(key[:2] for key in run.metrics) or [("train", 0)]:
        shown = {key: curve for key, curve in run.metrics.items() if key[:2] == group and key.metric in called}
        if layers:
            shown = {key: curve for key, curve in shown.items() if key.layer in layers}
        colors = {key: color_of(key.layer, layers) if layers else _color(key.metric, members) for key in shown}
        names = [layout.layers[key.layer] if layers else wrapped(called[key.metric], 50) for key in shown]
        curves = dict(zip(names, shown.values(), strict=True))
        draw(axis, heads, run.over, curves, list(colors.values()), style_of(*group), False, layout.linear[index])
        for key, (x, y) in run.metrics.items():
            own = key._replace(metric=base_name(key.metric))
            if is_chance(key.metric) and own in colors:
                axis.plot(x, y, color=colors[own], zorder=1, **_CHANCE)
    if not layers and members[1:]:
        legend_below(axis, *axis.get_legend_handles_labels())
    for level in dict.fromkeys(layout.levels[index].values()):
        axis.axhline(level, **LEVEL_STYLE)


def _color(metric: str, members: Sequence[str]) -> str:
    return COLORS[members.index(metric) % len(COLORS)]


def _entries(runs: Iterable[RunCurves], layout: _Layout) -> list[tuple[Any, str]]:
    """The legend below all panels: layers by color, stages by dashes, values by chance, exact frames of the other kind."""
    layers = list(layout.layers)
    entries = [(Line2D([], [], color=color_of(layer, layers)), name) for layer, name in layout.layers.items()]
    keys = list(dict.fromkeys(key for run in runs for key in [*run.metrics, *run.objectives]))
    entries = ([] if layout.bar else entries) + stage_entries(keys)
    if any(is_chance(key.metric) for key in keys):
        entries.append((Line2D([], [], color="0.2", **_CHANCE), "chance"))
    levels = dict.fromkeys(label for found in layout.levels for label in found)
    return entries + [(Line2D([], [], **LEVEL_STYLE), label) for label in levels]


def _color_bar(part: SubFigure, axes: list[Axes], layers: Mapping[str, str]) -> None:
    """The colors of many layers, with some of their names."""
    names = list(layers.values())
    ticks = max(2, min(6, _MOST_NAMES // max(name.count("\n") + 1 for name in names)))
    shown = numpy.linspace(0, len(names) - 1, ticks).round().astype(int)
    colors = ListedColormap([color_of(layer, list(layers)) for layer in layers])
    bar = part.colorbar(ScalarMappable(Normalize(-0.5, len(names) - 0.5), colors), ax=axes, aspect=30)
    bar.ax.set_yticks(shown, [names[index] for index in shown], fontsize=8)
    bar.ax.invert_yaxis()
