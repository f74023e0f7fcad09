import math
import socket
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from lightning_nc import functional
from lightning_nc.measuring.classifier import find_classifier
from lightning_nc.measuring.hooks import trace
from lightning_nc.measuring.probe import Probe

sys.path.insert(0, str(Path(__file__).parent))


@pytest.fixture(autouse=True)
def _fixed_seed():
    torch.manual_seed(0)


def clusters(classes, per_class, features, noise, seed=0, dtype=torch.float32):
    """Random class means of norm about sqrt(d), Gaussian samples around them, shuffled."""
    generator = torch.Generator().manual_seed(seed)
    means = torch.randn(classes, features, generator=generator, dtype=torch.float64)
    target = torch.arange(classes).repeat_interleave(per_class)
    rows = means[target] + noise * torch.randn(len(target), features, generator=generator, dtype=torch.float64)
    order = torch.randperm(len(target), generator=generator)
    return rows[order].to(dtype), target[order]


def simplex_etf(classes):
    return math.sqrt(classes / (classes - 1)) * (torch.eye(classes) - 1 / classes).double()


def bottleneck(classes, per_class, features, dtype, seed=0):
    """Features of a random net of that precision whose last layer sees two numbers: class means of rank two."""
    torch.manual_seed(seed)
    net = nn.Sequential(nn.Linear(16, 64), nn.ReLU(), nn.Linear(64, 2), nn.Linear(2, 64), nn.Linear(64, features))
    target = torch.arange(classes).repeat(per_class)
    rows = torch.randn(classes, 16)[target] + 0.1 * torch.randn(len(target), 16)
    with torch.no_grad():
        points = net[:3].double()(rows.double())
        return net.to(dtype)(rows.to(dtype)), target, points


def metric_value(name, rows, target, weight, bias, classes=None):
    """The value of a name of METRICS through the public function that computes it."""
    if name == "nc2_weight":
        return functional.nc2_weight(weight)
    base, *variant = name.split("_")
    arguments = {"weight": weight, "bias": bias}
    arguments = {need: arguments[need] for need in functional.METRICS[name].needs}
    if base == "nc2" and variant[0] in ("etf", "of"):
        return functional.nc2(rows, target, classes, frame=variant[0], center="centered" in variant)
    if name == "nc3_centered":
        return functional.nc3(rows, target, weight, classes, center=True)
    return getattr(functional, name)(rows, target, num_classes=classes, **arguments)


def found(model, forward, num_classes=None):
    """The classifier of a model, by name."""
    return find_classifier(model, *trace(model, forward), forward, num_classes)


def measured_features(model, batch, **arguments):
    """What a model gives for a batch, the features that are measured, and the classifier's weight and bias."""
    probe = Probe(**arguments)
    with torch.no_grad():
        probe.attach(model, batch)
        probe.start(batch)
        output = probe.forward(model, batch)
        features, _ = probe.features()
    parts = probe.head.parts()
    probe.detach()
    return output, features[""], parts


def free_port():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]
