"""When to measure: a rule for epochs that every front end follows, and the checks of its arguments."""

from __future__ import annotations

import math
import numbers
from collections.abc import Callable
from functools import partial
from typing import Any

from lightning_nc.keys import STAGES

__all__ = ["Schedule", "check_schedule", "is_due", "log_spaced"]

Schedule = int | Callable[[int], bool]
"""The argument ``every_n_epochs``."""


def log_spaced(per_decade: int = 10) -> Callable[[int], bool]:
    """A schedule for ``every_n_epochs``: about ``per_decade`` measurements while the number of epochs grows tenfold.

    Collapse is slow and is drawn on log axes. With 10 per decade it measures after 1, 2, 3, 4, 6, 7, 8, 10, 13, 16, 20, ...
    epochs.

    Raises:
        ValueError: if ``per_decade`` is not a positive integer.

    Example:
        >>> from lightning_nc import log_spaced
        >>> [epoch + 1 for epoch in range(100) if log_spaced(4)(epoch)]
        [1, 2, 4, 6, 10, 18, 32, 57, 100]
    """
    if not isinstance(per_decade, int) or per_decade < 1:
        raise ValueError(f"per_decade must be a positive integer, got {per_decade!r}")
    return partial(_is_log_spaced, per_decade)


def _is_log_spaced(per_decade: int, epoch: int) -> bool:
    power = math.floor(per_decade * math.log10(epoch + 1) + 1e-9)
    return math.ceil(10 ** (power / per_decade) - 1e-9) == epoch + 1


def is_due(every_n_epochs: Schedule, epoch: int, last: bool) -> bool:
    """Whether an epoch is measured: the first, the ``last``, and those of ``every_n_epochs``.

    Example:
        >>> [epoch for epoch in range(10) if is_due(4, epoch, last=epoch == 9)]
        [0, 3, 7, 9]
    """
    scheduled = every_n_epochs(epoch) if callable(every_n_epochs) else (epoch + 1) % every_n_epochs == 0
    return epoch == 0 or scheduled or last


def check_schedule(every_n_epochs: Any, stages: Any) -> None:
    """Raise ValueError unless both arguments of a callback fit."""
    if not callable(every_n_epochs) and (not isinstance(every_n_epochs, numbers.Integral) or every_n_epochs < 1):
        raise ValueError(
            f"every_n_epochs must be a positive integer or a callable from epoch to bool, got {every_n_epochs!r}"
        )
    if getattr(every_n_epochs, "__name__", "") == log_spaced.__name__:
        raise ValueError("every_n_epochs=log_spaced lacks its parentheses; write log_spaced()")
    if isinstance(stages, str) or not stages or not set(stages) <= STAGES.keys():
        raise ValueError(f"stages must be a sequence of any of {', '.join(map(repr, STAGES))}, got {stages!r}")
