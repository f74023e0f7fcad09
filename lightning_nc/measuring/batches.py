"""What a batch holds: inputs and labels; and how features become one row per label."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from typing import Any

import torch
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor, nn

__all__ = [
    "LABEL_KEYS",
    "POOLS",
    "Pool",
    "copy_batch",
    "feature_axes",
    "listed",
    "pool_features",
    "rows_at_positions",
    "run_forward",
    "some_rows",
    "targets_of",
]

LABEL_KEYS = ("label", "labels", "target", "targets", "y")
POOLS = ("mean", "mean_channels_first", "mean_channels_last", "flatten", "first", "last")

Pool = str | Callable[[Tensor], Tensor]


def targets_of(batch: Any) -> Any:
    """The labels of a batch: the second item of a sequence, or the first of the usual keys of a mapping.

    Raises:
        LookupError: if there are none.
    """
    if isinstance(batch, Mapping):
        for key in LABEL_KEYS:
            if key in batch:
                return batch[key]
        raise LookupError(
            f"a batch has the keys {listed(batch)}, none of {listed(LABEL_KEYS)}; pass target_fn, a function from a batch to "
            "its class indices" + (", or 'next_token' for a causal language model" if "input_ids" in batch else "")
        )
    if isinstance(batch, Sequence) and len(batch) > 1:
        return batch[1]
    raise LookupError(
        f"a batch of type {type(batch).__name__} has no labels as its second item; pass target_fn, a function from a batch "
        "to its class indices"
    )


def copy_batch(batch: Any) -> Any:
    """A batch that a model may change or empty; the batch itself if it cannot be copied."""
    try:
        return deepcopy(batch)
    except Exception:
        return batch


def some_rows(batch: Any, size: int, order: Sequence[int]) -> Any:
    """A copy of a batch of ``size`` samples with the samples ``order``, in that order."""

    def shorten(tensor: Tensor) -> Tensor:
        return tensor[list(order)] if tensor.dim() and len(tensor) == size else tensor.clone()

    return apply_to_collection(batch, Tensor, shorten)


def pool_features(features: Tensor, pool: Pool = "mean", axis: int | None = None, mask: Tensor | None = None) -> Tensor:
    """(B, ...) to (B, d), in memory of its own.

    Args:
        features: the output of a layer.
        pool: ``"mean"`` over all axes but the first and ``axis``, ``"flatten"``, ``"first"`` or ``"last"`` position that is not
            padding, or a function that is called on features of more than two dimensions.
        axis: the axis of the features; not needed for ``"flatten"`` and a function.
        mask: (B, T); zero where the positions of (B, T, d) are padding.

    Raises:
        LookupError: if the axis is needed and not known.
        ValueError: if the features have no such position.
    """
    features = features.detach()
    if features.is_nested:  # torch's own encoder drops the padding in eval mode
        picks = {"first": lambda x: x[0], "last": lambda x: x[-1]}
        if callable(pool) or pool not in ("mean", "mean_channels_last", *picks):
            raise ValueError(
                "sequences of different lengths come as a nested tensor, which only pool='mean', 'first' and 'last' can pool; "
                f"got pool={pool!r}"
            )
        return torch.stack([picks.get(pool, lambda x: x.mean(dim=0))(sequence) for sequence in features.unbind()])
    if features.dim() <= 2:
        return (features if features.dim() == 2 else features[:, None]).clone()
    if callable(pool):
        return pool(features).detach().clone()
    if pool == "flatten":
        return features.flatten(start_dim=1).clone()
    if axis is None:
        raise LookupError(
            f"which axis of {tuple(features.shape)} holds the features is not known; pass pool=, a function from it to (B, d)"
        )
    rows = features.movedim(axis, -1)
    mask = mask if mask is not None and mask.shape == rows.shape[:-1] else None
    if pool in ("first", "last"):
        if rows.dim() != 3:
            raise ValueError(f"pool={pool!r} takes a position of a sequence (B, T, d), got {tuple(features.shape)}")
        real = torch.ones_like(rows[..., 0], dtype=torch.bool) if mask is None else mask.bool()
        order = torch.arange(real.shape[1], device=rows.device)
        at = (real * (order if pool == "last" else order.flip(0) + 1)).argmax(dim=1)
        return rows[torch.arange(len(rows), device=rows.device), at]
    if mask is not None:
        wide = torch.promote_types(features.dtype, torch.float32)  # a sum may leave float16
        weights = mask.to(wide).unsqueeze(-1)
        return (rows * weights).sum(dim=1) / weights.sum(dim=1).clamp(min=1)
    return rows.flatten(1, -2).mean(dim=1)


def feature_axes(features: Tensor, positions: tuple[int, ...]) -> list[int]:
    """The axes of features (B, ...) that may hold the features, so that the others are the ``positions``."""
    if features.is_nested:  # its sequences have no common length, see rows_at_positions
        return [features.dim() - 1]
    shape = tuple(features.shape)
    return [axis for axis in range(1, len(shape)) if shape[1:axis] + shape[axis + 1 :] == positions]


def rows_at_positions(
    features: Tensor, labels: tuple[int, ...], pool: Pool = "mean", axis: int | None = None
) -> Tensor | None:
    """Features of labels (B, *positions) as (N, d), one row per label, in memory of its own; None if they do not fit.

    Args:
        features: the output of a layer: (B, ...) with the positions of the labels, or (N, d). A callable ``pool`` is called on
            other features of more than two dimensions, and returns (B, *positions, d), (B, d, *positions) or (N, d).
        labels: the shape of the labels.
        pool: see above.
        axis: the axis of the features.

    Raises:
        ValueError: if ``pool`` returns features whose axis is not clear.
    """
    features = features.detach()
    if features.is_nested:
        sequences = len(labels) == 2 and len(features.unbind()) == labels[0]
        if not sequences or max(len(sequence) for sequence in features.unbind()) > labels[1]:
            return None
        features = torch.nested.to_padded_tensor(features, 0.0, (*labels, features.unbind()[0].shape[-1]))
    fits = axis is not None and axis in feature_axes(features, labels[1:]) and len(features) == labels[0]
    if not fits and callable(pool) and features.dim() > 2:
        features = pool(features).detach()
        ends = {1, features.dim() - 1}  # the conventions
        axes = [axis for axis in feature_axes(features, labels[1:]) if axis in ends and len(features) == labels[0]]
        if len(axes) > 1:
            raise ValueError(
                f"pool= returned {tuple(features.shape)} for labels {labels}, and which axis holds the features is not clear; "
                "return (N, d), a row per label"
            )
        fits, axis = bool(axes), axes[0] if axes else None
    if fits:
        assert axis is not None
        rows = features.movedim(axis, -1).flatten(end_dim=-2)
        return rows.clone() if rows.data_ptr() == features.data_ptr() else rows
    return features.clone() if features.dim() == 2 and len(features) == math.prod(labels) else None


def run_forward(model: nn.Module, batch: Any) -> Any:
    """Call the model on the first item of a sequence, or on the entries of a mapping that its forward takes.

    A LightningModule that defines no forward of its own runs its ``validation_step``.

    Raises:
        LookupError: if the model cannot be called this way.
    """
    module = _unwrapped(model)
    if getattr(type(module).forward, "__name__", "") == "_forward_unimplemented" or _is_lightnings(
        type(module), "forward"
    ):
        if not hasattr(module, "validation_step") or _is_lightnings(type(module), "validation_step"):
            raise LookupError(
                f"{type(module).__name__} has neither a forward nor a validation_step to run; define one, or pass forward_fn, "
                "a function of the module and the batch"
            )
        return module.validation_step(batch, 0)  # type: ignore[operator]
    if isinstance(batch, Mapping):
        positional, named = _arguments(module, batch)
        return model(*positional, **named)
    if not isinstance(batch, Sequence):
        raise LookupError(
            f"a batch of type {type(batch).__name__} has no first item to call the model on; pass forward_fn, a function of "
            "the module and the batch"
        )
    return model(batch[0])


def listed(names: Any) -> str:
    """Names for a message, at most ten."""
    names = list(names)
    return ", ".join(repr(name) for name in names[:10]) + (", ..." if len(names) > 10 else "")


def _unwrapped(model: nn.Module) -> nn.Module:
    """The model inside torch.compile, FSDP, DDP or Fabric, whose wrappers take any argument."""
    model = getattr(model, "_orig_mod", model)
    kinds = {parameter.kind for parameter in inspect.signature(model.forward).parameters.values()}
    takes_anything = kinds == {inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD}
    return getattr(model, "module", model) if takes_anything and not _is_lightnings(type(model), "forward") else model


def _arguments(module: nn.Module, batch: Mapping[str, Any]) -> tuple[list[Any], dict[str, Any]]:
    """The positional and the named arguments that a mapping gives to the forward of a module."""
    parameters = inspect.signature(module.forward).parameters
    if any(parameter.kind == parameter.VAR_KEYWORD for parameter in parameters.values()):
        return [], dict(batch)
    required = {
        name
        for name, parameter in parameters.items()
        if parameter.default is parameter.empty and parameter.kind != parameter.VAR_POSITIONAL
    }
    taken = {name: value for name, value in batch.items() if name in parameters}
    if taken and required <= taken.keys():
        return [], taken
    inputs = [value for name, value in batch.items() if name not in LABEL_KEYS]
    if len(inputs) == 1 and len(required) == 1:
        return inputs, {}
    raise LookupError(
        f"a batch has the keys {listed(batch)}, and the forward of {type(module).__name__} takes {listed(parameters)}; pass "
        "forward_fn, a function of the module and the batch"
    )


def _is_lightnings(kind: type, method: str) -> bool:
    """Whether LightningModule defines the method, of either package, and not the user."""
    module: str = getattr(kind, method).__module__ or ""  # a traced module's method has none
    return module.startswith(("lightning.pytorch.", "pytorch_lightning."))
