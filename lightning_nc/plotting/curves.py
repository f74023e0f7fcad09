"""What a figure of runs draws: the values over epochs by key, and which metrics and layers of them."""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple

from lightning_nc.functional import METRICS
from lightning_nc.functional.geometry import FRAMES_IN_WORDS
from lightning_nc.functional.table import check_metrics
from lightning_nc.keys import CHANCE, DEPTH, ERROR, INPUT_NAME, STAGES, TRAIN_MEANS, Key, base_name, parse_key
from lightning_nc.plotting.style import wrapped
from lightning_nc.runs import Run, epoch_of, is_metric, is_objective, metrics_of

__all__ = [
    "MOST_PANELS",
    "Curve",
    "Curves",
    "RunCurves",
    "chosen",
    "drawn",
    "heads_of",
    "is_accuracy",
    "is_chance",
    "is_linear",
    "left_out",
    "other_frames",
    "panels_of",
    "read_curves",
    "same",
]

MOST_PANELS = 12  # more are drawn only if their metrics are named

_STAGE_PART = re.compile(r"(train|val|valid|validation|eval|test)[_/](.+)")
_OTHER_FRAME = {"nc2_etf": "OF", "nc2_of": "ETF"}

Curve = tuple[list[float], list[float]]
Curves = dict[Key, Curve]


class RunCurves(NamedTuple):
    """The curves of a run.

    Args:
        metrics: epochs and values by stage, dataloader, layer and metric; the classifier's input last, so that it is on top.
        objectives: losses and accuracies, likewise; ``val_loss`` is ``loss`` of the stage ``validate``.
        asked: the metrics that were asked for; the others are distances to frames that a history keeps beside them.
        over: what the x axis counts: ``"epoch"`` or ``"iteration"``.
    """

    metrics: Curves
    objectives: Curves
    asked: set[str]
    over: str


def read_curves(rows: Run) -> RunCurves:
    """The curves of the rows; ``ValueError`` if there is no metric, or a row has no epoch, an unknown stage or a value twice."""
    points: dict[Key, list[tuple[float, float]]] = {}
    losses: dict[Key, list[tuple[float, float]]] = {}
    for row in rows:
        if not isinstance(row, Mapping):
            raise ValueError(f"history must hold rows such as {{'epoch': 0, 'nc1': 0.5}}, got {row!r:.60}")
        if values := metrics_of(row):
            epoch, stage = epoch_of(row), row.get("stage", "train")
            if stage not in STAGES:
                raise ValueError(f"stage must be one of {', '.join(STAGES)}, got {stage!r}")
            keys = [key._replace(stage=stage) if key.stage == "train" else key for key in map(parse_key, values)]
            if len(set(keys)) < len(keys):
                raise ValueError(f"a row has a metric twice, such as 'nc1' and 'nc/nc1'; got {list(values)!r:.300}")
            for key, value in zip(keys, values.values(), strict=True):
                if not key.metric.endswith(ERROR):
                    points.setdefault(key, []).append((epoch, value))
            for key, value in _objectives(row, stage).items():
                losses.setdefault(key, []).append((epoch, value))
    if all(is_chance(key.metric) for key in points):
        found = list(dict.fromkeys(name for row in rows for name in row))
        raise ValueError(
            f"nothing to plot in {len(rows)} rows: needs 'epoch' and a metric such as 'nc1' or 'nc/nc1', found {found!r:.300}"
        )
    over = "iteration" if all("iteration" in row for row in rows) else "epoch"
    return RunCurves(_sorted(points), _sorted(losses), _asked(rows), over)


def _objectives(row: Mapping[str, Any], stage: str) -> dict[Key, float]:
    """The losses and accuracies of a row by stage, which their names may tell: ``val_loss``."""
    names = [name for name, value in row.items() if is_objective(name) and type(value) in (int, float)]
    found: dict[Key, float] = {}
    for name in sorted(names, key=lambda name: _STAGE_PART.fullmatch(name) is not None):
        part = _STAGE_PART.fullmatch(name)
        told = Key(part[1] if part[1] in STAGES else "validate", 0, "", part[2]) if part else Key(stage, 0, "", name)
        found[Key(stage, 0, "", name) if told in found else told] = row[name]
    return found


