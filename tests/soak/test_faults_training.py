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
from torch.utils.data import get_worker_info

from lightning_nc import History, NeuralCollapseCallback
from lightning_nc.functional import METRICS, MetricSpec
from lightning_nc.runs import read_run
from soak.faulty import EPOCHS, Fault, Measured, Raises, assert_clean, kill, left_behind, loader, raising, same

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
PLACES = [
    *((where, at) for where in ("forward", "forward_fn", "target_fn", "dataset") for at in (0, 4)),
    ("dataset", 20),
]


@pytest.mark.parametrize("always", [False, True])
@pytest.mark.parametrize("error", ERRORS, ids=repr)
@pytest.mark.parametrize(("where", "at"), PLACES)
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


@pytest.mark.parametrize("at", [0, 20])
def test_a_worker_process_that_dies_in_a_measurement_costs_its_row_alone(tmp_path, tally, at):
    flag = tmp_path / "die"

    def look():
        if get_worker_info() is not None and flag.exists() and DIED.add() > at:
            os._exit(1)

    # Its workers start in the measurement alone, so that those of the training live.
    callback = NeuralCollapseCallback(dataloader=loader(look, num_workers=1))

    class Dying(Measured):
        def on_train_batch_start(self, batch, batch_idx):
            DIED.count = 0
            flag.touch() if self.current_epoch == 1 else flag.unlink(missing_ok=True)

    check(tmp_path, tally, ("worker", at), callback, Dying)


class Counter:
    count = 0

    def add(self):
        self.count += 1
        return self.count


DIED = Counter()


@pytest.mark.parametrize("error", [KeyboardInterrupt(), SystemExit(3)], ids=repr)
@pytest.mark.parametrize("at", [0, 4])
def test_an_interrupt_in_a_measurement_ends_the_run_and_leaves_the_model_as_it_is_trained(tmp_path, tally, error, at):
    tally.add("faults", ("interrupt", error, at))
    fault, found = Fault(raising(error), at), []
    keep = ModelCheckpoint(tmp_path, save_last=True)
    callback = NeuralCollapseCallback()
    with pytest.raises((KeyboardInterrupt, SystemExit)):
        left_behind(tmp_path, [callback, keep], lambda: found.append(Measured(fault, True)) or found[0])
    assert_clean(found[0])
    assert [row["epoch"] for row in callback.history] == [0]
    again = NeuralCollapseCallback(strict=True)
    left_behind(tmp_path, [again], ckpt_path=tmp_path / "last.ckpt")
    assert [row["epoch"] for row in again.history] == list(range(EPOCHS))


def test_a_metric_that_raises_once_costs_the_rows_of_its_epoch(tmp_path, tally, monkeypatch):
    calls = []

    def formula(summary):
        calls.append(1)
        if len(calls) == 2:
            raise RuntimeError("of the user")
        return summary.moments.spread.sum()

    monkeypatch.setitem(METRICS, "mine", MetricSpec(formula))
    about = check(tmp_path, tally, "metric", NeuralCollapseCallback(metrics=("nc1", "mine")))
    assert "the formula of 'mine' failed: RuntimeError: of the user" in about[0]


@pytest.mark.parametrize("mode", [{"mode": "online"}, {"stages": ("validate",)}], ids=repr)
def test_an_error_of_target_fn_in_a_running_loop_costs_the_rows_of_its_epoch(tmp_path, tally, mode):
    tally.add("faults", ("target_fn", mode))
    calls = []

    def target_fn(batch):
        calls.append(1)
        if len(calls) == 12:
            raise RuntimeError("of the user")
        return batch[1]

    def run(callbacks):
        return left_behind(tmp_path, callbacks, val=loader(), num_sanity_val_steps=0)[0]

    callback = NeuralCollapseCallback(target_fn=target_fn, **mode)
    with pytest.warns(UserWarning, match="training goes on: target_fn failed on a batch: RuntimeError: of the user"):
        found = run([callback])
    assert same(run([]), found)
    assert len(callback.history) == EPOCHS - 1


# --------------------------------------------------------------------------------------------------- disks and loggers


def test_a_disk_that_is_full_for_figures_leaves_the_log_and_no_part_of_a_figure(tmp_path, tally):
    log = CSVLogger(tmp_path, name="log", version="")
    with full_disk(4000):  # of the picture, that of the layers and of the classes, a part would fit
        callback = NeuralCollapseCallback(["net.0", "net.2"], geometry=(0, 1, 2))
        about = check(tmp_path, tally, "full disk, figures", callback, missing=(), logger=log)
    assert "could not be written" in about[0]
    assert [path.name for path in (tmp_path / "log").iterdir()] == ["metrics.csv"]
    rows = [row for row in read_run(tmp_path / "log") if "nc/nc1" in row]
    assert [row["nc/nc1"] for row in rows] == [row["nc/nc1"] for row in callback.history]
    with full_disk(4000), pytest.raises(OSError, match="File too large"):
        callback.animate(tmp_path / "collapse.gif")
    assert not [*tmp_path.glob("collapse*")]
    callback.animate(tmp_path / "collapse.gif")


