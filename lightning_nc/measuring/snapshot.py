"""Evaluation mode for the length of a measurement, then everything back as it was."""

from __future__ import annotations

import random
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import copy
from functools import partial
from itertools import chain
from typing import Any

import numpy
import torch
from torch import Tensor, nn
from torch.nn.modules.lazy import LazyModuleMixin
from torchmetrics import Metric

from lightning_nc.measuring.distributed import is_sharded
from lightning_nc.versions import force_eager

__all__ = ["evaluation_mode", "fingerprint"]

_CONTAINERS = (list, deque, set, dict, defaultdict, OrderedDict, Counter)


@contextmanager
def evaluation_mode(
    model: nn.Module, device: torch.device, warn: Callable[[str, str], None] | None = None
) -> Iterator[None]:
    """Eval mode without gradients; on exit restore training flags, buffers, attributes, metrics and random streams.

    What the model logs meanwhile is dropped: it would be logged twice. ``warn(topic, message)`` is called if the forward pass
    changes parameters, which are not restored.

    Raises:
        TypeError: for a model that has no eval mode.
    """
    modules = list(model.modules())
    restore = [step for module in modules for step in _remember(module)]
    parameters = fingerprint(model) if warn is not None else ""
    loggers = [module for module in modules if hasattr(type(module), "log_dict")]
    python, numpys = random.getstate(), numpy.random.get_state()
    devices = [device] if device.type == "cuda" else []
    try:
        with torch.random.fork_rng(devices), torch.no_grad(), force_eager():
            for module in loggers:
                vars(module).update(log=_drop, log_dict=_drop)
            try:
                model.eval()
            except NotImplementedError as error:
                raise TypeError(
                    f"the model, a {type(model).__name__}, has no eval mode: {error} Measure the module that it was exported "
                    "from: an exported program calls none of its layers, so hooks see nothing"
                ) from error
            yield
        if warn is not None and fingerprint(model) != parameters:
            warn(
                "parameters",
                "the forward pass of the model changes its parameters (a momentum encoder, for example), and so has this "
                "measurement; update them in the training step instead",
            )
    finally:
        random.setstate(python)
        numpy.random.set_state(numpys)
        for module in loggers:
            vars(module).pop("log", None)
            vars(module).pop("log_dict", None)
        for step in restore:
            step()


@torch.no_grad()
def fingerprint(model: nn.Module) -> str:
    """The norms of the parameters, which change when the parameters change; empty for a model that FSDP shards."""
    plain = [] if is_sharded(model) else [p for p in model.parameters() if _is_plain(p) and p.is_floating_point()]
    norms = [torch.linalg.vector_norm(p, dtype=torch.promote_types(p.dtype, torch.float32)) for p in plain]
    return repr([norm.item() for norm in norms]) if norms else ""


def _remember(module: nn.Module) -> Iterator[Callable[[], None]]:
    """Functions that restore a module's own state: flag, buffers, attributes, and their contents one level deep."""
    yield partial(setattr, module, "training", module.training)
    yield from filter(None, map(_remember_contents, module._buffers.values()))
    if isinstance(module, torch.jit.ScriptModule):
        return
    yield partial(module._buffers.update, dict(module._buffers))
    if not isinstance(module, LazyModuleMixin):  # a lazy module becomes another class in its first forward
        public = {name: value for name, value in vars(module).items() if not name.startswith("_")}
        yield partial(_restore_attributes, vars(module), public)
        yield from filter(None, map(_remember_contents, public.values()))
    if isinstance(module, Metric):
        names = [*module._defaults, "_update_count", "_computed", "_forward_cache"]
        states = {name: _copied(value) for name, value in vars(module).items() if name in names}
        yield partial(vars(module).update, states)


def _copied(value: Any) -> Any:
    """A metric's state: a tensor that is updated in place, or a list of tensors. A cached loss holds a graph: not copied."""
    if isinstance(value, Tensor):
        return value if value.requires_grad else value.clone()
    return copy(value)


def _restore_attributes(own: dict[str, Any], before: dict[str, Any]) -> None:
    for name in [name for name in own if name not in before and not name.startswith("_")]:
        del own[name]
    for name, value in before.items():
        # FSDP binds another view of its parameters in every forward, and so does a norm with its weight.
        if not (_is_trained(value) and _is_trained(own.get(name))):
            own[name] = value


def _is_trained(value: Any) -> bool:
    if not isinstance(value, Tensor):
        return False
    return value.requires_grad or (_is_plain(value) and value.untyped_storage().size() == 0)


def _is_plain(tensor: Tensor) -> bool:
    """Whether the numbers of a tensor lie in one piece of memory that can be read."""
    return tensor.layout == torch.strided and not (tensor.is_nested or tensor.is_meta or nn.parameter.is_lazy(tensor))


def _remember_contents(value: Any) -> Callable[[], None] | None:
    if isinstance(value, Tensor):
        kept = _is_plain(value) and not _is_trained(value)
        return partial(_restore_tensor, value, value.detach().clone()) if kept else None
    if isinstance(value, numpy.ndarray) and value.flags.writeable:
        return partial(numpy.copyto, value, value.copy())
    return partial(_restore_container, value, copy(value)) if type(value) in _CONTAINERS else None


def _restore_tensor(tensor: Tensor, before: Tensor) -> None:
    if not torch.equal(tensor, before):  # an expanded tensor cannot be written to
        with torch.inference_mode(tensor.is_inference()), torch.no_grad():
            tensor.copy_(before)


def _restore_container(container: Any, before: Any) -> None:
    if _identities(container) == _identities(before):  # someone may be iterating over it
        return
    container.clear()
    (container.extend if isinstance(before, list | deque) else container.update)(before)


def _identities(container: Any) -> list[int]:
    entries = chain.from_iterable(container.items()) if isinstance(container, dict) else container
    return [id(entry) for entry in entries]


def _drop(*args: Any, **kwargs: Any) -> None:
    return None
