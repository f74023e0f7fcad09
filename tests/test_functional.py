import functools
import math

import numpy as np
import pytest
import reference
import torch
from conftest import OF_WEIGHT_ALONE, ONE_PASS, bottleneck, clusters, metric_value, simplex_etf
from torch import nn

from lightning_nc import NC1, NeuralCollapse, functional
from lightning_nc.functional import METRICS, nc1, nc2, nc2_equinorm, nc2_maxangle, nc3, nc4
from lightning_nc.functional.pairs import Pairs, deviation_over_pairs, mean_over_pairs
from lightning_nc.functional.table import check_metrics


def golden():
    rng = np.random.default_rng(0)
    rows = [3 * np.eye(3, 5)[k] + 0.15 * rng.standard_normal((30, 5)) for k in range(3)]
    return torch.tensor(np.concatenate(rows)), torch.arange(3).repeat_interleave(30)


@pytest.mark.parametrize(
    ("errors", "tolerance", "depth"),
    [
        ([0.5, 0.25, 0.0], 0.25, 2),  # at most the tolerance above the last layer's, which these fractions are exactly
        ([0.5, 0.375, 0.125], 0.25, 2),
        ([0.5, 0.3, 0.0], 0.25, 3),
        ([0.0, 0.5, 0.5, 0.4], 0.01, 1),
        ([0.7], 0.01, 1),
        ([0.5, math.nan, 0.0], 0.25, math.nan),
    ],
)
def test_the_effective_depth_is_the_first_layer_as_good_as_the_last(errors, tolerance, depth):
    assert functional.effective_depth(errors, tolerance) == pytest.approx(depth, nan_ok=True)


def test_the_golden_values_are_met():
    features, target = golden()
    assert nc1(features, target).item() == pytest.approx(0.00409094387203806, rel=1e-13)
    assert nc2_equinorm(features, target).item() == pytest.approx(0.00784386, rel=1e-6)
    assert nc2_maxangle(features, target).item() == pytest.approx(0.0111446387, rel=1e-8)
    independent = reference.all_metrics(features.numpy(), target.numpy(), np.eye(3, 5), np.zeros(3))
    assert independent["nc1"] == pytest.approx(0.00409094387203806, rel=1e-13)
    assert independent["nc2_equinorm"] == pytest.approx(0.00784386, rel=1e-6)
    assert independent["nc2_maxangle"] == pytest.approx(0.0111446387, rel=1e-8)


@pytest.mark.parametrize(("classes", "distance"), [(4, 0.5176380902), (5, 0.4595058411), (10, 0.3203644860)])
def test_the_two_frames_have_the_published_distance(classes, distance):
    labels = torch.arange(classes)
    orthogonal, etf = torch.eye(classes).double(), simplex_etf(classes)
    assert nc2(orthogonal, labels, frame="of").item() < 1e-12
    assert nc2(orthogonal, labels, center=True).item() < 1e-12
    assert nc2(etf, labels).item() < 1e-12
    fewest = torch.linalg.qr(etf).R[: classes - 1].T  # turned into as few dimensions as hold it
    assert nc2(fewest, labels).item() < 1e-12
    assert nc2(orthogonal, labels).item() == pytest.approx(distance, rel=1e-5)
    assert nc2(etf, labels, frame="of").item() == pytest.approx(distance, rel=1e-5)


@pytest.mark.parametrize(("classes", "features"), [(3, 5), (7, 4), (2, 6), (5, 1), (4, 3), (10, 64)])
def test_every_metric_agrees_with_an_independent_computation(classes, features):
    rows, target = clusters(classes, 12, features, 0.3, dtype=torch.float64)
    weight, bias = torch.randn(classes, features).double(), torch.randn(classes).double()
    expected = reference.all_metrics(rows.numpy(), target.numpy(), weight.numpy(), bias.numpy())
    assert set(expected) == set(METRICS)
    for name in METRICS:
        value = metric_value(name, rows, target, weight, bias)
        assert value.item() == pytest.approx(expected[name], rel=1e-9, abs=1e-13, nan_ok=True), name


