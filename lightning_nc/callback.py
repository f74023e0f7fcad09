"""The Lightning callback: when to measure, and where the values go."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset
from tqdm import tqdm
from typing_extensions import override

from lightning_nc.evaluation import ExactPass, buffers_of_first_rank, is_distributed, measurement_loader, undisturbed
from lightning_nc.features import Pool
from lightning_nc.functional import PAPER_MEASURES

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["NeuralCollapseCallback"]

_IN_PROGRESS_BAR = ("nc1", "nc2_etf_centered", "nc3_centered")


class NeuralCollapseCallback(Callback):
    r"""Measures neural collapse on the training data at the end of an epoch, and changes nothing in the training.

    The classifier (the last linear layer) is found by itself; its input, over all training samples in eval mode, is what
    is measured, in one extra pass. Values go to every logger, to the progress bar and to ``trainer.callback_metrics``
    under ``nc/nc1``, ``nc/nc2_etf`` and so on (``nc/layer3/nc1`` for a layer), before ModelCheckpoint and EarlyStopping
    look at this epoch. Weights, optimizer, random streams and batch order are those of a run without the callback.

    Args:
        layers: names (shell patterns allowed) of modules whose outputs are measured too.
        classifier: name of the last linear layer; found by itself where it is not given.
        num_classes: K; the classifier's number of outputs where it is not given.
        metrics: names in :data:`lightning_nc.functional.MEASURES`; the paper's six by default. Those that need the
            classifier's weight exist for the classifier's input alone.
        every_n_epochs: an int, or a callable from epoch to bool. The first and the last epoch are always measured; with
            an int n also epochs n - 1, 2n - 1 and so on, those at which ``ModelCheckpoint(every_n_epochs=n)`` acts.
            ``callback_metrics`` keeps the last value in between.
        dataloader: what to measure on in place of the training data, for example the same images without augmentation.
        target_fn: batch -> (B,) class indices; by default the second item of a pair, or ``label``, ``labels``, ``target``,
            ``targets`` or ``y`` of a mapping.
        forward_fn: (module, batch) -> anything; by default the module is called on the first item of the batch.
        pool: features of more than two dimensions: ``"mean"`` over positions, ``"flatten"``, or a callable.
        strict: raise when something cannot be measured; by default it warns once, says why, and training goes on.

    Raises:
        MisconfigurationException: for arguments that do not fit.

    Example::

        trainer = Trainer(callbacks=[NeuralCollapseCallback()])
    """

    def __init__(
        self,
        layers: Sequence[str] | None = None,
        classifier: str | None = None,
        num_classes: int | None = None,
        metrics: Sequence[str] = PAPER_MEASURES,
        *,
        every_n_epochs: int | Callable[[int], bool] = 1,
        dataloader: Iterable[Any] | None = None,
        target_fn: Callable[[Any], Tensor] | None = None,
        forward_fn: Callable[[nn.Module, Any], Any] | None = None,
        pool: Pool = "mean",
        strict: bool = False,
    ) -> None:
        try:
            self._exact = ExactPass(layers, classifier, num_classes, metrics, target_fn, forward_fn, pool)
        except ValueError as error:
            raise MisconfigurationException(str(error)) from error
        if not callable(every_n_epochs) and (not isinstance(every_n_epochs, int) or every_n_epochs < 1):
            raise MisconfigurationException(
                f"every_n_epochs must be a positive integer or a callable from epoch to bool, got {every_n_epochs!r}"
            )
        self.every_n_epochs = every_n_epochs
        self.dataloader = dataloader
        self.strict = strict
        self.history: list[dict[str, Any]] = []
        self._measured_step: int | None = None
        self._warned = False

    def plot(self) -> Figure:
        """The paper's panels, NC1, NC2 and NC3 over the epochs of ``history``, as a matplotlib figure."""
        from lightning_nc.plotting import plot_history

        return plot_history(self.history)

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._measured_step = None

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        # Before the validation loop, so that what monitors a value there sees the one of this epoch.
        if trainer.is_last_batch and self._is_due(trainer):
            self._measure_and_log(trainer, pl_module)

    @override
    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # An epoch that was cut short, by max_steps say, has no last batch.
        if self._measured_step != trainer.global_step and self._is_due(trainer):
            self._measure_and_log(trainer, pl_module)

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # Nobody knew that the epoch was the last one: it was stopped early. Lightning's own logging is closed by now.
        if self._measured_step == trainer.global_step or not trainer.global_step:
            return
        values = self._measure(trainer, pl_module, epoch=max(trainer.current_epoch - 1, 0))
        trainer.callback_metrics.update(_tensors(values))
        for logger in trainer.loggers:
            logger.log_metrics(values, step=trainer.global_step - 1)

    @override
    def state_dict(self) -> dict[str, Any]:
        return {"history": [dict(row) for row in self.history]}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.history = [dict(row) for row in state_dict["history"]]

    def _is_due(self, trainer: Trainer) -> bool:
        epoch = trainer.current_epoch
        if (
            epoch == 0
            or trainer.should_stop
            or epoch + 1 == trainer.max_epochs
            or trainer.global_step == trainer.max_steps
        ):
            return True
        return self.every_n_epochs(epoch) if callable(self.every_n_epochs) else (epoch + 1) % self.every_n_epochs == 0

    def _measure_and_log(self, trainer: Trainer, pl_module: LightningModule) -> None:
        values = self._measure(trainer, pl_module, trainer.current_epoch)
        for key, value in _tensors(values).items():
            # The maximum over one value and over equal ranks is the value itself, in its own precision.
            pl_module.log(
                key,
                value,
                prog_bar=key.removeprefix("nc/") in _IN_PROGRESS_BAR,
                on_step=False,
                on_epoch=True,
                reduce_fx="max",
                sync_dist=True,
                batch_size=1,
            )
        trainer.callback_metrics.update(_tensors(values))

    def _measure(self, trainer: Trainer, pl_module: LightningModule, epoch: int) -> dict[str, float]:
        """The values by key, appended to the history too; nothing where they could not be measured."""
        self._measured_step = trainer.global_step
        try:
            with undisturbed(pl_module, trainer.strategy.root_device):
                values = self._run(trainer, pl_module)
        except Exception as error:
            if self.strict:
                raise
            if not self._warned:
                # On every rank: the reason may be known to one of them alone.
                warnings.warn(
                    f"neural collapse cannot be measured, training goes on: {error} (NeuralCollapseCallback(strict=True) "
                    "raises instead)",
                    stacklevel=2,
                )
                self._warned = True
            return {}
        values = {f"nc/{name}": value for name, value in values.items()}
        self.history.append({"stage": "train", "epoch": epoch, "step": trainer.global_step, **values})
        return values

    def _run(self, trainer: Trainer, pl_module: LightningModule) -> dict[str, float]:
        batches, total = self._batches(trainer)
        on_device = (_to_device(trainer, pl_module, batch) for batch in _with_progress(trainer, batches, total))
        context = trainer.precision_plugin.forward_context
        if trainer.world_size == 1:
            self._exact.gather(pl_module, on_device, context)
            return self._exact.values()
        error: Exception | None = None
        with buffers_of_first_rank(pl_module):
            try:
                self._exact.gather(pl_module, on_device, context)
            except Exception as caught:
                error = caught
        # No rank may wait for one that gave up.
        if not trainer.strategy.reduce_boolean_decision(error is None, all=True):
            raise error or RuntimeError("another process could not measure its part; its own warning says why")
        return self._exact.values(synchronised=True)

    def _batches(self, trainer: Trainer) -> tuple[Iterable[Any], int | None]:
        """This rank's share of what is measured, and the number of batches where it is known."""
        rank, world_size = trainer.global_rank, trainer.world_size
        if isinstance(self.dataloader, DataLoader):
            return measurement_loader(self.dataloader, rank=rank, world_size=world_size)
        if self.dataloader is not None:
            return self.dataloader, None
        loader, limit = trainer.train_dataloader, None
        if isinstance(getattr(loader, "dataset", None), IterableDataset):
            limit = trainer.fit_loop.batch_idx + 1
        elif isinstance(loader, DataLoader) and trainer.num_training_batches < len(loader):
            limit = int(trainer.num_training_batches)
        if not is_distributed(loader):  # then every rank trains on all of the data
            rank, world_size = 0, 1
        return measurement_loader(loader, limit, rank, world_size)


def _tensors(values: dict[str, float]) -> dict[str, Tensor]:
    return {key: torch.tensor(value, dtype=torch.float64) for key, value in values.items()}


def _to_device(trainer: Trainer, pl_module: LightningModule, batch: Any) -> Any:
    batch = trainer.precision_plugin.convert_input(batch)
    batch = pl_module._on_before_batch_transfer(batch, dataloader_idx=0)
    return trainer.strategy.batch_to_device(batch, dataloader_idx=0)


def _with_progress(trainer: Trainer, batches: Iterable[Any], total: int | None) -> Iterator[Any]:
    """The batches, with a bar of their own below the trainer's where it shows one."""
    bar: Any = trainer.progress_bar_callback
    if bar is None or not bar.is_enabled:
        yield from batches
    elif (progress := getattr(bar, "progress", None)) is not None:  # rich has room for one live display: join it
        task = progress.add_task("Neural collapse", total=total)
        try:
            for batch in batches:
                yield batch
                progress.advance(task)
                progress.refresh()
        finally:
            progress.remove_task(task)
    else:
        yield from tqdm(batches, desc="Neural collapse", total=total, leave=False, position=1, dynamic_ncols=True)
