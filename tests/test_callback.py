"""The callback on training data: what is measured when, where the values go, and what is refused."""

import csv
import itertools
import time

import pytest
import reference
import torch
from conftest import (
    DATA,
    KEYS,
    ROWS,
    TARGET,
    Classifier,
    Normalized,
    StopAfter,
    fit,
    hooks_of,
    last,
    loader,
    true_nc1,
)
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, seed_everything
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from torch import nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from lightning_nc import NeuralCollapseCallback, log_spaced, measure


def test_one_line_measures_the_classifiers_input_in_eval_mode_exactly(tmp_path):
    callback = NeuralCollapseCallback()
    trainer, model = fit(tmp_path, [callback])
    model.eval()
    with torch.no_grad():
        features = model.net[:4](ROWS).numpy()
    head = model.net[4]
    expected = reference.all_metrics(
        features, TARGET.numpy(), head.weight.detach().double().numpy(), head.bias.detach().double().numpy()
    )
    last = callback.history[-1]
    assert list(last) == ["stage", "epoch", "step", *KEYS, "geometry"]
    assert (last["stage"], last["epoch"], last["step"]) == ("train", 2, 18)
    for key in KEYS:
        assert last[key] == pytest.approx(expected[key.removeprefix("nc/")], rel=1e-5)
        assert trainer.callback_metrics[key].item() == last[key]


def test_the_callback_and_measure_give_the_same_values(tmp_path):
    callback = NeuralCollapseCallback(layers=["net.*"], strict=True)
    _, model = fit(tmp_path, [callback])
    alone = measure(model, loader(shuffle=False), layers=["net.*"], progress=False)
    assert {f"nc/{name}": value for name, value in alone.items()} == pytest.approx(
        {key: value for key, value in callback.history[-1].items() if key.startswith("nc/")}, rel=1e-9
    )


def test_values_reach_the_logger_once_per_epoch(tmp_path):
    callback = NeuralCollapseCallback(layers=["net.2"])
    trainer, _ = fit(tmp_path, [callback], logger=CSVLogger(tmp_path))
    with open(f"{trainer.log_dir}/metrics.csv") as file:
        rows = [row for row in csv.DictReader(file) if row["nc/nc1"]]
    assert [float(row["nc/nc1"]) for row in rows] == [row["nc/nc1"] for row in callback.history]
    assert [float(row["nc/net.2/nc2_of"]) for row in rows] == [row["nc/net.2/nc2_of"] for row in callback.history]
    assert [int(row["epoch"]) for row in rows] == [0, 1, 2]


class Spy(Callback):
    """What a validation-time monitor would see."""

    def __init__(self):
        self.values = []

    def on_validation_end(self, trainer, pl_module):
        if not trainer.sanity_checking:
            self.values.append(trainer.callback_metrics["nc/nc1"].item())


def test_checkpoint_and_early_stopping_see_the_value_of_this_epoch(tmp_path):
    callback, spy = NeuralCollapseCallback(), Spy()
    checkpoint = ModelCheckpoint(tmp_path, monitor="nc/nc1", save_top_k=-1, filename="{epoch}")
    fit(tmp_path, [callback, spy, checkpoint], val=loader(shuffle=False))
    history = [row["nc/nc1"] for row in callback.history]
    assert spy.values == history
    assert sorted(value.item() for value in checkpoint.best_k_models.values()) == sorted(history)
    stopper = EarlyStopping("nc/nc1", stopping_threshold=1e9, strict=True)
    stopped, _ = fit(tmp_path, [NeuralCollapseCallback(), stopper], max_epochs=50)
    assert stopped.current_epoch == 1


# --------------------------------------------------------------------------------------------------------------- schedule


def test_the_first_and_the_last_epoch_are_always_measured(tmp_path):
    callback = NeuralCollapseCallback(every_n_epochs=3)
    fit(tmp_path, [callback], max_epochs=6)
    assert [row["epoch"] for row in callback.history] == [0, 2, 5]
    callback = NeuralCollapseCallback(every_n_epochs=lambda epoch: epoch == 2)
    fit(tmp_path, [callback], max_epochs=4)
    assert [row["epoch"] for row in callback.history] == [0, 2, 3]
    callback = NeuralCollapseCallback(every_n_epochs=10)
    fit(tmp_path, [callback], max_epochs=10, max_steps=15)  # ends in the middle of the third epoch
    assert [(row["epoch"], row["step"]) for row in callback.history] == [(0, 6), (2, 15)]


def test_a_log_spaced_schedule_measures_less_often_as_epochs_pass(tmp_path):
    callback = NeuralCollapseCallback(every_n_epochs=log_spaced(3), mode="online", strict=True)
    fit(tmp_path, [callback], max_epochs=12)
    assert [row["epoch"] + 1 for row in callback.history] == [1, 3, 5, 10, 12]
    with pytest.raises(ValueError, match="positive integer"):
        log_spaced(0)


