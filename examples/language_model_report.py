"""What `language_model.py` says about single tokens, and the tables and figures of a run."""

import csv
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from scipy.stats import spearmanr
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from lightning_nc import NeuralCollapse

LEAST = 10  # the scatter of tokens with fewer samples is too uncertain
GROUPS = 5  # groups of tokens by frequency
EARLY = (10, 20, 30, 40, 50, 70)  # most happens in the first epoch: optimizer steps that are measured too
COLORS = ("#0072B2", "#D55E00", "#009E73")

Rows = list[dict[str, Any]]


# -------------------------------------------------------------------------------------------------------- measurement


class TokenStatistics(Callback):
    """Measures each token before the training, after the steps ``EARLY``, and at the end of the epochs that are due.

    Args:
        vocabulary: the token of each class.
        train: inputs and labels, both (B, T).
        validation: the same of the held-out text.
        due: whether an epoch is measured.
    """

    def __init__(
        self, vocabulary: Sequence[str], train: TensorDataset, validation: TensorDataset, due: Callable[[Trainer], bool]
    ) -> None:
        if (enough := int((train.tensors[1].flatten().bincount() >= LEAST).sum())) < GROUPS:
            raise ValueError(
                f"only {enough} tokens occur {LEAST} times, at least {GROUPS} must; use more text or a smaller --vocabulary"
            )
        self.vocabulary, self.due = vocabulary, due
        # With a generator of its own a DataLoader draws no random number of the training's.
        loaders = (DataLoader(data, 64, generator=torch.Generator()) for data in (train, validation))
        self.train, self.validation = loaders
        self.preceding = preceding(*train.tensors, len(vocabulary))
        self.tokens: dict[int, Rows] = {}  # a row per token, by the number of optimizer steps
        self.rows: Rows = []  # a row per measurement

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """The untrained network."""
        self.measure(pl_module, trainer)

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        """The network after the first steps."""
        if trainer.global_step in EARLY:
            self.measure(pl_module, trainer)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """The network after this epoch."""
        if self.due(trainer) and trainer.global_step not in self.tokens:
            self.measure(pl_module, trainer)

    def measure(self, model: LightningModule, trainer: Trainer) -> None:
        """One more pass over both texts."""
        step = trainer.global_step
        model.eval()
        metric, loss, correct = per_token(model, self.train)
        held_out, held_out_loss, held_out_correct = per_token(model, self.validation)
        model.train()
        counts = metric.counts
        kept = (counts >= LEAST).nonzero().flatten()
        tight = variability(*(part[kept] for part in (counts, metric.means, metric.spread)))
        columns = (kept, counts[kept], self.preceding[kept.cpu()], tight, (correct / counts)[kept])
        self.tokens[step] = [
            {
                "step": step,
                "token": self.vocabulary[k],
                "count": int(n),
                "preceding": p,
                "variability": v,
                "accuracy": a,
            }
            for k, n, p, v, a in zip(*(column.tolist() for column in columns), strict=True)
        ]
        row = {
            "step": step,
            "loss": loss.sum() / counts.sum(),
            "val_loss": held_out_loss.sum() / held_out.counts.sum(),
            "accuracy": correct.sum() / counts.sum(),
            "val_accuracy": held_out_correct.sum() / held_out.counts.sum(),
            **metric.compute(),
        }
        self.rows.append({key: value if key == "step" else float(value) for key, value in row.items()})


@torch.no_grad()
def per_token(model: LightningModule, loader: Iterable) -> tuple[NeuralCollapse, Tensor, Tensor]:
    """The statistics of each token, and its summed cross-entropy and number of correct predictions, both (K,)."""
    classes, width = model.head.weight.shape
    metric = NeuralCollapse(classes, width, model.head, metrics=("gnc2_log", "nc3_uniform")).to(model.device)
    loss, correct = torch.zeros_like(metric.counts), torch.zeros_like(metric.counts)
    for tokens, following in loader:
        features = model.features(tokens.to(model.device)).flatten(0, 1)
        target, logits = following.to(model.device).flatten(), model.head(features)
        metric.update(features, target)
        loss.index_add_(0, target, F.cross_entropy(logits, target, reduction="none").to(loss))
        correct.index_add_(0, target, (logits.argmax(dim=1) == target).to(correct))
    return metric, loss, correct


