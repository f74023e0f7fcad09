"""The features themselves, with their labels: what ``measure`` computes its metrics from."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from lightning_nc.keys import INPUT_NAME
from lightning_nc.measuring.batches import Pool
from lightning_nc.measuring.collector import Collector
from lightning_nc.measuring.distributed import all_raise, check_same_shapes
from lightning_nc.measuring.evaluation import every_sample_once, place, run_over
from lightning_nc.measuring.loaders import check_loader
from lightning_nc.measuring.probe import Probe, match_layers
from lightning_nc.moments import check_labels

__all__ = ["Features", "extract_features"]

_BLOCK = 2**26
"""Bytes that are sent to other ranks together."""


class Features(NamedTuple):
    """What :func:`extract_features` returns.

    Args:
        features: rows (N, d) by layer; those of the classifier's input under the key ``"classifier input"``.
        target: the class index of each row, (N,), int64.
    """

    features: dict[str, Tensor]
    target: Tensor


def extract_features(  # noqa: D417
    model: nn.Module,
    dataloader: Iterable[Any],
    *,
    layers: Sequence[str] | None = None,
    classifier: str | None = None,
    num_classes: int | None = None,
    target_fn: Callable[[Any], Tensor] | str | None = None,
    forward_fn: Callable[[nn.Module, Any], Any] | None = None,
    pool: Pool = "mean",
    device: torch.device | str | None = None,
    progress: bool = True,
    ignore_index: int = -100,
    sync: bool = True,
) -> Features:
    """The features that :func:`lightning_nc.measure` measures, and their labels, of all samples of a dataloader.

    The model runs in eval mode and is left unchanged, like the random streams. A ``DataLoader`` is not iterated itself: the
    pass uses a copy of it that visits every sample once, in the order of the data set. Features are kept on the CPU, in the
    type in which the model computes them: N d numbers for each layer.

    Args:
        model: any module; not moved to another device.
        dataloader: gives batches.
        layers, classifier, num_classes, target_fn, forward_fn, pool, ignore_index: see
            :class:`lightning_nc.NeuralCollapseCallback`. Samples or positions with the label ``ignore_index`` are left out.
            Where every position has a label, it is a row: all positions of the first sample, then of the second.
        device: where batches are moved to; by default the device of the model's first parameter.
        progress: show a progress bar, on rank 0.
        sync: in a process group, return the rows of all ranks on all ranks, those of rank 0 first; False returns each rank's
            own rows.

    Returns:
        Features by layer and labels, see :class:`Features`.

    Raises:
        LookupError, ValueError: for a classifier, layers, features or labels that cannot be found or do not fit.
        RuntimeError: if other ranks do not call it within ten minutes.

    Example:
        >>> import torch
        >>> from lightning_nc.functional import nc1
        >>> model = torch.nn.Sequential(torch.nn.Linear(5, 8), torch.nn.ReLU(), torch.nn.Linear(8, 3))
        >>> data = [(torch.randn(12, 5), torch.arange(12) % 3) for _ in range(2)]
        >>> features, target = extract_features(model, data, layers=["0"], progress=False)
        >>> {layer: tuple(rows.shape) for layer, rows in features.items()}, tuple(target.shape)
        ({'classifier input': (24, 8), '0': (24, 8)}, (24,))
        >>> value = nc1(features["classifier input"], target)
    """
    check_loader(dataloader)
    probe = Probe(layers, classifier, num_classes, target_fn, forward_fn, pool, ignore_index=ignore_index)
    match_layers(model, layers or ())  # a name that is not there raises
    on, progress, ranks = place(model, device, progress, sync, "extract_features")
    collector = _RowCollector(probe)
    try:
        run_over(collector, model, lambda: every_sample_once(dataloader), on, progress, ranks)
    finally:
        probe.detach()
    return Features({layer or INPUT_NAME: rows for layer, rows in collector.rows.items()}, collector.target)


class _RowCollector(Collector):
    """Keeps the features of a pass, where a :class:`Collector` updates metrics with them."""

    def __init__(self, probe: Probe) -> None:
        super().__init__(probe, ())
        self.rows: dict[str, Tensor] = {}
        self.target = torch.zeros(0, dtype=torch.long)
        self._rows: dict[str, list[Tensor]] = {}
        self._targets: list[Tensor] = []

    def prepare(self, device: torch.device) -> None:
        """There is nothing to prepare."""

    def update(self, own: int | None = None) -> None:
        """Keep the features that the probe recorded."""
        features, target = self.probe.features()
        target = target.flatten().cpu().long()
        kept = target != self.probe.ignore_index
        check_labels(target[kept], self.probe.classes)
        self._targets.append(target[kept])
        for layer in self._rows.keys() - features:  # left out since this batch
            del self._rows[layer]
        for layer, values in features.items():
            parts = self._rows.setdefault(layer, [])
            if parts and parts[0].shape[1] != values.shape[1]:
                raise ValueError(
                    f"features must have {parts[0].shape[1]} columns as in the first batch, got {values.shape[1]}; inputs of "
                    "varying size need pool='mean' or a callable"
                )
            parts.append(values.cpu()[kept])

    def synchronize(self, ranks: torch.device | None) -> bool:
        """Concatenate the batches, and the rows of all ranks; True when done. Raise what went wrong."""
        all_raise(self.error, ranks)
        self.target = torch.cat(self._targets)
        self.rows = {layer: torch.cat(self._rows.pop(layer)) for layer in list(self._rows)}
        if ranks is not None:
            check_same_shapes({layer: (rows.shape[1], rows.dtype) for layer, rows in self.rows.items()}, ranks)
            counts = torch.zeros(dist.get_world_size(), dtype=torch.long, device=ranks)
            counts[dist.get_rank()] = len(self.target)
            dist.all_reduce(counts)
            self.target = _gathered(self.target, counts.tolist(), ranks)
            self.rows = {layer: _gathered(rows, counts.tolist(), ranks) for layer, rows in self.rows.items()}
        return True

    def look_again(self, ranks: torch.device | None, second_pass: bool) -> bool:
        """No sample must be seen again."""
        return False


def _gathered(rows: Tensor, counts: Sequence[int], ranks: torch.device) -> Tensor:
    """The rows of all ranks, in their order, which have that many each; sent through the device ``ranks``."""
    gathered = rows.new_empty(sum(counts), *rows.shape[1:])
    for source, part in enumerate(gathered.split(list(counts))):
        if source == dist.get_rank():
            part.copy_(rows)
        for block in part.view(-1).view(torch.uint8).split(_BLOCK):
            sent = block.to(ranks)
            dist.broadcast(sent, src=source)
            block.copy_(sent)
    return gathered
