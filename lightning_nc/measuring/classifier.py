"""Which layer is the classifier, and the weight that it applies now."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from lightning_nc.measuring.batches import listed
from lightning_nc.measuring.hooks import Call, named_modules, tensors_in
from lightning_nc.simplex_etf import SimplexETF
from lightning_nc.versions import force_eager

__all__ = ["Classifier", "find_classifier", "outputs_of"]


class Classifier:
    """The layer whose input is measured, and the weight (K, d) and bias (K,) that it applies now.

    Args:
        name: its name.
        module: the layer.
        num_classes: K; the first K outputs are used. One output is two classes with the rows -w and w, the biases -b and b.
        rows: a few of its inputs, (n, d) or (n, d, 1, ...), on which its weight is checked.
        sharded: whether its parameters are unsharded only during forward; they are then kept from the last call.
        replaced: whether its weight is another one during forward, as in ``torch.func.functional_call``; it is then unknown.
    """

    def __init__(
        self,
        name: str,
        module: nn.Module,
        num_classes: int,
        rows: Tensor | None = None,
        sharded: bool = False,
        replaced: bool = False,
    ) -> None:
        self.name, self.module, self.num_classes = name, module, num_classes
        self._rows, self._replaced = rows, replaced
        self._seen: dict[str, Tensor] = {}
        self._handles = []
        if sharded:
            self._handles.append(module.register_forward_pre_hook(self._see_parameters))
            self._handles.append(module.register_forward_hook(self._see_call))

    def remove(self) -> None:
        """Remove the hooks."""
        for handle in self._handles:
            handle.remove()

    def parts(self) -> tuple[Tensor | None, Tensor | None]:
        """Weight and bias so that the layer computes ``x W' + b``; both None if it does not.

        For any layer but torch's own, the raw parameters are taken if they reproduce what it returns for a few rows. Otherwise
        (LoRA and DoRA adapters, quantized layers) it is applied to the identity matrix, and what that gives is taken if it
        reproduces them.
        """
        if self._replaced:
            return None, None
        weight, bias = (self._seen.get(part, _part(self.module, part)) for part in ("weight", "bias"))
        if weight is not None:
            weight = weight.flatten(start_dim=1)
        if self._handles:
            applied = self._seen.get("output")
            rows = self._seen.get("input")
            known = weight is not None and rows is not None and applied is not None
            return self._first(weight, bias) if known and _fits(rows, weight, bias, applied) else (None, None)
        if _is_plain(self.module):
            return self._first(weight, bias)
        applied = self._apply(self._rows) if self._rows is not None else None
        if applied is None or self._rows is None:
            return None, None
        if weight is not None and _fits(self._rows, weight, bias, applied):
            return self._first(weight, bias)
        if outputs_of(self.module) is None:
            return None, None
        rows = self._rows.flatten(start_dim=1)
        offset = self._apply(torch.zeros_like(self._rows[:1]))
        units = self._apply(
            torch.eye(rows.shape[1], dtype=rows.dtype, device=rows.device).view(-1, *self._rows.shape[1:])
        )
        if offset is None or units is None:
            return None, None
        weight, bias = (units - offset).T, offset[0]
        return self._first(weight, bias) if _fits(self._rows, weight, bias, applied) else (None, None)

    def _first(self, weight: Tensor | None, bias: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
        if weight is not None and len(weight) == 1 and self.num_classes == 2:  # one output decides by its sign
            weight, bias = torch.cat([-weight, weight]), None if bias is None else torch.cat([-bias, bias])
        if weight is None or len(weight) < self.num_classes:
            return None, None
        return weight.detach()[: self.num_classes], None if bias is None else bias.detach()[: self.num_classes]

    def _apply(self, rows: Tensor) -> Tensor | None:
        """What the layer returns for ``rows`` in eval mode, (n, K); None if it cannot be called on them alone."""
        try:
            with _eval(self.module), torch.no_grad(), force_eager():
                weight: Any = getattr(self.module, "weight", None)
                floating = isinstance(weight, Tensor) and weight.is_floating_point()
                output: Tensor = self.module(rows.to(weight.dtype if floating else rows.dtype, copy=True))
            return output.flatten(start_dim=1).to(torch.promote_types(output.dtype, torch.float32))
        except Exception:  # it takes labels as well, for example
            return None

    def _see_parameters(self, module: nn.Module, args: Any) -> None:
        for name in ("weight", "bias"):
            if (part := _part(module, name)) is not None:
                self._seen[name] = part.clone()

    def _see_call(self, module: nn.Module, args: Any, output: Any) -> None:
        if (
            args
            and isinstance(args[0], Tensor)
            and isinstance(output, Tensor)
            and isinstance(module, nn.Linear | SimplexETF)
        ):
            self._seen["input"] = args[0].detach().flatten(end_dim=-2)[:8].clone()
            self._seen["output"] = output.detach().flatten(end_dim=-2)[:8].clone()

    def __reduce__(self) -> tuple[Any, ...]:  # a copy of the model carries an inert hook
        return Classifier, (self.name, nn.Identity(), self.num_classes)


def _is_plain(module: nn.Module) -> bool:
    """Whether a layer is one of torch's own, with a parameter as its weight and nothing that changes its output."""
    kinds = nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d
    own = type(module) in kinds and "forward" not in vars(module) and getattr(module, "groups", 1) == 1
    return own and type(module._parameters.get("weight")) is nn.Parameter and not module._forward_hooks


