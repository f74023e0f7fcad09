"""What a pass keeps of the samples for a second look at them, and the parts of the data for intervals."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from lightning_nc.moments import ClassMoments

__all__ = ["SHARDS", "KeptSamples", "Shards"]

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
