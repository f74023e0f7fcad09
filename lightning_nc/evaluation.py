"""An exact pass over a data set: eval mode, no gradients, every sample once, and everything left as it was found."""

from __future__ import annotations

import math
import random
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from copy import copy
from dataclasses import dataclass
from functools import partial
from itertools import chain
from typing import Any

import numpy
import torch
from lightning.fabric.utilities import move_data_to_device, rank_zero_info
from torch import Tensor, nn
from torch.nn.modules.lazy import LazyModuleMixin
from torch.nn.parameter import is_lazy
from torchmetrics import Metric
from tqdm import tqdm

from lightning_nc.features import Pool, copied
from lightning_nc.functional import MEASURES, PAPER_MEASURES, check_measures, evaluate
from lightning_nc.loaders import check_loader
from lightning_nc.metrics import synchronise
from lightning_nc.probe import Moments, Probe
from lightning_nc.processes import agree

__all__ = ["Moved", "exact_pass", "measure", "undisturbed", "values_of"]


def measure(
    model: nn.Module,
    dataloader: Iterable[Any],
    *,
    layers: Sequence[str] | None = None,
    classifier: str | None = None,
    num_classes: int | None = None,
    metrics: Sequence[str] = PAPER_MEASURES,
    target_fn: Callable[[Any], Tensor] | None = None,
    forward_fn: Callable[[nn.Module, Any], Any] | None = None,
    pool: Pool = "mean",
    device: torch.device | str | None = None,
    progress: bool = True,
) -> dict[str, float]:
    """Measure a model on all samples of a loader, in eval mode, leaving the model and the random streams as they were.

    Args:
        model: any module; moved nowhere.
        dataloader: gives batches; iterated once.
        layers: names (shell patterns allowed) of modules whose outputs are measured too, under ``"<layer>/<measure>"``.
        classifier: name of the last linear layer; found by itself where it is not given.
        num_classes: K; the classifier's number of outputs where it is not given.
        metrics: names in :data:`lightning_nc.functional.MEASURES`.
        target_fn: batch -> (B,) class indices; by default the second item, or one of the usual keys of a mapping.
        forward_fn: (module, batch) -> anything; by default the module is called on the first item of the batch.
        pool: features of more than two dimensions: ``"mean"`` over positions, ``"flatten"``, or a callable.
        device: where batches are moved to; by default the device of the model's first parameter.
        progress: show a progress bar.

    Returns:
        The measures by name, each a float without unit; nan where one is not defined.

    Raises:
        LookupError: if classifier, layers, features or labels cannot be found.
        ValueError: for names, features or labels that do not fit.

    Example:
        >>> import torch
        >>> from lightning_nc import measure
        >>> data = [(torch.eye(3).repeat(4, 1), torch.arange(3).repeat(4))]
        >>> values = measure(torch.nn.Linear(3, 3), data, metrics=("nc1", "nc2_of"), progress=False)
        >>> {name: round(value, 6) for name, value in values.items()}
        {'nc1': 0.0, 'nc2_of': 0.0}
    """
    metrics = check_measures(metrics)
    check_loader(dataloader)
    probe = Probe(layers, classifier, num_classes, target_fn, forward_fn, pool)
    if device is None:
        device = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
    on = torch.device(device)
    bar = tqdm(dataloader, desc="Neural collapse", leave=False, disable=not progress)
    sources = (dataloader, getattr(dataloader, "sampler", None))
    generators = [g for source in sources if isinstance(g := getattr(source, "generator", None), torch.Generator)]
    streams = [generator.get_state() for generator in generators]
    try:
        with undisturbed(model, on):
            batches = Moved(bar, lambda batch: move_data_to_device(batch, on))
            return values_of(exact_pass(probe, metrics, model, batches), metrics, probe)
    finally:
        probe.detach()
        for generator, stream in zip(generators, streams, strict=True):
            generator.set_state(stream)


class Moved:
    """The batches of a loader, each passed through ``move`` when it comes; as often as the loader gives them."""

    def __init__(self, loader: Iterable[Any], move: Callable[[Any], Any]) -> None:
        self.loader, self.move = loader, move

    def __iter__(self) -> Iterator[Any]:
        return map(self.move, self.loader)