def _fits(rows: Tensor | None, weight: Tensor | None, bias: Tensor | None, applied: Tensor | None) -> bool:
    """Whether a layer that returned ``applied`` computes x W' + b, up to the rounding of its precision."""
    assert rows is not None
    assert weight is not None
    assert applied is not None
    x, w = rows.flatten(start_dim=1).double(), weight.double()
    if x.shape[1] != w.shape[1] or applied.shape != (len(x), len(w)):
        return False
    b = torch.zeros_like(w[:, 0]) if bias is None else bias.double()
    coarsest = max(torch.finfo(t.dtype).eps for t in (rows, weight, applied) if t.is_floating_point())
    if rows.device.type == "cuda":
        coarsest = max(coarsest, 1e-3)  # TF32
    size = torch.linalg.vector_norm(x.abs() @ w.abs().T + b.abs())
    return bool(torch.linalg.vector_norm(applied.double() - (x @ w.T + b)) <= 32 * coarsest * size)


def _part(module: nn.Module, name: str) -> Tensor | None:
    """The weight or the bias of a layer with outputs; None if there is none or only a shard of it."""
    with _eval(module):
        part = getattr(module, name, None)
    sides = 2 if name == "weight" else 1
    if (
        not isinstance(part, Tensor)
        or hasattr(part, "full_tensor")
        or part.dim() < sides
        or not part.is_floating_point()
    ):
        return None
    if part.untyped_storage().size() == 0:  # FSDP frees the memory of the views it shows
        return None
    return part.detach() if len(part) == outputs_of(module) else None


@contextmanager
def _eval(module: nn.Module) -> Iterator[None]:
    """Eval mode by flags alone, then all attributes as before.

    A spectral norm takes a step whenever its weight is read in training mode, and its old form replaces the weight by one
    without a gradient.
    """
    attributes = {inner: dict(vars(inner)) for inner in module.modules()}
    try:
        for inner in attributes:
            inner.training = False
        yield
    finally:
        for inner, before in attributes.items():
            vars(inner).clear()
            vars(inner).update(before)


def outputs_of(module: nn.Module) -> int | None:
    """The number of outputs of a linear layer or a convolution; None for any other module."""
    outputs = getattr(module, "out_features", getattr(module, "out_channels", None))
    return outputs if isinstance(outputs, int) else None


