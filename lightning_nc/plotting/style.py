"""Colors, names and curves that all figures share."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib
import numpy
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

__all__ = ["COLORS", "INPUT_NAME", "color_of", "draw", "name_of", "wrapped"]

# The colors of Okabe and Ito, distinct for every kind of color vision, and two more.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#8C510A", "#7F7F7F")
INPUT_NAME = "classifier input"


def draw(
    axis: Axes,
    title: str,
    xlabel: str,
    curves: Mapping[str, tuple[Sequence[float], Sequence[float]]],
    colors: Sequence[Any] = COLORS,
    style: Any = "-",
    legend: bool = True,
    linear: bool = False,
) -> None:
    """Draw curves by label, each a pair of x and y, on a log axis, where zeros are triangles at its lower edge.

    The axis is linear if it is to be, or if a value is negative.
    """
    linear = linear or any(numpy.nanmin(ys, initial=0) < 0 for _, ys in curves.values())
    for index, (label, (xs, ys)) in enumerate(curves.items()):
        color, x, y = colors[index % len(colors)], numpy.asarray(xs), numpy.asarray(ys, dtype=float)
        seen = numpy.isfinite(y) & ((y > 0) | linear)
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
        if not linear and (zero := y == 0).any():
            axis.plot(x[zero], zero[zero] * 0.0, "v", color=color, transform=axis.get_xaxis_transform(), clip_on=False)
    if not linear:
        axis.set_yscale("log")
    axis.set_title(title, fontsize=10)
    axis.set_xlabel(xlabel)
    axis.xaxis.set_major_locator(MaxNLocator(nbins="auto", integer=True, steps=[1, 2, 5, 10]))
    axis.grid(True, which="major", alpha=0.3)
    for text in [text for text in axis.texts if text.get_text() == "no finite value"]:
        text.remove()  # of another stage
    if not any(numpy.isfinite(line.get_ydata()).any() for line in axis.lines):
        axis.text(0.5, 0.5, "no finite value", transform=axis.transAxes, ha="center", va="center", color="0.4")
    if legend and len(curves) > 1:
        axis.legend(fontsize=8, framealpha=0.8)


def name_of(layer: str) -> str:
    return wrapped(layer or INPUT_NAME, 36)


def wrapped(name: str, width: int = 80) -> str:
    """A name as text of a figure: wrapped at dots, ``$`` shown as it is, no ``_`` first (Matplotlib hides such labels)."""
    text = "\n".join(textwrap.wrap(name.replace(".", ". "), width)).replace(". ", ".").replace("$", r"\$")
    return f" {text}" if text.startswith("_") else text


def color_of(layer: str, layers: Sequence[str]) -> Any:
    return matplotlib.colormaps["viridis_r"](0.25 + 0.75 * layers.index(layer) / max(1, len(layers) - 1))
