r"""The unconstrained features models of Tirer & Bruna (2022): every synthetic figure of the paper, beside its theory.

    python examples/ufm.py --figure 1                    # 1 2 3 4 6 7 8 9: writes figure1.csv and figure1.png
    python examples/ufm.py --figure 4 --seeds 10         # ten random starts at once, drawn as a band
    python examples/ufm.py --model linear --lambda-w 0.01 --iterations 50000        # any other configuration
    python examples/ufm.py --config mine.yaml            # the same from a file
    python examples/ufm.py --model linear --loss cross-entropy --seeds 8
    python examples/ufm.py --theorem 5.1
    python examples/ufm.py --sweep lambda-b

The features of the N = K n training samples are a parameter. Plain gradient descent moves them together with the weights,
and `NeuralCollapseCallback` measures them as it measures any network. `lightning_nc.theory` says where descent should end.
"""

import csv
import math
import re
import sys
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal

import lightning as L
import numpy
import torch
from jsonargparse import ArgumentParser
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from tqdm import tqdm

from lightning_nc import NeuralCollapseCallback, theory
from lightning_nc.functional import evaluate
from lightning_nc.moments import ClassDeviations
from lightning_nc.plotting import draw

# ---------------------------------------------------------------------------------------------- configurations


@dataclass(frozen=True)
class Configuration:
    """One model, its regularisation, its start and its descent.

    Args:
        model: plain (eq. 3), linear (eq. 23, two levels of features) or relu (eq. 24).
        loss: mse or cross-entropy.
        num_classes: K.
        num_features: d, at least K.
        samples_per_class: n.
        lambda_w: regularisation of the last layer's weight (W; W2 in the extended models).
        lambda_w1: regularisation of the weight between the levels (extended models).
        lambda_h: regularisation of the features (H; H1 in the extended models).
        lambda_b: regularisation of the bias: inf is no bias, 0 a free one (plain model).
        scale_w: standard deviation of the last weight and of the bias at the start.
        scale_w1: standard deviation of the weight between the levels at the start.
        scale_h: standard deviation of the features at the start.
        step: step size of gradient descent.
        iterations: number of steps, rounded up to a multiple of `every`.
        every: steps from one measurement to the next.
    """

    model: Literal["plain", "linear", "relu"] = "plain"
    loss: Literal["mse", "cross-entropy"] = "mse"
    num_classes: int = 4
    num_features: int = 20
    samples_per_class: int = 50
    lambda_w: float = 0.005
    lambda_w1: float = 0.005
    lambda_h: float = 0.005
    lambda_b: float = math.inf
    scale_w: float = 0.1
    scale_w1: float = 0.1
    scale_h: float = 0.1
    step: float = 0.1
    iterations: int = 40_000
    every: int = 1000

    def __post_init__(self) -> None:
        if self.num_features < self.num_classes:
            raise ValueError(
                f"the theorems need num_features >= num_classes, got {self.num_features} < {self.num_classes}; "
                f"pass --num-features {self.num_classes} or more"
            )
        if self.model != "plain" and self.lambda_b != math.inf:
            raise ValueError(f"the {self.model} model has no bias, got lambda_b = {self.lambda_b}; leave lambda_b out")
        if self.every < 2 or self.iterations < 1 or self.step <= 0:
            raise ValueError(
                f"expected every >= 2, iterations >= 1 and step > 0, "
                f"got every = {self.every}, iterations = {self.iterations}, step = {self.step}"
            )
        self.minimum()  # complains about regularisations and sizes out of range

    def minimum(self) -> theory.Minimum:
        """The global minimum with the MSE loss, in closed form."""
        if self.model == "plain":
            return theory.plain_ufm(
                self.num_classes, self.samples_per_class, self.lambda_w, self.lambda_h, self.lambda_b
            )
        return theory.extended_ufm(
            self.num_classes, self.samples_per_class, self.lambda_w, self.lambda_w1, self.lambda_h
        )


unit = {"scale_w": 1.0, "scale_h": 1.0}
larger = {"num_classes": 5, "samples_per_class": 100, "lambda_h": 0.001, "every": 2000}
FIGURES = {
    1: Configuration(**unit),
    2: Configuration(**unit, lambda_b=0.0),
    3: Configuration(model="linear"),
    4: Configuration(model="relu", iterations=600_000, every=10_000),
    6: Configuration(**unit, **larger, iterations=160_000),
    7: Configuration(**unit, **larger, iterations=160_000, lambda_b=0.0),
    8: Configuration(model="linear", **larger, lambda_w1=0.0025, iterations=140_000),
    9: Configuration(model="relu", **larger, lambda_w1=0.0025, scale_h=0.2, iterations=200_000),
}


# ---------------------------------------------------------------------------------------------------- the models


