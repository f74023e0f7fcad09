"""The table of metrics: what each one is and needs, and how its rows are evaluated."""

from __future__ import annotations

import difflib
import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.linalg import vector_norm

from lightning_nc.comparison import Comparison
from lightning_nc.functional.pairs import Pairs, check_pairs, mean_over_pairs
from lightning_nc.keys import ERROR
from lightning_nc.moments import ClassDeviations, ClassMoments, check_batch, check_labels

__all__ = ["METRICS", "MetricSpec", "Summary", "UndefinedError", "check_metrics", "compute", "evaluate", "unit"]

_PAPER = ("nc1", "nc2_etf", "nc2_etf_centered", "nc2_of", "nc3", "nc3_centered")


class UndefinedError(ArithmeticError):
    """What a formula raises to say why it has no value; the metric is nan, with a warning that gives the reason."""


@dataclass
class Summary:
    """What a formula can read: the statistics of the classes seen, and the classifier's rows for them.

    Args:
        moments: the statistics.
        weight, bias: those of the classifier, (K, d) and (K,); nan of shape () if they are not given.
        pairs: the number of pairs of classes to sample; None for all of them.
        comparison: what the samples show that are compared with the class means, for ``samples=True``.
        ood_mean: the mean of features of no class, (d,); nan of shape () if it is not given.
    """

    moments: ClassMoments | ClassDeviations
    weight: Tensor
    bias: Tensor
    pairs: int | None = None
    comparison: Comparison | None = None
    ood_mean: Tensor = field(default_factory=lambda: torch.tensor(math.nan))

    @property
    def means(self) -> Tensor:
        """H, (K, d)."""
        return self.moments.means

    @cached_property
    def centered(self) -> Tensor:
        """M, (K, d)."""
        return self.means - self.means.mean(dim=0)

    @cached_property
    def directions(self) -> tuple[Tensor, Tensor]:
        """The principal directions of M beyond rounding, (d, r), and their singular values, (r,)."""
        directions, values = self.moments.directions()
        if not len(values):
            raise UndefinedError("the class means differ by no more than rounding")
        return directions, values

    def mean_over_pairs(self, values: Callable[[Pairs], Tensor]) -> tuple[Tensor, Tensor]:
        """The mean over the pairs of classes of ``values``, and its standard error; see :func:`mean_over_pairs`."""
        return mean_over_pairs(self.means, values, self.pairs)

    @cached_property
    def unit(self) -> Tensor:
        """The rows of M, each of length 1, (K, d)."""
        return unit(self.centered)


class MetricSpec(NamedTuple):
    """A metric: its formula, what it needs, and how to read its value.

    Args:
        formula: a function of a :class:`Summary`.
        title: a few words for figures and tables.
        needs: what it reads beside the features: ``weight``, ``bias``, ``ood``.
        collapse: the value at perfect collapse: a number, or a function of the number of classes and that of features.
        direction: ``"falls"`` or ``"rises"`` toward that value, or ``"approaches"`` it from either side.
        within: whether it reads how the samples of a class vary, so that centers of other data change it.
        scatter: whether it needs the scatter matrix.
        pairwise: whether it returns what :meth:`Summary.mean_over_pairs` returns: the value and its standard error.
        samples: whether samples must be compared with the class means, in ``comparison``.
        opt_in: whether ``metrics="all"`` leaves it out, because it is slow, needs other data or seldom exists.
        etf: whether it compares with a simplex ETF, which K classes form in K - 1 dimensions or more only.
        exists: for which K and d there is what it compares with; it is nan for others.
        family: what it is about; a panel of a figure shows the metrics of one family.
    """

    formula: Callable[[Summary], Any]
    title: str = ""
    needs: tuple[str, ...] = ()
    collapse: float | Callable[[int, int], float] = 0.0
    direction: Literal["falls", "rises", "approaches"] = "falls"
    within: bool = False
    scatter: bool = False
    pairwise: bool = False
    samples: bool = False
    opt_in: bool = False
    etf: bool = False
    exists: Callable[[int, int], bool] = lambda classes, features: True
    family: str = "other metrics"

    def value_at_collapse(self, num_classes: int, num_features: int | None = None) -> float:
        """The value at perfect collapse of K classes in d features, by default K; a simplex ETF where a frame matters."""
        return self.collapse(num_classes, num_features or num_classes) if callable(self.collapse) else self.collapse


