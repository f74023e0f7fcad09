"""The callback beside what else a Trainer can do: each works, or answers clearly."""

import copy

import pytest
import pytorch_lightning
import reference
import torch
from lightning.pytorch import LightningModule, Trainer, seed_everything
from lightning.pytorch.callbacks import (
    EarlyStopping,
    EMAWeightAveraging,
    GradientAccumulationScheduler,
    ModelCheckpoint,
    ProgressBar,
    StochasticWeightAveraging,
)
from lightning.pytorch.tuner import Tuner
from lightning.pytorch.utilities import CombinedLoader
from test_callback import DATA, ROWS, TARGET, Classifier, fit, hooks_of, loader
from torch import nn
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader

from lightning_nc import NeuralCollapseCallback, measure

MODES = [{}, {"mode": "online"}, {"stages": ("train", "validate")}]


def exact(model, rows=ROWS, target=TARGET):
    twin = copy.deepcopy(model).eval().float()
    with torch.no_grad():
        return reference.nc1_by_axes(twin.net[:4](rows).double().numpy(), target.numpy())


def last(callback, key="nc/nc1"):
    return next(row[key] for row in reversed(callback.history) if key in row)


@pytest.mark.parametrize("arguments", MODES)
@pytest.mark.parametrize(
    "trainer",
    [
        {"accumulate_grad_batches": 2},
        {"gradient_clip_val": 0.1},
        {"reload_dataloaders_every_n_epochs": 1},
        {"limit_train_batches": 0.5},
        {"limit_val_batches": 1},
        {"overfit_batches": 2},
        {"max_steps": 8},
        {"val_check_interval": 0.5},
        {"check_val_every_n_epoch": 2},
        {"fast_dev_run": True},
        {"num_sanity_val_steps": 0},
        {"barebones": False, "detect_anomaly": True},
        {"inference_mode": False},
        {"deterministic": True},
    ],
    ids=lambda options: ",".join(options),
)
def test_options_of_the_trainer(tmp_path, trainer, arguments):
    callback = NeuralCollapseCallback(strict=True, **arguments)
    runner, model = fit(tmp_path, [callback], val=loader(shuffle=False), **trainer)
    assert callback.history
    stages = {row["stage"] for row in callback.history}
    assert stages <= set(callback.stages)
    assert all(torch.isfinite(torch.tensor(last(callback))) for _ in stages)
    if not arguments and set(trainer) <= {
        "accumulate_grad_batches",
        "gradient_clip_val",
        "val_check_interval",
        "max_steps",
    }:
        assert last(callback) == pytest.approx(exact(model), rel=1e-5)
    assert runner.callback_metrics["nc/nc1"] == last(callback)
    assert hooks_of(model) == []


@pytest.mark.parametrize("arguments", MODES)
@pytest.mark.parametrize("precision", ["bf16-mixed", "16-mixed", "bf16-true", "64-true"])
def test_precisions(tmp_path, precision, arguments):
    callback = NeuralCollapseCallback(strict=True, **arguments)
    seed_everything(3, verbose=False)
    _, model = fit(tmp_path, [callback], precision=precision, val=loader(False))
    assert len([row for row in callback.history if row["stage"] == "train"]) == 3
    if arguments == {}:
        tolerance = 1e-6 if precision == "64-true" else 0.05  # of the forward pass; the moments are exact
        assert last(callback) == pytest.approx(exact(model), rel=tolerance)


