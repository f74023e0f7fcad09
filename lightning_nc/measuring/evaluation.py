"""The pass over a dataloader, and the collector that it shares with running loops; ``measure``."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from itertools import chain
from typing import Any

import torch
import torch.distributed as dist
from lightning.fabric.utilities import move_data_to_device, rank_zero_info
from lightning.fabric.utilities.data import sized_len
from torch import Tensor, nn
from torch.utils.data import DataLoader
from tqdm import tqdm

from lightning_nc.functional import METRICS
from lightning_nc.functional.table import check_metrics
from lightning_nc.keys import ERROR, make_key
from lightning_nc.measuring.batches import Pool, copy_batch
from lightning_nc.measuring.distributed import (
    all_max,
    all_raise,
    broadcast_buffers,
    check_same_shapes,
    meet,
    ranks_on,
)
from lightning_nc.measuring.loaders import (
    check_loader,
    has_own_iteration,
    measurement_loader,
    rank_of,
    unprepared,
    warn_if_moved,
)
from lightning_nc.measuring.probe import INPUT, NotCalledError, Probe, match_layers
from lightning_nc.measuring.snapshot import evaluation_mode
from lightning_nc.metrics import NeuralCollapse

__all__ = ["SCATTER_LIMIT", "Collector", "MappedBatches", "every_sample_once", "exact_pass", "measure", "run_over"]

SCATTER_LIMIT = 2**30
"""Bytes that the scatter matrices of all layers may take together; features beyond it need a second pass."""


def measure(  # noqa: D417
    model: nn.Module,
    dataloader: Iterable[Any],
    *,
    layers: Sequence[str] | None = None,
    classifier: str | None = None,
    num_classes: int | None = None,
    metrics: str | Sequence[str] = "paper",
    target_fn: Callable[[Any], Tensor] | str | None = None,
    forward_fn: Callable[[nn.Module, Any], Any] | None = None,
    pool: Pool = "mean",
    device: torch.device | str | None = None,
    progress: bool = True,
    ignore_index: int = -100,
    sync: bool = True,
    pairs: float | None = None,
) -> dict[str, float]:
    """Measure a model on all samples of a dataloader, in eval mode, and leave the model and the random streams unchanged.

    A ``DataLoader`` is not iterated itself: the pass uses a copy of it that visits every sample once, in order. Where
    ``torch.distributed`` is initialized, all ranks call ``measure``, each with its share of the data.

    Args:
        model: any module; not moved to another device.
        dataloader: gives batches.
        layers, classifier, num_classes, metrics, target_fn, forward_fn, pool, ignore_index, pairs: see
            :class:`lightning_nc.NeuralCollapseCallback`. The keys of a layer are ``"<layer>/<metric>"``.
        device: where batches are moved to; by default the device of the model's first parameter.
        progress: show a progress bar, on rank 0.
        sync: in a process group, return the values of all ranks together, on all ranks; False measures each rank's own data.

    Returns:
        The metrics by key, each a float without unit; nan where a metric is not defined.

    Raises:
        LookupError, ValueError: for a classifier, layers, features or labels that cannot be found or do not fit.
        RuntimeError: if other ranks do not call ``measure`` within ten minutes.

    Example:
        >>> import torch
        >>> data = [(torch.eye(3).repeat(4, 1), torch.arange(3).repeat(4))]
        >>> values = measure(torch.nn.Linear(3, 3), data, metrics=("nc1", "nc2_of"), progress=False)
        >>> {name: round(value, 6) for name, value in values.items()}
        {'nc1': 0.0, 'nc2_of': 0.0}
    """
    check_loader(dataloader)
    probe = Probe(layers, classifier, num_classes, target_fn, forward_fn, pool, ignore_index=ignore_index, pairs=pairs)
    collector = Collector(probe, check_metrics(metrics))
    on = torch.device(device or next((parameter.device for parameter in model.parameters()), "cpu"))
    return _measure(collector, model, dataloader, on, progress, sync)


def _measure(
    collector: Collector, model: nn.Module, dataloader: Iterable[Any], on: torch.device, progress: bool, sync: bool
) -> dict[str, float]:
    match_layers(model, collector.probe.layers or ())  # a name that is not there raises
    ranks = ranks_on(on) if sync else None
    progress = progress and (ranks_on(on) is None or not dist.get_rank())
    if ranks is not None:
        meet()
    try:
        run_over(collector, model, lambda: every_sample_once(dataloader), on, progress, ranks)
        return collector.values()
    finally:
        collector.probe.detach()


def run_over(
    collector: Collector,
    model: nn.Module,
    load: Callable[[], tuple[Iterable[Any], int | None]],
    device: torch.device,
    progress: bool,
    ranks: torch.device | None,
) -> None:
    """Run a model over data in eval mode, with a progress bar, and collect.

    Args:
        collector: collects the features.
        model: any module, on ``device``.
        load: returns the batches, and their number if it is known. A sampler may draw from the random streams, which are
            restored.
        device: where batches are moved to.
        progress: show the bar.
        ranks: in a distributed run, the device of its collectives.
    """
    warn = collector.probe.warn_once
    with evaluation_mode(model, device, warn):
        try:
            loader, total = load()
        except Exception as error:  # the pass tells the other ranks
            loader, total = _raising(error), None
        with (
            warn_if_moved(loader, warn),
            tqdm(loader, "Neural collapse", total, leave=False, disable=not progress) as bar,
        ):
            batches = MappedBatches(bar, lambda batch: move_data_to_device(batch, device))
            exact_pass(collector, model, batches, ranks=ranks, steps=total or 0)


def every_sample_once(dataloader: Iterable[Any], rank: int = 0, ranks: int = 1) -> tuple[Iterable[Any], int | None]:
    """A copy of a ``DataLoader`` that visits every sample once, or else the loader itself; and its number of batches.

    The data of a loader that does not share them itself are shared by ``ranks``.
    """
    loader = unprepared(dataloader)
    if isinstance(loader, DataLoader) and not has_own_iteration(loader):
        own = rank_of(loader)
        return measurement_loader(dataloader, None, *(own if own[1] > 1 else (rank, ranks)))
    return dataloader, sized_len(dataloader)


def _raising(error: Exception) -> Iterator[Any]:
    raise error
    yield


class MappedBatches:
    """The batches of a dataloader, each passed through ``function``; can be iterated as often as the dataloader."""

    def __init__(self, loader: Iterable[Any], function: Callable[[Any], Any]) -> None:
        self.loader, self.function = loader, function

    def __iter__(self) -> Iterator[Any]:
        return map(self.function, self.loader)


class Collector:
    """The metrics of one dataloader by layer, updated batch by batch.

    In a running loop nothing is raised before :meth:`synchronize`, where all ranks of a distributed run meet.

    Args:
        probe: what to measure of a batch.
        names: the names of the metrics.
        keep_weight: use the classifier's weight as it is at the first batch, because it is replaced before :meth:`values`:
            averaged weights are swapped out at the end of validation.
    """

    def __init__(self, probe: Probe, names: Sequence[str], keep_weight: bool = False) -> None:
        self.probe, self.names, self.keep_weight = probe, names, keep_weight
        self.metrics: dict[str, NeuralCollapse] = {}
        self.projected: dict[str, NeuralCollapse] = {}  # NC1 of features that are too wide for a scatter matrix
        self.spans: dict[str, Tensor] = {}
        self.batches = self.samples = 0
        self.error: Exception | None = None
        self._missed: NotCalledError | None = None  # a step may leave the model out; an error only if all do

    def start(self, batch: Any, attach: Callable[[], None]) -> None:
        """Before the model runs on a batch; ``attach`` attaches the probe if it is not attached yet."""
        if self.error is None:
            try:
                attach()
                self.probe.start(batch)
            except Exception as error:
                self.error = error

    def finish(self, own: int | None = None) -> None:
        """After the model ran; of a padded dataloader only the first ``own`` samples in all belong to this rank."""
        if self.error is None:
            try:
                self.update(own)
                self.batches += 1
            except NotCalledError as error:
                self._missed = error
            except Exception as error:
                self.error = error

    def update(self, own: int | None = None) -> None:
        """Update the metrics with the features that the probe recorded."""
        features, target = self.probe.features()
        for layer in [layer for layer in self.metrics if layer not in features]:  # left out since this batch
            self.metrics.pop(layer), self.spans.pop(layer, None), self.projected.pop(layer, None)
        own = None if own is None else max(own - self.samples, 0)
        target = target[:own]
        rows, self.samples, target = slice(target.numel()), self.samples + len(target), target.flatten()
        for layer, values in features.items():
            labels = target.to(
                values.device
            )  # a target_fn may look them up elsewhere, and a model may span several devices
            if self.spans:
                if layer in self.spans:
                    self.projected[layer].update(values[rows].to(self.spans[layer].dtype) @ self.spans[layer], labels)
            elif (metric := self._metric(layer, values.shape[1], values.device)) is not None:
                if metric.num_features != values.shape[1]:
                    raise ValueError(
                        f"features must have {metric.num_features} columns as in the first batch, got {values.shape[1]}; inputs "
                        "of varying size need pool='mean' or a callable"
                    )
                metric.update(values[rows], labels)

    def prepare(self, device: torch.device) -> None:
        """Create the metrics, so that a rank without samples has them too."""
        for layer, width in self.probe.widths.items():
            if width:
                self._metric(layer, width, device)

    def synchronize(self, ranks: torch.device | None) -> bool:
        """Merge over the ranks, whose collectives are on the device ``ranks``; True when done. Raise what went wrong."""
        all_raise(self.error or (None if self.batches else self._missed), ranks)
        if ranks is not None:
            metrics = self.projected or self.metrics
            check_same_shapes({layer: metric.num_features for layer, metric in metrics.items()}, ranks)
            for metric in metrics.values():
                metric.merge_over_ranks()
        return True

    def project(self, ranks: torch.device | None) -> bool:
        """Prepare a second pass, for the NC1 of features that are too wide; False if none are.

        NC1 does not change when the features are projected on the span of the class means.
        """
        for layer in self.too_wide():
            span = self.metrics[layer].span()
            if not span.shape[1]:  # all class means coincide: nc1 is nan, as it is for features that are not wide
                span = span.new_zeros(len(span), 1)
            if ranks is not None:
                dist.broadcast(span, src=0)
            self.spans[layer] = span
            self.projected[layer] = self._create(span.shape[1], ["nc1"], span.device)
        if self.spans and self.probe.is_new("two passes"):
            sizes = [f"{layer or 'classifier input'} {width}" for layer, width in self.too_wide().items()]
            named = ", ".join(sizes[:5]) + f" and {len(sizes) - 5} more" * (len(sizes) > 5)
            rank_zero_info(
                f"neural collapse: the features of {named} would need scatter matrices of more than {SCATTER_LIMIT / 2**30:g} "
                "GiB together, so their nc1 takes a second pass over the data; fewer layers or pool='mean' avoid it"
            )
        return bool(self.spans)

    def too_wide(self) -> dict[str, int]:
        """The layers, with the widths of their features, whose NC1 needs a second pass."""
        wanted = any(METRICS[name].scatter for name in self.names)
        return {
            layer: metric.num_features
            for layer, metric in self.metrics.items()
            if wanted and not any(METRICS[name].scatter for name in metric.metrics)
        }

    def values(self, stage: str | None = None, loader: int = 0) -> dict[str, float]:
        """The values by key, see :func:`make_key`; those that need the classifier's weight for its input alone."""
        if wide := self.too_wide().keys() - self.projected.keys():
            self.probe.warn_once(
                "wide",
                f"nc1 of {', '.join(layer or 'the classifier input' for layer in wide)} is left out: features this wide need a "
                "second pass, which only mode='exact' makes, on the training data. Fewer layers or pool='mean' avoid it",
            )
        values: dict[str, float] = {}
        for layer in self.metrics:
            with self._naming(layer, stage):
                computed = {**self.metrics[layer].compute()}
                computed |= self.projected[layer].compute() if layer in self.projected else {}
            kept = [name for name in computed if name.removesuffix(ERROR) in self.names]
            values |= {make_key(name, layer, stage, loader): float(computed[name]) for name in kept}
        if not values:
            raise LookupError(
                f"nothing can be measured: {', '.join(self.names)} need the weight or bias of a classifier"
            )
        return values

    @contextmanager
    def _naming(self, layer: str, stage: str | None) -> Iterator[None]:
        """Let the warnings of a metric name its layer and stage, and appear once in a run."""
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            yield
        where = (f"layer {layer!r}" if layer else "classifier's input") + (f", stage {stage!r}" if stage else "")
        for warning in caught:
            self.probe.warn_once(f"{where}: {warning.message}", f"{where}: {warning.message}")

    def class_means(self) -> tuple[Tensor, list[int]] | None:
        """The means of the classifier's input, (K, d), of the classes that have samples; and these classes."""
        if INPUT not in self.metrics:
            return None
        seen = self.metrics[INPUT].counts > 0
        return self.metrics[INPUT].means[seen].cpu(), seen.nonzero().flatten().tolist()

    def _metric(self, layer: str, width: int, device: torch.device) -> NeuralCollapse | None:
        if layer in self.metrics:
            return self.metrics[layer]
        weight, bias = self._parts() if layer == INPUT else (None, None)
        given = {part for part, tensor in (("weight", weight), ("bias", bias)) if tensor is not None}
        names = [name for name in self.names if given.issuperset(METRICS[name].needs)]
        if not names:
            return None
        taken = sum(8 * m.num_features**2 for m in self.metrics.values() if any(METRICS[n].scatter for n in m.metrics))
        if 8 * width**2 > SCATTER_LIMIT - taken and self.probe.classes < width:  # else a projection gains nothing
            names = [name for name in names if not METRICS[name].scatter] or ["nc1_trace"]  # for its class means
        self.metrics[layer] = self._create(
            width, names, device, weight=self._source(0, weight), bias=self._source(1, bias)
        )
        return self.metrics[layer]

    def _create(self, width: int, names: Sequence[str], device: torch.device, **parts: Any) -> NeuralCollapse:
        with torch.device(device):
            return NeuralCollapse(
                self.probe.classes,
                width,
                metrics=names,
                ignore_index=int(self.probe.ignore_index),
                pairs=self.probe.pairs,
                sync_on_compute=False,
                **parts,
            )

    def _source(self, part: int, tensor: Tensor | None) -> Any:
        """Where a metric reads the classifier's weight (0) or bias (1), ``tensor`` now."""
        head = self.probe.head
        if tensor is None or head is None:
            return None
        return tensor.clone() if self.keep_weight else lambda: head.parts()[part]

    def _parts(self) -> tuple[Tensor | None, Tensor | None]:
        """Weight and bias of the classifier; says once which metrics are left out without them."""
        head = self.probe.head
        weight, bias = (None, None) if head is None else head.parts()
        part = "weight" if weight is None else "bias"
        missing = [name for name in self.names if part in METRICS[name].needs]
        if head is not None and bias is None and missing:
            reason = (
                "does not compute x W' + b with a weight that it shows (a cosine head, for example), or cannot be called alone"
                if weight is None
                else "has no bias"
            )
            self.probe.warn_once(
                "parts",
                f"{', '.join(missing)} left out: the classifier {head.name!r}, a {type(head.module).__name__}, {reason}",
            )
        return weight, bias