@pytest.mark.filterwarnings("ignore:.*encountered in divide")  # the reference, for the dead unit
@pytest.mark.parametrize(("classes", "features"), [(5, 3), (40, 6), (50, 60), (2100, 3)])
def test_any_number_of_classes_gives_the_same_result_with_a_unit_that_is_dead(classes, features):
    # 2,100 classes have more pairs than are processed together.
    rows, target = clusters(classes, 3, features, 0.3, dtype=torch.float64)
    rows = torch.cat([rows.relu() + 0.1 * rows, torch.zeros(len(rows), 1)], dim=1)
    weight, bias = torch.randn(classes, features + 1).double(), torch.randn(classes).double()
    expected = reference.all_metrics(rows.numpy(), target.numpy(), weight.numpy(), bias.numpy())
    expected["nc1"] = reference.nc1_by_axes(rows.numpy(), target.numpy())
    for name in METRICS if classes < 100 else METRICS.keys() - {"gnc2_margin"}:  # which takes K^3 steps
        value = metric_value(name, rows, target, weight, bias).item()
        assert value == pytest.approx(expected[name], rel=1e-9 if name != "gnc2_margin" else 1e-7, nan_ok=True), name


PAIRWISE = tuple(name for name, spec in METRICS.items() if spec.pairwise and not spec.needs)


def of_pairs(rows, target, pairs):
    """The metrics over pairs of classes and their standard errors."""
    metric = NeuralCollapse(int(target.max()) + 1, rows.shape[1], metrics=PAIRWISE, pairs=pairs)
    metric.update(rows, target)
    return {name: value.item() for name, value in metric.compute().items()}


def test_an_estimate_from_random_pairs_lies_within_two_standard_errors_as_often_as_it_should():
    hits = dict.fromkeys(PAIRWISE, 0)
    for seed in range(300):
        rows, target = clusters(60, 3, 20, 0.5, seed=seed, dtype=torch.float64)
        exact, estimate = of_pairs(rows, target, None), of_pairs(rows, target, 500)
        for name in PAIRWISE:
            error = estimate[f"{name}_stderr"]
            assert 0 < error < 0.2 * abs(exact[name])
            hits[name] += abs(estimate[name] - exact[name]) < 2 * error
    # 95.4 % of 300 are 286, with a standard deviation of 3.6
    assert all(272 <= count <= 298 for count in hits.values()), hits


def test_the_standard_error_decreases_with_the_root_of_the_number_of_pairs_and_is_zero_for_all_of_them():
    rows, target = clusters(300, 2, 8, 0.5, dtype=torch.float64)
    few, many, all_ = (of_pairs(rows, target, pairs) for pairs in (400, 4e4, 44_850))
    for name in PAIRWISE:
        assert few[f"{name}_stderr"] / many[f"{name}_stderr"] == pytest.approx(10, rel=0.3)
        assert all_[f"{name}_stderr"] == 0
    exact = of_pairs(rows, target, None)
    assert exact == {name: all_[name] for name in PAIRWISE}
    for name in PAIRWISE:
        assert getattr(functional, name)(rows, target, pairs=400).item() == pytest.approx(few[name], rel=1e-12)


@pytest.mark.parametrize("name", ["equiangular", "maxangle"])
@pytest.mark.parametrize("pairs", [None, 400])
def test_the_angles_of_the_weight_are_those_of_class_means_with_the_same_rows(name, pairs):
    rows = torch.randn(60, 8).double()
    rows = rows - rows.mean(dim=0)
    expected = getattr(functional, f"nc2_{name}")(rows, torch.arange(60), pairs=pairs)
    assert getattr(functional, f"nc2_weight_{name}")(rows, pairs=pairs).item() == pytest.approx(
        expected.item(), rel=1e-12
    )


@pytest.mark.parametrize("name", OF_WEIGHT_ALONE)
def test_a_weight_in_float32_is_computed_with_in_float64(name):
    weight = torch.randn(4, 6)
    truth = getattr(functional, name)(weight.double()).item()
    value = getattr(functional, name)(weight)
    assert value.dtype == torch.float64
    assert value.item() == pytest.approx(truth, rel=1e-13)


