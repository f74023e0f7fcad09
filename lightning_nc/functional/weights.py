"""What the weight of the classifier alone shows."""

from __future__ import annotations

import math
import warnings

import torch
from torch import Tensor
from torch.linalg import vector_norm

from lightning_nc.functional.angles import equiangular, equinorm, maxangle
from lightning_nc.functional.frames import frame_distance
from lightning_nc.functional.pairs import check_pairs
from lightning_nc.functional.table import MetricSpec, Summary, UndefinedError, compute, unit
from lightning_nc.moments import state_dtype

__all__ = [
    "WEIGHTS",
    "gnc2_margin",
    "minority_cosine",
    "nc0",
    "nc2_weight_equiangular",
    "nc2_weight_equinorm",
    "nc2_weight_maxangle",
]

_STEPS = 10_000


def _wide(weight: Tensor) -> Tensor:
    return weight.to(state_dtype(weight.device))


def nc0(weight: Tensor) -> Tensor:
    r"""How far the rows of ``weight`` (K, d) are from a sum of zero, :math:`\|W^\top 1\|_2 / (\sqrt K \|W\|_F)`.

    In [0, 1], 0 at collapse. Free of scale by choice: the source takes :math:`\|W^\top 1\|_2^2 / K`. Source: arXiv 2602.16642,
    proposition 2.1.
    """
    return _nc0(_wide(weight))


def _nc0(weight: Tensor) -> Tensor:
    length: Tensor = vector_norm(weight.sum(dim=0)) / (math.sqrt(len(weight)) * vector_norm(weight))
    return length


def nc2_weight_equinorm(weight: Tensor) -> Tensor:
    """:func:`nc2_equinorm` of the rows of ``weight`` (K, d), not centered. Source: Papyan et al. (2020), figure 2."""
    return equinorm(_wide(weight))


def nc2_weight_equiangular(weight: Tensor, pairs: float | None = None) -> Tensor:
    """:func:`nc2_equiangular` of the rows of ``weight`` (K, d), not centered. Source: Papyan et al. (2020), figure 3."""
    return equiangular(unit(_wide(weight)), check_pairs(pairs))[0]


def nc2_weight_maxangle(weight: Tensor, pairs: float | None = None) -> Tensor:
    """:func:`nc2_maxangle` of the rows of ``weight`` (K, d), not centered. Source: Papyan et al. (2020), figure 4."""
    return maxangle(unit(_wide(weight)), check_pairs(pairs))[0]


def gnc2_margin(weight: Tensor) -> Tensor:
    r"""The smallest distance of a row of ``weight`` (K, d), of length 1, from the convex hull of the other rows, of length 1.

    In [0, 2]; K / (K - 1) at a simplex ETF, the largest for K <= d + 1. It is defined for any K and d, and is largest at a
    softmax code. A quadratic program for each class, solved to a relative duality gap of 1e-9; K x K numbers and time of
    K^3 a step, so ``metrics="all"`` leaves it out. Not differentiable. Source: Jiang et al. (2023), arXiv 2310.05351.

    Raises:
        ValueError: for fewer than two rows.
    """
    if len(weight) < 2:
        raise ValueError(f"weight must have two rows or more, got {tuple(weight.shape)}")
    return _gnc2_margin(_wide(weight.detach()))


