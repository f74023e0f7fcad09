"""Colors, names, ticks and curves that all figures share."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import matplotlib
import numpy
from matplotlib.axes import Axes
from matplotlib.figure import Figure, SubFigure
from matplotlib.lines import Line2D
from matplotlib.ticker import Formatter, LogLocator, MaxNLocator, NullFormatter

from lightning_nc.keys import INPUT_NAME, STAGES, Key

__all__ = [
    "COLORS",
    "LEVEL_STYLE",
    "PANEL",
    "WIDTH",
    "color_of",
    "columns_of",
    "draw",
    "legend_below",
    "legend_under",
    "name_of",
    "plain_log_ticks",
    "sized_figure",
    "stage_entries",
    "style_of",
    "wrapped",
]

# The colors of Okabe and Ito, distinct for every kind of color vision, and two more.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#8C510A", "#7F7F7F")
_SMALL: dict[str, Any] = {"fontsize": 8, "color": "0.35"}
LEVEL_STYLE: dict[str, Any] = {"color": "0.4", "linestyle": "-.", "linewidth": 1}
_DIGITS = {
    0.7: (1, 1.2, 1.5, 2, 2.5, 3, 4, 5, 6, 8),
    1.2: (1, 1.5, 2, 3, 5, 7),
    2.5: (1, 2, 5),
}  # by decades of an axis
_LEAST_RANGE = 2  # of a log axis, from end to end
PANEL, WIDTH = 3.1, 12.0  # inches; no panel and no figure is wider
_DASHES = {"train": (), "validate": (5, 2), "test": (1, 1.5)}


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

    The axis is linear if it is to be, or if a value is negative. Several curves get a legend below the axis. A subtitle may
    follow the title after an empty line.
    """
    linear = linear or any(value < 0 for _, ys in curves.values() for value in ys)
    for index, (label, (xs, ys)) in enumerate(curves.items()):
        x, y = numpy.asarray(xs), numpy.asarray(ys, dtype=float)
        _draw_curve(axis, label, x, y, colors[index % len(colors)], style, linear)
    if linear:
        values = numpy.concatenate([[0.0], *(numpy.asarray(line.get_ydata(), dtype=float) for line in axis.lines)])
        whole = not (values[numpy.isfinite(values)] % 1).any()
        axis.yaxis.set_major_locator(MaxNLocator("auto", integer=whole, steps=[1, 2, 2.5, 5, 10]))
    else:
        plain_log_ticks(axis)
    title, _, subtitle = title.partition("\n\n")
    lines = subtitle.count("\n") + bool(subtitle)
    axis.set_title(title, fontsize=10, pad=6 + 11 * lines)
    if subtitle not in ["", *(text.get_text() for text in axis.texts)]:
        above: dict[str, Any] = {"xytext": (0, 4), "textcoords": "offset points", "annotation_clip": False}
        axis.annotate(subtitle, (0.5, 1), xycoords="axes fraction", ha="center", va="bottom", **_SMALL, **above)
    axis.set_xlabel(xlabel)
    axis.xaxis.set_major_locator(MaxNLocator(nbins="auto", integer=True, steps=[1, 2, 5, 10]))
    axis.grid(True, which="major", alpha=0.3)
    for text in [text for text in axis.texts if text.get_text() in ("no finite value", "not measured")]:
        text.remove()  # of another stage
    if not any(numpy.isfinite(line.get_ydata()).any() for line in axis.lines):
        missing = "no finite value" if axis.lines else "not measured"
        axis.text(0.5, 0.5, missing, transform=axis.transAxes, ha="center", va="center", color="0.4")
    if legend and len(curves) > 1:
        legend_below(axis, *axis.get_legend_handles_labels())


def _draw_curve(axis: Axes, label: str, x: Any, y: Any, color: Any, style: Any, linear: bool) -> None:
    seen = (abs(y) < 1e300) & ((y > 0) | linear)  # margins of larger numbers overflow
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


def legend_below(axis: Axes, handles: Sequence[Any], labels: Sequence[str]) -> None:
    """A legend below the label of the x axis, where it hides no curve."""
    columns = _legend_columns(labels, PANEL)
    below: dict[str, Any] = {
        "loc": "upper center",
        "bbox_to_anchor": (0.5, 0.0),
        "borderaxespad": 4.3,
    }  # lines, below ticks and label
    axis.legend(handles, labels, ncols=columns, fontsize=8, frameon=False, handlelength=1.4, columnspacing=1.2, **below)


def plain_log_ticks(axis: Axes) -> None:
    """A log y axis over a factor of two or more, with several labels even below a decade, such as 0.2, 0.3, 0.5."""
    axis.set_yscale("log")
    axis.yaxis.set_major_locator(_LogTicks())
    axis.autoscale_view(scalex=False)
    axis.yaxis.set_major_formatter(_PlainNumbers())
    axis.yaxis.set_minor_formatter(NullFormatter())


