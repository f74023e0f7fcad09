"""The samples of a training loader, each once and in order, without touching the loader itself."""

from __future__ import annotations

import numbers
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from copy import deepcopy
from itertools import chain, islice
from typing import Any

import torch
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    DistributedSampler,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
    WeightedRandomSampler,
)

__all__ = [
    "check_loader",
    "has_own_iteration",
    "is_distributed",
    "measurement_loader",
    "own_samples",
    "rank_of",
    "unprepared",
    "warn_if_moved",
]


def measurement_loader(
    loader: Any, max_batches: int | None = None, rank: int = 0, world_size: int = 1
) -> tuple[Iterable[Any], int | None]:
    """A loader over the samples of a training loader, each once and in order, and its number of batches if known.

    The training loader itself is never iterated: with persistent workers, or a generator of its own, that would change
    the training. ``max_batches`` takes a fixed random choice of samples, since the first ones of sorted data would miss
    classes; the first ones where training itself sees no others. A loader that Accelerate or Fabric has prepared is copied
    without its wrapper, which shares out the samples among the ranks and repeats some of them to fill the last batches.

    Raises:
        LookupError: for a loader that cannot be copied.
    """
    _check_prepared(loader)
    loader = unprepared(loader)
    if not isinstance(loader, DataLoader):
        raise LookupError(
            f"the training data come from a {type(loader).__name__}, and which of its samples to measure is unclear; pass "
            "dataloader=, a DataLoader to measure on"
        )
    if has_own_iteration(loader):
        raise LookupError(
            f"the training data come from a {type(loader).__name__} that makes batches in a way of its own, which a copy may not "
            "have; pass dataloader=, anything that gives the batches to measure on"
        )
    copied: dict[str, Any] = {
        "num_workers": loader.num_workers,
        "collate_fn": loader.collate_fn,
        "pin_memory": loader.pin_memory,
        "timeout": loader.timeout,
        "worker_init_fn": loader.worker_init_fn,
        "multiprocessing_context": loader.multiprocessing_context,
        "generator": torch.Generator().manual_seed(0),
    }
    if loader.num_workers:
        copied["prefetch_factor"] = loader.prefetch_factor
    if isinstance(loader.dataset, IterableDataset):
        return _First(DataLoader(loader.dataset, batch_size=loader.batch_size, **copied), max_batches), max_batches
    sampler = _sampler(loader)
    indices, batch_size = _indices(loader, sampler, max_batches)
    size = (max_batches or 0) * (batch_size or 1) * world_size
    if max_batches is not None and size < len(indices):
        order = torch.arange(len(indices))
        if not isinstance(sampler, SequentialSampler):  # that one trains on the first samples, no others
            order = torch.randperm(len(indices), generator=torch.Generator().manual_seed(0))
        indices = [indices[i] for i in order[:size].tolist()]
    indices = indices[rank::world_size]
    clone = _Every(loader.dataset, batch_size=batch_size, sampler=indices, **copied)
    return clone, len(clone)


class _Every(DataLoader[Any]):
    """All batches of a loader, or an error: a ``StopIteration`` that its data set raises would end a loop early, in silence."""

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        count = 0
        for count, batch in enumerate(super().__iter__(), start=1):  # noqa: B007
            yield batch
        if count < len(self):
            raise RuntimeError(
                f"the data ended after {count} of {len(self)} batches: the data set {type(self.dataset).__name__} or its "
                "collate_fn raised StopIteration, which ends a loop without a word; raise another error there"
            )


class _First:
    """The first batches of a loader, as often as it is iterated."""

    def __init__(self, loader: DataLoader[Any], count: int | None) -> None:
        self.loader, self.count = loader, count
        self.dataset = getattr(loader, "dataset", None)

    def __iter__(self) -> Iterator[Any]:
        return islice(self.loader, self.count)


def unprepared(loader: Any) -> Any:
    """The ``DataLoader`` inside the wrapper of Accelerate or Fabric; any other loader as it is."""
    for name in ("base_dataloader", "_dataloader"):  # Fabric shows its loader under no public name
        loader = getattr(loader, name, loader)
    return loader


def _check_prepared(loader: Any) -> None:
    """Raise LookupError for a loader of Accelerate that does not show which samples are its own."""
    batches, dataset = getattr(loader, "batch_sampler", None), getattr(loader, "dataset", None)
    if _kind(loader) == "DataLoaderDispatcher":
        reason = "its first process reads the batches and hands them out"
    elif _kind(dataset) == "IterableDatasetShard":
        reason = "it cuts a stream into shares, and repeats its start to fill the last batches"
    elif getattr(loader, "skip_batches", 0) or _kind(batches) == "SkipBatchSampler":
        reason = "it skips the first batches of an epoch"
    else:
        return
    raise LookupError(
        f"the data come from a {_kind(loader)} of Accelerate, and which of its samples to measure is unclear: {reason}; pass "
        "dataloader=, the DataLoader as it was before accelerator.prepare or skip_first_batches"
    )


def is_distributed(loader: Any) -> bool:
    """Whether the loader gives each process a part of the data."""
    return isinstance(getattr(loader, "sampler", None), DistributedSampler)


def rank_of(loader: Any) -> tuple[int, int]:
    """This rank's number and the number of ranks that share the data of a loader; 0 and 1 if it is not shared."""
    batches, sampler = _batch_sampler(loader), getattr(loader, "sampler", None)
    if _kind(batches) == "BatchRebalanceSampler":
        return batches.rank, batches.dp_size
    if batches is not getattr(loader, "batch_sampler", None):
        return loader.batch_sampler.process_index, loader.batch_sampler.num_processes
    return (sampler.rank, sampler.num_replicas) if isinstance(sampler, DistributedSampler) else (0, 1)


