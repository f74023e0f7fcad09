"""Faults by plan in a measured training: it ends bit for bit as without the callback, and later epochs are measured rightly."""

import math
import os
import warnings
from functools import partial

import pytest
import torch
from conftest import full_disk
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from soak.faulty import EPOCHS, Measured, Fault, Raises, assert_clean, kill, left_behind, loader, raising, same

from lightning_nc import History, NeuralCollapseCallback
from lightning_nc.functional import METRICS, MetricSpec
from lightning_nc.runs import read_run

MEMORY = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")


def check(tmp_path, tally, name, callback, make=Measured, data=None, missing=(1,), warns=1, **options):
    """Train with a fault: one warning, all epochs but those of the fault are measured rightly, and nothing else differs."""
    tally.add("faults", name)
    expected, _ = left_behind(tmp_path / "plain", [], data=None if data is None else loader())
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        found, model = left_behind(tmp_path / "faulty", [callback], make, data, **options)
    assert same(expected, found)
    about = [str(w.message) for w in said if "neural collapse" in str(w.message)]
    assert len(about) == warns, about
    rows = {row["epoch"]: row for row in callback.history}
    assert list(rows) == [epoch for epoch in range(EPOCHS) if epoch not in missing]
    assert len(callback.history) == len(rows)
    for epoch, row in rows.items():
        assert row["nc/nc1"] == pytest.approx(model.truth[epoch], rel=1e-5)
    return about


ERRORS = [MEMORY, RuntimeError("device-side assert"), MemoryError(), OSError(5, "I/O"), KeyError(1), StopIteration()]


@pytest.mark.parametrize("at", [0, 4])
@pytest.mark.parametrize("always", [False, True])
@pytest.mark.parametrize("error", ERRORS, ids=repr)
@pytest.mark.parametrize("where", ["forward", "forward_fn", "target_fn", "dataset"])
def test_an_error_in_a_measurement_costs_its_rows_alone(tmp_path, tally, where, error, always, at):
    fault = Fault(raising(error), at, always)
    options = {
        "forward_fn": {"forward_fn": lambda module, batch: (fault(), module(batch[0]))[1]},
        "target_fn": {"target_fn": lambda batch: (fault(), batch[1])[1]},
    }
    callback = NeuralCollapseCallback(**options.get(where, {}))
    data = loader(fault) if where == "dataset" else None
    # The search for the classifier runs the model again on a whole batch where it fails on a part of one.
    retried = where.startswith("forward") and not always and at == 0
    missing = () if retried else range(1, EPOCHS) if always else (1,)
    make = partial(Measured, fault, where == "forward")
    about = check(tmp_path, tally, (where, error, always, at), callback, make, data, missing, 0 if retried else 1)
    assert fault.calls > at
    if not retried:
        assert "training goes on" in about[0]
        assert str(error) in about[0]
