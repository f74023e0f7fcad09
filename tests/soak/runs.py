"""A case run by a Trainer, with or without the callback, and everything that it leaves behind."""

import logging
import random
import signal
import warnings
from collections import defaultdict
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers.logger import Logger
from lightning.pytorch.strategies import DDPStrategy
from torch import nn

from lightning_nc import NeuralCollapseCallback
from soak.cases import METRICS, SCHEDULES, unpacked

logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
logging.getLogger("lightning.fabric").setLevel(logging.ERROR)


class Task(LightningModule):
    """Training with everything that noise can come from."""

    def __init__(self, case):
        super().__init__()
        self.case, self.net, self.seen = case, case.kind.build(case.classes), []

    def forward(self, inputs):
        return self.net(inputs)

    def loss(self, batch, augment):
        inputs, labels = unpacked(batch)
        if augment and inputs.is_floating_point():
            inputs = inputs + 0.1 * torch.randn_like(inputs) * random.random() * np.random.rand()
        logits = self(inputs)
        if self.case.model == "one output":
            return nn.functional.binary_cross_entropy_with_logits(logits, labels.reshape(-1, 1).to(logits.dtype))
        target = labels.argmax(1) if self.case.labels.startswith("one-hot") else labels.long()
        if self.case.kind.inputs == "tokens":
            logits = logits.transpose(1, 2)
        loss = nn.functional.cross_entropy(logits, target, ignore_index=self.case.ignore_index)
        extra = getattr(self.net, "auxiliary", None)
        return loss if extra is None else loss + 0.01 * extra.square().mean()

    def training_step(self, batch, batch_idx):
        self.seen.append(unpacked(batch)[0].double().sum().item())
        loss = self.loss(batch, augment=True)
        self.log("train_loss", loss, on_step=True, on_epoch=True)
        return loss

    def validation_step(self, batch, batch_idx, dataloader_idx=0):
        self.log("val_loss", self.loss(batch, augment=False), add_dataloader_idx=True)

    def test_step(self, batch, batch_idx, dataloader_idx=0):
        self.log("test_loss", self.loss(batch, augment=False), add_dataloader_idx=True)

    def configure_optimizers(self):
        kinds = {"SGD": (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9}), "Adam": (torch.optim.Adam, {"lr": 0.01})}
        kind, options = kinds[self.case.optimizer]
        return kind(self.parameters(), **options)


class Log(Logger):
    """Keeps what it is given."""

    name, version = "log", 0

    def __init__(self):
        super().__init__()
        self.rows = []

    def log_metrics(self, metrics, step=None):
        self.rows.append((step, {key: value for key, value in metrics.items() if not key.startswith("nc/")}))

    def log_hyperparams(self, *args, **kwargs):
        pass


class Recorder(Callback):
    """The state of the model after every batch, by epoch and step, and the end that a case asks for."""

    def __init__(self, stop, epochs):
        self.stop, self.batches, self.states, self.finished, self.trained = stop, 0, {}, [], defaultdict(int)

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        state = {name: tensor.clone() for name, tensor in pl_module.state_dict().items()}
        self.states[trainer.current_epoch, trainer.global_step] = state
        self.trained[trainer.current_epoch] = batch_idx + 1
        self.batches += 1
        if self.batches == self.stop[1] and self.stop[0] in ("error", "keyboard"):
            raise {"error": RuntimeError, "keyboard": KeyboardInterrupt}[self.stop[0]]("by plan")

    def on_train_epoch_end(self, trainer, pl_module):
        self.finished.append((trainer.current_epoch, trainer.global_step))
        trainer.should_stop |= self.stop == ("stop", trainer.current_epoch + 1)


class Witness(Callback):
    """What layers receive and return in the training steps of an epoch, or of its rest after a resume, from plain hooks."""

    def __init__(self, case):
        self.case, self.steps, self.calls, self.epoch = case, {}, None, []

    def on_fit_start(self, trainer, pl_module):
        kind = self.case.kind
        modules = {name: pl_module.get_submodule(name) for name in (kind.head, *self.case.layers)}
        keep = lambda name, tensor: self.calls.update({name: tensor.detach().clone()})  # noqa: E731
        self.handles = [
            module.register_forward_hook(lambda module, args, output, name=name: keep(name, output))
            for name, module in modules.items()
        ]
        self.handles.append(modules[kind.head].register_forward_pre_hook(lambda module, args: keep("", args[0])))
        self.calls = {}

    def on_train_epoch_start(self, trainer, pl_module):
        self.epoch = []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.calls.clear()

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.epoch.append((dict(self.calls), unpacked(batch)[1].clone()))
        self.steps[trainer.current_epoch, trainer.global_step] = list(self.epoch)

    def teardown(self, trainer, pl_module, stage):
        for handle in self.handles:
            handle.remove()


def callbacks_of(case):
    """The callback of a case, and the second one if there is one."""
    options = {
        "mode": case.mode,
        "stages": case.stages,
        "classifier": case.kind.head if case.named else None,
        "ignore_index": case.ignore_index,
        "feature_budget": case.budget,
        "strict": True,
    }
    first = NeuralCollapseCallback(
        layers=case.layers or None,
        metrics=METRICS[case.metrics],
        every_n_epochs=SCHEDULES[case.every],
        geometry=case.geometry,
        **options,
    )
    found = [first]
    if case.second is not None and case.second != case.metrics:
        found.append(NeuralCollapseCallback(metrics=METRICS[case.second], **options))
    return found


