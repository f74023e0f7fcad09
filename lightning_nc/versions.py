"""What torch 2.4 and 2.5 lack, as torch 2.6 has it: the one place where the release of torch is asked for."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib import import_module
from typing import Any

import torch
import torch.distributed as dist
from torch import serialization

__all__ = ["force_eager", "safe_globals", "store_of_all_ranks"]


@contextmanager
def force_eager() -> Iterator[None]:
    """Run what is compiled without its compiled code, which ignores hooks that were registered after the first call."""
    if hasattr(torch.compiler, "set_stance"):
        with torch.compiler.set_stance("force_eager"):
            yield
        return
    frames: Any = import_module("torch._dynamo.eval_frame")
    set_eval_frame = frames.set_eval_frame
    frames.set_eval_frame = lambda callback: set_eval_frame(None)
    try:
        yield
    finally:
        frames.set_eval_frame = set_eval_frame


@contextmanager
def safe_globals(allowed: Sequence[tuple[type, str]]) -> Iterator[None]:
    """Let ``torch.load`` construct these classes, each with the name that a file has for it."""
    if hasattr(torch.compiler, "set_stance"):  # torch 2.6, where a class may have another name in the file
        with serialization.safe_globals([*allowed]):
            yield
        return
    before = [*serialization.get_safe_globals()]
    serialization.add_safe_globals([kind for kind, _ in allowed])
    try:
        yield
    finally:
        serialization.clear_safe_globals()
        serialization.add_safe_globals(before)


def store_of_all_ranks() -> Any:
    """The key-value store of the process group of all ranks."""
    world: Any = dist.group.WORLD
    if hasattr(world, "get_group_store"):
        return world.get_group_store()
    return import_module("torch.distributed.distributed_c10d")._get_default_store()
