"""What to measure of a model, checked; and the features of one batch, by layer, with their labels."""

from __future__ import annotations

import difflib
import fnmatch
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import cache, partial
from typing import Any, TypeVar

import numpy
from lightning.fabric.utilities import rank_zero_info
from torch import Tensor, nn

from lightning_nc.functional.pairs import check_pairs
from lightning_nc.keys import is_reserved
from lightning_nc.measuring.batches import (
    POOLS,
    Pool,
    copy_batch,
    listed,
    pool_features,
    rows_at_positions,
    run_forward,
    targets_of,
)
from lightning_nc.measuring.classifier import Classifier, find_classifier, outputs_of
from lightning_nc.measuring.hooks import Recorder, named_modules, tensors_in
from lightning_nc.measuring.labels import NEXT_TOKEN, Labels, check_shift, check_type, find_labels, next_token
from lightning_nc.measuring.trial import INPUT, NotCalledError, Trial, uncalled
from lightning_nc.moments import check_batch
from lightning_nc.simplex_etf import SimplexETF

__all__ = ["INPUT", "NotCalledError", "Probe", "match_layers"]

_T = TypeVar("_T")

_ORDER = (
    "the rows of {} are taken to be all positions of the first sample, then of the second; this was not checked, because the "
    "first batch has one sample or the model runs on whole batches only. If the model flattens (T, B, d), transpose it first"
)
_MASK = (
    "attention_mask has the shape {}, but the classifier {} receives {} positions, so padding is not left out; pass pool=, a "
    "function from (B, T, d) to (B, d)"
)


