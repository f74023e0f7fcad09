"""Metrics against the depth of the layer."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from typing import Any

import matplotlib
import numpy
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import ListedColormap, Normalize
from matplotlib.figure import Figure

from lightning_nc.functional import METRICS
from lightning_nc.functional.samples import effective_depth
from lightning_nc.keys import CHANCE, DEPTH, ERROR, TRAIN_MEANS, base_name, parse_key
from lightning_nc.plotting.style import COLORS, draw, legend_under, name_of, wrapped
from lightning_nc.runs import epoch_of, metrics_of

__all__ = ["has_depth", "plot_depth"]

_MOST_MARKED = 12  # epochs whose curves are thick and have a dot at every layer
_MOST_NAMES = 16  # layers that are all named

Epochs = list[tuple[float, dict[tuple[str, str], float]]]
"""The epoch of each measurement and its values by metric and layer."""


def plot_depth(history: Iterable[Mapping[str, Any]]) -> Figure:
    """Draw every metric against depth, a curve for each measured epoch, on log axes that show zeros at their lower edge.

    The layers stand from left to right in the order of the rows, the classifier's input last; layers with the same numbers
    stand at one place. Colors go from light to dark with the epochs. A dashed line marks the effective depth in the last epoch
    that has it, which needs the metric ``ncc_error``, unless ``ncc_error`` of these layers in this order gives another one.
    The values are those of the training data, or else of the stage and dataloader that come first.

    Args:
        history: rows with ``epoch`` and metrics by key, as in ``NeuralCollapseCallback.history``.

    Raises:
        ValueError: if no metric was measured at two depths, or a row with metrics has no epoch.
    """
    epochs = _values(history)
    layers, metrics = _layers(epochs), _metrics(epochs)
    if not metrics:
        raise ValueError(
            f"depth needs a metric at two layers or more, found {sorted(map(name_of, layers))!r:.300}; pass layers= to the "
            "callback or to measure(), such as layers=['layer1', 'layer2']"
        )
    columns = 2 if len(metrics) == 4 else min(3, len(metrics))
    lines = -(-len(metrics) // columns)
    figure = Figure(figsize=(3.2 * columns + 0.9, 3.2 * lines + 0.5), layout="constrained")
    axes = figure.subplots(lines, columns, squeeze=False).ravel().tolist()
    for axis in axes[len(metrics) :]:
        axis.remove()
    axes = axes[: len(metrics)]
    shades = numpy.linspace(0.25, 1, len(epochs)) if len(epochs) > 1 else [1.0]
    colors = [matplotlib.colormaps["viridis_r"](shade) for shade in shades]
    places = _places(epochs, layers)
    for axis, metric in zip(axes, metrics, strict=True):
        _panel(axis, metric, epochs, places, colors)
    _color_bar(figure, axes, [epoch for epoch, _ in epochs], colors)
    legend_under(figure, _mark_depth(axes, epochs, layers, list(places)), 3.2 * columns)
    return figure


def has_depth(history: Iterable[Mapping[str, Any]]) -> bool:
    """Whether :func:`plot_depth` can draw the rows: a metric was measured at two depths."""
    return bool(_metrics(_values(history)))


def _names(epochs: Epochs) -> list[tuple[str, str]]:
    return list(dict.fromkeys(name for _, values in epochs for name in values if name[0] != DEPTH))


def _layers(epochs: Epochs) -> list[str]:
    """The layers in the order of the rows, and the classifier's input last."""
    return sorted(dict.fromkeys(layer for _, layer in _names(epochs)), key=lambda layer: not layer)


def _places(epochs: Epochs, layers: Sequence[str]) -> dict[str, str]:
    """The layers that are drawn, by what they are called: of several with the same numbers the last, under all of their names."""
    called = {layer: [name_of(layer)] for layer in layers}
    for layer, following in pairwise(layers):
        own = [(values, metric) for _, values in epochs for metric, at in values if at == layer]
        if all(_same(values[metric, layer], values.get((metric, following), math.inf)) for values, metric in own):
            called[following] = called.pop(layer) + called[following]
    return {layer: " =\n".join(names) for layer, names in called.items()}


def _same(value: float, other: float) -> bool:
    return math.isclose(value, other, rel_tol=1e-6) or (math.isnan(value) and math.isnan(other))


