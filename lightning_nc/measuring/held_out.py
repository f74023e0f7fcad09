"""Held-out data around the class means of the training data."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

from torch import Tensor

from lightning_nc.functional import METRICS
from lightning_nc.measuring.collector import Collector, Options
from lightning_nc.measuring.probe import Probe

__all__ = ["TrainingMeans"]


@dataclass
class TrainingMeans:
    """The class means of the training data by layer, and the fingerprint of the weights that gave them.

    Args:
        expected: whether the training data are measured in most epochs, so that held-out data can be compared with them.
    """

    expected: bool
    centers: dict[str, Tensor] = field(default_factory=dict)
    weights: str = ""

    def keep(self, collector: Collector, weights: str) -> None:
        """Keep those of a measurement of the training data."""
        self.centers, self.weights = collector.centers(), weights

    def settings(
        self, probe: Probe, names: Sequence[str], stage: str, options: Options, changed: Callable[[str], bool]
    ) -> tuple[tuple[str, ...], Options]:
        """The names and options of a measurement of held-out data; says once what differs from the usual.

        If the means are not those of the weights now, the metrics that compare samples with them are left out where they
        are expected; else the samples are compared with their own class means.

        Args:
            probe: warns.
            names: of the metrics that are asked for.
            stage: of the data.
            options: those of the training data.
            changed: whether the weights are others than those with a fingerprint.
        """
        known = bool(self.centers) and not changed(self.weights)
        options = replace(options, centers=self.centers if known else None, keep_weight=True)
        compared = [name for name in names if METRICS[name].samples]
        if known or not compared:
            return tuple(names), options
        what, reason = (
            f"{', '.join(compared)} of the stage {stage!r}",
            "the training data were not measured with these weights",
        )
        if self.expected:
            probe.warn_once(f"no centers {stage}", f"{what} left out, because {reason}")
            return tuple(name for name in names if name not in compared), options
        probe.warn_once(
            f"own centers {stage}",
            f"{what} are taken around the class means of these samples, not around those of the training data, because {reason}; "
            "mode='exact' and stages=('train', ...) measure the training data",
        )
        return tuple(names), options
