"""Counts, class means and within-class scatter of labeled features.

:class:`ClassMoments` accumulates them from batches in one pass and keeps no sample. :class:`ClassDeviations` holds all
features and is differentiable. Sums and products are in float64 (float32 on a device without it), so that no setting of
autocast, TF32 or ``torch.backends`` reaches them.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.linalg import vector_norm

__all__ = [
    "ClassDeviations",
    "ClassMoments",
    "check_batch",
    "check_dense",
    "check_labels",
    "check_target",
    "keep_rows",
    "state_dtype",
]

_DIGITS = {torch.bfloat16: 7, torch.float16: 10, torch.float32: 23, torch.float64: 52}
"""The types of features, coarsest first, and the binary digits that they store of each number."""

_INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.uint16, torch.uint32, torch.uint64)

_BLOCK = 128
"""Rows of the scatter matrix that are multiplied at a time: the matrix is symmetric, and its lower blocks are skipped."""

_UPDATE_BLOCK = 2**23
"""Values of a batch that are processed together: 64 MB in float64."""

_CACHE_BLOCK = 2**19
"""The same on the CPU, for its cache, if these are at least 256 rows: 4 MB."""

_MERGE_BLOCK = 2**16, 2**19
"""Values of the class means that are merged together, a sixteenth of all but between these: 0.5 and 4 MB in float64."""

_CLASSES = 2048
"""Class means that are squared together."""

_SUMS = ("spread", "columns", "nonfinite", "inexact", "mislabeled")
"""Parts of the moments that are added up when moments are merged around the same class means."""

Self = TypeVar("Self", bound="ClassStatistics")


def state_dtype(device: torch.device | str) -> torch.dtype:
    """The widest floating type of ``device``: float64, or float32 on Apple's MPS, which has no float64."""
    return torch.float32 if torch.device(device).type == "mps" else torch.float64


