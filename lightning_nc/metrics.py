"""The metrics as torchmetrics classes: one shared state, updated in one pass."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import fields
from typing import Any

import numpy
import torch
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.nn.parameter import is_lazy
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat

from lightning_nc.functional import METRICS, nc4
from lightning_nc.functional.frames import FrameName, nc2_name
from lightning_nc.functional.pairs import check_pairs
from lightning_nc.functional.table import check_metrics, evaluate
from lightning_nc.moments import ClassMoments, check_batch, check_labels, state_dtype

__all__ = ["NC1", "NC2", "NC3", "NC4", "NeuralCollapse"]

Weight = Tensor | torch.nn.Module | Callable[[], Tensor]


class _ClassifierMetric(Metric):
    """A metric that reads the classifier's weight and bias in every ``compute``."""

    is_differentiable = False
    higher_is_better = False
    full_state_update = False
    plot_lower_bound = 0.0

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
        for name, size, least in (("num_classes", num_classes, 2), ("num_features", num_features, 1)):
            if not isinstance(size, int | numpy.integer) or size < least:
                raise ValueError(f"{name} must be an integer of at least {least}, got {size!r}")
        if ignore_index is not None and not isinstance(ignore_index, int | numpy.integer):
            raise ValueError(f"ignore_index must be an integer or None, got {ignore_index!r}")
        self.num_classes, self.num_features, self.ignore_index = num_classes, num_features, ignore_index
        self._should_unsync = self.sync_on_compute  # who calls sync() also decides when the rank's own state returns
        self.compute_with_cache = False  # a cached value would outlive a change of the weight
        self._weight = _Reference("weight", weight, (num_classes, num_features))
        self._bias = _Reference("bias", bias, (num_classes,))

    def plot(self, val: Any = None, ax: Any = None) -> Any:
        """Plot the current value, or the given values; see :meth:`torchmetrics.Metric.plot`."""
        return self._plot(val, ax)

    def _check(self, features: Tensor, target: Tensor) -> None:
        if self._is_synced:
            raise RuntimeError(
                "the state holds the samples of all ranks; call reset() or unsync() before the next update"
            )
        check_batch(features, target, self.num_features)
        if target.device.type == "cpu":
            check_labels(target, self.num_classes, self.ignore_index)


