"""How many dimensions the class means and the features use."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_nc.functional.table import MetricSpec, Summary, compute

__all__ = ["RANKS", "numerical_rank", "numerical_rank_features", "stable_rank", "stable_rank_features"]

_CUT = 1e-3


def stable_rank(features: Tensor, target: Tensor, num_classes: int | None = None) -> Tensor:
    r"""Stable rank of the centered class means, :math:`\|M\|_F^2 / \|M\|_2^2`, with the largest singular value below the line.

    In [1, K - 1]; K - 1 at collapse. Source: Rudelson & Vershynin (2007); for features of networks WeightWatcher and
    arXiv 2305.19753.
    """
    return compute("stable_rank", features, target, num_classes)


def numerical_rank(features: Tensor, target: Tensor, num_classes: int | None = None) -> Tensor:
    """Number of singular values of the centered class means above 0.0316 of the largest: eigenvalues of their covariance above
    1e-3 of the largest. In [1, K - 1]; K - 1 at collapse. Not differentiable. Source: arXiv 2305.19753.
    """
    return compute("numerical_rank", features, target, num_classes)


def stable_rank_features(features: Tensor, target: Tensor, num_classes: int | None = None) -> Tensor:
    r"""Trace of the covariance of all features over its largest eigenvalue: the stable rank of the features minus their mean.

    In [1, d]; K - 1 at collapse of balanced classes. Source: see :func:`stable_rank`.
    """
    return compute("stable_rank_features", features, target, num_classes)


def numerical_rank_features(features: Tensor, target: Tensor, num_classes: int | None = None) -> Tensor:
    """Number of eigenvalues of the covariance of all features above 1e-3 of the largest. In [1, d]; K - 1 at collapse. Not
    differentiable. Source: arXiv 2305.19753.
    """
    return compute("numerical_rank_features", features, target, num_classes)


def _means(s: Summary) -> Tensor:
    """Eigenvalues of the covariance of the class means, up to a factor."""
    rows = s.centered
    values: Tensor = torch.linalg.eigvalsh(rows @ rows.T if len(rows) < rows.shape[1] else rows.T @ rows)
    return values


def _features(s: Summary) -> Tensor:
    values: Tensor = torch.linalg.eigvalsh(s.moments.total())
    return values


def _stable(values: Tensor) -> Tensor:
    return values.sum() / values[-1]


def _numerical(values: Tensor) -> Tensor:
    return (values > _CUT * values[-1]).sum().to(values) * values[-1].detach().sign()


def _row(formula: object, title: str, scatter: bool = False) -> MetricSpec:
    return MetricSpec(
        formula,  # type: ignore[arg-type]
        title,
        collapse=lambda classes, features: classes - 1,
        direction="approaches",
        scatter=scatter,
    )


RANKS = {
    "stable_rank": _row(lambda s: _stable(_means(s)), "stable rank of the class means"),
    "numerical_rank": _row(lambda s: _numerical(_means(s)), "numerical rank of the class means"),
    "stable_rank_features": _row(lambda s: _stable(_features(s)), "stable rank of the features", True),
    "numerical_rank_features": _row(lambda s: _numerical(_features(s)), "numerical rank of the features", True),
}
