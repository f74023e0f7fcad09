"""The Lightning callback: when to measure, and where the values go."""

from __future__ import annotations

import math
import numbers
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

from lightning_nc.functional import check_metrics
from lightning_nc.keys import STAGES, make_key, parse_key
from lightning_nc.loggers import publish_figures
from lightning_nc.measuring.batches import Pool
from lightning_nc.measuring.distributed import all_max
from lightning_nc.measuring.evaluation import Collector, MappedBatches, exact_pass
from lightning_nc.measuring.loaders import check_loader, own_samples, warn_if_moved
from lightning_nc.measuring.loops import RunningLoops
from lightning_nc.measuring.probe import Probe
from lightning_nc.measuring.snapshot import evaluation_mode, fingerprint
from lightning_nc.moments import state_dtype
from lightning_nc.trainers import (
    Progress,
    is_last_epoch,
    loader_at,
    model_to_call,
    move_to_end,
    ranks_of,
    to_device,
    training_data,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["NeuralCollapseCallback", "log_spaced"]

_T = TypeVar("_T")
_IN_PROGRESS_BAR = ("nc/nc1", "nc/nc2_etf_centered", "nc/nc3_centered")


def log_spaced(per_decade: int = 10) -> Callable[[int], bool]:
    """A schedule for ``every_n_epochs``: about ``per_decade`` measurements while the number of epochs grows tenfold.

    Collapse is slow and is drawn on log axes. With 10 per decade it measures after 1, 2, 3, 4, 6, 7, 8, 10, 13, 16, 20, ...
    epochs.

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

    The classifier (the last linear layer) is detected; its input is measured over all training samples, in eval mode, in an
    extra pass. Values go to every logger, to the progress bar and to ``trainer.callback_metrics`` under ``nc/nc1``,
    ``nc/nc2_etf`` and so on (``nc/layer3/nc1`` for a layer), before ModelCheckpoint and EarlyStopping look at this epoch.
    Weights, optimizer, random streams and batch order are those of a run without the callback.

    Args:
        layers: names (shell patterns allowed) of modules whose outputs are measured too.
        classifier: name of the last linear layer; detected by default.
        num_classes: K; by default the classifier's number of outputs.
        metrics: ``"paper"`` (six metrics), or a name or names in :data:`lightning_nc.functional.METRICS`. Metrics that need the
            classifier's weight exist for the classifier's input alone.
        stages: any of ``"train"``, ``"validate"``, ``"test"``. The last two are measured from the batches of their loops, without
            an extra pass, under ``nc/val/`` and ``nc/test/`` (``nc/val_1/`` for a second dataloader).
        mode: how training data are measured: ``"exact"`` in an extra pass in eval mode; ``"online"`` reuses the features computed
            during training, in train mode and with weights that change within the epoch.
        every_n_epochs: an int, or a callable from epoch to bool such as :func:`log_spaced`. The first and the last epoch are
            always measured; with an int n also epochs n - 1, 2n - 1 and so on, when ``ModelCheckpoint(every_n_epochs=n)`` acts.
        dataloader: what the exact pass runs over instead of the training data, for example the same images without
            augmentation.
        target_fn: batch -> (B,) class indices; by default the second item of a pair, or ``label``, ``labels``, ``target``,
            ``targets`` or ``y`` of a mapping.
        forward_fn: (module, batch) -> anything; by default the module is called on the first item of the batch, or with the
            entries of a mapping that match its argument names.
        pool: how features of more than two dimensions become (B, d): ``"mean"``, ``"mean_channels_first"``,
            ``"mean_channels_last"``, ``"flatten"`` or a callable; see :func:`lightning_nc.measure`.
        strict: raise when a measurement fails; by default it warns once, says why, and training goes on.

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
        metrics: str | Sequence[str] = "paper",
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
            self.metrics = check_metrics(metrics)
            check_loader(dataloader)
            self._probe = Probe(layers, classifier, num_classes, target_fn, forward_fn, pool, strict)
        except ValueError as error:
            raise MisconfigurationException(str(error)) from error
        _check_schedule(every_n_epochs)
        if isinstance(stages, str) or not stages or not set(stages) <= STAGES.keys():
            raise MisconfigurationException(
                f"stages must be a sequence of any of {', '.join(map(repr, STAGES))}, got {stages!r}"
            )
        if mode not in ("exact", "online"):
            raise MisconfigurationException(f"mode must be 'exact' or 'online', got {mode!r}")
        if mode == "online" and dataloader is not None:
            raise MisconfigurationException(
                "mode='online' measures the batches of the training loop, so dataloader= has no effect; leave one of them out"
            )
        self.stages, self.mode = tuple(stages), mode
        self.every_n_epochs, self.dataloader, self.strict = every_n_epochs, dataloader, strict
        self.history: list[dict[str, Any]] = []
        self.previous_histories: list[list[dict[str, Any]]] = []
        self.class_means: Tensor | None = None
        self._classes: list[int] = []  # the classes of these means
        self._loops = RunningLoops(self._probe, self.metrics)
        self._epoch_began: float | None = None
        self._measured: tuple[int, int] | None = None  # epoch and step of the last measurement of training data
        self._weights = ""  # fingerprint of the weights being trained, at that measurement or before validation
        self._marks: dict[str, Any] = {}  # for the next row: partial, weights
        self._validation_due = self._fitting = False
        self._fits = 0

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

    def should_measure(self, trainer: Trainer) -> bool:
        """Whether the current epoch is measured: the first, the last as far as is known, and those of ``every_n_epochs``.

        Override it to choose by any other rule.
        """
        epoch = trainer.current_epoch
        every = self.every_n_epochs
        scheduled = every(epoch) if callable(every) else (epoch + 1) % every == 0
        return epoch == 0 or scheduled or is_last_epoch(trainer)

    # ------------------------------------------------------------------------------------------ around the run

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._probe.reset()
        self._fitting = stage == "fit"
        self._loops = RunningLoops(self._probe, self.metrics)
        self._epoch_began = None
        others = [c for c in trainer.callbacks if isinstance(c, NeuralCollapseCallback) and c is not self]  # type: ignore[attr-defined]
        if any(set(self.stages) & set(other.stages) and self._settings() != other._settings() for other in others):
            raise MisconfigurationException(
                "two NeuralCollapseCallbacks would log different numbers under the same keys; give them different stages, or "
                "measure the second with lightning_nc.measure"
            )
        if self._fitting:
            move_to_end(trainer, self)

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        for logger in trainer.loggers:
            experiment: Any = getattr(logger, "experiment", None)
            if hasattr(experiment, "define_metric"):  # W&B: epochs, not steps, along the x axis
                experiment.define_metric("nc/*", step_metric="epoch")

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._measured, self._validation_due = None, False
        if trainer.global_step or trainer.current_epoch:
            # Resumed: monitors look for the last values, and the last epoch may be measured already.
            known = {key: value for row in self.history for key, value in row.items() if key.startswith("nc/")}
            trainer.callback_metrics.update(_tensors(known, pl_module.device))
            steps = [(row["epoch"], row["step"]) for row in self.history if row["stage"] == "train"]
            self._measured = steps[-1] if steps else None
        elif self._fits and self.history:  # another training, of cross-validation for example
            self.previous_histories.append(self.history)
            self.history = []
        self._fits += 1
        if "validate" in self.stages and not trainer.enable_validation:
            rank_zero_warn(
                "stages has 'validate', but this run has no validation loop, so neural collapse is not measured there; give "
                "the Trainer validation data and the module a validation_step"
            )

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
            except Exception as error:  # a full disk or a server that is gone: the run itself is done and saved
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
        # trainer.test may load an older checkpoint, the best one, whose history is shorter.
        if self._fitting or not self.history:
            self.history = [dict(row) for row in state_dict["history"]]

    # ------------------------------------------------------------------------------------------------ training

    @override
    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._epoch_began = None

    @override
    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        first = self._epoch_began is None  # the first batch, or the first one after a resume in the middle of an epoch
        if first:
            self._epoch_began = perf_counter()
            due = self.should_measure(trainer)
            self._validation_due = self._validation_due or due
            self._loops.begin("train", due and self.mode == "online" and "train" in self.stages)
            self._marks = {"partial": True} if batch_idx and self.mode == "online" else {}
        self._start(trainer, pl_module, "train", batch)
        if first and self._loops.is_active("train"):  # after the start, which may run the model itself
            self._loops.watch_inputs(pl_module, batch)

    @override
    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        self._probe.pause()

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._loops.check_inputs()
        self._loops.finish("train", 0, None)
        # Before the validation loop, so that callbacks that monitor a value there see the one of this epoch.
        if trainer.is_last_batch:
            self._finish_epoch(trainer, pl_module)

    @override
    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # An epoch that max_steps ended has no last batch.
        self._finish_epoch(trainer, pl_module)

    def _finish_epoch(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if "train" not in self.stages or self._is_measured(trainer):
            return
        if self.mode == "online":
            self._measured, self._weights = (trainer.current_epoch, trainer.global_step), fingerprint(pl_module)
            self._finish_loop(trainer, pl_module, "train")
        elif self.should_measure(trainer):
            self._publish(trainer, pl_module, self._measure(trainer, pl_module, trainer.current_epoch))

    def _is_measured(self, trainer: Trainer) -> bool:
        return self._measured == (trainer.current_epoch, trainer.global_step)

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # Early stopping ended training after an epoch that was not due, or weight averaging has replaced the weights.
        if "train" not in self.stages or self.mode == "online" or not trainer.global_step:
            return
        if self._measured is not None and self._measured[1] == trainer.global_step:
            if not self._has_swapped(trainer, pl_module):
                return
            self._marks = {"weights": "swapped"}
            rank_zero_info(
                "neural collapse: another callback replaced the weights at the end of training (weight averaging, for example); "
                "the last row of history, with weights='swapped', is about the model that fit leaves"
            )
        epoch = max(trainer.current_epoch - 1, 0)
        values = self._measure(trainer, pl_module, epoch)
        # Lightning's own logging is closed by now.
        trainer.callback_metrics.update(_tensors(values, pl_module.device))
        for logger in trainer.loggers if values else ():
            logger.log_metrics({**values, "epoch": epoch}, step=trainer.global_step - 1)

    def _has_swapped(self, trainer: Trainer, pl_module: LightningModule) -> bool:
        """Whether, on any rank, the weights are others than when the training data were measured."""
        changed, ranks = fingerprint(pl_module) != self._weights, ranks_of(trainer)
        return changed if ranks is None else bool(all_max(changed, ranks))

    # ------------------------------------------------------------------------------------- validation and test

    @override
    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if "validate" in self.stages and trainer.state.fn == "fit" and not self._is_measured(trainer):
            self._weights = fingerprint(pl_module)

    @override
    def on_validation_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if "validate" not in self.stages or trainer.sanity_checking:
            return
        # If validation is less frequent, the next loop after an epoch that is due is measured.
        due = trainer.state.fn != "fit" or self._validation_due or self.should_measure(trainer)
        self._loops.begin("validate", due)
        self._validation_due, self._marks = False, {}
        if due and trainer.state.fn == "fit" and self._has_swapped(trainer, pl_module):
            self._marks = {"weights": "swapped"}
            if self._probe.is_new("swapped"):
                rank_zero_info(
                    "neural collapse: validation runs with other weights than those being trained (weight averaging, for "
                    "example), so nc/val/ and nc/ of one epoch are about different weights; the rows say weights='swapped'"
                )

    @override
    def on_validation_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        if trainer.sanity_checking and self._uses_loops() and self._is_ready(pl_module):
            # Nothing to measure, but a model that is compiled in its first call must have its hooks before.
            self._guarded(lambda: self._attach(trainer, pl_module, batch))
        self._start(trainer, pl_module, "validate", batch, dataloader_idx)

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
        self._loops.finish("validate", dataloader_idx, _own(trainer, trainer.val_dataloaders, dataloader_idx))

    @override
    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._finish_loop(trainer, pl_module, "validate")

    @override
    def on_test_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._loops.begin("test", "test" in self.stages)

    @override
    def on_test_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        self._start(trainer, pl_module, "test", batch, dataloader_idx)

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
        self._loops.finish("test", dataloader_idx, _own(trainer, trainer.test_dataloaders, dataloader_idx))

    @override
    def on_test_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._finish_loop(trainer, pl_module, "test")

    # ------------------------------------------------------------------------------------------- running loops

    def _uses_loops(self) -> bool:
        return self.mode == "online" or self.stages != ("train",)

    def _is_ready(self, pl_module: LightningModule) -> bool:
        """False while a lazy layer waits for the first training batch to take its shape, and its numbers, from."""
        return self._probe.attached or not any(map(is_lazy, chain(pl_module.parameters(), pl_module.buffers())))

    def _attach(self, trainer: Trainer, pl_module: LightningModule, batch: Any) -> None:
        if not self._probe.attached:
            with evaluation_mode(pl_module, trainer.strategy.root_device):
                self._probe.attach(model_to_call(trainer, pl_module), batch, trainer.precision_plugin.forward_context)

    def _start(self, trainer: Trainer, pl_module: LightningModule, stage: str, batch: Any, loader: int = 0) -> None:
        if self._loops.is_active(stage) and self._is_ready(pl_module):
            self._loops.start(stage, loader, batch, lambda: self._attach(trainer, pl_module, batch))

    def _finish_loop(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if not self._loops.is_active(stage):
            return
        # Outside of fit the epoch is that of the weights, the last one measured as far as is known.
        last = max((row["epoch"] for row in self.history), default=0)
        epoch = trainer.current_epoch if trainer.state.fn == "fit" else last
        batches = {"validate": trainer.num_val_batches, "test": trainer.num_test_batches}.get(stage, [0])
        marks = self._marks
        for loader, collector in self._loops.end(stage, len(batches) if trainer.world_size > 1 else None).items():
            values = self._guarded(partial(self._values_of_loop, trainer, pl_module, collector, stage)) or {}
            self._marks = marks
            self._publish(trainer, pl_module, self._remember(trainer, values, epoch, stage, loader))

    def _values_of_loop(
        self, trainer: Trainer, pl_module: LightningModule, collector: Collector, stage: str
    ) -> dict[str, float]:
        collector.synchronize(ranks_of(trainer))
        if wide := collector.too_wide():
            self._probe.warn_once(
                "wide",
                f"nc1 of {', '.join(layer or 'the classifier input' for layer in wide)} is left out: features this wide need a "
                "second pass, which only mode='exact' makes, on the training data. Fewer layers or pool='mean' avoid it",
            )
        return self._values(collector, stage)

    # ------------------------------------------------------------------------------------------- the exact pass

    def _measure(self, trainer: Trainer, pl_module: LightningModule, epoch: int) -> dict[str, float]:
        """Measure the training data; the values by key, also appended to the history."""
        self._measured, began = (trainer.current_epoch, trainer.global_step), perf_counter()
        values = self._guarded(lambda: self._run(trainer, pl_module))
        if not self._uses_loops():
            self._probe.detach()
        if values is None:
            return {}
        took = perf_counter() - began
        epoch_took = math.inf if self._epoch_began is None else began - self._epoch_began
        if took > max(1, 0.25 * epoch_took) and self._probe.is_new("slow"):
            rank_zero_info(
                f"measuring neural collapse took {took:.1f} s, {100 * took / epoch_took:.0f} % of the {epoch_took:.1f} s of the "
                "epoch before it; NeuralCollapseCallback(every_n_epochs=...) measures less often, mode='online' without an "
                "extra pass"
            )
        return self._remember(trainer, values, epoch, "train")

    def _run(self, trainer: Trainer, pl_module: LightningModule) -> dict[str, float]:
        self._weights = fingerprint(pl_module)
        with evaluation_mode(pl_module, trainer.strategy.root_device):
            try:
                loader, total = training_data(trainer, self.dataloader)
            except Exception as error:  # which the pass tells the other ranks
                loader, total = _raising(error), None
            batches = MappedBatches(
                Progress(trainer, loader, total), lambda batch: to_device(trainer, pl_module, batch)
            )
            collector = Collector(self._probe, self.metrics)
            context = trainer.precision_plugin.forward_context
            with warn_if_moved(loader):
                model = model_to_call(trainer, pl_module)
                exact_pass(collector, model, batches, context, ranks_of(trainer), total or 0)
            return self._values(collector, "train")

    # ---------------------------------------------------------------------------------------- what becomes of values

    def _guarded(self, measure: Callable[[], _T]) -> _T | None:
        """Call ``measure``; warn and return None if it raises."""
        try:
            return measure()
        except Exception as error:
            if self.strict:
                raise
            if self._probe.is_new("cannot be measured"):
                # On every rank: the reason may be known to one of them alone.
                warnings.warn(
                    f"neural collapse cannot be measured, training goes on: {error} (NeuralCollapseCallback(strict=True) "
                    "raises instead)",
                    stacklevel=2,
                )
            return None

    def _values(self, collector: Collector, stage: str) -> dict[str, float]:
        values = collector.values()
        if (stage == "train" or "train" not in self.stages) and (means := collector.class_means()) is not None:
            self.class_means, self._classes = means
        return values

    def _remember(
        self, trainer: Trainer, values: dict[str, float], epoch: int, stage: str, loader: int = 0
    ) -> dict[str, float]:
        """Append a row to the history; the values by the keys under which they are logged."""
        logged = {}
        for key, value in values.items():
            parts = parse_key(key)
            logged[make_key(parts.metric, parts.layer, stage, loader)] = value
        if logged:
            self.history.append({"stage": stage, "epoch": epoch, "step": trainer.global_step, **self._marks, **logged})
        self._marks = {}
        return logged

    def _publish(self, trainer: Trainer, pl_module: LightningModule, values: dict[str, float]) -> None:
        tensors = _tensors(values, pl_module.device)
        for key, value in tensors.items():
            # The maximum of one value is the value itself, in its own precision. All ranks have the same value, so none needs
            # to ask the others.
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

    def _settings(self) -> tuple[Any, ...]:
        p = self._probe
        return self.mode, self.dataloader, p.classifier, p.num_classes, p.target_fn, p.forward_fn, p.pool


def _check_schedule(every_n_epochs: Any) -> None:
    if not callable(every_n_epochs) and (not isinstance(every_n_epochs, numbers.Integral) or every_n_epochs < 1):
        raise MisconfigurationException(
            f"every_n_epochs must be a positive integer or a callable from epoch to bool, got {every_n_epochs!r}"
        )
    if getattr(every_n_epochs, "__name__", "") == log_spaced.__name__:
        raise MisconfigurationException("every_n_epochs=log_spaced lacks its parentheses; write log_spaced()")


def _own(trainer: Trainer, loaders: Any, index: int) -> int | None:
    return own_samples(loader_at(loaders, index)) if trainer.world_size > 1 else None


def _raising(error: Exception) -> Iterator[Any]:
    raise error
    yield


def _tensors(values: dict[str, float], device: torch.device) -> dict[str, Tensor]:
    return {key: torch.tensor(value, dtype=state_dtype(device)) for key, value in values.items()}
