"""Collective steps that all ranks take together: if one rank fails, all raise."""

from __future__ import annotations

import zlib

import torch
import torch.distributed as dist
from torch import Tensor, nn

__all__ = ["all_max", "all_raise", "broadcast_buffers", "check_same_shapes", "is_sharded"]


def all_max(value: float, device: torch.device) -> float:
    """The largest ``value`` of all ranks."""
    largest = torch.tensor(float(value), device=device)
    dist.all_reduce(largest, op=dist.ReduceOp.MAX)
    return largest.item()


def all_raise(error: Exception | None, device: torch.device | None) -> None:
    """Raise on all ranks if one rank has an ``error``; with ``device=None`` there is one rank.

    Raises:
        Exception: ``error``, or a RuntimeError on the ranks that have none.
    """
    failed = error is not None if device is None else all_max(error is not None, device)
    if failed:
        raise error or RuntimeError("another rank could not measure its part; the message of that rank says why")


def check_same_shapes(shapes: object, device: torch.device) -> None:
    """Raise ValueError on all ranks unless ``shapes`` have the same repr everywhere."""
    own = float(zlib.crc32(repr(shapes).encode()) % 2**24)  # exact in float32
    if all_max(own, device) != -all_max(-own, device):
        raise ValueError(
            "the measured layers or their widths differ between ranks; inputs of varying size need pool='mean' or a callable"
        )


def is_sharded(model: nn.Module) -> bool:
    """Whether FSDP shards the model, so that its parameters are unsharded only during forward."""
    kinds = {kind.__name__ for module in model.modules() for kind in type(module).__mro__}
    return not kinds.isdisjoint(("FSDPModule", "FullyShardedDataParallel"))


@torch.no_grad()
def broadcast_buffers(model: nn.Module, device: torch.device) -> None:
    """Give all ranks the buffers of rank 0, whose running statistics of batch normalization differ in training.

    Buffers that are no part of a checkpoint, such as the cache of a rotary embedding, stay: their shapes may differ.
    """
    for module in model.modules():
        for name, buffer in module._buffers.items():
            if buffer is not None and buffer.numel() and name not in module._non_persistent_buffers_set:
                held: Tensor = buffer.detach().to(device).contiguous()
                dist.broadcast(held, src=0)
                buffer.copy_(held)