@pytest.mark.parametrize(("where", "arguments"), [("around", {}), *(("inside", arguments) for arguments in MODES)])
def test_a_compiled_model(tmp_path, arguments, where):
    torch._dynamo.reset()

    class Compiled(Classifier):
        def __init__(self):
            super().__init__()
            if where == "inside":
                self.net = torch.compile(self.net, backend="eager")

    def run(model):
        seed_everything(3, verbose=False)
        callback = NeuralCollapseCallback(layers=["net.2"], strict=True, **arguments)
        fit(tmp_path, [callback], model=model, val=loader(False))
        return callback.history

    seed_everything(3, verbose=False)
    plain = run(Classifier())
    seed_everything(3, verbose=False)
    model = Compiled() if where == "inside" else torch.compile(Classifier(), backend="eager")
    compiled = run(model)
    assert [list(row) for row in compiled] == [list(row) for row in plain]
    for row, expected in zip(compiled, plain, strict=True):
        assert {key: value for key, value in row.items() if key != "stage"} == pytest.approx(
            {key: value for key, value in expected.items() if key != "stage"}, rel=1e-3
        )


@pytest.mark.parametrize("reentrant", [True, False])
def test_activation_checkpointing_runs_layers_twice_and_counts_them_once(tmp_path, reentrant):
    class WithoutNorm(Classifier):  # whose running statistics would be updated twice, as ever with checkpointing
        def __init__(self):
            super().__init__()
            self.net[1] = nn.Identity()

    class Checkpointed(WithoutNorm):
        def forward(self, x):
            return checkpoint(self.net, x.requires_grad_(self.training), use_reentrant=reentrant)

    for arguments in MODES:

        def run(kind):
            seed_everything(3, verbose=False)
            callback = NeuralCollapseCallback(layers=["net.2"], strict=True, **arguments)  # noqa: B023
            fit(tmp_path, [callback], model=kind(), val=loader(False))
            return callback.history

        assert run(Checkpointed) == run(WithoutNorm)


@pytest.mark.parametrize("arguments", MODES)
@pytest.mark.parametrize(
    "make",
    [
        lambda: EMAWeightAveraging(decay=0.9),
        lambda: StochasticWeightAveraging(swa_lrs=0.05, swa_epoch_start=1),
        lambda: GradientAccumulationScheduler({0: 1, 1: 2}),
        lambda: EarlyStopping("nc/nc1", patience=5),
        lambda: ModelCheckpoint(monitor="nc/nc1"),
    ],
    ids=["EMA", "SWA", "accumulation", "early stopping", "checkpoint"],
)
def test_other_callbacks(tmp_path, make, arguments):
    callback = NeuralCollapseCallback(strict=True, **arguments)
    _, model = fit(tmp_path, [make(), callback], val=loader(shuffle=False), max_epochs=4)
    assert len([row for row in callback.history if row["stage"] == "train"]) >= 4
    assert hooks_of(model) == []


@pytest.mark.parametrize("arguments", MODES)
def test_the_finders_of_learning_rate_and_batch_size(tmp_path, arguments):
    class Tunable(Classifier):
        def __init__(self):
            super().__init__()
            self.learning_rate, self.batch_size = 0.1, 5

        def train_dataloader(self):
            return torch.utils.data.DataLoader(DATA, self.batch_size, shuffle=True)

        def val_dataloader(self):
            return loader(shuffle=False)

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=self.learning_rate, momentum=0.9)

    callback, model = NeuralCollapseCallback(strict=True, **arguments), Tunable()
    trainer = Trainer(
        max_epochs=2,
        accelerator="cpu",
        callbacks=[callback],
        logger=False,
        default_root_dir=tmp_path,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
    )
    tuner = Tuner(trainer)
    tuner.scale_batch_size(model, mode="power", init_val=5, max_trials=2, steps_per_trial=1)
    tuner.lr_find(model, num_training=10)
    assert [row for row in callback.history if row["stage"] == "train"] == []  # trials are no epochs of the run
    trainer.fit(model)
    assert [row["epoch"] for row in callback.history if row["stage"] == "train"] == [0, 1]


