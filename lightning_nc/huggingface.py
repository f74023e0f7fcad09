"""The callback for ``transformers.Trainer``: when to measure, and where the values go."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from lightning_nc.extras import needed
from lightning_nc.functional.projection import check_few
from lightning_nc.history import History
from lightning_nc.measuring.batches import Pool
from lightning_nc.measuring.collector import FEATURE_BUDGET, Collector, Options
from lightning_nc.measuring.distributed import all_max, ranks_on
from lightning_nc.measuring.evaluation import every_sample_once, names_to_measure, run_over
from lightning_nc.measuring.held_out import TrainingMeans
from lightning_nc.measuring.loaders import check_loader, measurement_loader, rank_of
from lightning_nc.measuring.probe import Probe
from lightning_nc.measuring.snapshot import fingerprint
from lightning_nc.results import Results
from lightning_nc.saved import state_of
from lightning_nc.schedule import check_schedule, is_due

with needed("lightning_nc.huggingface", '"lightning-neural-collapse[huggingface]"'):
    from transformers.trainer_callback import CallbackHandler, TrainerCallback

if TYPE_CHECKING:
    from transformers import TrainerControl, TrainerState, TrainingArguments

__all__ = ["NeuralCollapseCallback"]

_Load = Callable[[], tuple[Iterable[Any], int | None]]


class NeuralCollapseCallback(Results, TrainerCallback):
    r"""Measures neural collapse at the end of an epoch of a ``transformers.Trainer``, and changes nothing in the training.

    The classifier (the last linear layer) is detected; its input is measured over all training samples, in eval mode, in an
    extra pass. Values go to ``trainer.state.log_history`` and to the Trainer's reporters (W&B, TensorBoard, ...) under
    ``nc/nc1``, ``nc/nc2_etf`` and so on (``nc/layer3/nc1`` for a layer), with the Trainer's epoch and step. They are saved
    in the log history of a checkpoint. Weights, optimizer, random streams and the Trainer's own logs are those of a run
    without the callback.

    The arguments are those of :class:`lightning_nc.NeuralCollapseCallback`, with these differences:

    Args:
        layers, classifier, num_classes, metrics, target_fn, forward_fn, pool, strict, ignore_index: the same.
        ood_dataloader, feature_budget, pairs, geometry: the same.
        stages: any of ``"train"``, ``"validate"``, ``"test"``. The last two are measured in an extra pass over the data that
            ``trainer.evaluate`` and ``trainer.predict`` have gone through, in training as often as an epoch is due, under
            ``nc/val/`` and ``nc/test/``. What is evaluated with a ``metric_key_prefix`` that begins with ``"test"`` is of the
            stage ``"test"``. Several data sets are counted in the order of their first evaluation (``nc/val_1/`` for the
            second).
        mode: ``"exact"``; a callback of transformers does not see the training batches that ``"online"`` would measure.
        every_n_epochs: an int, or a callable from epoch to bool, where the first epoch is 0. The first and the last epoch are
            always measured, also one that ``max_steps`` or early stopping ends. In ``history`` as in the log history, the
            epoch is the number of epochs done, 1.0 after the first.
        dataloader: what the pass of the stage ``"train"`` runs over instead of the training data. In a distributed run the
            ranks share a ``DataLoader``.

    Raises:
        ValueError: for arguments that do not fit.

    Example::

        trainer.add_callback(NeuralCollapseCallback())
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
        if mode != "exact":
            raise ValueError(
                f"mode must be 'exact', got {mode!r}: a callback of transformers does not see the training batches. If an extra "
                "pass takes too long, measure less often with every_n_epochs=, or fewer samples with dataloader="
            )
        self.metrics = names_to_measure(metrics, ood_dataloader)
        check_loader(dataloader)
        check_loader(ood_dataloader)
        check_schedule(every_n_epochs, stages)
        self._probe = Probe(layers, classifier, num_classes, target_fn, forward_fn, pool, strict, ignore_index, pairs)
        self.stages, self.every_n_epochs, self.dataloader = tuple(stages), every_n_epochs, dataloader
        self.history, self.previous_histories = History(), list[History]()
        self.ood_dataloader, self._options = (
            ood_dataloader,
            Options(budget=feature_budget, geometry=() if geometry is None else check_few(geometry)),
        )
        self._means = TrainingMeans(expected="train" in stages)
        self._measured: int | None = None  # step of the last measurement of training data
        self._weights = ""  # fingerprint of the weights at the end of the last epoch
        self._training = self._has_trained = False
        self._evaluation_due = False  # an epoch was due and has not been evaluated
        self._evaluated: int | None = None  # step of the last measurement of an evaluation in training
        self._prefixes: dict[str, list[str]] = {}  # of the metrics of each stage's data sets

    def should_measure(self, args: TrainingArguments, state: TrainerState, control: TrainerControl) -> bool:
        """Whether the current epoch is measured: first, last as far as is known, or ``every_n_epochs``. May be overridden."""
        last = state.epoch > state.num_train_epochs - 1 or _is_over(state, control)
        return is_due(self.every_n_epochs, max(math.ceil(state.epoch) - 1, 0), last)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **kwargs: Any
    ) -> None:
        """Start a history, or continue that of the checkpoint."""
        self._probe.reset()
        self._prefixes, self._measured, self._evaluated = {}, None, None
        if state.global_step:
            self.restore(state_of(state.log_history, self.stages))
            self._measured = max((row["step"] for row in self.history if row["stage"] == "train"), default=None)
        elif self._has_trained and self.history:  # another training, of a search for hyperparameters for example
            self.previous_histories.append(self.history)
            self.history = History()
        self._training = self._has_trained = True
        self._evaluation_due, self._weights = False, fingerprint(model)

    def on_epoch_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Forget the evaluation of the epoch before."""
        self._evaluated = None

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Measure after the last step of an epoch, before a checkpoint of this step is saved."""
        if state.epoch == int(state.epoch) or state.global_step >= state.max_steps:
            self._finish_epoch(args, state, control, **kwargs)

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Measure after an epoch that another callback has ended."""
        self._finish_epoch(args, state, control, **kwargs)
        self._weights = fingerprint(kwargs["model"])
        self._evaluation_due |= self._evaluated is None and self.should_measure(args, state, control)

    def on_evaluate(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, metrics: Any = None, **kwargs: Any
    ) -> None:
        """Measure the data that were evaluated."""
        prefix = next((key.removesuffix("_runtime") for key in metrics or () if key.endswith("_runtime")), "eval")
        stage = "test" if prefix.split("_")[0] == "test" else "validate"
        if stage not in self.stages:
            return
        if self._training:
            goes_on = self._evaluated == state.global_step  # with another one of several data sets
            due = goes_on or self._evaluation_due or self.should_measure(args, state, control)
            if not due or not state.global_step:
                return
            self._evaluation_due, self._evaluated = False, state.global_step
        prefixes, loader = self._prefixes.setdefault(stage, []), kwargs["eval_dataloader"]
        if prefix not in prefixes:
            prefixes.append(prefix)
        values = self._measure(args, state, kwargs["model"], lambda: _copy_of(loader), stage, prefixes.index(prefix))
        self._report(args, state, control, values)

    on_predict = on_evaluate

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs: Any = None, **kwargs: Any
    ) -> None:
        """Measure after an epoch that was not due and that early stopping has made the last, before reporters close."""
        if self._training and "train_runtime" in (logs or ()) and _is_over(state, control):  # the Trainer's summary
            self._finish_epoch(args, state, control, **kwargs)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Measure the weights that training leaves if they are not the last ones: the Trainer may load the best ones."""
        self._training = False
        model, ranks = kwargs["model"], ranks_on(args.device)
        swapped = fingerprint(model) != self._weights
        if ranks is not None:
            swapped = bool(all_max(swapped, ranks))
        if swapped and "train" in self.stages and state.global_step:  # reporters have closed
            self._measure(args, state, model, self._training_data(**kwargs), "train", weights="swapped")

    def _finish_epoch(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any, **kwargs: Any
    ) -> None:
        if "train" not in self.stages or self._measured == state.global_step or not state.global_step:
            return
        if self.should_measure(args, state, control):
            self._measured = state.global_step
            values = self._measure(args, state, model, self._training_data(**kwargs), "train")
            self._report(args, state, control, values)

    def _training_data(self, train_dataloader: Any, **kwargs: Any) -> _Load:
        given = self.dataloader
        if given is None:
            return lambda: _copy_of(train_dataloader)
        return lambda: every_sample_once(given, *rank_of(train_dataloader))

    def _measure(
        self,
        args: TrainingArguments,
        state: TrainerState,
        model: Any,
        load: _Load,
        stage: str,
        loader: int = 0,
        **marks: Any,
    ) -> dict[str, float]:
        """Run the model over data; the values by the keys under which they are logged, also kept in both histories."""
        weights, ranks = fingerprint(model), ranks_on(args.device)
        names, options = self.metrics, replace(self._options, keep_weight=True)
        if stage != "train":

            def changed(before: str) -> bool:
                return weights != before if ranks is None else bool(all_max(weights != before, ranks))

            names, options = self._means.settings(self._probe, names, stage, options, changed)
        collector = Collector(self._probe, names, options)
        progress = state.is_local_process_zero and not args.disable_tqdm
        at = {"epoch": state.epoch or 0, "step": state.global_step}

        def run() -> dict[str, float]:
            ood = self.ood_dataloader if stage == "train" else None
            run_over(collector, model, load, args.device, progress, ranks, ood)
            return self.remember(collector, stage, loader, **at, **marks)

        try:
            values = self._probe.attempt(run) or {}
        finally:
            self._probe.detach()
        if values:
            row = {key: value for key, value in self.history[-1].items() if key != "stage"}
            scenes = [found for found in self.history.scenes[-1:] if (found.stage, found.step) == (stage, at["step"])]
            entry: dict[str, Any] = {**row, **at}
            if scenes and self._options.geometry:  # else the log history stays small
                entry["scene"] = scenes[0].text
            state.log_history.append(entry)
            if stage == "train":
                self._means.keep(collector, weights)
        return values

    def _report(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, values: Mapping[str, float]
    ) -> None:
        """Send values to the reporters."""
        if not values:
            return
        if (handler := _caller()) is None:
            self._probe.warn_once(
                "reporters", "no Trainer called this callback, so reporters such as W&B got no values"
            )
            return
        # Trainer.log would also cancel a log of the Trainer's own that is due in this step.
        handler.call_event("on_log", args, state, control, logs={**values, "epoch": state.epoch})


def _is_over(state: TrainerState, control: TrainerControl) -> bool:
    return bool(control.should_training_stop or state.global_step >= state.max_steps)


def _copy_of(loader: Any) -> tuple[Iterable[Any], int | None]:
    return measurement_loader(loader, None, *rank_of(loader))


def _caller() -> CallbackHandler | None:
    """The handler of the Trainer that is calling, which holds the reporters: a callback is given no other way to them."""
    frame = inspect.currentframe()
    while frame is not None:
        if isinstance(caller := frame.f_locals.get("self"), CallbackHandler):
            return caller
        frame = frame.f_back
    return None
