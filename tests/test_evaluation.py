import random

import numpy as np
import pytest
import reference
import torch
from conftest import clusters
from torch import nn
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    IterableDataset,
    RandomSampler,
    Sampler,
    SequentialSampler,
    Subset,
    SubsetRandomSampler,
    TensorDataset,
    WeightedRandomSampler,
)

from lightning_nc import measure
from lightning_nc.measuring.loaders import measurement_loader
from lightning_nc.measuring.snapshot import evaluation_mode

DATA = TensorDataset(torch.arange(51.0).unsqueeze(1), torch.arange(51) % 3)


def visited(loader, **kwargs):
    batches, _ = measurement_loader(loader, **kwargs)
    return [int(value) for rows, _ in batches for value in rows]


class Stream(IterableDataset):
    def __iter__(self):
        yield from DATA


@pytest.mark.parametrize(
    "loader",
    [
        DataLoader(DATA, 8),
        DataLoader(DATA, 8, shuffle=True, drop_last=True),
        DataLoader(DATA, 8, shuffle=True, num_workers=2, persistent_workers=True),
        DataLoader(DATA, 8, sampler=WeightedRandomSampler([1.0] * 51, 20)),
        DataLoader(DATA, batch_sampler=BatchSampler(RandomSampler(DATA), 8, drop_last=True)),
        DataLoader(Stream(), 8),
    ],
    ids=["sequential", "shuffled", "workers", "weighted", "batch sampler", "stream"],
)
def test_every_sample_is_visited_once_and_in_order(loader):
    assert visited(loader) == list(range(51))


def test_samples_outside_of_a_subset_are_not_visited():
    assert visited(DataLoader(DATA, 8, sampler=SubsetRandomSampler([40, 3, 9]))) == [3, 9, 40]
    assert visited(DataLoader(Subset(DATA, [5, 4]), 8, shuffle=True)) == [5, 4]
    half = torch.arange(51) % 2
    assert visited(DataLoader(DATA, 8, sampler=WeightedRandomSampler(half.double(), 20))) == list(range(1, 51, 2))


def test_a_sampler_over_a_part_of_the_data_gives_that_part():
    assert visited(DataLoader(DATA, 8, sampler=SequentialSampler(range(20)))) == list(range(20))
    assert visited(DataLoader(DATA, 8, sampler=RandomSampler(range(20)))) == list(range(20))
    with pytest.raises(LookupError, match="pass batch_sampler="):
        visited(DataLoader(DATA, batch_size=None, sampler=BatchSampler(RandomSampler(DATA), 8, False)))


class Endless(Sampler):
    def __iter__(self):
        while True:
            yield from reversed(range(20))


class Epochs(Endless):
    def __len__(self):
        return 20


class Half(RandomSampler):
    def __iter__(self):
        return iter(range(0, 51, 2))

    def __len__(self):
        return 26


class Repeated(BatchSampler):
    def __iter__(self):
        while True:
            yield from super().__iter__()


def test_what_a_batch_sampler_draws_from_is_what_is_measured():
    fold = SubsetRandomSampler(range(10, 30))
    assert visited(DataLoader(DATA, batch_sampler=BatchSampler(fold, 8, False))) == list(range(10, 30))
    chosen = visited(DataLoader(DATA, batch_sampler=BatchSampler(RandomSampler(DATA), 8, False)), max_batches=2)
    assert chosen != sorted(chosen)
    assert visited(DataLoader(DATA, 8, sampler=Half(DATA))) == list(range(0, 51, 2))


def test_samplers_without_an_end_are_followed_for_an_epoch():
    assert visited(DataLoader(DATA, 8, sampler=Epochs())) == list(range(20))
    assert visited(DataLoader(DATA, batch_sampler=Repeated(SequentialSampler(DATA), 8, False))) == list(range(51))
    assert len(visited(DataLoader(DATA, 5, sampler=Endless()), max_batches=2)) == 10
    with pytest.raises(LookupError, match="Endless of the training data has no length"):
        visited(DataLoader(DATA, 8, sampler=Endless()))


class Normalising(DataLoader):
    def __iter__(self):
        for rows, target in super().__iter__():
            yield rows / 100, target


