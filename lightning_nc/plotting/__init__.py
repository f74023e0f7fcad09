"""Figures, in Matplotlib."""

from lightning_nc.plotting.classes import plot_gram
from lightning_nc.plotting.overlay import plot_overlay
from lightning_nc.plotting.panels import plot_history, plot_runs
from lightning_nc.plotting.style import draw

__all__ = ["draw", "plot_gram", "plot_history", "plot_overlay", "plot_runs"]
