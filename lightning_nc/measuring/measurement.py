"""What a measurement has found: the values, and what is known beside them."""

from __future__ import annotations

import warnings
from typing import Any

from lightning_nc.certainty import jackknife
from lightning_nc.functional.geometry import Geometry, random_directions
from lightning_nc.keys import make_key
from lightning_nc.measuring.classes import MeasuredClasses
from lightning_nc.measuring.collector import Collector
from lightning_nc.measuring.probe import INPUT

__all__ = ["Measurement", "measurement"]


class Measurement(dict[str, float]):
    """What :func:`measure` returns: the metrics by key, each a float without unit, and what is known beside them.

    Attributes:
        classes: the statistics of the classes at the classifier's input; None without a classifier.
        baseline: the values that chance alone gives, by key: ``"permuted"``, with labels permuted at random, and ``"random"``, of
            random directions in place of class means and weight; None unless asked for.
        intervals: lower and upper end of the confidence interval by key; None unless asked for.
    """

    classes: MeasuredClasses | None = None
    baseline: dict[str, dict[str, float]] | None = None
    intervals: dict[str, tuple[float, float]] | None = None

    @property
    def geometry(self) -> Geometry | None:
        """Which frame the class means of the classifier's input are nearest to; None without a classifier."""
        return None if self.classes is None else self.classes.geometry

    @property
    def per_class(self) -> dict[str, list[Any]]:
        """A table of the classes, by column, as ``pandas.DataFrame`` takes it; empty without a classifier."""
        return {} if self.classes is None else self.classes.table


def measurement(
    collector: Collector, level: float | None = None, stage: str | None = None, loader: int = 0
) -> Measurement:
    """What a collector has found: the values by key, see :func:`make_key`, and what is known beside them."""
    found = Measurement(collector.values(stage, loader))
    if INPUT in collector.metrics:
        metric = collector.metrics[INPUT]
        missing = collector.few.missing() + [c for c in collector.few.samples if c == collector.probe.ignore_index]
        if missing:
            collector.probe.warn_once(
                "geometry",
                f"geometry={collector.options.geometry}: no picture is kept, because class {missing[0]} has no sample in the "
                "data, or is ignored; choose classes that have some",
            )
        found.classes = MeasuredClasses(
            metric.moments(), metric.classifier()[0], {} if missing else collector.few.samples
        )
    elif collector.options.geometry:
        collector.probe.warn_once(
            "geometry",
            f"geometry={collector.options.geometry}: no picture is kept, because the input of a classifier was not measured; "
            "pass classifier= if the model has one",
        )
    if collector.options.baseline:
        found.baseline = {"permuted": _permuted(collector), "random": _random(collector)}
    if level is not None:
        found.intervals = _intervals(collector, level)
    return found


def _permuted(collector: Collector) -> dict[str, float]:
    """The values with permuted labels, by key."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what is said of the labels themselves is enough
        return {
            make_key(name, layer): float(value)
            for layer, metric in collector.permuted.items()
            for name, value in metric.compute().items()
            if name in collector.names
        }


def _random(collector: Collector) -> dict[str, float]:
    """The values of random directions in place of the class means and the weight, by key."""
    found: dict[str, float] = {}
    for layer, metric in collector.metrics.items():
        names = [name for name in metric.metrics if name in collector.names]
        counts = metric.counts[metric.counts > 0].cpu()
        if len(counts) > 1:
            values = random_directions(
                names, len(counts), metric.num_features, counts=counts, pairs=collector.probe.pairs
            )
            found |= {make_key(name, layer): value for name, value in values.items()}
    return found


def _intervals(collector: Collector, level: float) -> dict[str, tuple[float, float]]:
    """Confidence intervals by key, of the metrics that one pass gives."""
    found = {}
    for layer, shards in collector.shards.items():
        names = [name for name in collector.metrics[layer].metrics if name in collector.names]
        parts = collector.metrics[layer].classifier()
        for name, ends in jackknife(names, shards.moments, *parts, level, collector.probe.pairs).items():
            found[make_key(name, layer)] = ends
    return found
