"""The command line: ``lightning-nc plot RUN...``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path


def main(arguments: Sequence[str] | None = None) -> int:
    """Plot finished runs from the files of their loggers; returns the exit status."""
    parser = argparse.ArgumentParser(prog="lightning-nc", description="Measure neural collapse.")
    commands = parser.add_subparsers(dest="command", required=True)
    plot = commands.add_parser("plot", help="plot one or more finished runs, in the layout of the paper")
    run = "a CSV file, or a directory of CSVLogger, TensorBoardLogger or WandbLogger (offline); the newest file in it"
    plot.add_argument("runs", nargs="+", metavar="RUN", type=Path, help=run)
    out = "PNG, PDF or SVG file, or a directory (default: %(default)s)"
    plot.add_argument("-o", "--out", type=Path, default=Path("neural_collapse.png"), help=out)
    frames = "of all runs; marks the value of nc2_etf and nc2_of at an exact frame of the other kind"
    plot.add_argument("-k", "--num-classes", type=int, help=frames)
    names = "after the runs: paper, all, or names such as nc1 nc3; without it, what was asked for in the measurement"
    plot.add_argument("--metrics", nargs="+", metavar="NAME", help=names)
    plot.add_argument("--labels", nargs="+", metavar="LABEL", help="after the runs: what to call them, one for each")
    plot.add_argument("--overlay", action="store_true", help="all runs in one set of panels, a color each")
    alike = "with --overlay: runs with the same label are one group, drawn as median and range; PATTERN, a regular expression, "
    plot.add_argument("--group", nargs="?", const="", metavar="PATTERN", help=alike + "is left out of labels first (default: the seed)")
    layer = "with --overlay: the layer to draw (default: the classifier input)"
    plot.add_argument("--layer", help=layer)
    given = parser.parse_args(arguments)
    if given.num_classes is not None and given.num_classes < 2:
        parser.error(f"--num-classes must be at least 2, got {given.num_classes}")
    if given.labels and len(given.labels) != len(given.runs):
        parser.error(f"--labels must name each of the {len(given.runs)} runs once, got {len(given.labels)}")
    if not given.overlay and (given.group is not None or given.layer is not None):
        parser.error("--group and --layer need --overlay")
    try:
        _plot(given)
    except (OSError, ValueError, ImportError) as error:
        remedy = "; install it with pip" if isinstance(error, ModuleNotFoundError) else ""
        print("lightning-nc:", " ".join(f"{error}{remedy}".split()), file=sys.stderr)
        return 1
    return 0


def _plot(given: argparse.Namespace) -> None:
    from lightning_nc.history import History
    from lightning_nc.plotting import plot_overlay, plot_runs
    from lightning_nc.runs import find_log, split_seeds

    logs: dict[Path, Path] = {}
    for path in given.runs:
        log = find_log(path)
        for other, known in logs.items():
            if log.samefile(known):
                raise ValueError(f"{other} and {path} are the same run; pass each run once")
        logs[path] = log
    histories = [History.read(log) for log in logs.values()]
    labels = given.labels or [str(path) for path in logs]
    runs = [run for label, rows in zip(labels, histories, strict=True) for run in split_seeds(label, rows)]
    metrics = given.metrics[0] if given.metrics in (["all"], ["paper"]) else given.metrics
    if given.overlay:
        figure = plot_overlay(runs, metrics, given.num_classes, given.group, given.layer)
    else:
        if len(set(labels)) < len(labels):
            raise ValueError(f"labels must differ, unless --overlay --group draws equal ones as a group; got {labels}")
        figure = plot_runs(dict(runs) if len(runs) > 1 else {"": runs[0][1]}, None, given.num_classes, metrics)
    out: Path = given.out
    if out.is_dir():
        out = out / "neural_collapse.png"
    elif not out.suffix:
        out = out.with_suffix(".png")
    figure.savefig(out, dpi=150)
    for log, rows in zip(logs.values(), histories, strict=True):
        print(f"{log}: {len(rows)} measurements")
    print(f"{out}: {len(runs)} run{'s' * (len(runs) > 1)}")


if __name__ == "__main__":
    sys.exit(main())
