"""The exact pass over a dataloader: ``measure``, and a second pass for features that are too wide."""

import math
import os
import subprocess
import sys

import pytest
import reference
import torch
from conftest import PAPER, clusters, fit, loader
from torch import nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from lightning_nc import NeuralCollapseCallback, measure
from lightning_nc.functional import nc1
from lightning_nc.measuring import collector as collecting
from lightning_nc.measuring.collector import Collector
from lightning_nc.measuring.measurement import measurement
from lightning_nc.measuring.probe import Probe


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
        (nn.Linear(6, 3), (torch.randn(4, 6), torch.rand(4, 3)), {}, ValueError, "soft row.*pass target_fn"),
        (nn.Linear(6, 3), (torch.randn(4, 6), [0, 1, 2, 0]), {}, ValueError, "got list"),
        (nn.Linear(6, 3), torch.randn(4, 6), {}, LookupError, "pass target_fn"),
        (nn.Linear(6, 3), {"x": torch.randn(4, 6), "z": 1, "y": torch.arange(3)}, {}, LookupError, "pass forward_fn"),
        (
            nn.Linear(6, 1),
            (torch.randn(4, 6), torch.tensor([0, 1, 1, 0])),
            {"num_classes": 3},
            ValueError,
            "num_classes is 3, but the classifier .* has 1 outputs",
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
            "'last', or a callable",
        ),
        (nn.Linear(6, 3), (torch.randn(4, 6), torch.arange(4)), {"target_fn": 1}, ValueError, "must be a callable"),
        (nn.Linear(6, 3), (torch.randn(4, 6), torch.arange(4)), {"metrics": ("nc9",)}, ValueError, "unknown metric"),
    ],
)
def test_what_cannot_be_measured_says_why_and_what_to_do(model, batch, arguments, error, message):
    with pytest.raises(error, match=message):
        measure(model, [batch], progress=False, **arguments)


def test_a_dataloader_without_batches_is_refused():
    with pytest.raises(LookupError, match="gave no batch"):
        measure(nn.Linear(6, 3), [], progress=False)


def test_a_traced_model_is_measured():
    traced = torch.fx.symbolic_trace(nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3)))
    assert measure(traced, [(torch.randn(9, 6), torch.arange(9) % 3)], progress=False)["nc1"] > 0


