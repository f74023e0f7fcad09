"""A trial: what two short runs of a model tell about its layers, before anything is measured."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from lightning_nc.measuring.batches import Pool, copy_batch, first_rows, pool_features
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
        size: the number of its labels.
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
        def run(rows: int, reverse: bool = False) -> Any:
            return forward(model, first_rows(batch, size, rows, reverse))

        self.pool, self.sharded = pool, is_sharded(model)
        self.rows = min(3, size), max(min(3, size) - 1, 1)
        self.reverse = True  # whether the second run is on samples 1 and 0
        self.run: Callable[[], Any] = partial(run, self.rows[0])
        try:
            if any(len(targets(first_rows(batch, size, rows))) != rows for rows in self.rows):
                raise ValueError("the batch cannot be shortened")
            self.output, self.calls = trace(model, self.run)
            try:
                _, self.fewer = trace(model, partial(run, self.rows[1], reverse=True))
            except Exception:  # a model that takes sorted samples only
                self.reverse = False
                _, self.fewer = trace(model, partial(run, self.rows[1]))
            if not any(self._has_rows(a.output, b.output) for a, b in zip(self.calls, self.fewer, strict=False)):
                raise ValueError("a part of the batch was not shortened")
        except Exception:  # a graph, or a model for one batch size: run it on the batch as it is
            self.run = lambda: forward(model, copy_batch(batch))
            self.output, self.calls = trace(model, self.run)
            self.fewer, self.rows, self.reverse = self.calls, (size, size), False
        self.layout = Layout(self.calls)

    def width(self, layer: str, name: str, axes: dict[str, int]) -> int:
        """The number of features of a layer; their axis is added to ``axes`` under ``name``.

        Raises:
            NotCalledError: if the layer was not called.
            LookupError: if no call has a row for each sample, or has them in another order, or if the axis is not known.
            ValueError: if the features cannot be pooled.
        """
        calls = [position for position, call in enumerate(self.calls) if call.name == layer]
        if not calls:
            raise NotCalledError(uncalled(layer, name == INPUT))
        tensors = [_tensor(self.calls[position], name) for position in calls]
        fewer = [_tensor(call, name) for call in self.fewer if call.name == layer]
        others = fewer if len(fewer) == len(tensors) else tensors
        fitting = [p for p, tensor, other in zip(calls, tensors, others, strict=True) if self._has_rows(tensor, other)]
        if not fitting:
            shapes = ", ".join(str(None if tensor is None else tuple(tensor.shape)) for tensor in tensors)
            raise LookupError(
                f"no call of {layer!r} has a row for each of the {self.rows[0]} labels, got {shapes}; pass target_fn or "
                "forward_fn so that features and labels fit, or pool=, a function from the output to (B, d)"
            )
        tensor, other = _tensor(self.calls[fitting[-1]], name), others[calls.index(fitting[-1])]
        assert tensor is not None
        assert other is not None
        if tensor.dim() > 2 and not callable(self.pool) and self.pool != "flatten":
            if self.pool == "mean" and not tensor.is_nested:
                axes[name] = self.layout.feature_axis(fitting[-1], outputs=name != INPUT)
            else:
                axes[name] = 1 if self.pool == "mean_channels_first" else tensor.dim() - 1
        rows = pool_features(tensor, self.pool, axes.get(name))
        check_batch(rows, torch.zeros(len(rows), dtype=torch.long))
        if (
            self.reverse
            and self.rows == (3, 2)
            and not _in_order(rows, pool_features(other, self.pool, axes.get(name)))
        ):
            raise LookupError(
                f"the rows of the last call of {layer!r} are in another order than the samples of the batch (the model sorts "
                "them, for example), so features and labels do not fit; sort them in the dataloader instead"
            )
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

    def _has_rows(self, tensor: Tensor | None, other: Tensor | None) -> bool:
        """Whether the first axis counts the samples, in the outputs of one call for two numbers of samples."""
        if tensor is None or other is None:
            return False
        if callable(self.pool) and tensor.dim() > 2:
            tensor, other = self.pool(tensor), self.pool(other)
        if not tensor.dim() or not other.dim() or (tensor.size(0), other.size(0)) != self.rows:
            return False
        # If the batch could not be shortened, an axis of the same size may be that of the samples.
        shortened, count = self.rows[0] != self.rows[1], self.rows[0]
        return shortened or count == 1 or tensor.dim() < 3 or count not in tensor.shape[1:]


def _in_order(three: Tensor, two: Tensor) -> bool:
    """False if a row of ``two``, of samples 1 and 0, is not the row of its sample in ``three`` but that of another."""
    if three.shape[1] != two.shape[1]:
        return True
    distances = torch.cdist(two.float(), three.float(), compute_mode="donot_use_mm_for_euclid_dist")
    own, size = distances[[0, 1], [1, 0]], torch.linalg.vector_norm(three.float())
    return not ((own > 1e-3 * size) & (distances.min(dim=1).values < 1e-3 * own)).any()


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
