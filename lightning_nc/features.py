"""Which layer, which call, which labels: the features of a model, caught by forward hooks that never outlive their block."""

from __future__ import annotations

import difflib
import fnmatch
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

__all__ = ["features_of", "find_classifier", "match_layers", "pool_features", "recording", "targets_of"]

LABEL_KEYS = ("label", "labels", "target", "targets", "y")

Pool = str | Callable[[Tensor], Tensor]


@contextmanager
def recording(
    modules: Mapping[str, nn.Module], keep: Callable[[nn.Module, Tensor], Tensor], inputs: bool = False
) -> Iterator[list[tuple[str, Tensor | None]]]:
    """Record what the named modules give, or with ``inputs`` take, call by call, while the block runs.

    Of each call the first floating tensor is kept, None where there is none. ``keep`` makes of it what is recorded, at
    once: the next layer may work in place.
    """
    recorded: list[tuple[str, Tensor | None]] = []

    def record(name: str, module: nn.Module, value: Any) -> None:
        tensor = next((tensor for tensor in _tensors(value) if tensor.is_floating_point()), None)
        recorded.append((name, None if tensor is None else keep(module, tensor)))

    def before(name: str) -> Callable[..., None]:
        return lambda module, args, kwargs: record(name, module, (*args, *kwargs.values()))

    def after(name: str) -> Callable[..., None]:
        return lambda module, args, output: record(name, module, output)

    handles = []
    try:
        for name, module in modules.items():
            if inputs:
                handles.append(module.register_forward_pre_hook(before(name), with_kwargs=True))
            else:
                handles.append(module.register_forward_hook(after(name)))
        yield recorded
    finally:
        for handle in handles:
            handle.remove()


def find_classifier(model: nn.Module, forward: Callable[[], Any], num_classes: int | None = None) -> str:
    """Name of the last linear layer of ``model``, found by running ``forward`` once.

    Among the linear layers that ran, the one whose output is the model's output; else those with ``num_classes`` outputs;
    else all. Of these, the last that ran.

    Raises:
        LookupError: if no linear layer ran, if the model returns the outputs of several, or if it returns the output of
            none and one was not called.
    """
    linear = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    if not linear:
        raise LookupError(
            f"{type(model).__name__} has no torch.nn.Linear layer, so its classifier cannot be found; name a module with "
            "classifier=..., or give num_classes=... and layers=[...] to measure layers alone"
        )
    with recording(linear, keep=lambda module, output: output) as calls:
        output = forward()
    if not calls:
        raise LookupError(
            f"none of the linear layers ({_listed(linear)}) was called in the forward pass; hooks see only calls of the "
            "module itself: write self.fc(x) instead of F.linear(x, self.fc.weight), or name a layer with layers=[...]"
        )
    returned = {id(tensor) for tensor in _tensors(output)}
    names = list(dict.fromkeys(name for name, _ in calls))
    heads = list(dict.fromkeys(name for name, result in calls if id(result) in returned))
    fitting = [name for name in heads or names if linear[name].out_features == num_classes]
    if len(heads) > 1 and len(fitting) != 1:
        raise LookupError(
            f"the model returns the outputs of several linear layers, {_listed(heads)}; name one with classifier=..."
        )
    # The projection inside torch's attention is a Linear that is never called.
    internal = nn.modules.linear.NonDynamicallyQuantizableLinear
    uncalled = [name for name, module in linear.items() if name not in names and not isinstance(module, internal)]
    if uncalled and not heads and not fitting:
        raise LookupError(
            f"no linear layer gives the model's output, and {_listed(uncalled)} was not called: hooks see only calls of the "
            "module itself, self.fc(x) instead of F.linear(x, self.fc.weight); name the classifier with classifier=..."
        )
    return (fitting or heads or names)[-1]


