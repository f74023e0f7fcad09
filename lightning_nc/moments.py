"""Counts, class means and within-class scatter of labelled features.

Two ways to the same numbers: :class:`ClassMoments` gathers them from batches in one pass and keeps nothing of the
samples; :class:`ClassDeviations` holds all features at once and is differentiable.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

__all__ = ["FOLD_EVERY", "ClassDeviations", "ClassMoments", "check_batch", "check_labels", "state_dtype"]

FOLD_EVERY = 16
"""Batches after which :meth:`ClassMoments.fold` is due: seldom enough to cost nothing, often enough for float32."""


def state_dtype(device: torch.device | str) -> torch.dtype:
    """The widest floating type of ``device``: float64, or float32 on Apple's MPS, which has no float64."""
    return torch.float32 if torch.device(device).type == "mps" else torch.float64


@dataclass
class ClassMoments:
    r"""Statistics of N samples in K classes, from which every measure of neural collapse follows.

    Batches are centred on the running class means before they are multiplied, so nothing cancels: with ``a`` the
    deviations of a batch from the class means before it and ``b`` from those after it, the pooled within-class scatter
    grows by exactly :math:`a^\top b`, whatever the mix of classes (Welford's identity, for batches).

    The products are in float32 for features up to float32: deviations should lie between 1e-18 and 1e17, where their
    squares do not leave its range.

    Args:
        counts: samples per class, (K,).
        means: class means, (K, d); zero for a class without a sample.
        spread: sum of squared distances to the class mean, per class, (K,).
        scatter: pooled within-class scatter, the sum over all samples of the outer product of the deviation, (d, d); of
            shape (0, 0) where it is not kept, and (r, r) in the coordinates of ``basis`` where there is one.
        recent: the part of the scatter that came from the last few batches, in their own precision, (d, d). Adding
            d x d float64 numbers after every batch would cost as much as the product itself.
        mislabelled: how many labels were outside [0, K), ().
        nonfinite: how many samples held an infinity or a nan, ().
        rounded: how many samples were given in float32 or less, ().
        basis: orthonormal columns that span the class means, (d, r), where the scatter is known in that span alone.
    """

    counts: Tensor
    means: Tensor
    spread: Tensor
    scatter: Tensor
    recent: Tensor
    mislabelled: Tensor
    nonfinite: Tensor
    rounded: Tensor
    basis: Tensor | None = None

    @classmethod
    def zeros(
        cls, num_classes: int, num_features: int, device: torch.device | str | None = None, scatter: bool = True
    ) -> ClassMoments:
        """The moments of no samples at all; without ``scatter`` they take O(K d) memory instead of O(K d + d^2)."""
        side = num_features if scatter else 0
        device = torch.get_default_device() if device is None else device

        def zeros(*shape: int, dtype: torch.dtype | None = None) -> Tensor:
            with torch.inference_mode(False):  # so that it can be updated in place in any mode
                return torch.zeros(shape, dtype=dtype or state_dtype(device), device=device)

        return cls(
            counts=zeros(num_classes),
            means=zeros(num_classes, num_features),
            spread=zeros(num_classes),
            scatter=zeros(side, side),
            recent=zeros(side, side, dtype=torch.float32),
            mislabelled=zeros(dtype=torch.long),
            nonfinite=zeros(dtype=torch.long),
            rounded=zeros(dtype=torch.long),
        )

    @property
    def samples(self) -> Tensor:
        """N, the number of samples, ()."""
        return self.counts.sum()

    @property
    def finite(self) -> bool:
        """Whether no sample was infinite or nan, and no square overflowed."""
        return bool((self.spread.sum() + self.scatter.sum() + self.recent.sum()).isfinite())

    def update(self, features: Tensor, target: Tensor) -> None:
        """Add a batch, in place, without waiting for the device.

        Args:
            features: (B, d), floating, on the device of the moments.
            target: class indices, (B,). A label outside [0, K) is counted in ``mislabelled``.
        """
        with torch.inference_mode(False), torch.no_grad(), _full_precision(features.device.type):
            product_dtype = torch.promote_types(features.dtype, torch.float32)
            target = target.long()
            valid = (target >= 0) & (target < self.counts.numel())
            target = target.clamp(0, self.counts.numel() - 1)
            self.mislabelled += (~valid).sum()
            self.rounded += _rounded(features)
            self.nonfinite += (~features.sum(dim=1, dtype=self.means.dtype).isfinite()).sum()

            # The first sample of each class in the batch stands for its class: only the classes that are here are touched.
            order = torch.arange(len(target), device=target.device)
            leader = order.new_full(self.counts.shape, len(target)).scatter_reduce_(0, target, order, "amin")[target]
            known = self.counts[target] > 0
            self.counts.index_add_(0, target, self.counts.new_ones(()).expand(len(target)))

            before = features.to(self.means.dtype) - self.means[target]
            shift = torch.zeros_like(before).index_add_(0, leader, before).div_(self.counts[target].unsqueeze(1))
            self.means.index_add_(0, target, shift)
            after = (before - shift[leader]).to(product_dtype)
            # For a class seen for the first time any centre before the batch is exact; the new mean cancels least.
            before = torch.where(known.unsqueeze(1), before.to(product_dtype), after)

            self.spread.index_add_(0, target, (before * after).sum(dim=1, dtype=self.spread.dtype))
            if len(self.scatter):
                sink = self.scatter if product_dtype == self.scatter.dtype else self.recent
                sink.addmm_(before.T, after)

    def fold(self) -> None:
        """Add what the last batches gathered to ``scatter``, in place."""
        with torch.inference_mode(False):
            self.scatter += self.recent
            self.recent.zero_()

    def merge(self, other: ClassMoments) -> ClassMoments:
        """The moments of both sets of samples together (Chan's formula; exact)."""
        counts = self.counts + other.counts
        delta = other.means - self.means
        moved = delta * (self.counts * other.counts / counts.clamp(min=1)).unsqueeze(1)
        return ClassMoments(
            counts=counts,
            means=self.means + delta * (other.counts / counts.clamp(min=1)).unsqueeze(1),
            spread=self.spread + other.spread + (moved * delta).sum(dim=1),
            scatter=(self.scatter + self.recent) + (other.scatter + other.recent) + moved.T @ delta,
            recent=torch.zeros_like(self.recent),
            mislabelled=self.mislabelled + other.mislabelled,
            nonfinite=self.nonfinite + other.nonfinite,
            rounded=self.rounded + other.rounded,
        )

    def select(self, classes: Tensor) -> ClassMoments:
        """Without the classes that have no sample; ``classes`` is a mask, (K,)."""
        return replace(self, counts=self.counts[classes], means=self.means[classes], spread=self.spread[classes])

    @property
    def knows_scatter(self) -> bool:
        """Whether the scatter was kept, so that :meth:`within` can be had."""
        return len(self.scatter) > 0

    def span(self) -> Tensor:
        """Orthonormal columns that span the class means, (d, r), r at most K."""
        basis: Tensor = torch.linalg.qr(self.means.T).Q
        return basis

    def with_scatter_of(self, projected: ClassMoments, basis: Tensor) -> ClassMoments:
        """These moments with the scatter that ``projected``, those of the features times ``basis``, have gathered."""
        return replace(self, scatter=projected.scatter, recent=projected.recent, basis=basis)

    def within(self, directions: Tensor) -> Tensor:
        """Sum over the samples of the squared projection of the deviation on ``directions`` (d, r): (), never negative.

        The d x d scatter carries rounding of the size of its largest entries, which is where this number's floor is. Where
        there is a ``basis``, the directions must lie in its span.
        """
        if self.basis is not None:
            directions = self.basis.T @ directions
        return (directions * ((self.scatter + self.recent) @ directions)).sum().clamp(min=0)


