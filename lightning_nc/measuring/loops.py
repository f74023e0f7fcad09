"""Running loops of training, validation and test, whose batches are measured without an extra pass."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import chain
from typing import Any

from torch import nn
from torch.nn.parameter import is_lazy

from lightning_nc.measuring.collector import Collector, Options
from lightning_nc.measuring.hooks import FirstInput, tensors_in
from lightning_nc.measuring.probe import Probe

__all__ = ["RunningLoops", "is_ready"]


class RunningLoops:
    """The collectors of loops that are running, by stage and dataloader.

    Args:
        probe: what to measure of a batch; raises from within a loop if it is strict.
        names: the names of the metrics.
    """

    def __init__(self, probe: Probe, names: Sequence[str]) -> None:
        self.probe, self.names = probe, names
        self._collectors: dict[str, dict[int, Collector]] = {}
        self._settings: dict[str, tuple[Sequence[str], Options]] = {}  # names and options by stage
        self._first_input: FirstInput | None = None

    def begin(
        self, stage: str, active: bool, options: Options | None = None, names: Sequence[str] | None = None
    ) -> None:
        """Measure the batches of ``stage`` from now on, or stop measuring them; ``names`` in place of all, if given."""
        self._collectors.pop(stage, None)
        names = self.names if names is None else names
        if active and names:
            self._collectors[stage], self._settings[stage] = {}, (names, options or Options())

    def is_active(self, stage: str) -> bool:
        """Whether the batches of ``stage`` are measured."""
        return stage in self._collectors

    def start(self, stage: str, loader: int, model: nn.Module, batch: Any, attach: Callable[[], None]) -> None:
        """Before the model runs on a batch; ``attach`` attaches the probe if it is not attached yet."""
        if not self.is_active(stage) or not is_ready(self.probe, model):
            return
        fresh = Collector(self.probe, *self._settings[stage])
        collector = self._collectors[stage].setdefault(loader, fresh)
        collector.start(batch, attach)
        self._raise_if_strict(collector)

    def finish(self, stage: str, loader: int, own: int | None) -> None:
        """After the model ran on a batch; see :meth:`Collector.finish`."""
        if (collector := self._collectors.get(stage, {}).get(loader)) is not None:
            collector.finish(own)
            self._raise_if_strict(collector)

    def end(self, stage: str, count: int | None = None) -> dict[int, Collector]:
        """The collectors of ``stage`` by dataloader; of ``count`` dataloaders, if given, also those without a batch."""
        collectors = self._collectors.pop(stage, {})
        for loader in range(count or 0):
            if loader not in collectors:
                collectors[loader] = Collector(self.probe, *self._settings[stage])
                collectors[loader].error = LookupError("no batch came to this rank")
        return dict(sorted(collectors.items()))

    def watch_inputs(self, model: nn.Module, batch: Any) -> None:
        """Look, in the next step, at what the model is called on."""
        self.stop_watching()
        self._first_input = FirstInput(model, tensors_in(batch))

    def stop_watching(self) -> None:
        """Remove the hooks of :meth:`watch_inputs`."""
        if self._first_input is not None:
            self._first_input.remove()
        self._first_input = None

    def check_inputs(self) -> None:
        """Warn, once in a run, if the model was called on other rows than those of the batch, as mixup does."""
        watched = self._first_input
        self.stop_watching()
        if watched is not None and watched.is_given is False:
            self.probe.warn_once(
                "inputs",
                "the training step calls the model on other values than those of the batch. If it mixes or permutes samples "
                "(mixup, CutMix, shuffling), features and labels do not belong together and the online values are wrong: use "
                "mode='exact'. If it only scales or augments each sample, ignore this",
            )

    def _raise_if_strict(self, collector: Collector) -> None:
        if self.probe.strict and collector.error is not None:
            raise collector.error


def is_ready(probe: Probe, model: nn.Module) -> bool:
    """False while a lazy layer waits for the first training batch to take its shape, and its numbers, from."""
    return probe.attached or not any(map(is_lazy, chain(model.parameters(), model.buffers())))
