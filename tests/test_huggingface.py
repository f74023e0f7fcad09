"""The callback of transformers.Trainer: when it measures, where the values go, and a training that it leaves unchanged."""

import copy
import functools
import gc
import inspect
import json
import random
import tempfile

import huggingface_ranks
import numpy as np
import pytest
import reference
import torch
import transformers
from conftest import PAPER, is_picture
from test_distributed import run
from tiny_transformers import (
    OTHER,
    TRAIN,
    CountingTrainer,
    bert,
    bert_of_tokens,
    for_language,
    gpt2,
    padded,
    passages,
    state_of,
    train,
    vit,
)
from torch.utils.data import DataLoader, IterableDataset
from transformers import EarlyStoppingCallback, Trainer, TrainerCallback, TrainingArguments, default_data_collator
from versions import needs_fsdp2, needs_torch_2_6

import lightning_nc
from lightning_nc import History, log_spaced, measure
from lightning_nc.huggingface import NeuralCollapseCallback

KEYS = [f"nc/{name}" for name in PAPER]
TEXTS = passages(50)
NEXT = {"target_fn": "next_token"}


@pytest.fixture(autouse=True, scope="module")
def _little_garbage_to_search():
    gc.freeze()  # every training collects garbage, among all that was imported
    yield
    gc.unfreeze()


def measured(trainer):
    """The entries of the log history that hold metrics."""
    return [entry for entry in trainer.state.log_history if any(key.startswith("nc/") for key in entry)]


def steps(callback, stage="train"):
    return [(row["epoch"], row["step"]) for row in callback.history if row["stage"] == stage]


def expected(model, batch):
    """The metrics of the classifier's input in eval mode, from the float64 reference."""
    twin, seen = copy.deepcopy(model).eval(), []
    head = twin.lm_head if hasattr(twin, "lm_head") else twin.classifier
    head.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    with torch.no_grad():
        twin(**batch)
    rows, labels, weight = seen[0].double().numpy(), batch["labels"].numpy(), head.weight.detach().double().numpy()
    if head is getattr(twin, "lm_head", None):
        rows, labels = rows[:, :-1], labels[:, 1:]
    rows, labels = rows[labels != -100], labels[labels != -100]
    values = reference.all_metrics(rows, labels, weight[np.unique(labels)], np.zeros(len(np.unique(labels))))
    return {name: values[name] for name in PAPER}


def check(row, model, batch, prefix="nc", rel=1e-5):
    batch = default_data_collator(batch) if isinstance(batch, list) else batch
    own = {name: row[f"{prefix}/{name}"] for name in PAPER}
    assert own == pytest.approx(expected(model, batch), rel=rel)


# ----------------------------------------------------------------------------------------- the numbers and where they go


class Reporter(TrainerCallback):
    def __init__(self):
        self.logs = []

    def on_log(self, args, state, control, logs=None, **kwargs):
        self.logs.append((state.global_step, dict(logs)))


@functools.cache
def usual():
    """A training of three epochs, with a reporter before and one after the callback."""
    callback = NeuralCollapseCallback(["vit.layernorm"], stages=("train", "validate"), strict=True)
    first, last = Reporter(), Reporter()
    with tempfile.TemporaryDirectory() as folder:
        trainer = train(folder, first, callback, last, evaluated=OTHER, eval_strategy="epoch", logging_steps=7)
    return trainer, callback, first, last


def test_all_samples_are_measured_in_eval_mode_at_the_end_of_every_epoch():
    trainer, callback, *_ = usual()
    assert steps(callback) == steps(callback, "validate") == [(1, 7), (2, 14), (3, 21)]
    check(callback.history[-2], trainer.model, TRAIN)
    check(callback.history[-1], trainer.model, OTHER, "nc/val")
    assert "nc/vit.layernorm/nc1" in callback.history[-2]
    assert callback.class_means.shape == (10, 16)
    alone = measure(
        trainer.model, [default_data_collator(OTHER)], reference=[default_data_collator(TRAIN)], progress=False
    )
    assert callback.history[-1]["nc/val/nc1_train_means"] == pytest.approx(alone["nc1_train_means"], rel=1e-5)


def test_values_are_entries_of_the_log_history_with_the_epoch_and_the_step_of_the_trainer():
    trainer, callback, *_ = usual()
    entries = measured(trainer)
    assert [(entry["epoch"], entry["step"]) for entry in entries[::2]] == [(1.0, 7), (2.0, 14), (3.0, 21)]
    for entry, row in zip(entries, callback.history, strict=True):
        assert {**entry, "stage": row["stage"]} == row


