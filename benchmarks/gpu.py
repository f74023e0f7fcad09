"""Costs on a GPU: the exact pass and online mode, as ratios to a bare forward pass and a bare training step; memory.

    python benchmarks/gpu.py                  # the tables of docs/costs.md; about a minute
    python benchmarks/gpu.py exact vocabulary # some of: exact, online, tokens, vocabulary

Nothing waits for the device within a pass. Passes of two lengths with and without measuring take turns: the difference of the
lengths is the cost of a step, the rest is paid once.
"""

import itertools
import logging
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torchvision
import transformers
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn

from lightning_nc import NeuralCollapse, NeuralCollapseCallback, measure

DEVICE = "cuda"


def clock(function: Callable[[], object]) -> float:
    """Seconds that a call takes, with all that it leaves for the device to do."""
    torch.cuda.synchronize()
    start = time.perf_counter()
    function()
    torch.cuda.synchronize()
    return time.perf_counter() - start


def network(name: str) -> nn.Module:
    """A torchvision network with 1000 classes."""
    return getattr(torchvision.models, name)().to(DEVICE, memory_format=torch.channels_last)


def images(batch: int) -> tuple[Tensor, Tensor]:
    """Random images of 224x224 with labels: what they show makes no difference to the cost."""
    rows = torch.randn(batch, 3, 224, 224, device=DEVICE).contiguous(memory_format=torch.channels_last)
    return rows, torch.randint(1000, (batch,), device=DEVICE)


def passes(title: str, bare: Callable[[int], object], ours: Callable[[int], object], few: int, many: int) -> None:
    """Print the cost of a step of ``ours`` as a ratio to one of ``bare``, and what ``ours`` pays once."""
    for function in (bare, ours):
        function(few)
    found = []
    for _ in range(3):
        short, long = clock(lambda: bare(few)), clock(lambda: bare(many))
        ours_short, ours_long = clock(lambda: ours(few)), clock(lambda: ours(many))
        step, our_step = (long - short) / (many - few), (ours_long - ours_short) / (many - few)
        found.append((our_step / step, step, ours_short - few * our_step))
    ratio, step, once = (statistics.median(column) for column in zip(*found, strict=True))
    ratios = [row[0] for row in found]
    print(
        f"| {title} | {1e3 * step:.2f} ms | {ratio:.3f} ({min(ratios):.3f} to {max(ratios):.3f}) | {once:.2f} s |",
        flush=True,
    )


def exact() -> None:
    """The exact pass of ResNet18 and ResNet50 in bfloat16."""
    for name, batch in (("resnet18", 256), ("resnet18", 1024), ("resnet50", 256)):
        model, (rows, target) = network(name).bfloat16().eval(), images(batch)
        data = rows.bfloat16(), target

        def bare(count: int, model: nn.Module = model, data: Any = data) -> None:
            with torch.no_grad():
                for _ in range(count):
                    model(data[0])

        def ours(count: int, model: nn.Module = model, data: Any = data) -> None:
            measure(model, [data] * count, classifier="fc", progress=False)

        passes(f"exact pass, {name}, batch {batch}", bare, ours, 5, 35)


class Classifier(LightningModule):
    """A network that trains with cross-entropy and SGD."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.net = network(name)

    def forward(self, rows: Tensor) -> Tensor:
        """The logits."""
        return self.net(rows)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """A step of cross-entropy."""
        return nn.functional.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Plain SGD."""
        return torch.optim.SGD(self.parameters(), lr=1e-3)


class Repeated:
    """One batch, several times; Lightning would take a list for several dataloaders."""

    def __init__(self, batch: tuple[Tensor, Tensor], count: int) -> None:
        self.batch, self.count = batch, count

    def __len__(self) -> int:
        return self.count

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return itertools.repeat(self.batch, self.count)


