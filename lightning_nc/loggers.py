"""Figures and a table of the final values, for every logger of a run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy
import torch
from lightning.fabric.utilities import rank_zero_info, rank_zero_warn

from lightning_nc.measuring.classes import MeasuredClasses
from lightning_nc.runs import metrics_of

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["publish_figures"]

_MOST_CLASSES = 1000  # a larger Gram matrix has less than a pixel per pair


def publish_figures(logger: Any, history: Sequence[Mapping[str, Any]], classes: MeasuredClasses | None) -> None:
    """Log the panels of :func:`~lightning_nc.plotting.plot_history` and the Gram matrix of the class means.

    W&B gets images and tables of the final values and of the classes, TensorBoard and MLflow get figures. For a logger that
    takes none of these but has a directory, PNG files are saved there. Does nothing if matplotlib is not installed.
    """
    if find_spec("matplotlib") is None:
        rank_zero_info(
            "neural collapse: no figures are drawn, because matplotlib is not installed: pip install matplotlib"
        )
        return
    from lightning_nc.plotting import plot_gram, plot_history

    figures = {"neural_collapse": plot_history(history, num_classes=None if classes is None else len(classes.labels))}
    if classes is not None and len(classes.labels) <= _MOST_CLASSES:
        unit = torch.nn.functional.normalize(classes.means - classes.means.mean(dim=0), dim=1)
        figures["class_means"] = plot_gram(unit @ unit.T, classes.labels)
    try:
        for name, figure in figures.items():
            _publish(logger, name, figure, step=history[-1]["step"])
        if hasattr(logger, "log_table"):
            last = {key: value for row in history for key, value in metrics_of(row).items()}
            rows = [list(item) for item in last.items()]
            logger.log_table("figures/final_values", columns=["metric", "value"], data=rows)
            if "class_means" in figures and classes is not None:
                columns = classes.table
                logger.log_table(
                    "figures/classes", [*columns], [list(row) for row in zip(*columns.values(), strict=True)]
                )
    except Exception as error:  # a full disk or a server that is gone: the run itself is done and saved
        rank_zero_warn(
            f"the figures of neural collapse could not be written: {error}; callback.plot() draws them again"
        )


def _publish(logger: Any, name: str, figure: Figure, step: int) -> None:
    experiment = logger.experiment
    if hasattr(logger, "log_image"):
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from PIL import Image

        canvas = FigureCanvasAgg(figure)
        canvas.draw()
        logger.log_image(f"figures/{name}", [Image.fromarray(numpy.array(canvas.buffer_rgba()))])
    elif hasattr(experiment, "add_figure"):
        experiment.add_figure(f"figures/{name}", figure, global_step=step)
    elif hasattr(experiment, "log_figure"):
        # MLflow's client needs the run's id; Comet's experiment is the run itself.
        if hasattr(logger, "run_id"):
            experiment.log_figure(logger.run_id, figure, f"{name}.png")
        else:
            experiment.log_figure(f"figures/{name}", figure, step=step)
    elif getattr(logger, "log_dir", None):
        Path(logger.log_dir).mkdir(parents=True, exist_ok=True)
        figure.savefig(Path(logger.log_dir) / f"{name}.png", dpi=150)
