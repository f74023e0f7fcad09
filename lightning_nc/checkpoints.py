"""Checkpoints of a training: found, put in order, and read without executing anything in them."""

from __future__ import annotations

import argparse
import json
import pathlib
import re
import zipfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lightning_nc.extras import needed
from lightning_nc.keys import natural_order
from lightning_nc.runs import finite_number
from lightning_nc.versions import safe_globals

__all__ = ["Checkpoint", "Place", "check_sums", "find_checkpoints", "in_training_order", "read_checkpoint"]

Weights = dict[str, Tensor]

SUFFIXES = (".ckpt", ".pt", ".pth", ".tar", ".bin", ".safetensors")
"""How the files end that stand for checkpoints in a folder."""

_ENTRIES = ("state_dict", "model_state_dict", "model")
_PRETRAINED = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")
# Beyond what weights_only allows: what command lines leave in checkpoints. Making one runs nothing else.
_HARMLESS = [
    (argparse.Namespace, "argparse.Namespace"),
    (pathlib.PosixPath, "pathlib.PosixPath"),
    (pathlib.PosixPath, "pathlib._local.PosixPath"),
]


@dataclass
class Checkpoint:
    """What a checkpoint holds beside its weights, and a function that reads these.

    Attributes:
        path: the file or folder.
        load: returns the weights by name, on the CPU.
        contents: all entries of the file; empty for a file of weights alone.
        epoch: of the callback's rows: 0 for the first. None if unknown.
        step: the number of optimizer steps. None if unknown.
        others: names of entries that are weights too, those of an average for example.
    """

    path: Path
    load: Callable[[], Weights]
    contents: Mapping[str, Any] = field(default_factory=dict)
    epoch: float | None = None
    step: float | None = None
    others: Sequence[str] = ()

    @property
    def is_lightning(self) -> bool:
        """Whether a Lightning Trainer saved it."""
        return "pytorch-lightning_version" in self.contents

    @property
    def is_averaged(self) -> bool:
        """Whether Lightning's ``WeightAveraging`` has put the averaged weights into the place of those of the training."""
        return "current_model_state" in self.contents


class Place(NamedTuple):
    """Where a checkpoint stands in the training. ``inside``: whether the epoch is from inside the checkpoint."""

    path: Path
    epoch: float
    step: float | None
    inside: bool


def find_checkpoints(paths: Iterable[Path]) -> list[Path]:
    """The checkpoints at paths, each once: files, and folders of transformers; or what a folder holds of them.

    Raises:
        FileNotFoundError: if a path does not exist or holds none.
    """
    found: dict[Path, Path] = {}
    for path in paths:
        if not path.exists():
            raise FileNotFoundError(f"{path} does not exist; pass checkpoints or folders of checkpoints")
        for checkpoint in _inside(path) if path.is_dir() else [path]:
            found.setdefault(checkpoint.resolve(), checkpoint)
    return list(found.values())


def _inside(folder: Path) -> list[Path]:
    """The checkpoints in a folder, or the folder itself."""
    children = sorted(folder.iterdir(), key=lambda path: natural_order(path.name))
    folders = [child for child in children if child.is_dir() and (_is_pretrained(child) or _is_sharded(child))]
    if not folders and (_is_pretrained(folder) or _is_sharded(folder)):
        return [folder]
    files = [child for child in children if child.is_file() and child.suffix.lower() in SUFFIXES]
    if any(map(_is_pretrained, (folder, *folders))):  # beside its checkpoints, a Trainer leaves files of other kinds
        files = []
    if not folders and not files:
        below = sorted({file.parent for file in folder.rglob("*") if file.suffix.lower() in SUFFIXES})
        hint = f"; pass {' or '.join(map(str, below[:3]))}" if below else ""
        raise FileNotFoundError(
            f"no checkpoint in {folder}: needs files that end in {', '.join(SUFFIXES)}, or folders with {_PRETRAINED[0]}{hint}"
        )
    return files + folders


def _is_pretrained(folder: Path) -> bool:
    """Whether transformers or its Trainer has saved a model to a folder."""
    return any((folder / name).is_file() for name in _PRETRAINED)


def _is_sharded(folder: Path) -> bool:
    return (folder / ".metadata").is_file() or folder.suffix == ".ckpt"


