r"""The measures of neural collapse, as differentiable functions of features and labels.

Notation: K classes, N samples, d features; :math:`\mu_k` the mean of class k, :math:`\mu_G` the mean of the class means
(not of the samples: the two differ when classes are unbalanced), H the K x d matrix of class means,
:math:`M = H - \mu_G` the centred means, W the K x d weight of the classifier, :math:`\Sigma_W` and :math:`\Sigma_B` the
within-class and between-class covariance, and :math:`E = (I - 11^\top / K) / \sqrt{K - 1}` the Gram matrix of a simplex
equiangular tight frame (ETF), of unit Frobenius norm.

Shared by all functions of features and labels:

* ``features`` is (N, d) and floating, ``target`` (N,) and integer; ``num_classes`` defaults to the highest label
  plus one, or to the number of rows of ``weight`` where there is one.
* The result is a tensor of shape (), without unit, in float64 (float32 on a device that has no float64).
* A class without a sample is left out, with a warning: K is then the number of classes seen, and the rows of W of the
  classes not seen are left out too. With fewer than two classes the result is nan; so is :func:`nc1`
  where all class means coincide.
* A non-finite feature gives nan, with a warning that says how many samples have one.
* ``ValueError`` for shapes that do not fit, labels that are no integers or lie outside [0, K).
"""

from __future__ import annotations

import difflib
import math
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from lightning_nc.moments import ClassDeviations, ClassMoments, check_batch, check_labels, state_dtype