@dataclass
class ClassStatistics:
    """What both kinds of statistics share.

    Args:
        counts: samples per class, (K,).
        means: class means, (K, d); zero for a class without a sample.
        spread: sum of squared distances to the class mean, per class, (K,).
        columns: the same sum per feature instead of per class, (d,).
        nonfinite: number of samples with an infinity or a nan, ().
        inexact: number of values with more digits than bfloat16, float16 and float32 hold, (3,).
    """

    counts: Tensor
    means: Tensor
    spread: Tensor
    columns: Tensor
    nonfinite: Tensor
    inexact: Tensor

    @property
    def samples(self) -> Tensor:
        """N, the number of samples, ()."""
        return self.counts.sum()

    @property
    def drift(self) -> float:
        """Rounding error of the class means that their computation adds, in units of the last digit."""
        return 4.0

    @property
    def resolution(self) -> float:
        """What :meth:`within` gives for a direction without any deviation is at most this."""
        return (16 * torch.finfo(self.means.dtype).eps) ** 2 * float(self.spread.detach().sum())

    @property
    def precision(self) -> torch.dtype:
        """The coarsest type whose digits hold every feature: float32 for float64 features that came from float32."""
        return list(_DIGITS)[[*self.inexact.eq(0).tolist(), True].index(True)]

    def select(self: Self, classes: Tensor) -> Self:
        """A copy of only the classes in the mask ``classes``, (K,), which holds all classes that have a sample."""
        return replace(self, counts=self.counts[classes], means=self.means[classes], spread=self.spread[classes])

    def varies(self) -> bool:
        """Whether samples can differ from the mean of their class: if every class has one, only from a mean of other data."""
        return bool(self.counts.max() > 1 or self.spread.any())

    def fault(self) -> str | None:
        """Why nothing can be computed: a feature that is not finite, or squares out of range. None if all is well."""
        if self.nonfinite:
            return f"{int(self.nonfinite)} samples have an infinity or a nan"
        info = torch.finfo(self.means.dtype)
        low, high = math.sqrt(info.tiny) / info.eps, math.sqrt(info.max) * info.eps
        largest = vector_norm(self.means.detach().flatten(), math.inf)
        size = float(torch.maximum(largest, self.spread.detach().max().sqrt()))
        if size == 0 or low <= size <= high:
            return None
        problem = "small that their squares underflow" if size < low else "large that their squares overflow"
        return f"the features are so {problem} (scale them to between {low:.0e} and {high:.0e})"

    def within(self, directions: Tensor) -> Tensor:
        """Sum over the samples of the squared deviation along each of the ``directions`` (d, r): (r,), not negative."""
        raise NotImplementedError

    def pooled(self) -> Tensor:
        """The within-class scatter, the sum over the samples of the outer product of the deviation, (d, d)."""
        raise NotImplementedError

    def root(self) -> Tensor:
        """Rows R with R'R = :meth:`pooled`."""
        raise NotImplementedError

    def total(self) -> Tensor:
        """The scatter of all samples around their common mean, (d, d)."""
        centered = self.means - self.counts @ self.means / self.samples
        return self.pooled() + (centered * self.counts.unsqueeze(1)).T @ centered

    def contrasts(self) -> Tensor:
        """K - 1 rows T with T'T = M'M, where the rows of M are the centered class means.

        M has K rows and at most rank K - 1. A reflection turns its null direction, the vector of ones, to the first axis,
        and that row is dropped by construction rather than by a rank tolerance.
        """
        return self.means[1:] - self._offset()

    def _offset(self) -> Tensor:
        mean = self.means.mean(dim=0)
        return mean + (self.means[0] - mean) / (math.sqrt(len(self.means)) + 1)

    def directions(self) -> tuple[Tensor, Tensor]:
        """The principal directions of the centered class means, (d, r), and their singular values, (r,).

        A direction is left out, with a warning, if rounding alone can cause it: neither the class means nor, as far as the
        scatter is known, the samples differ along it by more. See the section on precision in ``docs/metrics.md``.
        """
        with torch.no_grad():
            offset, contrasts = self._offset(), self.means[:0]
            for part in self.means[1:].split(2 * len(offset)):  # reduced to d rows or less, without a copy of all
                contrasts = torch.cat([contrasts, part - offset])
                if len(contrasts) > len(offset):
                    contrasts = torch.linalg.qr(contrasts, mode="r").R
            _, values, rows = torch.linalg.svd(contrasts, full_matrices=False)
            error, sums = self._rounding()
            # Rounding is the same for samples that are alike; errors of the sums of earlier layers average out.
            doubt = 1.5 + sums / self.counts.sqrt()
            kept = values > doubt.max() * vector_norm(error) + vector_norm(doubt) * error.max()
            weak = rows[~kept].T
            if weak.numel() and math.isfinite(self.resolution):
                varied = self.within(weak) > self.noise(weak)
                floor = torch.finfo(values.dtype).eps * max(self.means.shape) * values[0]
                kept[~kept] = varied & (values[~kept] > floor)
        if not kept.all():
            warnings.warn(
                f"nc1 leaves out {int((~kept).sum())} of {len(kept)} directions of the class means: what differs along them "
                f"is within the rounding of {str(self.precision).removeprefix('torch.')} features (they have no more digits)",
                stacklevel=2,
            )
        return rows[kept].T, values[kept]

    def rounding(self) -> Tensor:
        """What rounding of the features and of earlier layers can add to ``columns``, (d,)."""
        error, sums = self._rounding()
        return self.samples * sums**2 * error.square()

    def noise(self, directions: Tensor | None = None) -> Tensor:
        """What rounding can add to :meth:`within`, for each of the ``directions`` (d, r), of length 1, or for any at most."""
        rounding = self.rounding()
        along = rounding.max() if directions is None else rounding @ directions.square()
        return rounding.mean() + along + self.resolution

    def _rounding(self) -> tuple[Tensor, float]:
        """Rounding error of an entry of each feature, (d,), and by what factor sums in earlier layers can increase it."""
        info, own = torch.finfo(self.precision), torch.finfo(self.means.dtype)
        eps = info.eps + own.eps * self.drift
        square = self.columns / self.samples
        for counts, means in zip(self.counts.split(_CLASSES), self.means.split(_CLASSES), strict=True):
            square = square + counts @ means.square() / self.samples
        # float16 and bfloat16 are summed in float32.
        return eps * square.sqrt().clamp(min=info.smallest_normal) / math.sqrt(12), 8 if info.bits > 16 else 4


