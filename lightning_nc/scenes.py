"""The classes at one measurement as pictures show them: a few hundred numbers, kept with the history."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lightning_nc.functional.projection import span_of_means
from lightning_nc.measuring.classes import MeasuredClasses

__all__ = ["MOST_COSINES", "Points", "Scene", "pictured", "scene", "scenes_of"]

MOST_COSINES = 32
"""Classes whose cosines are kept at every measurement."""

Points = list[list[float]]
"""Rows of three coordinates."""


@dataclass(frozen=True)
class Scene:
    """The classes at one measurement, at the classifier's input; plain numbers of six digits.

    Attributes:
        epoch, step, stage: of the row in the history.
        classes: the number of classes that have samples.
        labels: the classes of ``cosines``: at most the first 32 that have samples.
        cosines: between the centered class means of ``labels``. A simplex ETF has -1 / (``classes`` - 1) off the diagonal.
        chosen: the classes of the picture, ``geometry=``; empty if there is none.
        samples: of each chosen class, the coordinates of the same few samples in every epoch; see
            :func:`lightning_nc.functional.projection.span_of_means`. The origin is the mean of the chosen class means.
        means: of each chosen class, in the same coordinates.
        weight: the classifier's rows of the chosen classes, centered, and scaled to the Frobenius norm of the class means; empty
            without a weight.
    """

    epoch: float
    step: float
    stage: str
    classes: int
    labels: list[int]
    cosines: list[list[float]]
    chosen: list[int]
    samples: list[Points]
    means: Points
    weight: Points


def scene(found: MeasuredClasses, epoch: float, step: float, stage: str) -> Scene:
    """The scene of a measurement."""
    means, labels = found.means.double(), found.labels
    unit = torch.nn.functional.normalize((means - means.mean(dim=0))[:MOST_COSINES], dim=1)
    points = _points(found) if _is_complete(found) else {"chosen": [], "samples": [], "means": [], "weight": []}
    return Scene(epoch, step, stage, len(labels), labels[:MOST_COSINES], _rows(unit @ unit.T), **points)


def _is_complete(found: MeasuredClasses) -> bool:
    means = [found.moments.means[label] for label in found.samples]
    return bool(means) and bool(torch.stack(means).isfinite().all())


def _points(found: MeasuredClasses) -> dict[str, Any]:
    """The chosen classes in the coordinates of the picture."""
    chosen = list(found.samples)
    means = found.moments.means[chosen].double()
    axes, origin = span_of_means(means), means.mean(dim=0)
    weight: Points = []
    if found.weight is not None:
        rows = found.weight[chosen].double()
        rows = rows - rows.mean(dim=0)
        weight = _rows(rows @ axes * ((means - origin).norm() / rows.norm().clamp(min=1e-300)))
    return {
        "chosen": chosen,
        "samples": [_rows((rows.double() - origin) @ axes) for rows in found.samples.values()],
        "means": _rows((means - origin) @ axes),
        "weight": weight,
    }


def _rows(values: Tensor) -> list[list[float]]:
    """Six digits, which are enough for a picture and short in a file."""
    return [[float(f"{value:.6g}") for value in row] for row in values.tolist()]


def pictured(scenes: Sequence[Scene]) -> list[Scene]:
    """The scenes of one course of training, in order: those of the training data if there are any, else of the first stage."""
    stages = [found.stage for found in scenes]
    stage = "train" if "train" in stages else next(iter(stages), "")
    return [found for found in scenes if found.stage == stage]


def scenes_of(states: Sequence[Mapping[str, Any]]) -> list[Scene]:
    """Scenes from their dicts of a file."""
    return [Scene(**state) for state in states]
