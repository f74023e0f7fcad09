"""A run in sentences: which geometry, how far, at which depth, which classes lag, and which results may be unreliable."""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Iterable, Iterator, Sequence
from itertools import chain
from statistics import median
from typing import Any

from lightning_nc.functional.geometry import FRAMES_IN_WORDS
from lightning_nc.history import History
from lightning_nc.keys import DEPTH, natural_order
from lightning_nc.plotting.curves import RunCurves, is_accuracy, read_curves
from lightning_nc.report.series import (
    Points,
    Series,
    by_layer,
    course_of,
    in_words,
    layer_name,
    layers_of,
    listed,
    metrics_shown,
    number,
    series_of,
)
from lightning_nc.runs import FIRST_COLUMNS
from lightning_nc.saved import values_of
from lightning_nc.scenes import pictured

__all__ = ["cautions", "summary"]

_FEW = 20  # samples of a class, with which a scatter is too small by 5 %
_FLOOR = 1e-12  # of nc1, which the scatter matrix resolves no further
_LAGS = 2.0  # times the median of the classes


def summary(history: History) -> dict[str, list[str]]:
    """Sentences by question, in plain text with code in backticks. They are about the training data if these were measured."""
    run = read_curves(history)
    series = course_of(series_of(run.metrics))
    found = {
        "Measured": [_measured(series)],
        "Which geometry": _geometry(history, series),
        "How far": list(_how_far(history, series, run.asked)),
        "At which depth": list(_depth(series)),
        "Which classes lag": list(_lagging(history.per_class)),
    }
    return {question: _over(run.over, sentences) for question, sentences in found.items() if sentences}


def _over(word: str, sentences: Iterable[str]) -> list[str]:
    """Sentences with the word for what the rows count: epochs or iterations."""
    return [
        re.sub(
            r"(?<![\w`/.])([Ee])poch(?=s?\b)", lambda found: word.capitalize() if found[1] == "E" else word, sentence
        )
        for sentence in sentences
    ]


def _measured(series: Series) -> str:
    epochs = sorted({epoch for points in series.values() for epoch, _ in points})
    data = {"train": "the training data", "validate": "the validation data", "test": "the test data"}
    stage, loader = next(iter(series))[:2]
    number_of = f" (dataloader {loader})" if loader else ""
    when = f"{len(epochs)} epochs from {number(epochs[0], 6)} to {number(epochs[-1], 6)}"
    return f"{data[stage].capitalize()}{number_of}, in {when if epochs[1:] else f'epoch {number(epochs[0], 6)} alone'}."


def _at_input(series: Series, metric: str) -> Points:
    return next((points for key, points in series.items() if key[2:] == ("", metric)), [])


def _nearest(history: History, series: Series) -> str | None:
    """The name of the frame that was nearest at the end; "none", or None if that is not known."""
    course = next(iter(series))[:2]
    known = (
        row["geometry"]
        for row in reversed(history)
        if "geometry" in row and course in {key[:2] for key in values_of(row)}
    )
    return next(known, None)


def _geometry(history: History, series: Series) -> list[str]:
    name, distances = _nearest(history, series), {frame: _at_input(series, frame) for frame in FRAMES_IN_WORDS}
    end = max((points[-1][0] for points in distances.values() if points), default=0)
    last = {
        frame: points[-1][1]
        for frame, points in distances.items()
        if points and math.isfinite(points[-1][1]) and (frame == name or points[-1][0] == end)
    }
    if name in last:
        return [f"The class means are nearest to {_article(FRAMES_IN_WORDS[name])}: {_change(name, distances[name])}"]
    text = listed([f"{FRAMES_IN_WORDS[frame]} {number(value)} (`{frame}`)" for frame, value in last.items()])
    if name == "none" and last:
        return [
            "No frame is near: class means of the same lengths in random directions can be as close. The distances at "
            f"the end are: {text}."
        ]
    if name == "none":
        return ["No frame exists for this number of classes and features, or the class means were not finite."]
    if last:
        return [
            f"The distances at the end are: {text}. Which frame is nearest is in the checkpoint of the run, which was not found."
        ]
    return []


def _article(frame: str) -> str:
    return frame if frame == "SELI" else f"an {frame}" if frame[0] == "o" else f"a {frame}"


def _change(metric: str, points: Points) -> str:
    """How a metric went from the first to the last epoch, in one sentence."""
    (start, first), (end, last) = points[0], points[-1]
    name = f"`{metric}`"
    if not (math.isfinite(first) and math.isfinite(last)):
        value = number(last)
        return f"{name} is {value} at epoch {number(end, 6)}."
    if len(points) == 1:
        return f"{name} is {number(last)} at epoch {number(end, 6)}."
    ratio = first / last if first > 0 < last else math.nan
    if 0.95 < ratio < 1.05 or first == last:
        return f"{name} hardly changed: {number(first)} at epoch {number(start, 6)}, {number(last)} at epoch {number(end, 6)}."
    verb = "fell" if last < first else "rose"
    times = max(ratio, 1 / ratio) if 0 < ratio < math.inf else math.inf
    factor = (
        ""
        if times == math.inf
        else f", by a factor of {round(times):,}"
        if times >= 100
        else f", by a factor of {number(times, 2)}"
    )
    least, epoch = min((value, epoch) for epoch, value in points if math.isfinite(value))
    dip = f" Its least was {number(least)} at epoch {number(epoch, 6)}." if last > 1.5 * least > 0 else ""
    change = (
        f"{name} {verb} from {number(first)} at epoch {number(start, 6)} to {number(last)} at epoch {number(end, 6)}"
    )
    return f"{change}{factor}.{dip}"


