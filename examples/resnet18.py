"""ResNet18 on real images: train past zero error, measure NC1, NC2 and NC3 at every depth, draw the figure.

    python examples/resnet18.py                                      # the demo: digits, about a minute on two cores
    python examples/resnet18.py fit --config examples/configs/figure5-top.yaml
    python examples/resnet18.py fit --data.dataset cifar10 --model.loss mse --model.bias false
    python examples/resnet18.py fit --help                           # every option

``fit`` writes metrics.csv, config.yaml, figures and checkpoints/last.ckpt to the logger's directory and prints
its name. ``validate``, ``test`` and ``fit`` continue from a checkpoint with ``--ckpt_path``. See docs/resnet18.md. The data
sets are in `resnet18_data.py`, the table and the figure in `resnet18_report.py`.
"""

import math
import sys
from pathlib import Path
from typing import Literal

import torch
import torchvision
from lightning.pytorch import LightningModule
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.cli import ArgsType, LightningArgumentParser, LightningCLI
from resnet18_data import Images
from resnet18_report import report
from torch import Tensor, nn

from lightning_nc import NeuralCollapseCallback, SimplexETF

RESULTS = Path("results")
DEMO = Path(__file__).parent / "configs" / "digits.yaml"


class ResNet18(LightningModule):
    """ResNet18 for small images: a 3x3 first convolution of stride 1 and no max-pool. The defaults are the paper's recipe.

    Args:
        width: channels of the first stage; 64 is the standard network.
        in_channels: channels of the images.
        num_classes: number of classes.
        loss: cross_entropy, or the squared error to one-hot targets: mse is averaged over samples and classes; half_sum is
            half the sum over the classes, averaged over samples, as in the paper's equation 3. It is num_classes / 2 times
            as steep.
        bias: whether the last layer has a bias.
        head: linear, or etf for a last layer that is fixed to a simplex ETF, without a bias.
        kaiming: whether convolutions start from Kaiming's normal distribution (fan-out) instead of PyTorch's default.
        lr: learning rate of SGD.
        momentum: momentum of SGD.
        lr_milestones: epochs after which the learning rate is divided by ten; none: half a cosine, down to 0 at the end.
        weight_decay: L2 regularization of all weights.
        channels_last: memory layout of the convolutions; faster on GPUs with half precision.
        compile: compile the network with torch.compile; ``reduce-overhead``: with CUDA graphs, faster for small batches.
    """

    def __init__(
        self,
        width: int = 64,
        in_channels: int = 1,
        num_classes: int = 10,
        loss: Literal["cross_entropy", "mse", "half_sum"] = "cross_entropy",
        bias: bool = True,
        head: Literal["linear", "etf"] = "linear",
        kaiming: bool = True,
        lr: float = 0.05,
        momentum: float = 0.9,
        lr_milestones: tuple[int, ...] = (40, 80, 120),
        weight_decay: float = 5e-4,
        channels_last: bool = False,
        compile: bool | Literal["reduce-overhead"] = False,
    ) -> None:
        super().__init__()
        self.save_hyperparameters(ignore=["in_channels", "num_classes"])  # the data determine these two
        self.num_classes = num_classes
        self.curves: dict[str, dict[int, float]] = {"loss": {}, "accuracy": {}}
        self.network = torchvision.models.ResNet(torchvision.models.resnet.BasicBlock, [2, 2, 2, 2], num_classes)
        self.network.conv1 = None  # replaced below; its three input channels are not to be scaled
        narrow(self.network, width)
        self.network.conv1 = nn.Conv2d(in_channels, width, 3, padding=1, bias=False)
        self.network.maxpool = nn.Identity()
        if head == "etf":
            self.network.fc = SimplexETF(8 * width, num_classes)
        else:
            self.network.fc = nn.Linear(8 * width, num_classes, bias=bias)
        for module in self.network.modules():
            if kaiming and isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        if channels_last:
            self.network.to(memory_format=torch.channels_last)
        if compile:
            self.network.compile(mode=None if compile is True else compile)

    def forward(self, images: Tensor) -> Tensor:
        """Logits (B, K) of images (B, C, H, W)."""
        return self.network(images)

    def step(self, batch: tuple[Tensor, Tensor], stage: str) -> Tensor:
        """The loss of a batch; logs the loss and the accuracy of the epoch."""
        images, target = batch
        logits = self(images).float()
        if self.hparams.loss == "cross_entropy":
            loss = nn.functional.cross_entropy(logits, target)
        else:
            loss = nn.functional.mse_loss(logits, nn.functional.one_hot(target, self.num_classes).float())
            if self.hparams.loss == "half_sum":
                loss = loss * self.num_classes / 2
        values = {f"{stage}_loss": loss, f"{stage}_accuracy": (logits.argmax(dim=1) == target).float().mean()}
        self.log_dict(values, on_step=False, on_epoch=True, prog_bar=True, sync_dist=True, batch_size=len(target))
        return loss

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """The training loss."""
        return self.step(batch, "train")

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """Loss and accuracy on held-out data."""
        self.step(batch, "val")

    def test_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """Loss and accuracy on held-out data."""
        self.step(batch, "test")

    def on_train_epoch_end(self) -> None:
        """Extend the curves of the figure. They are part of the checkpoint, so a resumed run draws all epochs."""
        for name, curve in self.curves.items():
            curve[self.current_epoch] = float(self.trainer.callback_metrics[f"train_{name}"])

    def on_save_checkpoint(self, checkpoint: dict) -> None:
        """Save the curves."""
        checkpoint["curves"] = self.curves

    def on_load_checkpoint(self, checkpoint: dict) -> None:
        """Restore the curves."""
        self.curves = checkpoint["curves"]

    def configure_optimizers(self) -> dict:
        """SGD with a learning rate that is divided by ten at the milestones, as in the paper, or follows half a cosine."""
        options = self.hparams
        optimizer = torch.optim.SGD(
            self.parameters(), lr=options.lr, momentum=options.momentum, weight_decay=options.weight_decay
        )
        if options.lr_milestones:
            scheduler = torch.optim.lr_scheduler.MultiStepLR(optimizer, options.lr_milestones)
        else:
            epochs = self.trainer.max_epochs
            scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda e: (1 + math.cos(math.pi * e / epochs)) / 2)
        return {"optimizer": optimizer, "lr_scheduler": scheduler}


