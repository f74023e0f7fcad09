"""What a pass keeps of the samples: for a second look at them, for pictures, and the parts of the data for intervals."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from lightning_nc.moments import ClassMoments

__all__ = ["SHARDS", "FewOfEach", "KeptSamples", "Shards"]

SHARDS = 20
"""Parts of the data whose statistics are kept apart."""

_STATE_LIMIT = 2**32
"""Bytes that these statistics may take."""


class KeptSamples:
    """Features and labels, batch by batch, as long as they fit into ``budget`` bytes; then none at all."""

    def __init__(self, budget: float) -> None:
        self.budget, self.fits = budget, True
        self._batches: list[tuple[dict[str, Tensor], Tensor]] = []
        self._bytes = 0

    def add(self, features: Mapping[str, Tensor], target: Tensor) -> None:
        """Keep a batch, in its own precision."""
        self._bytes += sum(values.numel() * values.element_size() for values in features.values())
        if self._bytes > self.budget:
            self.drop()
        elif self.fits:
            self._batches.append(
                ({layer: values.detach().clone() for layer, values in features.items()}, target.clone())
            )

    def drop(self) -> None:
        """Keep nothing, from now on."""
        self.fits, self._batches = False, []

    def __iter__(self) -> Iterator[tuple[dict[str, Tensor], Tensor]]:
        return iter(self._batches)


class FewOfEach:
    """The first few samples of some classes, for pictures: the same ones in every pass that goes through the data in order.

    Args:
        classes: the classes; none: keep nothing.
        most: samples of each.
    """

    def __init__(self, classes: Sequence[int], most: int = 40) -> None:
        self.most = most
        self.samples: dict[int, Tensor] = {}  # (n, d) by class
        self._classes = tuple(classes)

    def add(self, features: Tensor, target: Tensor) -> None:
        """Keep what is still missing of a batch."""
        for label in self._classes:
            found = self.samples.get(label, features[:0])
            if len(found) < self.most:
                rows = features.detach()[target == label][: self.most - len(found)]
                self.samples[label] = torch.cat([found, rows])

    def missing(self) -> list[int]:
        """The classes without a sample."""
        return [label for label in self._classes if not len(self.samples.get(label, ()))]

    def merge_over_ranks(self) -> None:
        """Keep the same samples on all ranks, the first of the first rank that has any. All ranks must call it."""
        if not self._classes:
            return
        shares: list[dict[int, Tensor]] = [{}] * dist.get_world_size()
        dist.all_gather_object(shares, {label: rows.cpu() for label, rows in self.samples.items()})
        for label in self._classes:
            rows = [share[label] for share in shares if label in share]
            self.samples[label] = torch.cat(rows)[: self.most] if rows else torch.zeros(0, 0)


class Shards:
    """The statistics of parts of the data, of equal size for each class.

    Args:
        num_classes, num_features, device, scatter: see :meth:`ClassMoments.zeros`.

    Raises:
        ValueError: if they would take more than 4 GiB.
    """

    def __init__(self, num_classes: int, num_features: int, device: torch.device, scatter: bool) -> None:
        needed = SHARDS * 8 * (num_classes * num_features + scatter * num_features**2)
        if needed > _STATE_LIMIT:
            raise ValueError(
                f"intervals keep the statistics of {SHARDS} parts of the data, which would take {needed / 2**30:.1f} GiB for "
                f"{num_classes} classes and {num_features} features"
            )
        self.moments = [ClassMoments.zeros(num_classes, num_features, device, scatter) for _ in range(SHARDS)]
        first = torch.randint(SHARDS, (num_classes,), generator=torch.Generator().manual_seed(0))
        self._next = first.to(device)  # the shard of the next sample of each class

    def update(self, features: Tensor, target: Tensor) -> None:
        """Deal the samples of each class to the shards in turn. Labels outside [0, K) are left out."""
        inside = (target >= 0) & (target < len(self._next))
        features, target = features[inside], target[inside]
        order = target.argsort(stable=True)
        ordered = target[order]
        place = torch.empty_like(order)
        place[order] = torch.arange(len(order), device=order.device) - torch.searchsorted(ordered, ordered)
        shard = (self._next[target] + place) % SHARDS
        self._next.index_add_(0, target, torch.ones_like(target))
        for index, moments in enumerate(self.moments):
            rows = shard == index
            if rows.any():
                moments.update(features[rows], target[rows])

    def merge_over_ranks(self) -> None:
        """Add the samples of all other ranks, in place. All ranks must call it."""
        for moments in self.moments:
            moments.merge_over_ranks()
