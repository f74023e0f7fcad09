import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))


@pytest.fixture(autouse=True)
def _fixed_seed():
    torch.manual_seed(0)


def clusters(classes, per_class, features, noise, seed=0, dtype=torch.float32):
    """Random class means of norm about sqrt(d), Gaussian samples around them, shuffled."""
    generator = torch.Generator().manual_seed(seed)
    means = torch.randn(classes, features, generator=generator, dtype=torch.float64)
    target = torch.arange(classes).repeat_interleave(per_class)
    rows = means[target] + noise * torch.randn(len(target), features, generator=generator, dtype=torch.float64)
    order = torch.randperm(len(target), generator=generator)
    return rows[order].to(dtype), target[order]