def test_a_loader_that_makes_its_batches_itself_is_not_copied():
    with pytest.raises(LookupError, match=r"a Normalising that makes batches in a way of its own.*pass dataloader="):
        visited(Normalising(DATA, 8))


def test_ranks_share_the_samples_without_padding():
    shards = [visited(DataLoader(DATA, 8), rank=rank, world_size=4) for rank in range(4)]
    assert sorted(sample for shard in shards for sample in shard) == list(range(51))


def test_a_limit_takes_a_fixed_random_choice():
    loader = DataLoader(DATA, 8, shuffle=True)
    chosen = visited(loader, max_batches=2)
    assert len(set(chosen)) == 16
    assert chosen == visited(loader, max_batches=2)
    assert chosen != sorted(chosen)


def test_a_loader_that_cannot_be_copied_is_refused():
    with pytest.raises(LookupError, match="pass dataloader="):
        measurement_loader({"a": DataLoader(DATA), "b": DataLoader(DATA)})


def test_training_flags_and_random_streams_are_put_back_even_after_an_error():
    model = nn.Sequential(nn.BatchNorm1d(3), nn.Dropout())
    model[0].eval()  # frozen by its owner
    states = [random.getstate(), np.random.get_state()[1].copy(), torch.get_rng_state()]
    with pytest.raises(KeyboardInterrupt), evaluation_mode(model, torch.device("cpu")):
        assert not model[1].training
        assert not torch.is_grad_enabled()
        random.random(), np.random.rand(), torch.rand(1)
        raise KeyboardInterrupt
    assert [model.training, model[0].training, model[1].training] == [True, False, True]
    assert random.getstate() == states[0]
    assert (np.random.get_state()[1] == states[1]).all()
    assert torch.equal(torch.get_rng_state(), states[2])


def test_measure_agrees_with_an_independent_computation_at_every_layer():
    rows, target = clusters(4, 30, 10, 0.5)
    model = nn.Sequential(nn.Linear(10, 7), nn.BatchNorm1d(7), nn.ReLU(), nn.Dropout(), nn.Linear(7, 4))
    model(rows)  # fills the running statistics
    values = measure(model, DataLoader(TensorDataset(rows, target), 16), layers=["0", "2"], progress=False)
    assert model.training
    model.eval()
    with torch.no_grad():
        first, features = model[0](rows).numpy(), model[:4](rows).numpy()
    weight, bias = model[4].weight.detach().double().numpy(), model[4].bias.detach().double().numpy()
    expected = reference.all_metrics(features, target.numpy(), weight, bias)
    names = ["nc1", "nc2_etf", "nc2_etf_centered", "nc2_of", "nc3", "nc3_centered"]
    assert {name: values[name] for name in names} == pytest.approx({name: expected[name] for name in names}, rel=1e-5)
    assert values["2/nc1"] == pytest.approx(values["nc1"])
    assert values["0/nc1"] == pytest.approx(reference.nc1_by_axes(first, target.numpy()), rel=1e-5)
    assert set(values) == {*names, *(f"{layer}/{name}" for layer in "02" for name in names[:4])}


def test_measure_takes_batches_of_any_kind_with_the_right_functions():
    rows, target = clusters(3, 10, 6, 0.3)
    model = nn.Linear(6, 3)
    plain = measure(model, [(rows, target)], progress=False)
    mapped = measure(
        model,
        [{"x": rows, "y": nn.functional.one_hot(target)}],
        target_fn=lambda batch: batch["y"].argmax(dim=1),
        forward_fn=lambda module, batch: module(batch["x"]),
        progress=False,
    )
    assert mapped == plain


def test_a_model_without_a_linear_classifier_can_still_be_measured_at_its_layers():
    rows, target = clusters(3, 10, 6, 0.3)
    model = nn.Sequential(nn.Identity(), nn.Conv1d(1, 3, 6))
    batches = [(rows.unsqueeze(1), target)]
    values = measure(model, batches, layers=["0"], num_classes=3, pool="flatten", progress=False)
    assert values["0/nc1"] == pytest.approx(reference.nc1(rows.numpy(), target.numpy()), rel=1e-5)


