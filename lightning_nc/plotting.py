"""Figures of metrics over epochs, in the layout of Tirer & Bruna (2022)."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import matplotlib
import numpy
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import ListedColormap, Normalize
from matplotlib.figure import Figure, SubFigure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from lightning_nc.functional import METRICS
from lightning_nc.functional.geometry import FRAMES_IN_WORDS
from lightning_nc.keys import CHANCE, DEPTH, ERROR, STAGES, TRAIN_MEANS, Key, base_name, natural_order, parse_key
from lightning_nc.runs import Run, epoch_of, metrics_of

__all__ = ["draw", "plot_gram", "plot_history", "plot_runs"]

# The colors of Okabe and Ito, distinct for every kind of color vision, and two more.
_COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#8C510A", "#7F7F7F")
_OTHER_FRAME = {"nc2_etf": "OF", "nc2_of": "ETF"}
_DASHES = {"train": (), "validate": (5, 2), "test": (1, 1.5)}
_INPUT = "classifier input"
_MOST_NAMES = 16  # lines of text that fit in a legend beside one row of panels

Curves = dict[Key, tuple[list[float], list[float]]]


def plot_history(
    history: Iterable[Mapping[str, Any]],
    objective: Mapping[str, Sequence[float]] | None = None,
    num_classes: int | None = None,
) -> Figure:
    """Plot metrics over epochs, on log axes that show zeros at their lower edge.

    NC1, NC2 and NC3 have one panel each. If layers were measured, each metric has a panel, and the color of a curve goes
    from light to dark with the depth of its layer. Training data are solid, validation data dashed, test data dotted.

    Args:
        history: rows with ``epoch``, metrics by key, and optionally ``stage`` (``"train"`` by default), as in
            ``NeuralCollapseCallback.history``. Keys are as the callback logs them (``nc/val/nc1``) or as
            :func:`lightning_nc.measure` returns them (``layer3/nc1``); other entries are ignored.
        objective: curves for an additional first panel: label -> values, one per row of the training data.
        num_classes: K; marks the value of ``nc2_etf`` and ``nc2_of`` at an exact frame of the other kind,
            sqrt(2 - 2 sqrt((K - 1) / K)).

    Raises:
        ValueError: if there is no metric, or a row with metrics has no epoch, an unknown stage or a value twice.
    """
    return plot_runs({"": list(history)}, objective, num_classes)


def plot_runs(
    runs: Mapping[str, Run], objective: Mapping[str, Sequence[float]] | None = None, num_classes: int | None = None
) -> Figure:
    """Plot several runs, one below the other, with the panels of :func:`plot_history` and shared axes limits.

    Args:
        runs: title -> rows.
        objective: see :func:`plot_history`; for a single run.
        num_classes: see :func:`plot_history`.

    Raises:
        ValueError: see :func:`plot_history`.
    """
    if not runs:
        raise ValueError("runs is empty; pass at least one run as {title: rows}")
    curves = {name: _curves(rows) for name, rows in runs.items()}
    keys = list(dict.fromkeys(key for run in curves.values() for key in run))
    layers = _layers(keys, sort=len(runs) > 1)
    panels = _panels([key.metric for key in keys if not _is_chance(key.metric)], by_family=not layers)
    count = len(panels) + bool(objective)
    columns = 3 if count > 4 else count
    lines = -(-count // columns)
    longest = max(len(line) for layer in layers or [_INPUT] for line in _name(layer).splitlines())
    beside = 0.6 + 0.065 * longest if layers or len({key[:2] for key in keys}) > 1 else 0
    figure = Figure(figsize=(3.6 * columns + beside, 3.1 * lines * len(runs)), layout="constrained")
    # Constrained layout has no groups of axes, so each run is a subfigure.
    for name, part in zip(runs, figure.subfigures(len(runs), 1, squeeze=False)[:, 0], strict=True):
        axes = list(part.subplots(lines, columns, squeeze=False).ravel())
        for axis in axes[count:]:
            axis.remove()
        for axis, above in zip(axes[:count], figure.axes, strict=False):
            if axis is not above:  # the same limits, so that runs can be compared by eye
                axis.sharex(above)
                axis.sharey(above)
        if objective:
            epochs = [epoch_of(row) for row in runs[name] if row.get("stage", "train") == "train"]
            draw(axes[0], "Training objective", "epoch", {k: (epochs, list(v)) for k, v in objective.items()})
        for axis, members in zip(axes[count - len(panels) : count], panels, strict=True):
            _draw_panel(axis, curves[name], members, layers, num_classes)
        _explain(part, axes[:count], keys, layers, most=_MOST_NAMES * lines)
        found = "\n".join(filter(None, (_text(name, 40 * columns), _geometry(runs[name]))))
        part.suptitle(found, fontsize=10)
    return figure


def plot_gram(gram: Any, classes: Sequence[int] | None = None) -> Figure:
    """Plot the Gram matrix of the unit class means, (K, K): the cosines of all pairs of classes, 1 on the diagonal.

    Args:
        gram: the matrix.
        classes: the class of each row; 0 to K - 1 by default.
    """
    figure = Figure(figsize=(4.2, 3.6), layout="constrained")
    axis = figure.subplots()
    image = axis.imshow(numpy.asarray(gram), cmap="RdBu_r", vmin=-1, vmax=1)
    axis.set_title("cosines of the centered class means", fontsize=10)
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


def _curves(rows: Run) -> Curves:
    """Epochs and values by stage, dataloader, layer and metric; the classifier's input last, so that it is drawn on top."""
    points: dict[Key, list[tuple[float, float]]] = {}
    for row in rows:
        if not isinstance(row, Mapping):
            raise ValueError(f"history must hold rows such as {{'epoch': 0, 'nc1': 0.5}}, got {row!r:.60}")
        if values := metrics_of(row):
            epoch, stage = epoch_of(row), row.get("stage", "train")
            if stage not in STAGES:
                raise ValueError(f"stage must be one of {', '.join(STAGES)}, got {stage!r}")
            keys = [key._replace(stage=stage) if key.stage == "train" else key for key in map(parse_key, values)]
            if len(set(keys)) < len(keys):
                raise ValueError(f"a row has a metric twice, such as 'nc1' and 'nc/nc1'; got {list(values)!r:.300}")
            for key, value in zip(keys, values.values(), strict=True):
                if not key.metric.endswith(ERROR):
                    points.setdefault(key, []).append((epoch, value))
    if not points:
        found = list(dict.fromkeys(name for row in rows for name in row))
        raise ValueError(
            f"nothing to plot in {len(rows)} rows: needs 'epoch' and a metric such as 'nc1' or 'nc/nc1', found {found!r:.300}"
        )
    order = list(STAGES)
    keys = sorted(points, key=lambda key: (order.index(key.stage), key.loader, not key.layer))
    for curve in points.values():  # rows of checkpoints come in any order
        curve.sort(key=lambda point: point[0])
    return {key: ([x for x, _ in points[key]], [y for _, y in points[key]]) for key in keys}


