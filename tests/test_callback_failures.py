"""What a kill, an interrupt or an error leaves behind, in the measurement and in the user's own code."""

import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from conftest import DATA, MODES, Classifier, fit, hooks_of, loader
from lightning.pytorch import LightningModule, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn
from torch.utils.data import DataLoader

from lightning_nc import NeuralCollapseCallback

KILLED = """
import signal, sys, time
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell starts what runs in the background without it
sys.path.insert(0, sys.argv[2])
from conftest import Classifier, fit
from lightning_nc import NeuralCollapseCallback
from lightning.pytorch.callbacks import ModelCheckpoint

class Slow(Classifier):
    epochs = 0

    def on_train_epoch_end(self):
        self.epochs += 1

    def forward(self, x):
        if not self.training and self.epochs == 2:  # in the third measurement
            print("measuring", flush=True)
            time.sleep(60)
        return super().forward(x)

if __name__ == "__main__":
    keep = ModelCheckpoint(sys.argv[1], save_last=True, save_top_k=-1, filename="{epoch}")
    fit(sys.argv[1], [NeuralCollapseCallback(), keep], model=Slow(), max_epochs=5)
"""


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_a_run_that_is_killed_while_it_measures_can_be_resumed(tmp_path, how):
    script = tmp_path / "run.py"
    script.write_text(KILLED)
    command = [sys.executable, script, tmp_path, os.path.dirname(__file__)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    assert process.stdout.readline() == "measuring\n"
    time.sleep(0.2)
    process.send_signal(how)
    assert process.wait(timeout=60) != 0
    process.stdout.close()
    saved = torch.load(tmp_path / "last.ckpt", weights_only=True)
    ((_, state),) = ((key, value) for key, value in saved["callbacks"].items() if "NeuralCollapse" in key)
    assert [row["epoch"] for row in state["history"]] == [0, 1]
    callback = NeuralCollapseCallback(strict=True)
    fit(tmp_path, [callback], max_epochs=4, ckpt_path=tmp_path / "last.ckpt")
    assert [row["epoch"] for row in callback.history] == [0, 1, 2, 3]


@pytest.mark.parametrize("arguments", MODES)
def test_a_run_that_is_resumed_after_the_validation_of_its_last_epoch_gets_no_other_row(tmp_path, arguments):
    keep = ModelCheckpoint(tmp_path, save_last=True, save_on_train_epoch_end=False)
    first, again = NeuralCollapseCallback(**arguments), NeuralCollapseCallback(strict=True, **arguments)
    fit(tmp_path, [first, keep], val=loader(False))
    fit(tmp_path, [again], val=loader(False), ckpt_path=tmp_path / "last.ckpt")
    assert again.history[:3] == first.history[:3]
    assert [(row["stage"], row["epoch"]) for row in again.history] == [
        (row["stage"], row["epoch"]) for row in first.history
    ]


@pytest.mark.parametrize("arguments", MODES)
@pytest.mark.parametrize("step", ["training_step", "validation_step"])
def test_an_error_in_the_users_step_is_the_one_that_is_raised_and_no_hook_is_left(tmp_path, arguments, step):
    class Broken(Classifier):
        def fails(self, batch, batch_idx):
            if self.current_epoch == 1 and batch_idx == 2:
                raise ZeroDivisionError("of the user")
            return getattr(Classifier, step)(self, batch, batch_idx)

    setattr(Broken, step, Broken.fails)
    model, callback = Broken(), NeuralCollapseCallback(strict=True, **arguments)
    keep = ModelCheckpoint(tmp_path, save_last=True, save_top_k=-1, filename="{epoch}")
    with pytest.raises(ZeroDivisionError, match="of the user"):
        fit(tmp_path, [callback, keep], model=model, val=loader(False))
    assert hooks_of(model) == []
    assert "log" not in vars(model)
    whole = [row for row in callback.history if row["epoch"] == 0]
    again = NeuralCollapseCallback(strict=True, **arguments)
    fit(tmp_path, [again], val=loader(False), ckpt_path=tmp_path / "last.ckpt")
    assert again.history[: len(whole)] == whole
    assert {row["epoch"] for row in again.history} == {0, 1, 2}


def test_a_measurement_that_fails_in_its_middle_leaves_training_as_it_was(tmp_path):
    def run(callbacks):
        seed_everything(3, verbose=False)
        _, model = fit(tmp_path, callbacks)
        return [*model.state_dict().values()]

    calls = []

    def fails_later(module, batch):
        calls.append(torch.rand(1))  # draws on the global stream, too
        if len(calls) % 4 == 0:
            raise RuntimeError("in the middle")
        return module(batch[0])

    with pytest.warns(UserWarning, match="in the middle"):
        measured = run([NeuralCollapseCallback(forward_fn=fails_later)])
    assert all(torch.equal(a, b) for a, b in zip(run([]), measured, strict=True))


@pytest.mark.parametrize("arguments", [{}, {"mode": "online"}, {"stages": ("validate",)}])
def test_a_pool_that_fails_in_a_hook_is_an_error_of_the_measurement_not_of_the_step(tmp_path, arguments):
    class Reshaped(Classifier):
        def __init__(self):
            super().__init__()
            self.fold = nn.Unflatten(1, (2, 4))

        def forward(self, x):
            features = self.net[:4](x)
            self.fold(features)
            return self.net[4](features)

    callback = NeuralCollapseCallback(["fold"], pool=lambda features: features[:, 0, :, 0], **arguments)
    with pytest.warns(UserWarning, match="'fold' is left out: too many indices"):
        trainer, _ = fit(tmp_path, [callback], model=Reshaped(), val=loader(False))
    assert trainer.global_step == 18
    assert len(callback.history) == 3
    assert not any("fold" in key for row in callback.history for key in row)


@pytest.mark.parametrize("arguments", [{}, {"mode": "online"}, {"stages": ("validate",)}])
@pytest.mark.parametrize("changes", ["empties", "shifts"])
def test_a_step_that_empties_or_changes_its_batch_is_trained_and_measured_as_ever(tmp_path, arguments, changes):
    class Changing(Classifier):
        def step(self, batch):
            if changes == "empties":
                rows, target = batch.pop("rows"), batch.pop("labels")
            else:
                rows, target = batch["rows"], batch["labels"]
                rows -= 5
            return nn.functional.cross_entropy(self.net(rows), target)

        forward = None

        def training_step(self, batch, batch_idx):
            return self.step(batch)

        def validation_step(self, batch, batch_idx):
            self.step(batch)

    Changing.forward = LightningModule.forward
    mappings = DataLoader([{"rows": row, "labels": label} for row, label in DATA], 9)

    def run(callbacks):
        seed_everything(3, verbose=False)
        _, model = fit(tmp_path, callbacks, data=mappings, model=Changing(), val=mappings, num_sanity_val_steps=0)
        return list(model.state_dict().values())

    callback = NeuralCollapseCallback(strict=True, **arguments)
    assert all(torch.equal(a, b) for a, b in zip(run([callback]), run([]), strict=True))
    assert len(callback.history) == 3
