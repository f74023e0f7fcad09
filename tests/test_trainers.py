"""What the callback asks of a Trainer, and the callback beside everything else that a Trainer can do."""

import csv
import shutil
from types import SimpleNamespace

import pytest
import pytorch_lightning
import torch
from conftest import DATA, MODES, Classifier, StopAfter, fit, hooks_of, last, loader, true_nc1
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from lightning.pytorch.callbacks import (
    EarlyStopping,
    GradientAccumulationScheduler,
    ModelCheckpoint,
    ProgressBar,
    RichProgressBar,
    StochasticWeightAveraging,
    TQDMProgressBar,
)
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.tuner import Tuner
from lightning.pytorch.utilities import CombinedLoader
from torch import nn
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, DistributedSampler, IterableDataset
from versions import EMAWeightAveraging

from lightning_nc import NeuralCollapseCallback
from lightning_nc.measuring.collector import Collector
from lightning_nc.measuring.probe import Probe
from lightning_nc.measuring.snapshot import fingerprint
from lightning_nc.trainers import (
    has_other_weights,
    is_last_epoch,
    log_after_training,
    log_values,
    move_to_end,
    own_samples_of,
    ranks_of,
    run_exact_pass,
)


class Asking(Callback):
    """Asks a function of the trainer at the start of every batch, and keeps the answers by epoch."""

    def __init__(self, function):
        self.function, self.answers = function, {}

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.answers.setdefault(trainer.current_epoch, []).append(self.function(trainer))


def asked(tmp_path, function, callbacks=(), **options):
    asking = Asking(function)
    fit(tmp_path, [*callbacks, asking], **options)
    return asking.answers


@pytest.mark.parametrize(
    ("options", "last_epoch"),
    [
        ({"max_epochs": 3}, 2),
        ({"max_epochs": 9, "max_steps": 12}, 1),
        ({"max_epochs": 9, "max_steps": 15}, 2),
        ({"max_epochs": 3, "limit_train_batches": 2}, 2),
        ({"max_epochs": 3, "accumulate_grad_batches": 2}, 2),
    ],
    ids=str,
)
def test_the_last_epoch_is_known_at_its_start(tmp_path, options, last_epoch):
    answers = asked(tmp_path, is_last_epoch, **options)
    assert {epoch: values[0] for epoch, values in answers.items()} == {
        epoch: epoch == last_epoch for epoch in range(last_epoch + 1)
    }


