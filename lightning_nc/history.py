"""The rows of metrics of a run: appended, written to a CSV file, read back and plotted."""

from __future__ import annotations

import csv
import io
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch.distributed as dist
from lightning.fabric.utilities import rank_zero_warn

from lightning_nc.keys import CHANCE, STAGES, make_key, parse_key
from lightning_nc.measuring.classes import MeasuredClasses
from lightning_nc.measuring.measurement import Measurement
from lightning_nc.runs import FIRST_COLUMNS, finite_number, in_one_step, is_metric, plain_value, read_rows
from lightning_nc.saved import read_saved
from lightning_nc.scenes import Scene, scene, scenes_of

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["History"]

_BEFORE = (-math.inf, -math.inf)
_MOST_CLASSES = 1000  # of a table that is saved


class History(list[dict[str, Any]]):
    """The metrics of a run, a list with one dict per measurement, and optionally a CSV file that has the same rows.

    A row has ``stage``, ``epoch``, ``step`` if it is known, and every value under the key that the callback logs: ``nc/nc1``,
    ``nc/test/layer3/nc1``. ``pandas.DataFrame(history)`` is a table of them.

    A file that exists is continued: its rows are read, and further rows are appended. A last row that was cut when a run was
    killed is dropped. A row whose epoch is not after those of the file comes from another run, and warns once.
    In a process group only rank 0 writes. A copy, or what is loaded from a pickle, continues the same file.

    Args:
        path: the CSV file, which :meth:`append` writes to; None for rows in memory alone.
        rows: rows to start with, those of a checkpoint for example. They are not written.

    Attributes:
        scenes: what pictures of the classes need, one :class:`~lightning_nc.scenes.Scene` per measurement. Not in the file.
        classes: the classes as they were measured last: on training data if these are measured, else on the data of the first
            row.
        about: settings and versions in words, for a report.

    Raises:
        ValueError: if ``path`` does not end in ``.csv``, or is a file of something else.

    Example:
        >>> from lightning_nc import History
        >>> history = History()
        >>> history.append({"nc1": 0.5, "layer3/nc1": 2.0}, epoch=0, stage="test", accuracy=0.9)
        >>> history
        [{'stage': 'test', 'epoch': 0, 'accuracy': 0.9, 'nc/test/nc1': 0.5, 'nc/test/layer3/nc1': 2.0}]
    """

    def __init__(self, path: str | Path | None = None, rows: Iterable[Mapping[str, Any]] = ()) -> None:
        super().__init__(map(dict, rows))
        self.path = None if path is None else Path(path).resolve()
        self._earlier: dict[str, tuple[float, float]] = {}  # the last epoch and step by stage that the file had
        self._continued = False  # the file had rows
        self.scenes: list[Scene] = []
        self.classes: MeasuredClasses | None = None
        self.about: dict[str, Any] = {}
        self._table: dict[str, list[Any]] = {}
        if self.path is None:
            return
        if self.path.suffix.lower() != ".csv":
            raise ValueError(f"path must end in .csv, got {str(path)!r}")
        if self.path.exists() and _own(self.path):
            for row in read_rows(self.path):
                stage = row.get("stage", "train")
                self._earlier[stage] = max(_place(row), self._earlier.get(stage, _BEFORE))
                super().append(row)
            self._continued = bool(self)

    def append(  # type: ignore[override]
        self,
        values: Mapping[str, Any],
        /,
        *,
        epoch: float,
        stage: str = "train",
        step: float | None = None,
        **entries: Any,
    ) -> None:
        """Append a row of metrics, and write it to the file.

        Other methods of a list change the rows in memory and not the file.

        Args:
            values: the metrics by key, as :func:`lightning_nc.measure` returns them (``layer3/nc1``) or as the callback logs
                them (``nc/test/layer3/nc1``). What ``measure`` returns beside them is in the row too: the distances to the frames
                that exist, the nearest as ``geometry``, and the baseline as ``nc/nc1_permuted`` and ``nc/nc2_etf_random``; not
                the intervals.
            epoch: a whole number or a fraction; the x axis of figures.
            stage: ``"train"``, ``"validate"`` or ``"test"``.
            step: the number of optimizer steps.
            entries: numbers, bools and short texts to keep in the row, such as ``accuracy=0.9``; None is left out. Figures
                show those that are named like a loss or an accuracy.

        Raises:
            ValueError: if there is no metric, a value is not a number, ``stage`` is unknown or is not that of a key, or the
                file was replaced by another one.
        """
        if stage not in STAGES:
            raise ValueError(f"stage must be one of {', '.join(map(repr, STAGES))}, got {stage!r}")
        row: dict[str, Any] = {"stage": stage, "epoch": finite_number("epoch", epoch)}
        if step is not None:
            row["step"] = finite_number("step", step)
        beside = _beside(values, stage)
        for name, value in (*entries.items(), *values.items(), *beside.items()):
            key = _logged(name, stage) if is_metric(name) else name
            if key in row:
                raise ValueError(f"{key!r} is in the row twice; got {[*entries, *values]!r:.300}")
            if (plain := plain_value(key, value)) not in (None, ""):
                row[key] = plain
        if not any(map(is_metric, row)):
            raise ValueError(f"values must hold a metric such as 'nc1' or 'nc/nc1', got {list(values)!r:.300}")
        if step is None and not self._continued and any(_same_place(row, other) for other in self):
            rank_zero_warn(
                f"a row of stage {stage!r} and epoch {row['epoch']} is there already; pass stage= for other data, or step= for "
                "another measurement in the epoch"
            )
        if isinstance(values, Measurement) and values.classes is not None:
            stages = [other.get("stage", "train") for other in self] or [stage]
            first = "train" not in stages and stage == stages[0] and parse_key(next(iter(values))).loader == 0
            if stage == "train" or first:  # so that the table, the pictures and the curves are about the same data
                self.classes = values.classes
                self.scenes.append(scene(values.classes, row["epoch"], row.get("step", 0), stage))
        super().append(row)
        if self.path is not None and not (dist.is_available() and dist.is_initialized() and dist.get_rank()):
            self._warn_of_earlier_run(row)
            _write(self.path, row)

    def _warn_of_earlier_run(self, row: Mapping[str, Any]) -> None:
        stage = row["stage"]
        if _place(row) <= self._earlier.get(stage, _BEFORE):
            rank_zero_warn(
                f"{self.path} has rows of an earlier run, up to epoch {self._earlier[stage][0]} of stage {stage!r}, and epoch "
                f"{row['epoch']} is appended to them; delete the file, or pass another path, for a run of its own"
            )
            self._earlier.clear()

    @property
    def per_class(self) -> dict[str, list[Any]]:
        """A table of the classes as they were measured last, by column, as ``pandas.DataFrame`` takes it; empty if none were.

        See :func:`lightning_nc.functional.geometry.per_class`.
        """
        return self._table if self.classes is None else self.classes.table

    def state(self) -> dict[str, Any]:
        """All of it but the file, in plain dicts, lists, numbers and texts, for a checkpoint."""
        small = self.classes is not None and len(self.classes.labels) <= _MOST_CLASSES
        return {
            "history": [dict(row) for row in self],
            "scenes": [found.text for found in self.scenes],
            "per_class": self.per_class if small else self._table,
            "about": self.about,
        }

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> History:
        """A history from what :meth:`state` gave."""
        history = cls(rows=state["history"])
        history.scenes, history.about = scenes_of(state.get("scenes", ())), dict(state.get("about", {}))
        history._table = state.get("per_class", {})
        return history

    @classmethod
    def read(cls, path: str | Path) -> History:
        """Read a run from the file of a ``History`` or of a logger, from a checkpoint, or from a directory with any of them.

        See :func:`lightning_nc.saved.read_saved`. The result has no file: what is appended stays in memory.
        """
        return cls.from_state(read_saved(path))

    def plot(self, num_classes: int | None = None, metrics: str | Sequence[str] | None = None) -> Figure:
        """The paper's panels, NC1, NC2 and NC3 over epochs; see :func:`lightning_nc.plotting.plot_history`."""
        from lightning_nc.plotting import plot_history

        return plot_history(self, num_classes=num_classes, metrics=metrics)

    def plot_depth(self) -> Figure:
        """Every metric against depth, a curve per epoch; see :func:`lightning_nc.plotting.plot_depth`."""
        from lightning_nc.plotting import plot_depth

        return plot_depth(self)

    def plot_classes(self) -> Figure:
        """The table of the classes and the cosines of their means; see :func:`lightning_nc.plotting.plot_classes`."""
        from lightning_nc.plotting import plot_classes

        return plot_classes(self.per_class, self.scenes)

    def plot_frames(self) -> Figure:
        """The cosines of the class means over time; see :func:`lightning_nc.plotting.plot_frames`."""
        from lightning_nc.plotting import plot_frames

        return plot_frames(self.scenes)

    def plot_geometry(self) -> Figure:
        """A few classes in the first, middle and last epoch; see :func:`lightning_nc.plotting.plot_geometry`."""
        from lightning_nc.plotting import plot_geometry

        return plot_geometry(self.scenes)

    def animate(self, path: str | Path) -> Path:
        """A few classes over the whole training, as a GIF or MP4; see :func:`lightning_nc.plotting.animate`."""
        from lightning_nc.plotting import animate

        return animate(self.scenes, path)

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (None, list(self)), vars(self)  # by default, a copy would call append for each row