def exact_pass(
    probe: Probe,
    metrics: Sequence[str],
    model: nn.Module,
    batches: Iterable[Any],
    forward_context: Any = nullcontext,
    agree_on: torch.device | None = None,
    steps: int = 0,
) -> Moments:
    """The moments of ``model`` on ``batches``, in one pass, or in two where a scatter would be too large.

    Args:
        probe: what to measure; it is attached on the first batch.
        metrics: names of measures.
        model: in eval mode, without gradients.
        batches: on the device of the model.
        forward_context: makes a context for each run of the model.
        agree_on: in a distributed run, the device of its collectives: the buffers become those of the first process, the
            moments those of all, and where one process cannot go on all of them raise. Three collectives for one pass.
        steps: in a distributed run, how many batches there are in this process. The model runs as often in all of them, on the
            first batch again if need be: it may hold collectives, of its sharded parameters or of the user's.
    """
    passes = _Passes(probe, model, forward_context, agree_on, steps)
    moments, first = passes.begin(batches)
    moments = passes.gather(moments, first, probe.absorb)
    wide = {prefix: m for prefix, m in moments.items() if not m.knows_scatter}
    if wide and any(MEASURES[name].scatter for name in metrics):
        sizes = ", ".join(f"{prefix[:-1] or 'classifier input'} {m.means.shape[1]}" for prefix, m in wide.items())
        if probe.first_time("two passes"):
            rank_zero_info(
                f"neural collapse: features too wide for a scatter matrix ({sizes}) take a second pass over the data"
            )
        bases = {prefix: m.span() for prefix, m in wide.items()}
        if agree_on is not None:
            for basis in bases.values():
                torch.distributed.broadcast(basis, src=0)
        projected = passes.gather(probe.empty_in(bases), batches, lambda into, index: probe.project(into, bases))
        moments |= {prefix: m.with_scatter_of(projected[prefix], bases[prefix]) for prefix, m in wide.items()}
    return moments


@dataclass
class _Passes:
    """Runs of a model over the batches of a loader, on all processes of a distributed run alike."""

    probe: Probe
    model: nn.Module
    forward_context: Any
    agree_on: torch.device | None
    steps: int
    spare: Any = None  # a batch to take part in the steps of other processes with

    def begin(self, batches: Iterable[Any]) -> tuple[Moments, Iterable[Any]]:
        """Attach the probe on the first batch; empty moments of the right shapes, and all batches, the first included."""
        moments: Moments = {}
        error: Exception | None = None
        taken: Iterable[Any] = ()
        try:
            iterator = iter(batches)
            first = next(iterator, None)
            if first is None:
                raise LookupError("the data loader gave no batch, so there is nothing to measure")
            taken = chain([first], iterator)
            self.spare = copied(first) if self.agree_on is not None else None
            self.probe.attach(self.model, first, self.forward_context)
            if self.agree_on is not None:
                moments = self.probe.empty(self.model, first, self.forward_context)
        except Exception as caught:
            if self.agree_on is None:
                raise
            error = caught
        if self.agree_on is not None:
            self.steps = agree(self.agree_on, error, moments, _saved_buffers(self.model), self.steps)
        return moments, taken

    def gather(self, moments: Moments, batches: Iterable[Any], absorb: Callable[[Moments, int], Any]) -> Moments:
        """One pass: ``absorb`` adds what was recorded of a batch to ``moments``."""
        error, taken = None, 0
        try:
            for index, batch in enumerate(batches):
                self.probe.arm(batch)
                taken += 1
                with self.forward_context():
                    self.probe.forward(self.model, batch)
                absorb(moments, index)
            if not taken:
                raise LookupError(
                    "the data loader gave no batch the second time; features too wide for a scatter matrix take two passes, "
                    "and a generator gives its batches only once"
                )
        except Exception as caught:
            if self.agree_on is None:
                raise
            error = caught
        if self.agree_on is None:
            return moments
        try:
            for _ in range(taken, self.steps):
                with self.forward_context():
                    self.probe.forward(self.model, copied(self.spare))
        except Exception as caught:
            error = error or caught
        return dict(zip(moments, synchronise(list(moments.values()), error=error), strict=True))


def _saved_buffers(model: nn.Module) -> list[Tensor]:
    """The buffers that a checkpoint holds. Others, the cache of a rotary embedding say, may differ in shape."""
    return [
        buffer
        for module in model.modules()
        for name, buffer in module._buffers.items()
        if buffer is not None and name not in module._non_persistent_buffers_set
    ]


def values_of(moments: Moments, metrics: Sequence[str], probe: Probe) -> dict[str, float]:
    """The measures by name; those that need the classifier's weight for its input alone."""
    values = {}
    for prefix, m in moments.items():
        if m.mislabelled:
            raise ValueError(
                f"targets must lie in [0, {len(m.counts)}), got {int(m.mislabelled)} outside; pass num_classes, or a target_fn"
            )
        known = probe.classifier_parts() if prefix == "" else {}
        names = [
            name
            for name in metrics
            if known.keys() >= set(MEASURES[name].needs) and (m.knows_scatter or not MEASURES[name].scatter)
        ]
        needed = {need: known[need] for name in names for need in MEASURES[name].needs}
        values.update({prefix + name: float(value) for name, value in evaluate(names, m, **needed).items()})
    return values


