r"""The metrics of neural collapse, as differentiable functions of features and labels.

Notation: K classes, N samples, d features; :math:`\mu_k` is the mean of class k, :math:`\mu_G` the mean of the class means
(not of the samples: the two differ when classes are unbalanced), H the K x d matrix of class means,
:math:`M = H - \mu_G` the centered means, W the K x d weight of the classifier, :math:`\Sigma_W` and :math:`\Sigma_B` the
within-class and between-class covariance, and :math:`E = (I - 11^\top / K) / \sqrt{K - 1}` the Gram matrix of a simplex
equiangular tight frame (ETF), of unit Frobenius norm.

Shared by all functions of features and labels:

* ``features`` is (N, d) and floating, ``target`` (N,) and integer; ``num_classes`` defaults to the number of rows of
  ``weight`` if there is one, and to the highest label plus one otherwise.
* The result is a tensor of shape (), without unit, in float64 (float32 on a device that has no float64).
* A class without a sample is left out, with a warning: K is then the number of classes seen, and the rows of W of the
  other classes are left out too. With fewer than two classes the result is nan.
* A non-finite feature gives nan, with a warning that says how many samples have one. So does a weight or bias that is not
  finite, and a scale of the features whose squares leave the floating range.
* ``ValueError`` for shapes that do not fit, labels that are not integers or lie outside [0, K).
"""

from __future__ import annotations

import difflib
import math
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor
from torch.linalg import vector_norm

from lightning_nc.moments import ClassDeviations, ClassMoments, check_batch, check_labels, state_dtype

__all__ = [
    "METRICS",
    "bias_collapse",
    "nc1",
    "nc1_cdnv",
    "nc1_trace",
    "nc2",
    "nc2_equiangular",
    "nc2_equinorm",
    "nc2_maxangle",
    "nc2_weight",
    "nc3",
    "nc3_cosine",
    "nc3_gram",
    "nc4",
]

FrameName = Literal["etf", "of"]

_PAPER = ("nc1", "nc2_etf", "nc2_etf_centered", "nc2_of", "nc3", "nc3_centered")

_BLOCK = 2**22
"""Pairs of classes that are processed together: with 50,000 classes a matrix of all pairs would take 20 GB."""


class Summary(NamedTuple):
    """What a formula can read: the statistics of the classes seen, and the classifier's rows for them."""

    moments: ClassMoments | ClassDeviations
    weight: Tensor
    bias: Tensor

    @property
    def means(self) -> Tensor:
        """H, (K, d)."""
        return self.moments.means

    @property
    def centered(self) -> Tensor:
        """M, (K, d)."""
        return self.means - self.means.mean(dim=0)


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
    return _compute("nc1", features, target, num_classes)


def _nc1(s: Summary) -> Tensor:
    directions, values = s.moments.directions()
    if not len(values):
        return values.new_full((), math.nan)
    whitening = directions / values
    if s.means.requires_grad:
        # With T = U diag(s) V', V diag(1/s) and the pseudoinverse V diag(1/s) U' give the same value. The gradient of the
        # pseudoinverse exists for equal singular values too, that of V does not.
        contrasts = s.moments.contrasts()
        if len(values) < min(contrasts.shape):
            contrasts = contrasts @ directions @ directions.T
        whitening = torch.linalg.pinv(contrasts, atol=values.min() / 2, rtol=0)
    return s.moments.within(whitening).sum() / s.moments.samples


def nc1_trace(features: Tensor, target: Tensor, num_classes: int | None = None) -> Tensor:
    r""":math:`\operatorname{tr} \Sigma_W / \operatorname{tr} \Sigma_B`. Source: arXiv 2210.16658."""
    return _compute("nc1_trace", features, target, num_classes)


def _nc1_trace(s: Summary) -> Tensor:
    return (s.moments.spread.sum() / s.moments.samples) / (s.centered.square().sum() / len(s.means))


def nc1_cdnv(features: Tensor, target: Tensor, num_classes: int | None = None) -> Tensor:
    r"""Class-distance normalized variance: the mean over pairs of classes of
    :math:`(s_i^2 + s_j^2) / (2 \|\mu_i - \mu_j\|^2)`, with :math:`s_k^2` the mean squared distance to :math:`\mu_k`.
    Source: arXiv 2112.15121.
    """
    return _compute("nc1_cdnv", features, target, num_classes)


