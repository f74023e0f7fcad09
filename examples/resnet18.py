"""ResNet18 collapses on real images: train past zero error, measure NC1, NC2, NC3 in every epoch, draw the figure.

    python examples/resnet18.py                                     # handwritten digits, a few minutes on two cores
    python examples/resnet18.py fit --model.loss mse --model.bias false --model.lr 0.1
    python examples/resnet18.py fit --help                          # every option of the model, the data and the Trainer

Writes metrics.csv and neural_collapse.png to the logger's directory and says where.
"""

import csv
import math
import sys
from pathlib import Path
from typing import Literal

import torch
import torchvision
from lightning.pytorch import LightningDataModule, LightningModule
from lightning.pytorch.cli import ArgsType, LightningCLI
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_nc import NeuralCollapseCallback
from lightning_nc.plotting import plot_history


class ResNet18(LightningModule):
    """ResNet18 for small images: a 3x3 first convolution of stride 1 and no max-pool.

    Args:
        width: channels of the first stage; 64 is the standard network.
        in_channels: channels of the images.
        num_classes: number of classes.
        loss: cross-entropy, or mean squared error to one-hot targets.
        bias: whether the last layer has one.
        lr: learning rate of SGD with momentum 0.9, divided by ten at half and at three quarters of the epochs.
        weight_decay: L2 regularization of all weights. Digits are few: ten times the 5e-4 of Tirer & Bruna (2022).
    """

    def __init__(
        self,
        width: int = 16,
        in_channels: int = 1,
        num_classes: int = 10,
        loss: Literal["cross_entropy", "mse"] = "cross_entropy",
        bias: bool = True,
        lr: float = 0.05,
        weight_decay: float = 5e-3,
    ) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.network = torchvision.models.ResNet(torchvision.models.resnet.BasicBlock, [2, 2, 2, 2], num_classes)
        narrow(self.network, width)
        self.network.conv1 = nn.Conv2d(in_channels, width, 3, padding=1, bias=False)
        self.network.maxpool = nn.Identity()
        self.network.fc = nn.Linear(8 * width, num_classes, bias=bias)
        for module in self.network.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, images: Tensor) -> Tensor:
        """Logits (B, K) of images (B, C, H, W)."""
        return self.network(images)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Loss of a batch; logs loss and accuracy of the epoch."""
        images, target = batch
        logits = self(images)
        if self.hparams.loss == "mse":
            loss = 0.5 * (logits - nn.functional.one_hot(target, self.hparams.num_classes)).square().sum(dim=1).mean()
        else:
            loss = nn.functional.cross_entropy(logits, target)
        self.log("train_loss", loss, on_step=False, on_epoch=True, prog_bar=True)
        self.log(
            "train_accuracy",
            (logits.argmax(dim=1) == target).float().mean(),
            on_step=False,
            on_epoch=True,
            prog_bar=True,
        )
        return loss

    def configure_optimizers(self) -> dict:
        """SGD with two steps down, as in the paper."""
        optimizer = torch.optim.SGD(
            self.parameters(), lr=self.hparams.lr, momentum=0.9, weight_decay=self.hparams.weight_decay
        )
        epochs = self.trainer.max_epochs
        scheduler = torch.optim.lr_scheduler.MultiStepLR(optimizer, [max(1, epochs // 2), max(2, epochs * 3 // 4)])
        return {"optimizer": optimizer, "lr_scheduler": scheduler}


def narrow(network: nn.Module, width: int) -> None:
    """Scale the channels of torchvision's ResNet, whose stages start at 64, to start at ``width``."""
    for name, module in network.named_children():
        if isinstance(module, nn.Conv2d):
            ins, outs = module.in_channels * width // 64, module.out_channels * width // 64
            setattr(network, name, nn.Conv2d(ins, outs, module.kernel_size, module.stride, module.padding, bias=False))
        elif isinstance(module, nn.BatchNorm2d):
            setattr(network, name, nn.BatchNorm2d(module.num_features * width // 64))
        else:
            narrow(module, width)


class Images(LightningDataModule):
    """Labelled images, normalised to mean 0 and variance 1.

    Args:
        dataset: ``digits``, the 1797 handwritten digits of 8x8 pixels that scikit-learn ships.
        image_size: side of the images; they are resized to it where it differs.
        batch_size: images per step.
    """

    def __init__(self, dataset: Literal["digits"] = "digits", image_size: int = 8, batch_size: int = 64) -> None:
        super().__init__()
        self.save_hyperparameters()

    def setup(self, stage: str) -> None:
        """Load the images into memory."""
        images, target = DATASETS[self.hparams.dataset]()
        size = self.hparams.image_size
        if images.shape[-2:] != (size, size):
            images = nn.functional.interpolate(images, size=(size, size), mode="bilinear", antialias=True)
        self.train = TensorDataset((images - images.mean()) / images.std(), target)

    def train_dataloader(self) -> DataLoader:
        """Shuffled batches; without the last one, whose five digits would upset the batch norm of the whole epoch."""
        return DataLoader(self.train, batch_size=self.hparams.batch_size, shuffle=True, drop_last=True)


def digits() -> tuple[Tensor, Tensor]:
    """1797 images (N, 1, 8, 8) and their labels (N,)."""
    bundle = load_digits()
    return torch.tensor(bundle.images, dtype=torch.float32).unsqueeze(1), torch.tensor(bundle.target)


DATASETS = {"digits": digits}


class CLI(LightningCLI):
    """``fit`` ends with a table and a figure."""

    def after_fit(self) -> None:
        """Print the first, best and last value of every measure and draw the four panels."""
        callback = next(c for c in self.trainer.callbacks if isinstance(c, NeuralCollapseCallback))
        if not callback.history or not self.trainer.is_global_zero:
            return
        directory = Path(self.trainer.log_dir or ".")
        curves = {"loss": column(directory, "train_loss"), "accuracy": column(directory, "train_accuracy")}
        by_epoch = {
            label: [values.get(row["epoch"], math.nan) for row in callback.history] for label, values in curves.items()
        }
        print(f"\n{'':24}{'first':>12}{'best':>12}{'last':>12}")
        for key in [key for key in callback.history[0] if key.startswith("nc/")]:
            values = [row[key] for row in callback.history]
            print(f"{key:24}{values[0]:12.3e}{min(values):12.3e}{values[-1]:12.3e}")
        accuracy = by_epoch["accuracy"]
        print(f"{'accuracy':24}{accuracy[0]:12.4f}{max(accuracy):12.4f}{accuracy[-1]:12.4f}")
        picture = directory / "neural_collapse.png"
        plot_history(callback.history, objective=by_epoch).savefig(picture, dpi=150)
        print(f"\nvalues:  {directory / 'metrics.csv'}\nfigure:  {picture}")


def column(directory: Path, name: str) -> dict[int, float]:
    """One column of the logged CSV by epoch."""
    with open(directory / "metrics.csv") as file:
        return {int(row["epoch"]): float(row[name]) for row in csv.DictReader(file) if row.get(name)}


def main(args: ArgsType = None) -> None:
    """Run the command line."""
    CLI(
        ResNet18,
        Images,
        seed_everything_default=0,
        trainer_defaults={
            "max_epochs": 200,
            "logger": {"class_path": "CSVLogger", "init_args": {"save_dir": "results", "name": "resnet18"}},
            "callbacks": [NeuralCollapseCallback()],
            "enable_checkpointing": False,
            "log_every_n_steps": 1,
        },
        args=args,
    )


if __name__ == "__main__":
    main(sys.argv[1:] or ["fit"])