@dataclass
class Probe:
    """What to measure of a model; the arguments are those of :func:`lightning_nc.measure`, checked by the constructor.

    Between :meth:`start` and :meth:`features` the model runs on a batch, by :meth:`forward` or in a training step.
    """

    layers: Sequence[str] | None = None
    classifier: str | None = None
    num_classes: int | None = None
    target_fn: Callable[[Any], Tensor] | str | None = None
    forward_fn: Callable[[nn.Module, Any], Any] | None = None
    pool: Pool = "mean"
    strict: bool = False  # raise for a layer that cannot be measured; else warn and leave it out
    ignore_index: int = -100
    pairs: float | None = None
    head: Classifier | None = field(init=False, repr=False, default=None)
    classes: int = field(init=False, repr=False, default=0)
    widths: dict[str, int] = field(init=False, repr=False, default_factory=dict)
    _recorder: Recorder | None = field(init=False, repr=False, default=None)
    _axes: dict[str, int] = field(init=False, repr=False, default_factory=dict)
    _labels: Labels | None = field(init=False, repr=False, default=None)
    _target: Tensor | None = field(init=False, repr=False, default=None)
    _model: nn.Module | None = field(init=False, repr=False, default=None)  # until a batch tells how it shifts labels
    _unchecked: list[str] = field(init=False, repr=False, default_factory=list)
    _said: set[str] = field(init=False, repr=False, default_factory=set)

    def __post_init__(self) -> None:
        if isinstance(self.layers, str):
            raise ValueError(
                f"layers must be a sequence of names, got the string {self.layers!r}; write [{self.layers!r}]"
            )
        if self.num_classes is not None and (
            not isinstance(self.num_classes, int | numpy.integer) or self.num_classes < 2
        ):
            raise ValueError(f"num_classes must be an integer of at least 2, got {self.num_classes!r}")
        if not callable(self.pool) and self.pool not in POOLS:
            raise ValueError(f"pool must be one of {', '.join(map(repr, POOLS))}, or a callable, got {self.pool!r}")
        for name, also in (("target_fn", (None, NEXT_TOKEN)), ("forward_fn", (None,))):
            if not callable(getattr(self, name)) and getattr(self, name) not in also:
                words = f" or {NEXT_TOKEN!r}" if NEXT_TOKEN in also else ""
                raise ValueError(f"{name} must be a callable{words}, got {getattr(self, name)!r}")
        check_pairs(self.pairs)
        if not isinstance(self.ignore_index, int | numpy.integer):
            raise ValueError(f"ignore_index must be an integer, got {self.ignore_index!r}")

    @property
    def attached(self) -> bool:
        """Whether the hooks are registered."""
        return self._recorder is not None

    def attach(self, model: nn.Module, batch: Any, forward_context: Any = nullcontext) -> None:
        """Find the classifier and the axes of the features by running the model on a few samples; register the hooks.

        Raises:
            LookupError: if the classifier or all layers cannot be found.
            ValueError: for labels that do not fit.
        """
        self.detach()
        raw = self.targets(copy_batch(batch))
        self._model = None if check_shift(batch, self.target_fn, self.ignore_index, model) else model
        names = self._match(model)
        with forward_context():
            trial = Trial(model, batch, len(raw), self.forward, self.targets, self.pool)
        self.head = self._find_head(model, trial)
        if trial.sharded:  # its weight is seen in a forward only
            with forward_context():
                trial.run()
        self._labels = self._find_labels(raw, trial)
        target = self._labels.indices(raw)
        # Reading labels makes the host wait for the device, so there only those of the first batch are checked.
        self._labels.check(raw, target)
        self._check_layers(names, trial, tuple(target.shape[1:]))
        modules = named_modules(model)
        inputs = {} if self.head is None else {INPUT: self.head.module}
        self._recorder = Recorder({name: modules[name] for name in self.widths if name != INPUT}, inputs)

    def detach(self) -> None:
        """Remove the hooks."""
        for hooks in (self._recorder, self.head):
            if hooks is not None:
                hooks.remove()
        self._recorder = self.head = self._model = None

    def reset(self) -> None:
        """Prepare for another run."""
        self.detach()
        self._said = set()

    def is_new(self, topic: str) -> bool:
        """Whether ``topic`` was not mentioned yet in this run, for messages that appear once."""
        new = topic not in self._said
        self._said.add(topic)
        return new

    def warn_once(self, topic: str, message: str) -> None:
        """Warn, once in a run."""
        if self.is_new(topic):
            _warn(f"neural collapse: {message}")

    def attempt(self, measure: Callable[[], _T]) -> _T | None:
        """Call ``measure``; unless strict, warn and return None if it raises."""
        try:
            return measure()
        except Exception as error:
            if self.strict:
                raise
            # On every rank: the reason may be known to one of them alone.
            if self.is_new("cannot be measured"):
                _warn(
                    f"neural collapse cannot be measured, training goes on: {error} (NeuralCollapseCallback(strict=True) "
                    "raises instead)"
                )
            return None

    def forward(self, model: nn.Module, batch: Any) -> Any:
        """Run the model on a batch."""
        if self.forward_fn is not None:
            return self.forward_fn(model, batch)
        try:
            return run_forward(model, batch)
        except (TypeError, ValueError, IndexError, KeyError, AttributeError) as error:
            raise TypeError(
                f"calling the model on the first item of a batch, or on the entries of a mapping, failed: {error}; pass "
                "forward_fn, a function of the module and the batch"
            ) from error

    def start(self, batch: Any) -> None:
        """Record the features of the calls to come, which are on ``batch``."""
        assert self._recorder is not None
        assert self._labels is not None
        raw = self.targets(batch)
        if self._model is not None and check_shift(batch, self.target_fn, self.ignore_index, self._model):
            self._model = None
        self._target = self._labels.indices(raw)
        if raw.device.type == "cpu":
            self._labels.check(raw, self._target)
        mask = batch.get("attention_mask") if hasattr(batch, "get") else None
        if self.pool == "last" and mask is None and isinstance(batch, Mapping) and "input_ids" in batch:
            self.warn_once(
                "no mask", "the batch has no attention_mask, so pool='last' takes the last position, also of padding"
            )
        self._recorder.start(partial(self._pool, mask))

    def start_unlabeled(self, batch: Any) -> None:
        """Record the features of the calls to come, which are on ``batch``, whose samples are of no class."""
        assert self._recorder is not None
        if self._target is None or self._target.dim() > 1:
            raise ValueError("nc5 needs one feature vector per sample, but the labels are per position")
        first = next((tensor for tensor in tensors_in(batch) if tensor.dim()), None)
        if first is None:
            raise LookupError("a batch of ood_dataloader holds no tensor")
        self._target = self._target.new_zeros(len(first))
        mask = batch.get("attention_mask") if hasattr(batch, "get") else None
        self._recorder.start(partial(self._pool, mask))

    def pause(self) -> None:
        """Record no more of this batch: the backward pass may run layers again."""
        if self._recorder is not None and self._recorder.calls:
            self._recorder.pause()

    def features(self) -> tuple[dict[str, Tensor], Tensor]:
        """Features (N, d) by layer, ``""`` for the classifier's input, and labels of the batch since :meth:`start`.

        The labels are (B,), with N = B, or (B, *positions), with a row for each position of the first sample, then the second.

        Raises:
            NotCalledError: if the classifier or a layer was not called.
            LookupError: if a layer has no row for each label.
        """
        assert self._recorder is not None
        assert self._target is not None
        calls, target = self._recorder.stop(), self._target.flatten()
        found = {}
        for name in list(self.widths):
            try:
                rows = _last_fitting(self._title(name), name, calls, len(target))
                check_batch(rows, target)
                found[name] = rows
            except (LookupError, ValueError) as error:
                if name == INPUT or not calls:
                    raise
                if self.strict:
                    raise type(error)(f"the layer {name!r} cannot be measured: {error}") from error
                del self.widths[name]
                self.warn_once(f"left out {name}", f"the layer {name!r} is left out from here on: {error}")
        if self._unchecked and len(self._target) > 1:
            self.warn_once("order", _ORDER.format(listed(self._unchecked)))
        own = [rows for name, rows in calls if name == INPUT and rows is not None and len(rows) == len(target)]
        if len(own) > 1:
            self.warn_once(
                "several calls",
                f"the classifier {self._title(INPUT)} is called several times with {len(target)} rows; the last call is "
                "measured. If its features do not belong to the labels, use mode='exact' with dataloader= and forward_fn=",
            )
        return found, self._target

    def _title(self, name: str) -> str:
        return repr(name or (self.head.name if self.head is not None else "classifier"))

    def _pool(self, mask: Tensor | None, name: str, tensor: Tensor) -> Tensor:
        assert self._target is not None
        axis = self._axes.get(name)
        if self._target.dim() > 1:
            rows = rows_at_positions(tensor, tuple(self._target.shape), self.pool, axis)
            return tensor if rows is None else rows
        if name == INPUT and isinstance(mask, Tensor) and axis is not None and tensor.dim() == 3:
            self._check_mask(mask, tensor.shape[3 - axis])
        # A function may turn another layout, that of a sequence-first layer for example, into one row per sample.
        pooled = tensor.dim() and (tensor.size(0) == len(self._target) or (callable(self.pool) and tensor.dim() > 2))
        return pool_features(tensor, self.pool, axis, mask) if pooled else tensor

    def _check_mask(self, mask: Tensor, positions: int) -> None:
        if self.pool != "flatten" and not callable(self.pool) and mask.shape[1:] != (positions,):
            self.warn_once("mask", _MASK.format(tuple(mask.shape), self._title(INPUT), positions))

    def targets(self, batch: Any) -> Tensor:
        """The labels of a batch, as it holds them."""
        if self.target_fn == NEXT_TOKEN:
            return next_token(batch, self.ignore_index)
        try:
            target: Tensor = self.target_fn(batch) if callable(self.target_fn) else targets_of(batch)
        except Exception as error:
            if self.target_fn is None:
                raise
            raise LookupError(f"target_fn failed on a batch: {type(error).__name__}: {error}") from error
        check_type(target)
        return target

    def _find_labels(self, raw: Tensor, trial: Trial) -> Labels:
        if self.head is None:
            return find_labels(raw, lambda positions: True, self.classes, None, self.ignore_index)
        name, outputs = self.head.name, outputs_of(self.head.module)
        fits, received = partial(trial.has_positions, name), trial.shapes_into(name)
        return find_labels(raw, fits, self.classes, outputs, self.ignore_index, name, received)

    def _match(self, model: nn.Module) -> list[str]:
        patterns = list(self.layers or ())
        for pattern in () if self.strict else tuple(patterns):
            try:
                match_layers(model, [pattern])
            except LookupError as error:
                patterns.remove(pattern)
                self.warn_once(pattern, f"{error}; what can be found is measured")
        return match_layers(model, patterns)

    def _find_head(self, model: nn.Module, trial: Trial) -> Classifier | None:
        """The classifier; None if only layers are measured and there is none. Sets the number of classes."""
        modules = named_modules(model)
        try:
            name = self.classifier or find_classifier(model, trial.output, trial.calls, trial.run, self.num_classes)
        except LookupError as error:
            if not (self.layers and self.num_classes):
                raise
            self.warn_once("no classifier", f"only layers are measured: {error}")
            self.classes = self.num_classes
            return None
        if name not in modules:
            match_layers(model, [name.replace("*", "[*]")])  # raises, with the nearest names
        module = modules[name]
        outputs = outputs_of(module)
        if set(getattr(module, "kernel_size", {1})) != {1}:
            raise LookupError(
                f"the classifier {name!r} is a convolution of more than one position, no linear layer; name another"
            )
        if self.num_classes is None and outputs is None:
            raise LookupError(f"{name!r} is no linear layer, so the number of classes is unknown; pass num_classes=...")
        self.classes = self.num_classes or max(int(outputs or 0), 2)  # one output decides between two classes
        if outputs is not None and max(outputs, 2) < self.classes:
            raise ValueError(
                f"num_classes is {self.classes}, but the classifier {name!r} has {outputs} outputs; leave num_classes out, or "
                "name another classifier"
            )
        rows = trial.rows_into(name)
        if self.classifier is None and rows is not None:
            title = name or type(module).__name__
            _say_once(
                f"neural collapse: measuring the input of {title!r} ({self.classes} classes, {rows.shape[1]} features)"
            )
        used = {id(call.weight) for call in trial.calls if call.name == name}
        replaced = bool(used) and not trial.sharded and used != {id(module._parameters.get("weight"))}
        return Classifier(name, module, self.classes, rows, trial.sharded, replaced)

    def _check_layers(self, names: list[str], trial: Trial, positions: tuple[int, ...]) -> None:
        """Set the widths of what can be measured, and the axes of features with more than two dimensions."""
        self.widths, self._axes = {}, {}
        left_out: dict[str, list[str]] = {}
        if self.head is not None:
            try:
                self.widths[INPUT] = trial.width(self.head.name, INPUT, self._axes, positions)
            except NotCalledError:
                if self.classifier is None:
                    raise
                self.widths[INPUT] = 0  # not known yet: the training step may call it
            if (
                self.pool == "mean"
                and INPUT in self._axes
                and not positions
                and isinstance(self.head.module, nn.Linear | SimplexETF)
            ):
                self.warn_once(
                    "sequence",
                    f"the classifier {self.head.name!r} is called on every position of a sequence; the mean over the positions "
                    "is measured. If the model uses one of them, pass pool='first' (a CLS token), pool='last' (the last position "
                    "that is not padding), or a function from (B, T, d) to (B, d)",
                )
        for name in names:
            try:
                if is_reserved(name):
                    raise ValueError(
                        "its keys would read as those of a stage; rename the module, or measure a module inside it"
                    )
                self.widths[name] = trial.width(name, name, self._axes, positions)
            except (LookupError, ValueError) as error:
                if self.strict:
                    raise type(error)(f"the layer {name!r} cannot be measured: {error}") from error
                left_out.setdefault(str(error), []).append(name)
        for reason, those in left_out.items():
            named = ", ".join(map(repr, those))
            kind = f"the layer {named} is" if len(those) == 1 else f"the layers {named} are"
            self.warn_once(f"left out {named}", f"{kind} left out: {reason}")
        self._unchecked = trial.unchecked
        if trial.dependent:
            self.warn_once(
                "dependent",
                f"the features of a sample at {listed(trial.dependent)} change with the other samples of the batch: time "
                "steps or positions may stand in the place of samples, so that labels do not fit; or a layer is random in "
                "eval mode, or normalizes over the batch, and the values depend on the batches",
            )
        if not self.widths:
            raise LookupError(f"none of the layers can be measured: {next(iter(left_out), 'no layer was found')}")


