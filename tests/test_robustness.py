"""What a crash, a kill, an interrupt or a full disk leaves behind."""

import os
import signal
import subprocess
import sys
import time
from collections import Counter, deque

import numpy as np
import pytest
import torch
from lightning.pytorch import LightningModule, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from test_callback import DATA, Classifier, fit, hooks_of, loader
from torch import nn
from torch.utils.data import DataLoader
from torchmetrics import MeanMetric
from torchmetrics.wrappers import MinMaxMetric

from lightning_nc import NeuralCollapseCallback, measure

KILLED = """
import signal, sys, time
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell starts what runs in the background without it
sys.path.insert(0, sys.argv[2])
from test_callback import Classifier, NeuralCollapseCallback, fit, loader
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


@pytest.mark.parametrize("arguments", [{}, {"mode": "online"}, {"stages": ("train", "validate")}])
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
    class Folded(Classifier):
        def __init__(self):
            super().__init__()
            self.fold = nn.Unflatten(1, (2, 4))

        def forward(self, x):
            features = self.net[:4](x)
            self.fold(features)
            return self.net[4](features)

    callback = NeuralCollapseCallback(["fold"], pool=lambda features: features[:, 0, :, 0], **arguments)
    with pytest.warns(UserWarning, match="'fold' is left out: too many indices"):
        trainer, _ = fit(tmp_path, [callback], model=Folded(), val=loader(False))
    assert trainer.global_step == 18
    assert len(callback.history) == 3
    assert not any("fold" in key for row in callback.history for key in row)


def test_what_a_forward_changes_in_the_module_is_put_back(tmp_path):
    class Stateful(LightningModule):
        def __init__(self):
            super().__init__()
            self.net = Classifier().net
            self.loss, self.outputs, self.steps, self.losses = MeanMetric(), [], 0, []
            self.kept, self.hidden = {}, torch.zeros(3)
            self.counts, self.array, self.pair = Counter(), np.zeros(2), deque()
            self.range = MinMaxMetric(MeanMetric())
            self.register_buffer("calls", torch.zeros(()))
            self.register_buffer("grid", torch.arange(5.0).expand(4, 5))  # cannot be written to

        def training_step(self, batch, batch_idx):
            return self.loss(nn.functional.cross_entropy(self.net(batch[0]), batch[1]))  # whose cache holds a graph

        def validation_step(self, batch, batch_idx):
            self.outputs.append(nn.functional.cross_entropy(self.net(batch[0]), batch[1]))
            self.steps += 1
            self.calls += 1
            self.kept[self.steps] = 1
            self.counts.update([self.steps])
            self.array += 1
            self.pair.append(self.steps)
            self.range(batch[0].abs().sum())
            self.hidden += 1
            self.seen_before = True

        def on_validation_epoch_end(self):
            self.losses.append(torch.stack(self.outputs).mean().item() + len(self.kept) + self.hidden.sum())
            states = sum(self.counts.values()), self.array.sum(), len(self.pair), self.range.compute()["max"].item()
            self.losses.append(states)
            self.outputs.clear()

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.1)

    def run(callbacks):
        seed_everything(3, verbose=False)
        _, model = fit(tmp_path, callbacks, model=Stateful(), val=loader(False))
        return model.losses, model.steps, model.calls.item(), model.outputs

    callback = NeuralCollapseCallback(strict=True)
    assert run([callback]) == run([])
    assert len(callback.history) == 3


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


def test_tensors_of_every_kind_that_a_module_keeps_are_the_same_after_the_pass(tmp_path):
    class Keeping(Classifier):
        def __init__(self):
            super().__init__()
            self.adjacencies = [torch.eye(8).to_sparse()]
            self.cycle = {}
            self.cycle["inner"] = [torch.zeros(2, device="meta")]

        def forward(self, x):
            self.features = self.net[:4](x)
            return self.net[4](self.features)

        def on_train_batch_end(self, outputs, batch, batch_idx):
            assert self.features.requires_grad
            assert self.net[1].training

    def run(callbacks):
        seed_everything(3, verbose=False)
        return list(fit(tmp_path, callbacks, model=Keeping())[1].state_dict().values())

    assert all(torch.equal(a, b) for a, b in zip(run([]), run([NeuralCollapseCallback(strict=True)]), strict=True))
    model = nn.Sequential(nn.Linear(6, 8), nn.utils.spectral_norm(nn.Linear(8, 3)))
    model(DATA.tensors[0])
    measure(model, loader(False), progress=False)
    assert model[1].weight.requires_grad


def test_a_container_that_did_not_change_is_left_alone():
    class Replay(nn.Linear):
        def __init__(self):
            super().__init__(6, 3)
            self.replay = deque(range(5))

    model = Replay()
    iterator = iter(model.replay)
    measure(model, loader(False), progress=False)
    assert list(iterator) == list(range(5))


def test_finding_the_classifier_changes_no_batch():
    class InPlace(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.head = nn.Linear(6, 8), nn.Linear(8, 3)

        def forward(self, x):
            x -= 5
            return self.head(self.body(x).relu())

    model = InPlace()
    found = measure(model, loader(False), progress=False)
    assert found == measure(model, loader(False), classifier="head", progress=False)


def test_a_norm_that_steps_whenever_the_weight_is_read_takes_no_step_more(tmp_path):
    class Normed(Classifier):
        def __init__(self):
            super().__init__()
            nn.utils.parametrizations.spectral_norm(self.net[4])

    def run(callbacks):
        seed_everything(3, verbose=False)
        return list(fit(tmp_path, callbacks, model=Normed())[1].state_dict().values())

    measured = run([NeuralCollapseCallback(mode="online", strict=True)])
    assert all(torch.equal(a, b) for a, b in zip(run([]), measured, strict=True))


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


def test_a_step_that_leaves_the_model_out_is_left_out_of_the_measurement(tmp_path):
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


def test_two_passes_of_a_step_through_the_classifier_are_pointed_out(tmp_path):
    class Twice(Classifier):
        def training_step(self, batch, batch_idx):
            self(batch[0].flip(0))
            return super().training_step(batch, batch_idx)

    with pytest.warns(UserWarning, match="is called several times with 8 rows; the last call is measured"):
        fit(tmp_path, [NeuralCollapseCallback(mode="online", strict=True)], model=Twice())
