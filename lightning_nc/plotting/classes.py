"""Figures of the classes: their table, and the cosines of their means."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib
import numpy
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from lightning_nc.plotting.style import COLORS
from lightning_nc.scenes import Scene, first_middle_last, pictured

__all__ = ["plot_classes", "plot_frames", "plot_gram"]

_MOST_ROWS = 20
_MOST_NAMES = 12  # classes of a heat map that are all named
_COLUMNS = {
    "nearest_cdnv": "spread against\nnearest class",
    "nc1_trace_share": "share of\nall spread",
    "mean_norm": "norm of the\nclass mean",
    "weight_cosine": "cosine with\nits weight row",
    "samples": "samples\n",
}
_AT_COLLAPSE = {"nearest_cdnv": 0.0, "weight_cosine": 1.0}


def plot_classes(table: Mapping[str, Sequence[Any]], scenes: Sequence[Scene]) -> Figure:
    r"""Draw the table of the classes, and the histogram of the cosines between their means.

    A row is a class and its nearest class; the classes with the largest ``nearest_cdnv``, at most 20, stand at the top. Below
    is the histogram of the cosines between the centered class means of all pairs of classes, of the last measurement, beside the
    value -1 / (K - 1) of a simplex ETF. Of more than 32 classes, scenes hold the cosines of the first 32.

    Args:
        table: see :func:`lightning_nc.functional.geometry.per_class`; may be empty.
        scenes: ``callback.history.scenes``; may be empty.

    Raises:
        ValueError: if both are empty.
    """
    rows, shown = _worst(table), pictured(scenes)
    if not rows and not shown:
        raise ValueError("no classes were measured; train with the callback, or append what measure() returns")
    columns = [name for name in _COLUMNS if rows and name in table]
    mosaic: Any = ([columns] if rows else []) + ([["cosines"] * max(1, len(columns))] if shown else [])
    heights = ([0.9 + 0.2 * len(rows)] if rows else []) + ([2.2] if shown else [])
    figure = Figure(figsize=(7.2, sum(heights) + 0.8), layout="constrained")
    axes = figure.subplot_mosaic(mosaic, height_ratios=heights)
    for name in columns:
        _column(axes[name], name, [row[name] for row in rows], table[name])
    if rows:
        axes[columns[0]].set_yticks(range(len(rows)), [_name(row) for row in rows])
        axes[columns[0]].set_ylabel("class → nearest class")
        most = f"{len(rows)} of {len(table['class'])}" if len(rows) < len(table["class"]) else f"all {len(rows)}"
        figure.suptitle(f"{most} classes, the least separated at the top", fontsize=10)
    if shown:
        _histogram(axes["cosines"], shown[-1])
    ideal = f" (cosine: {_minus(_ideal(shown[-1]))})" if shown and shown[-1].classes > 1 else ""
    entries = {
        f"at collapse{ideal}": Line2D([], [], color=COLORS[1], linewidth=1.5),
        "mean over all classes": Line2D([], [], color="0.5", linestyle="--", linewidth=1),
    }
    figure.legend(list(entries.values()), list(entries), loc="outside lower center", ncol=2, fontsize=8, frameon=False)
    return figure


def plot_frames(scenes: Sequence[Scene]) -> Figure:
    """Draw the cosines of the centered class means in the first, middle and last measured epoch as heat maps on one scale.

    The scale goes as far as the largest absolute cosine between two classes, on both sides of zero, or from -1 to 1 for one
    measurement. The diagonal, which is 1, is black where it is beyond the scale. The color bar marks -1 / (K - 1), the value of
    all pairs of classes at a simplex ETF. Of more than 32 classes, the first 32 are drawn. The middle is that of the
    measurements.

    Args:
        scenes: ``callback.history.scenes``.

    Raises:
        ValueError: if there is none.
    """
    shown = first_middle_last(pictured(scenes))
    if not shown:
        raise ValueError("no classes were measured; train with the callback, or append what measure() returns")
    figure = Figure(figsize=(2.5 * len(shown) + 1.1, 3.1), layout="constrained")
    axes = figure.subplots(1, len(shown), squeeze=False)[0]
    largest = _largest(shown) if len(shown) > 1 else 1.0  # of one epoch: pictures of several are compared
    for axis, scene in zip(axes, shown, strict=True):
        image = _heat_map(axis, scene.cosines, scene.labels, largest)
        axis.set_title(f"epoch {scene.epoch:g}", fontsize=10)
    axes[0].set_ylabel("class")
    bar = figure.colorbar(image, ax=axes.tolist(), aspect=25, shrink=0.8, extend="max" if largest < 1 else "neither")
    ticks = [-largest, -largest / 2, 0, largest / 2, largest]
    bar.set_ticks(ticks, labels=[_minus(tick) for tick in ticks])
    bar.ax.tick_params(labelsize=8)
    last = shown[-1]
    if last.classes > 1:
        bar.ax.axhline(_ideal(last), color="black", linewidth=1.5)
        mark = bar.ax.secondary_yaxis("left")
        mark.set_yticks([_ideal(last)], [f"ideal\n{_minus(_ideal(last))}"], fontsize=8)
    beyond = ", 1 on the diagonal (black)" if largest < 1 else ""
    figure.suptitle("\n".join([f"cosines of the centered class means{beyond}", *_first_of(last)]), fontsize=10)
    return figure


def plot_gram(gram: Any, classes: Sequence[int] | None = None) -> Figure:
    """Plot the Gram matrix of the unit class means, (K, K): the cosines of all pairs of classes, 1 on the diagonal.

    Args:
        gram: the matrix.
        classes: the class of each row; 0 to K - 1 by default.
    """
    figure = Figure(figsize=(4.2, 3.6), layout="constrained")
    axis = figure.subplots()
    image = _heat_map(axis, gram, range(len(gram)) if classes is None else classes)
    axis.set_title("cosines of the centered class means", fontsize=10)
    axis.set_ylabel("class")
    figure.colorbar(image)
    return figure


def _heat_map(axis: Axes, cosines: Any, labels: Sequence[int], largest: float = 1.0) -> Any:
    colors = matplotlib.colormaps["RdBu_r"].with_extremes(over="black")
    image = axis.imshow(numpy.asarray(cosines), cmap=colors, vmin=-largest, vmax=largest)
    axis.set_facecolor("0.5")  # of what is not a number
    axis.set_xlabel("class")
    axis.tick_params(labelsize=8)
    for ticks in (axis.xaxis, axis.yaxis):
        if len(labels) <= _MOST_NAMES:
            ticks.set_ticks(range(len(labels)), [str(label) for label in labels])
        else:
            ticks.set_major_locator(MaxNLocator(nbins=6, integer=True))
            ticks.set_major_formatter(lambda at, _: str(labels[int(at)]) if 0 <= at < len(labels) else "")
    return image


def _largest(scenes: Sequence[Scene]) -> float:
    """The largest absolute cosine between two classes, of those measured and the ideal one; 1 if there is none."""
    found = [numpy.asarray(scene.cosines, dtype=float)[~numpy.eye(len(scene.labels), dtype=bool)] for scene in scenes]
    values = numpy.abs([*numpy.concatenate(found), _ideal(scenes[-1])])
    return float(min(1.0, values[numpy.isfinite(values)].max(initial=0.0))) or 1.0


def _ideal(scene: Scene) -> float:
    """The cosine of every pair of classes at a simplex ETF."""
    return -1 / (scene.classes - 1) if scene.classes > 1 else math.nan


def _minus(number: float) -> str:
    return f"{number:.2g}".replace("-", "\N{MINUS SIGN}")


def _first_of(scene: Scene) -> list[str]:
    """How many classes are drawn, if it is not all of them."""
    return [f"first {len(scene.labels)} of {scene.classes} classes"] if len(scene.labels) < scene.classes else []


def _worst(table: Mapping[str, Sequence[Any]]) -> list[dict[str, Any]]:
    """The rows of the classes that are least apart from another, the worst first."""
    rows = [dict(zip(table, row, strict=True)) for row in zip(*table.values(), strict=True)]
    return sorted(rows, key=lambda row: -row["nearest_cdnv"] if row["nearest_cdnv"] >= 0 else 0)[:_MOST_ROWS]


def _name(row: Mapping[str, Any]) -> str:
    return f"{row['class']}" if row["nearest"] is None else f"{row['class']} → {row['nearest']}"


def _column(axis: Axes, name: str, values: Sequence[float], of_all: Sequence[float]) -> None:
    """One column of the table: a dot for each class; what is not a finite number is written."""
    numbers, places = numpy.asarray(values, dtype=float), numpy.arange(len(values))
    finite = numpy.isfinite(numbers)
    axis.plot(numbers[finite], places[finite], "o", color=COLORS[0], markersize=5)
    for place in places[~finite]:
        axis.text(
            0.5,
            place,
            f"{numbers[place]:g}",
            transform=axis.get_yaxis_transform(),
            ha="center",
            va="center",
            fontsize=8,
        )
    if name in _AT_COLLAPSE:
        axis.axvline(_AT_COLLAPSE[name], color=COLORS[1], linewidth=1.5)
    elif numpy.isfinite(of_all).any():
        axis.axvline(float(numpy.nanmean(of_all)), color="0.5", linestyle="--", linewidth=1)
    axis.set_title(_COLUMNS[name], fontsize=9)
    axis.set_xlabel(name, fontsize=8)
    axis.xaxis.set_major_locator(MaxNLocator(nbins=3, integer=name == "samples"))
    axis.set_yticks(places, [])
    axis.set_ylim(len(values) - 0.5, -0.5)
    axis.tick_params(labelsize=8)
    axis.grid(True, alpha=0.3)


def _histogram(axis: Axes, scene: Scene) -> None:
    cosines = numpy.asarray(scene.cosines, dtype=float)
    pairs = cosines[numpy.triu_indices(len(cosines), 1)]
    pairs = pairs[numpy.isfinite(pairs)]
    if len(pairs):
        low, high = min(pairs.min(), _ideal(scene)), max(pairs.max(), _ideal(scene))
        margin = max(0.05 * (high - low), 0.05)
        axis.hist(pairs, bins=numpy.linspace(low - margin, high + margin, 16).tolist(), color=COLORS[0])
        axis.axvline(_ideal(scene), color=COLORS[1], linewidth=1.5)
    else:
        axis.text(0.5, 0.5, "no finite value", transform=axis.transAxes, ha="center", va="center", color="0.4")
    axis.set_title(", ".join([f"cosines between class means, epoch {scene.epoch:g}", *_first_of(scene)]), fontsize=9)
    axis.set_xlabel("cosine; −1/(K − 1) at collapse to a simplex ETF", fontsize=8)
    axis.set_ylabel("pairs of classes", fontsize=8)
    axis.yaxis.set_major_locator(MaxNLocator(nbins=5, integer=True))
    axis.tick_params(labelsize=8)
