"""Memory and time of update, synchronization and compute for many classes, next to their lower bounds. See costs.py."""

import ctypes
import math
import socket
import sys
import time
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from pages import table

from lightning_nc import NeuralCollapse

BATCH = 4096


class Case(NamedTuple):
    """Classes, features, samples a rank, and ranks; ``whole``: the six metrics, else without the weight and the copy."""

    classes: int
    features: int
    samples: int = 4 * BATCH
    ranks: int = 2
    whole: bool = True

    @property
    def state(self) -> int:
        """Bytes of the class means and the scatter matrix."""
        return 8 * self.classes * self.features + 8 * self.features**2


SIZES = [Case(10, 512), Case(1000, 2048), Case(50_257, 768)]
LARGE = [Case(32_064, 4096, samples=2 * BATCH), Case(128_256, 4096, samples=2 * BATCH, whole=False)]


def memory(entry: str) -> int:
    """Bytes of this process: resident now (VmRSS), or at the most since the last reset (VmHWM). Linux only."""
    with open("/proc/self/status") as file:
        line = next(line for line in file if line.startswith(entry))
    return 1024 * int(line.split()[1])


def cost(function: Callable[[], object]) -> tuple[float, int]:
    """Seconds of one core that a call takes, and bytes of memory that it takes besides what is there.

    Time of the process, not of the clock: waiting for the other rank does not count.
    """
    ctypes.CDLL(None).malloc_trim(0)  # gives memory that was freed back, which the call would use again
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")  # resets the peak
    before, start = memory("VmRSS"), time.process_time()
    function()
    return time.process_time() - start, memory("VmHWM") - before


def product_rate(size: int = 2048) -> float:
    """Floating-point operations a second of a bare float64 product."""
    rows = torch.randn(size, size, dtype=torch.float64)
    torch.mm(rows, rows)
    return 2 * size**3 / min(cost(lambda: torch.mm(rows, rows))[0] for _ in range(3))


def rank_costs(rank: int, case: Case, port: int, queue: "mp.SimpleQueue[dict[str, float]]") -> None:
    """What one rank measures; the first one reports it."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"tcp://127.0.0.1:{port}", rank=rank, world_size=case.ranks)
    torch.manual_seed(rank)
    features, target = torch.randn(BATCH, case.features), torch.randint(case.classes, (BATCH,))
    features += torch.randn(case.classes, 1)[target]
    weight = torch.randn(case.classes, case.features) if case.whole else None
    metric = NeuralCollapse(case.classes, case.features, weight, sync_on_compute=False)
    for state in metric.metric_state.values():
        state.add_(0)  # memory counts once it is written to
    metric.update(features, target)
    metric.update(torch.zeros(case.classes, 1).expand(-1, case.features), torch.arange(case.classes))  # all are seen
    found = {"rate": product_rate()}

    def update() -> None:
        for _ in range(case.samples // BATCH):
            metric.update(features, target)

    for name, function in {"update": update, "sync": metric.sync, "merge": metric.merge_over_ranks}.items():
        if name == "sync" and not case.whole:
            continue
        dist.barrier()
        found[name], found[f"{name} bytes"] = cost(function)
        if name == "sync":
            metric.unsync()
    if rank:
        metric.to("meta")  # makes room
    dist.barrier()
    if rank == 0:
        found["compute"], found["compute bytes"] = cost(metric.compute)
        queue.put(found)
    dist.barrier()
    dist.destroy_process_group()


def run(case: Case) -> dict[str, float]:
    """The costs of the first rank, in fresh processes."""
    print(f"K = {case.classes}, d = {case.features}, {case.ranks} ranks ...", file=sys.stderr, flush=True)
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    queue = mp.get_context("spawn").SimpleQueue()
    mp.spawn(rank_costs, (case, port, queue), nprocs=case.ranks)
    return queue.get()


def sizes_table(cases: list[Case]) -> str:
    """Time, next to its bound, and peak memory at each size."""
    rows = []
    for case in cases:
        found = run(case)
        classes, features, rate = case.classes, case.features, found["rate"]
        found["update"] *= 1000 / case.samples
        bounds = {
            "update": 1000 * features**2 / rate,
            "merge": classes * features**2 / rate,
            "sync": classes * features**2 / rate,
            "compute": 2 * classes * features * min(classes, features) / rate,
        }
        cells = [f"{classes:,}", f"{features:,}", f"{case.state / 1e6:,.0f}"]
        for name, bound in bounds.items():
            if name in found:
                extra = found[f"{name} bytes"]
                peak = f"{extra / 1e6:.0f}" if name == "update" else f"{1 + extra / case.state:.2f}"
                cells += [f"{seconds(found[name])} ({seconds(bound)})", peak]
            else:
                cells += ["", ""]
        rows.append(cells)
    steps = ["update with 1000 samples", "besides the state, MB", "merge of 2 ranks", "peak / state"]
    return table(["K", "d", "state, MB", *steps, "`sync()`", "peak / state", "`compute()`", "peak / state"], rows)


def growth_table(base: Case) -> str:
    """By which factor time and memory grow if one size doubles."""
    start, rows = run(base), []
    for name, field in {"K": "classes", "d": "features", "N": "samples", "ranks": "ranks"}.items():
        case = base._replace(**{field: 2 * getattr(base, field)})
        found = run(case)
        cells = [f"{found[key] / start[key]:.1f}" for key in ("update", "merge", "compute")]
        rows.append(
            [
                f"2 {name}",
                *cells,
                f"{case.state / base.state:.1f}",
                f"{found['merge bytes'] / start['merge bytes']:.1f}",
            ]
        )
    sizes = f"from K = {base.classes}, d = {base.features}, N = {base.samples} a rank, 2 ranks"
    return table([sizes, "update", "merge", "compute", "state", "memory of a merge"], rows)


def pairs_table(classes: int = 4096, target: int = 128_256, pairs: int = 20_000) -> str:
    """Metrics over pairs of classes: the time of a pair, and what all pairs of ``target`` classes would take."""
    rows = []
    for features in (512, 2048, 4096):
        labels = torch.arange(classes).repeat(2)
        samples = torch.randn(classes, features)[labels] + torch.randn(len(labels), features)
        for name in ("nc1_cdnv", "nc2_equiangular", "nc2_maxangle"):
            times = []
            for count in (None, pairs):
                metric = NeuralCollapse(classes, features, metrics=name, pairs=count)
                metric.update(samples, labels)
                times.append(cost(metric.compute)[0] / (count or math.comb(classes, 2)))
            every, drawn = seconds(times[0] * math.comb(target, 2)), seconds(1e7 * times[1])
            rows.append(
                [f"`{name}`", f"{features:,}", f"{1e9 * times[0]:.0f} ns", every, f"{1e6 * times[1]:.1f} us", drawn]
            )
    count = f"all {math.comb(target, 2):.2g} pairs of {target:,}"
    return table(["metric", "d", f"a pair of {classes:,} classes", count, "a random pair", "10 million of them"], rows)


def seconds(value: float) -> str:
    """A time with a unit that suits it."""
    for unit, size in (("h", 3600), ("min", 60), ("s", 1)):
        if value >= 2 * size or (unit == "s" and value >= 1):
            return f"{value / size:.1f} {unit}"
    return f"{1e3 * value:.3g} ms"