def test_reporters_get_the_values_wherever_they_stand_among_the_callbacks():
    _, callback, *reporters = usual()
    for reporter in reporters:
        logs = [(step, logs) for step, logs in reporter.logs if "nc/nc1" in logs]
        assert [(step, logs["epoch"]) for step, logs in logs] == [(7, 1), (14, 2), (21, 3)]
        assert [logs["nc/nc1"] for _, logs in logs] == [row["nc/nc1"] for row in callback.history[::2]]
        assert len([logs for _, logs in reporter.logs if "nc/val/nc1" in logs]) == 3


def test_logs_of_the_trainer_that_are_due_in_the_same_step_are_not_lost():
    trainer, _, reporter, _ = usual()
    assert [step for step, logs in reporter.logs if "loss" in logs] == [7, 14, 21]
    assert [entry["step"] for entry in trainer.state.log_history if "loss" in entry] == [7, 14, 21]


def test_the_history_can_be_plotted(tmp_path):
    usual()[1].plot().savefig(tmp_path / "nc.png")
    assert is_picture(tmp_path / "nc.png")


def test_tensorboard_gets_the_values_which_can_be_read_back(tmp_path, monkeypatch):
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "logs"))
    callback = NeuralCollapseCallback(strict=True)
    train(tmp_path, callback, report_to="tensorboard", num_train_epochs=2)
    (file,) = tmp_path.rglob("events.out*")  # transformers 4 has a folder of its own for them
    read = History.read(file)
    assert [(row["epoch"], row["step"]) for row in read] == steps(callback)
    for row, own in zip(read, callback.history, strict=True):
        assert {key: row[key] for key in KEYS} == pytest.approx({key: own[key] for key in KEYS}, rel=1e-6)


# --------------------------------------------------------------------------------------------------------- which epochs


@pytest.mark.parametrize(
    ("arguments", "training", "expected_steps"),
    [
        ({"every_n_epochs": 4}, {"num_train_epochs": 6}, [(1, 2), (4, 8), (6, 12)]),
        ({"every_n_epochs": log_spaced(2)}, {"num_train_epochs": 5}, [(1, 2), (4, 8), (5, 10)]),
        ({"every_n_epochs": 4}, {"max_steps": 5}, [(1, 2), (2.5, 5)]),
        ({}, {"max_steps": 1}, [(0.5, 1)]),
        ({}, {"num_train_epochs": 1.5}, [(1, 2), (1.5, 3)]),
        ({}, {"num_train_epochs": 2, "gradient_accumulation_steps": 3}, [(1, 1), (2, 2)]),
        ({"every_n_epochs": 9}, {"num_train_epochs": 3, "per_device_train_batch_size": 60}, [(1, 1), (3, 3)]),
    ],
    ids=["every fourth", "log spaced", "max_steps", "less than an epoch", "half an epoch", "accumulation", "one batch"],
)
def test_the_first_and_the_last_epoch_and_those_of_the_schedule_are_measured(
    tmp_path, arguments, training, expected_steps
):
    callback = NeuralCollapseCallback(**arguments, strict=True)
    train(tmp_path, callback, **{"per_device_train_batch_size": 26, **training})
    assert steps(callback) == expected_steps


class SetAfterStep(TrainerCallback):
    def __init__(self, step, flag):
        self.step, self.flag = step, flag

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            setattr(control, self.flag, True)


@pytest.mark.parametrize("first", [True, False])
def test_an_epoch_in_which_another_callback_ends_the_training_is_the_last_one(tmp_path, first):
    callback, stop = NeuralCollapseCallback(every_n_epochs=9, strict=True), SetAfterStep(10, "should_training_stop")
    train(tmp_path, *((stop, callback) if first else (callback, stop)))
    assert steps(callback) == [(1, 7), (1 + 3 / 7, 10)]


def test_epochs_that_another_callback_cuts_short_are_epochs(tmp_path):
    callback = NeuralCollapseCallback(strict=True)
    train(tmp_path, SetAfterStep(4, "should_epoch_stop"), callback)
    assert steps(callback) == [(4 / 7, 4), (2, 11), (3, 18)]