def read_checkpoint(path: Path, unsafe: bool = False) -> Checkpoint:
    """Read what a checkpoint holds beside its weights. Weights are mapped into memory where the format permits it.

    Args:
        path: a file of ``torch.save`` or safetensors, or a folder of transformers.
        unsafe: unpickle whatever the file asks for, which may run any code.

    Raises:
        ValueError: if it is damaged, needs ``unsafe``, or holds no weights.
        OSError: if it cannot be read.
    """
    if path.is_dir():
        return _folder(path, unsafe)
    return _safetensors(path) if path.suffix.lower() == ".safetensors" else _torch_file(path, unsafe)


def _torch_file(path: Path, unsafe: bool) -> Checkpoint:
    """A file of ``torch.save``: a state dict, or a dict with one."""
    contents = _unpickled(path, unsafe)
    if isinstance(contents, nn.Module):
        contents = contents.state_dict()
    if not isinstance(contents, Mapping):
        raise ValueError(f"holds a {type(contents).__name__}; needs a state dict, or a dict with one")
    entries = [name for name, value in contents.items() if _is_state(value)]
    named = [name for name in _ENTRIES if name in entries]
    if len(named) > 1:
        raise ValueError(f"holds weights under {' and '.join(map(repr, named))}; save one of them in a file of its own")
    if not named and not _is_state(contents):
        raise ValueError(
            f"holds no weights: needs a state dict, or one under {', '.join(map(repr, _ENTRIES))}; got the entries "
            f"{list(contents)!r:.300}"
        )

    def load() -> Weights:
        check_sums(path)
        return dict(contents[named[0]] if named else contents)

    if not named:
        return Checkpoint(path, load)
    return _with_place(Checkpoint(path, load, contents, others=[name for name in entries if name not in named]))


def _is_state(value: Any) -> bool:
    """Whether a value is a state dict: tensors by name, and extra states of modules."""
    if not isinstance(value, Mapping) or not all(isinstance(name, str) for name in value):
        return False
    plain = [entry for name, entry in value.items() if not name.endswith("_extra_state")]
    return all(isinstance(entry, Tensor) for entry in plain) and any(entry.dim() for entry in plain)


def _unpickled(path: Path, unsafe: bool) -> Any:
    """The contents of a file of ``torch.save``."""
    zipped = zipfile.is_zipfile(path)
    check_sums(path, "data.pkl")  # that of the weights when they are read
    try:
        with safe_globals(_HARMLESS):
            return torch.load(path, map_location="cpu", weights_only=not unsafe, mmap=zipped)
    except Exception as error:
        if isinstance(error, OSError) and error.filename is not None:  # not for a jump beyond the end of a cut file
            raise
        check_sums(path)
        needs = re.search(r"GLOBAL (\S+)", str(error))
        if needs is None or unsafe:
            raise ValueError(f"cannot be read, it may be damaged ({type(error).__name__}: {error!s:.200})") from error
        raise ValueError(
            f"needs {needs[1]} to be unpickled, which may run any code, and is refused; pass --unsafe if you trust its source"
        ) from error


def check_sums(path: Path, ending: str = "") -> None:
    """Raise ValueError if the bytes of a file of ``torch.save`` do not fit its checksums, which ``torch.load`` ignores.

    With ``ending``, only those of its parts whose names end so: ``"data.pkl"`` holds everything but the tensors.
    """
    if not (path.is_file() and zipfile.is_zipfile(path)):
        return
    try:
        with zipfile.ZipFile(path) as file:
            damaged = next((name for name in file.namelist() if name.endswith(ending) and not _fits(file, name)), None)
    except Exception as error:
        if isinstance(error, OSError) and error.filename is not None:
            raise
        raise ValueError(f"is damaged: {error}") from error
    if damaged is not None:
        raise ValueError(f"is damaged: {damaged} does not fit its checksum")


def _fits(file: zipfile.ZipFile, name: str) -> bool:
    """Whether a part of a zip file fits its checksum, which is checked when all of it is read."""
    try:
        with file.open(name) as part:
            while part.read(2**20):
                pass
    except zipfile.BadZipFile:
        return False
    return True


