"""The metrics of one dataloader by layer, from the batches of a pass or of a running loop."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
import torch.distributed as dist
from lightning.fabric.utilities import rank_zero_info
from torch import Tensor

from lightning_nc.functional import METRICS
from lightning_nc.functional.samples import effective_depth
from lightning_nc.keys import DEPTH, INPUT_NAME, base_name, make_key
from lightning_nc.measuring.distributed import all_max, all_raise, check_same_shapes
from lightning_nc.measuring.kept import FewOfEach, KeptSamples, Shards
from lightning_nc.measuring.probe import INPUT, NotCalledError, Probe
from lightning_nc.metrics import NeuralCollapse

__all__ = ["FEATURE_BUDGET", "SCATTER_LIMIT", "Collector", "Options"]

SCATTER_LIMIT = 2**30
"""Bytes that the scatter matrices of all layers may take together; features beyond it need a second look."""

FEATURE_BUDGET = 2**30
"""Bytes of features that are kept by default for a second look at them; beyond it the model runs a second time."""


@dataclass(frozen=True)
class Options:
    """What is measured beside the metrics of a dataloader's own samples.

    Args:
        centers: class means of other data by layer, (K, d), a row of nan for a class without a mean; see
            :class:`lightning_nc.NeuralCollapse`.
        budget: bytes of features that may be kept, on each rank.
        baseline: whether the metrics with permuted labels are measured.
        shards: whether the statistics of parts of the data are kept, for intervals.
        keep_weight: use the classifier's weight as it is at the first batch, because it is replaced before the values are
            computed: averaged weights are swapped out at the end of validation.
        geometry: the classes of which a few samples are kept for pictures.
    """

    centers: Mapping[str, Tensor] | None = None
    budget: float = FEATURE_BUDGET
    baseline: bool = False
    shards: bool = False
    keep_weight: bool = False
    geometry: tuple[int, ...] = ()


class Collector:
    """The metrics of one dataloader by layer, updated batch by batch.

    In a running loop nothing is raised before :meth:`synchronize`, where all ranks of a distributed run meet. Some metrics need
    a second look at the samples, when the class means are known: :meth:`look_again`.

    Args:
        probe: what to measure of a batch.
        names: the names of the metrics.
        options: what is measured beside them.
    """

    def __init__(self, probe: Probe, names: Sequence[str], options: Options | None = None) -> None:
        self.probe, self.names, self.options = probe, names, options or Options()
        self.metrics: dict[str, NeuralCollapse] = {}
        self.projected: dict[str, NeuralCollapse] = {}  # NC1 of features that are too wide for a scatter matrix
        self.permuted: dict[str, NeuralCollapse] = {}  # the metrics with permuted labels
        self.shards: dict[str, Shards] = {}
        self.kept = KeptSamples(self.options.budget)
        self.few = FewOfEach(self.options.geometry)
        self.batches = self.samples = 0
        self.error: Exception | None = None
        self._spans: dict[str, Tensor] = {}
        self._looking = False  # at the samples again, with the class means known
        self._labels: list[Tensor] = []  # of this rank, to be permuted
        self._drawn = torch.zeros(0, dtype=torch.long)  # the permuted labels of this rank
        self._missed: NotCalledError | None = None  # a step may leave the model out; an error only if all do

    def start(self, batch: Any, attach: Callable[[], None]) -> None:
        """Before the model runs on a batch; ``attach`` attaches the probe if it is not attached yet."""
        if self.error is None:
            try:
                attach()
                self.probe.start(batch)
            except Exception as error:
                self.error = error

    def finish(self, own: int | None = None) -> None:
        """After the model ran; of a padded dataloader only the first ``own`` samples in all belong to this rank."""
        if self.error is None:
            try:
                self.update(own)
                self.batches += 1
            except NotCalledError as error:
                self._missed = error
            except Exception as error:
                self.error = error

    def update(self, own: int | None = None) -> None:
        """Update the metrics with the features that the probe recorded."""
        features, target = self.probe.features()
        for layer in [layer for layer in self.metrics if layer not in features]:  # left out since this batch
            for held in (self.metrics, self.shards, self._spans, self.projected, self.permuted):
                held.pop(layer, None)
        own = None if own is None else max(own - self.samples, 0)
        target = target[:own]
        rows, self.samples, target = slice(target.numel()), self.samples + len(target), target.flatten()
        self._add({layer: values[rows] for layer, values in features.items()}, target)

    def update_ood(self) -> None:
        """Update ``nc5`` with the features of no class that the probe recorded."""
        for layer, values in self.probe.features()[0].items():
            if layer in self.metrics and "nc5" in self.metrics[layer].metrics:
                self.metrics[layer].update_ood(values)

    def _add(self, features: Mapping[str, Tensor], target: Tensor) -> None:
        for layer, values in features.items():
            # A target_fn may look labels up elsewhere, and a model may span several devices.
            labels = target.to(values.device)
            if self._looking:
                self._look_at(layer, values, labels)
            elif (metric := self._metric(layer, values.shape[1], values.device)) is not None:
                if metric.num_features != values.shape[1]:
                    raise ValueError(
                        f"features must have {metric.num_features} columns as in the first batch, got {values.shape[1]}; inputs "
                        "of varying size need pool='mean' or a callable"
                    )
                metric.update(values, labels)
                if layer in self.shards:
                    kept = labels != self.probe.ignore_index
                    self.shards[layer].update(values[kept], labels[kept])
        if INPUT in features and not self._looking:
            self.few.add(features[INPUT], target.to(features[INPUT].device))
        if self._looking:
            self._drawn = self._drawn[len(target) :]
        elif self.options.baseline or any(map(self._looks_later, self.metrics)):
            self.kept.add({layer: features[layer] for layer in self.metrics}, target)
            self._labels += [target.cpu()] if self.options.baseline else []

    def prepare(self, device: torch.device) -> None:
        """Create the metrics, so that a rank without samples has them too."""
        for layer, width in self.probe.widths.items():
            if width:
                self._metric(layer, width, device)

    def synchronize(self, ranks: torch.device | None) -> bool:
        """Merge over the ranks, whose collectives are on the device ``ranks``; True when done. Raise what went wrong."""
        all_raise(self.error or (None if self.batches else self._missed), ranks)
        if ranks is None:
            return True
        if self._looking:
            for layer in self.metrics:
                if self._looks_later(layer):
                    self.metrics[layer].merge_comparison_over_ranks()
        held = [self.projected, self.permuted] if self._looking else [self.metrics]
        for metrics in held:
            check_same_shapes({layer: metric.num_features for layer, metric in metrics.items()}, ranks)
            for metric in metrics.values():
                metric.merge_over_ranks()
        if not self._looking:
            for shards in self.shards.values():
                shards.merge_over_ranks()
            self.few.merge_over_ranks()
        return True

    def conclude(self, ranks: torch.device | None) -> bool:
        """After a running loop: merge over the ranks, and look again at the samples that were kept; True when done."""
        self.synchronize(ranks)
        self.look_again(ranks, second_pass=False)
        return True

    def look_again(self, ranks: torch.device | None, second_pass: bool) -> bool:
        """Look at the samples again, now that the class means are known, if a metric needs that.

        Args:
            ranks: in a distributed run, the device of its collectives.
            second_pass: whether the model can run on the data again.

        Returns:
            Whether it must run again, since the samples were not kept. Then, or when this has looked at the kept ones, the ranks
            must be merged once more by :meth:`synchronize`.
        """
        wide = self.too_wide() if second_pass else {}
        if not (wide or self.options.baseline or any(map(self._looks_later, self.metrics))):
            return False
        fits = self.kept.fits and not wide
        if ranks is not None:
            fits = not all_max(not fits, ranks)
        if not (fits or second_pass):
            self._leave_out_samples()
            return False
        self._start_look(wide, ranks)
        if not fits:
            self.kept.drop()
            if self.probe.is_new("two passes"):
                rank_zero_info(f"neural collapse: {_why_again(wide, self.options.budget)}")
            return True
        for features, target in self.kept:
            self._add(features, target)
        self.kept.drop()
        self.synchronize(ranks)
        return False

    def _start_look(self, wide: Mapping[str, int], ranks: torch.device | None) -> None:
        self._looking = True
        for layer in wide:
            # NC1 does not change when the features are projected on the span of the class means.
            span = self.metrics[layer].span()
            if not span.shape[1]:  # all class means coincide: nc1 is nan, as it is for features that are not wide
                span = span.new_zeros(len(span), 1)
            if ranks is not None:
                dist.broadcast(span, src=0)
            self._spans[layer] = span
            self.projected[layer] = self._create(span.shape[1], ["nc1"], span.device)
        if self.options.baseline:
            self._drawn = _permuted(torch.cat([*self._labels, self._drawn]), int(self.probe.ignore_index), ranks)
            for layer, metric in self.metrics.items():
                names = [
                    name for name in metric.metrics if not METRICS[name].samples and "ood" not in METRICS[name].needs
                ]
                if names:
                    parts = self.parts() if layer == INPUT else (None, None)
                    self.permuted[layer] = self._create(metric.num_features, names, metric.device, *parts)

    def _look_at(self, layer: str, values: Tensor, labels: Tensor) -> None:
        if self._looks_later(layer):
            self.metrics[layer].compare(values, labels)
        if layer in self.projected:
            self.projected[layer].update(values.to(self._spans[layer].dtype) @ self._spans[layer], labels)
        if layer in self.permuted:
            self.permuted[layer].update(values, self._drawn[: len(labels)].to(labels))

    def _looks_later(self, layer: str) -> bool:
        """Whether a metric compares samples with class means that are known only after the pass."""
        metric = self.metrics.get(layer)
        return metric is not None and metric.compares and metric.centers is None

    def too_wide(self) -> dict[str, int]:
        """The layers, with the widths of their features, whose NC1 needs a second pass."""
        wanted = "nc1" in self.names
        return {
            layer: metric.num_features
            for layer, metric in self.metrics.items()
            if wanted and not any(METRICS[name].scatter for name in metric.metrics)
        }

    def values(self, stage: str | None = None, loader: int = 0) -> dict[str, float]:
        """The values by key, see :func:`make_key`; those that need the classifier's weight for its input alone."""
        _warn_of_left_out(self)
        values: dict[str, float] = {}
        for layer, metric in self.metrics.items():
            with self._naming(layer, stage):
                computed = {**metric.compute()}
                computed |= self.projected[layer].compute() if layer in self.projected else {}
            for name, value in computed.items():
                if base_name(name) in self.names:
                    values[make_key(name, layer, stage, loader)] = float(value)
        errors = [values.get(make_key("ncc_error", layer, stage, loader)) for layer in self.metrics if layer != INPUT]
        errors.append(values.get(make_key("ncc_error", INPUT, stage, loader)))
        known = [error for error in errors if error is not None]
        if len(known) == len(errors) > 1:
            values[make_key(DEPTH, INPUT, stage, loader)] = effective_depth(known)
        if not values:
            raise LookupError(
                f"nothing can be measured: {', '.join(self.names)} need the weight or bias of a classifier, or are left out as a "
                "warning says"
            )
        return values

    def _leave_out_samples(self) -> None:
        """Measure no metric that needs the samples again."""
        left_out: dict[str, None] = {}
        for metric in self.metrics.values():
            if metric.compares and metric.centers is None:
                left_out |= dict.fromkeys(name for name in metric.metrics if METRICS[name].samples)
                metric.metrics = tuple(name for name in metric.metrics if not METRICS[name].samples)
                metric.compares = False
        self.probe.warn_once(
            "budget",
            f"{', '.join(left_out)} left out: the features do not fit into feature_budget={self.options.budget:g} bytes, and "
            "only mode='exact' can make a second pass, on the training data",
        )

    @contextmanager
    def _naming(self, layer: str, stage: str | None) -> Iterator[None]:
        """Let the warnings of a metric name its layer and stage, and appear once in a run."""
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            yield
        where = (f"layer {layer!r}" if layer else INPUT_NAME) + (f", stage {stage!r}" if stage else "")
        for warning in caught:
            self.probe.warn_once(f"{where}: {warning.message}", f"{where}: {warning.message}")

    def centers(self) -> dict[str, Tensor]:
        """The class means by layer, (K, d), with a row of nan for a class without a sample."""
        return {
            layer: metric.means.where((metric.counts > 0).unsqueeze(1), torch.nan)
            for layer, metric in self.metrics.items()
        }

    def _metric(self, layer: str, width: int, device: torch.device) -> NeuralCollapse | None:
        if layer in self.metrics:
            return self.metrics[layer]
        weight, bias = self.parts() if layer == INPUT else (None, None)
        given = {"ood"} | {part for part, tensor in (("weight", weight), ("bias", bias)) if tensor is not None}
        names = _that_fit([name for name in self.names if given.issuperset(METRICS[name].needs)], self.probe)
        if not names:
            return None
        taken = sum(8 * m.num_features**2 for m in self.metrics.values() if any(METRICS[n].scatter for n in m.metrics))
        if 8 * width**2 > SCATTER_LIMIT - taken and self.probe.classes < width:  # else a projection gains nothing
            names = [name for name in names if not METRICS[name].scatter] or ["nc1_trace"]  # for its class means
        metric = self._create(
            width, names, device, self._source(0, weight), self._source(1, bias), self._centers_of(layer, width)
        )
        metric.keeps_samples = False  # they are kept here, for all purposes
        self.metrics[layer] = metric
        if self.options.shards:
            self._create_shards(layer, width, device)
        return metric

    def _centers_of(self, layer: str, width: int) -> Tensor | None:
        centers = None if self.options.centers is None else self.options.centers.get(layer)
        return centers if centers is not None and centers.shape[1] == width else None

    def _create_shards(self, layer: str, width: int, device: torch.device) -> None:
        scatter = any(METRICS[name].scatter for name in self.metrics[layer].metrics)
        try:
            self.shards[layer] = Shards(self.probe.classes, width, device, scatter)
        except ValueError as error:
            self.probe.warn_once(f"shards {layer}", f"no intervals for {layer or f'the {INPUT_NAME}'}: {error}")

    def _create(
        self,
        width: int,
        names: Sequence[str],
        device: torch.device,
        weight: Any = None,
        bias: Any = None,
        centers: Tensor | None = None,
    ) -> NeuralCollapse:
        with torch.device(device):
            return NeuralCollapse(
                self.probe.classes,
                width,
                weight,
                bias,
                metrics=names,
                ignore_index=int(self.probe.ignore_index),
                pairs=self.probe.pairs,
                centers=centers,
                sync_on_compute=False,
            )

    def _source(self, part: int, tensor: Tensor | None) -> Any:
        """Where a metric reads the classifier's weight (0) or bias (1), ``tensor`` now."""
        head = self.probe.head
        if tensor is None or head is None:
            return None
        return tensor.clone() if self.options.keep_weight else lambda: head.parts()[part]

    def parts(self) -> tuple[Tensor | None, Tensor | None]:
        """Weight and bias of the classifier; says once which metrics are left out without them."""
        head = self.probe.head
        weight, bias = (None, None) if head is None else head.parts()
        part = "weight" if weight is None else "bias"
        missing = [name for name in self.names if part in METRICS[name].needs]
        if head is not None and bias is None and missing:
            reason = (
                "does not compute x W' + b with a weight that it shows (a cosine head, for example), or cannot be called alone"
                if weight is None
                else "has no bias"
            )
            self.probe.warn_once(
                "parts",
                f"{', '.join(missing)} left out: the classifier {head.name!r}, a {type(head.module).__name__}, {reason}",
            )
        return weight, bias


