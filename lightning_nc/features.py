"""Which layer, which call, which labels: the features of a model, caught by forward hooks that never outlive their block."""

from __future__ import annotations

import difflib
import fnmatch
import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import fields, is_dataclass
from typing import Any

import torch
from torch import Tensor, nn

__all__ = [
    "NotCalledError",
    "Recorder",
    "copied",
    "features_of",
    "find_classifier",
    "match_layers",
    "named_modules",
    "pool_features",
    "run_forward",
    "targets_of",
]

LABEL_KEYS = ("label", "labels", "target", "targets", "y")

Pool = str | Callable[[Tensor], Tensor]
Keep = Callable[[nn.Module, Tensor], Tensor]

_WRAPPERS = ("_fsdp_wrapped_module", "_orig_mod", "_checkpoint_wrapped_module")


class NotCalledError(LookupError):
    """A layer was not called on a batch."""


class Recorder:
    """Records what modules give, or take, call by call, while it is armed; its hooks stay until :meth:`remove`.

    Of each call the first floating tensor is kept, None where there is none. ``keep`` makes of it what is recorded, at
    once: the next layer may work in place. Hooks that a copy of the model inherits, an average of the weights say, do
    nothing.

    Args:
        outputs: modules whose outputs are recorded, by name.
        inputs: modules whose inputs are recorded, by name.
    """

    def __init__(self, outputs: Mapping[str, nn.Module], inputs: Mapping[str, nn.Module] | None = None) -> None:
        self.calls: list[tuple[str, Tensor | None]] = []
        self.keep: Keep | None = None
        self.error: Exception | None = None
        self._handles = [module.register_forward_hook(_Hook(self, name)) for name, module in outputs.items()]
        for name, module in (inputs or {}).items():
            hook = _Hook(self, name, inputs=True)
            self._handles.append(module.register_forward_pre_hook(hook, with_kwargs=True))

    def arm(self, keep: Keep) -> None:
        """Record from now on, starting with nothing."""
        self.calls, self.keep, self.error = [], keep, None

    def disarm(self) -> None:
        """Record no more; what was recorded stays."""
        self.keep = None

    def take(self) -> list[tuple[str, Tensor | None]]:
        """What was recorded, which is forgotten here; raises what went wrong in recording it."""
        calls, error = self.calls, self.error
        self.calls, self.keep, self.error = [], None, None
        if error is not None:
            raise error
        return calls

    def remove(self) -> None:
        """Take the hooks off."""
        self.calls, self.keep, self.error = [], None, None
        for handle in self._handles:
            handle.remove()


class _Hook:
    """Called with (module, args, kwargs) before a call, or with (module, args, output) after it; a copy does nothing."""

    def __init__(self, recorder: Recorder | None, name: str, inputs: bool = False) -> None:
        self.recorder, self.name, self.inputs = recorder, name, inputs

    def __call__(self, module: nn.Module, args: Any, last: Any) -> None:
        if self.recorder is None or self.recorder.keep is None:
            return
        try:
            self._record(module, args, last)
        except Exception as error:  # of a measurement, not of the model, whose step goes on
            self.recorder.error = error

    def _record(self, module: nn.Module, args: Any, last: Any) -> None:
        assert self.recorder is not None
        assert self.recorder.keep is not None
        value = (*args, *last.values()) if self.inputs else last
        tensor = next((tensor for tensor in _tensors(value) if tensor.is_floating_point()), None)
        self.recorder.calls.append((self.name, None if tensor is None else self.recorder.keep(module, tensor)))

    def __reduce__(self) -> tuple[Any, ...]:
        return _Hook, (None, self.name, self.inputs)


def named_modules(model: nn.Module) -> dict[str, nn.Module]:
    """The modules by the names they have without wrappers: those of FSDP, torch.compile and activation checkpointing."""
    named = {}
    for name, module in model.named_modules(remove_duplicate=False):
        named[".".join(part for part in name.split(".") if part not in _WRAPPERS)] = (
            module  # what is inside comes later
        )
    return named


