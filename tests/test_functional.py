import math

import numpy as np
import pytest
import reference
import torch
from conftest import clusters

from lightning_nc import NC1, functional
from lightning_nc.functional import MEASURES, nc1, nc2, nc2_equinorm, nc2_maxangle, nc3


def golden():
    rng = np.random.default_rng(0)
    rows = [3 * np.eye(3, 5)[k] + 0.15 * rng.standard_normal((30, 5)) for k in range(3)]
    return torch.tensor(np.concatenate(rows)), torch.arange(3).repeat_interleave(30)


def simplex_etf(classes):
    return math.sqrt(classes / (classes - 1)) * (torch.eye(classes) - 1 / classes).double()


def test_the_golden_values_are_met():
    features, target = golden()
    assert nc1(features, target).item() == pytest.approx(0.00409094387203806, rel=1e-13)
    assert nc2_equinorm(features, target).item() == pytest.approx(0.00784386, rel=1e-6)
    assert nc2_maxangle(features, target).item() == pytest.approx(0.0111446387, rel=1e-8)


@pytest.mark.parametrize(("classes", "distance"), [(4, 0.5176380902), (5, 0.4595058411), (10, 0.3203644860)])
def test_the_two_frames_have_the_published_distance(classes, distance):
    labels = torch.arange(classes)
    orthogonal, etf = torch.eye(classes).double(), simplex_etf(classes)
    assert nc2(orthogonal, labels, frame="of").item() < 1e-12
    assert nc2(orthogonal, labels, center=True).item() < 1e-12
    assert nc2(etf, labels).item() < 1e-12
    assert nc2(orthogonal, labels).item() == pytest.approx(distance, rel=1e-5)
    assert nc2(etf, labels, frame="of").item() == pytest.approx(distance, rel=1e-5)


@pytest.mark.parametrize(("classes", "features"), [(3, 5), (7, 4), (2, 6), (5, 1), (10, 64)])
def test_every_measure_agrees_with_an_independent_computation(classes, features):
    rows, target = clusters(classes, 12, features, 0.3, dtype=torch.float64)
    weight, bias = torch.randn(classes, features).double(), torch.randn(classes).double()
    expected = reference.all_measures(rows.numpy(), target.numpy(), weight.numpy(), bias.numpy())
    assert set(expected) == set(MEASURES)
    for name, (_, needs, _) in MEASURES.items():
        parts = [{"weight": weight, "bias": bias}[need] for need in needs]
        value = functional._measure(name, rows, target, classes, *parts)
        assert value.item() == pytest.approx(expected[name], rel=1e-9, abs=1e-13), name


@pytest.mark.filterwarnings("ignore:.*encountered in divide")  # the reference, of the dead unit
@pytest.mark.parametrize(("classes", "features"), [(5, 3), (40, 6), (50, 60)])
def test_many_classes_are_compared_in_blocks_with_the_same_result(classes, features, monkeypatch):
    monkeypatch.setattr(functional, "_BLOCK", 3 * classes)
    rows, target = clusters(classes, 5, features, 0.3, dtype=torch.float64)
    rows = torch.cat([rows.relu(), torch.zeros(len(rows), 1)], dim=1)  # a unit that is dead
    weight, bias = torch.randn(classes, features + 1).double(), torch.randn(classes).double()
    expected = reference.all_measures(rows.numpy(), target.numpy(), weight.numpy(), bias.numpy())
    expected["nc1"] = reference.nc1_by_axes(rows.numpy(), target.numpy())
    for name, (_, needs, _) in MEASURES.items():
        parts = [{"weight": weight, "bias": bias}[need] for need in needs]
        value = functional._measure(name, rows, target, classes, *parts)
        assert value.item() == pytest.approx(expected[name], rel=1e-9), name


@pytest.mark.parametrize("features", [1, 20, 998])
def test_a_tight_frame_of_more_classes_than_dimensions_has_the_smallest_distance_there_is(features):
    # Its Gram matrix is a projection P of rank d onto a part of where the ETF lives: <P / sqrt d, E> = sqrt(d / (K - 1)).
    classes = 1000
    axes = torch.linalg.qr(torch.randn(classes, features + 1).double().index_fill(1, torch.tensor(0), 1)).Q[:, 1:]
    smallest = math.sqrt(2 / (1 + math.sqrt(features / (classes - 1))) * (1 - features / (classes - 1)))
    assert nc2(axes, torch.arange(classes)).item() == pytest.approx(smallest, rel=1e-10)
    assert nc2(axes, torch.arange(classes), center=True).item() == pytest.approx(smallest, rel=1e-10)


