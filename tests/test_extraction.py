"""The features themselves, with their labels."""

import pytest
import torch
from conftest import clusters, hooks_of, loader
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_nc import extract_features, measure
from lightning_nc.functional import nc1

INPUT = "classifier input"


class Tokens(nn.Module):
    """A classifier of every position, with a convolution before it."""

    def __init__(self):
        super().__init__()
        self.mix, self.body, self.head = nn.Conv1d(6, 5, 1), nn.Linear(5, 7), nn.Linear(7, 3)

    def forward(self, x):
        return self.head(self.body(self.mix(x.mT).mT).relu())


def check_against_measure(model, data, layers, **arguments):
    """NC1 of what is extracted is that of measure, at every layer; returns what is extracted."""
    features, target = extract_features(model, data, layers=layers, progress=False, **arguments)
    values = measure(model, data, layers=layers, metrics="nc1", progress=False, **arguments)
    assert list(features) == [INPUT, *layers]
    assert target.dtype == torch.int64
    for layer, rows in features.items():
        key = "nc1" if layer == INPUT else f"{layer}/nc1"
        assert nc1(rows, target).item() == pytest.approx(values[key], rel=1e-9)
    return features, target


def test_the_rows_are_those_of_the_model_in_eval_mode_in_the_order_of_the_data():
    rows, target = clusters(3, 15, 6, 0.5)
    model = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Dropout(), nn.ReLU(), nn.Linear(8, 3))
    data = DataLoader(TensorDataset(rows, target), 8, shuffle=True)
    state, random = {name: part.clone() for name, part in model.state_dict().items()}, torch.get_rng_state()
    features, labels = check_against_measure(model, data, ["0", "3"])
    assert labels.equal(target)
    assert model.training
    assert torch.get_rng_state().equal(random)
    torch.testing.assert_close(model.state_dict(), state, rtol=0, atol=0)
    assert hooks_of(model) == []
    model.eval()
    torch.testing.assert_close(features["0"], model[0](rows).detach())
    torch.testing.assert_close(features[INPUT], model[:4](rows).detach())
    assert features[INPUT].equal(features["3"])


def test_they_can_be_differentiated_and_changed_later():
    features, target = extract_features(nn.Linear(6, 3), loader(), progress=False)
    rows = features[INPUT].requires_grad_()
    nc1(rows, target).backward()
    assert rows.grad.any()
    with torch.no_grad():
        rows += 1


@pytest.mark.parametrize("pool", ["mean", "flatten", lambda x: x.amax(dim=(2, 3))])
def test_positions_are_pooled_as_in_measure(pool):
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.AvgPool2d(2), nn.Flatten(), nn.Linear(16, 3))
    features, target = check_against_measure(
        model, [(torch.randn(12, 1, 6, 6), torch.arange(12) % 3) for _ in range(2)], ["0", "1"], pool=pool
    )
    assert features["1"].shape == (24, 16 if pool == "flatten" else 4)
    assert features[INPUT].shape == (24, 16)
    assert target.shape == (24,)


def test_every_position_with_a_label_is_a_row_and_ignored_ones_are_left_out():
    model, rows = Tokens(), torch.randn(10, 4, 6)
    target = torch.randint(3, (10, 4))
    target[:, 3] = -100
    target[7:] = -100
    data = [(rows[:6], target[:6]), (rows[6:], target[6:])]
    features, labels = check_against_measure(model, data, ["mix", "body"])
    kept = target.flatten() >= 0
    assert labels.equal(target.flatten()[kept])
    expected = model.body(model.mix(rows.mT).mT).relu().flatten(end_dim=1)[kept]
    torch.testing.assert_close(features[INPUT], expected.detach())
    everything = extract_features(
        model, [(rows, target.clamp(min=0))], target_fn=lambda batch: batch[1], ignore_index=2, progress=False
    )
    assert len(everything.target) == (target < 2).sum()


def test_features_keep_their_own_type_and_labels_become_indices():
    rows, target = clusters(3, 10, 6, 0.3, dtype=torch.bfloat16)
    features, labels = extract_features(
        nn.Linear(6, 3, dtype=torch.bfloat16),
        [{"x": rows, "y": nn.functional.one_hot(target)}],
        forward_fn=lambda module, batch: module(batch["x"]),
        progress=False,
    )
    assert features[INPUT].dtype == torch.bfloat16
    assert features[INPUT].equal(rows)
    assert labels.equal(target)


def test_layers_can_be_extracted_without_a_classifier():
    rows, target = clusters(3, 10, 6, 0.3)
    model = nn.Sequential(nn.Identity(), nn.Conv1d(1, 3, 6))
    with pytest.warns(UserWarning, match="only layers are measured"):
        features, _ = extract_features(
            model, [(rows.unsqueeze(1), target)], layers=["0"], num_classes=3, pool="flatten", progress=False
        )
    assert list(features) == ["0"]
    assert features["0"].equal(rows)


class SometimesOther(nn.Module):
    """Skips a layer in its second call, after the trial."""

    def __init__(self):
        super().__init__()
        self.side, self.head = nn.Linear(6, 4), nn.Linear(6, 3)

    def forward(self, x):
        if len(x) != 5:
            self.side(x)
        return self.head(x)


def test_a_layer_that_a_later_batch_does_not_reach_is_left_out():
    rows, target = clusters(3, 10, 6, 0.3)
    batches = [(rows[:8], target[:8]), (rows[8:13], target[8:13]), (rows[13:], target[13:])]
    with pytest.warns(UserWarning, match="the layer 'side' is left out from here on"):
        features, labels = extract_features(SometimesOther(), batches, layers=["side"], progress=False)
    assert list(features) == [INPUT]
    assert features[INPUT].equal(rows)
    assert labels.equal(target)


@pytest.mark.parametrize(
    ("batches", "arguments", "error", "message"),
    [
        (loader(), {"layers": ["fc"]}, LookupError, "is named 'fc'"),
        (loader(), {"classifier": "fc"}, LookupError, "is named 'fc'"),
        (loader(), {"pool": "max"}, ValueError, "'last', or a callable"),
        (loader().dataset, {}, ValueError, "dataloader must give batches, got the data set TensorDataset"),
        ([], {}, LookupError, "gave no batch"),
        ([(torch.randn(4, 6), torch.arange(4))], {}, ValueError, r"lie in \[0, 3\)"),
        ([(torch.randn(4, 6), torch.arange(4))], {"num_classes": 4}, ValueError, "has 3 outputs"),
    ],
)
def test_what_cannot_be_extracted_says_why(batches, arguments, error, message):
    with pytest.raises(error, match=message):
        extract_features(nn.Sequential(nn.Linear(6, 3)), batches, progress=False, **arguments)


def test_features_of_varying_width_are_refused():
    model = nn.Sequential(
        nn.Unflatten(1, (3, -1)), nn.Identity(), nn.AdaptiveAvgPool1d(2), nn.Flatten(), nn.Linear(6, 3)
    )
    batches = [(torch.randn(9, size), torch.arange(9) % 3) for size in (6, 12)]
    with pytest.raises(ValueError, match="must have 6 columns as in the first batch, got 12"):
        extract_features(model, batches, layers=["1"], pool="flatten", progress=False)
