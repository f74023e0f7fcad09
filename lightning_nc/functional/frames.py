"""NC2: how near the class means, or the classifier's rows, are to a frame."""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor
from torch.linalg import vector_norm

from lightning_nc.functional.table import MetricSpec, compute
from lightning_nc.moments import state_dtype

__all__ = [
    "FRAMES",
    "FrameName",
    "frame_distance",
    "nc2",
    "nc2_name",
    "nc2_weight",
]

FrameName = Literal["etf", "of"]


def nc2(
    features: Tensor, target: Tensor, num_classes: int | None = None, frame: FrameName = "etf", center: bool = False
) -> Tensor:
    r"""Distance of the class means from a simplex ETF or an orthogonal frame (OF).

    .. math:: \left\| HH^\top / \|HH^\top\|_F - E \right\|_F, \qquad \left\| HH^\top / \|HH^\top\|_F - I/\sqrt K \right\|_F

    Args:
        features: (N, d).
        target: class indices, (N,).
        num_classes: K; by default the highest label plus one.
        frame: ``"etf"`` or ``"of"``.
        center: use M instead of H. Features after a ReLU are non-negative: their means form an ETF only when centered.
            An exact orthogonal frame is an exact ETF once centered; ``frame="of"`` without centering tells them apart.

    Source: Tirer & Bruna (2022), equation (27); centered: figures 5 and 10.
    """
    return compute(nc2_name(frame, center), features, target, num_classes)


def nc2_name(frame: str, center: bool) -> str:
    """The name in :data:`METRICS` of a variant of :func:`nc2`."""
    if frame not in ("etf", "of"):
        raise ValueError(f"frame must be 'etf' or 'of', got {frame!r}")
    return f"nc2_{frame}_centered" if center else f"nc2_{frame}"


def frame_distance(rows: Tensor, frame: str, other: Tensor | None = None) -> Tensor:
    """Distance of AB' / |AB'| from I or I - 11'/K, normalized; A are the ``rows``, B the ``other`` rows or A."""
    other = rows if other is None else other
    lengths: tuple[Tensor, Tensor] = vector_norm(rows), vector_norm(other)
    classes, features = rows.shape
    if classes > features + 1:
        # The K x K matrix may be too large, and is not needed. AB' has rank d at most, so its cosine c with the frame, of
        # rank K - 1 at least, is at most sqrt(d / (K - 1)): 2 - 2c cancels no more than log10(2d) digits.
        gram = rows.T @ rows / lengths[0].square()
        size = (gram * (gram if other is rows else other.T @ other / lengths[1].square())).sum().sqrt()
        paired = torch.dot(rows.flatten(), other.flatten())
        if frame == "etf":
            paired = paired - rows.mean(dim=0) @ other.mean(dim=0) * classes
        cosine = paired / (lengths[0] * lengths[1]) / size
        return (2 - 2 * cosine / math.sqrt(classes if frame == "of" else classes - 1)).sqrt()
    gram = (rows / lengths[0]) @ (other / lengths[1]).T
    identity = torch.eye(classes, dtype=gram.dtype, device=gram.device)
    target = identity / math.sqrt(classes) if frame == "of" else (identity - 1 / classes) / math.sqrt(classes - 1)
    distance: Tensor = vector_norm(gram / vector_norm(gram) - target)
    return distance


def nc2_weight(weight: Tensor) -> Tensor:
    r"""Distance of the rows of ``weight`` (K, d) from a simplex ETF, :math:`\| WW^\top / \|WW^\top\|_F - E \|_F`, with rows that
    are not centered. In [0, sqrt(2)], 0 at collapse. Source: Zhu et al. (2021), arXiv 2105.02375.
    """
    return frame_distance(weight.to(state_dtype(weight.device)), "etf")


FRAMES = {
    "nc2_etf": MetricSpec(lambda s: frame_distance(s.means, "etf"), "NC2, class means to ETF", etf=True),
    "nc2_etf_centered": MetricSpec(lambda s: frame_distance(s.centered, "etf"), "NC2, centered means to ETF", etf=True),
    "nc2_of": MetricSpec(lambda s: frame_distance(s.means, "of"), "NC2, class means to OF"),
    "nc2_of_centered": MetricSpec(lambda s: frame_distance(s.centered, "of"), "NC2, centered means to OF"),
}