def test_random_pairs_are_of_two_classes_and_every_pair_is_as_likely():
    classes, count = 200, 19_000  # several blocks
    rows, seen = 0.1 * torch.randn(classes, 40).double(), []

    def values(pairs):
        seen.append(torch.stack([pairs.left, pairs.right]))
        left, right = rows[pairs.left], rows[pairs.right]
        found = pairs.products(rows), pairs.sums(rows[:, 0]), pairs.squared_distances(rows)
        truth = (left * right).sum(dim=1), left[:, 0] + right[:, 0], ((left - right) ** 2).sum(dim=1)
        torch.testing.assert_close(found, truth, rtol=1e-12, atol=1e-12)
        return found[2]

    mean, error = mean_over_pairs(rows, values, count)
    left, right = torch.cat(seen, dim=1)
    distances = ((rows[left] - rows[right]) ** 2).sum(dim=1)
    assert len(left) == count
    assert mean.item() == pytest.approx(distances.mean().item(), rel=1e-12)
    assert error.item() == pytest.approx(distances.std().item() / math.sqrt(count), rel=1e-9)
    deviation, error = deviation_over_pairs(rows, lambda pairs: pairs.squared_distances(rows), count)
    squares = (distances - distances.mean()) ** 2
    assert deviation.item() == pytest.approx(squares.mean().sqrt().item(), rel=1e-9)
    assert error.item() == pytest.approx((squares.std() / math.sqrt(count) / (2 * deviation)).item(), rel=1e-9)
    assert (left != right).all()
    for side in (left, right):  # five standard deviations of a count of 95
        counts = side.bincount(minlength=classes)
        assert len(counts) == classes
        assert ((counts - count / classes).abs() < 5 * math.sqrt(count / classes)).all()
    steps = ((right - left) % classes).bincount(minlength=classes)[1:]
    assert ((steps - count / (classes - 1)).abs() < 5 * math.sqrt(count / classes)).all()


def test_pairs_that_are_all_alike_have_no_deviation_and_no_error_and_a_gradient():
    rows = torch.randn(6, 3).double().requires_grad_()
    deviation, error = deviation_over_pairs(rows, lambda pairs: 0 * pairs.products(rows) + 2, 5)
    deviation.backward()
    assert (deviation, error) == (0, 0)
    assert torch.equal(rows.grad, torch.zeros(6, 3))


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
def test_near_rows_keep_the_digits_of_their_distance_at_any_scale(scale):
    rows = scale * (torch.randn(1, 5).double() + 1e-5 * torch.randn(7, 5).double())
    everyone = slice(0, 7)
    found = Pairs(everyone, everyone).squared_distances(rows)
    truth = [((rows[i] - rows[j]) ** 2).sum().item() for i in range(7) for j in range(i + 1, 7)]
    assert found.tolist() == pytest.approx(truth, rel=1e-9)


def test_random_pairs_are_the_same_every_time_and_move_no_random_stream():
    rows, target = clusters(40, 3, 6, 0.5)
    state = torch.get_rng_state()
    assert of_pairs(rows, target, 100) == of_pairs(rows, target, 100)
    assert of_pairs(rows, target, 2)["nc1_cdnv_stderr"] > 0  # the fewest that have a standard error
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("pairs", [1, 2.5, "1e7", math.inf, math.nan])
def test_a_number_of_pairs_that_is_none_is_refused(pairs):
    with pytest.raises(ValueError, match="pairs must be a whole number of at least 2"):
        NeuralCollapse(3, 4, metrics="nc1_cdnv", pairs=pairs)
    with pytest.raises(ValueError, match="pairs must be a whole number of at least 2"):
        functional.nc1_cdnv(torch.ones(2, 2), torch.arange(2), pairs=pairs)


def test_what_is_not_defined_has_no_standard_error_either():
    values = of_pairs(torch.ones(4, 2), torch.ones(4, dtype=int), 100)
    assert [*values] == [f"{name}{suffix}" for name in PAIRWISE for suffix in ("", "_stderr")]
    assert all(math.isnan(value) for value in values.values())


@pytest.mark.parametrize("distance", [1e-1, 1e-3, 1e-6])
def test_class_means_that_are_near_to_each_other_keep_their_digits(distance):
    points, target = clusters(6, 20, 8, 0.1 * distance, dtype=torch.float64)
    points[target == 1] = points[target == 0] + distance * torch.randn(8, dtype=torch.float64)
    expected = reference.all_metrics(points.numpy(), target.numpy(), np.ones((6, 8)), np.ones(6))
    assert functional.nc1_cdnv(points, target).item() == pytest.approx(expected["nc1_cdnv"], rel=1e-9)


