"""Neural collapse of regression: the formulas, and the metric that accumulates them."""

import math
import pickle

import numpy as np
import pytest
import torch
from torch import nn
from torchmetrics import MetricCollection

from lightning_nc import NeuralRegressionCollapse
from lightning_nc.functional import nrc1, nrc2, nrc3
from lightning_nc.regression_moments import RegressionMoments

NAMES = ("nrc1", "nrc2", "nrc3")


def data(samples=200, features=12, targets=3, noise=0.3, dtype=torch.float64, seed=0):
    """Features near a space of as many dimensions as there are targets, but off its origin; targets; a weight."""
    generator = torch.Generator().manual_seed(seed)
    scale = torch.arange(1, targets + 1, dtype=torch.float64)
    y = torch.randn(samples, targets, generator=generator, dtype=torch.float64) * scale + 2
    y[:, 0] += 0.5 * y[:, -1] * (targets > 1)
    inside = torch.randn(targets, features, generator=generator, dtype=torch.float64)
    rows = (y - 2) @ inside + noise * torch.randn(samples, features, generator=generator, dtype=torch.float64) + 0.2
    weight = inside + 0.5 * torch.randn(targets, features, generator=generator, dtype=torch.float64)
    return rows.to(dtype), y.to(dtype), weight.to(dtype)


def expected(rows, y, weight):
    """The definitions sample by sample: principal directions by the SVD of the features, and gamma from a grid."""
    rows, y, weight = (np.asarray(part, dtype=np.float64) for part in (rows, y, weight))
    directions = np.linalg.svd(rows - rows.mean(axis=0))[2][: y.shape[1]]
    basis = np.linalg.qr(weight.T)[0].T
    distances = {"nrc1": [], "nrc2": []}
    for row in rows:
        unit = row / math.sqrt(row @ row)
        for name, span in (("nrc1", directions), ("nrc2", basis)):
            difference = unit - sum((direction @ unit) * direction for direction in span)
            distances[name].append(difference @ difference)
    values = {name: np.mean(distance) for name, distance in distances.items()}
    return values | {"nrc3": grid(weight, np.cov(y.T, ddof=0))}


def grid(weight, covariance):
    """NRC3 as the smallest value for 20,001 roots of gamma; also the two ends of the interval."""
    values, vectors = np.linalg.eigh(covariance)
    root = vectors @ np.diag(np.sqrt(values)) @ vectors.T
    gram = weight @ weight.T
    forms = root - np.linspace(0, np.sqrt(values[0]), 20_001)[:, None, None] * np.eye(len(values))
    forms /= np.linalg.norm(forms, axis=(1, 2), keepdims=True)
    return (np.linalg.norm(gram / np.linalg.norm(gram) - forms, axis=(1, 2)) ** 2).min()


def metric_of(rows, y, weight, size=64, **arguments):
    metric = NeuralRegressionCollapse(y.shape[1], rows.shape[1], weight, **arguments)
    for part in zip(rows.split(size), y.split(size), strict=True):
        metric.update(*part)
    return metric


def floats(values):
    return {name: float(value) for name, value in values.items()}


# ------------------------------------------------------------------------------------------------------------ formulas


@pytest.mark.parametrize("targets", [2, 3, 5])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_the_formulas_and_the_metric_agree_with_an_independent_computation(targets, dtype):
    rows, y, weight = data(targets=targets, dtype=dtype)
    values = {"nrc1": nrc1(rows, y), "nrc2": nrc2(rows, y, weight), "nrc3": nrc3(rows, y, weight)}
    truth = expected(rows, y, weight)
    assert floats(values) == pytest.approx(truth, rel=1e-6)
    assert floats(metric_of(rows, y, weight).compute()) == pytest.approx(floats(values), rel=1e-10)
    assert all(value.dtype == torch.float64 and value.shape == () for value in values.values())


def test_one_target_may_be_a_vector_and_its_nrc3_says_that_it_means_nothing():
    rows, y, weight = data(targets=1)
    assert nrc1(rows, y[:, 0]) == nrc1(rows, y)
    centered = rows - rows.mean(dim=0)
    direction = torch.linalg.eigh(centered.T @ centered).eigenvectors[:, -1]
    unit = rows / rows.norm(dim=1, keepdim=True)
    assert nrc1(rows, y).item() == pytest.approx((1 - (unit @ direction).square()).mean().item(), rel=1e-10)
    with pytest.warns(UserWarning, match="nrc3 is nan, because for one target the formula gives 0 whatever the weight"):
        assert nrc3(rows, y, weight).isnan()