def test_several_loaders_are_measured_as_they_pass_or_on_a_loader_given(tmp_path):
    class FromFirst(Classifier):
        def training_step(self, batch, batch_idx):
            return super().training_step(batch["a"], batch_idx)

    both = CombinedLoader({"a": loader(), "b": loader()}, "min_size")
    with pytest.warns(UserWarning, match="come from a dict.*pass dataloader="):
        fit(tmp_path, [NeuralCollapseCallback()], data=both, model=FromFirst())
    callback = NeuralCollapseCallback(
        mode="online",
        target_fn=lambda batch: batch["a"][1],
        forward_fn=lambda module, batch: module(batch["a"][0]),
        strict=True,
    )
    fit(tmp_path, [callback], data=both, model=FromFirst())
    assert len(callback.history) == 3


def test_manual_optimization(tmp_path):
    class Manual(Classifier):
        def __init__(self):
            super().__init__()
            self.automatic_optimization = False

        def training_step(self, batch, batch_idx):
            optimizer = self.optimizers()
            for _ in range(2):
                optimizer.zero_grad()
                self.manual_backward(super().training_step(batch, batch_idx))
                optimizer.step()

    for arguments in MODES:
        callback = NeuralCollapseCallback(strict=True, **arguments)
        _, model = fit(tmp_path, [callback], model=Manual(), val=loader(False))
        assert len([row for row in callback.history if row["stage"] == "train"]) == 3
        if not arguments:
            assert last(callback) == pytest.approx(exact(model), rel=1e-5)


def test_manual_optimization_that_lightning_does_not_count_is_measured_in_every_epoch(tmp_path):
    class Uncounted(Classifier):
        def __init__(self):
            super().__init__()
            self.automatic_optimization = False
            self.auxiliary = nn.Linear(6, 1)

        def training_step(self, batch, batch_idx):
            optimizer = self.optimizers(use_pl_optimizer=False)
            optimizer.zero_grad()
            self.manual_backward(self.auxiliary(batch[0]).square().mean())  # before the classifier has run
            self.manual_backward(super().training_step(batch, batch_idx))
            optimizer.step()

    for arguments in MODES:
        callback = NeuralCollapseCallback(strict=True, **arguments)
        trainer, _ = fit(tmp_path, [callback], model=Uncounted(), val=loader(False))
        assert trainer.global_step == 0
        assert [row["epoch"] for row in callback.history if row["stage"] == "train"] == [0, 1, 2]


def test_a_module_without_forward_is_run_through_its_validation_step_and_logs_once(tmp_path):
    class Silent(LightningModule):
        def __init__(self):
            super().__init__()
            self.net = Classifier().net

        def training_step(self, batch, batch_idx):
            return nn.functional.cross_entropy(self.net(batch[0]), batch[1])

        def validation_step(self, batch, batch_idx):
            self.log("val_loss", nn.functional.cross_entropy(self.net(batch[0]), batch[1]), on_epoch=True)

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.1)

    callback = NeuralCollapseCallback(strict=True)
    trainer, model = fit(tmp_path, [callback], model=Silent())
    assert "val_loss" not in trainer.callback_metrics  # no validation loop ran: what the pass logged is dropped
    assert last(callback) == pytest.approx(exact(model), rel=1e-5)

    class Mute(Silent):
        validation_step = LightningModule.validation_step

    with pytest.warns(UserWarning, match="neither a forward nor a validation_step"):
        fit(tmp_path, [NeuralCollapseCallback()], model=Mute())


