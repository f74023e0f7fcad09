"""Run in two processes by test_guarantees.py: each rank measures, and saves what it got or the error that was raised.

torchrun --nproc-per-node=2 guarantees_ranks.py FOLDER
"""

import sys
import warnings
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from conftest import clusters
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler, IterableDataset, TensorDataset
from versions import MixedPrecisionPolicy, fully_shard

from lightning_nc import measure

ROWS, TARGET = clusters(3, 17, 6, 0.5)


def model(norm=False):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 9), nn.BatchNorm1d(9) if norm else nn.Identity(), nn.ReLU(), nn.Linear(9, 3))


class Shard(IterableDataset):
    """The first rank streams all classes but one, the second one the rest."""

    def __iter__(self):
        mine = (TARGET == 2) if dist.get_rank() else (TARGET != 2)
        yield from zip(ROWS[mine], TARGET[mine], strict=True)


def streams_of_other_classes():
    return measure(DistributedDataParallel(model()), DataLoader(Shard(), 5), progress=False)


def batch_norm():
    """Buffers differ between the ranks: those of the first count."""
    wrapped = DistributedDataParallel(model(norm=True), broadcast_buffers=False)
    wrapped.module[1].running_mean += dist.get_rank()
    sampler = DistributedSampler(TensorDataset(ROWS, TARGET), shuffle=True)
    loader = DataLoader(TensorDataset(ROWS, TARGET), 8, sampler=sampler)
    values = measure(wrapped, loader, layers=["module.1"], progress=False)
    return values, wrapped.module[1].running_mean.tolist()


def one_rank_alone():
    if dist.get_rank():
        return None
    return measure(model(), [(ROWS, TARGET)], sync=False, progress=False)


def one_fails():
    target = TARGET.clone()
    if dist.get_rank():
        target[-1] = 7
    return measure(model(), [(ROWS[:40], target[:40]), (ROWS[40:], target[40:])], progress=False)


def one_has_no_batch():
    return measure(model(), [] if dist.get_rank() else [(ROWS, TARGET)], progress=False)


def sharded_in_bfloat16():
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, output_dtype=torch.float32)
    whole = model()
    for module in (whole[0], whole[3], whole):
        fully_shard(module, mp_policy=policy)
    part = slice(dist.get_rank(), None, 2)
    return measure(whole, [(ROWS[part], TARGET[part])], progress=False)


def main(folder):
    dist.init_process_group("gloo", timeout=timedelta(seconds=60))
    results = {}
    parts = streams_of_other_classes, batch_norm, one_rank_alone, one_fails, one_has_no_batch, sharded_in_bfloat16
    for function in parts:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                results[function.__name__] = function()
            except Exception as error:
                results[function.__name__] = f"{type(error).__name__}: {error}"
        dist.barrier()
    torch.save(results, Path(folder) / f"{dist.get_rank()}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1])
