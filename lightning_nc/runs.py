"""Runs: rows of metrics over epochs, and reading them back from CSV files, TensorBoard and W&B (offline)."""

from __future__ import annotations

import csv
import io
import json
import math
import re
import struct
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from lightning.fabric.utilities import rank_zero_warn

from lightning_nc.extras import needed
from lightning_nc.functional import METRICS
from lightning_nc.keys import DEPTH, STAGES, base_name, natural_order, parse_key

__all__ = [
    "FIRST_COLUMNS",
    "Run",
    "epoch_of",
    "find_log",
    "finite_number",
    "in_one_step",
    "is_metric",
    "is_objective",
    "metrics_of",
    "plain_value",
    "read_rows",
    "read_run",
    "split_seeds",
]

Run = Sequence[Mapping[str, Any]]
"""Rows with ``epoch``, values by key, and optionally ``stage``."""

FIRST_COLUMNS = ("stage", "epoch")
"""How the CSV file of a :class:`lightning_nc.History` begins."""

_OBJECTIVE = re.compile(
    r"(.*[^a-z0-9])?(loss|objective|acc|accuracy)([_@/]?(epoch|top|\d+|dataloader_idx))*", re.IGNORECASE
)
_DAMAGED = "the file is damaged: the record {} does not fit its checksum"
_UFM_LEVEL = re.compile(r"(.+)_(h1|pre)")  # columns of the UFM example: the first layer, and before the ReLU


def is_metric(key: str) -> bool:
    """Whether an entry of a row is a metric, or its error: its key starts with ``nc/`` or ends with a name in ``METRICS``.

    Example:
        >>> [is_metric(key) for key in ("nc/val/nc1", "layer3/nc1", "nc1_cdnv_stderr", "train_loss")]
        [True, True, True, False]
    """
    name = base_name(parse_key(key).metric)
    return key.startswith("nc/") or name in METRICS or name == DEPTH


def is_objective(key: str) -> bool:
    """Whether an entry of a row is a loss, an objective or an accuracy, by its name; not that of a single step.

    Example:
        >>> [is_objective(key) for key in ("val/loss", "train_acc", "accuracy_top5", "loss_step", "loss_scale", "nc/loss/nc1")]
        [True, True, True, False, False, False]
    """
    return _OBJECTIVE.fullmatch(key) is not None and not is_metric(key)


def metrics_of(row: Mapping[str, Any]) -> dict[str, float]:
    """The metrics of a row by key; ``ValueError`` if one is not a number."""
    return {key: _number(key, value) for key, value in row.items() if is_metric(key)}


def epoch_of(row: Mapping[str, Any]) -> float:
    """The epoch of a row, an int if it is a whole number; ``ValueError`` if it is missing or not a finite number."""
    if "epoch" not in row:
        raise ValueError(f"a row of metrics needs an 'epoch', got only {list(row)!r:.300}")
    return finite_number("epoch", row["epoch"])


def finite_number(name: str, value: Any) -> float:
    """A finite number below 2**63, an int if it is whole; ``ValueError`` if it is something else."""
    number = _number(name, value)
    if not math.isfinite(number):
        raise ValueError(f"{name} must be a finite number, got {value!r}")
    if abs(number) > 2**63:  # an axis of such numbers cannot be drawn
        raise ValueError(f"{name} must be below 2**63, got {value!r:.60}")
    return int(number) if number.is_integer() else number


def plain_value(name: str, value: Any) -> float | str | None:
    """The value of an entry as a file gives it back: a float for a metric; else a number, a bool, a text in one line or None.

    Example:
        >>> plain_value("nc/nc1", "0.5"), plain_value("partial", "True"), plain_value("weights", "swapped")
        (0.5, True, 'swapped')
    """
    if is_metric(name):
        return _number(name, value)
    if isinstance(value, str):
        text = " ".join(value.split())
        for kind in (int, float):
            with suppress(ValueError):
                number = kind(text)
                return number if abs(number) < 2**63 else float(text)
        return {"True": True, "False": False}.get(text, text)
    exact = value is None or (isinstance(value, int) and abs(value) < 2**63)
    return value if exact else _number(name, value)


