"""The same for transformers.Trainer, which is an extra."""

from __future__ import annotations

from pathlib import Path

import torch
from torch.utils.data import Dataset
from transformers import BertConfig, BertForSequenceClassification, Trainer, TrainingArguments

from lightning_nc import History
from lightning_nc.huggingface import NeuralCollapseCallback


class Rows(Dataset[dict[str, torch.Tensor]]):
    """Three classes of token sequences."""

    def __len__(self) -> int:
        return 24

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        label = index % 3
        return {"input_ids": torch.full((4,), 1 + label), "labels": torch.tensor(label)}


def main(folder: Path) -> None:
    """Train with the callback."""
    config = BertConfig(vocab_size=8, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8)
    config.num_labels = 3
    callback = NeuralCollapseCallback(metrics=["nc1", "nc3"], pool="mean")
    arguments = TrainingArguments(
        output_dir=str(folder), num_train_epochs=2, report_to=[], save_strategy="no", use_cpu=True, disable_tqdm=True
    )
    trainer = Trainer(model=BertForSequenceClassification(config), args=arguments, train_dataset=Rows())
    trainer.add_callback(callback)
    trainer.train()
    history: History = callback.history
    assert len(history) == 2
