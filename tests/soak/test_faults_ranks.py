"""A rank that dies or fails in a measurement: the other one ends with an error, and does not wait for ever."""

import os
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from conftest import clusters, free_port
from torch import nn

from lightning_nc import measure

TIMEOUT = 20  # seconds, of the process group


def work(rank, port, how, at, folder):
    """Measure on one of two ranks, of which rank 1 dies or fails at the call ``at`` of its model; write what rank 0 got."""
    store = f"tcp://127.0.0.1:{port}"
    dist.init_process_group("gloo", store, rank=rank, world_size=2, timeout=timedelta(seconds=TIMEOUT))
    rows, target = clusters(3, 12, 6, 0.5)
    batches = [(rows[place : place + 6], target[place : place + 6]) for place in range(18 * rank, 18 * rank + 18, 6)]
    torch.manual_seed(0)
    model, calls = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3)), []

    def forward_fn(module, batch):
        calls.append(1)
        if rank and len(calls) > at:
            if how == "dies":
                os._exit(1)
            raise ZeroDivisionError("of the user")
        return module(batch[0])

    try:
        found = repr(measure(model, batches, metrics="all", forward_fn=forward_fn, progress=False))
    except Exception as error:
        found = f"{type(error).__name__}: {error}"
    (folder / str(rank)).write_text(found)
    os._exit(0)


@pytest.mark.parametrize("at", [0, 4])  # in the search for the classifier, and in the last batch
@pytest.mark.parametrize("how", ["dies", "fails"])
def test_when_a_rank_dies_or_fails_the_other_ends_with_an_error_in_time(tmp_path, tally, how, at):
    tally.add("faults", ("rank", how, at))
    context = mp.get_context("spawn")
    port = free_port()
    ranks = [context.Process(target=work, args=(rank, port, how, at, tmp_path)) for rank in range(2)]
    for process in ranks:
        process.start()
    try:
        for process in ranks:
            process.join(TIMEOUT + 100)  # for the imports too
        assert not any(process.is_alive() for process in ranks)
    finally:
        for process in ranks:
            process.kill()
    said = (tmp_path / "0").read_text()
    if how == "fails":
        assert said.startswith("RuntimeError: another rank could not measure its part")
        assert "of the user" in (tmp_path / "1").read_text()
    else:
        assert said.startswith(("RuntimeError", "DistBackendError", "DistNetworkError"))
        assert not (tmp_path / "1").exists()