def _gnc2_margin(weight: Tensor) -> Tensor:
    """Accelerated projected gradient over the weights of the hull, all classes at once, with restarts."""
    rows = unit(weight.detach())
    if not rows.isfinite().all():
        return rows.new_full((), math.nan)
    gram, classes = rows @ rows.T, len(rows)
    own = torch.eye(classes, dtype=torch.bool, device=rows.device)
    step = 1 / torch.linalg.matrix_norm(gram, 2)
    shares = (~own).to(gram) / (classes - 1)
    ahead, momentum = shares, 1.0
    for _ in range(_STEPS):
        slope = shares @ gram - gram
        # A step to the vertex of the steepest descent bounds what is left.
        gap = (slope * shares).sum(dim=1) - slope.masked_fill(own, torch.inf).amin(dim=1)
        distance = ((slope * shares).sum(dim=1) - (gram * shares).sum(dim=1) + 1).clamp(min=0)
        farther = distance - 2 * gap > distance.min()  # than the nearest one, whatever is left
        if ((gap <= 1e-9 * distance + 1e-14) | farther).all():
            break
        new = _on_simplex((ahead - step * (ahead @ gram - gram)).masked_fill(own, -torch.inf))
        if ((ahead - new) * (new - shares)).sum() > 0:  # it has turned uphill
            momentum = 1.0
        following = (1 + math.sqrt(1 + 4 * momentum**2)) / 2
        ahead, shares, momentum = new + (momentum - 1) / following * (new - shares), new, following
    else:
        warnings.warn(f"gnc2_margin: not solved after {_STEPS} steps; the value may be too large", stacklevel=2)
    return distance.min().sqrt()


def _on_simplex(rows: Tensor) -> Tensor:
    """The nearest rows of numbers that are not negative and sum to 1."""
    ordered = rows.sort(dim=1, descending=True).values
    sums = ordered.masked_fill(ordered.isinf(), 0).cumsum(dim=1) - 1
    count = torch.arange(1, rows.shape[1] + 1, device=rows.device)
    kept = (ordered * count > sums).sum(dim=1, keepdim=True)
    return (rows - sums.gather(1, kept - 1) / kept).clamp(min=0)


def minority_cosine(features: Tensor, target: Tensor, weight: Tensor, num_classes: int | None = None) -> Tensor:
    """The mean of cos(w_i, w_j) over the pairs of the classes with fewer samples than the median; over all pairs if the classes
    are of one size.

    In [-1, 1]; -1/(K - 1) at collapse of balanced classes, 1 in minority collapse, where the rows of small classes are one. nan
    if only one class is that small. Which classes count as small is a choice. Source: Fang et al. (2021), arXiv 2101.12699.
    """
    return compute("minority_cosine", features, target, num_classes, weight)


def _minority_cosine(s: Summary) -> Tensor:
    counts = s.moments.counts
    small = counts < counts.quantile(0.5) if counts.min() < counts.max() else torch.ones_like(counts, dtype=torch.bool)
    rows = unit(s.weight[small])
    if len(rows) < 2:
        raise UndefinedError("fewer than two classes have fewer samples than the median")
    return (rows.sum(dim=0).square().sum() - len(rows)) / (len(rows) * (len(rows) - 1))


_W = ("weight",)

WEIGHTS = {
    "nc0": MetricSpec(lambda s: _nc0(s.weight), "NC0, sum of the weight's rows", _W),
    "nc2_weight": MetricSpec(lambda s: frame_distance(s.weight, "etf"), "NC2, weight to ETF", _W, etf=True),
    "nc2_weight_equinorm": MetricSpec(lambda s: equinorm(s.weight), "NC2, equal norms of the weight", _W),
    "nc2_weight_equiangular": MetricSpec(
        lambda s: equiangular(unit(s.weight), s.pairs), "NC2, equal angles of the weight", _W, pairwise=True, etf=True
    ),
    "nc2_weight_maxangle": MetricSpec(
        lambda s: maxangle(unit(s.weight), s.pairs), "NC2, largest angles of the weight", _W, pairwise=True, etf=True
    ),
    "gnc2_margin": MetricSpec(
        lambda s: _gnc2_margin(s.weight),
        "NC2, margin of the weight",
        _W,
        collapse=lambda classes, features: classes / (classes - 1),
        direction="rises",
        opt_in=True,
    ),
    "minority_cosine": MetricSpec(
        _minority_cosine, "cosine of small classes' weight", _W, collapse=lambda classes, features: -1 / (classes - 1)
    ),
}