def narrow(network: nn.Module, width: int) -> None:
    """Scale all channels of torchvision's ResNet by ``width`` / 64."""
    for name, module in network.named_children():
        if isinstance(module, nn.Conv2d):
            ins, outs = module.in_channels * width // 64, module.out_channels * width // 64
            setattr(network, name, nn.Conv2d(ins, outs, module.kernel_size, module.stride, module.padding, bias=False))
        elif isinstance(module, nn.BatchNorm2d):
            setattr(network, name, nn.BatchNorm2d(module.num_features * width // 64))
        else:
            narrow(module, width)


class CLI(LightningCLI):
    """``fit`` measures the training data and ends with a table and a figure; ``test`` and ``validate`` measure the test data."""

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add the options of the two callbacks; the data determine the channels and classes of the network."""
        parser.add_lightning_class_args(NeuralCollapseCallback, "neural_collapse")
        parser.add_lightning_class_args(ModelCheckpoint, "checkpoint")
        parser.set_defaults(
            {
                "neural_collapse.layers": [f"network.layer{depth}" for depth in (1, 2, 3, 4)],
                "checkpoint.save_last": True,
                "checkpoint.save_top_k": 0,
            }
        )
        parser.link_arguments("data.in_channels", "model.in_channels", apply_on="instantiate")
        parser.link_arguments("data.num_classes", "model.num_classes", apply_on="instantiate")

    def parse_arguments(self, parser: LightningArgumentParser, args: ArgsType) -> None:
        """``--ckpt_path last`` means the checkpoint beside the given config.yaml, or else the newest checkpoint of all runs."""
        super().parse_arguments(parser, args)
        options = self.config[self.config.subcommand]
        if options.ckpt_path == "last":
            beside = [Path(str(file)).parent / "checkpoints" / "last.ckpt" for file in options.get("config") or []]
            found = [file for file in beside if file.is_file()]
            found = found or sorted(
                RESULTS.glob("resnet18/*/checkpoints/last.ckpt"), key=lambda file: file.stat().st_mtime
            )
            if not found:
                raise FileNotFoundError(
                    f"--ckpt_path last: no run in {RESULTS / 'resnet18'} has a checkpoint; run fit first"
                )
            options.ckpt_path = str(found[-1])
        if self.config.subcommand in ("validate", "test"):
            options.neural_collapse.stages = [self.config.subcommand]

    def after_fit(self) -> None:
        """Print the table and draw the figure."""
        measured = next(c for c in self.trainer.callbacks if isinstance(c, NeuralCollapseCallback))
        directory = Path(self.trainer.log_dir or ".")  # a collective: all processes read it
        if measured.history and self.trainer.is_global_zero:
            report(measured, self.model.curves, directory)


def main(args: ArgsType = None) -> None:
    """Run the command line."""
    CLI(
        ResNet18,
        Images,
        seed_everything_default=0,
        trainer_defaults={
            "max_epochs": 160,
            "logger": {"class_path": "CSVLogger", "init_args": {"save_dir": str(RESULTS), "name": "resnet18"}},
            "log_every_n_steps": 1,
        },
        args=args,
    )


if __name__ == "__main__":
    sys.argv[1:] = sys.argv[1:] or ["fit", "--config", str(DEMO)]
    main()
