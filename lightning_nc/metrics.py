"""The metrics as torchmetrics classes: one shared state, updated in one pass."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import fields, replace
from typing import Any

import numpy
import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from lightning_nc.comparison import Centers, Comparison
from lightning_nc.functional import METRICS
from lightning_nc.functional.frames import FrameName, nc2_name
from lightning_nc.functional.pairs import check_pairs
from lightning_nc.functional.table import check_metrics, evaluate
from lightning_nc.keys import TRAIN_MEANS
from lightning_nc.mergeable import MergeableMetric, Reference, Weight, check_size
from lightning_nc.moments import ClassMoments, check_batch, check_labels

__all__ = ["NC1", "NC2", "NC3", "NC4", "NeuralCollapse"]


class _ClassifierMetric(MergeableMetric):
    """A metric that reads the classifier's weight and bias in every ``compute``."""

    def __init__(
        self,
        num_classes: int,
        num_features: int,
        weight: Weight | None,
        bias: Weight | None,
        ignore_index: int | None = -100,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        check_size("num_classes", num_classes, 2)
        check_size("num_features", num_features, 1)
        if ignore_index is not None and not isinstance(ignore_index, int | numpy.integer):
            raise ValueError(f"ignore_index must be an integer or None, got {ignore_index!r}")
        self.num_classes, self.num_features, self.ignore_index = num_classes, num_features, ignore_index
        self._weight = Reference("weight", weight, (num_classes, num_features), num_classes == 2)
        self._bias = Reference("bias", bias, (num_classes,), num_classes == 2)

    def _check(self, features: Tensor, target: Tensor) -> None:
        self._check_own("update")
        check_batch(features, target, self.num_features)
        if target.device.type == "cpu":
            check_labels(target, self.num_classes, self.ignore_index)


class NeuralCollapse(_ClassifierMetric):
    """Any metrics of neural collapse from one pass over the features.

    Input of ``update``: ``features``, (B, d) floating, and ``target``, (B,) class indices. ``compute`` returns a dict of
    tensors of shape (), without unit, in float64 (float32 on a device without it). The state takes O(K d) memory, and
    O(d^2) more if a metric needs the within-class scatter (``nc1``), whatever the number of samples. It keeps its own
    precision under ``.to(dtype)``. Values carry no gradient: use :mod:`lightning_nc.functional` for a loss term.

    A class without a sample is left out with a warning. Fewer than two classes seen, or a feature that is not finite, give
    nan.

    Args:
        num_classes: K, at least 2.
        num_features: d, at least 1.
        weight: the classifier's weight, (K, d): the layer itself, a tensor, or a callable that returns a tensor. Its
            current value is read in every ``compute``, also by copies of the metric (``clone``, ``MetricCollection``,
            ``MetricTracker``). Give the layer rather than ``layer.weight``: ``load_state_dict(..., assign=True)``
            replaces the parameter, and a metric that holds the old one cannot follow. Without ``weight`` the metrics
            that need it are left out.
        bias: the classifier's bias, (K,), likewise. A layer without a bias counts as not given.
        metrics: ``"paper"``, ``"all"``, one name, or several names in :data:`lightning_nc.functional.METRICS`. Those with
            ``samples=True`` (``nc4``, ``ncc_error``, ``nc1_cdnv_directional``) compare samples with the class means, which must
            be known first, so the features are kept in their own precision: N d numbers. ``nc5`` needs :meth:`update_ood`.
        ignore_index: samples with this label are left out, whatever their features hold; None: there are none.
        pairs: estimate the metrics over pairs of classes (``nc1_cdnv``, ``nc2_equiangular``, ``nc2_maxangle``) from that many
            random pairs if there are more, such as ``1e6``. The pairs are always the same, and the global random streams do
            not move. ``compute`` then gives the standard error too, ``nc1_cdnv_stderr``; it is 0 for all pairs.
        centers: class means of other data, those of training for held-out samples: the state ``means`` of another metric, (K, d),
            in which a row of nan is a class without a mean. Samples are compared with them.
            ``compute`` gives NC1 around them beside NC1 around the samples' own class means: ``nc1_train_means``.
        kwargs: see :class:`torchmetrics.Metric`. Values are not cached, since the weight can change between two calls.

    Raises:
        ValueError: for sizes, names or shapes that do not fit; in ``update`` for features or labels that do not fit.
            Labels outside [0, K) raise in ``update`` on the CPU. Elsewhere a check would make every step wait for the
            device, so they raise in ``compute``.

    Example:
        >>> import torch
        >>> from lightning_nc import NeuralCollapse
        >>> metric = NeuralCollapse(num_classes=2, num_features=1, metrics=("nc1", "nc2_etf_centered"))
        >>> metric.update(torch.tensor([[2.0], [4.0]]), torch.tensor([0, 0]))
        >>> metric.update(torch.tensor([[-2.0], [-4.0]]), torch.tensor([1, 1]))
        >>> {name: round(float(value), 4) for name, value in metric.compute().items()}
        {'nc1': 0.0556, 'nc2_etf_centered': 0.0}
    """

    counts: Tensor
    means: Tensor
    features: list[Tensor]
    target: list[Tensor]
    along: Tensor
    ood_sum: Tensor
    ood_count: Tensor
    centers: Tensor | None

    def __init__(
        self,
        num_classes: int,
        num_features: int,
        weight: Weight | None = None,
        bias: Weight | None = None,
        metrics: str | Sequence[str] = "paper",
        ignore_index: int | None = -100,
        pairs: float | None = None,
        centers: Tensor | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(num_classes, num_features, weight, bias, ignore_index, **kwargs)
        self.pairs = check_pairs(pairs)
        names = check_metrics(metrics)
        given = {"ood"} | {part.name for part in (self._weight, self._bias) if part.given}
        self.metrics = tuple(name for name in names if given.issuperset(METRICS[name].needs))
        if not self.metrics:
            raise ValueError(f"no metric is left: {', '.join(names)} need the classifier's weight or bias")
        rows = [METRICS[name] for name in self.metrics]
        empty = ClassMoments.zeros(num_classes, num_features, scatter=any(row.scatter for row in rows))
        self.add_statistics(empty)
        self.compares = any(row.samples for row in rows)
        self.keeps_samples = self.compares
        if self.compares:
            along = "nc1_cdnv_directional" in self.metrics
            self.add_statistics(Comparison.zeros(num_classes, empty.counts, along))
            self.add_state("features", [])
            self.add_state("target", [])
        if any("ood" in row.needs for row in rows):
            self.add_state("ood_sum", empty.counts.new_zeros(num_features))
            self.add_state("ood_count", empty.counts.new_zeros(()))
        if centers is not None and centers.shape != (num_classes, num_features):
            raise ValueError(f"centers must have shape {(num_classes, num_features)}, got {tuple(centers.shape)}")
        self.register_buffer(
            "centers", None if centers is None else centers.detach().to(empty.counts), persistent=False
        )

    def update(self, features: Tensor, target: Tensor) -> None:
        """Add a batch: ``features`` (B, d), ``target`` (B,)."""
        self._check(features, target)
        self.moments().update(features, target, self.ignore_index)
        if self.keeps_samples:
            self.features.append(features.detach().clone())
            self.target.append(target.long().clone())
        elif self.centers is not None and self.compares:
            self.compare(features, target)

    def update_ood(self, features: Tensor) -> None:
        """Add a batch of features of no class, (B, d), for ``nc5``."""
        check_batch(features, torch.zeros(len(features), dtype=torch.long), self.num_features)
        self.ood_sum += features.detach().to(self.ood_sum).sum(dim=0)
        self.ood_count += len(features)

    def compare(self, features: Tensor, target: Tensor) -> None:
        """Compare a batch with the class means as they are now: a second pass over data, after a first one with
        ``keeps_samples = False``, which ``update`` obeys.
        """
        self._comparison().update(features.detach(), target, self._held_centers(), self.ignore_index)

    def compute(self) -> Any:
        """The metrics by name, each a tensor of shape ()."""
        moments = self.moments()
        if moments.mislabeled:
            raise ValueError(
                f"targets must lie in [0, {self.num_classes}), got {int(moments.mislabeled)} outside; check num_classes, "
                "or remove the samples without a class"
            )
        comparison = self._comparison() if self.compares else None
        if comparison is not None and self.features:
            comparison = self._compare_kept()
        rest: dict[str, Any] = {
            "weight": self._weight.read(),
            "bias": self._bias.read(),
            "pairs": self.pairs,
            "comparison": comparison,
        }
        if "nc5" in self.metrics:
            rest["ood_mean"] = self.ood_sum / self.ood_count
        with torch.no_grad():
            if self.centers is None:
                return evaluate(self.metrics, moments, **rest)
            return self._around_centers(moments, rest)

    def _around_centers(self, moments: ClassMoments, rest: Any) -> dict[str, Tensor]:
        """The values of samples that were compared with the class means of other data."""
        own = [name for name in self.metrics if not METRICS[name].samples]
        values = evaluate(own, moments, **rest)
        seen, means = self._held_centers().seen, self._held_centers().means
        names = [name for name in self.metrics if METRICS[name].samples or METRICS[name].within]
        lost = (moments.counts > 0) & ~seen
        if lost.any():
            warnings.warn(
                f"{int(lost.sum())} classes of the samples have no mean among the centers: NC1 around the centers is left out, "
                "and these samples are not compared with them",
                stacklevel=3,
            )
            names = [name for name in names if METRICS[name].samples]
            moments = replace(moments, counts=moments.counts * seen)
        other = evaluate(names, moments.around(means), **rest)
        return values | {
            name if name in names and METRICS[name].samples else name + TRAIN_MEANS: v for name, v in other.items()
        }

    def classifier(self) -> tuple[Tensor | None, Tensor | None]:
        """The current weight and bias that it was given, each None if there is none."""
        return self._weight.read(), self._bias.read()

    def span(self) -> Tensor:
        """Orthonormal columns that span the centered class means, (d, r), without directions that rounding can cause.

        ``nc1`` is the same for ``features.double() @ span``. r is 0 if no direction is left.
        """
        moments = self.moments()
        return moments.select(moments.counts > 0).directions()[0]

    def moments(self) -> ClassMoments:
        """A view of the state: counts, class means and within-class scatter."""
        return self._view(ClassMoments)

    def _comparison(self) -> Comparison:
        return self._view(Comparison)

    def _held_centers(self) -> Centers:
        """What samples are compared with: the class means of this metric, or those that it was given."""
        means, seen = self.means, self.counts > 0
        if self.centers is not None:
            seen = self.centers.isfinite().all(dim=1)
            means = self.centers.where(seen.unsqueeze(1), 0)
        return Centers(means, seen, *self.classifier())

    def _compare_kept(self) -> Comparison:
        """The comparison of the samples that are kept."""
        found, centers = Comparison.zeros(self.num_classes, self.counts, len(self.along) > 0), self._held_centers()
        for features, target in zip(self.features, self.target, strict=True):
            found.update(features, target, centers, self.ignore_index)
        return found

    def _merge(self, group: Any) -> None:
        """Merge the state over the ranks. Samples that are kept are compared with the class means of all ranks, and dropped."""
        self.moments().merge_over_ranks(group)
        if self.keeps_samples:
            found = self._compare_kept()
            for field in fields(Comparison):
                setattr(self, field.name, getattr(found, field.name))
            self.features, self.target = [], []
        if self.keeps_samples or (self.compares and self.centers is not None):
            self.merge_comparison_over_ranks(group)
        if "nc5" in self.metrics:
            torch.distributed.all_reduce(self.ood_sum, group=group)
            torch.distributed.all_reduce(self.ood_count, group=group)

    def merge_comparison_over_ranks(self, group: ProcessGroup | None = None) -> None:
        """Add what :meth:`compare` found on all other ranks, in place. All ranks must call it."""
        self._comparison().merge_over_ranks(group or self.process_group)

    def _reduce_states(self, incoming_state: dict[str, Any]) -> None:
        other = {name: incoming_state[name] for name in self._defaults}
        if self.compares and any(state["features"] for state in (vars(self), other)):
            for state in (vars(self), other):
                if state["compared"].any():
                    raise ValueError(
                        "samples that were compared with class means already cannot be merged with samples that are kept; merge "
                        "the metrics before merge_over_ranks()"
                    )
        self.moments().merge(ClassMoments(**{field.name: other[field.name] for field in fields(ClassMoments)}))
        if self.compares:
            self._comparison().merge(Comparison(**{field.name: other[field.name] for field in fields(Comparison)}))
            self.features += [part.to(self.device) for part in other["features"]]
            self.target += [part.to(self.device) for part in other["target"]]
        if "nc5" in self.metrics:
            self.ood_sum += other["ood_sum"].to(self.ood_sum)
            self.ood_count += other["ood_count"].to(self.ood_count)


class _SingleMetric(NeuralCollapse):
    """One metric instead of a dict."""

    def compute(self) -> Tensor:
        """The metric, a tensor of shape ()."""
        values: dict[str, Tensor] = super().compute()
        return values[self.metrics[0]]


class NC1(_SingleMetric):
    """Within-class variability: :func:`lightning_nc.functional.nc1` in one pass.

    Args:
        num_classes, num_features: K, at least 2, and d, at least 1.
        kwargs: see :class:`torchmetrics.Metric`.

    Input, state and errors: see :class:`NeuralCollapse`. The smallest value it can resolve is near
    eps * tr(Sigma_W) / tr(Sigma_B), with the eps of float64; the function, with all features at hand, has no such limit.

    Example:
        >>> import torch
        >>> from lightning_nc import NC1
        >>> metric = NC1(num_classes=2, num_features=1)
        >>> metric.update(torch.tensor([[2.0], [4.0], [-2.0], [-4.0]]), torch.tensor([0, 0, 1, 1]))
        >>> metric.compute()
        tensor(0.0556, dtype=torch.float64)
    """

    def __init__(self, num_classes: int, num_features: int, **kwargs: Any) -> None:
        super().__init__(num_classes, num_features, metrics="nc1", **kwargs)


class NC2(_SingleMetric):
    """Distance of the class means from a frame: :func:`lightning_nc.functional.nc2` in one pass.

    Args:
        num_classes, num_features: K, at least 2, and d, at least 1.
        frame: ``"etf"``, simplex equiangular tight frame, or ``"of"``, orthogonal frame.
        center: center the class means first.
        kwargs: see :class:`torchmetrics.Metric`.

    Input, state and errors: see :class:`NeuralCollapse`.
    """

    def __init__(
        self, num_classes: int, num_features: int, frame: FrameName = "etf", center: bool = False, **kwargs: Any
    ) -> None:
        super().__init__(num_classes, num_features, metrics=nc2_name(frame, center), **kwargs)


class NC3(_SingleMetric):
    """Distance of the classifier's weight from the class means: :func:`lightning_nc.functional.nc3` in one pass.

    Args:
        num_classes, num_features: K, at least 2, and d, at least 1.
        weight: (K, d): the layer itself, a tensor, or a callable; see :class:`NeuralCollapse`.
        center: center the class means first.
        kwargs: see :class:`torchmetrics.Metric`.

    Input, state and errors: see :class:`NeuralCollapse`.
    """

    def __init__(
        self, num_classes: int, num_features: int, weight: Weight, center: bool = False, **kwargs: Any
    ) -> None:
        name = "nc3_centered" if center else "nc3"
        super().__init__(num_classes, num_features, weight=weight, metrics=name, **kwargs)


class NC4(_SingleMetric):
    """Disagreement of the nearest class mean with the classifier: :func:`lightning_nc.functional.nc4`.

    The class means must be known before the samples are compared with them, so the features are kept: N d numbers, in their own
    precision.

    Args:
        num_classes, num_features: K, at least 2, and d, at least 1.
        weight: (K, d): the layer itself, a tensor, or a callable; see :class:`NeuralCollapse`.
        bias: (K,), likewise. The layer's bias is used only if it is given here too.
        kwargs: see :class:`torchmetrics.Metric`.

    Input and errors: see :class:`NeuralCollapse`.

    Example:
        >>> import torch
        >>> from lightning_nc import NC4
        >>> metric = NC4(num_classes=2, num_features=1, weight=torch.tensor([[1.0], [-1.0]]))
        >>> metric.update(torch.tensor([[2.0], [1.0]]), torch.tensor([0, 0]))
        >>> metric.update(torch.tensor([[-2.0]]), torch.tensor([1]))
        >>> metric.compute()
        tensor(0., dtype=torch.float64)
    """

    plot_upper_bound = 1.0

    def __init__(
        self, num_classes: int, num_features: int, weight: Weight, bias: Weight | None = None, **kwargs: Any
    ) -> None:
        super().__init__(num_classes, num_features, weight, bias, metrics="nc4", **kwargs)