def own_samples(loader: Any, batch: int) -> int | None:
    """How many samples of a loader belong to this rank, if its sampler pads with samples of other ranks; None if all do.

    A sampler of whole batches (``batch_size=None``) pads with batches: 0 if the one with the number ``batch`` is padding.
    """
    sampler = getattr(loader, "sampler", None)
    if not isinstance(sampler, DistributedSampler) or sampler.drop_last:
        return None
    own = len(range(sampler.rank, len(sampler.dataset), sampler.num_replicas))  # type: ignore[arg-type]
    if loader.batch_sampler is None:
        return None if batch < own else 0
    return own


@contextmanager
def warn_if_moved(loader: Any, warn: Callable[[str, str], None]) -> Iterator[None]:
    """Call ``warn(topic, message)`` if a number that the data set keeps, such as the cursor of a stream, changes."""
    dataset = getattr(loader, "dataset", None)
    before = _numbers(dataset)
    yield
    moved = [name for name, value in _numbers(dataset).items() if before.get(name, value) != value]
    if moved:
        warn(
            "cursor",
            f"measuring moved {', '.join(moved)} of the data set {type(dataset).__name__}, so training goes on from another "
            "place; pass dataloader=, over a copy of the data",
        )


def _numbers(dataset: Any) -> dict[str, Any]:
    held = getattr(dataset, "__dict__", {})
    return {name: n for name, n in held.items() if isinstance(n, numbers.Real) and n == n and not isinstance(n, bool)}


def check_loader(dataloader: Any) -> None:
    """Raise ValueError for a data set, which gives samples instead of batches."""
    if isinstance(dataloader, Dataset):
        raise ValueError(
            f"dataloader must give batches, got the data set {type(dataloader).__name__}; write DataLoader(dataset, "
            "batch_size=...)"
        )


def has_own_iteration(loader: DataLoader[Any]) -> bool:
    """Whether a subclass changes what a loader gives: normalizes batches, prefetches them, never ends."""
    return type(loader).__iter__ is not DataLoader.__iter__


def _batch_sampler(loader: Any) -> Any:
    """What draws the batches of an epoch, those of all ranks where Accelerate gives each rank some of them."""
    batches: Any = getattr(loader, "batch_sampler", None)
    return batches.batch_sampler if _kind(batches) == "BatchSamplerShard" else batches


def _kind(instance: Any) -> str:
    """The name of a class of Accelerate or transformers, which are not imported. ``__class__`` of a wrapper is not its own."""
    return type(instance).__name__


def _sampler(loader: DataLoader[Any]) -> Any:
    """What draws the samples of an epoch."""
    sampler, batches = loader.sampler, _batch_sampler(loader)
    if batches is not None:  # where it was given, the sampler of the loader is a stand-in
        sampler = batches.sampler if type(batches) is BatchSampler else batches
    if isinstance(sampler, DistributedSampler):  # Lightning wraps a sampler that is not the default as the "dataset"
        inner = getattr(sampler.dataset, "_sampler", None)
        plain = RandomSampler if sampler.shuffle else SequentialSampler
        sampler = inner if inner is not None else plain(loader.dataset)  # type: ignore[arg-type]
    return sampler


def _indices(loader: DataLoader[Any], sampler: Any, max_batches: int | None) -> tuple[Sequence[Any], int | None]:
    """The samples that the training loader can visit, each once, and the batch size."""
    batches = _batch_sampler(loader)
    shared = {id(loader.dataset): loader.dataset}  # a copy of a sampler must not copy the data
    if _kind(batches) == "BatchRebalanceSampler":  # it draws the batches of one rank
        return range(len(batches.lengths)), batches.effective_batch_size // (batches.dp_size * batches.grad_accum)
    if batches is not None and type(batches) is not BatchSampler:
        drawn = list(islice(deepcopy(batches, shared), _length(batches, max_batches)))
        return sorted(set(chain.from_iterable(drawn))), getattr(batches, "batch_size", None) or len(drawn[0])
    batch_size = loader.batch_size if batches is None else batches.batch_size
    if type(sampler) is WeightedRandomSampler:
        return sampler.weights.nonzero().flatten().tolist(), batch_size
    if type(sampler) in (SequentialSampler, RandomSampler) or _kind(sampler) == "SeedableRandomSampler":
        return range(len(sampler.data_source)), batch_size
    limit = None if max_batches is None else max_batches * (batch_size or 1)
    drawn = list(islice(deepcopy(sampler, shared), _length(sampler, limit)))
    if drawn and isinstance(drawn[0], list):
        raise LookupError(
            "the sampler of the training data gives lists of samples (batch_size=None), and which are measured in one batch is "
            "not clear; pass batch_sampler= to the DataLoader instead of sampler=, or dataloader= to the callback"
        )
    return sorted(set(drawn)), batch_size


def _length(sampler: Any, limit: int | None) -> int:
    """How much of a sampler is an epoch: some go on for ever."""
    if hasattr(sampler, "__len__"):
        return len(sampler)
    if limit is None:
        raise LookupError(
            f"the sampler {type(sampler).__name__} of the training data has no length, so which samples to measure is not clear; "
            "give it a __len__, or pass dataloader=, a DataLoader to measure on"
        )
    return limit