def test_finding_the_classifier_changes_no_batch():
    class InPlace(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.head = nn.Linear(6, 8), nn.Linear(8, 3)

        def forward(self, x):
            x -= 5
            return self.head(self.body(x).relu())

    model = InPlace()
    found = measure(model, loader(False), progress=False)
    assert found == measure(model, loader(False), classifier="head", progress=False)


# -------------------------------------------------------------------------------------------------------- the collector


def collected(batches, own=None):
    """A collector after these batches of a linear layer, whose input is the features."""
    torch.manual_seed(0)
    model, probe = nn.Linear(6, 3), Probe()
    collector = Collector(probe, PAPER)
    with torch.no_grad():
        for batch in batches:
            collector.start(batch, lambda batch=batch: probe.attached or probe.attach(model, batch))
            model(batch[0])
            collector.finish(own)
    probe.detach()
    return collector


def test_batches_are_collected_to_the_values_of_all_samples():
    rows, target = clusters(3, 10, 6, 0.3)
    collector = collected(zip(rows.split(7), target.split(7), strict=True))
    assert (collector.batches, collector.samples) == (5, 30)
    assert collector.values()["nc1"] == pytest.approx(reference.nc1(rows.numpy(), target.numpy()), rel=1e-5)
    found = measurement(collector).classes
    means, classes = found.means, found.labels
    assert classes == [0, 1, 2]
    torch.testing.assert_close(means, torch.from_numpy(reference.moments(rows, target)[0]))


def test_samples_that_pad_a_dataloader_are_not_counted():
    rows, target = clusters(3, 10, 6, 0.3)
    padded = [(part[torch.arange(35) % 30]) for part in (rows, target)]
    batches = list(zip(*(part.split(7) for part in padded), strict=True))
    whole = collected(zip(rows.split(7), target.split(7), strict=True)).values()
    assert collected(batches, own=30).values() == pytest.approx(whole, rel=1e-12)
    assert collected(batches).values()["nc1"] != pytest.approx(whole["nc1"], rel=1e-6)


def test_classes_without_a_sample_have_no_mean():
    rows, target = clusters(2, 10, 6, 0.3)
    found = measurement(collected([(rows, 2 * target)])).classes
    means, classes = found.means, found.labels
    assert classes == [0, 2]
    torch.testing.assert_close(means, torch.from_numpy(reference.moments(rows, target)[0]))


def test_an_error_waits_until_all_ranks_meet():
    rows, target = clusters(3, 10, 6, 0.3)
    collector = collected([(rows, target), (rows, target + 0.5), (rows, target)])
    assert collector.batches == 1
    with pytest.raises(ValueError, match="must be whole numbers"):
        collector.synchronize(None)


def test_inputs_of_varying_size_need_a_pool():
    model = nn.Sequential(
        nn.Unflatten(1, (3, -1)), nn.Identity(), nn.AdaptiveAvgPool1d(2), nn.Flatten(), nn.Linear(6, 3)
    )
    batches = [(torch.randn(9, size), torch.arange(9) % 3) for size in (6, 12)]
    with pytest.raises(
        ValueError, match="must have 6 columns as in the first batch, got 12; inputs of varying size need"
    ):
        measure(model, batches, layers=["1"], pool="flatten", progress=False)
    assert "1/nc1" in measure(model, batches, layers=["1"], pool="mean_channels_first", progress=False)


# ------------------------------------------------------------------------------------------------------ wide features


@pytest.fixture
def _no_scatter(monkeypatch):
    monkeypatch.setattr(collecting, "SCATTER_LIMIT", 0)


@pytest.mark.usefixtures("_no_scatter")
@pytest.mark.parametrize(("classes", "width"), [(4, 12), (9, 6)])
@pytest.mark.parametrize("noise", [0.3, 1e-4])
def test_a_second_pass_gives_the_nc1_of_all_features(classes, width, noise, caplog):
    rows, target = clusters(classes, 20, width, noise)
    model = nn.Sequential(nn.Unflatten(1, (2, -1)), nn.Flatten(), nn.Linear(width, classes))
    with caplog.at_level("INFO"):
        values = measure(model, DataLoader(TensorDataset(rows, target), 7), layers=["0"], pool="flatten")
    expected = reference.nc1_by_axes(rows.numpy(), target.numpy())
    assert expected < (1 if noise == 0.3 else 1e-7)
    assert values["nc1"] == values["0/nc1"] == pytest.approx(expected, rel=1e-6)
    said = [record.message for record in caplog.records if "second pass" in record.message]
    if classes < width:
        assert len(said) == 1
        assert f"the features of classifier input {width}, 0 {width} would need" in said[0]
    else:  # a projection on the span of the class means would gain nothing
        assert not said


@pytest.mark.usefixtures("_no_scatter")
def test_metrics_that_need_a_scatter_matrix_which_is_too_large_are_left_out_with_a_warning():
    rows, target = clusters(4, 30, 12, 0.5)
    with pytest.warns(UserWarning, match="nc1_vci of the classifier input left out: features this wide"):
        found = measure(nn.Linear(12, 4), [(rows, target)], metrics=("nc1", "nc1_vci"), progress=False)
    assert found.keys() == {"nc1"}


@pytest.mark.usefixtures("_no_scatter")
def test_a_generator_which_has_only_one_pass_is_refused():
    rows, target = clusters(3, 10, 6, 0.3)
    batches = zip(rows.split(5), target.split(5), strict=True)
    with pytest.raises(LookupError, match="a generator gives its batches only once"):
        measure(nn.Linear(6, 3), batches, progress=False)
    values = measure(nn.Linear(6, 3), [(rows, target)], metrics=("nc2_etf", "nc3"), progress=False)
    assert set(values) == {"nc2_etf", "nc3"}


@pytest.mark.usefixtures("_no_scatter")
def test_an_iterable_dataset_is_iterated_twice(tmp_path):
    rows, target = clusters(3, 15, 6, 0.5)

    class Stream(IterableDataset):
        def __iter__(self):
            yield from TensorDataset(rows, target)

    callback = NeuralCollapseCallback(strict=True)
    _, model = fit(tmp_path, [callback], data=DataLoader(Stream(), 8), max_epochs=1)
    with torch.no_grad():
        features = model.eval().net[:4](rows)
    assert callback.history[-1]["nc/nc1"] == pytest.approx(nc1(features, target).item(), rel=1e-6)


@pytest.mark.usefixtures("_no_scatter")
def test_nc1_of_wide_features_is_nan_where_the_class_means_coincide():
    rows, target = torch.ones(12, 6), torch.arange(12) % 3
    values = measure(nn.Linear(6, 3), DataLoader(TensorDataset(rows, target), 5), progress=False)
    assert math.isnan(values["nc1"])


REAL = """
import resource, torch
from torch import nn
from lightning_nc import measure
from lightning_nc.functional import nc1
from lightning_nc.measuring import collector
torch.manual_seed(0)
target = torch.arange(10).repeat(20)
images = torch.randn(10, 4, 64, 64)[target] + 1e-3 * torch.randn(200, 4, 64, 64)
model = nn.Sequential(nn.ReLU(), nn.Flatten(), nn.Linear(16384, 10))
def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
measure(model, [(images[:20], target[:20])], metrics=("nc2_etf",), progress=False)
before = peak()
values = measure(model, list(zip(images.split(20), target.split(20))), layers=["0"], pool="flatten", progress=False)
print(peak() - before, values["0/nc1"], nc1(images.relu().flatten(1), target).item())
"""


@pytest.mark.slow
def test_features_of_16384_dimensions_take_little_memory():
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    run = subprocess.run([sys.executable, "-c", REAL], env=environment, check=True, capture_output=True, text=True)
    gigabytes, value, expected = map(float, run.stdout.split())
    assert gigabytes < 0.3  # the scatter alone would take 3.2
    assert value == pytest.approx(expected, rel=1e-6)


def test_a_layer_that_a_later_batch_does_not_reach_is_left_out_and_the_others_are_measured():
    class Experts(nn.Module):
        """The second expert sees negative samples only."""

        def __init__(self):
            super().__init__()
            self.body, self.expert, self.head = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 3)

        def forward(self, x):
            features = self.body(x)
            return self.head(self.expert(features) if (x[:, 0] < 0).all() else features)

    rows, target = clusters(3, 20, 6, 0.5)
    rows[:30, 0], rows[30:, 0] = -1, 1
    loader = DataLoader(TensorDataset(rows, target), 10)
    model = Experts()
    with pytest.warns(UserWarning, match="the layer 'expert' is left out from here on: not called"):
        values = measure(model, loader, layers=["body", "expert"], progress=False)
    assert "expert/nc1" not in values
    assert {key: values[key] for key in values if "/" not in key} == measure(model, loader, progress=False)