@pytest.mark.parametrize("targets", [2, 3, 5])
@pytest.mark.parametrize("kind", ["near the form", "random", "opposed", "white targets"])
def test_the_best_gamma_is_that_of_a_grid(targets, kind):
    for seed in range(20):
        rows, y, weight = data(targets=targets, seed=seed)
        generator = np.random.default_rng(seed)
        values, vectors = np.linalg.eigh(np.cov(y.T.numpy(), ddof=0))
        root = vectors @ np.diag(np.sqrt(values)) @ vectors.T
        if kind == "near the form":  # the rows of W have the Gram matrix root - 0.7 times its smallest eigenvalue
            gram = root - 0.7 * math.sqrt(values[0]) * np.eye(targets)
            weight = torch.from_numpy(np.linalg.cholesky(gram) @ np.eye(targets, 12))
            weight += 0.01 * torch.from_numpy(generator.standard_normal(tuple(weight.shape)))
        if kind == "opposed":  # no gamma is a maximum of the cosine between the two: one end of the interval is best
            weight = torch.from_numpy(vectors @ np.diag(1 / values) @ vectors.T @ np.eye(targets, 12))
        if kind == "white targets":
            y = (y - y.mean(dim=0)) @ torch.from_numpy(np.linalg.inv(root))
            exact = (weight @ weight.T / (weight @ weight.T).norm() - torch.eye(targets) / targets**0.5).square().sum()
            assert nrc3(rows, y, weight).item() == pytest.approx(exact.item(), rel=1e-6)
            continue
        best = grid(weight.numpy(), np.cov(y.T.numpy(), ddof=0))
        found = nrc3(rows, y, weight).item()
        assert found <= best + 1e-12
        assert found == pytest.approx(best, abs=1e-6)


@pytest.mark.parametrize("targets", [2, 3])
def test_all_are_zero_at_exact_collapse(targets):
    """Features that the unconstrained features model has: h = W' root^-1 (y - mean), W W' = root - sqrt(gamma) I."""
    _, y, _ = data(targets=targets)
    values, vectors = torch.linalg.eigh(torch.from_numpy(np.cov(y.T.numpy(), ddof=0)))
    root = vectors @ values.sqrt().diag() @ vectors.T
    gram = root - 0.5 * values[0].sqrt() * torch.eye(targets)
    turn = torch.linalg.qr(torch.randn(9, 9, dtype=torch.float64)).Q[:targets]
    weight = torch.linalg.cholesky(gram) @ turn
    rows = (y - y.mean(dim=0)) @ torch.linalg.inv(root) @ weight
    for value in (*metric_of(rows, y, weight).compute().values(), nrc1(rows, y), nrc2(rows, y, weight)):
        assert value.item() == pytest.approx(0, abs=1e-13)


def test_a_known_angle_gives_its_squared_sine():
    """Half of the features lie along the first axis, the others at an angle to it, out of the plane of the weight."""
    angle = 0.3
    sign = torch.tensor([1.0, -1.0], dtype=torch.float64).repeat(50)
    rows = torch.zeros(100, 4, dtype=torch.float64)
    rows[:50, 0], rows[50:, 0], rows[50:, 3] = sign[:50], math.cos(angle) * sign[50:], math.sin(angle) * sign[50:]
    y = torch.randn(100, 2)
    weight = torch.eye(4)[:2] * torch.tensor([[3.0], [0.1]])
    assert nrc2(5 * rows, y, weight).item() == pytest.approx(math.sin(angle) ** 2 / 2, rel=1e-10)


def test_rows_of_the_weight_that_depend_on_each_other_span_less():
    rows, y, weight = data(targets=2)
    weight[1] = -2 * weight[0]
    direction = weight[0] / weight[0].norm()
    unit = rows / rows.norm(dim=1, keepdim=True)
    truth = (unit - (unit @ direction)[:, None] * direction).square().sum(dim=1).mean().item()
    assert nrc2(rows, y, weight).item() == pytest.approx(truth, rel=1e-10)
    assert metric_of(rows, y, weight).compute()["nrc2"].item() == pytest.approx(truth, rel=1e-10)