def test_an_epoch_that_early_stopping_has_made_the_last_is_measured_before_the_reporters_close(tmp_path):
    callback, reporter = NeuralCollapseCallback(every_n_epochs=9, strict=True), Reporter()
    stop = EarlyStoppingCallback(early_stopping_threshold=1e9)  # no loss is that much better than the first
    stopping = {"metric_for_best_model": "loss", "eval_strategy": "epoch"}
    trainer = train(tmp_path, stop, reporter, callback, evaluated=OTHER, num_train_epochs=9, **stopping)
    assert steps(callback) == [(1, 7), (2, 14)]
    check(callback.history[-1], trainer.model, TRAIN)
    assert [step for step, logs in reporter.logs if "nc/nc1" in logs] == [7, 14]
    assert [row.get("weights") for row in callback.history] == [None, None]


class EvaluatingTrainer(CountingTrainer):
    """Evaluates its training data in the middle of an epoch."""

    def training_step(self, *args, **kwargs):
        if self.state.global_step == 3:
            self.evaluate(TRAIN, metric_key_prefix="train")
        return super().training_step(*args, **kwargs)


def test_an_evaluation_of_the_training_data_in_the_middle_of_an_epoch_is_not_its_end(tmp_path):
    callback = NeuralCollapseCallback(strict=True)
    train(tmp_path, callback, kind=EvaluatingTrainer, num_train_epochs=1)
    assert steps(callback) == [(1, 7)]


def test_the_rule_can_be_overridden(tmp_path):
    class Second(NeuralCollapseCallback):
        def should_measure(self, args, state, control):
            return state.epoch == 2

    callback = Second(strict=True)
    train(tmp_path, callback)
    assert steps(callback) == [(2, 14)]


def test_the_best_weights_that_training_leaves_are_measured_too_and_marked(tmp_path):
    best = {"load_best_model_at_end": True, "metric_for_best_model": "step", "greater_is_better": False}
    every = {"eval_strategy": "epoch", "save_strategy": "epoch"}
    callback = NeuralCollapseCallback(strict=True)
    trainer = train(
        tmp_path,
        callback,
        model=bert(),
        data=TEXTS,
        evaluated=TEXTS,
        collator=padded,
        num_train_epochs=2,
        **best,
        **every,
    )
    assert [row.get("weights") for row in callback.history] == [None, None, "swapped"]
    first, *_, last = callback.history
    assert [last[key] for key in KEYS] == [first[key] for key in KEYS]
    assert measured(trainer)[-1]["weights"] == "swapped"


# --------------------------------------------------------------------------------------------------------------- stages


def test_evaluated_data_are_measured_with_every_epoch_that_is_due(tmp_path):
    callback = NeuralCollapseCallback(stages=("train", "validate"), every_n_epochs=3, strict=True)
    train(tmp_path, callback, evaluated=OTHER, eval_strategy="epoch", num_train_epochs=4)
    assert steps(callback) == steps(callback, "validate") == [(1, 7), (3, 21), (4, 28)]


@pytest.mark.skipif(
    transformers.__version__ < "5", reason="transformers 4 does not evaluate at the end of the training"
)
def test_a_rarer_evaluation_is_measured_after_an_epoch_that_was_due(tmp_path):
    callback = NeuralCollapseCallback(stages=("validate",), every_n_epochs=9, strict=True)
    train(tmp_path, callback, evaluated=OTHER, eval_strategy="steps", eval_steps=10, num_train_epochs=6)
    assert steps(callback) == []
    assert steps(callback, "validate") == [(1 + 3 / 7, 10), (5 + 5 / 7, 40), (6, 42)]


def test_an_evaluation_before_the_first_step_is_not_measured(tmp_path):
    callback = NeuralCollapseCallback(stages=("validate",), strict=True)
    train(tmp_path, callback, evaluated=OTHER, eval_strategy="epoch", eval_on_start=True, num_train_epochs=1)
    assert steps(callback, "validate") == [(1, 7)]


def test_several_data_sets_are_counted_in_their_order(tmp_path):
    sets = {"plain": OTHER, "again": TRAIN}
    callback = NeuralCollapseCallback(stages=("validate",), strict=True)
    trainer = train(tmp_path, callback, evaluated=sets, eval_strategy="epoch", num_train_epochs=2)
    assert [{key.split("/")[1] for key in row if "/" in key} for row in callback.history] == [{"val"}, {"val_1"}] * 2
    check(callback.history[-1], trainer.model, TRAIN, "nc/val_1")