def unit(rows: Tensor) -> Tensor:
    """The rows, each of length 1."""
    scaled: Tensor = rows / vector_norm(rows, dim=1, keepdim=True)
    return scaled


METRICS: dict[str, MetricSpec] = {}
"""Every metric by its name in the argument ``metrics``. To add one, write its formula of a :class:`Summary` and a row here."""


def evaluate(
    names: Sequence[str],
    moments: ClassMoments | ClassDeviations,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    pairs: float | None = None,
    comparison: Comparison | None = None,
    ood_mean: Tensor | None = None,
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
    sampled = {name for name in names if pairs is not None and METRICS[name].pairwise}
    keys = [key for name in names for key in (name, *[name + ERROR] * (name in sampled))]
    if seen.any() and (fault := moments.fault()):
        warnings.warn(f"{fault}; the metrics are nan", stacklevel=2)
        return dict.fromkeys(keys, nan)
    if seen.sum() < 2:
        only = f"only class {int(seen.nonzero())} has samples" if seen.any() else "no class has samples"
        warnings.warn(f"{only}, and two are needed; the metrics are nan", stacklevel=2)
        return dict.fromkeys(keys, nan)
    if not seen.all():
        _warn_of_absent(seen)
        moments, parts = moments.select(seen), {name: part[seen] for name, part in parts.items()}
        comparison = comparison and comparison.select(seen)

    needs = {need for name in names for need in METRICS[name].needs}
    samples = [name for name in names if METRICS[name].samples]
    parts = {name: part.to(moments.means) for name, part in parts.items() if name in needs or samples}
    broken = {name for name, part in parts.items() if not torch.stack(part.aminmax()).isfinite().all()}
    summary = Summary(moments, parts.get("weight", nan), parts.get("bias", nan), check_pairs(pairs), comparison)
    if samples and isinstance(moments, ClassDeviations):
        with torch.no_grad():
            summary.comparison = Comparison.of(moments, parts.get("weight"), parts.get("bias"))
    summary.ood_mean = nan if ood_mean is None else ood_mean.to(moments.means)
    values: dict[str, Tensor] = {}
    undefined: dict[str, list[str]] = {}
    for name in names:
        values[name], error, reason = _value(name, summary, broken)
        values |= {name + ERROR: error} if name in sampled else {}
        if not values[name].isfinite():
            reason = reason or _reason(summary, seen.nonzero().flatten())
            undefined.setdefault(f"{'nan' if values[name].isnan() else 'infinite'}, because {reason}", []).append(name)
    for message in [f"{', '.join(listed)}: {why}" for why, listed in undefined.items()] + _cautions(values, summary):
        warnings.warn(message, stacklevel=2)
    return values


def _value(name: str, s: Summary, broken: set[str]) -> tuple[Tensor, Tensor, str]:
    """The metric, its standard error, and why it has no value if the formula knows."""
    spec, nan = METRICS[name], s.means.new_full((), math.nan)
    reads = {*spec.needs, *["bias"] * ("weight" in spec.needs and spec.samples)}
    if lost := broken & reads:
        return nan, nan, f"the classifier's {' and '.join(sorted(lost))} holds an infinity or a nan"
    if not spec.exists(*s.means.shape):
        return nan, nan, "{} classes in {} dimensions cannot have this geometry".format(*s.means.shape)
    if spec.within and not s.moments.varies():
        return nan, nan, "every class has one sample, which cannot vary around the mean of its class"
    try:
        result = spec.formula(s)
    except UndefinedError as why:
        return nan, nan, str(why)
    except Exception as failure:
        raise RuntimeError(f"the formula of {name!r} failed: {type(failure).__name__}: {failure}") from failure
    value, error = result if isinstance(result, tuple) else (result, nan)
    if not isinstance(value, Tensor) or value.dim():
        raise TypeError(f"the formula of {name!r} must return a tensor of shape (), got {value!r:.80}")
    return value, error, ""


def _cautions(values: dict[str, Tensor], s: Summary) -> list[str]:
    """What to know of the values that are defined and yet mean less than they seem to."""
    found, (classes, features) = [], s.means.shape
    framed = [name for name in values if name in METRICS and METRICS[name].etf]
    if framed and classes > features + 1:
        least = math.sqrt(2 - 2 * math.sqrt(features / (classes - 1)))
        found.append(
            f"{', '.join(framed)}: {classes} classes form no simplex ETF in {features} dimensions, so the value at collapse is "
            f"out of reach; a distance between Gram matrices is at least {least:.4f}"
        )
    floors = {name: floor for name, floor in _floors(values, s).items() if 0 < values[name] <= floor}
    if floors:
        listed = ", ".join(f"{name} = {float(values[name]):.1e}" for name in floors)
        found.append(
            f"{listed}: no more than what rounding of {str(s.moments.precision).removeprefix('torch.')} features can cause; only "
            "the order of magnitude is known, as an upper bound"
        )
    return found


def _floors(values: dict[str, Tensor], s: Summary) -> dict[str, Tensor]:
    """What rounding alone can make of each metric that reads how samples vary, and that is defined."""
    names = [name for name in values if name in METRICS and METRICS[name].within and values[name].isfinite()]
    floors: dict[str, Tensor] = {}
    with torch.no_grad():
        for name in names:
            if METRICS[name].scatter:  # along the directions of the class means
                directions, lengths = s.directions
                share = (s.moments.noise(directions) / lengths.square()).sum() / s.moments.samples
                floors[name] = share * len(s.means) / len(lengths)
            else:  # in all directions
                share = 2 * s.moments.rounding().sum() / s.moments.spread.sum()
                floors[name] = values[name] * share.where(share.isfinite(), 0)
    return floors


def _warn_of_absent(seen: Tensor) -> None:
    absent = (~seen).nonzero().flatten().tolist()
    listed = ", ".join(map(str, absent[:10])) + (", ..." if len(absent) > 10 else "")
    warnings.warn(
        f"no sample of {len(absent)} class{'es' * (len(absent) > 1)} ({listed}): left out of the metrics", stacklevel=3
    )


def _reason(s: Summary, classes: Tensor) -> str:
    """Why a metric is not finite although all features are."""
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
    """The names as a tuple: ``"paper"`` (the six of Tirer & Bruna, 2022), ``"all"``, one name of :data:`METRICS`, or several."""
    if metrics == "all":
        return tuple(name for name, spec in METRICS.items() if not spec.opt_in)
    names = _PAPER if metrics == "paper" else (metrics,) if isinstance(metrics, str) else tuple(metrics)
    if not names:
        raise ValueError(f"metrics is empty; choose from {', '.join(METRICS)}")
    for name in names:
        if name not in METRICS:
            known = ["paper", "all", *METRICS]
            near = difflib.get_close_matches(str(name).lower(), known) or known
            raise ValueError(f"unknown metric {name!r}; did you mean one of {', '.join(near)}?")
    return names


def compute(
    name: str,
    features: Tensor,
    target: Tensor,
    num_classes: int | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    pairs: float | None = None,
    ood_mean: Tensor | None = None,
) -> Tensor:
    """One metric of all features at hand: what the public functions return."""
    check_batch(features, target)
    if num_classes is None:
        num_classes = len(weight) if weight is not None else int(target.max()) + 1 if len(target) else 0
    check_labels(target, num_classes)
    moments = ClassDeviations.of(features, target, num_classes)
    return evaluate((name,), moments, weight, bias, pairs, ood_mean=ood_mean)[name]
