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

__all__ = ["METRICS", "MetricSpec", "Summary", "check_metrics", "compute", "evaluate"]

_PAPER = ("nc1", "nc2_etf", "nc2_etf_centered", "nc2_of", "nc3", "nc3_centered")


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

    def mean_over_pairs(self, values: Callable[[Pairs], Tensor]) -> tuple[Tensor, Tensor]:
        """The mean over the pairs of classes of ``values``, and its standard error; see :func:`mean_over_pairs`."""
        return mean_over_pairs(self.means, values, self.pairs)


class MetricSpec(NamedTuple):
    """A metric: its formula, what it needs, and how to read its value.

    Args:
        formula: a function of a :class:`Summary`.
        title: a few words for figures and tables.
        needs: what it reads beside the features: ``weight``, ``bias``, ``ood``.
        collapse: the value at perfect collapse: a number, or a function of the number of classes.
        direction: ``"falls"`` or ``"rises"`` toward that value, or ``"approaches"`` it from either side.
        within: whether it reads how the samples of a class vary, so that centers of other data change it.
        scatter: whether it needs the scatter matrix.
        pairwise: whether it returns what :meth:`Summary.mean_over_pairs` returns: the value and its standard error.
        samples: whether samples must be compared with the class means, in ``comparison``.
        opt_in: whether ``metrics="all"`` leaves it out, because it is slow, needs other data or seldom exists.
        exists: for which K and d there is what it compares with; it is nan for others.
        family: what it is about; a panel of a figure shows the metrics of one family.
    """

    formula: Callable[[Summary], Any]
    title: str = ""
    needs: tuple[str, ...] = ()
    collapse: float | Callable[[int], float] = 0.0
    direction: Literal["falls", "rises", "approaches"] = "falls"
    within: bool = False
    scatter: bool = False
    pairwise: bool = False
    samples: bool = False
    opt_in: bool = False
    exists: Callable[[int, int], bool] = lambda classes, features: True
    family: str = "other metrics"

    def value_at_collapse(self, num_classes: int) -> float:
        """The value at perfect collapse of ``num_classes`` classes."""
        return self.collapse(num_classes) if callable(self.collapse) else self.collapse


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
    absent, values = [name for name in names if not METRICS[name].exists(*moments.means.shape)], {}
    for name in names:
        needs = {*METRICS[name].needs, *["bias"] * ("weight" in METRICS[name].needs and METRICS[name].samples)}
        result = nan if broken & needs or name in absent else METRICS[name].formula(summary)
        values[name], error = result if isinstance(result, tuple) else (result, nan)
        values |= {name + ERROR: error} if name in sampled else {}
    if absent:
        size = "{} classes in {} dimensions".format(*moments.means.shape)
        warnings.warn(f"{', '.join(absent)}: nan, because {size} cannot have this geometry", stacklevel=2)
    undefined = [name for name in names if name not in ("nc1", *absent) and not values[name].isfinite()]
    if undefined:
        kind = "nan" if any(values[name].isnan() for name in undefined) else "infinite"
        reason = _reason(summary, broken, seen.nonzero().flatten())
        warnings.warn(f"{', '.join(undefined)}: {kind}, because {reason}", stacklevel=2)
    return values


def _warn_of_absent(seen: Tensor) -> None:
    absent = (~seen).nonzero().flatten().tolist()
    listed = ", ".join(map(str, absent[:10])) + (", ..." if len(absent) > 10 else "")
    warnings.warn(
        f"no sample of {len(absent)} class{'es' * (len(absent) > 1)} ({listed}): left out of the metrics", stacklevel=3
    )


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
    """The names as a tuple: ``"paper"`` (the six of Tirer & Bruna, 2022), ``"all"``, one name of :data:`METRICS`, or several."""
    if metrics == "all":
        return tuple(name for name, spec in METRICS.items() if not spec.opt_in)
    names = _PAPER if metrics == "paper" else (metrics,) if isinstance(metrics, str) else tuple(metrics)
    if not names:
        raise ValueError(f"metrics is empty; choose from {', '.join(METRICS)}")
    for name in names:
        if name not in METRICS:
            known = ["paper", "all", *METRICS]
            near = difflib.get_close_matches(str(name), known) or known
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