def test_predicted_data_and_an_evaluation_named_test_are_of_the_stage_test(tmp_path):
    callback = NeuralCollapseCallback(stages=("test",), strict=True)
    trainer = train(tmp_path, callback, evaluated=OTHER, num_train_epochs=1)
    trainer.evaluate()
    assert callback.history == []
    trainer.predict(OTHER)
    trainer.evaluate(OTHER, metric_key_prefix="test")
    assert steps(callback, "test") == [(1, 7), (1, 7)]
    for row in callback.history:
        check(row, trainer.model, OTHER, "nc/test")


def test_a_model_is_measured_without_any_training(tmp_path):
    callback = NeuralCollapseCallback(stages=("validate",), strict=True)
    arguments = TrainingArguments(str(tmp_path), report_to="none", disable_tqdm=True, use_cpu=True)
    Trainer(model=vit(), args=arguments, eval_dataset=OTHER, callbacks=[callback]).evaluate()
    assert steps(callback, "validate") == [(0, 0)]


def test_other_data_than_those_of_the_training_are_measured_if_they_are_given(tmp_path):
    data = DataLoader(OTHER, 7, shuffle=True, collate_fn=default_data_collator)
    callback = NeuralCollapseCallback(dataloader=data, strict=True)
    trainer = train(tmp_path, callback, num_train_epochs=1)
    check(callback.history[-1], trainer.model, OTHER)


@pytest.mark.filterwarnings("ignore:no sample of")
@pytest.mark.parametrize(
    ("make", "labels", "collator", "arguments"),
    [
        (bert, "subject", padded, {}),
        (bert_of_tokens, "token", padded, {}),
        (gpt2, None, for_language, NEXT),
    ],
    ids=["sequence classifier", "token classifier", "causal language model"],
)
def test_sequences_of_different_lengths_are_measured(tmp_path, make, labels, collator, arguments):
    data = passages(50, labels)
    callback = NeuralCollapseCallback(strict=True, **arguments)
    trainer = train(tmp_path, callback, model=make(), data=data, collator=collator, num_train_epochs=1)
    check(callback.history[-1], trainer.model, collator(data), rel=1e-4)


def test_a_causal_language_model_without_next_token_is_told_of_it(tmp_path):
    with pytest.raises(ValueError, match="pass target_fn='next_token'"):
        train(
            tmp_path, NeuralCollapseCallback(strict=True), model=gpt2(), data=passages(9, None), collator=for_language
        )


# ---------------------------------------------------------------------------------------------------- training unchanged


def assert_identical(first, second):
    if isinstance(first, torch.Tensor):
        assert torch.equal(first, second)
    elif isinstance(first, dict):
        assert first.keys() == second.keys()
        for key, value in first.items():
            assert_identical(value, second[key])
    elif isinstance(first, list | tuple):
        assert len(first) == len(second)
        for one, other in zip(first, second, strict=True):
            assert_identical(one, other)
    else:
        assert first == second or (first != first and second != second)


class Noisy(list):
    """Samples with random augmentation from every random stream."""

    def __getitem__(self, index):
        sample = super().__getitem__(index)
        noise = torch.randn_like(sample["pixel_values"]) * random.random() * np.random.rand()
        return {**sample, "pixel_values": sample["pixel_values"] + 0.1 * noise}


EVALUATED = {"evaluated": OTHER, "eval_strategy": "steps", "eval_steps": 5}
TRAININGS = {
    "shuffled": {},
    "accumulation": {"gradient_accumulation_steps": 3, "max_grad_norm": 0.5, **EVALUATED},
    "bf16": {"bf16": True},
    "checkpointing": {"gradient_checkpointing": True},
    "evaluation": EVALUATED,
    "workers": {"dataloader_num_workers": 2, "dataloader_persistent_workers": True},
    "max_steps": {"max_steps": 10, "dataloader_drop_last": True},
    "all at once": {
        "model": gpt2,
        "data": passages(50, None),
        "evaluated": passages(20, None),
        "collator": for_language,
        "eval_strategy": "epoch",
        "gradient_accumulation_steps": 2,
        "bf16": True,
        "gradient_checkpointing": True,
    },
}


