"""What a run of `ufm.py` reached: the closing line, compared with theory, the table as CSV and the picture."""

from __future__ import annotations

import csv
import math
from pathlib import Path
from typing import TYPE_CHECKING

import numpy
import torch
from matplotlib.figure import Figure
from torch import Tensor

from lightning_nc.plotting import draw, legend_below

if TYPE_CHECKING:
    from ufm import UFM, Configuration

COLORS = ("#0072B2", "#D55E00", "#009E73")
LABELS = {"": "deepest features", "_h1": "first layer", "_pre": "before the ReLU"}
FRAMES = {"of": "orthogonal frame", "etf": "simplex ETF", "between": "between ETF and OF", "zero": "zero"}
CONVERGED = 1e-9  # relative difference from the global minimum below which a run has reached it
NEAR_LEVEL = 1e-6  # the same for all other levels of the objective

Table = list[dict[str, float]]


def report(models: list[UFM], tables: list[Table], starts: list[int], name: str, out: Path) -> None:
    """Write the table and the picture of one or more seeds and print a closing line for each."""
    c, first, last = models[0].c, starts[0], starts[-1]
    stem = name if len(starts) == 1 else f"{name}-seeds"
    seeds = f"seed {first}" if len(starts) == 1 else f"seeds {first} to {last}, median and range"
    write_csv(out / f"{stem}.csv", tables, starts)
    draw_run(out / f"{stem}.png", c, tables, f"{name}: {describe(c)}, {seeds}", levels(c) | dead_levels(models))
    for model, table, start in zip(models, tables, starts, strict=True):
        print(f"{name}, seed {start}: {verdict(model, table[-1])}")


# ------------------------------------------------------------------------------------------------ the closing line


def verdict(model: UFM, row: dict[str, float]) -> str:
    """What descent reached, in numbers and in words."""
    c, value = model.c, row["objective"]
    known = levels(c)
    if not known:
        return f"objective {value:.12g}; theory knows no minimum of the relu model with cross-entropy"
    if c.loss == "cross-entropy":
        name = min(known, key=lambda key: abs(known[key] - value))
        listed = ", ".join(f"{key} {level:.9f}" for key, level in known.items())
        reached = f"reached the {name}" if near(value, known[name]) else f"not within {NEAR_LEVEL:.0e} of either"
        return f"objective {value:.9f} ({listed}): {reached}"
    ((frame, lowest),) = known.items()
    if not math.isfinite(value):
        return f"objective {value}, theory {lowest:.12f}: diverged; pass a --step smaller than {c.step:g}"
    text = f"objective {value:.12f}, theory {lowest:.12f}, relative difference {value / lowest - 1:.1e}: "
    if near(value, lowest, CONVERGED):
        scores = f"(NC1 {row['nc1']:.1e}, NC3 {row['nc3']:.1e})"
        return text + f"reached the global minimum to {CONVERGED:.0e}, {frame} {scores}"
    return text + why_not(model, row, frame, lowest)


def why_not(model: UFM, row: dict[str, float], frame: str, lowest: float) -> str:
    """Why an MSE model is not at its global minimum ``lowest``."""
    c, value, dead = model.c, row["objective"], dead_samples(model)
    unfinished = f"not converged to {CONVERGED:.0e}"
    if any(dead):
        level = dead_level(model, dead)
        counted = f"{sum(dead)} dead sample{'s' * (sum(dead) > 1)} (per class {dead})"
        if near(value, level):
            return f"stuck at the level of {counted}, {100 * (level / lowest - 1):.6f} % above the minimum"
        return f"{unfinished}; {counted}, whose level is {level:.12f}"
    if (shared := shared_units(model)) and value / lowest - 1 < 1e-4:
        units = f"{shared} hidden unit{'s' * (shared > 1)}"
        return f"{unfinished}, slowly approaching the global minimum, {frame}: two classes still share each of {units}"
    if c.model != "plain":
        for rank in range(c.num_classes):
            if near(value, c.minimum().level([0.0] * rank + [1.0] * (c.num_classes - rank))):
                return f"stuck at a stationary point of rank {rank}"
    gradient = torch.autograd.grad(model.objective(), list(model.parameters()))
    if math.sqrt(sum(part.square().sum().item() for part in gradient)) < 1e-10:
        return "stuck at a stationary point that theory does not list"
    return f"{unfinished} after {row['iteration']} iterations; pass more --iterations"


def near(value: float, level: float, tolerance: float = NEAR_LEVEL) -> bool:
    """Whether an objective equals a level to a relative tolerance."""
    return abs(value / level - 1) < tolerance


@torch.no_grad()
def dead_samples(model: UFM) -> list[int]:
    """The number of samples of each class that the ReLUs switch off, so that no gradient reaches them."""
    if model.c.model != "relu":
        return [0] * model.c.num_classes
    outputs = model(torch.arange(len(model.labels))).norm(dim=1)
    # A unit that is active but has lost its outgoing weight passes no gradient either: check the outputs, not the signs.
    return (outputs < 1e-3 * outputs.max()).view(model.c.num_classes, -1).sum(dim=1).tolist()


def dead_level(model: UFM, dead: list[int]) -> float:
    """The objective at which descent stops with so many dead samples in each class."""
    return model.c.minimum().level([count / model.c.samples_per_class for count in dead])


@torch.no_grad()
def shared_units(model: UFM) -> int:
    """The number of hidden units shared by two classes: one class activates the unit at least a tenth as much as another."""
    if model.c.model != "relu":
        return 0
    means = model.levels()[""][0].view(model.c.num_classes, model.c.samples_per_class, -1).mean(dim=1)
    second, first = means.sort(dim=0).values[-2:]
    return int(((second > 0.1 * first) & (first > 1e-3 * means.max())).sum())


