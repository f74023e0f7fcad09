"""A training with a fault in it, and all that it leaves behind."""

import os
import random
import signal

import numpy as np
import torch
from conftest import DATA, Classifier, fit, hooks_of, true_nc1
from lightning.pytorch import Callback, seed_everything
from torch.utils.data import DataLoader, Dataset

EPOCHS = 4


class Fault:
    """Calls ``act`` in a measurement of the model in training: at the call ``at`` in ``epoch``, or at all calls from then on."""

    def __init__(self, act, at=0, always=False, epoch=1):
        self.act, self.at, self.always, self.epoch, self.model, self.calls = act, at, always, epoch, None, 0

    def __call__(self):
        if self.model is not None and self.model.measuring() and self.model.current_epoch >= self.epoch:
            self.calls += 1
            if self.calls == self.at + 1 or (self.always and self.calls > self.at):
                self.act()


class Measured(Classifier):
    """Knows what NC1 is after each epoch, and whether it is being measured in training. ``fault`` may act in its forward."""

    def __init__(self, fault=None, in_forward=False):
        super().__init__()
        self.truth, self._in_forward = {}, fault if in_forward else lambda: None
        if fault is not None:
            fault.model = self

    def forward(self, x):
        self._in_forward()
        return super().forward(x)

    def measuring(self):
        return not self.training and self._trainer is not None and self.trainer.training

    def on_train_epoch_end(self):
        self.truth[self.current_epoch] = true_nc1(self)


class Watched(Dataset):
    """The data; ``look`` is called whenever a sample is taken."""

    def __init__(self, look):
        self.look = look

    def __len__(self):
        return len(DATA)

    def __getitem__(self, index):
        self.look()
        return DATA[index]


class Raises(Callback):
    """Calls ``fault`` in one hook, in one epoch, after the hooks of the callbacks before it."""

    def __init__(self, hook, fault, epoch=1):
        def run(trainer, *args, **kwargs):
            if trainer.current_epoch >= epoch and not trainer.sanity_checking:
                fault()

        setattr(self, hook, run)


def kill():
    os.kill(os.getpid(), signal.SIGKILL)


def raising(error):
    def fault():
        raise error

    return fault


def left_behind(folder, callbacks, make=Measured, data=None, **options):
    """All that a training leaves behind: weights, optimizer, random streams, what the steps saw; and the model."""
    seed_everything(3, verbose=False)
    trainer, model = fit(folder, callbacks, data=data, model=make(), **{"max_epochs": EPOCHS, **options})
    assert_clean(model)
    momenta = [state["momentum_buffer"] for state in trainer.optimizers[0].state_dict()["state"].values()]
    streams = [torch.get_rng_state(), torch.tensor(np.random.get_state()[1].astype(np.int64))]
    seen = torch.tensor([*model.seen, random.random()])
    return [*model.state_dict().values(), *momenta, *streams, seen], model


def assert_clean(model, trains=True):
    """No hook is left, every module trains if Lightning left it so, and nothing stands in the way of logging."""
    assert hooks_of(model) == []
    assert not trains or all(module.training for module in model.modules())
    assert "log" not in vars(model)
    assert torch.is_grad_enabled()


def same(first, second):
    return all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def loader(look=lambda: None, **options):
    return DataLoader(Watched(look), 8, shuffle=True, **options)
