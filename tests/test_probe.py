"""What is measured of one batch: settings, layers, features and labels."""

import warnings
from collections import OrderedDict

import pytest
import reference
import torch
from conftest import DATA, clusters, hooks_of
from torch import nn

from lightning_nc import measure
from lightning_nc.measuring.probe import NotCalledError, Probe, match_layers


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.trunk = nn.Sequential(nn.Linear(6, 8), nn.ReLU())
        self.head = nn.Linear(8, 3)

    def forward(self, x):
        return self.head(self.trunk(x))


def attached(model, batch=DATA.tensors, **arguments):
    probe = Probe(**arguments)
    with torch.no_grad():
        probe.attach(model, batch)
    return probe


# --------------------------------------------------------------------------------------------------------------- settings


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"layers": "fc"}, r"sequence of names, got the string 'fc'; write \['fc'\]"),
        ({"num_classes": 1}, "integer of at least 2, got 1"),
        ({"num_classes": 2.5}, "integer of at least 2, got 2.5"),
        ({"pool": "max"}, "pool must be one of 'mean', .*'last', or a callable, got 'max'"),
        ({"target_fn": 3}, "target_fn must be a callable or 'next_token', got 3"),
        ({"forward_fn": "forward"}, "forward_fn must be a callable, got 'forward'"),
    ],
)
def test_settings_that_do_not_fit_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        Probe(**arguments)


def test_a_message_appears_once_in_a_run():
    probe = Probe()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        probe.warn_once("topic", "first")
        probe.warn_once("topic", "second")
        probe.reset()
        probe.warn_once("topic", "third")
    assert [str(warning.message) for warning in caught] == ["neural collapse: first", "neural collapse: third"]


# ------------------------------------------------------------------------------------------------------ from batch to rows


def test_attaching_finds_the_classifier_the_classes_and_the_widths_and_leaves_no_hook_when_detached():
    model = Net()
    probe = attached(model, layers=["trunk.*"])
    assert (probe.head.name, probe.classes) == ("head", 3)
    assert probe.widths == {"": 8, "trunk.0": 8, "trunk.1": 8}
    assert probe.attached
    assert len(hooks_of(model)) == 3
    probe.detach()
    assert not probe.attached
    assert hooks_of(model) == []


def test_features_and_labels_of_a_batch_come_by_layer():
    model = Net()
    probe = attached(model, layers=["trunk.0"])
    rows, target = DATA.tensors
    probe.start((rows, target))
    probe.forward(model, (rows, target))
    features, labels = probe.features()
    assert list(features) == ["", "trunk.0"]
    torch.testing.assert_close(features[""], model.trunk(rows).detach())
    torch.testing.assert_close(features["trunk.0"], model.trunk[0](rows).detach())
    assert labels is target


def test_what_runs_after_a_pause_is_not_recorded():
    model = Net()
    probe = attached(model)
    rows, target = DATA.tensors
    probe.start((rows, target))
    probe.pause()  # nothing has run: the backward pass of another loss
    model(rows)
    probe.pause()
    model(rows + 1)
    torch.testing.assert_close(probe.features()[0][""], model.trunk(rows).detach())


def test_a_batch_on_which_the_classifier_is_not_called_is_an_error_of_its_own_kind():
    model = Net()
    probe = attached(model)
    probe.start(DATA.tensors)
    model.trunk(DATA.tensors[0])
    with pytest.raises(NotCalledError, match=r"'head' was not called.*write self.head\(x\) instead of F.linear"):
        probe.features()


def test_layers_match_by_shell_pattern_and_near_names_are_offered():
    model = Net()
    assert match_layers(model, ["head", "trunk.*"]) == ["trunk.0", "trunk.1", "head"]
    with pytest.raises(LookupError, match="is named 'heat'; near: 'head'"):
        match_layers(model, ["heat"])


def test_the_last_call_with_a_row_for_each_label_is_measured():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(6, 3)

        def forward(self, x):
            self.fc(x[:2])
            output = self.fc(x)
            self.fc(x.repeat(2, 1) + 1)
            return output

    rows, target = clusters(3, 10, 6, 0.3)
    model = Twice()
    assert measure(model, [(rows, target)], progress=False) == measure(model.fc, [(rows, target)], progress=False)


