"""Several runs in one set of panels, and bands over runs that differ in their seed."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import matplotlib
import numpy
from lightning.fabric.utilities import rank_zero_warn
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from lightning_nc.keys import INPUT_NAME, Key, natural_order
from lightning_nc.plotting.curves import (
    Curve,
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
    read_curves,
)
from lightning_nc.plotting.style import (
    COLORS,
    LEVEL_STYLE,
    PANEL,
    WIDTH,
    columns_of,
    draw,
    legend_under,
    sized_figure,
    stage_entries,
    style_of,
    wrapped,
)
from lightning_nc.runs import Run

__all__ = ["plot_overlay"]

_SEED = r"[\W_]*seed[\W_]*\d+"
_BAND = 0.2  # opacity
_MOST_IN_TWO = 8  # panels in two columns


def plot_overlay(
    runs: Iterable[tuple[str, Run]],
    metrics: str | Sequence[str] | None = None,
    num_classes: int | None = None,
    group: str | None = None,
    layer: str | None = None,
) -> Figure:
    """Plot several runs in one set of panels, one color per run or group of runs.

    A group is drawn as the median of its runs, with a band from the smallest to the largest value, over the epochs that all
    of them have. Losses and accuracies have panels of their own, unless only one of several runs or groups has them. Stages
    differ by dashes, as in :func:`plot_history`.

    Args:
        runs: label and rows of each run.
        metrics: see :func:`plot_history`. Losses and accuracies are left out if given.
        num_classes: see :func:`plot_history`.
        group: a regular expression; runs whose labels are the same without the part that it matches form a group. With
            ``""`` that part is the seed: ``"cnn-seed0"`` and ``"cnn, seed 1"`` are the group ``"cnn"``.
        layer: the layer to draw; the classifier's input by default, or the last layer if there is none.

    Raises:
        ValueError: see :func:`plot_history`; also if two runs without a group have the same label, no group has several runs,
            a group has no epoch in common, no run has the layer, or some runs count epochs and others iterations.
    """
    read = [(label, read_curves(rows)) for label, rows in runs]
    if not read:
        raise ValueError("runs is empty; pass at least one run as (label, rows)")
    if len({run.over for _, run in read}) > 1:
        raise ValueError("some runs count epochs and others iterations, which share no axis; plot them apart")
    layer = _layer([run for _, run in read], layer)
    read = [(label, _at(run, layer)) for label, run in read]
    names = chosen([run for _, run in read], metrics, by_family=False)
    groups = _groups([(label, _all_curves(run, names, metrics is None)) for label, run in read], group)
    figure = _draw(groups, names, read[0][1].over, num_classes)
    heading = [f"layer {layer}" if layer else INPUT_NAME, "" if metrics else left_out([run for _, run in read], names)]
    figure.suptitle("\n".join(wrapped(text) for text in heading if text), fontsize=10)
    return figure


def _layer(runs: Sequence[RunCurves], layer: str | None) -> str:
    measured = {key.layer for run in runs for key in run.metrics if not is_chance(key.metric)}
    layers = sorted(measured, key=natural_order)
    wanted = ("" if "" in layers else layers[-1]) if layer is None else "" if layer == INPUT_NAME else layer
    if wanted not in layers:
        raise ValueError(
            f"no run has a layer {wanted!r}; measured were {', '.join(name or INPUT_NAME for name in layers)}"
        )
    return wanted


def _at(run: RunCurves, layer: str) -> RunCurves:
    metrics = {key._replace(layer=""): curve for key, curve in run.metrics.items() if key.layer == layer}
    return run._replace(metrics=metrics, asked=run.asked & {key.metric for key in metrics})


def _all_curves(run: RunCurves, names: Sequence[str], objectives: bool) -> Curves:
    """The curves of the metrics that are drawn, and those of losses and accuracies."""
    curves = {key: curve for key, curve in drawn(run.metrics, names).items() if not is_chance(key.metric)}
    if objectives:
        curves |= run.objectives
    return curves


def _groups(runs: Sequence[tuple[str, Curves]], pattern: str | None) -> dict[str, list[Curves]]:
    """The runs by the label of their group."""
    groups: dict[str, list[Curves]] = {}
    try:
        dropped = re.compile(pattern or _SEED)
    except re.error as error:
        raise ValueError(f"group must be a regular expression, got {pattern!r}: {error}") from None
    for label, curves in runs:
        rest = label if pattern is None else dropped.sub("", label)
        groups.setdefault(rest or label, []).append(curves)
    several = [label for label, members in groups.items() if members[1:]]
    if pattern is None and several:
        raise ValueError(
            f"several runs have the label {several[0]!r}; pass labels that differ, or draw them as a group"
        )
    if pattern is not None and not several:
        raise ValueError(
            f"no two runs have the same label without {pattern or _SEED!r}; labels: {', '.join(label for label, _ in runs)}"
        )
    return groups


def _draw(groups: Mapping[str, list[Curves]], names: Sequence[str], over: str, num_classes: int | None) -> Figure:
    runs = [curves for members in groups.values() for curves in members]
    keys = list(dict.fromkeys(key for curves in runs for key in curves))
    owners = Counter(name for members in groups.values() for name in {key.metric for run in members for key in run})
    shared = {name for name, count in owners.items() if count > 1 or len(groups) == 1}
    scores = sorted(shared - set(names), key=lambda name: (is_accuracy(name), name))
    panels = [*scores, *names]
    levels = {name: other_frames([name], runs, num_classes) for name in panels}
    entries = _entries(groups, keys, levels.values())
    columns = min(2, len(panels)) if len(panels) <= _MOST_IN_TWO else columns_of(len(panels))
    lines, width = -(-len(panels) // columns), min(PANEL, WIDTH / columns)
    figure = sized_figure(columns, lines, 1, width, 0.0, entries)
    axes = list(figure.subplots(lines, columns, squeeze=False).ravel())
    for axis in axes[len(panels) :]:
        axis.remove()
    for axis, name in zip(axes, panels, strict=False):
        linear = is_linear([name], runs) or (name in scores and is_accuracy(name))
        heads = wrapped(name) if name in scores else heads_of([name], num_classes, width)
        for color, (label, members) in zip(_colors(len(groups)), groups.items(), strict=True):
            for key in (key for key in keys if key.metric == name):
                curve = _draw_band(axis, label, [run[key] for run in members if key in run], len(members), color)
                draw(axis, heads, over, curve, [color], style_of(*key[:2]), False, linear)
        for level in levels[name].values():
            axis.axhline(level, **LEVEL_STYLE)
    legend_under(figure, entries, width * columns)
    return figure


def _entries(
    groups: Mapping[str, list[Curves]], keys: Iterable[Key], levels: Iterable[Mapping[str, float]]
) -> list[tuple[Any, str]]:
    """The legend: runs or groups by color, stages by dashes, exact frames of the other kind."""
    entries: list[tuple[Any, str]] = [
        (Line2D([], [], color=color), wrapped(f"{label} ({len(members)} runs)" if members[1:] else label, 50))
        for color, (label, members) in zip(_colors(len(groups)), groups.items(), strict=True)
    ]
    if any(members[1:] for members in groups.values()):
        entries.append((Patch(color="0.3", alpha=_BAND), "line: median of the runs, band: smallest to largest"))
    frames = dict.fromkeys(label for found in levels for label in found)
    return [*entries, *stage_entries(keys), *((Line2D([], [], **LEVEL_STYLE), label) for label in frames)]


def _draw_band(axis: Axes, label: str, curves: Sequence[Curve], runs: int, color: Any) -> dict[str, Curve]:
    """The median of the curves, by its label; draws the band of several. Empty if there are no curves."""
    if not curves or runs == 1:
        return {label: curves[0]} if curves else {}
    by_epoch = [dict(zip(*curve, strict=True)) for curve in curves]
    every = sorted({x for found in by_epoch for x in found})
    common = [x for x in every if all(x in found for found in by_epoch)]
    if not common:
        raise ValueError(f"the runs of the group {label!r} have no epoch in common; draw them without a group")
    if len(common) < len(every) or len(curves) < runs:
        rank_zero_warn(
            f"group {label!r}: {axis.get_title() or 'a metric'} is drawn at the {len(common)} of {len(every)} epochs that the "
            f"{len(curves)} of {runs} runs with values share"
        )
    values = numpy.array([[found[x] for x in common] for found in by_epoch])
    axis.fill_between(common, values.min(axis=0), values.max(axis=0), color=color, alpha=_BAND, linewidth=0)
    return {label: (common, numpy.median(values, axis=0).tolist())}


def _colors(count: int) -> list[Any]:
    """A color for each run; those of a scale for more than there are distinct ones."""
    return list(
        COLORS[:count] if count <= len(COLORS) else matplotlib.colormaps["viridis_r"](numpy.linspace(0.15, 1, count))
    )
