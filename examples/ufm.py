"""The unconstrained features models of Tirer & Bruna (2022): every synthetic figure of the paper, beside its theory.

    python examples/ufm.py --figure 1                    # 1 2 3 4 6 7 8 9: writes figure1.csv and figure1.png
    python examples/ufm.py --figure 4 --seeds 10         # ten random starts together, drawn as a band
    python examples/ufm.py --model linear --lambda-w 0.01 --iterations 50000        # any other configuration
    python examples/ufm.py --config mine.yaml            # the same from a file
    python examples/ufm.py --model linear --loss cross-entropy --seeds 8
    python examples/ufm.py --theorem 5.1
    python examples/ufm.py --sweep lambda-b

The features of the N = K n training samples are a parameter. Plain gradient descent updates them together with the weights,
and `NeuralCollapseCallback` measures them like those of any network. `lightning_nc.theory` gives the minimum that descent
should reach. Beside this file stand `ufm_options.py` (settings and command line), `ufm_descent.py` (fast gradient descent),
`ufm_report.py` (closing line, table and picture) and `ufm_theorems.py` (`--theorem` and `--sweep`).
"""

import itertools
import logging
import math
import sys
import warnings

import lightning as L
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from tqdm import tqdm
from ufm_descent import descend
from ufm_options import Configuration, parse
from ufm_report import Table, report
from ufm_theorems import report_sweep, sweep_lambda_b, theorem_51

from lightning_nc import NeuralCollapseCallback
from lightning_nc.functional import nc1, nc2, nc3

# ----------------------------------------------------------------------------------------------------- the models