def test_features_that_vary_along_one_direction_are_not_projected_on_an_arbitrary_second_one():
    rows = torch.zeros(40, 5, dtype=torch.float64)
    rows[:, 0], rows[:, 4] = (
        torch.linspace(-1, 1, 40),
        2.0,
    )  # they vary along the first axis, and the mean is along the last
    y = torch.randn(40, 2)
    assert nrc1(rows, y).item() == pytest.approx((4 / (4 + rows[:, 0].square())).mean().item(), rel=1e-12)


def test_values_do_not_depend_on_the_scale_of_features_and_targets_or_on_the_order_of_samples():
    rows, y, weight = data()
    order = torch.randperm(len(y))
    truth = floats(metric_of(rows, y, weight).compute())
    assert floats(metric_of(1e6 * rows[order], 1e-3 * y[order], 7 * weight).compute()) == pytest.approx(truth, rel=1e-9)
    turn = torch.linalg.qr(torch.randn(12, 12, dtype=torch.float64)).Q
    assert floats(metric_of(rows @ turn, y + 100, weight @ turn).compute()) == pytest.approx(truth, rel=1e-9)


def test_a_zero_feature_counts_as_no_distance():
    rows, y, weight = data()
    more, also = torch.cat([rows, torch.zeros_like(rows)]), torch.cat([y, y])
    assert nrc2(more, also, weight).item() == pytest.approx(nrc2(rows, y, weight).item() / 2, rel=1e-12)


def test_they_are_differentiable_in_what_they_depend_on():
    rows, y, weight = (part.requires_grad_() for part in data(samples=15, features=5, targets=2))
    assert torch.autograd.gradcheck(lambda h: nrc1(h, y.detach()), rows)
    assert torch.autograd.gradcheck(lambda h, w: nrc2(h, y.detach(), w), (rows, weight))
    assert torch.autograd.gradcheck(lambda w: nrc3(rows.detach(), y.detach(), w), weight)
    few = data(samples=6, features=20)[0].requires_grad_()  # most eigenvalues are zero
    assert torch.autograd.gradcheck(lambda h: nrc1(h, y.detach()[:6]), few)


# --------------------------------------------------------------------------------------------------- what means nothing


@pytest.mark.parametrize(
    ("function", "change", "reason"),
    [
        (nrc1, {"features": lambda h: h[:, :3]}, "3 features always lie in a space of 3 dimensions"),
        (nrc2, {"features": lambda h: h[:, :2], "weight": lambda w: w[:, :2]}, "2 features always lie in a space of 3"),
        (nrc1, {"features": torch.ones_like}, "all features are the same"),
        (nrc3, {"targets": torch.ones_like}, "all targets are the same"),
        (nrc2, {"weight": torch.zeros_like}, "the weight is zero"),
        (nrc3, {"weight": lambda w: w / 0}, "the weight holds an infinity or a nan"),
        (nrc1, {"features": lambda h: h.where(h < h.max(), math.nan)}, "1 samples have an infinity or a nan"),
        (nrc3, {"targets": lambda y: y.where(y < y.max(), math.inf)}, "1 samples have an infinity or a nan"),
        (nrc1, {"features": lambda h: h * 1e200}, "the squares of the features or targets leave the floating range"),
    ],
)
def test_a_value_that_means_nothing_is_nan_with_a_reason(function, change, reason):
    parts = dict(zip(("features", "targets", "weight"), data(), strict=True))
    parts |= {name: changed(parts[name]) for name, changed in change.items()}
    if function is nrc1:
        del parts["weight"]
    with pytest.warns(UserWarning, match=f"{function.__name__} is nan, because {reason}"):
        assert function(**parts).isnan()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda h, y, w: nrc1(h[:5], y), "must have the same length, got 5 and 200"),
        (lambda h, y, w: nrc1(h.long(), y), "features must be float64, float32"),
        (lambda h, y, w: nrc1(h, y.bool()), r"targets must hold real numbers of shape \(N, n\).* got torch.bool"),
        (lambda h, y, w: nrc1(h, y[:, :, None]), "targets must hold real numbers"),
        (lambda h, y, w: nrc1(h, y.to(torch.complex64)), "targets must hold real numbers"),
        (lambda h, y, w: nrc1(h, y.tolist()), "targets must be a tensor of shape .* got list"),
        (lambda h, y, w: nrc2(h, y, w.T), r"weight must have shape \(3, 12\), got \(12, 3\)"),
        (lambda h, y, w: nrc1(h, y.to_sparse()), "targets must be a dense tensor"),
        (lambda h, y, w: NeuralRegressionCollapse(0, 12), "num_targets must be an integer of at least 1, got 0"),
        (lambda h, y, w: NeuralRegressionCollapse(1, 0), "num_features must be an integer of at least 1, got 0"),
        (lambda h, y, w: NeuralRegressionCollapse(3, 12, w.T), r"weight must have shape \(3, 12\), got \(12, 3\)"),
        (lambda h, y, w: NeuralRegressionCollapse(3, 11).update(h, y), "must have num_features=11 columns"),
        (lambda h, y, w: NeuralRegressionCollapse(2, 12).update(h, y), r"num_targets=2 columns, got \(200, 3\)"),
        (
            lambda h, y, w: RegressionMoments.of(h, y).merge(RegressionMoments.of(h, y[:, :2])),
            r"\(3, 12\) and \(2, 12\)",
        ),
    ],
)
def test_bad_input_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call(*data())


