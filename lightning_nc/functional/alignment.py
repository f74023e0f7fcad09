"""NC3: how near the classifier is to the class means."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.linalg import vector_norm

from lightning_nc.functional.frames import frame_distance
from lightning_nc.functional.table import MetricSpec, Summary, compute

__all__ = ["ALIGNMENT", "bias_collapse", "nc3", "nc3_cosine", "nc3_gram", "nc3_uniform"]

_BLOCK = 2**20  # numbers that are processed together


def nc3(
    features: Tensor, target: Tensor, weight: Tensor, num_classes: int | None = None, center: bool = False
) -> Tensor:
    r"""Distance of the classifier's weight from the class means, :math:`\| W/\|W\|_F - H/\|H\|_F \|_F`.

    Args:
        features: (N, d).
        target: class indices, (N,).
        weight: (K, d).
        num_classes: K; by default the number of rows of ``weight``.
        center: use M instead of H.

    Source: Tirer & Bruna (2022), equation (28). Papyan et al. (2020) use the square of the centered distance.
    """
    return compute("nc3_centered" if center else "nc3", features, target, num_classes, weight)


def _nc3(weight: Tensor, means: Tensor) -> Tensor:
    lengths, rows = (vector_norm(weight), vector_norm(means)), max(1, _BLOCK // means.shape[1])
    distance = means.new_zeros(())
    for w, m in zip(weight.split(rows), means.split(rows), strict=True):
        distance = vector_norm(torch.stack([distance, vector_norm(w / lengths[0] - m / lengths[1])]))
    return distance


def nc3_gram(features: Tensor, target: Tensor, weight: Tensor, num_classes: int | None = None) -> Tensor:
    r""":math:`\| WM^\top / \|WM^\top\|_F - E \|_F`, with ``weight`` (K, d). Source: arXiv 2105.02375."""
    return compute("nc3_gram", features, target, num_classes, weight)


def nc3_cosine(features: Tensor, target: Tensor, weight: Tensor, num_classes: int | None = None) -> Tensor:
    """One minus the mean over the classes of cos(w_k, m_k), with ``weight`` (K, d)."""
    return compute("nc3_cosine", features, target, num_classes, weight)


def _cosines(s: Summary) -> Tensor:
    """cos(w_k, m_k), (K,)."""
    lengths = vector_norm(s.weight, dim=1) * vector_norm(s.centered, dim=1)
    cosines: Tensor = torch.linalg.vecdot(s.weight, s.centered) / lengths
    return cosines


def nc3_uniform(features: Tensor, target: Tensor, weight: Tensor, num_classes: int | None = None) -> Tensor:
    """Uniform duality: the population standard deviation (ddof 0) over the classes of cos(w_k, m_k), with ``weight`` (K, d).

    In [0, 1], 0 at collapse, and also where all rows are off by the same angle. Other code takes ddof 1, dot products, or the
    ratio of the standard deviation to the mean. Source: Wu & Papyan (2024), arXiv 2405.17767.
    """
    return compute("nc3_uniform", features, target, num_classes, weight)


def bias_collapse(
    features: Tensor, target: Tensor, weight: Tensor, bias: Tensor, num_classes: int | None = None
) -> Tensor:
    r""":math:`\| W \mu_G + b \|_2`, with ``weight`` (K, d) and ``bias`` (K,). Source: arXiv 2105.02375."""
    return compute("bias_collapse", features, target, num_classes, weight, bias)


ALIGNMENT = {
    "nc3": MetricSpec(lambda s: _nc3(s.weight, s.means), "NC3, weight to class means", ("weight",)),
    "nc3_centered": MetricSpec(lambda s: _nc3(s.weight, s.centered), "NC3, weight to centered means", ("weight",)),
    "nc3_gram": MetricSpec(
        lambda s: frame_distance(s.weight, "etf", s.centered), "NC3, weight times means to ETF", ("weight",), etf=True
    ),
    "nc3_cosine": MetricSpec(lambda s: 1 - _cosines(s).mean(), "NC3, angle of weight to means", ("weight",)),
    "nc3_uniform": MetricSpec(lambda s: _cosines(s).std(correction=0), "NC3, uniform angles", ("weight",)),
    "bias_collapse": MetricSpec(
        lambda s: vector_norm(s.weight @ s.means.mean(dim=0) + s.bias), "bias against global mean", ("weight", "bias")
    ),
}