def _that_fit(names: list[str], probe: Probe) -> list[str]:
    """The metrics whose tables of pairs of classes are not too large; says once which are left out."""
    needed = 8 * probe.classes**2
    if "nc1_cdnv_directional" not in names or needed <= SCATTER_LIMIT:
        return names
    probe.warn_once(
        "pairs of classes",
        f"nc1_cdnv_directional left out: the pairs of {probe.classes} classes would take {needed / 2**30:.1f} GiB",
    )
    return [name for name in names if name != "nc1_cdnv_directional"]


def _permuted(labels: Tensor, ignore_index: int, ranks: torch.device | None) -> Tensor:
    """A random permutation of the labels of all ranks: this rank's share of it. What is ignored stays where it is."""
    used = labels != ignore_index
    shares = [labels[used]]
    if ranks is not None:
        shares = [labels] * dist.get_world_size()
        dist.all_gather_object(shares, labels[used])
    start = sum(map(len, shares[: dist.get_rank()])) if ranks is not None else 0
    everything = torch.cat(shares)
    order = torch.randperm(len(everything), generator=torch.Generator().manual_seed(0))
    return labels.masked_scatter(used, everything[order][start : start + int(used.sum())])


def _warn_of_left_out(collector: Collector) -> None:
    """Say once which metrics features are too wide for."""
    if wide := collector.too_wide().keys() - collector.projected.keys():
        collector.probe.warn_once(
            "wide",
            f"nc1 of {', '.join(layer or f'the {INPUT_NAME}' for layer in wide)} is left out: features this wide need a "
            "second pass, which only mode='exact' makes, on the training data. Fewer layers or pool='mean' avoid it",
        )
    lost = {
        layer or f"the {INPUT_NAME}": [
            n for n in collector.names if METRICS[n].scatter and n not in (*metric.metrics, "nc1")
        ]
        for layer, metric in collector.metrics.items()
    }
    if names := dict.fromkeys(chain.from_iterable(lost.values())):
        collector.probe.warn_once(
            "wide scatter",
            f"{', '.join(names)} of {', '.join(layer for layer in lost if lost[layer])} left out: features this wide would "
            f"need scatter matrices of more than {SCATTER_LIMIT / 2**30:g} GiB together; "
            "measure fewer layers or use pool='mean'",
        )


def _why_again(wide: Mapping[str, int], budget: float) -> str:
    if not wide:
        return (
            f"the features take more than feature_budget={budget:g} bytes, so what compares samples with the class means takes a "
            "second pass over the data; a larger feature_budget avoids it"
        )
    sizes = [f"{layer or INPUT_NAME} {width}" for layer, width in wide.items()]
    named = ", ".join(sizes[:5]) + f" and {len(sizes) - 5} more" * (len(sizes) > 5)
    return (
        f"the features of {named} would need scatter matrices of more than {SCATTER_LIMIT / 2**30:g} GiB together, so their nc1 "
        "takes a second pass over the data; fewer layers or pool='mean' avoid it"
    )
