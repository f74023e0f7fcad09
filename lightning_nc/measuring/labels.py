"""The labels of a batch as class indices: one per sample, or one per position of a sequence or an image."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lightning_nc.measuring.batches import LABEL_KEYS, listed, targets_of
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
        shape: that of the labels of the first batch.
    """

    num_classes: int
    ignore_index: int
    class_axis: int | None
    classifier: str
    shape: tuple[int, ...]

    def indices(self, raw: Tensor) -> Tensor:
        """Class indices, (B,) or (B, *positions), int64. A label that is no class becomes one out of range.

        Raises:
            ValueError: for labels of another number of dimensions than those of the first batch.
        """
        if raw.dim() != len(self.shape):
            raise ValueError(
                f"labels of shape {tuple(raw.shape)} are of another kind than those of the first batch, {self.shape}: one-hot or "
                "soft rows in one dataloader and class indices in another, for example; pass target_fn, a function from a batch "
                "to class indices that takes both"
            )
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
                if math.isfinite(value)
                else f"labels must be whole numbers, got {value:g}; for labels that are missing pass target_fn, such as lambda "
                f"batch: batch[1].nan_to_num({self.ignore_index}), since {self.ignore_index} (ignore_index) is left out"
            )
        row = [round(value, 3) for value in raw.movedim(self.class_axis, -1)[tuple(at)].tolist()]
        shown = f"{row[:8]}".replace("]", ", ...]" if len(row) > 8 else "]")
        if all(value in (0, 1) or not 0 <= value <= 1 for value in row):
            classes = f" with {int(sum(row))} classes" if set(row) <= {0, 1} else ""
            return (
                f"labels must name one class per sample, got the row {shown}{classes}; neural collapse is about samples of one "
                "class each: pass target_fn, a function from a batch to class indices; it gives "
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
    received: str = "",
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
        classifier: its name, for messages.
        received: the shapes of its inputs, for a message.

    Raises:
        ValueError: for labels that fit no layout, or two.
    """

    def found(axis: int | None) -> Labels:
        return Labels(num_classes, ignore_index, axis, classifier, tuple(raw.shape))

    tail = tuple(raw.shape[1:])
    axes = list(_class_axes(tail, fits, {1, num_classes, outputs}))
    columns, hot = ([axis for axis in axes if (raw.shape[axis] == 1) == single] for single in (True, False))
    clear = [axis for axis in hot if bool((found(axis).indices(raw) != _INVALID).all())]
    floats = raw.is_floating_point() and outputs != 1
    indices = not floats and fits(tail)
    if clear and len(clear) + indices > 1:
        other = "or a class index per position" if indices else "along more than one axis"
        raise ValueError(
            f"labels of shape {tuple(raw.shape)} may be one-hot rows {other}; pass target_fn, a function from a batch to class "
            "indices"
        )
    if clear or (hot and floats):
        return found((clear or hot)[0])
    if not floats and (columns or indices or hot):
        return found(columns[0] if columns else None if indices else hot[0])
    raise ValueError(
        _misfit(tuple(raw.shape), floats, num_classes, f"the classifier {classifier!r} receives, {received}")
    )


def _misfit(shape: tuple[int, ...], floats: bool, num_classes: int, inputs: str) -> str:
    if floats:
        return (
            f"labels are floats of shape {shape}, which are no class indices and no rows of {num_classes} classes; if they are "
            "whole numbers, pass target_fn, such as lambda batch: batch[1].long()"
        )
    return (
        f"labels of shape {shape} do not fit what {inputs}; labels are class indices (B,), one-hot rows (B, {num_classes}), or "
        "one label for each position at which the classifier is called. Pass target_fn, a function from a batch to such labels; "
        "or forward_fn, such as lambda model, batch: model(*batch), if training calls the classifier at more positions; or name "
        "another layer with classifier="
    )


def _class_axes(
    tail: tuple[int, ...], fits: Callable[[tuple[int, ...]], bool], sizes: set[int | None]
) -> Iterator[int]:
    for axis in dict.fromkeys((len(tail), 1)) if tail else ():
        if tail[axis - 1] in sizes and fits(tail[: axis - 1] + tail[axis:]):
            yield axis


def check_type(raw: Any) -> None:
    """Raise ValueError unless labels are a dense tensor of real numbers with an axis of samples. Reads no value."""
    if not isinstance(raw, Tensor):
        raise ValueError(
            f"labels must be a tensor, such as class indices of shape (B,), got {type(raw).__name__}; pass target_fn, a function "
            "from a batch to such a tensor"
        )
    check_dense("labels", raw)
    if not raw.dim() or raw.is_complex() or raw.is_quantized:
        kind = str(raw.dtype).removeprefix("torch.")
        raise ValueError(
            f"labels must hold class indices, such as integers of shape (B,), got {kind} {tuple(raw.shape)}"
        )


def next_token(batch: Any, ignore_index: int) -> Tensor:
    """The label of each position: the next entry of ``labels``, else of ``input_ids``, (B, T).

    The last position and those at padding, where ``attention_mask`` is zero, hold ``ignore_index``. Without ``labels``, so does
    the last position of a packed sequence, after which ``position_ids`` do not grow.

    Raises:
        LookupError: if the batch has neither, or labels of another shape than its tokens.
    """
    given = batch if isinstance(batch, Mapping) else {}
    labels, mask, order = given.get("labels"), given.get("attention_mask"), given.get("position_ids")
    if isinstance(labels, Tensor):
        order = None
        inputs = [given["input_ids"]] if "input_ids" in given else [v for k, v in given.items() if k not in LABEL_KEYS]
        if not any(isinstance(value, Tensor) and value.shape[:2] == labels.shape for value in inputs):
            raise LookupError(
                f"target_fn={NEXT_TOKEN!r} needs labels of the same shape as the input tokens, got {tuple(labels.shape)} and "
                f"{listed(tuple(value.shape) for value in inputs if isinstance(value, Tensor))}. An encoder with a decoder (T5, "
                "Whisper) shifts its inputs instead: leave target_fn out. Else pass a function from a batch to the labels"
            )
    labels = _tokens(batch) if labels is None else labels
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
    if isinstance(order, Tensor) and order.shape == labels.shape:
        target[:, :-1].masked_fill_(order[:, 1:] <= order[:, :-1], ignore_index)
    return target


def check_shift(batch: Any, target_fn: Any, ignore_index: int, model: nn.Module) -> bool:
    """Raise ValueError if token labels are paired with the wrong position, or are a mask; False if they are all ignored.

    A causal language model shifts ``labels`` by itself, so they equal its tokens. An encoder with a decoder shifts its inputs.
    Reads the values.
    """
    if any(_shifts_inputs(module) for module in model.modules()):
        if target_fn == NEXT_TOKEN:
            raise ValueError(
                f"target_fn={NEXT_TOKEN!r} is for a causal language model, got an encoder with a decoder, which shifts its "
                "inputs instead: leave target_fn out"
            )
        return True
    tokens = _tokens(batch)
    if tokens is None and isinstance(batch, Mapping):
        tokens = next((value for key, value in batch.items() if key not in LABEL_KEYS and _is_tokens(value)), None)
    try:
        labels = targets_of(batch)
    except LookupError:
        return True
    if not _is_tokens(tokens) or not _is_tokens(labels) or labels.shape != tokens.shape or callable(target_fn):
        return True
    if not isinstance(batch, Mapping) and _is_mask(labels):
        raise ValueError(
            "the second item of a batch is 0 and 1, with the 0 of a row on one side, so it seems to be the attention mask of the "
            "tokens and not their labels; give batches as mappings with the keys input_ids, attention_mask and labels, or pass "
            "target_fn, such as lambda batch: batch[2]"
        )
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
    return bool(kept.any())


def _shifts_inputs(module: nn.Module) -> bool:
    """Whether a module is an encoder with a decoder of transformers, which makes the decoder's inputs of the labels."""
    return getattr(getattr(module, "config", None), "is_encoder_decoder", False) is True


def _is_tokens(value: Any) -> bool:
    return isinstance(value, Tensor) and value.dim() == 2 and not value.is_floating_point()


def _is_mask(labels: Tensor) -> bool:
    """Whether labels (B, T) look like the mask of padding on one side: 0 and 1, in one order along each row."""
    steps = labels.long().diff(dim=1)
    sided = (steps <= 0).all(dim=1) | (steps >= 0).all(dim=1)
    return labels.shape[1] > 1 and bool(((labels == 0) | (labels == 1)).all() and labels.any() and sided.all())


def _tokens(batch: Any) -> Any:
    if isinstance(batch, Mapping):
        return batch.get("input_ids")
    return batch[0] if isinstance(batch, Sequence) and len(batch) else batch