@pytest.mark.parametrize("features", [1, 20, 998])
def test_a_tight_frame_of_more_classes_than_dimensions_has_the_smallest_distance_there_is(features):
    # Its Gram matrix is a projection P of rank d onto a part of where the ETF lives: <P / sqrt d, E> = sqrt(d / (K - 1)).
    classes = 1000
    axes = torch.linalg.qr(torch.randn(classes, features + 1).double().index_fill(1, torch.tensor(0), 1)).Q[:, 1:]
    smallest = math.sqrt(2 / (1 + math.sqrt(features / (classes - 1))) * (1 - features / (classes - 1)))
    assert nc2(axes, torch.arange(classes)).item() == pytest.approx(smallest, rel=1e-10)
    assert nc2(axes, torch.arange(classes), center=True).item() == pytest.approx(smallest, rel=1e-10)


@pytest.mark.parametrize("level", [1e-2, 1e-10, 1e-25])
def test_nc1_of_all_features_is_exact_however_small(level):
    # Deviations +-e around exactly representable means: Sigma_W = e^2 I, and with the means on the axes NC1 is known.
    classes, size = 4, 2.0**20
    step = 2.0 ** round(math.log2(size * math.sqrt(level)))
    means = size * torch.eye(classes, dtype=torch.float64)
    target = torch.arange(classes).repeat_interleave(2 * classes)
    signs = torch.cat([torch.eye(classes), -torch.eye(classes)]).repeat(classes, 1).double()
    features = means[target] + step * signs
    # Sigma_W = step^2 / K I, Sigma_B = size^2 / K (I - 11'/K), so NC1 = (step / size)^2 (K - 1) / K
    expected = (step / size) ** 2 * (classes - 1) / classes
    assert nc1(features, target).item() == pytest.approx(expected, rel=1e-9)


def test_a_weak_class_direction_is_not_cut_off():
    # float32 pinv with its default cut-off loses a direction with a singular value ratio of 1e-3.
    means = torch.tensor([[1.0, 0, 0], [-1, 0, 0], [0, 1e-3, 0], [0, -1e-3, 0]], dtype=torch.float64)
    target = torch.arange(4).repeat_interleave(50)
    features = (means[target] + 1e-4 * torch.randn(200, 3).double()).float()
    assert nc1(features, target).item() == pytest.approx(
        reference.nc1_by_axes(features.numpy(), target.numpy()), rel=1e-6
    )


def test_formulas_are_differentiable_at_random_points_and_nearly_collapsed_ones():
    rows, target = clusters(3, 4, 5, 0.3, dtype=torch.float64)
    weight = torch.randn(3, 5, dtype=torch.float64, requires_grad=True)
    rows.requires_grad_()
    assert torch.autograd.gradcheck(lambda f: nc1(f, target), rows)
    for center in (False, True):
        assert torch.autograd.gradcheck(lambda f, center=center: nc2(f, target, center=center), rows)
        assert torch.autograd.gradcheck(lambda f, center=center: nc2(f, target, frame="of", center=center), rows)
        assert torch.autograd.gradcheck(lambda f, w, center=center: nc3(f, target, w, center=center), (rows, weight))
    rows, target = clusters(7, 2, 4, 0.3, dtype=torch.float64)  # more classes than dimensions
    weight = torch.randn(7, 4, dtype=torch.float64)
    rows.requires_grad_()
    for name, spec in METRICS.items():
        smooth = not (
            spec.samples or name.startswith("numerical_rank") or name in (*OF_WEIGHT_ALONE, "minority_cosine")
        )
        if smooth and spec.exists(7, 4):
            compute = functools.partial(metric_value, name, target=target, weight=weight, bias=torch.zeros(7))
            assert torch.autograd.gradcheck(compute, rows), name
    for name in PAIRWISE:
        assert torch.autograd.gradcheck(lambda f, name=name: getattr(functional, name)(f, target, pairs=9), rows), name
    collapsed = (simplex_etf(4).repeat(5, 1) + 1e-8 * torch.randn(20, 4).double()).requires_grad_()
    nc1(collapsed, torch.arange(4).repeat(5)).backward()  # equal singular values, where the gradient of an SVD is nan
    assert collapsed.grad.isfinite().all()


