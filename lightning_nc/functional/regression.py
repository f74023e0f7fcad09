"""Neural collapse of regression: NRC1, NRC2 and NRC3."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.linalg import matrix_norm

from lightning_nc.regression_moments import RegressionMoments, check_regression

__all__ = ["REGRESSION", "evaluate_regression", "nrc1", "nrc2", "nrc3"]


def nrc1(features: Tensor, targets: Tensor) -> Tensor:
    r"""Distance of the features from their own leading principal directions, as many as there are targets.

    :math:`\frac1N \sum_i \| \tilde h_i - P \tilde h_i \|^2`, where :math:`\tilde h = h / \|h\|`, and P projects on the n
    leading eigenvectors of the covariance of the features. It lies in [0, 1].

    The directions are those of the centered features, and the features that are projected are not centered. Directions
    along which the features do not vary are left out of P, so that it has less than n of them if the features have less.
    A feature that is zero counts as 0.

    Args:
        features: (N, d), floating.
        targets: (N, n), or (N,) for n = 1; only n is used.

    Returns:
        A tensor of shape (), in float64 (float32 on a device without it). It is nan, with a warning that says why, for
        d <= n, for features that do not vary, and for an infinity or a nan.

    Raises:
        ValueError: for shapes or types that do not fit.

    Source: Andriopoulos et al. (arXiv 2409.04180), section 3.1.
    """
    return _compute("nrc1", features, targets)


def _nrc1(moments: RegressionMoments, weight: Tensor | None) -> Tensor:
    scatter, count = moments.feature_scatter, len(moments.target_mean)
    values, vectors = torch.linalg.eigh(scatter.detach())
    leading = values > len(values) * torch.finfo(values.dtype).eps * values[-1]
    leading[:-count] = False
    inside, outside = vectors[:, leading], vectors[:, ~leading]
    if scatter.requires_grad:  # as the eigenvectors move, to first order; equal eigenvalues on one side do no harm
        gaps = values[leading].unsqueeze(1) - values[~leading]
        outside = outside - inside @ (inside.T @ scatter @ outside / gaps)
    residual: Tensor = (outside * (moments.unit_scatter @ outside)).sum() / moments.count
    return residual


def nrc2(features: Tensor, targets: Tensor, weight: Tensor) -> Tensor:
    r"""Distance of the features from the span of the rows of the weight.

    :math:`\frac1N \sum_i \| \tilde h_i - P \tilde h_i \|^2`, where :math:`\tilde h = h / \|h\|`, and P projects on the span of
    the rows of W. It lies in [0, 1].

    Args:
        features: (N, d), floating.
        targets: (N, n), or (N,) for n = 1; their values are not used.
        weight: (n, d), of the last layer.

    Returns:
        A tensor of shape (); see :func:`nrc1`.

    Raises:
        ValueError: for shapes or types that do not fit.

    Source: Andriopoulos et al. (arXiv 2409.04180), section 3.1.
    """
    return _compute("nrc2", features, targets, weight)


def _nrc2(moments: RegressionMoments, weight: Tensor | None) -> Tensor:
    assert weight is not None
    rest = torch.eye(weight.shape[1], dtype=weight.dtype, device=weight.device) - torch.linalg.pinv(weight) @ weight
    residual: Tensor = ((rest @ moments.unit_scatter) * rest).sum() / moments.count
    return residual


def nrc3(features: Tensor, targets: Tensor, weight: Tensor) -> Tensor:
    r"""Distance of the Gram matrix of the weight's rows from the form that the covariance of the targets gives it.

    :math:`\min_\gamma \left\| \frac{WW^\top}{\|WW^\top\|_F} - \frac{\Sigma^{1/2} - \sqrt\gamma I}{\|\Sigma^{1/2} - \sqrt\gamma
    I\|_F} \right\|_F^2` over :math:`0 \le \gamma \le \lambda_{\min}`, where :math:`\Sigma` is the covariance of the targets,
    divided by N, and :math:`\lambda_{\min}` its smallest eigenvalue. The minimum has a closed form. It is differentiable in
    the weight.

    For targets that are almost uncorrelated and of the same variance, :math:`\gamma` near :math:`\lambda_{\min}` leaves only
    what little they differ, so the value says little.

    Args:
        features: (N, d), floating; their values are not used.
        targets: (N, n) with n >= 2.
        weight: (n, d), of the last layer.

    Returns:
        A tensor of shape (); see :func:`nrc1`. It is nan, with a warning that says why, for one target, for which the
        formula gives 0 whatever the weight is.

    Raises:
        ValueError: for shapes or types that do not fit.

    Source: Andriopoulos et al. (arXiv 2409.04180), section 3.1.
    """
    return _compute("nrc3", features, targets, weight)


def _nrc3(moments: RegressionMoments, weight: Tensor | None) -> Tensor:
    assert weight is not None
    gram = weight @ weight.T
    values, vectors = torch.linalg.eigh(moments.target_scatter.detach() / moments.count)
    root, one = (vectors * values.clamp(min=0).sqrt()) @ vectors.T, torch.diag(torch.ones_like(values))
    largest = values[0].clamp(min=0).sqrt()
    a, s, p, q = gram.trace(), root.trace(), (gram * root).sum(), root.square().sum()
    # Where the derivative is 0. It may be a maximum, so the ends of the interval are tried too.
    stationary = ((a * q - p * s) / (a * s - len(values) * p)).detach().nan_to_num().clamp(torch.zeros_like(s), largest)
    targets = [root - shift * one for shift in (stationary, torch.zeros_like(s), largest)]
    resolved = 16 * len(values) * torch.finfo(values.dtype).eps * matrix_norm(root)  # below it, nothing but rounding
    distances = [
        matrix_norm(gram / matrix_norm(gram) - target / matrix_norm(target)).square()
        for target in targets
        if matrix_norm(target) > resolved
    ]
    return torch.stack(distances).min()


REGRESSION: dict[str, Callable[[RegressionMoments, Tensor | None], Tensor]] = {
    "nrc1": _nrc1,
    "nrc2": _nrc2,
    "nrc3": _nrc3,
}
"""The metrics of regression by name: functions of the moments and the weight."""


def evaluate_regression(
    names: Sequence[str], moments: RegressionMoments, weight: Tensor | None = None
) -> dict[str, Tensor]:
    """The named metrics. What means nothing is nan, with a warning that says why.

    Raises:
        ValueError: for a weight whose shape does not fit.
    """
    sizes = len(moments.target_mean), len(moments.feature_mean)
    if weight is not None and weight.shape != sizes:
        raise ValueError(f"weight must have shape {sizes}, got {tuple(weight.shape)}")
    weight = None if weight is None else weight.to(moments.feature_mean)
    nan = moments.count.new_full((), math.nan)
    values = {}
    for name in names:
        reason = _reason(name, moments, weight)
        values[name] = nan if reason else REGRESSION[name](moments, weight)
        if reason and moments.count:
            warnings.warn(f"{name} is nan, because {reason}", stacklevel=3)
    return values


def _reason(name: str, moments: RegressionMoments, weight: Tensor | None) -> str | None:
    """Why a metric means nothing; None if it means something."""
    targets, features = len(moments.target_mean), len(moments.feature_mean)
    if not moments.count:
        return "there is no sample"
    if moments.nonfinite:
        return f"{int(moments.nonfinite)} samples have an infinity or a nan"
    if not all(part.isfinite().all() for part in (moments.feature_scatter, moments.target_scatter)):
        return "the squares of the features or targets leave the floating range"
    if name != "nrc1" and (weight is None or not weight.isfinite().all()):
        return "the weight holds an infinity or a nan"
    if name in ("nrc1", "nrc2") and features <= targets:
        return f"{features} features always lie in a space of {targets} dimensions, one for each target"
    if name == "nrc1" and not moments.feature_scatter.diagonal().any():
        return "all features are the same"
    if name == "nrc3" and targets == 1:
        return "for one target the formula gives 0 whatever the weight is"
    if name == "nrc3" and not moments.target_scatter.diagonal().any():
        return "all targets are the same"
    if name != "nrc1" and weight is not None and not weight.any():
        return "the weight is zero"
    return None


def _compute(name: str, features: Tensor, targets: Tensor, weight: Tensor | None = None) -> Tensor:
    """One metric of all features at hand."""
    targets = check_regression(features, targets)
    return evaluate_regression((name,), RegressionMoments.of(features, targets), weight)[name]