class _Reference:
    """A part of the classifier. Copies of a metric share it; a copy of a whole model looks at its own part."""

    def __init__(self, name: str, source: Weight | None, shape: tuple[int, ...]) -> None:
        self.name, self.source = name, source
        if source is not None and not callable(source) and not isinstance(source, Tensor):
            raise ValueError(f"{name} must be a tensor, the layer or a callable, got {type(source).__name__}")
        if isinstance(source, torch.nn.Module) and not hasattr(source, name):
            raise ValueError(
                f"{name} must be a layer with a {name}, a tensor or a callable, got {type(source).__name__}"
            )
        if hasattr(source, "base_layer"):
            raise ValueError(
                f"{name} of {type(source).__name__} is that of the layer below its adapter; pass a callable that returns what it "
                "applies, such as lambda: head.weight + head.get_delta_weight('default')"
            )
        value = self.read() if isinstance(source, Tensor | torch.nn.Module) else None
        if value is not None and not is_lazy(value) and value.shape != shape:
            one = shape[0] == 2 and len(value) == 1  # a classifier with one output decides by its sign
            hint = f"; for one output pass a callable that returns torch.cat([-{name}, {name}])" if one else ""
            raise ValueError(f"{name} must have shape {shape}, got {tuple(value.shape)}{hint}")
        self.given = source is not None and not (isinstance(source, torch.nn.Module) and value is None)

    def read(self) -> Tensor | None:
        """The current value; None if there is none."""
        if isinstance(self.source, torch.nn.Module):
            value: Tensor | None = getattr(self.source, self.name)
            return value
        return self.source if isinstance(self.source, Tensor) or self.source is None else self.source()

    def __deepcopy__(self, memo: dict[int, Any]) -> _Reference:
        if id(getattr(self.source, "__self__", self.source)) not in memo:
            return self
        copied = copy.copy(self)
        copied.source = copy.deepcopy(self.source, memo)
        return copied


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
        metrics: ``"paper"``, one name, or several names in :data:`lightning_nc.functional.METRICS`.
        ignore_index: samples with this label are left out, whatever their features hold; None: there are none.
        pairs: estimate the metrics over pairs of classes (``nc1_cdnv``, ``nc2_equiangular``, ``nc2_maxangle``) from that many
            random pairs if there are more, such as ``1e6``. The pairs are always the same, and the global random streams do
            not move. ``compute`` then gives the standard error too, ``nc1_cdnv_stderr``; it is 0 for all pairs.
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

    def __init__(
        self,
        num_classes: int,
        num_features: int,
        weight: Weight | None = None,
        bias: Weight | None = None,
        metrics: str | Sequence[str] = "paper",
        ignore_index: int | None = -100,
        pairs: float | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(num_classes, num_features, weight, bias, ignore_index, **kwargs)
        self.pairs = check_pairs(pairs)
        names = check_metrics(metrics)
        given = {part.name for part in (self._weight, self._bias) if part.given}
        self.metrics = tuple(name for name in names if given.issuperset(METRICS[name].needs))
        if not self.metrics:
            raise ValueError(f"no metric is left: {', '.join(names)} need the classifier's weight or bias")
        scatter = any(METRICS[name].scatter for name in self.metrics)
        empty = ClassMoments.zeros(num_classes, num_features, scatter=scatter)
        for field in fields(ClassMoments):
            self.add_state(field.name, getattr(empty, field.name))
        # torchmetrics keeps a copy of each state for reset(): one number stands for the zeros of the matrices.
        for name in ("means", "scatter"):
            self._defaults[name] = empty.counts.new_zeros(()).expand(getattr(empty, name).shape)

    def update(self, features: Tensor, target: Tensor) -> None:
        """Add a batch: ``features`` (B, d), ``target`` (B,)."""
        self._check(features, target)
        self._moments().update(features, target, self.ignore_index)

    def compute(self) -> Any:
        """The metrics by name, each a tensor of shape ()."""
        moments = self._moments()
        if moments.mislabeled:
            raise ValueError(
                f"targets must lie in [0, {self.num_classes}), got {int(moments.mislabeled)} outside; check num_classes, "
                "or remove the samples without a class"
            )
        with torch.no_grad():
            return evaluate(self.metrics, moments, self._weight.read(), self._bias.read(), self.pairs)

    def span(self) -> Tensor:
        """Orthonormal columns that span the centered class means, (d, r), without directions that rounding can cause.

        ``nc1`` is the same for ``features.double() @ span``. r is 0 if no direction is left.
        """
        moments = self._moments()
        return moments.select(moments.counts > 0).directions()[0]

    def _moments(self) -> ClassMoments:
        """A view of the state. A tensor that was made in inference mode cannot be updated in place outside of it."""
        for name in self._defaults:
            if (state := getattr(self, name)).is_inference():
                with torch.inference_mode(False):
                    setattr(self, name, state.clone())
        return ClassMoments(**{name: getattr(self, name) for name in self._defaults})

    def merge_over_ranks(self, group: ProcessGroup | None = None) -> None:
        """Add the samples of all other ranks to the state, in place. All ranks must call it.

        It cannot be undone: :meth:`compute` then returns the values of all ranks, and the metric takes no further batch
        before ``reset()``. ``compute()`` and ``sync()`` of a metric with ``sync_on_compute=True`` give the same values, but keep
        a copy of the rank's own state, so that it can return: they take twice the memory of the state.

        Args:
            group: by default the ``process_group`` of the metric, else all ranks.

        Raises:
            RuntimeError: if the ranks are merged already, or if ``compute`` would merge them again.
        """
        if self._is_synced or self._to_sync:
            raise RuntimeError(
                "merge_over_ranks needs a metric with sync_on_compute=False, because compute() would merge the ranks again"
                if self._to_sync
                else "the state holds the samples of all ranks already; call reset() or unsync() first"
            )
        self._moments().merge_over_ranks(group or self.process_group)
        self._is_synced, self._should_unsync = True, False

    def merge_state(self, incoming_state: dict[str, Any] | Metric) -> None:
        """Add the samples of another metric, or of its ``state_dict()``, in place; exact. The other stays as it is.

        So parts of the data can be measured apart: each part saves ``metric.state_dict()`` after ``metric.persistent(True)``,
        and one metric of the same arguments merges what ``torch.load`` gives. It may lie on another device.

        Raises:
            RuntimeError: if the state holds the samples of all ranks.
            ValueError: if a state is missing or does not fit.
        """
        if self._is_synced:
            raise RuntimeError(
                "the state holds the samples of all ranks; call reset() or unsync() before the next merge"
            )
        if incoming_state is self:
            raise ValueError("a metric cannot be merged with itself: its samples would count twice")
        if isinstance(incoming_state, dict) and incoming_state.keys() != self._defaults.keys():
            raise ValueError(
                f"a state to merge must hold {', '.join(self._defaults)}, got {', '.join(incoming_state) or 'nothing'}; call "
                "metric.persistent(True) before metric.state_dict()"
            )
        super().merge_state(incoming_state)
        self._update_count += 1  # else compute() warns that there are no samples

    def _reduce_states(self, incoming_state: dict[str, Any]) -> None:
        self._moments().merge(ClassMoments(**incoming_state))

    def _sync_dist(self, dist_sync_fn: Any = None, process_group: Any = None) -> None:
        # Other metrics of a collection may share the rank's own state, so the copy that sync() has just made is merged.
        own, copies = self.metric_state, self._cache
        assert copies is not None
        for name, state in copies.items():
            setattr(self, name, state)
        self._cache = own
        self._moments().merge_over_ranks(process_group or self.process_group)

    def _apply(self, fn: Callable[[Tensor], Tensor], *args: Any, **kwargs: Any) -> Any:
        """Move with the module, but keep the precision: bfloat16 moments would be worthless."""

        def move(state: Tensor) -> Tensor:
            device = fn(state.new_empty(0, dtype=torch.float32)).device
            one_number = state.numel() > 1 and not any(state.stride())
            moved = state[(0,) * state.dim()] if one_number else state
            return moved.to(device, state_dtype(device) if state.is_floating_point() else state.dtype).expand(
                state.shape
            )

        return super()._apply(move, *args, **kwargs)


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


class NC4(_ClassifierMetric):
    """Disagreement of the nearest class mean with the classifier: :func:`lightning_nc.functional.nc4`.

    The class means must be known before the samples are compared with them, so the features are kept: N d numbers, in
    float32 at least. After synchronization every rank holds those of all ranks.

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

    features: list[Tensor]
    target: list[Tensor]

    def __init__(
        self, num_classes: int, num_features: int, weight: Weight, bias: Weight | None = None, **kwargs: Any
    ) -> None:
        super().__init__(num_classes, num_features, weight, bias, **kwargs)
        self.add_state("features", [], dist_reduce_fx="cat")
        self.add_state("target", [], dist_reduce_fx="cat")

    def update(self, features: Tensor, target: Tensor) -> None:
        """Add a batch: ``features`` (B, d), ``target`` (B,)."""
        self._check(features, target)
        self.features.append(features.detach().to(torch.promote_types(features.dtype, torch.float32)))
        self.target.append(target.long())

    def _sync_dist(self, *args: Any, **kwargs: Any) -> None:
        # All ranks must gather tensors of one type, including a rank without samples.
        none = torch.zeros(0, self.num_features, device=self.device)
        self.features = [dim_zero_cat([none, *self.features]).to(state_dtype(self.device))]
        self.target = [dim_zero_cat([none[:, 0].long(), *self.target])]
        super()._sync_dist(*args, **kwargs)

    def compute(self) -> Tensor:
        """The share, in [0, 1], a tensor of shape ()."""
        weight = self._weight.read()
        assert weight is not None
        if not len(self.features):
            return torch.full((), math.nan, dtype=state_dtype(self.device), device=self.device)
        with torch.no_grad():
            features, target = dim_zero_cat(self.features), dim_zero_cat(self.target)
            if self.ignore_index is not None:
                features, target = features[target != self.ignore_index], target[target != self.ignore_index]
            return nc4(features, target, weight, self._bias.read(), self.num_classes)
