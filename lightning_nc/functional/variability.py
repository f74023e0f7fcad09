"""NC1: how far samples scatter around the mean of their class."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.linalg import vector_norm

from lightning_nc.functional.table import MetricSpec, Summary, UndefinedError, compute
from lightning_nc.moments import ClassMoments

__all__ = ["VARIABILITY", "nc1", "nc1_cdnv", "nc1_trace", "nc1_vci"]


def nc1(features: Tensor, target: Tensor, num_classes: int | None = None) -> Tensor:
    r"""Within-class variability relative to the separation of the classes.

    .. math:: \mathrm{NC}_1 = \tfrac1K \operatorname{tr}(\Sigma_W \Sigma_B^\dagger)

    Computed by projecting the deviations on the span of the centered class means, which is exact down to 1e-25 and never
    negative; the d x d matrices are not formed. Directions in which the class means differ by no more than the rounding of
    the features are left out of the pseudoinverse, with a warning that says how many. Source: Tirer & Bruna (2022),
    equation (26); Papyan et al. (2020).

    Example:
        >>> import torch
        >>> from lightning_nc.functional import nc1
        >>> nc1(torch.tensor([[2.0], [4.0], [-2.0], [-4.0]]), torch.tensor([0, 0, 1, 1]))
        tensor(0.0556, dtype=torch.float64)
    """
    return compute("nc1", features, target, num_classes)


def _nc1(s: Summary) -> Tensor:
    return s.moments.within(_whitening(s)[0]).sum() / s.moments.samples


def _whitening(s: Summary) -> tuple[Tensor, Tensor]:
    """The pseudoinverse of rows T (m, d) with T'T = M'M, and T."""
    directions, values = s.directions
    if not s.means.requires_grad:
        return directions / values, (directions * values).T
    # With T = U diag(s) V', V diag(1/s) and the pseudoinverse V diag(1/s) U' give the same value. The gradient of the
    # pseudoinverse exists for equal singular values too, that of V does not.
    contrasts = s.moments.contrasts()
    if len(values) < min(contrasts.shape):
        contrasts = contrasts @ directions @ directions.T
    return torch.linalg.pinv(contrasts, atol=values.min() / 2, rtol=0), contrasts


def nc1_trace(features: Tensor, target: Tensor, num_classes: int | None = None) -> Tensor:
    r""":math:`\operatorname{tr} \Sigma_W / \operatorname{tr} \Sigma_B`. Source: arXiv 2210.16658."""
    return compute("nc1_trace", features, target, num_classes)


def _nc1_trace(s: Summary) -> Tensor:
    between: Tensor = vector_norm(s.centered).square() / len(s.means)
    return s.moments.spread.sum() / s.moments.samples / between


def nc1_cdnv(features: Tensor, target: Tensor, num_classes: int | None = None, pairs: float | None = None) -> Tensor:
    r"""Class-distance normalized variance: the mean over pairs of classes of
    :math:`(s_i^2 + s_j^2) / (2 \|\mu_i - \mu_j\|^2)`, with :math:`s_k^2` the mean squared distance to :math:`\mu_k`.
    Source: arXiv 2112.15121.

    ``pairs`` estimates it from that many random pairs if there are more, always the same ones;
    :class:`lightning_nc.NeuralCollapse` gives the standard error too.
    """
    return compute("nc1_cdnv", features, target, num_classes, pairs=pairs)


def _nc1_cdnv(s: Summary) -> tuple[Tensor, Tensor]:
    variance = s.moments.spread / s.moments.counts
    return s.mean_over_pairs(lambda pairs: pairs.sums(variance) / (2 * pairs.squared_distances(s.centered)))


def nc1_vci(features: Tensor, target: Tensor, num_classes: int | None = None) -> Tensor:
    r"""Variability collapse index.

    .. math:: \mathrm{VCI} = 1 - \operatorname{tr}\big((\Sigma_W + \Sigma_B)^\dagger \Sigma_B\big) / r,

    with r the rank of :math:`\Sigma_B`. In [0, 1], 0 at collapse, and at most K / r times :func:`nc1`. Invariant to every
    invertible linear map of the features. Computed without that subtraction: with x the eigenvalues of what is left of the
    within-class covariance along the class means, relative to their separation, once the other directions have explained what
    they can, it is the mean of x / (1 + x). A direction counts if samples vary along it by more than rounding.

    nan, with a warning, where :math:`N - K \le d - r`: fewer samples than directions explain each other exactly, whatever the
    collapse (d counts the directions in which features vary). Source: arXiv 2306.03440; that it divides by r is a choice, which
    the text of the paper does not settle.
    """
    return compute("nc1_vci", features, target, num_classes)


def _nc1_vci(s: Summary) -> Tensor:
    directions, lengths = s.directions
    if isinstance(s.moments, ClassMoments) and (factor := s.moments.cholesky()) is not None:
        separation = directions * lengths * (s.moments.samples / len(s.means)).sqrt()
        ratios: Tensor = torch.linalg.svdvals(torch.linalg.solve_triangular(factor, separation, upper=False))
        return (1 / (1 + ratios.square())).sum() / len(lengths)
    left = _unexplained(s)
    ratio = left.T @ left * (len(s.means) / s.moments.samples)
    index: Tensor = torch.linalg.solve(torch.eye(len(ratio)).to(ratio) + ratio, ratio).trace()
    return index / len(lengths)


def _unexplained(s: Summary) -> Tensor:
    """What is left of the deviations along the class means, whitened, after regression on those in all other directions."""
    (directions, _), (whitening, rows), deviations = s.directions, _whitening(s), s.moments.root()
    along = deviations @ whitening
    complement = torch.linalg.qr(directions, mode="complete").Q[:, directions.shape[1] :]
    others = (deviations - along @ rows) @ complement
    with torch.no_grad():
        axes, values, turn = torch.linalg.svd(others, full_matrices=False)
        kept = values.square() > s.moments.noise()  # rounding explains nothing, though it would fit anything
        inverse = (turn[kept].T / values[kept]) @ axes[:, kept].T
        if s.moments.samples - len(s.means) <= kept.sum():
            raise UndefinedError(
                f"{int(s.moments.samples)} samples of {len(s.means)} classes are too few for features that vary in "
                f"{int(kept.sum()) + len(rows)} directions: it is 0 for any features"
            )
    for _ in range(2):  # again, for what rounding has left; what is left does not change with the coefficients
        along = along - others @ (inverse @ along.detach())
    return along


VARIABILITY = {
    "nc1": MetricSpec(_nc1, "NC1, within-class variability", within=True, scatter=True),
    "nc1_trace": MetricSpec(_nc1_trace, "NC1, ratio of traces", within=True),
    "nc1_cdnv": MetricSpec(_nc1_cdnv, "NC1, class-distance normalized variance", within=True, pairwise=True),
    "nc1_vci": MetricSpec(_nc1_vci, "NC1, variability collapse index", within=True, scatter=True),
}
