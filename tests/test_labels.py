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
from lightning_nc.functional.table import check_metrics

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
    missing = {"bias_collapse"} if head.bias is None else set()
    return {name: values[name] for name in check_metrics("all") if name not in missing}


@pytest.mark.parametrize("name", CASES)
def test_every_metric_equals_an_independent_computation_for_every_kind_of_label(name):
    case = CASES[name]()
    values = measure(case.model, case.batches, metrics="all", progress=False, **case.arguments)
    expected = truth(case)
    own = {key: value for key, value in values.items() if "/" not in key and key != "effective_depth"}
    assert own.keys() == expected.keys()
    assert own == pytest.approx(expected, rel=2e-5, abs=1e-6, nan_ok=True)


@pytest.mark.parametrize(
    "mode", [{}, {"mode": "online"}, {"stages": ("validate",)}], ids=["exact", "online", "validation"]
)
@pytest.mark.parametrize("name", CASES)
def test_every_mode_of_the_callback_pairs_the_same_labels_and_features(name, mode, tmp_path):
    case = CASES[name]()
    callback = NeuralCollapseCallback(metrics="all", strict=True, **mode, **case.arguments)
    data = loader_of(case.batches)
    fit(tmp_path, [callback], data, Frozen(case.model), val=data, max_epochs=1)
    expected, prefix = truth(case), "nc/val/" if "stages" in mode else "nc/"
    found = {name: callback.history[-1][prefix + name] for name in expected}
    assert found == pytest.approx(expected, rel=2e-5, abs=1e-6, nan_ok=True)


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
        assert {key: rank[name][key] for key in expected} == pytest.approx(expected, rel=2e-5, abs=1e-6, nan_ok=True)


@pytest.mark.parametrize("name", ["padding alone", "exact", "online", "validation"])
def test_a_rank_with_nothing_but_padding_and_every_mode_of_two_processes_give_the_values_of_the_whole(name):
    expected = truth(causal())
    prefix = {"padding alone": "", "validation": "nc/val/"}.get(name, "nc/")
    for rank in ranks():
        assert {key: rank[name][prefix + key] for key in expected} == pytest.approx(
            expected, rel=2e-5, abs=1e-6, nan_ok=True
        )


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

    with torch.no_grad():
        rows = resampled(net[:2](batch[0])).reshape(-1, 6).double().numpy()
    expected = pytest.approx(reference.nc1(rows, batch[1].flatten().numpy()), rel=1e-5)
    assert measure(net, [batch], layers=["1"], pool=resampled, progress=False)["1/nc1"] == expected
    channels_first = measure(net, [batch], layers=["1"], pool=lambda x: resampled(x).movedim(-1, 1), progress=False)
    assert channels_first["1/nc1"] == expected
    with pytest.warns(UserWarning, match=r"\(and \(3, 6, 2, 3\) from pool=\)"):
        measure(net, [batch], layers=["1"], pool=lambda x: x, progress=False)


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
            r"\(6, 4\) do not fit what the classifier 'fc' receives, \(3, 4\) for 3 samples",
        ),
        (torch.tensor(1), "must hold class indices"),
        (torch.zeros(6, dtype=torch.complex64), "must hold class indices"),
        ([0, 1, 2, 0, 1, 2], "must be a tensor.*got list; pass target_fn"),
        (
            torch.tensor([[-100.0, -100.0, -100.0]]).repeat(6, 1),
            r"the row \[-100.0, -100.0, -100.0\]; neural.*ignore_index",
        ),
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
        (torch.tensor([0, 1, torch.nan, 0, 1, 0]), r"got nan; for labels that are missing.*nan_to_num\(-100\)"),
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
    for batches in ([indices, mixed], [hard, indices]):
        with pytest.raises(ValueError, match=r"are of another kind than those of the first batch.*takes both"):
            measure(nn.Linear(4, 3), batches, progress=False)


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


def test_one_hot_maps_are_read_along_their_classes_where_the_image_is_as_wide():
    torch.manual_seed(0)
    model = nn.Conv2d(3, 4, 1)
    images, target = torch.randn(5, 3, 4, 4), torch.randint(4, (5, 4, 4))
    expected = measure(model, [(images, target)], progress=False)
    hot = nn.functional.one_hot(target, 4)
    for rows in (hot.movedim(-1, 1), hot, hot.movedim(-1, 1).float()):
        assert measure(model, [(images, rows)], progress=False) == expected
    with pytest.raises(ValueError, match="along more than one axis"):
        measure(
            model, [(images, (sum(torch.meshgrid(*[torch.arange(4)] * 3, indexing="ij")) % 4 == 0).expand(5, 4, 4, 4))]
        )


