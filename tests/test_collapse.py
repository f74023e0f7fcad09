"""What every metric gives where the truth is known: at collapse, near it, under imbalance, and where it means nothing."""

import math
import warnings

import mpmath
import numpy as np
import pytest
import reference
import torch
from conftest import clusters, metric_value, simplex_etf

from lightning_nc import NeuralCollapse, functional
from lightning_nc.functional import METRICS, nc1_vci

OF_OTHER_FRAMES = {"nc2_of", "nc2_of_centered", "nc2_orthoplex"}


def etf(classes, features, seed=0):
    """Class means of a simplex ETF in any orientation."""
    axes = torch.linalg.qr(torch.randn(features, classes, generator=torch.Generator().manual_seed(seed)).double()).Q
    return simplex_etf(classes) @ axes.T


def values_of(rows, target, weight, bias, names):
    metric = NeuralCollapse(len(weight), rows.shape[1], weight, bias, metrics=names)
    for part, labels in zip(rows.split(17), target.split(17), strict=True):
        metric.update(part, labels)
    return {name: value.item() for name, value in metric.compute().items()}


@pytest.mark.filterwarnings("ignore:.*no more than what rounding")
@pytest.mark.parametrize(("classes", "features"), [(4, 4), (4, 20), (10, 10), (10, 64)])
def test_every_metric_has_the_value_at_collapse_that_the_table_gives(classes, features):
    means, target = etf(classes, features), torch.arange(classes).repeat(70)
    names = [name for name in METRICS if name not in OF_OTHER_FRAMES | {"nc5"}]
    found = values_of(means[target], target, 2 * means, torch.zeros(classes).double(), names)
    for name, value in found.items():
        assert value == pytest.approx(METRICS[name].value_at_collapse(classes, features), abs=1e-7), name
    orthogonal = torch.eye(classes, features).double()
    assert values_of(orthogonal[target], target, means, None, "nc2_of")["nc2_of"] == pytest.approx(0, abs=1e-7)
    other = torch.zeros(1, features + 1).double()
    other[:, -1] = 1  # orthogonal to all class means
    flat = torch.cat([means, torch.zeros(classes, 1)], dim=1)
    assert functional.nc5(flat[target], target, other).item() == METRICS["nc5"].value_at_collapse(classes)


def test_directions_are_those_of_the_way_to_collapse():
    """Each value far from collapse is on the side of the value at collapse that the table says."""
    rows, target = clusters(5, 30, 8, 2.0, dtype=torch.float64)
    weight, bias = torch.randn(5, 8).double(), torch.randn(5).double()
    for name, spec in METRICS.items():
        if name != "nc2_orthoplex":
            value, end = metric_value(name, rows, target, weight, bias).item(), spec.value_at_collapse(5, 8)
            assert {"falls": value > end, "rises": value < end, "approaches": value > 0}[spec.direction], name


@pytest.mark.parametrize("noise", [1e-1, 1e-4])
@pytest.mark.parametrize("sizes", [(20, 20, 20, 20), (50, 9, 30, 12)])
@pytest.mark.parametrize("features", [3, 4, 12])
def test_every_metric_agrees_with_an_independent_computation_near_collapse_and_under_imbalance(noise, sizes, features):
    target = torch.cat([torch.full((size,), k) for k, size in enumerate(sizes)])
    target = target[torch.randperm(len(target))]
    means = etf(4, features) if features > 3 else simplex_etf(4)[:, :3]
    rows = means[target] + noise * torch.randn(len(target), features).double()
    weight, bias = means + 0.1 * torch.randn(4, features).double(), torch.randn(4).double()
    expected = reference.all_metrics(rows.numpy(), target.numpy(), weight.numpy(), bias.numpy())
    names = [name for name in METRICS if name not in ("nc5", "nc2_orthoplex")]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", ".*three features or more")
        found = values_of(rows, target, weight, bias, names)
    for name, value in found.items():
        if name != "nc1_vci" or noise == 0.1:  # by its definition it cancels; see below
            assert value == pytest.approx(expected[name], rel=1e-7, nan_ok=True), name
        whole = metric_value(name, rows, target, weight, bias).item()
        assert value == pytest.approx(whole, rel=1e-7, nan_ok=True), name


def exact_vci(rows, target, digits=80):
    """The index by its definition, in arithmetic of that many digits."""
    with mpmath.workdps(digits):
        data = [[mpmath.mpf(float(x)) for x in row] for row in rows]
        classes, d = sorted(set(target)), rows.shape[1]
        means = {}
        for k in classes:
            own = [row for row, label in zip(data, target, strict=True) if label == k]
            means[k] = [mpmath.fsum(row[j] for row in own) / len(own) for j in range(d)]
        center = [mpmath.fsum(means[k][j] for k in classes) / len(classes) for j in range(d)]
        pairs = list(zip(data, target, strict=True))
        deviations = mpmath.matrix([[row[j] - means[label][j] for j in range(d)] for row, label in pairs])
        separation = mpmath.matrix([[means[k][j] - center[j] for j in range(d)] for k in classes])
        within = deviations.T * deviations / len(data)
        between = separation.T * separation / len(classes)
        rank = min(len(classes) - 1, d)
        explained = (within + between) ** -1 * between
        return float(1 - mpmath.fsum(explained[i, i] for i in range(d)) / rank)