def trainer_of(case, callbacks, folder):
    saving = {"every_n_train_steps": case.checkpoint} if case.checkpoint else {"every_n_epochs": 1}
    saved = ModelCheckpoint(folder, filename="{epoch}-{step}", save_top_k=-1, **saving)
    ranks = (
        {"devices": 2, "strategy": DDPStrategy(timeout=timedelta(seconds=60))} if case.ranks == 2 else {"devices": 1}
    )
    return Trainer(
        max_epochs=case.epochs,
        max_steps=case.stop[1] if case.stop[0] == "max_steps" else -1,
        accelerator="cpu",
        precision=case.precision,
        accumulate_grad_batches=case.accumulate,
        gradient_clip_val=case.clip,
        limit_train_batches=case.limit,
        num_sanity_val_steps=case.sanity,
        log_every_n_steps=1,
        callbacks=[*callbacks, saved],
        logger=Log(),
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
        **ranks,
    )


def newest(folder):
    """The last checkpoint, by its step; None if there is none."""
    return max(Path(folder).glob("*.ckpt"), key=step_of, default=None)


def step_of(checkpoint):
    """The optimizer step of a checkpoint; 0 without one."""
    return 0 if checkpoint is None else int(checkpoint.stem.split("step=")[1].split("-")[0])


def continued(earlier, later, step):
    """What two parts of a run kept by epoch and step, if the second went on from ``step``.

    Lightning gives the number of the epoch again to one that goes on from a checkpoint of its last batch.
    """
    return {**earlier, **{place: kept for place, kept in later.items() if place not in earlier or place[1] > step}}


def run(case, kind, folder):
    """What a run leaves behind. ``kind``: "plain" without the callback, "measured" with it, "witness" with hooks alone."""
    warnings.simplefilter("ignore")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        found = _attempt(case, kind, folder, case.stop, None)
        if found["ended"] is not None:
            earlier, last = found, newest(folder)
            found = _attempt(case, kind, folder, ("none", 0), last)
            found["earlier"], found["began"] = earlier, step_of(last)
            for name in ("states", "steps"):
                found[name] = continued(earlier[name], found[name], found["began"])
    found["warnings"] = [str(warning.message) for warning in caught]
    return found


def _attempt(case, kind, folder, stop, checkpoint):
    seed_everything(case.seed, verbose=False)
    torch.rand(1), np.random.rand(), random.random()
    recorder, measuring = Recorder(stop, case.epochs), callbacks_of(case) if kind == "measured" else []
    witness = [Witness(case)] if kind == "witness" else []
    trainer, model = trainer_of(case, [*measuring, recorder, *witness], folder), Task(case)
    loader, held_out = case.train_loader(), case.held_out()
    interrupt, ended = signal.getsignal(signal.SIGINT), None
    try:
        trainer.fit(model, loader, held_out or None, ckpt_path=checkpoint)
    except BaseException as error:
        planned = "by plan" in str(error) or isinstance(error, SystemExit | KeyboardInterrupt)
        if not planned:
            raise
        ended = repr(error)
    finally:
        signal.signal(signal.SIGINT, interrupt)
    found = {
        "ended": ended,
        "weights": {name: tensor.clone() for name, tensor in model.state_dict().items()},
        "optimizer": [optimizer.state_dict() for optimizer in trainer.optimizers],
        "random": [torch.get_rng_state(), np.random.get_state()[1], random.getstate()],
        "loader": None if loader.generator is None else loader.generator.get_state(),
        "modes": [module.training for module in model.modules()],
        "seen": model.seen,
        "states": recorder.states,
        "finished": recorder.finished,
        "trained": dict(recorder.trained),
    }
    if "test" in case.stages and ended is None:
        trainer.test(model, held_out, verbose=False)
        found["random after test"] = [torch.get_rng_state(), np.random.get_state()[1], random.getstate()]
    found["log"] = trainer.logger.rows
    found["shown"] = {name: value for name, value in trainer.callback_metrics.items() if not name.startswith("nc/")}
    found["hooks"] = sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())
    found["steps"] = witness[0].steps if witness else {}
    found["histories"] = [list(callback.history) for callback in measuring]
    found["scenes"] = measuring[0].history.scenes if measuring else []
    found["tables"] = [callback.per_class for callback in measuring]
    last = newest(folder)
    if last is not None and trainer.is_global_zero:
        content = torch.load(last, weights_only=False)
        content["callbacks"] = {k: v for k, v in content["callbacks"].items() if "NeuralCollapse" not in k}
        content["callbacks"] = [v.get("best_k_models", v) for v in content["callbacks"].values()]
        found["checkpoint"] = _without_paths(content)
    return found


def _without_paths(value):
    if isinstance(value, dict):
        return {Path(k).name if isinstance(k, str) else k: _without_paths(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_without_paths(entry) for entry in value]
    return Path(value).name if isinstance(value, str) else value


def difference(first, second, where=""):
    """Where two nested values differ first, bit for bit; None if they do not."""
    if isinstance(first, dict) and isinstance(second, dict):
        if list(first) != list(second):
            return f"{where}: {list(first)} or {list(second)}"
        entries = ((f"{where}/{name}", first[name], second[name]) for name in first)
    elif isinstance(first, list | tuple) and isinstance(second, list | tuple):
        if len(first) != len(second):
            return f"{where}: {len(first)} or {len(second)} entries"
        entries = ((f"{where}/{number}", *pair) for number, pair in enumerate(zip(first, second, strict=True)))
    else:
        return None if _same(first, second) else f"{where}: {first!r:.80} or {second!r:.80}"
    return next((found for place, a, b in entries if (found := difference(a, b, place))), None)


def _same(first, second):
    if isinstance(first, torch.Tensor) and isinstance(second, torch.Tensor):
        one, other = (part.detach().contiguous().reshape(-1).view(torch.uint8) for part in (first, second))
        return first.dtype == second.dtype and first.shape == second.shape and torch.equal(one, other)
    if isinstance(first, np.ndarray):
        return np.array_equal(first, second)
    return first == second or (first != first and second != second)