class UFM(L.LightningModule):
    """min 1/(2N) |W H + b 1' - Y|^2 + lambda_w/2 |W|^2 + lambda_h/2 |H|^2 + lambda_b/2 |b|^2, eq. (3)."""

    def __init__(self, configuration: Configuration, seed: int = 0) -> None:
        super().__init__()
        # The last step of every block is the optimizer's, the others are taken in closed form by `descend`.
        self.automatic_optimization = False
        c = self.c = configuration
        K, d, n = c.num_classes, c.num_features, c.samples_per_class
        generator = torch.Generator().manual_seed(seed)

        def normal(scale: float, *shape: int) -> nn.Parameter:
            return nn.Parameter(scale * torch.randn(shape, generator=generator, dtype=torch.float64))

        # A seed is a start: the tensors are drawn one after the other, in the order of the forward pass.
        self.features = normal(c.scale_h, K * n, d)
        if c.model != "plain":
            self.hidden = nn.Linear(d, d, bias=False)
            self.hidden.weight = normal(c.scale_w1, d, d)
        self.classifier = nn.Linear(d, K, bias=c.lambda_b < math.inf)
        self.classifier.weight = normal(c.scale_w, K, d)
        if self.classifier.bias is not None:
            self.classifier.bias = normal(c.scale_w, K)
        self.register_buffer("labels", torch.arange(c.num_classes).repeat_interleave(c.samples_per_class))

    def forward(self, indices: Tensor) -> Tensor:
        """The outputs (B, K) of the samples with these indices (B,)."""
        return self.classifier(self.features[indices])

    def levels(self) -> dict[str, tuple[Tensor, Tensor]]:
        """Of every level the (N, d) features and the (K, d) weight from there to the outputs, by the suffix of its columns."""
        return {"": (self.features, self.classifier.weight)}

    def penalty(self) -> Tensor:
        """The regularisation."""
        c = self.c
        penalty = c.lambda_w * self.classifier.weight.square().sum() + c.lambda_h * self.features.square().sum()
        if self.classifier.bias is not None:
            penalty = penalty + c.lambda_b * self.classifier.bias.square().sum()
        return penalty / 2

    def objective(self) -> Tensor:
        """What descent minimizes."""
        outputs = self(torch.arange(len(self.labels)))
        if self.c.loss == "cross-entropy":
            return nn.functional.cross_entropy(outputs, self.labels) + self.penalty()
        error = outputs - nn.functional.one_hot(self.labels, self.c.num_classes)
        return error.square().sum() / (2 * len(self.labels)) + self.penalty()

    def train_dataloader(self) -> DataLoader:
        """All samples in one batch: descent is full-batch."""
        return DataLoader(TensorDataset(torch.arange(len(self.labels)), self.labels), batch_size=len(self.labels))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Plain gradient descent."""
        return torch.optim.SGD(self.parameters(), lr=self.c.step)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> None:
        """`every` steps of gradient descent; the last goes through the optimizer, so that Lightning counts it."""
        descend([self], self.c.every - 1)
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(self.objective())
        optimizer.step()


class ExtendedUFM(UFM):
    """min 1/(2N) |W2 s(W1 H1) - Y|^2 + lambda_w/2 |W2|^2 + lambda_w1/2 |W1|^2 + lambda_h/2 |H1|^2, eqs. (23), (24)."""

    def __init__(self, configuration: Configuration, seed: int = 0) -> None:
        super().__init__(configuration, seed)
        # A parameter has no output to measure; passing it through a module gives the first level a name.
        self.first = nn.Identity()
        self.activation = nn.ReLU() if configuration.model == "relu" else nn.Identity()

    def forward(self, indices: Tensor) -> Tensor:
        """The outputs (B, K) of the samples with these indices (B,)."""
        return self.classifier(self.activation(self.hidden(self.first(self.features[indices]))))

    def levels(self) -> dict[str, tuple[Tensor, Tensor]]:
        """The deepest features, those of the first layer, and those before the ReLU where there is one."""
        pre, weight = self.hidden(self.features), self.classifier.weight
        both = {"": (self.activation(pre), weight), "_h1": (self.features, weight @ self.hidden.weight)}
        return both | {"_pre": (pre, weight)} if self.c.model == "relu" else both

    def penalty(self) -> Tensor:
        """The regularisation."""
        return super().penalty() + self.c.lambda_w1 / 2 * self.hidden.weight.square().sum()


def build(configuration: Configuration, seed: int = 0) -> UFM:
    """The model of a configuration at a random start."""
    return (UFM if configuration.model == "plain" else ExtendedUFM)(configuration, seed)


# --------------------------------------------------------------------------------------------------- the descent
# Shapes are the paper's with the models in front: W2 (S, K, d), W1 (S, d, d), H (S, d, N), Y and E (S, K, N). E is the
# derivative of the loss by the outputs, times N. Every product is fused with the decay that the regularisation brings, and
# writes into memory that exists already.


@torch.no_grad()
def descend(models: list[UFM], steps: int) -> None:
    """Gradient descent of several models of one configuration at once, in place; lambda_b may differ between them."""
    c = models[0].c
    Y = nn.functional.one_hot(models[0].labels, c.num_classes).T.to(torch.float64).expand(len(models), -1, -1)
    W2 = torch.stack([m.classifier.weight for m in models])
    H = torch.stack([m.features.T for m in models])
    W1 = None if c.model == "plain" else torch.stack([m.hidden.weight for m in models])
    b = None if c.lambda_b == math.inf else torch.stack([m.classifier.bias[:, None] for m in models])
    decay_b = 1 - c.step * torch.tensor([m.c.lambda_b for m in models], dtype=torch.float64)[:, None, None]
    if c.model == "relu":
        descend_relu(c, W2, W1, H, Y, steps)
    elif c.loss == "mse":
        samples = Compressed(H, Y)
        descend_linear(c, W2, W1, b, decay_b, samples.H, samples.Y, samples.ones, steps)
        H = samples.expand()
    else:
        descend_linear(c, W2, W1, b, decay_b, H, Y, torch.ones_like(Y[:, :1]), steps)
    for i, m in enumerate(models):
        m.classifier.weight.copy_(W2[i])
        m.features.copy_(H[i].T)
        if W1 is not None:
            m.hidden.weight.copy_(W1[i])
        if b is not None:
            m.classifier.bias.copy_(b[i, :, 0])


class Compressed:
    """The N samples of a linear model with MSE loss as K + d, exactly.

    Objective and descent do not change when H, Y and the ones that carry the bias are multiplied from the right by one
    orthogonal matrix. The one that starts with Y'/sqrt(n) and goes on with the right factor of the deviations from the class
    means leaves K + d columns that are not zero, and they stay the only ones.
    """

    def __init__(self, H: Tensor, Y: Tensor) -> None:
        classes, samples = Y.shape[1:]
        self.labels, self.root = Y, math.sqrt(samples / classes)
        means = H @ Y.mT * (classes / samples)
        # Where the features are not fewer than the samples this is no gain, but no loss of exactness either.
        self.basis, triangle = torch.linalg.qr((H - means @ Y).mT)
        self.H = torch.cat([self.root * means, triangle.mT], dim=2)
        rest = Y.new_zeros(len(Y), classes, triangle.shape[1])
        self.Y = torch.cat([self.root * torch.eye(classes).to(Y).expand(len(Y), -1, -1), rest], dim=2)
        self.ones = self.Y.sum(dim=1, keepdim=True)

    def expand(self) -> Tensor:
        """The features of all samples."""
        classes = self.labels.shape[1]
        return self.H[:, :, :classes] / self.root @ self.labels + self.H[:, :, classes:] @ self.basis.mT


def descend_linear(
    c: Configuration,
    W2: Tensor,
    W1: Tensor | None,
    b: Tensor | None,
    decay_b: Tensor,
    H: Tensor,
    Y: Tensor,
    ones: Tensor,
    steps: int,
) -> None:
    """The plain and the extended linear model: with P = W2 W1 no product is larger than K d times the samples."""
    rate = -c.step / (c.num_classes * c.samples_per_class)
    decay_w2, decay_w1, decay_h = (1 - c.step * x for x in (c.lambda_w, c.lambda_w1, c.lambda_h))
    offset, E, P, gradient = -Y, torch.empty(Y.shape, dtype=Y.dtype), torch.empty_like(W2), torch.empty_like(W2)
    # Each update needs the other factor as it was before the step: W2 alternates between two places.
    new, old = W2.clone(), W2
    new_T, old_T, H_T, ones_T = new.mT, old.mT, H.mT, ones.mT
    P, P_T = (old, old_T) if W1 is None else (P, P.mT)
    for _ in range(steps):
        if W1 is None:
            P, P_T = old, old_T
        else:
            torch.bmm(old, W1, out=P)
        if b is not None:
            torch.baddbmm(Y, b, ones, beta=-1, out=offset)
        if c.loss == "mse":
            torch.baddbmm(offset, P, H, out=E)
        else:
            torch.bmm(P, H, out=E) if b is None else torch.baddbmm(offset.add_(Y), P, H, out=E)
            torch.softmax(E, dim=1, out=E).sub_(Y)
        if W1 is None:
            torch.baddbmm(old, E, H_T, beta=decay_w2, alpha=rate, out=new)
        else:
            torch.bmm(E, H_T, out=gradient)
            torch.baddbmm(old, gradient, W1.mT, beta=decay_w2, alpha=rate, out=new)
            W1.baddbmm_(old_T, gradient, beta=decay_w1, alpha=rate)
        if b is not None:
            b.mul_(decay_b).baddbmm_(E, ones_T, alpha=rate)
        H.baddbmm_(P_T, E, beta=decay_h, alpha=rate)
        new, old, new_T, old_T = old, new, old_T, new_T
    W2.copy_(old)


def descend_relu(c: Configuration, W2: Tensor, W1: Tensor, H: Tensor, Y: Tensor, steps: int) -> None:
    """The extended ReLU model."""
    rate = -c.step / (c.num_classes * c.samples_per_class)
    decay_w2, decay_w1, decay_h = (1 - c.step * x for x in (c.lambda_w, c.lambda_w1, c.lambda_h))
    E, H2, G = torch.empty(Y.shape, dtype=Y.dtype), torch.empty_like(H), torch.empty_like(H)
    minus_Y, H_T, H2_T = -Y, H.mT, H2.mT
    new2, old2, new1, old1 = W2.clone(), W2, W1.clone(), W1
    new2_T, old2_T, new1_T, old1_T = new2.mT, old2.mT, new1.mT, old1.mT
    for _ in range(steps):
        torch.bmm(old1, H, out=H2).clamp_min_(0)
        if c.loss == "mse":
            torch.baddbmm(minus_Y, old2, H2, out=E)
        else:
            torch.softmax(torch.bmm(old2, H2, out=E), dim=1, out=E).sub_(Y)
        torch.bmm(old2_T, E, out=G)
        torch.ops.aten.threshold_backward.grad_input(G, H2, 0, grad_input=G)
        torch.baddbmm(old2, E, H2_T, beta=decay_w2, alpha=rate, out=new2)
        torch.baddbmm(old1, G, H_T, beta=decay_w1, alpha=rate, out=new1)
        H.baddbmm_(old1_T, G, beta=decay_h, alpha=rate)
        new2, old2, new2_T, old2_T = old2, new2, old2_T, new2_T
        new1, old1, new1_T, old1_T = old1, new1, old1_T, new1_T
    W2.copy_(old2)
    W1.copy_(old1)


# ----------------------------------------------------------------------------------- what was reached, in numbers


MEASURES = ("nc1", "nc2_of", "nc2_etf", "nc2_etf_centered", "nc3")
MODULES = {"": "", "_h1": "first/", "_pre": "hidden/"}  # suffix of a column -> part of the callback's key


@torch.no_grad()
def measure_now(model: UFM, iteration: int) -> dict[str, float]:
    """One row of the table, from all features at hand."""
    row = {"iteration": iteration, "objective": model.objective().item()}
    for suffix, (features, weight) in model.levels().items():
        values = evaluate(MEASURES, ClassDeviations.of(features, model.labels, model.c.num_classes), weight)
        row |= {name + suffix: value.item() for name, value in values.items()}
    return row


class Record(L.Callback):
    """Gathers the rows of the table from NeuralCollapseCallback, and shows the progress in iterations."""

    def __init__(self, collapse: NeuralCollapseCallback) -> None:
        self.collapse = collapse
        self.rows: list[dict[str, float]] = []

    def on_fit_start(self, trainer: L.Trainer, model: UFM) -> None:
        """The row of the start."""
        self.rows = [measure_now(model, 0)]
        self.bar = tqdm(total=trainer.max_epochs * model.c.every, unit="step", unit_scale=True)

    def on_train_epoch_end(self, trainer: L.Trainer, model: UFM) -> None:
        """The row of this epoch."""
        values = self.collapse.history[-1]
        row = measure_now(model, (trainer.current_epoch + 1) * model.c.every)
        for suffix, part in MODULES.items():
            # The callback sees batches, not the whole, and its NC1 has a floor near 1e-24: the exact one is kept.
            row |= {name + suffix: values[key] for name in MEASURES[1:] if (key := f"nc/{part}{name}") in values}
        self.rows.append(row)
        self.bar.update(model.c.every)
        self.bar.set_postfix_str(f"objective {row['objective']:.6g}, NC1 {row['nc1']:.1e}", refresh=False)

    def on_train_end(self, trainer: L.Trainer, model: UFM) -> None:
        """Leave the bar standing."""
        self.bar.close()


def epochs(c: Configuration) -> int:
    """Blocks of `every` steps."""
    return math.ceil(c.iterations / c.every)


def run(c: Configuration, seed: int) -> tuple[list[UFM], list[list[dict[str, float]]]]:
    """One start through the Trainer: the model at the end and its table."""
    model = build(c, seed)
    layers = {"plain": None, "linear": ["first"], "relu": ["first", "hidden"]}[c.model]
    collapse = NeuralCollapseCallback(layers=layers, metrics=MEASURES, strict=True)
    record = Record(collapse)
    L.Trainer(
        max_epochs=epochs(c),
        accelerator="cpu",
        callbacks=[collapse, record],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    ).fit(model)
    return [model], [record.rows]


def run_together(
    configurations: list[Configuration], seeds: list[int]
) -> tuple[list[UFM], list[list[dict[str, float]]]]:
    """Many starts at once, in batched products: the models at the end and a table each."""
    models = [build(c, seed) for c, seed in zip(configurations, seeds, strict=True)]
    tables = [[measure_now(model, 0)] for model in models]
    c = configurations[0]
    with tqdm(total=epochs(c) * c.every, unit="step", unit_scale=True) as bar:
        for epoch in range(epochs(c)):
            descend(models, c.every)
            for model, table in zip(models, tables, strict=True):
                table.append(measure_now(model, (epoch + 1) * c.every))
            bar.update(c.every)
    return models, tables


def levels(c: Configuration) -> dict[str, float]:
    """The objectives that theory knows by name, the global minimum of the MSE models first."""
    if c.loss == "mse":
        minimum = c.minimum()
        frame = {"of": "orthogonal frame", "etf": "simplex ETF", "between": "between ETF and OF", "zero": "zero"}
        return {frame[minimum.frame]: minimum.objective}
    if c.model == "relu":
        return {}
    # Outputs t Z where Z is the Gram matrix of the class means, with singular values sigma: one scalar is left to find.
    K, n = c.num_classes, c.samples_per_class
    angles = 2 * math.pi * torch.arange(K, dtype=torch.float64) / K
    identity = torch.eye(K, dtype=torch.float64)
    frames = {"simplex ETF": identity - 1 / K, f"regular {K}-gon, rank 2": torch.cos(angles[:, None] - angles)}

    def objective(gram: Tensor, t: Tensor) -> Tensor:
        sigma = t[:, None] * torch.linalg.svdvals(gram)
        loss = (t[:, None] * gram[0]).logsumexp(dim=1) - t * gram[0, 0]
        if c.model == "plain":
            return loss + math.sqrt(n * c.lambda_h * c.lambda_w) * sigma.sum(dim=1)
        return loss + 1.5 * (n * c.lambda_w * c.lambda_w1 * c.lambda_h) ** (1 / 3) * sigma.pow(2 / 3).sum(dim=1)

    def smallest(gram: Tensor) -> float:
        low, high = 1e-6, 100.0
        for _ in range(8):
            grid = torch.linspace(low, high, 4001, dtype=torch.float64)
            best = grid[objective(gram, grid).argmin()].item()
            low, high = max(best - (high - low) / 2000, 0), best + (high - low) / 2000
        return objective(gram, torch.tensor([best], dtype=torch.float64)).item()

    return {name: smallest(gram) for name, gram in frames.items()}


@torch.no_grad()
def dead_samples(model: UFM) -> list[int]:
    """How many samples of each class are switched off by the ReLUs, so that no gradient reaches them."""
    if model.c.model != "relu":
        return [0] * model.c.num_classes
    outputs = model(torch.arange(len(model.labels))).norm(dim=1)
    # A unit that stays on but has lost its outgoing weight passes no gradient either: look at the output, not at the signs.
    return (outputs < 1e-3 * outputs.max()).view(model.c.num_classes, -1).sum(dim=1).tolist()


@torch.no_grad()
def shared_units(model: UFM) -> int:
    """How many hidden units two classes share still: one answers at least a tenth as strongly as the other."""
    if model.c.model != "relu":
        return 0
    means = model.levels()[""][0].view(model.c.num_classes, model.c.samples_per_class, -1).mean(dim=1)
    second, first = means.sort(dim=0).values[-2:]
    return int(((second > 0.1 * first) & (first > 1e-3 * means.max())).sum())


def verdict(model: UFM, row: dict[str, float]) -> str:
    """What descent reached, in numbers and in words."""
    c, value = model.c, row["objective"]
    known = levels(c)
    if not known:
        return f"objective {value:.12g}; theory knows no minimum of the relu model with cross-entropy"
    if c.loss == "cross-entropy":
        name = min(known, key=lambda key: abs(known[key] - value))
        reached = abs(value / known[name] - 1) < 1e-6
        listed = ", ".join(f"{key} {level:.9f}" for key, level in known.items())
        return f"objective {value:.9f} ({listed}): " + (f"reached the {name}" if reached else "at neither of them")
    ((frame, lowest),) = known.items()
    if not math.isfinite(value):
        return f"objective {value}, theory {lowest:.12f}: diverged; take a smaller --step than {c.step:g}"
    text = f"objective {value:.12f}, theory {lowest:.12f}, relative difference {value / lowest - 1:.1e}: "
    if abs(value / lowest - 1) < 1e-9:
        return text + f"reached the global minimum, {frame} (NC1 {row['nc1']:.1e}, NC3 {row['nc3']:.1e})"
    dead, n = dead_samples(model), c.samples_per_class
    if c.model == "relu" and any(dead):
        level = c.minimum().level([count / n for count in dead])
        off = f"{sum(dead)} dead sample{'s' * (sum(dead) > 1)} (per class {dead})"
        if abs(value / level - 1) < 1e-6:
            return text + f"stuck at the level of {off}, {100 * (level / lowest - 1):.6f} % above the minimum"
        return text + f"not converged, with {off}, whose level is {level:.12f}"
    if (shared := shared_units(model)) and value / lowest - 1 < 1e-4:
        units = f"{shared} hidden unit{'s' * (shared > 1)}"
        return text + f"nearing the global minimum, {frame}, slowly: two classes share each of {units} still"
    if c.model != "plain":
        for rank in range(c.num_classes):
            if abs(value / c.minimum().level([0.0] * rank + [1.0] * (c.num_classes - rank)) - 1) < 1e-6:
                return text + f"stuck at a stationary point of rank {rank}"
    gradient = torch.autograd.grad(model.objective(), list(model.parameters()))
    if math.sqrt(sum(part.square().sum().item() for part in gradient)) < 1e-10:
        return text + "stuck at a stationary point whose level theory does not name"
    return text + f"not converged after {row['iteration']} iterations; give more --iterations"


# ------------------------------------------------------------------------------------------- tables and pictures


def write_csv(path: Path, tables: list[list[dict[str, float]]], seeds: list[int]) -> None:
    """A row per measurement; many seeds have theirs in front."""
    many = len(seeds) > 1
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, (["seed"] if many else []) + list(tables[0][0]))
        writer.writeheader()
        for seed, table in zip(seeds, tables, strict=True):
            writer.writerows(({"seed": seed} if many else {}) | row for row in table)


LABELS = {"": "deepest features", "_h1": "first layer", "_pre": "before the ReLU"}
COLORS = ("#0072B2", "#D55E00", "#009E73")


def draw_run(
    path: Path, c: Configuration, tables: list[list[dict[str, float]]], heading: str, named: dict[str, float]
) -> None:
    """The paper's four panels: the objective with theory's levels dashed, NC1, NC2, NC3; a band over many seeds."""
    frame = "nc2_etf" if c.loss == "cross-entropy" or c.minimum().frame == "etf" else "nc2_of"
    titles = {
        "objective": "objective",
        "nc1": "NC1, within-class variability",
        frame: f"NC2, distance to the {frame[4:].upper()}",
        "nc3": "NC3, weight to means",
    }
    figure = Figure(figsize=(16, 3.8), layout="constrained")
    iterations = [row["iteration"] for row in tables[0]]
    for axis, (column, title) in zip(figure.subplots(1, 4), titles.items(), strict=True):
        curves = {}
        for (suffix, label), color in zip(LABELS.items(), COLORS, strict=True):
            if column + suffix in tables[0][0]:
                values = numpy.array([[row[column + suffix] for row in table] for table in tables])
                curves["descent" if column == "objective" else label] = (iterations, numpy.median(values, axis=0))
                if len(tables) > 1:
                    low, high = values.min(axis=0), values.max(axis=0)
                    axis.fill_between(iterations, low, high, color=color, alpha=0.2, linewidth=0)
        draw(axis, title, "iteration", curves)
        axis.ticklabel_format(axis="x", scilimits=(0, 3))
        if column == "objective":
            for (level, value), style in zip(named.items(), ("--", "-.", ":"), strict=False):
                axis.axhline(value, color="black", linestyle=style, linewidth=1, label=f"{level}: {value:.9f}")
            axis.legend(fontsize=8)
            if c.loss == "cross-entropy":  # the levels lie close together: show them, not the way down
                axis.set_yscale("linear")
                axis.set_ylim(min(named.values()) * 0.99, max(named.values()) * 1.03)
    figure.suptitle(heading)
    figure.savefig(path, dpi=110)


def dead_levels(models: list[UFM]) -> dict[str, float]:
    """The levels above the minimum at which some of the models stay for want of dead samples' gradients."""
    found = {}
    for model in models:
        if any(dead := dead_samples(model)):
            share = [count / model.c.samples_per_class for count in dead]
            found[f"{sum(dead)} dead"] = model.c.minimum().level(share)
    return dict(sorted(found.items())[:2])


