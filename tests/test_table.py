import math
import warnings

import pytest
import torch
from conftest import clusters

from lightning_nc import functional
from lightning_nc.functional import METRICS, MetricSpec
from lightning_nc.functional.table import check_metrics, evaluate
from lightning_nc.moments import ClassDeviations, ClassMoments


def both(features, target, classes=None):
    """The statistics of all features at hand, and of batches."""
    classes = classes or int(target.max()) + 1
    moments = ClassMoments.zeros(classes, features.shape[1])
    for rows, labels in zip(features.split(50), target.split(50), strict=True):
        moments.update(rows, labels)
    return ClassDeviations.of(features, target, classes), moments


def warnings_of(function):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        value = function()
    return value, [str(warning.message) for warning in caught]


FLAGS = {
    "within": "nc1 nc1_trace nc1_cdnv nc1_vci nc1_cdnv_directional",
    "scatter": "nc1 nc1_vci stable_rank_features numerical_rank_features",
    "pairwise": "nc1_cdnv nc2_equiangular nc2_maxangle gnc2_log gnc2_log_spread nc2_weight_equiangular nc2_weight_maxangle",
    "samples": "nc1_cdnv_directional nc4 ncc_error",
    "opt_in": "nc2_orthoplex gnc2_margin nc5",
    "etf": "nc2_etf nc2_etf_centered nc2_equiangular nc2_maxangle gnc2_log_spread nc2_weight nc2_weight_equiangular "
    "nc2_weight_maxangle nc3_gram nc3_seli",
}


@pytest.mark.parametrize("flag", FLAGS)
def test_the_table_says_what_a_metric_reads_and_compares_with(flag):
    """By the formulas of docs/metrics.md."""
    assert {name for name, spec in METRICS.items() if getattr(spec, flag)} == {*FLAGS[flag].split()}


@pytest.mark.parametrize(
    ("formula", "error", "message"),
    [
        (lambda s: 1 / 0, RuntimeError, "the formula of 'own' failed: ZeroDivisionError: division by zero"),
        (lambda s: 1.0, TypeError, "the formula of 'own' must return a tensor of shape .., got 1.0"),
        (lambda s: s.centered[0], TypeError, "the formula of 'own' must return a tensor of shape .., got tensor"),
    ],
)
def test_a_formula_that_fails_or_returns_no_number_is_named(monkeypatch, formula, error, message):
    monkeypatch.setitem(METRICS, "own", MetricSpec(formula))
    with pytest.raises(error, match=message):
        evaluate(("own",), ClassDeviations.of(*clusters(3, 5, 4, 0.2), 3))


def test_all_leaves_out_what_is_slow_needs_other_data_or_seldom_exists():
    assert {*METRICS} - {*check_metrics("all")} == {"nc5", "gnc2_margin", "nc2_orthoplex"}


def test_a_row_that_gives_only_a_formula_reads_class_means_and_falls_to_zero():
    row = MetricSpec(lambda s: s.centered.abs().max())
    assert (row.title, row.direction, row.value_at_collapse(5), row.exists(9, 2)) == ("", "falls", 0, True)
    assert not any(getattr(row, flag) for flag in FLAGS)


@pytest.mark.parametrize("features", [1, 4])
def test_more_classes_than_a_simplex_has_room_for_keep_the_value_and_get_one_warning_with_the_least_distance(features):
    rows, target = clusters(6, 9, features, 0.3, dtype=torch.float64)
    names = ("nc1_trace", "nc2_etf_centered", "nc2_maxangle", "nc2_weight", "nc3_gram", "nc2_equinorm")
    moments, weight = ClassDeviations.of(rows, target, 6), torch.randn(6, features).double()
    values, messages = warnings_of(lambda: evaluate(names, moments, weight))
    assert all(value.isfinite() for value in values.values())
    least = math.sqrt(2 - 2 * math.sqrt(features / 5))
    assert len(messages) == 1
    assert messages[0].startswith("nc2_etf_centered, nc2_maxangle, nc2_weight, nc3_gram: 6 classes form no simplex ETF")
    assert f"at least {least:.4f}" in messages[0]
    assert min(values[name] for name in ("nc2_etf_centered", "nc2_weight", "nc3_gram")) >= least
    assert (
        warnings_of(lambda: evaluate(names, ClassDeviations.of(*clusters(6, 9, 5, 0.3), 6), torch.randn(6, 5)))[1] == []
    )


