"""The command: ``lightning-nc plot RUN...``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path


def main(arguments: Sequence[str] | None = None) -> int:
    """Draw what loggers have written of one run or several; the exit status."""
    parser = argparse.ArgumentParser(prog="lightning-nc", description="Measure neural collapse.")
    commands = parser.add_subparsers(dest="command", required=True)
    plot = commands.add_parser("plot", help="draw runs from the files of their loggers, in the layout of the paper")
    plot.add_argument(
        "runs",
        nargs="+",
        metavar="RUN",
        type=Path,
        help="a CSV file, or a directory of CSVLogger, TensorBoard or W&B (offline)",
    )
    plot.add_argument(
        "-o", "--out", type=Path, default=Path("neural_collapse.png"), help="PNG, PDF or SVG (%(default)s)"
    )
    plot.add_argument(
        "-k", "--num-classes", type=int, help="marks what nc2_etf and nc2_of are at an exact frame of the other kind"
    )
    given = parser.parse_args(arguments)
    if given.num_classes is not None and given.num_classes < 2:
        parser.error(f"--num-classes must be at least 2, got {given.num_classes}")
    out = given.out if given.out.suffix else given.out.with_suffix(".png")
    try:
        from lightning_nc.plotting import plot_runs
        from lightning_nc.runs import find_log, read_run

        runs = {str(path): read_run(path) for path in given.runs}
        named = runs if len(runs) > 1 else {"": next(iter(runs.values()))}
        plot_runs(named, num_classes=given.num_classes).savefig(out, dpi=150)
    except (OSError, ValueError, ImportError) as error:
        print(f"lightning-nc: {error}", file=sys.stderr)
        return 1
    for path, rows in runs.items():
        print(f"{find_log(path)}: {len(rows)} measurements")
    print(f"{out}: {len(runs)} run{'s' * (len(runs) > 1)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