class UFM(L.LightningModule):
    """min 1/(2N) |W H + b 1' - Y|^2 + lambda_w/2 |W|^2 + lambda_h/2 |H|^2 + lambda_b/2 |b|^2, eq. (3)."""

    def __init__(self, configuration: Configuration, seed: int = 0) -> None:
        super().__init__()
        self.automatic_optimization = False  # a training step is many steps of gradient descent
        c = self.c = configuration
        K, d, n = c.num_classes, c.num_features, c.samples_per_class
        generator = torch.Generator().manual_seed(seed)

        def normal(scale: float, *shape: int) -> nn.Parameter:
            return nn.Parameter(scale * torch.randn(shape, generator=generator, dtype=torch.float64))

        # The tensors are drawn in the order of the forward pass; another order would be another start.
        self.features = normal(c.scale_h, K * n, d)
        if c.model != "plain":
            self.hidden = nn.Linear(d, d, bias=False)
            self.hidden.weight = normal(c.scale_w1, d, d)
        self.classifier = nn.Linear(d, K, bias=c.lambda_b < math.inf)
        self.classifier.weight = normal(c.scale_w, K, d)
        if self.classifier.bias is not None:
            self.classifier.bias = normal(c.scale_w, K)
        self.register_buffer("labels", torch.arange(K).repeat_interleave(n))

    def forward(self, indices: Tensor) -> Tensor:
        """The outputs (B, K) of the samples with these indices (B,)."""
        return self.classifier(self.features[indices])

    def levels(self) -> dict[str, tuple[Tensor, Tensor]]:
        """Each level's features (N, d) and the weight (K, d) from there to the outputs, by the suffix of its columns."""
        return {"": (self.features, self.classifier.weight)}

    def penalty(self) -> Tensor:
        """The regularization."""
        c = self.c
        penalty = c.lambda_w * self.classifier.weight.square().sum() + c.lambda_h * self.features.square().sum()
        if self.classifier.bias is not None:
            penalty = penalty + c.lambda_b * self.classifier.bias.square().sum()
        return penalty / 2

    def objective(self) -> Tensor:
        """The quantity that gradient descent minimizes."""
        outputs = self(torch.arange(len(self.labels)))
        if self.c.loss == "cross-entropy":
            return nn.functional.cross_entropy(outputs, self.labels) + self.penalty()
        error = outputs - nn.functional.one_hot(self.labels, self.c.num_classes)
        return error.square().sum() / (2 * len(self.labels)) + self.penalty()

    def train_dataloader(self) -> DataLoader:
        """All samples in one batch: gradient descent is full-batch."""
        return DataLoader(TensorDataset(torch.arange(len(self.labels)), self.labels), batch_size=len(self.labels))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Plain gradient descent."""
        return torch.optim.SGD(self.parameters(), lr=self.c.step)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> None:
        """Gradient descent up to the next measurement; the last step goes through the optimizer, so Lightning counts it."""
        start, end = self.c.measured_at[self.current_epoch : self.current_epoch + 2]
        descend([self], end - start - 1)
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(self.objective())
        optimizer.step()


class ExtendedUFM(UFM):
    """min 1/(2N) |W2 s(W1 H1) - Y|^2 + lambda_w/2 |W2|^2 + lambda_w1/2 |W1|^2 + lambda_h/2 |H1|^2, eqs. (23), (24)."""

    def __init__(self, configuration: Configuration, seed: int = 0) -> None:
        super().__init__(configuration, seed)
        # The callback measures outputs of modules; passing the parameter through a module gives the first level a name.
        self.first = nn.Identity()
        self.activation = nn.ReLU() if configuration.model == "relu" else nn.Identity()

    def forward(self, indices: Tensor) -> Tensor:
        """The outputs (B, K) of the samples with these indices (B,)."""
        return self.classifier(self.activation(self.hidden(self.first(self.features[indices]))))

    def levels(self) -> dict[str, tuple[Tensor, Tensor]]:
        """The deepest features, those of the first layer, and with a ReLU those before it."""
        pre, weight = self.hidden(self.features), self.classifier.weight
        both = {"": (self.activation(pre), weight), "_h1": (self.features, weight @ self.hidden.weight)}
        return both | {"_pre": (pre, weight)} if self.c.model == "relu" else both

    def penalty(self) -> Tensor:
        """The regularization."""
        return super().penalty() + self.c.lambda_w1 / 2 * self.hidden.weight.square().sum()


def build(configuration: Configuration, seed: int = 0) -> UFM:
    """The model of a configuration at a random start."""
    return (UFM if configuration.model == "plain" else ExtendedUFM)(configuration, seed)


# --------------------------------------------------------------------------------- the measurements, the training

METRICS = {
    "nc1": lambda features, target, weight: nc1(features, target),
    "nc2_of": lambda features, target, weight: nc2(features, target, frame="of"),
    "nc2_etf": lambda features, target, weight: nc2(features, target, frame="etf"),
    "nc2_etf_centered": lambda features, target, weight: nc2(features, target, frame="etf", center=True),
    "nc3": nc3,
}
LAYERS = {"": "nc/", "_h1": "nc/first/", "_pre": "nc/hidden/"}
COLUMNS = {
    start + name: name + suffix for suffix, start in LAYERS.items() for name in METRICS
}  # by the callback's keys


@torch.no_grad()
def measure_now(model: UFM, iteration: int, measured: dict[str, float] | None = None) -> dict[str, float]:
    """A row of the table, from all features; columns in ``measured`` are not computed again."""
    row, measured = {"iteration": iteration, "objective": model.objective().item()}, measured or {}
    for suffix, (features, weight) in model.levels().items():
        for name, metric in METRICS.items():
            column = name + suffix
            row[column] = measured[column] if column in measured else metric(features, model.labels, weight).item()
    return row


class Recorder(L.Callback):
    """Collects the rows of the table and shows the progress in iterations."""

    def __init__(self, collapse: NeuralCollapseCallback) -> None:
        self.collapse = collapse
        self.rows: Table = []

    def on_fit_start(self, trainer: L.Trainer, model: UFM) -> None:
        """The row of the start."""
        self.rows = [measure_now(model, 0)]
        self.bar = tqdm(total=model.c.iterations, unit="step", unit_scale=True)

    def on_train_epoch_end(self, trainer: L.Trainer, model: UFM) -> None:
        """The row of this epoch, with the values that `NeuralCollapseCallback` has just measured."""
        values = {key: value for key, value in self.collapse.history[-1].items() if key in COLUMNS}
        # The callback accumulates NC1 over batches, which has a floor near 1e-24; from all features it is exact.
        measured = {COLUMNS[key]: value for key, value in values.items() if not key.endswith("/nc1")}
        row = measure_now(model, model.c.measured_at[trainer.current_epoch + 1], measured)
        self.bar.update(row["iteration"] - self.rows[-1]["iteration"])
        self.bar.set_postfix_str(f"objective {row['objective']:.6g}, NC1 {row['nc1']:.1e}", refresh=False)
        self.rows.append(row)

    def on_train_end(self, trainer: L.Trainer, model: UFM) -> None:
        """Keep the finished bar on the screen."""
        self.bar.close()


def run(c: Configuration, seed: int) -> tuple[UFM, Table]:
    """Train from one start with the Trainer; the model at the end and its table."""
    model = build(c, seed)
    layers = {"plain": None, "linear": ["first"], "relu": ["first", "hidden"]}[c.model]
    collapse = NeuralCollapseCallback(layers=layers, metrics=tuple(METRICS), strict=True)
    recorder = Recorder(collapse)
    L.Trainer(
        max_epochs=len(c.measured_at) - 1,
        accelerator="cpu",
        callbacks=[collapse, recorder],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    ).fit(model)
    return model, recorder.rows


def run_together(configurations: list[Configuration], seeds: list[int]) -> tuple[list[UFM], list[Table]]:
    """Train from many starts in batched products, without a Trainer; the models at the end and a table for each."""
    models = [build(c, seed) for c, seed in zip(configurations, seeds, strict=True)]
    tables = [[measure_now(model, 0)] for model in models]
    with tqdm(total=configurations[0].iterations, unit="step", unit_scale=True) as bar:
        for start, end in itertools.pairwise(configurations[0].measured_at):
            descend(models, end - start)
            for model, table in zip(models, tables, strict=True):
                table.append(measure_now(model, end))
            bar.update(end - start)
    return models, tables


# ---------------------------------------------------------------------------------------------------- the command


def main(argv: list[str] | None = None) -> None:
    """Run what the command line asks for."""
    options, c = parse(argv or sys.argv[1:], description=__doc__.splitlines()[0])
    options.out.mkdir(parents=True, exist_ok=True)
    if options.theorem:
        theorem_51(c, options.out, options.seed)
    elif options.sweep:
        swept = sweep_lambda_b(c)
        _, tables = run_together(swept, [options.seed] * len(swept))
        report_sweep(swept, tables, options.out)
    else:
        starts = [options.seed + i for i in range(options.seeds)]
        if len(starts) == 1:
            model, table = run(c, options.seed)
            models, tables = [model], [table]
        else:
            models, tables = run_together([c] * len(starts), starts)
        name = f"figure{options.figure}" if options.figure else c.model if c.loss == "mse" else f"{c.model}-{c.loss}"
        report(models, tables, starts, name, options.out)


if __name__ == "__main__":
    # Lightning's advice about hardware, loggers and workers does not apply to matrices this small.
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", message=".*does not have many workers.*")
    main()
