"""Transformers of a few thousand parameters from their configurations, real data for them, and their trainings."""

import random
from pydoc_data.topics import topics

import numpy as np
import torch
from sklearn.datasets import load_digits
from torch.nn.utils.rnn import pad_sequence
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    BertForTokenClassification,
    GPT2Config,
    GPT2LMHeadModel,
    Trainer,
    TrainingArguments,
    ViTConfig,
    ViTForImageClassification,
    default_data_collator,
)

TOKENS = 24
SUBJECTS = ("types", "debugger", "formatstrings")


def digits(first, last):
    """Images of 8 x 8 pixels and their classes."""
    images, labels = load_digits(return_X_y=True)
    pixels = torch.tensor(images[first:last], dtype=torch.float32).reshape(-1, 1, 8, 8) / 16
    return [{"pixel_values": x, "labels": int(y)} for x, y in zip(pixels, labels[first:last], strict=True)]


def passages(count, labels="subject"):
    """Passages of 8 to 19 characters of Python's own help, with the ``"subject"`` or a kind of each ``"token"``, or none."""
    samples = []
    for number in range(count):
        subject, length = number % len(SUBJECTS), 8 + 5 * number % 12
        text = topics[SUBJECTS[subject]][100 + 20 * number :][:length]
        kinds = [-100 if c.isspace() else 0 if c in "aeiou" else 1 if c.isalpha() else 2 for c in text]
        given = {"subject": {"labels": subject}, "token": {"labels": kinds}}.get(labels, {})
        samples.append({"input_ids": [ord(c) % (TOKENS - 1) + 1 for c in text], **given})
    return samples


def padded(samples):
    """A batch, as the collators of transformers make it: padding is token 0, label -100 and mask 0."""
    rows = [torch.tensor(sample["input_ids"]) for sample in samples]
    batch = {
        "input_ids": pad_sequence(rows, batch_first=True),
        "attention_mask": pad_sequence([torch.ones_like(row) for row in rows], batch_first=True),
    }
    labels = [torch.tensor(sample["labels"]) for sample in samples if "labels" in sample]
    if labels:
        shaped = pad_sequence(labels, batch_first=True, padding_value=-100) if labels[0].dim() else torch.stack(labels)
        batch["labels"] = shaped
    return batch


def for_language(samples):
    """A batch for a causal language model: the labels are the tokens themselves, which the model shifts."""
    batch = padded(samples)
    return {**batch, "labels": batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)}


def vit(seed=0):
    torch.manual_seed(seed)
    size = {"image_size": 8, "patch_size": 4, "num_channels": 1, "hidden_size": 16, "intermediate_size": 32}
    dropout = {"hidden_dropout_prob": 0.2, "attention_probs_dropout_prob": 0.2}
    config = ViTConfig(num_hidden_layers=2, num_attention_heads=2, num_labels=10, **size, **dropout)
    return ViTForImageClassification(config)


def bert(seed=0, kind=BertForSequenceClassification):
    torch.manual_seed(seed)
    size = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    config = BertConfig(vocab_size=TOKENS, max_position_embeddings=32, num_labels=3, **size)
    return kind(config)


def bert_of_tokens(seed=0):
    return bert(seed, BertForTokenClassification)


def gpt2(seed=0):
    torch.manual_seed(seed)
    config = GPT2Config(
        vocab_size=TOKENS, n_positions=32, n_embd=32, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=0
    )
    return GPT2LMHeadModel(config)


class CountingTrainer(Trainer):
    """A metric of the evaluation is the step, so that the first checkpoint is the best if less is better."""

    def evaluate(self, *args, **kwargs):
        return {**super().evaluate(*args, **kwargs), "eval_step": self.state.global_step}


TRAIN, OTHER = digits(0, 51), digits(51, 90)  # 7 batches of 8, the last of three samples


def train(
    folder,
    *callbacks,
    model=None,
    data=TRAIN,
    evaluated=None,
    resume=None,
    collator=None,
    kind=CountingTrainer,
    **arguments,
):
    defaults = {
        "per_device_train_batch_size": 8,
        "num_train_epochs": 3,
        "learning_rate": 1e-2,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
    }
    trainer = kind(
        model=vit() if model is None else model,
        args=TrainingArguments(str(folder), **{**defaults, **arguments}),
        train_dataset=data,
        eval_dataset=evaluated,
        data_collator=collator or default_data_collator,
    )
    for callback in callbacks:
        trainer.add_callback(callback)
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def state_of(trainer):
    """Everything that a training leaves; nothing of it may depend on the callback."""
    logs = [entry for entry in trainer.state.log_history if not any(key.startswith("nc/") for key in entry)]
    timings = ("runtime", "per_second")
    return {
        "weights": trainer.model.state_dict(),
        "optimizer": trainer.optimizer.state_dict(),
        "scheduler": trainer.lr_scheduler.state_dict(),
        "logs": [{key: v for key, v in entry.items() if not key.endswith(timings)} for entry in logs],
        "random": [random.random(), np.random.rand(), torch.rand(1).item()],
        "modes": [module.training for module in trainer.model.modules()],
    }