def _beside(values: Mapping[str, Any], stage: str) -> dict[str, Any]:
    """The entries of what a measurement knows beside its metrics."""
    if not isinstance(values, Measurement):
        return {}
    loader = parse_key(next(iter(values))).loader
    found: dict[str, Any] = {}
    if values.geometry is not None:
        found["geometry"] = values.geometry.nearest or "none"
        found |= {make_key(name, "", stage, loader): value for name, value in values.geometry.distances.items()}
    for kind, chance in (values.baseline or {}).items():
        for key, value in chance.items():
            found[make_key(parse_key(key).metric + CHANCE[kind], parse_key(key).layer, stage, loader)] = value
    held = {_logged(key, stage) for key in values}
    return {key: value for key, value in found.items() if key not in held}


def _logged(key: str, stage: str) -> str:
    """The key under which a metric of ``stage`` is logged."""
    found, whole = parse_key(key), key.startswith("nc/")
    if found.stage != stage and (whole or found.stage != "train"):
        raise ValueError(
            f"stage is {stage!r}, but the key {key!r} is of the stage {found.stage!r}; pass stage={found.stage!r}, or keys "
            "without a stage, as measure returns them"
        )
    return key if whole else make_key(found.metric, found.layer, stage, found.loader)


def _place(row: Mapping[str, Any]) -> tuple[float, float]:
    """The epoch and step of a row, which grow in the course of a run."""
    return row["epoch"], finite_number("step", row.get("step", 0))


