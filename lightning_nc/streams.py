"""Batches that are measured as they pass, in a training, validation or test loop."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from lightning_nc.features import NotCalledError
from lightning_nc.metrics import synchronise
from lightning_nc.probe import Moments, Probe
from lightning_nc.processes import agree

__all__ = ["Stream"]


@dataclass
class Stream:
    """What is gathered of one data loader whose batches pass.

    Nothing is raised before :meth:`total`: in a distributed run all processes must come there.
    """

    probe: Probe
    moments: Moments = field(default_factory=dict)
    batches: int = 0
    samples: int = 0
    error: Exception | None = None
    missed: NotCalledError | None = None  # in a step that left the model out; an error only where all did

    def open(self, batch: Any, attach: Callable[[], None]) -> None:
        """Before a batch passes; ``attach`` puts the probe in place where it is not yet."""
        if self.error is None:
            try:
                attach()
                self.probe.arm(batch)
            except Exception as error:
                self.error = error

    def close(self, share: int | None = None) -> None:
        """After a batch has passed; of a loader that is padded, only the first ``share`` samples are this process's own."""
        if self.error is None:
            try:
                left = None if share is None else max(share - self.samples, 0)
                self.samples += self.probe.absorb(self.moments, self.batches, left)
                self.batches += 1
            except NotCalledError as error:
                self.missed = error
            except Exception as error:
                self.error = error

    def total(self, agree_on: torch.device | None) -> Moments:
        """The moments, of all processes where ``agree_on`` is the device of their collectives; raises what went wrong."""
        error = self.error or (None if self.batches else self.missed)
        if agree_on is not None:
            agree(agree_on, error, self.moments)
            return dict(zip(self.moments, synchronise(list(self.moments.values())), strict=True))
        if error is not None:
            raise error
        return self.moments