@pytest.mark.parametrize("scale", [1e-130, 1e-100, 1e-30, 1e30, 1e100, 1e130])
@pytest.mark.parametrize("classes", [4, 9])
def test_no_metric_depends_on_the_scale_of_features_and_weight(scale, classes):
    rows, target = clusters(classes, 9, 6, 0.3, dtype=torch.float64)
    weight, bias = torch.randn(classes, 6).double(), torch.zeros(classes)
    for name in METRICS.keys() - {"bias_collapse"}:
        value = metric_value(name, rows * scale, target, weight * scale, bias).item()
        expected = metric_value(name, rows, target, weight, bias).item()
        assert value == pytest.approx(expected, rel=1e-9, nan_ok=True), name
    metric = NeuralCollapse(classes, 6, metrics=("nc1", "nc1_trace", "nc2_etf"))
    metric.update(rows * scale, target)
    expected = {name: metric_value(name, rows, target, weight, bias).item() for name in metric.metrics}
    assert {name: value.item() for name, value in metric.compute().items()} == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize(("scale", "effect"), [(1e-150, "underflow"), (1e150, "overflow"), (1e-300, "underflow")])
def test_squares_out_of_range_are_nan_with_the_remedy(scale, effect):
    rows, target = clusters(4, 9, 6, 0.3, dtype=torch.float64)
    metric = NC1(4, 6)
    metric.update(rows * scale, target)
    for compute in (lambda: nc1(rows * scale, target), lambda: nc2(rows * scale, target), metric.compute):
        with pytest.warns(UserWarning, match=f"squares {effect} .scale them"):
            assert compute().isnan()


@pytest.mark.parametrize("value", [math.nan, math.inf, 0.0])
def test_a_weight_that_is_zero_or_not_finite_gives_nan_and_one_warning_with_the_reason(value):
    features, target = clusters(3, 20, 5, 0.3)
    weight = torch.full((3, 5), value)
    reason = "weight is zero" if value == 0 else "weight holds an infinity or a nan"
    metric = NeuralCollapse(3, 5, weight, torch.zeros(3), metrics=ONE_PASS)
    metric.update(features, target)
    with pytest.warns(UserWarning, match=reason) as caught:
        values = metric.compute()
    assert len(caught) == 1
    undefined = {name for name, result in values.items() if result.isnan()}
    needing = {name for name in ONE_PASS if "weight" in METRICS[name].needs}
    assert undefined == needing - ({"bias_collapse"} if value == 0 else set())


def test_a_bias_or_a_single_row_of_the_weight_spoils_only_what_needs_it():
    features, target = clusters(3, 20, 5, 0.3)
    weight, bias = torch.randn(3, 5), torch.tensor([0.0, math.nan, 0.0])
    with pytest.warns(UserWarning, match="bias_collapse: nan, because the classifier's bias holds"):
        assert functional.bias_collapse(features, target, weight, bias).isnan()
    with pytest.warns(UserWarning, match="nc4: nan, because the classifier's bias"):
        assert nc4(features, target, weight, bias).isnan()
    with pytest.warns(UserWarning, match="nc4: nan, because the classifier's weight"):
        assert nc4(features, target, weight * math.nan).isnan()
    for value in (math.nan, math.inf, -math.inf):
        one = weight.clone()
        one[2, 3] = value
        with pytest.warns(UserWarning, match="nc4: nan, because the classifier's weight holds"):
            assert nc4(features, target, one).isnan()
    weight[1] = 0
    with pytest.warns(UserWarning, match="nc3_cosine: nan, because the classifier's weight is zero for one or more"):
        assert functional.nc3_cosine(features, target, weight).isnan()
    assert nc3(features, target, weight).isfinite()
    weight[2] = math.nan
    kept = target != 2  # a class without samples does not matter
    with pytest.warns(UserWarning, match="no sample"):
        assert nc3(features[kept], target[kept], weight).isfinite()