def test_integer_targets_are_numbers():
    rows, y, weight = data()
    assert nrc3(rows, y.long(), weight) == nrc3(rows, y.long().double(), weight)


# ---------------------------------------------------------------------------------------------------------- the metric


@pytest.mark.parametrize("size", [1, 7, 200])
def test_batches_of_any_size_give_the_values_of_all_samples(size):
    rows, y, weight = data()
    rows = rows + 1e4  # far from the origin: raw sums of squares would cancel
    moments, truth = metric_of(rows, y, weight, size).moments(), np.cov(rows.T.numpy(), ddof=0)
    np.testing.assert_allclose(moments.feature_scatter / len(y), truth, rtol=1e-7, atol=1e-7)
    assert floats(metric_of(rows, y, weight, size).compute()) == pytest.approx(expected(rows, y, weight), rel=1e-5)


def test_without_a_weight_there_is_nrc1_alone_and_a_layer_is_followed():
    rows, y, weight = data(dtype=torch.float32)
    assert list(metric_of(rows, y, None).compute()) == ["nrc1"]
    head = nn.Linear(12, 3)
    metric = metric_of(rows, y, head)
    before = metric.compute()
    with torch.no_grad():
        head.weight.copy_(weight)
    assert metric.compute()["nrc2"].item() == pytest.approx(nrc2(rows, y, weight).item(), rel=1e-12)
    assert before["nrc2"].item() != pytest.approx(nrc2(rows, y, weight).item(), rel=1e-2)
    assert metric.clone().compute()["nrc3"] == metric.compute()["nrc3"]


def test_merge_pickle_reset_and_a_state_dict(tmp_path):
    rows, y, weight = data()
    whole = floats(metric_of(rows, y, weight).compute())
    first, second = metric_of(rows[:50], y[:50], weight), metric_of(rows[50:], y[50:], weight)
    second.persistent(True)
    torch.save(second.state_dict(), tmp_path / "part.pt")
    first.merge_state(torch.load(tmp_path / "part.pt", weights_only=True))
    assert floats(first.compute()) == pytest.approx(whole, rel=1e-12)
    assert floats(pickle.loads(pickle.dumps(first)).compute()) == floats(first.compute())
    first.reset()
    first.update(rows, y)
    assert floats(first.compute()) == pytest.approx(whole, rel=1e-12)
    with pytest.raises(ValueError, match="a state to merge must hold count, feature_mean"):
        first.merge_state({"count": torch.ones(())})