def _metrics(epochs: Epochs) -> list[str]:
    """The metrics that were measured at two depths or more, in the order of :data:`METRICS`."""
    known = {name: place for place, name in enumerate(METRICS)}
    depths = Counter(metric for metric, _ in _names(epochs))
    deep = [metric for metric, count in depths.items() if count > 1]
    return sorted(deep, key=lambda metric: known.get(base_name(metric), len(known)))


def _values(history: Iterable[Mapping[str, Any]]) -> Epochs:
    """What was measured of one stage and dataloader, by epoch."""
    rows = [row for row in history if metrics_of(row)]
    found: dict[tuple[str, int], Epochs] = {}
    for row in sorted(rows, key=epoch_of):
        values: dict[tuple[str, int], dict[tuple[str, str], float]] = {}
        for key, value in metrics_of(row).items():
            part = parse_key(key)
            stage = row.get("stage", "train") if part.stage == "train" else part.stage
            if not part.metric.endswith((ERROR, *CHANCE.values())):
                values.setdefault((stage, part.loader), {})[part.metric, part.layer] = value
        for group, measured in values.items():
            found.setdefault(group, []).append((epoch_of(row), measured))
    return found.get(("train", 0)) or next(iter(found.values()), [])


def _panel(axis: Axes, metric: str, epochs: Epochs, places: Mapping[str, str], colors: Sequence[Any]) -> None:
    spec, layers = METRICS.get(base_name(metric)), list(places)
    curves = {}
    for place, (_, values) in enumerate(epochs):
        depths = [depth for depth, layer in enumerate(layers) if (metric, layer) in values]
        curves[str(place)] = depths, [values[metric, layers[depth]] for depth in depths]
    linear = spec is not None and spec.direction == "approaches"
    around = ", around training means" * metric.endswith(TRAIN_MEANS)
    title = wrapped(f"{spec.title}{around}", 44) + "\n\n" if spec is not None and spec.title else ""
    draw(axis, title + wrapped(metric, 44), "", curves, colors, legend=False, linear=linear)
    few = len(epochs) <= _MOST_MARKED
    for line in axis.lines:
        line.set_linewidth(1.4 if few else 0.8)
        if few and line.get_linestyle() != "None":
            line.set(marker="o", markersize=3, markevery=None)
    step = -(-len(layers) // _MOST_NAMES)
    shown = sorted({*range(0, len(layers), step), len(layers) - 1})
    names = [places[layers[depth]] for depth in shown]
    level = max(map(len, names)) * len(names) <= 26
    axis.set_xticks(shown, names, fontsize=8, rotation=0 if level else 60, ha="center" if level else "right")
    if not level:
        axis.tick_params(axis="x", pad=1)


def _color_bar(figure: Figure, axes: list[Axes], epochs: Sequence[float], colors: Sequence[Any]) -> None:
    if len(epochs) == 1:
        figure.suptitle(f"epoch {epochs[0]:g}", fontsize=10)
        return
    scale = ScalarMappable(Normalize(-0.5, len(epochs) - 0.5), ListedColormap(colors))
    bar = figure.colorbar(scale, ax=axes, aspect=30 * max(1, len(axes) // 3))
    shown = sorted({round(place) for place in numpy.linspace(0, len(epochs) - 1, min(6, len(epochs)))})
    bar.ax.set_yticks(shown, [f"{epochs[place]:g}" for place in shown], fontsize=8)
    bar.set_label("epoch")


def _mark_depth(
    axes: Sequence[Axes], epochs: Epochs, layers: Sequence[str], drawn: Sequence[str]
) -> list[tuple[Any, str]]:
    """Mark the effective depth in the last epoch that has it, a number of the layers from 1; its entry of the legend."""
    known = [(epoch, values) for epoch, values in epochs if values.get((DEPTH, ""), 0) >= 1]
    if not known:
        return []
    epoch, values = known[-1]
    errors = [values.get(("ncc_error", layer), math.nan) for layer in layers]
    depth = int(values[DEPTH, ""])
    if effective_depth(errors) != depth:  # a log that sorts the layers by name does not have the order of the network
        return []
    place = sum(layers.index(layer) < depth - 1 for layer in drawn)  # a layer that is not drawn stands at the next one
    for axis in axes:
        line = axis.axvline(place, color=COLORS[1], linestyle="--", linewidth=1.2)
    return [(line, f"effective depth in epoch {epoch:g}: {name_of(layers[depth - 1])}")]