def test_a_column_of_labels_is_one_per_sample_for_every_layer():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 6, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 1))
    images, target = torch.randn(12, 3, 5, 5), (torch.arange(12) % 2).float()
    expected = measure(model, [(images, target)], layers=["0"], progress=False)
    assert "0/nc1" in expected
    assert measure(model, [(images, target[:, None])], layers=["0"], progress=False) == expected


class Shuffling(nn.Module):
    """Gives the classifier its rows in another order: one time step of all samples after the other, or samples reversed."""

    def __init__(self, kind):
        super().__init__()
        self.kind, self.head = kind, nn.Linear(4, 3)

    def forward(self, x):
        return self.head(x.flip(0) if self.kind == "reversed" else x.transpose(0, 1).reshape(-1, 4))


@pytest.mark.parametrize("samples", [2, 3, 5])
@pytest.mark.parametrize("kind", ["reversed", "time first"])
def test_rows_in_another_order_than_the_labels_are_refused_in_batches_of_any_size(kind, samples):
    torch.manual_seed(0)
    positions = () if kind == "reversed" else (5,)
    batches = [(torch.randn(samples, *positions, 4), torch.randint(3, (samples, *positions))) for _ in range(4)]
    with pytest.raises(LookupError, match="another order than the labels"):
        measure(Shuffling(kind), batches, progress=False)


@pytest.mark.parametrize("sizes", [(1, 4), (4, 4)])
def test_flattened_positions_whose_order_no_run_can_tell_are_pointed_out(sizes):
    torch.manual_seed(0)
    model = Shuffling("time first")

    def whole_batches_only(model, batch):
        assert len(batch[0]) in sizes
        return model(batch[0])

    batches = [(torch.randn(n, 5, 4), torch.randint(3, (n, 5))) for n in sizes]
    with pytest.warns(
        UserWarning, match=r"rows of 'head' are taken to be all positions of the first sample.*\(T, B, d\)"
    ):
        measure(model, batches, forward_fn=whole_batches_only, progress=False)


def test_layers_of_torchs_encoder_that_drop_the_padding_are_measured_at_its_positions():
    torch.manual_seed(0)

    class Tagger(nn.Module):
        def __init__(self):
            super().__init__()
            layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, dropout=0.0)
            self.body, self.encoder, self.head = nn.Embedding(7, 8), nn.TransformerEncoder(layer, 2), nn.Linear(8, 3)

        def forward(self, input_ids, attention_mask):
            return self.head(self.encoder(self.body(input_ids), src_key_padding_mask=attention_mask == 0))

    tokens, mask = sequences()
    target = torch.randint(3, tokens.shape).masked_fill(mask == 0, -100)
    batch = {"input_ids": tokens, "attention_mask": mask, "labels": target}
    values = measure(Tagger(), [batch], layers=["encoder.layers.1"], progress=False)
    assert values["encoder.layers.1/nc1"] == pytest.approx(values["nc1"], rel=1e-5)


def test_a_layer_with_as_many_features_as_the_labels_have_positions_is_not_measured_across():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 8), nn.Flatten(1), nn.Unflatten(1, (2, 20)), nn.Linear(20, 5), nn.Linear(5, 20))
    net.extend([nn.Flatten(1), nn.Unflatten(1, (5, 8)), nn.Linear(8, 3)])
    batch = torch.randn(9, 5, 4), torch.randint(3, (9, 5))  # five positions; layer 3 has two positions of five features
    with pytest.warns(UserWarning, match=r"layer '3' is left out.*got \(3, 2, 5\) for labels \(3, 5\)"):
        values = measure(net, [batch], layers=["0", "3"], progress=False)
    assert "0/nc1" in values
    assert "3/nc1" not in values
    assert "3/nc1" in measure(
        net, [batch], layers=["3"], pool=lambda x: x.repeat(1, 3, 1)[:, :5].flatten(0, 1), progress=False
    )
    with pytest.warns(UserWarning, match=r"pool= returned \(3, 5, 5\).*which axis holds the features is not clear"):
        measure(net, [batch], layers=["3"], pool=lambda x: x.repeat(1, 3, 1)[:, :5], progress=False)