def match_layers(model: nn.Module, patterns: Sequence[str]) -> list[str]:
    """Names of the modules that match the shell patterns, in the order of the model.

    Raises:
        LookupError: for a pattern that matches none, with the nearest names.
    """
    names = [name for name in named_modules(model) if name]
    chosen: set[str] = set()
    for pattern in patterns:
        if not (found := fnmatch.filter(names, pattern)):
            near = difflib.get_close_matches(pattern, names, n=5, cutoff=0.4) or names[:10]
            raise LookupError(f"no module of {type(model).__name__} is named {pattern!r}; near: {listed(near)}")
        chosen.update(found)
    return [name for name in names if name in chosen]


@cache
def _say_once(message: str) -> None:
    """Say it once in a process: ``measure`` may be called in every epoch."""
    rank_zero_info(message)


def _warn(message: str) -> None:
    """Warn in every run: Python shows the same warning of one line of code only once in a process."""
    warnings.warn_explicit(message, UserWarning, __file__, 1, __name__)


def _last_fitting(title: str, name: str, calls: Sequence[tuple[str, Tensor | None]], size: int) -> Tensor:
    tensors = [tensor for called, tensor in calls if called == name]
    if not tensors:
        raise NotCalledError(uncalled(title.strip("'"), name == INPUT))
    fitting = [tensor for tensor in tensors if tensor is not None and tensor.dim() and len(tensor) == size]
    if not fitting:
        shapes = ", ".join(str(None if tensor is None else tuple(tensor.shape)) for tensor in tensors)
        raise LookupError(
            f"no call of {title} has a row for each of the {size} labels, got {shapes}; pass target_fn or forward_fn so that "
            "features and labels fit"
        )
    return fitting[-1]