def test_it_works_in_inference_mode_under_autocast_and_in_a_collection_and_keeps_its_precision():
    rows, y, weight = data(dtype=torch.float32)
    truth = floats(metric_of(rows, y, weight).compute())
    metric = NeuralRegressionCollapse(3, 12, weight).to(torch.bfloat16).half()
    with torch.inference_mode(), torch.autocast("cpu"):
        metric.update(rows[:100], y[:100])
    metric.update(rows[100:].requires_grad_(), y[100:])
    assert floats(metric.compute()) == pytest.approx(truth, rel=1e-10)
    assert metric.feature_scatter.dtype == torch.float64
    collection = MetricCollection({"a": NeuralRegressionCollapse(3, 12, weight), "b": NeuralRegressionCollapse(3, 12)})
    for part in zip(rows.split(64), y.split(64), strict=True):
        collection.update(*part)
    assert collection.compute()["b_nrc1"].item() == pytest.approx(truth["nrc1"], rel=1e-10)


def test_after_a_merge_over_ranks_nothing_is_added():
    rows, y, weight = data()
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        metric = metric_of(rows, y, weight, sync_on_compute=False)
        metric.merge_over_ranks()
        with pytest.raises(RuntimeError, match="before the next update"):
            metric.update(rows, y)
        assert floats(metric.compute()) == pytest.approx(expected(rows, y, weight), rel=1e-5)
    finally:
        torch.distributed.destroy_process_group()


def test_one_feature_is_enough_for_a_state():
    assert NeuralRegressionCollapse(1, 1).feature_scatter.shape == (1, 1)


def test_no_samples_are_nan():
    with pytest.warns(UserWarning, match="before the ``update``"):
        assert NeuralRegressionCollapse(2, 5).compute()["nrc1"].isnan()


# ------------------------------------------------------------------------------------------------------- special cases


@pytest.mark.parametrize("shift", [0.0, 0.5, 0.95, 1.5])
def test_nrc3_finds_the_shift_inside_of_its_interval_and_at_its_ends(shift):
    rows, y, _ = data()
    values, vectors = np.linalg.eigh(np.cov(y.numpy().T, ddof=0))
    form = np.sqrt(values) - shift * np.sqrt(values[0])
    weight = np.sqrt(form.clip(0))[:, None] * vectors.T @ np.linalg.qr(np.ones((12, 12)) + np.diag(range(12)))[0][:3]
    weight = vectors @ weight + 0.01 * np.arange(36).reshape(3, 12) / 36
    truth = grid(weight, np.cov(y.numpy().T, ddof=0))
    assert nrc3(rows, y, torch.tensor(weight)).item() == pytest.approx(truth, rel=1e-4, abs=1e-8)


@pytest.mark.parametrize("scale", [1e-9, 1.0, 1e9])
def test_nrc1_leaves_directions_out_along_which_the_features_do_not_vary(scale):
    line, offset = torch.randn(6).double(), torch.randn(6).double()
    rows = scale * (offset + torch.randn(50, 1).double() * line)
    unit, along = (rows / rows.norm(dim=1, keepdim=True)).numpy(), (line / line.norm()).numpy()
    truth = np.mean(((unit - np.outer(unit @ along, along)) ** 2).sum(axis=1))
    assert nrc1(rows, torch.randn(50, 3)).item() == pytest.approx(truth, rel=1e-9)


def test_a_target_that_is_constant_is_a_direction_without_variance():
    rows, y, weight = data()
    y[:, 1] = 3.0
    assert nrc3(rows, y, weight).item() == pytest.approx(expected(rows, y, weight)["nrc3"], rel=1e-9)


def test_what_spoils_one_metric_leaves_the_others():
    rows, y, weight = data()
    with pytest.warns(UserWarning, match="is nan, because the weight is zero"):
        values = floats(metric_of(rows, y, torch.zeros_like(weight)).compute())
    assert {name for name, value in values.items() if math.isnan(value)} == {"nrc2", "nrc3"}
    weight[0, 2] = math.nan
    with pytest.warns(UserWarning, match="is nan, because the weight holds an infinity or a nan"):
        assert nrc2(rows, y, weight).isnan()
    rows[:, 4] *= 1e200
    with pytest.warns(UserWarning, match="is nan, because the squares of the features or targets leave"):
        assert nrc1(rows, y).isnan()


@pytest.mark.filterwarnings("error")
def test_values_that_mean_something_come_without_a_warning():
    rows, y, weight = data()
    assert floats(metric_of(rows, y, weight).compute()) == pytest.approx(expected(rows, y, weight), rel=1e-6)