class Clock(Callback):
    """Seconds from the start of the step ``first`` to that of the step ``last``."""

    def __init__(self, first: int, last: int) -> None:
        self.first, self.last = first, last

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Read the clock."""
        if batch_idx in (self.first, self.last):
            torch.cuda.synchronize()
            now = time.perf_counter()
            self.seconds = now - self.began if batch_idx == self.last else 0.0
            self.began = now


def online() -> None:
    """Online mode in training ResNet18 and ResNet50 in bf16-mixed."""
    for name, batch, steps in (("resnet18", 128, 60), ("resnet18", 512, 30), ("resnet50", 128, 40)):
        data, model = images(batch), Classifier(name)

        def fit(measuring: bool, data: Any = data, model: Any = model, steps: int = steps) -> float:
            callback = Clock(5, steps + 5)
            Trainer(
                max_epochs=1,
                accelerator="gpu",
                devices=1,
                precision="bf16-mixed",
                benchmark=True,
                callbacks=[callback, *([NeuralCollapseCallback(mode="online", strict=True)] if measuring else [])],
                logger=False,
                enable_checkpointing=False,
                enable_model_summary=False,
                enable_progress_bar=False,
            ).fit(model, Repeated(data, steps + 6))
            return callback.seconds / steps

        fit(False)
        pairs = [(fit(False), fit(True)) for _ in range(3)]
        ratios = sorted(ours / bare for bare, ours in pairs)
        step = statistics.median(bare for bare, _ in pairs)
        print(
            f"| online mode, {name}, batch {batch} | {1e3 * step:.2f} ms | {ratios[1]:.3f} "
            f"({ratios[0]:.3f} to {ratios[-1]:.3f}) | |",
            flush=True,
        )


def tokens() -> None:
    """The exact pass of a GPT-2 in bfloat16, every token a sample; the first batches hold all tokens.

    Passes of both lengths see all classes, so their ``compute()`` takes the same time.
    """
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config()).to(DEVICE, torch.bfloat16).eval()

    words = torch.arange(14 * 16 * 1024, device=DEVICE) % model.config.vocab_size
    data = [{"input_ids": rows} for rows in words.view(14, 16, 1024)]

    def bare(count: int) -> None:
        with torch.no_grad():
            for batch in data[:count]:
                model(**batch)

    def ours(count: int) -> None:
        measure(model, data[:count], target_fn="next_token", progress=False)

    passes("exact pass, GPT-2 (K = 50,257, d = 768), batch of 16,384 tokens", bare, ours, 4, 14)


def vocabulary() -> None:
    """Time and memory of update and compute, for the vocabularies of GPT-2 and Llama 3."""
    print("\n| K | d | state, MB | update with 16,384 samples | peak / state | `compute()` | peak / state |")
    print("|" + "---|" * 7)
    for classes, features in ((50_257, 768), (128_256, 4096)):
        with torch.device(DEVICE):
            metric = NeuralCollapse(classes, features, metrics=("nc1", "nc2_etf_centered", "nc2_of"))
        state = 8 * classes * features + 8 * features**2
        rows, target = torch.randn(16_384, features, device=DEVICE), torch.arange(16_384, device=DEVICE)
        for start in range(0, classes, len(target)):
            metric.update(rows + start, (target + start) % classes)
        cells = []
        for function, repeats in (
            (lambda metric=metric, rows=rows, target=target: metric.update(rows, target), 20),
            (metric.compute, 1),
        ):
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            seconds = clock(lambda function=function, repeats=repeats: [function() for _ in range(repeats)]) / repeats
            peak = 1 + (torch.cuda.max_memory_allocated() - before) / state
            cells += [f"{1e3 * seconds:.1f} ms", f"{peak:.2f}"]
        print(f"| {classes:,} | {features:,} | {state / 1e6:,.0f} | " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")
    torch.backends.cudnn.benchmark = True
    parts = {"exact": exact, "online": online, "tokens": tokens, "vocabulary": vocabulary}
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}")
    print("| | bare | ratio | once |\n|---|---|---|---|")
    for name in sys.argv[1:] or parts:
        parts[name]()
