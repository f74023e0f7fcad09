"""Which axis of a layer's output holds the features.

Nothing is guessed from a class name. The features' axis is known at convolutions, linear layers and norms, from the kind of
the layer and its number of channels. It carries over to other modules that pass on the same tensor, and to those whose
neighbors in the order of the calls say so.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice, permutations
from typing import NamedTuple

import torch
from torch import Tensor, nn

from lightning_nc.measuring.hooks import Call
from lightning_nc.simplex_etf import SimplexETF

__all__ = ["Layout"]

_Key = tuple[int, tuple[int, ...], tuple[int, ...]]

_FIRST = nn.modules.conv._ConvNd, nn.modules.batchnorm._NormBase, nn.GroupNorm
_LAST = nn.Linear, SimplexETF, nn.Embedding, nn.RNNBase, nn.MultiheadAttention, nn.Bilinear


class _Known(NamedTuple):
    """A layer whose features' axis is known: its tensor's key and shape, the axis, and the number of channels there."""

    key: _Key
    shape: tuple[int, ...]
    axis: int  # 0 if it is not known, behind a permutation
    position: int  # in the order of the calls
    permuted: bool = False  # by this call


class Layout:
    """The axes of the features in one run of a model.

    Args:
        calls: all calls of the run, in the order they finished.
    """

    def __init__(self, calls: Sequence[Call]) -> None:
        self.calls = calls
        self._givers, self._takers = _known(calls, outputs=True), _known(calls, outputs=False)

    def feature_axis(self, position: int, outputs: bool = True) -> int:
        """The axis that holds the features in what a module returned, or received, of three dimensions or more.

        Args:
            position: the number of the call.
            outputs: whether the output or the input is asked for.

        Raises:
            LookupError: if nothing says which axis it is, or if the layers around it disagree.
        """
        call, givers, takers = self.calls[position], self._givers, self._takers
        tensor = call.output if outputs else call.input
        assert tensor is not None
        own = _axis(call.module, tensor, outputs)
        if own is not None:
            return own
        # The same tensor, as the output of one layer or as the input of another.
        same = {known.axis for known in (*givers, *takers) if known.key == _key(tensor) and known.axis}
        if len(same) == 1:
            return same.pop()
        before = next((known for known in reversed(givers) if known.position < position), None)
        after = next((known for known in takers if known.position > position), None)
        if after is not None and any(known.permuted and position < known.position < after.position for known in givers):
            after = None
        # Channels first everywhere, or last everywhere.
        uniform = len({known.axis == 1 for known in (*givers, *takers)}) == 1
        neighbors = [
            axis for known in (before, after) if known and (axis := _carried(known, tensor, uniform)) is not None
        ]
        # Between two neighbors that say the same, or by its size: behind a single one, a square tensor may have been transposed.
        sure = len(neighbors) == 2 or _is_only_axis_of_its_size(neighbors, tensor)
        if len(set(neighbors)) == 1 and not same and sure:
            return neighbors[0]
        candidates = sorted({*same, *neighbors}) or range(1, tensor.dim())
        raise LookupError(
            f"which axis of its {'output' if outputs else 'input'} {tuple(tensor.shape)} holds the features is ambiguous; "
            f"candidates are {' and '.join(f'axis {axis} ({tensor.shape[axis]})' for axis in candidates)}. Pass "
            "pool='mean_channels_first', pool='mean_channels_last', or a function from the output to (B, d)"
        )


def _known(calls: Sequence[Call], outputs: bool) -> list[_Known]:
    found: list[_Known] = []
    for position, call in enumerate(calls):
        tensor = call.output if outputs else call.input
        if tensor is not None and not tensor.is_nested and tensor.dim() > 2:
            axis, order = _axis(call.module, tensor, outputs), None
            source = call.input if outputs and axis is None else None
            if source is not None and (order := _reordering(call.module, source, tensor)) is not None:
                same = [known.axis for known in found if known.key == _key(source)]
                held = same[-1] if same else _carried(found[-1], source, False) if found else None
                axis = order.index(held) if held else 0
            if axis is not None:
                found.append(_Known(_key(tensor), tuple(tensor.shape), axis, position, order is not None))
    return found


def _reordering(module: nn.Module, x: Tensor, y: Tensor) -> tuple[int, ...] | None:
    """The order of the axes of the input ``x`` in the output ``y``, if all that a module does is to permute them."""
    if module._parameters or x.is_nested or x.numel() != y.numel() or (x.shape == y.shape and torch.equal(x, y)):
        return None
    orders = ((0, *order) for order in islice(permutations(range(1, x.dim())), 1, None))
    return next((o for o in orders if x.permute(o).shape == y.shape and torch.equal(x.permute(o), y)), None)


def _axis(module: nn.Module, tensor: Tensor, outputs: bool) -> int | None:
    """The features' axis of what a layer returns or receives, None for a layer that does not say."""
    last = tensor.dim() - 1
    channels = _channels(module, outputs)
    if channels is None:
        return _axis_of_scale(module, tensor)
    if isinstance(module, _FIRST):
        return 1 if tensor.shape[1] == channels else None
    if isinstance(module, _LAST) or type(module) in (nn.LayerNorm, nn.RMSNorm):
        return last if tensor.shape[last] == channels else None
    # A norm of another library, or a subclass that permutes: its number of channels must fit one axis alone.
    fitting = [axis for axis in range(1, last + 1) if tensor.shape[axis] == channels]
    return fitting[0] if len(fitting) == 1 and fitting[0] in (1, last) else None