def describe(c: Configuration) -> str:
    """The configuration in one line."""
    lambdas = f"λ_W={c.lambda_w:g}, λ_H={c.lambda_h:g}"
    if c.model == "plain":
        model = "plain UFM" + ("" if c.lambda_b == math.inf else f" with bias, λ_b={c.lambda_b:g}")
    else:
        model = f"extended {'ReLU' if c.model == 'relu' else 'linear'} UFM"
        lambdas = f"λ_W2={c.lambda_w:g}, λ_W1={c.lambda_w1:g}, λ_H1={c.lambda_h:g}"
    return f"{model}, {c.loss}: K={c.num_classes}, d={c.num_features}, n={c.samples_per_class}, {lambdas}"


def draw_and_report(c: Configuration, out: Path, name: str, seed: int, seeds: int) -> None:
    """Descend, write the table and the picture, say what was reached."""
    starts = list(range(seed, seed + seeds))
    models, tables = run(c, seed) if seeds == 1 else run_together([c] * seeds, starts)
    stem = name if seeds == 1 else f"{name}-seeds"
    write_csv(out / f"{stem}.csv", tables, starts)
    which = f"seed {seed}" if seeds == 1 else f"seeds {seed} to {seed + seeds - 1}, median and range"
    draw_run(out / f"{stem}.png", c, tables, f"{name}: {describe(c)}, {which}", levels(c) | dead_levels(models))
    for model, table, start in zip(models, tables, starts, strict=True):
        print(f"{name}, seed {start}: {verdict(model, table[-1])}")


