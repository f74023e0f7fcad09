"""What `resnet18.py` prints and draws when training ends."""

import math
import sys
from pathlib import Path

from lightning_nc import NeuralCollapseCallback
from lightning_nc.functional.geometry import worst
from lightning_nc.plotting import plot_history

History = list[dict]


def report(measured: NeuralCollapseCallback, curves: dict[str, dict[int, float]], directory: Path) -> None:
    """Print the table, draw the figure and the animation, and say where the files are and what to do with them.

    Args:
        measured: the callback of the run.
        curves: loss and accuracy on the training data by epoch.
        directory: the directory of the run.
    """
    history = measured.history
    print_table(history, list(curves["accuracy"].values()))
    print(f"\nThe classes that are least separated from another, after the last epoch:\n{worst(measured.per_class)}")
    epochs = [row["epoch"] for row in history if row["stage"] == "train"]
    objective = {name: [curve.get(epoch, math.nan) for epoch in epochs] for name, curve in curves.items()}
    picture = directory / "neural_collapse.png"
    plot_history(paper_metrics(history), objective=objective if epochs else None).savefig(picture, dpi=150)
    print()
    values, config, last = (directory / name for name in ("metrics.csv", "config.yaml", "checkpoints/last.ckpt"))
    if values.exists():
        print(f"values:  {values}")
    print(f"figure:  {picture}")
    if any(scene.chosen for scene in history.scenes):
        print(f"moving:  {measured.animate(directory / 'collapse.gif')}")
    if last.exists():
        print(f"report:  lightning-nc report {directory}")
    if config.exists() and last.exists():
        print(f"test:    python {sys.argv[0]} test --config {config} --ckpt_path {last}")


def print_table(history: History, accuracy: list[float]) -> None:
    """The first, best and last value of each metric."""
    print(f"\n{'':36}{'first':>12}{'best':>12}{'last':>12}")
    for key in dict.fromkeys(key for row in history for key in row if key.startswith("nc/")):
        values = [row[key] for row in history if key in row]
        print(f"{key:36}{values[0]:12.3e}{min(values):12.3e}{values[-1]:12.3e}")
    print(f"{'accuracy':36}{accuracy[0]:12.4f}{max(accuracy):12.4f}{accuracy[-1]:12.4f}")


def paper_metrics(history: History) -> History:
    """The metrics in figures 5 and 10 of the paper: NC1 and NC2 at every depth, and NC3, of centered means.

    If none of them was measured, all metrics are kept.
    """
    shown = ("stage", "epoch", "geometry", "nc1", "nc2_etf_centered", "nc3_centered")
    rows = [{key: value for key, value in row.items() if key.split("/")[-1] in shown} for row in history]
    chosen = rows if any(key.startswith("nc/") for row in rows for key in row) else history
    return [{key.replace("network.", ""): value for key, value in row.items()} for row in chosen]
