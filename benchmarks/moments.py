"""Cost of the statistics and of the formulas, each as a ratio to a stated baseline in the same run.

python benchmarks/moments.py
"""

import time
from collections.abc import Callable

import torch

from lightning_nc import NC1
from lightning_nc.functional.table import evaluate
from lightning_nc.moments import ClassMoments

BATCHES = 16


def seconds_of(*functions: Callable[[], object], repeats: int) -> list[float]:
    """The median time of each function; they take turns, so that a slow moment of the machine meets them all."""
    for function in functions:
        function()  # warm up
    times: list[list[float]] = [[] for _ in functions]
    for _ in range(repeats):
        for taken, function in zip(times, functions, strict=True):
            start = time.perf_counter()
            function()
            taken.append(time.perf_counter() - start)
    return [sorted(taken)[repeats // 2] for taken in times]


def update(classes: int, batch: int = 256, features: int = 2048) -> None:
    """``NC1.update`` against the bare float32 product that any scatter matrix needs."""
    rows = [torch.randn(batch, features) for _ in range(BATCHES)]
    target = [torch.randint(classes, (batch,)) for _ in range(BATCHES)]
    metric = NC1(classes, features)
    total = torch.zeros(features, features)

    def ours() -> None:
        for h, y in zip(rows, target, strict=True):
            metric.update(h, y)

    def bare() -> None:
        for h in rows:
            torch.mm(h.T, h, out=total)

    mine, product = seconds_of(ours, bare, repeats=7)
    print(
        f"update, K = {classes}, B = {batch}, d = {features}: {1e3 * mine / BATCHES:.1f} ms, bare float32 product "
        f"{1e3 * product / BATCHES:.1f} ms: {product / mine:.2f} of its speed"
    )


def compute(classes: int = 1000, features: int = 2048, samples: int = 8192) -> None:
    """``compute`` against the float32 pseudoinverse of the d x d between-class covariance."""
    moments = ClassMoments.zeros(classes, features)
    target = torch.arange(samples) % classes
    moments.update(torch.randn(classes, features)[target] + torch.randn(samples, features), target)
    centered = (moments.means - moments.means.mean(dim=0)).float()
    covariance = centered.T @ centered / classes
    mine, pinv = seconds_of(lambda: evaluate(("nc1",), moments), lambda: torch.linalg.pinv(covariance), repeats=3)
    print(
        f"compute of NC1, K = {classes}, d = {features}: {mine:.2f} s, float32 pinv of the d x d matrix {pinv:.2f} s: "
        f"{pinv / mine:.1f} times as fast"
    )


def memory(features: int = 512, classes: int = 100, batch: int = 256) -> None:
    """Size of the state after one batch and after a thousand."""
    metric = NC1(classes, features)
    sizes = []
    for count in (1, 1000):
        for _ in range(count):
            metric.update(torch.randn(batch, features), torch.randint(classes, (batch,)))
        sizes.append(sum(state.numel() * state.element_size() for state in metric.metric_state.values()))
    print(
        f"state after 1 and 1001 batches: {sizes[0] / 2**20:.1f} and {sizes[1] / 2**20:.1f} MiB: {sizes[1] / sizes[0]:.2f}"
    )


if __name__ == "__main__":
    print(f"{torch.get_num_threads()} threads")
    torch.zeros(2**26)  # freed at once: the allocator then keeps large blocks, as it does after any step of training
    update(classes=10)
    update(classes=1000)
    memory()
    compute()
