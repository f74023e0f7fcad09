"""Cases that hypothesis draws: a small model, its data, how they are loaded, and what the Trainer and the callback do."""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from hypothesis import strategies as st
from torch import nn
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    IterableDataset,
    RandomSampler,
    Sampler,
    SubsetRandomSampler,
    WeightedRandomSampler,
    get_worker_info,
)

from lightning_nc import log_spaced

# ------------------------------------------------------------------------------------------------------------- models


class Tied(nn.Module):
    """A block that is called twice, the second time on what it gave the first time."""

    def __init__(self, classes):
        super().__init__()
        self.stem, self.block, self.head = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, classes)

    def forward(self, x):
        x = self.block(self.stem(x).tanh()).tanh()
        return self.head(self.block(x).tanh())


class Nested(nn.Module):
    """Two heads, one inside a Sequential, of which the model returns one."""

    def __init__(self, classes):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(6, 8), nn.LayerNorm(8), nn.GELU())
        main = nn.Sequential(nn.Dropout(0.1), nn.Linear(8, 7), nn.ReLU(inplace=True), nn.Linear(7, classes))
        self.heads = nn.ModuleDict({"main": main, "aux": nn.Linear(8, classes + 1)})

    def forward(self, x):
        x = self.body(x)
        self.auxiliary = self.heads["aux"](x)
        return self.heads["main"](x)


class Tagger(nn.Module):
    """A transformer that classifies every token."""

    def __init__(self, classes):
        super().__init__()
        self.embed = nn.Embedding(9, 8)
        self.encoder = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.1, batch_first=True)
        self.norm, self.head = nn.LayerNorm(8), nn.Linear(8, classes)

    def forward(self, tokens):
        return self.head(self.norm(self.encoder(self.embed(tokens))))


def mlp(classes):
    return nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.2), nn.Linear(8, classes))


