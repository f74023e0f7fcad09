"""What `language_model.py` says about single tokens, and the tables and figures of a run."""

import csv
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from scipy.stats import spearmanr
from torch import Tensor
from torch.nn import functional as F

from lightning_nc import NeuralCollapse
from lightning_nc.plotting import draw

LEAST = 10  # the scatter of tokens with fewer samples is too uncertain
GROUPS = 5  # groups of tokens by frequency
KINDS = {"space": "starts a word (space before)", "letters": "no space before", "other": "no letter"}
STYLES = {"space": ("#D55E00", "^"), "letters": ("#0072B2", "o"), "other": ("#000000", "x")}

Rows = list[dict[str, Any]]


# -------------------------------------------------------------------------------------------------------- measurement


class TokenStatistics(Callback):
    """Measures each token at the end of the epochs that are due.

    Args:
        vocabulary: the token of each class.
        loader: the training data, in order; iterating over it draws no random number.
        due: whether the epoch is measured.
    """

    def __init__(self, vocabulary: Sequence[str], loader: Iterable, due: Callable[[Trainer], bool]) -> None:
        self.vocabulary, self.loader, self.due = vocabulary, loader, due
        self.tokens: dict[int, Rows] = {}  # a row per token, by the number of epochs trained
        self.epochs: Rows = []  # a row per measurement

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """One more pass over the training data. Validation has been before."""
        if not self.due(trainer):
            return
        pl_module.eval()
        metric, loss, correct = per_token(pl_module, self.loader)
        pl_module.train()
        counts, epoch = metric.counts, trainer.current_epoch + 1
        kept = (counts >= LEAST).nonzero().flatten()
        values = (
            counts[kept],
            variability(*(s[kept] for s in (counts, metric.means, metric.spread))),
            (correct / counts)[kept],
        )
        self.tokens[epoch] = [
            {"epoch": epoch, "token": self.vocabulary[k], "count": int(n), "variability": v, "accuracy": a}
            for k, n, v, a in zip(kept.tolist(), *(value.tolist() for value in values), strict=True)
        ]
        seen = counts > 0
        self.epochs.append(
            {
                "epoch": epoch,
                "train_loss": float(loss.sum() / counts.sum()),
                "val_loss": float(trainer.callback_metrics["val_loss"]),
                "train_accuracy": float(correct.sum() / counts.sum()),
                "val_accuracy": float(trainer.callback_metrics["val_accuracy"]),
                **uniformity(metric.means[seen], pl_module.head.weight.detach()[seen].to(metric.means)),
                "rank_correlation": float(spearmanr(*(value.tolist() for value in values[:2])).statistic),
            }
        )


@torch.no_grad()
def per_token(model: LightningModule, loader: Iterable) -> tuple[NeuralCollapse, Tensor, Tensor]:
    """The statistics of each token, and its summed cross-entropy and number of correct predictions, both (K,)."""
    classes, width = model.head.weight.shape
    metric = NeuralCollapse(classes, width, metrics="nc1_cdnv").to(model.device)
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
    unbiased estimates for independent samples. Otherwise rare classes, whose means are uncertain, would look tighter.

    Args:
        counts: samples of each class, at least two, (K,).
        means: class means, (K, d).
        spread: sum of squared distances to the class mean, (K,).
    """
    variance = spread / (counts - 1)
    error = variance / counts  # expected squared error of a class mean
    distances = torch.cdist(means, means, compute_mode="donot_use_mm_for_euclid_dist").square() - error[:, None] - error
    return variance * (len(counts) - 1) / distances.fill_diagonal_(0).sum(dim=1)


def uniformity(means: Tensor, weight: Tensor) -> dict[str, float]:
    r"""GNC2 and UNC3 of arXiv 2405.17767, from class means and weight, both (K, d).

    ``gnc2_log`` is the mean over pairs of :math:`-\log \|\hat m_i - \hat m_j\|` with the centered means scaled to length 1, at
    least :math:`-\frac12 \log \frac{2K}{K - 1}`. ``nc3_uniform`` is the standard deviation over the classes of
    :math:`\cos(w_k, m_k)`, 0 when all classes are aligned equally well.
    """
    unit = F.normalize(means - means.mean(dim=0))
    cosines = (unit * F.normalize(weight)).sum(dim=1)
    return {"gnc2_log": float(-F.pdist(unit).log().mean()), "nc3_uniform": float(cosines.std(correction=0))}


# ------------------------------------------------------------------------------------------------------------- report


def report(statistics: TokenStatistics, history: Sequence[Mapping[str, Any]], width: int, out: Path) -> None:
    """Write metrics.csv, tokens.csv and both figures to ``out``, and print what they show."""
    rows = [dict(row) for row in statistics.epochs]
    for row in rows:
        for measured in history:
            if measured["epoch"] + 1 == row["epoch"]:
                row |= {key: value for key, value in measured.items() if key.startswith("nc/")}
    write_rows(out / "metrics.csv", rows)
    write_rows(out / "tokens.csv", [row for table in statistics.tokens.values() for row in table])
    draw_metrics(rows, len(statistics.vocabulary), width).savefig(out / "metrics.png", dpi=110)
    draw_tokens(statistics.tokens).savefig(out / "tokens.png", dpi=110)
    print_table(rows)
    print_tokens(statistics.tokens)
    print(
        f"\nfiles: {', '.join(str(out / name) for name in ('metrics.csv', 'metrics.png', 'tokens.csv', 'tokens.png'))}"
    )


def write_rows(path: Path, rows: Rows) -> None:
    """Dicts with the same keys as a CSV file."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def print_table(rows: Rows) -> None:
    """Every value by epoch."""
    print(f"\n{'epochs':24}" + "".join(f"{row['epoch']:>9}" for row in rows))
    for key in list(rows[0])[1:]:
        print(f"{key:24}" + "".join(f"{row.get(key, math.nan):9.3f}" for row in rows))


