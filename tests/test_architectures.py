"""Every layer of real architectures: measured as the architecture's source says it should be, or left out with a reason."""

import warnings
from dataclasses import dataclass, field

import numpy as np
import pytest
import reference
import torch
from architectures import ARCHITECTURES, BATCH, CLASSES
from torch import nn
from torch.utils.data import DataLoader

from lightning_nc import measure

QUICK = (
    "resnet18 convnext swin vit efficientnet mixer bert gpt2 conv1d lstm lstm_square torch_transformer_sequence_first"
)
EVERY = [pytest.param(name, marks=() if name in QUICK.split() else pytest.mark.slow, id=name) for name in ARCHITECTURES]

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.GroupNorm, nn.LayerNorm)
LAYERS = (*CONVOLUTIONS, *NORMS, nn.Linear, nn.Embedding)


@dataclass
class Layer:
    """What hooks of our own saw of a module, and what the reading makes of it."""

    module: nn.Module
    layout: str
    shape: tuple[int, ...] | None = None  # of the first batch; None if the module was not called
    pooled: list[np.ndarray] = field(default_factory=list)

    @property
    def axes(self):
        return self.layout.removeprefix("maybe ").split()

    @property
    def features(self):
        return np.concatenate(self.pooled) if self.pooled else None

    def must_be_measured(self):
        """Whether neither the architecture nor the shape leaves open which axis holds the features."""
        if self.features is None or self.layout.startswith(("maybe", "T B")):
            return False
        positions = [size for axis, size in zip(self.axes, self.shape, strict=True) if axis not in "BC" and size > 1]
        if len(self.shape) == 3 and BATCH in positions:
            return False
        channels = channels_inside(self.module) | {self.shape[self.axes.index("C")]}
        has_weights = any(True for _ in self.module.parameters())
        return self.layout == "B C" or type(self.module) in LAYERS or (has_weights and channels.isdisjoint(positions))


def channels_inside(module):
    names = ("in_channels", "out_channels", "in_features", "out_features", "num_features", "num_channels")
    counts = {getattr(inner, name, None) for inner in module.modules() for name in (*names, "embedding_dim")}
    norms = {inner.normalized_shape[-1] for inner in module.modules() if isinstance(inner, nn.LayerNorm)}
    return (counts | norms) - {None}


def tensors_in(output):
    """The floating tensors of a module's output, in order, as they are now: the next layer may work in place."""
    if isinstance(output, torch.Tensor):
        return [output.detach().clone()] if output.is_floating_point() else []
    parts = output.values() if isinstance(output, dict) else output if isinstance(output, tuple | list) else ()
    return [tensor for part in parts for tensor in tensors_in(part)]


def run(model, batch):
    with torch.no_grad():
        return model(**batch) if isinstance(batch, dict) else model(batch[0])


def outputs_of_modules(model, batch):
    """By name, the tensors of every call."""
    calls = {}

    def keep(name):
        return lambda module, args, output: calls.setdefault(name, []).append(tensors_in(output))

    named = model.named_modules(remove_duplicate=False)
    handles = [module.register_forward_hook(keep(name)) for name, module in named if name]
    run(model, batch)
    for handle in handles:
        handle.remove()
    return calls


def fitting(calls, axes, size):
    """Of the last call with such a tensor, the first with these axes and a row per sample."""
    found = [[x for x in call if x.dim() == len(axes) and x.shape[axes.index("B")] == size] for call in calls]
    return next((tensors[0] for tensors in reversed(found) if tensors), None)


def pooled(tensor, axes, mask=None):
    """The mean over the positions, in float64; those of a masked sequence where the mask is one."""
    x = np.einsum(f"{''.join(axes)}->BC{''.join(axis for axis in axes if axis not in 'BC')}", tensor.double().numpy())
    if mask is not None and len(axes) == 3 and x.shape[2] == mask.shape[1]:
        return (x * mask.numpy()[:, None]).sum(2) / mask.numpy().sum(1, keepdims=True)
    return x.reshape(*x.shape[:2], -1).mean(2)


def read(name):
    """A model, a loader and its labels, and the layers by name."""
    architecture = ARCHITECTURES[name]
    model, loader = architecture.model(), DataLoader(architecture.samples(), BATCH)
    modules = {name: module for name, module in model.named_modules(remove_duplicate=False) if name}
    layers = {name: Layer(module, architecture.layout(name)) for name, module in modules.items()}
    labels = []
    for batch in loader:
        labels.append(batch["labels"] if isinstance(batch, dict) else batch[1])
        mask = batch.get("attention_mask") if isinstance(batch, dict) else None
        calls = outputs_of_modules(model, batch)
        for name, layer in layers.items():
            add_features(layer, name, calls.get(name, []), len(labels[-1]), mask)
    return model, loader, torch.cat(labels).numpy(), layers


def add_features(layer, name, calls, size, mask):
    if not calls:
        return
    if layer.layout.startswith("left out"):
        layer.shape = layer.shape or next((tuple(x.shape) for x in calls[-1]), ())
        return
    tensor = fitting(calls, layer.axes, size)
    shapes = [tuple(x.shape) for call in calls for x in call]
    assert tensor is not None, f"{name} is read as {layer.layout!r}, but gives {shapes}"
    layer.shape = layer.shape or tuple(tensor.shape)
    layer.pooled.append(pooled(tensor, layer.axes, mask))


