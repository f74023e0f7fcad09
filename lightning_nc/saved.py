"""A saved run, read back: the rows of its log, and what only a checkpoint holds beside them."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from lightning.fabric.utilities import rank_zero_warn

from lightning_nc.checkpoints import read_checkpoint
from lightning_nc.keys import STAGES, Key, parse_key
from lightning_nc.runs import epoch_of, find_log, finite_number, is_metric, metrics_of, read_run
from lightning_nc.scenes import scenes_of

__all__ = ["checked", "read_saved", "state_of", "values_of"]

_OF_ONE_ROW = {"stage", "step", "weights", "partial", "geometry"}  # not of all measurements of an epoch


def read_saved(path: str | Path) -> dict[str, Any]:
    """The state of the :class:`lightning_nc.History` of a run: what ``History.state`` gave, as far as files hold it.

    A log file has rows alone. A directory also has scenes, the table of the classes, settings and versions, if there is a
    checkpoint in it, at any depth, whose callback saved them: the newest whose values are those of the log. The
    checkpoint's rows say more, so they are taken, and those of the log that it does not hold. Of several callbacks, what they
    measured at the same moment is one row. Nothing in a checkpoint is executed.

    Args:
        path: a log file (see :func:`lightning_nc.runs.read_run`), a Lightning checkpoint (``.ckpt``), the
            ``trainer_state.json`` of transformers, or a directory with any of them.

    Raises:
        FileNotFoundError: if there is none.
        ValueError: if the file holds no metrics, or is damaged.
    """
    path = Path(path)
    if path.is_file() and (read := _reader(path)):
        saved = read(path)
        if not saved["history"]:
            raise ValueError(f"{path} holds no history of NeuralCollapseCallback; was it in the Trainer?")
        return saved
    try:
        log = find_log(path)
    except FileNotFoundError as error:
        state = _newest(path, []) if path.is_dir() else None
        if state is None:
            raise FileNotFoundError(f"{error}, a checkpoint (.ckpt) or trainer_state.json of the callback") from None
        return state
    rows = list(read_run(log))
    state = None if path.is_file() else _newest(path, rows)
    return {"history": rows} if state is None else {**state, "history": _joined(rows, state["history"])}


def state_of(log_history: Iterable[Mapping[str, Any]], stages: Iterable[str] = tuple(STAGES)) -> dict[str, Any]:
    """The state of the history that the log history of ``transformers.Trainer`` holds."""
    rows, scenes, stages = [], [], set(stages)
    for entry in log_history:
        values = {key: value for key, value in entry.items() if key.startswith("nc/")}
        marks = {key: entry[key] for key in ("weights", "geometry") if key in entry}
        stage = parse_key(next(iter(values), "")).stage
        if values and stage in stages and "step" in entry:
            rows.append({"stage": stage, "epoch": entry["epoch"], "step": entry["step"], **marks, **values})
            scenes += [entry["scene"]] if "scene" in entry else []
    return {"history": rows, "scenes": scenes}


def values_of(row: Mapping[str, Any]) -> dict[Key, float]:
    """The metrics of a row by the parts of their keys, with the row's stage where a key names none."""
    return {_key(name, row): value for name, value in metrics_of(row).items()}


def _key(name: str, row: Mapping[str, Any]) -> Key:
    key = parse_key(name)
    return key._replace(stage=row.get("stage", "train")) if key.stage == "train" else key


def _reader(file: Path) -> Callable[[Path], dict[str, Any]] | None:
    return {".ckpt": _lightning, ".json": _transformers}.get(file.suffix.lower())


def _transformers(file: Path) -> dict[str, Any]:
    try:
        state = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file} is damaged: {error}") from error
    if not (isinstance(state, dict) and isinstance(state.get("log_history"), list)):
        raise ValueError(f"{file} is not the trainer_state.json of transformers: it has no log_history")
    try:
        return checked(state_of(state["log_history"]), str(file))
    except (AttributeError, LookupError, TypeError) as error:
        raise ValueError(f"{file} is damaged, or of another version: {type(error).__name__}: {error}") from error


def _lightning(file: Path) -> dict[str, Any]:
    try:
        contents = read_checkpoint(file).contents
    except ValueError as error:
        raise ValueError(f"{file} {str(error).partition('; pass --unsafe')[0]}") from error
    callbacks = contents.get("callbacks")
    states = callbacks.values() if isinstance(callbacks, Mapping) else []
    found = [state for state in states if isinstance(state, Mapping) and _is_history(state.get("history"))]
    return _together([checked(state, str(file)) for state in found])


