"""What a Lightning Trainer knows of devices, processes and data, for the callback."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from lightning.fabric.utilities.data import sized_len
from lightning.pytorch import LightningModule, Trainer
from torch import nn
from torch.utils.data import DataLoader, DistributedSampler, IterableDataset
from tqdm import tqdm

from lightning_nc.loaders import has_own_iteration, is_distributed, measurement_loader

__all__ = [
    "Progress",
    "device_to_agree_on",
    "is_last",
    "model_to_call",
    "own_samples",
    "steps_of_epoch",
    "to_device",
    "training_data",
]


def device_to_agree_on(trainer: Trainer) -> torch.device | None:
    """The device of the collectives; None for one process."""
    return trainer.strategy.root_device if trainer.world_size > 1 else None


def model_to_call(trainer: Trainer, pl_module: LightningModule) -> nn.Module:
    """The module, or its wrapper where parameters are sharded, since that gathers them."""
    # By name: the class exists in both packages, lightning and pytorch_lightning.
    sharded = type(trainer.strategy).__name__ in ("FSDPStrategy", "ModelParallelStrategy")
    model = trainer.strategy.model
    return model if sharded and model is not None else pl_module


def to_device(trainer: Trainer, pl_module: LightningModule, batch: Any) -> Any:
    """A batch as the training step would get it, but for what ``on_after_batch_transfer`` does."""
    batch = trainer.precision_plugin.convert_input(batch)
    batch = pl_module._on_before_batch_transfer(batch, dataloader_idx=0)
    return trainer.strategy.batch_to_device(batch, dataloader_idx=0)


def training_data(trainer: Trainer, dataloader: Iterable[Any] | None) -> tuple[Iterable[Any], int | None]:
    """This process's share of the training data, or of ``dataloader``, and the number of batches where it is known."""
    share = getattr(trainer.strategy, "distributed_sampler_kwargs", None) or {"rank": 0, "num_replicas": 1}
    rank, world_size = share["rank"], share["num_replicas"]
    if isinstance(dataloader, DataLoader) and not has_own_iteration(dataloader):
        return measurement_loader(dataloader, rank=rank, world_size=world_size)
    if dataloader is not None:
        return dataloader, None
    loader, limit = trainer.train_dataloader, None
    if isinstance(getattr(loader, "dataset", None), IterableDataset):
        limit = trainer.fit_loop.batch_idx + 1
    elif isinstance(loader, DataLoader) and trainer.num_training_batches < (sized_len(loader) or math.inf):
        limit = int(trainer.num_training_batches)
    if not is_distributed(loader):  # then every process trains on all of the data
        rank, world_size = 0, 1
    return measurement_loader(loader, limit, rank, world_size)


def own_samples(trainer: Trainer, loaders: Any, index: int) -> int | None:
    """How many samples of a loader are this process's own, where its sampler pads with samples of the others."""
    if trainer.world_size == 1:
        return None
    flat = loaders.values() if isinstance(loaders, Mapping) else loaders if isinstance(loaders, Sequence) else [loaders]
    sampler = getattr(list(flat)[index], "sampler", None) if index < len(flat) else None
    if not isinstance(sampler, DistributedSampler) or sampler.drop_last:
        return None
    return len(range(sampler.rank, len(sampler.dataset), sampler.num_replicas))  # type: ignore[arg-type]


def steps_of_epoch(trainer: Trainer) -> float:
    """The most steps that an epoch takes: one per batch and optimizer."""
    return trainer.num_training_batches * max(len(trainer.optimizers), 1)


def is_last(trainer: Trainer, ahead: float = 0) -> bool:
    """Whether the epoch is the last, as far as is known ``ahead`` steps before its end."""
    stopped = trainer.should_stop or trainer.current_epoch + 1 == trainer.max_epochs
    return stopped or 0 < trainer.max_steps <= trainer.global_step + ahead


class Progress:
    """A loader with a bar of its own below the trainer's, where that shows one."""

    def __init__(self, trainer: Trainer, loader: Iterable[Any], total: int | None) -> None:
        self.trainer, self.loader, self.total = trainer, loader, total

    def __iter__(self) -> Iterator[Any]:
        bar: Any = self.trainer.progress_bar_callback
        progress: Any = getattr(bar, "progress", None)
        if not getattr(bar, "is_enabled", False):  # there is none, or one of the user's own
            yield from self.loader
        elif hasattr(progress, "add_task"):  # rich has room for one live display: join it
            task = progress.add_task("Neural collapse", total=self.total)
            try:
                for batch in self.loader:
                    yield batch
                    progress.advance(task)
                    progress.refresh()
            finally:
                progress.remove_task(task)
        else:
            yield from tqdm(self.loader, "Neural collapse", self.total, leave=False, position=1, dynamic_ncols=True)
