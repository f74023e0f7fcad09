"""Data, models and trainings that several test files share."""

import copy
import logging
import math
import random
import resource
import socket
from contextlib import contextmanager

import numpy as np
import pytest
import reference
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from PIL import Image
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_nc import functional
from lightning_nc.measuring.classifier import find_classifier
from lightning_nc.measuring.hooks import trace
from lightning_nc.measuring.probe import Probe


@pytest.fixture(autouse=True)
def _fixed_seed():
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _lightning_logs_where_caplog_sees_it(monkeypatch):
    for name in ("lightning", "lightning.fabric", "lightning.pytorch"):
        monkeypatch.setattr(logging.getLogger(name), "propagate", True)


# ------------------------------------------------------------------------------------------------- features and labels


class Permute(nn.Module):
    def __init__(self, *axes):
        super().__init__()
        self.axes = axes

    def forward(self, x):
        return x.permute(*self.axes)


def clusters(classes, per_class, features, noise, seed=0, dtype=torch.float32):
    """Random class means of norm about sqrt(d), Gaussian samples around them, shuffled."""
    generator = torch.Generator().manual_seed(seed)
    means = torch.randn(classes, features, generator=generator, dtype=torch.float64)
    target = torch.arange(classes).repeat_interleave(per_class)
    rows = means[target] + noise * torch.randn(len(target), features, generator=generator, dtype=torch.float64)
    order = torch.randperm(len(target), generator=generator)
    return rows[order].to(dtype), target[order]


def simplex_etf(classes):
    return math.sqrt(classes / (classes - 1)) * (torch.eye(classes, dtype=torch.float64) - 1 / classes)


def bottleneck(classes, per_class, features, dtype, seed=0):
    """Features of a random net of that precision whose last layer sees two numbers: class means of rank two."""
    torch.manual_seed(seed)
    net = nn.Sequential(nn.Linear(16, 64), nn.ReLU(), nn.Linear(64, 2), nn.Linear(2, 64), nn.Linear(64, features))
    target = torch.arange(classes).repeat(per_class)
    rows = torch.randn(classes, 16)[target] + 0.1 * torch.randn(len(target), 16)
    with torch.no_grad():
        points = net[:3].double()(rows.double())
        return net.to(dtype)(rows.to(dtype)), target, points


OF_WEIGHT_ALONE = [
    "nc2_weight",
    "nc2_weight_equinorm",
    "nc2_weight_equiangular",
    "nc2_weight_maxangle",
    "nc0",
    "gnc2_margin",
]

# The metrics that need neither a second look at the samples nor other data, and exist where K <= d + 1.
ONE_PASS = [
    name
    for name, spec in functional.METRICS.items()
    if not spec.samples and "ood" not in spec.needs and spec.exists(3, 5)
]


def metric_value(name, rows, target, weight, bias, classes=None):
    """The value of a name of METRICS through the public function that computes it. Every third sample is of no class."""
    if name in OF_WEIGHT_ALONE:
        return getattr(functional, name)(weight)
    base, *variant = name.split("_")
    needs = ("weight", "bias") if name == "nc4" else functional.METRICS[name].needs
    given = {"weight": weight, "bias": bias, "ood": rows[::3]}
    arguments = {"ood_features" if need == "ood" else need: given[need] for need in needs}
    if base == "nc2" and variant[0] in ("etf", "of"):
        return functional.nc2(rows, target, classes, frame=variant[0], center="centered" in variant)
    if name == "nc3_centered":
        return functional.nc3(rows, target, weight, classes, center=True)
    return getattr(functional, name)(rows, target, num_classes=classes, **arguments)


# ------------------------------------------------------------------------------------------------- models and their parts


def name_of_classifier(model, forward, num_classes=None):
    """The name that is found for the classifier of a model."""
    return find_classifier(model, *trace(model, forward), forward, num_classes)


