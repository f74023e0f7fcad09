"""Cost of the exact pass over a data set, as a ratio to the bare forward pass over the same data; and its peak memory.

python benchmarks/exact_pass.py
"""

import resource
import subprocess
import sys
import time
from collections.abc import Iterator
from typing import Any

import torch
import torchvision
import transformers
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from tqdm import tqdm

from lightning_nc import measure
from lightning_nc.functional import METRICS


def resnet18() -> nn.Module:
    """The standard network for 32x32 images: 3x3 first convolution, no max-pool."""
    model = torchvision.models.resnet18(num_classes=10)
    model.conv1 = nn.Conv2d(3, 64, 3, padding=1, bias=False)
    model.maxpool = nn.Identity()
    return model.eval()


def images(count: int) -> DataLoader:
    """Random images: what they show makes no difference to the cost."""
    return DataLoader(TensorDataset(torch.randn(count, 3, 32, 32), torch.arange(count) % 10), 128)


def one_pass() -> list[str]:
    """The names of all metrics that need no second look at the samples."""
    return [name for name, spec in METRICS.items() if not (spec.samples or spec.opt_in)]


def cost(title: str, layers: list[str] | None = None, count: int = 1024, repeats: int = 5, **arguments: Any) -> None:
    """Time of ``measure`` with these arguments, and of the bare forward pass, taking turns."""
    model, loader = resnet18(), images(count)

    def bare() -> None:
        with torch.no_grad():
            for rows, _ in loader:
                model(rows)

    def ours() -> None:
        measure(model, loader, progress=False, classifier="fc", layers=layers, **arguments)

    ratios, times = [], []
    bare()
    for _ in range(repeats):
        start = time.perf_counter()
        bare()
        middle = time.perf_counter()
        ours()
        end = time.perf_counter()
        ratios.append((end - middle) / (middle - start))
        times.append(middle - start)
    middle = sorted(ratios)[repeats // 2]
    print(
        f"exact pass of ResNet18, {title}, over {count} images of 32x32: {middle:.3f} times the bare "
        f"forward pass ({sorted(times)[repeats // 2]:.2f} s); between {min(ratios):.3f} and {max(ratios):.3f}"
    )


def tokens(count: int = 12, length: int = 1024) -> None:
    """Time of a pass over the tokens of a GPT-2, every token a sample; the bare forward pass runs before each of its steps.

    Time of one core, on one thread: what else the machine does counts less.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config()).eval()
    times: list[tuple[float, float]] = []

    def batches() -> Iterator[dict[str, torch.Tensor]]:
        for _ in tqdm(range(count), "GPT-2"):
            batch = {"input_ids": torch.randint(model.config.vocab_size, (1, length))}
            start = time.process_time()
            with torch.no_grad():
                model(**batch)
            middle = time.process_time()
            yield batch  # comes back after the step of the pass
            times.append((middle - start, time.process_time() - middle))

    start = time.process_time()
    measure(model, batches(), target_fn="next_token", progress=False)
    total = time.process_time() - start
    bare, ours = (sorted(column)[count // 2] for column in zip(*times, strict=True))
    ratios = sorted(mine / forward for forward, mine in times)
    once = (
        total - sum(map(sum, times)) + times[0][1] - ours
    )  # the trial before the first step, and what follows the last one
    torch.set_num_threads(threads)
    print(
        f"exact pass of GPT-2 (K = 50,257, d = 768), every token a sample: {ratios[count // 2]:.3f} times the bare forward pass "
        f"({bare:.2f} s for {length} tokens); most between {ratios[count // 4]:.3f} and {ratios[3 * count // 4]:.3f}; besides "
        f"{once:.1f} s once, which is {once / bare / 128:.3f} of the forward pass over {128 * length:,} tokens"
    )


def peak(batches: int, metrics: str = "paper", budget: float = 2**30) -> int:
    """Peak resident memory in MiB of a fresh process that measures a small model over that many generated batches."""
    call = f"exact_pass.stream({batches}, {metrics!r}, {budget})"
    program = f"import sys; sys.path.insert(0, {__file__.rsplit('/', 1)[0]!r}); import exact_pass; {call}"
    return int(subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True).stdout)


class Generated:
    """Batches that are made anew, the same ones each time."""

    def __init__(self, batches: int) -> None:
        self.batches = batches

    def __iter__(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        generator = torch.Generator().manual_seed(0)
        for _ in range(self.batches):
            yield torch.randn(256, 512, generator=generator), torch.randint(10, (256,), generator=generator)


def stream(batches: int, metrics: str, budget: float) -> None:
    """Measure over generated batches and print the peak memory."""
    measure(nn.Linear(512, 10), Generated(batches), progress=False, metrics=metrics, feature_budget=budget)
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024)


if __name__ == "__main__":
    print(f"{torch.get_num_threads()} threads")
    few, many = peak(20), peak(2000)
    print(f"peak memory over 5,120 and 512,000 samples: {few} and {many} MiB: {many / few:.2f}")
    layers = ["layer1", "layer2", "layer3", "layer4"]
    twice, none, kept = peak(1000, "all", 0), peak(1000, "all", 2**27), peak(1000, "all", 2**30)
    print(
        f"all metrics over 256,000 samples of 512 features, 500 MiB: peak of {twice} MiB with a feature budget of 0, {none} MiB "
        f"with one of 128 MiB (both in two passes), {kept} MiB with one of 1 GiB (kept)"
    )
    cost("the paper's six")
    cost("the paper's six and 4 layers", layers)
    cost("all metrics that one pass gives", metrics=one_pass())
    cost("all metrics, with samples compared at 5 layers", layers, metrics="all")
    cost("the same in two passes", layers, metrics="all", feature_budget=0)
    tokens()
