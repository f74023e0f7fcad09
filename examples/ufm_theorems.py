"""Two experiments of `ufm.py` beyond the figures: Theorem 5.1, and the frame as a function of the bias's regularization."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from matplotlib.figure import Figure
from tqdm import tqdm
from ufm_report import COLORS, Table, describe, write_rows

from lightning_nc import theory
from lightning_nc.functional import nc2

if TYPE_CHECKING:
    from ufm import Configuration


def theorem_51(c: Configuration, out: Path, seed: int, sigma: float = 0.1) -> None:
    """Noise of standard deviation sigma on collapsed features: the best weight, eq. (93), shrinks to a multiple of W*."""
    generator = torch.Generator().manual_seed(seed)
    rows = [attenuated(c, n, sigma, generator) for n in tqdm([10**k for k in range(2, 7)])]
    write_rows(out / "theorem5.1.csv", rows)
    draw_theorem_51(out / "theorem5.1.png", rows)
    first, last = rows[0], rows[-1]
    slope = math.log10(last["relative_error"] / first["relative_error"]) / 4
    print(
        f"theorem 5.1: attenuation {last['attenuation']:.6f} at n = {last['n']}, theory {last['theory']:.6f}, "
        f"relative error {last['relative_error']:.1e}, falling as n^({slope:.2f})"
    )


def attenuated(c: Configuration, n: int, sigma: float, generator: torch.Generator) -> dict[str, float]:
    """The best weight for n noisy samples per class, compared with theory."""
    K, d = c.num_classes, c.num_features
    lambda_h = c.samples_per_class * c.lambda_h / n  # n lambda_h stays fixed
    minimum = theory.plain_ufm(K, n, c.lambda_w, lambda_h)
    means, weight = minimum.class_means(d), minimum.weight(d)
    scatter, sums = torch.zeros(d, d, dtype=torch.float64), torch.zeros(K, d, dtype=torch.float64)
    for k in range(K):
        for start in range(0, n, 100_000):
            noise = torch.randn(min(n - start, 100_000), d, generator=generator, dtype=torch.float64)
            H = means[k] + sigma * noise
            scatter += H.T @ H
            sums[k] += H.sum(dim=0)
    ridge = scatter / (K * n) + c.lambda_w * torch.eye(d, dtype=torch.float64)
    best = torch.linalg.solve(ridge, sums.T / (K * n)).T
    factor = theory.attenuation(K, n, c.lambda_w, lambda_h, sigma**2)
    return {
        "n": n,
        "attenuation": ((best * weight).sum() / weight.square().sum()).item(),
        "theory": factor,
        "relative_error": ((best - factor * weight).norm() / (factor * weight).norm()).item(),
    }


def draw_theorem_51(path: Path, rows: Table) -> None:
    """The attenuation, and how fast the weight converges."""
    n, factor, error = [row["n"] for row in rows], rows[-1]["theory"], rows[-1]["relative_error"]
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    left.semilogx(n, [row["attenuation"] for row in rows], "o-", color=COLORS[0], label="measured")
    left.axhline(factor, color="black", linestyle="--", linewidth=1, label=f"theory: {factor:.6f}")
    left.set_title("attenuation of the best weight")
    right.loglog(n, [row["relative_error"] for row in rows], "o-", color=COLORS[0], label="|W - theory| / |theory|")
    right.loglog(n, [error * math.sqrt(n[-1] / x) for x in n], "k--", linewidth=1, label="slope -1/2")
    right.set_title("convergence")
    for axis in (left, right):
        axis.set_xlabel("samples per class")
        axis.grid(alpha=0.3)
        axis.legend()
    figure.savefig(path, dpi=110)


def threshold(c: Configuration) -> float:
    """The lambda_b up to which the minimizer is an exact simplex ETF, c / (1 - c) with c = K sqrt(n lambda_h lambda_w)."""
    scale = c.num_classes * math.sqrt(c.samples_per_class * c.lambda_h * c.lambda_w)
    return scale / (1 - scale) if scale < 1 else math.inf


def sweep_lambda_b(c: Configuration, per_decade: int = 5) -> list[Configuration]:
    """Configurations with ``lambda_b`` on a logarithmic grid of four decades around the threshold."""
    middle = threshold(c) if math.isfinite(threshold(c)) else 1.0
    grid = [middle * 10 ** (k / per_decade - 1.5) for k in range(4 * per_decade + 1)]
    # Above 1/step every step would overshoot the minimum of the bias.
    return [replace(c, model="plain", lambda_b=lambda_b) for lambda_b in grid if lambda_b < 1 / c.step]


def theory_frames(c: Configuration) -> dict[str, float]:
    """The distances of the minimizer's class means from the two frames."""
    means, target = c.minimum().class_means(c.num_features), torch.arange(c.num_classes)
    return {f"nc2_{frame}": nc2(means, target, frame=frame).item() for frame in ("etf", "of")}


def report_sweep(swept: list[Configuration], tables: list[Table], out: Path) -> None:
    """Write and draw where descent ended for each ``lambda_b``, beside theory."""
    rows = []
    for c, table in zip(swept, tables, strict=True):
        ends = {"lambda_b": c.lambda_b, "objective": table[-1]["objective"], "theory": c.minimum().objective}
        measured = {name: table[-1][name] for name in ("nc2_etf", "nc2_of", "nc2_etf_centered", "nc3")}
        rows.append(ends | measured | {f"{name}_theory": value for name, value in theory_frames(c).items()})
    write_rows(out / "sweep-lambda-b.csv", rows)
    draw_sweep(out / "sweep-lambda-b.png", swept[0], rows)
    worst = max(rows, key=lambda row: abs(row["objective"] / row["theory"] - 1))
    print(
        f"sweep of lambda_b, threshold {threshold(swept[0]):.6f}: largest relative difference of the objective "
        f"{worst['objective'] / worst['theory'] - 1:.1e}, at lambda_b = {worst['lambda_b']:.4g}"
    )


def draw_sweep(path: Path, c: Configuration, rows: Table) -> None:
    """The distances from the two frames against ``lambda_b``: theory as lines, descent as points."""
    figure = Figure(figsize=(7, 4), layout="constrained")
    axis = figure.subplots()
    fine = sweep_lambda_b(c, per_decade=100)
    curves = [theory_frames(x) for x in fine]
    for name, color in zip(("nc2_etf", "nc2_of"), COLORS, strict=False):
        x, y = [x.lambda_b for x in fine], [curve[name] for curve in curves]
        axis.semilogx(x, y, "--", color=color, linewidth=1, label=f"{name}, theory")
        x, y = [row["lambda_b"] for row in rows], [row[name] for row in rows]
        axis.semilogx(x, y, "o", color=color, label=f"{name}, descent")
    if math.isfinite(threshold(c)):
        axis.axvline(threshold(c), color="black", linestyle=":", label=f"threshold c/(1-c) = {threshold(c):.4f}")
    axis.set_xlabel("λ_b")
    axis.set_title(describe(replace(c, lambda_b=math.inf)), fontsize=9)
    axis.grid(alpha=0.3)
    axis.legend()
    figure.savefig(path, dpi=110)
