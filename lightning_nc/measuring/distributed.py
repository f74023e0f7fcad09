"""Collective steps that all ranks take together: if one rank fails, all raise."""

from __future__ import annotations

import warnings
import zlib
from contextlib import suppress
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor, nn

from lightning_nc.versions import store_of_all_ranks

__all__ = [
    "PATIENCE",
    "all_max",
    "all_raise",
    "broadcast_buffers",
    "check_same_shapes",
    "is_sharded",
    "meet",
    "ranks_on",
]

PATIENCE = 600
"""Seconds that a rank waits in :func:`meet` for the others."""


def ranks_on(device: torch.device) -> torch.device | None:
    """``device`` if there are several ranks, whose collectives are on it; None for a single process."""
    several = dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
    return device if several else None


def meet(caller: str = "measure") -> None:
    """Wait for all ranks, which must run ``caller``, in the store of the process group.

    A collective would wait longer, or would be paired with another one, such as that of the gradients, in which a rank
    waits that never comes here.

    Raises:
        RuntimeError: on each rank that has waited for :data:`PATIENCE` seconds.
    """
    store, rank = store_of_all_ranks(), dist.get_rank()
    turn = store.add(f"lightning_nc/{rank}", 1)  # how often this rank was here
    keys = [f"lightning_nc/{turn}/{other}" for other in range(dist.get_world_size())]
    store.set(keys[rank], "")
    store.delete_key(f"lightning_nc/{turn - 2}/{rank}")  # all have left that turn, since all have come to the next
    with suppress(dist.DistStoreError):
        store.wait(keys, timedelta(seconds=min(60, PATIENCE / 2)))
        return
    warnings.warn(
        f"{caller} on rank {rank} waits for other ranks, which all must call it, up to {PATIENCE} s", stacklevel=2
    )
    try:
        store.wait(keys, timedelta(seconds=PATIENCE))
    except dist.DistStoreError:
        missing = [other for other, key in enumerate(keys) if not store.check([key])]
        if not missing:  # the last one came just now
            return
        store.add(f"lightning_nc/{rank}", -1)
        store.delete_key(keys[rank])
        raise RuntimeError(
            f"{caller} on rank {rank} has waited {PATIENCE} s for rank {', '.join(map(str, missing))} of {len(keys)}: in a "
            f"process group all ranks must call {caller}; pass sync=False for this rank's own data alone"
        ) from None


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
