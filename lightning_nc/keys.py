"""The grammar of keys: ``nc/val_1/layer3/nc1`` is stage, dataloader, layer and metric."""

from __future__ import annotations

import re
from typing import NamedTuple

__all__ = [
    "DEPTH",
    "ERROR",
    "INPUT_NAME",
    "STAGES",
    "TRAIN_MEANS",
    "Key",
    "base_name",
    "is_reserved",
    "make_key",
    "natural_order",
    "parse_key",
]

STAGES = {"train": "nc", "validate": "nc/val", "test": "nc/test"}
"""How the keys of each stage begin."""

ERROR = "_stderr"
"""How the key of the standard error of a metric ends, after the key of the metric."""

TRAIN_MEANS = "_train_means"
"""How the key of a metric of held-out samples ends that is taken around the class means of the training data."""

CHANCE = {"permuted": "_permuted", "random": "_random"}
"""How the keys of values end that chance alone gives: with permuted labels, and of random directions."""

INPUT_NAME = "classifier input"
"""What the classifier's input is called where layers are named; in keys its name is empty."""

DEPTH = "effective_depth"
"""The one value that is about all layers together."""

_STAGE_PART = re.compile(r"(val|test)(?:_(\d+))?")


class Key(NamedTuple):
    """The parts of a key. ``layer`` is empty for the classifier's input, ``loader`` counts the dataloaders of a stage."""

    stage: str
    loader: int
    layer: str
    metric: str


def make_key(metric: str, layer: str = "", stage: str | None = None, loader: int = 0) -> str:
    """The key of a value: as :func:`lightning_nc.measure` returns it, or as the callback logs it if ``stage`` is given.

    Example:
        >>> make_key("nc1", layer="layer3"), make_key("nc1", layer="layer3", stage="validate", loader=1)
        ('layer3/nc1', 'nc/val_1/layer3/nc1')
    """
    head = [] if stage is None else [STAGES[stage] + (f"_{loader}" if loader else "")]
    return "/".join([*head, *([layer] if layer else []), metric])


def parse_key(key: str) -> Key:
    """The parts of a key, with or without the prefix ``nc/``; a key without a stage is of the training data.

    Example:
        >>> parse_key("nc/val_1/layer3/nc1")
        Key(stage='validate', loader=1, layer='layer3', metric='nc1')
        >>> parse_key("layer3/nc1")
        Key(stage='train', loader=0, layer='layer3', metric='nc1')
    """
    *parts, metric = key.removeprefix("nc/").split("/")
    found = _STAGE_PART.fullmatch(parts[0]) if parts else None
    if found is None:
        return Key("train", 0, "/".join(parts), metric)
    stage = "validate" if found[1] == "val" else "test"
    return Key(stage, int(found[2] or 0), "/".join(parts[1:]), metric)


def base_name(metric: str) -> str:
    """The name in the table of metrics: without the endings :data:`ERROR`, :data:`TRAIN_MEANS` and :data:`CHANCE`."""
    for ending in (ERROR, *CHANCE.values(), TRAIN_MEANS):
        metric = metric.removesuffix(ending)
    return metric


def is_reserved(layer: str) -> bool:
    """Whether a layer's keys would read as those of a stage: a layer named ``nc``, ``val``, ``test`` or ``val_1``."""
    first = layer.split("/")[0]
    return first == "nc" or _STAGE_PART.fullmatch(first) is not None


def natural_order(name: str) -> list[int | str]:
    """A sort key that puts ``layer2`` before ``layer10``."""
    return [int(part) if part.isdecimal() else part for part in re.split(r"(\d+)", name)]