def _safetensors(path: Path) -> Checkpoint:
    """A safetensors file. Its metadata may have an epoch and a step."""
    with needed(str(path), "safetensors"):
        from safetensors import SafetensorError, safe_open
        from safetensors.torch import load_file

    try:
        with safe_open(path, framework="pt") as file:
            return _with_place(Checkpoint(path, partial(load_file, path), file.metadata() or {}))
    except SafetensorError as error:
        raise ValueError(f"is damaged, or no safetensors file: {error}") from error


def _folder(path: Path, unsafe: bool) -> Checkpoint:
    """What a folder of transformers holds: the state of its Trainer, and files of weights."""
    name = next((name for name in _PRETRAINED if (path / name).is_file()), None)
    if name is None:
        raise ValueError(
            "is a sharded checkpoint; join its parts with python -m lightning.pytorch.utilities.consolidate_checkpoint "
            f"{path}, and measure the result"
        )
    state = path / "trainer_state.json"
    contents = json.loads(state.read_text(encoding="utf-8")) if state.is_file() else {}
    parts = [name]
    if name.endswith(".json"):
        parts = sorted(set(json.loads((path / name).read_text(encoding="utf-8"))["weight_map"].values()))

    def load() -> Weights:
        weights: Weights = {}
        for part in parts:
            weights |= read_checkpoint(path / part, unsafe).load()
        return weights

    return _with_place(Checkpoint(path, load, contents))


def _with_place(checkpoint: Checkpoint) -> Checkpoint:
    """The checkpoint with the epoch and step among its contents."""
    contents = checkpoint.contents
    epoch = _first_number(contents, "epoch")
    with suppress(
        LookupError, TypeError, ValueError
    ):  # after fit Lightning's "epoch" is one more, but none has begun since
        epoch = max(contents["loops"]["fit_loop"]["epoch_progress"]["current"]["ready"] - 1, 0)
    return replace(checkpoint, epoch=epoch, step=_first_number(contents, "global_step", "step", "iteration"))


def _first_number(contents: Mapping[str, Any], *names: str) -> float | None:
    for name in names:
        with suppress(KeyError, ValueError):
            return finite_number(name, contents[name])
    return None


def in_training_order(paths: Iterable[Path], unsafe: bool = False) -> tuple[list[Place], str, dict[Path, Exception]]:
    """Checkpoints in the order of the training; where their epochs are from; and those that cannot be read, with the reason.

    The order is that of the epochs and steps inside; else that of the numbers in the names; else natural order of the names.
    The weights are not read.
    """
    every = sorted(paths, key=lambda path: natural_order(str(path)))
    failed, epochs, steps = dict[Path, Exception](), dict[Path, float | None](), dict[Path, float | None]()
    for path in every:
        try:
            checkpoint = read_checkpoint(path, unsafe)
            epochs[path], steps[path] = checkpoint.epoch, checkpoint.step
        except Exception as error:
            failed[path] = error
    inside = None not in epochs.values()
    source = "from inside the checkpoints"
    if not inside:
        epochs = {path: _number_in(path) for path in epochs}
        source = "from the numbers in the names"
    if None in epochs.values() or (not inside and len(set(epochs.values())) < len(epochs)):
        epochs = {path: every.index(path) for path in epochs}
        source = "counted in the order of the names, since neither all checkpoints nor all names have one"
    places = [Place(path, epoch, steps[path], inside) for path, epoch in epochs.items() if epoch is not None]
    return sorted(places, key=lambda place: (place.epoch, place.step or 0)), source, failed


def _number_in(path: Path) -> int | None:
    """The number after "epoch" in a name, or else the last one that is whole.

    Example:
        >>> [_number_in(Path(name)) for name in ("epoch=3-step=40.ckpt", "checkpoint-500", "last.ckpt", "loss0.5.pt")]
        [3, 500, None, None]
    """
    name = re.sub("|".join(map(re.escape, SUFFIXES)), "", path.name)
    if found := re.search(r"epoch\D?(\d+)", name, re.IGNORECASE):
        return int(found[1])
    numbers = re.findall(r"\d+(?:\.\d+)?", name)
    return int(numbers[-1]) if numbers and numbers[-1].isdecimal() else None