# --------------------------------------------------------------------------- Theorem 5.1 and the regularised bias


def theorem_51(c: Configuration, out: Path, seed: int, sigma: float = 0.1) -> None:
    """Noise of standard deviation sigma on collapsed features: the best weight, eq. (93), shrinks to a multiple of W*."""
    K, d = c.num_classes, c.num_features
    tilde_h = c.samples_per_class * c.lambda_h
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for n in tqdm([10**k for k in range(2, 7)]):
        minimum = theory.plain_ufm(K, n, c.lambda_w, tilde_h / n)
        means, weight = minimum.class_means(d), minimum.weight(d)
        scatter, sums = torch.zeros(d, d, dtype=torch.float64), torch.zeros(K, d, dtype=torch.float64)
        for k in range(K):
            for start in range(0, n, 100_000):
                noise = torch.randn(min(n - start, 100_000), d, generator=generator, dtype=torch.float64)
                H = means[k] + sigma * noise
                scatter += H.T @ H
                sums[k] += H.sum(dim=0)
        ridge = scatter / (K * n) + c.lambda_w * torch.eye(d, dtype=torch.float64)
        best = torch.linalg.solve(ridge, sums.T / (K * n)).T
        factor = theory.attenuation(K, n, c.lambda_w, tilde_h / n, sigma**2)
        error = ((best - factor * weight).norm() / (factor * weight).norm()).item()
        rows.append(
            {
                "n": n,
                "attenuation": ((best * weight).sum() / weight.square().sum()).item(),
                "theory": factor,
                "relative_error": error,
            }
        )
    with (out / "theorem5.1.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    n = [row["n"] for row in rows]
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    left.semilogx(n, [row["attenuation"] for row in rows], "o-", color=COLORS[0], label="measured")
    left.axhline(factor, color="black", linestyle="--", linewidth=1, label=f"theory: {factor:.6f}")
    left.set_title("attenuation of the best weight")
    right.loglog(n, [row["relative_error"] for row in rows], "o-", color=COLORS[0], label="|W - theory| / |theory|")
    right.loglog(n, [error * math.sqrt(n[-1] / x) for x in n], "k--", linewidth=1, label="slope -1/2")
    right.set_title("convergence")
    for axis in (left, right):
        axis.set_xlabel("samples per class")
        axis.grid(alpha=0.3)
        axis.legend()
    figure.savefig(out / "theorem5.1.png", dpi=110)
    slope = math.log10(rows[-1]["relative_error"] / rows[0]["relative_error"]) / 4
    print(
        f"theorem 5.1: attenuation {rows[-1]['attenuation']:.6f} at n = {n[-1]}, theory {factor:.6f}, "
        f"relative error {error:.1e}, falling as n^({slope:.2f})"
    )


def sweep_lambda_b(c: Configuration, out: Path, seed: int) -> None:
    """The frame against the regularisation of the bias: measured by descent, and theory."""

    def frames(minimum: theory.Minimum) -> dict[str, Tensor]:
        means = ClassDeviations.of(minimum.class_means(c.num_features), torch.arange(c.num_classes), c.num_classes)
        return evaluate(("nc2_etf", "nc2_of"), means)

    scale = c.num_classes * math.sqrt(c.samples_per_class * c.lambda_h * c.lambda_w)
    threshold = scale / (1 - scale) if scale < 1 else math.inf
    middle = threshold if math.isfinite(threshold) else 1.0
    # Beyond 1/step the bias itself no longer descends.
    grid = [lb for k in range(-15, 26) if (lb := middle * 10 ** (k / 10)) < 1 / c.step]
    chosen = [replace(c, lambda_b=lb) for lb in grid[::2]]
    _, tables = run_together(chosen, [seed] * len(chosen))
    rows = []
    for configuration, table in zip(chosen, tables, strict=True):
        minimum, last = configuration.minimum(), table[-1]
        rows.append(
            {
                "lambda_b": configuration.lambda_b,
                "objective": last["objective"],
                "theory": minimum.objective,
                **{name: last[name] for name in ("nc2_etf", "nc2_of", "nc2_etf_centered", "nc3")},
                **{f"{name}_theory": value.item() for name, value in frames(minimum).items()},
            }
        )
    with (out / "sweep-lambda-b.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    figure = Figure(figsize=(7, 4), layout="constrained")
    axis = figure.subplots()
    fine = [lb for k in range(-150, 251) if (lb := middle * 10 ** (k / 100)) < 1 / c.step]
    curves = [frames(replace(c, lambda_b=lb).minimum()) for lb in fine]
    for name, color in zip(("nc2_etf", "nc2_of"), COLORS, strict=False):
        axis.semilogx(fine, [curve[name] for curve in curves], "--", color=color, linewidth=1, label=f"{name}, theory")
        axis.semilogx(
            [row["lambda_b"] for row in rows], [row[name] for row in rows], "o", color=color, label=f"{name}, descent"
        )
    if math.isfinite(threshold):
        axis.axvline(threshold, color="black", linestyle=":", label=f"threshold c/(1-c) = {threshold:.4f}")
    axis.set_xlabel("λ_b")
    axis.set_title(describe(replace(c, lambda_b=math.inf)), fontsize=9)
    axis.grid(alpha=0.3)
    axis.legend()
    figure.savefig(out / "sweep-lambda-b.png", dpi=110)
    worst = max(rows, key=lambda row: abs(row["objective"] / row["theory"] - 1))
    print(
        f"sweep of lambda_b, threshold {threshold:.6f}: largest relative difference of the objective "
        f"{worst['objective'] / worst['theory'] - 1:.1e}, at lambda_b = {worst['lambda_b']:.4g}"
    )


# ---------------------------------------------------------------------------------------------------- the command


def main(argv: list[str] | None = None) -> None:
    """Read the command line and draw what it asks for."""
    parser = ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config", action="config", help="a YAML file with any of the options below")
    parser.add_argument("--figure", type=int, help=f"one of {', '.join(map(str, FIGURES))}")
    parser.add_argument("--theorem", type=str, help="5.1: the attenuation by noise on the features")
    parser.add_argument("--sweep", type=str, help="lambda-b: the frame against the regularisation of the bias")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--seeds", type=int, default=1, help="how many seeds, from --seed on, to run at once")
    parser.add_argument("--out", type=Path, default=Path("figures"), help="where the CSV and the PNG go")
    parser.add_class_arguments(Configuration)
    # Options may be written with dashes, as in --num-classes.
    argv = [re.sub(r"^--[\w-]+", lambda m: "--" + m[0][2:].replace("-", "_"), a) for a in argv or sys.argv[1:]]
    chosen = parser.parse_args(argv)
    for option, known in (("figure", FIGURES), ("theorem", ("5.1",)), ("sweep", ("lambda-b", "lambda_b"))):
        if chosen[option] is not None and chosen[option] not in known:
            listed = " ".join(map(str, known))
            hint = (
                "; figures 5 and 10 are practical networks: python examples/resnet18.py" if option == "figure" else ""
            )
            parser.error(f"--{option} must be one of {listed}, got {chosen[option]}{hint}")
    asked = [f"--{option}" for option in ("figure", "theorem", "sweep") if chosen[option] is not None]
    if len(asked) > 1:
        parser.error(f"{' and '.join(asked)} cannot be drawn together; run one after the other")
    if (chosen.theorem or chosen.sweep) and (chosen.model != "plain" or chosen.loss != "mse" or chosen.seeds > 1):
        parser.error(
            f"{asked[0]} is of the plain model with MSE loss from one seed; leave --model, --loss and --seeds out"
        )
    if chosen.seeds < 1:
        parser.error(f"--seeds must be at least 1, got {chosen.seeds}")
    # A figure, the theorem and the sweep bring defaults of their own; what is given besides still counts.
    if chosen.figure:
        parser.set_defaults(asdict(FIGURES[chosen.figure]))
    elif chosen.theorem or chosen.sweep:
        parser.set_defaults(asdict(replace(FIGURES[1], iterations=100_000, every=10_000)))
    chosen = parser.parse_args(argv)
    try:
        c = Configuration(**{name: chosen[name] for name in Configuration.__dataclass_fields__})
    except ValueError as error:
        parser.error(str(error))
    out = chosen.out
    out.mkdir(parents=True, exist_ok=True)
    if chosen.theorem:
        theorem_51(c, out, chosen.seed)
    elif chosen.sweep:
        sweep_lambda_b(replace(c, model="plain", lambda_b=1.0), out, chosen.seed)
    else:
        name = f"figure{chosen.figure}" if chosen.figure else (c.model if c.loss == "mse" else f"{c.model}-{c.loss}")
        draw_and_report(c, out, name, chosen.seed, chosen.seeds)


if __name__ == "__main__":
    # Lightning's advice on hardware, loggers and workers has no bearing on 4 x 20 matrices.
    import logging
    import warnings

    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", message=".*does not have many workers.*")
    main()
