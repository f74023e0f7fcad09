"""Figures from a history of measurements, in the layout of Tirer & Bruna (2022)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy
from matplotlib.axes import Axes
from matplotlib.figure import Figure

__all__ = ["draw", "plot_history"]

# Okabe and Ito's colours: distinct for every kind of colour vision.
_COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
_TITLES = {
    "nc1": "NC1, within-class variability",
    "nc2": "NC2, class means to frame",
    "nc3": "NC3, weight to class means",
}


def plot_history(
    history: Iterable[Mapping[str, Any]], objective: Mapping[str, Sequence[float]] | None = None
) -> Figure:
    """Draw NC1, NC2 and NC3 over the epochs, on log axes; what is no measure of the three gets a panel of its own.

    Args:
        history: rows with ``epoch`` and values by key, as in ``NeuralCollapseCallback.history``. A key's last part names
            the measure: ``nc/layer3/nc1``.
        objective: curves for a first panel, as the paper has it: label -> values, one per row of the history.
    """
    rows = list(history)
    keys = list(dict.fromkeys(key for row in rows for key in row if key not in ("stage", "epoch", "step", "partial")))
    panels: dict[str, list[str]] = {family: [] for family in ("nc1", "nc2", "nc3", "other")}
    for key in keys:
        family = key.split("/")[-1][:3]
        panels[family if family in panels else "other"].append(key)
    shown = [family for family, members in panels.items() if members] or ["nc1"]
    first = 1 if objective else 0
    figure = Figure(figsize=(3.6 * (len(shown) + first), 3.2), layout="constrained")
    axes = figure.subplots(1, len(shown) + first, squeeze=False)[0]
    epochs = [row["epoch"] for row in rows]
    if objective:
        draw(axes[0], "Training objective", "epoch", {name: (epochs, list(v)) for name, v in objective.items()})
    for axis, family in zip(axes[first:], shown, strict=True):
        curves = {
            key.removeprefix("nc/"): (
                [row["epoch"] for row in rows if key in row],
                [row[key] for row in rows if key in row],
            )
            for key in panels[family]
        }
        draw(axis, _TITLES.get(family, "other measures"), "epoch", curves)
    return figure


def draw(axis: Axes, title: str, xlabel: str, curves: Mapping[str, tuple[Sequence[float], Sequence[float]]]) -> None:
    """One panel: curves by label, each a pair of x and y, on a log axis; values of zero are marked at the lower edge."""
    positive = [y for _, ys in curves.values() for y in ys if y > 0 and numpy.isfinite(y)]
    floor = min(positive, default=1.0) / 3
    for (label, (xs, ys)), color in zip(curves.items(), _cycle(_COLORS), strict=False):
        y = numpy.asarray(ys, dtype=float)
        zero = y == 0
        marker = "o" if len(y) < 2 else None
        axis.plot(xs, numpy.where(zero, floor, y), color=color, label=label, linewidth=1.6, marker=marker, markersize=4)
        if zero.any():
            axis.plot(numpy.asarray(xs)[zero], y[zero] + floor, "v", color=color, markersize=5)
    axis.set_yscale("log")
    axis.set_title(title, fontsize=10)
    axis.set_xlabel(xlabel)
    axis.grid(True, which="major", alpha=0.3)
    if len(curves) > 1:
        axis.legend(fontsize=8, framealpha=0.8)


def _cycle(colors: Sequence[str]) -> Iterable[str]:
    while True:
        yield from colors