def _sorted(points: Mapping[Key, list[tuple[float, float]]]) -> Curves:
    order = list(STAGES)
    keys = sorted(points, key=lambda key: (order.index(key.stage), key.loader, not key.layer))
    # Rows of checkpoints come in any order.
    by_epoch = {key: sorted(points[key], key=lambda point: point[0]) for key in keys}
    return {key: ([x for x, _ in found], [y for _, y in found]) for key, found in by_epoch.items()}


def _asked(rows: Run) -> set[str]:
    """The metrics but for the distances to frames that a history keeps beside them, after the entry ``geometry``."""
    asked: set[str] = set()
    late: set[str] = set()
    known = False  # rows of transformers have that entry before all metrics
    for row in rows:
        names = list(row)
        place = names.index("geometry") if "geometry" in names else len(names)
        for index, name in enumerate(names):
            if is_metric(name):
                metric = parse_key(name).metric
                (late if index > place and metric in FRAMES_IN_WORDS else asked).add(metric)
                known = known or index < place
    return asked if known else asked | late


def is_accuracy(name: str) -> bool:
    """Whether a loss or an accuracy is an accuracy, by its name."""
    return "acc" in name.lower()


def is_chance(metric: str) -> bool:
    """Whether these are values that chance alone gives."""
    return metric.endswith(tuple(CHANCE.values()))


def left_out(runs: Iterable[RunCurves], names: Sequence[str]) -> str:
    """What a reader should know of metrics that are not drawn by default; empty if all are."""
    count = len({name for run in runs for name in run.asked if not is_chance(name)} - set(names))
    return f"{count} more metrics were measured; metrics='all' or their names draw them" if count else ""


def chosen(runs: Iterable[RunCurves], metrics: str | Sequence[str] | None, by_family: bool) -> list[str]:
    """The metrics that a figure draws, in the order of :data:`METRICS`.

    Those that were asked for by default; those of the paper where they would need more than ``MOST_PANELS`` panels.

    Args:
        runs: the curves of each run.
        metrics: ``"paper"``, ``"all"``, or one or more names; None for the default.
        by_family: whether the metrics of a family share a panel.

    Raises:
        ValueError: if a metric was not measured.
    """
    runs = list(runs)
    names = {key.metric: None for run in runs for key in run.metrics if not is_chance(key.metric)}
    known = {name: place for place, name in enumerate(METRICS)}
    found = sorted(names, key=lambda name: known.get(base_name(name), len(known)))
    if metrics == "all":
        return found
    paper = [name for name in found if name in check_metrics("paper")]
    if metrics is None:
        asked = [name for name in found if any(name in run.asked for run in runs)]
        many = len(panels_of(asked, by_family)) > MOST_PANELS
        return (paper or asked[:MOST_PANELS]) if many else asked
    wanted = paper if metrics == "paper" else [metrics] if isinstance(metrics, str) else list(metrics)
    for name in wanted:
        if name not in found:
            near = difflib.get_close_matches(str(name).lower(), found, n=1)
            hint = f"did you mean {near[0]!r}? " if near else ""
            raise ValueError(f"no metric {name!r} was measured; {hint}measured were {', '.join(found)}")
    if not wanted:
        raise ValueError(f"metrics names none that was measured; measured were {', '.join(found)}")
    return [name for name in found if name in wanted]


def drawn(curves: Curves, names: Sequence[str]) -> Curves:
    """The curves of the named metrics, and what chance alone gives for them."""
    return {
        key: curve
        for key, curve in curves.items()
        if key.metric in names or (is_chance(key.metric) and base_name(key.metric) in names)
    }


def is_linear(members: Sequence[str], runs: Iterable[Curves]) -> bool:
    """Whether a panel has a linear axis: for numbers of dimensions or layers, which do not approach zero, or negative values."""
    counts = all(name == DEPTH or (name in METRICS and METRICS[name].direction == "approaches") for name in members)
    return counts or any(value < 0 for value in _values(members, runs))


