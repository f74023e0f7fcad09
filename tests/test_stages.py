"""Validation and test stages, online mode, schedules, several callbacks, and when a measurement takes too long."""

import copy

import numpy as np
import pytest
import reference
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, Trainer, seed_everything
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from test_callback import DATA, KEYS, ROWS, TARGET, Classifier, fit, hooks_of, loader
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_nc import NeuralCollapseCallback, log_spaced

OTHER = TensorDataset(ROWS[:20] + 0.5, TARGET[:20])


def features_of(model, rows):
    """The classifier's input in eval mode."""
    twin = copy.deepcopy(model).eval()
    with torch.no_grad():
        return twin.net[:4](rows).double().numpy()


def nc1(model, dataset):
    return reference.nc1_by_axes(features_of(model, dataset.tensors[0]), dataset.tensors[1].numpy())


class Tested(Classifier):
    def test_step(self, batch, batch_idx, dataloader_idx=0):  # noqa: PT028
        self(batch[0])

    def predict_step(self, batch, batch_idx):
        return self(batch[0])


def test_validation_data_are_measured_from_the_batches_of_their_loop(tmp_path):
    callback = NeuralCollapseCallback(stages=("train", "validate"), layers=["net.2"], strict=True)
    calls = []

    class Counting(Classifier):
        def validation_step(self, batch, batch_idx):
            calls.append(len(batch[0]))
            super().validation_step(batch, batch_idx)

    trainer, model = fit(tmp_path, [callback], model=Counting(), val=DataLoader(OTHER, 8), num_sanity_val_steps=0)
    assert calls == [8, 8, 4] * 3  # no extra pass
    rows = [row for row in callback.history if row["stage"] == "validate"]
    assert [(row["epoch"], row["step"]) for row in rows] == [(0, 6), (1, 12), (2, 18)]
    assert set(rows[0]) >= {key.replace("nc/", "nc/val/") for key in KEYS} | {"nc/val/net.2/nc1"}
    assert rows[-1]["nc/val/nc1"] == pytest.approx(nc1(model, OTHER), rel=1e-5)
    assert trainer.callback_metrics["nc/val/nc1"].item() == rows[-1]["nc/val/nc1"]
    assert trainer.callback_metrics["nc/nc1"].item() == pytest.approx(nc1(model, DATA), rel=1e-5)
    assert hooks_of(model) == []


def test_test_data_and_validation_alone_return_the_values(tmp_path):
    callback = NeuralCollapseCallback(stages=("train", "validate", "test"), strict=True)
    trainer, model = fit(tmp_path, [callback], model=Tested(), logger=True)
    (tested,) = trainer.test(model, DataLoader(OTHER, 8), verbose=False)
    assert tested["nc/test/nc1"] == pytest.approx(nc1(model, OTHER), rel=1e-5)
    assert callback.history[-1]["stage"] == "test"
    alone = Trainer(accelerator="cpu", callbacks=[callback], logger=False, enable_progress_bar=False)
    (validated,) = alone.validate(model, DataLoader(OTHER, 8), verbose=False)
    assert validated["nc/val/nc1"] == tested["nc/test/nc1"]
    assert len(alone.predict(model, DataLoader(OTHER, 8))) == 3
    assert hooks_of(model) == []


def test_testing_an_older_checkpoint_keeps_the_history(tmp_path):
    callback = NeuralCollapseCallback(stages=("train", "test"), strict=True)
    keep = ModelCheckpoint(tmp_path, save_top_k=-1, filename="{epoch}")
    trainer, model = fit(tmp_path, [callback, keep], model=Tested())
    trainer.test(model, DataLoader(OTHER, 8), ckpt_path=tmp_path / "epoch=0.ckpt", verbose=False)
    assert [(row["stage"], row["epoch"]) for row in callback.history[:3]] == [("train", 0), ("train", 1), ("train", 2)]
    assert callback.history[3]["stage"] == "test"


def test_a_callback_for_training_alone_leaves_validate_test_and_predict_in_peace(tmp_path):
    callback = NeuralCollapseCallback(strict=True)
    trainer = Trainer(accelerator="cpu", callbacks=[callback], logger=False, enable_progress_bar=False)
    model = Tested()
    assert "nc/val/nc1" not in trainer.validate(model, loader(False), verbose=False)[0]
    trainer.test(model, loader(False), verbose=False)
    trainer.predict(model, loader(False))
    assert callback.history == []


