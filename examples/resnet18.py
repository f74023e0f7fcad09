"""ResNet18 collapses on real images: train past zero error, measure NC1, NC2, NC3 at every depth, draw the figure.

    python examples/resnet18.py                                      # the demo: digits, a few minutes on two cores
    python examples/resnet18.py fit --config examples/configs/figure5-top.yaml
    python examples/resnet18.py fit --data.dataset cifar10 --model.loss mse --model.bias false
    python examples/resnet18.py fit --help                           # every option

``fit`` writes metrics.csv, config.yaml, neural_collapse.png and checkpoints/last.ckpt to the logger's directory and says
where. ``validate``, ``test`` and ``fit`` go on from it with ``--ckpt_path``. docs/resnet18.md has more.
"""

import math
import sys
from pathlib import Path
from typing import Literal

import numpy
import torch
import torchvision
from lightning.pytorch import LightningDataModule, LightningModule
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.cli import ArgsType, LightningArgumentParser, LightningCLI
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, Subset, TensorDataset

from lightning_nc import NeuralCollapseCallback
from lightning_nc.plotting import plot_history

RESULTS = Path("results")
DEMO = Path(__file__).parent / "configs" / "digits.yaml"


class ResNet18(LightningModule):
    """ResNet18 for small images: a 3x3 first convolution of stride 1 and no max-pool. The defaults are the paper's recipe.

    Args:
        width: channels of the first stage; 64 is the standard network.
        in_channels: channels of the images.
        num_classes: number of classes.
        loss: cross-entropy, or the mean squared distance to one-hot targets over samples and classes. (Half the sum over the
            classes, as in the paper's equation 3, is num_classes / 2 times as steep, and diverges at its learning rate.)
        bias: whether the last layer has one.
        lr: learning rate of SGD with momentum 0.9.
        lr_milestones: epochs after which the learning rate is divided by ten.
        weight_decay: L2 regularization of all weights.
        channels_last: memory layout of the convolutions; faster on GPUs with half precision.
        compile: run the network through torch.compile.
    """

    def __init__(
        self,
        width: int = 64,
        in_channels: int = 1,
        num_classes: int = 10,
        loss: Literal["cross_entropy", "mse"] = "cross_entropy",
        bias: bool = True,
        lr: float = 0.05,
        lr_milestones: tuple[int, ...] = (40, 80, 120),
        weight_decay: float = 5e-4,
        channels_last: bool = False,
        compile: bool = False,
    ) -> None:
        super().__init__()
        self.save_hyperparameters(ignore=["in_channels", "num_classes"])  # those two are the data's
        self.num_classes = num_classes
        self.curves: dict[str, dict[int, float]] = {"loss": {}, "accuracy": {}}
        self.network = torchvision.models.ResNet(torchvision.models.resnet.BasicBlock, [2, 2, 2, 2], num_classes)
        self.network.conv1 = None  # of three channels; in its place:
        narrow(self.network, width)
        self.network.conv1 = nn.Conv2d(in_channels, width, 3, padding=1, bias=False)
        self.network.maxpool = nn.Identity()
        self.network.fc = nn.Linear(8 * width, num_classes, bias=bias)
        for module in self.network.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        if channels_last:
            self.network.to(memory_format=torch.channels_last)
        if compile:
            self.network.compile()

    def forward(self, images: Tensor) -> Tensor:
        """Logits (B, K) of images (B, C, H, W)."""
        return self.network(images)

    def step(self, batch: tuple[Tensor, Tensor], stage: str) -> Tensor:
        """Loss of a batch; logs loss and accuracy of the epoch."""
        images, target = batch
        logits = self(images).float()
        if self.hparams.loss == "mse":
            loss = nn.functional.mse_loss(logits, nn.functional.one_hot(target, self.num_classes).float())
        else:
            loss = nn.functional.cross_entropy(logits, target)
        values = {f"{stage}_loss": loss, f"{stage}_accuracy": (logits.argmax(dim=1) == target).float().mean()}
        self.log_dict(values, on_step=False, on_epoch=True, prog_bar=True, sync_dist=True, batch_size=len(target))
        return loss

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """One step down."""
        return self.step(batch, "train")

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """Held-out loss and accuracy."""
        self.step(batch, "val")

    def test_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """Held-out loss and accuracy."""
        self.step(batch, "test")

    def on_train_epoch_end(self) -> None:
        """Keep the curves for the figure; they live in the checkpoint, so a resumed run draws them whole."""
        for name, curve in self.curves.items():
            curve[self.current_epoch] = float(self.trainer.callback_metrics[f"train_{name}"])

    def on_save_checkpoint(self, checkpoint: dict) -> None:
        """Into the checkpoint."""
        checkpoint["curves"] = self.curves

    def on_load_checkpoint(self, checkpoint: dict) -> None:
        """Out of the checkpoint."""
        self.curves = checkpoint["curves"]

    def configure_optimizers(self) -> dict:
        """SGD with steps down, as in the paper."""
        optimizer = torch.optim.SGD(
            self.parameters(), lr=self.hparams.lr, momentum=0.9, weight_decay=self.hparams.weight_decay
        )
        scheduler = torch.optim.lr_scheduler.MultiStepLR(optimizer, self.hparams.lr_milestones)
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
    """Labelled images without augmentation, normalised per channel. All but folders are held in memory as tensors.

    Args:
        dataset: ``digits`` (8x8 pixels, comes with scikit-learn); ``mnist``, ``fashion_mnist``, ``cifar10`` or ``cifar100``
            (downloaded on first use); a file ``*.npz`` with the arrays ``x_train`` (N, H, W) or (N, H, W, C) and
            ``y_train`` (N,) of labels from 0, and, for ``validate`` and ``test``, ``x_test`` and ``y_test``; or a folder
            with one sub-folder of images per class, or with ``train`` and ``test`` of that kind.
        root: where downloads are kept.
        batch_size: images per step and device.
        image_size: side of the images; they are resized to it where it differs. Images of a folder get 64.
        samples_per_class: take only so many training images of each class, the first ones.
        on_device: hold the tensors on the device of the model, so that no step waits for a copy.
        num_workers: processes that read a folder's images.
    """

    def __init__(
        self,
        dataset: str = "digits",
        root: str = "~/.cache/lightning_nc",
        batch_size: int = 128,
        image_size: int | None = None,
        samples_per_class: int | None = None,
        on_device: bool = True,
        num_workers: int = 4,
    ) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.root = Path(root).expanduser()
        self.train: Dataset | None = None
        self.test: Dataset | None = None
        if dataset == "digits":
            self.in_channels, self.num_classes = 1, 10
        elif dataset in DOWNLOADS:
            _, _, self.in_channels, self.num_classes = DOWNLOADS[dataset]
        elif Path(dataset).is_dir():
            self.in_channels, self.num_classes = 3, len(folder(dataset, "train", 1).classes)
        elif dataset.endswith(".npz") and Path(dataset).is_file():
            images, target = npz(dataset)["train"]
            self.in_channels, self.num_classes = images.shape[1], int(target.max()) + 1
        else:
            raise ValueError(
                f"data.dataset must be digits, {', '.join(DOWNLOADS)}, an .npz file or a folder of images; there is no "
                f"data set, file or folder {dataset!r}"
            )

    def prepare_data(self) -> None:
        """Download what is not there yet, in one process alone."""
        if self.hparams.dataset in DOWNLOADS:
            name, files, _, _ = DOWNLOADS[self.hparams.dataset]
            try:
                getattr(torchvision.datasets, name)(self.root, download=True)
            except (OSError, RuntimeError) as error:
                raise RuntimeError(
                    f"{self.hparams.dataset} is not in {self.root} and could not be downloaded ({error}). Without a network: "
                    f"get {files} elsewhere and put it into {self.root}, or give data.root"
                ) from error

    def setup(self, stage: str) -> None:
        """Load the data."""
        name, size, count = self.hparams.dataset, self.hparams.image_size, self.hparams.samples_per_class
        if Path(name).is_dir():
            self.train, self.test = folder(name, "train", size or 64), folder(name, "test", size or 64)
            if count:
                self.train = Subset(self.train, first_of_each(torch.tensor(self.train.targets), count).tolist())
            return
        parts = digits() if name == "digits" else npz(name) if name.endswith(".npz") else downloaded(name, self.root)
        if count:
            chosen = first_of_each(parts["train"][1], count)
            parts["train"] = tuple(tensor[chosen] for tensor in parts["train"])
        deviation, mean = torch.std_mean(parts["train"][0].float(), dim=(0, 2, 3), keepdim=True)
        device = self.trainer.strategy.root_device if self.trainer and self.hparams.on_device else "cpu"
        for part, (images, target) in parts.items():
            if size and images.shape[-2:] != (size, size):
                images = nn.functional.interpolate(images.float(), size=(size, size), mode="bilinear", antialias=True)
            images = (images.float() - mean) / deviation.clamp(min=1e-6)  # a channel may be constant
            setattr(self, part, InMemory(images.to(device), target.to(device)))

    def train_dataloader(self) -> DataLoader:
        """Shuffled batches; without the last one, whose few images would upset the batch norm of the whole epoch."""
        own = len(self.train) // (self.trainer.world_size if self.trainer else 1)
        return self._loader(self.train, shuffle=True, drop_last=own > self.hparams.batch_size)

    def val_dataloader(self) -> DataLoader | list:
        """The test images: nothing is chosen by them here."""
        return [] if self.test is None else self._loader(self.test)

    def test_dataloader(self) -> DataLoader:
        """Held-out images."""
        if self.test is None:
            raise ValueError(
                f"{self.hparams.dataset} has no test images: an .npz needs x_test and y_test, a folder needs train and test"
            )
        return self._loader(self.test)

    def _loader(self, data: Dataset, **options: bool) -> DataLoader:
        if isinstance(data, InMemory):
            return DataLoader(data, self.hparams.batch_size, collate_fn=as_it_is, **options)
        workers = self.hparams.num_workers
        return DataLoader(
            data,
            self.hparams.batch_size,
            num_workers=workers,
            persistent_workers=workers > 0,
            pin_memory=True,
            **options,
        )