@pytest.mark.filterwarnings(
    "ignore:.*gradient_checkpointing. is deprecated", "ignore:no sample of", "ignore:nc1 leaves out"
)
@pytest.mark.parametrize(
    "arguments",
    [
        pytest.param(v, id=k, marks=() if k in ("shuffled", "all at once") else pytest.mark.slow)
        for k, v in TRAININGS.items()
    ],
)
def test_training_is_bit_for_bit_the_same_with_and_without_the_callback(tmp_path, arguments):
    make, arguments = arguments.get("model", vit), {"data": Noisy(TRAIN), **arguments}
    target_fn = "next_token" if make is gpt2 else None
    callback = NeuralCollapseCallback(["*.0"], stages=("train", "validate"), target_fn=target_fn, strict=True)
    plain = state_of(train(tmp_path, **{**arguments, "model": make()}))
    assert_identical(plain, state_of(train(tmp_path, callback, **{**arguments, "model": make()})))
    assert len(steps(callback)) >= 2
    assert ("evaluated" in arguments) == bool(steps(callback, "validate"))


@needs_torch_2_6
@pytest.mark.parametrize("saved", [7, 10])
def test_a_resumed_training_is_the_same_and_goes_on_with_the_history_of_the_checkpoint(tmp_path, saved):
    def run(callback, **kwargs):
        saving = {"save_strategy": "steps", "save_steps": saved, "save_total_limit": 9}
        return train(tmp_path, callback, data=TEXTS, collator=padded, num_train_epochs=2, **saving, **kwargs)

    whole, resumed = (NeuralCollapseCallback(geometry=(0, 1), strict=True) for _ in range(2))
    first = state_of(run(whole, model=bert()))
    trainer = run(resumed, model=bert(1), resume=str(tmp_path / f"checkpoint-{saved}"))
    assert resumed.history == whole.history
    assert resumed.history.scenes == whole.history.scenes
    assert [scene.chosen for scene in whole.history.scenes] == [[0, 1], [0, 1]]
    assert [entry["nc/nc1"] for entry in measured(trainer)] == [row["nc/nc1"] for row in whole.history]
    assert_identical(state_of(trainer)["weights"], first["weights"])
    assert_identical(state_of(trainer)["optimizer"], first["optimizer"])


@needs_torch_2_6
def test_a_checkpoint_of_a_training_without_the_callback_can_be_resumed_with_it_and_again(tmp_path):
    def run(callback, epochs, resume=None):
        every = {"save_strategy": "epoch", "num_train_epochs": epochs, "resume": resume and str(tmp_path / resume)}
        train(tmp_path, *callback, model=bert(), data=TEXTS, collator=padded, **every)

    run([], 1)
    callback, again = NeuralCollapseCallback(strict=True), NeuralCollapseCallback(strict=True)
    run([callback], 2, "checkpoint-7")
    assert steps(callback) == [(2, 14)]
    saved = json.loads((tmp_path / "checkpoint-14/trainer_state.json").read_text())["log_history"]
    assert [entry["nc/nc1"] for entry in saved if "nc/nc1" in entry] == [row["nc/nc1"] for row in callback.history]
    run([again], 2, "checkpoint-14")  # which is complete, and measured
    assert again.history == callback.history


def test_another_training_with_the_same_callback_starts_a_new_history(tmp_path):
    callback = NeuralCollapseCallback(strict=True)
    trainer = train(tmp_path, callback, num_train_epochs=1)
    first = callback.history
    trainer.train()
    assert callback.previous_histories == [first]
    assert steps(callback) == [(1, 7)]


# ------------------------------------------------------------------------------------------------------------- failures


class Stream(IterableDataset):
    def __iter__(self):
        yield from TRAIN


def test_what_cannot_be_measured_warns_once_and_training_goes_on(tmp_path):
    callback = NeuralCollapseCallback()
    with pytest.warns(UserWarning, match="DataLoaderDispatcher of Accelerate.*pass dataloader=") as caught:
        trainer = train(tmp_path, callback, data=Stream(), max_steps=12)
    assert len([w for w in caught if "neural collapse" in str(w.message)]) == 1
    assert trainer.state.global_step == 12
    assert callback.history == measured(trainer) == []


def test_with_strict_it_raises(tmp_path):
    with pytest.raises(LookupError, match="is named 'fc'"):
        train(tmp_path, NeuralCollapseCallback(["fc"], strict=True))