def test_each_of_several_loaders_has_keys_of_its_own(tmp_path):
    callback = NeuralCollapseCallback(stages=("test",), strict=True)
    trainer = Trainer(accelerator="cpu", callbacks=[callback], logger=False, enable_progress_bar=False)
    model = Tested()
    trainer.test(model, [DataLoader(DATA, 8), DataLoader(OTHER, 8)], verbose=False)
    assert trainer.callback_metrics["nc/test/nc1"].item() == pytest.approx(nc1(model, DATA), rel=1e-5)
    assert trainer.callback_metrics["nc/test_1/nc1"].item() == pytest.approx(nc1(model, OTHER), rel=1e-5)


def test_a_monitor_of_the_validation_stage_sees_the_value_of_this_epoch(tmp_path):
    callback = NeuralCollapseCallback(stages=("validate",), strict=True)
    checkpoint = ModelCheckpoint(tmp_path, monitor="nc/val/nc1", save_top_k=-1, filename="{epoch}")
    stopper = EarlyStopping("nc/val/nc1", patience=100)
    fit(tmp_path, [callback, checkpoint, stopper], val=loader(shuffle=False), val_check_interval=0.5)
    history = [row["nc/val/nc1"] for row in callback.history]
    assert len(history) == 6
    assert sorted(value.item() for value in checkpoint.best_k_models.values()) == sorted(history)


class Features(Callback):
    """Independently, by a hook of its own: what the classifier is given in the training steps of an epoch."""

    def on_train_epoch_start(self, trainer, pl_module):
        self.rows, self.target = [], []
        self.handle = pl_module.net[4].register_forward_pre_hook(
            lambda module, args: self.rows.append(args[0].detach())
        )

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.target.append(batch[1])

    def on_train_epoch_end(self, trainer, pl_module):
        self.handle.remove()


def test_online_mode_measures_the_training_features_as_they_pass(tmp_path):
    callback, independent = NeuralCollapseCallback(mode="online", strict=True), Features()
    trainer, model = fit(tmp_path, [callback, independent])
    rows, target = torch.cat(independent.rows).double().numpy(), torch.cat(independent.target).numpy()
    assert len(rows) == len(target) == 45
    head = model.net[4]
    expected = reference.all_metrics(
        rows, target, head.weight.detach().double().numpy(), head.bias.detach().double().numpy()
    )
    for key in KEYS:
        assert callback.history[-1][key] == pytest.approx(expected[key.removeprefix("nc/")], rel=1e-5)
        assert trainer.callback_metrics[key].item() == callback.history[-1][key]
    assert [row["epoch"] for row in callback.history] == [0, 1, 2]
    assert hooks_of(model) == []


def test_an_epoch_resumed_in_its_middle_is_marked_as_partial(tmp_path):
    class Halfway(ModelCheckpoint):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            if (trainer.current_epoch, batch_idx) == (1, 2):
                trainer.save_checkpoint(tmp_path / "halfway.ckpt")

    fit(tmp_path, [NeuralCollapseCallback(mode="online"), Halfway(save_top_k=0)])
    callback = NeuralCollapseCallback(mode="online", strict=True)
    fit(tmp_path, [callback], ckpt_path=tmp_path / "halfway.ckpt")
    assert [(row["epoch"], row.get("partial", False)) for row in callback.history] == [
        (0, False),
        (1, True),
        (2, False),
    ]


def test_a_log_spaced_schedule_ships(tmp_path):
    callback = NeuralCollapseCallback(every_n_epochs=log_spaced(3), mode="online", strict=True)
    fit(tmp_path, [callback], max_epochs=12)
    assert [row["epoch"] + 1 for row in callback.history] == [1, 3, 5, 10, 12]
    with pytest.raises(ValueError, match="positive integer"):
        log_spaced(0)


def test_streams_of_epochs_that_are_not_due_are_not_measured(tmp_path):
    callback = NeuralCollapseCallback(stages=("train", "validate"), mode="online", every_n_epochs=3, strict=True)
    fit(tmp_path, [callback], max_epochs=5, val=loader(False))
    assert [(row["stage"], row["epoch"]) for row in callback.history] == [
        (stage, epoch) for epoch in (0, 2, 4) for stage in ("train", "validate")
    ]


def test_online_mode_reaches_max_steps_in_the_middle_of_an_epoch(tmp_path):
    callback = NeuralCollapseCallback(mode="online", every_n_epochs=10, strict=True)
    fit(tmp_path, [callback], max_epochs=10, max_steps=15)
    assert [(row["epoch"], row["step"]) for row in callback.history] == [(0, 6), (2, 15)]