def find_log(path: str | Path) -> Path:
    """The log file at a path: the path itself, or the newest log file in a directory, at any depth.

    Raises:
        FileNotFoundError: if there is none.
    """
    path = Path(path)
    if path.is_file() and (path.suffix.lower() == ".csv" or any(path.match(pattern) for pattern in _readers())):
        return path
    found = [file for pattern in _readers() for file in path.rglob(pattern) if file.is_file()]
    if not found:
        problem = (
            "is not a CSV file, and not a directory with" if path.exists() else "does not exist; needs a CSV file or"
        )
        raise FileNotFoundError(
            f"{path} {problem} {', '.join(_readers())}; pass the file or the directory that a logger wrote"
        )
    return max(found, key=lambda file: file.stat().st_mtime)


def read_run(path: str | Path) -> Run:
    """Read the rows of a run that hold metrics, each with ``epoch`` and values by key, and ``step`` if the file has it.

    Layers are in natural order; those of a :class:`lightning_nc.History` keep their order, and its rows all of their entries.
    A last row of a CSV file without a line end, which may be cut, is left out. A loss or an accuracy (see :func:`is_objective`)
    goes into the first row of its epoch that has metrics.

    Args:
        path: a CSV file with a column ``epoch`` or ``iteration``, or a directory that holds, at any depth, ``metrics.csv``,
            TensorBoard's ``events.out.tfevents*`` or W&B's ``run-*.wandb``; the newest file is read. Keys are as the callback
            logs them (``nc/val/nc1``) or as :func:`lightning_nc.measure` returns them (``layer3/nc1``). Columns ``stage``,
            ``seed``, ``weights`` and ``partial`` are kept. Iterations without epochs become the ``epoch`` too; in such a file, a
            column ``nc1_h1`` or ``nc1_pre``, as the UFM example writes it, is ``nc1`` of a layer ``h1`` or ``pre``.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if the file holds no metrics, or is damaged.
        ImportError: if the package that wrote it is not installed.
    """
    file = find_log(path)
    rows = read_rows(file)
    if not rows:
        raise ValueError(f"{file} holds no values of metrics; was NeuralCollapseCallback in the Trainer?")
    return rows


def read_rows(file: Path) -> list[dict[str, Any]]:
    """The rows of a log file, as :func:`read_run` returns them; empty if it has none yet."""
    read = next((read for pattern, read in _readers().items() if file.match(pattern)), _csv)
    try:
        rows = list(read(file))
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from error
    # Some loggers sort their columns by name, others do not.
    own = bool(rows) and tuple(rows[0])[:2] == FIRST_COLUMNS
    return rows if own else [{key: row[key] for key in sorted(row, key=_order)} for row in _joined(rows)]


@contextmanager
def in_one_step(path: Path) -> Iterator[Path]:
    """Another path to write a file to, which then takes the place of ``path``; nothing of it is left if that fails.

    A run that is killed leaves the old file or the new one.

    Raises:
        OSError: with the name of the file, which that of a full disk does not have.
    """
    path = path.resolve()  # a link stays a link
    if path.exists() and not path.is_file():  # a device
        yield path
        return
    scratch = path.with_name(f"{path.stem}.tmp{path.suffix}")
    try:
        yield scratch
        scratch.replace(path)
    except OSError as error:
        raise OSError(error.errno, error.strerror or str(error), str(path)) from error
    finally:
        with suppress(OSError):
            scratch.unlink()


def split_seeds(label: str, rows: Run) -> list[tuple[str, Run]]:
    """Label and rows of each run in the rows of a file, which has several if its column ``seed`` has several values.

    Example:
        >>> split_seeds("figure4.csv", [{"seed": 0, "nc1": 0.5}, {"seed": 1, "nc1": 0.4}])
        [('figure4.csv, seed 0', [{'seed': 0, 'nc1': 0.5}]), ('figure4.csv, seed 1', [{'seed': 1, 'nc1': 0.4}])]
    """
    runs: dict[Any, list[Mapping[str, Any]]] = {}
    for row in rows:
        seed = row.get("seed")
        runs.setdefault("nan" if seed != seed else seed, []).append(row)
    return [(f"{label}, seed {seed}" if len(runs) > 1 else label, rows) for seed, rows in runs.items()]


