"""What loggers have written, read back: CSV files, TensorBoard directories, W&B offline directories."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from lightning_nc.functional import MEASURES
from lightning_nc.plotting import Run, natural

__all__ = ["find_log", "read_run"]


def find_log(path: str | Path) -> Path:
    """The file of a logger: the path itself, or the newest in a directory, at any depth.

    Raises:
        FileNotFoundError: if there is none.
    """
    path = Path(path)
    if path.is_file() and any(path.match(pattern) for pattern in (*_readers(), "*.csv")):
        return path
    found = [file for pattern in _readers() for file in path.rglob(pattern)]
    if not found:
        raise FileNotFoundError(
            f"{path} is, or holds, none of {', '.join(_readers())}; give the file or the directory that a logger wrote"
        )
    return max(found, key=lambda file: file.stat().st_mtime)


def read_run(path: str | Path) -> Run:
    """The rows of a run that hold measurements, each with ``epoch`` and values by key, layers in natural order.

    Args:
        path: a CSV file, or a directory that holds, at any depth, ``metrics.csv``, TensorBoard's ``events.out.tfevents*`` or
            W&B's ``run-*.wandb``. Of several the newest is read.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it holds no measurement of neural collapse, or is damaged.
        ImportError: if the package that wrote it is not installed.
    """
    file = find_log(path)
    read = next((read for pattern, read in _readers().items() if file.match(pattern)), _csv)
    rows = [row for row in read(file) if any(key.startswith("nc/") for key in row)]
    if not rows:
        raise ValueError(
            f"{file} holds no row with an epoch and a key that starts with nc/; was NeuralCollapseCallback in the Trainer?"
        )
    # Some loggers sort their columns by name, some not at all.
    return [{key: row[key] for key in sorted(row, key=_order)} for row in rows]


def _readers() -> dict[str, Callable[[Path], Iterator[dict[str, Any]]]]:
    return {"metrics.csv": _csv, "events.out.tfevents*": _tensorboard, "run-*.wandb": _wandb}


def _order(key: str) -> tuple[Any, ...]:
    layer, _, measure = key.rpartition("/")
    return natural(layer), list(MEASURES).index(measure) if measure in MEASURES else len(MEASURES), measure


def _csv(file: Path) -> Iterator[dict[str, Any]]:
    with file.open(newline="") as lines:
        for row in csv.DictReader(lines):
            try:
                values = {key: float(value) for key, value in row.items() if str(key).startswith("nc/") and value}
                if values:
                    yield {"epoch": int(float(row["epoch"])), **values}
            except (KeyError, ValueError):  # a row that is half written, or of another table
                continue


def _tensorboard(file: Path) -> Iterator[dict[str, Any]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(file.parent), size_guidance={"scalars": 0}).Reload()
    tags = events.Tags()["scalars"]
    epochs = {event.step: int(event.value) for event in events.Scalars("epoch")} if "epoch" in tags else {}
    rows: dict[int, dict[str, Any]] = {}
    for tag in tags:
        if tag.startswith("nc/"):
            for event in events.Scalars(tag):
                rows.setdefault(event.step, {"epoch": epochs.get(event.step, event.step)})[tag] = event.value
    yield from (rows[step] for step in sorted(rows))


def _wandb(file: Path) -> Iterator[dict[str, Any]]:
    from wandb.proto import wandb_internal_pb2 as proto

    for payload in _records(file.read_bytes()):
        record = proto.Record()  # type: ignore[attr-defined]
        try:
            record.ParseFromString(payload)
        except Exception as error:
            raise ValueError(f"{file} is damaged: {error}") from error
        if record.WhichOneof("record_type") == "history":
            row = {"/".join(item.nested_key) or item.key: json.loads(item.value_json) for item in record.history.item}
            values = {key: float(value) for key, value in row.items() if key.startswith("nc/") and _is_number(value)}
            if values:
                yield {"epoch": int(row.get("epoch", 0)), **values}


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) or value in ("NaN", "Infinity", "-Infinity")


def _records(data: bytes) -> Iterator[bytes]:
    """The records of a file in LevelDB's log format, which W&B writes: blocks of 32 KiB, a record cut where a block ends."""
    header, block = 7, 32768
    position, parts = header, b""  # the file itself has a header of seven bytes, too
    while position + header <= len(data):
        if block - position % block < header:  # no header fits in the rest of the block
            position += block - position % block
            continue
        length, kind = int.from_bytes(data[position + 4 : position + 6], "little"), data[position + 6]
        part = data[position + header : position + header + length]
        position += header + length
        if position > len(data):  # the run is going on, or was killed
            return
        parts = part if kind in (1, 2) else parts + part  # whole, first, middle, last
        if kind in (1, 4):
            yield parts
