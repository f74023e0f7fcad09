"""What new releases of other packages have and the oldest supported ones lack: a test that uses it is skipped there."""

import importlib

import pytest

try:
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
except ImportError:
    MixedPrecisionPolicy = fully_shard = None

needs_torch_2_6 = pytest.mark.skipif(fully_shard is None, reason="transformers resumes with torch 2.6 or newer alone")
needs_fsdp2 = pytest.mark.skipif(fully_shard is None, reason="FSDP2 needs torch 2.6")

__all__ = ["EMAWeightAveraging", "MixedPrecisionPolicy", "fully_shard", "needs_fsdp2", "needs_torch_2_6", "since"]


def since(release, module, name):
    """A class of another package; where it is missing, one that skips the test when it is called or subclassed."""

    def skip(*_, **__):
        pytest.skip(f"{name} needs {release}")

    missing = type(name, (), {"__init__": skip, "__init_subclass__": skip})
    return getattr(importlib.import_module(module), name, missing)


EMAWeightAveraging = since("lightning 2.6", "lightning.pytorch.callbacks", "EMAWeightAveraging")