def match_layers(model: nn.Module, patterns: Sequence[str]) -> list[str]:
    """Names of the modules that match the shell patterns, in the order of the model.

    Raises:
        LookupError: for a pattern that matches none, with the nearest names.
    """
    names = [name for name, _ in model.named_modules() if name]
    chosen: set[str] = set()
    for pattern in patterns:
        if not (found := fnmatch.filter(names, pattern)):
            near = difflib.get_close_matches(pattern, names, n=5, cutoff=0.4) or names[:10]
            raise LookupError(f"no module of {type(model).__name__} is named {pattern!r}; near: {_listed(near)}")
        chosen.update(found)
    return [name for name in names if name in chosen]


def features_of(name: str, recorded: Sequence[tuple[str, Tensor | None]], batch_size: int) -> Tensor:
    """The last of what was recorded of module ``name`` that has a row for each label.

    Raises:
        LookupError: if the module was not called, or if no call has ``batch_size`` rows.
    """
    tensors = [tensor for called, tensor in recorded if called == name]
    if not tensors:
        raise LookupError(
            f"{name!r} was not called in the forward pass; hooks see only calls of the module itself: write self.{name}(x) "
            f"instead of F.linear(x, self.{name}.weight), self.{name}.forward(x) or a traced copy"
        )
    fitting = [tensor for tensor in tensors if tensor is not None and tensor.dim() and len(tensor) == batch_size]
    if not fitting:
        shapes = ", ".join(str(None if tensor is None else tuple(tensor.shape)) for tensor in tensors)
        raise LookupError(
            f"no call of {name!r} has a row for each of the {batch_size} labels, got {shapes}; pass target_fn or "
            "forward_fn so that features and labels fit"
        )
    return fitting[-1]


def pool_features(features: Tensor, pool: Pool, module: nn.Module | None = None) -> Tensor:
    """(B, ...) to (B, d), in memory of its own: ``"mean"`` over positions, ``"flatten"``, or a callable.

    Three dimensions are a sequence (B, T, d), or (B, d, T) at a module whose name ends in 1d, such as Conv1d; more are a
    map (B, d, ...).
    """
    if callable(pool):
        pooled = pool(features)
    elif pool == "flatten" or features.dim() <= 2:
        pooled = features.flatten(start_dim=1) if features.dim() > 1 else features.unsqueeze(1)
    elif features.dim() == 3 and not type(module).__name__.endswith("1d"):
        pooled = features.mean(dim=1)
    else:
        pooled = features.flatten(start_dim=2).mean(dim=2)
    return pooled.clone() if pooled.data_ptr() == features.data_ptr() else pooled


def targets_of(batch: Any) -> Any:
    """The labels of a batch: the second item of a sequence, or the first of the usual keys of a mapping.

    Raises:
        LookupError: if there are none.
    """
    if isinstance(batch, Mapping):
        for key in LABEL_KEYS:
            if key in batch:
                return batch[key]
        raise LookupError(
            f"a batch has the keys {_listed(batch)}, none of {_listed(LABEL_KEYS)}; pass target_fn, a function "
            "from a batch to its class indices"
        )
    if isinstance(batch, Sequence) and len(batch) > 1:
        return batch[1]
    raise LookupError(
        f"a batch of type {type(batch).__name__} has no labels as its second item; pass target_fn, a function "
        "from a batch to its class indices"
    )


def run_forward(model: nn.Module, batch: Any) -> Any:
    """Call the model on the first item of a batch.

    Raises:
        LookupError: if the batch is no sequence, or the model cannot be called so.
    """
    if isinstance(batch, Mapping) or not isinstance(batch, Sequence):
        raise LookupError(
            f"a batch of type {type(batch).__name__} has no first item to call the model on; pass forward_fn, a "
            "function of the module and the batch"
        )
    try:
        return model(batch[0])
    except NotImplementedError as error:
        raise LookupError(
            f"{type(model).__name__} cannot be called: define its forward, or pass forward_fn, a function of "
            "the module and the batch"
        ) from error


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from _tensors(item)
    elif isinstance(value, Sequence) and not isinstance(value, str):
        for item in value:
            yield from _tensors(item)


def _listed(names: Any) -> str:
    names = list(names)
    return ", ".join(repr(name) for name in names[:10]) + (", ..." if len(names) > 10 else "")
