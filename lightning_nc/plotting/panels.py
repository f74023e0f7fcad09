"""Figures of metrics over epochs, in the layout of Tirer & Bruna (2022)."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import ListedColormap, Normalize
from matplotlib.figure import Figure, SubFigure
from matplotlib.lines import Line2D

from lightning_nc.functional import METRICS
from lightning_nc.functional.geometry import FRAMES_IN_WORDS
from lightning_nc.keys import CHANCE, DEPTH, ERROR, STAGES, TRAIN_MEANS, Key, base_name, natural_order, parse_key
from lightning_nc.plotting.style import COLORS, INPUT_NAME, color_of, draw, name_of, wrapped
from lightning_nc.runs import Run, epoch_of, metrics_of

__all__ = ["plot_history", "plot_runs"]

_OTHER_FRAME = {"nc2_etf": "OF", "nc2_of": "ETF"}
_DASHES = {"train": (), "validate": (5, 2), "test": (1, 1.5)}
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
    longest = max(len(line) for layer in layers or [INPUT_NAME] for line in name_of(layer).splitlines())
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
        found = "\n".join(filter(None, (wrapped(name, 40 * columns), _geometry(runs[name]))))
        part.suptitle(found, fontsize=10)
    return figure


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
            curves = {key.layer or INPUT_NAME: curve for key, curve in chosen.items()}
            colors = [color_of(key.layer, layers) for key in chosen]
        else:
            curves = {wrapped(key.metric): curve for key, curve in chosen.items()}
            colors = [COLORS[members.index(key.metric) % len(COLORS)] for key in chosen]
        for key, (x, y) in chances:
            own = key._replace(metric=base_name(key.metric))
            if own in chosen:  # behind its curve: what chance alone would give
                axis.plot(x, y, color=colors[list(chosen).index(own)], alpha=0.3, linewidth=1, marker="_", zorder=1)
        draw(
            axis,
            wrapped(title),
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
    names = [name_of(layer) for layer in layers]
    colors = [color_of(layer, layers) for layer in layers]
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


def _style(stage: str, loader: int) -> Any:
    """Solid for training, dashed for validation, dotted for test, with more dashes for further dataloaders."""
    return (0, _DASHES[stage] + (3, 1.5) * loader) if _DASHES[stage] else "-"
