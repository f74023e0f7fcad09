"""NC2 in parts: lengths and angles of the class means, and their energy, which still means something for many classes."""

from __future__ import annotations

import math

from torch import Tensor
from torch.linalg import vector_norm

from lightning_nc.functional.pairs import Pairs, deviation_over_pairs, log_mean_exp_over_pairs, mean_over_pairs
from lightning_nc.functional.table import MetricSpec, Summary, UndefinedError, compute

__all__ = [
    "ANGLES",
    "ENERGY",
    "equiangular",
    "equinorm",
    "gnc2_log",
    "gnc2_log_spread",
    "gnc2_riesz",
    "maxangle",
    "nc2_equiangular",
    "nc2_equinorm",
    "nc2_maxangle",
]


def nc2_equinorm(features: Tensor, target: Tensor, num_classes: int | None = None) -> Tensor:
    r"""Equal norms: the population standard deviation (ddof 0) of :math:`\|m_k\|` over its mean. At least 0, and 0 at collapse.

    The notebook of the source takes ddof 1, a factor of sqrt(K / (K - 1)). Source: Papyan et al. (2020), figure 2.
    """
    return compute("nc2_equinorm", features, target, num_classes)


def equinorm(rows: Tensor) -> Tensor:
    """The population standard deviation of the lengths of the rows over their mean."""
    norms: Tensor = vector_norm(rows, dim=1)
    return norms.std(correction=0) / norms.mean()


def nc2_equiangular(
    features: Tensor, target: Tensor, num_classes: int | None = None, pairs: float | None = None
) -> Tensor:
    """Equal angles: the population standard deviation of cos(m_i, m_j) over the pairs. In [0, 1], 0 at collapse.
    Source: Papyan et al. (2020), figure 3.

    ``pairs`` estimates it from random pairs, see :func:`nc1_cdnv`.
    """
    return compute("nc2_equiangular", features, target, num_classes, pairs=pairs)


def equiangular(unit: Tensor, pairs: int | None) -> tuple[Tensor, Tensor]:
    """The standard deviation of the cosines of rows of length 1 over the pairs, and its standard error."""
    return deviation_over_pairs(unit, lambda block: block.products(unit), pairs)


def nc2_maxangle(
    features: Tensor, target: Tensor, num_classes: int | None = None, pairs: float | None = None
) -> Tensor:
    """Largest angles: the mean over the pairs of abs(cos(m_i, m_j) + 1/(K - 1)). At least 0, and 0 at collapse.

    The mean of the signed value would cancel. Source: Papyan et al. (2020), figure 4.
    ``pairs`` estimates it from random pairs, see :func:`nc1_cdnv`.
    """
    return compute("nc2_maxangle", features, target, num_classes, pairs=pairs)


def maxangle(unit: Tensor, pairs: int | None) -> tuple[Tensor, Tensor]:
    """The mean of abs(cos + 1 / (K - 1)) of rows of length 1 over the pairs, and its standard error."""
    return mean_over_pairs(unit, lambda block: (block.products(unit) + 1 / (len(unit) - 1)).abs(), pairs)


def gnc2_log(features: Tensor, target: Tensor, num_classes: int | None = None, pairs: float | None = None) -> Tensor:
    r"""Logarithmic energy: the mean over the pairs of :math:`-\log \|\hat m_i - \hat m_j\|`, with :math:`\hat m_k` the centered
    class means, each of length 1. At least :math:`-\log 2`; :math:`-\tfrac12 \log \frac{2K}{K-1}` at a simplex ETF, its minimum
    for K <= d + 1. It is defined for any K and d. Source: Liu et al. (2023), arXiv 2303.06484; Wu & Papyan (2024), arXiv
    2405.17767.

    ``pairs`` estimates it from random pairs, see :func:`nc1_cdnv`.
    """
    return compute("gnc2_log", features, target, num_classes, pairs=pairs)


def _log_distance(s: Summary, pairs: Pairs) -> Tensor:
    return -pairs.squared_distances(s.unit).log() / 2


def gnc2_log_spread(
    features: Tensor, target: Tensor, num_classes: int | None = None, pairs: float | None = None
) -> Tensor:
    r"""The population standard deviation over the pairs of the values whose mean is :func:`gnc2_log`: whether the class means are
    equally far apart. At least 0, and 0 at collapse. Source: Wu & Papyan (2024), arXiv 2405.17767.

    ``pairs`` estimates it from random pairs, see :func:`nc1_cdnv`.
    """
    return compute("gnc2_log_spread", features, target, num_classes, pairs=pairs)


def gnc2_riesz(features: Tensor, target: Tensor, num_classes: int | None = None) -> Tensor:
    r"""Logarithm of the Riesz energy, :math:`\log \operatorname{mean} \|\hat m_i - \hat m_j\|^{-s}` over the pairs, s = d - 2.

    The energy itself leaves the floating range for large d. Any real number; :math:`-\tfrac s2 \log \frac{2K}{K-1}` at a simplex
    ETF, its minimum for K <= d + 1. nan for d <= 2. Always over all pairs: the few nearest ones, which random pairs would miss,
    dominate it. Source: Liu et al. (2023), arXiv 2303.06484; s is that of the authors' code.
    """
    return compute("gnc2_riesz", features, target, num_classes)


def _gnc2_riesz(s: Summary) -> Tensor:
    power = s.means.shape[1] - 2
    if power < 1:
        raise UndefinedError(f"the Riesz energy with s = d - 2 needs three features or more, not {power + 2}")
    return log_mean_exp_over_pairs(s.means, lambda pairs: power * _log_distance(s, pairs))


def _etf_energy(num_classes: int) -> float:
    return -math.log(2 * num_classes / (num_classes - 1)) / 2


ANGLES = {
    "nc2_equinorm": MetricSpec(lambda s: equinorm(s.centered), "NC2, equal norms"),
    "nc2_equiangular": MetricSpec(lambda s: equiangular(s.unit, s.pairs), "NC2, equal angles", pairwise=True, etf=True),
    "nc2_maxangle": MetricSpec(lambda s: maxangle(s.unit, s.pairs), "NC2, largest angles", pairwise=True, etf=True),
    "gnc2_log_spread": MetricSpec(
        lambda s: deviation_over_pairs(s.means, lambda pairs: _log_distance(s, pairs), s.pairs),
        "NC2, spread of the energy",
        pairwise=True,
        etf=True,
    ),
}

ENERGY = {
    "gnc2_log": MetricSpec(
        lambda s: s.mean_over_pairs(lambda pairs: _log_distance(s, pairs)),
        "NC2, logarithmic energy",
        collapse=lambda classes, features: _etf_energy(classes),
        pairwise=True,
    ),
    "gnc2_riesz": MetricSpec(
        _gnc2_riesz,
        "NC2, log of the Riesz energy",
        collapse=lambda classes, features: (features - 2) * _etf_energy(classes),
    ),
}
