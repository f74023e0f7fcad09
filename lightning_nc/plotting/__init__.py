"""Figures, in Matplotlib."""

from lightning_nc.extras import needed

with needed("a figure", "matplotlib"):
    import matplotlib  # noqa: F401

from lightning_nc.plotting.classes import plot_classes, plot_frames, plot_gram
from lightning_nc.plotting.depth import has_depth, plot_depth
from lightning_nc.plotting.geometry import animate, plot_geometry
from lightning_nc.plotting.overlay import plot_overlay
from lightning_nc.plotting.panels import plot_history, plot_runs
from lightning_nc.plotting.style import draw, legend_below

__all__ = [
    "animate",
    "draw",
    "has_depth",
    "legend_below",
    "plot_classes",
    "plot_depth",
    "plot_frames",
    "plot_geometry",
    "plot_gram",
    "plot_history",
    "plot_overlay",
    "plot_runs",
]