def measured_features(model, batch, **arguments):
    """What a model returns for a batch, the features that are measured, and the classifier's weight and bias."""
    probe = Probe(**arguments)
    with torch.no_grad():
        probe.attach(model, batch)
        probe.start(batch)
        output = probe.forward(model, batch)
        features, _ = probe.features()
    parts = probe.head.parts()
    probe.detach()
    return output, features[""], parts


def hooks_of(model):
    return [hook for module in model.modules() for hook in (*module._forward_hooks, *module._forward_pre_hooks)]


# ------------------------------------------------------------------------------------------------------- small trainings

ROWS, TARGET = clusters(3, 15, 6, 0.5)
DATA = TensorDataset(ROWS, TARGET)
OTHER = TensorDataset(ROWS[:20] + 0.5, TARGET[:20])
PAPER = ("nc1", "nc2_etf", "nc2_etf_centered", "nc2_of", "nc3", "nc3_centered")
KEYS = [f"nc/{name}" for name in PAPER]
MODES = [{}, {"mode": "online"}, {"stages": ("train", "validate")}]


class Classifier(LightningModule):
    """Everything that training noise can come from: batch norm, dropout, momentum, random augmentation."""

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.2), nn.Linear(8, 3))
        self.seen = []

    def forward(self, x):
        return self.net(x)

    def training_step(self, batch, batch_idx):
        x, y = batch
        self.seen.append(x.sum().item())
        noise = torch.randn_like(x) * random.random() * np.random.rand()
        loss = nn.functional.cross_entropy(self(x + 0.1 * noise), y)
        self.log("train_loss", loss)
        return loss

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", nn.functional.cross_entropy(self(batch[0]), batch[1]))

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)


class StopAfter(Callback):
    """Ends training after the fifth epoch."""

    def on_train_epoch_end(self, trainer, pl_module):
        trainer.should_stop = trainer.current_epoch == 4


class ClassifierInputs(Callback):
    """What the classifier receives in the training steps of an epoch, seen by an independent hook."""

    def on_train_epoch_start(self, trainer, pl_module):
        self.rows, self.target = [], []
        self.handle = pl_module.net[4].register_forward_pre_hook(
            lambda module, args: self.rows.append(args[0].detach())
        )

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.target.append(batch[1])

    def on_train_epoch_end(self, trainer, pl_module):
        self.handle.remove()


class Normalized(DataLoader):
    """Changes every batch, which a copy of the loader would not."""

    def __iter__(self):
        for rows, target in super().__iter__():
            yield 3 * rows, target


def loader(shuffle=True, **kwargs):
    return DataLoader(DATA, 8, shuffle=shuffle, **kwargs)


def fit(tmp_path, callbacks, data=None, model=None, ckpt_path=None, val=None, **trainer):
    """Train for three epochs; the trainer and the model."""
    defaults = {
        "max_epochs": 3,
        "accelerator": "cpu",
        "logger": False,
        "enable_checkpointing": any(isinstance(c, ModelCheckpoint) for c in callbacks),
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "log_every_n_steps": 1,
        "default_root_dir": tmp_path,
    }
    runner = Trainer(callbacks=callbacks, **{**defaults, **trainer})
    model = Classifier() if model is None else model
    runner.fit(model, data if data is not None else loader(), val, ckpt_path=ckpt_path)
    return runner, model


def true_nc1(model, rows=ROWS, target=TARGET):
    """NC1 of the classifier's input in eval mode, from the float64 reference."""
    twin = copy.deepcopy(model).eval().float()
    with torch.no_grad():
        return reference.nc1_by_axes(twin.net[:4](rows).double().numpy(), target.numpy())


def last(callback, key="nc/nc1"):
    return next(row[key] for row in reversed(callback.history) if key in row)


# ---------------------------------------------------------------------------------------------------------- surroundings


def free_port():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


@contextmanager
def full_disk(size):
    """No file can be longer than ``size`` bytes: what fits is written, then OSError, as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def is_picture(path):
    """Whether a file holds an image with something on it."""
    pixels = np.asarray(Image.open(path).convert("RGB"))
    return min(pixels.shape[:2]) > 200 and len(np.unique(pixels.reshape(-1, 3), axis=0)) > 20
