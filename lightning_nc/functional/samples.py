"""NC4 and its kin: samples compared with the class means."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.linalg import vector_norm

from lightning_nc.comparison import pair_scale
from lightning_nc.functional.table import MetricSpec, Summary, UndefinedError, compute
from lightning_nc.moments import state_dtype

__all__ = ["SAMPLES", "SCATTER_OF_SAMPLES", "effective_depth", "nc1_cdnv_directional", "nc4", "nc5", "ncc_error"]

_BLOCK = 2**22  # numbers that are processed together


def nc4(
    features: Tensor, target: Tensor, weight: Tensor, bias: Tensor | None = None, num_classes: int | None = None
) -> Tensor:
    """Share of the samples for which the nearest class mean and the classifier's arg max disagree.

    The class means must be known before the samples are compared with them, so this needs all features and cannot be
    computed in a single pass. Not differentiable.

    Args:
        features: (N, d).
        target: class indices, (N,).
        weight: (K, d).
        bias: (K,); zero if it is not given.
        num_classes: K; by default the number of rows of ``weight``.

    Source: Papyan et al. (2020), figure 7.

    Example:
        >>> import torch
        >>> from lightning_nc.functional import nc4
        >>> nc4(torch.tensor([[2.0], [1.0], [-2.0]]), torch.tensor([0, 0, 1]), torch.tensor([[1.0], [-1.0]]))
        tensor(0., dtype=torch.float64)
    """
    return compute("nc4", features, target, num_classes, weight, bias)


def _nc4(s: Summary) -> Tensor:
    assert s.comparison is not None
    return s.comparison.disagreeing.sum() / s.comparison.compared.sum()


def ncc_error(features: Tensor, target: Tensor, num_classes: int | None = None) -> Tensor:
    """Error of the nearest-class-center classifier: the share of the samples whose nearest class mean is not that of their
    own class. In [0, 1], 0 at collapse. Not differentiable. Source: Galanti et al. (2022), arXiv 2202.09028.

    :func:`nc4` compares the nearest class mean with the classifier's decision instead of the label.
    """
    return compute("ncc_error", features, target, num_classes)


def _ncc_error(s: Summary) -> Tensor:
    assert s.comparison is not None
    return s.comparison.misplaced.sum() / s.comparison.compared.sum()


def effective_depth(errors: Sequence[float], tolerance: float = 0.01) -> float:
    """The number, from 1, of the first layer whose nearest-class-center error is at most ``tolerance`` above the last layer's.

    Args:
        errors: :func:`ncc_error` of the layers, from the first to the last; nan gives nan.
        tolerance: the paper takes a threshold of its own for each network; 0.01 is a choice.

    Source: Galanti et al. (2022), arXiv 2202.09028.

    Example:
        >>> from lightning_nc.functional import effective_depth
        >>> effective_depth([0.6, 0.2, 0.005, 0.0])
        3.0
    """
    if any(math.isnan(error) for error in errors):
        return math.nan
    return next(depth for depth, error in enumerate(errors, 1) if error <= errors[-1] + tolerance) * 1.0


def nc1_cdnv_directional(features: Tensor, target: Tensor, num_classes: int | None = None) -> Tensor:
    r"""Directional class-distance normalized variance: the mean over ordered pairs of classes i, j of the variance of class i
    along the line to class j, :math:`\operatorname{mean}_{h \in i} ((h - \mu_i)^\top u_{ij})^2 / \|\mu_i - \mu_j\|^2`, where
    :math:`u_{ij}` is the unit vector between the two means. At least 0, and 0 at collapse. Not differentiable.

    :func:`nc1_cdnv` takes the variance in all directions, of both classes, with a factor 1/2. Source: arXiv 2603.03530.
    """
    return compute("nc1_cdnv_directional", features, target, num_classes)


def _nc1_cdnv_directional(s: Summary) -> Tensor:
    assert s.comparison is not None
    means, along, raw = s.centered.detach(), s.comparison.along, s.means.detach()
    summed = along.new_zeros(())
    size = max(1, _BLOCK // means.numel())
    for start in range(0, len(means), size):
        rows = slice(start, start + size)
        scale = pair_scale(raw[rows], raw).unsqueeze(2)
        squares = ((means[rows].unsqueeze(1) - means) / scale).square().sum(dim=2)
        own = torch.arange(start, start + len(squares), device=means.device).unsqueeze(1)
        squares = squares.scatter(1, own, 1)  # a class has no direction to itself, where ``along`` is zero
        summed += (along[rows] / squares.square() / s.comparison.compared[rows].unsqueeze(1)).sum()
    return summed / (len(means) * (len(means) - 1))


def nc5(features: Tensor, target: Tensor, ood_features: Tensor, num_classes: int | None = None) -> Tensor:
    r"""Orthogonality to out-of-distribution data: the mean over the classes of :math:`|\cos(\mu_k, \mu_{OOD})|`, where
    :math:`\mu_{OOD}` is the mean of ``ood_features``, (n, d). Means are not centered. In [0, 1], 0 at collapse.
    Source: arXiv 2310.06823, equation (5).
    """
    return compute(
        "nc5", features, target, num_classes, ood_mean=ood_features.to(state_dtype(features.device)).mean(dim=0)
    )


def _nc5(s: Summary) -> Tensor:
    if not s.ood_mean.isfinite().all():
        raise UndefinedError(
            "the mean of the data of no class is not finite: there are none, or they hold an infinity or a nan"
        )
    lengths = vector_norm(s.means, dim=1) * vector_norm(s.ood_mean)
    if not lengths.all():
        raise UndefinedError("the mean of a class, or that of the data of no class, is zero")
    cosines: Tensor = (s.means @ s.ood_mean / lengths).abs()
    return cosines.mean()


SAMPLES = {
    "nc4": MetricSpec(_nc4, "NC4, nearest center against classifier", ("weight",), samples=True),
    "ncc_error": MetricSpec(_ncc_error, "error of the nearest class center", samples=True),
    "nc5": MetricSpec(_nc5, "NC5, class means against other data", ("ood",), opt_in=True),
}

SCATTER_OF_SAMPLES = {
    "nc1_cdnv_directional": MetricSpec(_nc1_cdnv_directional, "NC1, directional CDNV", within=True, samples=True),
}
