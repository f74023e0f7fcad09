"""What the callback asks of a Lightning Trainer: devices, ranks, data, and whether an epoch is the last."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from lightning.fabric.utilities.data import sized_len
from lightning.pytorch import LightningModule, Trainer
from torch import nn
from torch.utils.data import DataLoader, IterableDataset
from tqdm import tqdm

from lightning_nc.measuring.loaders import has_own_iteration, is_distributed, measurement_loader

__all__ = [
    "Progress",
    "is_last_epoch",
    "loader_at",
    "model_to_call",
    "move_to_end",
    "ranks_of",
    "to_device",
    "training_data",
]


def ranks_of(trainer: Trainer) -> torch.device | None:
    """The device of the collectives of a distributed run; None for a single process."""
    return trainer.strategy.root_device if trainer.world_size > 1 else None


def model_to_call(trainer: Trainer, pl_module: LightningModule) -> nn.Module:
    """The module, or its wrapper if parameters are sharded, since the wrapper gathers them."""
    # By name: the class exists in both packages, lightning and pytorch_lightning.
    sharded = type(trainer.strategy).__name__ in ("FSDPStrategy", "ModelParallelStrategy")
    model = trainer.strategy.model
    return model if sharded and model is not None else pl_module


def to_device(trainer: Trainer, pl_module: LightningModule, batch: Any) -> Any:
    """A batch as the training step receives it: converted, moved, and through the hooks of batch transfer."""
    batch = trainer.precision_plugin.convert_input(batch)
    batch = pl_module._on_before_batch_transfer(batch, dataloader_idx=0)
    return trainer.strategy.batch_to_device(batch, dataloader_idx=0)


def training_data(trainer: Trainer, dataloader: Iterable[Any] | None) -> tuple[Iterable[Any], int | None]:
    """This rank's share of the training data, or of ``dataloader``, and the number of batches if it is known."""
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
    if not is_distributed(loader):  # then every rank trains on all of the data
        rank, world_size = 0, 1
    return measurement_loader(loader, limit, rank, world_size)


def loader_at(loaders: Any, index: int) -> Any:
    """One of the dataloaders of a stage, which may be a dataloader, a sequence or a mapping."""
    flat = loaders.values() if isinstance(loaders, Mapping) else loaders if isinstance(loaders, Sequence) else [loaders]
    return next((loader for i, loader in enumerate(flat) if i == index), None)


def is_last_epoch(trainer: Trainer) -> bool:
    """Whether the current epoch is the last one, as far as is known now."""
    progress: Any = trainer.fit_loop.epoch_loop.batch_progress.current
    batches = trainer.num_training_batches - progress.processed
    ahead = max(batches, 0) * max(len(trainer.optimizers), 1)
    enough = trainer.current_epoch + 1 >= (trainer.min_epochs or 0) and trainer.global_step >= (trainer.min_steps or 0)
    stopped = (trainer.should_stop and enough) or trainer.current_epoch + 1 == trainer.max_epochs
    return stopped or 0 < trainer.max_steps <= trainer.global_step + ahead


def move_to_end(trainer: Trainer, callback: Any) -> None:
    """Let a callback act after all others but checkpoints: weight averaging swaps weights in the same hooks."""
    callbacks = [other for other in trainer.callbacks if other is not callback]  # type: ignore[attr-defined]
    names = [
        {kind.__name__ for kind in type(other).__mro__} for other in callbacks
    ]  # the class exists in both packages
    first = next((i for i, kinds in enumerate(names) if "Checkpoint" in kinds), len(callbacks))
    trainer.callbacks = [*callbacks[:first], callback, *callbacks[first:]]  # type: ignore[attr-defined]


class Progress:
    """A dataloader with a progress bar of its own below the trainer's, if the trainer shows one."""

    def __init__(self, trainer: Trainer, loader: Iterable[Any], total: int | None) -> None:
        self.trainer, self.loader, self.total = trainer, loader, total

    def __iter__(self) -> Iterator[Any]:
        bar: Any = self.trainer.progress_bar_callback
        progress: Any = getattr(bar, "progress", None)
        if not getattr(bar, "is_enabled", False):  # there is none, or one that the user wrote
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