# ------------------------------------------------------------------------------------------- what theory predicts


def levels(c: Configuration) -> dict[str, float]:
    """Objectives known from theory, by name; for MSE models the global minimum alone."""
    if c.loss == "mse":
        minimum = c.minimum()
        return {FRAMES[minimum.frame]: minimum.objective}
    if c.model == "relu":
        return {}
    K = c.num_classes
    angles = 2 * math.pi * torch.arange(K, dtype=torch.float64) / K
    identity = torch.eye(K, dtype=torch.float64)
    frames = {"simplex ETF": identity - 1 / K, f"regular {K}-gon, rank 2": torch.cos(angles[:, None] - angles)}
    return {name: smallest_cross_entropy(c, gram) for name, gram in frames.items()}


def smallest_cross_entropy(c: Configuration, gram: Tensor) -> float:
    """The smallest cross-entropy objective with outputs t ``gram``, the Gram matrix of the class means, over scalars t."""
    n = c.samples_per_class
    singular = torch.linalg.svdvals(gram)

    def objective(t: Tensor) -> Tensor:
        sigma = t[:, None] * singular
        loss = (t[:, None] * gram[0]).logsumexp(dim=1) - t * gram[0, 0]
        if c.model == "plain":
            return loss + math.sqrt(n * c.lambda_h * c.lambda_w) * sigma.sum(dim=1)
        return loss + 1.5 * (n * c.lambda_w * c.lambda_w1 * c.lambda_h) ** (1 / 3) * sigma.pow(2 / 3).sum(dim=1)

    low, high = 1e-6, 100.0
    for _ in range(8):
        grid = torch.linspace(low, high, 4001, dtype=torch.float64)
        best = grid[objective(grid).argmin()].item()
        low, high = max(best - (high - low) / 2000, 0), best + (high - low) / 2000
    return objective(torch.tensor([best], dtype=torch.float64)).item()


def dead_levels(models: list[UFM]) -> dict[str, float]:
    """The levels above the minimum at which dead samples hold some of the MSE models, at most two."""
    if models[0].c.loss != "mse":
        return {}
    found = {f"{sum(dead)} dead": dead_level(model, dead) for model in models if any(dead := dead_samples(model))}
    return dict(sorted(found.items())[:2])


# ---------------------------------------------------------------------------------------------- table and picture


def write_csv(path: Path, tables: list[Table], seeds: list[int]) -> None:
    """A row per measurement; with several seeds, the first column is the seed."""
    many = len(seeds) > 1
    rows = [({"seed": seed} if many else {}) | row for seed, table in zip(seeds, tables, strict=True) for row in table]
    write_rows(path, rows)


def write_rows(path: Path, rows: Table) -> None:
    """Dicts with the same keys as a CSV file."""
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def draw_run(path: Path, c: Configuration, tables: list[Table], heading: str, named: dict[str, float]) -> None:
    """The paper's four panels: objective with the levels of theory dashed, NC1, NC2, NC3; for several seeds the range."""
    frame = "nc2_etf" if c.loss == "cross-entropy" or c.minimum().frame == "etf" else "nc2_of"
    titles = {
        "objective": "objective",
        "nc1": "NC1, within-class variability",
        frame: f"NC2, distance to the {frame[4:].upper()}",
        "nc3": "NC3, weight to means",
    }
    figure = Figure(figsize=(16, 3.8), layout="constrained")
    panels = dict(zip(titles, figure.subplots(1, 4), strict=True))
    iterations = [row["iteration"] for row in tables[0]]
    for (column, title), axis in zip(titles.items(), panels.values(), strict=True):
        curves = {}
        for suffix, color in zip(
            (suffix for suffix in LABELS if column + suffix in tables[0][0]), COLORS, strict=False
        ):
            values = numpy.array([[row[column + suffix] for row in table] for table in tables])
            label = "descent" if column == "objective" else LABELS[suffix]
            curves[label] = (iterations, numpy.median(values, axis=0))
            if len(tables) > 1:
                low, high = values.min(axis=0), values.max(axis=0)
                axis.fill_between(iterations, low, high, color=color, alpha=0.2, linewidth=0)
        draw(axis, title, "iteration", curves)
        axis.ticklabel_format(axis="x", scilimits=(0, 3))
    for (level, value), style in zip(named.items(), ("--", "-.", ":"), strict=False):
        label = f"{level}: {value:.9f}"
        panels["objective"].axhline(value, color="black", linestyle=style, linewidth=1, label=label)
    legend_below(panels["objective"], *panels["objective"].get_legend_handles_labels())
    if c.loss == "cross-entropy" and named:  # the levels lie close together: zoom in on them
        panels["objective"].set_yscale("linear")
        panels["objective"].set_ylim(min(named.values()) * 0.99, max(named.values()) * 1.03)
    figure.suptitle(heading)
    figure.savefig(path, dpi=110)


def describe(c: Configuration) -> str:
    """The configuration in one line."""
    lambdas = f"λ_W={c.lambda_w:g}, λ_H={c.lambda_h:g}"
    if c.model == "plain":
        model = "plain UFM" + ("" if c.lambda_b == math.inf else f" with bias, λ_b={c.lambda_b:g}")
    else:
        model = f"extended {'ReLU' if c.model == 'relu' else 'linear'} UFM"
        lambdas = f"λ_W2={c.lambda_w:g}, λ_W1={c.lambda_w1:g}, λ_H1={c.lambda_h:g}"
    return f"{model}, {c.loss}: K={c.num_classes}, d={c.num_features}, n={c.samples_per_class}, {lambdas}"
