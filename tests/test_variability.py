import pytest
import torch
from conftest import bottleneck, clusters

from lightning_nc.functional import nc1_vci
from lightning_nc.functional.table import evaluate
from lightning_nc.moments import ClassMoments


def both_vci(features, target):
    """By the function and from batches."""
    classes = int(target.max()) + 1
    moments = ClassMoments.zeros(classes, features.shape[1])
    for rows, labels in zip(features.split(37), target.split(37), strict=True):
        moments.update(rows, labels)
    return nc1_vci(features, target).item(), evaluate(("nc1_vci",), moments)["nc1_vci"].item()


def correlated(classes, per_class, features, noise, seed=0):
    """Samples that vary in a way that correlates the directions of the class means with all others."""
    rows, target = clusters(classes, per_class, features, 0.0, seed, torch.float64)
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(features, features, generator=generator, dtype=torch.float64)
    return rows + noise * torch.randn(len(rows), features, generator=generator, dtype=torch.float64) @ mix, target


@pytest.mark.filterwarnings("ignore:nc1 leaves out")
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("per_class", [30, 300])
def test_dimensions_that_only_rounding_fills_explain_nothing_of_the_variability(dtype, per_class):
    # The index does not change when two dimensions are mapped into 64. Regression on the other 62, which hold nothing but
    # rounding, would explain half of 120 samples.
    points, target = clusters(4, per_class, 2, 0.3, dtype=torch.float64)
    wide = (points @ torch.randn(2, 64).double() + 3).to(dtype)
    expected = nc1_vci(points, target).item()
    assert expected > 0.01
    rel = 0.02 if dtype == torch.bfloat16 else 1e-5
    assert both_vci(wide, target) == pytest.approx((expected, expected), rel=rel)


@pytest.mark.filterwarnings("ignore:nc1 leaves out")
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_the_index_behind_a_bottleneck_is_that_of_the_bottleneck(dtype):
    rows, target, points = bottleneck(5, 100, 128, dtype)
    expected = nc1_vci(points, target).item()
    rel = 0.1 if dtype == torch.bfloat16 else 1e-3
    assert both_vci(rows, target) == pytest.approx((expected, expected), rel=rel)


@pytest.mark.parametrize("noise", [1.0, 1e-2, 1e-5])
@pytest.mark.parametrize(("classes", "features"), [(3, 8), (6, 4), (4, 150)])
def test_every_invertible_map_of_the_features_leaves_the_index_as_it_is(classes, features, noise):
    rows, target = correlated(classes, 60, features, noise)
    own = both_vci(rows, target)
    assert own[0] == pytest.approx(own[1], rel=1e-7)
    turn = torch.linalg.qr(torch.randn(features, features).double()).Q
    stretched = (rows @ turn) * torch.logspace(-1, 1, features, dtype=torch.float64) + 5
    assert both_vci(stretched, target) == pytest.approx(own, rel=1e-6)


@pytest.mark.filterwarnings("ignore:.*rounding")
def test_variation_that_other_directions_explain_does_not_count():
    # Along the class means the samples repeat what they do in another dimension: a linear map takes it out.
    rows = torch.zeros(80, 3).double()
    target = torch.arange(2).repeat(40)
    rows[:, 0] = 2.0 * target
    common, own = torch.randn(2, 80).double()
    for share, explained in ((0.0, False), (1.0, True)):
        rows[:, 1] = common
        rows[:, 0] = 2.0 * target + 0.5 * (common * share + own * (1 - share))
        values = both_vci(rows, target)
        assert (max(values) < 1e-6) == explained, values


@pytest.mark.parametrize("noise", [0.5, 1e-3])
@pytest.mark.parametrize(("classes", "features"), [(3, 6), (5, 3)])
def test_the_gradient_of_the_index_is_that_of_finite_differences(noise, classes, features):
    rows, target = correlated(classes, 8, features, noise)
    rows.requires_grad_()
    value = nc1_vci(rows, target)
    (gradient,) = torch.autograd.grad(value, rows)
    for seed in range(3):
        direction = torch.randn(rows.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        step = 1e-4 * noise * direction
        with torch.no_grad():
            change = nc1_vci(rows + step, target) - nc1_vci(rows - step, target)
        assert (gradient * step).sum().item() * 2 == pytest.approx(change.item(), rel=1e-4)


@pytest.mark.filterwarnings("ignore:nc1 leaves out")
def test_the_gradient_of_the_index_leaves_rounding_out_too():
    points, target = clusters(4, 60, 2, 0.3, dtype=torch.float64)
    wide = (points @ torch.randn(2, 64).double() + 3).float().requires_grad_()
    (gradient,) = torch.autograd.grad(nc1_vci(wide, target), wide)
    points.requires_grad_()
    own = nc1_vci(points, target)
    step = 1e-2 * torch.autograd.grad(own, points)[0]
    # A step in the plane of the features changes the index as it does there.
    plane = torch.linalg.lstsq(torch.cat([points.detach(), torch.ones(240, 1)], dim=1), wide.detach().double()).solution
    assert (gradient * (step @ plane[:2])).sum().item() == pytest.approx(100 * step.square().sum().item(), rel=1e-3)
