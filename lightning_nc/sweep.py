"""``lightning-nc measure``: one model with the weights of one checkpoint after another, on the same data."""

from __future__ import annotations

import ast
import copy
import math
import sys
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from lightning_nc.checkpoints import Checkpoint, Place, find_checkpoints, in_training_order, read_checkpoint
from lightning_nc.functional.table import check_metrics
from lightning_nc.history import History
from lightning_nc.keys import make_key
from lightning_nc.measuring.evaluation import measure, names_to_measure
from lightning_nc.runs import in_one_step
from lightning_nc.specs import DataSpec, ModelSpec, state_of

__all__ = ["Sweep", "measure_checkpoints", "parse_arguments"]


def measure_checkpoints(  # noqa: D417
    paths: Sequence[Path],
    model: str | None,
    data: str,
    *,
    layers: Sequence[str] | None = None,
    metrics: str | Sequence[str] = "paper",
    model_arguments: Mapping[str, Any] | None = None,
    data_arguments: Mapping[str, Any] | None = None,
    device: str = "cpu",
    unsafe: bool = False,
    out: Path | None = None,
    plot: Path | None = None,
) -> int:
    """Measure checkpoints in the order of the training, and print a table.

    Args:
        paths: checkpoints, and folders of them.
        model, data: see :class:`lightning_nc.specs.ModelSpec` and :class:`lightning_nc.specs.DataSpec`.
        layers, metrics: see :func:`lightning_nc.measure`.
        model_arguments, data_arguments: for the class or function that ``model`` and ``data`` name.
        device: where the model runs.
        unsafe: unpickle whatever a checkpoint asks for, which may run any code.
        out: the CSV file, which must not exist yet.
        plot: the picture.

    Returns:
        The exit status: 0 if all checkpoints were measured, else 1.

    Raises:
        FileNotFoundError, ValueError, ImportError: for arguments that do not fit.
    """
    try:
        on = torch.device(device)
    except RuntimeError as error:
        raise ValueError(f"--device must be one of PyTorch, such as cpu or cuda:0, got {device!r}") from error
    if out is not None and out.exists():
        raise ValueError(f"{out} exists; pass another file as -o, or delete it")
    if plot is not None:
        import lightning_nc.plotting  # noqa: F401  # if matplotlib is missing, say so before the measurements
    history = History(out)
    found = find_checkpoints(paths)
    sweep = Sweep(
        ModelSpec(model, model_arguments or {}, on),
        DataSpec(data, data_arguments or {}),
        {"layers": layers, "metrics": metrics, "device": on, "progress": False},
        unsafe,
    )
    names = names_to_measure(metrics, None)  # the modules of MODEL and DATA may have added some
    places, source, failed = in_training_order(found, unsafe)
    if places:
        print(f"{len(places)} checkpoint{'s' * (len(places) > 1)}, epochs {source}")
        failed |= sweep.run(places, history)
    for note in sweep.notes:
        print(note)
    _print_table(history, names)
    if out is not None and out.exists():
        print(f"{out}: {len(History(out))} measurements")  # a full disk may have kept some of them out
    _print_failed(failed, len(found))
    if plot is not None and history:
        with in_one_step(plot) as scratch:
            history.plot(sweep.num_classes).savefig(scratch, dpi=150)
        print(plot)
    return int(bool(failed))


