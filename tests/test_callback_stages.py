"""Validation and test stages, and online mode: what is measured in loops that run anyway."""

import pytest
import reference
import torch
from conftest import (
    DATA,
    KEYS,
    OTHER,
    Classifier,
    ClassifierInputs,
    fit,
    hooks_of,
    loader,
    true_nc1,
)
from lightning.pytorch import Trainer, seed_everything
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from torch import nn
from torch.utils.data import DataLoader

from lightning_nc import NeuralCollapseCallback


class WithTest(Classifier):
    def test_step(self, batch, batch_idx, dataloader_idx=0):
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
    assert rows[-1]["nc/val/nc1"] == pytest.approx(true_nc1(model, *OTHER.tensors), rel=1e-5)
    assert trainer.callback_metrics["nc/val/nc1"].item() == rows[-1]["nc/val/nc1"]
    assert trainer.callback_metrics["nc/nc1"].item() == pytest.approx(true_nc1(model, *DATA.tensors), rel=1e-5)
    assert hooks_of(model) == []


def test_test_data_and_validation_alone_return_the_values(tmp_path):
    callback = NeuralCollapseCallback(stages=("train", "validate", "test"), strict=True)
    trainer, model = fit(tmp_path, [callback], model=WithTest(), logger=True)
    (tested,) = trainer.test(model, DataLoader(OTHER, 8), verbose=False)
    assert tested["nc/test/nc1"] == pytest.approx(true_nc1(model, *OTHER.tensors), rel=1e-5)
    assert callback.history[-1]["stage"] == "test"
    alone = Trainer(accelerator="cpu", callbacks=[callback], logger=False, enable_progress_bar=False)
    (validated,) = alone.validate(model, DataLoader(OTHER, 8), verbose=False)
    assert validated["nc/val/nc1"] == tested["nc/test/nc1"]
    assert len(alone.predict(model, DataLoader(OTHER, 8))) == 3
    assert hooks_of(model) == []


def test_testing_an_older_checkpoint_keeps_the_history(tmp_path):
    callback = NeuralCollapseCallback(stages=("train", "test"), strict=True)
    keep = ModelCheckpoint(tmp_path, save_top_k=-1, filename="{epoch}")
    trainer, model = fit(tmp_path, [callback, keep], model=WithTest())
    trainer.test(model, DataLoader(OTHER, 8), ckpt_path=tmp_path / "epoch=0.ckpt", verbose=False)
    assert [(row["stage"], row["epoch"]) for row in callback.history[:3]] == [("train", 0), ("train", 1), ("train", 2)]
    assert callback.history[3]["stage"] == "test"


def test_a_callback_for_training_does_nothing_in_validate_test_and_predict(tmp_path):
    callback = NeuralCollapseCallback(strict=True)
    trainer = Trainer(accelerator="cpu", callbacks=[callback], logger=False, enable_progress_bar=False)
    model = WithTest()
    assert "nc/val/nc1" not in trainer.validate(model, loader(False), verbose=False)[0]
    trainer.test(model, loader(False), verbose=False)
    trainer.predict(model, loader(False))
    assert callback.history == []


def test_each_of_several_loaders_has_keys_of_its_own(tmp_path):
    callback = NeuralCollapseCallback(stages=("test",), strict=True)
    trainer = Trainer(accelerator="cpu", callbacks=[callback], logger=False, enable_progress_bar=False)
    model = WithTest()
    trainer.test(model, [DataLoader(DATA, 8), DataLoader(OTHER, 8)], verbose=False)
    assert trainer.callback_metrics["nc/test/nc1"].item() == pytest.approx(true_nc1(model, *DATA.tensors), rel=1e-5)
    assert trainer.callback_metrics["nc/test_1/nc1"].item() == pytest.approx(true_nc1(model, *OTHER.tensors), rel=1e-5)