def test_an_epoch_that_was_stopped_is_the_last_unless_more_are_required(tmp_path):
    class StopAtOnce(Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            trainer.should_stop = True

    assert asked(tmp_path, is_last_epoch, [StopAtOnce()], max_epochs=9) == {0: [True]}
    answers = asked(tmp_path, is_last_epoch, [StopAtOnce()], max_epochs=9, min_epochs=2)
    assert [values[0] for values in answers.values()] == [False, True]


def measured(trainer, forward_fn=None, dataloader=None):
    """A collector after an exact pass."""
    collector = Collector(Probe(forward_fn=forward_fn), ("nc1",))
    assert run_exact_pass(trainer, trainer.lightning_module, collector, dataloader)
    return collector


def test_a_pass_takes_the_training_data_of_an_epoch_each_once(tmp_path):
    class Stream(IterableDataset):
        def __iter__(self):
            yield from DATA

    def samples(trainer):
        return measured(trainer).samples

    assert asked(tmp_path, samples, max_epochs=1)[0] == [45] * 6
    assert asked(tmp_path, samples, data=loader(drop_last=True), max_epochs=1)[0] == [45] * 5
    assert asked(tmp_path, samples, limit_train_batches=2, max_epochs=1)[0] == [16] * 2
    assert asked(tmp_path, samples, data=DataLoader(Stream(), 8), max_epochs=1)[0] == [8, 16, 24, 32, 40, 45]


def test_a_pass_over_other_data_takes_all_of_them(tmp_path):
    for given in (loader(), [DATA[:]]):
        passed = lambda trainer, given=given: measured(trainer, dataloader=given).samples  # noqa: E731
        assert asked(tmp_path, passed, max_epochs=1, limit_train_batches=2)[0] == [45, 45]


def test_a_pass_converts_batches_and_runs_the_hooks_of_batch_transfer(tmp_path):
    class Hooked(Classifier):
        def on_before_batch_transfer(self, batch, dataloader_idx):
            return batch[0] + 1, batch[1]

        def on_after_batch_transfer(self, batch, dataloader_idx):
            return 2 * batch[0], batch[1]

    batches = []

    def forward_fn(module, batch):
        batches.append(batch)
        return module(batch[0])

    passed = lambda trainer: measured(trainer, forward_fn, [DATA[:]]).samples  # noqa: E731
    asked(tmp_path, passed, model=Hooked(), max_epochs=1, limit_train_batches=1, precision="64-true")
    rows, target = batches[-1]
    assert rows.dtype == torch.float64
    torch.testing.assert_close(rows, 2 * (DATA[:][0].double() + 1))
    assert torch.equal(target, DATA[:][1])


def test_the_samples_of_a_rank_are_counted_for_a_distributed_sampler_alone():
    shared = DataLoader(DATA, 8, sampler=DistributedSampler(DATA, 2, 1))
    one, two = SimpleNamespace(world_size=1), SimpleNamespace(world_size=2)
    for loaders in ([loader(), shared], {"a": loader(), "b": shared}):
        assert [own_samples_of(two, loaders, index, 0) for index in range(3)] == [None, 22, None]
        assert own_samples_of(one, loaders, 1, 0) is None
    assert own_samples_of(two, shared, 0, 0) == 22


def test_a_single_process_has_no_ranks(tmp_path):
    assert asked(tmp_path, ranks_of, max_epochs=1, limit_train_batches=1)[0] == [None]


def test_every_step_changes_the_fingerprint_of_the_weights(tmp_path):
    seen = []

    def changed(trainer):
        before, model = (seen or [""])[-1], trainer.lightning_module
        seen.append(fingerprint(model))
        return has_other_weights(trainer, model, before), has_other_weights(trainer, model, seen[-1])

    assert asked(tmp_path, changed, max_epochs=1)[0] == [(True, False)] * 6


def test_values_are_logged_and_shown_to_callbacks_in_their_own_precision(tmp_path):
    value = 1 / 3

    def logs(trainer):
        log_values(trainer, trainer.lightning_module, {"nc/nc1": value, "nc/x": 2 * value})
        return trainer.callback_metrics["nc/nc1"].item()

    logger = CSVLogger(tmp_path, name="", version="")
    assert set(asked(tmp_path, logs, max_epochs=1, logger=logger)[0]) == {value}
    rows = [row for row in csv.DictReader((tmp_path / "metrics.csv").open()) if row["nc/nc1"]]
    assert [(float(row["nc/nc1"]), float(row["nc/x"])) for row in rows] == [(value, 2 * value)]


def test_values_after_the_training_reach_loggers_and_callbacks_with_their_epoch(tmp_path):
    trainer, model = fit(tmp_path, [], max_epochs=2, logger=CSVLogger(tmp_path, name="", version=""))
    log_after_training(trainer, model, {"nc/nc1": 0.5}, epoch=1)
    trainer.logger.save()
    assert trainer.callback_metrics["nc/nc1"].item() == 0.5
    rows = [row for row in csv.DictReader((tmp_path / "metrics.csv").open()) if row["nc/nc1"]]
    assert [(float(row["nc/nc1"]), row["epoch"], row["step"]) for row in rows] == [(0.5, "1", "11")]


def test_a_logger_that_fails_at_the_start_or_after_the_last_epoch_does_not_end_the_training(tmp_path):
    class Stopped(Classifier):
        def on_train_epoch_end(self):  # after the callbacks, so that the epoch was not known to be the last
            self.trainer.should_stop = self.current_epoch == 4

    def gone(*args, **kwargs):
        raise ConnectionError("the server is gone")

    class Gone(CSVLogger):
        experiment = SimpleNamespace(define_metric=gone, add_figure=gone)
        log_hyperparams = log_graph = finalize = save = lambda self, *args: None

        def log_metrics(self, metrics, step=None):
            if "nc/nc1" in metrics and metrics["epoch"] == 4:
                gone()

    callback, keep = NeuralCollapseCallback(every_n_epochs=100), ModelCheckpoint(tmp_path, save_last=True)
    with pytest.warns(UserWarning, match=r"could not be logged; callback\.history has them: Conn") as caught:
        fit(tmp_path, [callback, keep], model=Stopped(), max_epochs=9, logger=Gone(tmp_path))
    assert sum("the server is gone" in str(w.message) for w in caught) == 3  # at the start, the values, the figures
    assert [row["epoch"] for row in callback.history] == [0, 4]
    assert (tmp_path / "last.ckpt").is_file()


def test_the_callback_is_placed_after_all_others_but_before_checkpoints():
    callback, average, stop, keep = NeuralCollapseCallback(), EMAWeightAveraging(), StopAfter(), ModelCheckpoint()
    trainer = Trainer(
        callbacks=[callback, average, stop, keep], logger=False, enable_progress_bar=False, accelerator="cpu"
    )
    move_to_end(trainer, callback)
    ours = [other for other in trainer.callbacks if other in (callback, average, stop, keep)]
    assert ours == [average, stop, callback, keep]


# ------------------------------------------------------------------------------------------------ options and precisions


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
def test_the_callback_works_with_every_option_of_the_trainer(tmp_path, trainer, arguments):
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
        assert last(callback) == pytest.approx(true_nc1(model), rel=1e-5)
    assert runner.callback_metrics["nc/nc1"] == last(callback)
    assert hooks_of(model) == []


@pytest.mark.parametrize("arguments", MODES)
@pytest.mark.parametrize("precision", ["bf16-mixed", "16-mixed", "bf16-true", "64-true"])
def test_every_precision_is_measured_up_to_its_rounding(tmp_path, precision, arguments):
    callback = NeuralCollapseCallback(strict=True, **arguments)
    seed_everything(3, verbose=False)
    _, model = fit(tmp_path, [callback], precision=precision, val=loader(False))
    assert len([row for row in callback.history if row["stage"] == "train"]) == 3
    if arguments == {}:
        tolerance = 1e-6 if precision == "64-true" else 0.05  # of the forward pass; the moments are exact
        assert last(callback) == pytest.approx(true_nc1(model), rel=tolerance)


@pytest.mark.parametrize(("where", "arguments"), [("around", {}), *(("inside", arguments) for arguments in MODES)])
def test_a_compiled_model_gives_the_rows_of_the_plain_one(tmp_path, arguments, where):
    torch.compiler.reset()

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
        assert {key: value for key, value in row.items() if "nc/" in key} == pytest.approx(
            {key: value for key, value in expected.items() if "nc/" in key}, rel=1e-3
        )


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler")
@pytest.mark.parametrize(("mode", "error"), [("exact", 0), ("online", 1e-5)])
def test_compiled_training_is_the_same_in_exact_mode_and_up_to_rounding_in_online_mode(tmp_path, mode, error):
    def train(callbacks):
        torch.compiler.reset()
        seed_everything(3, verbose=False)
        model = Classifier()
        model.net = torch.compile(model.net)
        fit(tmp_path, callbacks, model=model, max_epochs=2)
        return [*model.state_dict().values(), torch.get_rng_state()]

    measured = train([NeuralCollapseCallback(mode=mode, strict=True)])
    for a, b in zip(train([]), measured, strict=True):
        assert (a.double() - b.double()).abs().max() <= error * a.double().abs().max()


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


# ------------------------------------------------------------------------------------------ other callbacks and progress bars


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
def test_the_callback_works_with_other_callbacks(tmp_path, make, arguments):
    callback = NeuralCollapseCallback(strict=True, **arguments)
    _, model = fit(tmp_path, [make(), callback], val=loader(shuffle=False), max_epochs=4)
    assert len([row for row in callback.history if row["stage"] == "train"]) >= 4
    assert hooks_of(model) == []


@pytest.mark.parametrize("arguments", MODES)
def test_the_finders_of_learning_rate_and_batch_size_leave_no_rows(tmp_path, arguments):
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


@pytest.mark.parametrize("rich", [True, False])
def test_the_progress_bar_shows_the_pass_and_the_values(tmp_path, capsys, rich):
    bar = RichProgressBar() if rich else TQDMProgressBar()
    trainer, _ = fit(tmp_path, [NeuralCollapseCallback(strict=True), bar], enable_progress_bar=True)
    output = capsys.readouterr()
    text = output.out + output.err
    assert "nc/nc1" in text
    if not rich:  # rich draws only the last state when its output is no terminal
        assert "Neural collapse" in text
    assert {"nc/nc1", "nc/nc2_etf_centered", "nc/nc3_centered"} <= set(trainer.progress_bar_metrics)


def test_the_callback_works_with_a_custom_progress_bar(tmp_path):
    class Own(ProgressBar):
        def __init__(self):
            super().__init__()
            self.progress = 0

        def disable(self):
            pass

    callback = NeuralCollapseCallback(strict=True)
    fit(tmp_path, [callback, Own()], enable_progress_bar=True)
    assert len(callback.history) == 3


# -------------------------------------------------------------------------------------------------- other ways to train


def test_several_training_loaders_are_measured_in_online_mode(tmp_path):
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


def test_manual_optimization_is_measured(tmp_path):
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
            assert last(callback) == pytest.approx(true_nc1(model), rel=1e-5)


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
    assert last(callback) == pytest.approx(true_nc1(model), rel=1e-5)

    class Mute(Silent):
        validation_step = LightningModule.validation_step

    with pytest.warns(UserWarning, match="neither a forward nor a validation_step"):
        fit(tmp_path, [NeuralCollapseCallback()], model=Mute())


def test_the_callback_works_with_the_trainer_of_pytorch_lightning(tmp_path):
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
            assert last(callback) == pytest.approx(true_nc1(model), rel=1e-5)
