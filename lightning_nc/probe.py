"""A probe: which layers of a model are measured, and the labelled features they give, batch by batch."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import numpy
from torch import Tensor, nn

from lightning_nc.features import (
    Pool,
    Recorder,
    copied,
    features_of,
    find_classifier,
    match_layers,
    named_modules,
    outputs_of,
    pool_features,
    run_forward,
    targets_of,
)
from lightning_nc.moments import FOLD_EVERY, ClassMoments, check_batch, check_labels, check_target

__all__ = ["Moments", "Probe"]

SCATTER_LIMIT = 2**30
"""Bytes that the scatter of one layer may take; beyond, it is gathered in the span of the class means alone."""

_INPUT = "input of the classifier"  # whose output may be measured too, under its own name

Moments = dict[str, ClassMoments]
"""Moments by prefix: ``""`` is the classifier's input, ``"layer3/"`` a layer's output."""


@dataclass
class Probe:
    """What to measure of a model; the arguments are those of :func:`lightning_nc.measure`, checked on construction.

    Between :meth:`arm` and :meth:`absorb` somebody runs the model on a batch, the probe's :meth:`forward` or a training
    step.
    """

    layers: Sequence[str] | None = None
    classifier: str | None = None
    num_classes: int | None = None
    target_fn: Callable[[Any], Tensor] | None = None
    forward_fn: Callable[[nn.Module, Any], Any] | None = None
    pool: Pool = "mean"
    strict: bool = True  # else a layer that is not there warns, and the others are measured
    classes: int = field(init=False, repr=False, default=0)
    _recorder: Recorder | None = field(init=False, repr=False, default=None)
    _head: tuple[str, nn.Module] | None = field(init=False, repr=False, default=None)
    _names: list[str] = field(init=False, repr=False, default_factory=list)
    _sharded: list[str] = field(init=False, repr=False, default_factory=list)
    _whole: dict[str, Tensor] = field(init=False, repr=False, default_factory=dict)
    _target: Tensor | None = field(init=False, repr=False, default=None)
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
        if not callable(self.pool) and self.pool not in ("mean", "flatten"):
            raise ValueError(f"pool must be 'mean', 'flatten' or a callable, got {self.pool!r}")
        for name in ("target_fn", "forward_fn"):
            if getattr(self, name) is not None and not callable(getattr(self, name)):
                raise ValueError(f"{name} must be a callable, got {getattr(self, name)!r}")

    @property
    def attached(self) -> bool:
        """Whether the hooks are in place."""
        return self._recorder is not None

    def attach(self, model: nn.Module, batch: Any, forward_context: Any = nullcontext) -> None:
        """Find the classifier, running the model on ``batch`` where it is not known yet, and put the hooks in place.

        Raises:
            LookupError: if classifier or layers cannot be found.
            ValueError: for labels that do not fit.
        """
        self.detach()
        self._names = self._match(model)
        target = self._targets(copied(batch))
        if self._head is None or named_modules(model).get(self._head[0]) is not self._head[1]:
            with forward_context():
                self._head, self.classes = self._find(model, lambda: self.forward(model, copied(batch)))
        modules = named_modules(model)
        head = {}
        if self._head is not None:
            name = self._head[0]
            head = {_INPUT: modules[name]}
            self._head = (name, modules[name])
            self._sharded = [part for part in ("weight", "bias") if _part(modules[name], part) is None]
        check_labels(target, self.classes)  # once, since reading labels makes the host wait for the device
        self._recorder = Recorder({name: modules[name] for name in self._names}, head)

    def detach(self) -> None:
        """Take the hooks off."""
        if self._recorder is not None:
            self._recorder.remove()
        self._recorder = None

    def forget(self) -> None:
        """Be ready for another model."""
        self.detach()
        self._head = None
        self._said = set()

    def first_time(self, topic: str) -> bool:
        """Whether nothing was said of a topic yet, for what is said once in a run."""
        first = topic not in self._said
        self._said.add(topic)
        return first

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

    def arm(self, batch: Any) -> None:
        """Record the features of the calls that come, which are on ``batch``."""
        assert self._recorder is not None
        self._target = self._targets(batch)
        size, mask = len(self._target), batch.get("attention_mask") if hasattr(batch, "get") else None

        def keep(module: nn.Module, tensor: Tensor) -> Tensor:
            if self._head is not None and module is self._head[1]:
                self._see(module, tensor)
            # A function may turn other layouts, of a sequence-first layer say, into one row per sample.
            fits = tensor.dim() and (tensor.size(0) == size or (callable(self.pool) and tensor.dim() > 2))
            return pool_features(tensor, self.pool, module, mask) if fits else tensor

        self._recorder.arm(keep)

    def disarm(self) -> None:
        """Record no more of this batch: what comes is the backward pass, which may run layers again."""
        if self._recorder is not None and self._recorder.calls:
            self._recorder.disarm()

    def absorb(self, moments: Moments, index: int, rows: int | None = None) -> int:
        """Add the features that were recorded, of the first ``rows`` samples, to ``moments``; ``index`` counts batches.

        Returns:
            How many samples these were.

        Raises:
            LookupError: if a layer was not called on the batch.
            ValueError: for features that do not fit.
        """
        assert self._recorder is not None
        assert self._target is not None
        target = self._target[:rows]
        for prefix, features in self._fitting(self._recorder.take(), moments, rows).items():
            width = features.shape[1]
            if prefix not in moments:
                small = 12 * width**2 <= SCATTER_LIMIT  # bytes, in float64 and float32
                moments[prefix] = ClassMoments.zeros(self.classes, width, features.device, scatter=small)
            expected = moments[prefix].means.shape[1]
            if width != expected:
                raise ValueError(
                    f"features must have {expected} columns as in the first batch, got {width}; inputs of varying size need "
                    "pool='mean' or a callable"
                )
            moments[prefix].update(features, target)
            if index % FOLD_EVERY == FOLD_EVERY - 1:
                moments[prefix].fold()
        return len(target)

    def empty(self, model: nn.Module, batch: Any, forward_context: Any = nullcontext) -> Moments:
        """Moments of no samples, as wide as the features that the model, run on ``batch``, gives."""
        moments: Moments = {}
        batch = copied(batch)
        self.arm(batch)
        with forward_context():
            self.forward(model, batch)
        self.absorb(moments, 0, rows=0)
        return moments

    def empty_in(self, bases: dict[str, Tensor]) -> Moments:
        """Moments of no samples in the coordinates of the bases, (d, r) each."""
        return {prefix: ClassMoments.zeros(self.classes, b.shape[1], b.device) for prefix, b in bases.items()}

    def project(self, moments: Moments, bases: dict[str, Tensor]) -> None:
        """As :meth:`absorb`, with the features of the layers in ``bases`` alone, multiplied by their basis (d, r)."""
        assert self._recorder is not None
        assert self._target is not None
        calls = self._recorder.take()
        for prefix, basis in bases.items():
            features = self._features(prefix[:-1], calls, len(self._target))
            moments[prefix].update(features.to(basis.dtype) @ basis, self._target)

    def classifier_parts(self) -> dict[str, Tensor]:
        """Weight (K, d) and bias (K,) of the classifier as they are now; the first rows where it has more outputs."""
        if self._head is None:
            return {}
        parts = {}
        for name in ("weight", "bias"):
            part = _part(self._head[1], name)
            part = self._whole.get(name) if part is None else part
            if part is not None:
                parts[name] = part[: self.classes].flatten(start_dim=1) if name == "weight" else part[: self.classes]
        return parts

    def _fitting(self, calls: list[tuple[str, Tensor | None]], moments: Moments, rows: int | None) -> dict[str, Tensor]:
        """The features of the first ``rows`` samples by prefix.

        A layer that does not fit is left out for the rest of the run, unless it is the first to be asked for, has been measured
        before, or the user asked for strictness.
        """
        assert self._target is not None
        size, target = len(self._target), self._target[:rows]
        found = {}
        for name in ["", *self._names] if self._head is not None else list(self._names):
            prefix = name and f"{name}/"
            try:
                features = self._features(name, calls, size)[:rows]
                check_batch(features, target)
                found[prefix] = features
            except (LookupError, ValueError) as error:
                if self.strict or not found or prefix in moments:
                    raise
                self._names.remove(name)
                warnings.warn(f"neural collapse: the layer {name!r} is left out: {error}", stacklevel=2)
        return found

    def _features(self, name: str, calls: list[tuple[str, Tensor | None]], size: int) -> Tensor:
        if name or self._head is None:
            return features_of(name, calls, size)
        own = [(self._head[0], tensor) for called, tensor in calls if called == _INPUT]
        fitting = [tensor for _, tensor in own if tensor is not None and tensor.dim() and tensor.size(0) == size]
        if len(fitting) > 1 and self.first_time("several calls"):
            warnings.warn(
                f"the classifier {self._head[0]!r} is called several times with {size} rows; the last call is measured. If its "
                "features are not those of the labels, use mode='exact' with dataloader= and forward_fn=",
                stacklevel=2,
            )
        return features_of(self._head[0], own, size)

    def _see(self, module: nn.Module, features: Tensor) -> None:
        """The classifier at work: where its parameters are sharded, this is the time when they are whole."""
        for name in self._sharded:
            if (part := _part(module, name)) is not None:
                self._whole[name] = part.clone()
        sequence = features.dim() == 3 and isinstance(module, nn.Linear) and self.pool == "mean"
        if sequence and self.first_time("sequence"):
            warnings.warn(
                f"the classifier {self._head[0] if self._head else ''!r} is called on a sequence of shape "
                f"{tuple(features.shape)}; the mean over its positions is measured. If the model takes one of them, the last "
                "token say, pass pool=, a function from (B, T, d) to (B, d)",
                stacklevel=2,
            )

    def _match(self, model: nn.Module) -> list[str]:
        patterns = list(self.layers or ())
        for pattern in () if self.strict else tuple(patterns):
            try:
                match_layers(model, [pattern])
            except LookupError as error:
                patterns.remove(pattern)
                if self.first_time("layers"):
                    warnings.warn(f"neural collapse: {error}; what can be found is measured", stacklevel=2)
        return match_layers(model, patterns)

    def _targets(self, batch: Any) -> Tensor:
        try:
            target: Tensor = (self.target_fn or targets_of)(batch)
        except Exception as error:
            if self.target_fn is None:
                raise
            raise LookupError(f"target_fn failed on a batch: {type(error).__name__}: {error}") from error
        check_target(target)
        return target

    def _find(self, model: nn.Module, forward: Callable[[], Any]) -> tuple[tuple[str, nn.Module] | None, int]:
        """The classifier, None where only layers are measured and there is none, and the number of classes."""
        modules = named_modules(model)
        if self.classifier is not None:
            name = self.classifier
            if name not in modules:
                match_layers(model, [name.replace("*", "[*]")])  # raises, with the nearest names
        else:
            try:
                name = find_classifier(model, forward, self.num_classes)
            except LookupError:
                if self.layers and self.num_classes:
                    return None, self.num_classes
                raise
        outputs = outputs_of(modules[name])
        if set(getattr(modules[name], "kernel_size", {1})) != {1}:
            raise LookupError(
                f"the classifier {name!r} is a convolution of more than one position, no linear layer; name another"
            )
        if self.num_classes is None and outputs is None:
            raise LookupError(f"{name!r} is no linear layer, so the number of classes is unknown; pass num_classes=...")
        if self.num_classes is None and outputs == 1:
            raise LookupError(
                f"the classifier {name!r} has one output, a binary head: neural collapse compares one row of weights per "
                "class; use two outputs with cross-entropy, or pass num_classes=2 and metrics that need no weight, such "
                "as metrics=('nc1', 'nc1_cdnv') (two centred means are always an ETF)"
            )
        return (name, modules[name]), self.num_classes or int(outputs or 0)


def _part(module: nn.Module, name: str) -> Tensor | None:
    """The weight or the bias of a layer with outputs, None where there is none or only a shard of it."""
    flags = {inner: inner.training for inner in module.modules()}
    try:
        for inner in flags:  # a spectral norm, say, would take a step whenever it is looked at
            inner.training = False
        part = getattr(module, name, None)
    finally:
        for inner, training in flags.items():
            inner.training = training
    sides = 2 if name == "weight" else 1
    if not isinstance(part, Tensor) or hasattr(part, "full_tensor") or part.dim() < sides:
        return None
    if part.untyped_storage().size() == 0:  # FSDP keeps the view of a flat parameter and frees what it shows
        return None
    return part.detach() if len(part) == outputs_of(module) else None
