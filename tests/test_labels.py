"""Whatever labels a batch holds, each class index meets the feature vector that belongs to it."""

import functools
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import label_cases
import numpy as np
import pytest
import reference
import torch
from conftest import fit, free_port
from label_cases import (
    CASES,
    Frozen,
    causal,
    features_and_labels,
    gpt2,
    loader_of,
    segmentation,
    sequences,
    token_classifier,
)
from torch import nn

from lightning_nc import NeuralCollapseCallback, measure
from lightning_nc.functional import METRICS

pytestmark = pytest.mark.filterwarnings("ignore:no sample of")


def truth(case):
    """Every metric that the classifier of a case has, from the float64 reference on independently paired rows."""
    rows, target = features_and_labels(case)
    head = case.model.get_submodule(case.head)
    weight = head.weight.detach().double().flatten(1).numpy()
    bias = np.zeros(len(weight)) if head.bias is None else head.bias.detach().double().numpy()
    if len(weight) == 1:
        weight, bias = np.concatenate([-weight, weight]), np.concatenate([-bias, bias])
    seen = np.unique(target)
    values = reference.all_metrics(rows, target, weight[seen], bias[seen])
    return values if head.bias is not None else {k: v for k, v in values.items() if k != "bias_collapse"}


@pytest.mark.parametrize("name", CASES)
def test_every_metric_equals_an_independent_computation_for_every_kind_of_label(name):
    case = CASES[name]()
    values = measure(case.model, case.batches, metrics=tuple(METRICS), progress=False, **case.arguments)
    expected = truth(case)
    own = {key: value for key, value in values.items() if "/" not in key}
    assert own.keys() == expected.keys()
    assert own == pytest.approx(expected, rel=2e-5, abs=1e-6)


@pytest.mark.parametrize(
    "mode", [{}, {"mode": "online"}, {"stages": ("validate",)}], ids=["exact", "online", "validation"]
)
@pytest.mark.parametrize("name", CASES)
def test_every_mode_of_the_callback_pairs_the_same_labels_and_features(name, mode, tmp_path):
    case = CASES[name]()
    callback = NeuralCollapseCallback(metrics=tuple(METRICS), strict=True, **mode, **case.arguments)
    data = loader_of(case.batches)
    fit(tmp_path, [callback], data, Frozen(case.model), val=data, max_epochs=1)
    expected, prefix = truth(case), "nc/val/" if "stages" in mode else "nc/"
    found = {name: callback.history[-1][prefix + name] for name in expected}
    assert found == pytest.approx(expected, rel=2e-5, abs=1e-6)


@functools.cache
def ranks():
    """What each of two processes measured, see label_ranks.py."""
    script, launcher = Path(label_cases.__file__).with_name("label_ranks.py"), ["-m", "torch.distributed.run"]
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, *launcher, "--nproc-per-node=2", "--master-port", str(free_port()), script, folder]
        done = subprocess.run(
            command, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=300
        )
        assert not done.returncode, done.stderr
        return [torch.load(Path(folder, f"{rank}.pt"), weights_only=False) for rank in range(2)]


@pytest.mark.parametrize("name", CASES)
def test_two_processes_measure_the_labels_of_both(name):
    expected = truth(CASES[name]())
    for rank in ranks():
        assert {key: rank[name][key] for key in expected} == pytest.approx(expected, rel=2e-5, abs=1e-6)


@pytest.mark.parametrize("name", ["padding alone", "exact", "online", "validation"])
def test_a_rank_with_nothing_but_padding_and_every_mode_of_two_processes_give_the_values_of_the_whole(name):
    expected = truth(causal())
    prefix = {"padding alone": "", "validation": "nc/val/"}.get(name, "nc/")
    for rank in ranks():
        assert {key: rank[name][prefix + key] for key in expected} == pytest.approx(expected, rel=2e-5, abs=1e-6)


def test_layers_at_the_same_positions_are_measured_and_those_of_another_resolution_are_left_out():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 6, 3, padding=1), nn.AvgPool2d(2), nn.Upsample(scale_factor=2), nn.Conv2d(6, 4, 1))
    batch = torch.randn(5, 3, 4, 6), torch.randint(4, (5, 4, 6))
    with pytest.warns(UserWarning, match=r"layer '1' is left out.*\(3, 6, 2, 3\) for labels \(3, 4, 6\); pass pool="):
        values = measure(net, [batch], layers=["0", "1", "2"], progress=False)
    assert {key.split("/")[0] for key in values if "/" in key} == {"0", "2"}
    with torch.no_grad():
        maps = net[:1](batch[0])
    rows = maps.permute(0, 2, 3, 1).reshape(-1, 6).double().numpy()
    assert values["0/nc1"] == pytest.approx(reference.nc1(rows, batch[1].flatten().numpy()), rel=1e-5)

    def resampled(output):
        return nn.functional.interpolate(output, size=(4, 6)).movedim(1, -1)

    assert "1/nc1" in measure(net, [batch], layers=["1"], pool=resampled, progress=False)


