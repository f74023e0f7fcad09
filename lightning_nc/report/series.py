"""The rows of a run as series of points, and numbers and names as a reader sees them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from lightning_nc.functional import METRICS
from lightning_nc.keys import CHANCE, DEPTH, ERROR, INPUT_NAME, TRAIN_MEANS, Key, base_name
from lightning_nc.runs import epoch_of
from lightning_nc.saved import values_of

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

_PAPER = ("nc1", "nc2_etf", "nc2_etf_centered", "nc2_of", "nc3", "nc3_centered")


def series_of(rows: Iterable[Mapping[str, Any]]) -> Series:
    """The points of every metric by stage, dataloader, layer and metric, in the order of the epochs."""
    found: Series = {}
    for row in rows:
        for key, value in values_of(row).items():
            if not key.metric.endswith(ERROR):
                found.setdefault(key, []).append((epoch_of(row), value))
    return {key: sorted(points, key=lambda point: point[0]) for key, points in found.items()}


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


def without_twins(runs: Mapping[str, Series]) -> tuple[dict[str, Series], dict[str, str]]:
    """Runs without layers whose values are those of the classifier's input in all of them, and the names of all layers."""
    keys = [key for series in runs.values() for key in series]

    def is_twin(layer: str) -> bool:
        own = [(series, key) for series in runs.values() for key in series if key.layer == layer]
        return all(
            repr(series[key]) == repr(series.get(key._replace(layer=""))) for series, key in own
        )  # nan equals nan

    names = {layer: layer_name(layer) for layer in layers_of(keys)}
    twins = [layer for layer in names if layer and is_twin(layer)]
    if twins:
        names[""] = " = ".join([*twins, names[""]])
    kept = {name: {key: series[key] for key in series if key.layer not in twins} for name, series in runs.items()}
    return kept, names


def metrics_shown(keys: Iterable[Key], asked: str = "") -> list[str]:
    """The metrics that have a panel of their own: those that were asked for if that is known, the paper's first.

    Rows also have the distances to the frames that exist, and what chance gives, without being asked.
    """
    found = dict.fromkeys(key.metric for key in keys if not key.metric.endswith(tuple(CHANCE.values())))
    wanted = asked.split(", ")
    shown = [name for name in found if not asked or name == DEPTH or base_name(name) in wanted]
    return sorted(shown or found, key=lambda name: _PAPER.index(name) if name in _PAPER else len(_PAPER))


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
