"""The classifier that is fixed to a simplex ETF."""

import copy

import numpy as np
import pytest
import reference
import torch
from conftest import clusters, fit, hooks_of, name_of_classifier
from lightning.pytorch import LightningModule
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_nc import NeuralCollapseCallback, SimplexETF, measure

SIZES = [(1, 2), (2, 3), (9, 10), (64, 10), (40, 41)]


@pytest.mark.parametrize(("features", "classes"), SIZES)
def test_rows_have_norm_one_and_the_cosine_of_a_simplex_even_where_it_just_fits(features, classes):
    weight = SimplexETF(features, classes, dtype=torch.float64).weight.numpy()
    gram = np.where(np.eye(classes) == 1, 1.0, -1 / (classes - 1))
    np.testing.assert_allclose(weight @ weight.T, gram, atol=1e-12)
    np.testing.assert_allclose(weight.sum(axis=0), 0, atol=1e-12)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((3, 5), "no simplex ETF of 5 vectors exists in 3 dimensions: .* at most num_features"),
        ((3, 1), "num_classes must be an integer of at least 2, got 1"),
        ((3.0, 2), "num_features must be an integer of at least 1, got 3.0"),
    ],
)
def test_sizes_without_a_simplex_etf_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        SimplexETF(*arguments)


def test_it_looks_like_a_linear_layer_without_bias():
    head, rows = SimplexETF(6, 3, dtype=torch.float64), torch.randn(4, 5, 6, dtype=torch.float64)
    torch.testing.assert_close(head(rows), torch.einsum("btd,kd->btk", rows, head.weight))
    assert head.bias is None
    assert (head.in_features, head.out_features) == (6, 3)
    assert repr(head) == "SimplexETF(in_features=6, out_features=3)"
    assert SimplexETF(6, 3, device="meta").weight.is_meta
    assert SimplexETF(6, 3, dtype=torch.bfloat16).weight.dtype == torch.bfloat16


def test_the_rotation_is_random_and_a_seed_or_a_generator_repeats_it():
    torch.manual_seed(1)
    first, second = SimplexETF(6, 3).weight, SimplexETF(6, 3).weight
    torch.manual_seed(1)
    assert SimplexETF(6, 3).weight.equal(first)
    assert not first.equal(second)
    state = torch.get_rng_state()
    given = [SimplexETF(6, 3, generator=torch.Generator().manual_seed(7)).weight for _ in range(2)]
    assert given[0].equal(given[1])
    assert torch.get_rng_state().equal(state)


def test_all_rotations_are_equally_likely():
    """Every entry of a uniformly random direction in d dimensions has mean 0 and variance 1 / d, without correlations."""
    rows = torch.stack([SimplexETF(3, 4, dtype=torch.float64).weight for _ in range(4000)])
    torch.testing.assert_close(rows.mean(dim=0), torch.zeros(4, 3).double(), atol=0.04, rtol=0)
    second = torch.einsum("nkd,nke->kde", rows, rows) / len(rows)
    torch.testing.assert_close(second, torch.eye(3).double().expand(4, 3, 3) / 3, atol=0.03, rtol=0)


@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.AdamW])
def test_training_with_weight_decay_and_functions_that_initialize_layers_leave_it_alone(optimizer):
    model = nn.Sequential(nn.Linear(6, 8), SimplexETF(8, 3))
    before = copy.deepcopy(model.state_dict())
    model.apply(lambda module: nn.init.zeros_(module.weight) if isinstance(module, nn.Linear) else None)
    stepping = optimizer(model.parameters(), lr=0.1, weight_decay=0.5)
    for _ in range(3):
        stepping.zero_grad()
        nn.functional.cross_entropy(model(torch.randn(9, 6)), torch.arange(9) % 3).backward()
        stepping.step()
    assert model[1].weight.equal(before["1.weight"])
    assert not model[0].weight.equal(before["0.weight"])
    assert not model[0].weight.equal(torch.zeros(8, 6))  # the gradient passes through the head


def test_it_is_saved_and_loaded():
    saved, other = SimplexETF(8, 3), SimplexETF(8, 3)
    assert list(saved.state_dict()) == ["weight"]
    other.load_state_dict(saved.state_dict())
    assert other.weight.equal(saved.weight)


def test_it_is_found_as_the_classifier_also_behind_a_softmax_and_missed_with_a_message():
    model = nn.Sequential(nn.Linear(6, 8), SimplexETF(8, 3), nn.LogSoftmax(dim=1))
    assert name_of_classifier(model, lambda: model(torch.randn(4, 6))) == "1"
    with pytest.raises(LookupError, match="'1' was not called in the forward pass"):
        name_of_classifier(model, lambda: nn.functional.linear(model[0](torch.randn(4, 6)), model[1].weight).softmax(1))


def test_it_is_measured_with_its_weight_also_on_sequences():
    rows, target = clusters(3, 10, 6, 0.3)
    head = SimplexETF(6, 3)
    values = measure(nn.Sequential(nn.Identity(), head), [(rows, target)], metrics="all", progress=False)
    expected = reference.all_metrics(rows.numpy(), target.numpy(), head.weight.double().numpy(), np.zeros(3))
    for name in ("nc1", "nc2_weight", "nc3", "nc3_centered", "nc3_gram", "nc3_cosine"):
        assert values[name] == pytest.approx(expected[name], rel=1e-5, abs=1e-6)
    assert values["nc2_weight"] < 1e-6
    sequences = rows.unsqueeze(1).repeat(1, 6, 1)  # as many positions as features
    with pytest.warns(UserWarning, match="called on every position of a sequence"):
        values = measure(
            nn.Sequential(nn.Identity(), head),
            [(sequences, target)],
            forward_fn=lambda module, batch: module(batch[0]).mean(dim=1),
            progress=False,
        )
    assert values["nc3"] == pytest.approx(expected["nc3"], rel=1e-5)


class OnDigits(LightningModule):
    """Features of unit length, so that the loss cannot fall by their length alone."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 32))
        self.head = SimplexETF(32, 10)

    def forward(self, x):
        return self.head(nn.functional.normalize(self.body(x), dim=1))

    def training_step(self, batch, batch_idx):
        return nn.functional.cross_entropy(5 * self(batch[0]), batch[1])

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=1e-2, weight_decay=0.1)


def test_the_class_means_of_digits_align_with_it(tmp_path):
    images, target = load_digits(return_X_y=True)
    data = TensorDataset(torch.tensor(images[:500], dtype=torch.float32) / 16, torch.tensor(target[:500]))
    callback = NeuralCollapseCallback(every_n_epochs=100, strict=True)
    _, model = fit(tmp_path, [callback], DataLoader(data, 500), OnDigits(), max_epochs=200)
    assert callback.history[0]["nc/nc3_centered"] > 1
    assert callback.history[-1]["nc/nc3_centered"] < 0.1
    assert callback.history[-1]["nc/nc2_etf"] < 0.1
    assert hooks_of(model) == []
