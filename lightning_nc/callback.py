"""The Lightning callback: when to measure, and where the values go."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import fields
from functools import partial
from time import perf_counter
from typing import Any

from lightning.fabric.utilities import rank_zero_info, rank_zero_warn
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn
from typing_extensions import override

from lightning_nc.functional.projection import check_few
from lightning_nc.history import History
from lightning_nc.loggers import publish_figures, publish_scene
from lightning_nc.measuring.batches import Pool
from lightning_nc.measuring.collector import FEATURE_BUDGET, Collector, Options
from lightning_nc.measuring.evaluation import names_to_measure
from lightning_nc.measuring.held_out import TrainingMeans
from lightning_nc.measuring.loaders import check_loader
from lightning_nc.measuring.loops import RunningLoops, is_ready
from lightning_nc.measuring.probe import Probe
from lightning_nc.measuring.snapshot import fingerprint
from lightning_nc.results import Results
from lightning_nc.schedule import check_schedule, is_due
from lightning_nc.trainers import (
    attach,
    has_other_weights,
    is_last_epoch,
    log_after_training,
    log_values,
    move_to_end,
    own_samples_of,
    ranks_of,
    run_exact_pass,
    tensors_of,
    use_epoch_as_axis,
)

__all__ = ["NeuralCollapseCallback"]

_NO_VALIDATION = (
    "stages has 'validate', but this run has no validation loop, so neural collapse is not measured there; give the Trainer "
    "validation data and the module a validation_step"
)


class NeuralCollapseCallback(Results, Callback):
    r"""Measures neural collapse on the training data at the end of an epoch, and changes nothing in the training.

    The classifier (the last linear layer) is detected; its input is measured over all training samples, in eval mode, in an
    extra pass. Values go to every logger, to the progress bar and to ``trainer.callback_metrics`` under ``nc/nc1``,
    ``nc/nc2_etf`` and so on (``nc/layer3/nc1`` for a layer), before ModelCheckpoint and EarlyStopping look at this epoch.
    Weights, optimizer, random streams and batch order are those of a run without the callback.

    Args:
        layers: names (shell patterns allowed) of modules whose outputs are measured too.
        classifier: name of the last linear layer; detected by default.
        num_classes: K; by default the classifier's number of outputs.
        metrics: ``"paper"`` (six metrics), ``"all"``, or a name or names in :data:`lightning_nc.functional.METRICS`. Metrics that
            need the classifier's weight exist for the classifier's input alone.
        stages: any of ``"train"``, ``"validate"``, ``"test"``. The last two are measured from the batches of their loops, without
            an extra pass, under ``nc/val/`` and ``nc/test/`` (``nc/val_1/`` for a second dataloader).
        mode: ``"exact"`` measures the training data in an extra pass in eval mode; ``"online"`` reuses the features computed
            during training, in train mode and with weights that change within the epoch.
        every_n_epochs: an int, or a callable from epoch to bool such as :func:`log_spaced`. The first and the last epoch are
            always measured; with an int n also epochs n - 1, 2n - 1 and so on, when ``ModelCheckpoint(every_n_epochs=n)`` acts.
        dataloader: what the exact pass runs over instead of the training data, such as the images without augmentation.
        target_fn: batch -> labels; by default the second item of a pair, or ``label``, ``labels``, ``target``, ``targets`` or
            ``y`` of a mapping. Labels are class indices (B,), one-hot rows (B, K), or one per position, (B, T) or (B, H, W), of
            a classifier that is called on these positions. ``"next_token"``: the next entry of ``labels``, else ``input_ids``.
        forward_fn: (module, batch) -> anything; by default the module is called on the first item of the batch, or with the
            entries of a mapping that match its argument names.
        pool: how features of more than two dimensions become (B, d): ``"mean"`` over positions (the layers around show the axis
            of the features), ``"mean_channels_first"``, ``"mean_channels_last"``, ``"first"`` or ``"last"`` position that is not
            padding, ``"flatten"``, or a callable. Features at positions that have labels of their own are not pooled.
        strict: raise when a measurement fails; by default it warns once, says why, and training goes on.
        ignore_index: samples and positions with this label are left out.
        ood_dataloader: data of no class, for ``nc5``, which is measured on the training data in ``"exact"`` mode.
        feature_budget: bytes of features that may be kept, on each rank, for metrics that compare samples with the class means
            (``nc4``, ``ncc_error``, ``nc1_cdnv_directional``); beyond it the exact pass takes a second one.
        pairs: estimate metrics over pairs of classes from so many random pairs; see :class:`lightning_nc.NeuralCollapse`.
        geometry: two to four classes, such as ``(0, 1, 2)``, of which 40 samples are kept at every measurement, in the
            coordinates of :meth:`plot_geometry` and :meth:`animate`. Needs ``mode="exact"``.

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
        target_fn: Callable[[Any], Tensor] | str | None = None,
        forward_fn: Callable[[nn.Module, Any], Any] | None = None,
        pool: Pool = "mean",
        strict: bool = False,
        ignore_index: int = -100,
        ood_dataloader: Iterable[Any] | None = None,
        feature_budget: float = FEATURE_BUDGET,
        pairs: float | None = None,
        geometry: Sequence[int] | None = None,
    ) -> None:
        try:
            self.metrics = names_to_measure(metrics, ood_dataloader)
            check_loader(dataloader)
            check_loader(ood_dataloader)
            check_schedule(every_n_epochs, stages)
            chosen = () if geometry is None else check_few(geometry)
            probe = Probe(layers, classifier, num_classes, target_fn, forward_fn, pool, strict, ignore_index, pairs)
        except ValueError as error:
            raise MisconfigurationException(str(error)) from error
        _check_mode(mode, dataloader, ood_dataloader, geometry)
        self._probe, self.stages, self.mode = probe, tuple(stages), mode
        self.every_n_epochs, self.dataloader, self.strict = every_n_epochs, dataloader, strict
        self.history, self.previous_histories = History(), list[History]()
        self.ood_dataloader, self._options = ood_dataloader, Options(budget=feature_budget, geometry=chosen)
        self._means = TrainingMeans(expected="train" in stages and mode == "exact")
        self._loops = RunningLoops(self._probe, self.metrics)
        self._epoch_began: float | None = None
        self._measured: tuple[int, int] | None = None  # epoch and step of the last measurement of training data
        self._weights = ""  # fingerprint of the weights being trained, at that measurement or before validation
        self._partial = self._swapped = False  # the epoch was resumed in its middle; validation runs with other weights
        self._validation_due = self._fitting = self._has_fitted = False

    @property
    @override
    def state_key(self) -> str:
        return self._generate_state_key(
            layers=self._probe.layers, stages=self.stages, mode=self.mode, names=self.metrics
        )

    def should_measure(self, trainer: Trainer) -> bool:
        """Whether the current epoch is measured: first, last as far as is known, or ``every_n_epochs``. May be overridden."""
        return is_due(self.every_n_epochs, trainer.current_epoch, is_last_epoch(trainer))

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._probe.reset()
        self._fitting = stage == "fit"
        self._loops = RunningLoops(self._probe, self.metrics)
        _check_others(trainer, self)
        if self._fitting:
            move_to_end(trainer, self)

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        use_epoch_as_axis(trainer)
        self._measured, self._epoch_began, self._validation_due = None, None, False
        if trainer.global_step or trainer.current_epoch:
            # Resumed: monitors look for the last values, and the last epoch may be measured already.
            known = {key: value for row in self.history for key, value in row.items() if key.startswith("nc/")}
            trainer.callback_metrics.update(tensors_of(known, pl_module.device))
            steps = ((row["epoch"], row["step"]) for row in reversed(self.history) if row["stage"] == "train")
            self._measured, self._weights = next(steps, None), fingerprint(pl_module)
        elif self._has_fitted and self.history:  # another training, of cross-validation for example
            self.previous_histories.append(self.history)
            self.history = History()
        self._has_fitted = True
        if "validate" in self.stages and not trainer.enable_validation:
            rank_zero_warn(_NO_VALIDATION)

    @override
    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        every = _callbacks_of(trainer)
        if every[0] is self and trainer.is_global_zero:
            publish_figures(trainer.loggers, [callback.history for callback in every])

    @override
    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._loops.stop_watching()
        self._probe.detach()

    @override
    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._probe.detach()

    @override
    def state_dict(self) -> dict[str, Any]:
        return self.history.state()

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        if self._fitting or not self.history:  # trainer.test may load an older checkpoint, with a shorter history
            self.restore(state_dict)
            self._has_fitted = True

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
            self._loops.begin("train", due and self.mode == "online" and "train" in self.stages, self._options)
            self._partial = batch_idx > 0
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
        # Before the validation loop, so that a callback that monitors a value there sees that of this epoch.
        if trainer.is_last_batch:
            self._finish_epoch(trainer, pl_module)

    @override
    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._finish_epoch(trainer, pl_module)  # an epoch that max_steps ended has no last batch

    def _finish_epoch(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if "train" not in self.stages or self._measured == (trainer.current_epoch, trainer.global_step):
            return
        if self.mode == "online":
            self._measured, self._weights = (trainer.current_epoch, trainer.global_step), fingerprint(pl_module)
            self._finish_loop(trainer, pl_module, "train")
        elif self.should_measure(trainer):
            log_values(trainer, pl_module, self._measure(trainer, pl_module, trainer.current_epoch))

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # Early stopping ended training after an epoch that was not due, or weight averaging replaced the weights.
        if "train" not in self.stages or self.mode == "online" or not trainer.global_step:
            return
        swapped = self._measured is not None and self._measured[1] == trainer.global_step
        if swapped and not has_other_weights(trainer, pl_module, self._weights):
            return
        if swapped:
            _say_swapped(self._probe, "the last row is about the model that fit leaves,")
        epoch = max(trainer.current_epoch - 1, 0)
        values = self._measure(trainer, pl_module, epoch, **({"weights": "swapped"} if swapped else {}))
        log_after_training(trainer, pl_module, values, epoch)

    @override
    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if "validate" in self.stages and trainer.state.fn == "fit":
            self._weights = fingerprint(pl_module)

    @override
    def on_validation_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if "validate" not in self.stages or trainer.sanity_checking:
            return
        # If validation is less frequent, the next loop after an epoch that is due is measured.
        due = trainer.state.fn != "fit" or self._validation_due or self.should_measure(trainer)
        self._begin_held_out(trainer, pl_module, "validate", due)
        self._validation_due = False
        self._swapped = due and trainer.state.fn == "fit" and has_other_weights(trainer, pl_module, self._weights)
        if self._swapped:
            _say_swapped(self._probe, "nc/val/ is")

    @override
    def on_validation_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        if trainer.sanity_checking and self._uses_loops() and is_ready(self._probe, pl_module):
            # Nothing to measure, but a model that is compiled in its first call must have its hooks before.
            self._probe.attempt(lambda: attach(trainer, pl_module, self._probe, batch))
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
        own = own_samples_of(trainer, trainer.val_dataloaders, dataloader_idx, batch_idx)
        self._loops.finish("validate", dataloader_idx, own)

    @override
    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._finish_loop(trainer, pl_module, "validate")

    @override
    def on_test_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._begin_held_out(trainer, pl_module, "test", "test" in self.stages)

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
        own = own_samples_of(trainer, trainer.test_dataloaders, dataloader_idx, batch_idx)
        self._loops.finish("test", dataloader_idx, own)

    @override
    def on_test_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._finish_loop(trainer, pl_module, "test")

    def _uses_loops(self) -> bool:
        return self.mode == "online" or self.stages != ("train",)

    def _start(self, trainer: Trainer, pl_module: LightningModule, stage: str, batch: Any, loader: int = 0) -> None:
        self._loops.start(stage, loader, pl_module, batch, lambda: attach(trainer, pl_module, self._probe, batch))

    def _begin_held_out(self, trainer: Trainer, pl_module: LightningModule, stage: str, due: bool) -> None:
        if due:
            changed = partial(has_other_weights, trainer, pl_module)
            names, options = self._means.settings(self._probe, self.metrics, stage, self._options, changed)
            self._loops.begin(stage, True, options, names)
        else:
            self._loops.begin(stage, False)

    def _finish_loop(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if not self._loops.is_active(stage):
            return
        # Outside of fit the epoch is that of the weights, the last one measured as far as is known.
        last = max((row["epoch"] for row in self.history), default=0)
        epoch = trainer.current_epoch if trainer.state.fn == "fit" else last
        batches = {"validate": trainer.num_val_batches, "test": trainer.num_test_batches}.get(stage, [0])
        marks: dict[str, Any] = {"partial": True} if stage == "train" and self._partial else {}
        marks |= {"weights": "swapped"} if stage == "validate" and self._swapped else {}
        for loader, collector in self._loops.end(stage, len(batches) if trainer.world_size > 1 else None).items():
            if self._probe.attempt(partial(collector.conclude, ranks_of(trainer))):
                log_values(trainer, pl_module, self._remember(trainer, collector, epoch, stage, loader, **marks))

    def _measure(self, trainer: Trainer, pl_module: LightningModule, epoch: int, **marks: Any) -> dict[str, float]:
        """Measure the training data; the values by key, also appended to the history."""
        self._measured, began = (trainer.current_epoch, trainer.global_step), perf_counter()
        self._weights = fingerprint(pl_module)
        collector = Collector(self._probe, self.metrics, self._options)
        data = self.dataloader, self.ood_dataloader
        done = self._probe.attempt(lambda: run_exact_pass(trainer, pl_module, collector, *data))
        values = self._remember(trainer, collector, epoch, "train", **marks) if done else {}
        if not self._uses_loops():
            self._probe.detach()
        if done:
            _say_if_slow(self._probe, perf_counter() - began, began - (self._epoch_began or -math.inf))
        return values

    def _remember(
        self, trainer: Trainer, collector: Collector, epoch: int, stage: str, loader: int = 0, **marks: Any
    ) -> dict[str, float]:
        """Append a row to the history; the values by the keys under which they are logged."""
        at = {"epoch": epoch, "step": trainer.global_step}
        values = self._probe.attempt(lambda: self.remember(collector, stage, loader, **at, **marks)) or {}
        if stage == "train" and values and self.mode == "exact":
            self._means.keep(collector, self._weights)
            if self._options.geometry and self.history.scenes and trainer.is_global_zero:
                publish_scene(trainer.loggers, self.history.scenes[-1])
        return values


def _check_mode(mode: str, dataloader: Any, ood_dataloader: Any, geometry: Any) -> None:
    if mode not in ("exact", "online"):
        raise MisconfigurationException(f"mode must be 'exact' or 'online', got {mode!r}")
    for name, given in (("dataloader", dataloader), ("ood_dataloader", ood_dataloader)):
        if mode == "online" and given is not None:
            raise MisconfigurationException(
                f"mode='online' measures the batches of the training loop, so {name}= has no effect; leave one of them out"
            )
    if mode == "online" and geometry is not None:
        raise MisconfigurationException(
            "geometry= keeps the same samples in every epoch, which only mode='exact' can, because mode='online' sees them in "
            "another order and with other weights each time; leave one of them out"
        )


def _callbacks_of(trainer: Trainer) -> list[NeuralCollapseCallback]:
    return [callback for callback in trainer.callbacks if isinstance(callback, NeuralCollapseCallback)]  # type: ignore[attr-defined]


def _say_if_slow(probe: Probe, took: float, epoch_took: float) -> None:
    if took > max(1, 0.25 * epoch_took) and probe.is_new("slow"):
        rank_zero_info(
            f"measuring neural collapse took {took:.1f} s, {100 * took / epoch_took:.0f} % of the {epoch_took:.1f} s of the "
            "epoch before it; NeuralCollapseCallback(every_n_epochs=...) measures less often, mode='online' without an extra "
            "pass"
        )


def _say_swapped(probe: Probe, what: str) -> None:
    if probe.is_new(what):
        rank_zero_info(
            f"neural collapse: another callback has replaced the weights (weight averaging, for example), so {what} not about "
            "the weights of the last training step; history marks such rows with weights='swapped'"
        )


def _check_others(trainer: Trainer, callback: NeuralCollapseCallback) -> None:
    def settings(of: NeuralCollapseCallback) -> tuple[Any, ...]:
        names = [field.name for field in fields(Probe) if field.init and field.name not in ("layers", "strict")]
        return of.mode, of.dataloader, *(getattr(of._probe, name) for name in names)

    others = [other for other in _callbacks_of(trainer) if set(other.stages) & set(callback.stages)]
    if any(settings(other) != settings(callback) for other in others):
        raise MisconfigurationException(
            "two NeuralCollapseCallbacks would log different numbers under the same keys; give them different stages, or "
            "measure the second with lightning_nc.measure"
        )