def test_a_metric_of_the_bias_is_left_out_with_a_reason_if_the_classifier_has_none():
    rows, target = clusters(3, 10, 6, 0.3)
    with pytest.warns(UserWarning, match="bias_collapse left out: the classifier .* a Linear, has no bias"):
        values = measure(
            nn.Linear(6, 3, bias=False), [(rows, target)], metrics=("nc1", "bias_collapse"), progress=False
        )
    assert set(values) == {"nc1"}


def test_metrics_over_pairs_of_classes_can_be_estimated_with_a_standard_error():
    rows, target = clusters(60, 8, 20, 0.5)
    arguments = {"metrics": ("nc1_cdnv", "nc1_trace"), "layers": ["0"], "progress": False}
    model = nn.Sequential(nn.Identity(), nn.Linear(20, 60))
    exact = measure(model, [(rows, target)], **arguments)
    sampled = measure(model, [(rows, target)], pairs=500, **arguments)
    assert sampled.keys() == {*exact, "nc1_cdnv_stderr", "0/nc1_cdnv_stderr"}
    for key in ("nc1_cdnv", "0/nc1_cdnv"):
        assert 0 < sampled[f"{key}_stderr"] < 0.05 * exact[key]
        assert abs(sampled[key] - exact[key]) < 4 * sampled[f"{key}_stderr"]
    assert sampled["nc1_trace"] == exact["nc1_trace"]
    assert measure(model, [(rows, target)], pairs=1e7, **arguments)["nc1_cdnv_stderr"] == 0
    with pytest.raises(ValueError, match="pairs must be a whole number"):
        measure(model, [(rows, target)], pairs=0.5, progress=False)
