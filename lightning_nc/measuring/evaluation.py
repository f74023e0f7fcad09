"""The pass over a dataloader; ``measure``."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import nullcontext
from itertools import chain
from typing import Any

import torch
import torch.distributed as dist
from lightning.fabric.utilities import move_data_to_device
from lightning.fabric.utilities.data import sized_len
from torch import Tensor, nn
from torch.utils.data import DataLoader
from tqdm import tqdm

from lightning_nc.functional.table import check_metrics
from lightning_nc.measuring.batches import Pool, copy_batch
from lightning_nc.measuring.collector import FEATURE_BUDGET, Collector, Options
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
from lightning_nc.measuring.measurement import Measurement, measurement
from lightning_nc.measuring.probe import Probe, match_layers
from lightning_nc.measuring.snapshot import evaluation_mode

__all__ = [
    "MappedBatches",
    "every_sample_once",
    "exact_pass",
    "measure",
    "names_to_measure",
    "place",
    "run_over",
]


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
    reference: Iterable[Any] | None = None,
    baseline: bool = False,
    intervals: float | None = None,
    ood_dataloader: Iterable[Any] | None = None,
    feature_budget: float = FEATURE_BUDGET,
    pairs: float | None = None,
) -> Measurement:
    """Measure a model on all samples of a dataloader, in eval mode, and leave the model and the random streams unchanged.

    A ``DataLoader`` is not iterated itself: the pass uses a copy of it that visits every sample once, in order. Where
    ``torch.distributed`` is initialized, all ranks call ``measure``, each with its share of the data.

    Args:
        model: any module; not moved to another device.
        dataloader: gives batches.
        layers, classifier, num_classes, metrics, target_fn, forward_fn, pool: see
            :class:`lightning_nc.NeuralCollapseCallback`. The keys of a layer are ``"<layer>/<metric>"``.
        ignore_index, ood_dataloader, feature_budget, pairs: likewise.
        device: where batches are moved to; by default the device of the model's first parameter.
        progress: show a progress bar, on rank 0.
        sync: in a process group, return the values of all ranks together, on all ranks; False measures each rank's own data.
        reference: the training data, if ``dataloader`` gives held-out samples. The model runs on them first, and their class
            means are the centers: ``nc4`` and ``ncc_error`` compare samples with them, and ``nc1_train_means`` and its kin stand
            beside the values around the samples' own class means.
        baseline: also give what chance alone would give, in ``.baseline``.
        intervals: the level, such as 0.95, of confidence intervals, in ``.intervals``.

    Returns:
        The metrics by key, each a float without unit; nan where a metric is not defined. See :class:`Measurement`.

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
    for loader in (dataloader, reference, ood_dataloader):
        check_loader(loader)
    if intervals is not None and not 0 < intervals < 1:
        raise ValueError(f"intervals must be a level between 0 and 1, such as 0.95, got {intervals!r}")
    probe = Probe(layers, classifier, num_classes, target_fn, forward_fn, pool, ignore_index=ignore_index, pairs=pairs)
    names = names_to_measure(metrics, ood_dataloader)
    match_layers(model, layers or ())  # a name that is not there raises
    on, progress, ranks = place(model, device, progress, sync, "measure")

    def collect(
        data: Iterable[Any], names: Sequence[str], options: Options, ood: Iterable[Any] | None = None
    ) -> Collector:
        collector = Collector(probe, names, options)
        run_over(collector, model, lambda: every_sample_once(data), on, progress, ranks, ood)
        return collector

    try:
        centers = None if reference is None else collect(reference, ["nc1_trace"], Options()).centers()
        options = Options(centers, feature_budget, baseline, intervals is not None, keep_weight=True)
        return measurement(collect(dataloader, names, options, ood_dataloader), intervals)
    finally:
        probe.detach()