@dataclass
class ClassDeviations:
    """The same statistics with all features at hand: exact far below what a scatter matrix can hold, differentiable.

    Args:
        counts: samples per class, (K,).
        means: class means, (K, d).
        deviations: features minus the mean of their class, (N, d).
        target: class indices, (N,).
        nonfinite: how many samples held an infinity or a nan, ().
        rounded: how many samples were given in float32 or less, ().
    """

    counts: Tensor
    means: Tensor
    deviations: Tensor
    target: Tensor
    nonfinite: Tensor
    rounded: Tensor

    @classmethod
    def of(cls, features: Tensor, target: Tensor, num_classes: int) -> ClassDeviations:
        """From features (N, d) and class indices (N,), computed in the widest type of their device."""
        rounded = torch.as_tensor(_rounded(features), device=features.device)
        features, target = features.to(state_dtype(features.device)), target.long()
        counts = torch.zeros(num_classes, dtype=features.dtype, device=features.device)
        counts = counts.index_add(0, target, counts.new_ones(len(target)))

        def class_mean(rows: Tensor) -> Tensor:
            total = rows.new_zeros(num_classes, rows.shape[1]).index_add(0, target, rows)
            return total / counts.clamp(min=1).unsqueeze(1)

        with _full_precision(features.device.type):
            means = class_mean(features)
            means = means + class_mean(features - means[target])  # takes the rounding of the first sum out
            nonfinite = (~features.isfinite().all(dim=1)).sum()
            return cls(counts, means, features - means[target], target, nonfinite, rounded)

    @property
    def samples(self) -> Tensor:
        """N, the number of samples, ()."""
        return self.counts.sum()

    @property
    def finite(self) -> bool:
        """Whether no sample was infinite or nan, and no square overflows."""
        return bool(self.deviations.square().sum().isfinite())

    @property
    def spread(self) -> Tensor:
        """Sum of squared distances to the class mean, per class, (K,)."""
        return torch.zeros_like(self.counts).index_add(0, self.target, self.deviations.square().sum(dim=1))

    def select(self, classes: Tensor) -> ClassDeviations:
        """Without the classes that have no sample; ``classes`` is a mask, (K,)."""
        target = (classes.cumsum(0) - 1)[self.target]
        return replace(self, counts=self.counts[classes], means=self.means[classes], target=target)

    def within(self, directions: Tensor) -> Tensor:
        """Sum over the samples of the squared projection of the deviation on ``directions`` (d, r): ()."""
        return (self.deviations @ directions).square().sum()


