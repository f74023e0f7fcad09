"""NC1 and CDNV as other implementations compute them, on the same features: error, time, memory, and what ends each.

python benchmarks/peers.py             # prints the tables of docs/peers.md, in two to three minutes of one core; 4 GB of memory
python benchmarks/peers.py --write     # and puts them into the page

Each function here computes what a paper or a package says that it computes, in the precision, the order and the number of passes
that it says, and was written anew. Factors between definitions are removed: see docs/conventions.md.
"""

import math
import platform
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import scipy
import torch
from pages import publish, table
from scale import cost
from scipy.sparse.linalg import svds
from torch import Tensor

from lightning_nc import NeuralCollapse

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
import reference

Batches = list[tuple[Tensor, Tensor]]

# ------------------------------------------------------------------------------------------------------------------ NC1


def papyan(batches: Batches, classes: int) -> float:
    """Papyan et al. (2020), Han et al. (2022), their notebook: two passes, class by class, the outer product of each sample."""
    sums, counts, within = [0] * classes, [0] * classes, 0
    for rows, target in batches:
        for k in target.unique().tolist():
            sums[k] = sums[k] + rows[target == k].sum(dim=0)
            counts[k] += int((target == k).sum())
    means = [total / count for total, count in zip(sums, counts, strict=True)]
    for rows, target in batches:
        for k in target.unique().tolist():
            deviations = rows[target == k] - means[k]
            within = within + (deviations[:, :, None] * deviations[:, None, :]).sum(dim=0)
    centered = torch.stack(means) - torch.stack(means).mean(dim=0)
    between = (centered.T @ centered / classes).numpy()
    start = np.random.default_rng(0).random(len(between))  # theirs is random, so that a value may vary from run to run
    vectors, values, _ = svds(between, k=classes - 1, v0=start)
    inverse = vectors / values @ vectors.T
    return float(np.trace((within / sum(counts)).numpy() @ inverse)) / classes


def zhu(batches: Batches, _: int) -> float:
    """Zhu et al. (2021): two passes, sample by sample; SciPy's pseudoinverse with its default cutoff."""
    sums, counts, total, within = {}, {}, 0, 0
    for rows, target in batches:
        total = total + rows.sum(dim=0)
        for row, k in zip(rows, target.tolist(), strict=True):
            sums[k] = sums[k] + row if k in sums else row.clone()
            counts[k] = counts.get(k, 0) + 1
    samples = sum(counts.values())
    for rows, target in batches:
        for row, k in zip(rows, target.tolist(), strict=True):
            deviation = row - sums[k] / counts[k]
            within = within + torch.outer(deviation, deviation)
    between = 0
    for k in range(len(sums)):
        separation = sums[k] / counts[k] - total / samples
        between = between + torch.outer(separation, separation)
    inverse = scipy.linalg.pinv((between / len(sums)).numpy())
    return float(np.trace((within / samples).numpy() @ inverse)) / len(sums)


def neural_collapse(batches: Batches, classes: int, dtype: torch.dtype = torch.float32) -> float:
    """The package neural_collapse: two passes, one-hot products, accumulators of ``dtype``; the pseudoinverse of torch."""
    width, eps = batches[0][0].shape[1], torch.finfo(dtype).eps
    sums, counts = torch.zeros(classes, width, dtype=dtype), torch.zeros(classes, dtype=dtype)
    within = torch.zeros(width, width, dtype=dtype)
    for rows, target in batches:
        one_hot = torch.nn.functional.one_hot(target, classes).to(dtype)
        sums += one_hot.T @ rows.to(dtype)
        counts += one_hot.sum(dim=0)
    means = sums / (counts[:, None] + eps)
    for rows, target in batches:
        deviations = rows - means[target]
        within += deviations.T @ deviations
    centered = means - means.mean(dim=0)
    inverse = torch.linalg.pinv(centered.T @ centered / classes)
    return float(torch.trace(inverse @ (within / (counts.sum() + eps)))) / classes


def neural_collapse_double(batches: Batches, classes: int) -> float:
    """The same with its option ``dtype=torch.float64``."""
    return neural_collapse(batches, classes, torch.float64)


