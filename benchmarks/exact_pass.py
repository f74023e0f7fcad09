"""Cost of the exact pass over a data set, as a ratio to the bare forward pass over the same data; and its memory. See costs.py.

Times are those of one core, on one thread: what else the machine does counts less.
"""

import subprocess
import sys
import time
from collections.abc import Iterator
from typing import Any

import torch
import torchvision
import transformers
from pages import table
from scale import memory
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

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


LAYERS = ["layer1", "layer2", "layer3", "layer4"]
PASSES: dict[str, dict[str, Any]] = {
    "the paper's six": {},
    "the same and 4 layers": {"layers": LAYERS},
    "all metrics that one pass gives": {"metrics": one_pass()},
    "all metrics, with samples compared at 5 layers": {"layers": LAYERS, "metrics": "all"},
    "the same in two passes": {"layers": LAYERS, "metrics": "all", "feature_budget": 0},
}


def passes_table(count: int = 384, repeats: int = 3) -> str:
    """Time of ``measure`` over the bare forward pass of ResNet18, which take turns."""
    model, loader, rows = resnet18(), images(count), []

    def bare() -> None:
        with torch.no_grad():
            for batch, _ in loader:
                model(batch)

    bare()
    for title, arguments in PASSES.items():
        print(f"  {title}", file=sys.stderr, flush=True)
        ratios, times = [], []
        for _ in range(repeats):
            start = time.process_time()
            bare()
            middle = time.process_time()
            measure(model, loader, progress=False, classifier="fc", **arguments)
            ratios.append((time.process_time() - middle) / (middle - start))
            times.append(middle - start)
        low, ratio, *_, high = sorted(ratios)
        rows.append([title, f"{ratio:.3f}", f"{low:.3f} to {high:.3f}", f"{sorted(times)[repeats // 2]:.1f} s"])
    return table([f"ResNet18, {count} images of 32x32", "ratio", "of three", "bare forward pass"], rows)


def tokens_table(count: int = 8, length: int = 1024) -> str:
    """Time of a pass over the tokens of a GPT-2, every token a sample; the bare forward pass runs before each of its steps."""
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config()).eval()
    times: list[tuple[float, float]] = []

    def batches() -> Iterator[dict[str, torch.Tensor]]:
        for _ in range(count):
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
    # The trial before the first step, and what follows the last one.
    once = total - sum(map(sum, times)) + times[0][1] - ours
    spread = f"{ratios[count // 4]:.3f} to {ratios[3 * count // 4]:.3f}"
    share = f"{once:.1f} s, {once / bare / 128:.3f} of a forward pass over {128 * length:,} tokens"
    head = [
        f"GPT-2, K = 50,257, d = 768, {length:,} tokens a step",
        "ratio",
        f"half of {count} steps",
        "bare step",
        "once",
    ]
    return table(head, [["the paper's six", f"{ratios[count // 2]:.3f}", spread, f"{bare:.1f} s", share]])


def layers_table(width: int = 512, count: int = 4096) -> str:
    """Time beside the bare forward pass, and state, against the number of layers that are measured."""
    depth = 8
    blocks = [nn.Sequential(nn.Linear(width, width), nn.ReLU()) for _ in range(depth)]
    model = nn.Sequential(*blocks, nn.Linear(width, 10)).eval()
    loader = DataLoader(TensorDataset(torch.randn(count, width), torch.arange(count) % 10), 256)
    rows, first = [], 0.0
    for layers in (0, 1, 2, 4, 8):
        names = [str(place) for place in range(layers)]
        times = []
        for _ in range(5):
            start = time.process_time()
            measure(model, loader, layers=names, progress=False)
            times.append(time.process_time() - start)
        taken = min(times)
        first = first or taken
        state = (layers + 1) * (8 * 10 * width + 8 * width**2) / 1e6
        rows.append([f"{layers}", f"{taken / first:.2f}", f"{state:.0f}"])
    return table(
        [f"layers of {width} features besides the classifier's input", "time / that of none", "state, MB"], rows
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
    print(memory("VmHWM") // 2**20)


def memory_table() -> str:
    """Peak memory of a whole process against the number of samples, and against what is kept for a second look at them."""
    few = peak(20)
    rows = [
        ["the paper's six", f"{256 * count:,}", f"{found}", f"{found / few:.2f}"]
        for count, found in ((20, few), (200, peak(200)), (2000, peak(2000)))
    ]
    for title, budget in (("two passes: `feature_budget=0`", 0), ("features kept: `feature_budget=2**30`", 2**30)):
        found = peak(1000, "all", budget)
        rows.append([f"all metrics, {title}", "256,000", f"{found}", f"{found / few:.2f}"])
    return table(["512 features, 10 classes", "samples", "peak of the process, MiB", "ratio"], rows)