def _axis_of_scale(module: nn.Module, tensor: Tensor) -> int | None:
    """The axis along which a layer without inner modules scales a tensor, by a parameter such as (1, C, 1, 1)."""
    axes: set[int] = set()
    for scale in module._parameters.values() if next(module.children(), None) is None else ():
        wide = [axis for axis, size in enumerate(scale.shape) if size > 1] if scale is not None else []
        if len(wide) == 1 and scale is not None and scale.dim() == tensor.dim() and wide[0] > 0:
            axes.update(axis for axis in wide if tensor.shape[axis] == scale.shape[axis])
    return axes.pop() if len(axes) == 1 else None


def _channels(module: nn.Module, outputs: bool) -> int | None:
    """The number of channels that a layer returns or receives."""
    if isinstance(module, nn.RNNBase):
        width = module.proj_size or module.hidden_size
        return width * (1 + module.bidirectional) if outputs else module.input_size
    if isinstance(module, nn.LayerNorm | nn.RMSNorm):
        return module.normalized_shape[-1] if len(module.normalized_shape) == 1 else None
    own = (
        ["out_channels", "out_features", "embedding_dim"] if outputs else ["in_channels", "in_features", "in1_features"]
    )
    names = [*own, "num_features", "num_channels", "embed_dim"]
    found = next((value for name in names if isinstance(value := getattr(module, name, None), int)), None)
    leaf = next(module.children(), None) is None
    if found is not None and (leaf or isinstance(module, _FIRST + _LAST)):
        return found
    scale = vars(module)["_parameters"].get("bias" if outputs else None) if leaf else None
    scale = vars(module)["_parameters"].get("weight") if leaf and scale is None else scale
    return len(scale) if isinstance(scale, Tensor) and scale.dim() == 1 else None


def _carried(known: _Known, tensor: Tensor, uniform: bool) -> int | None:
    """The axis of ``tensor`` that a neighbor speaks of: the same one in the same shape, else the one of its size.

    In a model of one convention the number of channels may change between the two, as in a concatenation.
    """
    shape = tuple(tensor.shape)
    if known.shape == shape or not known.axis:
        return known.axis or None
    if uniform and len(known.shape) == len(shape) and _without(known.shape, known.axis) == _without(shape, known.axis):
        return known.axis
    size = known.shape[known.axis]
    fitting = [axis for axis in range(1, tensor.dim()) if tensor.shape[axis] == size]
    if len(fitting) > 1 and len(known.shape) == len(shape) and known.axis in (1, len(known.shape) - 1):
        # Several axes of that size: the convention of the neighbor is kept, and another source has to confirm it.
        conventional = 1 if known.axis == 1 else tensor.dim() - 1
        return conventional if conventional in fitting else None
    return fitting[0] if len(fitting) == 1 and fitting[0] in (1, tensor.dim() - 1) else None


def _without(shape: tuple[int, ...], axis: int) -> tuple[int, ...]:
    """The sizes of a shape but those of one axis and of the samples."""
    return shape[1:axis] + shape[axis + 1 :]


def _is_only_axis_of_its_size(axes: Sequence[int], tensor: Tensor) -> bool:
    return bool(axes) and list(tensor.shape[1:]).count(tensor.shape[axes[0]]) == 1


def _key(tensor: Tensor) -> _Key:
    return tensor.data_ptr(), tuple(tensor.shape), tuple(tensor.stride())