def variability(counts: Tensor, means: Tensor, spread: Tensor) -> Tensor:
    r"""Within-class variability of each class: :math:`s_k^2` over the mean of :math:`\|\mu_k - \mu_j\|^2` over the other classes.

    0 when the class has collapsed. At 1 its samples are as far from their mean as that is from the other means. Both parts are
    unbiased estimates for independent samples. Otherwise rare classes, whose means are uncertain, would look tighter. The result
    is nan for a class whose mean is too uncertain to be told from the others.

    Args:
        counts: samples of each class, at least two, (K,).
        means: class means, (K, d).
        spread: sum of squared distances to the class mean, (K,).
    """
    variance = spread / (counts - 1)
    error = variance / counts  # expected squared error of a class mean
    distances = torch.cdist(means, means, compute_mode="donot_use_mm_for_euclid_dist").square() - error[:, None] - error
    total = distances.fill_diagonal_(0).sum(dim=1)
    return torch.where(total > 0, variance * (len(counts) - 1) / total, math.nan)


def preceding(inputs: Tensor, labels: Tensor, classes: int) -> Tensor:
    r"""By how many different tokens each token is preceded, (K,): the perplexity :math:`\exp(-\sum_j p_j \log p_j)`, where
    :math:`p_j` is the share of its samples that come right after token j.
    """
    pairs = torch.bincount((labels * classes + inputs).flatten(), minlength=classes**2).view(classes, classes).double()
    share = pairs / pairs.sum(dim=1, keepdim=True).clamp(min=1)
    return torch.special.entr(share).sum(dim=1).exp()


# ------------------------------------------------------------------------------------------------------------- report


def report(statistics: TokenStatistics, history: Sequence[Mapping[str, Any]], width: int, out: Path) -> None:
    """Write metrics.csv, tokens.csv and both figures to ``out``, and print what they show.

    Args:
        statistics: what was measured of each token.
        history: the rows of ``NeuralCollapseCallback``.
        width: d, the number of features.
        out: an existing directory.
    """
    rows = [dict(row) for row in statistics.rows]
    keys = dict.fromkeys(key for row in history for key in row if key.startswith("nc/"))
    for row in rows:
        measured = {key: value for other in history if other["step"] == row["step"] for key, value in other.items()}
        row |= {key: measured.get(key, math.nan) for key in keys}
    files = [out / name for name in ("metrics.csv", "tokens.csv", "metrics.png", "tokens.png")]
    write_rows(files[0], rows)
    write_rows(files[1], [row for table in statistics.tokens.values() for row in table])
    draw_metrics(rows, len(statistics.vocabulary), width).savefig(files[2], dpi=110)
    tables = certain(statistics.tokens)
    draw_tokens(tables).savefig(files[3], dpi=110)
    print_table(rows)
    print("variability of the tokens: median, and rank correlation with")
    variabilities = {step: [row["variability"] for row in table] for step, table in tables.items()}
    print_table([{"step": step} | correlations(variabilities[step], tables[step]) for step in tables])
    print("what is left of it: median, and rank correlation with")
    print_table([{"step": step} | correlations(left(tables, step), tables[step]) for step in list(tables)[1:]])
    print_tokens(tables)
    print("files: " + ", ".join(map(str, files)))


def certain(tables: Mapping[int, Rows]) -> dict[int, Rows]:
    """The tables without the tokens whose variability is nan at any measurement; says how many these are."""
    uncertain = {row["token"] for table in tables.values() for row in table if math.isnan(row["variability"])}
    if uncertain:
        print(f"{len(uncertain)} tokens are left out: too few samples to tell their mean from the others")
    return {step: [row for row in table if row["token"] not in uncertain] for step, table in tables.items()}


