import csv
import itertools
import random

import numpy as np
import pytest
import reference
import torch
from conftest import clusters
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from torch import nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from lightning_nc import NeuralCollapseCallback

ROWS, TARGET = clusters(3, 15, 6, 0.5)
DATA = TensorDataset(ROWS, TARGET)
KEYS = [f"nc/{name}" for name in ("nc1", "nc2_etf", "nc2_etf_centered", "nc2_of", "nc3", "nc3_centered")]


class Classifier(LightningModule):
    """Everything that training noise can come from: batch norm, dropout, momentum, random augmentation."""

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.2), nn.Linear(8, 3))
        self.seen = []

    def forward(self, x):
        return self.net(x)

    def training_step(self, batch, batch_idx):
        x, y = batch
        self.seen.append(x.sum().item())
        noise = torch.randn_like(x) * random.random() * np.random.rand()
        loss = nn.functional.cross_entropy(self(x + 0.1 * noise), y)
        self.log("train_loss", loss)
        return loss

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", nn.functional.cross_entropy(self(batch[0]), batch[1]))

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)


def loader(shuffle=True, **kwargs):
    return DataLoader(DATA, 8, shuffle=shuffle, **kwargs)


def fit(tmp_path, callbacks, data=None, model=None, ckpt_path=None, val=None, **trainer):
    defaults = {
        "max_epochs": 3,
        "accelerator": "cpu",
        "logger": False,
        "enable_checkpointing": any(isinstance(c, ModelCheckpoint) for c in callbacks),
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "log_every_n_steps": 1,
        "default_root_dir": tmp_path,
    }
    runner = Trainer(callbacks=callbacks, **{**defaults, **trainer})
    model = Classifier() if model is None else model
    runner.fit(model, data if data is not None else loader(), val, ckpt_path=ckpt_path)
    return runner, model


def fingerprint(trainer, model):
    optimizer = trainer.optimizers[0].state_dict()["state"]
    tensors = [*model.state_dict().values(), *(state["momentum_buffer"] for state in optimizer.values())]
    streams = [torch.get_rng_state(), random.getstate(), tuple(np.random.get_state()[1])]
    return tensors, streams, model.seen, [module.training for module in model.modules()]


def run_seeded(tmp_path, callbacks, **kwargs):
    seed_everything(3, verbose=False)
    make_loader = kwargs.pop("make_loader")
    return fingerprint(*fit(tmp_path, callbacks, data=make_loader(), **kwargs))


@pytest.mark.parametrize(
    "make_loader",
    [
        lambda: loader(shuffle=False),
        lambda: loader(),
        lambda: loader(generator=torch.Generator().manual_seed(5)),
        lambda: loader(num_workers=1),
        lambda: loader(num_workers=2, persistent_workers=True),
    ],
    ids=["unshuffled", "shuffled", "own generator", "workers", "persistent workers"],
)
@pytest.mark.parametrize("with_validation", [False, True])
def test_training_is_bit_identical_with_and_without_the_callback(tmp_path, make_loader, with_validation):
    val = loader(shuffle=False) if with_validation else None
    plain = run_seeded(tmp_path, [], make_loader=make_loader, val=val)
    callback = NeuralCollapseCallback(layers=["net.0"], strict=True)
    measured = run_seeded(tmp_path, [callback], make_loader=make_loader, val=val)
    assert len(callback.history) == 3
    assert all(torch.equal(a, b) for a, b in zip(plain[0], measured[0], strict=True))
    assert torch.equal(plain[1][0], measured[1][0])
    assert plain[1][1:] == measured[1][1:]
    assert plain[2:] == measured[2:]


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
    assert list(last) == ["stage", "epoch", "step", *KEYS]
    assert (last["stage"], last["epoch"], last["step"]) == ("train", 2, 18)
    for key in KEYS:
        assert last[key] == pytest.approx(expected[key.removeprefix("nc/")], rel=1e-5)
        assert trainer.callback_metrics[key].item() == last[key]


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


class StopAfter(Callback):
    def on_train_epoch_end(self, trainer, pl_module):
        trainer.should_stop = trainer.current_epoch == 4


def test_a_run_that_is_stopped_early_is_measured_at_its_end(tmp_path):
    callback = NeuralCollapseCallback(every_n_epochs=3)
    trainer, _ = fit(tmp_path, [callback, StopAfter()], max_epochs=50, logger=CSVLogger(tmp_path))
    assert [row["epoch"] for row in callback.history] == [0, 2, 4]
    assert trainer.callback_metrics["nc/nc1"].item() == callback.history[-1]["nc/nc1"]
    with open(f"{trainer.log_dir}/metrics.csv") as file:
        logged = [float(row["nc/nc1"]) for row in csv.DictReader(file) if row["nc/nc1"]]
    assert logged == [row["nc/nc1"] for row in callback.history]


def hooks_of(model):
    return [hook for module in model.modules() for hook in (*module._forward_hooks, *module._forward_pre_hooks)]


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


def test_plot_draws_a_panel_for_each_family(tmp_path):
    callback = NeuralCollapseCallback()
    fit(tmp_path, [callback], fast_dev_run=True)
    figure = callback.plot()
    assert [axis.get_title()[:3] for axis in figure.axes] == ["NC1", "NC2", "NC3"]
    figure.savefig(tmp_path / "figure.png")
    assert (tmp_path / "figure.png").stat().st_size > 10_000


@pytest.mark.parametrize("rich", [True, False])
def test_the_progress_bar_shows_the_pass_and_the_values(tmp_path, capsys, rich):
    from lightning.pytorch.callbacks import RichProgressBar, TQDMProgressBar

    bar = RichProgressBar() if rich else TQDMProgressBar()
    trainer, _ = fit(tmp_path, [NeuralCollapseCallback(strict=True), bar], enable_progress_bar=True)
    output = capsys.readouterr()
    text = output.out + output.err
    assert "nc/nc1" in text
    if not rich:  # rich draws only the last state when its output is no terminal
        assert "Neural collapse" in text
    assert {"nc/nc1", "nc/nc2_etf_centered", "nc/nc3_centered"} <= set(trainer.progress_bar_metrics)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"metrics": ("nc1", "nc2_eft")}, "unknown metric 'nc2_eft'; did you mean"),
        ({"layers": "layer1"}, r"write \['layer1'\]"),
        ({"every_n_epochs": 0}, "positive integer or a callable"),
        ({"num_classes": 1}, "at least 2"),
        ({"pool": "max"}, "'flatten', or a callable"),
        ({"target_fn": 3}, "target_fn must be a callable"),
    ],
)
def test_bad_arguments_are_refused_in_the_constructor(arguments, message):
    with pytest.raises(MisconfigurationException, match=message):
        NeuralCollapseCallback(**arguments)