def test_the_public_functions_are_the_measures_of_their_name():
    rows, target = clusters(4, 9, 6, 0.3, dtype=torch.float64)
    weight, bias = torch.randn(4, 6).double(), torch.randn(4).double()
    expected = reference.all_measures(rows.numpy(), target.numpy(), weight.numpy(), bias.numpy())
    values = {
        name: getattr(functional, name)(rows, target)
        for name in expected
        if name in ("nc1", "nc1_trace", "nc1_cdnv", "nc2_equinorm", "nc2_equiangular", "nc2_maxangle")
    }
    for frame in ("etf", "of"):
        values[f"nc2_{frame}"] = nc2(rows, target, frame=frame)
        values[f"nc2_{frame}_centered"] = nc2(rows, target, frame=frame, center=True)
    values["nc3"], values["nc3_centered"] = nc3(rows, target, weight), nc3(rows, target, weight, center=True)
    values["nc3_gram"] = functional.nc3_gram(rows, target, weight)
    values["nc3_cosine"] = functional.nc3_cosine(rows, target, weight)
    values["nc2_weight"] = functional.nc2_weight(weight)
    values["bias_collapse"] = functional.bias_collapse(rows, target, weight, bias)
    assert {k: v.item() for k, v in values.items()} == pytest.approx(expected, rel=1e-9)


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
    for name, measure in MEASURES.items():
        if "bias" not in measure.needs:
            parts = [weight] * len(measure.needs)
            assert torch.autograd.gradcheck(
                lambda f, name=name, parts=parts: functional._measure(name, f, target, 7, *parts), rows
            ), name
    collapsed = (simplex_etf(4).repeat(5, 1) + 1e-8 * torch.randn(20, 4).double()).requires_grad_()
    nc1(collapsed, torch.arange(4).repeat(5)).backward()  # equal singular values, where the gradient of an SVD is nan
    assert collapsed.grad.isfinite().all()


def test_no_measure_depends_on_the_scale_of_tiny_features():
    rows, target = clusters(4, 9, 6, 0.3, dtype=torch.float64)
    weight = torch.randn(4, 6).double()
    for name in ("nc1", "nc1_trace", "nc1_cdnv", "nc2_equinorm", "nc2_equiangular", "nc2_maxangle"):
        function = getattr(functional, name)
        assert function(rows * 1e-30, target).item() == pytest.approx(function(rows, target).item(), rel=1e-9), name
    tiny = functional.nc3_cosine(rows * 1e-30, target, weight * 1e-30)
    assert tiny.item() == pytest.approx(functional.nc3_cosine(rows, target, weight).item(), rel=1e-9)


def test_a_missing_class_is_left_out_with_a_warning():
    rows, target = clusters(4, 10, 6, 0.2, dtype=torch.float64)
    weight = torch.randn(4, 6, dtype=torch.float64)
    kept = target != 2
    labels = target[kept].apply_(lambda k: k - (k > 2))
    with pytest.warns(UserWarning, match=r"no sample of 1 classes \(2\)"):
        value = nc3(rows[kept], target[kept], weight)
    assert value.item() == pytest.approx(nc3(rows[kept], labels, weight[[0, 1, 3]]).item(), rel=1e-12)
    with pytest.warns(UserWarning, match="no sample"):
        assert nc1(rows[kept], target[kept], 4).item() == pytest.approx(nc1(rows[kept], labels).item(), rel=1e-12)


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
        (torch.ones(4, 3, dtype=torch.long), torch.ones(4, dtype=torch.long), "floating"),
        (torch.ones(4, 3), torch.ones(5, dtype=torch.long), "same length"),
        (torch.ones(4, 3), torch.tensor([0, 1, -100, 1]), "-100 for one"),
    ],
)
def test_bad_input_names_what_came_and_the_remedy(features, target, message):
    with pytest.raises(ValueError, match=message):
        nc1(features, target)


def test_a_weight_that_does_not_fit_is_refused():
    features, target = torch.randn(6, 3), torch.arange(3).repeat(2)
    with pytest.raises(ValueError, match="a row for each of the 3 classes"):
        nc3(features, target, torch.randn(4, 3), num_classes=3)
    with pytest.raises(ValueError, match="a column for each of the 3 features"):
        nc3(features, target, torch.randn(3, 4))
    with pytest.raises(ValueError, match="frame must be"):
        nc2(features, target, frame="simplex")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("classes", [4, 5, 12])
def test_class_means_of_a_low_rank_are_measured_in_the_directions_that_they_have(classes, dtype):
    # NC1 does not change when two dimensions are mapped into 64, where rounding alone fills the others.
    points, target = clusters(classes, 30, 2, 0.1, seed=classes, dtype=torch.float64)
    wide = (points.float() @ torch.randn(2, 64) + 3).to(dtype)
    expected = reference.nc1_by_axes(points.numpy(), target.numpy())
    assert nc1(wide, target).item() == pytest.approx(expected, rel=1e-3)
    metric = NC1(classes, 64)
    metric.update(wide[:50], target[:50])
    metric.update(wide[50:], target[50:])
    assert metric.compute().item() == pytest.approx(expected, rel=1e-3)
