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
    report = commands.add_parser("report", help="write one or more runs as a single HTML page that opens without a network")
    run = "a directory with a log or a checkpoint of the run, or a CSV file, a checkpoint (.ckpt) or trainer_state.json"
    report.add_argument("runs", nargs="+", metavar="RUN", type=Path, help=run)
    report.add_argument("-o", "--out", type=Path, default=Path("report.html"), help="HTML file (default: %(default)s)")
    given = parser.parse_args(arguments)
    if given.command == "plot" and given.num_classes is not None and given.num_classes < 2:
        parser.error(f"--num-classes must be at least 2, got {given.num_classes}")
    try:
        if given.command == "report":
            _report(given.runs, given.out)
        else:
            _plot(given.runs, given.out, given.num_classes)
    except (OSError, ValueError, ImportError) as error:
        remedy = "; install it with pip" if isinstance(error, ModuleNotFoundError) else ""
        print("lightning-nc:", " ".join(f"{error}{remedy}".split()), file=sys.stderr)
        return 1
    return 0


def _plot(paths: Sequence[Path], out: Path, num_classes: int | None) -> None:
    from lightning_nc.history import History
    from lightning_nc.plotting import plot_runs
    from lightning_nc.runs import find_log

    logs: dict[Path, Path] = {}
    for path in paths:
        log = find_log(path)
        for other, known in logs.items():
            if log.samefile(known):
                raise ValueError(f"{other} and {path} are the same run; pass each run once")
        logs[path] = log
    runs = {str(path): History.read(log) for path, log in logs.items()}
    if out.is_dir():
        out = out / "neural_collapse.png"
    elif not out.suffix:
        out = out.with_suffix(".png")
    titled = runs if len(runs) > 1 else {"": next(iter(runs.values()))}
    plot_runs(titled, num_classes=num_classes).savefig(out, dpi=150)
    for log, rows in zip(logs.values(), runs.values(), strict=True):
        print(f"{log}: {len(rows)} measurements")
    print(f"{out}: {len(runs)} run{'s' * (len(runs) > 1)}")


def _report(paths: Sequence[Path], out: Path) -> None:
    from lightning_nc.history import History
    from lightning_nc.report import write_report

    places = [path.resolve() for path in paths]
    for place, path in zip(places, paths, strict=True):
        if places.count(place) > 1:
            raise ValueError(f"{path} is given twice; pass each run once")
    runs = {str(path): History.read(path) for path in paths}
    if out.is_dir():
        out = out / "report.html"
    write_report(runs, out)
    for name, rows in runs.items():
        print(f"{name}: {len(rows)} measurements")
    print(f"{out}: {len(runs)} run{'s' * (len(runs) > 1)}, {out.stat().st_size / 2**20:.1f} MB")


if __name__ == "__main__":
    sys.exit(main())
