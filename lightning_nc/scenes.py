"""The classes at one measurement as pictures show them: a few hundred numbers, kept with the history."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property
from itertools import chain
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.linalg import vector_norm

from lightning_nc.functional.projection import span_of_means
from lightning_nc.measuring.classes import MeasuredClasses

__all__ = ["MOST_COSINES", "Points", "Scene", "first_middle_last", "pictured", "posed", "scene", "scenes_of"]

MOST_COSINES = 32
"""Classes whose cosines are kept at every measurement."""

Points = list[list[float]]
"""Rows of three coordinates."""

T = TypeVar("T")


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
        weight: the classifier's rows of the chosen classes, centered, and scaled to the Frobenius norm of the class means before
            they are projected, so that rows in other directions are short; empty without a weight, or if all rows are the same.
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

    @cached_property
    def text(self) -> str:
        """All of it in JSON. A checkpoint saves and loads one text many times faster than a thousand numbers."""
        return json.dumps({field.name: getattr(self, field.name) for field in fields(self)})


def scene(found: MeasuredClasses, epoch: float, step: float, stage: str) -> Scene:
    """The scene of a measurement; without points if the chosen class means are not finite, or all the same."""
    means, labels = found.means, found.labels
    centered = means[:MOST_COSINES].double() - means.mean(dim=0, dtype=torch.float64)
    unit = centered / vector_norm(centered, dim=1, keepdim=True)
    points = _points(found) if found.samples else {}
    points = points or {"chosen": [], "samples": [], "means": [], "weight": []}
    return Scene(epoch, step, stage, len(labels), labels[:MOST_COSINES], _rows(unit @ unit.T), **points)


def _points(found: MeasuredClasses) -> dict[str, Any]:
    """The chosen classes in the coordinates of the picture; empty if their means span nothing."""
    chosen = list(found.samples)
    means = found.moments.means[chosen].double()
    origin = means.mean(dim=0)
    size = vector_norm(means - origin)
    if not 1e-12 * vector_norm(means) < size < math.inf:  # the same but for rounding, or not finite
        return {}
    axes, weight = span_of_means(means), list[list[float]]()
    if found.weight is not None:
        rows = found.weight[chosen].double()
        rows = rows - rows.mean(dim=0)
        scale = size / vector_norm(rows)
        weight = _rows(rows @ axes * scale) if scale.isfinite() else []
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
    """The scenes of one course of training by epoch and step: of the training data if there are any, else of the first stage.

    If there are several at one step, such as one of averaged weights, only the last of them, as in the table of the classes.
    """
    stages = [found.stage for found in scenes]
    stage = "train" if "train" in stages else next(iter(stages), "")
    course: dict[tuple[float, float], Scene] = {}
    for found in scenes:
        if found.stage == stage:
            course[found.epoch, found.step] = found
    return [course[place] for place in sorted(course)]


def posed(scenes: Sequence[Scene]) -> list[Scene]:
    """The pictured scenes that have points, each in a unit of its own, the root mean square distance of its class means.

    In this unit an ideal frame has its corners at distance 1 in every epoch, however long the features are. All scenes have the
    classes and the number of samples of the last one, so that points can move from one to the next.
    """
    complete = [found for found in pictured(scenes) if found.chosen]
    return [_in_its_unit(found) for found in complete if _shape(found) == _shape(complete[-1])]


def _shape(found: Scene) -> tuple[list[int], list[int], int]:
    return found.chosen, list(map(len, found.samples)), len(found.weight)


def _in_its_unit(found: Scene) -> Scene:
    unit = math.hypot(*(x for row in found.means for x in row)) / math.sqrt(len(found.means))

    def scaled(points: Points) -> Points:
        return [[x / unit for x in row] for row in points]

    samples = list(map(scaled, found.samples))
    return replace(found, samples=samples, means=scaled(found.means), weight=scaled(found.weight))


def first_middle_last(scenes: Sequence[T]) -> list[T]:
    """The first, the middle and the last of a sequence, each once. The middle is that of the measurements, not of the epochs."""
    return [scenes[place] for place in sorted({0, len(scenes) // 2, len(scenes) - 1})] if scenes else []


def scenes_of(texts: Sequence[str]) -> list[Scene]:
    """Scenes from their texts in a file.

    Raises:
        TypeError, ValueError: for entries that are not those of a scene.
    """
    found = [Scene(**json.loads(text)) for text in texts]
    for scene in found:
        size, points = len(scene.labels), [*scene.means, *scene.weight, *chain.from_iterable(scene.samples)]
        fits = size <= scene.classes and [len(row) for row in scene.cosines] == [size] * size
        fits = fits and len(scene.chosen) == len(scene.samples) == len(scene.means)
        if not fits or any(len(point) != 3 for point in points) or not math.isfinite(scene.epoch + scene.step):
            raise ValueError(f"the parts of the scene at epoch {scene.epoch} do not fit together")
    return found
