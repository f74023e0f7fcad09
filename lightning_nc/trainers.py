"""What the callback asks of a Lightning Trainer: devices, ranks, data, and whether an epoch is the last."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from lightning.fabric.utilities import rank_zero_warn
from lightning.fabric.utilities.data import sized_len
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset
from tqdm import tqdm

from lightning_nc.measuring.collector import Collector
from lightning_nc.measuring.distributed import all_max
from lightning_nc.measuring.evaluation import MappedBatches, exact_pass
from lightning_nc.measuring.loaders import (
    has_own_iteration,
    is_distributed,
    measurement_loader,
    own_samples,
    warn_if_moved,
)
from lightning_nc.measuring.probe import Probe
from lightning_nc.measuring.snapshot import evaluation_mode, fingerprint
from lightning_nc.moments import state_dtype

__all__ = [
    "attach",
    "has_other_weights",
    "is_last_epoch",
    "log_after_training",
    "log_values",
    "move_to_end",
    "own_samples_of",
    "ranks_of",
    "run_exact_pass",
    "tensors_of",
    "use_epoch_as_axis",
]

_IN_PROGRESS_BAR = ("nc/nc1", "nc/nc2_etf_centered", "nc/nc3_centered")


def ranks_of(trainer: Trainer) -> torch.device | None:
    """The device of the collectives of a distributed run; None for a single process."""
    return trainer.strategy.root_device if trainer.world_size > 1 else None


def attach(trainer: Trainer, pl_module: LightningModule, probe: Probe, batch: Any) -> None:
    """Attach a probe to the module if it is not yet, by running the module on the first samples of ``batch``."""
    if probe.attached:
        return
    with evaluation_mode(pl_module, trainer.strategy.root_device, probe.warn_once):
        probe.attach(_model_to_call(trainer, pl_module), batch, trainer.precision_plugin.forward_context)


def run_exact_pass(
    trainer: Trainer,
    pl_module: LightningModule,
    collector: Collector,
    dataloader: Iterable[Any] | None,
    ood_dataloader: Iterable[Any] | None = None,
) -> bool:
    """Collect the features of the training data, or of ``dataloader``, in a pass of their own; True when done."""
    warn = collector.probe.warn_once

    def moved(batches: Iterable[Any]) -> MappedBatches:
        return MappedBatches(batches, lambda batch: _to_device(trainer, pl_module, batch))

    with evaluation_mode(pl_module, trainer.strategy.root_device, warn):
        try:
            loader, total = _training_data(trainer, dataloader)
        except Exception as error:  # the pass tells the other ranks
            loader, total = _raising(error), None
        progress = _Progress(trainer, loader, total)
        ood = None if ood_dataloader is None else _training_data(trainer, ood_dataloader)
        ood = ood and (moved(ood[0]), ood[1])
        context, model = trainer.precision_plugin.forward_context, _model_to_call(trainer, pl_module)
        with warn_if_moved(loader, warn):
            exact_pass(collector, model, moved(progress), context, ranks_of(trainer), total or 0, ood)
    return True


def has_other_weights(trainer: Trainer, pl_module: LightningModule, before: str) -> bool:
    """Whether, on any rank, the weights are others than those whose fingerprint was ``before``."""
    changed, ranks = fingerprint(pl_module) != before, ranks_of(trainer)
    return changed if ranks is None else bool(all_max(changed, ranks))


def log_values(trainer: Trainer, pl_module: LightningModule, values: dict[str, float]) -> None:
    """Log values by key through the module, and show them to callbacks that monitor one in the same epoch."""
    tensors = tensors_of(values, pl_module.device)
    for key, value in tensors.items():
        # The maximum of one value is the value itself, in its own precision. All ranks have the same value, so none needs to
        # ask the others.
        pl_module.log(
            key,
            value,
            prog_bar=key in _IN_PROGRESS_BAR,
            on_step=False,
            on_epoch=True,
            reduce_fx="max",
            sync_dist=True,
            rank_zero_only=True,
            add_dataloader_idx=False,
            batch_size=1,
        )
    trainer.callback_metrics.update(tensors)


def log_after_training(trainer: Trainer, pl_module: LightningModule, values: dict[str, float], epoch: int) -> None:
    """Log values by key when Lightning's own logging is closed."""
    trainer.callback_metrics.update(tensors_of(values, pl_module.device))
    for logger in trainer.loggers if values else ():
        with _going_on("the values after the training could not be logged; callback.history has them"):
            logger.log_metrics({**values, "epoch": epoch}, step=trainer.global_step - 1)


def use_epoch_as_axis(trainer: Trainer) -> None:
    """Let W&B draw the metrics over epochs rather than steps."""
    for logger in trainer.loggers:
        with _going_on("the logger could not be told to draw the metrics over epochs"):
            experiment: Any = getattr(logger, "experiment", None)
            if hasattr(experiment, "define_metric"):
                experiment.define_metric("nc/*", step_metric="epoch")


@contextmanager
def _going_on(problem: str) -> Iterator[None]:
    """Warn instead of raising: a logger that fails does not end a training."""
    try:
        yield
    except Exception as error:
        rank_zero_warn(f"neural collapse: {problem}: {type(error).__name__}: {error}")


def tensors_of(values: dict[str, float], device: torch.device) -> dict[str, Tensor]:
    """Values as tensors of shape (), in the widest type of the device."""
    return {key: torch.tensor(value, dtype=state_dtype(device)) for key, value in values.items()}


def own_samples_of(trainer: Trainer, loaders: Any, index: int, batch: int) -> int | None:
    """How many samples of a stage's dataloader belong to this rank, see :func:`own_samples`; None if all do."""
    if trainer.world_size == 1:
        return None
    flat = loaders.values() if isinstance(loaders, Mapping) else loaders if isinstance(loaders, Sequence) else [loaders]
    return own_samples(next((loader for i, loader in enumerate(flat) if i == index), None), batch)


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


def _model_to_call(trainer: Trainer, pl_module: LightningModule) -> nn.Module:
    """The module, or its wrapper if parameters are sharded, since the wrapper gathers them."""
    # By name: the class exists in both packages, lightning and pytorch_lightning.
    sharded = type(trainer.strategy).__name__ in ("FSDPStrategy", "ModelParallelStrategy")
    model = trainer.strategy.model
    return model if sharded and model is not None else pl_module


def _to_device(trainer: Trainer, pl_module: LightningModule, batch: Any) -> Any:
    """A batch as the training step receives it: converted, moved, and through the hooks of batch transfer."""
    batch = trainer.precision_plugin.convert_input(batch)
    batch = pl_module._on_before_batch_transfer(batch, dataloader_idx=0)
    return trainer.strategy.batch_to_device(batch, dataloader_idx=0)


def _training_data(trainer: Trainer, dataloader: Iterable[Any] | None) -> tuple[Iterable[Any], int | None]:
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


def _raising(error: Exception) -> Iterator[Any]:
    raise error
    yield


class _Progress:
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
