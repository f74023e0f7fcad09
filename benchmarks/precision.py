"""Where the precision of the features ends: NC1 over its true value as the class means approach the rounding error.

python benchmarks/precision.py [FILE]                          the default is docs/images/precision.png
"""

import sys
import warnings
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import torch

from lightning_nc.functional import nc1
from lightning_nc.moments import ClassDeviations

CLASSES, PER_CLASS, FEATURES = 10, 200, 64
RATIOS = np.logspace(-1, 3, 61)
TYPES = {  # colors of Okabe and Ito, which color-blind readers can tell apart
    torch.bfloat16: ("#E69F00", "o", 11),
    torch.float16: ("#0072B2", "s", 6),
    torch.float32: ("#009E73", "^", 9),
    torch.float64: ("#CC79A7", "v", 6),
}


def every_direction(features: torch.Tensor, target: torch.Tensor) -> float:
    """NC1 with no direction left out but the one that centering makes zero."""
    moments = ClassDeviations.of(features, target, CLASSES)
    _, values, rows = torch.linalg.svd(moments.contrasts(), full_matrices=False)
    return float((moments.within(rows.T) / values.square()).sum() / len(target))


def curve(points: torch.Tensor, target: torch.Tensor, dtype: torch.dtype) -> np.ndarray:
    """For each ratio: NC1, and NC1 with no direction left out, both over the true value; (ratios, 2)."""
    truth = float(nc1(points, target))
    rounding = torch.finfo(dtype).eps / np.sqrt(12)  # of a feature near 1
    means = torch.stack([points[target == k].mean(dim=0) for k in range(CLASSES)])
    separation = float((means - means.mean(dim=0)).square().mean().sqrt())
    results = []
    for ratio in RATIOS:
        features = (1 + ratio * rounding / separation * points).to(dtype)
        results.append((float(nc1(features, target)) / truth, every_direction(features, target) / truth))
    return np.array(results)


def main() -> None:
    """Draw both panels and print where each curve comes within 5 % of the truth for good."""
    warnings.filterwarnings("ignore", message="nc1 leaves out")
    torch.manual_seed(0)
    target = torch.arange(CLASSES).repeat(PER_CLASS)
    full = torch.randn(CLASSES, FEATURES).double()[target] + 0.3 * torch.randn(len(target), FEATURES).double()
    low = torch.randn(CLASSES, 2).double()[target] + 0.3 * torch.randn(len(target), 2).double()
    panels = {
        f"{FEATURES} features of rank {FEATURES}": full,
        f"{FEATURES} features of rank 2": low @ torch.randn(2, FEATURES).double(),
    }
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.8), sharey=True, layout="constrained")
    for axis, (title, points) in zip(axes, panels.items(), strict=True):
        for place, (dtype, (color, marker, size)) in enumerate(TYPES.items()):
            values, uncut = curve(points - points.mean(dim=0), target, dtype).T
            name, hollow = (
                str(dtype).removeprefix("torch."),
                {"mfc": "none", "ms": size, "markevery": (2 * (place // 2), 4)},
            )
            axis.plot(RATIOS, values, marker, ls="-", color=color, label=name, **hollow)
            axis.plot(RATIOS, uncut, "--", color=color, lw=1)
            wrong = np.flatnonzero(~(np.abs(values - 1) < 0.05))
            print(f"{title}, {name}: within 5 % above a ratio of {RATIOS[wrong.max()] if len(wrong) else 0:.3g}")
        axis.plot([], [], "--", color="0.3", lw=1, label="no direction left out")
        axis.axhline(1, color="0.6", lw=0.8, zorder=0)
        axis.set(xscale="log", yscale="log", title=title, xlim=(0.1, 1500), ylim=(0.03, 3000))
        axis.set_xlabel("separation of the class means / rounding error")
    axes[0].set_ylabel("NC1 / true NC1")
    axes[0].legend(frameon=False, fontsize=9)
    path = sys.argv[1] if len(sys.argv) > 1 else Path(__file__).parents[1] / "docs" / "images" / "precision.png"
    figure.savefig(path, dpi=130)


if __name__ == "__main__":
    main()
