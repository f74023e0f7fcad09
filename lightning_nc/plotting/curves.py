"""What a figure of runs draws: the values over epochs by key, and which metrics and layers of them."""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

from lightning_nc.functional import METRICS
from lightning_nc.functional.geometry import FRAMES_IN_WORDS
from lightning_nc.functional.table import check_metrics
from lightning_nc.keys import CHANCE, DEPTH, ERROR, STAGES, TRAIN_MEANS, Key, base_name, parse_key
from lightning_nc.plotting.style import INPUT_NAME, wrapped
from lightning_nc.runs import Run, epoch_of, is_metric, is_objective, metrics_of

__all__ = [
    "MOST_PANELS",
    "Curve",
    "Curves",
    "RunCurves",
    "chosen",
    "drawn",
    "is_chance",
    "is_linear",
    "other_frames",
    "panels_of",
    "read_curves",
    "reading",
    "same_curve",
    "same_layers",
    "title_of",
]

MOST_PANELS = 12  # more are drawn only if their metrics are named

_OTHER_FRAME = {"nc2_etf": "OF", "nc2_of": "ETF"}

Curve = tuple[list[float], list[float]]
Curves = dict[Key, Curve]


class RunCurves(NamedTuple):
    """The curves of a run.

    Args:
        metrics: epochs and values by stage, dataloader, layer and metric; the classifier's input last, so that it is on top.
        objectives: losses and accuracies by name.
        asked: the metrics that were asked for; the others are distances to frames that a history keeps beside them.
        over: what the x axis counts: ``"epoch"`` or ``"iteration"``.
    """

    metrics: Curves
    objectives: dict[str, Curve]
    asked: set[str]
    over: str


def read_curves(rows: Run) -> RunCurves:
    """The curves of the rows; ``ValueError`` if there is no metric, or a row has no epoch, an unknown stage or a value twice."""
    points: dict[Key, list[tuple[float, float]]] = {}
    losses: dict[tuple[str, str], list[tuple[float, float]]] = {}
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
            for name, value in row.items():
                if is_objective(name) and isinstance(value, int | float) and not isinstance(value, bool):
                    losses.setdefault((name, stage), []).append((epoch, value))
    if not points:
        found = list(dict.fromkeys(name for row in rows for name in row))
        raise ValueError(
            f"nothing to plot in {len(rows)} rows: needs 'epoch' and a metric such as 'nc1' or 'nc/nc1', found {found!r:.300}"
        )
    order = list(STAGES)
    keys = sorted(points, key=lambda key: (order.index(key.stage), key.loader, not key.layer))
    named = [name for name, _ in losses]
    objectives = {name if named.count(name) == 1 else f"{name}, {stage}": curve for (name, stage), curve in losses.items()}
    over = "iteration" if all("iteration" in row for row in rows) else "epoch"
    metrics, scores = {key: _sorted(points[key]) for key in keys}, {name: _sorted(at) for name, at in objectives.items()}
    return RunCurves(metrics, scores, _asked(rows), over)


def _sorted(points: list[tuple[float, float]]) -> Curve:
    points = sorted(points, key=lambda point: point[0])  # rows of checkpoints come in any order
    return [x for x, _ in points], [y for _, y in points]


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


def is_chance(metric: str) -> bool:
    """Whether these are values that chance alone gives."""
    return metric.endswith(tuple(CHANCE.values()))


def chosen(runs: Iterable[RunCurves], metrics: str | Sequence[str] | None) -> list[str]:
    """The metrics that a figure draws, in the order of :data:`METRICS`.

    Those that were asked for by default; those of the paper where they would need more than ``MOST_PANELS`` panels.

    Args:
        runs: the curves of each run.
        metrics: ``"paper"``, ``"all"``, or one or more names; None for the default.

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
        layered = any(key.layer for run in runs for key in run.metrics)
        many = len(panels_of(asked, by_family=not layered)) > MOST_PANELS
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


def title_of(members: Sequence[str]) -> str:
    """The title of a panel, in words."""
    spec = METRICS.get(base_name(members[0]))
    if members[1:] and spec:
        return spec.family
    around = ", around training means" * members[0].endswith(TRAIN_MEANS)
    if members[0] == DEPTH:
        return "effective depth"
    return wrapped(spec.title + around if spec and spec.title else members[0])


def reading(members: Sequence[str], num_classes: int | None) -> str:
    """How to read a panel: the name of its metric as it is logged, and which values are closer to collapse."""
    spec = METRICS.get(base_name(members[0]))
    name = [] if members[1:] else [wrapped(members[0])]
    if spec is None:
        return "\n".join(name)
    at = "collapse"
    if num_classes and spec.value_at_collapse(num_classes, 10**6) == spec.value_at_collapse(num_classes):
        at = f"{spec.value_at_collapse(num_classes):.3g}"
    if spec.direction == "approaches":
        return " · ".join([*name, f"approaches {at}" if at != "collapse" else "approaches its value at collapse"])
    bound = "" if spec.collapse == 0.0 or at == "collapse" else f", {at} at collapse"
    return " · ".join([*name, f"{'smaller' if spec.direction == 'falls' else 'larger'} is closer{bound}"])


def same_layers(runs: Sequence[Curves], layers: Sequence[str]) -> dict[str, str]:
    """The layers to draw, by their names; layers with the same numbers are one, ``"layer4 = classifier input"``."""
    by_layer: dict[str, dict[tuple[int, Key], Curve]] = {layer: {} for layer in layers}
    for index, run in enumerate(runs):
        for key, curve in run.items():
            if key.layer in by_layer:
                by_layer[key.layer][index, key._replace(layer="")] = curve
    names = {layer: [layer or INPUT_NAME] for layer in layers}
    for place, layer in enumerate(layers):
        twin = next((later for later in layers[place + 1 :] if _same(by_layer[layer], by_layer[later])), None)
        if twin is not None:
            names[twin] = names.pop(layer) + names[twin]
    return {layer: " = ".join(same) for layer, same in names.items()}


def _same(curves: Mapping[tuple[int, Key], Curve], later: Mapping[tuple[int, Key], Curve]) -> bool:
    """Whether one layer has no curve that another lacks or has with other numbers, up to rounding."""
    return bool(curves) and all(key in later and same_curve(curve, later[key]) for key, curve in curves.items())


def same_curve(curve: Curve, other: Curve) -> bool:
    """Whether two curves are the same numbers, up to rounding of float32."""
    return curve[0] == other[0] and all(
        math.isclose(a, b, rel_tol=1e-6) or (a != a and b != b) for a, b in zip(curve[1], other[1], strict=True)
    )