@pytest.mark.parametrize("name", ["log_image", "add_figure", "log_table"])
@pytest.mark.parametrize("always", [False, True])
def test_a_logger_that_refuses_pictures_changes_nothing_else(tmp_path, tally, name, always):
    calls = []

    def refuse(*args, **kwargs):
        calls.append(1)
        if always or len(calls) == 1:
            raise ConnectionError("the server is gone")

    class Refusing(TensorBoardLogger):
        pass

    logger = Refusing(tmp_path, name="log", version="")
    setattr(logger.experiment if name == "add_figure" else Refusing, name, refuse)
    callback = NeuralCollapseCallback(geometry=(0, 1, 2))
    # Python shows the same warning of one line of code once.
    check(
        tmp_path,
        tally,
        (name, always),
        callback,
        missing=(),
        warns=EPOCHS + 1 if always and name != "log_table" else 1,
        logger=logger,
    )
    assert calls
    assert [row["nc/nc1"] for row in read_run(tmp_path / "log")] == pytest.approx(
        [row["nc/nc1"] for row in callback.history]
    )


# ------------------------------------------------------------------------------------------------------ kill and resume

HOOKS = [
    "on_train_epoch_start",
    "on_train_batch_start",
    "on_before_backward",
    "on_before_optimizer_step",
    "on_train_batch_end",
    "on_validation_start",
    "on_validation_epoch_start",
    "on_validation_batch_start",
    "on_validation_batch_end",
    "on_validation_epoch_end",
    "on_validation_end",
    "on_train_epoch_end",
    "on_save_checkpoint",
    "on_train_end",
    "on_fit_end",
]
ARGUMENTS = [{}, {"stages": ("train", "validate")}, {"mode": "online"}]


def resumed(folder, options):
    """Resume from the last checkpoint; its history has every epoch once, with a value."""
    callback = NeuralCollapseCallback(strict=True, **options)
    left_behind(folder, [callback], ckpt_path=folder / "last.ckpt", val=loader())
    stages = callback.stages
    places = [(row["stage"], row["epoch"]) for row in callback.history]
    assert sorted(places) == sorted((stage, epoch) for stage in stages for epoch in range(EPOCHS))
    for row in callback.history:
        assert math.isfinite(row[f"nc/{'val/' if row['stage'] == 'validate' else ''}nc1"])


@pytest.mark.parametrize("options", ARGUMENTS, ids=repr)
@pytest.mark.parametrize("hook", [*HOOKS, "in the pass"])
@pytest.mark.parametrize("how", ["kill", "raise"])
def test_a_run_that_ends_in_any_hook_is_resumed_with_every_epoch_once(tmp_path, tally, how, hook, options):
    tally.add("faults", (how, hook, options))

    def run():
        act = kill if how == "kill" else raising(ZeroDivisionError("of the user"))
        fault = Fault(act, at=4) if hook == "in the pass" and how == "kill" else None
        breaks = Raises("on_train_epoch_end" if hook == "in the pass" else hook, act)
        keep = ModelCheckpoint(
            tmp_path, save_last=True, save_top_k=-1, filename="{epoch}", save_on_train_epoch_end=False
        )
        callback = NeuralCollapseCallback(**options)
        others = [callback, keep] if fault else [breaks, callback, keep]
        made = []
        try:
            left_behind(
                tmp_path, others, lambda: made.append(Measured(fault, fault is not None)) or made[0], val=loader()
            )
        except ZeroDivisionError:
            # Lightning leaves the model in eval mode if validation raises.
            assert_clean(made[0], trains=not hook.startswith("on_validation") and hook != "on_save_checkpoint")
            return True
        return False

    if how == "raise":
        assert run()
    elif (child := os.fork()) == 0:  # the modules are loaded already
        try:
            run()
        finally:
            os._exit(0)
    else:
        _, status = os.waitpid(child, 0)
        assert os.WIFSIGNALED(status) or (hook == "in the pass" and options.get("mode") == "online")
    if (tmp_path / "last.ckpt").exists():
        resumed(tmp_path, options)
    else:
        assert hook == "on_save_checkpoint"


def test_the_file_of_a_history_that_is_killed_at_any_byte_has_whole_rows_and_goes_on(tmp_path, tally):
    file = tmp_path / "nc.csv"
    history = History(file)
    for epoch in range(3):
        history.append({"nc1": 1 / (epoch + 3), "layer3/nc1": 2 / (epoch + 3)}, epoch=epoch)
    whole = file.read_bytes()
    for size in (0, *range(whole.index(b"\n"), len(whole) + 1)):  # the header is written in one step
        tally.add("faults", ("cut", size))
        file.write_bytes(whole[:size])
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            kept = History(file)
            assert list(kept) == list(history)[: len(kept)]
            assert len(kept) >= whole[:size].count(b"\n") - 1
            kept.append({"nc1": 0.1, "layer3/nc1": 0.2}, epoch=9)
            assert list(History(file)) == list(kept)
