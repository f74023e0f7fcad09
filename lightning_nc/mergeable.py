"""What the torchmetrics classes share: states that merge exactly and keep their precision, and the weight of a layer."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import fields
from typing import Any, TypeVar

import numpy
import torch
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.nn.parameter import is_lazy
from torchmetrics import Metric

from lightning_nc.moments import state_dtype

__all__ = ["MergeableMetric", "Reference", "Weight", "check_size"]

Weight = Tensor | torch.nn.Module | Callable[[], Tensor]

_Statistics = TypeVar("_Statistics")


def check_size(name: str, size: Any, least: int) -> None:
    """Raise ``ValueError`` unless a size is an integer of at least ``least``."""
    if not isinstance(size, int | numpy.integer) or size < least:
        raise ValueError(f"{name} must be an integer of at least {least}, got {size!r}")


class Reference:
    """A part of a layer. Copies of a metric share it; a copy of a whole model looks at its own part."""

    def __init__(self, name: str, source: Weight | None, shape: tuple[int, ...], two_classes: bool = False) -> None:
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
            one = two_classes and len(value) == 1  # a classifier with one output decides by its sign
            hint = f"; for one output pass a callable that returns torch.cat([-{name}, {name}])" if one else ""
            raise ValueError(f"{name} must have shape {shape}, got {tuple(value.shape)}{hint}")
        self.given = source is not None and not (isinstance(source, torch.nn.Module) and value is None)

    def read(self) -> Tensor | None:
        """The current value; None if there is none."""
        if isinstance(self.source, torch.nn.Module):
            value: Tensor | None = getattr(self.source, self.name)
            return value
        return self.source if isinstance(self.source, Tensor) or self.source is None else self.source()

    def __deepcopy__(self, memo: dict[int, Any]) -> Reference:
        if id(getattr(self.source, "__self__", self.source)) not in memo:
            return self
        copied = copy.copy(self)
        copied.source = copy.deepcopy(self.source, memo)
        return copied


class MergeableMetric(Metric):
    """A metric whose states are statistics that merge exactly, from batches, other metrics and ranks.

    A subclass adds its states with :meth:`add_statistics`, and defines ``_merge`` and ``_reduce_states``.
    """

    is_differentiable = False
    higher_is_better = False
    full_state_update = False
    plot_lower_bound = 0.0

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self._should_unsync = self.sync_on_compute  # who calls sync() also decides when the rank's own state returns
        self.compute_with_cache = False  # a cached value would outlive a change of the weight

    def plot(self, val: Any = None, ax: Any = None) -> Any:
        """Plot the current value, or the given values; see :meth:`torchmetrics.Metric.plot`."""
        return self._plot(val, ax)

    def add_statistics(self, empty: Any) -> None:
        """Add a state for each field of a dataclass of statistics of no samples."""
        for field in fields(empty):
            state = getattr(empty, field.name)
            self.add_state(field.name, state)
            if state.dim() == 2:  # torchmetrics keeps a copy for reset(): one number stands for the zeros of a matrix
                self._defaults[field.name] = state.new_zeros(()).expand(state.shape)

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
        self._merge(group or self.process_group)
        self._is_synced, self._should_unsync = True, False

    def merge_state(self, incoming_state: dict[str, Any] | Metric) -> None:
        """Add the samples of another metric, or of its ``state_dict()``, in place; exact. The other stays as it is.

        So parts of the data can be measured apart: each part saves ``metric.state_dict()`` after ``metric.persistent(True)``,
        and one metric of the same arguments merges what ``torch.load`` gives. It may lie on another device.

        Raises:
            RuntimeError: if the state holds the samples of all ranks.
            ValueError: if a state is missing or does not fit.
        """
        self._check_own("merge")
        if incoming_state is self:
            raise ValueError("a metric cannot be merged with itself: its samples would count twice")
        if isinstance(incoming_state, dict) and incoming_state.keys() != self._defaults.keys():
            raise ValueError(
                f"a state to merge must hold {', '.join(self._defaults)}, got {', '.join(incoming_state) or 'nothing'}; call "
                "metric.persistent(True) before metric.state_dict()"
            )
        super().merge_state(incoming_state)
        self._update_count += 1  # else compute() warns that there are no samples

    def _check_own(self, what: str) -> None:
        """Raise ``RuntimeError`` if the state is no longer that of this rank alone."""
        if self._is_synced:
            raise RuntimeError(
                f"the state holds the samples of all ranks; call reset() or unsync() before the next {what}"
            )

    def _view(self, kind: type[_Statistics]) -> _Statistics:
        """A view of the state. A tensor that was made in inference mode cannot be updated in place outside of it."""
        names = [field.name for field in fields(kind)]  # type: ignore[arg-type]
        for name in names:
            if (state := getattr(self, name)).is_inference():
                with torch.inference_mode(False):
                    setattr(self, name, state.clone())
        return kind(**{name: getattr(self, name) for name in names})

    def _merge(self, group: Any) -> None:
        """Merge the state over the ranks, in place."""
        raise NotImplementedError

    def _sync_dist(self, dist_sync_fn: Any = None, process_group: Any = None) -> None:
        # Other metrics of a collection may share the rank's own state, so the copy that sync() has just made is merged.
        own, copies = self.metric_state, self._cache
        assert copies is not None
        for name, state in copies.items():
            setattr(self, name, state)
        self._cache = own
        self._merge(process_group or self.process_group)

    def _apply(self, fn: Callable[[Tensor], Tensor], *args: Any, **kwargs: Any) -> Any:
        """Move with the module, but keep the precision: bfloat16 moments would be worthless."""

        def move(state: Tensor) -> Tensor:
            device = fn(state.new_empty(0, dtype=torch.float32)).device
            one_number = state.numel() > 1 and not any(state.stride())
            moved = state[(0,) * state.dim()] if one_number else state
            wide = state.dtype in (torch.float32, torch.float64)  # samples that are kept may be coarser
            return moved.to(device, state_dtype(device) if wide else state.dtype).expand(state.shape)

        return super()._apply(move, *args, **kwargs)