def test_the_order_of_the_positions_is_that_of_the_labels_where_the_model_flattens_them():
    torch.manual_seed(0)

    class Tagger(nn.Module):
        def __init__(self, transposed):
            super().__init__()
            self.transposed, self.body, self.head = transposed, nn.Linear(4, 6), nn.Linear(6, 3)

        def forward(self, x):
            hidden = self.body(x).relu()
            return self.head((hidden.transpose(0, 1) if self.transposed else hidden).reshape(-1, 6))

    batch = torch.randn(6, 5, 4), torch.randint(3, (6, 5))
    model = Tagger(transposed=False)
    with torch.no_grad():
        rows = model.body(batch[0]).relu().reshape(-1, 6)
    expected = reference.nc1(rows.double().numpy(), batch[1].flatten().numpy())
    assert measure(model, [batch], progress=False)["nc1"] == pytest.approx(expected, rel=1e-5)
    with pytest.raises(LookupError, match="another order than the labels"):
        measure(Tagger(transposed=True), [batch], progress=False)


def test_ignored_labels_count_nowhere_even_where_their_features_are_not_finite():
    rows, target = torch.randn(20, 5), torch.arange(20) % 3
    model = nn.Linear(5, 3)
    clean = measure(model, [(rows[:15], target[:15])], progress=False)
    rows[15:], target[15:] = torch.nan, -100
    assert measure(model, [(rows, target)], progress=False) == pytest.approx(clean, rel=1e-12)
    only_ignored = rows[15:], target[15:]
    batches = [only_ignored, (rows[:15], target[:15]), only_ignored]
    assert measure(model, batches, progress=False) == pytest.approx(clean, rel=1e-12)


def test_bfloat16_and_gradient_checkpointing_measure_what_the_model_computes():
    case = causal()
    case.model.to(torch.bfloat16).gradient_checkpointing_enable()
    values = measure(case.model, case.batches, progress=False, metrics=("nc1", "nc3"), **case.arguments)
    expected = truth(case._replace(model=case.model))
    assert values == pytest.approx({name: expected[name] for name in values}, rel=1e-4)


def test_token_labels_that_the_model_shifts_by_itself_are_refused_without_next_token():
    tokens, mask = sequences()
    labels = tokens.masked_fill(mask == 0, -100)
    batch = {"input_ids": tokens, "attention_mask": mask, "labels": labels}
    with pytest.raises(ValueError, match=r"equal its input tokens.*pass target_fn='next_token'"):
        measure(gpt2(), [batch], progress=False)
    shifted = {**batch, "labels": torch.cat([labels[:, 1:], torch.full((12, 1), -100)], dim=1)}
    with pytest.raises(ValueError, match="shifted already, leave target_fn out"):
        measure(gpt2(), [shifted], target_fn="next_token", progress=False)
    own = measure(gpt2(), [shifted], progress=False)
    assert own == measure(gpt2(), [batch], target_fn="next_token", progress=False)
    with pytest.raises(LookupError, match="needs a batch with labels or input_ids"):
        measure(nn.Linear(4, 3), [(torch.randn(5, 4), torch.arange(5) % 3)], target_fn="next_token", progress=False)


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (torch.tensor([[0.7, 0.3, 0.0]]).repeat(6, 1), r"soft row \[0.7, 0.3, 0.0\] \(from mixup.*dataloader="),
        (torch.tensor([[1, 1, 0]]).repeat(6, 1), r"the row \[1, 1, 0\] with 2 classes"),
        (torch.zeros(6, 3), r"the row \[0.0, 0.0, 0.0\] with 0 classes"),
        (torch.arange(6) % 3 + 1, "start at 1: pass target_fn"),
        (torch.tensor([0, 1, 2, 0, 255, 255]), "got 2 outside.*pass ignore_index=255"),
        (torch.tensor([0, 1, 2, -1, 0, 1]), "pass ignore_index=-1"),
        (torch.arange(6), r"lie in \[0, 3\), the outputs of 'fc', got 3 outside.*name it with classifier="),
        (torch.arange(6) % 3 + 0.0, r"floats of shape \(6,\).*\.long\(\)"),
        (torch.rand(6, 5), r"floats of shape \(6, 5\).*no rows of 3 classes"),
        (
            torch.zeros(6, 4, dtype=torch.long),
            r"\(6, 4\) are per position, but the classifier receives one feature vector",
        ),
        (torch.tensor(1), "must hold class indices"),
        (torch.zeros(6, dtype=torch.complex64), "must hold class indices"),
        ([0, 1, 2, 0, 1, 2], "must be a tensor.*got list"),
    ],
)
def test_a_label_error_names_its_cause(labels, message):
    model = nn.Sequential()
    model.add_module("fc", nn.Linear(4, 3))
    with pytest.raises(ValueError, match=message):
        measure(model, [(torch.randn(6, 4), labels)], progress=False)


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (torch.rand(6), "whole numbers, got 0.*soft labels, or a regression"),
        (torch.tensor([-1, 1, -1, 1, 1, 1]), r"-1 and 1 pass target_fn, such as lambda batch: \(batch\[1\] > 0\)"),
        (torch.tensor([0, 1, 2, 1, 0, 1]), r"lie in \[0, 2\)"),
    ],
)
def test_a_label_error_of_a_head_with_one_output_names_its_cause(labels, message):
    with pytest.raises(ValueError, match=message):
        measure(nn.Linear(4, 1), [(torch.randn(6, 4), labels)], progress=False)