def test_a_missing_class_is_left_out_with_a_warning():
    rows, target = clusters(4, 10, 6, 0.2, dtype=torch.float64)
    weight = torch.randn(4, 6, dtype=torch.float64)
    kept = target != 2
    labels = target[kept].apply_(lambda k: k - (k > 2))
    with pytest.warns(UserWarning, match=r"no sample of 1 class \(2\)"):
        value = nc3(rows[kept], target[kept], weight)
    assert value.item() == pytest.approx(nc3(rows[kept], labels, weight[[0, 1, 3]]).item(), rel=1e-12)
    with pytest.warns(UserWarning, match="no sample"):
        assert nc1(rows[kept], target[kept], 4).item() == pytest.approx(nc1(rows[kept], labels).item(), rel=1e-12)


def test_nc5_needs_means_that_have_a_direction_and_keeps_their_digits():
    rows, target = clusters(3, 20, 5, 0.3)
    other = torch.randn(70, 5) + 1
    truth = reference.all_metrics(rows.numpy(), target.numpy(), np.eye(3, 5), np.zeros(3), other.numpy())["nc5"]
    assert functional.nc5(rows, target, other).item() == pytest.approx(truth, rel=1e-13)
    broken = other.clone()
    broken[3, 2] = torch.inf
    with pytest.warns(UserWarning, match="nc5: nan, because the mean of the data of no class is not finite"):
        assert functional.nc5(rows, target, broken).isnan()
    with pytest.warns(
        UserWarning, match="nc5: nan, because the mean of a class, or that of the data of no class, is zero"
    ):
        assert functional.nc5(rows, target, torch.zeros(4, 5)).isnan()
    rows[target == 1] = 0
    with pytest.warns(
        UserWarning, match="nc5: nan, because the mean of a class, or that of the data of no class, is zero"
    ):
        assert functional.nc5(rows, target, other).isnan()


@pytest.mark.filterwarnings("ignore")
def test_at_collapse_every_metric_has_the_value_of_its_row_and_elsewhere_lies_on_the_named_side():
    classes, target = 4, torch.arange(4).repeat(5)
    turn = torch.linalg.qr(torch.randn(6, 6).double()).Q
    etf = torch.nn.functional.pad(simplex_etf(classes), (0, 2)) @ turn
    noisy, line = etf[target] + 0.5 * torch.randn(20, 6).double(), torch.arange(4.0).double()[target, None] * turn[0]
    for name, spec in METRICS.items():
        value = spec.value_at_collapse(classes, 6)
        if not name.startswith("nc2_of") and name != "nc5" and spec.exists(classes, 6):
            found = metric_value(name, etf[target], target, 2 * etf, torch.zeros(4)).item()
            assert found == pytest.approx(value, abs=1e-7), name
        for rows, weight in ((noisy, torch.randn(4, 6).double()), (line, line[:4] + turn[1])):
            found = metric_value(name, rows, target, weight, torch.zeros(4)).item()
            assert not (spec.direction == "falls" and found < value - 1e-9), name
            assert not (spec.direction == "rises" and found > value + 1e-9), name
    assert METRICS["nc2_of"].value_at_collapse(classes) == 0  # of an orthogonal frame
    assert functional.numerical_rank(torch.ones(20, 6), target) == 0


@pytest.mark.parametrize("name", ONE_PASS)
def test_a_metric_alone_keeps_all_that_it_needs(name):
    rows, target = clusters(3, 8, 5, 0.3, dtype=torch.float64)
    weight, bias = torch.randn(3, 5).double(), torch.randn(3).double()
    metric = NeuralCollapse(3, 5, weight, bias, metrics=name)
    metric.update(rows, target)
    truth = reference.all_metrics(rows.numpy(), target.numpy(), weight.numpy(), bias.numpy())[name]
    assert metric.compute()[name].item() == pytest.approx(truth, rel=1e-8, abs=1e-12)