def write_rows(path: Path, rows: Rows) -> None:
    """Dicts with the same keys as a CSV file."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def print_table(rows: Rows) -> None:
    """A line per quantity, a column per measurement; empty where the callback has not measured."""
    print(f"{'steps':23}" + "".join(f"{row['step']:>7}" for row in rows))
    for key in list(rows[0])[1:]:
        print(f"{key:23}" + "".join(" " * 7 if math.isnan(row[key]) else f"{row[key]:7.3f}" for row in rows))
    print()


def correlations(values: Sequence[float], table: Rows) -> dict[str, float]:
    """The median of a value of each token, and its rank correlations over the tokens.

    With the count, with ``preceding``, and with the count at equal ``preceding`` (partial correlation).
    """
    columns = [(value, row["count"], row["preceding"]) for value, row in zip(values, table, strict=True)]
    (_, count, before), (_, _, both), _ = spearmanr(columns).statistic
    partial = (count - before * both) / math.sqrt((1 - before**2) * (1 - both**2))
    return {"median": median(values), "count": count, "preceding": before, "count | preceding": partial}


def left(tables: Mapping[int, Rows], step: int) -> list[float]:
    """What is left of the variability that each token has in the untrained network."""
    return [row["variability"] / before["variability"] for row, before in zip(tables[step], tables[0], strict=True)]


def median(values: Iterable[float]) -> float:
    """The median, a float."""
    return float(numpy.median(list(values)))


def print_tokens(tables: Mapping[int, Rows]) -> None:
    """The tokens with the smallest and largest variability, and with the least left of it, at three measurements."""
    for step in three(tables):
        print(f"after step {step}" if step else "untrained")
        rows = [row | {"left": share} for row, share in zip(tables[step], left(tables, step), strict=True)]
        for key in ("variability", "left") if step else ("variability",):
            ordered = [f"{visible(row['token'])} {row[key]:.2f}" for row in sorted(rows, key=lambda row: row[key])]
            print(f"  {key + ', smallest:':24}" + ", ".join(ordered[:12]))
            print(f"  {key + ', largest:':24}" + ", ".join(ordered[:-13:-1]))
    print()


def three(tables: Mapping[int, Rows]) -> list[int]:
    """The first measurement, the first at which the median token has less than half of its variability left, and the last."""
    first, *later = tables
    half = next((step for step in later if median(left(tables, step)) < 0.5), later[len(later) // 2])
    return list(dict.fromkeys((first, half, later[-1])))


def visible(token: str) -> str:
    """The token with a sign for a space and for the end of a line."""
    return token.replace(" ", "␣").replace("\n", "↵")


# ------------------------------------------------------------------------------------------------------------ figures


def draw_metrics(rows: Rows, classes: int, width: int) -> Figure:
    """Loss, accuracy, NC1, NC2, GNC2 and NC3 over the steps; training text solid, held-out text dashed."""
    lowest = -math.log(2 * classes / (classes - 1)) / 2
    rows = [{"gnc2_gap": row["gnc2_log"] - lowest} | row for row in rows]
    panels = {
        "cross-entropy": {"loss": "val_loss"},
        "accuracy": {"accuracy": "val_accuracy"},
        "NC1, within-class variability": {f"nc/{name}": f"nc/val/{name}" for name in ("nc1", "nc1_cdnv")},
        "NC2, frame of the class means": {
            f"nc/{name}": f"nc/val/{name}" for name in ("nc2_etf_centered", "nc2_equinorm", "nc2_equiangular")
        },
        "GNC2, gnc2_log minus its minimum": {"gnc2_gap": None},
        "NC3, weight and class means": {
            **{f"nc/{name}": f"nc/val/{name}" for name in ("nc3_centered", "nc3_cosine")},
            "nc3_uniform": None,
        },
    }
    figure = Figure(figsize=(11, 6.6), layout="constrained")
    axes = dict(zip(panels, figure.subplots(2, 3).ravel(), strict=True))
    for (title, curves), axis in zip(panels.items(), axes.values(), strict=True):
        draw_curves(axis, curves, rows)
        finish(axis, title, rows[-1]["step"])
        axis.set_ylim(bottom=0)
    # Behind a LayerNorm the class means span d - 1 dimensions; the cosine with E is at most sqrt(rank / (K - 1)).
    smallest = math.sqrt(2 - 2 * math.sqrt(min((width - 1) / (classes - 1), 1)))
    axes["NC2, frame of the class means"].axhline(smallest, color=COLORS[0], linestyle=":")
    figure.suptitle(
        "solid: training text; dashed: held-out text; dotted: smallest nc2_etf_centered for this K and d", fontsize=10
    )
    return figure


def draw_curves(axis: Axes, curves: Mapping[str, str | None], rows: Rows) -> None:
    """A solid curve for each key, and a dashed one of the same color for the key of the held-out text."""
    for color, (solid, dashed) in zip(COLORS, curves.items(), strict=False):
        for key, style in ((solid, "-"), (dashed, "--")):
            points = [(row["step"], row[key]) for row in rows if key and not math.isnan(row[key])]
            label = solid.removeprefix("nc/") if key == solid else None
            axis.plot(*numpy.reshape(points, (-1, 2)).T, style, marker=".", color=color, label=label)


def finish(axis: Axes, title: str, last: int) -> None:
    """Title, legend of several curves, and an axis of steps that is logarithmic from ``EARLY`` on."""
    ticks = sorted({0, *(tick for tick in (10, 100, 1000, 10_000) if tick < last / 3), last})
    axis.set_title(title, fontsize=10)
    axis.set_xlabel("optimizer steps")
    axis.set_xscale("symlog", linthresh=EARLY[0])
    axis.set_xlim(0, last)
    axis.set_xticks(ticks, map(str, ticks))
    axis.minorticks_off()
    axis.grid(alpha=0.3)
    if len(axis.get_legend_handles_labels()[0]) > 1:
        axis.legend(fontsize=8, framealpha=0.8)


def draw_tokens(tables: Mapping[int, Rows]) -> Figure:
    """Variability against frequency at three measurements, and what is left of it by frequency at all of them."""
    figure = Figure(figsize=(11, 8.4), layout="constrained")
    *scatters, curves = figure.subplots(2, 2).ravel()
    named = tokens_to_name(tables)
    for axis, step in zip(scatters, three(tables), strict=False):
        axis.sharey(scatters[0])
        points = draw_scatter(axis, tables[step], named)
        axis.set_title(f"after step {step}" if step else "untrained", fontsize=10)
    figure.colorbar(points, ax=scatters[1], label="different tokens right before it (perplexity)")
    order = numpy.argsort([row["count"] for row in tables[0]], kind="stable")
    for place, group in enumerate(numpy.array_split(order, GROUPS)):
        values = [median(numpy.array(left(tables, step))[group]) for step in tables]
        label = f"{tables[0][group[0]]['count']} to {tables[0][group[-1]]['count']} samples"
        curves.plot(list(tables), values, marker=".", color=f"{0.75 - 0.75 * place / (GROUPS - 1):.2f}", label=label)
    curves.set_yscale("log")
    curves.set_ylabel("variability / that of the untrained network")
    finish(curves, "median of what is left, by frequency", list(tables)[-1])
    return figure


def draw_scatter(axis: Axes, table: Rows, named: Sequence[str]) -> Any:
    """A point per token, with the names of some; returns the points."""
    counts, values, colors = ([row[name] for row in table] for name in ("count", "variability", "preceding"))
    points = axis.scatter(counts, values, c=colors, s=14, cmap="viridis", norm=LogNorm(1, max(2, *colors)), alpha=0.8)
    for row in (row for row in table if row["token"] in named):
        text, at = visible(row["token"]).replace("$", r"\$"), (row["count"], row["variability"])
        box = {"boxstyle": "round,pad=0.15", "facecolor": "white", "edgecolor": "0.5", "alpha": 0.85, "linewidth": 0.5}
        axis.plot(*at, "o", markersize=7, markerfacecolor="none", markeredgecolor="black")
        offset = (6, 6 if named.index(row["token"]) % 2 else -15)  # the one that has lost most stands below
        axis.annotate(text, at, offset, textcoords="offset points", fontsize=9, bbox=box)
    axis.axhline(1, color="0.5", linewidth=0.8)
    axis.set_xscale("log")
    axis.set_yscale("log")
    axis.set_xlabel("samples of the token in the training text")
    axis.set_ylabel("within-class variability")
    return points


def tokens_to_name(tables: Mapping[int, Rows]) -> list[str]:
    """The tokens that have lost most and least of their variability half way, in each of three ranges of frequency."""
    shares = left(tables, three(tables)[1])
    logs = numpy.log([row["count"] for row in tables[0]])
    ranges = numpy.digitize(logs, numpy.linspace(logs.min(), logs.max(), 4)[1:-1])
    groups = ([k for k in numpy.argsort(shares) if ranges[k] == place] for place in range(3))
    return [tables[0][k]["token"] for group in groups for k in group[:1] + group[-1:]]