@pytest.mark.parametrize("noise", [0.3, 1e-3, 1e-6])
@pytest.mark.parametrize("shape", ["round", "in a few directions"])
def test_the_variability_collapse_index_keeps_its_digits_down_to_1e_12(noise, shape):
    rng = np.random.default_rng(0)
    target = np.arange(3).repeat(12)
    stretch = np.ones(5) if shape == "round" else 10.0 ** -np.arange(5)
    rows = 3 * np.eye(3, 5)[target] + noise * stretch * rng.standard_normal((36, 5))
    expected = exact_vci(rows, target.tolist())
    assert expected < 1e-11 or noise > 1e-6
    features, labels = torch.tensor(rows), torch.tensor(target)
    assert nc1_vci(features, labels).item() == pytest.approx(expected, rel=1e-6)
    metric = NeuralCollapse(3, 5, metrics="nc1_vci")
    for part, own in zip(features.split(7), labels.split(7), strict=True):
        metric.update(part, own)
    assert metric.compute()["nc1_vci"].item() == pytest.approx(expected, rel=1e-6)


def test_the_variability_collapse_index_is_at_most_k_over_k_minus_1_times_nc1_and_knows_no_basis():
    rows, target = clusters(4, 30, 6, 0.7, dtype=torch.float64)
    index = nc1_vci(rows, target)
    assert index <= 4 / 3 * functional.nc1(rows, target)
    assert nc1_vci(rows @ torch.randn(6, 6).double(), target).item() == pytest.approx(index.item(), rel=1e-8)


# --------------------------------------------------------------------------------------- numbers that mean nothing


def one_warning(compute, match):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        value = compute()
    assert [warning for warning in caught if match in str(warning.message)], [str(w.message) for w in caught]
    assert len(caught) == 1
    return value.item()


def test_one_sample_in_each_class_says_nothing_of_variability():
    rows, target = torch.randn(4, 6).double(), torch.arange(4)
    for name in ("nc1", "nc1_trace", "nc1_cdnv"):
        value = one_warning(lambda name=name: getattr(functional, name)(rows, target), "every class has one sample")
        assert math.isnan(value)


@pytest.mark.parametrize(("dtype", "error"), [(torch.float64, 1e-9), (torch.float32, 1e-6), (torch.float16, 1e-3)])
def test_directions_that_hold_nothing_but_rounding_explain_nothing_in_the_variability_collapse_index(dtype, error):
    rows, target = clusters(4, 50, 6, 1.0, dtype=torch.float64)
    expected = nc1_vci(rows, target).item()  # invariant to every linear map that keeps the six dimensions
    wide = (rows @ torch.randn(6, 12, dtype=torch.float64)).to(dtype)  # a bottleneck of six dimensions
    assert nc1_vci(wide, target).item() == pytest.approx(expected, rel=error)
    metric = NeuralCollapse(4, 12, metrics="nc1_vci")
    for part, own in zip(wide.split(32), target.split(32), strict=True):
        metric.update(part, own)
    assert metric.compute()["nc1_vci"].item() == pytest.approx(expected, rel=error)


def test_fewer_samples_than_dimensions_make_the_variability_collapse_index_undefined():
    rows, target = clusters(3, 4, 20, 0.5, dtype=torch.float64)
    assert math.isnan(one_warning(lambda: nc1_vci(rows, target), "are too few for features that vary in"))
    # What does not vary does not count.
    narrow = torch.cat([rows[:, :4], torch.zeros(12, 16)], dim=1)
    assert nc1_vci(narrow, target).item() == pytest.approx(nc1_vci(rows[:, :4], target).item(), rel=1e-9)


def test_more_classes_than_a_simplex_holds_keep_their_value_and_say_what_is_out_of_reach():
    rows, target = clusters(7, 5, 4, 0.3, dtype=torch.float64)
    value = one_warning(lambda: functional.nc2(rows, target), "7 classes form no simplex ETF in 4 dimensions")
    least = math.sqrt(2 - 2 * math.sqrt(4 / 6))
    assert value > least
    with pytest.warns(UserWarning, match=f"at least {least:.4f}"):
        functional.nc2(rows, target)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nc1_at_the_rounding_of_the_features_says_so(dtype):
    target = torch.arange(3).repeat(50)
    rows = (torch.randn(3, 8).double()[target] + 1e-9 * torch.randn(150, 8).double()).to(dtype)
    rows[0] = rows[0] * (1 + torch.finfo(dtype).eps)  # else bfloat16 has no scatter at all
    value = one_warning(lambda: functional.nc1(rows, target), "no more than what rounding")
    assert 0 < value < torch.finfo(dtype).eps ** 1.5
    assert one_warning(lambda: functional.nc1_trace(rows, target), "no more than what rounding") > 0


def test_class_means_that_are_all_equal_have_no_frame():
    rows = torch.randn(10, 6).double().repeat(3, 1)
    target = torch.arange(3).repeat_interleave(10)
    assert math.isnan(one_warning(lambda: functional.nc2(rows, target, center=True), "coincide"))


def test_one_small_class_has_no_other_to_merge_with():
    target = torch.tensor([0] * 5 + [1] * 9 + [2] * 9)
    rows = torch.randn(23, 4).double()
    value = one_warning(
        lambda: functional.minority_cosine(rows, target, torch.randn(3, 4)), "fewer than two classes have fewer samples"
    )
    assert math.isnan(value)


def test_the_energy_of_riesz_needs_three_dimensions():
    rows, target = clusters(3, 5, 2, 0.3, dtype=torch.float64)
    assert math.isnan(one_warning(lambda: functional.gnc2_riesz(rows, target), "three features or more"))


def test_the_energy_of_riesz_does_not_underflow_in_many_dimensions():
    means = etf(10, 3000)
    target = torch.arange(10).repeat(2)
    expected = -(3000 - 2) / 2 * math.log(20 / 9)
    assert functional.gnc2_riesz(means[target], target).item() == pytest.approx(expected, rel=1e-9)