@pytest.mark.filterwarnings("ignore:nc1 leaves out")
def test_what_is_not_defined_is_nan():
    assert nc1(torch.randn(5, 3), torch.zeros(5, dtype=torch.long)).isnan()
    assert nc1(torch.randn(0, 3), torch.zeros(0, dtype=torch.long)).isnan()
    assert nc1(torch.ones(6, 3), torch.arange(2).repeat(3)).isnan()  # all class means coincide: nothing to compare with
    features = torch.randn(6, 3)
    features[1, 2] = torch.nan
    with pytest.warns(UserWarning, match="1 samples have an infinity or a nan"):
        assert nc1(features, torch.arange(2).repeat(3)).isnan()


@pytest.mark.parametrize(
    ("features", "target", "message"),
    [
        (torch.ones(4, 3), torch.ones(4), "class indices of shape"),
        (torch.ones(4, 3), torch.ones(4, 3, dtype=torch.long), "class indices of shape"),
        (torch.ones(4, 3, 2), torch.ones(4, dtype=torch.long), "pool or flatten"),
        (torch.ones(4, 3, dtype=torch.long), torch.ones(4, dtype=torch.long), r"int64 \(4, 3\); call .float"),
        (torch.ones(4, 3), torch.ones(5, dtype=torch.long), "same length"),
        (torch.ones(4, 3), torch.tensor([0, 1, -100, 1]), "example -100"),
    ],
)
def test_bad_input_names_what_came_and_the_remedy(features, target, message):
    with pytest.raises(ValueError, match=message):
        nc1(features, target)


def test_a_weight_that_does_not_fit_is_refused():
    features, target = torch.randn(6, 3), torch.arange(3).repeat(2)
    with pytest.raises(ValueError, match=r"two rows or more, got \(1, 3\)"):
        functional.gnc2_margin(torch.ones(1, 3))
    assert functional.gnc2_margin(
        torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
    ).isnan()  # a row without a direction
    with pytest.raises(ValueError, match=r"weight must have shape \(3, 3\), got \(4, 3\)"):
        nc3(features, target, torch.randn(4, 3), num_classes=3)
    with pytest.raises(ValueError, match=r"weight must have shape \(3, 3\), got \(3, 4\)"):
        nc3(features, target, torch.randn(3, 4))
    with pytest.raises(ValueError, match="frame must be"):
        nc2(features, target, frame="simplex")


def test_names_of_metrics_are_a_word_a_name_or_a_sequence():
    assert check_metrics("paper") == ("nc1", "nc2_etf", "nc2_etf_centered", "nc2_of", "nc3", "nc3_centered")
    assert check_metrics("nc1_cdnv") == ("nc1_cdnv",)
    assert check_metrics(["nc1", "nc3"]) == ("nc1", "nc3")
    assert check_metrics("all") == tuple(name for name, spec in METRICS.items() if not spec.opt_in)
    for names, message in [
        ((), "metrics is empty"),
        ("papers", "did you mean one of paper"),
        (("nc2_eft",), "did you mean one of nc2_etf"),
        (("nc6",), "did you mean one of nc"),
    ]:
        with pytest.raises(ValueError, match=message):
            check_metrics(names)


def both_nc1(features, target, classes):
    """By the function and by the metric, in two batches."""
    metric = NC1(classes, features.shape[1])
    metric.update(features[::2], target[::2])
    metric.update(features[1::2], target[1::2])
    return nc1(features, target).item(), metric.compute().item()


TYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("classes", [4, 5, 12])
def test_class_means_of_a_low_rank_are_measured_in_the_directions_that_they_have(classes, dtype):
    # NC1 does not change when two dimensions are mapped into 64, where rounding alone fills the others.
    points, target = clusters(classes, 30, 2, 0.1, seed=classes, dtype=torch.float64)
    wide = (points @ torch.randn(2, 64).double() + 3).to(dtype)
    expected = reference.nc1_by_axes(points.numpy(), target.numpy())
    with pytest.warns(UserWarning, match=rf"leaves out {classes - 3} of {classes - 1} directions.*{str(dtype)[6:]}"):
        values = both_nc1(wide, target, classes)
    assert values == pytest.approx(
        (expected, expected), rel={torch.float16: 0.02, torch.bfloat16: 0.3}.get(dtype, 1e-3)
    )