def cnn(classes):
    body = nn.Conv2d(2, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU(inplace=True), nn.Dropout2d(0.1)
    return nn.Sequential(*body, nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(24, classes))


def all_convolutions(classes):
    body = nn.Conv2d(2, 6, 3, padding=1), nn.GroupNorm(2, 6), nn.ReLU(inplace=True)
    return nn.Sequential(*body, nn.Conv2d(6, classes, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten())


def segmentation(classes):
    return nn.Sequential(nn.Conv2d(2, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, classes, 1))


class Model(NamedTuple):
    build: object
    inputs: str  # rows, images or tokens
    head: str
    into: str  # the axes of what the head receives
    layers: dict  # the axes of what layers return
    labels: tuple = ("index", "one-hot", "one-hot floats")


MODELS = {
    "mlp": Model(mlp, "rows", "net.4", "BC", {"net.0": "BC", "net.1": "BC", "net.2": "BC", "net.3": "BC"}),
    "one output": Model(
        lambda classes: mlp(1), "rows", "net.4", "BC", {"net.0": "BC", "net.2": "BC"}, ("index", "floats", "column")
    ),
    "cnn": Model(cnn, "images", "net.6", "BC", {"net.0": "BCHW", "net.1": "BCHW", "net.2": "BCHW", "net.5": "BC"}),
    "all convolutions": Model(
        all_convolutions, "images", "net.3", "BCHW", {"net.0": "BCHW", "net.1": "BCHW", "net.2": "BCHW"}
    ),
    "tied": Model(Tied, "rows", "net.head", "BC", {"net.stem": "BC", "net.block": "BC"}),
    "nested": Model(
        Nested, "rows", "net.heads.main.3", "BC", {"net.body": "BC", "net.body.0": "BC", "net.heads.main.1": "BC"}
    ),
    "tagger": Model(
        Tagger, "tokens", "net.head", "BTC", {"net.embed": "BTC", "net.encoder": "BTC", "net.norm": "BTC"}, ("places",)
    ),
    "segmentation": Model(
        segmentation, "images", "net.3", "BCHW", {"net.0": "BCHW", "net.1": "BCHW", "net.2": "BCHW"}, ("places",)
    ),
}


def rows_of(output, axes, places):
    """What a layer gave as a row per label: positions are rows of their own, or are averaged over."""
    if axes == "BC":
        return output
    rows = output.movedim(1, -1) if axes == "BCHW" else output
    return rows.flatten(0, -2) if places else rows.flatten(1, -2).mean(dim=1)


# --------------------------------------------------------------------------------------------------------------- data


class Pair(NamedTuple):
    inputs: torch.Tensor
    target: torch.Tensor


FORMS = {
    "tuple": lambda x, y: (x, y),
    "list": lambda x, y: [x, y],
    "named": Pair,
    "dict": lambda x, y: {"inputs": x, "labels": y},
    "dict with y": lambda x, y: {"y": y, "x": x},
}


def unpacked(batch):
    """The inputs and the labels of a batch of any form."""
    if isinstance(batch, dict):
        name = "labels" if "labels" in batch else "y"
        return next(value for key, value in batch.items() if key != name), batch[name]
    return batch[0], batch[1]


class Samples(Dataset):
    def __init__(self, inputs, labels, form):
        self.inputs, self.labels, self.form = inputs, labels, FORMS[form]

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, index):
        return self.form(self.inputs[index], self.labels[index])


class Stream(IterableDataset):
    """Each worker gives every other sample."""

    def __init__(self, samples):
        self.samples = samples

    def __iter__(self):
        worker = get_worker_info()
        start, step = (worker.id, worker.num_workers) if worker else (0, 1)
        return (self.samples[index] for index in range(start, len(self.samples), step))


class EveryOther(Sampler):
    """A sampler of the user's, which draws from the global random stream."""

    def __init__(self, data):
        self.data = data

    def __len__(self):
        return len(range(0, len(self.data), 2))

    def __iter__(self):
        return iter((2 * torch.randperm(len(self))).tolist())


class Sevens(EveryOther):
    """Batches of seven in a random order, with a length and without a batch size."""

    def __len__(self):
        return -(-len(self.data) // 7)

    def __iter__(self):
        return iter([part.tolist() for part in torch.randperm(len(self.data)).split(7)])


# ---------------------------------------------------------------------------------------------------------------- cases

LOADERS = (
    "shuffled",
    "in order",
    "generator",
    "subset",
    "weighted",
    "every other",
    "batch sampler",
    "sevens",
    "stream",
)
STAGES = (
    ("train",),
    ("train",),
    ("train", "validate"),
    ("train", "test"),
    ("validate",),
    ("train", "validate", "test"),
)
STOPS = ("none", "none", "none", "max_steps", "stop", "error", "keyboard")
SCHEDULES = {"all": 1, "second": 2, "third": 3, "log": log_spaced(3), "epoch 1": lambda epoch: epoch == 1}
METRICS = {
    "paper": "paper",
    "all": "all",
    "nc1": "nc1",
    "few": ("nc2_etf_centered", "nc3", "ncc_error"),
    "cdnv": ("nc1_cdnv", "nc1_cdnv_directional", "nc4"),
}


@dataclass(frozen=True)
class Case:
    model: str
    labels: str
    integers: str  # the type of class indices
    classes: int
    absent: bool  # the last class has no sample
    single: bool  # class 0 has one sample
    samples: int
    noise: float
    seed: int
    form: str
    loader: str
    batch_size: int
    drop_last: bool
    workers: int
    validation: tuple  # the numbers of samples of the dataloaders of validation, and of test
    limit: int | None
    precision: str
    ranks: int
    optimizer: str
    epochs: int
    accumulate: int
    clip: float | None
    sanity: int
    stop: tuple  # what ends the run early, and when
    checkpoint: int  # every so many steps; 0: every epoch
    layers: tuple
    named: bool  # the classifier is named
    metrics: str
    stages: tuple
    mode: str
    every: str
    geometry: tuple | None
    budget: float
    second: str | None  # the metrics of a second callback

    @property
    def kind(self):
        return MODELS[self.model]

    @property
    def places(self):
        return self.labels == "places"

    def data(self, count, seed):
        """Inputs, and class indices with ignore_index where there is no label."""
        generator = torch.Generator().manual_seed(seed)
        shape = {"rows": (), "images": (4, 3), "tokens": (5,)}[self.kind.inputs] if self.places else ()
        used = self.classes - self.absent
        target = torch.randint(used, (count, *shape), generator=generator)
        if not self.places:
            target = torch.arange(count) % used
            if self.single and used > 2:
                target[target == 0] = 1
                target[count // 2] = 0
        size = {"rows": (6,), "images": (2, 4, 3), "tokens": (5,)}[self.kind.inputs]
        if self.kind.inputs == "tokens":
            inputs = (target * 2 + torch.randint(3, size=(count, 5), generator=generator)) % 9
        else:
            centers = torch.randn(self.classes, size[0], generator=torch.Generator().manual_seed(self.seed))
            middle = centers[target].movedim(-1, 1)  # (N, C) or (N, C, H, W)
            middle = middle.reshape(count, size[0], *([1] * (len(size) - 1) if not self.places else size[1:]))
            inputs = middle + self.noise * torch.randn(count, *size, generator=generator)
        if self.places:
            left_out = torch.rand(target.shape, generator=generator) < 0.2
            target[left_out] = self.ignore_index
        return inputs, target

    @property
    def ignore_index(self):
        return 255 if self.integers == "uint8" else -100

    def raw(self, target):
        """Labels as a batch holds them."""
        if self.labels.startswith("one-hot"):
            hot = nn.functional.one_hot(target, self.classes)
            return hot.float() if self.labels.endswith("floats") else hot
        if self.labels == "floats":
            return target.float()
        target = target.to(getattr(torch, self.integers))
        return target[:, None] if self.labels == "column" else target

    def dataset(self, count, seed):
        inputs, target = self.data(count, seed)
        return Samples(inputs, self.raw(target), self.form)

    def train_loader(self):
        data = self.dataset(self.samples, self.seed)
        options = {"num_workers": self.workers}
        if self.loader == "stream":
            return DataLoader(Stream(data), self.batch_size, drop_last=self.drop_last, **options)
        if self.loader == "sevens":
            return DataLoader(data, batch_sampler=Sevens(data), **options)
        if self.loader == "batch sampler":
            return DataLoader(
                data, batch_sampler=BatchSampler(RandomSampler(data), self.batch_size, self.drop_last), **options
            )
        weights = (torch.arange(self.samples) % 4).float()
        samplers = {
            "subset": lambda: SubsetRandomSampler(range(3, self.samples)),
            "weighted": lambda: WeightedRandomSampler(weights, self.samples),
            "every other": lambda: EveryOther(data),
        }
        generator = torch.Generator().manual_seed(5) if self.loader == "generator" else None
        sampler = samplers[self.loader]() if self.loader in samplers else None
        shuffle = self.loader in ("shuffled", "generator")
        return DataLoader(
            data, self.batch_size, shuffle, sampler, drop_last=self.drop_last, generator=generator, **options
        )

    def trained_on(self):
        """The indices that the training loader can draw, in order."""
        everything = range(self.samples)
        parts = {
            "subset": everything[3:],
            "every other": everything[::2],
            "weighted": [index for index in everything if index % 4],
        }
        return list(parts.get(self.loader, everything))

    def held_out(self):
        return [
            DataLoader(self.dataset(count, self.seed + 7 + number), self.batch_size)
            for number, count in enumerate(self.validation)
        ]


@st.composite
def cases(draw, ranks=1):
    """Cases that training itself can run, unless a batch of one sample meets batch norm."""
    pick = lambda *options: draw(st.sampled_from(options))  # noqa: E731
    flag = st.booleans()
    model = pick(*MODELS)
    kind = MODELS[model]
    labels = pick(*kind.labels)
    classes = 2 if model == "one output" else draw(st.integers(2, 5))
    places = labels == "places"
    mode = pick("exact", "exact", "online")
    stages = pick(*STAGES)
    stop = pick(*[name for name in STOPS if ranks == 1 or name not in ("error", "keyboard")])
    used = classes - (classes > 2 and draw(flag))
    chosen = st.lists(st.sampled_from(range(used)), min_size=2, max_size=min(4, used), unique=True)
    return Case(
        model=model,
        labels=labels,
        integers=pick("int64", "int64", "int32", "int16", "uint8"),
        classes=classes,
        absent=used < classes,
        single=draw(flag),
        samples=draw(st.integers(24, 45)),
        noise=pick(0.3, 1.0),
        seed=draw(st.integers(0, 99)),
        form=pick(*FORMS),
        loader=pick(*[name for name in LOADERS if ranks == 1 or name not in ("sevens", "batch sampler")]),
        batch_size=draw(st.integers(3, 9)),
        drop_last=draw(flag),
        workers=2 if ranks == 1 and draw(st.integers(0, 15)) == 15 else 0,
        validation=pick((), (13,), (10, 17)) if len(stages) == 1 and "train" in stages else pick((13,), (10, 17)),
        limit=pick(None, None, 2, 3) if not places else pick(None, 2),
        precision=pick("32-true", "32-true", "64-true", "bf16-mixed", "bf16-true"),
        ranks=ranks,
        optimizer=pick("SGD", "Adam"),
        epochs=draw(st.integers(1, 4)),
        accumulate=pick(1, 1, 2, 3),
        clip=pick(None, None, 0.5),
        sanity=pick(0, 2),
        stop=(stop, draw(st.integers(1, 9))),
        checkpoint=pick(0, 0, 1, 2),
        layers=tuple(name for name in kind.layers if draw(flag)),
        named=draw(flag),
        metrics=pick(*METRICS),
        stages=stages,
        mode=mode,
        every=pick(*SCHEDULES),
        geometry=tuple(draw(chosen)) if mode == "exact" and draw(flag) else None,
        budget=pick(2.0**30, 2.0**30, 100.0),
        second=pick(None, None, None, "nc1", "few"),
    )