def _geometry(rows: Run) -> str:
    """The frame that the class means were nearest to at last, in words; empty if that is not known."""
    row = next((row for row in reversed(list(rows)) if row.get("geometry") in FRAMES_IN_WORDS), None)
    if row is None:
        return ""
    name = row["geometry"]
    value = next((value for key, value in metrics_of(row).items() if parse_key(key)[2:] == ("", name)), None)
    return f"nearest frame: {FRAMES_IN_WORDS[name]}" + (
        f" ({METRICS[name].title}: {value:.2g})" if value is not None else ""
    )


def _layers(keys: Sequence[Key], sort: bool) -> list[str]:
    """Layers from first to last, with the classifier's input ("") at the end; empty if only that was measured."""
    layers = list(dict.fromkeys(key.layer for key in keys if key.layer))
    if sort:  # several runs may have different layers
        layers.sort(key=natural_order)
    return layers + [""] * (bool(layers) and any(not key.layer for key in keys))


def _panels(metrics: Iterable[str], by_family: bool) -> list[list[str]]:
    """The metrics of each panel, in the order of :data:`METRICS`: one metric, or those of a family."""
    names = list(dict.fromkeys(metrics))
    known = {name: place for place, name in enumerate(METRICS)}
    names.sort(key=lambda name: known.get(base_name(name), len(known)))
    if not by_family:
        return [[name] for name in names]
    families: dict[str, list[str]] = {}
    for name in names:
        families.setdefault(_family(name), []).append(name)
    return list(families.values())


def _family(metric: str) -> str:
    spec = METRICS.get(base_name(metric))
    return "effective depth" if metric == DEPTH else spec.family if spec else "other metrics"


def _title(metric: str) -> str:
    spec = METRICS.get(base_name(metric))
    around = ", around training means" * metric.endswith(TRAIN_MEANS)
    return "effective depth" if metric == DEPTH else spec.title + around if spec and spec.title else metric


