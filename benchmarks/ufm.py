"""How much faster the UFM example is than a naive loop: ratios measured in one run, on one thread.

    python benchmarks/ufm.py [--iterations 40000]

The naive loop uses autograd, torch.optim.SGD and explicit penalties in float32. The example runs in float64, through the
Trainer, with NeuralCollapseCallback, logging and progress bar. The time of ten seeds together includes their measurements.
"""

import argparse
import logging
import statistics
import sys
import time
import warnings
from dataclasses import replace
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
import ufm
from ufm_options import FIGURES, Configuration

TARGETS = {1: 6.0, 3: 4.0, 4: 3.5}


def naive(c: Configuration, steps: int) -> float:
    """Seconds per step of the loop that one would write first."""
    start = ufm.build(c)
    W, H = (x.detach().float().requires_grad_() for x in (start.classifier.weight, start.features.T.contiguous()))
    factors = [(W, c.lambda_w), (H, c.lambda_h)]
    if c.model != "plain":
        W1 = start.hidden.weight.detach().float().requires_grad_()
        factors.append((W1, c.lambda_w1))
    Y = torch.eye(c.num_classes).repeat_interleave(c.samples_per_class, dim=1)
    optimizer = torch.optim.SGD([x for x, _ in factors], lr=c.step)
    begin = time.perf_counter()
    for _ in range(steps):
        deepest = H if c.model == "plain" else W1 @ H
        if c.model == "relu":
            deepest = deepest.relu()
        loss = ((W @ deepest - Y) ** 2).sum() / (2 * Y.shape[1])
        loss = loss + sum(weight / 2 * (x**2).sum() for x, weight in factors)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return (time.perf_counter() - begin) / steps


def through_the_trainer(c: Configuration) -> float:
    """Seconds per step of the example."""
    begin = time.perf_counter()
    ufm.run(c, 0)
    return (time.perf_counter() - begin) / c.iterations


def together(c: Configuration, seeds: int) -> float:
    """Seconds per step and seed of many seeds together."""
    begin = time.perf_counter()
    ufm.run_together([c] * seeds, list(range(seeds)))
    return (time.perf_counter() - begin) / c.iterations / seeds


def main() -> None:
    """Print one line per figure."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--iterations", type=int, default=40_000)
    parser.add_argument("--repeats", type=int, default=5, help="number of rounds; medians are printed, with the spread")
    options = parser.parse_args()
    iterations, repeats = options.iterations, options.repeats
    torch.set_num_threads(1)
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", message=".*does not have many workers.*")
    ufm.run(replace(FIGURES[1], iterations=1000), 0)  # warm-up: keep what is paid once per process out of the ratios
    naive(FIGURES[1], 200)
    for figure, target in TARGETS.items():
        c = replace(FIGURES[figure], iterations=iterations, every=1000)
        # The three take turns, so that other load on the machine slows all of them alike.
        rounds = [
            (naive(c, 4000), through_the_trainer(c), together(replace(c, iterations=iterations // 4), 10))
            for _ in range(repeats)
        ]
        slow, fast, many = (statistics.median(column) for column in zip(*rounds, strict=True))
        spread = [f"{1e6 * min(column):.1f} to {1e6 * max(column):.1f}" for column in zip(*rounds, strict=True)]
        print(
            f"figure {figure}: naive {1e6 * slow:.0f} us ({spread[0]}), Trainer {1e6 * fast:.1f} us ({spread[1]}) "
            f"= {slow / fast:.1f}x (wanted {target}x), 10 seeds {1e6 * many:.1f} us per seed ({spread[2]}) "
            f"= {fast / many:.1f}x better still (wanted 2x), {slow / many:.1f}x the naive loop (wanted {2 * target}x)"
        )


if __name__ == "__main__":
    main()