def _how_far(history: History, series: Series, asked: Collection[str]) -> Iterator[str]:
    nearest = _nearest(history, series)
    names = metrics_shown([key for key in series if not key.layer] or series, asked)
    wanted = ["nc1", "nc2_etf_centered", "nc2_of"] if nearest not in FRAMES_IN_WORDS else ["nc1"]
    wanted += [
        "nc3" if nearest == "nc2_of" and "nc3" in names else "nc3_centered" if "nc3_centered" in names else "nc3"
    ]
    shown = [name for name in wanted if name in names] or [name for name in names if name != DEPTH][:3]
    layers = layers_of(series)
    for name in shown:
        key = max((key for key in series if key.metric == name), key=lambda key: layers.index(key.layer))
        at = f" of {key.layer}" * bool(key.layer)
        yield f"{in_words(name) or f'`{name}`'}{at}: {_change(name, series[key])}"
    points = [point for point in _at_input(series, "nc1") if math.isfinite(point[1]) and point[1] > 0]
    if len(points) >= 8:
        epoch, before = points[-1 - len(points) // 4]
        fell = 1 - points[-1][1] / before
        yield (
            f"`nc1` was still falling: {100 * fell:.0f} % lower than at epoch {number(epoch, 6)}."
            if fell > 0.1
            else f"`nc1` was no longer falling: {number(before)} at epoch {number(epoch, 6)}, {number(points[-1][1])} at the end."
        )


def _depth(series: Series) -> Iterator[str]:
    layers = layers_of(series)
    if len(layers) < 2:
        yield f"One depth alone was measured, {layer_name(layers[0])}; `layers=` of the callback adds others."
        return
    if points := [(epoch, value) for epoch, value in _at_input(series, DEPTH) if math.isfinite(value)]:
        epoch, depth = points[-1]
        yield (
            f"The effective depth is {number(depth)} of {len(layers)} at epoch {number(epoch, 6)}: from that layer on, the "
            "nearest class mean classifies as well as at the last layer, within 1 %."
            f"{' The classifier input counts as the last layer.' * (not layers[-1])}"
        )
    for metric in ("nc1", "ncc_error"):
        last = {layer: points[-1][1] for layer, points in by_layer(series, metric).items()}
        if not last:
            continue
        places = sorted({round(at * (len(last) - 1) / 7) for at in range(8)})
        names = list(last)
        text = ", ".join(f"{layer_name(names[at])} {number(last[names[at]])}" for at in places)
        yield f"`{metric}` by depth, at the end: {text}.{_monotone(last)}"


def _monotone(last: dict[str, float]) -> str:
    pairs = list(zip(last.items(), list(last.items())[1:], strict=False))
    rises = [f"{layer_name(after)}" for (_, before), (after, value) in pairs if value > before]
    if not rises:
        return " It does not increase from layer to layer."
    return f" It rises at {listed(rises)}."


def _lagging(table: dict[str, list[Any]]) -> Iterator[str]:
    terms = zip(*(table.get(name, []) for name in ("class", "nearest", "nearest_cdnv")), strict=False)
    known = sorted((row for row in terms if math.isfinite(row[2])), key=lambda row: -row[2])
    if len(known) < 2:
        return
    middle = median(row[2] for row in known)
    behind = [row for row in known if row[2] > _LAGS * middle]
    if not behind:
        label, other, value = known[0]
        yield (
            f"No class lags. The largest `nearest_cdnv` is {number(value)} (class {label}, nearest class {other}); the median is "
            f"{number(middle)}."
        )
        return
    names = [f"class {label} (nearest class {other}, {number(value)})" for label, other, value in behind]
    yield (
        f"{listed(names, 4).capitalize()}: `nearest_cdnv` is more than twice the median of the classes, {number(middle)}."
    )


def cautions(history: History) -> list[str]:
    """Results of a run that may be unreliable, with the reason, as far as its data show it."""
    run = read_curves(history)
    series = course_of(series_of(run.metrics))
    doubts = (
        _of_rows(history, series),
        _of_files(history, series, run),
        _of_values(series),
        _of_classes(history),
        _of_settings(history, series, run),
    )
    return _over(run.over, chain.from_iterable(doubts))


def _of_rows(history: History, series: Series) -> Iterator[str]:
    if len({epoch for points in series.values() for epoch, _ in points}) == 1:
        yield "One epoch alone was measured: nothing is known about the course of training."
    for name, value, reason in (
        ("partial", True, "after training was resumed in the middle, so only in part"),
        ("weights", "swapped", "with other weights than those of the last step, such as averaged ones"),
    ):
        if epochs := list(dict.fromkeys(number(row["epoch"], 6) for row in history if row.get(name) == value)):
            yield f"{_epochs(epochs)} measured {reason}."
    places = [
        (row["epoch"], row.get("step"), row.get("weights"), key) for row in history for key in row if key[:3] == "nc/"
    ]
    if epochs := list(dict.fromkeys(number(place[0], 6) for place in _twice(places))):
        yield f"{_epochs(epochs)} measured twice at one step: the file may hold the rows of two runs."


def _of_files(history: History, series: Series, run: RunCurves) -> Iterator[str]:
    """What a checkpoint or a log alone does not tell of the rest."""
    end = max(epoch for points in series.values() for epoch, _ in points)
    shown = pictured(history.scenes)
    if shown and shown[-1].epoch < end:
        yield (
            f"The checkpoint of the run ends at epoch {number(shown[-1].epoch, 6)}, before the curves: the nearest frame, the "
            "classes and the pictures are those of that epoch."
        )
    layers = [layer for layer in layers_of(series) if layer]
    of_logger = not history.about and tuple(history[0])[:2] != FIRST_COLUMNS and run.over == "epoch"
    if of_logger and len(layers) > 1 and layers == sorted(layers, key=natural_order):
        yield (
            "Layers stand in the order of their names, which may not be that of the network: a logger's file alone does not "
            "tell; the checkpoint of the run does."
        )


def _epochs(epochs: Sequence[str]) -> str:
    return f"Epochs {listed(epochs)} were" if epochs[1:] else f"Epoch {epochs[0]} was"


def _twice(places: Sequence[Any]) -> list[Any]:
    seen: set[Any] = set()
    return [place for place in places if place in seen or seen.add(place)]  # type: ignore[func-returns-value]


def _of_values(series: Series) -> Iterator[str]:
    for kind, is_kind in (("not a number", math.isnan), ("infinite", math.isinf)):
        keys = {key: sum(map(is_kind, (value for _, value in points))) for key, points in series.items()}
        always = [key for key, count in keys.items() if count == len(series[key])]
        at_last = [key for key, count in keys.items() if key not in always and count and is_kind(series[key][-1][1])]
        at_times = [key for key, count in keys.items() if count and key not in always and key not in at_last]
        for found, when in ((always, "always"), (at_last, "at the end"), (at_times, "in some epochs")):
            if names := list(dict.fromkeys(key.metric for key in found)):
                yield (
                    f"{listed(names)} {'are' if names[1:] else 'is'} {kind} {when}"
                    f"{_where(found, series)}: there the value means nothing, and a warning of the run says why."
                )
    points = _at_input(series, "nc1")
    if points and 0 <= points[-1][1] < _FLOOR:
        yield (
            f"`nc1` is {number(points[-1][1])} at the end. So far down, the rounding of float32 features is as large as their "
            "scatter: only the order of magnitude is known."
        )


def _where(keys: Sequence[Any], series: Series) -> str:
    """At which layers, unless it is all of them."""
    layers = layers_of(keys)
    return "" if len(layers) == len(layers_of(series)) else f" at {listed([layer_name(layer) for layer in layers])}"


def _of_classes(history: History) -> Iterator[str]:
    about, seen = history.about, history.scenes[-1].classes if history.scenes else None
    outputs, features = (
        int(text) if (text := about.get(name, "")).isdecimal() else None for name in ("classes", "features")
    )
    if seen is not None and outputs is not None and seen < outputs:
        yield f"Only {seen} of {outputs} classes have samples; the others are left out of every metric."
    classes = seen or outputs
    if classes and features and classes > features + 1:
        yield (
            f"No simplex ETF exists for {classes} classes in {features} dimensions, so metrics that compare with it cannot "
            "reach 0."
        )
    samples = history.per_class.get("samples", [])
    if samples and (least := min(samples)) < _FEW:
        few = [str(label) for label, count in zip(history.per_class["class"], samples, strict=True) if count < _FEW]
        yield (
            f"Few samples in class {listed(few)}: with {least} of them, the scatter around their own mean is too small by a "
            f"factor of {number(1 - 1 / least)} on average."
        )


def _of_settings(history: History, series: Series, run: RunCurves) -> Iterator[str]:
    stage = next(iter(series)).stage
    if stage != "train":
        yield "Collapse is a statement about the training data; here other data were measured."
    if history.about.get("mode") == "online":
        yield (
            'Measured with `mode="online"`: in train mode (dropout, batch statistics), with weights that change '
            "within the epoch, so the values differ from those of an extra pass in eval mode."
        )
    accuracies = [
        (key.metric, ys[-1])
        for key, (_, ys) in run.objectives.items()
        if key.stage == "train" and is_accuracy(key.metric)
    ]
    name, accuracy = next(iter(accuracies), ("", math.nan))
    if stage == "train" and 0 <= accuracy < 1:
        yield (
            f"Training accuracy (`{name}`) is {number(accuracy, 4)} at the end, not 1: collapse is what happens after the last "
            "training error is gone."
        )