class Sweep:
    """Measures checkpoints one after another.

    Args:
        model: the model, built once.
        data: the data, loaded once.
        settings: for :func:`lightning_nc.measure`.
        unsafe: see :func:`measure_checkpoints`.
    """

    def __init__(self, model: ModelSpec, data: DataSpec, settings: Mapping[str, Any], unsafe: bool = False) -> None:
        self.model, self.data, self.settings, self.unsafe = model, data, dict(settings), unsafe
        self.notes: dict[str, None] = {}  # what was found out, each once
        self.num_classes: int | None = None
        self._said: set[str] = set()
        self._kept: tuple[Path, dict[str, Any]] | None = None  # the weights before, if the next have the same place

    def run(self, places: Sequence[Place], history: History) -> dict[Path, Exception]:
        """Append a row to a history for each checkpoint, in this order; those that could not be measured, with the reason."""
        failed: dict[Path, Exception] = {}
        self.data.load(read_checkpoint(places[0].path, self.unsafe))
        self._note_arguments(self.data)
        for place, following in zip(tqdm(places, "Checkpoints"), [*places[1:], None], strict=True):
            try:
                with _warnings_once(self._said):
                    self._measure(place, following, history)
            except Exception as error:
                failed[place.path] = error
                self._kept = None
        return failed

    def _measure(self, place: Place, following: Place | None, history: History) -> None:
        checkpoint = read_checkpoint(place.path, self.unsafe)
        if checkpoint.step != place.step or (place.inside and checkpoint.epoch != place.epoch):
            raise ValueError("has changed since the command began; measure it again")
        model = self.model.load(checkpoint, self.unsafe)
        self._note_arguments(self.model)
        self._note(checkpoint)
        if self._is_repeated(place, following, state_of(model)):
            return
        values = measure(model, self.data.batches(model, self.model.device), **self.settings)
        if values.classes is not None:
            self.num_classes = len(values.classes.labels)
        marks = {"weights": "swapped"} if checkpoint.is_averaged else {}
        history.append(values, epoch=place.epoch, step=place.step, checkpoint=str(place.path), **marks)

    def _is_repeated(self, place: Place, following: Place | None, weights: Mapping[str, Any]) -> bool:
        """Whether the checkpoint before, of the same epoch and step, has the same weights, as ``last.ckpt`` often has."""
        before, self._kept = self._kept, None
        if following is not None and following[1:] == place[1:]:
            self._kept = place.path, copy.deepcopy(dict(weights))
        if before is None:
            return False
        path, others = before
        if weights.keys() == others.keys() and all(map(_equal, weights.values(), others.values())):
            self.notes[f"left out: {place.path}, which has the weights of {path}"] = None
            return True
        self.notes[f"{place.path} and {path} have the same epoch and step, but other weights: are they of one run?"] = (
            None
        )
        return False

    def _note_arguments(self, spec: ModelSpec | DataSpec) -> None:
        if spec.arguments:
            pairs = ", ".join(f"{name}={value!r:.100}" for name, value in spec.arguments.items())
            self.notes[f"{spec.text} with {pairs}"] = None

    def _note(self, checkpoint: Checkpoint) -> None:
        if self.model.removed:
            self.notes[f"removed {self.model.removed} from the names of the weights"] = None
        if checkpoint.is_averaged:
            self.notes[
                "measured averaged weights, which WeightAveraging saves as state_dict; weights='swapped' in the rows"
            ] = None
        if checkpoint.others:
            others = ", ".join(map(repr, checkpoint.others))
            self.notes[f"not measured: the weights that the checkpoints have under {others}"] = None


def _equal(tensor: Any, other: Any) -> bool:
    return isinstance(tensor, Tensor) and isinstance(other, Tensor) and torch.equal(tensor, other)


@contextmanager
def _warnings_once(said: set[str]) -> Iterator[None]:
    """Pass on the warnings whose text is not among those said before."""
    caught: list[warnings.WarningMessage] = []
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            yield
    finally:
        for warning in caught:
            if str(warning.message) not in said:
                said.add(str(warning.message))
                warnings.warn_explicit(warning.message, warning.category, warning.filename, warning.lineno)


def parse_arguments(option: str, pairs: Iterable[str]) -> dict[str, Any]:
    """Arguments from ``NAME=VALUE``; a value that is no Python literal is a text.

    Example:
        >>> parse_arguments("--model-args", ["width=16", "loss=mse", "sizes=(1, 2)"])
        {'width': 16, 'loss': 'mse', 'sizes': (1, 2)}
    """
    found = {}
    for pair in pairs:
        name, mark, text = pair.partition("=")
        if not name.isidentifier() or not mark:
            raise ValueError(f"{option} must be NAME=VALUE, got {pair!r}")
        try:
            found[name] = ast.literal_eval(text)
        except (ValueError, SyntaxError):
            found[name] = text
    return found


def _print_table(history: History, metrics: Sequence[str]) -> None:
    """Epoch and step, and up to six metrics of the classifier's input, one row per checkpoint."""
    shown = [name for name in check_metrics("paper") if name in metrics] or metrics[:6]
    names = [key for key in (make_key(name, stage="train") for name in shown) if any(key in row for row in history)]
    if not names:
        return
    widths = [max(len(name), 9) for name in names]
    print("  ".join([" epoch", "   step", *(f"{name:>{width}}" for name, width in zip(names, widths, strict=True))]))
    for row in history:
        cells = [f"{row.get(name, math.nan):{width}.3e}" for name, width in zip(names, widths, strict=True)]
        print("  ".join([f"{row['epoch']:>6g}", f"{row.get('step', ''):>7}", *cells]))


def _print_failed(failed: Mapping[Path, Exception], total: int) -> None:
    """One line for each reason, with the checkpoints that have it."""
    reasons: dict[str, list[str]] = {}
    for path, error in failed.items():
        plain = isinstance(error, ValueError | OSError | RuntimeError) or type(error) is LookupError
        text = str(error) if plain else f"{type(error).__name__}: {error}"
        reasons.setdefault(" ".join(text.split())[:600], []).append(str(path))
    for reason, paths in reasons.items():
        print(f"lightning-nc: {', '.join(paths)}: {reason}", file=sys.stderr)
    if failed:
        print(f"lightning-nc: {len(failed)} of {total} checkpoints not measured", file=sys.stderr)