def find_classifier(
    model: nn.Module, output: Any, calls: Sequence[Call], forward: Callable[[], Any], num_classes: int | None = None
) -> str:
    """Name of the classifier of ``model``, given what a run returned and which modules it called.

    In this order: what the model itself names (``get_classifier()`` of timm, ``get_output_embeddings()`` of transformers);
    the linear layer whose output the model returns; the last linear layer that was called. ``num_classes`` decides between
    several. A convolution with a kernel of 1 is a linear layer too.

    Args:
        model: the model.
        output: what it returned.
        calls: the calls of its modules.
        forward: runs the model again, for heads that are combined into one output.
        num_classes: K, if it is known.

    Raises:
        LookupError: if there is no such layer, or more than one.
    """
    layers = _linear_layers(model)
    if not layers:
        raise LookupError(
            f"{type(model).__name__} has no torch.nn.Linear layer, so its classifier cannot be found; name a module with "
            "classifier=..., or give num_classes=... and layers=[...] to measure layers alone"
        )
    called = [call for call in calls if call.name in layers]
    names = list(dict.fromkeys(call.name for call in called))
    returned = {_memory(tensor) for tensor in tensors_in(output)}
    heads = [name for name in names if any(c.name == name and _memory(c.output) in returned for c in called)]
    asked = [name for name in names if name in _named_by_model(model, layers)]
    linear = [name for name in layers if isinstance(layers[name], nn.Linear | SimplexETF)]
    if not names or (linear and not heads and not set(linear) & set(names)):
        raise LookupError(
            f"none of the linear layers ({listed(linear)}) was called in the forward pass; hooks see only calls of the module "
            "itself: write self.fc(x) instead of F.linear(x, self.fc.weight), or name a layer with layers=[...]"
        )
    candidates = [name for name in asked if name in heads] or asked or heads
    fitting = _with_outputs(layers, candidates or names, num_classes)
    if len(candidates) > 1 and len(fitting) != 1:
        by = "names" if asked else "returns the outputs of"
        raise LookupError(f"the model {by} several linear layers, {listed(candidates)}; name one with classifier=...")
    last = (fitting or candidates or names)[-1]
    if not fitting and (not candidates or num_classes is not None):
        _check_uncalled(layers, names, last, num_classes if candidates else None)
    if not candidates and not fitting:
        _check_output(output, called, last, layers)
    if not candidates:
        _check_only_head(last, names, layers, forward)
    return last


def _linear_layers(model: nn.Module) -> dict[str, nn.Module]:
    """Linear layers by one name each, and after them the convolutions with a kernel of 1.

    A layer with inputs, outputs and a weight of its own, or with a ``base_layer`` as adapters have, is one layer: what is
    inside it is not listed.
    """
    first: dict[nn.Module, str] = {}  # a module may be registered under several names
    for name, module in named_modules(model).items():
        first.setdefault(module, name)
    linear: dict[str, nn.Module] = {}
    inside: set[nn.Module] = set()
    for module, name in first.items():
        if module not in inside and _is_linear(module):
            linear[name] = module
            inside.update(module.modules())
    kinds = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
    return linear | {n: m for m, n in first.items() if isinstance(m, kinds) and set(m.kernel_size) == {1}}


def _is_linear(module: nn.Module) -> bool:
    sizes = all(isinstance(getattr(module, name, None), int) for name in ("in_features", "out_features"))
    own = "weight" in module._parameters or "weight" in module._buffers or hasattr(module, "base_layer")
    return isinstance(module, nn.Linear) or (sizes and own)


def _with_outputs(layers: Mapping[str, nn.Module], names: Sequence[str], num_classes: int | None) -> list[str]:
    """The layers with as many outputs as classes; for two classes else those with one, which decides by its sign."""
    found = [name for name in names if outputs_of(layers[name]) == num_classes]
    return found or (_with_outputs(layers, names, 1) if num_classes == 2 else [])


def _named_by_model(model: nn.Module, layers: Mapping[str, nn.Module]) -> set[str]:
    """The linear layers that timm's ``get_classifier`` or transformers' ``get_output_embeddings`` return."""
    for module in model.modules():
        for method in ("get_classifier", "get_output_embeddings"):
            try:
                answer = getattr(module, method)()
            except Exception:
                continue
            inner = {part for head in _modules_in(answer) for part in head.modules()}
            if found := {name for name, layer in layers.items() if layer in inner}:
                return found
    return set()


