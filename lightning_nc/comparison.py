"""How samples compare with class means that are known already: which mean is nearest, and how they vary toward the others."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.linalg import vector_norm

from lightning_nc.moments import ClassDeviations, keep_rows

__all__ = ["Centers", "Comparison", "pair_scale"]

_BLOCK = 2**22
"""Numbers that are processed together."""


class Centers(NamedTuple):
    """What samples are compared with.

    Args:
        means: class means, (K, d).
        seen: which classes have a mean, (K,).
        weight, bias: those of the classifier, (K, d) and (K,), if there is one.
    """

    means: Tensor
    seen: Tensor
    weight: Tensor | None = None
    bias: Tensor | None = None


def pair_scale(left: Tensor, right: Tensor) -> Tensor:
    """The sum of the norms of each row of ``left`` (B, d) and ``right`` (K, d), (B, K): fourth powers would leave the range."""
    norms: Tensor = vector_norm(left, dim=1, keepdim=True) + vector_norm(right, dim=1)
    return norms.clamp(min=torch.finfo(norms.dtype).tiny ** 0.5)


@dataclass
class Comparison:
    """What a look at the samples shows once the class means are known. It takes O(K) memory, and O(K^2) with ``along``.

    Args:
        compared: samples per class, (K,).
        misplaced: those of them whose nearest class mean is that of another class, (K,).
        disagreeing: those of them whose nearest class mean is not the decision of the classifier, (K,).
        along: sum over the samples of class i of the squared product of their deviation and the difference of the class
            means i and j, both in units of :func:`pair_scale`, (K, K). Of shape (0, 0) if it is not kept.
    """

    compared: Tensor
    misplaced: Tensor
    disagreeing: Tensor
    along: Tensor

    @classmethod
    def zeros(cls, num_classes: int, like: Tensor, along: bool) -> Comparison:
        """The comparison of no samples, on the device and in the type of ``like``."""
        with torch.inference_mode(False):
            side = num_classes if along else 0
            one = like.new_zeros(num_classes)
            return cls(one, one.clone(), one.clone(), like.new_zeros(side, side))

    @classmethod
    def of(cls, moments: ClassDeviations, weight: Tensor | None, bias: Tensor | None) -> Comparison:
        """The comparison of all features at hand with their own class means, each class of which has a sample."""
        means = moments.means.detach()
        found = cls.zeros(len(means), means, along=True)
        features = moments.deviations.detach() + means[moments.target]
        found.update(features, moments.target, Centers(means, moments.counts > 0, weight, bias))
        return found

    def update(self, features: Tensor, target: Tensor, centers: Centers, ignore_index: int | None = None) -> None:
        """Add a batch, in place, without waiting for the device.

        Args:
            features: (B, d), floating.
            target: class indices, (B,). Labels outside [0, K) and of classes without a mean are not counted.
            centers: what to compare them with.
            ignore_index: samples with this label are not counted.
        """
        means, seen = centers.means, centers.seen
        size = max(1, _BLOCK // (means.shape[1] + len(means)))
        with torch.inference_mode(False), torch.no_grad(), torch.autocast(features.device.type, enabled=False):
            weight = None if centers.weight is None else centers.weight.to(means)
            bias = means.new_zeros(len(means)) if centers.bias is None else centers.bias.to(means)
            offset = (means * seen.unsqueeze(1)).sum(dim=0) / seen.sum()
            centered = means - offset
            half = (centered.square().sum(dim=1) / 2).masked_fill(~seen, torch.inf)
            for rows, labels in zip(features.split(size), target.long().split(size), strict=True):
                kept = (labels >= 0) & (labels < len(means))
                kept = kept if ignore_index is None else kept & (labels != ignore_index)
                labels = labels.clamp(0, len(means) - 1)
                kept = kept & seen[labels]
                rows = keep_rows(rows, kept).to(means.dtype)
                nearest = (half - (rows - offset) @ centered.T).argmin(dim=1)
                self.compared.index_add_(0, labels, kept.to(half))
                self.misplaced.index_add_(0, labels, (kept & (nearest != labels)).to(half))
                if weight is not None:
                    decision = (rows @ weight.T + bias).masked_fill(~seen, -torch.inf).argmax(dim=1)
                    self.disagreeing.index_add_(0, labels, (kept & (nearest != decision)).to(half))
                if len(self.along):
                    deviations = (rows - means[labels]) * kept.unsqueeze(1)
                    own = (deviations * centered[labels]).sum(dim=1, keepdim=True)
                    products = (deviations @ centered.T - own) / pair_scale(means[labels], means).square()
                    self.along.index_add_(0, labels, products.square())

    def merge(self, other: Comparison) -> None:
        """Add the samples of ``other``, compared with the same class means, in place."""
        for part in fields(self):
            getattr(self, part.name).add_(getattr(other, part.name).to(self.compared))

    def merge_over_ranks(self, group: ProcessGroup | None = None) -> None:
        """Add the samples of all other ranks, in place. All ranks must call it."""
        for part in fields(self):
            dist.all_reduce(getattr(self, part.name), group=group)

    def select(self, classes: Tensor) -> Comparison:
        """Only the classes in the mask ``classes``, (K,)."""
        along = self.along[classes][:, classes] if len(self.along) else self.along
        return Comparison(self.compared[classes], self.misplaced[classes], self.disagreeing[classes], along)