def test_one_sample_in_every_class_has_no_within_class_variation_and_says_so():
    rows, target = clusters(5, 1, 8, 0.3, dtype=torch.float64)
    within = [name for name, spec in METRICS.items() if spec.within]
    assert {"nc1", "nc1_trace", "nc1_cdnv", "nc1_vci"} <= {*within}
    for moments in both(rows, target):
        names = within if isinstance(moments, ClassDeviations) else [n for n in within if not METRICS[n].samples]
        values, messages = warnings_of(lambda moments=moments, names=names: evaluate((*names, "nc2_etf"), moments))
        assert all(values[name].isnan() for name in names)
        assert values["nc2_etf"].isfinite()
        assert len(messages) == 1
        assert messages[0].startswith(", ".join(names))
        assert "every class has one sample" in messages[0]
    assert functional.nc1(torch.cat([rows, rows[:1] + 1]), torch.cat([target, target[:1]])).isfinite()


def test_samples_around_class_means_of_other_data_vary_even_if_there_is_one_of_each():
    rows, target = clusters(5, 1, 8, 0.3, dtype=torch.float64)
    moments = both(rows, target)[1]
    centers = moments.means + 0.1
    centers[0] = moments.means[0]  # where a sample lies exactly on its center
    value = evaluate(("nc1_trace",), moments.around(centers))["nc1_trace"].item()
    between = (centers - centers.mean(dim=0)).square().sum().item() / 5
    assert value == pytest.approx(0.01 * 8 * 4 / 5 / between, rel=1e-9)


@pytest.mark.parametrize(("dtype", "scatter"), [(torch.float32, 1e-8), (torch.bfloat16, 1e-4), (torch.float64, 1e-17)])
def test_variation_that_rounding_can_cause_keeps_its_value_with_a_warning(dtype, scatter):
    means = torch.randn(4, 12).double()
    target = torch.arange(4).repeat(50)
    names = ("nc1", "nc1_trace", "nc1_cdnv", "nc1_vci")
    features = (means[target] + scatter * torch.randn(200, 12).double()).to(dtype)
    # Rounding to the nearest number alone hardly moves samples that are alike: a last layer adds its own.
    bit = torch.finfo(dtype).eps * torch.randint(-1, 2, (200, 12)).double()
    features = (features.double() * (1 + bit)).to(dtype)
    for moments in both(features, target):
        values, messages = warnings_of(lambda moments=moments: evaluate(names, moments))
        assert all(value > 0 for value in values.values())
        assert len(messages) == 1, messages
        assert all(f"{name} = " in messages[0] for name in names)
        assert f"rounding of {str(dtype).removeprefix('torch.')} features" in messages[0]
    # A thousand times more variation is none that rounding causes.
    features = (means[target] * (1 + 1000 * torch.finfo(dtype).eps * torch.randn(200, 12).double())).to(dtype)
    assert warnings_of(lambda: evaluate(names, ClassDeviations.of(features, target, 4)))[1] == []


def test_exact_collapse_is_zero_without_a_warning():
    target = torch.cat([torch.arange(4).repeat(6), torch.tensor([4])])  # of the last class a single sample
    for moments in both(torch.eye(5)[target] * 3, target):
        values, messages = warnings_of(lambda moments=moments: evaluate(("nc1", "nc1_trace", "nc1_cdnv"), moments))
        assert [value.item() for value in values.values()] == [0, 0, 0]
        assert messages == []


@pytest.mark.parametrize(("labels", "said"), [([2, 2, 2], "only class 2 has samples"), ([], "no class has samples")])
def test_fewer_than_two_classes_are_nan_and_one_warning_says_so(labels, said):
    rows, target = torch.randn(len(labels), 5), torch.tensor(labels, dtype=torch.long)
    for moments in both(rows, target, 4):
        values, messages = warnings_of(lambda moments=moments: evaluate(("nc1", "nc2_etf"), moments))
        assert all(value.isnan() for value in values.values())
        assert messages == [f"{said}, and two are needed; the metrics are nan"]


def test_each_reason_gets_one_warning_with_the_metrics_that_it_concerns():
    rows, target = clusters(3, 20, 5, 0.3)
    weight = torch.randn(3, 5)
    weight[1] = 0
    names = ("nc3", "nc3_cosine", "nc3_uniform", "bias_collapse", "nc2_weight_equiangular", "nc1")
    moments = ClassDeviations.of(rows, target, 3)
    values, messages = warnings_of(lambda: evaluate(names, moments, weight, torch.full((3,), math.nan)))
    assert {name for name, value in values.items() if value.isnan()} == {*names} - {"nc3", "nc1"}
    assert messages == [
        "nc3_cosine, nc3_uniform, nc2_weight_equiangular: nan, because the classifier's weight is zero for one or more classes",
        "bias_collapse: nan, because the classifier's bias holds an infinity or a nan",
    ]
