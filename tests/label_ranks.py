"""Run in two processes by test_labels.py: each rank measures its share of the batches of every kind of label.

python -m torch.distributed.run --nproc-per-node=2 label_ranks.py FOLDER
"""

import sys
from pathlib import Path

import torch
from label_cases import CASES, Frozen, causal, loader_of
from lightning.pytorch import Trainer

from lightning_nc import NeuralCollapseCallback, measure

MODES = {"exact": {}, "online": {"mode": "online"}, "validation": {"stages": ("validate",)}}


def measured(name):
    case = CASES[name]()
    share = case.batches[torch.distributed.get_rank() :: 2]
    return measure(case.model, share, metrics="all", progress=False, **case.arguments)


def one_rank_with_padding_alone():
    case = causal()
    padding = [batch for batch in case.batches if not batch["attention_mask"].any()]
    others = [batch for batch in case.batches if batch["attention_mask"].any()]
    share = padding if torch.distributed.get_rank() else others
    return measure(case.model, share, metrics="all", progress=False, **case.arguments)


def trained(mode):
    """With four batches, which two ranks share evenly."""
    case = causal()
    callback = NeuralCollapseCallback(metrics="all", strict=True, **mode, **case.arguments)
    quiet = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    trainer = Trainer(accelerator="cpu", devices=2, strategy="ddp", max_epochs=1, callbacks=[callback], **quiet)
    trainer.fit(Frozen(case.model), loader_of(case.batches), loader_of(case.batches))
    return callback.history[-1]


def main(folder):
    torch.distributed.init_process_group("gloo")
    results = {name: measured(name) for name in CASES}
    results["padding alone"] = one_rank_with_padding_alone()
    results |= {name: trained(mode) for name, mode in MODES.items()}
    torch.save(results, Path(folder) / f"{torch.distributed.get_rank()}.pt")


if __name__ == "__main__":
    main(*sys.argv[1:])
