"""The measures as torchmetrics metrics: one shared state, updated in one pass, synchronised in two collectives."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import fields
from typing import Any

import numpy
import torch
from torch import Tensor
from torch.distributed import ProcessGroup
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat

from lightning_nc.functional import MEASURES, PAPER_MEASURES, Frame, _nc2_name, check_measures, evaluate, nc4
from lightning_nc.moments import FOLD_EVERY, ClassMoments, check_batch, check_labels, state_dtype

__all__ = ["NC1", "NC2", "NC3", "NC4", "NeuralCollapse"]

Weight = Tensor | Callable[[], Tensor]


class NeuralCollapse(Metric):
    """Any measures of neural collapse from one pass over the features.

    As input to ``update``: ``features``, (B, d) floating, and ``target``, (B,) class indices. ``compute`` returns a dict
    of tensors of shape (), without unit, in float64 (float32 on a device without it). The state takes O(K d + d^2)
    memory however many samples pass, is synchronised over processes in two collectives, and stays in its own precision
    under ``.to(dtype)``. Values carry no gradient: :mod:`lightning_nc.functional` has differentiable ones.

    A class without a sample is left out with a warning; fewer than two classes seen, or a feature that is not finite,
    give nan.

    Args:
        num_classes: K, at least 2.
        num_features: d, at least 1.
        weight: the classifier's weight, (K, d): a tensor, read at ``compute``, or a callable that returns it. Without it
            the measures that need it are left out.
        bias: the classifier's bias, (K,), likewise.
        metrics: names in :data:`lightning_nc.functional.MEASURES`.
        kwargs: see :class:`torchmetrics.Metric`.

    Raises:
        ValueError: for sizes, names or shapes that do not fit; from ``update`` for features or labels that do not.
            Labels outside [0, K) raise in ``update`` on the CPU; elsewhere, where looking would make every step wait for
            the device, in ``compute``.

    Example:
        >>> import torch
        >>> from lightning_nc import NeuralCollapse
        >>> metric = NeuralCollapse(num_classes=2, num_features=1, metrics=("nc1", "nc2_etf_centered"))
        >>> metric.update(torch.tensor([[2.0], [4.0]]), torch.tensor([0, 0]))
        >>> metric.update(torch.tensor([[-2.0], [-4.0]]), torch.tensor([1, 1]))
        >>> {name: round(float(value), 4) for name, value in metric.compute().items()}
        {'nc1': 0.0556, 'nc2_etf_centered': 0.0}
    """

    is_differentiable = False
    higher_is_better = False
    full_state_update = False
    plot_lower_bound = 0.0

    counts: Tensor
    means: Tensor
    spread: Tensor
    scatter: Tensor
    recent: Tensor
    mislabelled: Tensor
    nonfinite: Tensor
    rounded: Tensor

    def __init__(
        self,
        num_classes: int,
        num_features: int,
        weight: Weight | None = None,
        bias: Weight | None = None,
        metrics: Sequence[str] = PAPER_MEASURES,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        _check_sizes(num_classes, num_features, weight, bias)
        given = {name for name, part in (("weight", weight), ("bias", bias)) if part is not None}
        self.num_classes, self.num_features = num_classes, num_features
        self.metrics = tuple(name for name in check_measures(metrics) if given.issuperset(MEASURES[name].needs))
        if not self.metrics:
            raise ValueError(f"nothing is left to measure: {', '.join(metrics)} need the classifier's weight or bias")
        self._classifier = (weight, bias)  # a tuple: a Parameter must not become a parameter of the metric
        empty = ClassMoments.zeros(num_classes, num_features)
        for field in fields(ClassMoments):
            if (state := getattr(empty, field.name)) is not None:
                self.add_state(field.name, state)

    def update(self, features: Tensor, target: Tensor) -> None:
        """Add a batch: ``features`` (B, d), ``target`` (B,)."""
        check_batch(features, target, self.num_features)
        if target.device.type == "cpu":
            check_labels(target, self.num_classes)
        moments = self._moments()
        moments.update(features, target)
        if self.update_count % FOLD_EVERY == 0:
            moments.fold()

    def compute(self) -> Any:
        """The measures by name, each a tensor of shape ()."""
        moments = self._moments()
        if moments.mislabelled:
            raise ValueError(
                f"targets must lie in [0, {self.num_classes}), got {int(moments.mislabelled)} outside; check num_classes, "
                "or leave out the samples that have no class"
            )
        weight, bias = _read(self._classifier)
        with torch.no_grad():
            return evaluate(self.metrics, moments, weight, bias)

    def plot(self, val: Any = None, ax: Any = None) -> Any:
        """Draw the current value, or the values given; see :meth:`torchmetrics.Metric.plot`."""
        return self._plot(val, ax)

    def _moments(self) -> ClassMoments:
        """A view of the state. A tensor that was made in inference mode cannot be updated in place outside of it."""
        for name in self._defaults:
            if (state := getattr(self, name)).is_inference():
                with torch.inference_mode(False):
                    setattr(self, name, state.clone())
        return ClassMoments(**{name: getattr(self, name) for name in self._defaults})

    def _store(self, moments: ClassMoments) -> None:
        for name in self._defaults:
            setattr(self, name, getattr(moments, name))

    def _reduce_states(self, incoming_state: dict[str, Any]) -> None:
        self._store(ClassMoments(**incoming_state).merge(self._moments()))

    def _sync_dist(self, dist_sync_fn: Any = None, process_group: Any = None) -> None:
        (moments,) = synchronise([self._moments()], process_group or self.process_group)
        self._store(moments)

    def _apply(self, fn: Callable[[Tensor], Tensor], *args: Any, **kwargs: Any) -> Any:
        """Move with the module, but keep the precision: bfloat16 moments would be worthless."""

        def move(state: Tensor) -> Tensor:
            device = fn(state.new_empty(0, dtype=torch.float32)).device
            wide = state.dtype == torch.float64
            return state.to(device, state_dtype(device) if wide else state.dtype)

        return super()._apply(move, *args, **kwargs)


class _SingleMeasure(NeuralCollapse):
    """One measure instead of a dict."""

    def compute(self) -> Tensor:
        """The measure, a tensor of shape ()."""
        values: dict[str, Tensor] = super().compute()
        return values[self.metrics[0]]


class NC1(_SingleMeasure):
    """Within-class variability: :func:`lightning_nc.functional.nc1` in one pass.

    Args:
        num_classes: K, at least 2.
        num_features: d, at least 1.
        kwargs: see :class:`torchmetrics.Metric`.

    Input, state, errors: as for :class:`NeuralCollapse`. The floor is near eps * tr(Sigma_W) / tr(Sigma_B), with the eps
    of float32, or of float64 for float64 features; the function, with all features at hand, has none.

    Example:
        >>> import torch
        >>> from lightning_nc import NC1
        >>> metric = NC1(num_classes=2, num_features=1)
        >>> metric.update(torch.tensor([[2.0], [4.0], [-2.0], [-4.0]]), torch.tensor([0, 0, 1, 1]))
        >>> metric.compute()
        tensor(0.0556, dtype=torch.float64)
    """

    def __init__(self, num_classes: int, num_features: int, **kwargs: Any) -> None:
        super().__init__(num_classes, num_features, metrics=("nc1",), **kwargs)


class NC2(_SingleMeasure):
    """Distance of the class means from a frame: :func:`lightning_nc.functional.nc2` in one pass.

    Args:
        num_classes: K, at least 2.
        num_features: d, at least 1.
        frame: ``"etf"``, simplex equiangular tight frame, or ``"of"``, orthogonal frame.
        center: centre the class means first.
        kwargs: see :class:`torchmetrics.Metric`.

    Input, state, errors: as for :class:`NeuralCollapse`.
    """

    def __init__(
        self, num_classes: int, num_features: int, frame: Frame = "etf", center: bool = False, **kwargs: Any
    ) -> None:
        super().__init__(num_classes, num_features, metrics=(_nc2_name(frame, center),), **kwargs)


class NC3(_SingleMeasure):
    """Distance of the classifier's weight from the class means: :func:`lightning_nc.functional.nc3` in one pass.

    Args:
        num_classes: K, at least 2.
        num_features: d, at least 1.
        weight: (K, d), a tensor, read at ``compute``, or a callable that returns it.
        center: centre the class means first.
        kwargs: see :class:`torchmetrics.Metric`.

    Input, state, errors: as for :class:`NeuralCollapse`.
    """

    def __init__(
        self, num_classes: int, num_features: int, weight: Weight, center: bool = False, **kwargs: Any
    ) -> None:
        super().__init__(
            num_classes, num_features, weight=weight, metrics=("nc3_centered" if center else "nc3",), **kwargs
        )


class NC4(Metric):
    """Disagreement of the nearest class mean with the classifier: :func:`lightning_nc.functional.nc4`.

    The class means must be known before the samples are looked at, so the features are kept: N d numbers, in float32 at
    least, and those of all processes on each of them when it synchronises.

    Args:
        num_classes: K, at least 2.
        num_features: d, at least 1.
        weight: (K, d), a tensor, read at ``compute``, or a callable that returns it.
        bias: (K,), likewise; none where it is not given.
        kwargs: see :class:`torchmetrics.Metric`.

    Input and errors: as for :class:`NeuralCollapse`.

    Example:
        >>> import torch
        >>> from lightning_nc import NC4
        >>> metric = NC4(num_classes=2, num_features=1, weight=torch.tensor([[1.0], [-1.0]]))
        >>> metric.update(torch.tensor([[2.0], [1.0]]), torch.tensor([0, 0]))
        >>> metric.update(torch.tensor([[-2.0]]), torch.tensor([1]))
        >>> metric.compute()
        tensor(0., dtype=torch.float64)
    """

    is_differentiable = False
    higher_is_better = False
    full_state_update = False
    plot_lower_bound = 0.0
    plot_upper_bound = 1.0

    features: list[Tensor]
    target: list[Tensor]

    def __init__(
        self, num_classes: int, num_features: int, weight: Weight, bias: Weight | None = None, **kwargs: Any
    ) -> None:
        super().__init__(**kwargs)
        _check_sizes(num_classes, num_features, weight, bias)
        self.num_classes, self.num_features = num_classes, num_features
        self._classifier = (weight, bias)
        self.add_state("features", [], dist_reduce_fx="cat")
        self.add_state("target", [], dist_reduce_fx="cat")

    def update(self, features: Tensor, target: Tensor) -> None:
        """Add a batch: ``features`` (B, d), ``target`` (B,)."""
        check_batch(features, target, self.num_features)
        if target.device.type == "cpu":
            check_labels(target, self.num_classes)
        self.features.append(features.detach().to(torch.promote_types(features.dtype, torch.float32)))
        self.target.append(target.long())

    def _sync_dist(self, *args: Any, **kwargs: Any) -> None:
        # The others would wait for a process that has nothing to give, or gives another type.
        none = torch.zeros(0, self.num_features, device=self.device)
        self.features = [dim_zero_cat([none, *self.features]).to(state_dtype(self.device))]
        self.target = [dim_zero_cat([none[:, 0].long(), *self.target])]
        super()._sync_dist(*args, **kwargs)

    def compute(self) -> Tensor:
        """The share, in [0, 1], a tensor of shape ()."""
        weight, bias = _read(self._classifier)
        assert weight is not None
        if not len(self.features):
            return torch.full((), math.nan, dtype=state_dtype(self.device), device=self.device)
        with torch.no_grad():
            return nc4(dim_zero_cat(self.features), dim_zero_cat(self.target), weight, bias, self.num_classes)

    def plot(self, val: Any = None, ax: Any = None) -> Any:
        """Draw the current value, or the values given; see :meth:`torchmetrics.Metric.plot`."""
        return self._plot(val, ax)


def _check_sizes(num_classes: int, num_features: int, weight: Weight | None, bias: Weight | None) -> None:
    if not isinstance(num_classes, int | numpy.integer) or num_classes < 2:
        raise ValueError(f"num_classes must be an integer of at least 2, got {num_classes!r}")
    if not isinstance(num_features, int | numpy.integer) or num_features < 1:
        raise ValueError(f"num_features must be a positive integer, got {num_features!r}")
    for name, part, shape in (("weight", weight, (num_classes, num_features)), ("bias", bias, (num_classes,))):
        if part is not None and (isinstance(part, torch.nn.Module) or not (callable(part) or isinstance(part, Tensor))):
            raise ValueError(
                f"{name} must be a tensor or a callable that returns one, got {type(part).__name__}; of a layer, its .{name}"
            )
        if isinstance(part, Tensor) and part.shape != shape:
            raise ValueError(f"{name} must have shape {shape}, got {tuple(part.shape)}")


def _read(classifier: tuple[Weight | None, Weight | None]) -> tuple[Tensor | None, Tensor | None]:
    weight, bias = (part() if callable(part) else part for part in classifier)
    return weight, bias


def synchronise(
    moments: Sequence[ClassMoments], group: ProcessGroup | None = None, error: Exception | None = None
) -> list[ClassMoments]:
    """The moments of all processes together, on each of them.

    Two sums over the processes for all of ``moments`` together: first counts and weighted means, then, moved to the
    common means, the scatters. Memory does not grow with the number of processes. Every process must take part, one that
    has seen no sample too, and one that could not go on: it gives its ``error``, and after the first sum all processes raise.
    """
    counted = [torch.cat([m.counts, (m.means * m.counts.unsqueeze(1)).flatten()]) for m in moments]
    tallies = [torch.stack([m.mislabelled, m.nonfinite, m.rounded]).to(m.means.dtype) for m in moments]
    failed = moments[0].counts.new_full((1,), error is not None)
    *first, failed = _all_reduce([*counted, *tallies, failed], group)
    if failed:
        raise error or RuntimeError("another process could not measure its part; its own warning says why")
    totals, second = [], []
    for m, total in zip(moments, first, strict=False):
        counts, means = total[: len(m.counts)], total[len(m.counts) :].view_as(m.means)
        means = means / counts.clamp(min=1).unsqueeze(1)
        moved = m.means - means
        weighted = moved * m.counts.unsqueeze(1)
        spread = m.spread + (weighted * moved).sum(dim=1)
        totals.append((counts, means))
        second += [spread, m.scatter + m.recent + weighted.T @ moved if m.knows_scatter else m.scatter]
    summed = _all_reduce(second, group)
    return [
        ClassMoments(counts, means, spread, scatter, torch.zeros_like(m.recent), *tally.to(torch.long).unbind())
        for m, (counts, means), spread, scatter, tally in zip(
            moments, totals, summed[::2], summed[1::2], first[len(moments) :], strict=True
        )
    ]


def _all_reduce(tensors: list[Tensor], group: ProcessGroup | None) -> list[Tensor]:
    packed = torch.cat([tensor.flatten() for tensor in tensors])
    torch.distributed.all_reduce(packed, group=group)
    parts = packed.split([tensor.numel() for tensor in tensors])
    return [part.view_as(tensor) for part, tensor in zip(parts, tensors, strict=True)]