def _modules_in(answer: Any) -> Iterator[nn.Module]:
    for item in answer if isinstance(answer, tuple | list) else (answer,):
        if isinstance(item, nn.Module):
            yield item


def _check_uncalled(layers: Mapping[str, nn.Module], names: Sequence[str], last: str, outputs: int | None) -> None:
    """Raise LookupError if a linear layer after ``last``, with ``outputs`` outputs if given, was not called."""
    # The projection inside torch's attention is a Linear that is never called.
    internal = nn.modules.linear.NonDynamicallyQuantizableLinear
    order = list(layers)
    uncalled = [
        name
        for name, module in layers.items()
        if isinstance(module, nn.Linear | SimplexETF)
        and name not in names
        and not isinstance(module, internal)
        and order.index(name) > order.index(last)
        and outputs in (None, outputs_of(module))
    ]
    if uncalled:
        raise LookupError(
            f"{listed(uncalled)} was not called in the forward pass, and {last!r}, the last linear layer that was, may not be "
            "the classifier: hooks see only calls of the module itself, self.fc(x) instead of F.linear(x, self.fc.weight); "
            "pass forward_fn, a function of the module and the batch that calls the classifier, or name it with "
            "classifier=..."
        )


def _check_output(output: Any, called: Sequence[Call], last: str, layers: Mapping[str, nn.Module]) -> None:
    """Raise LookupError if the model returns other columns than its last linear layer, and no slice of them."""
    if not isinstance(output, Tensor) or output.dim() < 2 or outputs_of(layers[last]) in output.shape[1:]:
        return
    results = {call.output.untyped_storage().data_ptr() for call in called if call.output is not None}
    if output.untyped_storage().data_ptr() not in results:
        raise LookupError(
            f"the model returns {tuple(output.shape)}, which comes from no linear layer; the last that was called, {last!r}, "
            f"has {outputs_of(layers[last])} outputs. Hooks see only calls of a module itself, self.fc(x) instead of "
            "F.linear(x, self.weight); name the classifier with classifier=..."
        )


def _check_only_head(
    last: str, names: Sequence[str], layers: Mapping[str, nn.Module], forward: Callable[[], Any]
) -> None:
    """Raise LookupError if a layer with as many outputs as ``last`` does not feed it: the output may combine the two."""
    others = [name for name in names if name != last and outputs_of(layers[name]) == outputs_of(layers[last])]
    if not others:
        return
    marks: dict[str, Tensor] = {}
    inputs: list[Tensor] = []

    def mark(name: str, module: nn.Module, args: Any, output: Tensor) -> Tensor:
        marks[name] = torch.zeros_like(output, requires_grad=True)
        return output + marks[name]

    def keep(module: nn.Module, args: Any, kwargs: Any) -> None:
        inputs.append((*args, *kwargs.values())[0])

    handles = [layers[name].register_forward_hook(partial(mark, name)) for name in others]
    handles.append(layers[last].register_forward_pre_hook(keep, with_kwargs=True))
    try:
        with torch.enable_grad():
            forward()
    finally:
        for handle in handles:
            handle.remove()
    total = torch.stack([tensor.float().sum() for tensor in inputs]).sum()
    ends = [marks[name] for name in others]
    grads = torch.autograd.grad(total, ends, allow_unused=True) if total.requires_grad else [None] * len(ends)
    if beside := [name for name, grad in zip(others, grads, strict=True) if grad is None]:
        raise LookupError(
            f"several layers with {outputs_of(layers[last])} outputs could be the classifier, {listed([*beside, last])}: the "
            "model returns the output of none of them, and none feeds the last; name one with classifier=..."
        )


def _memory(tensor: Tensor | None) -> tuple[int, int] | None:
    """Identifies a tensor, or a view of it in another shape, among those that are alive."""
    return None if tensor is None else (tensor.data_ptr(), tensor.numel())