def test_the_arguments_are_those_of_the_lightning_callback():
    own, lightnings = (
        inspect.signature(kind.__init__) for kind in (NeuralCollapseCallback, lightning_nc.NeuralCollapseCallback)
    )
    assert list(own.parameters.values()) == list(lightnings.parameters.values())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"mode": "online"}, "mode must be 'exact', got 'online'.*every_n_epochs="),
        ({"every_n_epochs": 0}, "every_n_epochs must be a positive integer"),
        ({"stages": "train"}, "stages must be a sequence"),
        ({"stages": ("eval",)}, "any of 'train', 'validate', 'test', got"),
        ({"metrics": "nc9"}, "unknown metric"),
        ({"layers": "vit"}, r"write \['vit'\]"),
    ],
)
def test_arguments_that_do_not_fit_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        NeuralCollapseCallback(**arguments)


def test_a_callback_that_no_trainer_calls_says_that_reporters_get_nothing(tmp_path):
    trainer = train(tmp_path, num_train_epochs=1)
    callback = NeuralCollapseCallback(strict=True)
    given = {"model": trainer.model, "train_dataloader": trainer.callback_handler.train_dataloader}
    with pytest.warns(UserWarning, match="reporters such as W&B got no values"):
        callback.on_epoch_end(trainer.args, trainer.state, trainer.control, **given)
    assert len(callback.history) == 1


# -------------------------------------------------------------------------------------------------------- two processes


def ranks():
    """What each of two processes saved; see huggingface_ranks.py."""
    return [rank["huggingface"] for rank in run("sharded")[0]]


def loaded(model, state):
    model.load_state_dict(state)
    return model


def test_two_processes_measure_every_sample_once_in_both_stages():
    first, second = (rank["trained"] for rank in ranks())
    assert first["history"] == second["history"]
    assert [row["step"] for row in first["history"]] == [4, 4, 8, 8]
    model = loaded(vit(), first["measured"]["state"]["weights"])
    check(first["history"][-2], model, TRAIN)
    check(first["history"][-1], model, OTHER, "nc/val")
    assert [entry for entry in first["measured"]["logs"] if "nc/nc1" in entry]


def test_a_training_in_two_processes_is_bit_for_bit_the_same_with_and_without_the_callback():
    for rank in ranks():
        assert_identical(rank["trained"]["plain"]["state"], rank["trained"]["measured"]["state"])


def test_two_processes_measure_a_language_model_in_training():
    first, second = (rank["language"] for rank in ranks())
    assert first["history"] == second["history"]
    model = loaded(gpt2(), first["state"]["weights"])
    check(first["history"][-1], model, for_language(huggingface_ranks.TEXTS), rel=1e-4)


@needs_fsdp2
def test_a_training_whose_parameters_are_sharded_is_measured_and_is_the_same():
    first, second = (rank["sharded_training"] for rank in ranks())
    assert first["history"] == second["history"]
    check(
        first["history"][-1],
        loaded(gpt2(), first["measured"]["weights"]),
        for_language(huggingface_ranks.TEXTS),
        rel=1e-4,
    )
    for rank in (first, second):
        assert_identical(rank["plain"], rank["measured"])


def test_if_one_process_cannot_measure_both_warn_and_train_on():
    first, second = (rank["gives_up"] for rank in ranks())
    assert first["history"] == second["history"] == []
    assert first["steps"] == second["steps"] == 4
    assert "another rank could not measure its part" in first["said"][0]
    assert "labels must lie in [0, 10)" in second["said"][0]
    assert len(first["said"]) == len(second["said"]) == 1


def test_measure_gives_the_values_of_all_samples_in_a_loop_with_accelerate_and_leaves_the_training_as_it_is():
    first, second = (rank["accelerated"] for rank in ranks())
    for rank in (first, second):
        assert_identical({**rank[True], "values": []}, rank[False])
    assert first[True]["values"] == second[True]["values"]
    model = loaded(vit(), first[True]["state"])
    for values, data in zip(first[True]["values"][-1], (TRAIN, OTHER), strict=True):
        check({f"nc/{key}": value for key, value in values.items()}, model, data)


@pytest.mark.parametrize(
    ("part", "make", "collate", "data"),
    [
        pytest.param("sharded language", gpt2, for_language, "TEXTS", marks=needs_fsdp2),
        ("padding alone", gpt2, for_language, "TEXTS"),
        pytest.param("sharded tokens", bert_of_tokens, padded, "TOKENS", marks=needs_fsdp2),
    ],
)
def test_ranks_with_batches_of_padding_measure_what_one_process_measures(part, make, collate, data):
    first, second = (rank[part] for rank in ranks())
    assert first == second
    check({f"nc/{key}": v for key, v in first.items()}, make(), collate(getattr(huggingface_ranks, data)), rel=1e-4)