class InMemory(TensorDataset):
    """Tensors that give a whole batch in one indexing, where PyTorch would stack single images."""

    def __getitems__(self, indices: list[int]) -> tuple[Tensor, ...]:
        """The batch of a list of indices."""
        return self[indices]


def as_it_is(batch: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """A batch that needs no collating."""
    return batch


# name: torchvision's class, its files under the root, channels, classes
MNIST_FILES = "{train-images-idx3,train-labels-idx1,t10k-images-idx3,t10k-labels-idx1}-ubyte.gz"
DOWNLOADS = {
    "mnist": ("MNIST", f"MNIST/raw/{MNIST_FILES}", 1, 10),
    "fashion_mnist": ("FashionMNIST", f"FashionMNIST/raw/{MNIST_FILES}", 1, 10),
    "cifar10": ("CIFAR10", "cifar-10-python.tar.gz", 3, 10),
    "cifar100": ("CIFAR100", "cifar-100-python.tar.gz", 3, 100),
}
Parts = dict[str, tuple[Tensor, Tensor]]


def digits() -> Parts:
    """The 1797 handwritten digits of scikit-learn; the last 297 are held out."""
    bundle = load_digits()
    images, target = torch.tensor(bundle.images, dtype=torch.float32).unsqueeze(1), torch.tensor(bundle.target)
    return {"train": (images[:1500], target[:1500]), "test": (images[1500:], target[1500:])}


def downloaded(dataset: str, root: Path) -> Parts:
    """The images (N, C, H, W) and labels (N,) of a data set of torchvision's."""
    kind = getattr(torchvision.datasets, DOWNLOADS[dataset][0])
    bundles = {"train": kind(root, train=True), "test": kind(root, train=False)}
    return {part: channels_first(bundle.data, bundle.targets) for part, bundle in bundles.items()}


def npz(path: str) -> Parts:
    """The images (N, C, H, W) and labels (N,) of a file of the user's own."""
    with numpy.load(path) as arrays:
        if not {"x_train", "y_train"} <= set(arrays):
            raise ValueError(
                f"{path} needs the arrays x_train and y_train, and x_test and y_test for held-out images; it has "
                f"{', '.join(arrays) or 'none'}"
            )
        names = [part for part in ("train", "test") if f"x_{part}" in arrays and f"y_{part}" in arrays]
        parts = {part: checked(path, part, arrays[f"x_{part}"], arrays[f"y_{part}"]) for part in names}
    classes = int(parts["train"][1].max()) + 1
    for part, (_, target) in parts.items():
        if not 0 <= int(target.min()) <= int(target.max()) < classes:
            raise ValueError(f"{path}: y_{part} must hold labels from 0 to {classes - 1}, the largest of y_train")
    return parts


def checked(path: str, part: str, images: numpy.ndarray, target: numpy.ndarray) -> tuple[Tensor, Tensor]:
    """Arrays of the user's own as tensors, or what is wrong with them."""
    if images.ndim not in (3, 4) or (images.ndim == 4 and images.shape[3] not in (1, 2, 3, 4)):
        raise ValueError(
            f"{path}: x_{part} must be (N, H, W) or (N, H, W, C) with C at most 4, got {images.shape}; reshape flat images, and "
            "transpose(0, 2, 3, 1) those whose channels come first"
        )
    if not numpy.issubdtype(target.dtype, numpy.integer) or target.size != len(images) or len(target) != len(images):
        raise ValueError(
            f"{path}: y_{part} must be {len(images)} integers, one for each image, got {target.dtype} {target.shape}; take the "
            "argmax of one-hot labels"
        )
    return channels_first(images, target)


def channels_first(images: object, target: object) -> tuple[Tensor, Tensor]:
    """Images (N, H, W) or (N, H, W, C) as (N, C, H, W), with their labels."""
    images = torch.as_tensor(images)
    images = images.unsqueeze(1) if images.dim() == 3 else images.permute(0, 3, 1, 2).contiguous()
    return images, torch.as_tensor(target).long().flatten()


def folder(path: str, part: str, size: int) -> torchvision.datasets.ImageFolder | None:
    """A folder of images, resized and normalised with ImageNet's mean and deviation; None where it has no such part."""
    directory = Path(path) / part if (Path(path) / "train").is_dir() else Path(path)
    if part == "test" and (directory == Path(path) or not directory.is_dir()):
        return None
    steps = torchvision.transforms
    normal = steps.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    found = torchvision.datasets.ImageFolder(
        directory, steps.Compose([steps.Resize((size, size)), steps.ToTensor(), normal])
    )
    if part == "test":  # which may lack a class: its labels are those of the training images
        labels = folder(path, "train", size).class_to_idx
        if unknown := found.class_to_idx.keys() - labels.keys():
            raise ValueError(
                f"{directory} has the classes {', '.join(sorted(unknown))}, which the training images lack"
            )
        found.samples = [(file, labels[found.classes[label]]) for file, label in found.samples]
    return found


def first_of_each(target: Tensor, count: int) -> Tensor:
    """Indices of the first ``count`` samples of every class, in order."""
    return torch.cat([(target == label).nonzero().flatten()[:count] for label in target.unique()]).sort().values


class CLI(LightningCLI):
    """``fit`` measures the training data and ends with a table and a figure, ``test`` and ``validate`` the test data."""

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Options of the two callbacks; what the data are decides the shape of the network."""
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
        """``--ckpt_path last`` is that of the run whose config.yaml is given, else the newest of all runs."""
        super().parse_arguments(parser, args)
        options = self.config[self.config.subcommand]
        if options.ckpt_path == "last":
            beside = [Path(str(file)).parent / "checkpoints" / "last.ckpt" for file in options.get("config") or []]
            found = [file for file in beside if file.is_file()]
            found = found or sorted(
                RESULTS.glob("resnet18/*/checkpoints/last.ckpt"), key=lambda file: file.stat().st_mtime
            )
            if not found:
                raise FileNotFoundError(f"--ckpt_path last: no run in {RESULTS / 'resnet18'} has a checkpoint")
            options.ckpt_path = str(found[-1])
        if self.config.subcommand in ("validate", "test"):
            options.neural_collapse.stages = [self.config.subcommand]

    def after_fit(self) -> None:
        """Print the first, best and last value of every measure and draw the four panels."""
        history = next(c for c in self.trainer.callbacks if isinstance(c, NeuralCollapseCallback)).history
        if not history:
            return
        directory = Path(self.trainer.log_dir or ".")  # all processes ask together
        if not self.trainer.is_global_zero:
            return
        print(f"\n{'':36}{'first':>12}{'best':>12}{'last':>12}")
        for key in dict.fromkeys(key for row in history for key in row if key.startswith("nc/")):
            values = [row[key] for row in history if key in row]
            print(f"{key:36}{values[0]:12.3e}{min(values):12.3e}{values[-1]:12.3e}")
        epochs = [row["epoch"] for row in history if row["stage"] == "train"]
        curves = {name: [curve.get(epoch, math.nan) for epoch in epochs] for name, curve in self.model.curves.items()}
        accuracy = list(self.model.curves["accuracy"].values())
        print(f"{'accuracy':36}{accuracy[0]:12.4f}{max(accuracy):12.4f}{accuracy[-1]:12.4f}")
        picture = directory / "neural_collapse.png"
        plot_history(figure5(history), objective=curves if epochs else None).savefig(picture, dpi=150)
        print()
        values, config, last = (directory / name for name in ("metrics.csv", "config.yaml", "checkpoints/last.ckpt"))
        if values.exists():
            print(f"values:  {values}")
        print(f"figure:  {picture}")
        if config.exists() and last.exists():
            print(f"test:    python {sys.argv[0]} test --config {config} --ckpt_path {last}")


def figure5(history: list[dict]) -> list[dict]:
    """Of the measurements, what the paper's figure shows: NC1 and NC2 at every depth and NC3, of centred means.

    All of them, where other measures were asked for.
    """
    shown = ("stage", "epoch", "nc1", "nc2_etf_centered", "nc3_centered")
    rows = [{key: value for key, value in row.items() if key.split("/")[-1] in shown} for row in history]
    chosen = rows if any(key.startswith("nc/") for row in rows for key in row) else history
    return [{key.replace("network.", ""): value for key, value in row.items()} for row in chosen]


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