def print_tokens(tables: Mapping[int, Rows]) -> None:
    """Medians by frequency and by kind, and the tokens at both ends, at the first, middle and last measurement."""
    for epoch in three(tables):
        table = tables[epoch]
        groups = {f"{name} times": rows for name, rows in by_frequency(table).items()}
        groups |= {KINDS[kind]: [row for row in table if kind_of(row["token"]) == kind] for kind in KINDS}
        ordered = sorted(table, key=lambda row: row["variability"])
        print(f"\nafter epoch {epoch}: median variability of tokens")
        print("  " + "; ".join(f"{name} {median(rows):.2f}" for name, rows in groups.items() if rows))
        for name, some in (("lowest", ordered[:10]), ("highest", ordered[:-11:-1])):
            print(f"  {name}: " + ", ".join(f"{visible(row['token'])} {row['variability']:.2f}" for row in some))


def three(tables: Mapping[int, Rows]) -> list[int]:
    """The first, middle and last measurement."""
    epochs = list(tables)
    return list(dict.fromkeys((epochs[0], epochs[len(epochs) // 2], epochs[-1])))


def by_frequency(table: Rows) -> dict[str, Rows]:
    """Groups with the same number of tokens, the rarest first, by the range of their counts."""
    ordered = sorted(table, key=lambda row: row["count"])
    edges = [len(ordered) * part // GROUPS for part in range(GROUPS + 1)]
    groups = [ordered[low:high] for low, high in pairwise(edges) if high > low]
    return {f"{group[0]['count']}-{group[-1]['count']}": group for group in groups}


def median(rows: Rows) -> float:
    """The median variability."""
    return float(torch.tensor([row["variability"] for row in rows]).quantile(0.5))


def kind_of(token: str) -> str:
    """A key of ``KINDS``."""
    if not token.strip()[:1].isalpha():
        return "other"
    return "space" if token[0] == " " else "letters"


def visible(token: str) -> str:
    """The token with a sign for a space and for the end of a line."""
    return token.replace(" ", "␣").replace("\n", "↵")


# ------------------------------------------------------------------------------------------------------------ figures


def draw_metrics(rows: Rows, classes: int, width: int) -> Figure:
    """Loss, accuracy, NC1, NC2, GNC2 and NC3 over the epochs; training text solid, held-out text dashed."""
    lowest = -math.log(2 * classes / (classes - 1)) / 2
    rows = [{"gnc2_gap": row["gnc2_log"] - lowest} | row for row in rows]
    panels = {
        "cross-entropy": {"loss": ("train_loss", "val_loss")},
        "accuracy": {"accuracy": ("train_accuracy", "val_accuracy")},
        "NC1, within-class variability": both("nc1", "nc1_cdnv"),
        "NC2, frame of the class means": both("nc2_etf_centered", "nc2_equinorm", "nc2_equiangular"),
        "GNC2, uniformity of the class means": {"gnc2_log above its minimum": ("gnc2_gap",)},
        "NC3, weight and class means": both("nc3_centered", "nc3_cosine") | {"nc3_uniform": ("nc3_uniform",)},
    }
    figure = Figure(figsize=(11, 6.6), layout="constrained")
    axes = dict(zip(panels, figure.subplots(2, 3).ravel(), strict=True))
    for (title, curves), axis in zip(panels.items(), axes.values(), strict=True):
        for stage, style in enumerate(("-", "--")):
            shown = {name: [row[keys[stage]] for row in rows] for name, keys in curves.items() if stage < len(keys)}
            curve = {name: ([row["epoch"] for row in rows], values) for name, values in shown.items()}
            draw(axis, title, "epochs", curve, style=style, legend=False)
        axis.set_xscale("log")
        axis.legend(fontsize=8, framealpha=0.8)
    axes["accuracy"].set_yscale("linear")
    # Behind a LayerNorm the class means span d - 1 dimensions; the cosine with E is at most sqrt(rank / (K - 1)).
    smallest = math.sqrt(2 - 2 * math.sqrt(min((width - 1) / (classes - 1), 1)))
    axes["NC2, frame of the class means"].axhline(smallest, color="#0072B2", linestyle=":")
    figure.suptitle(
        "solid: training text; dashed: held-out text; dotted: smallest nc2_etf_centered for this K and d", fontsize=10
    )
    return figure


def both(*metrics: str) -> dict[str, tuple[str, str]]:
    """The keys of training and validation by the name of the metric."""
    return {metric: (f"nc/{metric}", f"nc/val/{metric}") for metric in metrics}


def draw_tokens(tables: Mapping[int, Rows]) -> Figure:
    """Variability against frequency at three measurements, and its median by frequency at all of them."""
    figure = Figure(figsize=(11, 8.4), layout="constrained")
    *scatters, curves = figure.subplots(2, 2).ravel()
    named = tokens_to_name(tables)
    for axis, epoch in zip(scatters, three(tables), strict=False):
        draw_scatter(axis, tables[epoch], named)
        axis.set_title(f"after epoch {epoch}", fontsize=10)
        axis.sharey(scatters[0])
    scatters[0].legend(fontsize=8, loc="lower right", framealpha=0.8)
    draw_groups(curves, tables)
    return figure


def draw_scatter(axis: Axes, table: Rows, named: Sequence[str]) -> None:
    """A point per token, with the names of some."""
    for kind, (color, marker) in STYLES.items():
        points = [(row["count"], row["variability"]) for row in table if kind_of(row["token"]) == kind]
        axis.scatter(
            *zip(*points, strict=True), s=14, color=color, marker=marker, alpha=0.5, linewidth=0.8, label=KINDS[kind]
        )
    for row in (row for row in table if row["token"] in named):
        text = visible(row["token"]).replace("$", r"\$")
        box = {"boxstyle": "round,pad=0.15", "facecolor": "white", "edgecolor": "0.5", "alpha": 0.85, "linewidth": 0.5}
        at = (row["count"], row["variability"])
        axis.annotate(text, at, (6, 6), textcoords="offset points", fontsize=9, bbox=box)
        axis.plot(*at, "o", markersize=6, markerfacecolor="none", markeredgecolor="black")
    axis.axhline(1, color="0.5", linewidth=0.8)
    axis.set_xscale("log")
    axis.set_yscale("log")
    axis.set_xlabel("samples of the token in the training text")
    axis.set_ylabel("within-class variability")


def draw_groups(axis: Axes, tables: Mapping[int, Rows]) -> None:
    """The median of each group of tokens over the epochs; the lighter, the more frequent."""
    groups = [by_frequency(table) for table in tables.values()]
    colors = ScalarMappable(Normalize(0, GROUPS), "viridis").to_rgba(range(GROUPS))
    curves = {f"{name} samples": (list(tables), [median(group[name]) for group in groups]) for name in groups[0]}
    draw(axis, "median by frequency", "epochs", curves, colors=colors)
    axis.set_xscale("log")
    axis.set_ylabel("within-class variability")


def tokens_to_name(tables: Mapping[int, Rows]) -> list[str]:
    """The lowest and the highest token of three ranges of frequency at the first measurement."""
    table = sorted(next(iter(tables.values())), key=lambda row: row["count"])
    ranges = [table[len(table) * part // 3 : len(table) * (part + 1) // 3] for part in range(3)]
    ordered = [sorted(rows, key=lambda row: row["variability"]) for rows in ranges if rows]
    return [row["token"] for rows in ordered for row in (rows[0], rows[-1])]