def _joined(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows with metrics; losses and accuracies of rows without go into the first row of their epoch."""
    apart: dict[float, dict[str, Any]] = {}
    measured = []
    for row in rows:
        if any(map(is_metric, row)):
            measured.append(row)
        else:
            apart.setdefault(row["epoch"], {}).update({key: row[key] for key in row if is_objective(key)})
    return [{**apart.pop(row["epoch"], {}), **row} for row in measured]


def _readers() -> dict[str, Callable[[Path], Iterator[dict[str, Any]]]]:
    return {"metrics.csv": _csv, "events.out.tfevents*": _tensorboard, "run-*.wandb": _wandb}


def _order(key: str) -> tuple[Any, ...]:
    found, names = parse_key(key), list(METRICS)
    metric = base_name(found.metric)
    place = names.index(metric) if metric in names else len(names)
    return list(STAGES).index(found.stage), found.loader, natural_order(found.layer), place, found.metric


def _number(name: str, value: Any) -> float:
    try:
        return float(value)
    except (TypeError, ValueError, RuntimeError, OverflowError):  # a tensor of several numbers; an int of 400 digits
        raise ValueError(f"{name} must be a number, got {value!r:.60}") from None


def _csv(file: Path) -> Iterator[dict[str, Any]]:
    names, *table = _cells(file)
    if over := "iteration" in names and "epoch" not in names:
        names = [_of_layer(name) for name in names]
    if not (over or "epoch" in names) or not any(is_metric(name) for name in names):
        raise ValueError(
            f"needs a column 'epoch' and a metric such as 'nc/nc1' or 'layer3/nc1', found the columns {names!r:.300}"
        )
    twice = [name for name in dict.fromkeys(names) if names.count(name) > 1 and (is_metric(name) or name == "epoch")]
    if twice:
        raise ValueError(f"has several columns named {twice!r:.300}; keep one of each")
    own = tuple(names[:2]) == FIRST_COLUMNS
    for number, cells in enumerate(table, start=2):
        if len(cells) < len(names) and number == len(table) + 1:  # still being written
            return
        if len(cells) not in (0, len(names)):
            raise ValueError(f"row {number} has {len(cells)} cells, but the header has {len(names)}")
        row = {name: cell for name, cell in zip(names, cells, strict=False) if cell and (own or _is_kept(name))}
        if over and "iteration" in row:
            row["epoch"] = row["iteration"]
        try:
            if any(map(is_metric, row)) or ("epoch" in row and any(map(is_objective, row))):
                yield {**{name: plain_value(name, cell) for name, cell in row.items()}, "epoch": epoch_of(row)}
        except ValueError as error:
            raise ValueError(f"row {number}: {error}") from error


def _cells(file: Path) -> list[list[str]]:
    """The cells of a CSV file in UTF-8 (with or without a byte order mark), separated by commas, semicolons or tabs."""
    limit = csv.field_size_limit()
    data, end, rest = file.read_bytes().rpartition(b"\n")
    try:
        text = (data + end or rest).decode("utf-8-sig")
        csv.field_size_limit(max(limit, len(text)))
        first = text.partition("\n")[0]
        delimiter = max(",;\t", key=lambda mark: ("epoch" in first.split(mark), first.count(mark)))
        rows = list(csv.reader(io.StringIO(text, newline=None), delimiter=delimiter, skipinitialspace=True))
    except (UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"not a CSV file in UTF-8: {error}") from error
    finally:
        csv.field_size_limit(limit)
    if not rows:
        raise ValueError("the file is empty")
    if end and rest.count(delimiter.encode()) + 1 >= len(rows[0]):
        rank_zero_warn(
            f"the last row of {file} has no line end, so it may be cut, and is left out; end the line if it is complete"
        )
    return rows


def _is_kept(name: str) -> bool:
    """Whether a column of a file that is not of a ``History`` goes into the rows."""
    kept = ("stage", "epoch", "iteration", "step", "seed", "weights", "partial")
    return name in kept or is_metric(name) or is_objective(name)


def _of_layer(name: str) -> str:
    """The key of a column of the UFM example: ``h1/nc1`` of ``nc1_h1``."""
    found = _UFM_LEVEL.fullmatch(name)
    return f"{found[2]}/{found[1]}" if found and found[1] in METRICS else name


def _without_prefix(key: str) -> str:
    """A key as it is logged; the callbacks of transformers put ``train/`` before all keys."""
    rest = key.removeprefix("train/")
    return rest if rest in ("epoch", "global_step") or rest.startswith("nc/") else key


def _tensorboard(file: Path) -> Iterator[dict[str, Any]]:
    with needed(f"{file}, a file of TensorBoard,", "tensorboard"):
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for part in file.parent.glob("events.out.tfevents*"):
        _check_events(part)
    try:
        events = EventAccumulator(str(file.parent), size_guidance={"scalars": 0}).Reload()
    except Exception as error:
        raise ValueError(f"the file is damaged: {error}") from error
    tags = {_without_prefix(tag): tag for tag in events.Tags()["scalars"]}
    epochs = {event.step: event.value for event in events.Scalars(tags["epoch"])} if "epoch" in tags else None
    rows: dict[int, dict[str, Any]] = {}
    lost: set[int] = set()
    for key in (tag for tag in tags if is_metric(tag) or is_objective(tag)):
        for event in events.Scalars(tags[key]):
            if epochs is not None and event.step not in epochs:
                lost |= {event.step} if is_metric(key) else set()
                continue
            epoch = finite_number("epoch", event.step if epochs is None else epochs[event.step])
            rows.setdefault(event.step, {"epoch": epoch, "step": event.step})[key] = event.value
    if lost:
        rank_zero_warn(
            f"{file} has metrics without an epoch at {len(lost)} steps, the last of them {max(lost)}: left out, since the run "
            "may have been killed before it wrote the epoch"
        )
    yield from (rows[step] for step in sorted(rows))


def _check_events(file: Path) -> None:
    """Raise ValueError if a record of TensorBoard does not fit its checksums, after which TensorBoard reads no further."""
    from tensorboard.compat.tensorflow_stub.pywrap_tensorflow import masked_crc32c

    data, position = file.read_bytes(), 0
    while position + 12 <= len(data) and not _only_zeros(data, position):
        body, end = position + 12, position + 16 + int.from_bytes(data[position : position + 8], "little")
        parts = [
            data[position:body],
            data[body:end] if end <= len(data) else b"",
        ]  # cut: still being written, or killed
        if any(part and masked_crc32c(part[:-4]) != int.from_bytes(part[-4:], "little") for part in parts):
            raise ValueError(_DAMAGED.format(f"of {file.name} at byte {position}"))
        position = end


def _only_zeros(data: bytes, position: int) -> bool:
    """Whether nothing but zeros follows, as a crash of the machine may leave them."""
    return not any(data[position : position + 7]) and not data[position:].strip(b"\0")


def _wandb(file: Path) -> Iterator[dict[str, Any]]:
    with needed(f"{file}, a file of W&B,", '"lightning-neural-collapse[wandb]"'):
        from wandb.proto import wandb_internal_pb2 as proto

    for payload in _records(file.read_bytes()):
        record = proto.Record()  # type: ignore[attr-defined]
        try:
            record.ParseFromString(payload)
        except Exception as error:
            raise ValueError(f"the file is damaged: {error}") from error
        if record.WhichOneof("record_type") == "history":
            items = {"/".join(item.nested_key) or item.key: item.value_json for item in record.history.item}
            row = {_without_prefix(key): json.loads(value) for key, value in items.items()}
            metrics, losses = metrics_of(row), {key: row[key] for key in row if is_objective(key)}
            if metrics or (losses and "epoch" in row):
                step = row.get("trainer/global_step", row.get("global_step"))  # Lightning's key, that of transformers
                yield {"epoch": epoch_of(row), **({} if step is None else {"step": step}), **losses, **metrics}


def _records(data: bytes) -> Iterator[bytes]:
    """The records of a file in LevelDB's log format, which W&B writes: blocks of 32 KiB; records may span several blocks."""
    header, block = 7, 32768
    position, parts = header, b""  # the file itself has a header of seven bytes, too
    while position + header <= len(data):
        if block - position % block < header:  # no header fits in the rest of the block
            position += block - position % block
            continue
        if _only_zeros(data, position):
            return
        checksum, length, kind = struct.unpack_from("<IHB", data, position)
        part = data[position + header : position + header + length]
        if len(part) < length:  # the run is still going, or was killed
            return
        if zlib.crc32(part, zlib.crc32(bytes([kind]))) != checksum:
            raise ValueError(_DAMAGED.format(f"at byte {position}"))
        position += header + length
        parts = part if kind in (1, 2) else parts + part  # whole, first, middle, last
        if kind in (1, 4):
            yield parts
