"""The processes of a distributed run, which take every collective step together: none waits for one that gave up."""

from __future__ import annotations

import zlib
from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_nc.probe import Moments

__all__ = ["agree"]

_NOT_MINE = torch.iinfo(torch.long).min


@torch.no_grad()
def agree(
    device: torch.device, error: Exception | None, moments: Moments, buffers: Sequence[Tensor] = (), steps: int = 0
) -> int:
    """Before the processes add up their moments: whether all of them can. One collective.

    Args:
        device: of the collective.
        error: what went wrong in this process.
        moments: those to be added, whose shapes must be the same everywhere.
        buffers: given the values that they have in the first process. The statistics of BatchNorm differ between processes
            in training.
        steps: a number of steps.

    Returns:
        The largest ``steps`` of all processes.

    Raises:
        Exception: ``error``, or a RuntimeError in the processes that have none while another has one.
        ValueError: for shapes that differ.
    """
    shapes = zlib.crc32(repr([(prefix, m.means.shape) for prefix, m in moments.items()]).encode())
    own = torch.tensor([error is not None, steps, shapes, -shapes], device=device)
    parts = [buffer.to(device).contiguous().flatten().view(torch.uint8) for buffer in buffers if buffer.numel()]
    size = sum(map(len, parts))
    held = torch.cat([*parts, own.new_zeros(-size % 8, dtype=torch.uint8)]).view(torch.long)
    if torch.distributed.get_rank() > 0:
        held.fill_(_NOT_MINE)
    told = torch.cat([own, held])
    torch.distributed.all_reduce(told, op=torch.distributed.ReduceOp.MAX)
    failed, steps, largest, smallest = told[:4].tolist()
    if failed:
        raise error or RuntimeError("another process could not measure its part; its own warning says why")
    if largest != -smallest:
        raise ValueError(
            "features have other shapes in other processes; inputs of varying size need pool='mean' or a callable"
        )
    filled = (buffer for buffer in buffers if buffer.numel())
    for buffer, part in zip(filled, told[4:].view(torch.uint8)[:size].split([len(p) for p in parts]), strict=True):
        buffer.copy_(part.clone().view(buffer.dtype).view_as(buffer))
    return steps
