"""What was measured last of the classes at the classifier's input: their means, the frame these are near to, and a table."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

from torch import Tensor

from lightning_nc.functional.geometry import Geometry, nearest_frame, per_class
from lightning_nc.moments import ClassMoments

__all__ = ["MeasuredClasses"]


@dataclass
class MeasuredClasses:
    """The statistics of the classes on the CPU, without the scatter matrix, and the weight of the classifier of that moment.

    Args:
        moments: the statistics.
        weight: (K, d).
        samples: a few samples of some classes, (n, d) by class.
    """

    moments: ClassMoments
    weight: Tensor | None = None
    samples: dict[int, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        held = {name: part.detach().cpu() for name, part in vars(self.moments).items() if name != "scatter"}
        self.moments = replace(self.moments, **held, scatter=self.moments.scatter[:0, :0].cpu())
        self.weight = None if self.weight is None else self.weight.cpu()
        self.samples = {label: rows.cpu() for label, rows in self.samples.items()}

    @property
    def labels(self) -> list[int]:
        """The classes that have samples."""
        return self.moments.counts.nonzero().flatten().tolist()

    @property
    def means(self) -> Tensor:
        """Their means, (K, d)."""
        return self.moments.means[self.moments.counts > 0]

    @cached_property
    def geometry(self) -> Geometry:
        """The distances to the frames that exist, and the nearest."""
        return nearest_frame(self.moments)

    @cached_property
    def table(self) -> dict[str, list[Any]]:
        """A row for each class, by column; see :func:`per_class`."""
        return per_class(self.moments, self.weight)