def checked(state: Mapping[str, Any], source: str) -> dict[str, Any]:
    """The state of a history without what cannot be read: a part that is damaged or of another version is left out, and warns.

    Raises:
        ValueError: if these are the rows.
    """
    problem = f"{source} holds {{}} of neural collapse that cannot be read, damaged or of another version: {{}}"
    try:
        for row in state["history"]:
            epoch_of(row), finite_number("step", row.get("step", 0)), metrics_of(row)
            if not all(value is None or isinstance(value, str | int | float) for value in (*row, *row.values())):
                raise ValueError("an entry is neither a number nor a text")
    except (AttributeError, LookupError, TypeError, ValueError) as error:
        raise ValueError(problem.format("rows", error)) from error
    found = {"history": state["history"]}
    for name, check in (("scenes", scenes_of), ("per_class", _check_table), ("about", _check_texts)):
        try:
            if part := state.get(name):
                check(part)
                found[name] = part
        except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
            rank_zero_warn(f"{problem.format(name, error)}; left out")
    return found


def _check_table(table: Any) -> None:
    if not (all(isinstance(column, list) for column in table.values()) and len(set(map(len, table.values()))) == 1):
        raise ValueError("the columns of the table do not have the same length")


def _check_texts(about: Any) -> None:
    if not all(isinstance(part, str) for item in about.items() for part in item):
        raise ValueError("an entry is no text")


def _is_history(rows: Any) -> bool:
    return isinstance(rows, list) and bool(rows) and all(isinstance(row, Mapping) and "epoch" in row for row in rows)


def _together(states: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The states of several callbacks as one: what they measured at the same moment is one row."""
    if len(states) == 1:
        return dict(states[0])
    rows: dict[tuple[Any, ...], dict[str, Any]] = {}
    for row in (row for state in states for row in state["history"]):
        moment = tuple(row.get(name) for name in ("epoch", "step", "stage", "weights"))
        rows[moment] = {**row, **rows.get(moment, {})}

    def first(name: str) -> Any:
        return next((state[name] for state in states if state.get(name)), {})

    pictured = [
        state["scenes"] for state in states if any(scene.chosen for scene in scenes_of(state.get("scenes", ())))
    ]
    return {
        "history": sorted(rows.values(), key=epoch_of),
        "scenes": pictured[0] if pictured else first("scenes") or [],
        "per_class": first("per_class"),
        "about": first("about"),
    }


def _newest(folder: Path, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
    """The history in the newest checkpoint of a directory that matches the rows of its log, if there is one."""
    files = [file for pattern in ("*.ckpt", "trainer_state.json") for file in folder.rglob(pattern) if file.is_file()]
    problems: list[str] = []
    other = False
    for file in sorted(files, key=lambda file: file.stat().st_mtime, reverse=True):
        try:
            state = (_reader(file) or _lightning)(file)
        except ValueError as error:
            problems.append(str(error))
            continue
        if state["history"] and (not rows or _are_of_one_run(rows, state["history"])):
            break
        other = other or bool(state["history"])
    else:
        state = None
        if other:
            problems.append(
                f"the checkpoints in {folder} hold other epochs or other values than its newest log, so they may be of other "
                "runs; pass the directory of one run"
            )
    if problems:
        rank_zero_warn("; ".join(problems[:1] if state else problems[-1:]) + "; what only it holds is left out")
    return state


def _points(rows: Iterable[Mapping[str, Any]]) -> Iterator[tuple[tuple[Key, float], float]]:
    for row in rows:
        for key, value in values_of(row).items():
            yield (key, epoch_of(row)), value


def _are_of_one_run(rows: Iterable[Mapping[str, Any]], others: Iterable[Mapping[str, Any]]) -> bool:
    """Whether rows have values at the same epochs, and these are equal but for the rounding of a log."""
    known: dict[tuple[Key, float], list[float]] = {}
    for point, value in _points(rows):
        known.setdefault(point, []).append(value)
    shared = [(value, known[point]) for point, value in _points(others) if point in known]
    return bool(shared) and all(any(_is_close(value, other) for other in found) for value, found in shared)


def _is_close(value: float, other: float) -> bool:
    return math.isclose(value, other, rel_tol=1e-4) or (math.isnan(value) and math.isnan(other))


def _joined(rows: Iterable[Mapping[str, Any]], known: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The rows of a checkpoint, with what else the log has of their epochs (a loss), and what it does not hold yet."""
    points = {point for point, _ in _points(known)}
    rest: list[dict[str, Any]] = []
    beside: dict[float, dict[str, Any]] = {}
    for row in rows:
        epoch = epoch_of(row)
        new = {name: value for name, value in row.items() if is_metric(name) and (_key(name, row), epoch) not in points}
        others = {name: value for name, value in row.items() if not is_metric(name)}
        if new:
            rest.append(others | new)
        else:
            beside.setdefault(epoch, {}).update({name: others[name] for name in others.keys() - _OF_ONE_ROW})
    by_stage = sorted(known, key=lambda row: row.get("stage", "train") == "train")
    owner = {row["epoch"]: id(row) for row in by_stage}  # a loss without a stage is that of training
    whole = [{**(beside.get(row["epoch"], {}) if owner[row["epoch"]] == id(row) else {}), **row} for row in known]
    return sorted([*whole, *rest], key=epoch_of)