def other_frames(members: Sequence[str], runs: Iterable[Curves], num_classes: int | None) -> dict[str, float]:
    """The value of ``nc2_etf`` and ``nc2_of`` at an exact frame of the other kind, by what it is.

    Only if the curves keep two thirds of the height of a log axis that shows it.
    """
    names = [name for name in members if name in _OTHER_FRAME]
    shown = [value for value in _values(members, runs) if 0 < value < math.inf]
    if not names or not shown or not num_classes:
        return {}
    level = math.sqrt(2 - 2 * math.sqrt((num_classes - 1) / num_classes))
    span = math.log(max(shown) / min(shown))
    if math.log(max(*shown, level) / min(*shown, level)) > 1.5 * span:
        return {}
    return {f"{name} of an exact {_OTHER_FRAME[name]}": level for name in names}


def _values(members: Sequence[str], runs: Iterable[Curves]) -> Iterator[float]:
    yield from (value for run in runs for key, curve in run.items() if key.metric in members for value in curve[1])


def panels_of(metrics: Sequence[str], by_family: bool) -> list[list[str]]:
    """The metrics of each panel: one metric, or those of a family that approach zero."""
    if not by_family:
        return [[name] for name in metrics]
    families: dict[str, list[str]] = {}
    for name in metrics:
        spec = METRICS.get(base_name(name))
        shared = spec is not None and (spec.collapse == 0.0 or spec.direction == "approaches")
        families.setdefault(spec.family if spec and shared else name, []).append(name)
    return list(families.values())


def heads_of(members: Sequence[str], num_classes: int | None, width: float) -> str:
    """Title and subtitle of a panel of so many inches, in lines; an empty line stands between them."""
    parts = _reading(members, num_classes)
    lines = [" · ".join(parts)] if len(" · ".join(parts)) <= 15 * width else parts
    subtitle = "\n".join(wrapped(line, int(15 * width)) for line in lines)
    return f"{wrapped(_title(members), int(12 * width))}\n\n{subtitle}"


def _title(members: Sequence[str]) -> str:
    """The title of a panel, in words."""
    spec = METRICS.get(base_name(members[0]))
    if members[1:] and spec:
        return spec.family
    around = ", around training means" * members[0].endswith(TRAIN_MEANS)
    if members[0] == DEPTH:
        return "effective depth"
    return spec.title + around if spec and spec.title else members[0]


def _reading(members: Sequence[str], num_classes: int | None) -> list[str]:
    """How to read a panel: the name of its metric as it is logged, and which values are closer to collapse."""
    spec = METRICS.get(base_name(members[0]))
    name = [] if members[1:] else [members[0]]
    if spec is None:
        return name
    at = "collapse"
    if num_classes and spec.value_at_collapse(num_classes, 10**6) == spec.value_at_collapse(num_classes):
        at = f"{spec.value_at_collapse(num_classes):.3g}"
    if spec.direction == "approaches":
        return [*name, f"approaches {at}" if at != "collapse" else "approaches its value at collapse"]
    bound = "" if spec.collapse == 0.0 or at == "collapse" else f", {at} at collapse"
    return [*name, f"{'smaller' if spec.direction == 'falls' else 'larger'} is closer{bound}"]


def same(runs: Sequence[Curves], names: Sequence[str], part: Literal["layer", "metric"]) -> dict[str, str]:
    """What each layer or metric is called that is drawn: those with the same numbers are one, ``"layer4 = classifier input"``.

    The last of them is the one to draw.
    """
    curves: dict[str, dict[tuple[int, Key], Curve]] = {name: {} for name in names}
    for index, run in enumerate(runs):
        for key, curve in run.items():
            if (name := getattr(key, part)) in curves:
                rest = key._replace(layer="") if part == "layer" else key._replace(metric="")
                curves[name][index, rest] = curve
    called = {name: [name or INPUT_NAME] for name in names}
    for place, name in enumerate(names):
        twin = next((later for later in names[place + 1 :] if _same(curves[name], curves[later])), None)
        if twin is not None:
            called[twin] = called.pop(name) + called[twin]
    return {name: " = ".join(found) for name, found in called.items()}


def _same(curves: Mapping[tuple[int, Key], Curve], later: Mapping[tuple[int, Key], Curve]) -> bool:
    """Whether all curves of one have the same numbers in the other, up to rounding of float32."""
    return bool(curves) and all(
        key in later
        and xs == later[key][0]
        and all(math.isclose(y, z, rel_tol=1e-6) or (y != y and z != z) for y, z in zip(ys, later[key][1], strict=True))
        for key, (xs, ys) in curves.items()
    )
