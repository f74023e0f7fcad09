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
    _add_plot(commands.add_parser("plot", help="plot one or more finished runs, in the layout of the paper"))
    given = parser.parse_args(arguments)
    if given.num_classes is not None and given.num_classes < 2:
        parser.error(f"--num-classes must be at least 2, got {given.num_classes}")
    try:
        _plot(given)
    except (OSError, ValueError, ImportError) as error:
        remedy = "; install it with pip" if isinstance(error, ModuleNotFoundError) else ""
        print("lightning-nc:", " ".join(f"{error}{remedy}".split()), file=sys.stderr)
        return 1
    return 0


def _add_plot(plot: argparse.ArgumentParser) -> None:
    run = "a CSV file, or a directory of CSVLogger, TensorBoardLogger or WandbLogger (offline); the newest file in it"
    plot.add_argument("runs", nargs="+", metavar="RUN", type=Path, help=run)
    out = "PNG, PDF or SVG file, or a directory (default: %(default)s)"
    plot.add_argument("-o", "--out", type=Path, default=Path("neural_collapse.png"), help=out)
    frames = "of all runs; marks the value of nc2_etf and nc2_of at an exact frame of the other kind"
    plot.add_argument("-k", "--num-classes", type=int, help=frames)
    names = "after the runs: all, paper, or names such as nc1 nc3 (default: what the measurement was asked for)"
    plot.add_argument("--metrics", nargs="+", metavar="NAME", help=names)
    plot.add_argument("--labels", nargs="+", metavar="LABEL", help="after the runs: what to call each of them")
    plot.add_argument("--overlay", action="store_true", help="draw all runs in one set of panels, a color each")
    bands = (
        "with --overlay: draw runs as median and range whose labels are the same without PATTERN (default: the seed)"
    )
    plot.add_argument("--group", nargs="?", const="", metavar="PATTERN", help=bands)
    plot.add_argument("--layer", help="with --overlay: the layer to draw (default: the classifier input)")


def _plot(given: argparse.Namespace) -> None:
    from lightning_nc.history import History
    from lightning_nc.plotting import plot_overlay, plot_runs
    from lightning_nc.runs import find_log, split_seeds

    if given.labels and len(given.labels) != len(given.runs):
        raise ValueError(f"--labels must name each of the {len(given.runs)} runs, got {len(given.labels)} labels")
    if not given.overlay and (given.group is not None or given.layer is not None):
        raise ValueError("--group and --layer are about one set of panels; pass --overlay too")
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
            raise ValueError(f"--labels must differ, but for groups of --overlay --group; got {' '.join(labels)}")
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
