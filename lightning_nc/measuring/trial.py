"""A trial: what two short runs of a model tell about its layers, before anything is measured."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from lightning_nc.measuring.batches import (
    Pool,
    copy_batch,
    feature_axes,
    pool_features,
    rows_at_positions,
    some_rows,
)
from lightning_nc.measuring.distributed import is_sharded
from lightning_nc.measuring.hooks import Call, trace
from lightning_nc.measuring.layout import Layout
from lightning_nc.moments import check_batch

__all__ = ["INPUT", "NotCalledError", "Trial", "uncalled"]

INPUT = ""
"""The name of the classifier's input among the layers."""


class NotCalledError(LookupError):
    """A layer was not called on a batch."""


class Trial:
    """Two runs of a model on the first samples of a batch, which show its classifier and the layout of its layers.

    Args:
        model: in eval mode.
        batch: a batch of ``size`` samples; it is not changed.
        size: its number of samples.
        forward: runs the model on a batch.
        targets: gives the labels of a batch.
        pool: see :class:`lightning_nc.NeuralCollapseCallback`.
    """

    def __init__(
        self,
        model: nn.Module,
        batch: Any,
        size: int,
        forward: Callable[[nn.Module, Any], Any],
        targets: Callable[[Any], Tensor],
        pool: Pool,
    ) -> None:
        def run(order: Sequence[int]) -> Any:
            return forward(model, some_rows(batch, size, order))

        self.pool, self.sharded = pool, is_sharded(model)
        self.rows = min(3, size), max(min(3, size) - 1, 1)
        self.order: list[int] = [1, 0][: self.rows[1]] if size > 1 else []
        """The samples of the second run; empty if they are the first ones, in their order."""
        self.run: Callable[[], Any] = partial(run, range(self.rows[0]))
        try:
            if any(len(targets(some_rows(batch, size, range(rows)))) != rows for rows in self.rows):
                raise ValueError("the batch cannot be shortened")
            self.output, self.calls = trace(model, self.run)
            try:
                _, self.fewer = trace(model, partial(run, self.order or [0]))
            except Exception:  # a model that takes sorted samples only
                self.order = []
                _, self.fewer = trace(model, partial(run, range(self.rows[1])))
            pairs = [(call.output, other.output) for call, other in zip(self.calls, self.fewer, strict=False)]
            if not any(self._has_rows(*pair) or self._is_shortened(*pair) for pair in pairs):
                raise ValueError("a part of the batch was not shortened")
        except Exception:  # a graph, or a model for one batch size: run it on the batch as it is
            self.run = lambda: forward(model, copy_batch(batch))
            self.output, self.calls = trace(model, self.run)
            self.fewer, self.rows, self.order = self.calls, (size, size), []
        self.layout = Layout(self.calls)
        self.unchecked: list[str] = []
        """Those with rows (N, d) for labels (B, *positions) in an order that the two runs could not tell."""
        self.dependent: list[str] = []
        """The layers whose features of a sample change with the other samples of the batch, among those asked for."""

    def has_positions(self, layer: str, positions: tuple[int, ...]) -> bool:
        """Whether a layer receives features at ``positions``, ``()`` for one vector per sample; True if it was not called."""
        calls = [
            (call.input, other.input) for call, other in zip(self.calls, self.fewer, strict=False) if call.name == layer
        ]
        return not calls or any(self._has_rows(tensor, other, positions) for tensor, other in calls)

    def shapes_into(self, layer: str) -> str:
        """The shapes that a layer receives, in words."""
        inputs = [call.input for call in self.calls if call.name == layer]
        return f"{_shapes(inputs)} for {self.rows[0]} samples"

    def width(self, layer: str, name: str, axes: dict[str, int], positions: tuple[int, ...] = ()) -> int:
        """The number of features of a layer; their axis is added to ``axes`` under ``name``.

        Args:
            layer: name of the module.
            name: its name among the layers.
            axes: the axes of the features by name.
            positions: the positions of the labels, ``()`` for labels per sample.

        Raises:
            NotCalledError: if the layer was not called.
            LookupError: if no call has a row for each label, or has them in another order, or if the axis is not known.
            ValueError: if the features cannot be pooled.
        """
        calls = [position for position, call in enumerate(self.calls) if call.name == layer]
        if not calls:
            raise NotCalledError(uncalled(layer, name == INPUT))
        tensors = [_tensor(self.calls[position], name) for position in calls]
        fewer = [_tensor(call, name) for call in self.fewer if call.name == layer]
        others = fewer if len(fewer) == len(tensors) else tensors
        fitting = [
            p
            for p, tensor, other in zip(calls, tensors, others, strict=True)
            if self._has_rows(tensor, other, positions)
        ]
        if not fitting:
            raise LookupError(self._misfit(layer, tensors, positions))
        tensor, other = _tensor(self.calls[fitting[-1]], name), others[calls.index(fitting[-1])]
        assert tensor is not None
        assert other is not None
        axis = self._axis(fitting[-1], tensor, name, positions)
        if axis is not None and positions and axis not in feature_axes(tensor, positions):
            raise LookupError(self._misfit(layer, tensors, positions))
        if axis is not None:
            axes[name] = axis
        rows, fewer_rows = (
            self._rows(t, n, axis, positions) for t, n in ((tensor, self.rows[0]), (other, self.rows[1]))
        )
        check_batch(rows, torch.zeros(len(rows), dtype=torch.long))
        if self.order:
            self._check_order(layer, rows, fewer_rows)
        elif math.prod(positions) > 1 and tensor.dim() == 2:
            self.unchecked.append(layer)
        return rows.shape[1]

    def rows_into(self, layer: str) -> Tensor | None:
        """A few inputs of a layer, (n, d), or (n, d, 1, ...) of a convolution."""
        tensors = [call.input for call in self.calls if call.name == layer and call.input is not None]
        if not tensors or tensors[-1].dim() < 2 or tensors[-1].is_nested:
            return None
        last = tensors[-1].detach()
        module = next(call.module for call in self.calls if call.name == layer)
        if hasattr(module, "kernel_size"):
            return last[(slice(8), slice(None), *[slice(1)] * (last.dim() - 2))].clone()
        return last.flatten(end_dim=-2)[:8].clone()

    def _check_order(self, layer: str, first: Tensor, second: Tensor) -> None:
        """Compare the rows of the first run, one or more for each sample, with those of the second, on the samples ``order``.

        Raises:
            LookupError: if they are in another order than the labels.
        """
        if first.shape[1] != second.shape[1] or len(first) * self.rows[1] != len(second) * self.rows[0]:
            return
        runs = list(zip((first.float(), second.float()), self.rows, strict=True))
        long, short = (rows.reshape(samples, -1) for rows, samples in runs)
        distances = torch.cdist(short, long, compute_mode="donot_use_mm_for_euclid_dist")
        own, size = distances[range(len(self.order)), self.order], torch.linalg.vector_norm(long)
        others = distances.min(dim=1).values
        if len(first) > self.rows[0]:  # one position after the other, each with all samples
            crossed, shorter = (rows.reshape(-1, samples, rows.shape[1]).transpose(0, 1) for rows, samples in runs)
            others = torch.linalg.vector_norm((crossed[self.order] - shorter).flatten(1), dim=1).minimum(others)
        if ((own > 1e-3 * size) & (others < 1e-3 * own)).any():
            raise LookupError(
                f"the rows of the last call of {layer!r} are in another order than the labels of the batch (the model sorts or "
                "transposes samples, for example), so features and labels do not fit; sort them in the dataloader instead, or "
                "pass target_fn, which gives the labels in the order of the rows"
            )
        # Far more than rounding in a half precision, and not little beside the distance of two samples.
        if (own > 0.02 * size).all() and (own > 0.1 * torch.linalg.vector_norm(long[0] - long[1])).all():
            self.dependent.append(layer)

    def _is_shortened(self, tensor: Tensor | None, other: Tensor | None) -> bool:
        """Whether the outputs of one call have as many rows for each sample in both runs."""
        if tensor is None or other is None or not tensor.dim() or not other.dim():
            return False
        return tensor.size(0) * self.rows[1] == other.size(0) * self.rows[0]

    def _is_square(self, positions: tuple[int, ...]) -> bool:
        """Whether the batch could not be shortened, and has as many samples as positions along an axis."""
        return self.rows[0] == self.rows[1] > 1 and self.rows[0] in positions

    def _axis(self, call: int, tensor: Tensor, name: str, positions: tuple[int, ...]) -> int | None:
        """The axis of the features of more than two dimensions, None where it is not needed."""
        if tensor.is_nested:
            return tensor.dim() - 1
        own = feature_axes(tensor, positions) if positions else list(range(1, tensor.dim()))
        if tensor.dim() < 3 or not own or (not positions and (callable(self.pool) or self.pool == "flatten")):
            return None
        if self.pool in ("mean_channels_first", "mean_channels_last"):
            return 1 if self.pool == "mean_channels_first" else tensor.dim() - 1
        try:  # that it has as many features as the labels have positions does not make an axis one of positions
            axis = self.layout.feature_axis(call, outputs=name != INPUT)
        except LookupError:
            if len(own) > 1:
                raise
            axis = own[0]
        return None if positions and axis not in own and callable(self.pool) else axis

    def _rows(self, tensor: Tensor, samples: int, axis: int | None, positions: tuple[int, ...]) -> Tensor:
        if not positions:
            return pool_features(tensor, self.pool, axis)
        rows = rows_at_positions(tensor, (samples, *positions), self.pool, axis)
        assert rows is not None
        return rows

    def _misfit(self, layer: str, tensors: list[Tensor | None], positions: tuple[int, ...]) -> str:
        shapes = _shapes(tensors)
        if self._is_square(positions):
            shapes += " (as many samples as positions, so which axis is which is not clear: choose another batch size)"
        if positions and callable(self.pool):
            wide = [tensor for tensor in tensors if tensor is not None and tensor.dim() > 2]
            shapes += f" (and {_shapes([self.pool(tensor) for tensor in wide])} from pool=)" * bool(wide)
        if positions:
            return (
                f"no call of {layer!r} has a feature vector for each label, got {shapes} for labels "
                f"{(self.rows[0], *positions)}; pass pool=, a function that resamples the output to (B, *positions, d) of the "
                "labels, or target_fn, which gives the labels at the positions of the layer"
            )
        return (
            f"no call of {layer!r} has a row for each of the {self.rows[0]} labels, got {shapes}; pass target_fn or "
            "forward_fn so that features and labels fit, or pool=, a function from the output to (B, d)"
        )

    def _has_rows(self, tensor: Tensor | None, other: Tensor | None, positions: tuple[int, ...] = ()) -> bool:
        """Whether the outputs of one call for two numbers of samples have a row for each label."""
        if tensor is None or other is None:
            return False
        if positions:
            return not self._is_square(positions) and all(
                any(
                    rows_at_positions(part, (samples, *positions), self.pool, axis) is not None
                    for axis in (*feature_axes(part, positions), None)
                )
                for part, samples in ((tensor, self.rows[0]), (other, self.rows[1]))
            )
        if callable(self.pool) and tensor.dim() > 2:
            tensor, other = self.pool(tensor), self.pool(other)
        if not tensor.dim() or not other.dim() or (tensor.size(0), other.size(0)) != self.rows:
            return False
        # If the batch could not be shortened, an axis of the same size may be that of the samples.
        shortened, count = self.rows[0] != self.rows[1], self.rows[0]
        return shortened or count == 1 or tensor.dim() < 3 or count not in tensor.shape[1:]


def _shapes(tensors: list[Tensor | None]) -> str:
    shapes = (None if tensor is None else "nested" if tensor.is_nested else tuple(tensor.shape) for tensor in tensors)
    return ", ".join(map(str, shapes))


def _tensor(call: Call, name: str) -> Tensor | None:
    return call.input if name == INPUT else call.output


def uncalled(layer: str, of_classifier: bool) -> str:
    """Why a layer cannot be measured that was not called, and the remedy."""
    if not of_classifier:
        return "not called in the forward pass"
    return (
        f"{layer!r} was not called in the forward pass; hooks see only calls of the module itself: write self.{layer}(x) "
        f"instead of F.linear(x, self.{layer}.weight), self.{layer}.forward(x) or a traced copy; if it is called in the "
        "training step alone, pass forward_fn, a function of the module and the batch that calls it"
    )