def expected_values(features, labels):
    """nc1 and nc2_etf, each with a tolerance; nc1 is nan if all classes have the same mean."""
    means, centered, deviations, _, _ = reference.moments(features, labels)
    values, rows = np.linalg.svd(centered, full_matrices=False)[1:]
    rank = min(CLASSES - 1, features.shape[1])
    size = values[:rank] / np.linalg.norm(means)
    kept = size > 1e-13  # the rest is rounding, of layers with dead units
    expected = {"nc1": (np.nan, 0), "nc2_etf": (reference.frame(means, "etf"), 1e-8)}
    if kept.any():
        nc1 = (((deviations @ rows[:rank][kept].T) / values[:rank][kept]) ** 2).sum() / len(features)
        expected["nc1"] = (nc1, nc1 * max(1e-8, 1e-14 / size[kept].min()))
    return expected


def fault_of(name, layer, labels, values, reasons):
    """What is wrong with what was measured of a layer; None if nothing is."""
    described = f"{name} ({type(layer.module).__name__}) {layer.shape} read as {layer.layout!r}"
    measured = {key.removeprefix(f"{name}/"): value for key, value in values.items() if key.rpartition("/")[0] == name}
    if not measured:
        reason = next((line for line in reasons if repr(name) in line), None)
        if layer.must_be_measured():
            return f"{described}: left out, {reason or 'without a reason'}"
        containers = nn.ModuleList | nn.ModuleDict | nn.ParameterList | nn.ParameterDict  # which nobody can call
        said = reason is not None or isinstance(layer.module, containers)
        return None if said else f"{described}: left out without a reason"
    if layer.features is None:
        return f"{described}: measured {measured}, should be left out"
    for metric, (expected, tolerance) in expected_values(layer.features, labels).items():
        if measured.get(metric) != pytest.approx(expected, rel=0, abs=tolerance, nan_ok=True):
            return f"{described}: {metric} expected {expected:.10g}, measured {measured.get(metric)!r}"
    return None


@pytest.mark.parametrize("name", EVERY)
def test_every_layer_is_measured_as_its_architecture_says_or_left_out_with_a_reason(name):
    model, loader, labels, layers = read(name)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        arguments = {"num_classes": CLASSES, "metrics": ("nc1", "nc2_etf"), "progress": False}
        values = measure(model, loader, layers=["*"], **arguments)
    reasons = [str(warning.message) for warning in caught]
    faults = [fault for layer in layers if (fault := fault_of(layer, layers[layer], labels, values, reasons))]
    assert not faults, "\n".join([f"{name}: {len(faults)} of {len(layers)} layers", *faults])


def one_batch(name):
    architecture = ARCHITECTURES[name]
    batch = next(iter(DataLoader(architecture.samples(), BATCH)))
    return architecture, architecture.model(), batch


def backwards(batch):
    return {key: x.flip(0) for key, x in batch.items()} if isinstance(batch, dict) else [x.flip(0) for x in batch]


@pytest.mark.parametrize("name", EVERY)
def test_samples_in_another_order_give_what_is_read_as_features_in_that_order(name):
    architecture, model, batch = one_batch(name)
    forward, backward = outputs_of_modules(model, batch), outputs_of_modules(model, backwards(batch))
    for module, calls in forward.items():
        layout = architecture.layout(module)
        if layout == "left out, attention weights":  # they have a row per sample
            continue
        left_out = layout.startswith("left out")
        axes = ["B"] + ["T"] * (calls[-1][0].dim() - 1) if left_out else layout.removeprefix("maybe ").split()
        first, second = fitting(calls, axes, BATCH), fitting(backward[module], axes, BATCH)
        follows = first is not None and torch.allclose(first.flip(axes.index("B")), second, rtol=1e-6, atol=1e-6)
        assert follows != left_out, f"{module} {[tuple(x.shape) for x in calls[-1]]} is read as {layout!r}"


@pytest.mark.parametrize("name", [one for one in EVERY if one.id != "llama"])  # which has no bias
def test_an_entry_of_a_bias_moves_one_of_what_is_read_as_features(name):
    architecture, model, batch = one_batch(name)
    moved = {}

    def move(name):
        def hook(module, args, kwargs, output):
            module.bias[0] += 1
            moved[name] = module.forward(*args, **kwargs) - output
            module.bias[0] -= 1

        return hook

    for module_name, module in model.named_modules():
        if isinstance(module, LAYERS) and getattr(module, "bias", None) is not None:
            module.register_forward_hook(move(module_name), with_kwargs=True)
    run(model, batch)
    assert moved
    for module_name, difference in moved.items():
        layer = Layer(model.get_submodule(module_name), architecture.layout(module_name))
        if not layer.layout.startswith("left out"):
            first, *others = difference.movedim(layer.axes.index("C"), 0)
            message = f"{module_name} {tuple(difference.shape)} is read as {layer.layout!r}"
            assert first.any(), message
            assert not any(other.any() for other in others), message
