"""The Lightning callback: when to measure, and where the values go."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from itertools import chain
from time import perf_counter
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from lightning.fabric.utilities import rank_zero_info, rank_zero_warn
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from typing_extensions import override

from lightning_nc.evaluation import Moved, exact_pass, undisturbed, values_of
from lightning_nc.features import Pool
from lightning_nc.functional import MEASURES, PAPER_MEASURES, check_measures
from lightning_nc.loaders import check_loader
from lightning_nc.loggers import publish_figures
from lightning_nc.moments import state_dtype
from lightning_nc.probe import Moments, Probe
from lightning_nc.streams import Stream
from lightning_nc.trainers import (
    Progress,
    device_to_agree_on,
    is_last,
    model_to_call,
    own_samples,
    steps_of_epoch,
    to_device,
    training_data,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["NeuralCollapseCallback", "log_spaced"]

_T = TypeVar("_T")
_KEYS = {"train": "nc", "validate": "nc/val", "test": "nc/test"}
_IN_PROGRESS_BAR = ("nc1", "nc2_etf_centered", "nc3_centered")


def log_spaced(per_decade: int = 10) -> Callable[[int], bool]:
    """A schedule for ``every_n_epochs``: about ``per_decade`` measurements while the number of epochs grows tenfold.

    Collapse is slow and is drawn on log axes. After 1, 2, 3, 4, 6, 7, 8, 10, 13, 16, 20, ... epochs with 10 per
    decade.

    Raises:
        ValueError: if ``per_decade`` is not a positive integer.

    Example:
        >>> from lightning_nc import log_spaced
        >>> [epoch + 1 for epoch in range(100) if log_spaced(4)(epoch)]
        [1, 2, 4, 6, 10, 18, 32, 57, 100]
    """
    if not isinstance(per_decade, int) or per_decade < 1:
        raise ValueError(f"per_decade must be a positive integer, got {per_decade!r}")
    return partial(_is_log_spaced, per_decade)


def _is_log_spaced(per_decade: int, epoch: int) -> bool:
    power = math.floor(per_decade * math.log10(epoch + 1) + 1e-9)
    return math.ceil(10 ** (power / per_decade) - 1e-9) == epoch + 1


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
        stages: any of ``"train"``, ``"validate"``, ``"test"``. The last two are measured from the batches of their loops, at
            no extra pass, under ``nc/val/`` and ``nc/test/`` (``nc/val_1/`` for a second data loader).
        mode: how training data are measured: ``"exact"`` in an extra pass, in eval mode; ``"online"`` from the training
            batches as they pass, in train mode and with weights that move within the epoch.
        every_n_epochs: an int, or a callable from epoch to bool such as :func:`log_spaced`. The first and the last epoch
            are always measured; with an int n also epochs n - 1, 2n - 1 and so on, those at which
            ``ModelCheckpoint(every_n_epochs=n)`` acts. ``callback_metrics`` keeps the last value in between.
        dataloader: what the exact pass runs over in place of the training data, for example the same images without
            augmentation.
        target_fn: batch -> (B,) class indices; by default the second item of a pair, or ``label``, ``labels``, ``target``,
            ``targets`` or ``y`` of a mapping.
        forward_fn: (module, batch) -> anything; by default the module is called on the first item of the batch, or on the
            entries of a mapping that its ``forward`` takes.
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
        stages: Sequence[str] = ("train",),
        mode: str = "exact",
        every_n_epochs: int | Callable[[int], bool] = 1,
        dataloader: Iterable[Any] | None = None,
        target_fn: Callable[[Any], Tensor] | None = None,
        forward_fn: Callable[[nn.Module, Any], Any] | None = None,
        pool: Pool = "mean",
        strict: bool = False,
    ) -> None:
        try:
            self.metrics = check_measures(metrics)
            check_loader(dataloader)
            self._probe = Probe(layers, classifier, num_classes, target_fn, forward_fn, pool, strict)
        except ValueError as error:
            raise MisconfigurationException(str(error)) from error
        if not callable(every_n_epochs) and (not isinstance(every_n_epochs, int) or every_n_epochs < 1):
            raise MisconfigurationException(
                f"every_n_epochs must be a positive integer or a callable from epoch to bool, got {every_n_epochs!r}"
            )
        if getattr(every_n_epochs, "__name__", "") == log_spaced.__name__:
            raise MisconfigurationException("every_n_epochs=log_spaced lacks its parentheses; write log_spaced()")
        if isinstance(stages, str) or not stages or not set(stages) <= _KEYS.keys():
            raise MisconfigurationException(
                f"stages must be a sequence of any of {', '.join(map(repr, _KEYS))}, got {stages!r}"
            )
        if mode not in ("exact", "online"):
            raise MisconfigurationException(f"mode must be 'exact' or 'online', got {mode!r}")
        if mode == "online" and dataloader is not None:
            raise MisconfigurationException(
                "mode='online' measures the training batches as they pass, so there is nothing for dataloader= to do; "
                "leave one of them out"
            )
        self.stages, self.mode = tuple(stages), mode
        self.every_n_epochs = every_n_epochs
        self.dataloader = dataloader
        self.strict = strict
        self.history: list[dict[str, Any]] = []
        self.class_means: Tensor | None = None
        self._classes: list[int] = []  # whose means they are
        self._streams: dict[tuple[str, int], Stream] = {}  # by stage and data loader
        self._active: set[str] = set()  # stages whose batches are measured as they pass, at present
        self._epoch_began: float | None = None
        self._measured: tuple[int, int] | None = None  # epoch and step
        self._validated = -1  # the last epoch whose validation loop was measured
        self._fitting = True
        self._partial = False

    @property
    @override
    def state_key(self) -> str:
        return self._generate_state_key(
            layers=self._probe.layers, stages=self.stages, mode=self.mode, metrics=self.metrics
        )

    def plot(self) -> Figure:
        """The paper's panels, NC1, NC2 and NC3 over the epochs of ``history``, as a matplotlib figure."""
        from lightning_nc.plotting import plot_history

        return plot_history(self.history, num_classes=None if self.class_means is None else len(self.class_means))

    # ------------------------------------------------------------------------------------------ around the run

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._probe.forget()
        self._fitting = stage == "fit"
        self._streams, self._active = {}, set()
        self._epoch_began, self._partial = None, False
        others = [c for c in trainer.callbacks if isinstance(c, NeuralCollapseCallback) and c is not self]  # type: ignore[attr-defined]
        if any(set(self.stages) & set(other.stages) and self._settings() != other._settings() for other in others):
            raise MisconfigurationException(
                "two NeuralCollapseCallbacks would log different numbers under the same keys; give them different stages, or "
                "measure the second with lightning_nc.measure"
            )

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._measured, self._validated = None, -1
        if (
            trainer.global_step
        ):  # resumed: monitors look for the last values, and the last epoch may be measured already
            known = {key: value for row in self.history for key, value in row.items() if key.startswith("nc/")}
            trainer.callback_metrics.update(_tensors(known, pl_module.device))
            steps = [(row["epoch"], row["step"]) for row in self.history if row["stage"] == "train"]
            self._measured = steps[-1] if steps else None
        if "validate" in self.stages and not trainer.enable_validation:
            rank_zero_warn(
                "stages has 'validate', but this run has no validation loop, so neural collapse is not measured there; give "
                "the Trainer validation data and the module a validation_step"
            )

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        for logger in trainer.loggers:
            experiment: Any = getattr(logger, "experiment", None)
            if hasattr(experiment, "define_metric"):  # W&B: epochs, not steps, along the x axis
                experiment.define_metric("nc/*", step_metric="epoch")

    @override
    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        every = [callback for callback in trainer.callbacks if isinstance(callback, NeuralCollapseCallback)]  # type: ignore[attr-defined]
        history = [row for callback in every for row in callback.history]
        if every[0] is not self or not trainer.is_global_zero or not history:
            return
        means, classes = next(((c.class_means, c._classes) for c in every if c.class_means is not None), (None, []))
        for logger in trainer.loggers:
            try:
                publish_figures(logger, history, means, classes)
            except Exception as error:  # a full disk, a server that is gone: the run itself is done and saved
                rank_zero_warn(
                    f"the figures of neural collapse could not be written: {error}; callback.plot() draws them again"
                )

    @override
    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._probe.detach()

    @override
    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._probe.detach()

    @override
    def state_dict(self) -> dict[str, Any]:
        return {"history": [dict(row) for row in self.history]}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        # A checkpoint that is tested, the best one say, may be older than the history.
        if self._fitting or not self.history:
            self.history = [dict(row) for row in state_dict["history"]]

    # ------------------------------------------------------------------------------------------------ training

    @override
    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._epoch_began = perf_counter()
        if self.mode == "online":
            self._begin("train", self._is_due(trainer, ahead=steps_of_epoch(trainer)))

    @override
    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if self._epoch_began is None:  # resumed in the middle of an epoch
            self.on_train_epoch_start(trainer, pl_module)
            self._partial = batch_idx > 0
        self._open(trainer, pl_module, "train", batch)

    @override
    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        self._probe.disarm()

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._close("train")
        # Before the validation loop, so that what monitors a value there sees the one of this epoch.
        if trainer.is_last_batch:
            self._finish_epoch(trainer, pl_module)

    @override
    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # An epoch that was cut short, by max_steps say, has no last batch.
        self._finish_epoch(trainer, pl_module)
        self._epoch_began = None
        self._partial = False

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # Nobody knew that the epoch was the last one: it was stopped early. Lightning's own logging is closed by now.
        if "train" not in self.stages or self.mode == "online" or not trainer.global_step:
            return
        if self._measured is not None and self._measured[1] == trainer.global_step:
            return
        epoch = max(trainer.current_epoch - 1, 0)
        values = self._measure(trainer, pl_module, epoch)
        trainer.callback_metrics.update(_tensors(values, pl_module.device))
        for logger in trainer.loggers if values else ():
            logger.log_metrics({**values, "epoch": epoch}, step=trainer.global_step - 1)

    def _is_due(self, trainer: Trainer, ahead: float = 0) -> bool:
        return is_last(trainer, ahead) or self._is_scheduled(trainer.current_epoch)

    def _is_scheduled(self, epoch: int) -> bool:
        if epoch == 0:
            return True
        return self.every_n_epochs(epoch) if callable(self.every_n_epochs) else (epoch + 1) % self.every_n_epochs == 0

    def _finish_epoch(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if "train" not in self.stages or self._measured == (trainer.current_epoch, trainer.global_step):
            return
        if self.mode == "online":
            self._measured = trainer.current_epoch, trainer.global_step
            self._publish_streams(trainer, pl_module, "train")
        elif self._is_due(trainer):
            self._publish(trainer, pl_module, self._measure(trainer, pl_module, trainer.current_epoch))

    # ------------------------------------------------------------------------------------- validation and test

    @override
    def on_validation_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        due = trainer.state.fn != "fit" or self._is_due(trainer, ahead=steps_of_epoch(trainer))
        if trainer.state.fn == "fit" and not trainer.sanity_checking:  # there may be no loop in the epochs that are due
            passed = range(self._validated + 1, trainer.current_epoch)
            due = due or any(self._is_scheduled(epoch) for epoch in passed)
            self._validated = trainer.current_epoch if due else self._validated
        self._begin("validate", due and not trainer.sanity_checking)

    @override
    def on_validation_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        if trainer.sanity_checking and self._streaming() and self._is_ready(pl_module):
            # Nothing to measure, but a model that is compiled at its first call must have its hooks before.
            self._guarded(lambda: self._attach(trainer, pl_module, batch))
        self._open(trainer, pl_module, "validate", batch, dataloader_idx)

    @override
    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        self._close("validate", dataloader_idx, own_samples(trainer, trainer.val_dataloaders, dataloader_idx))

    @override
    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._publish_streams(trainer, pl_module, "validate")

    @override
    def on_test_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._begin("test", True)

    @override
    def on_test_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        self._open(trainer, pl_module, "test", batch, dataloader_idx)

    @override
    def on_test_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        self._close("test", dataloader_idx, own_samples(trainer, trainer.test_dataloaders, dataloader_idx))

    @override
    def on_test_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._publish_streams(trainer, pl_module, "test")

    # ------------------------------------------------------------------------------- batches measured as they pass

    def _streaming(self) -> bool:
        return self.mode == "online" or self.stages != ("train",)

    def _is_ready(self, pl_module: LightningModule) -> bool:
        """Whether no layer waits for the first batch of the training to take its shape from, and its numbers."""
        return self._probe.attached or not any(map(is_lazy, chain(pl_module.parameters(), pl_module.buffers())))

    def _begin(self, stage: str, due: bool) -> None:
        self._streams = {key: stream for key, stream in self._streams.items() if key[0] != stage}
        self._active.discard(stage)
        if due and stage in self.stages:
            self._active.add(stage)

    def _attach(self, trainer: Trainer, pl_module: LightningModule, batch: Any) -> None:
        if not self._probe.attached:
            with undisturbed(pl_module, trainer.strategy.root_device):
                self._probe.attach(model_to_call(trainer, pl_module), batch, trainer.precision_plugin.forward_context)

    def _open(self, trainer: Trainer, pl_module: LightningModule, stage: str, batch: Any, index: int = 0) -> None:
        """Before a batch passes."""
        if stage in self._active and self._is_ready(pl_module):
            stream = self._streams.setdefault((stage, index), Stream(self._probe))
            stream.open(batch, lambda: self._attach(trainer, pl_module, batch))
            if self.strict and stream.error is not None:
                raise stream.error

    def _close(self, stage: str, index: int = 0, share: int | None = None) -> None:
        """After a batch has passed."""
        stream = self._streams.get((stage, index)) if stage in self._active else None
        if stream is not None:
            stream.close(share)
            if self.strict and stream.error is not None:
                raise stream.error

    def _publish_streams(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        # Outside of a fit the epoch is that of the weights, the last one measured as far as is known.
        last = max((row["epoch"] for row in self.history), default=0)
        epoch = trainer.current_epoch if trainer.state.fn == "fit" else last
        keys = sorted(key for key in self._streams if key[0] == stage)
        if trainer.world_size > 1:  # all processes together, one to which no batch came too
            loaders = {"validate": trainer.num_val_batches, "test": trainer.num_test_batches}.get(stage, [0])
            keys = [(stage, index) for index in range(len(loaders))]
        for key in keys if stage in self._active else ():
            stream = self._streams.get(key) or Stream(self._probe, error=LookupError("no batch came to this process"))
            values = self._guarded(partial(self._values_of_stream, trainer, stage, stream)) or {}
            prefix = _KEYS[stage] + (f"_{key[1]}" if key[1] else "")
            marks = {"partial": True} if stage == "train" and self._partial else {}
            self._publish(trainer, pl_module, self._remember(trainer, stage, prefix, values, epoch, marks))
        self._begin(stage, False)

    def _values_of_stream(self, trainer: Trainer, stage: str, stream: Stream) -> dict[str, float]:
        moments = stream.total(device_to_agree_on(trainer))
        if any(MEASURES[name].scatter for name in self.metrics) and not all(m.knows_scatter for m in moments.values()):
            rank_zero_warn(
                "neural collapse: features too wide for a scatter matrix need a second pass, which only mode='exact' makes on "
                "the training data; their nc1 is left out here. pool='mean' makes them narrow"
            )
        return self._values(moments, stage)

    # ------------------------------------------------------------------------------------------- the exact pass

    def _measure(self, trainer: Trainer, pl_module: LightningModule, epoch: int) -> dict[str, float]:
        """The values by key, appended to the history too; nothing where they could not be measured."""
        self._measured, began = (trainer.current_epoch, trainer.global_step), perf_counter()
        values = self._guarded(lambda: self._run(trainer, pl_module))
        if not self._streaming():
            self._probe.detach()
        if values is None:
            return {}
        took = perf_counter() - began
        epoch_took = math.inf if self._epoch_began is None else began - self._epoch_began
        if took > max(1, 0.25 * epoch_took) and self._probe.first_time("slow"):
            rank_zero_info(
                f"measuring neural collapse took {took:.1f} s, {100 * took / epoch_took:.0f} % of the {epoch_took:.1f} s of the "
                "epoch before it; NeuralCollapseCallback(every_n_epochs=...) measures less often, mode='online' without an "
                "extra pass"
            )
        return self._remember(trainer, "train", _KEYS["train"], values, epoch)

    def _run(self, trainer: Trainer, pl_module: LightningModule) -> dict[str, float]:
        with undisturbed(pl_module, trainer.strategy.root_device):
            try:
                loader, total = training_data(trainer, self.dataloader)
            except Exception as error:  # which the pass tells the other processes
                loader, total = _raising(error), None
            batches = Moved(Progress(trainer, loader, total), lambda batch: to_device(trainer, pl_module, batch))
            model = model_to_call(trainer, pl_module)
            moments = exact_pass(
                self._probe,
                self.metrics,
                model,
                batches,
                trainer.precision_plugin.forward_context,
                device_to_agree_on(trainer),
                steps=total or 0,
            )
            return self._values(moments, "train")

    # ---------------------------------------------------------------------------------------- what becomes of values

    def _guarded(self, measure: Callable[[], _T]) -> _T | None:
        """What ``measure`` gives, None where it raises."""
        try:
            return measure()
        except Exception as error:
            if self.strict:
                raise
            if self._probe.first_time("cannot be measured"):
                # On every process: the reason may be known to one of them alone.
                warnings.warn(
                    f"neural collapse cannot be measured, training goes on: {error} (NeuralCollapseCallback(strict=True) "
                    "raises instead)",
                    stacklevel=2,
                )
            return None

    def _values(self, moments: Moments, stage: str) -> dict[str, float]:
        values = values_of(moments, self.metrics, self._probe)
        if "" in moments and (stage == "train" or "train" not in self.stages):
            seen = moments[""].counts > 0
            self.class_means, self._classes = moments[""].means[seen].cpu(), seen.nonzero().flatten().tolist()
        return values

    def _remember(
        self,
        trainer: Trainer,
        stage: str,
        prefix: str,
        values: dict[str, float],
        epoch: int,
        marks: dict[str, Any] | None = None,
    ) -> dict[str, float]:
        values = {f"{prefix}/{name}": value for name, value in values.items()}
        if values:
            self.history.append(
                {"stage": stage, "epoch": epoch, "step": trainer.global_step, **(marks or {}), **values}
            )
        return values

    def _publish(self, trainer: Trainer, pl_module: LightningModule, values: dict[str, float]) -> None:
        tensors = _tensors(values, pl_module.device)
        for key, value in tensors.items():
            # The maximum of one value is the value itself, in its own precision. All processes have the same, so none needs
            # to ask the others.
            pl_module.log(
                key,
                value,
                prog_bar=key.removeprefix("nc/") in _IN_PROGRESS_BAR,
                on_step=False,
                on_epoch=True,
                reduce_fx="max",
                sync_dist=True,
                rank_zero_only=True,
                add_dataloader_idx=False,
                batch_size=1,
            )
        trainer.callback_metrics.update(tensors)

    def _settings(self) -> tuple[Any, ...]:
        p = self._probe
        return self.mode, self.dataloader, p.classifier, p.num_classes, p.target_fn, p.forward_fn, p.pool


def _raising(error: Exception) -> Iterator[Any]:
    raise error
    yield


def _tensors(values: dict[str, float], device: torch.device) -> dict[str, Tensor]:
    return {key: torch.tensor(value, dtype=state_dtype(device)) for key, value in values.items()}
