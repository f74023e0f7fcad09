"""An exact pass over a data set: eval mode, no gradients, every sample once, and everything left as it was found."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from copy import deepcopy
from dataclasses import dataclass, field
from itertools import chain, islice
from typing import Any

import numpy
import torch
from lightning.fabric.utilities import move_data_to_device
from torch import Tensor, nn
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    DistributedSampler,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
    WeightedRandomSampler,
)
from tqdm import tqdm

from lightning_nc.features import (
    Pool,
    features_of,
    find_classifier,
    match_layers,
    pool_features,
    recording,
    run_forward,
    targets_of,
)
from lightning_nc.functional import MEASURES, PAPER_MEASURES, check_measures, evaluate
from lightning_nc.metrics import synchronise
from lightning_nc.moments import FOLD_EVERY, ClassMoments, check_batch, check_labels, check_target

__all__ = ["ExactPass", "measure", "measurement_loader", "undisturbed"]


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
    exact = ExactPass(layers, classifier, num_classes, metrics, target_fn, forward_fn, pool)
    if device is None:
        device = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
    bar = tqdm(dataloader, desc="Neural collapse", leave=False, disable=not progress)
    generator = getattr(dataloader, "generator", None)
    stream = None if generator is None else generator.get_state()
    try:
        with undisturbed(model, torch.device(device)):
            exact.gather(model, (move_data_to_device(batch, torch.device(device)) for batch in bar))
            return exact.values()
    finally:
        if generator is not None:
            generator.set_state(stream)


@dataclass
class ExactPass:
    """What to measure of a model; the arguments are those of :func:`measure`, checked on construction."""

    layers: Sequence[str] | None = None
    classifier: str | None = None
    num_classes: int | None = None
    metrics: Sequence[str] = PAPER_MEASURES
    target_fn: Callable[[Any], Tensor] | None = None
    forward_fn: Callable[[nn.Module, Any], Any] | None = None
    pool: Pool = "mean"
    moments: dict[str, ClassMoments] = field(init=False, repr=False, default_factory=dict)
    _head: nn.Module | None = field(init=False, repr=False, default=None)

    def __post_init__(self) -> None:
        self.metrics = check_measures(self.metrics)
        if isinstance(self.layers, str):
            raise ValueError(
                f"layers must be a sequence of names, got the string {self.layers!r}; write [{self.layers!r}]"
            )
        if self.num_classes is not None and (not isinstance(self.num_classes, int) or self.num_classes < 2):
            raise ValueError(f"num_classes must be an integer of at least 2, got {self.num_classes!r}")
        if not callable(self.pool) and self.pool not in ("mean", "flatten"):
            raise ValueError(f"pool must be 'mean', 'flatten' or a callable, got {self.pool!r}")
        for name in ("target_fn", "forward_fn"):
            if getattr(self, name) is not None and not callable(getattr(self, name)):
                raise ValueError(f"{name} must be a callable, got {getattr(self, name)!r}")

    def gather(self, model: nn.Module, batches: Iterable[Any], forward_context: Any = nullcontext) -> None:
        """Gather the moments of every layer of ``model`` over ``batches``, which are on its device."""
        self.moments = {}
        forward_fn = self.forward_fn or run_forward
        layers = match_layers(model, self.layers or ())
        for index, batch in enumerate(batches):
            target = self._targets(batch)

            def forward(batch: Any = batch) -> Any:
                with forward_context():
                    return forward_fn(model, batch)

            if index == 0:
                classifier, classes = self._classifier(model, forward)
                modules = {name: model.get_submodule(name) for name in layers}
                head = {} if classifier is None else {classifier: model.get_submodule(classifier)}
                self._head = head.get(classifier or "")
                check_labels(target, classes)  # once, since reading labels makes the host wait for the device

            def keep(module: nn.Module, tensor: Tensor, size: int = len(target)) -> Tensor:
                fits = tensor.dim() and len(tensor) == size
                return pool_features(tensor, self.pool, module) if fits else tensor

            with recording(modules, keep) as outputs, recording(head, keep, inputs=True) as inputs:
                forward()
            for name in layers:
                self._update(f"{name}/", features_of(name, outputs, len(target)), target, classes, index)
            for name in head:
                self._update("", features_of(name, inputs, len(target)), target, classes, index)
        if not self.moments:
            raise LookupError("the data loader gave no batch, so there is nothing to measure")

    def values(self, synchronised: bool = False) -> dict[str, float]:
        """The measures of what was gathered, by name; with ``synchronised``, of all processes together."""
        if synchronised:
            self.moments = dict(zip(self.moments, synchronise(list(self.moments.values())), strict=True))
        values = {}
        for prefix, moments in self.moments.items():
            if moments.mislabelled:
                raise ValueError(
                    f"targets must lie in [0, {len(moments.counts)}), got {int(moments.mislabelled)} outside; pass "
                    "num_classes, or a target_fn"
                )
            known = self._known(len(moments.counts)) if prefix == "" else {}
            names = [name for name in self.metrics if all(known.get(need) is not None for need in MEASURES[name].needs)]
            needed = {need: known[need] for name in names for need in MEASURES[name].needs}
            measured = evaluate(names, moments, **needed)
            values.update({prefix + name: float(value) for name, value in measured.items()})
        return values

    def _known(self, classes: int) -> dict[str, Tensor | None]:
        """Weight and bias of a linear classifier; the first rows where it has more outputs than there are classes."""
        weight, bias = getattr(self._head, "weight", None), getattr(self._head, "bias", None)
        if weight is None or weight.dim() != 2:
            return {}
        return {"weight": weight[:classes], "bias": None if bias is None else bias[:classes]}

    def _targets(self, batch: Any) -> Tensor:
        target: Tensor = (self.target_fn or targets_of)(batch)
        check_target(target)
        return target

    def _classifier(self, model: nn.Module, forward: Callable[[], Any]) -> tuple[str | None, int]:
        """Name of the classifier, None where only layers are measured and there is none, and the number of classes."""
        if self.classifier is not None:
            name = self.classifier
            if name not in (known for known, _ in model.named_modules(remove_duplicate=False)):
                match_layers(model, [name.replace("*", "[*]")])  # raises, with the nearest names
        else:
            try:
                name = find_classifier(model, forward, self.num_classes)
            except LookupError:
                if self.layers and self.num_classes:
                    return None, self.num_classes
                raise
        outputs = getattr(model.get_submodule(name), "out_features", None)
        if self.num_classes is None and outputs is None:
            raise LookupError(f"{name!r} is no linear layer, so the number of classes is unknown; pass num_classes=...")
        if self.num_classes is None and outputs == 1:
            raise LookupError(
                f"the classifier {name!r} has one output, a binary head: neural collapse compares one row of weights per "
                "class; use two outputs with cross-entropy, or pass num_classes=2 and metrics that need no weight, such "
                "as metrics=('nc1', 'nc2_etf_centered')"
            )
        return name, self.num_classes or int(outputs or 0)

    def _update(self, prefix: str, features: Tensor, target: Tensor, classes: int, index: int) -> None:
        check_batch(features, target)
        if index == 0:
            self.moments[prefix] = ClassMoments.zeros(classes, features.shape[1], features.device)
        moments = self.moments[prefix]
        if features.shape[1] != moments.means.shape[1]:
            raise ValueError(
                f"features must have {moments.means.shape[1]} columns as in the first batch, got {features.shape[1]}; "
                "inputs of varying size need pool='mean' or a callable"
            )
        moments.update(features, target)
        if index % FOLD_EVERY == FOLD_EVERY - 1:
            moments.fold()


@contextmanager
def undisturbed(model: nn.Module, device: torch.device) -> Iterator[None]:
    """Eval mode without gradients; training flags and random streams (Python, NumPy, PyTorch) are put back in any case."""
    training = {module: module.training for module in model.modules()}
    python, numpys = random.getstate(), numpy.random.get_state()
    devices = [device] if device.type == "cuda" else []
    try:
        # A hook that was not there when a compiled model first ran would be ignored by it.
        with torch.random.fork_rng(devices), torch.no_grad(), torch.compiler.set_stance("force_eager"):
            model.eval()
            yield
    finally:
        for module, flag in training.items():
            module.training = flag
        random.setstate(python)
        numpy.random.set_state(numpys)


@contextmanager
def buffers_of_first_rank(model: nn.Module) -> Iterator[None]:
    """Every process computes with the buffers of the first: BatchNorm statistics differ between ranks in training."""
    buffers = list(model.buffers())
    own = [buffer.clone() for buffer in buffers]
    try:
        for dtype in sorted({buffer.dtype for buffer in buffers}, key=str):
            same = [buffer for buffer in buffers if buffer.dtype == dtype]
            packed = torch.cat([buffer.flatten() for buffer in same])
            torch.distributed.broadcast(packed, src=0)
            for buffer, part in zip(same, packed.split([buffer.numel() for buffer in same]), strict=True):
                buffer.copy_(part.view_as(buffer))
        yield
    finally:
        for buffer, kept in zip(buffers, own, strict=True):
            buffer.copy_(kept)


def measurement_loader(
    loader: Any, max_batches: int | None = None, rank: int = 0, world_size: int = 1
) -> tuple[Iterable[Any], int | None]:
    """A loader over the samples of a training loader, each once and in order, and its number of batches if known.

    The training loader itself is never iterated: with persistent workers, or a generator of its own, that would change
    the training. ``max_batches`` takes a fixed random choice of samples, since the first ones of sorted data would miss
    classes; the first ones where training itself sees no others.

    Raises:
        LookupError: for a loader that cannot be copied.
    """
    if not isinstance(loader, DataLoader):
        raise LookupError(
            f"the training data come from a {type(loader).__name__}, and which of its samples to measure is not clear; pass "
            "dataloader=, a DataLoader to measure on"
        )
    copied: dict[str, Any] = {
        "num_workers": loader.num_workers,
        "collate_fn": loader.collate_fn,
        "pin_memory": loader.pin_memory,
        "timeout": loader.timeout,
        "worker_init_fn": loader.worker_init_fn,
        "multiprocessing_context": loader.multiprocessing_context,
        "generator": torch.Generator().manual_seed(0),
    }
    if loader.num_workers:
        copied["prefetch_factor"] = loader.prefetch_factor
    if isinstance(loader.dataset, IterableDataset):
        batches: Iterable[Any] = DataLoader(loader.dataset, batch_size=loader.batch_size, **copied)
        return islice(batches, max_batches), max_batches
    indices, batch_size = _indices(loader)
    size = (max_batches or 0) * (batch_size or 1) * world_size
    if max_batches is not None and size < len(indices):
        order = torch.arange(len(indices))
        if not isinstance(loader.sampler, SequentialSampler):  # that one trains on the first samples, no others
            order = torch.randperm(len(indices), generator=torch.Generator().manual_seed(0))
        indices = [indices[i] for i in order[:size].tolist()]
    indices = indices[rank::world_size]
    clone: DataLoader[Any] = DataLoader(loader.dataset, batch_size=batch_size, sampler=indices, **copied)
    return clone, len(clone)


def is_distributed(loader: Any) -> bool:
    """Whether the loader gives each process a part of the data."""
    return isinstance(getattr(loader, "sampler", None), DistributedSampler)


def _indices(loader: DataLoader[Any]) -> tuple[Sequence[Any], int | None]:
    """The samples that the training loader can visit, each once, and the batch size."""
    sampler: Any = loader.sampler
    batches: Any = loader.batch_sampler
    if isinstance(sampler, DistributedSampler):  # Lightning wraps a sampler that is not the default as the "dataset"
        inner = getattr(sampler.dataset, "_sampler", None)
        sampler = inner if inner is not None else SequentialSampler(loader.dataset)  # type: ignore[arg-type]
    shared = {id(loader.dataset): loader.dataset}  # a copy of a sampler must not copy the data
    if batches is not None and type(batches) is not BatchSampler:
        visited = set(chain.from_iterable(deepcopy(batches, shared)))
        return sorted(visited), getattr(batches, "batch_size", None) or len(next(iter(deepcopy(batches, shared))))
    batch_size = loader.batch_size if batches is None else batches.batch_size
    if isinstance(sampler, WeightedRandomSampler):
        return sampler.weights.nonzero().flatten().tolist(), batch_size
    if isinstance(sampler, SequentialSampler | RandomSampler):
        return range(len(loader.dataset)), batch_size  # type: ignore[arg-type]
    return sorted(set(deepcopy(sampler, shared))), batch_size