def find_classifier(model: nn.Module, forward: Callable[[], Any], num_classes: int | None = None) -> str:
    """Name of the last linear layer of ``model``, found by running ``forward``.

    Among the linear layers that ran, the one whose output is the model's output; else those with ``num_classes`` outputs;
    else all. Of these, the last that ran. A convolution with a kernel of 1 is a linear layer too.

    Where no layer gives the model's output it may be made from several, their average say: so a layer with as many outputs
    as the last must feed it, or it is a second head. That takes one more run, and one for each such layer.

    Raises:
        LookupError: if no such layer ran, if the model has several heads, or if it returns the output of no linear layer
            and one was not called.
    """
    modules = named_modules(model)
    layers = _linear_layers(modules)
    linear = {name: module for name, module in layers.items() if isinstance(module, nn.Linear)}
    if not layers:
        raise LookupError(
            f"{type(model).__name__} has no torch.nn.Linear layer, so its classifier cannot be found; name a module with "
            "classifier=..., or give num_classes=... and layers=[...] to measure layers alone"
        )
    recorder = Recorder(layers)
    recorder.arm(keep=lambda module, output: output)
    try:
        output = forward()
    finally:
        calls = recorder.calls
        recorder.remove()
    returned = {_memory(tensor) for tensor in _tensors(output)}
    heads = _unique(name for name, result in calls if result is not None and _memory(result) in returned)
    names = _unique(name for name, _ in calls)
    if not names or (linear and not heads and linear.keys().isdisjoint(names)):
        raise LookupError(
            f"none of the linear layers ({_listed(linear)}) was called in the forward pass; hooks see only calls of the "
            "module itself: write self.fc(x) instead of F.linear(x, self.fc.weight), or name a layer with layers=[...]"
        )
    outputs = {name: outputs_of(module) for name, module in layers.items()}
    fitting = [name for name in heads or names if outputs[name] == num_classes]
    if len(heads) > 1 and len(fitting) != 1:
        raise LookupError(
            f"the model returns the outputs of several linear layers, {_listed(heads)}; name one with classifier=..."
        )
    last = (fitting or heads or names)[-1]
    if not fitting:
        # The projection inside torch's attention is a Linear that is never called.
        internal = nn.modules.linear.NonDynamicallyQuantizableLinear
        order = list(layers)
        uncalled = [
            name
            for name, module in linear.items()
            if name not in names and not isinstance(module, internal) and order.index(name) > order.index(last)
        ]
        if heads:
            uncalled = [name for name in uncalled if num_classes is not None and outputs[name] == num_classes]
        if uncalled:
            raise LookupError(
                f"{_listed(uncalled)} was not called in the forward pass, and {last!r}, the last linear layer that was, may "
                "not be the classifier: hooks see only calls of the module itself, self.fc(x) instead of "
                "F.linear(x, self.fc.weight); pass forward_fn, a function of the module and the batch that calls the "
                "classifier, or name it with classifier=..."
            )
        if not heads and _is_made_otherwise(output, calls, outputs[last]):
            raise LookupError(
                f"the model returns {output.shape[1]} columns, which come from no linear layer; the last that was called, "
                f"{last!r}, has {outputs[last]} outputs. Hooks see only calls of a module itself, self.fc(x) instead of "
                "F.linear(x, self.weight); name the classifier with classifier=..."
            )
    others = [] if heads else [name for name in names if outputs[name] == outputs[last] and name != last]
    if beside := _without_way_to(last, others, modules, forward):
        raise LookupError(
            f"several layers with {outputs[last]} outputs could be the classifier, {_listed([*beside, last])}: the model "
            "returns the output of none of them, and none feeds the last; name one with classifier=..."
        )
    return last


def _linear_layers(modules: Mapping[str, nn.Module]) -> dict[str, nn.Module]:
    """By one name each, the linear layers, and after them the convolutions with a kernel of 1."""
    first: dict[nn.Module, str] = {}  # a module may be registered under several names
    for name, module in modules.items():
        first.setdefault(module, name)
    linear = {name: module for module, name in first.items() if isinstance(module, nn.Linear)}
    kinds = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
    return linear | {
        name: module for module, name in first.items() if isinstance(module, kinds) and set(module.kernel_size) == {1}
    }