@pytest.mark.filterwarnings("ignore:nc1 leaves out")
@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize(("classes", "per_class"), [(5, 40), (10, 500), (20, 3)])
@pytest.mark.parametrize("seed", range(3))
def test_noise_that_a_net_adds_behind_a_bottleneck_is_no_direction(classes, per_class, dtype, seed):
    rows, target, points = bottleneck(classes, per_class, 128, dtype, seed)
    expected = reference.nc1_by_axes(points.numpy(), target.numpy())
    assert both_nc1(rows, target, classes) == pytest.approx(
        (expected, expected), rel=0.3 if dtype in TYPES[2:] else 1e-2
    )


@pytest.mark.filterwarnings("ignore:nc1 leaves out")
@pytest.mark.parametrize("dtype", TYPES)
def test_outliers_among_identical_samples_make_no_direction_of_rounding(dtype):
    # Their scatter is large, yet the rounding errors of all the others are the same and do not average out.
    points, target = clusters(10, 500, 2, 0.0, dtype=torch.float64)
    points[::100] += torch.randn(50, 2).double()
    wide = (points @ torch.randn(2, 256).double() + 3).to(dtype)
    expected = reference.nc1_by_axes(points.numpy(), target.numpy())
    assert both_nc1(wide, target, 10) == pytest.approx((expected, expected), rel=0.02)


def test_a_column_that_is_much_larger_than_the_others_does_not_count_as_a_direction():
    points, target = clusters(20, 100, 2, 0.1, dtype=torch.float64)
    wide = points @ torch.randn(2, 128).double()
    wide[:, 0] += 1000
    expected = reference.nc1_by_axes(points.numpy(), target.numpy())
    with pytest.warns(UserWarning, match="leaves out 17 of 19"):
        assert both_nc1(wide.float(), target, 20) == pytest.approx((expected, expected), rel=1e-3)


@pytest.mark.parametrize("depth", [2, 4, 6])
def test_weak_directions_of_an_untrained_net_are_kept(depth):
    layers = [layer for _ in range(depth) for layer in (nn.Linear(128, 128), nn.ReLU())]
    target = torch.arange(100).repeat(40)
    inputs = torch.randn(100, 128)[target] + torch.randn(len(target), 128)
    with torch.no_grad():
        exact = nn.Sequential(*layers).double()(inputs.double())
        rows = nn.Sequential(*layers).float()(inputs)
    expected = reference.nc1_by_axes(exact.numpy(), target.numpy())
    assert both_nc1(rows, target, 100) == pytest.approx((expected, expected), rel=1e-4)


def test_a_small_separation_on_a_large_offset_is_seen():
    points, target = clusters(10, 200, 64, 1.0, dtype=torch.float64)
    expected = reference.nc1(points.numpy(), target.numpy())
    rows = (1e4 + 0.01 * points).float()
    assert both_nc1(rows, target, 10) == pytest.approx((expected, expected), rel=1e-2)


def test_one_float64_row_that_float32_could_hold_changes_nothing():
    points, target = clusters(5, 20, 8, 1.0, dtype=torch.float64)
    rows = 1 + 1e-8 * points
    expected = reference.nc1(points.numpy(), target.numpy())
    rows = torch.cat([rows, torch.ones(1, 8).double()])
    target = torch.cat([target, target[:1]])
    expected = reference.nc1_by_axes(((rows - 1) * 1e8).numpy(), target.numpy())
    assert both_nc1(rows, target, 5) == pytest.approx((expected, expected), rel=1e-5)


def test_the_gradient_of_nc1_leaves_rounding_out_too():
    points, target = clusters(5, 30, 2, 0.1, dtype=torch.float64)
    wide = (points @ torch.randn(2, 64).double() + 3).float().requires_grad_()
    with pytest.warns(UserWarning, match="leaves out 2 of 4"):
        value = nc1(wide, target)
    assert value.item() == pytest.approx(reference.nc1_by_axes(points.numpy(), target.numpy()), rel=1e-3)
    (gradient,) = torch.autograd.grad(value, wide)
    step = 1e-3 * gradient / gradient.norm()
    with pytest.warns(UserWarning, match="leaves out"):
        ahead, behind = nc1(wide.detach() + step, target), nc1(wide.detach() - step, target)
    assert ((ahead - behind) / 2e-3).item() == pytest.approx(gradient.norm().item(), rel=1e-2)