def test_a_function_turns_a_sequence_first_layer_into_a_row_per_sample():
    class Recurrent(nn.Module):
        def __init__(self):
            super().__init__()
            self.rnn, self.fc = nn.GRU(6, 8), nn.Linear(8, 3)

        def forward(self, x):
            return self.fc(self.rnn(x.transpose(0, 1))[0][-1])

    model, batches = Recurrent(), [(torch.randn(12, 5, 6), torch.arange(12) % 3)]
    values = measure(model, batches, layers=["rnn"], pool=lambda hidden: hidden[-1], progress=False)
    assert values["rnn/nc1"] == pytest.approx(values["nc1"], rel=1e-12)


def test_an_encoder_that_drops_the_padding_is_measured():
    class Encoder(nn.Module):
        def __init__(self):
            super().__init__()
            layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0, batch_first=True)
            self.encoder, self.fc = nn.TransformerEncoder(layer, 2), nn.Linear(8, 3)

        def forward(self, x, attention_mask):
            hidden = self.encoder(x, src_key_padding_mask=attention_mask == 0)
            weights = attention_mask[..., None]
            return self.fc((hidden * weights).sum(dim=1) / weights.sum(dim=1))

    model, mask = Encoder(), torch.ones(12, 5)
    mask[3:, 3:] = 0
    batch = {"x": torch.randn(12, 5, 8), "attention_mask": mask, "labels": torch.arange(12) % 3}
    values = measure(model, [batch], layers=["encoder.layers.1"], progress=False)
    assert values["encoder.layers.1/nc1"] == pytest.approx(values["nc1"], rel=1e-4)


@pytest.mark.parametrize(
    ("batch", "reason"),
    [
        (({"x": torch.randn(4, 6)}, torch.arange(4)), "must be Tensor, not dict"),
        (([torch.randn(4, 6)] * 2, torch.arange(4)), "must be Tensor, not list"),
    ],
)
def test_a_call_that_fails_names_the_way_out(batch, reason):
    with pytest.raises(TypeError, match=rf"{reason}.*; pass forward_fn"):
        measure(nn.Linear(6, 4), [batch], progress=False)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"target_fn": lambda batch: {}["foo"]}, "target_fn failed on a batch: KeyError: 'foo'"),
        ({"classifier": "conv"}, "'conv' is a convolution of more than one position"),
    ],
)
def test_settings_that_do_not_fit_the_model_are_named(arguments, message):
    model = nn.Sequential(OrderedDict(conv=nn.Conv2d(3, 5, 3), flat=nn.Flatten(), fc=nn.Linear(20, 4)))
    with pytest.raises(LookupError, match=message):
        measure(model, [(torch.randn(8, 3, 4, 4), torch.arange(8) % 4)], progress=False, **arguments)


def test_features_are_taken_before_the_next_layer_works_in_place():
    rows, target = clusters(4, 30, 8, 0.5)
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(inplace=True), nn.Linear(16, 4))
    values = measure(model, [(rows, target)], layers=["0"], metrics=("nc1",), progress=False)
    with torch.no_grad():
        expected = reference.nc1_by_axes(model[0](rows).numpy(), target.numpy())
    assert values["0/nc1"] == pytest.approx(expected, rel=1e-5)
    model = nn.Sequential(nn.Identity(), nn.Sequential(nn.ReLU(inplace=True), nn.Linear(8, 4)))
    values = measure(model, [(rows.clone(), target)], classifier="1", num_classes=4, metrics=("nc1",), progress=False)
    assert values["nc1"] == pytest.approx(reference.nc1_by_axes(rows.numpy(), target.numpy()), rel=1e-5)


def test_a_classifier_is_one_name():
    with pytest.raises(LookupError, match="is named"):
        measure(
            nn.Sequential(nn.Linear(6, 3)), [(torch.randn(4, 6), torch.zeros(4).long())], classifier="*", progress=False
        )


def test_a_head_with_more_outputs_than_classes_and_one_that_is_no_linear_layer():
    rows, target = clusters(4, 30, 8, 0.5)
    wide = nn.Linear(8, 10)
    values = measure(wide, [(rows, target)], num_classes=4, progress=False)
    expected = reference.direction(wide.weight[:4].detach().double().numpy(), reference.moments(rows, target)[0])
    assert values["nc3"] == pytest.approx(expected, rel=1e-5)
    model = nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 4))
    assert "nc3" not in measure(model, [(rows, target)], classifier="0", num_classes=4, progress=False)


def test_a_binary_head_can_be_measured_as_the_message_says():
    rows, target = clusters(2, 10, 6, 0.3)
    metrics = ("nc1", "nc2_etf_centered")
    values = measure(nn.Linear(6, 1), [(rows, target)], num_classes=2, metrics=metrics, progress=False)
    assert values["nc1"] == pytest.approx(reference.nc1(rows.numpy(), target.numpy()), rel=1e-5)
