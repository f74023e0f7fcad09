"""Figures from measurements, in the layout of Tirer & Bruna (2022)."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import matplotlib
import numpy
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

__all__ = ["draw", "natural", "plot_gram", "plot_history", "plot_runs"]

# Okabe and Ito's colours, distinct for every kind of colour vision, and two more.
_COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#8C510A", "#7F7F7F")
_TITLES = {
    "nc1": "NC1, within-class variability",
    "nc2": "NC2, class means to frame",
    "nc2_etf": "NC2, class means to ETF",
    "nc2_etf_centered": "NC2, centred means to ETF",
    "nc2_of": "NC2, class means to OF",
    "nc3": "NC3, weight to class means",
    "nc3_centered": "NC3, weight to centred means",
}
_OTHER_FRAME = {"nc2_etf": "OF", "nc2_of": "ETF"}
_DASHES = {"train": (), "validate": (5, 2), "test": (1, 1.5)}

Run = Sequence[Mapping[str, Any]]


def plot_history(
    history: Iterable[Mapping[str, Any]],
    objective: Mapping[str, Sequence[float]] | None = None,
    num_classes: int | None = None,
) -> Figure:
    """Draw the measures over the epochs, on log axes that show zeros at their lower edge.

    NC1, NC2 and NC3 have a panel each. Where layers were measured every measure has one, and the layers are a scale of
    colours, from light to dark with depth. Training data are drawn solid, validation dashed, test dotted.

    Args:
        history: rows with ``stage``, ``epoch`` and values by key, as in ``NeuralCollapseCallback.history``.
        objective: curves for a first panel, as the paper has it: label -> values, one per row of the training data.
        num_classes: K; then a line in the panels of ``nc2_etf`` and ``nc2_of`` marks their value at an exact frame of the
            other kind, sqrt(2 - 2 sqrt((K - 1) / K)).
    """
    return plot_runs({"": list(history)}, objective, num_classes)


def plot_runs(
    runs: Mapping[str, Run],
    objective: Mapping[str, Sequence[float]] | None = None,
    num_classes: int | None = None,
) -> Figure:
    """Draw several runs below each other, panels as in :func:`plot_history` and with the same axes.

    Args:
        runs: history by name.
        objective: see :func:`plot_history`; of a single run.
        num_classes: see :func:`plot_history`.
    """
    curves = {name: _curves(rows) for name, rows in runs.items()}
    layers = list(dict.fromkeys(layer for run in curves.values() for _, layer, _ in run if layer))
    if len(runs) > 1:  # which may have different ones
        layers.sort(key=natural)
    measures = list(dict.fromkeys(measure for run in curves.values() for _, _, measure in run)) or ["nc1"]
    if layers:
        measures.sort(key=lambda measure: _order(measure))
        panels = [[measure] for measure in measures]
    else:
        families = {family: [m for m in measures if m[:3] == family] for family in ("nc1", "nc2", "nc3")}
        families["other measures"] = [m for m in measures if m[:3] not in families]
        panels = [found for found in families.values() if found]
    first = 1 if objective else 0
    columns = 3 if len(panels) + first > 4 else len(panels) + first
    lines = -(-(len(panels) + first) // columns)
    entries = _explained([key[0] for run in curves.values() for key in run], layers)
    beside = -(-len(entries) // (14 * lines))
    figure = Figure(figsize=(3.6 * columns + 1.3 * beside, 3.1 * lines * len(runs)), layout="constrained")
    # Constrained layout knows no groups, so each run is a sub-figure of its own.
    for (name, run), part in zip(curves.items(), figure.subfigures(len(runs), 1, squeeze=False)[:, 0], strict=True):
        axes = part.subplots(lines, columns, squeeze=False).ravel()
        for axis in axes[len(panels) + first :]:
            axis.remove()
        if objective:
            epochs = [row["epoch"] for row in runs[name] if row.get("stage", "train") == "train"]
            draw(axes[0], "Training objective", "epoch", {k: (epochs, list(v)) for k, v in objective.items()})
        for axis, members in zip(axes[first:], panels, strict=False):
            for stage in dict.fromkeys(stage for stage, _, _ in run):
                chosen = {key: curve for key, curve in run.items() if key[0] == stage and key[2] in members}
                draw(
                    axis,
                    _title(members),
                    "epoch",
                    {
                        (layer or "features") if layers else measure: curve
                        for (_, layer, measure), curve in chosen.items()
                    },
                    [_color(layer, layers, members.index(measure)) for _, layer, measure in chosen],
                    _style(stage),
                    legend=not layers and len(members) > 1,
                )
            if num_classes and (frames := [_OTHER_FRAME[m] for m in members if m in _OTHER_FRAME]):
                _mark_frame(axis, num_classes, frames[0] if len(frames) == 1 else "other frame")
        if entries:
            part.legend(entries.values(), entries.keys(), loc="outside right upper", fontsize=8, ncols=beside)
        longest = 40 * columns
        part.suptitle(name if len(name) <= longest else f"...{name[-longest:]}", fontsize=10)
    _share_scales(figure)
    return figure


def _explained(stages: Sequence[str], layers: Sequence[str]) -> dict[str, Line2D]:
    """Lines for a legend of what is the same in every panel: layers by colour, stages by dashes."""
    entries = {}
    if layers:
        entries = {layer or "features": Line2D([], [], color=_color(layer, layers, 0)) for layer in [*layers, ""]}
    if len(set(stages)) > 1:
        entries |= {stage: Line2D([], [], color="0.3", linestyle=_style(stage)) for stage in dict.fromkeys(stages)}
    return entries


def _mark_frame(axis: Axes, num_classes: int, name: str) -> None:
    level = math.sqrt(2 - 2 * math.sqrt((num_classes - 1) / num_classes))
    axis.axhline(level, color="0.4", linestyle="-.", linewidth=1)
    axis.text(0.02, level, f"exact {name}", transform=axis.get_yaxis_transform(), va="bottom", fontsize=7, color="0.3")


def plot_gram(gram: Any, classes: Sequence[int] | None = None) -> Figure:
    """Draw a Gram matrix of unit class means, (K, K): the cosines of all pairs of classes, 1 on the diagonal.

    Args:
        gram: the matrix.
        classes: the class of each row; 0 to K - 1 where it is not given.
    """
    figure = Figure(figsize=(4.2, 3.6), layout="constrained")
    axis = figure.subplots()
    image = axis.imshow(numpy.asarray(gram), cmap="RdBu_r", vmin=-1, vmax=1)
    axis.set_title("cosines of the centred class means", fontsize=10)
    axis.set_xlabel("class")
    axis.set_ylabel("class")
    for ticks in (axis.xaxis, axis.yaxis):
        ticks.set_major_locator(MaxNLocator(nbins=6, integer=True))
        if classes is not None:
            ticks.set_major_formatter(lambda at, _: str(classes[int(at)]) if 0 <= at < len(classes) else "")
    figure.colorbar(image)
    return figure


def draw(
    axis: Axes,
    title: str,
    xlabel: str,
    curves: Mapping[str, tuple[Sequence[float], Sequence[float]]],
    colors: Sequence[Any] = _COLORS,
    style: Any = "-",
    legend: bool = True,
) -> None:
    """Curves by label, each a pair of x and y, on a log axis; values of zero are triangles at its lower edge."""
    for index, (label, (xs, ys)) in enumerate(curves.items()):
        color, x, y = colors[index % len(colors)], numpy.asarray(xs), numpy.asarray(ys, dtype=float)
        seen = numpy.isfinite(y) & (y > 0)
        alone = seen & ~numpy.append(seen[1:], False) & ~numpy.append(False, seen[:-1])
        known = {line.get_label() for line in axis.lines}
        axis.plot(
            x,
            numpy.where(seen, y, numpy.nan),
            linestyle=style,
            color=color,
            label=f"_{label}" if label in known else label,
            linewidth=1.6,
            marker="o" if alone.any() else None,
            markersize=4,
            markevery=alone.nonzero()[0].tolist(),
        )
        if (zero := y == 0).any():
            axis.plot(x[zero], zero[zero] * 0.0, "v", color=color, transform=axis.get_xaxis_transform(), clip_on=False)
    axis.set_yscale("log")
    axis.set_title(title, fontsize=10)
    axis.set_xlabel(xlabel)
    axis.xaxis.set_major_locator(MaxNLocator(nbins="auto", integer=True, steps=[1, 2, 5, 10]))
    axis.grid(True, which="major", alpha=0.3)
    if not any(numpy.isfinite(line.get_ydata()).any() for line in axis.lines):
        axis.text(0.5, 0.5, "no finite value", transform=axis.transAxes, ha="center", va="center", color="0.4")
    if legend and len(curves) > 1:
        axis.legend(fontsize=8, framealpha=0.8)


def _curves(rows: Run) -> dict[tuple[str, str, str], tuple[list[float], list[float]]]:
    """Epochs and values by stage, layer ("" is the classifier's input) and measure."""
    curves: dict[tuple[str, str, str], tuple[list[float], list[float]]] = {}
    for row in rows:
        for key, value in row.items():
            if key.startswith("nc/"):
                stage, layer, measure = split_key(key)
                xs, ys = curves.setdefault((stage, layer, measure), ([], []))
                xs.append(row["epoch"])
                ys.append(value)
    # By stage, and the classifier's input last and on top, in whatever order a logger has its columns.
    order = sorted(curves, key=lambda key: (list(_DASHES).index(key[0].split("_")[0]), key[0], key[1] == ""))
    return {key: curves[key] for key in order}


def split_key(key: str) -> tuple[str, str, str]:
    """Stage, layer and measure of a logged key such as ``nc/val/layer3/nc1``; ``validate_1`` is of the second loader."""
    _, *middle, measure = key.split("/")
    found = re.fullmatch(r"(val|test)(_\d+)?", middle[0]) if middle else None
    if found is None:
        return "train", "/".join(middle), measure
    return ("validate" if found[1] == "val" else "test") + (found[2] or ""), "/".join(middle[1:]), measure


def _order(measure: str) -> int:
    return list(_TITLES).index(measure) if measure in _TITLES else len(_TITLES)


def _title(members: Sequence[str]) -> str:
    """Of a panel: the measure, or what several have in common."""
    (first, *others) = members
    if not others:
        return _TITLES.get(first, first)
    return _TITLES.get(first[:3], "other measures")


def _style(stage: str) -> Any:
    """Solid for training, dashed for validation, dotted for test, and more dashes for their further data loaders."""
    name, _, loader = stage.partition("_")
    return (0, _DASHES[name] + (3, 1.5) * int(loader or 0)) if _DASHES[name] else "-"


def _color(layer: str, layers: Sequence[str], member: int) -> Any:
    """The scale of layers, light to dark with depth, or a colour for each measure where there are none."""
    if not layers:
        return _COLORS[member % len(_COLORS)]
    depth = layers.index(layer) if layer else len(layers)
    return matplotlib.colormaps["viridis_r"](0.25 + 0.75 * depth / len(layers))


def natural(name: str) -> list[int | str]:
    """A key that sorts layer2 before layer10."""
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", name)]


def _share_scales(figure: Figure) -> None:
    """The same limits for panels of the same title, so that runs can be compared by eye."""
    by_title: dict[str, list[Axes]] = {}
    for axis in figure.axes:
        by_title.setdefault(axis.get_title(), []).append(axis)
    for axes in by_title.values():
        if len(axes) > 1:
            for which in ("xlim", "ylim"):
                limits = [getattr(axis, f"get_{which}")() for axis in axes]
                for axis in axes:
                    getattr(axis, f"set_{which}")(min(low for low, _ in limits), max(high for _, high in limits))