def _nc1_cdnv(s: Summary) -> Tensor:
    variance = s.moments.spread / s.moments.counts

    def ratios(some: slice, i: Tensor, j: Tensor) -> Tensor:
        distance = torch.cdist(s.means[some], s.means, compute_mode="donot_use_mm_for_euclid_dist")[i, j]
        return (variance[some][i] + variance[j]) / (2 * distance.square())

    return _mean_over_pairs(ratios, s.means)


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
    return _compute(nc2_name(frame, center), features, target, num_classes)


def nc2_name(frame: str, center: bool) -> str:
    """The name in :data:`METRICS` of a variant of :func:`nc2`."""
    if frame not in ("etf", "of"):
        raise ValueError(f"frame must be 'etf' or 'of', got {frame!r}")
    return f"nc2_{frame}_centered" if center else f"nc2_{frame}"


def _frame_distance(rows: Tensor, frame: str, other: Tensor | None = None) -> Tensor:
    """Distance of AB' / |AB'| from I or I - 11'/K, normalized; A are the ``rows``, B the ``other`` rows or A."""
    rows = rows / vector_norm(rows)
    other = rows if other is None else other / vector_norm(other)
    classes, features = rows.shape
    if classes > features + 1:
        # The K x K matrix may be too large, and is not needed. AB' has rank d at most, so its cosine c with the frame, of
        # rank K - 1 at least, is at most sqrt(d / (K - 1)): 2 - 2c cancels no more than log10(2d) digits.
        size = ((rows.T @ rows) * (other.T @ other)).sum().sqrt()
        paired = rows if frame == "of" else rows - rows.mean(dim=0)
        cosine = (paired * other).sum() / size / math.sqrt(classes if frame == "of" else classes - 1)
        return (2 - 2 * cosine).sqrt()
    gram = rows @ other.T
    identity = torch.eye(classes, dtype=gram.dtype, device=gram.device)
    target = identity / math.sqrt(classes) if frame == "of" else (identity - 1 / classes) / math.sqrt(classes - 1)
    distance: Tensor = vector_norm(gram / vector_norm(gram) - target)
    return distance


def nc2_equinorm(features: Tensor, target: Tensor, num_classes: int | None = None) -> Tensor:
    r"""Equal norms: the population standard deviation (ddof 0) of :math:`\|m_k\|` over its mean.
    Source: Papyan et al. (2020), figure 2.
    """
    return _compute("nc2_equinorm", features, target, num_classes)


def _nc2_equinorm(s: Summary) -> Tensor:
    norms: Tensor = vector_norm(s.centered, dim=1)
    return norms.std(correction=0) / norms.mean()


def nc2_equiangular(features: Tensor, target: Tensor, num_classes: int | None = None) -> Tensor:
    """Equal angles: the standard deviation of cos(m_i, m_j) over the pairs. Source: Papyan et al. (2020), figure 3."""
    return _compute("nc2_equiangular", features, target, num_classes)


def _nc2_equiangular(s: Summary) -> Tensor:
    cosines = _cosines(s.centered)
    mean = _mean_over_pairs(cosines, s.means)
    distances = torch.stack([vector_norm(cosines(*block) - mean) for block in _pairs(s.means)])
    deviation: Tensor = vector_norm(distances) / math.sqrt(math.comb(len(s.means), 2))
    return deviation


def nc2_maxangle(features: Tensor, target: Tensor, num_classes: int | None = None) -> Tensor:
    """Largest angles: the mean over the pairs of abs(cos(m_i, m_j) + 1/(K - 1)). Source: Papyan et al. (2020), figure 4."""
    return _compute("nc2_maxangle", features, target, num_classes)


def _nc2_maxangle(s: Summary) -> Tensor:
    cosines = _cosines(s.centered)
    return _mean_over_pairs(lambda *block: (cosines(*block) + 1 / (len(s.means) - 1)).abs(), s.means)


def nc2_weight(weight: Tensor) -> Tensor:
    r"""Distance of the rows of ``weight`` (K, d) from a simplex ETF, :math:`\| WW^\top / \|WW^\top\|_F - E \|_F`.
    Source: Zhu et al. (2021), arXiv 2105.02375.
    """
    return _frame_distance(weight.to(state_dtype(weight.device)), "etf")


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
    return _compute("nc3_centered" if center else "nc3", features, target, num_classes, weight)