def _is_made_otherwise(output: Any, calls: Sequence[tuple[str, Tensor | None]], columns: int | None) -> bool:
    """Whether a model's output has other columns than the last linear layer's, of which it is no slice either."""
    if not isinstance(output, Tensor) or output.dim() != 2 or output.shape[1] == columns:
        return False
    results = {tensor.untyped_storage().data_ptr() for _, tensor in calls if tensor is not None}
    return output.untyped_storage().data_ptr() not in results


def _without_way_to(
    last: str, others: Sequence[str], modules: Mapping[str, nn.Module], forward: Callable[[], Any]
) -> list[str]:
    """Those of the other layers whose output does not reach the layer ``last``: its input is the same without them."""

    def inputs_of_last(disturbed: str | None = None) -> list[Tensor]:
        recorder = Recorder({}, {last: modules[last]})
        recorder.arm(keep=lambda module, tensor: tensor.clone())
        # Not a shift or a scale, which a normalisation would take away, and nothing random.
        handle = modules[disturbed].register_forward_hook(lambda module, args, y: y.cos()) if disturbed else None
        try:
            forward()
        finally:
            tensors = [tensor for _, tensor in recorder.take() if tensor is not None]
            recorder.remove()
            if handle is not None:
                handle.remove()
        return tensors

    before = inputs_of_last() if others else []
    return [name for name in others if all(map(torch.equal, before, inputs_of_last(name)))]


def outputs_of(module: nn.Module) -> int | None:
    """The number of outputs of a linear layer or a convolution; None for any other module."""
    outputs: int | None = getattr(module, "out_features", getattr(module, "out_channels", None))
    return outputs


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
        raise NotCalledError(
            f"{name!r} was not called in the forward pass; hooks see only calls of the module itself: write self.{name}(x) "
            f"instead of F.linear(x, self.{name}.weight), self.{name}.forward(x) or a traced copy; where it is called in the "
            "training step alone, pass forward_fn, a function of the module and the batch that calls it"
        )
    fitting = [tensor for tensor in tensors if tensor is not None and tensor.dim() and len(tensor) == batch_size]
    if not fitting:
        shapes = ", ".join(str(None if tensor is None else tuple(tensor.shape)) for tensor in tensors)
        raise LookupError(
            f"no call of {name!r} has a row for each of the {batch_size} labels, got {shapes}; pass target_fn or "
            "forward_fn so that features and labels fit"
        )
    return fitting[-1]


def pool_features(features: Tensor, pool: Pool, module: nn.Module | None = None, mask: Tensor | None = None) -> Tensor:
    """(B, ...) to (B, d), in memory of its own: ``"mean"`` over positions, ``"flatten"``, or a callable.

    Three dimensions are a sequence (B, T, d), or (B, d, T) at a module whose name ends in 1d, such as Conv1d; more are a
    map (B, d, ...). The mean of a sequence is over the positions where ``mask``, (B, T), is not zero.
    """
    features = features.detach()
    if features.is_nested:  # what torch's own encoder hands on in eval mode, without the padding
        if pool != "mean":
            raise ValueError(
                "sequences of different lengths come as a nested tensor, of which only pool='mean' can be had"
            )
        return torch.stack([sequence.mean(dim=0) for sequence in features.unbind()])
    if features.dim() <= 2:
        return (features if features.dim() == 2 else features[:, None]).clone()
    if callable(pool):
        return pool(features).detach().clone()
    if pool == "flatten":
        return features.flatten(start_dim=1).clone()
    if features.dim() == 3 and not type(module).__name__.endswith("1d"):
        if mask is not None and mask.shape == features.shape[:2]:
            weights = mask.to(torch.promote_types(features.dtype, torch.float32)).unsqueeze(
                2
            )  # a sum may leave float16
            return (features * weights).sum(dim=1) / weights.sum(dim=1).clamp(min=1)
        return features.mean(dim=1)
    return features.flatten(start_dim=2).mean(dim=2)


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