def _is_count(members: Sequence[str]) -> bool:
    """Whether the metrics are numbers of dimensions or layers, which do not approach zero."""
    return all(name == DEPTH or (name in METRICS and METRICS[name].direction == "approaches") for name in members)


def _is_chance(metric: str) -> bool:
    return metric.endswith(tuple(CHANCE.values()))


def _draw_panel(
    axis: Axes, run: Curves, members: Sequence[str], layers: Sequence[str], num_classes: int | None
) -> None:
    title = _family(members[0]) if members[1:] else _title(members[0])
    for group in dict.fromkeys(key[:2] for key in run):
        chosen = {key: curve for key, curve in run.items() if key[:2] == group and key.metric in members}
        chances = [(key, curve) for key, curve in run.items() if key[:2] == group and _is_chance(key.metric)]
        if layers:
            curves = {key.layer or _INPUT: curve for key, curve in chosen.items()}
            colors = [_color(key.layer, layers) for key in chosen]
        else:
            curves = {_text(key.metric): curve for key, curve in chosen.items()}
            colors = [_COLORS[members.index(key.metric) % len(_COLORS)] for key in chosen]
        for key, (x, y) in chances:
            own = key._replace(metric=base_name(key.metric))
            if own in chosen:  # behind its curve: what chance alone would give
                axis.plot(x, y, color=colors[list(chosen).index(own)], alpha=0.3, linewidth=1, marker="_", zorder=1)
        draw(
            axis,
            _text(title),
            "epoch",
            curves,
            colors,
            _style(*group),
            not layers and len(members) > 1,
            _is_count(members),
        )
    frames = [_OTHER_FRAME[name] for name in members if name in _OTHER_FRAME]
    if num_classes and frames:
        level = math.sqrt(2 - 2 * math.sqrt((num_classes - 1) / num_classes))
        axis.axhline(level, color="0.4", linestyle="-.", linewidth=1)
        name = f"exact {frames[0] if len(frames) == 1 else 'other frame'}"
        axis.text(0.02, level, name, transform=axis.get_yaxis_transform(), va="bottom", fontsize=7, color="0.3")


def _explain(part: SubFigure, axes: list[Axes], keys: Sequence[Key], layers: Sequence[str], most: int) -> None:
    """One legend for all panels: layers by color, stages by dashes. Many layers get a color bar with some of their names."""
    names = [_name(layer) for layer in layers]
    colors = [_color(layer, layers) for layer in layers]
    entries = [(Line2D([], [], color=color), name) for color, name in zip(colors, names, strict=True)]
    if "\n".join(names).count("\n") >= most:
        entries = []
        ticks = max(2, min(6, most // max(name.count("\n") + 1 for name in names)))
        shown = numpy.linspace(0, len(layers) - 1, ticks).round().astype(int)
        scale = ScalarMappable(Normalize(-0.5, len(layers) - 0.5), ListedColormap(colors))
        bar = part.colorbar(scale, ax=axes, aspect=30)
        bar.ax.set_yticks(shown, [names[index] for index in shown], fontsize=8)
        bar.ax.invert_yaxis()
    groups = sorted({key[:2] for key in keys}, key=lambda group: (list(STAGES).index(group[0]), group[1]))
    for stage, loader in groups if len(groups) > 1 else ():
        line = Line2D([], [], color="0.3", linestyle=_style(stage, loader))
        entries.append((line, f"{stage}_{loader}" if loader else stage))
    if entries:
        part.legend(*zip(*entries, strict=True), loc="outside right upper", fontsize=8)


def _name(layer: str) -> str:
    return _text(layer or _INPUT, 36)


def _text(name: str, width: int = 80) -> str:
    """A name as text of a figure: wrapped at dots, ``$`` shown as it is, no ``_`` first (Matplotlib hides such labels)."""
    text = "\n".join(textwrap.wrap(name.replace(".", ". "), width)).replace(". ", ".").replace("$", r"\$")
    return f" {text}" if text.startswith("_") else text


def _style(stage: str, loader: int) -> Any:
    """Solid for training, dashed for validation, dotted for test, with more dashes for further dataloaders."""
    return (0, _DASHES[stage] + (3, 1.5) * loader) if _DASHES[stage] else "-"


def _color(layer: str, layers: Sequence[str]) -> Any:
    return matplotlib.colormaps["viridis_r"](0.25 + 0.75 * layers.index(layer) / max(1, len(layers) - 1))
