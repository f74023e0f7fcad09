"""A thousand measured epochs: what they take at the end of the run against its beginning, and what grows.

    python benchmarks/long_run.py [--epochs 1000]

The run measures every epoch, with two layers, pictures of three classes, a CSVLogger, and a checkpoint after every epoch. The
baseline is the same run without the callback, in the same process. Times are of the processor, and medians over a tenth of the
epochs, because other processes disturb single ones.
"""

import argparse
import gc
import logging
import os
import statistics
import tempfile
import time
import warnings
from pathlib import Path

import torch
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_nc import NeuralCollapseCallback


class Classifier(LightningModule):
    """A small network with batch norm."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(20, 64), nn.BatchNorm1d(64), nn.ReLU(), nn.Linear(64, 10))

    def forward(self, rows):
        """The logits."""
        return self.net(rows)

    def training_step(self, batch, batch_idx):
        """A step of cross-entropy."""
        loss = nn.functional.cross_entropy(self(batch[0]), batch[1])
        self.log("train_loss", loss, on_step=False, on_epoch=True)
        return loss

    def configure_optimizers(self):
        """SGD with momentum."""
        return torch.optim.SGD(self.parameters(), lr=0.01, momentum=0.9)


class Watch(Callback):
    """At the end of every epoch: the time, and every tenth of the run what is in memory and on disk."""

    def __init__(self, epochs: int, checkpoint: Path) -> None:
        self.every, self.checkpoint = max(1, epochs // 10), checkpoint
        self.times: list[float] = []
        self.saving: list[float] = []
        self.rows: list[tuple[int, ...]] = []

    def on_train_epoch_start(self, trainer, pl_module):
        """Start the clock. What lies between two epochs is the checkpoint."""
        if self.times:
            self.saving.append(time.process_time() - self.began - self.times[-1])
        self.began = time.process_time()

    def on_train_epoch_end(self, trainer, pl_module):
        """Look at what is in use. Checkpoints are written after this, so their size is that of the epoch before."""
        self.times.append(time.process_time() - self.began)
        if (trainer.current_epoch + 1) % self.every == 0:
            gc.collect()
            tensors = sum(isinstance(found, torch.Tensor) for found in gc.get_objects())
            hooks = sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in pl_module.modules())
            files = len(os.listdir("/proc/self/fd"))
            size = self.checkpoint.stat().st_size if self.checkpoint.exists() else 0
            self.rows.append((trainer.current_epoch + 1, resident(), tensors, hooks, files, size))


def resident() -> int:
    """Bytes of memory that the process holds."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def run(epochs: int, callbacks: list[Callback]) -> tuple[Watch, float]:
    """Train with these callbacks; what was watched, and the seconds of the processor that fit took."""
    seed_everything(0, verbose=False)
    labels = torch.arange(10).repeat(20)
    rows = 3 * torch.randn(10, 20)[labels] + torch.randn(200, 20)
    with tempfile.TemporaryDirectory() as folder:
        watch = Watch(epochs, Path(folder) / "last.ckpt")
        trainer = Trainer(
            max_epochs=epochs,
            accelerator="cpu",
            logger=CSVLogger(folder),
            callbacks=[*callbacks, watch, ModelCheckpoint(folder, filename="only", save_last=True)],
            enable_progress_bar=False,
            enable_model_summary=False,
            log_every_n_steps=1,
        )
        began = time.process_time()
        trainer.fit(Classifier(), DataLoader(TensorDataset(rows, labels), 50, shuffle=True))
        return watch, time.process_time() - began


def late_over_early(times: list[float]) -> float:
    """The median of the last tenth over that of the first, without the first epoch, which warms up."""
    count = max(1, len(times) // 10)
    return statistics.median(times[-count:]) / statistics.median(times[1 : count + 1])


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=1000, help="at least 20 (default: 1000)")
    epochs = max(20, parser.parse_args().epochs)
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    plain, _ = run(epochs, [])
    callback = NeuralCollapseCallback(layers=["net.1", "net.2"], geometry=(0, 1, 2), strict=True)
    measured, seconds = run(epochs, [callback])
    print(f"{epochs} epochs of 200 samples, measured at three layers, {seconds:.0f} s of the processor")
    print("time of an epoch, last tenth over first tenth:")
    print(f"  without the callback  {late_over_early(plain.times):.2f}")
    print(f"  measured              {late_over_early(measured.times):.2f}")
    print("time of the two checkpoints after an epoch over that of the measured epoch, first and last tenth:")
    count = epochs // 10
    for name, watch in (("without the callback", plain), ("measured", measured)):
        shares = [statistics.median(part) for part in (watch.saving[1:count], watch.saving[-count:])]
        epoch = statistics.median(measured.times)
        print(f"  {name:21} {shares[0] / epoch:.2f} {shares[1] / epoch:.2f}")
    print(f"{'epoch':>8} {'memory MB':>10} {'tensors':>8} {'hooks':>6} {'files':>6} {'checkpoint kB':>14}")
    for epoch, memory, tensors, hooks, files, size in measured.rows:
        print(f"{epoch:8} {memory / 1e6:10.1f} {tensors:8} {hooks:6} {files:6} {size / 1e3:14.1f}")
    first, last = measured.rows[0], measured.rows[-1]
    span = last[0] - first[0]
    print(f"an epoch adds {(last[5] - first[5]) / span:.0f} bytes to the checkpoint")
    print(f"and {(last[1] - first[1]) / span:.0f} bytes to the memory")
    print(f"(without the callback {(plain.rows[-1][1] - plain.rows[0][1]) / span:.0f} bytes to the memory)")


if __name__ == "__main__":
    main()