def _rounded(features: Tensor) -> Tensor | int:
    """How many samples carry no more than float32 holds, in whatever type they come."""
    if features.dtype != torch.float64:
        return len(features)
    return (features.detach() == features.detach().float()).all(dim=1).sum()


def check_batch(features: Tensor, target: Tensor, num_features: int | None = None) -> None:
    """Raise ``ValueError`` unless features are floating (B, d) and labels are integer (B,). Looks at no value."""
    if not isinstance(features, Tensor):
        raise ValueError(f"features must be a tensor of shape (B, d), got {type(features).__name__}")
    if not features.is_floating_point() or features.dim() != 2:
        raise ValueError(
            f"features must be floating and of shape (B, d), got {_describe(features)}; pool or flatten them first"
        )
    if num_features is not None and features.shape[1] != num_features:
        raise ValueError(f"features must have num_features={num_features} columns, got {_describe(features)}")
    check_target(target)
    if len(features) != len(target):
        raise ValueError(f"features and targets must have the same length, got {len(features)} and {len(target)}")


def check_target(target: Any) -> None:
    """Raise ``ValueError`` unless labels are an integer tensor (B,). Looks at no value."""
    if not isinstance(target, Tensor):
        raise ValueError(f"targets must be a tensor of class indices of shape (B,), got {type(target).__name__}")
    if target.is_floating_point() or target.is_complex() or target.dtype == torch.bool or target.dim() != 1:
        column = target.dim() == 2 and target.shape[1] == 1
        remedy = "take squeeze(1) of it" if column else "take the arg max of one-hot or soft labels"
        raise ValueError(
            f"targets must hold class indices of shape (B,), got {_describe(target)}; {remedy} first, or pass target_fn to "
            "extract class indices from the batch"
        )


def check_labels(target: Tensor, num_classes: int) -> None:
    """Raise ``ValueError`` for labels outside [0, num_classes). Reads the values, so it waits for the device."""
    target = target.long()  # a comparison would cast the number of classes to uint8
    outside = target[(target < 0) | (target >= num_classes)]
    if len(outside):
        raise ValueError(
            f"targets must lie in [0, {num_classes}), got {len(outside)} outside, {int(outside[0])} for one; "
            "check num_classes, or leave out the samples that have no class"
        )


def _describe(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {tuple(tensor.shape)}"


@contextmanager
def _full_precision(device_type: str) -> Iterator[None]:
    """Products at the precision of their operands: no autocast, no TF32, no bfloat16 inside a float32 product."""
    backends = (torch.backends.cuda.matmul, torch.backends.mkldnn.matmul)  # type: ignore[attr-defined]
    before = [backend.fp32_precision for backend in backends]
    with torch.autocast(device_type, enabled=False):
        try:
            for backend in backends:
                backend.fp32_precision = "ieee"
            yield
        finally:
            for backend, precision in zip(backends, before, strict=True):
                backend.fp32_precision = precision