def test_an_encoder_with_a_decoder_has_labels_of_its_own_positions():
    import transformers

    torch.manual_seed(0)
    sizes = {"d_model": 12, "d_kv": 6, "d_ff": 24, "num_layers": 1, "num_heads": 2}
    model = transformers.T5ForConditionalGeneration(
        transformers.T5Config(vocab_size=7, decoder_start_token_id=0, dropout_rate=0.0, **sizes)
    )
    tokens = torch.randint(7, (9, 6))
    for target in (torch.randint(7, (9, 4)), tokens):  # a copy task has the labels of its inputs
        batch = {"input_ids": tokens, "labels": target}
        with torch.no_grad():
            rows = model(**batch, output_hidden_states=True).decoder_hidden_states[-1].double().reshape(-1, 12)
        expected = reference.nc1(rows.numpy(), target.flatten().numpy())
        assert measure(model, [batch], progress=False)["nc1"] == pytest.approx(expected, rel=2e-5)
        with pytest.raises((LookupError, ValueError), match="shifts its inputs instead: leave target_fn out"):
            measure(model, [batch], target_fn="next_token", progress=False)
    with pytest.raises(LookupError, match=r"the same shape as the input tokens, got \(9, 4\) and \(9, 3, 20\)"):
        measure(model, [{"input_features": torch.randn(9, 3, 20), "labels": target[:, :4]}], target_fn="next_token")


def test_a_mask_in_the_place_of_the_labels_is_refused():
    tokens, mask = sequences()
    model = nn.Sequential(nn.Embedding(7, 6), nn.Linear(6, 2))
    for batch, target_fn in (
        ((tokens, mask, mask), None),
        ((tokens, mask.bool()), None),
        ((tokens, mask), "next_token"),
    ):
        with pytest.raises(ValueError, match=r"seems to be the attention mask.*batch\[2\]"):
            measure(model, [batch], target_fn=target_fn, progress=False)
    tags = tokens % 2
    assert measure(model, [(tokens, tags, mask)], progress=False) == measure(model, [(tokens, tags)], progress=False)
    column = torch.arange(7)[:, None]
    assert measure(nn.Sequential(*model, nn.Flatten(1), nn.Linear(2, 1)), [(column, column % 2)], progress=False)


def test_labels_that_equal_the_tokens_are_found_under_any_key_and_after_batches_of_ignored_labels():
    class Reader(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.head = nn.Embedding(7, 6), nn.Linear(6, 7)

        def forward(self, tokens):
            return self.head(self.body(tokens))

    tokens, _ = sequences()
    batch = {"tokens": tokens, "labels": tokens}
    nothing = {"tokens": tokens, "labels": torch.full_like(tokens, -100)}
    for batches in ([batch], [nothing, nothing, batch]):
        with pytest.raises(ValueError, match="equal its input tokens"):
            measure(Reader(), batches, progress=False)
    values = measure(Reader(), [nothing, batch], target_fn="next_token", progress=False)
    assert values.keys() == measure(Reader(), [{"tokens": tokens, "labels": tokens % 3}], progress=False).keys()


def test_packed_sequences_end_where_their_positions_start_again():
    torch.manual_seed(0)
    order = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 0, 1, 2]])
    packed = {"input_ids": torch.randint(7, (1, 10)), "position_ids": order}
    labeled = {**packed, "labels": packed["input_ids"].masked_fill(order == 0, -100)}
    model = gpt2()
    assert measure(model, [packed], target_fn="next_token", progress=False) == measure(
        model, [labeled], target_fn="next_token", progress=False
    )


def test_a_mask_that_does_not_belong_to_the_positions_of_the_classifier_is_pointed_out():
    class Prompted(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.head = nn.Embedding(7, 6), nn.Linear(6, 2)

        def forward(self, input_ids, attention_mask):
            rows = self.body(input_ids)
            return self.head(torch.cat([rows[:, :2], rows], dim=1))[:, -1]

    tokens, mask = sequences()
    batch = {"input_ids": tokens, "attention_mask": mask, "labels": torch.arange(12) % 2}
    with pytest.warns(UserWarning, match=r"attention_mask has the shape \(12, 9\).*'head' receives 11 positions"):
        measure(Prompted(), [batch], pool="last", progress=False)


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


def test_time_steps_in_the_place_of_samples_are_pointed_out():
    class Tagger(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.head = nn.LSTM(5, 8), nn.Linear(8, 3)

        def forward(self, x):  # (T, B, 5)
            return self.head(self.body(x)[0])

    torch.manual_seed(0)
    x, target = 3 * torch.randn(4, 4, 5), torch.randint(3, (4, 4))
    with pytest.warns(UserWarning, match="at 'head' change with the other samples of the batch: time steps"):
        measure(Tagger(), [(x, target)], progress=False)
