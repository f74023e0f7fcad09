"""The command line: ``lightning-nc plot RUN...``, ``lightning-nc report RUN...``, ``lightning-nc measure CHECKPOINT...``."""

from __future__ import annotations

import argparse
import platform
import sys
from collections.abc import Sequence
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lightning_nc.history import History

from lightning_nc import __version__


def main(arguments: Sequence[str] | None = None) -> int:
    """Plot finished runs or report on them, or measure checkpoints; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="lightning-nc",
        description="Measure neural collapse.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    versions = "versions of this package, of those it works with, and of Python"
    parser.add_argument("--version", action="version", version=_versions(), help=versions)
    commands = parser.add_subparsers(dest="command", required=True)
    _add_plot(commands.add_parser("plot", help="plot one or more finished runs, in the layout of the paper"))
    _add_measure(commands.add_parser("measure", help="measure the checkpoints of a training"))
    _add_report(commands.add_parser("report", help="write one or more runs as one HTML page that needs no network"))
    given = parser.parse_args(arguments)
    try:
        status: int = given.run(given)
        return status
    except (OSError, ValueError, ImportError) as error:
        remedy = "; install it with pip" if isinstance(error, ModuleNotFoundError) else ""
        print("lightning-nc:", " ".join(f"{error}{remedy}".split()), file=sys.stderr)
        return 1


def _versions() -> str:
    """A line for each package that is installed; none of them is imported."""
    found = {"lightning-neural-collapse": __version__}
    for name in ("torch", "lightning", "pytorch-lightning", "torchmetrics", "numpy", "transformers", "accelerate"):
        with suppress(PackageNotFoundError):
            found[name] = version(name)
    found |= {"Python": platform.python_version(), "platform": platform.platform()}
    return "\n".join(f"{name} {number}" for name, number in found.items())


def _add_measure(measure: argparse.ArgumentParser) -> None:
    measure.set_defaults(run=_measure)
    files = "files of torch.save, Lightning or safetensors, folders of transformers, or a folder of these"
    measure.add_argument("checkpoints", nargs="+", metavar="CHECKPOINT", type=Path, help=files)
    model = (
        "package.module:name of a LightningModule class or of a function that returns a module; torchvision:NAME, timm:NAME or "
        "transformers:NAME; not needed for folders of transformers"
    )
    measure.add_argument("--model", help=model)
    data = "package.module:name of a function that returns a DataLoader, or of a LightningDataModule class"
    measure.add_argument("--data", required=True, help=data)
    for name, what in (("model", "MODEL"), ("data", "DATA")):
        arguments = f"arguments for {what}; they replace those that the checkpoints hold"
        measure.add_argument(f"--{name}-args", nargs="+", default=[], metavar="NAME=VALUE", help=arguments)
    measure.add_argument("--layers", nargs="+", help="names or shell patterns of layers that are measured too")
    measure.add_argument("--metrics", nargs="+", default=["paper"], help="paper, all, or names (default: paper)")
    measure.add_argument("-o", "--out", type=Path, help="CSV file, which plot can read; it must not exist yet")
    measure.add_argument("--plot", type=Path, help="PNG, PDF or SVG file for a figure")
    measure.add_argument("--device", default="cpu", help="where the model runs (default: %(default)s)")
    unsafe = (
        "unpickle whatever a checkpoint asks for, which may run any code: only for checkpoints from a source you trust"
    )
    measure.add_argument("--unsafe", action="store_true", help=unsafe)


def _measure(given: argparse.Namespace) -> int:
    from lightning_nc.sweep import measure_checkpoints, parse_arguments

    return measure_checkpoints(
        given.checkpoints,
        given.model,
        given.data,
        layers=given.layers,
        metrics=given.metrics[0] if len(given.metrics) == 1 else given.metrics,
        model_arguments=parse_arguments("--model-args", given.model_args),
        data_arguments=parse_arguments("--data-args", given.data_args),
        device=given.device,
        unsafe=given.unsafe,
        out=given.out,
        plot=given.plot,
    )


def _add_plot(plot: argparse.ArgumentParser) -> None:
    plot.set_defaults(run=_plot)
    run = (
        "a CSV file, or a directory of CSVLogger, TensorBoardLogger or WandbLogger (offline), the newest file in it; without "
        "one, a checkpoint or trainer_state.json of the callback"
    )
    plot.add_argument("runs", nargs="+", metavar="RUN", type=Path, help=run)
    out = "PNG, PDF or SVG file, or a directory (default: %(default)s)"
    plot.add_argument("-o", "--out", type=Path, default=Path("neural_collapse.png"), help=out)
    frames = "of all runs; marks the value of nc2_etf and nc2_of at an exact frame of the other kind"
    plot.add_argument("-k", "--num-classes", type=_at_least_two, help=frames)
    names = "after the runs: all, paper, or names such as nc1 nc3 (default: what the measurement was asked for)"
    plot.add_argument("--metrics", nargs="+", metavar="NAME", help=names)
    plot.add_argument("--labels", nargs="+", metavar="LABEL", help="after the runs: what to call each of them")
    plot.add_argument("--overlay", action="store_true", help="draw all runs in one set of panels, a color each")
    bands = (
        "with --overlay: draw runs as median and range whose labels are the same without PATTERN (default: the seed)"
    )
    plot.add_argument("--group", nargs="?", const="", metavar="PATTERN", help=bands)
    plot.add_argument("--layer", help="with --overlay: the layer to draw (default: the classifier input)")


def _at_least_two(text: str) -> int:
    if not text.isdecimal() or int(text) < 2:
        raise argparse.ArgumentTypeError(f"must be a whole number of at least 2, got {text}")
    return int(text)


def _plot(given: argparse.Namespace) -> int:
    from lightning_nc.runs import find_log, in_one_step, split_seeds

    if given.labels and len(given.labels) != len(given.runs):
        raise ValueError(f"--labels must name each of the {len(given.runs)} runs, got {len(given.labels)} labels")
    if not given.overlay and (given.group is not None or given.layer is not None):
        raise ValueError("--group and --layer are about one set of panels; pass --overlay too")
    logs: dict[Path, Path] = {}
    for path in given.runs:
        log = path
        with suppress(FileNotFoundError):  # a run may have a checkpoint and no log
            log = find_log(path)
        for other, known in logs.items():
            if log.resolve() == known.resolve():
                raise ValueError(f"{other} and {path} are the same run; pass each run once")
        logs[path] = log
    histories = [_read(log) for log in logs.values()]

    from lightning_nc.plotting import plot_overlay, plot_runs  # after reading, which says what else it needs

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
    with in_one_step(out) as scratch:
        figure.savefig(scratch, dpi=150)
    for log, rows in zip(logs.values(), histories, strict=True):
        print(f"{log}: {len(rows)} measurements")
    print(f"{out}: {len(runs)} run{'s' * (len(runs) > 1)}")
    return 0


def _read(path: Path) -> History:
    """A run, of which curves can be drawn."""
    from lightning_nc.history import History

    history = History.read(path)

    from lightning_nc.plotting.curves import read_curves  # needs matplotlib, which is not the first thing to miss

    try:
        read_curves(history)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    return history


def _add_report(report: argparse.ArgumentParser) -> None:
    report.set_defaults(run=_report)
    run = "a directory with a log or a checkpoint of the run, or a CSV file, a checkpoint (.ckpt) or trainer_state.json"
    report.add_argument("runs", nargs="+", metavar="RUN", type=Path, help=run)
    report.add_argument("-o", "--out", type=Path, default=Path("report.html"), help="HTML file (default: %(default)s)")


def _report(given: argparse.Namespace) -> int:
    from lightning_nc.report import write_report

    paths, out = given.runs, given.out
    if out.is_dir():
        out = out / "report.html"
    elif out.suffix.lower() not in ("", ".html", ".htm"):  # a log or a checkpoint, which the page would replace
        raise ValueError(f"--out must end in .html or be a directory, got {out}")
    places = [path.resolve() for path in paths]
    for place, path in zip(places, paths, strict=True):
        if places.count(place) > 1:
            raise ValueError(f"{path} is given twice; pass each run once")
    runs = {str(path): _read(path) for path in paths}
    write_report(runs, out)
    for name, rows in runs.items():
        print(f"{name}: {len(rows)} measurements")
    print(f"{out}: {len(runs)} run{'s' * (len(runs) > 1)}, {out.stat().st_size / 2**20:.1f} MB")
    return 0


if __name__ == "__main__":
    sys.exit(main())
