"""Figures of the classes: their table, and the cosines of their means."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

__all__ = ["plot_gram"]


def plot_gram(gram: Any, classes: Sequence[int] | None = None) -> Figure:
    """Plot the Gram matrix of the unit class means, (K, K): the cosines of all pairs of classes, 1 on the diagonal.

    Args:
        gram: the matrix.
        classes: the class of each row; 0 to K - 1 by default.
    """
    figure = Figure(figsize=(4.2, 3.6), layout="constrained")
    axis = figure.subplots()
    image = axis.imshow(numpy.asarray(gram), cmap="RdBu_r", vmin=-1, vmax=1)
    axis.set_title("cosines of the centered class means", fontsize=10)
    axis.set_xlabel("class")
    axis.set_ylabel("class")
    for ticks in (axis.xaxis, axis.yaxis):
        ticks.set_major_locator(MaxNLocator(nbins=6, integer=True))
        if classes is not None:
            ticks.set_major_formatter(lambda at, _: str(classes[int(at)]) if 0 <= at < len(classes) else "")
    figure.colorbar(image)
    return figure
