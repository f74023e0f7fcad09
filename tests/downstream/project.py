"""A project that uses every public entry point, with types. ``check.py`` checks them against an installed package and runs it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_nc import (
    NC1,
    NC2,
    NC3,
    NC4,
    History,
    NeuralCollapse,
    NeuralCollapseCallback,
    NeuralRegressionCollapse,
    SimplexETF,
    extract_features,
    functional,
    log_spaced,
    measure,
    theory,
)
from lightning_nc.__main__ import main as command
from lightning_nc.functional import METRICS, MetricSpec, nc1, nc2, nc3, nc4, nrc1, nrc2, nrc3
from lightning_nc.functional.geometry import Geometry
from lightning_nc.measuring.extraction import Features
from lightning_nc.measuring.measurement import Measurement

Batch = tuple[Tensor, Tensor]
CLASSES, FEATURES = 3, 8

OF_FEATURES: list[Callable[[Tensor, Tensor], Tensor]] = [
    functional.gnc2_log,
    functional.gnc2_log_spread,
    functional.gnc2_riesz,
    functional.nc1_cdnv,
    functional.nc1_cdnv_directional,
    functional.nc1_trace,
    functional.nc1_vci,
    functional.nc2_equiangular,
    functional.nc2_equinorm,
    functional.nc2_maxangle,
    functional.nc2_orthoplex,
    functional.nc2_seli,
    functional.ncc_error,
    functional.numerical_rank,
    functional.numerical_rank_features,
    functional.stable_rank,
    functional.stable_rank_features,
]
OF_BOTH: list[Callable[[Tensor, Tensor, Tensor], Tensor]] = [
    functional.minority_cosine,
    functional.nc2_weight_seli,
    functional.nc3_cosine,
    functional.nc3_gram,
    functional.nc3_seli,
    functional.nc3_uniform,
    functional.nc5,  # its third argument are features of no class
]
OF_WEIGHT: list[Callable[[Tensor], Tensor]] = [
    functional.gnc2_margin,
    functional.nc0,
    functional.nc2_weight,
    functional.nc2_weight_equiangular,
    functional.nc2_weight_equinorm,
    functional.nc2_weight_maxangle,
]


class Classifier(LightningModule):
    """A body and a head."""

    def __init__(self, head: nn.Module | None = None) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(5, FEATURES), nn.ReLU())
        self.head = nn.Linear(FEATURES, CLASSES) if head is None else head

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head(self.body(x))
        return logits

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        x, y = batch
        return nn.functional.cross_entropy(self(x), y) + 0.01 * nc1(self.body(x), y, num_classes=CLASSES)

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        self.log("val_loss", nn.functional.cross_entropy(self(batch[0]), batch[1]))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def loader(seed: int = 0) -> DataLoader[tuple[Tensor, ...]]:
    """Three classes of 20 samples each."""
    generator = torch.Generator().manual_seed(seed)
    target = torch.arange(CLASSES).repeat(20)
    inputs = 2 * torch.eye(CLASSES, 5)[target] + torch.randn(len(target), 5, generator=generator)
    return DataLoader(TensorDataset(inputs, target), batch_size=16)


class EveryOther(NeuralCollapseCallback):
    """Measures the even epochs."""

    def should_measure(self, trainer: Trainer) -> bool:
        return trainer.current_epoch % 2 == 0


def fit(callback: NeuralCollapseCallback, folder: Path) -> None:
    """Three epochs with a callback."""
    trainer = Trainer(
        max_epochs=3,
        callbacks=[callback],
        default_root_dir=folder,
        logger=False,
        accelerator="cpu",
        enable_progress_bar=False,
    )
    trainer.fit(Classifier(), loader(), loader(1))


def train(folder: Path) -> NeuralCollapseCallback:
    """A callback with most of its arguments, and one with a schedule and a metric of its own."""
    own = EveryOther(mode="online", metrics=["nc1", "my_spread"])
    fit(own, folder)
    assert [row["epoch"] for row in own.history] == [0, 2]
    assert own.history[-1]["nc/my_spread"] > 0

    schedule: Callable[[int], bool] = log_spaced(per_decade=5)
    callback = NeuralCollapseCallback(
        layers=["body"], stages=("train", "validate"), metrics="all", every_n_epochs=schedule, geometry=(0, 1, 2)
    )
    fit(callback, folder)
    return callback


def after_training(callback: NeuralCollapseCallback) -> tuple[float, str]:
    """What a callback holds after a training."""
    history: History = callback.history
    row: dict[str, object] = [entry for entry in history if entry["stage"] == "train"][-1]
    means: Tensor | None = callback.class_means
    table: dict[str, list[object]] = callback.per_class
    geometry: Geometry | None = callback.geometry
    assert means is not None
    assert geometry is not None
    assert means.shape == (CLASSES, FEATURES)
    assert len(table["class"]) == CLASSES
    value = row["nc/nc1"]
    assert isinstance(value, float)
    return value, geometry.words


def without_trainer(folder: Path) -> Measurement:
    """Numbers, features and a history of a loop of one's own."""
    model = Classifier(SimplexETF(FEATURES, CLASSES))
    values: Measurement = measure(model, loader(), layers=["body"], baseline=True, intervals=0.95, progress=False)
    held_out = measure(model, loader(1), reference=loader(), progress=False, device="cpu")
    found: Features = extract_features(model, loader(), progress=False)
    features: Tensor = found.features["classifier input"]
    assert features.shape == (60, FEATURES)
    assert found.target.dtype is torch.int64
    nc1_value: float = values["nc1"]
    assert held_out["nc1"] != nc1_value

    history = History(folder / "nc.csv")
    history.append(values, epoch=0)
    history.append(held_out, epoch=0, stage="test", accuracy=0.5)
    again: History = History.read(folder / "nc.csv")
    assert [row["stage"] for row in again] == ["train", "test"]
    return values


