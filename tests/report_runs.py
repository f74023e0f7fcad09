"""Runs as a report reads them, for the tests and the benchmark of reports."""

import math

import torch

from lightning_nc import History, functional
from lightning_nc.measuring.classes import MeasuredClasses
from lightning_nc.metrics import NeuralCollapse
from lightning_nc.scenes import scene

PAPER = ("nc1", "nc2_etf", "nc2_etf_centered", "nc2_of", "nc3", "nc3_centered")


def collapsing(epochs=200, layers=("layer1", "layer2", "layer3", "layer4"), classes=10, chosen=(0, 1, 2), per_class=40):
    """The history of a run whose noise around the corners of a simplex ETF shrinks from epoch to epoch, more in deep layers."""
    generator = torch.Generator().manual_seed(0)
    corners = torch.eye(classes, 32, dtype=torch.float64)
    target = torch.arange(classes).repeat_interleave(per_class)
    noise = torch.randn(len(target), 32, generator=generator, dtype=torch.float64)
    rows, scenes, classes_of_last = [], [], None
    for epoch in range(epochs):
        spread = 0.5 * math.exp(-4 * epoch / epochs)
        features = corners[target] + spread * noise
        values = {}
        for depth, layer in enumerate((*layers, ""), start=1):
            near = corners[target] + 0.5 * math.exp(-4 * epoch / epochs * depth / (len(layers) + 1)) * noise
            head = corners + spread * noise[:classes]
            for name in PAPER if not layer else PAPER[:4]:
                values["/".join(filter(None, ("nc", layer, name)))] = float(value_of(name, near, target, head))
        metric = NeuralCollapse(classes, 32, weight=head)
        metric.update(features, target)
        kept = {label: features[target == label] for label in chosen}
        classes_of_last = MeasuredClasses(metric.moments(), head, kept)
        scenes.append(scene(classes_of_last, epoch, 10 * (epoch + 1), "train"))
        rows.append(
            {"stage": "train", "epoch": epoch, "step": 10 * (epoch + 1), "geometry": "nc2_etf_centered", **values}
        )
    history = History(rows=rows)
    history.scenes, history.classes = scenes, classes_of_last
    history.about = {
        "mode": "exact",
        "metrics": ", ".join(PAPER),
        "classes": str(classes),
        "features": "32",
        "torch": str(torch.__version__),
    }
    return history


def value_of(name, features, target, head):
    """A metric of the paper through its public function."""
    if name == "nc1":
        return functional.nc1(features, target)
    if name.startswith("nc3"):
        return functional.nc3(features, target, head, center="centered" in name)
    return functional.nc2(features, target, frame="of" if "_of" in name else "etf", center="centered" in name)