def toolbox(batches: Batches, _: int) -> float:
    """The package nc-toolbox: all features in one array, class by class; NumPy's pseudoinverse with its default cutoff."""
    rows, target = (torch.cat(parts).numpy() for parts in zip(*batches, strict=True))
    seen = np.unique(target)
    means = np.empty((len(seen), rows.shape[1]))
    deviations = np.empty_like(rows)
    for place, k in enumerate(seen):
        means[place] = rows[target == k].mean(axis=0)
    for k in seen:
        deviations[target == k] = rows[target == k] - means[k]
    separation = means - rows.mean(axis=0)
    between = separation.T @ separation / len(seen)
    return float(np.trace(deviations.T @ deviations / len(rows) @ np.linalg.pinv(between))) / len(seen)


def raw_sums(batches: Batches, classes: int) -> float:
    """One pass over sums and squares in float32, with which no published code is named: E[hh'] minus the class means."""
    width = batches[0][0].shape[1]
    sums, counts, squares = torch.zeros(classes, width), torch.zeros(classes), torch.zeros(width, width)
    for rows, target in batches:
        rows = rows.float()
        sums.index_add_(0, target, rows)
        counts += target.bincount(minlength=classes)
        squares += rows.T @ rows
    means = sums / counts[:, None]
    centered = means - means.mean(dim=0)
    within = (squares - (means * counts[:, None]).T @ means) / counts.sum()
    return float(torch.trace(within @ torch.linalg.pinv(centered.T @ centered / classes))) / classes


def ours(batches: Batches, classes: int, name: str = "nc1") -> float:
    """One pass of this library's metric."""
    metric = NeuralCollapse(classes, batches[0][0].shape[1], metrics=name)
    for rows, target in batches:
        metric.update(rows, target)
    return metric.compute()[name].item()


def in_double(function: Callable[[Batches, int], float]) -> Callable[[Batches, int], float]:
    """The same of features that are converted to float64 first."""
    return lambda batches, classes: function([(rows.double(), target) for rows, target in batches], classes)


NC1 = {
    "Papyan, Han": papyan,
    "Papyan, Han, float64": in_double(papyan),
    "Zhu": zhu,
    "Zhu, float64": in_double(zhu),
    "neural_collapse": neural_collapse,
    "neural_collapse, float64": neural_collapse_double,
    "nc-toolbox": toolbox,
    "nc-toolbox, float64": in_double(toolbox),
    "raw sums": raw_sums,
    "ours": ours,
}

# ----------------------------------------------------------------------------------------------------------------- CDNV


def galanti(batches: Batches, classes: int) -> float:
    """Galanti et al. (2021), their code: one pass, the variance as a difference of two squares, a loop over the pairs."""
    sums, squares, counts = [0] * classes, [0] * classes, [0] * classes
    for rows, target in batches:
        for k in target.unique().tolist():
            own = rows[target == k]
            sums[k], squares[k] = sums[k] + own.sum(dim=0), squares[k] + own.square().sum()
            counts[k] += len(own)
    means = [total / count for total, count in zip(sums, counts, strict=True)]
    total = 0.0
    for i in range(classes):
        for j in range(i + 1, classes):
            spread = [abs(float(squares[k] / counts[k]) - float(means[k].square().sum())) for k in (i, j)]
            total += sum(spread) / 2 / float((means[i] - means[j]).norm()) ** 2
    return total / math.comb(classes, 2)


def neural_collapse_cdnv(batches: Batches, classes: int) -> float:
    """The package neural_collapse: two passes in float32, and a grid of all pairs in tiles."""
    width = batches[0][0].shape[1]
    sums, counts, spread = torch.zeros(classes, width), torch.zeros(classes), torch.zeros(classes)
    for rows, target in batches:
        one_hot = torch.nn.functional.one_hot(target, classes).float()
        sums += one_hot.T @ rows.float()
        counts += one_hot.sum(dim=0)
    means = sums / (counts[:, None] + torch.finfo().eps)
    for rows, target in batches:
        one_hot = torch.nn.functional.one_hot(target, classes).float()
        spread += (one_hot.T @ (rows - means[target]).square()).sum(dim=1)
    variance, total = spread / (counts + torch.finfo().eps), 0.0
    for first, own in zip(means.split(64), variance.split(64), strict=True):
        for second, other in zip(means.split(64), variance.split(64), strict=True):
            squares = (first[:, None] - second).square().sum(dim=2)
            values = (own[:, None] + other) / 2 / squares
            total += float(values[squares > 0].sum())
    return total / (classes * (classes - 1))


