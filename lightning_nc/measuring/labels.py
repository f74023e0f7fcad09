"""The labels of a batch as class indices: one per sample, or one per position of a sequence or an image."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lightning_nc.measuring.batches import listed, targets_of
from lightning_nc.moments import check_dense

__all__ = ["NEXT_TOKEN", "Labels", "check_shift", "check_type", "find_labels", "next_token"]

NEXT_TOKEN = "next_token"

_INVALID = torch.iinfo(torch.int32).min
"""Takes the place of a label that is no class, so that it is counted on the device and raises in ``compute()``."""


@dataclass(frozen=True)
class Labels:
    """How the labels of a run become class indices.

    Args:
        num_classes: K.
        ignore_index: the label of samples and positions that are left out.
        class_axis: the axis of one-hot rows, or of a single column; None for labels that are class indices already.
        classifier: name of the classifier, for messages.
    """

    num_classes: int
    ignore_index: int
    class_axis: int | None
    classifier: str

    def indices(self, raw: Tensor) -> Tensor:
        """Class indices, (B,) or (B, *positions), int64. A label that is no class becomes one out of range."""
        if self.class_axis is not None and raw.shape[self.class_axis] > 1:
            rows = raw.movedim(self.class_axis, -1)
            rows = rows.byte() if rows.dtype == torch.bool else rows
            hot = ((rows == 1).sum(dim=-1) == 1) & ((rows != 0).sum(dim=-1) == 1)
            return torch.where(hot, (rows == 1).byte().argmax(dim=-1), _INVALID)
        if self.class_axis is not None:
            raw = raw.squeeze(self.class_axis)
        target = raw.long()
        return torch.where(raw == target, target, _INVALID) if raw.is_floating_point() else target

    def check(self, raw: Tensor, target: Tensor) -> None:
        """Raise ValueError for labels that are no class, by their cause. Reads the values, so it waits for the device."""
        kept = target[target != self.ignore_index]
        outside = kept[(kept < 0) | (kept >= self.num_classes)]
        if len(outside):
            invalid = (target == _INVALID).nonzero()
            raise ValueError(
                self._soft(raw, invalid[0].tolist()) if len(invalid) else self._out_of_range(kept, outside)
            )

    def _soft(self, raw: Tensor, at: list[int]) -> str:
        if self.class_axis is None or raw.shape[self.class_axis] == 1:
            value = (raw if self.class_axis is None else raw.squeeze(self.class_axis))[tuple(at)].item()
            return (
                f"labels must be whole numbers, got {value:g}: soft labels, or a regression, which has no classes; for soft "
                "labels pass target_fn, a function from a batch to class indices, such as lambda batch: batch[1].round()"
            )
        row = [round(value, 3) for value in raw.movedim(self.class_axis, -1)[tuple(at)].tolist()]
        shown = f"{row[:8]}".replace("]", ", ...]" if len(row) > 8 else "]")
        if all(value in (0, 1) for value in row):
            return (
                f"labels must name one class per sample, got the row {shown} with {int(sum(row))} classes; neural collapse is "
                "about samples of one class each: pass target_fn, a function from a batch to class indices; it gives "
                f"{self.ignore_index} (ignore_index) for samples to leave out"
            )
        return (
            f"labels must name one class per sample, got the soft row {shown} (from mixup, CutMix, label smoothing or "
            "distillation); measure on data without mixing: with dataloader=, or by mixing in the training step instead of the "
            "dataloader. If the largest entry is the class, pass target_fn, such as lambda batch: batch[1].argmax(dim=1)"
        )

    def _out_of_range(self, kept: Tensor, outside: Tensor) -> str:
        low, high, classes = int(kept.min()), int(kept.max()), self.num_classes
        values = outside.unique().tolist()
        if (low, high) == (1, classes):
            remedy = "they start at 1: pass target_fn, such as lambda batch: batch[1] - 1"
        elif classes == 2 and kept.unique().tolist() == [-1, 1]:
            remedy = "for -1 and 1 pass target_fn, such as lambda batch: (batch[1] > 0).long()"
        elif len(values) == 1:
            remedy = f"if {values[0]} marks what has no class, pass ignore_index={values[0]}"
        else:
            remedy = "if another layer is the classifier, name it with classifier="
        whose = f", the outputs of {self.classifier!r}" if self.classifier else ""
        return (
            f"labels must lie in [0, {classes}){whose}, got {len(outside)} outside, for example {int(outside[0])} (the labels "
            f"of the batch go from {low} to {high}); {remedy}, else check num_classes"
        )


def find_labels(
    raw: Tensor,
    fits: Callable[[tuple[int, ...]], bool],
    num_classes: int,
    outputs: int | None,
    ignore_index: int,
    classifier: str = "",
) -> Labels:
    """How the labels of a batch become class indices.

    Labels (B,) are per sample and labels (B, *positions) per position, where the classifier is called on these positions. An
    axis more, at the end or next to that of the samples, holds one-hot rows, or a single column.

    Args:
        raw: the labels of the first batch.
        fits: whether the classifier receives features at positions of this shape, ``()`` for one vector per sample.
        num_classes: K.
        outputs: number of outputs of the classifier, if it is known.
        ignore_index: the label of what is left out.
        classifier: its name.

    Raises:
        ValueError: for labels that fit no layout, or two.
    """

    def found(axis: int | None) -> Labels:
        return Labels(num_classes, ignore_index, axis, classifier)

    tail = tuple(raw.shape[1:])
    floating = raw.is_floating_point()
    axes = list(_class_axes(tail, fits, {1, num_classes, outputs}))
    hot = [axis for axis in axes if raw.shape[axis] > 1]
    if floating and outputs != 1:
        if hot:
            return found(hot[0])
        raise ValueError(
            f"labels are floats of shape {tuple(raw.shape)}, which are no class indices"
            + (f" and no rows of {num_classes} classes" if tail else "")
            + "; if they are whole numbers, pass target_fn, such as lambda batch: batch[1].long()"
        )
    if fits(tail):
        if hot and tail and bool((found(hot[0]).indices(raw) != _INVALID).all()):
            raise ValueError(
                f"labels of shape {tuple(raw.shape)} may be one-hot rows or a class index per position; pass target_fn, a "
                "function from a batch to class indices"
            )
        return found(None)
    if axes:
        return found((hot or axes)[0])
    raise ValueError(_misfit(tuple(raw.shape), num_classes, fits(())))


def _class_axes(
    tail: tuple[int, ...], fits: Callable[[tuple[int, ...]], bool], sizes: set[int | None]
) -> Iterator[int]:
    for axis in dict.fromkeys((len(tail), 1)) if tail else ():
        if tail[axis - 1] in sizes and fits(tail[: axis - 1] + tail[axis:]):
            yield axis


def _misfit(shape: tuple[int, ...], num_classes: int, per_sample: bool) -> str:
    if per_sample and len(shape) > 1:
        return (
            f"labels of shape {shape} are per position, but the classifier receives one feature vector per sample; (B,) class "
            f"indices or (B, {num_classes}) one-hot rows are expected. Pass target_fn, a function from a batch to them, or name "
            "a classifier that is called on every position with classifier="
        )
    return (
        f"labels of shape {shape} have no feature vector each: the classifier is called on other positions; pass target_fn, a "
        "function from a batch to labels with the positions of the features, or forward_fn"
    )


def check_type(raw: Any) -> None:
    """Raise ValueError unless labels are a dense tensor of real numbers with an axis of samples. Reads no value."""
    if not isinstance(raw, Tensor):
        raise ValueError(f"labels must be a tensor, such as class indices of shape (B,), got {type(raw).__name__}")
    check_dense("labels", raw)
    if not raw.dim() or raw.is_complex() or raw.is_quantized:
        kind = str(raw.dtype).removeprefix("torch.")
        raise ValueError(
            f"labels must hold class indices, such as integers of shape (B,), got {kind} {tuple(raw.shape)}"
        )


def next_token(batch: Any, ignore_index: int) -> Tensor:
    """The label of each position: the next entry of ``labels``, else of ``input_ids``, (B, T).

    The last position and those at padding, where ``attention_mask`` is zero, hold ``ignore_index``.

    Raises:
        LookupError: if the batch has neither.
    """
    labels, mask = _tokens(batch), None
    if isinstance(batch, Mapping):
        labels, mask = batch.get("labels", labels), batch.get("attention_mask")
    if not isinstance(labels, Tensor) or labels.dim() != 2 or labels.is_floating_point():
        raise LookupError(
            f"target_fn={NEXT_TOKEN!r} needs a batch with labels or input_ids, integers of shape (B, T); a batch "
            + (f"has the keys {listed(batch)}" if isinstance(batch, Mapping) else f"is a {type(batch).__name__}")
            + ". Pass target_fn, a function from a batch to the labels of each position"
        )
    target = torch.full_like(labels, ignore_index, dtype=torch.long)
    target[:, :-1] = labels[:, 1:]
    if isinstance(mask, Tensor) and mask.shape == labels.shape:
        real = mask.bool()
        target[:, :-1].masked_fill_(~(real[:, 1:] & real[:, :-1]), ignore_index)
    return target


def check_shift(batch: Any, target_fn: Any, ignore_index: int) -> None:
    """Raise ValueError if token labels are paired with the wrong position. Reads the values.

    A causal language model shifts ``labels`` by itself, so they equal ``input_ids``.
    """
    tokens = _tokens(batch)
    try:
        labels = targets_of(batch)
    except LookupError:
        return
    if not isinstance(tokens, Tensor) or not isinstance(labels, Tensor) or labels.shape != tokens.shape:
        return
    if tokens.dim() != 2 or tokens.is_floating_point() or labels.is_floating_point():
        return
    kept = labels != ignore_index
    same = bool((labels == tokens)[kept].all())
    if target_fn is None and same and kept.any():
        raise ValueError(
            "the labels of a batch equal its input tokens: a causal language model shifts them by itself, so the features of a "
            f"position would be paired with the token that it has just read; pass target_fn={NEXT_TOKEN!r}. If the model "
            "predicts its own input, pass target_fn, a function from a batch to the labels"
        )
    if target_fn == NEXT_TOKEN and not same:
        raise ValueError(
            f"target_fn={NEXT_TOKEN!r} takes labels that equal the input tokens where they are not ignored, got others: if they "
            "are shifted already, leave target_fn out"
        )


def _tokens(batch: Any) -> Any:
    if isinstance(batch, Mapping):
        return batch.get("input_ids")
    return batch[0] if isinstance(batch, Sequence) and len(batch) else batch
