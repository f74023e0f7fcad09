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
from dataclasses import dataclass
from functools import cached_property
from numbers import Real
from typing import Any, Literal, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.linalg import vector_norm
from tqdm import tqdm

from lightning_nc.keys import ERROR
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

_BLOCK = 2**20
"""Numbers that are processed together: with 50,000 classes a matrix of all pairs would take 20 GB."""


@dataclass
class Summary:
    """What a formula can read: the statistics of the classes seen, and the classifier's rows for them.

    ``pairs`` is the number of pairs of classes to sample; None for all of them.
    """

    moments: ClassMoments | ClassDeviations
    weight: Tensor
    bias: Tensor
    pairs: int | None = None

    @property
    def means(self) -> Tensor:
        """H, (K, d)."""
        return self.moments.means

    @cached_property
    def centered(self) -> Tensor:
        """M, (K, d)."""
        return self.means - self.means.mean(dim=0)

    def mean_over_pairs(self, values: Callable[[Pairs], Tensor]) -> tuple[Tensor, Tensor]:
        """The mean over the pairs of classes of ``values``, which gives one value a pair, and its standard error.

        The standard error is zero if the mean is over all pairs.
        """
        (classes, width), device = self.means.shape, self.means.device
        total = math.comb(classes, 2)
        sampled = self.pairs is not None and self.pairs < total
        count = min(self.pairs or total, total)
        numbers = 2**18 if device.type == "cpu" else 2**22  # of a block; fits the cache of the CPU
        size = max(1, numbers // width) if sampled else math.isqrt(numbers)
        blocks = _random_pairs(classes, count, size, device) if sampled else _all_pairs(classes, size)
        quiet = dist.is_available() and dist.is_initialized() and dist.get_rank() > 0
        center: Tensor | None = None
        summed = squares = self.means.new_zeros(())  # not a list, whose small tensors would fragment the memory
        with tqdm(total=count, desc="Pairs of classes", unit_scale=True, leave=False, delay=5, disable=quiet) as bar:
            for block in blocks:
                found = values(block)
                center = found.detach().mean() if center is None else center  # near the mean, so that nothing cancels
                squares = squares + (found.detach() - center).square().sum() if sampled else squares
                summed = summed + found.sum()
                bar.update(found.numel())
        mean = summed / count
        if not sampled or center is None:
            return mean, torch.zeros_like(mean)
        variance = squares / count - (mean.detach() - center).square()
        return mean, (variance.clamp(min=0) / (count - 1)).sqrt()


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
    between: Tensor = vector_norm(s.centered).square() / len(s.means)
    return s.moments.spread.sum() / s.moments.samples / between


def nc1_cdnv(features: Tensor, target: Tensor, num_classes: int | None = None, pairs: float | None = None) -> Tensor:
    r"""Class-distance normalized variance: the mean over pairs of classes of
    :math:`(s_i^2 + s_j^2) / (2 \|\mu_i - \mu_j\|^2)`, with :math:`s_k^2` the mean squared distance to :math:`\mu_k`.
    Source: arXiv 2112.15121.

    ``pairs`` estimates it from that many random pairs if there are more, always the same ones;
    :class:`lightning_nc.NeuralCollapse` gives the standard error too.
    """
    return _compute("nc1_cdnv", features, target, num_classes, pairs=pairs)


def _nc1_cdnv(s: Summary) -> tuple[Tensor, Tensor]:
    variance = s.moments.spread / s.moments.counts
    return s.mean_over_pairs(lambda pairs: pairs.sums(variance) / (2 * pairs.squared_distances(s.centered)))


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


def nc2_equinorm(features: Tensor, target: Tensor, num_classes: int | None = None) -> Tensor:
    r"""Equal norms: the population standard deviation (ddof 0) of :math:`\|m_k\|` over its mean.
    Source: Papyan et al. (2020), figure 2.
    """
    return _compute("nc2_equinorm", features, target, num_classes)


def _nc2_equinorm(s: Summary) -> Tensor:
    norms: Tensor = vector_norm(s.centered, dim=1)
    return norms.std(correction=0) / norms.mean()


def nc2_equiangular(
    features: Tensor, target: Tensor, num_classes: int | None = None, pairs: float | None = None
) -> Tensor:
    """Equal angles: the standard deviation of cos(m_i, m_j) over the pairs. Source: Papyan et al. (2020), figure 3.

    ``pairs`` estimates it from random pairs, see :func:`nc1_cdnv`.
    """
    return _compute("nc2_equiangular", features, target, num_classes, pairs=pairs)


def _nc2_equiangular(s: Summary) -> tuple[Tensor, Tensor]:
    unit = _unit(s.centered)
    mean, _ = s.mean_over_pairs(lambda pairs: pairs.products(unit))
    variance, error = s.mean_over_pairs(lambda pairs: (pairs.products(unit) - mean).square())
    # To first order the mean, an estimate too, adds no error; that of the root is d sqrt(v) = dv / (2 sqrt(v)).
    zero = variance == 0  # where the root has no gradient
    deviation = variance.where(~zero, 1).sqrt() * ~zero
    return deviation, (error / (2 * deviation)).where(~zero, 0)


def nc2_maxangle(
    features: Tensor, target: Tensor, num_classes: int | None = None, pairs: float | None = None
) -> Tensor:
    """Largest angles: the mean over the pairs of abs(cos(m_i, m_j) + 1/(K - 1)). Source: Papyan et al. (2020), figure 4.

    ``pairs`` estimates it from random pairs, see :func:`nc1_cdnv`.
    """
    return _compute("nc2_maxangle", features, target, num_classes, pairs=pairs)


def _nc2_maxangle(s: Summary) -> tuple[Tensor, Tensor]:
    unit = _unit(s.centered)
    return s.mean_over_pairs(lambda pairs: (pairs.products(unit) + 1 / (len(unit) - 1)).abs())


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
    lengths, rows = (vector_norm(weight), vector_norm(means)), max(1, _BLOCK // means.shape[1])
    distance = means.new_zeros(())
    for w, m in zip(weight.split(rows), means.split(rows), strict=True):
        distance = vector_norm(torch.stack([distance, vector_norm(w / lengths[0] - m / lengths[1])]))
    return distance


def nc3_gram(features: Tensor, target: Tensor, weight: Tensor, num_classes: int | None = None) -> Tensor:
    r""":math:`\| WM^\top / \|WM^\top\|_F - E \|_F`, with ``weight`` (K, d). Source: arXiv 2105.02375."""
    return _compute("nc3_gram", features, target, num_classes, weight)


def nc3_cosine(features: Tensor, target: Tensor, weight: Tensor, num_classes: int | None = None) -> Tensor:
    """One minus the mean over the classes of cos(w_k, m_k), with ``weight`` (K, d)."""
    return _compute("nc3_cosine", features, target, num_classes, weight)


def _nc3_cosine(s: Summary) -> Tensor:
    lengths = vector_norm(s.weight, dim=1) * vector_norm(s.centered, dim=1)
    cosines: Tensor = torch.linalg.vecdot(s.weight, s.centered) / lengths
    return 1 - cosines.mean()


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
    rows = max(1, 4 * _BLOCK // len(means))
    for deviations, target in zip(s.moments.deviations.split(rows), s.moments.target.split(rows), strict=True):
        features = deviations.detach() + means[target]
        distances = torch.cdist(features, means, compute_mode="donot_use_mm_for_euclid_dist")
        disagree += (distances.argmin(dim=1) != (features @ weight.T + bias).argmax(dim=1)).sum()
    return disagree / s.moments.samples


def _unit(rows: Tensor) -> Tensor:
    unit: Tensor = rows / vector_norm(rows, dim=1, keepdim=True)
    return unit


class Pairs(NamedTuple):
    """Pairs of classes. Of slices: each class of ``left`` with each of ``right``, once; of tensors: one by one."""

    left: slice | Tensor
    right: slice | Tensor

    def products(self, rows: Tensor) -> Tensor:
        """Inner products of the two rows of each pair."""
        left, right = rows[self.left], rows[self.right]
        return self._once(left @ right.T) if isinstance(self.left, slice) else torch.linalg.vecdot(left, right)

    def sums(self, values: Tensor) -> Tensor:
        """Sums of the two values of each pair."""
        left, right = values[self.left], values[self.right]
        return self._once(left.unsqueeze(1) + right) if isinstance(self.left, slice) else left + right

    def squared_distances(self, rows: Tensor) -> Tensor:
        """Squared distances between the two rows of each pair."""
        left, right = rows[self.left], rows[self.right]
        if not isinstance(self.left, slice):
            return (left - right).square().sum(dim=1)
        norms = self._once(left.square().sum(dim=1, keepdim=True) + right.square().sum(dim=1))
        squares = norms - 2 * self.products(rows)
        # A matrix product is much faster than differences, but cancels where rows are near to each other.
        near = (squares.detach() <= 0.01 * norms.detach()).nonzero().flatten()
        if len(near):
            index = self._once(torch.arange(len(left) * len(right), device=rows.device).view(len(left), -1))
            for part in near.split(max(1, _BLOCK // rows.shape[1])):
                difference = left[index[part] // len(right)] - right[index[part] % len(right)]
                squares[part] = difference.square().sum(dim=1)
        return squares

    def _once(self, matrix: Tensor) -> Tensor:
        """The entries of a matrix of all pairs, each pair once."""
        if self.left != self.right:
            return matrix.flatten()
        i, j = torch.triu_indices(len(matrix), len(matrix), 1, device=matrix.device)
        return matrix[i, j]


def _all_pairs(classes: int, size: int) -> Iterator[Pairs]:
    blocks = [slice(start, min(start + size, classes)) for start in range(0, classes, size)]
    return (Pairs(left, right) for i, left in enumerate(blocks) for right in blocks[i:])


def _random_pairs(classes: int, count: int, size: int, device: torch.device) -> Iterator[Pairs]:
    """Independent pairs of two classes, the same ones on every device and rank; no other random stream moves."""
    generator = torch.Generator().manual_seed(0)
    for start in range(0, count, size):
        drawn = torch.randint(classes * (classes - 1), (min(size, count - start),), generator=generator).to(device)
        left, right = drawn // (classes - 1), drawn % (classes - 1)
        yield Pairs(left, right + (right >= left))


class MetricSpec(NamedTuple):
    """A formula and what it needs.

    Args:
        formula: a function of a :class:`Summary`.
        needs: the parts of the classifier it reads: ``weight``, ``bias``.
        scatter: whether it needs the scatter matrix.
        pairwise: whether it returns what :meth:`Summary.mean_over_pairs` returns: the value and its standard error.
    """

    formula: Callable[[Summary], Any]
    needs: tuple[str, ...] = ()
    scatter: bool = False
    pairwise: bool = False


METRICS: Mapping[str, MetricSpec] = {
    "nc1": MetricSpec(_nc1, scatter=True),
    "nc1_trace": MetricSpec(_nc1_trace),
    "nc1_cdnv": MetricSpec(_nc1_cdnv, pairwise=True),
    "nc2_etf": MetricSpec(lambda s: _frame_distance(s.means, "etf")),
    "nc2_etf_centered": MetricSpec(lambda s: _frame_distance(s.centered, "etf")),
    "nc2_of": MetricSpec(lambda s: _frame_distance(s.means, "of")),
    "nc2_of_centered": MetricSpec(lambda s: _frame_distance(s.centered, "of")),
    "nc2_equinorm": MetricSpec(_nc2_equinorm),
    "nc2_equiangular": MetricSpec(_nc2_equiangular, pairwise=True),
    "nc2_maxangle": MetricSpec(_nc2_maxangle, pairwise=True),
    "nc2_weight": MetricSpec(lambda s: _frame_distance(s.weight, "etf"), ("weight",)),
    "nc3": MetricSpec(lambda s: _nc3(s.weight, s.means), ("weight",)),
    "nc3_centered": MetricSpec(lambda s: _nc3(s.weight, s.centered), ("weight",)),
    "nc3_gram": MetricSpec(lambda s: _frame_distance(s.weight, "etf", s.centered), ("weight",)),
    "nc3_cosine": MetricSpec(_nc3_cosine, ("weight",)),
    "bias_collapse": MetricSpec(lambda s: vector_norm(s.weight @ s.means.mean(dim=0) + s.bias), ("weight", "bias")),
}
"""Every metric by its name in the argument ``metrics``. To add one, write its formula of a :class:`Summary` and a row here."""

_FORMULAS = {**METRICS, "nc4": MetricSpec(_nc4, ("weight", "bias"))}  # with the metric that one pass cannot give


def evaluate(
    names: Sequence[str],
    moments: ClassMoments | ClassDeviations,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    pairs: float | None = None,
) -> dict[str, Tensor]:
    """The named metrics of the classes that have a sample. Raises and warns as the documentation of the module says.

    With ``pairs``, the entry ``"<name>_stderr"`` stands after that of each metric over pairs of classes.
    """
    seen = moments.counts > 0
    nan = moments.means.new_full((), math.nan)
    parts = {name: part for name, part in (("weight", weight), ("bias", bias)) if part is not None}
    for name, part in parts.items():
        shape = moments.means.shape if name == "weight" else seen.shape
        if part.shape != shape:
            raise ValueError(f"{name} must have shape {tuple(shape)}, got {tuple(part.shape)}; check num_classes")
    sampled = {name for name in names if pairs is not None and _FORMULAS[name].pairwise}
    keys = [key for name in names for key in (name, *[name + ERROR] * (name in sampled))]
    if seen.any() and (fault := moments.fault()):
        warnings.warn(f"{fault}; the metrics are nan", stacklevel=2)
        return dict.fromkeys(keys, nan)
    if seen.sum() < 2:
        return dict.fromkeys(keys, nan)
    if not seen.all():
        absent = (~seen).nonzero().flatten().tolist()
        listed = ", ".join(map(str, absent[:10])) + (", ..." if len(absent) > 10 else "")
        warnings.warn(
            f"no sample of {len(absent)} class{'es' * (len(absent) > 1)} ({listed}): left out of the metrics",
            stacklevel=2,
        )
        moments, parts = moments.select(seen), {name: part[seen] for name, part in parts.items()}

    needs = {need for name in names for need in _FORMULAS[name].needs}
    parts = {name: part.to(moments.means) for name, part in parts.items() if name in needs}
    broken = {name for name, part in parts.items() if not torch.stack(part.aminmax()).isfinite().all()}
    summary = Summary(moments, parts.get("weight", nan), parts.get("bias", nan), check_pairs(pairs))
    values = {}
    for name in names:
        result = nan if broken & {*_FORMULAS[name].needs} else _FORMULAS[name].formula(summary)
        values[name], error = result if isinstance(result, tuple) else (result, nan)
        values |= {name + ERROR: error} if name in sampled else {}
    undefined = [name for name in names if name != "nc1" and not values[name].isfinite()]
    if undefined:
        kind = "nan" if any(values[name].isnan() for name in undefined) else "infinite"
        reason = _reason(summary, broken, seen.nonzero().flatten())
        warnings.warn(f"{', '.join(undefined)}: {kind}, because {reason}", stacklevel=2)
    return values


def _reason(s: Summary, broken: set[str], classes: Tensor) -> str:
    """Why a metric is not finite although all features are."""
    if broken:
        return f"the classifier's {' and '.join(sorted(broken))} holds an infinity or a nan"
    if s.weight.dim() and not vector_norm(s.weight, dim=1).all():
        return "the classifier's weight is zero for one or more classes"
    if not vector_norm(s.centered, dim=1).all():
        return "one or more class means coincide with the mean of all"
    _, place, size = torch.unique(s.means, dim=0, return_inverse=True, return_counts=True)
    if size.max() > 1:
        same = (place == size.argmax()).nonzero().flatten()[:2]
        pair, counts = (" and ".join(str(int(n)) for n in numbers[same]) for numbers in (classes, s.moments.counts))
        return f"the means of the classes {pair} coincide, which have {counts} samples"
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


def check_pairs(pairs: float | None) -> int | None:
    """The number of pairs of classes to sample as an integer: 1e6 is accepted."""
    if pairs is None:
        return None
    if not isinstance(pairs, Real) or pairs < 2 or not float(pairs).is_integer():
        raise ValueError(
            f"pairs must be a whole number of at least 2, such as 1e6, or None for all pairs of classes; got {pairs!r}"
        )
    return int(pairs)


def _compute(
    name: str,
    features: Tensor,
    target: Tensor,
    num_classes: int | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    pairs: float | None = None,
) -> Tensor:
    check_batch(features, target)
    if num_classes is None:
        num_classes = len(weight) if weight is not None else int(target.max()) + 1 if len(target) else 0
    check_labels(target, num_classes)
    return evaluate((name,), ClassDeviations.of(features, target, num_classes), weight, bias, pairs)[name]
