"""What the callbacks keep of their measurements."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor

from lightning_nc.functional.geometry import Geometry
from lightning_nc.history import History
from lightning_nc.measuring.classes import MeasuredClasses
from lightning_nc.measuring.collector import Collector
from lightning_nc.measuring.measurement import measurement

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["Results"]


class Results:
    """A history, and the classes at the classifier's input as they were measured last: on training data if these are measured."""

    stages: Sequence[str]
    history: History
    previous_histories: list[History]
    measured_classes: MeasuredClasses | None = None

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
        return {} if self.measured_classes is None else self.measured_classes.table

    def plot(self) -> Figure:
        """The paper's panels, NC1, NC2 and NC3 over the epochs of ``history``, as a matplotlib figure."""
        return self.history.plot(num_classes=len(self.measured_classes.labels) if self.measured_classes else None)

    def remember(
        self, collector: Collector, stage: str, loader: int, *, epoch: float, step: float, **marks: Any
    ) -> dict[str, float]:
        """Append the values of a collector to the history; the values by the keys under which they are logged.

        The row also has the distances to the frames that exist for these classes, and the nearest.
        """
        found = measurement(collector, None, stage, loader)
        if found.classes is not None and (stage == "train" or "train" not in self.stages):
            self.measured_classes = found.classes
        self.history.append(found, epoch=epoch, step=step, stage=stage, **marks)
        return found
