"""Figures and a table of the final values, for every logger of a run."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy
from lightning.fabric.utilities import rank_zero_info, rank_zero_warn
from torch.nn.functional import normalize

from lightning_nc.history import History
from lightning_nc.runs import in_one_step, metrics_of
from lightning_nc.scenes import MOST_COSINES, Scene

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["publish_figures", "publish_scene"]

_MOST_CLASSES = 1000  # rows of a table


def publish_figures(loggers: Iterable[Any], histories: Sequence[History]) -> None:
    """Log the figures of a run whose callbacks have kept ``histories``, and print which frame the class means are nearest to.

    The figures are those of :class:`~lightning_nc.History`: the panels, the cosines of the class means, the classes, depth if
    layers were measured, and the geometry if it was kept. W&B gets images and tables of the final values and of the classes,
    TensorBoard and MLflow get figures. For a logger that takes none of these but has a directory, PNG files are saved there.
    Does nothing if matplotlib is not installed.
    """
    rows = [row for history in histories for row in history]
    if not rows:
        return
    kept = next((history for history in histories if history.classes is not None), histories[0])
    if kept.classes is not None:
        rank_zero_info(f"neural collapse: {kept.classes.geometry}")
    if find_spec("matplotlib") is None:
        rank_zero_info(
            "neural collapse: no figures are drawn, because matplotlib is not installed: pip install matplotlib"
        )
        return
    for logger in loggers:
        _attempt(lambda: _publish_all(logger, rows, kept))  # noqa: B023


def publish_scene(loggers: Iterable[Any], scene: Scene) -> None:
    """Log the cosines of the class means and the geometry at one measurement, to loggers that take images."""
    if find_spec("matplotlib") is not None:
        for logger in loggers:
            _attempt(lambda: _publish_scene(logger, scene))  # noqa: B023


def _publish_scene(logger: Any, scene: Scene) -> None:
    if not _takes_images(logger):
        return
    from lightning_nc.plotting import plot_frames, plot_geometry

    _publish(logger, "figures/class_means_by_epoch", plot_frames([scene]), int(scene.step))
    if scene.chosen:
        _publish(logger, "figures/geometry_by_epoch", plot_geometry([scene]), int(scene.step))


def _publish_all(logger: Any, rows: Sequence[Any], kept: History) -> None:
    for name, figure in _figures(rows, kept).items():
        _publish(logger, f"figures/{name}", figure, rows[-1]["step"])
    if hasattr(logger, "log_table"):
        last = {key: value for row in rows for key, value in metrics_of(row).items()}
        logger.log_table(
            "figures/final_values", columns=["metric", "value"], data=[list(item) for item in last.items()]
        )
        if kept.classes is not None and len(kept.classes.labels) <= _MOST_CLASSES:
            table = kept.per_class
            logger.log_table(
                "figures/classes_table", [*table], [list(row) for row in zip(*table.values(), strict=True)]
            )


def _figures(rows: Sequence[Any], kept: History) -> dict[str, Figure]:
    from lightning_nc.plotting import (
        has_depth,
        plot_classes,
        plot_depth,
        plot_frames,
        plot_geometry,
        plot_gram,
        plot_history,
    )

    classes = None if kept.classes is None else len(kept.classes.labels)
    figures = {"neural_collapse": plot_history(rows, num_classes=classes)}
    if has_depth(rows):
        figures["depth"] = plot_depth(rows)
    if kept.scenes:
        figures["class_means"] = plot_frames(kept.scenes)
        if classes is not None and classes <= _MOST_CLASSES:
            figures["classes"] = plot_classes(kept.per_class, kept.scenes)
        if kept.classes is not None and MOST_COSINES < len(kept.classes.labels) <= _MOST_CLASSES:
            unit = normalize(kept.classes.means - kept.classes.means.mean(dim=0), dim=1)
            figures["all_class_means"] = plot_gram(unit @ unit.T, kept.classes.labels)
        if any(scene.chosen for scene in kept.scenes):
            figures["geometry"] = plot_geometry(kept.scenes)
    return figures


def _attempt(publish: Callable[[], None]) -> None:
    try:
        publish()
    except Exception as error:  # a full disk or a server that is gone: the run goes on, or is done and saved
        rank_zero_warn(
            f"the figures of neural collapse could not be written: {error}; callback.plot() draws them again"
        )


def _takes_images(logger: Any) -> bool:
    return hasattr(logger, "log_image") or any(
        hasattr(logger.experiment, name) for name in ("add_figure", "log_figure")
    )


def _publish(logger: Any, name: str, figure: Figure, step: int) -> None:
    experiment, file = logger.experiment, name.rpartition("/")[2]
    if hasattr(logger, "log_image"):
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from PIL import Image

        canvas = FigureCanvasAgg(figure)
        canvas.draw()
        logger.log_image(name, [Image.fromarray(numpy.array(canvas.buffer_rgba()))], step=step)
    elif hasattr(experiment, "add_figure"):
        experiment.add_figure(name, figure, global_step=step)
    elif hasattr(experiment, "log_figure"):
        # MLflow's client needs the run's id; Comet's experiment is the run itself.
        if hasattr(logger, "run_id"):
            place = f"{file}/{step:08d}.png" if file.endswith("_by_epoch") else f"{file}.png"
            experiment.log_figure(logger.run_id, figure, place)
        else:
            experiment.log_figure(name, figure, step=step)
    elif getattr(logger, "log_dir", None):
        Path(logger.log_dir).mkdir(parents=True, exist_ok=True)
        with in_one_step(Path(logger.log_dir) / f"{file}.png") as path:
            figure.savefig(path, dpi=150)
