"""The classes themselves, in the plane or space of their means: as a figure and as an animation."""

from __future__ import annotations

import math
import shutil
import subprocess
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from importlib.util import find_spec
from itertools import chain, combinations
from pathlib import Path
from typing import Any

import numpy
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patheffects import withStroke
from PIL import Image
from tqdm import tqdm

from lightning_nc.functional.projection import simplex
from lightning_nc.plotting.style import COLORS
from lightning_nc.runs import in_one_step
from lightning_nc.scenes import Scene, first_middle_last, posed

__all__ = ["animate", "plot_geometry"]

_SPACES = {2: "on the line", 3: "in the plane", 4: "in the space"}
_RATE = 20  # frames a second
_MOST_STEPS = 180
_HEIGHT, _TURN = 20, 130  # degrees, from where space is seen
_LABELS = 1.55  # distance of the labels from the center; the corners are at 1
_FARTHEST = 3.0  # of a sample from the center; the class means are at 1 on average
_SHADES = 14  # of each color in a GIF


def plot_geometry(scenes: Sequence[Scene]) -> Figure:
    """Draw a few classes in the first, middle and last measured epoch, beside the frame of exact collapse.

    Points are samples, circles class means and arrows the rows of the classifier's weight, all projected on the span of the
    chosen class means: a line for two classes (their samples are spread across it), a plane for three, space for four.
    Dashed lines join the corners of the ideal simplex. The unit of each panel is the root mean square distance of its class
    means from their center, so that the corners are at distance 1 in every epoch; weight rows are scaled to the same size.
    Samples that are more than three units from the center are left out, and the panel says how many. The middle is that of the
    measurements, which may differ from that of the epochs.

    Args:
        scenes: ``callback.history.scenes``.

    Raises:
        ValueError: if no scene has points.
    """
    shown = first_middle_last(_with_points(scenes))
    chosen = shown[-1].chosen
    columns = 2 if len(shown) > 1 else len(shown) + 1
    lines = -(-(len(shown) + 1) // columns)
    figure = Figure(figsize=(3.2 * columns, (1.4 if len(chosen) == 2 else 3.2) * lines + 1.1), layout="constrained")
    space, window = {"projection": "3d"} if len(chosen) == 4 else {}, _window(shown)
    for place, scene in enumerate([*shown, _ideal(shown[-1])], start=1):
        axis = figure.add_subplot(lines, columns, place, **space)
        picture = _Picture(axis, scene, window)
        left_out = picture.show(scene.samples, scene.means, scene.weight)
        axis.set_title("exact collapse" if scene.epoch == math.inf else f"epoch {scene.epoch:g}", fontsize=11)
        figure.text(0.02, 0.02, _left_out(left_out, scene), fontsize=8, transform=axis.transAxes)
    figure.suptitle(
        f"classes {', '.join(map(str, chosen))} {_SPACES[len(chosen)]} of their means\n"
        "unit of a panel: root mean square distance of the class means from their center",
        fontsize=10,
    )
    figure.legend(*_legend(bool(shown[-1].weight)), loc="outside lower center", ncol=2, fontsize=9, frameon=False)
    return figure


def animate(scenes: Sequence[Scene], path: str | Path) -> Path:
    """Write the course of :func:`plot_geometry` over all measured epochs as a GIF or MP4 of at most ten seconds.

    Every measurement is a frame, and points move in straight lines from one to the next. Of more than 181 measurements, 181
    that are evenly spread are frames. The last frame stays for a second.

    Args:
        scenes: ``callback.history.scenes``.
        path: the file; ``.gif`` or ``.mp4``. Its directory is created, and a file that exists is replaced.

    Returns:
        The path of the file.

    Raises:
        ValueError: for another suffix, or if no scene has points.
        ImportError: for an MP4 without ffmpeg.
        RuntimeError: if ffmpeg fails.
    """
    path = Path(path)
    if path.suffix.lower() not in _WRITERS:
        raise ValueError(f"path must end in {' or '.join(_WRITERS)}, got {str(path)!r}")
    shown = _with_points(scenes)
    path.parent.mkdir(parents=True, exist_ok=True)
    with in_one_step(path) as scratch:
        _WRITERS[path.suffix.lower()](_frames(shown), scratch)
    return path


def _with_points(scenes: Sequence[Scene]) -> list[Scene]:
    found = posed(scenes)
    if not found:
        raise ValueError(
            f"no samples were kept in {len(scenes)} measurements; pass two to four classes to the callback, such as "
            "geometry=(0, 1, 2), and train"
        )
    return found


def _left_out(count: int, scene: Scene) -> str:
    return f"{count} of {sum(map(len, scene.samples))} samples are farther out" if count else ""


def _ideal(like: Scene) -> Scene:
    """The classes at exact collapse: every sample and weight row at its class mean, these at the corners."""
    corners = simplex(len(like.chosen)).tolist()
    weight = corners if like.weight else []
    return Scene(math.inf, 0, "", like.classes, [], [], like.chosen, [[corner] for corner in corners], corners, weight)


def _window(scenes: Sequence[Scene]) -> Any:
    """The smallest cube that shows all scenes and the labels at the corners, as it is seen: from and to by coordinate, (3, 2)."""
    labels = 1.1 * _LABELS * simplex(len(scenes[-1].chosen)).numpy()
    groups = (rows for scene in scenes for rows in (*scene.samples, scene.means, scene.weight) if rows)
    points = numpy.concatenate([labels, *groups])
    points = points[numpy.linalg.norm(points, axis=1) <= _FARTHEST]
    axes = _seen_axes() if len(scenes[-1].chosen) == 4 else numpy.eye(3)
    low, high = (points @ axes.T).min(axis=0), (points @ axes.T).max(axis=0)
    center, half = (low + high) / 2 @ axes, 0.52 * (high - low).max()
    return numpy.stack([center - half, center + half], axis=1)


def _seen_axes() -> Any:
    """The directions in space that point to the right and upward in the figure, (2, 3)."""
    height, turn = math.radians(_HEIGHT), math.radians(_TURN)
    upward = [-math.sin(height) * math.cos(turn), -math.sin(height) * math.sin(turn), math.cos(height)]
    return numpy.array([[-math.sin(turn), math.cos(turn), 0], upward])


class _Picture:
    """The classes on an axis; :meth:`show` moves them."""

    def __init__(self, axis: Any, scene: Scene, window: Any) -> None:
        self.axis, self.dimensions = axis, len(scene.chosen) - 1
        self.arrows: list[Any] = []
        self.drawn = max(2, self.dimensions)  # a line is drawn in a plane, so that samples do not hide each other
        if self.drawn == 3:
            axis.set(**dict(zip(("xlim", "ylim", "zlim"), window, strict=True)), proj_type="ortho")
            axis.set_box_aspect((1, 1, 1), zoom=1.62)  # a side of the cube is as wide as the axis
            axis.view_init(elev=_HEIGHT, azim=_TURN)  # no corner hides another one or the center
            axis.set_axis_off()
        else:
            axis.set(xlim=window[0], ylim=window[1] * (1 if self.dimensions == 2 else 0.4), aspect="equal")
            axis.set(xticks=[], yticks=[])
            axis.spines[:].set_color("0.85")
        corners = simplex(self.dimensions + 1).numpy()[:, : self.drawn]
        for pair in combinations(corners, 2):
            axis.plot(*zip(*pair, strict=True), color="0.6", linewidth=1, linestyle=(0, (5, 3)), zorder=1)
        self.colors = COLORS[: len(corners)]
        for corner, label, color in zip(corners, scene.chosen, self.colors, strict=True):
            text = axis.text(*(_LABELS * corner), str(label), color=color, fontsize=13, weight="bold", zorder=10)
            text.set(ha="center", va="center", path_effects=[withStroke(linewidth=4, foreground="white")])
        self.samples = [self._points(color, markersize=3.5, alpha=0.5, zorder=2) for color in self.colors]
        self.means = [self._points(color, markersize=11, markeredgecolor="white", zorder=3) for color in self.colors]

    def _points(self, color: str, **style: Any) -> Any:
        (line,) = self.axis.plot(*[[]] * self.drawn, "o", color=color, markeredgewidth=0.8, **style)
        return line

    def show(self, samples: Sequence[Any], means: Any, weight: Any) -> int:
        """Move everything to these coordinates; the number of samples that are left out."""
        left_out = 0
        for line, rows in zip(self.samples, samples, strict=True):
            points = numpy.asarray(rows)[:, : self.drawn]
            inside = numpy.linalg.norm(points, axis=1) <= _FARTHEST
            left_out += len(points) - int(inside.sum())
            if self.dimensions == 1:
                spread = numpy.arange(len(points)) * (math.sqrt(5) - 1) / 2 % 1 - 0.5
                points = numpy.stack([points[:, 0], 0.5 * spread * (len(points) > 1)], axis=1)
            self._move(line, points[inside])
        for line, row in zip(self.means, means, strict=True):
            self._move(line, numpy.asarray([row])[:, : self.drawn])
        for arrow in self.arrows:
            arrow.remove()
        self.arrows = [self._arrow(row[: self.drawn], color) for row, color in zip(weight, self.colors, strict=False)]
        return left_out

    def _move(self, line: Any, points: Any) -> None:
        (line.set_data if self.drawn == 2 else line.set_data_3d)(*points.T)

    def _arrow(self, tip: Sequence[float], color: str) -> Any:
        style = (
            {"angles": "xy", "scale_units": "xy", "scale": 1, "width": 0.012}
            if self.drawn == 2
            else {"arrow_length_ratio": 0.14, "linewidth": 2.2}
        )
        return self.axis.quiver(*[0] * self.drawn, *tip, color=[_dark(color)], zorder=4, **style)


def _dark(color: str) -> Any:
    return 0.55 * numpy.array(to_rgb(color))


def _legend(weight: bool) -> tuple[list[Any], list[str]]:
    entries = {
        "samples": Line2D([], [], color="0.4", linestyle="", marker="o", markersize=3.5, alpha=0.6),
        "class mean": Line2D([], [], color="0.4", linestyle="", marker="o", markersize=9),
        "row of the weight": Line2D([], [], marker=r"$\rightarrow$", markersize=14, color="0.2", linestyle=""),
        "ideal simplex": Line2D([], [], color="0.6", linewidth=1, linestyle=(0, (5, 3))),
    }
    if not weight:
        del entries["row of the weight"]
    return list(entries.values()), list(entries)


def _frames(scenes: Sequence[Scene]) -> Iterator[Image.Image]:
    """The images of the animation."""
    figure = Figure(figsize=(4.8, 2.4 if len(scenes[-1].chosen) == 2 else 4.8), dpi=100)
    canvas = FigureCanvasAgg(figure)
    axis = figure.add_axes((0.02, 0.02, 0.96, 0.86), projection="3d" if len(scenes[-1].chosen) == 4 else None)
    picture = _Picture(axis, scenes[-1], _window(scenes))
    note = figure.text(0.02, 0.02, "", fontsize=10, transform=axis.transAxes)
    for place in tqdm(_places(len(scenes)), "Animation", leave=False, delay=1):
        before, after = scenes[math.floor(place)], scenes[math.ceil(place)]
        share = place % 1

        def between(start: Any, end: Any, share: float = share) -> Any:
            return (1 - share) * numpy.asarray(start) + share * numpy.asarray(end)

        samples = [between(*pair) for pair in zip(before.samples, after.samples, strict=True)]
        left_out = picture.show(samples, between(before.means, after.means), between(before.weight, after.weight))
        note.set_text(_left_out(left_out, before))
        axis.set_title(f"epoch {before.epoch:g}", fontsize=16)
        canvas.draw()
        yield Image.fromarray(numpy.asarray(canvas.buffer_rgba())[..., :3].copy())


def _places(count: int) -> list[float]:
    """The places of the frames among ``count`` scenes: whole numbers, and fractions between them."""
    gaps = count - 1
    steps = min(_RATE, _MOST_STEPS // max(gaps, 1))
    places = numpy.linspace(0, gaps, gaps * steps + 1) if steps else numpy.linspace(0, gaps, _MOST_STEPS + 1).round()
    return [float(place) for place in places.round(6)]


def _gif(frames: Iterator[Image.Image], path: Path) -> None:
    """All frames have one palette, the shades of the colors of the picture, so that what rests does not flicker."""
    grays = numpy.linspace(0, 255, 32)[:, None].repeat(3, axis=1)
    share = numpy.linspace(0.1, 1, _SHADES)[:, None]
    pure = [numpy.array(shade) for color in COLORS[:4] for shade in (to_rgb(color), _dark(color))]
    mixed = [255 * (share * color + 1 - share) for color in pure]
    palette = Image.new("P", (1, 1))
    palette.putpalette(numpy.concatenate([grays, *mixed]).round().astype(numpy.uint8).tobytes())
    first, *others = [frame.quantize(palette=palette, dither=Image.Dither.NONE) for frame in frames]
    durations = [1000 // _RATE] * len(others) + [1000]
    first.save(path, "GIF", save_all=True, append_images=others, duration=durations, loop=0)


def _mp4(frames: Iterator[Image.Image], path: Path) -> None:
    first = next(frames)
    command = [_ffmpeg(), "-loglevel", "error", "-y", "-f", "rawvideo", "-pix_fmt", "rgb24", "-r", str(_RATE)]
    command += ["-s", f"{first.width}x{first.height}", "-i", "-", "-vf", "tpad=stop_mode=clone:stop_duration=0.95"]
    command += ["-c:v", "libx264", "-pix_fmt", "yuv420p", "-movflags", "+faststart", str(path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdin is not None
        with suppress(BrokenPipeError):  # its message follows
            for frame in chain([first], frames):
                process.stdin.write(frame.tobytes())
        errors = process.communicate()[1]
    if process.returncode:
        raise RuntimeError(f"ffmpeg could not write {path}: {errors.decode(errors='replace').strip()}")


def _ffmpeg() -> str:
    if find_spec("imageio_ffmpeg") is not None:
        import imageio_ffmpeg

        return str(imageio_ffmpeg.get_ffmpeg_exe())
    found = shutil.which("ffmpeg")
    if found is None:
        raise ImportError(
            'an MP4 needs ffmpeg: pip install "lightning-neural-collapse[report]", or pass a path that ends in .gif'
        )
    return found


_WRITERS: dict[str, Callable[[Iterator[Image.Image], Path], None]] = {".gif": _gif, ".mp4": _mp4}