def _nc3(weight: Tensor, means: Tensor) -> Tensor:
    distance: Tensor = vector_norm(weight / vector_norm(weight) - means / vector_norm(means))
    return distance


def nc3_gram(features: Tensor, target: Tensor, weight: Tensor, num_classes: int | None = None) -> Tensor:
    r""":math:`\| WM^\top / \|WM^\top\|_F - E \|_F`, with ``weight`` (K, d). Source: arXiv 2105.02375."""
    return _compute("nc3_gram", features, target, num_classes, weight)


def nc3_cosine(features: Tensor, target: Tensor, weight: Tensor, num_classes: int | None = None) -> Tensor:
    """One minus the mean over the classes of cos(w_k, m_k), with ``weight`` (K, d)."""
    return _compute("nc3_cosine", features, target, num_classes, weight)


def bias_collapse(
    features: Tensor, target: Tensor, weight: Tensor, bias: Tensor, num_classes: int | None = None
) -> Tensor:
    r""":math:`\| W \mu_G + b \|_2`, with ``weight`` (K, d) and ``bias`` (K,). Source: arXiv 2105.02375."""
    return _compute("bias_collapse", features, target, num_classes, weight, bias)


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
    return _compute("nc4", features, target, num_classes, weight, bias)


def _nc4(s: Summary) -> Tensor:
    assert isinstance(s.moments, ClassDeviations)
    means, weight = s.means.detach(), s.weight.detach()
    bias = s.bias.detach() if s.bias.dim() else torch.zeros_like(weight[:, 0])
    disagree = torch.zeros_like(means[0, 0])
    rows = max(1, _BLOCK // len(means))
    for deviations, target in zip(s.moments.deviations.split(rows), s.moments.target.split(rows), strict=True):
        features = deviations.detach() + means[target]
        distances = torch.cdist(features, means, compute_mode="donot_use_mm_for_euclid_dist")
        disagree += (distances.argmin(dim=1) != (features @ weight.T + bias).argmax(dim=1)).sum()
    return disagree / s.moments.samples


def _unit(rows: Tensor) -> Tensor:
    unit: Tensor = rows / vector_norm(rows, dim=1, keepdim=True)
    return unit


def _pairs(rows: Tensor) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """Each pair of rows once, in blocks: some of the rows, and the pairs (i, j) of the i-th of them and the j-th of all."""
    size = max(1, _BLOCK // len(rows))
    for start in range(0, len(rows), size):
        some = slice(start, min(start + size, len(rows)))
        yield some, *torch.triu_indices(some.stop - start, len(rows), offset=start + 1, device=rows.device)


def _mean_over_pairs(values: Callable[[slice, Tensor, Tensor], Tensor], rows: Tensor) -> Tensor:
    total = torch.stack([values(*block).sum() for block in _pairs(rows)]).sum()
    return total / math.comb(len(rows), 2)


def _cosines(rows: Tensor) -> Callable[[slice, Tensor, Tensor], Tensor]:
    """The cosines of a block of pairs."""
    unit = _unit(rows)
    return lambda some, i, j: (unit[some] @ unit.T)[i, j]


class MetricSpec(NamedTuple):
    """A formula, the parts of the classifier it needs (``weight``, ``bias``), and whether it needs the scatter matrix."""

    formula: Callable[[Summary], Tensor]
    needs: tuple[str, ...] = ()
    scatter: bool = False


METRICS: Mapping[str, MetricSpec] = {
    "nc1": MetricSpec(_nc1, scatter=True),
    "nc1_trace": MetricSpec(_nc1_trace),
    "nc1_cdnv": MetricSpec(_nc1_cdnv),
    "nc2_etf": MetricSpec(lambda s: _frame_distance(s.means, "etf")),
    "nc2_etf_centered": MetricSpec(lambda s: _frame_distance(s.centered, "etf")),
    "nc2_of": MetricSpec(lambda s: _frame_distance(s.means, "of")),
    "nc2_of_centered": MetricSpec(lambda s: _frame_distance(s.centered, "of")),
    "nc2_equinorm": MetricSpec(_nc2_equinorm),
    "nc2_equiangular": MetricSpec(_nc2_equiangular),
    "nc2_maxangle": MetricSpec(_nc2_maxangle),
    "nc2_weight": MetricSpec(lambda s: _frame_distance(s.weight, "etf"), ("weight",)),
    "nc3": MetricSpec(lambda s: _nc3(s.weight, s.means), ("weight",)),
    "nc3_centered": MetricSpec(lambda s: _nc3(s.weight, s.centered), ("weight",)),
    "nc3_gram": MetricSpec(lambda s: _frame_distance(s.weight, "etf", s.centered), ("weight",)),
    "nc3_cosine": MetricSpec(lambda s: 1 - (_unit(s.weight) * _unit(s.centered)).sum(dim=1).mean(), ("weight",)),
    "bias_collapse": MetricSpec(lambda s: vector_norm(s.weight @ s.means.mean(dim=0) + s.bias), ("weight", "bias")),
}
"""Every metric by its name in the argument ``metrics``. To add one, write its formula of a :class:`Summary` and a row here."""

_FORMULAS = {**METRICS, "nc4": MetricSpec(_nc4, ("weight", "bias"))}  # with the metric that one pass cannot give


def evaluate(
    names: Sequence[str],
    moments: ClassMoments | ClassDeviations,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
) -> dict[str, Tensor]:
    """The named metrics of the classes that have a sample. Raises and warns as the documentation of the module says."""
    seen = moments.counts > 0
    nan = moments.means.new_full((), math.nan)
    parts = {name: part for name, part in (("weight", weight), ("bias", bias)) if part is not None}
    for name, part in parts.items():
        shape = moments.means.shape if name == "weight" else seen.shape
        if part.shape != shape:
            raise ValueError(f"{name} must have shape {tuple(shape)}, got {tuple(part.shape)}; check num_classes")
    if seen.any() and (fault := moments.fault()):
        warnings.warn(f"{fault}; the metrics are nan", stacklevel=2)
        return dict.fromkeys(names, nan)
    if seen.sum() < 2:
        return dict.fromkeys(names, nan)
    if not seen.all():
        absent = (~seen).nonzero().flatten().tolist()
        listed = ", ".join(map(str, absent[:10])) + (", ..." if len(absent) > 10 else "")
        warnings.warn(
            f"no sample of {len(absent)} class{'es' * (len(absent) > 1)} ({listed}): left out of the metrics",
            stacklevel=2,
        )

    parts = {name: part.to(moments.means)[seen] for name, part in parts.items()}
    broken = {name for name, part in parts.items() if not part.isfinite().all()}
    summary = Summary(moments.select(seen), parts.get("weight", nan), parts.get("bias", nan))
    values = {n: nan if broken & {*_FORMULAS[n].needs} else _FORMULAS[n].formula(summary) for n in names}
    undefined = [name for name, value in values.items() if name != "nc1" and value.isnan()]
    if undefined:
        warnings.warn(f"{', '.join(undefined)}: nan, because {_reason(summary, broken)}", stacklevel=2)
    return values


def _reason(s: Summary, broken: set[str]) -> str:
    """Why a metric is nan although all features are finite."""
    if broken:
        return f"the classifier's {' and '.join(sorted(broken))} holds an infinity or a nan"
    if s.weight.dim() and not vector_norm(s.weight, dim=1).all():
        return "the classifier's weight is zero for one or more classes"
    if not vector_norm(s.centered, dim=1).all():
        return "one or more class means coincide with the mean of all"
    return "the formula is not defined for these class means"


def check_metrics(metrics: str | Sequence[str]) -> tuple[str, ...]:
    """The names as a tuple: ``"paper"`` (the six of Tirer & Bruna, 2022), one name of :data:`METRICS`, or a sequence."""
    names = _PAPER if metrics == "paper" else (metrics,) if isinstance(metrics, str) else tuple(metrics)
    if not names:
        raise ValueError(f"metrics is empty; choose from {', '.join(METRICS)}")
    for name in names:
        if name == "nc4":
            raise ValueError("nc4 needs all features at once; use lightning_nc.NC4 or functional.nc4")
        if name not in METRICS:
            near = difflib.get_close_matches(str(name), ["paper", *METRICS]) or ["paper", *METRICS]
            raise ValueError(f"unknown metric {name!r}; did you mean one of {', '.join(near)}?")
    return names


def _compute(
    name: str,
    features: Tensor,
    target: Tensor,
    num_classes: int | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
) -> Tensor:
    check_batch(features, target)
    if num_classes is None:
        num_classes = len(weight) if weight is not None else int(target.max()) + 1 if len(target) else 0
    check_labels(target, num_classes)
    return evaluate((name,), ClassDeviations.of(features, target, num_classes), weight, bias)[name]
