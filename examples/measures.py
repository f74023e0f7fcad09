"""What every metric does while a network collapses: the pictures of docs/metrics.md, one for each family.

    python examples/measures.py                     # a minute on one core
    python examples/measures.py --out docs/images   # the pictures of the documentation

A multilayer perceptron learns the handwritten digits of scikit-learn with cross-entropy, far past zero training error.
`NeuralCollapseCallback` measures all metrics at the classifier's input and behind every hidden layer.
"""

import math
from argparse import ArgumentDefaultsHelpFormatter, ArgumentParser
from collections.abc import Sequence
from pathlib import Path

import torch
from lightning.pytorch import LightningModule, Trainer, seed_everything
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_nc import History, NeuralCollapseCallback, log_spaced
from lightning_nc.functional import METRICS

CLASSES, WIDTH, HIDDEN = 10, 64, 4
LAYERS = {f"body.{index}/": f"layer {index + 1}" for index in range(HIDDEN - 1)} | {"": "classifier input"}
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
DEPTH = ("#C6DBEF", "#6CAFD6", "#2171B5", "#08306B")

# The panels of each picture: a title, and the metrics that it shows. By layer if it is a single metric with a star.
FAMILIES = {
    "variability": (
        ("NC1: scatter against separation", "nc1 nc1_trace nc1_cdnv nc1_cdnv_directional nc1_vci"),
        ("nc1 by layer", "nc1*"),
    ),
    "frames": (("NC2: distance from a frame", "nc2_etf nc2_etf_centered nc2_of"),),
    "angles": (("NC2: norms and angles of the class means", "nc2_equinorm nc2_equiangular nc2_maxangle"),),
    "weights": (
        ("NC2 of the weight", "nc2_weight nc2_weight_equinorm nc2_weight_equiangular nc2_weight_maxangle nc0"),
    ),
    "alignment": (("NC3: weight against class means", "nc3 nc3_centered nc3_gram nc3_cosine nc3_uniform"),),
    "samples": (("ncc_error by layer", "ncc_error*"), ("Nearest center and classifier", "ncc_error nc4")),
    "ranks": (
        ("Ranks of the class means", "stable_rank numerical_rank"),
        ("Ranks of the features", "stable_rank_features numerical_rank_features"),
    ),
    "energy": (("Energy of the class means", "gnc2_log"), ("Its spread over pairs", "gnc2_log_spread")),
}
LINEAR = ("ranks", "samples")  # values that are no distances from zero
# nc2_of at an exact simplex ETF, and nc2_etf at an exact orthogonal frame.
OTHER_FRAME = math.sqrt(2 - 2 * math.sqrt((CLASSES - 1) / CLASSES))


class Perceptron(LightningModule):
    """Hidden layers with batch normalization and ReLU, and a linear classifier."""

    def __init__(self) -> None:
        super().__init__()
        layers = [(nn.Linear(WIDTH, WIDTH, bias=False), nn.BatchNorm1d(WIDTH), nn.ReLU()) for _ in range(HIDDEN)]
        self.body = nn.Sequential(*[nn.Sequential(*layer) for layer in layers])
        self.head = nn.Linear(WIDTH, CLASSES)

    def forward(self, images: Tensor) -> Tensor:
        """(B, 64) pixels to (B, 10) logits."""
        return self.head(self.body(images))

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Cross-entropy."""
        images, target = batch
        return nn.functional.cross_entropy(self(images), target)

    def configure_optimizers(self) -> dict:
        """SGD with momentum and weight decay; the learning rate falls as a cosine."""
        optimizer = torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9, weight_decay=2e-3)
        return {
            "optimizer": optimizer,
            "lr_scheduler": torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, self.trainer.max_epochs),
        }


def train(epochs: int, seed: int) -> History:
    """All metrics of a run, in rows by epoch."""
    seed_everything(seed, verbose=False)
    images, target = (torch.tensor(part) for part in load_digits(return_X_y=True))
    data = TensorDataset((images.float() - images.mean()) / images.std(), target)
    collapse = NeuralCollapseCallback(metrics="all", layers=["body.[012]"], every_n_epochs=log_spaced(12))
    options = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "accelerator": "cpu"}
    trainer = Trainer(max_epochs=epochs, callbacks=[collapse], **options)
    trainer.fit(Perceptron(), DataLoader(data, 256, shuffle=True, drop_last=True))
    return collapse.history


def draw(axis: Axes, title: str, names: str, history: History, logarithmic: bool) -> None:
    """One panel: a curve for each metric, or for each layer, and the value at collapse."""
    epochs = [row["epoch"] + 1 for row in history]
    if names.endswith("*"):
        curves = {label: f"nc/{layer}{names[:-1]}" for layer, label in LAYERS.items()}
    else:
        curves = {name: f"nc/{name}" for name in names.split()}
    for (label, key), color in zip(curves.items(), DEPTH if names.endswith("*") else COLORS, strict=False):
        axis.plot(epochs, [row[key] for row in history], color=color, label=label, linewidth=1.6)
    lines = {METRICS[name.strip("*")].value_at_collapse(CLASSES, WIDTH): "at collapse" for name in names.split()}
    lines |= {OTHER_FRAME: "exact other frame"} if "nc2_of" in names.split() else {}
    for value, label in lines.items():
        if value:
            axis.axhline(value, color="#7F7F7F", linewidth=1, linestyle=(0, (2, 2)), label=label, zorder=0)
    axis.set(title=title, xlabel="epoch", xscale="log", yscale="log" if logarithmic else "linear")
    axis.title.set_fontsize(9)
    axis.xaxis.label.set_fontsize(8)
    axis.grid(color="#E5E5E5", linewidth=0.5)
    axis.spines[["top", "right"]].set_visible(False)
    axis.tick_params(which="both", labelsize=8)
    axis.legend(fontsize=7.5, frameon=False, loc="upper left", bbox_to_anchor=(1, 1.05), borderaxespad=0.2)


def picture(family: str, history: History) -> Figure:
    """The picture of a family."""
    panels = FAMILIES[family]
    figure = Figure(figsize=(4.3 * len(panels), 2.3), layout="constrained")
    for axis, (title, names) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        draw(axis, title, names, history, family not in LINEAR and METRICS[names.split()[0].strip("*")].collapse == 0)
    return figure


def main(arguments: Sequence[str] | None = None) -> None:
    """Train, measure, draw."""
    parser = ArgumentParser(description=__doc__.partition("\n")[0], formatter_class=ArgumentDefaultsHelpFormatter)
    parser.add_argument("--epochs", type=int, default=600, help="passes over the digits")
    parser.add_argument("--seed", type=int, default=0, help="of the weights and of the order of the images")
    parser.add_argument("--out", type=Path, default=Path("results/measures"), help="directory of the pictures")
    args = parser.parse_args(arguments)
    history = train(args.epochs, args.seed)
    args.out.mkdir(parents=True, exist_ok=True)
    for family in FAMILIES:
        picture(family, history).savefig(args.out / f"measures-{family}.png", dpi=100)
    print(f"pictures of {len(FAMILIES)} families in {args.out}")


if __name__ == "__main__":
    main()