def toolbox_cdnv(batches: Batches, _: int) -> float:
    """The package nc-toolbox: all features and all pairs at once; a variance divided by N_k - 1, which is converted."""
    rows, target = (torch.cat(parts).numpy() for parts in zip(*batches, strict=True))
    seen, counts = np.unique(target, return_counts=True)
    means, variance = np.empty((len(seen), rows.shape[1])), np.empty(len(seen))
    for place, k in enumerate(seen):
        means[place] = rows[target == k].mean(axis=0)
    for place, k in enumerate(seen):
        variance[place] = np.square(rows[target == k] - means[k]).sum() / (counts[place] - 1)
    first, second = np.triu_indices(len(seen), k=1)
    values = (variance[first] + variance[second]) / (2 * np.square(means[first] - means[second]).sum(axis=1))
    return float(values.mean()) * (counts[0] - 1) / counts[0]


CDNV = {
    "Galanti": galanti,
    "Galanti, float64": in_double(galanti),
    "neural_collapse": neural_collapse_cdnv,
    "nc-toolbox": toolbox_cdnv,
    "nc-toolbox, float64": in_double(toolbox_cdnv),
    "ours": lambda batches, classes: ours(batches, classes, "nc1_cdnv"),
}


# ------------------------------------------------------------------------------------------------------------ NC2 and NC3


def class_means(batches: Batches, classes: int) -> Tensor:
    """Centered class means as sums of float32 features over counts, (K, d)."""
    sums = torch.zeros(classes, batches[0][0].shape[1])
    for rows, target in batches:
        sums.index_add_(0, target, rows)
    means = sums / torch.cat([target for _, target in batches]).bincount(minlength=classes)[:, None]
    return means - means.mean(dim=0)


def etf_error(batches: Batches, classes: int, weight: Tensor | None = None) -> float:
    """The package neural_collapse: the K x K Gram matrix (with ``weight``, its product with the means) against that of an ETF."""
    means = class_means(batches, classes)
    gram = (means if weight is None else weight) @ means.T
    etf = (torch.eye(classes) - 1 / classes) / math.sqrt(classes - 1)
    return float((gram / gram.norm() - etf).norm())


def duality(batches: Batches, classes: int, weight: Tensor) -> float:
    """Papyan et al. (2020): the distance of weight and class means, each of norm 1; theirs is the square."""
    means = class_means(batches, classes)
    return float((weight / weight.norm() - means / means.norm()).norm())


def coherence(batches: Batches, classes: int) -> float:
    """Papyan et al. (2020): how far the cosines between class means are from -1/(K - 1), on average."""
    means = torch.nn.functional.normalize(class_means(batches, classes))
    apart = ~torch.eye(classes, dtype=torch.bool)
    return float(((means @ means.T)[apart] + 1 / (classes - 1)).abs().mean())


# --------------------------------------------------------------------------------------------------------------- features


def clusters(
    classes: int, features: int, each: int, noise: float, dtype: torch.dtype = torch.float64
) -> tuple[Tensor, Tensor]:
    """Gaussian class means and samples, shuffled."""
    target = torch.arange(classes).repeat(each)[torch.randperm(classes * each)]
    means = torch.randn(classes, features, dtype=torch.float64)
    return (means[target] + noise * torch.randn(len(target), features, dtype=torch.float64)).to(dtype), target


def weak(noise: float = 1e-5) -> tuple[Tensor, Tensor]:
    """Ten classes that differ by 1 in eight directions and by 1e-4 in the ninth."""
    rows, target = clusters(10, 256, 100, 0)
    means = torch.stack([rows[target == k][0] for k in range(10)])
    center = means.mean(dim=0)
    left, values, right = torch.linalg.svd(means - center, full_matrices=False)
    values[8] = 1e-4 * values[0]
    means = center + left[:, :9] * values[:9] @ right[:9]
    return (means[target] + noise * torch.randn(len(target), 256, dtype=torch.float64)).float(), target


PLANE = "class means in a plane"


def plane() -> tuple[Tensor, Tensor]:
    """Samples in two dimensions. A linear map into more of them does not change NC1."""
    return clusters(10, 2, 100, 0.1)