@dataclass
class ClassMoments(ClassStatistics):
    r"""Statistics of N samples in K classes, accumulated from batches.

    Batches are centered on the running class means before they are multiplied, so nothing cancels: with ``a`` the
    deviations of a batch from the class means before it and ``b`` the deviations from those after it, the pooled
    within-class scatter grows by exactly :math:`a^\top b`, whatever the mix of classes (Welford's identity, for batches).

    Args:
        counts, means, spread, columns, nonfinite, inexact: see :class:`ClassStatistics`.
        scatter: pooled within-class scatter, the sum over all samples of the outer product of the deviation, (d, d); only
            its upper triangle is meaningful. Of shape (0, 0) if it is not kept.
        mislabeled: number of labels outside [0, K), ().
    """

    scatter: Tensor
    mislabeled: Tensor

    @classmethod
    def zeros(
        cls, num_classes: int, num_features: int, device: torch.device | str | None = None, scatter: bool = True
    ) -> ClassMoments:
        """The moments of no samples. Without ``scatter`` they take O(K d) memory instead of O(K d + d^2)."""
        side = num_features if scatter else 0
        device = torch.empty(0, device=device).device  # for None the default
        with torch.inference_mode(False):  # so that they can be updated in place in any mode
            count = torch.zeros((), dtype=torch.long, device=device)
            sums = torch.zeros(num_classes, dtype=state_dtype(device), device=device)
            return cls(
                counts=sums,
                means=sums.new_zeros(num_classes, num_features),
                spread=sums.clone(),
                columns=sums.new_zeros(num_features),
                nonfinite=count,
                inexact=count.new_zeros(3),
                scatter=sums.new_zeros(side, side),
                mislabeled=count.clone(),
            )

    def update(self, features: Tensor, target: Tensor, ignore_index: int | None = None) -> None:
        """Add a batch, in place, without waiting for the device, in blocks of rows that bound the memory it takes.

        Args:
            features: (B, d), floating, on the device of the moments.
            target: class indices, (B,). A label outside [0, K) is counted in ``mislabeled`` and its sample nowhere else.
            ignore_index: samples with this label are counted nowhere, whatever their features hold.
        """
        with torch.inference_mode(False), torch.no_grad(), torch.autocast(features.device.type, enabled=False):
            width, block = features.shape[1], _UPDATE_BLOCK
            if features.device.type == "cpu":
                block = min(block, max(_CACHE_BLOCK, 256 * width))
            for rows in _row_blocks(len(features), width, block):
                self._update(features[rows], target[rows].long(), ignore_index)

    def _update(self, features: Tensor, target: Tensor, ignore_index: int | None) -> None:
        valid = (target >= 0) & (target < self.counts.numel())
        ignored = torch.zeros_like(valid) if ignore_index is None else target == ignore_index
        used = valid & ~ignored
        self.mislabeled += (~(valid | ignored)).sum()
        target = target.clamp(0, self.counts.numel() - 1)
        features = keep_rows(features, used)
        self.inexact += _inexact(features)
        features = features.to(self.means.dtype)
        self.nonfinite += (~features.sum(dim=1).isfinite()).sum()

        # The first sample of each class in the batch stands for its class: other classes are not touched.
        order = torch.arange(len(target), device=target.device)
        leader = order.new_full(self.counts.shape, len(target)).scatter_reduce_(0, target, order, "amin")[target]
        weight = used.to(self.counts)  # the deviation of a row that is not used is zero, so that it changes nothing
        new = weight * (self.counts[target] == 0)
        self.counts.index_add_(0, target, weight)

        before = features.sub_(self.means[target]).mul_(weight.unsqueeze(1))
        size = self.counts[target].clamp(min=1).unsqueeze(1)
        shift = torch.zeros_like(before).index_add_(0, leader, before).div_(size)
        self.means.index_add_(0, target, shift)
        step = shift[leader]
        # Any center is exact for a class without earlier samples; the new mean cancels least.
        self._add_products(target, before.addcmul(step, new.unsqueeze(1), value=-1), before - step)

    def _add_products(self, target: Tensor, left: Tensor, right: Tensor) -> None:
        """Add the outer products of the rows of ``left`` and ``right``, which belong to the classes ``target``."""
        squares = left * right
        self.spread.index_add_(0, target, squares.sum(dim=1))
        self.columns += squares.sum(dim=0)
        for rows, columns in _upper_blocks(len(self.scatter)):
            self.scatter[rows, columns].addmm_(left[:, rows].T, right[:, columns])

    def around(self, centers: Tensor) -> ClassMoments:
        """The moments of the same samples around other class means, (K, d); exact. Each class with a sample needs one."""
        moved = replace(
            self, means=centers, **{name: getattr(self, name).clone() for name in ("spread", "columns", "scatter")}
        )
        for rows in self._class_blocks():
            delta = (self.means[rows] - centers[rows]) * (self.counts[rows] > 0).unsqueeze(1)
            classes = torch.arange(rows.start, rows.stop, device=delta.device)
            moved._add_products(classes, delta * self.counts[rows].unsqueeze(1), delta)
        return moved

    def merge(self, other: ClassMoments) -> None:
        """Add the samples of ``other``, in place; exact. ``other`` stays as it is and may be on another device.

        Raises:
            ValueError: unless both have the same K and d, and both a scatter matrix or none.
        """
        shapes = [(*moments.means.shape, len(moments.scatter) > 0) for moments in (self, other)]
        if shapes[0] != shapes[1]:
            raise ValueError(
                "moments can be merged if their number of classes and of features is the same, and both keep a scatter matrix "
                f"or none; got {shapes[0]} and {shapes[1]}: give both the same num_classes, num_features and metrics"
            )
        with torch.no_grad():
            counts = other.counts.to(self.counts)
            share = counts / (self.counts + counts).clamp(min=1)
            for rows in self._class_blocks():
                delta = other.means[rows].to(self.means) - self.means[rows]
                classes = torch.arange(rows.start, rows.stop, device=delta.device)
                self._add_products(classes, delta * (self.counts * share)[rows].unsqueeze(1), delta)
                self.means[rows] += delta * share[rows].unsqueeze(1)
            for name in ("counts", *_SUMS):
                getattr(self, name).add_(getattr(other, name).to(self.counts.device))
            for rows, columns in _upper_blocks(len(self.scatter)):
                self.scatter[rows, columns] += other.scatter[rows, columns].to(self.scatter)

    def merge_over_ranks(self, group: ProcessGroup | None = None) -> None:
        """Add the samples of all other ranks, in place. All ranks must call it, with the same K and d.

        Works in blocks of rows: the memory that it takes is small compared to the moments, for any number of ranks.
        """

        def reduce(part: Tensor) -> Tensor:
            torch.distributed.all_reduce(part, group=group)
            return part

        with torch.no_grad():
            own = self.counts.clone()
            reduce(self.counts)
            for rows in self._class_blocks():
                size = own[rows].unsqueeze(1)
                merged = reduce(self.means[rows] * size).div_(self.counts[rows].clamp(min=1).unsqueeze(1))
                delta = self.means[rows] - merged
                self.means[rows] = merged
                classes = torch.arange(rows.start, rows.stop, device=delta.device)
                self._add_products(classes, torch.mul(delta, size, out=merged), delta)
            for name in _SUMS:
                reduce(getattr(self, name))
            for rows, columns in _upper_blocks(len(self.scatter)):
                self.scatter[rows, columns] = reduce(self.scatter[rows, columns].contiguous())

    def _class_blocks(self) -> Iterator[slice]:
        """Blocks of classes whose means are small compared to all of them."""
        (classes, features), (least, most) = self.means.shape, _MERGE_BLOCK
        return _row_blocks(classes, features, max(least, min(classes * features // 16, most)))

    @property
    def drift(self) -> float:
        """Running means are rounded at every update."""
        return 8 + math.sqrt(self.counts.max())

    @property
    def resolution(self) -> float:
        """The rounding of the scatter matrix; infinite if it is not kept."""
        return 32 * torch.finfo(self.means.dtype).eps * float(self.spread.sum()) if len(self.scatter) else math.inf

    def within(self, directions: Tensor) -> Tensor:
        """Sum over the samples of the squared deviation along each of the ``directions`` (d, r): (r,), not negative."""
        self._check_scatter()
        total = directions.new_zeros(directions.shape[1])
        for rows, right in _upper_blocks(len(self.scatter)):
            block, size = self.scatter[rows, right], rows.stop - rows.start
            product = block[:, :size] @ directions[rows] + 2 * block[:, size:] @ directions[rows.stop :]
            total += (directions[rows] * product).sum(dim=0)
        return total.clamp(min=0)

    def pooled(self) -> Tensor:
        """The within-class scatter, (d, d)."""
        self._check_scatter()
        return self.scatter.triu() + self.scatter.triu(1).T

    def root(self) -> Tensor:
        """Rows R with R'R = :meth:`pooled`, (d, d) or fewer."""
        values, axes = torch.linalg.eigh(self.pooled())
        kept: Tensor = values > self.resolution
        rows: Tensor = (axes[:, kept] * values[kept].sqrt()).T
        return rows

    def cholesky(self) -> Tensor | None:
        """L, lower triangular, with LL' = :meth:`pooled`. None if samples vary in a direction by no more than rounding."""
        scatter = self.pooled()
        above = torch.linalg.cholesky_ex(scatter - self.noise() * torch.eye(len(scatter)).to(scatter)).info == 0
        return torch.linalg.cholesky(scatter) if above else None

    def _check_scatter(self) -> None:
        if not len(self.scatter):
            raise RuntimeError("the scatter matrix was not kept; the metric's row in METRICS needs scatter=True")


@dataclass
class ClassDeviations(ClassStatistics):
    """The same statistics with all features at hand: exact far below what a scatter matrix can hold, differentiable.

    Args:
        counts, means, spread, columns, nonfinite, inexact: see :class:`ClassStatistics`.
        deviations: features minus the mean of their class, (N, d).
        target: class indices, (N,).
    """

    deviations: Tensor
    target: Tensor

    @classmethod
    def of(cls, features: Tensor, target: Tensor, num_classes: int) -> ClassDeviations:
        """From features (N, d) and class indices (N,), computed in the widest type of their device."""
        inexact, target = _inexact(features), target.long()
        features = features.to(state_dtype(features.device))
        counts = torch.zeros(num_classes, dtype=features.dtype, device=features.device)
        counts = counts.index_add(0, target, counts.new_ones(len(target)))

        def class_sum(rows: Tensor) -> Tensor:
            return rows.new_zeros(num_classes, *rows.shape[1:]).index_add(0, target, rows)

        size = counts.clamp(min=1).unsqueeze(1)
        means = class_sum(features) / size
        means = means + class_sum(features - means[target]) / size  # removes the rounding error of the first sum
        deviations = features - means[target]
        squares = deviations.square()
        return cls(
            counts=counts,
            means=means,
            spread=class_sum(squares.sum(dim=1)),
            columns=squares.sum(dim=0),
            nonfinite=(~features.isfinite().all(dim=1)).sum(),
            inexact=inexact,
            deviations=deviations,
            target=target,
        )

    def select(self, classes: Tensor) -> ClassDeviations:
        """Only the classes in the mask ``classes``, (K,)."""
        return replace(super().select(classes), target=(classes.cumsum(0) - 1)[self.target])

    def within(self, directions: Tensor) -> Tensor:
        """Sum over the samples of the squared deviation along each of the ``directions`` (d, r): (r,)."""
        return (self.deviations @ directions).square().sum(dim=0)

    def pooled(self) -> Tensor:
        """The within-class scatter, (d, d)."""
        return self.deviations.T @ self.deviations

    def root(self) -> Tensor:
        """Rows R with R'R = :meth:`pooled`: the deviations, or without a gradient as many rows as features at most."""
        if self.deviations.requires_grad or len(self.deviations) <= self.deviations.shape[1]:
            return self.deviations
        rows: Tensor = torch.linalg.qr(self.deviations, mode="r").R
        return rows


def _upper_blocks(side: int) -> Iterator[tuple[slice, slice]]:
    """Blocks of rows of a (side, side) matrix, each with its columns from the diagonal on."""
    for start in range(0, side, _BLOCK):
        yield slice(start, min(start + _BLOCK, side)), slice(start, side)


def _row_blocks(rows: int, width: int, values: int) -> Iterator[slice]:
    """Blocks of rows of a (rows, width) matrix, each of at most that many ``values``, but of one row at least."""
    size = max(1, values // width)
    for start in range(0, rows, size):
        yield slice(start, min(start + size, rows))


def _bits(features: Tensor) -> Tensor:
    return features.detach().view({2: torch.int16, 4: torch.int32, 8: torch.int64}[features.element_size()])


def keep_rows(features: Tensor, kept: Tensor) -> Tensor:
    """A copy in which the rows that are not ``kept``, (N,), are zero, whatever they hold."""
    bits = _bits(features)
    return (bits & -kept.to(bits).unsqueeze(1)).view(features.dtype)  # -1 has all bits; nan times zero would be nan


def _inexact(features: Tensor) -> Tensor:
    """How many of the values have more digits than bfloat16, float16 and float32 hold, (3,)."""
    bits, none = _bits(features), torch.zeros((), dtype=torch.long, device=features.device)
    excess = [_DIGITS[features.dtype] - digits for digits in list(_DIGITS.values())[:-1]]
    return torch.stack([(bits & (2**count - 1)).count_nonzero() if count > 0 else none for count in excess])


def check_batch(features: Tensor, target: Tensor, num_features: int | None = None) -> None:
    """Raise ``ValueError`` unless features are dense, floating and (B, d), and labels integers (B,). Reads no value."""
    if not isinstance(features, Tensor):
        raise ValueError(f"features must be a tensor of shape (B, d), got {type(features).__name__}")
    check_dense("features", features)
    if features.dim() != 2 or features.dtype not in _DIGITS:
        remedy = "dequantize" if features.is_quantized else "call .float()"
        remedy = remedy if features.dim() == 2 else "pool or flatten them"
        raise ValueError(
            "features must be float64, float32, float16 or bfloat16 and of shape (B, d), "
            f"got {_describe(features)}; {remedy} first"
        )
    if num_features is not None and features.shape[1] != num_features:
        raise ValueError(f"features must have num_features={num_features} columns, got {_describe(features)}")
    check_target(target)
    if len(features) != len(target):
        raise ValueError(f"features and targets must have the same length, got {len(features)} and {len(target)}")


def check_target(target: Any) -> None:
    """Raise ``ValueError`` unless labels are a dense integer tensor (B,). Reads no value."""
    if not isinstance(target, Tensor):
        raise ValueError(f"targets must be a tensor of class indices of shape (B,), got {type(target).__name__}")
    check_dense("targets", target)
    if target.dtype not in _INTEGERS or target.dim() != 1:
        column = target.dim() == 2 and target.shape[1] == 1
        remedy = "squeeze(1) them" if column else "call .long()" if target.dim() == 1 else "take the arg max"
        raise ValueError(
            f"targets must hold class indices of shape (B,), got {_describe(target)}; {remedy} first (the callback and measure "
            "take target_fn, a function from a batch to class indices)"
        )


def check_dense(name: str, tensor: Tensor) -> None:
    """Raise ``ValueError`` unless a tensor has its values in one piece of memory."""
    layout = "nested" if tensor.is_nested else "meta" if tensor.is_meta else str(tensor.layout).removeprefix("torch.")
    if layout != "strided":
        remedy = {"nested": "concatenate its parts", "meta": "give it values"}.get(layout, "call .to_dense()")
        raise ValueError(f"{name} must be a dense tensor, got a {layout} tensor; {remedy} first")


def check_labels(target: Tensor, num_classes: int, ignore_index: int | None = None) -> None:
    """Raise ``ValueError`` for labels outside [0, num_classes), other than ``ignore_index``.

    Reads the values, so it waits for the device.
    """
    target = target.long()  # a comparison would cast the number of classes to uint8
    outside = target[(target < 0) | (target >= num_classes)]
    outside = outside if ignore_index is None else outside[outside != ignore_index]
    if len(outside):
        raise ValueError(
            f"targets must lie in [0, {num_classes}), got {len(outside)} outside, for example {int(outside[0])}; "
            "check num_classes, or remove the samples without a class"
        )


def _describe(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {tuple(tensor.shape)}"
