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

from lightning_nc.functional import METRICS
from lightning_nc.functional.geometry import FRAMES_IN_WORDS
from lightning_nc.keys import Key, base_name, natural_order, parse_key
from lightning_nc.plotting.curves import (
    Curve,
    RunCurves,
    chosen,
    drawn,
    is_chance,
    is_linear,
    other_frames,
    panels_of,
    read_curves,
    reading,
    same_curve,
    same_layers,
    title_of,
)
from lightning_nc.plotting.style import (
    COLORS,
    LEVEL_STYLE,
    WIDTH,
    color_of,
    columns_of,
    draw,
    legend_below,
    stage_entries,
    style_of,
    wrapped,
)
from lightning_nc.runs import Run, epoch_of, metrics_of

__all__ = ["plot_history", "plot_runs"]

_MOST_NAMES = 16  # lines of text that fit in a legend beside one row of panels
_CHANCE = {"alpha": 0.35, "linewidth": 1, "marker": "_"}


class _Layout(NamedTuple):
    """What the panels of all runs have in common."""

    panels: list[list[str]]
    layers: dict[str, str]  # the layers by what they are called; empty if only the classifier's input was measured
    linear: list[bool]
    levels: list[dict[str, float]]
    num_classes: int | None


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
    names = chosen(found.values(), metrics)
    found = {name: run._replace(metrics=drawn(run.metrics, names)) for name, run in found.items()}
    if objective is not None:
        found = {name: run._replace(objectives=_over_training(runs[name], objective)) for name, run in found.items()}
    layout = _layout(list(found.values()), names, num_classes)
    entries = _entries(found.values(), layout)
    first = any(run.objectives for run in found.values()) and (metrics is None or objective is not None)
    count = len(layout.panels) + first
    columns = columns_of(count)
    lines = -(-count // columns)
    texts = [line for text in [*layout.layers.values(), *(text for _, text in entries)] for line in text.splitlines()]
    beside = 0.6 + 0.065 * max(map(len, texts)) if texts else 0
    width = min(3.6, (WIDTH - beside) / columns)
    figure = Figure(figsize=(width * columns + beside, (0.4 + 0.85 * width) * lines * len(runs)), layout="constrained")
    above: list[Axes] = []
    # Constrained layout has no groups of axes, so each run is a subfigure.
    for (name, run), part in zip(found.items(), figure.subfigures(len(runs), 1, squeeze=False)[:, 0], strict=True):
        axes = list(part.subplots(lines, columns, squeeze=False).ravel())
        for axis in axes[count:]:
            axis.remove()
        for axis, other in zip(axes[:count], above, strict=False):  # so that runs can be compared by eye
            axis.sharex(other)
            axis.sharey(other)
        above = above or axes
        if first:
            _draw_objectives(axes[0], run)
        for index, axis in enumerate(axes[first:count]):
            _draw_panel(axis, run, layout, index)
        _explain(part, axes[:count], layout, entries, most=_MOST_NAMES * lines)
        part.suptitle("\n".join(filter(None, (wrapped(name, 40 * columns), _geometry(runs[name])))), fontsize=10)
    return figure


def _over_training(rows: Run, objective: Mapping[str, Sequence[float]]) -> dict[str, Curve]:
    epochs = [epoch_of(row) for row in rows if row.get("stage", "train") == "train"]
    return {label: (epochs, list(values)) for label, values in objective.items()}


def _layout(runs: Sequence[RunCurves], names: Sequence[str], num_classes: int | None) -> _Layout:
    layers = list(dict.fromkeys(key.layer for run in runs for key in run.metrics if key.layer))
    if len(runs) > 1:  # they may have different layers
        layers.sort(key=natural_order)
    layers += [""] * (bool(layers) and any(not key.layer for run in runs for key in run.metrics))
    called = {layer: wrapped(name, 36) for layer, name in same_layers([run.metrics for run in runs], layers).items()}
    panels, curves = panels_of(names, by_family=not layers), [run.metrics for run in runs]
    linear = [is_linear(members, curves) for members in panels]
    levels = [other_frames(members, curves, num_classes) for members in panels]
    return _Layout(panels, called, linear, levels, num_classes)


def _geometry(rows: Run) -> str:
    """The frame that the class means were nearest to at last, in words; empty if none was near, or that is not known."""
    known = [row for row in rows if "geometry" in row]
    row = next((row for row in reversed(known) if row.get("stage", "train") == "train"), known[-1] if known else {})
    name = row.get("geometry")
    if name not in FRAMES_IN_WORDS:
        return ""
    value = next((value for key, value in metrics_of(row).items() if parse_key(key)[2:] == ("", name)), None)
    return f"nearest frame at the end: {FRAMES_IN_WORDS[name]}" + (f" ({name} {value:.2g})" if value is not None else "")


def _draw_objectives(axis: Axes, run: RunCurves) -> None:
    """Losses on a log axis on the left, accuracies on a linear one on the right."""
    right = {name: curve for name, curve in run.objectives.items() if "acc" in name.lower()}
    left = {name: curve for name, curve in run.objectives.items() if name not in right}
    title = " and ".join(["loss"] * bool(left) + ["accuracy"] * bool(right)).capitalize() or "Loss and accuracy"
    draw(axis, title, run.over, left or right, COLORS[:1] + COLORS[5:], legend=False, linear=not left)
    axis.set_ylabel("loss" if left else "accuracy", color=COLORS[0])
    handles, labels = axis.get_legend_handles_labels()
    if left and right:
        twin = axis.twinx()
        draw(twin, "", run.over, right, COLORS[1:5], legend=False, linear=True)
        twin.set_ylabel("accuracy", color=COLORS[1])
        twin.grid(False)
        more, names = twin.get_legend_handles_labels()
        handles, labels = handles + more, labels + [f"{name} (right)" for name in names]
    if labels:
        legend_below(axis, handles, labels)


def _draw_panel(axis: Axes, run: RunCurves, layout: _Layout, index: int) -> None:
    members, layers = layout.panels[index], list(layout.layers)
    text = title_of(members), run.over
    subtitle = reading(members, layout.num_classes)
    for group in dict.fromkeys(key[:2] for key in run.metrics) or [("train", 0)]:
        of_group = {key: curve for key, curve in run.metrics.items() if key[:2] == group}
        curves: dict[str, Curve] = {}
        colors: dict[Key, Any] = {}
        for key, curve in of_group.items():
            if key.metric in members and (not layers or key.layer in layers):
                label = layout.layers[key.layer] if layers else wrapped(key.metric)
                same = None if layers else next((name for name in curves if same_curve(curves[name], curve)), None)
                if same is not None:  # it would lie on the other and hide it
                    curves = {f"{name} = {label}" if name == same else name: curves[name] for name in curves}
                    continue
                curves[label] = curve
                colors[key] = color_of(key.layer, layers) if layers else COLORS[members.index(key.metric) % len(COLORS)]
        draw(
            axis,
            *text,
            curves,
            list(colors.values()),
            style_of(*group),
            legend=not layers and len(members) > 1,
            linear=layout.linear[index],
            subtitle=subtitle,
        )
        for key, (x, y) in of_group.items():
            own = key._replace(metric=base_name(key.metric))
            if is_chance(key.metric) and own in colors:
                axis.plot(x, y, color=colors[own], zorder=1, **_CHANCE)
    for level in dict.fromkeys(layout.levels[index].values()):
        axis.axhline(level, **LEVEL_STYLE)


def _entries(runs: Iterable[RunCurves], layout: _Layout) -> list[tuple[Line2D, str]]:
    """The entries of the legend beside the layers: stages by dashes, values by chance, and exact frames of the other kind."""
    keys = list(dict.fromkeys(key for run in runs for key in run.metrics))
    entries = stage_entries(keys)
    if any(is_chance(key.metric) for key in keys):
        entries.append((Line2D([], [], color="0.2", **_CHANCE), "chance"))
    levels = dict.fromkeys(label for found in layout.levels for label in found)
    return entries + [(Line2D([], [], **LEVEL_STYLE), label) for label in levels]


def _explain(
    part: SubFigure, axes: list[Axes], layout: _Layout, entries: Sequence[tuple[Line2D, str]], most: int
) -> None:
    """One legend for all panels: layers by color, then the entries. Many layers get a color bar with some of their names."""
    layers, names = list(layout.layers), list(layout.layers.values())
    colors = [color_of(layer, layers) for layer in layers]
    entries = [*((Line2D([], [], color=color), name) for color, name in zip(colors, names, strict=True)), *entries]
    if "\n".join(names).count("\n") >= most:
        entries = entries[len(names) :]
        ticks = max(2, min(6, most // max(name.count("\n") + 1 for name in names)))
        shown = numpy.linspace(0, len(layers) - 1, ticks).round().astype(int)
        scale = ScalarMappable(Normalize(-0.5, len(layers) - 0.5), ListedColormap(colors))
        bar = part.colorbar(scale, ax=axes, aspect=30)
        bar.ax.set_yticks(shown, [names[index] for index in shown], fontsize=8)
        bar.ax.invert_yaxis()
    if entries:
        part.legend(*zip(*entries, strict=True), loc="outside right upper", fontsize=8)
