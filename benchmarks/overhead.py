"""Cost of measuring batches as they pass, as a ratio to the same batches of the same run without the callback.

    python benchmarks/overhead.py [--rounds 20]

In every round of three batches one is measured, one passes the hooks on an epoch that is not measured, and one passes a network
without hooks, in an order that changes from round to round: what else the machine does falls on all three alike. Times are those
of one core, on one thread.
"""

import argparse
import logging
import statistics
import time
import warnings

import torch
from exact_pass import images, resnet18
from lightning.pytorch import LightningModule, Trainer
from torch import nn

from lightning_nc import NeuralCollapseCallback
from lightning_nc.trainers import attach

BARE, IDLE, MEASURED = KINDS = ("without the callback", "hooked and not measured", "measured")
STAGES = {"train": "online mode", "validate": "validation stage"}


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


class TakingTurns(NeuralCollapseCallback):
    """The callback, which leaves out two batches of three and takes its hooks off for one of them."""

    def kind(self, index: int) -> str:
        """What is done with a batch."""
        return KINDS[(index + index // 3) % 3]

    def begin(self, stage, trainer, pl_module, batch):
        """Put the hooks in place, or remove them, and start the clock; whether the batch is measured."""
        self.turn = self.kind(self.seen[stage])
        self.seen[stage] += 1
        if self.turn == BARE:
            self._probe.detach()
        else:
            attach(trainer, pl_module, self._probe, batch)  # does nothing if they are in place
        self.began = time.process_time()
        return self.turn == MEASURED

    def end(self, stage):
        """Stop the clock."""
        self.times[stage][self.turn].append(time.process_time() - self.began)

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        """Measure one batch of three."""
        if self.begin("train", trainer, pl_module, batch):
            super().on_train_batch_start(trainer, pl_module, batch, batch_idx)

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        """Leave the end of the epoch to on_train_epoch_end."""
        if self.turn == MEASURED and not trainer.is_last_batch:
            super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
        self.end("train")

    def on_train_epoch_end(self, trainer, pl_module):
        """Time the values."""
        began = time.process_time()
        super().on_train_epoch_end(trainer, pl_module)
        self.ends["train"] = time.process_time() - began

    def on_validation_batch_start(self, trainer, pl_module, batch, batch_idx, dataloader_idx=0):
        """Measure one batch of three."""
        if self.begin("validate", trainer, pl_module, batch):
            super().on_validation_batch_start(trainer, pl_module, batch, batch_idx)

    def on_validation_batch_end(self, trainer, pl_module, outputs, batch, batch_idx, dataloader_idx=0):
        """Measure one batch of three."""
        if self.turn == MEASURED:
            super().on_validation_batch_end(trainer, pl_module, outputs, batch, batch_idx)
        self.end("validate")

    def on_validation_epoch_end(self, trainer, pl_module):
        """Time the values."""
        began = time.process_time()
        super().on_validation_epoch_end(trainer, pl_module)
        self.ends["validate"] = time.process_time() - began

    def on_fit_start(self, trainer, pl_module):
        """Reset the counters."""
        self.seen, self.ends = dict.fromkeys(STAGES, 0), {}
        self.times = {stage: {kind: [] for kind in KINDS} for stage in STAGES}


def main() -> None:
    """Print a line per stage."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=20, help="of three batches each, in training and in validation")
    rounds = parser.parse_args().rounds
    torch.set_num_threads(1)
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")
    callback = TakingTurns(mode="online", stages=("train", "validate"), strict=True)
    Trainer(
        max_epochs=1,
        accelerator="cpu",
        callbacks=[callback],
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
    ).fit(Classifier(), images(128 * 3 * (rounds + 1)), images(128 * 3 * (rounds + 1)))
    print(f"{torch.get_num_threads()} threads, ResNet18, 32x32, batch 128, medians of {rounds} rounds of three batches")
    for stage, name in STAGES.items():
        times = {kind: values[1:] for kind, values in callback.times[stage].items()}  # the first round warms up
        for kind in (MEASURED, IDLE):
            pairs = [one / bare for one, bare in zip(times[kind], times[BARE], strict=True)]
            low, _, high = statistics.quantiles(pairs, n=4)
            print(
                f"{name}, {kind}: {statistics.median(pairs):.4f} times the batch {BARE} "
                f"({statistics.median(times[BARE]):.3f} s); half of the rounds between {low:.3f} and {high:.3f}"
            )
        share = callback.ends[stage] / sum(map(sum, times.values()))
        print(f"{name}, values at the end of the epoch: {callback.ends[stage]:.3f} s, {share:.5f} of the epoch")


if __name__ == "__main__":
    main()