@pytest.mark.parametrize("arguments", [{"mode": "online"}, {"stages": ("validate",)}])
def test_what_cannot_be_measured_as_it_passes_warns_once_and_training_goes_on(tmp_path, recwarn, arguments):
    class Functional(Classifier):
        def forward(self, x):
            return nn.functional.linear(self.net[:4](x), self.net[4].weight)

    callback = NeuralCollapseCallback(**arguments)
    trainer, _ = fit(tmp_path, [callback], model=Functional(), val=loader(False))
    messages = [str(warning.message) for warning in recwarn if "cannot be measured" in str(warning.message)]
    assert len(messages) == 1
    assert "training goes on" in messages[0]
    assert trainer.global_step == 18
    assert callback.history == []
    with pytest.raises(LookupError, match=r"self\.fc\(x\) instead of F\.linear"):
        fit(tmp_path, [NeuralCollapseCallback(strict=True, **arguments)], model=Functional(), val=loader(False))


def test_several_callbacks_live_together_unless_they_would_write_under_the_same_keys(tmp_path):
    train, val = NeuralCollapseCallback(strict=True), NeuralCollapseCallback(stages=("validate",), strict=True)
    more = NeuralCollapseCallback(layers=["net.0"], metrics=("nc1_trace",), strict=True)
    trainer, _ = fit(tmp_path, [train, val, more], val=loader(False))
    assert {"nc/nc1", "nc/val/nc1", "nc/net.0/nc1_trace"} <= set(trainer.callback_metrics)
    assert len({callback.state_key for callback in (train, val, more)}) == 3
    with pytest.raises(MisconfigurationException, match="under the same keys"):
        fit(tmp_path, [NeuralCollapseCallback(), NeuralCollapseCallback(mode="online")])


def test_a_stage_without_a_loop_is_said_at_the_start(tmp_path):
    with pytest.warns(UserWarning, match="stages has 'validate', but this run has no validation loop"):
        fit(tmp_path, [NeuralCollapseCallback(stages=("train", "validate"), strict=True)])


def test_a_layer_that_is_not_there_is_said_once_and_the_others_are_measured(tmp_path):
    callback = NeuralCollapseCallback(layers=["net.2", "net.two"], stages=("train", "validate"))
    with pytest.warns(UserWarning, match=r"is named 'net\.two'; near: .*what can be found is measured") as caught:
        fit(tmp_path, [callback], val=loader(False))
    assert sum("net.two" in str(warning.message) for warning in caught) == 1
    assert "nc/net.2/nc1" in callback.history[-2]
    assert "nc/val/net.2/nc1" in callback.history[-1]
    with pytest.raises(LookupError, match=r"is named 'net\.two'"):
        fit(tmp_path, [NeuralCollapseCallback(layers=["net.two"], strict=True)])


def test_a_pass_that_takes_more_than_a_quarter_of_the_epoch_is_said_once(tmp_path, caplog, monkeypatch):
    clock = iter(range(0, 10_000, 2))  # every look at the clock is two seconds later
    monkeypatch.setattr("lightning_nc.callback.perf_counter", lambda: float(next(clock)))
    with caplog.at_level("INFO"):
        fit(tmp_path, [NeuralCollapseCallback(strict=True)])
    said = [record.message for record in caplog.records if "measuring neural collapse took" in record.message]
    assert len(said) == 1
    assert "every_n_epochs" in said[0]
    assert "mode='online'" in said[0]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"stages": ("train", "val")}, "any of 'train', 'validate', 'test', got"),
        ({"stages": "train"}, "must be a sequence"),
        ({"stages": ()}, "must be a sequence"),
        ({"every_n_epochs": log_spaced}, r"write log_spaced\(\)"),
        ({"mode": "offline"}, "'exact' or 'online'"),
        ({"mode": "online", "dataloader": []}, "leave one of them out"),
    ],
)
def test_arguments_that_do_not_fit_are_refused_in_the_constructor(arguments, message):
    with pytest.raises(MisconfigurationException, match=message):
        NeuralCollapseCallback(**arguments)


def test_measuring_as_it_passes_changes_nothing_in_the_training(tmp_path):
    def run(callbacks):
        seed_everything(3, verbose=False)
        _, model = fit(tmp_path, callbacks, val=loader(False))
        return [*model.state_dict().values()], model.seen, torch.get_rng_state(), np.random.get_state()[1]

    plain = run([])
    for arguments in (
        {"mode": "online"},
        {"stages": ("train", "validate")},
        {"mode": "online", "stages": ("train", "validate")},
    ):
        measured = run([NeuralCollapseCallback(strict=True, **arguments)])
        assert all(torch.equal(a, b) for a, b in zip(plain[0], measured[0], strict=True))
        assert plain[1] == measured[1]
        assert torch.equal(plain[2], measured[2])
        assert (plain[3] == measured[3]).all()


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