@pytest.mark.parametrize(
    ("model", "batch", "arguments", "error", "message"),
    [
        (nn.Linear(6, 3), (torch.randn(4, 6), torch.tensor([0, 1, 2, 3])), {}, ValueError, r"lie in \[0, 3\)"),
        (nn.Linear(6, 3), (torch.randn(4, 6), torch.rand(4, 3)), {}, ValueError, r"float32 \(4, 3\).*pass target_fn"),
        (nn.Linear(6, 3), (torch.randn(4, 6), [0, 1, 2, 0]), {}, ValueError, "got list"),
        (nn.Linear(6, 3), torch.randn(4, 6), {}, LookupError, "pass target_fn"),
        (nn.Linear(6, 3), {"x": torch.randn(4, 6), "z": 1, "y": torch.arange(3)}, {}, LookupError, "pass forward_fn"),
        (
            nn.Linear(6, 1),
            (torch.randn(4, 6), torch.tensor([0, 1, 1, 0])),
            {},
            LookupError,
            "one output.*num_classes=2",
        ),
        (nn.Conv1d(1, 1, 3), (torch.randn(4, 1, 6), torch.arange(4)), {}, LookupError, "no torch.nn.Linear"),
        (nn.Linear(6, 3), (torch.randn(4, 6), torch.arange(4)), {"layers": ["fc"]}, LookupError, "is named 'fc'"),
        (
            nn.Linear(6, 3),
            (torch.randn(4, 6), torch.arange(4)),
            {"num_classes": 5},
            ValueError,
            "num_classes is 5, but the classifier .* has 3 outputs",
        ),
        (nn.Linear(6, 3), (torch.randn(4, 6), torch.arange(4)), {"layers": "fc"}, ValueError, r"write \['fc'\]"),
        (
            nn.Linear(6, 3),
            (torch.randn(4, 6), torch.arange(4)),
            {"pool": "max"},
            ValueError,
            "'flatten', or a callable",
        ),
        (nn.Linear(6, 3), (torch.randn(4, 6), torch.arange(4)), {"target_fn": 1}, ValueError, "must be a callable"),
        (nn.Linear(6, 3), (torch.randn(4, 6), torch.arange(4)), {"metrics": ("nc9",)}, ValueError, "unknown metric"),
    ],
)
def test_what_cannot_be_measured_says_why_and_what_to_do(model, batch, arguments, error, message):
    with pytest.raises(error, match=message):
        measure(model, [batch], progress=False, **arguments)


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


def test_a_head_with_more_outputs_than_classes_and_one_that_is_no_linear_layer():
    rows, target = clusters(4, 30, 8, 0.5)
    wide = nn.Linear(8, 10)
    values = measure(wide, [(rows, target)], num_classes=4, progress=False)
    expected = reference.direction(wide.weight[:4].detach().double().numpy(), reference.moments(rows, target)[0])
    assert values["nc3"] == pytest.approx(expected, rel=1e-5)
    model = nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 4))
    assert "nc3" not in measure(model, [(rows, target)], classifier="0", num_classes=4, progress=False)


def test_measuring_leaves_the_generator_of_the_loader_where_it_was():
    rows, target = clusters(4, 30, 8, 0.5)
    generator = torch.Generator().manual_seed(5)
    before = generator.get_state()
    measure(
        nn.Linear(8, 4), DataLoader(TensorDataset(rows, target), 7, shuffle=True, generator=generator), progress=False
    )
    assert torch.equal(generator.get_state(), before)


def test_a_binary_head_can_be_measured_as_the_message_says():
    rows, target = clusters(2, 10, 6, 0.3)
    metrics = ("nc1", "nc2_etf_centered")
    values = measure(nn.Linear(6, 1), [(rows, target)], num_classes=2, metrics=metrics, progress=False)
    assert values["nc1"] == pytest.approx(reference.nc1(rows.numpy(), target.numpy()), rel=1e-5)


def test_a_classifier_is_one_name():
    with pytest.raises(LookupError, match="is named"):
        measure(
            nn.Sequential(nn.Linear(6, 3)), [(torch.randn(4, 6), torch.zeros(4).long())], classifier="*", progress=False
        )


def test_no_batch_at_all_is_said():
    with pytest.raises(LookupError, match="gave no batch"):
        measure(nn.Linear(6, 3), [], progress=False)
