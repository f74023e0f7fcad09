"""The data sets of `resnet18.py`: digits, torchvision's, an .npz file or a folder of images."""

from pathlib import Path

import numpy
import torch
import torchvision
from lightning.pytorch import LightningDataModule
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, Subset, TensorDataset


class Images(LightningDataModule):
    """Labeled images without augmentation, normalized per channel. All data sets except folders are kept in memory as tensors.

    Args:
        dataset: ``digits`` (8x8 pixels, comes with scikit-learn); ``mnist``, ``fashion_mnist``, ``cifar10`` or ``cifar100``
            (downloaded on first use); a file ``*.npz`` with the arrays ``x_train`` (N, H, W) or (N, H, W, C) and
            ``y_train`` (N,), labels from 0, and, for ``validate`` and ``test``, ``x_test`` and ``y_test``; or a folder
            with one subfolder of images per class, or with subfolders ``train`` and ``test`` of that kind.
        root: directory for downloads.
        batch_size: images per step and device.
        image_size: height and width to which images are resized; for a folder the default is 64.
        samples_per_class: use only the first so many training images of each class.
        on_device: keep the tensors on the model's device, so that no step waits for a copy.
        num_workers: number of processes that read a folder's images.
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
                f"data.dataset must be digits, {', '.join(DOWNLOADS)}, an .npz file or a folder of images; "
                f"no data set, file or folder is named {dataset!r}"
            )

    def prepare_data(self) -> None:
        """Download what is missing, in a single process."""
        if self.hparams.dataset in DOWNLOADS:
            name, files, _, _ = DOWNLOADS[self.hparams.dataset]
            try:
                getattr(torchvision.datasets, name)(self.root, download=True)
            except (OSError, RuntimeError) as error:
                raise RuntimeError(
                    f"{self.hparams.dataset} is not in {self.root} and could not be downloaded ({error}). Without a network, "
                    f"get {files} elsewhere and put it into {self.root}, or pass its directory as data.root"
                ) from error

    def setup(self, stage: str) -> None:
        """Load the images and normalize them."""
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
            images = (images.float() - mean) / deviation.clamp(min=1e-6)  # the deviation of a constant channel is 0
            setattr(self, part, InMemory(images.to(device), target.to(device)))

    def train_dataloader(self) -> DataLoader:
        """Shuffled batches; an incomplete last batch is dropped, because batch norm is unreliable on few images."""
        own = len(self.train) // (self.trainer.world_size if self.trainer else 1)
        return self._loader(self.train, shuffle=True, drop_last=own > self.hparams.batch_size)

    def val_dataloader(self) -> DataLoader | list:
        """The test images. They serve for validation too, since no setting is selected with them."""
        return [] if self.test is None else self._loader(self.test)

    def test_dataloader(self) -> DataLoader:
        """The test images."""
        if self.test is None:
            raise ValueError(
                f"{self.hparams.dataset} has no test images: an .npz file needs x_test and y_test, a folder needs train and test"
            )
        return self._loader(self.test)

    def _loader(self, data: Dataset, **options: bool) -> DataLoader:
        if isinstance(data, InMemory):
            return DataLoader(data, self.hparams.batch_size, collate_fn=keep_batch, **options)
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
    """Tensors from which a whole batch is read with one indexing operation instead of stacking single images."""

    def __getitems__(self, indices: list[int]) -> tuple[Tensor, ...]:
        """The batch of these indices."""
        return self[indices]


def keep_batch(batch: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """A collate function for batches that are complete already."""
    return batch


MNIST_FILES = "{train-images-idx3,train-labels-idx1,t10k-images-idx3,t10k-labels-idx1}-ubyte.gz"
# Name -> torchvision's class, its files under the root, number of channels, number of classes.
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
    """The images (N, C, H, W) and labels (N,) of a torchvision data set."""
    kind = getattr(torchvision.datasets, DOWNLOADS[dataset][0])
    bundles = {"train": kind(root, train=True), "test": kind(root, train=False)}
    return {part: channels_first(bundle.data, bundle.targets) for part, bundle in bundles.items()}


def npz(path: str) -> Parts:
    """The images (N, C, H, W) and labels (N,) of an .npz file."""
    with numpy.load(path) as arrays:
        if not {"x_train", "y_train"} <= set(arrays):
            raise ValueError(
                f"{path} needs the arrays x_train and y_train, and x_test and y_test for test images; it has "
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
    """Arrays from an .npz file as tensors; ``ValueError`` if they are not images and labels."""
    if images.ndim not in (3, 4) or (images.ndim == 4 and images.shape[3] not in (1, 2, 3, 4)):
        raise ValueError(
            f"{path}: x_{part} must be (N, H, W) or (N, H, W, C) with C at most 4, got {images.shape}; reshape flat images, or "
            "apply transpose(0, 2, 3, 1) if the channels come first"
        )
    if not numpy.issubdtype(target.dtype, numpy.integer) or target.size != len(images) or len(target) != len(images):
        raise ValueError(
            f"{path}: y_{part} must be {len(images)} integers, one for each image, got {target.dtype} {target.shape}; if the "
            "labels are one-hot, take their argmax"
        )
    return channels_first(images, target)


def channels_first(images: object, target: object) -> tuple[Tensor, Tensor]:
    """Images (N, H, W) or (N, H, W, C) as (N, C, H, W), with their labels."""
    images = torch.as_tensor(images)
    images = images.unsqueeze(1) if images.dim() == 3 else images.permute(0, 3, 1, 2).contiguous()
    return images, torch.as_tensor(target).long().flatten()


def folder(path: str, part: str, size: int) -> torchvision.datasets.ImageFolder | None:
    """A folder of images, resized and normalized with ImageNet's mean and deviation; None if it has no such part."""
    directory = Path(path) / part if (Path(path) / "train").is_dir() else Path(path)
    if part == "test" and (directory == Path(path) or not directory.is_dir()):
        return None
    steps = torchvision.transforms
    normal = steps.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    found = torchvision.datasets.ImageFolder(
        directory, steps.Compose([steps.Resize((size, size)), steps.ToTensor(), normal])
    )
    if part == "test":  # a class may be missing from the test images, so the labels come from the training images
        labels = folder(path, "train", size).class_to_idx
        if unknown := found.class_to_idx.keys() - labels.keys():
            raise ValueError(
                f"{directory} has the classes {', '.join(sorted(unknown))}, which do not occur in the training images; "
                "remove their subfolders or add training images"
            )
        found.samples = [(file, labels[found.classes[label]]) for file, label in found.samples]
    return found


def first_of_each(target: Tensor, count: int) -> Tensor:
    """Indices of the first ``count`` samples of every class, in order."""
    return torch.cat([(target == label).nonzero().flatten()[:count] for label in target.unique()]).sort().values
