"""What the callbacks keep of their measurements."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from platform import python_version
from typing import TYPE_CHECKING, Any

from lightning.fabric.utilities import rank_zero_warn
from torch import Tensor

from lightning_nc.functional.geometry import Geometry
from lightning_nc.history import History
from lightning_nc.measuring.classes import MeasuredClasses
from lightning_nc.measuring.collector import Collector
from lightning_nc.measuring.measurement import measurement
from lightning_nc.saved import checked

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["Results"]


class Results:
    """A history and its figures. What is known of the classes is from the last measurement: of training data if there are any,
    else of the stage and dataloader that were measured first.
    """

    stages: Sequence[str]
    history: History
    previous_histories: list[History]

    @property
    def measured_classes(self) -> MeasuredClasses | None:
        """The classes at the classifier's input; None before the first measurement."""
        return self.history.classes

    @property
    def class_means(self) -> Tensor | None:
        """The means of the classes that have samples, (K, d), on the CPU; None before the first measurement."""
        return None if self.measured_classes is None else self.measured_classes.means

    @property
    def geometry(self) -> Geometry | None:
        """Which frame the class means are nearest to; None before the first measurement."""
        return None if self.measured_classes is None else self.measured_classes.geometry

    @property
    def per_class(self) -> dict[str, list[Any]]:
        """A table by class, as ``pandas.DataFrame`` takes it; see :func:`lightning_nc.functional.geometry.per_class`."""
        return self.history.per_class

    def plot(self) -> Figure:
        """The paper's panels, NC1, NC2 and NC3 over the epochs; see :meth:`History.plot`."""
        return self.history.plot(num_classes=len(self.measured_classes.labels) if self.measured_classes else None)

    def plot_depth(self) -> Figure:
        """Every metric against depth, a curve per epoch; see :meth:`History.plot_depth`."""
        return self.history.plot_depth()

    def plot_classes(self) -> Figure:
        """The table of the classes and the cosines of their means; see :meth:`History.plot_classes`."""
        return self.history.plot_classes()

    def plot_frames(self) -> Figure:
        """The cosines of the class means in the first, middle and last epoch; see :meth:`History.plot_frames`."""
        return self.history.plot_frames()

    def plot_geometry(self) -> Figure:
        """The classes of ``geometry=`` in the first, middle and last epoch; see :meth:`History.plot_geometry`."""
        return self.history.plot_geometry()

    def animate(self, path: str | Path) -> Path:
        """The classes of ``geometry=`` over the whole training; see :meth:`History.animate`."""
        return self.history.animate(path)

    def restore(self, state: Mapping[str, Any]) -> None:
        """Continue the history of a checkpoint. Of what cannot be read it warns; if these are the rows, a new history begins."""
        try:
            self.history = History.from_state(checked(state, "the checkpoint"))
        except ValueError as error:
            rank_zero_warn(f"{error}; the history begins anew")
            self.history = History()

    def remember(
        self, collector: Collector, stage: str, loader: int, *, epoch: float, step: float, **marks: Any
    ) -> dict[str, float]:
        """Append the values of a collector to the history; the values by the keys under which they are logged.

        The row also has the distances to the frames that exist for these classes, and the nearest.
        """
        found = measurement(collector, None, stage, loader)
        if not self.history.about:
            self.history.about = {"mode": getattr(self, "mode", "exact"), **_about(collector, self.stages)}
        self.history.append(found, epoch=epoch, step=step, stage=stage, **marks)
        return found


def _about(collector: Collector, stages: Sequence[str]) -> dict[str, str]:
    """Settings and versions in words."""
    probe = collector.probe
    found = {
        "classifier": "" if probe.head is None else probe.head.name,
        "layers": ", ".join(layer for layer in collector.metrics if layer),
        "metrics": ", ".join(collector.names),
        "stages": ", ".join(stages),
        "pooling of positions": probe.pool if isinstance(probe.pool, str) else "a function",
        "classes": str(probe.classes),
        "features": "".join(str(metric.num_features) for layer, metric in collector.metrics.items() if not layer),
        "samples": str(max(int(metric.counts.sum()) for metric in collector.metrics.values())),
        "Python": python_version(),
    }
    for package in ("lightning-neural-collapse", "torch", "lightning", "pytorch-lightning", "transformers"):
        with suppress(PackageNotFoundError):
            found[package] = version(package)
    return {name: text for name, text in found.items() if text}