def kinds() -> dict[str, tuple[Tensor, Tensor, int]]:
    """By what is special: features, labels, and the number of classes."""
    torch.manual_seed(0)
    points, labels = plane()
    flat = (points @ torch.randn(2, 256, dtype=torch.float64) + 3).float()
    missing = clusters(10, 256, 100, 0.3, torch.float32)
    missing = tuple(part[missing[1] != 4] for part in missing)
    offset, target = clusters(10, 256, 100, 0.3)
    return {
        "10 classes, 256 features": (*clusters(10, 256, 100, 0.3, torch.float32), 10),
        "100 classes": (*clusters(100, 256, 50, 0.3, torch.float32), 100),
        "1,000 classes, 1,024 features": (*clusters(1000, 1024, 5, 0.3, torch.float32), 1000),
        "100 classes, 64 features": (*clusters(100, 64, 50, 0.3, torch.float32), 100),
        "NC1 near 1e-8": (*clusters(10, 256, 100, 1e-3, torch.float32), 10),
        "NC1 near 1e-12": (*clusters(10, 256, 100, 1e-5, torch.float32), 10),
        "a direction 1e-4 as strong as the others": (*weak(), 10),
        PLANE: (flat, labels, 10),
        "an offset of 1,000": ((offset + 1000).float(), target, 10),
        "float16 features": (*clusters(10, 256, 100, 0.3, torch.float16), 10),
        "bfloat16 features": (*clusters(10, 256, 100, 0.3, torch.bfloat16), 10),
        "a class without samples": (*missing, 10),
    }


def batches_of(rows: Tensor, target: Tensor) -> Batches:
    """Batches of 256."""
    return list(zip(rows.split(256), target.split(256), strict=True))


# ----------------------------------------------------------------------------------------------------------------- tables


def error(function: Callable[[Batches, int], float], rows: Tensor, target: Tensor, classes: int, truth: float) -> str:
    """The relative error, or what was raised."""
    try:
        value = function(batches_of(rows, target), classes)
    except Exception as failure:
        return f"`{type(failure).__name__.strip('_')}`"
    return f"{abs(value / truth - 1):.0e}" if math.isfinite(value) else "nan"


def columns(functions: dict[str, Callable[[Batches, int], float]]) -> list[str]:
    """The names of the implementations."""
    return [name for name in functions if "float64" not in name]


def errors(functions: dict[str, Callable[[Batches, int], float]], *data: Any) -> list[str]:
    """A cell per implementation: the error with the features as they are given, and in float64 if there is a way to it."""
    found = {name: error(function, *data) for name, function in functions.items()}
    return [" / ".join(dict.fromkeys([found[n], found.get(f"{n}, float64", found[n])])) for n in columns(functions)]


def errors_of_nc1() -> str:
    """A row per kind of features, a column per implementation."""
    rows = []
    for name, (features, target, classes) in kinds().items():
        print(f"  {name}", file=sys.stderr, flush=True)
        truth = true_nc1(name, features, target)
        cells = errors(NC1, features, target, classes, truth)
        rows.append([name, f"{truth:.2g}", *cells])
    return table(["features", "NC1", *columns(NC1)], rows)


def errors_of_cdnv() -> str:
    """The same for CDNV."""
    rows = []
    for name, (features, target, classes) in kinds().items():
        if name in (PLANE, "a direction 1e-4 as strong as the others", "100 classes, 64 features"):
            continue  # CDNV looks in all directions alike
        truth = true_cdnv(features.double().numpy(), target.numpy())
        cells = errors(CDNV, features, target, classes, truth)
        rows.append([name, f"{truth:.2g}", *cells])
    return table(["features", "CDNV", *columns(CDNV)], rows)


def true_nc1(name: str, rows: Tensor, target: Tensor) -> float:
    """In float64; of a plane, before rounding fills the other dimensions."""
    if name == PLANE:
        torch.manual_seed(0)
        rows, target = plane()
    return reference.nc1_by_axes(rows.double().numpy(), target.numpy())


def true_cdnv(rows: np.ndarray, target: np.ndarray) -> float:
    """In float64, by its definition."""
    means, _, deviations, _, _ = reference.moments(rows, target)
    owner = np.searchsorted(np.unique(target), target)
    variance = np.bincount(owner, (deviations**2).sum(axis=1)) / np.bincount(owner)
    pairs = [
        (variance[i] + variance[i + 1 :]) / 2 / ((means[i] - means[i + 1 :]) ** 2).sum(axis=1)
        for i in range(len(means) - 1)
    ]
    return float(np.concatenate(pairs).mean())