def test_a_monitor_of_the_validation_stage_sees_the_value_of_this_epoch(tmp_path):
    callback = NeuralCollapseCallback(stages=("validate",), strict=True)
    checkpoint = ModelCheckpoint(tmp_path, monitor="nc/val/nc1", save_top_k=-1, filename="{epoch}")
    stopper = EarlyStopping("nc/val/nc1", patience=100)
    fit(tmp_path, [callback, checkpoint, stopper], val=loader(shuffle=False), val_check_interval=0.5)
    history = [row["nc/val/nc1"] for row in callback.history]
    assert len(history) == 6
    assert sorted(value.item() for value in checkpoint.best_k_models.values()) == sorted(history)


@pytest.mark.parametrize(("n", "every", "measured"), [(2, 5, [1, 5, 9]), (5, 3, [4, 9])])
def test_validation_is_measured_in_the_first_loop_after_an_epoch_that_is_due(tmp_path, n, every, measured):
    callback = NeuralCollapseCallback(stages=("validate",), every_n_epochs=every, strict=True)
    keep = ModelCheckpoint(tmp_path, monitor="nc/val/nc1")
    fit(tmp_path, [callback, keep], val=loader(False), max_epochs=10, check_val_every_n_epoch=n)
    assert [row["epoch"] for row in callback.history] == measured


def test_a_stage_without_a_loop_causes_a_warning_at_the_start(tmp_path):
    with pytest.warns(UserWarning, match="stages has 'validate', but this run has no validation loop"):
        fit(tmp_path, [NeuralCollapseCallback(stages=("train", "validate"), strict=True)])


# ------------------------------------------------------------------------------------------------------------ online mode


def test_online_mode_measures_the_features_of_the_training_steps(tmp_path):
    callback, independent = NeuralCollapseCallback(mode="online", strict=True), ClassifierInputs()
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

    used = NeuralCollapseCallback(mode="online", strict=True)
    fit(tmp_path, [used, Halfway(save_top_k=0)])
    for callback in (NeuralCollapseCallback(mode="online", strict=True), used):
        fit(tmp_path, [callback], ckpt_path=tmp_path / "halfway.ckpt")
        assert [(row["epoch"], row.get("partial", False)) for row in callback.history] == [
            (0, False),
            (1, True),
            (2, False),
        ]


def test_loops_of_epochs_that_are_not_due_are_not_measured(tmp_path):
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
def test_a_loop_that_cannot_be_measured_warns_once_and_training_goes_on(tmp_path, recwarn, arguments):
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


def test_layers_without_a_shape_get_theirs_from_the_training(tmp_path):
    class Lazy(Classifier):
        def __init__(self):
            super().__init__()
            self.net = nn.Sequential(
                nn.LazyLinear(8), nn.LazyBatchNorm1d(), nn.ReLU(), nn.Dropout(0.2), nn.LazyLinear(3)
            )

    def run(callbacks):
        seed_everything(3, verbose=False)
        return list(fit(tmp_path, callbacks, model=Lazy())[1].state_dict().values())

    callback = NeuralCollapseCallback(mode="online", num_classes=3, strict=True)
    assert all(torch.equal(a, b) for a, b in zip(run([]), run([callback]), strict=True))
    assert [row["epoch"] for row in callback.history] == [0, 1, 2]


def test_a_step_that_does_not_call_the_model_is_not_measured(tmp_path):
    class Skipping(Classifier):
        def training_step(self, batch, batch_idx):
            return None if batch_idx == 2 else super().training_step(batch, batch_idx)

    callback = NeuralCollapseCallback(mode="online", strict=True)
    fit(tmp_path, [callback], model=Skipping())
    assert len(callback.history) == 3
    with pytest.warns(UserWarning, match="was not called in the forward pass"):
        fit(tmp_path, [NeuralCollapseCallback(mode="online")], model=NeverCalled())


class NeverCalled(Classifier):
    def training_step(self, batch, batch_idx):
        return self.net[0].weight.sum()


def test_a_step_that_calls_the_classifier_twice_causes_a_warning(tmp_path):
    class Twice(Classifier):
        def training_step(self, batch, batch_idx):
            self(batch[0].flip(0))
            return super().training_step(batch, batch_idx)

    with pytest.warns(UserWarning, match="is called several times with 8 rows; the last call is measured"):
        fit(tmp_path, [NeuralCollapseCallback(mode="online", strict=True)], model=Twice())
