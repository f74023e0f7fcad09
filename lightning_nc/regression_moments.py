"""Means and scatter of features and regression targets: from a batch, merged, and merged over ranks."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.linalg import vector_norm

from lightning_nc.moments import check_batch, check_dense, state_dtype

__all__ = ["RegressionMoments", "check_regression"]


@dataclass
class RegressionMoments:
    """Statistics of N samples with d features and n targets, in float64 (float32 on a device without it).

    Moments of a batch are centered on the means of that batch, and merging keeps them centered, so nothing cancels.

    Args:
        count: N, ().
        feature_mean, target_mean: (d,) and (n,).
        feature_scatter, target_scatter: sum of the outer products of the deviations from the mean, (d, d) and (n, n).
        unit_scatter: sum of the outer products of the features scaled to norm 1, (d, d). A zero feature adds nothing.
        nonfinite: number of samples with an infinity or a nan in features or targets, ().
    """

    count: Tensor
    feature_mean: Tensor
    target_mean: Tensor
    feature_scatter: Tensor
    target_scatter: Tensor
    unit_scatter: Tensor
    nonfinite: Tensor

    @classmethod
    def of(cls, features: Tensor, targets: Tensor) -> RegressionMoments:
        """From features (N, d) and targets (N, n), differentiable."""
        features, targets = (rows.to(state_dtype(features.device)) for rows in (features, targets))
        with torch.autocast(features.device.type, enabled=False):
            unit = features / vector_norm(features, dim=1, keepdim=True).clamp(min=torch.finfo(features.dtype).tiny)
            count = features.new_full((), len(features))
            feature_mean, target_mean = (rows.sum(dim=0) / count.clamp(min=1) for rows in (features, targets))
            centered, deviations = features - feature_mean, targets - target_mean
            return cls(
                count,
                feature_mean,
                target_mean,
                centered.T @ centered,
                deviations.T @ deviations,
                unit.T @ unit,
                (~(features.isfinite().all(dim=1) & targets.isfinite().all(dim=1))).sum(),
            )

    @classmethod
    def zeros(cls, num_targets: int, num_features: int, device: torch.device | str | None = None) -> RegressionMoments:
        """The moments of no samples."""
        with torch.inference_mode(False):  # so that they can be updated in place in any mode
            device = torch.empty(0, device=device).device  # for None the default
            none = torch.zeros(0, max(num_features, num_targets), dtype=state_dtype(device), device=device)
            return cls.of(none[:, :num_features], none[:, :num_targets])

    @torch.no_grad()
    def merge(self, other: RegressionMoments) -> None:
        """Add the samples of ``other``, in place; exact. ``other`` stays as it is and may be on another device.

        Raises:
            ValueError: unless both have the same n and d.
        """
        shapes = [(len(moments.target_mean), len(moments.feature_mean)) for moments in (self, other)]
        if shapes[0] != shapes[1]:
            raise ValueError(
                "moments can be merged if their number of targets and of features is the same; got "
                f"{shapes[0]} and {shapes[1]}"
            )
        count = other.count.to(self.count)
        share = count / (self.count + count).clamp(min=1)
        for kind in ("feature", "target"):
            mean, scatter = getattr(self, f"{kind}_mean"), getattr(self, f"{kind}_scatter")
            delta = getattr(other, f"{kind}_mean").to(mean) - mean
            scatter += getattr(other, f"{kind}_scatter").to(scatter)
            scatter.addr_(delta * (self.count * share), delta)
            mean += delta * share
        self.count += count
        for name in ("unit_scatter", "nonfinite"):
            getattr(self, name).add_(getattr(other, name).to(getattr(self, name)))

    @torch.no_grad()
    def merge_over_ranks(self, group: ProcessGroup | None = None) -> None:
        """Add the samples of all other ranks, in place. All ranks must call it, with the same n and d."""

        def reduce(part: Tensor) -> Tensor:
            torch.distributed.all_reduce(part, group=group)
            return part

        own = self.count.clone()
        reduce(self.count)
        for kind in ("feature", "target"):
            mean, scatter = getattr(self, f"{kind}_mean"), getattr(self, f"{kind}_scatter")
            merged = reduce(mean * own) / self.count.clamp(min=1)
            delta = mean - merged
            reduce(scatter.addr_(delta * own, delta))
            mean.copy_(merged)
        reduce(self.unit_scatter)
        reduce(self.nonfinite)


def check_regression(
    features: Tensor, targets: Tensor, num_features: int | None = None, num_targets: int | None = None
) -> Tensor:
    """The targets as (N, n); ``ValueError`` unless features are dense, floating and (N, d), and targets (N, n) or (N,)."""
    if not isinstance(targets, Tensor):
        raise ValueError(f"targets must be a tensor of shape (N, n), got {type(targets).__name__}")
    check_dense("targets", targets)
    if targets.dim() == 1:
        targets = targets.unsqueeze(1)
    if targets.dim() != 2 or targets.dtype == torch.bool or targets.is_complex() or targets.is_quantized:
        raise ValueError(
            f"targets must hold real numbers of shape (N, n), or (N,) for one target, got {targets.dtype} "
            f"{tuple(targets.shape)}"
        )
    check_batch(features, torch.zeros(len(targets), dtype=torch.long), num_features)
    if num_targets is not None and targets.shape[1] != num_targets:
        raise ValueError(f"targets must have num_targets={num_targets} columns, got {tuple(targets.shape)}")
    return targets