class _LogTicks(LogLocator):
    """Powers of ten, with more between them below 2.5 decades; evenly spaced below a factor of 2.2."""

    def view_limits(self, vmin: float, vmax: float) -> tuple[float, float]:
        """At least ``_LEAST_RANGE``, or a change of a few percent would look like a collapse."""
        vmin, vmax = super().view_limits(vmin, vmax)
        wider = max(1.0, math.sqrt(_LEAST_RANGE * vmin / vmax))
        return vmin / wider, vmax * wider

    def tick_values(self, vmin: float, vmax: float) -> Any:
        if not 0 < vmin < vmax or (decades := math.log10(vmax / vmin)) >= 2.5:
            return super().tick_values(vmin, vmax)
        if decades < 0.35:
            ticks = numpy.asarray(MaxNLocator(nbins=4, steps=[1, 2, 5, 10]).tick_values(vmin, vmax))
            return ticks[ticks > 0]
        exponents = numpy.arange(math.floor(math.log10(vmin)), math.ceil(math.log10(vmax)) + 1)
        between = next(digits for most, digits in _DIGITS.items() if decades < most)
        return numpy.outer(10.0**exponents, between).ravel()


class _PlainNumbers(Formatter):
    """0.2 and 1 rather than powers of ten, unless a tick is below a thousandth or from ten thousand on."""

    def __call__(self, x: float, pos: int | None = None) -> str:
        return self.format_ticks([x])[0]

    def format_ticks(self, values: Sequence[float]) -> list[str]:
        if all(1e-3 <= value < 1e4 for value in values if value > 0):
            return [f"{value:.4g}" for value in values]
        return [_power(value) for value in values]


def _power(value: float) -> str:
    """A power of ten, or a multiple of one, as a formula."""
    digits, exponent = f"{value:.3e}".split("e")
    factor = f"{float(digits):g}"
    return (r"$\mathdefault{" if factor == "1" else rf"$\mathdefault{{{factor}\times") + f"10^{{{int(exponent)}}}}}$"


def name_of(layer: str) -> str:
    """What a figure calls a layer."""
    return wrapped(layer or INPUT_NAME, 36)


def wrapped(name: str, width: int = 80) -> str:
    """A name as text of a figure: wrapped at dots, ``$`` shown as it is, no ``_`` first (Matplotlib hides such labels)."""
    text = "\n".join(textwrap.wrap(name.replace(".", ". "), width)).replace(". ", ".").replace("$", r"\$")
    return f" {text}" if text.startswith("_") else text


def color_of(layer: str, layers: Sequence[str]) -> Any:
    """The color of a layer: from light to dark with its depth."""
    return matplotlib.colormaps["viridis_r"](0.25 + 0.75 * layers.index(layer) / max(1, len(layers) - 1))


def sized_figure(
    columns: int, lines: int, runs: int, width: float, beside: float, entries: Sequence[tuple[Any, str]]
) -> Figure:
    """A figure for the panels of some runs, each of this width in inches, with the entries of a legend under each run."""
    below = 0.17 * -(-len(entries) // _legend_columns([text for _, text in entries], width * columns)) + 0.2
    return Figure(
        figsize=(width * columns + beside, ((0.55 + 0.8 * width) * lines + below) * runs), layout="constrained"
    )


def legend_under(part: Figure | SubFigure, entries: Sequence[tuple[Any, str]], inches: float) -> None:
    """A legend under all panels of a figure, which are so many inches wide; it explains triangles if there are any."""
    if any(line.get_marker() == "v" for axis in part.axes for line in axis.lines):
        entries = [*entries, (Line2D([], [], color="0.3", marker="v", linestyle=""), "exactly 0")]
    if entries:
        handles, texts = zip(*entries, strict=True)
        columns = _legend_columns(texts, inches)
        part.legend(handles, texts, loc="outside lower center", fontsize=8, frameon=False, ncols=columns)


def _legend_columns(texts: Sequence[str], inches: float) -> int:
    """How many entries of a legend stand side by side."""
    longest = max((len(line) for text in texts for line in text.splitlines()), default=0)
    return max(1, min(len(texts), int(inches / 0.068) // (longest + 6)))


def columns_of(panels: int) -> int:
    """How many panels stand side by side."""
    return 2 if panels in (2, 4) else 4 if panels > 12 else min(panels, 3)


def style_of(stage: str, loader: int) -> Any:
    """Solid for training, dashed for validation, dotted for test, with more dashes for further dataloaders."""
    return (0, _DASHES[stage] + (3, 1.5) * loader) if _DASHES[stage] else "-"


def stage_entries(keys: Iterable[Key]) -> list[tuple[Line2D, str]]:
    """The entries of a legend for the stages and dataloaders; none if there is one only."""
    groups = sorted({key[:2] for key in keys}, key=lambda group: (list(STAGES).index(group[0]), group[1]))
    named = [(style_of(*group), "{}_{}".format(*group) if group[1] else group[0]) for group in groups]
    return [(Line2D([], [], color="0.3", linestyle=style), name) for style, name in named if len(named) > 1]