def test_a_subclass_may_choose_the_epochs_by_a_rule_of_its_own(tmp_path):
    class Even(NeuralCollapseCallback):
        def should_measure(self, trainer):
            return trainer.current_epoch % 2 == 0

    for mode in ("exact", "online"):
        callback = Even(mode=mode, strict=True)
        fit(tmp_path, [callback], max_epochs=5)
        assert [row["epoch"] for row in callback.history] == [0, 2, 4]


def test_a_run_that_is_stopped_early_is_measured_at_its_end(tmp_path):
    callback = NeuralCollapseCallback(every_n_epochs=3)
    trainer, _ = fit(tmp_path, [callback, StopAfter()], max_epochs=50, logger=CSVLogger(tmp_path))
    assert [row["epoch"] for row in callback.history] == [0, 2, 4]
    assert trainer.callback_metrics["nc/nc1"].item() == callback.history[-1]["nc/nc1"]
    with open(f"{trainer.log_dir}/metrics.csv") as file:
        logged = [float(row["nc/nc1"]) for row in csv.DictReader(file) if row["nc/nc1"]]
    assert logged == [row["nc/nc1"] for row in callback.history]


# ----------------------------------------------------------------------------------------------------------- resumed runs


def test_a_resumed_run_continues_the_history_and_equals_an_uninterrupted_one(tmp_path):
    seed_everything(3, verbose=False)
    whole = NeuralCollapseCallback()
    checkpoint = ModelCheckpoint(tmp_path, save_top_k=-1, filename="{epoch}")
    fit(tmp_path, [whole, checkpoint], data=loader(shuffle=False), max_epochs=4)
    seed_everything(3, verbose=False)
    resumed = NeuralCollapseCallback()
    fit(tmp_path, [resumed], data=loader(shuffle=False), max_epochs=4, ckpt_path=tmp_path / "epoch=1.ckpt")
    assert [row["epoch"] for row in resumed.history] == [0, 1, 2, 3]
    assert resumed.history[:2] == whole.history[:2]


def test_a_resumed_run_hands_its_last_values_to_what_monitors_them(tmp_path):
    def callbacks():
        keep = ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1)
        return [NeuralCollapseCallback(every_n_epochs=5, strict=True), EarlyStopping("nc/nc1", patience=100), keep]

    fit(tmp_path, callbacks(), max_epochs=3)
    runner, _ = fit(tmp_path, callbacks(), max_epochs=7, ckpt_path=tmp_path / "epoch=1.ckpt")
    assert runner.current_epoch == 7


def test_a_run_resumed_after_its_last_measurement_does_not_measure_twice(tmp_path):
    keep = ModelCheckpoint(tmp_path, filename="{epoch}-{step}", save_top_k=-1, save_on_train_epoch_end=False)
    options = {"val": loader(False), "val_check_interval": 0.5, "max_epochs": 2}
    fit(tmp_path, [NeuralCollapseCallback(strict=True), keep], **options)
    callback = NeuralCollapseCallback(strict=True)
    fit(tmp_path, [callback], ckpt_path=tmp_path / "epoch=0-step=6.ckpt", **options)
    assert [(row["epoch"], row["step"]) for row in callback.history] == [(0, 6), (1, 12)]


# --------------------------------------------------------------------------------------------------- data to measure on


def test_other_data_can_be_measured_on(tmp_path):
    other = DataLoader(TensorDataset(ROWS[:20], TARGET[:20]), 5)
    callback = NeuralCollapseCallback(dataloader=other, strict=True)
    _, model = fit(tmp_path, [callback])
    model.eval()
    with torch.no_grad():
        features = model.net[:4](ROWS[:20]).numpy()
    assert callback.history[-1]["nc/nc1"] == pytest.approx(
        reference.nc1_by_axes(features, TARGET[:20].numpy()), rel=1e-5
    )


def test_several_training_loaders_need_a_choice(tmp_path):
    class FromFirst(Classifier):
        def training_step(self, batch, batch_idx):
            return super().training_step(batch["a"], batch_idx)

    both = {"a": loader(), "b": loader()}
    with pytest.warns(UserWarning, match="come from a dict.*pass dataloader="):
        fit(tmp_path, [NeuralCollapseCallback()], data=both, model=FromFirst())
    callback = NeuralCollapseCallback(dataloader=[(ROWS, TARGET)], strict=True)
    fit(tmp_path, [callback], data=both, model=FromFirst())
    assert len(callback.history) == 3


class Counting(NeuralCollapseCallback):
    """Keeps how many samples were measured, batch by batch, without the runs on three samples and two before a pass."""

    def __init__(self, **kwargs):
        self.sizes = []
        forward_fn = lambda module, batch: (self.sizes.append(len(batch[0])), module(batch[0]))[1]  # noqa: E731
        super().__init__(classifier="net.4", forward_fn=forward_fn, strict=True, **kwargs)

    def measured(self):
        return [size for size in self.sizes if size > 3]


