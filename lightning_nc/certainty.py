"""How sure a metric is: confidence intervals by the jackknife.

They are about the choice of the samples. In simulations of Gaussian classes they cover the value of infinitely many samples
as often as they say, within 2 %, and up to 4 % less often for ``nc2_maxangle``, a mean of absolute values. That value must be
well inside its range. A distance of class means that would be zero is never measured as zero: the noise of the means adds to
it, and the jackknife takes off about half of that. Its interval tells how the measured value varies, and reaches down to zero
less often than it says. Weight and bias count as given: the interval of a metric of the weight alone is a point.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator, Sequence
from copy import deepcopy
from dataclasses import fields

import torch
from torch import Tensor

from lightning_nc.functional import METRICS
from lightning_nc.functional.table import evaluate
from lightning_nc.moments import ClassMoments

__all__ = ["jackknife"]

_KINKED = ("nc2_maxangle",)
"""Means of absolute values, of which the jackknife's estimate of the bias is mostly noise."""

_GIVEN = ("minority_cosine",)
"""Metrics of the weight alone: which classes are small is that of all samples, whatever the parts of the data hold of each."""


def jackknife(
    names: Sequence[str],
    shards: Sequence[ClassMoments],
    weight: Tensor | None,
    bias: Tensor | None,
    level: float,
    pairs: float | None = None,
) -> dict[str, tuple[float, float]]:
    r"""Confidence intervals of the named metrics: see above for what they mean.

    With :math:`\theta` the metric of all samples, :math:`\theta_s` that of all but shard s of S, and
    :math:`\bar\theta` the mean of these, the interval is

    .. math:: S\theta - (S - 1) \bar\theta \pm
        t_{S - 1} \Big( \tfrac{S - 1}{S} \sum_s (\theta_s - \bar\theta)^2 \Big)^{1/2}

    with the quantile of Student's distribution. The first part is the metric without its bias, to first order in 1/N. NC1 and
    its kin are ratios of variances: their logarithms take the place of the values. Metrics that fall to 0 have no interval
    below 0. Metrics that look at the samples again (``samples=True``) and those of other data are left out.

    Args:
        names: of :data:`METRICS`.
        shards: the statistics of two or more parts of the data, with the samples of each class spread over them evenly and at
            random; 20 do well. Empty ones are left out. A class whose samples are all in one shard is missing without it,
            which makes the interval wider.
        weight: that of the classifier, (K, d), if there is one.
        bias: that of the classifier, (K,), if there is one.
        level: between 0 and 1, such as 0.95.
        pairs: the number of pairs of classes to sample, see :func:`nc1_cdnv`.

    Returns:
        The lower and the upper end by name; nan where the metric is not defined for all shards but one.

    Raises:
        ValueError: unless 0 < level < 1.
    """
    if not 0 < level < 1:
        raise ValueError(f"the level of intervals must lie between 0 and 1, such as 0.95; got {level!r}")
    names = [name for name in names if not METRICS[name].samples and "ood" not in METRICS[name].needs]
    shards = [shard for shard in shards if shard.counts.any()]
    if len(shards) < 2:
        return dict.fromkeys(names, (math.nan, math.nan))
    total = deepcopy(shards[0])
    for shard in shards[1:]:
        total.merge(shard)
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")  # the measurement of all samples has said it
        rows = [evaluate(names, part, weight, bias, pairs) for part in (total, *_leave_one_out(total, shards))]
    quantile = _student(level, len(shards) - 1)
    values = {name: [float(row[name]) for row in (rows[:1] * len(rows) if name in _GIVEN else rows)] for name in names}
    return {name: _interval(name, values[name], quantile) for name in names}


def _leave_one_out(total: ClassMoments, shards: Sequence[ClassMoments]) -> Iterator[ClassMoments]:
    """The moments of all samples but those of one shard: the merge of all with minus as many samples is exact too."""
    for shard in shards:
        rest = deepcopy(total)
        minus = {part.name: -getattr(shard, part.name) for part in fields(shard) if part.name != "means"}
        rest.merge(ClassMoments(means=shard.means, **minus))
        rest.spread.clamp_(min=0)
        yield rest


def _interval(name: str, values: Sequence[float], quantile: float) -> tuple[float, float]:
    """The interval from the metric of all samples and those without each shard."""
    ratio = METRICS[name].within and min(values) > 0
    whole, *rest = map(math.log, values) if ratio else values
    mean = math.fsum(rest) / len(rest)
    deviation = math.sqrt((len(rest) - 1) / len(rest) * math.fsum((value - mean) ** 2 for value in rest))
    center = whole if name in _KINKED else whole - (len(rest) - 1) * (mean - whole)
    ends = center - quantile * deviation, center + quantile * deviation
    low, high = (math.exp(min(end, 700.0)) for end in ends) if ratio else ends
    falls_to_zero = METRICS[name].direction == "falls" and METRICS[name].collapse == 0
    return (max(low, 0.0), max(high, 0.0)) if falls_to_zero else (low, high)


def _student(level: float, freedom: int) -> float:
    """The t that Student's distribution exceeds in absolute value with probability 1 - level.

    With t = sqrt(freedom) tan(angle), the density over the angle is the cosine to the power of freedom - 1.
    """
    angle = torch.linspace(0, math.pi / 2, 2**17 + 1, dtype=torch.float64)
    mass = torch.cumulative_trapezoid(angle.cos() ** (freedom - 1), angle)
    place = int(torch.searchsorted(mass, level * mass[-1]))
    return math.sqrt(freedom) * math.tan(float(angle[place + 1]))