@contextmanager
def undisturbed(model: nn.Module, device: torch.device) -> Iterator[None]:
    """Eval mode without gradients; in any case training flags, buffers, metrics and random streams are put back.

    What the model logs meanwhile is dropped: it would be logged twice.
    """
    modules = list(model.modules())
    training = {module: module.training for module in modules}
    buffers = [(m._buffers, name, b, _contents(b, math.inf)) for m in modules for name, b in m._buffers.items()]
    states = [(m, _state_of(m)) for m in modules if isinstance(m, Metric)]
    attributes = [_Attributes(m) for m in modules if not isinstance(m, LazyModuleMixin)]
    loggers = [module for module in modules if hasattr(type(module), "log_dict")]
    python, numpys = random.getstate(), numpy.random.get_state()
    devices = [device] if device.type == "cuda" else []
    try:
        # A hook that was not there when a compiled model first ran would be ignored by it.
        with torch.random.fork_rng(devices), torch.no_grad(), torch.compiler.set_stance("force_eager"):
            for module in loggers:
                vars(module).update(log=_drop, log_dict=_drop)
            model.eval()
            yield
    finally:
        random.setstate(python)
        numpy.random.set_state(numpys)
        for module, flag in training.items():
            module.training = flag
        for module in loggers:
            vars(module).pop("log", None)
            vars(module).pop("log_dict", None)
        for metric, state in states:
            vars(metric).update(state)
        for kept in attributes:
            kept.restore()
        for own, name, buffer, put_back in buffers:
            own[name] = buffer
            put_back()


_LARGEST = 2**26
"""Bytes beyond which a tensor that is no buffer is not copied: it may be the data set."""


class _Attributes:
    """What a module of the user's remembers by itself: counters, the outputs of an epoch, a hidden state."""

    def __init__(self, module: nn.Module) -> None:
        self.own = vars(module)
        self.states = module._defaults if isinstance(module, Metric) else ()  # which are put back by themselves
        public = {name: v for name, v in self.own.items() if not name.startswith("_") and name not in self.states}
        self.values = {name: value for name, value in public.items() if not _is_trained(value)}
        self.trained = {name: value for name, value in public.items() if _is_trained(value)}
        self.contents = [_contents(value) for value in self.values.values()]

    def restore(self) -> None:
        for name, value in list(self.own.items()):
            if not (name.startswith("_") or name in self.values or name in self.states or _is_trained(value)):
                del self.own[name]
        self.own.update(self.values)
        for name, value in self.trained.items():
            self.own.setdefault(name, value)
        for put_back in self.contents:
            put_back()


def _has_memory(tensor: Tensor) -> bool:
    """Whether the numbers of a tensor lie in one piece of memory that can be looked at."""
    return tensor.layout == torch.strided and not (tensor.is_nested or tensor.is_meta or is_lazy(tensor))


def _is_trained(value: Any) -> bool:
    """Whether training goes through it. FSDP puts views of what it shards, and frees, in the place of parameters."""
    if not isinstance(value, Tensor):
        return False
    return value.requires_grad or (_has_memory(value) and value.untyped_storage().size() == 0)


def _contents(value: Any, limit: float = _LARGEST) -> Callable[[], None]:
    """A function that gives a tensor or a container back what it holds now."""
    if isinstance(value, Tensor) and _has_memory(value) and value.numel() * value.element_size() <= limit:
        return partial(_put_numbers_back, value, value.detach().clone())
    if isinstance(value, numpy.ndarray) and value.flags.writeable and value.nbytes <= limit:
        return partial(numpy.copyto, value, value.copy())
    if type(value) not in (tuple, list, deque, set, dict, defaultdict, OrderedDict, Counter):
        return _nothing
    items = list(value.items() if isinstance(value, dict) else value)
    inside = value.values() if isinstance(value, dict) else value
    inner = [
        _contents(item)
        for item in inside
        if isinstance(item, Tensor | numpy.ndarray | tuple | list | deque | set | dict)
    ]
    return partial(_put_items_back, value, items, inner)


def _put_numbers_back(tensor: Tensor, kept: Tensor) -> None:
    if not _is_trained(tensor) and not torch.equal(tensor, kept):  # some cannot be written to
        with torch.inference_mode(tensor.is_inference()), torch.no_grad():
            tensor.copy_(kept)


def _put_items_back(container: Any, items: list[Any], inner: list[Callable[[], None]]) -> None:
    for put_back in inner:
        put_back()
    now = list(container.items() if isinstance(container, dict) else container)
    if len(now) == len(items) and all(map(_is_same, now, items)):  # somebody may be iterating over it
        return
    container.clear()
    if isinstance(container, dict):
        dict.update(container, items)  # a Counter's own would count them
    elif isinstance(container, set):
        container.update(items)
    else:
        container.extend(items)


def _is_same(item: Any, other: Any) -> bool:
    if type(item) is type(other) is tuple:  # an entry of a dict, for one
        return len(item) == len(other) and all(map(_is_same, item, other))
    return item is other


def _nothing() -> None:
    return None


def _drop(*args: Any, **kwargs: Any) -> None:
    return None


def _state_of(metric: Metric) -> dict[str, Any]:
    """What an update or a compute changes."""
    kept = {}
    for name in [*metric._defaults, "_update_count", "_computed", "_forward_cache"]:
        if name in vars(metric):
            value = vars(metric)[name]
            # An update works in place on states alone; the cache of a loss may hold a graph, which cannot be copied.
            in_place = name in metric._defaults
            kept[name] = (
                value.detach().clone() if in_place and isinstance(value, Tensor) else copy(value) if in_place else value
            )
    return kept