def test_limited_training_batches_limit_the_measurement(tmp_path):
    callback = Counting(metrics=("nc1",))
    _, model = fit(tmp_path, [callback], data=loader(shuffle=False), limit_train_batches=2)
    model.eval()
    with torch.no_grad():
        features = model.net[:4](ROWS[:16]).numpy()
    assert callback.history[-1]["nc/nc1"] == pytest.approx(
        reference.nc1_by_axes(features, TARGET[:16].numpy()), rel=1e-5
    )
    assert callback.measured() == [8, 8] * 3
    callback = Counting()
    fit(tmp_path, [callback], data=loader(), limit_train_batches=2)
    assert callback.measured() == [8, 8] * 3


def test_an_iterable_dataset_is_measured_as_far_as_the_epoch_went(tmp_path):
    class Stream(IterableDataset):
        def __iter__(self):
            yield from DATA

    callback = Counting()
    fit(tmp_path, [callback], data=DataLoader(Stream(), 8), limit_train_batches=2)
    assert sum(callback.measured()) == 3 * 16
    fit(tmp_path, [callback], data=DataLoader(Stream(), 8))
    assert sum(callback.measured()) == 3 * 16 + 3 * len(DATA)
    assert [row["epoch"] for row in callback.history] == [0, 1, 2]
    assert [[row["epoch"] for row in history] for history in callback.previous_histories] == [[0, 1, 2]]


def test_a_dropped_last_batch_is_measured_all_the_same(tmp_path):
    callback = Counting()
    fit(tmp_path, [callback], data=loader(drop_last=True))
    assert sum(callback.measured()) == 3 * len(DATA)


def test_a_loader_with_its_own_iteration_is_used_directly(tmp_path):
    with pytest.warns(UserWarning, match="pass dataloader="):
        fit(tmp_path, [NeuralCollapseCallback()], data=Normalized(DATA, 8))
    callback = NeuralCollapseCallback(dataloader=Normalized(DATA, 8), strict=True)
    _, model = fit(tmp_path, [callback], data=Normalized(DATA, 8, shuffle=True))
    assert last(callback) == pytest.approx(true_nc1(model, 3 * ROWS), rel=1e-5)


# -------------------------------------------------------------------------------------- what cannot be measured, or slowly


class RaiseInPass(Classifier):
    """Raises in the third forward pass in eval mode, that is inside a measurement."""

    def __init__(self, error):
        super().__init__()
        self.error, self.calls = error, itertools.count(1)  # a number would be put back

    def forward(self, x):
        if not self.training and next(self.calls) == 3:
            raise self.error
        return super().forward(x)


@pytest.mark.parametrize("error", [KeyboardInterrupt(), RuntimeError("boom")])
def test_no_hook_outlives_an_interrupt_or_an_error(tmp_path, error):
    model = RaiseInPass(error)
    with pytest.raises((KeyboardInterrupt, SystemExit, RuntimeError)):
        fit(tmp_path, [NeuralCollapseCallback(strict=True)], model=model)
    assert hooks_of(model) == []
    assert all(module.training for module in model.modules())


def test_an_error_in_a_measurement_does_not_kill_the_run_and_later_epochs_are_measured(tmp_path):
    callback = NeuralCollapseCallback()
    with pytest.warns(UserWarning, match="neural collapse cannot be measured, training goes on: boom"):
        trainer, model = fit(tmp_path, [callback], model=RaiseInPass(RuntimeError("boom")))
    assert trainer.global_step == 18
    assert [row["epoch"] for row in callback.history] == [1, 2]
    assert hooks_of(model) == []


def test_what_cannot_be_measured_warns_once_or_raises_if_asked_to(tmp_path, recwarn):
    mapped = DataLoader([{"rows": x, "weight": 1.0, "labels": y} for x, y in DATA], 8)

    class TakesMapping(Classifier):
        def training_step(self, batch, batch_idx):
            return nn.functional.cross_entropy(self(batch["rows"]), batch["labels"])

    fit(tmp_path, [NeuralCollapseCallback()], data=mapped, model=TakesMapping())
    messages = [str(warning.message) for warning in recwarn if "neural collapse" in str(warning.message)]
    assert len(messages) == 1
    assert "pass forward_fn" in messages[0]
    with pytest.raises(LookupError, match="pass forward_fn"):
        fit(tmp_path, [NeuralCollapseCallback(strict=True)], data=mapped, model=TakesMapping())
    callback = NeuralCollapseCallback(forward_fn=lambda module, batch: module(batch["rows"]), strict=True)
    fit(tmp_path, [callback], data=mapped, model=TakesMapping())
    assert len(callback.history) == 3


