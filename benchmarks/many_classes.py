"""Time and peak memory of the default metrics with 50,000 classes, where a K x K matrix would take 20 GB.

python benchmarks/many_classes.py
"""

import resource
import time

import torch

from lightning_nc import NeuralCollapse


def peak() -> float:
    """Peak resident memory of this process so far, in GB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


def run(classes: int = 50_000, features: int = 1024, per_class: int = 3, batch: int = 2000) -> None:
    """Gaussian classes in random order, one pass; then all metrics from the state."""
    centers = torch.randn(classes, features)
    metric = NeuralCollapse(classes, features, weight=centers + 0.1 * torch.randn(classes, features))
    print(f"K = {classes}, d = {features}: {peak():.1f} GB before the first batch")
    target = torch.arange(classes).repeat(per_class)[torch.randperm(classes * per_class)]
    took = 0.0
    for labels in target.split(batch):
        rows = centers[labels] + 0.1 * torch.randn(len(labels), features)
        start = time.perf_counter()
        metric.update(rows, labels)
        took += time.perf_counter() - start
    print(f"update: {1e3 * took / len(target.split(batch)):.0f} ms a batch of {batch}, peak memory {peak():.1f} GB")
    start = time.perf_counter()
    values = metric.compute()
    print(f"compute: {time.perf_counter() - start:.1f} s, peak memory {peak():.1f} GB")
    print(", ".join(f"{name} {float(value):.4g}" for name, value in values.items()))


if __name__ == "__main__":
    print(f"{torch.get_num_threads()} threads")
    run()