def errors_of_frames() -> str:
    """NC2 and NC3, for few and for many classes."""
    rows = []
    for classes, features, each in ((10, 256, 100), (1000, 1024, 5)):
        torch.manual_seed(0)
        batches = batches_of(*clusters(classes, features, each, 0.3, torch.float32))
        weight = torch.randn(classes, features)
        metric = NeuralCollapse(
            classes, features, weight, metrics=("nc2_etf_centered", "nc2_maxangle", "nc3_gram", "nc3_centered")
        )
        for part in batches:
            metric.update(*part)
        found = {name: value.item() for name, value in metric.compute().items()}
        features64, target = (torch.cat(parts).numpy() for parts in zip(*batches, strict=True))
        truth = true_frames(features64, target, weight.double().numpy())
        theirs = {
            "nc2_etf_centered": etf_error(batches, classes),
            "nc2_maxangle": coherence(batches, classes),
            "nc3_gram": etf_error(batches, classes, weight),
            "nc3_centered": duality(batches, classes, weight),
        }
        for name, value in theirs.items():
            cells = [f"{abs(each / truth[name] - 1):.0e}" for each in (value, found[name])]
            rows.append([f"`{name}`", f"{classes:,}", f"{truth[name]:.3g}", *cells])
    return table(["metric", "K", "value", "theirs", "ours"], rows)


def true_frames(rows: np.ndarray, target: np.ndarray, weight: np.ndarray) -> dict[str, float]:
    """In float64, by their definitions."""
    centered = reference.moments(rows, target)[1]
    return {
        "nc2_etf_centered": reference.frame(centered, "etf"),
        "nc2_maxangle": float(np.abs(reference.cosines(centered) + 1 / (len(centered) - 1)).mean()),
        "nc3_gram": reference.frame(weight, "etf", centered),
        "nc3_centered": reference.direction(weight, centered),
    }


def costs(functions: dict[str, Callable[[Batches, int], float]], widest: int = 1024) -> str:
    """Time of one core over that of the bare float32 product of the scatter matrix, and memory beside the features."""
    rows: dict[str, list[str]] = {name: [name] for name in functions}
    head = [""]
    for classes, features, samples in ((10, 512, 10_000), (100, 512, 10_000), (1000, widest, 10_000)):
        print(f"  {classes} classes", file=sys.stderr, flush=True)
        torch.manual_seed(0)
        batches = batches_of(*clusters(classes, features, samples // classes, 0.3, torch.float32))
        total = torch.zeros(features, features)

        def product(batches: Batches = batches, total: Tensor = total) -> None:
            for part, _ in batches:
                total.addmm_(part.T, part)

        product()
        bare = min(cost(product)[0] for _ in range(3))
        head += [f"K = {classes:,}, d = {features:,}: time", "MB"]
        for name, function in functions.items():
            runs = [
                cost(lambda function=function, batches=batches, classes=classes: function(batches, classes))
                for _ in "12"
            ]
            seconds, memory = map(min, zip(*runs, strict=True))
            rows[name] += [f"{seconds / bare:.1f}", f"{memory / 1e6:,.0f}"]
    return table(head, rows.values())


def machine() -> str:
    """What the numbers were measured with."""
    with open("/proc/cpuinfo") as file:
        processor = next(line.partition(":")[2].strip() for line in file if line.startswith("model name"))
    versions = f"Python {platform.python_version()}, torch {torch.__version__}, NumPy {np.__version__}, SciPy {scipy.__version__}"
    return f"One thread of {processor}; {versions}."


TABLES = {
    "machine": machine,
    "errors of NC1": errors_of_nc1,
    "errors of CDNV": errors_of_cdnv,
    "errors of NC2 and NC3": errors_of_frames,
    "costs of NC1": lambda: costs(NC1),
    "costs of CDNV": lambda: costs(CDNV, widest=512),
}

if __name__ == "__main__":
    if not {*sys.argv[1:]} <= {"--write"}:
        raise SystemExit(__doc__)
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    publish("peers.md", TABLES)