def with_metrics(features: Tensor, target: Tensor, head: nn.Linear) -> dict[str, float]:
    """Every metric class, and their formulas."""
    whole = NeuralCollapse(CLASSES, FEATURES, weight=head, bias=head, metrics="paper")
    others = (
        NC1(CLASSES, FEATURES),
        NC2(CLASSES, FEATURES, frame="of"),
        NC3(CLASSES, FEATURES, weight=head, center=True),
        NC4(CLASSES, FEATURES, weight=head.weight, bias=head.bias),
    )
    for metric in (whole, *others):
        metric.update(features, target)
    single: list[Tensor] = [metric.compute() for metric in others]
    assert torch.isclose(single[0], nc1(features, target))
    assert torch.isclose(single[1], nc2(features, target, frame="of"))
    assert torch.isclose(single[2], nc3(features, target, head.weight, center=True))
    assert torch.isclose(single[3].double(), nc4(features, target, head.weight, head.bias).double())

    regression = NeuralRegressionCollapse(num_targets=2, num_features=FEATURES)
    targets = features[:, :2] - features[:, 2:4]
    regression.update(features, targets)
    values: dict[str, Tensor] = regression.compute()
    assert torch.isclose(values["nrc1"], nrc1(features, targets))
    return {name: float(value) for name, value in whole.compute().items()}


def with_formulas(features: Tensor, target: Tensor, head: nn.Linear) -> list[float]:
    """Every function of one signature, and those of another."""
    weight, bias = head.weight, head.bias
    targets = features[:, :2] - features[:, 2:4]
    depth: float = functional.effective_depth([0.5, 0.2, 0.0], tolerance=0.1)
    values = [formula(features, target) for formula in OF_FEATURES]
    values += [formula(features, target, weight) for formula in OF_BOTH] + [formula(weight) for formula in OF_WEIGHT]
    values += [nrc2(features, targets, weight[:2]), nrc3(features, targets, weight[:2])]
    values += [functional.bias_collapse(features, target, weight, bias)]
    return [depth, *(float(value) for value in values)]


def with_figures(callback: NeuralCollapseCallback, folder: Path) -> None:
    """Figures of a callback, of a history and of a file; they need matplotlib."""
    from matplotlib.figure import Figure

    from lightning_nc import plotting
    from lightning_nc.runs import read_run

    history = callback.history
    rows: Sequence[Mapping[str, object]] = read_run(folder / "nc.csv")
    figures: list[Figure] = [
        callback.plot(),
        callback.plot_depth(),
        callback.plot_classes(),
        callback.plot_frames(),
        callback.plot_geometry(),
        history.plot(metrics="all"),
        plotting.plot_history(rows, num_classes=CLASSES),
        plotting.plot_runs({"a": rows}),
        plotting.plot_overlay([("a", rows), ("b", rows)]),
        plotting.plot_depth(history),
        plotting.plot_classes(history.per_class, history.scenes),
        plotting.plot_frames(history.scenes),
        plotting.plot_geometry(history.scenes),
        plotting.plot_gram(torch.eye(CLASSES)),
    ]
    for number, figure in enumerate(figures):
        figure.savefig(folder / f"{number}.png")
    written: Path = callback.animate(folder / "callback.gif")
    assert written.exists()
    assert plotting.animate(history.scenes, folder / "scenes.gif").exists()
    assert command(["plot", str(folder / "nc.csv"), "-o", str(folder / "command.png")]) == 0


def with_theory() -> Tensor:
    """Closed-form minimizers."""
    minimum: theory.Minimum = theory.plain_ufm(CLASSES, 20, lambda_w=0.01, lambda_h=0.01)
    extended: theory.ExtendedMinimum = theory.extended_ufm(CLASSES, 20, lambda_w2=0.01, lambda_w1=0.01, lambda_h1=0.01)
    factor: float = theory.attenuation(CLASSES, 20, 0.01, 0.01, noise_variance=0.1)
    assert 0 < factor <= 1
    assert minimum.objective > 0
    assert extended.first_class_means(FEATURES).shape == (CLASSES, FEATURES)
    means: Tensor = minimum.class_means(FEATURES)
    return means


def main(folder: Path) -> None:
    """Use everything."""
    METRICS["my_spread"] = MetricSpec(lambda s: s.moments.spread.max() / s.moments.spread.sum(), "largest share")
    callback = train(folder)
    value, words = after_training(callback)
    measured = without_trainer(folder)
    features, target, head = torch.randn(60, FEATURES), torch.arange(CLASSES).repeat(20), nn.Linear(FEATURES, CLASSES)
    numbers = with_metrics(features, target, head)
    count = len(with_formulas(features, target, head))
    assert with_theory().dtype is torch.float64
    if find_spec("matplotlib") is not None:
        with_figures(callback, folder)
    print(f"{words}: {value:.3g}, {measured['nc1']:.3g}, {numbers['nc1']:.3g}, and {count} formulas")