def test_soft_labels_of_a_later_batch_are_not_taken_for_classes():
    hard = torch.randn(6, 4), nn.functional.one_hot(torch.arange(6) % 3, 3).float()
    mixed = torch.randn(6, 4), 0.6 * hard[1] + 0.4 * hard[1].roll(1, 0)
    with pytest.raises(ValueError, match="soft row"):
        measure(nn.Linear(4, 3), [hard, mixed], progress=False)
    indices = torch.randn(6, 4), torch.arange(6) % 3
    with pytest.raises(ValueError, match="whole numbers"):
        measure(nn.Linear(4, 3), [indices, mixed], progress=False)


@pytest.mark.parametrize("kind", [torch.bool, torch.float64, torch.int8, torch.uint8, torch.int64])
def test_labels_of_one_output_may_come_in_any_type_as_a_row_or_a_column(kind):
    rows, target = torch.randn(12, 4), torch.arange(12) % 2
    model = nn.Linear(4, 1)
    expected = measure(model, [(rows, target)], progress=False)
    assert measure(model, [(rows, target.to(kind))], progress=False) == expected
    assert measure(model, [(rows, target.to(kind)[:, None])], num_classes=2, progress=False) == expected


@pytest.mark.parametrize("kind", [torch.bool, torch.float32, torch.int32, torch.uint8])
def test_one_hot_rows_equal_class_indices_per_sample_and_per_position(kind):
    rows, target = torch.randn(12, 4), torch.arange(12) % 3
    hot = nn.functional.one_hot(target, 3)
    model = nn.Linear(4, 3)
    assert measure(model, [(rows, hot.to(kind))], progress=False) == measure(model, [(rows, target)], progress=False)
    case = segmentation()
    images, labels = case.batches[0]
    labels = labels.long() % 4
    maps = nn.functional.one_hot(labels, 4).movedim(-1, 1)
    assert measure(case.model, [(images, maps.to(kind))], progress=False) == measure(
        case.model, [(images, labels)], progress=False
    )


def test_labels_that_may_be_one_hot_rows_or_positions_are_refused():
    model = nn.Linear(4, 3)
    rows, hot = torch.randn(6, 3, 4), nn.functional.one_hot(torch.arange(6) % 3, 3)
    with pytest.raises(ValueError, match="may be one-hot rows or a class index per position"):
        measure(model, [(rows, hot)], progress=False)
    assert measure(model, [(rows, torch.arange(18).view(6, 3) % 3)], progress=False)


def test_the_last_token_that_is_not_padding_is_what_a_causal_classifier_uses():
    import transformers

    tokens, mask = sequences(seed=4)
    tokens = tokens.clamp(min=1) * mask
    config = transformers.GPT2Config(
        vocab_size=7, n_positions=12, n_embd=16, n_layer=2, n_head=2, num_labels=3, pad_token_id=0
    )
    model = transformers.GPT2ForSequenceClassification(config).eval()
    target = torch.arange(12) % 3
    batch = {"input_ids": tokens, "attention_mask": mask, "labels": target}
    with torch.no_grad():
        hidden = model.transformer(tokens, attention_mask=mask).last_hidden_state
    rows = np.stack([hidden[i, int(n) - 1].double().numpy() for i, n in enumerate(mask.sum(1))])
    values = measure(model, [batch], pool="last", layers=["transformer.h.1"], progress=False)
    assert values["nc1"] == pytest.approx(reference.nc1(rows, target.numpy()), rel=1e-5)
    assert "transformer.h.1/nc1" in values


def test_a_token_classifier_of_positions_needs_no_pool():
    case = token_classifier()
    values = [
        measure(case.model, case.batches, pool=pool, progress=False)["nc1"]
        for pool in ("mean", "first", "flatten", lambda output: output.mean(dim=1))
    ]
    assert len(set(values)) == 1