def test_a_layer_that_does_not_exist_causes_one_warning_and_the_others_are_measured(tmp_path):
    callback = NeuralCollapseCallback(layers=["net.2", "net.two"], stages=("train", "validate"))
    with pytest.warns(UserWarning, match=r"is named 'net\.two'; near: .*what can be found is measured") as caught:
        fit(tmp_path, [callback], val=loader(False))
    assert sum("net.two" in str(warning.message) for warning in caught) == 1
    assert "nc/net.2/nc1" in callback.history[-2]
    assert "nc/val/net.2/nc1" in callback.history[-1]
    with pytest.raises(LookupError, match=r"is named 'net\.two'"):
        fit(tmp_path, [NeuralCollapseCallback(layers=["net.two"], strict=True)])


@pytest.mark.parametrize("arguments", [{}, {"mode": "online"}])
def test_a_layer_that_does_not_fit_is_left_out_and_the_others_are_measured(tmp_path, arguments):
    class Nodes(Classifier):
        def __init__(self):
            super().__init__()
            self.nodes = nn.Linear(6, 6)

        def forward(self, x):
            return super().forward(self.nodes(x.repeat(3, 1))[: len(x)])

    callback = NeuralCollapseCallback(["nodes", "net.2"], **arguments)
    with pytest.warns(UserWarning, match="the layer 'nodes' is left out: no call of 'nodes' has a row"):
        fit(tmp_path, [callback], model=Nodes())
    assert len(callback.history) == 3
    assert all("nc/net.2/nc1" in row and "nc/nc1" in row and "nc/nodes/nc1" not in row for row in callback.history)
    with pytest.raises(LookupError, match="no call of 'nodes' has a row"):
        fit(tmp_path, [NeuralCollapseCallback(["nodes"], strict=True, **arguments)], model=Nodes())


def test_a_pass_longer_than_a_quarter_of_the_epoch_is_reported_once(tmp_path, caplog):
    class Slow:
        """Takes more than a second."""

        def __iter__(self):
            time.sleep(1.1)
            yield from loader(False)

    with caplog.at_level("INFO"):
        fit(tmp_path, [NeuralCollapseCallback(dataloader=Slow(), strict=True)], max_epochs=2)
    said = [record.message for record in caplog.records if "measuring neural collapse took" in record.message]
    assert len(said) == 1
    assert "every_n_epochs" in said[0]
    assert "mode='online'" in said[0]


# ---------------------------------------------------------------------------------------------------- settings and figures


def test_several_callbacks_work_together_unless_they_would_log_under_the_same_keys(tmp_path):
    train, val = NeuralCollapseCallback(strict=True), NeuralCollapseCallback(stages=("validate",), strict=True)
    more = NeuralCollapseCallback(layers=["net.0"], metrics=("nc1_trace",), strict=True)
    trainer, _ = fit(tmp_path, [train, val, more], val=loader(False))
    assert {"nc/nc1", "nc/val/nc1", "nc/net.0/nc1_trace"} <= set(trainer.callback_metrics)
    assert len({callback.state_key for callback in (train, val, more)}) == 3
    with pytest.raises(MisconfigurationException, match="under the same keys"):
        fit(tmp_path, [NeuralCollapseCallback(), NeuralCollapseCallback(mode="online")])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"metrics": ("nc1", "nc2_eft")}, "unknown metric 'nc2_eft'; did you mean"),
        ({"layers": "layer1"}, r"write \['layer1'\]"),
        ({"every_n_epochs": 0}, "positive integer or a callable"),
        ({"num_classes": 1}, "at least 2"),
        ({"pool": "max"}, "'last', or a callable"),
        ({"target_fn": 3}, "target_fn must be a callable"),
        ({"stages": ("train", "val")}, "any of 'train', 'validate', 'test', got"),
        ({"stages": "train"}, "must be a sequence"),
        ({"stages": ()}, "must be a sequence"),
        ({"every_n_epochs": log_spaced}, r"write log_spaced\(\)"),
        ({"mode": "offline"}, "'exact' or 'online'"),
        ({"mode": "online", "dataloader": []}, "leave one of them out"),
    ],
)
def test_bad_arguments_are_refused_in_the_constructor(arguments, message):
    with pytest.raises(MisconfigurationException, match=message):
        NeuralCollapseCallback(**arguments)


def test_plot_draws_a_panel_for_each_family(tmp_path):
    callback = NeuralCollapseCallback()
    fit(tmp_path, [callback], fast_dev_run=True)
    figure = callback.plot()
    assert [axis.get_title()[:3] for axis in figure.axes] == ["NC1", "NC2", "NC3"]
    figure.savefig(tmp_path / "figure.png")
    assert (tmp_path / "figure.png").stat().st_size > 10_000