def _same_place(row: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """Whether two rows have a metric in common, of the same epoch and kind of weights."""
    same = all(row.get(name) == other.get(name) for name in ("epoch", "weights"))
    return same and any(map(is_metric, row.keys() & other.keys()))


def _own(path: Path) -> bool:
    """Whether a file that exists has rows of a ``History``; False if it is empty."""
    data = path.read_bytes().removeprefix(b"\xef\xbb\xbf")  # a byte order mark of a spreadsheet
    if data and not data.startswith(",".join(FIRST_COLUMNS).encode()):
        raise ValueError(
            f"{path} was not written by History, whose files begin with {','.join(FIRST_COLUMNS)}; it begins with "
            f"{data[:60].decode(errors='replace')!r}. Pass another path; History.read reads the files of loggers"
        )
    return bool(data)


def _write(path: Path, row: Mapping[str, Any]) -> None:
    """Append a row to a file, which is written anew only for a new column, or without a last row that was cut."""
    data = path.read_bytes() if path.exists() and _own(path) else b""
    whole = data[: data.rfind(b"\n") + 1]
    rows = csv.reader(io.StringIO(whole.decode("utf-8-sig"), newline=""))
    names = next(rows, [])
    columns = list(dict.fromkeys([*names, *row]))
    line = _lines([[row.get(name, "") for name in columns]])
    if columns == names and whole == data:
        try:
            with path.open("ab") as file:
                file.write(line)
        except OSError:  # a full disk, on which there was room for a part of the row
            os.truncate(path, len(data))
            raise
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    padding = [""] * (len(columns) - len(names))
    with in_one_step(path) as scratch:
        scratch.write_bytes(_lines([columns, *(cells + padding for cells in rows)]) + line)


def _lines(rows: Iterable[Iterable[Any]]) -> bytes:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(rows)
    return text.getvalue().encode()
