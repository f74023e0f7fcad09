"""Run in two processes by distributed.py: trainings with transformers.Trainer and with Accelerate, and sharded models."""

import gc
import warnings

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from tiny_transformers import (
    OTHER,
    TRAIN,
    bert_of_tokens,
    for_language,
    gpt2,
    padded,
    passages,
    state_of,
    train,
    vit,
)
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader
from transformers import default_data_collator
from versions import fully_shard

from lightning_nc import measure
from lightning_nc.huggingface import NeuralCollapseCallback

TEXTS = passages(51, labels=None)
TOKENS = passages(51, labels="token")
NEXT = {"target_fn": "next_token", "progress": False}


def of_trainer(folder, *callbacks, **arguments):
    trainer = train(folder, *callbacks, **{"num_train_epochs": 2, **arguments})
    return {"state": state_of(trainer), "logs": trainer.state.log_history}


def trained(folder):
    """A training without the callback and one with it."""
    arguments = {"evaluated": OTHER, "eval_strategy": "epoch"}
    callback = NeuralCollapseCallback(["vit.*layer*.?"], stages=("train", "validate"), strict=True)
    plain = of_trainer(folder, **arguments)
    return {"plain": plain, "measured": of_trainer(folder, callback, **arguments), "history": callback.history}


def language(folder):
    """A language model, whose sequences have different lengths."""
    callback = NeuralCollapseCallback(target_fn="next_token", strict=True)
    text = {"model": gpt2(), "data": TEXTS, "collator": for_language}
    measured = of_trainer(folder, callback, num_train_epochs=1, gradient_accumulation_steps=2, **text)
    return {**measured, "history": callback.history}


def sharded_training(folder):
    """Trainings of a language model that the Trainer shards, without the callback and with it."""
    config = {"version": 2, "transformer_layer_cls_to_wrap": ["GPT2Block"]}
    arguments = {"data": TEXTS, "collator": for_language, "fsdp": "full_shard", "fsdp_config": config}
    callback = NeuralCollapseCallback(target_fn="next_token", strict=True)
    states = []
    for callbacks in ([], [callback]):
        state = of_trainer(folder, *callbacks, model=gpt2(), **arguments)["state"]
        whole = {
            name: part.full_tensor() if hasattr(part, "full_tensor") else part
            for name, part in state["weights"].items()
        }
        states.append({"weights": whole, "logs": state["logs"], "random": state["random"]})
    return {"plain": states[0], "measured": states[1], "history": callback.history}


def gives_up(folder):
    """The labels of the second rank are out of range."""
    rank = torch.distributed.get_rank()
    callback = NeuralCollapseCallback(target_fn=lambda batch: batch["labels"] + 10 * rank)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer = train(folder, callback, num_train_epochs=1)
    said = [str(w.message) for w in caught if "neural collapse" in str(w.message)]
    return {"history": callback.history, "steps": trainer.state.global_step, "said": said}


def accelerated(measured):
    """A training loop with Accelerate, measured after every epoch or not."""
    set_seed(3)
    accelerator = Accelerator(cpu=True)
    model = vit()
    loader = DataLoader(TRAIN, 8, shuffle=True, collate_fn=default_data_collator)
    test = DataLoader(OTHER, 8, collate_fn=default_data_collator)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    model, optimizer, loader, test = accelerator.prepare(model, optimizer, loader, test)
    values = []
    for _ in range(2):
        model.train()
        for batch in loader:
            accelerator.backward(model(**batch).loss)
            optimizer.step()
            optimizer.zero_grad()
        if measured:
            values.append([measure(model, data, progress=False) for data in (loader, test)])
    assert isinstance(model, DistributedDataParallel)
    return {"state": accelerator.unwrap_model(model).state_dict(), "next": torch.rand(1).item(), "values": values}


def sharded(make, collate, data, **arguments):
    """The values of a model that FSDP2 shards; the second rank has one batch of padding alone, and fewer batches."""
    model = make()
    for block in model.transformer.h if hasattr(model, "transformer") else model.bert.encoder.layer:
        fully_shard(block)
    fully_shard(model)
    rank = torch.distributed.get_rank()
    batches = [collate(data[first : first + 6]) for first in range(0, len(data), 6)]
    share = batches[:7] if rank == 0 else batches[7:]
    if rank == 1:
        nothing = {key: torch.zeros_like(value) for key, value in share[0].items()}
        share.insert(0, {**nothing, "labels": torch.full_like(nothing["input_ids"], -100)})
    return measure(model, share, **arguments)


def padding_alone():
    """The second rank has nothing but padding."""
    batch = for_language(TEXTS)
    if torch.distributed.get_rank() == 1:
        batch = {
            "input_ids": torch.zeros(4, 9, dtype=torch.long),
            "attention_mask": torch.zeros(4, 9, dtype=torch.long),
        }
        batch["labels"] = torch.full((4, 9), -100)
    return measure(DistributedDataParallel(gpt2()), [batch], **NEXT)


def results(folder):
    gc.freeze()  # every training collects garbage, among all that was imported
    found = {
        "padding alone": padding_alone(),
        "accelerated": {measured: accelerated(measured) for measured in (False, True)},
        **{part.__name__: part(folder) for part in (trained, language, gives_up)},
    }
    if fully_shard:
        found["sharded language"] = sharded(gpt2, for_language, TEXTS, **NEXT)
        found["sharded tokens"] = sharded(bert_of_tokens, padded, TOKENS, progress=False)
        found["sharded_training"] = sharded_training(folder)
    return found