__all__ = [
    "MEASURES",
    "PAPER_MEASURES",
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

Frame = Literal["etf", "of"]

PAPER_MEASURES = ("nc1", "nc2_etf", "nc2_etf_centered", "nc2_of", "nc3", "nc3_centered")
"""The measures of Tirer & Bruna (2022), equations (26) to (28), and the centred ones of their figures 5 and 10."""

_BLOCK = 2**22
"""Pairs of classes that are looked at together: with 50,000 classes a matrix of all pairs would take 20 GB."""


def nc1(features: Tensor, target: Tensor, num_classes: int | None = None) -> Tensor:
    r"""Within-class variability relative to the distance of the classes.

    .. math:: \mathrm{NC}_1 = \tfrac1K \operatorname{tr}(\Sigma_W \Sigma_B^\dagger)

    Computed by projecting the deviations on the span of the centred class means, which is exact down to 1e-25 and never
    negative; the d x d matrices are not formed. Source: Tirer & Bruna (2022), equation (26); Papyan et al. (2020).

    Example:
        >>> import torch
        >>> from lightning_nc.functional import nc1
        >>> nc1(torch.tensor([[2.0], [4.0], [-2.0], [-4.0]]), torch.tensor([0, 0, 1, 1]))
        tensor(0.0556, dtype=torch.float64)
    """
    return _measure("nc1", features, target, num_classes)


def nc1_trace(features: Tensor, target: Tensor, num_classes: int | None = None) -> Tensor:
    r""":math:`\operatorname{tr} \Sigma_W / \operatorname{tr} \Sigma_B`. Source: arXiv 2210.16658."""
    return _measure("nc1_trace", features, target, num_classes)


def nc1_cdnv(features: Tensor, target: Tensor, num_classes: int | None = None) -> Tensor:
    r"""Class-distance normalised variance: the mean over pairs of classes of
    :math:`(s_i^2 + s_j^2) / (2 \|\mu_i - \mu_j\|^2)`, with :math:`s_k^2` the mean squared distance to :math:`\mu_k`.
    Source: arXiv 2112.15121.
    """
    return _measure("nc1_cdnv", features, target, num_classes)


def nc2(
    features: Tensor, target: Tensor, num_classes: int | None = None, frame: Frame = "etf", center: bool = False
) -> Tensor:
    r"""Distance of the class means from a simplex ETF or an orthogonal frame (OF).

    .. math:: \left\| HH^\top / \|HH^\top\|_F - E \right\|_F, \qquad \left\| HH^\top / \|HH^\top\|_F - I/\sqrt K \right\|_F

    Args:
        features: (N, d).
        target: class indices, (N,).
        num_classes: K; the highest label plus one where it is not given.
        frame: ``"etf"`` or ``"of"``.
        center: take M in place of H. Features after a ReLU are non-negative: their means are an ETF only when centred.
            An exact orthogonal frame is an exact ETF once centred; ``frame="of"`` without centring tells the two apart.

    Source: Tirer & Bruna (2022), equation (27); centred: figures 5 and 10.
    """
    return _measure(_nc2_name(frame, center), features, target, num_classes)


def nc2_equinorm(features: Tensor, target: Tensor, num_classes: int | None = None) -> Tensor:
    r"""Equal norms: the standard deviation (of a population, ddof 0) of :math:`\|m_k\|` over its mean.
    Source: Papyan et al. (2020), figure 2.
    """
    return _measure("nc2_equinorm", features, target, num_classes)


def nc2_equiangular(features: Tensor, target: Tensor, num_classes: int | None = None) -> Tensor:
    """Equal angles: the standard deviation of cos(m_i, m_j) over the pairs. Source: Papyan et al. (2020), figure 3."""
    return _measure("nc2_equiangular", features, target, num_classes)


def nc2_maxangle(features: Tensor, target: Tensor, num_classes: int | None = None) -> Tensor:
    """Largest angles: the mean over the pairs of abs(cos(m_i, m_j) + 1/(K - 1)). Source: Papyan et al. (2020), figure 4."""
    return _measure("nc2_maxangle", features, target, num_classes)


def nc2_weight(weight: Tensor) -> Tensor:
    r"""Distance of the classifier's rows from a simplex ETF, :math:`\| WW^\top / \|WW^\top\|_F - E \|_F`.

    Args:
        weight: (K, d).

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
        num_classes: K; the number of rows of ``weight`` where it is not given.
        center: take M in place of H.

    Source: Tirer & Bruna (2022), equation (28). Papyan et al. (2020) use the square of the centred distance.
    """
    return _measure("nc3_centered" if center else "nc3", features, target, num_classes, weight)


def nc3_gram(features: Tensor, target: Tensor, weight: Tensor, num_classes: int | None = None) -> Tensor:
    r""":math:`\| WM^\top / \|WM^\top\|_F - E \|_F`, with ``weight`` (K, d). Source: arXiv 2105.02375."""
    return _measure("nc3_gram", features, target, num_classes, weight)


def nc3_cosine(features: Tensor, target: Tensor, weight: Tensor, num_classes: int | None = None) -> Tensor:
    """One minus the mean over the classes of cos(w_k, m_k), with ``weight`` (K, d)."""
    return _measure("nc3_cosine", features, target, num_classes, weight)


def bias_collapse(
    features: Tensor, target: Tensor, weight: Tensor, bias: Tensor, num_classes: int | None = None
) -> Tensor:
    r""":math:`\| W \mu_G + b \|_2`, with ``weight`` (K, d) and ``bias`` (K,). Source: arXiv 2105.02375."""
    return _measure("bias_collapse", features, target, num_classes, weight, bias)


def nc4(
    features: Tensor, target: Tensor, weight: Tensor, bias: Tensor | None = None, num_classes: int | None = None
) -> Tensor:
    """Share of the samples for which the nearest class mean and the classifier's own arg max disagree.

    The class means must be known before the samples are looked at, so this needs all features at once and is no measure
    for a single pass. Not differentiable.

    Args:
        features: (N, d).
        target: class indices, (N,).
        weight: (K, d).
        bias: (K,).
        num_classes: K; the number of rows of ``weight`` where it is not given.

    Source: Papyan et al. (2020), figure 7.

    Example:
        >>> import torch
        >>> from lightning_nc.functional import nc4
        >>> nc4(torch.tensor([[2.0], [1.0], [-2.0]]), torch.tensor([0, 0, 1]), torch.tensor([[1.0], [-1.0]]))
        tensor(0., dtype=torch.float64)
    """
    return _measure("nc4", features, target, num_classes, weight, bias)


class Summary(NamedTuple):
    """What a formula may look at: the classes seen, and the classifier's rows for them."""

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


def _contrasts(means: Tensor) -> Tensor:
    """K - 1 rows T with T'T = M'M.

    M has K rows and rank K - 1 at most; a reflection turns its null direction, the vector of ones, to the first axis,
    and that row is dropped by construction instead of by the luck of a threshold.
    """
    centered = means - means.mean(dim=0)
    return centered[1:] - centered[0] / (math.sqrt(len(means)) + 1)


def _nc1(s: Summary) -> Tensor:
    contrasts = _contrasts(s.means)
    # Directions as weak as the rounding of the features are none: where the means have a lower rank than K - 1, the scatter
    # along them would be divided by nothing. With T = U diag(s) V', this is V diag(1/s) U'.
    eps = torch.finfo(torch.float32 if s.moments.rounded > 0 else contrasts.dtype).eps
    cut = {"atol": 10 * eps * _norm(s.means.detach()), "rtol": torch.finfo(contrasts.dtype).eps * max(contrasts.shape)}
    if len(contrasts) > contrasts.shape[1] and not contrasts.requires_grad:
        contrasts = torch.linalg.qr(contrasts, mode="r").R  # T = QR, and U is all that Q would change
    whitening = torch.linalg.pinv(contrasts, **cut)
    return s.moments.within(whitening) / s.moments.samples if whitening.any() else whitening.new_full((), math.nan)


def _nc1_trace(s: Summary) -> Tensor:
    return (s.moments.spread.sum() / s.moments.samples) / (s.centered.square().sum() / len(s.means))


def _nc1_cdnv(s: Summary) -> Tensor:
    variance = s.moments.spread / s.moments.counts

    def ratios(some: slice, i: Tensor, j: Tensor) -> Tensor:
        distance = torch.cdist(s.means[some], s.means, compute_mode="donot_use_mm_for_euclid_dist")[i, j]
        return (variance[some][i] + variance[j]) / (2 * distance.square())

    return _mean_over_pairs(ratios, s.means)


def _pairs(rows: Tensor) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """Each pair of rows once, in blocks: some of the rows, and the pairs (i, j) of the i-th of them and the j-th of all."""
    size = max(1, _BLOCK // len(rows))
    for start in range(0, len(rows), size):
        some = slice(start, min(start + size, len(rows)))
        yield some, *torch.triu_indices(some.stop - start, len(rows), offset=start + 1, device=rows.device)


def _mean_over_pairs(values: Callable[[slice, Tensor, Tensor], Tensor], rows: Tensor) -> Tensor:
    total = torch.stack([values(*block).sum() for block in _pairs(rows)]).sum()
    return total / math.comb(len(rows), 2)


def _norm(matrix: Tensor) -> Tensor:
    norm: Tensor = torch.linalg.vector_norm(matrix)
    return norm


def _equinorm(rows: Tensor) -> Tensor:
    norms: Tensor = torch.linalg.vector_norm(rows, dim=1)
    return norms.std(correction=0) / norms.mean()


def _unit(rows: Tensor) -> Tensor:
    unit: Tensor = rows / torch.linalg.vector_norm(rows, dim=1, keepdim=True)
    return unit


def _equiangular(rows: Tensor) -> Tensor:
    cosines = _cosines(rows)
    mean = _mean_over_pairs(cosines, rows)
    distances = torch.stack([_norm(cosines(*block) - mean) for block in _pairs(rows)])
    return _norm(distances) / math.sqrt(math.comb(len(rows), 2))


def _maxangle(rows: Tensor) -> Tensor:
    cosines = _cosines(rows)
    return _mean_over_pairs(lambda *block: (cosines(*block) + 1 / (len(rows) - 1)).abs(), rows)


def _cosines(rows: Tensor) -> Callable[[slice, Tensor, Tensor], Tensor]:
    """The cosines of a block of pairs."""
    unit = _unit(rows)
    return lambda some, i, j: (unit[some] @ unit.T)[i, j]


def _frame_distance(rows: Tensor, frame: Frame, other: Tensor | None = None) -> Tensor:
    """Distance of the direction of AB' from that of I or of I - 11'/K, with A the ``rows`` and B the ``other`` ones, or A."""
    other = rows if other is None else other
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
    return _norm(gram / _norm(gram) - target)


def _distance_of_directions(weight: Tensor, means: Tensor) -> Tensor:
    return _norm(weight / _norm(weight) - means / _norm(means))


def _nc4(s: Summary) -> Tensor:
    assert isinstance(s.moments, ClassDeviations)
    bias = s.bias if s.bias.dim() else torch.zeros_like(s.weight[:, 0])
    disagree = torch.zeros_like(s.means[0, 0])
    rows = max(1, _BLOCK // len(s.means))
    for deviations, target in zip(s.moments.deviations.split(rows), s.moments.target.split(rows), strict=True):
        features = deviations.detach() + s.means.detach()[target]
        distances = torch.cdist(features, s.means.detach(), compute_mode="donot_use_mm_for_euclid_dist")
        disagree += (distances.argmin(dim=1) != (features @ s.weight.detach().T + bias.detach()).argmax(dim=1)).sum()
    return disagree / s.moments.samples


class Measure(NamedTuple):
    """A formula, which parts of the classifier it needs (``weight``, ``bias``), and whether it needs the scatter."""

    formula: Callable[[Summary], Tensor]
    needs: tuple[str, ...] = ()
    scatter: bool = False


MEASURES: Mapping[str, Measure] = {
    "nc1": Measure(_nc1, scatter=True),
    "nc1_trace": Measure(_nc1_trace),
    "nc1_cdnv": Measure(_nc1_cdnv),
    "nc2_etf": Measure(lambda s: _frame_distance(s.means, "etf")),
    "nc2_etf_centered": Measure(lambda s: _frame_distance(s.centered, "etf")),
    "nc2_of": Measure(lambda s: _frame_distance(s.means, "of")),
    "nc2_of_centered": Measure(lambda s: _frame_distance(s.centered, "of")),
    "nc2_equinorm": Measure(lambda s: _equinorm(s.centered)),
    "nc2_equiangular": Measure(lambda s: _equiangular(s.centered)),
    "nc2_maxangle": Measure(lambda s: _maxangle(s.centered)),
    "nc2_weight": Measure(lambda s: _frame_distance(s.weight, "etf"), ("weight",)),
    "nc3": Measure(lambda s: _distance_of_directions(s.weight, s.means), ("weight",)),
    "nc3_centered": Measure(lambda s: _distance_of_directions(s.weight, s.centered), ("weight",)),
    "nc3_gram": Measure(lambda s: _frame_distance(s.weight, "etf", s.centered), ("weight",)),
    "nc3_cosine": Measure(lambda s: 1 - (_unit(s.weight) * _unit(s.centered)).sum(dim=1).mean(), ("weight",)),
    "bias_collapse": Measure(lambda s: _norm(s.weight @ s.means.mean(dim=0) + s.bias), ("weight", "bias")),
}
"""Every measure by the name under which the metrics and the callback know it."""

_FORMULAS = {**MEASURES, "nc4": Measure(_nc4, ("weight",))}  # with those that one pass cannot give


def evaluate(
    names: Sequence[str],
    moments: ClassMoments | ClassDeviations,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
) -> dict[str, Tensor]:
    """The named measures of the classes that have a sample. Raises and warns as the module's page says."""
    seen = moments.counts > 0
    nan = moments.means.new_full((), math.nan)
    for name, part in (("weight", weight), ("bias", bias)):
        if part is not None and len(part) != len(seen):
            raise ValueError(
                f"{name} must have a row for each of the {len(seen)} classes, got {tuple(part.shape)}; is num_classes right?"
            )
    if weight is not None and weight.shape[1:] != moments.means.shape[1:]:
        features = moments.means.shape[1]
        raise ValueError(f"weight must have a column for each of the {features} features, got {tuple(weight.shape)}")
    if not moments.finite:
        count = int(moments.nonfinite)
        reason = (
            f"{count} samples have" if count else "the features are so large that their squares overflow: some have"
        )
        warnings.warn(f"{reason} an infinity or a nan; the measures are nan", stacklevel=2)
        return dict.fromkeys(names, nan)
    if seen.sum() < 2:
        return dict.fromkeys(names, nan)
    if not seen.all():
        absent = (~seen).nonzero().flatten().tolist()
        listed = ", ".join(map(str, absent[:10])) + (", ..." if len(absent) > 10 else "")
        warnings.warn(f"no sample of {len(absent)} classes ({listed}): every measure leaves them out", stacklevel=2)

    def of_seen(rows: Tensor | None) -> Tensor:
        return nan if rows is None else rows.to(moments.means)[seen]

    summary = Summary(moments.select(seen), of_seen(weight), of_seen(bias))
    return {name: _FORMULAS[name].formula(summary) for name in names}


def check_measures(names: Sequence[str]) -> tuple[str, ...]:
    """The names as a tuple; ``ValueError`` for one that is not in :data:`MEASURES`, with the nearest ones."""
    if isinstance(names, str):
        raise ValueError(f"metrics must be a sequence of names, got the string {names!r}; write ({names!r},)")
    if not names:
        raise ValueError(f"metrics is empty; name some of {', '.join(MEASURES)}")
    for name in names:
        if name in _FORMULAS.keys() - MEASURES.keys():
            raise ValueError(f"{name} needs all features at once; use lightning_nc.{name.upper()} or functional.{name}")
        if name not in MEASURES:
            near = difflib.get_close_matches(str(name), MEASURES) or list(MEASURES)
            raise ValueError(f"unknown measure {name!r}; did you mean one of {', '.join(near)}?")
    return tuple(names)


def _nc2_name(frame: str, center: bool) -> str:
    if frame not in ("etf", "of"):
        raise ValueError(f"frame must be 'etf' or 'of', got {frame!r}")
    return f"nc2_{frame}_centered" if center else f"nc2_{frame}"


def _measure(
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
