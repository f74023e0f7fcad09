"""The rows of a run as series of points, and numbers and names as a reader sees them."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping, Sequence

from lightning_nc.functional import METRICS
from lightning_nc.functional.table import check_metrics
from lightning_nc.keys import DEPTH, INPUT_NAME, TRAIN_MEANS, Key, base_name
from lightning_nc.plotting.curves import Curves, RunCurves, is_chance, same

__all__ = [
    "Points",
    "Series",
    "by_layer",
    "course_of",
    "in_words",
    "layer_name",
    "layers_of",
    "listed",
    "metrics_shown",
    "number",
    "series_of",
    "stage_name",
    "without_twins",
]

Points = list[tuple[float, float]]
"""Epochs and values."""

Series = dict[Key, Points]


def series_of(curves: Curves) -> Series:
    """Curves as points."""
    return {key: list(zip(*curve, strict=True)) for key, curve in curves.items()}


def course_of(series: Series) -> Series:
    """The series that words are about: of the training data if there are any, else of the first stage and dataloader."""
    stages = [key[:2] for key in series]
    chosen = ("train", 0) if ("train", 0) in stages else next(iter(stages), None)
    return {key: points for key, points in series.items() if key[:2] == chosen}


def layers_of(keys: Iterable[Key]) -> list[str]:
    """The layers in the order of the rows, the classifier's input (empty) last."""
    return sorted(dict.fromkeys(key.layer for key in keys), key=lambda layer: not layer)


def layer_name(layer: str) -> str:
    """The name of a layer in figures and sentences."""
    return layer or INPUT_NAME


def stage_name(stage: str, loader: int) -> str:
    """The name of a stage and its dataloader."""
    return f"{stage}_{loader}" if loader else stage


def without_twins(runs: Mapping[str, RunCurves]) -> tuple[dict[str, Series], dict[str, str]]:
    """The metrics of runs without layers that have the numbers of a later one in all runs, and the names of those that stay."""
    every = [run.metrics for run in runs.values()]
    names = same(every, layers_of(key for curves in every for key in curves), "layer")
    kept = {name: {key: run.metrics[key] for key in run.metrics if key.layer in names} for name, run in runs.items()}
    return {name: series_of(curves) for name, curves in kept.items()}, names


def metrics_shown(keys: Iterable[Key], asked: Collection[str]) -> list[str]:
    """The metrics that were asked for, and so have a panel, the paper's first; not what chance gives."""
    found = dict.fromkeys(key.metric for key in keys if not is_chance(key.metric) and key.metric in asked)
    paper = check_metrics("paper")
    return sorted(found, key=lambda name: paper.index(name) if name in paper else len(paper))


def by_layer(series: Series, metric: str) -> dict[str, Points]:
    """The points of one metric by layer, where several layers have it."""
    found = {layer: series[key] for layer in layers_of(series) for key in series if key[2:] == (layer, metric)}
    return found if len(found) > 1 else {}


def in_words(metric: str) -> str:
    """A few words about a metric."""
    if metric == DEPTH:
        return "the first layer that separates the classes as the last does"
    spec = METRICS.get(base_name(metric))
    around = ", around training means" if metric.endswith(TRAIN_MEANS) else ""
    return spec.title + around if spec else ""


def number(value: float, digits: int = 3) -> str:
    """A number as text, without the zeros that ``e-05`` has.

    Example:
        >>> number(0.12345), number(4.05e-5), number(199.0)
        ('0.123', '4.05e-5', '199')
    """
    if not math.isfinite(value):
        return "not a number" if math.isnan(value) else "infinite"
    mantissa, _, exponent = f"{value:.{digits}g}".partition("e")
    return mantissa + (f"e{int(exponent)}" if exponent else "")


def listed(names: Sequence[str], most: int = 8) -> str:
    """Names in a sentence."""
    if len(names) > most:
        return f"{', '.join(names[:most])} and {len(names) - most} more"
    return " and ".join(filter(None, (", ".join(names[:-1]), *names[-1:])))