def copied(batch: Any) -> Any:
    """A batch that a model may change or empty; the batch itself where it cannot be copied."""
    try:
        return deepcopy(batch)
    except Exception:
        return batch


def run_forward(model: nn.Module, batch: Any) -> Any:
    """Call the model on a batch: on the first item of a sequence, on the entries of a mapping that its forward takes.

    A LightningModule that defines no forward of its own runs its ``validation_step``.

    Raises:
        LookupError: if the model cannot be called so.
    """
    module = _unwrapped(model)
    if getattr(type(module).forward, "__name__", "") == "_forward_unimplemented" or _is_lightnings(
        type(module), "forward"
    ):
        if not hasattr(module, "validation_step") or _is_lightnings(type(module), "validation_step"):
            raise LookupError(
                f"{type(module).__name__} has neither a forward nor a validation_step to run; define one, or pass forward_fn, "
                "a function of the module and the batch"
            )
        return module.validation_step(batch, 0)  # type: ignore[operator]
    if isinstance(batch, Mapping):
        return model(*_entries(module, batch)[0], **_entries(module, batch)[1])
    if not isinstance(batch, Sequence):
        raise LookupError(
            f"a batch of type {type(batch).__name__} has no first item to call the model on; pass forward_fn, a "
            "function of the module and the batch"
        )
    return model(batch[0])


def _unwrapped(model: nn.Module) -> nn.Module:
    """Without the wrapper of torch.compile, and those whose forward takes anything: of FSDP, DDP and Fabric."""
    model = getattr(model, "_orig_mod", model)
    kinds = {parameter.kind for parameter in inspect.signature(model.forward).parameters.values()}
    takes_anything = kinds == {inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD}
    return getattr(model, "module", model) if takes_anything and not _is_lightnings(type(model), "forward") else model


def _entries(module: nn.Module, batch: Mapping[str, Any]) -> tuple[list[Any], dict[str, Any]]:
    """The positional and the named arguments that a mapping gives to the forward of a module."""
    parameters = inspect.signature(module.forward).parameters
    if any(parameter.kind == parameter.VAR_KEYWORD for parameter in parameters.values()):
        return [], dict(batch)
    required = {
        name
        for name, parameter in parameters.items()
        if parameter.default is parameter.empty and parameter.kind != parameter.VAR_POSITIONAL
    }
    taken = {name: value for name, value in batch.items() if name in parameters}
    if taken and required <= taken.keys():
        return [], taken
    inputs = [value for name, value in batch.items() if name not in LABEL_KEYS]
    if len(inputs) == 1 and len(required) == 1:
        return inputs, {}
    raise LookupError(
        f"a batch has the keys {_listed(batch)}, and the forward of {type(module).__name__} takes {_listed(parameters)}; "
        "pass forward_fn, a function of the module and the batch"
    )


def _is_lightnings(kind: type, method: str) -> bool:
    """Whether the method is that of LightningModule, of either package, and so not the user's."""
    module: str = getattr(kind, method).__module__ or ""  # a traced module's method has none
    return module.startswith(("lightning.pytorch.", "pytorch_lightning."))


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from _tensors(item)
    elif isinstance(value, Sequence) and not isinstance(value, str):
        for item in value:
            yield from _tensors(item)
    elif is_dataclass(value) and not isinstance(value, type):
        for part in fields(value):
            yield from _tensors(getattr(value, part.name))


def _listed(names: Any) -> str:
    names = list(names)
    return ", ".join(repr(name) for name in names[:10]) + (", ..." if len(names) > 10 else "")


def _memory(tensor: Tensor) -> tuple[int, int]:
    """Tells a tensor, or a view of another shape of it, from all others that are alive."""
    return tensor.data_ptr(), tensor.numel()


def _unique(names: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(names))
