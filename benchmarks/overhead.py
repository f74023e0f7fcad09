"""Cost of measuring batches as they pass, as a ratio to the same epochs of the same run that are not measured.

python benchmarks/overhead.py

Every other epoch is measured, so both kinds see the same machine. A run without the callback comes between, for the hooks that
stay in place on epochs that are not measured.
"""

import logging
import time
import warnings

import torch
from exact_pass import images, resnet18
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import nn

from lightning_nc import NeuralCollapseCallback


class Classifier(LightningModule):
    """ResNet18 in a training and a validation loop."""

    def __init__(self) -> None:
        super().__init__()
        self.net = resnet18().train()

    def forward(self, rows):
        """The logits."""
        return self.net(rows)

    def training_step(self, batch, batch_idx):
        """A step of cross-entropy."""
        return nn.functional.cross_entropy(self(batch[0]), batch[1])

    def validation_step(self, batch, batch_idx):
        """The forward pass alone."""
        self(batch[0])

    def configure_optimizers(self):
        """Plain SGD."""
        return torch.optim.SGD(self.parameters(), lr=0.01)


class Clock(Callback):
    """Seconds of each training epoch and of each validation loop."""

    def __init__(self) -> None:
        self.times = {"train": [], "validate": []}

    def on_train_epoch_start(self, trainer, pl_module):
        """Training begins."""
        self.start = time.perf_counter()

    def on_validation_start(self, trainer, pl_module):
        """Training ends, before the callback closes its epoch; validation begins."""
        now = time.perf_counter()
        if not trainer.sanity_checking:
            self.times["train"].append(now - self.start)
        self.start = now

    def on_validation_end(self, trainer, pl_module):
        """Validation ends."""
        if not trainer.sanity_checking:
            self.times["validate"].append(time.perf_counter() - self.start)


def run(callbacks: list[Callback], epochs: int) -> dict[str, list[float]]:
    """Times of the epochs, without the first, which warms up."""
    clock = Clock()
    Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        callbacks=[*callbacks, clock],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
    ).fit(Classifier(), images(256), images(512))
    return {stage: times[1:] for stage, times in clock.times.items()}


def median(values: list[float]) -> float:
    """The middle one."""
    return sorted(values)[len(values) // 2]


if __name__ == "__main__":
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")
    epochs = 14  # the first and the last are always measured
    callback = NeuralCollapseCallback(mode="online", stages=("train", "validate"), every_n_epochs=2, strict=True)
    print(f"{torch.get_num_threads()} threads, ResNet18, 32x32, batch 128")
    measured = run([callback], epochs)
    plain = run([], epochs)
    for stage, name in (("train", "online mode"), ("validate", "validation stage")):
        # Epochs 1, 3, 5, ... are measured.
        pairs = [on / off for on, off in zip(measured[stage][::2], measured[stage][1::2], strict=False)]
        idle = median(measured[stage][1::2]) / median(plain[stage])
        print(
            f"{name}: {median(pairs):.3f} times an epoch that is not measured (pairs between {min(pairs):.3f} and "
            f"{max(pairs):.3f}, wanted 1.02); one that is not measured: {idle:.3f} times one without the callback"
        )