def test_the_trainer_of_pytorch_lightning(tmp_path):
    class Other(pytorch_lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.net = Classifier().net

        def forward(self, x):
            return self.net(x)

        def training_step(self, batch, batch_idx):
            return nn.functional.cross_entropy(self(batch[0]), batch[1])

        def validation_step(self, batch, batch_idx):
            self(batch[0])

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.1)

    for arguments in MODES:
        callback = NeuralCollapseCallback(strict=True, **arguments)
        keep = pytorch_lightning.callbacks.ModelCheckpoint(tmp_path, monitor="nc/nc1", mode="min")
        trainer = pytorch_lightning.Trainer(
            max_epochs=2,
            accelerator="cpu",
            callbacks=[callback, keep],
            logger=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        model = Other()
        trainer.fit(model, loader(), loader(False))
        assert trainer.callback_metrics["nc/nc1"] == last(callback)
        assert keep.best_model_score == min(row["nc/nc1"] for row in callback.history if "nc/nc1" in row)
        if not arguments:
            assert last(callback) == pytest.approx(exact(model), rel=1e-5)


def test_the_callback_and_measure_agree(tmp_path):
    callback = NeuralCollapseCallback(layers=["net.*"], strict=True)
    _, model = fit(tmp_path, [callback])
    alone = measure(model, loader(shuffle=False), layers=["net.*"], progress=False)
    assert {f"nc/{name}": value for name, value in alone.items()} == pytest.approx(
        {key: value for key, value in callback.history[-1].items() if key.startswith("nc/")}, rel=1e-9
    )


def test_a_resumed_run_hands_its_last_values_to_what_monitors_them(tmp_path):
    def callbacks():
        keep = ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1)
        return [NeuralCollapseCallback(every_n_epochs=5, strict=True), EarlyStopping("nc/nc1", patience=100), keep]

    fit(tmp_path, callbacks(), max_epochs=3)
    runner, _ = fit(tmp_path, callbacks(), max_epochs=7, ckpt_path=tmp_path / "epoch=1.ckpt")
    assert runner.current_epoch == 7


def test_a_run_resumed_behind_its_last_measurement_does_not_measure_twice(tmp_path):
    keep = ModelCheckpoint(tmp_path, filename="{epoch}-{step}", save_top_k=-1, save_on_train_epoch_end=False)
    options = {"val": loader(False), "val_check_interval": 0.5, "max_epochs": 2}
    fit(tmp_path, [NeuralCollapseCallback(strict=True), keep], **options)
    callback = NeuralCollapseCallback(strict=True)
    fit(tmp_path, [callback], ckpt_path=tmp_path / "epoch=0-step=6.ckpt", **options)
    assert [(row["epoch"], row["step"]) for row in callback.history] == [(0, 6), (1, 12)]


@pytest.mark.parametrize(("n", "every", "measured"), [(2, 5, [1, 5, 9]), (5, 3, [4, 9])])
def test_of_seldom_validation_loops_those_behind_a_due_epoch_are_measured(tmp_path, n, every, measured):
    callback = NeuralCollapseCallback(stages=("validate",), every_n_epochs=every, strict=True)
    keep = ModelCheckpoint(tmp_path, monitor="nc/val/nc1")
    fit(tmp_path, [callback, keep], val=loader(False), max_epochs=10, check_val_every_n_epoch=n)
    assert [row["epoch"] for row in callback.history] == measured


def test_a_progress_bar_of_the_users_own_does_not_stand_in_the_way(tmp_path):
    class Own(ProgressBar):
        def __init__(self):
            super().__init__()
            self.progress = 0

        def disable(self):
            pass

    callback = NeuralCollapseCallback(strict=True)
    fit(tmp_path, [callback, Own()], enable_progress_bar=True)
    assert len(callback.history) == 3


class Normalising(DataLoader):
    def __iter__(self):
        for rows, target in super().__iter__():
            yield 3 * rows, target


def test_a_loader_that_makes_its_batches_itself_is_used_as_it_is(tmp_path):
    with pytest.warns(UserWarning, match="pass dataloader="):
        fit(tmp_path, [NeuralCollapseCallback()], data=Normalising(DATA, 8))
    callback = NeuralCollapseCallback(dataloader=Normalising(DATA, 8), strict=True)
    _, model = fit(tmp_path, [callback], data=Normalising(DATA, 8, shuffle=True))
    assert last(callback) == pytest.approx(exact(model, 3 * ROWS), rel=1e-5)
