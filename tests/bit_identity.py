"""Trainings with and without the callback, and whether they differ in a single bit.

test_bit_identity.py compares a few of them. The full matrix is a script of its own, in one process and, by torchrun, in two:
it writes a JSON list of rows (loader, precision, what the callback does, whether all was identical) to the file given.
"""

import json
import random
import sys
import warnings
from pathlib import Path

import numpy as np
import torch
from conftest import DATA, Classifier, loader
from lightning.pytorch import Trainer, seed_everything
from torch.utils.data import DataLoader, IterableDataset, RandomSampler, SubsetRandomSampler, WeightedRandomSampler

from lightning_nc import NeuralCollapseCallback


class Stream(IterableDataset):
    def __iter__(self):
        yield from DATA


LOADERS = {
    "in order": lambda: loader(shuffle=False),
    "shuffled": lambda: loader(),
    "shuffled, last batch dropped": lambda: loader(drop_last=True),
    "generator of its own": lambda: loader(generator=torch.Generator().manual_seed(5)),
    "sampler with a generator": lambda: DataLoader(
        DATA, 8, sampler=RandomSampler(DATA, generator=torch.Generator().manual_seed(5))
    ),
    "weighted sampler": lambda: DataLoader(DATA, 8, sampler=WeightedRandomSampler(torch.arange(45) % 4 + 1.0, 40)),
    "subset sampler": lambda: DataLoader(DATA, 8, sampler=SubsetRandomSampler(range(0, 40))),
    "iterable data set": lambda: DataLoader(Stream(), 8),
    "two workers": lambda: loader(num_workers=2),
    "two workers that persist": lambda: loader(num_workers=2, persistent_workers=True),
}
MODES = {
    "exact": {},
    "exact, with layers": {"layers": ["net.*"]},
    "online": {"mode": "online"},
    "exact and validation": {"stages": ("train", "validate")},
}
PRECISIONS = ("32-true", "bf16-mixed", "bf16-true")
WORLD_SIZE = 2 if "--two" in sys.argv else 1


def train(make_loader, precision, arguments, validation=True):
    """Everything that a training leaves behind, without the callback if ``arguments`` is None."""
    seed_everything(3, verbose=False)
    callback = None if arguments is None else NeuralCollapseCallback(strict=True, **arguments)
    trainer = Trainer(
        max_epochs=2,
        accelerator="cpu",
        devices=WORLD_SIZE,
        strategy="ddp" if WORLD_SIZE > 1 else "auto",
        precision=precision,
        callbacks=[] if callback is None else [callback],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    model = Classifier()
    trainer.fit(model, make_loader(), loader(shuffle=False) if validation else None)
    assert callback is None or len(callback.history) == 2 * len(callback.stages)
    optimizer = trainer.optimizers[0].state_dict()["state"]
    tensors = [*model.state_dict().values(), *(state["momentum_buffer"] for state in optimizer.values())]
    streams = [torch.get_rng_state(), torch.tensor(np.random.get_state()[1].astype(np.int64))]
    return [*tensors, *streams, torch.tensor(model.seen)], random.getstate(), [m.training for m in model.modules()]


def is_identical(first, second):
    """Whether two trainings left the same behind, bit for bit."""
    return all(torch.equal(a, b) for a, b in zip(first[0], second[0], strict=True)) and first[1:] == second[1:]


def main():
    warnings.simplefilter("ignore")
    chosen = [name for name in LOADERS if WORLD_SIZE == 1 or "workers" not in name or "persist" in name]
    rows = []
    for loader_name in chosen:
        for precision in PRECISIONS:
            # Workers take long to start; what they do does not depend on the precision.
            if "workers" in loader_name and precision != "32-true":
                continue
            plain = train(LOADERS[loader_name], precision, None)
            for mode, arguments in MODES.items():
                measured = train(LOADERS[loader_name], precision, arguments)
                rows.append((loader_name, precision, mode, is_identical(plain, measured)))
    if WORLD_SIZE > 1:
        identical = torch.tensor([row[3] for row in rows], dtype=torch.int)
        torch.distributed.all_reduce(identical, torch.distributed.ReduceOp.MIN)
        rows = [(*row[:3], bool(same)) for row, same in zip(rows, identical, strict=True)]
        if torch.distributed.get_rank():
            return
    Path(sys.argv[1]).write_text(json.dumps(rows))


if __name__ == "__main__":
    import logging

    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    main()
