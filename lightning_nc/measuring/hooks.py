"""Forward hooks on named modules, removed after use."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import fields, is_dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

__all__ = ["Call", "FirstInput", "Recorder", "named_modules", "tensors_in", "trace"]

_WRAPPERS = ("_fsdp_wrapped_module", "_orig_mod", "_checkpoint_wrapped_module")

Keep = Callable[[str, Tensor], Any]


class Recorder:
    """Records what modules return, or receive, call by call, between :meth:`start` and :meth:`stop`.

    Each call contributes its first floating-point tensor, passed through ``keep`` immediately, because the next layer may
    work in place. Copies of a hooked module, made by weight averaging for example, record nothing.

    Args:
        outputs: modules whose outputs are recorded, by name.
        inputs: modules whose inputs are recorded, by name.
    """

    def __init__(
        self, outputs: Mapping[str, nn.Module] | None = None, inputs: Mapping[str, nn.Module] | None = None
    ) -> None:
        self.calls: list[tuple[str, Any]] = []
        self._keep: Keep | None = None
        self._error: Exception | None = None
        self._handles = [
            module.register_forward_hook(partial(self._record, name, False)) for name, module in (outputs or {}).items()
        ]
        for name, module in (inputs or {}).items():
            self._handles.append(module.register_forward_pre_hook(partial(self._record, name, True), with_kwargs=True))

    def start(self, keep: Keep) -> None:
        """Forget earlier calls and record from now on."""
        self.calls, self._keep, self._error = [], keep, None

    def pause(self) -> None:
        """Stop recording but keep the recorded calls."""
        self._keep = None

    def stop(self) -> list[tuple[str, Any]]:
        """Stop recording and return the recorded calls; raise the first error that occurred in a hook."""
        calls, error = self.calls, self._error
        self.calls, self._keep, self._error = [], None, None
        if error is not None:
            raise error
        return calls

    def remove(self) -> None:
        """Remove the hooks."""
        self.calls, self._keep, self._error = [], None, None
        for handle in self._handles:
            handle.remove()

    def _record(self, name: str, inputs: bool, module: nn.Module, args: Any, last: Any) -> None:
        if self._keep is None or self._error is not None:
            return
        try:
            tensor = _first_floating((*args, *last.values()) if inputs else last)
            self.calls.append((name, None if tensor is None else self._keep(name, tensor)))
        except Exception as error:  # an error in the measurement must not stop the user's step
            self._error = error

    def __reduce__(self) -> tuple[Any, ...]:
        return Recorder, ()


class Call(NamedTuple):
    """One call of a module: its first floating-point input and output."""

    name: str
    module: nn.Module
    input: Tensor | None
    output: Tensor | None


def trace(model: nn.Module, forward: Callable[[], Any]) -> tuple[Any, list[Call]]:
    """Run ``forward`` and return its result and the calls of all modules of ``model``, in the order they finished."""
    calls: list[Call] = []

    def hook(name: str, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        calls.append(Call(name, module, _first_floating((*args, *kwargs.values())), _first_floating(output)))

    first_names: dict[nn.Module, str] = {}
    for name, module in named_modules(model).items():
        first_names.setdefault(module, name)
    handles = [
        module.register_forward_hook(partial(hook, name), with_kwargs=True)
        for module, name in first_names.items()
        if not isinstance(module, torch.jit.ScriptModule)
    ]
    try:
        return forward(), calls
    finally:
        for handle in handles:
            handle.remove()


class FirstInput:
    """Whether the first tensor that a step of the user gives to any module of a model is one of ``tensors``, unchanged.

    ``is_given`` is None until the step calls a module.
    """

    def __init__(self, model: nn.Module, tensors: Iterable[Tensor]) -> None:
        self.is_given: bool | None = None
        # A few rows as they are now, since a step may mix a batch in place.
        self._given = [(t, t[:8].clone()) for t in tensors if t.dim() and t.layout == torch.strided and not t.is_nested]
        compiled = any(m._compiled_call_impl is not None or hasattr(m, "_orig_mod") for m in model.modules())
        self._handles = [
            module.register_forward_pre_hook(self._see, with_kwargs=True)
            for module in model.modules()
            if not compiled and not isinstance(module, torch.jit.ScriptModule)  # a compiled model would keep the hook
        ]

    def remove(self) -> None:
        """Remove the hooks."""
        for handle in self._handles:
            handle.remove()

    def _see(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        tensor = None if self.is_given is not None else next(tensors_in((*args, *kwargs.values())), None)
        if tensor is not None and self._given:
            with suppress(RuntimeError, NotImplementedError):  # a sparse tensor, or one inside of vmap
                self.is_given = any(_is_same(tensor, *given) for given in self._given)


def named_modules(model: nn.Module) -> dict[str, nn.Module]:
    """Modules by name, without the wrappers of FSDP, torch.compile and activation checkpointing in the names."""
    named = {}
    for name, module in model.named_modules(remove_duplicate=False):
        # The module inside a wrapper comes later and takes its place.
        named[".".join(part for part in name.split(".") if part not in _WRAPPERS)] = module
    return named


def tensors_in(value: Any) -> Iterator[Tensor]:
    """All tensors in nested mappings, sequences and dataclasses."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from tensors_in(item)
    elif isinstance(value, Sequence) and not isinstance(value, str):
        for item in value:
            yield from tensors_in(item)
    elif is_dataclass(value) and not isinstance(value, type):
        for part in fields(value):
            yield from tensors_in(getattr(value, part.name))


def _is_same(tensor: Tensor, given: Tensor, rows: Tensor) -> bool:
    """Whether ``tensor`` is a view or a copy of ``given``, whose first rows were ``rows``."""
    if tensor.device != given.device or not torch.equal(given[:8], rows):
        return False
    if tensor.untyped_storage().data_ptr() == given.untyped_storage().data_ptr():
        return True
    return tensor.shape == given.shape and torch.equal(tensor, given.to(tensor.dtype))


def _first_floating(value: Any) -> Tensor | None:
    return next((tensor for tensor in tensors_in(value) if tensor.is_floating_point()), None)
