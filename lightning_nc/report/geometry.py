"""The chosen classes over the epochs, as the script of a report draws them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import combinations
from typing import Any

from lightning_nc.functional.projection import simplex
from lightning_nc.report.figures import CLASS_COLORS
from lightning_nc.scenes import Points, Scene, posed

__all__ = ["moving"]

_FARTHEST = 3.0  # half the width of the picture at most, in units of the distance of the ideal corners


def moving(scenes: Sequence[Scene]) -> dict[str, Any] | None:
    """The classes of all measurements, and the ideal frame; None if no samples were kept.

    The unit of each epoch is the root mean square distance of its class means from their center, so that the corners of the ideal
    frame are at distance 1. Two and three classes are drawn in the plane (samples of two are spread across their line), four in
    space.
    """
    shown = posed(scenes)
    if not shown:
        return None
    count = len(shown[-1].chosen)
    axes = max(2, count - 1)
    corners = simplex(count)[:, :axes].tolist()
    frames: list[dict[str, Any]] = []
    far: list[float] = []
    for scene in shown:
        samples = [_spread(rows) if count == 2 else _cut(rows, axes) for rows in scene.samples]
        means, weight = _cut(scene.means, axes), _cut(scene.weight, axes)
        frames.append({"epoch": f"{scene.epoch:g}", "samples": samples, "means": means, "weight": weight})
        far += [max(map(abs, row)) for rows in (*samples, weight) for row in rows]
    far.sort()
    return {
        "classes": [f"class {label}" for label in shown[-1].chosen],
        "colors": CLASS_COLORS[:count],
        "axes": axes,
        "corners": corners,
        "edges": [list(pair) for pair in combinations(range(count), 2)],
        "limit": min(max(1.05 * far[int(0.98 * len(far))], 1.5), _FARTHEST),
        "frames": frames,
    }


def _cut(rows: Points, axes: int) -> Points:
    return [[round(x, 4) for x in row[:axes]] for row in rows]


def _spread(rows: Points) -> Points:
    """Samples on a line, apart from each other across it."""
    golden = (math.sqrt(5) - 1) / 2
    return [
        [round(row[0], 4), round(0.5 * (at * golden % 1 - 0.5) * (len(rows) > 1), 4)] for at, row in enumerate(rows)
    ]
