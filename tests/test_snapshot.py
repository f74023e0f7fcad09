"""Evaluation mode for the length of a measurement, then everything back as it was."""

import random
from collections import Counter, deque

import numpy as np
import pytest
import torch
from conftest import DATA, Classifier, fit, loader
from lightning.pytorch import LightningModule, seed_everything
from torch import nn
from torchmetrics import MeanMetric
from torchmetrics.wrappers import MinMaxMetric

from lightning_nc import NeuralCollapseCallback, measure
from lightning_nc.measuring.snapshot import evaluation_mode, fingerprint


def test_training_flags_and_random_streams_are_put_back_even_after_an_error():
    model = nn.Sequential(nn.BatchNorm1d(3), nn.Dropout())
    model[0].eval()  # frozen by its owner
    states = [random.getstate(), np.random.get_state()[1].copy(), torch.get_rng_state()]
    with pytest.raises(KeyboardInterrupt), evaluation_mode(model, torch.device("cpu")):
        assert not model[1].training
        assert not torch.is_grad_enabled()
        random.random(), np.random.rand(), torch.rand(1)
        raise KeyboardInterrupt
    assert [model.training, model[0].training, model[1].training] == [True, False, True]
    assert random.getstate() == states[0]
    assert (np.random.get_state()[1] == states[1]).all()
    assert torch.equal(torch.get_rng_state(), states[2])


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


def test_what_a_module_logs_meanwhile_is_dropped_and_its_own_log_is_back_afterward():
    class Logging(LightningModule):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(6, 3)

        def forward(self, x):
            self.log("loss", 1.0)  # raises outside of a Trainer's loop
            self.log_dict({"loss": 1.0})
            return self.fc(x)

    model = Logging()
    log = model.log
    with evaluation_mode(model, torch.device("cpu")):
        model(DATA.tensors[0])
    assert model.log == log
    assert "log_dict" not in vars(model)


def test_a_forward_that_changes_parameters_is_pointed_out():
    class Momentum(nn.Linear):
        def forward(self, x):
            self.weight.mul_(0.9)
            return super().forward(x)

    said = []
    for model in (nn.Linear(6, 3), Momentum(6, 3)):
        assert said == []
        with evaluation_mode(model, torch.device("cpu"), lambda topic, message: said.append(message)):
            model(DATA.tensors[0])
    assert len(said) == 1
    assert "changes its parameters (a momentum encoder" in said[0]


def test_the_fingerprint_changes_with_any_parameter():
    model = nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 3))
    prints = [fingerprint(model)]
    for parameter in model.parameters():
        with torch.no_grad():
            parameter.view(-1)[0] += 1e-3
        prints.append(fingerprint(model))
        with torch.no_grad():
            parameter.copy_(parameter.flip(0))
    assert len(set(prints)) == 5
    assert fingerprint(model) == fingerprint(model)
    assert fingerprint(nn.ReLU()) == ""


def test_a_model_without_an_eval_mode_is_refused_with_a_remedy():
    exported = torch.export.export(nn.Linear(6, 3), (torch.randn(4, 6),)).module()
    with pytest.raises(TypeError, match=r"has no eval mode.*Measure the module that it was exported from"):
        measure(exported, loader(False), progress=False)