def place(
    model: nn.Module, device: torch.device | str | None, progress: bool, sync: bool, caller: str
) -> tuple[torch.device, bool, torch.device | None]:
    """Where batches go, whether this rank shows progress, and the device of the collectives if the ranks measure together.

    In the last case, waits for the other ranks to come to ``caller``.
    """
    on = torch.device(device or next((parameter.device for parameter in model.parameters()), "cpu"))
    several = ranks_on(on)
    if sync and several is not None:
        meet(caller)
    return on, progress and (several is None or not dist.get_rank()), several if sync else None


def names_to_measure(metrics: str | Sequence[str], ood_dataloader: Iterable[Any] | None) -> tuple[str, ...]:
    """The names of the metrics, checked; ``nc5`` among them if there are data for it, and only then."""
    names = check_metrics(metrics)
    if ood_dataloader is None and "nc5" in names:
        raise ValueError("nc5 compares the class means with data of no class; pass ood_dataloader=")
    return names if ood_dataloader is None else tuple(dict.fromkeys((*names, "nc5")))


def run_over(
    collector: Collector,
    model: nn.Module,
    load: Callable[[], tuple[Iterable[Any], int | None]],
    device: torch.device,
    progress: bool,
    ranks: torch.device | None,
    ood: Iterable[Any] | None = None,
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
        ood: data of no class.
    """
    warn = collector.probe.warn_once

    def moved(batches: Iterable[Any]) -> MappedBatches:
        return MappedBatches(batches, lambda batch: move_data_to_device(batch, device))

    with evaluation_mode(model, device, warn):
        try:
            loader, total = load()
        except Exception as error:  # the pass tells the other ranks
            loader, total = _raising(error), None
        with (
            warn_if_moved(loader, warn),
            tqdm(loader, "Neural collapse", total, leave=False, disable=not progress) as bar,
        ):
            others = None if ood is None else every_sample_once(ood)
            others = others and (moved(others[0]), others[1])
            exact_pass(collector, model, moved(bar), ranks=ranks, steps=total or 0, ood=others)


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


def exact_pass(
    collector: Collector,
    model: nn.Module,
    batches: Iterable[Any],
    forward_context: Any = nullcontext,
    ranks: torch.device | None = None,
    steps: int = 0,
    ood: tuple[Iterable[Any], int | None] | None = None,
) -> None:
    """Run ``model`` over ``batches`` and collect; run it twice if the samples must be seen again and cannot be kept.

    Args:
        collector: collects the features; its probe is attached on the first batch.
        model: in eval mode, without gradients.
        batches: on the device of the model.
        forward_context: makes a context for each run of the model.
        ranks: in a distributed run, the device of its collectives. All ranks use the buffers of the first rank, and if one
            rank fails, all raise.
        steps: in a distributed run, the number of batches on this rank. The model runs equally often on all ranks, on the
            first batch again if need be, since it may hold collectives.
        ood: batches of no class, and their number if it is known.
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
    if ood is not None:
        others, count = ood
        if ranks is not None and count is None:
            others = list(others)
            count = len(others)
        most = 0 if ranks is None else int(all_max(count or 0, ranks))
        _run_all(collector, run, others, spare, most, ood=True)
    collector.synchronize(ranks)
    if collector.look_again(ranks, second_pass=True):
        _run_all(collector, run, batches, spare, steps)
        collector.synchronize(ranks)


def _run_all(
    collector: Collector,
    run: Callable[[Any], None],
    batches: Iterable[Any],
    spare: Any,
    steps: int,
    ood: bool = False,
) -> None:
    """Run the model on all batches and collect; an error is kept in the collector, and the remaining steps are taken."""
    taken = 0
    start, update = (
        (collector.probe.start_unlabeled, collector.update_ood) if ood else (collector.probe.start, collector.update)
    )
    try:
        for batch in batches:
            start(batch)
            taken += 1
            run(batch)
            update()
            collector.batches += not ood
        if not taken:
            raise LookupError(
                "the ood_dataloader gave no batch"
                if ood
                else "the dataloader gave no batch the second time; some metrics take two passes over the data, and a generator "
                "gives its batches only once"
            )
    except Exception as error:
        collector.error = collector.error or error
    try:
        for _ in range(taken, steps):
            run(copy_batch(spare))
    except Exception as error:
        collector.error = collector.error or error
