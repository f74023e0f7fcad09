"""Cost of the exact pass over a data set, as a ratio to the bare forward pass over the same data; and its peak memory.

python benchmarks/exact_pass.py
"""

import resource
import subprocess
import sys
import time

import torch
import torchvision
import transformers
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from tqdm import tqdm

from lightning_nc import measure


def resnet18() -> nn.Module:
    """The standard network for 32x32 images: 3x3 first convolution, no max-pool."""
    model = torchvision.models.resnet18(num_classes=10)
    model.conv1 = nn.Conv2d(3, 64, 3, padding=1, bias=False)
    model.maxpool = nn.Identity()
    return model.eval()


def images(count: int) -> DataLoader:
    """Random images: what they show makes no difference to the cost."""
    return DataLoader(TensorDataset(torch.randn(count, 3, 32, 32), torch.arange(count) % 10), 128)


def cost(layers: list[str] | None = None, count: int = 1024, repeats: int = 5) -> None:
    """Time of ``measure``, with layers or without, and of the bare forward pass, taking turns."""
    model, loader = resnet18(), images(count)

    def bare() -> None:
        with torch.no_grad():
            for rows, _ in loader:
                model(rows)

    def ours() -> None:
        measure(model, loader, progress=False, classifier="fc", layers=layers)

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
        f"exact pass of ResNet18 with {len(layers or [])} layers over {count} images of 32x32: {middle:.3f} times the bare "
        f"forward pass ({sorted(times)[repeats // 2]:.2f} s); between {min(ratios):.3f} and {max(ratios):.3f}"
    )


def tokens(few: int = 2, many: int = 10, length: int = 1024, repeats: int = 3) -> None:
    """Time of a pass over the tokens of a GPT-2, every token a sample, and of the bare forward pass, taking turns.

    Two passes of different lengths tell the cost of a token from what is paid once: the trial, ``compute`` and the like.
    """
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config()).eval()
    batches = [{"input_ids": torch.randint(model.config.vocab_size, (1, length))} for _ in range(many)]
    times: dict[int, list[tuple[float, float]]] = {few: [], many: []}
    for count in tqdm([few, *[few, many] * repeats], "passes over GPT-2"):
        start = time.perf_counter()
        with torch.no_grad():
            for batch in batches[:count]:
                model(**batch)
        middle = time.perf_counter()
        measure(model, batches[:count], target_fn="next_token", progress=False)
        times[count].append((middle - start, time.perf_counter() - middle))
    pairs = list(zip(times[few][1:], times[many], strict=True))  # the first pass warms up
    bare = [(long[0] - short[0]) / (many - few) for short, long in pairs]
    ours = [(long[1] - short[1]) / (many - few) for short, long in pairs]
    once = sorted(long[1] - many * each for (_, long), each in zip(pairs, ours, strict=True))[repeats // 2]
    ratios, forward = sorted(mine / each for mine, each in zip(ours, bare, strict=True)), sorted(bare)[repeats // 2]
    print(
        f"exact pass of GPT-2 (K = 50,257, d = 768), every token a sample: {ratios[repeats // 2]:.3f} times the bare forward "
        f"pass ({forward:.2f} s for {length} tokens); between {ratios[0]:.3f} and {ratios[-1]:.3f}; besides {once:.1f} s once, "
        f"which is {once / forward / 128:.3f} of the forward pass over {128 * length:,} tokens"
    )


def peak(batches: int) -> int:
    """Peak resident memory in MiB of a fresh process that measures a small model over that many generated batches."""
    program = f"import sys; sys.path.insert(0, {__file__.rsplit('/', 1)[0]!r}); import exact_pass; exact_pass.stream({batches})"
    return int(subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True).stdout)


def stream(batches: int) -> None:
    """Measure over generated batches and print the peak memory."""
    generated = ((torch.randn(256, 512), torch.randint(10, (256,))) for _ in range(batches))
    measure(nn.Linear(512, 10), generated, progress=False)
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024)


if __name__ == "__main__":
    print(f"{torch.get_num_threads()} threads")
    few, many = peak(20), peak(2000)
    print(f"peak memory over 5,120 and 512,000 samples: {few} and {many} MiB: {many / few:.2f}")
    cost()
    cost(["layer1", "layer2", "layer3", "layer4"])
    tokens()