def exact_pass(
    collector: Collector,
    model: nn.Module,
    batches: Iterable[Any],
    forward_context: Any = nullcontext,
    ranks: torch.device | None = None,
    steps: int = 0,
) -> None:
    """Run ``model`` over ``batches`` and collect; run it twice if features are too wide for a scatter matrix.

    Args:
        collector: collects the features; its probe is attached on the first batch.
        model: in eval mode, without gradients.
        batches: on the device of the model.
        forward_context: makes a context for each run of the model.
        ranks: in a distributed run, the device of its collectives. All ranks use the buffers of the first rank, and if one
            rank fails, all raise.
        steps: in a distributed run, the number of batches on this rank. The model runs equally often on all ranks, on the
            first batch again if need be, since it may hold collectives.
    """
    probe, error, spare, taken = collector.probe, None, None, batches
    try:
        iterator = iter(batches)
        first = next(iterator, None)
        if first is None:
            raise LookupError("the dataloader gave no batch, so there is nothing to measure")
        spare, taken = None if ranks is None else copy_batch(first), chain([first], iterator)
        probe.attach(model, first, forward_context)
        if ranks is not None:
            collector.prepare(ranks)
    except Exception as caught:
        error = caught
    all_raise(error, ranks)
    if ranks is not None:
        check_same_shapes(probe.widths, ranks)
        broadcast_buffers(model, ranks)
    steps = 0 if ranks is None else int(all_max(steps, ranks))

    def run(batch: Any) -> None:
        with forward_context():
            probe.forward(model, batch)

    _run_all(collector, run, taken, spare, steps)
    collector.synchronize(ranks)
    if collector.project(ranks):
        _run_all(collector, run, batches, spare, steps)
        collector.synchronize(ranks)


def _run_all(collector: Collector, run: Callable[[Any], None], batches: Iterable[Any], spare: Any, steps: int) -> None:
    """Run the model on all batches and collect; an error is kept in the collector, and the remaining steps are taken."""
    taken = 0
    try:
        for batch in batches:
            collector.probe.start(batch)
            taken += 1
            run(batch)
            collector.update()
            collector.batches += 1
        if not taken:
            raise LookupError(
                "the dataloader gave no batch the second time; features too wide for a scatter matrix take two passes, and a "
                "generator gives its batches only once"
            )
    except Exception as error:
        collector.error = error
    try:
        for _ in range(taken, steps):
            run(copy_batch(spare))
    except Exception as error:
        collector.error = collector.error or error
