"""SELI, the orthoplex, the nearest frame, what chance gives, and the table of classes."""

import itertools
import math
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import reference
import torch
from conftest import clusters, simplex_etf

from lightning_nc import functional, theory
from lightning_nc.functional import METRICS, nc2_orthoplex, nc2_seli, nc2_weight_seli, nc3_seli
from lightning_nc.functional.geometry import nearest_frame, per_class, random_directions, worst
from lightning_nc.functional.table import evaluate
from lightning_nc.moments import ClassDeviations, ClassMoments


def moments_of(means, counts=None):
    """Statistics of collapsed classes with these means."""
    empty = ClassMoments.zeros(*means.shape, "cpu", scatter=False)
    counts = torch.full((len(means),), 10.0) if counts is None else torch.as_tensor(counts)
    return replace(empty, means=means.double(), counts=counts.double())


def rotated(rows, features, offset=0.0, scale=1.0):
    """The rows with more features, turned at random, moved and scaled."""
    rows = torch.nn.functional.pad(rows.double(), (0, features - rows.shape[1]))
    turn = torch.linalg.qr(torch.randn(features, features, dtype=torch.float64)).Q
    return scale * rows @ turn + offset * torch.randn(features, dtype=torch.float64)


def vertices(classes, features):
    """K - d pairs of opposite unit vectors and 2d - K single ones, shuffled."""
    axes = torch.eye(features, dtype=torch.float64)
    return torch.cat([axes, -axes[: classes - features]])[torch.randperm(classes)]


def distance(gram, target):
    return float(np.linalg.norm(gram / np.linalg.norm(gram) - target / np.linalg.norm(target)))


# ----------------------------------------------------------------------------------------------------------- SELI

UNEQUAL = [[40, 20, 10, 5], [3, 3, 50, 7, 50, 1], [9, 1], [5, 5, 5]]


def seli_of_labels(counts):
    """The Gram matrices of weight and class means from the singular values of the K x N simplex-encoded labels."""
    labels = np.repeat(np.eye(len(counts)), counts, axis=1) - 1 / len(counts)
    left, values, right = np.linalg.svd(labels, full_matrices=False)
    left, values, right = left[:, :-1], values[:-1], right[:-1]
    first = np.cumsum([0, *counts[:-1]])  # the features of a class are one point
    return left * values @ left.T, ((right.T * values) @ right)[np.ix_(first, first)]


@pytest.mark.parametrize("counts", UNEQUAL)
def test_seli_is_that_of_the_singular_values_of_the_labels(counts):
    features, target = torch.randn(sum(counts), 7, dtype=torch.float64), torch.arange(len(counts))
    target, weight = target.repeat_interleave(torch.tensor(counts)), torch.randn(len(counts), 7, dtype=torch.float64)
    means = np.stack([features[target == k].mean(dim=0).numpy() for k in range(len(counts))])
    means -= means.mean(axis=0)
    of_weight, of_means = seli_of_labels(counts)
    expected = distance(means @ means.T, of_means)
    assert nc2_seli(features, target).item() == pytest.approx(expected, rel=1e-9, abs=1e-12)
    expected = distance(weight.numpy() @ weight.numpy().T, of_weight)
    assert nc2_weight_seli(features, target, weight).item() == pytest.approx(expected, rel=1e-9)
    expected = distance(weight.numpy() @ means.T, np.eye(len(counts)) - 1 / len(counts))
    assert nc3_seli(features, target, weight).item() == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("counts", UNEQUAL)
def test_at_seli_the_distances_are_zero(counts):
    roots = []
    for gram in seli_of_labels(counts):
        values, vectors = np.linalg.eigh(gram)
        roots.append(torch.tensor(vectors * np.sqrt(values.clip(0))) @ torch.tensor(vectors.T))
    target = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))
    weight, means = (3 * torch.nn.functional.pad(root, (0, 2)) for root in roots)
    rows = means[target] + torch.randn(means.shape[1])
    assert nc2_seli(rows, target).item() < 1e-7  # the root of a matrix halves the digits
    assert nc2_weight_seli(rows, target, weight).item() < 1e-7
    assert nc3_seli(rows, target, weight).item() < 1e-7


def test_with_classes_of_one_size_seli_is_the_simplex_etf():
    rows, target = clusters(6, 8, 9, 0.4, dtype=torch.float64)
    weight = torch.randn(6, 9, dtype=torch.float64)
    etf = functional.nc2(rows, target, center=True)
    assert nc2_seli(rows, target).item() == pytest.approx(etf.item(), rel=1e-12)
    assert nc2_weight_seli(rows, target, weight).item() == pytest.approx(
        functional.nc2_weight(weight).item(), rel=1e-12
    )
    assert nc3_seli(rows, target, weight).item() == functional.nc3_gram(rows, target, weight).item()


# ------------------------------------------------------------------------------------------------------ orthoplex


@pytest.mark.parametrize(
    ("classes", "features"), [(4, 2), (5, 3), (6, 3), (6, 4), (12, 10), (15, 10), (20, 10), (90, 60)]
)
def test_vertices_of_an_orthoplex_are_recognized_at_any_offset_and_scale(classes, features):
    for offset, scale in [(0, 1), (5, 1), (300, 0.01)]:
        rows = rotated(vertices(classes, features), features, offset, scale)
        assert nc2_orthoplex(rows, torch.arange(classes)).item() < 1e-9
        assert nc2_orthoplex(rows + 0.3 * scale * torch.randn_like(rows), torch.arange(classes)).item() > 0.01


@pytest.mark.parametrize("offset", [0.0, 0.3])
def test_a_class_mean_at_the_mean_of_all_has_no_opposite_whatever_the_order_of_the_classes(offset):
    rows = torch.tensor([[1, 0, 0], [-1, 0, 0], [0, 1, 0], [0, -1, 0], [0, 0, 0]], dtype=torch.float64) + offset
    alone = torch.zeros(1, 1, dtype=torch.float64)
    pairs = torch.kron(torch.eye(2, dtype=torch.float64), torch.tensor([[1, -1], [-1, 1]]))
    gram = torch.block_diag(pairs / math.sqrt(8), alone)
    ideal = torch.block_diag(pairs / 3, alone + 1 / 3)  # two pairs and a vertex without its opposite
    for order in (torch.arange(5), torch.tensor([4, 0, 1, 2, 3]), torch.tensor([0, 2, 4, 3, 1])):
        found = nc2_orthoplex(rows[order], torch.arange(5)).item()
        assert found == pytest.approx(torch.linalg.norm(gram - ideal).item(), rel=1e-9)


def test_the_distance_to_an_orthoplex_is_the_smallest_over_all_pairs_near_to_one():
    classes, features = 6, 4
    for _ in range(20):
        rows = rotated(vertices(classes, features), features, 2.0) + 0.15 * torch.randn(classes, features).double()
        found = []
        for ends in itertools.permutations(range(classes), 4):
            center = rows[list(ends)].mean(dim=0)
            target = np.eye(classes)
            for i, j in (ends[:2], ends[2:]):
                target[i, j] = target[j, i] = -1
            gram = ((rows - center) @ (rows - center).T).numpy()
            found.append(distance(gram, target))
        assert nc2_orthoplex(rows, torch.arange(classes)).item() == pytest.approx(min(found), rel=1e-9)


@pytest.mark.parametrize(("classes", "features"), [(4, 2), (6, 3), (5, 3), (8, 4), (20, 10)])
def test_far_from_an_orthoplex_the_pairs_are_chosen_one_after_the_other(classes, features):
    for _ in range(20):
        rows = torch.randn(classes, features, dtype=torch.float64)
        assert nc2_orthoplex(rows, torch.arange(classes)).item() == pytest.approx(
            reference.orthoplex(rows.numpy()), rel=1e-9
        )


@pytest.mark.parametrize(("classes", "features"), [(5, 5), (6, 5), (11, 5), (3, 1)])
def test_for_other_numbers_of_classes_there_is_no_orthoplex(classes, features):
    reason = f"nc2_orthoplex: nan, because {classes} classes in {features} dimensions cannot have this geometry"
    with pytest.warns(UserWarning, match=reason) as caught:
        assert nc2_orthoplex(torch.randn(classes, features), torch.arange(classes)).isnan()
    assert len(caught) == 1


def test_with_more_classes_than_dimensions_and_one_there_is_no_seli():
    rows, target = clusters(6, 5, 4, 0.3)
    with pytest.warns(UserWarning, match="nc2_seli, nc2_weight_seli: nan, because 6 classes in 4") as caught:
        values = evaluate(
            ("nc2_seli", "nc2_weight_seli", "nc2_of"), ClassDeviations.of(rows, target, 6), torch.randn(6, 4)
        )
    assert [value.isnan().item() for value in values.values()] == [True, True, False]
    assert len(caught) == 1


def test_seli_and_the_orthoplex_are_differentiable():
    target = torch.arange(6).repeat_interleave(torch.tensor([1, 1, 1, 2, 2, 3]))
    for name, features in (("nc2_seli", 5), ("nc2_weight_seli", 5), ("nc2_orthoplex", 4)):
        rows = torch.randn(len(target), features, dtype=torch.float64, requires_grad=True)
        weight = torch.randn(6, features, dtype=torch.float64, requires_grad=True)
        parts = [weight] * ("weight" in METRICS[name].needs)
        assert torch.autograd.gradcheck(
            lambda f, *w, name=name: getattr(functional, name)(f, target, *w), (rows, *parts)
        )


# --------------------------------------------------------------------------------------------------- nearest frame


def minimizers():
    plain = {"lambda_w": 0.005, "lambda_h": 0.005}
    extended = theory.extended_ufm(4, 10, 1e-3, 1e-3, 1e-3)
    yield "nc2_of", theory.plain_ufm(4, 10, **plain).class_means(8)
    yield "nc2_etf_centered", theory.plain_ufm(4, 10, **plain, lambda_b=0).class_means(8)
    yield "nc2_of", extended.class_means(8)
    yield "nc2_of", extended.first_class_means(8)


@pytest.mark.parametrize(("frame", "means"), list(minimizers()))
@pytest.mark.parametrize("noise", [0, 0.05])
def test_the_frame_of_every_theorem_is_named(frame, means, noise):
    means = means + noise * means.norm(dim=1).mean() * torch.randn_like(means) / math.sqrt(8)
    found = nearest_frame(moments_of(means))
    assert found.nearest == frame
    assert found.distances.keys() == found.chance.keys() == {"nc2_etf_centered", "nc2_of"}
    assert found.distances[frame] <= 3 * noise + 1e-7
    words = {"nc2_of": "orthogonal frame", "nc2_etf_centered": "simplex ETF"}[frame]
    value, chance = found.distances[frame], found.chance[frame]
    assert str(found) == f"nearest frame: {words} (distance {value:.2g}; random directions: {chance:.2g})"


def free_features(counts, penalty):
    """Free features, a weight and the labels that minimize regularized cross-entropy."""
    target = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))
    shapes = (len(target), 8), (len(counts), 8)
    features, weight = (torch.randn(shape, dtype=torch.float64).requires_grad_() for shape in shapes)
    descent = torch.optim.LBFGS(
        [features, weight], max_iter=3000, line_search_fn="strong_wolfe", tolerance_change=1e-18
    )

    def objective():
        descent.zero_grad()
        loss = torch.nn.functional.cross_entropy(features @ weight.T, target, reduction="sum")
        loss = loss + penalty / 2 * (features.square().sum() + weight.square().sum())
        loss.backward()
        return loss

    descent.step(objective)
    return features.detach(), target, weight.detach()


def test_an_imbalanced_ufm_under_descent_is_nearest_to_seli_and_nearer_with_less_regularization():
    counts, values = [40, 20, 10, 5], []
    for penalty in (1e-2, 1e-4, 1e-6):
        features, target, weight = free_features(counts, penalty)
        moments = ClassDeviations.of(features, target, 4)
        found = nearest_frame(moments)
        assert found.nearest == "nc2_seli"
        names = ("nc2_seli", "nc2_weight_seli", "nc3_seli", "nc2_etf_centered", "nc2_weight")
        values.append([float(value) for value in evaluate(names, moments, weight).values()])
        assert found.distances["nc2_seli"] == pytest.approx(values[-1][0])
    first, middle, last = np.array(values)
    assert (last[:3] < 0.85 * middle[:3]).all()
    assert (middle[:3] < 0.85 * first[:3]).all()
    assert (last[3:] > 5 * last[0]).all()
    features, target, _ = free_features([10, 10, 10, 10], 1e-2)
    assert nearest_frame(ClassDeviations.of(features, target, 4)).nearest == "nc2_etf_centered"


@pytest.mark.parametrize(("classes", "features"), [(8, 4), (20, 10), (64, 32), (12, 10), (15, 10)])
def test_class_means_at_the_vertices_of_an_orthoplex_are_named(classes, features):
    rows = rotated(vertices(classes, features), features, 3.0) + 0.02 * torch.randn(classes, features)
    found = nearest_frame(moments_of(rows))
    assert found.nearest == "nc2_orthoplex"
    assert found.distances.keys() == {"nc2_orthoplex"}
    assert str(found).startswith("nearest frame: orthoplex (distance ")


@pytest.mark.parametrize("classes", [6, 10, 40])
@pytest.mark.parametrize("noise", [0, 0.05, 0.15])
def test_an_orthogonal_frame_is_told_from_a_simplex_etf_with_an_offset(classes, noise):
    def named(rows):
        rows = rotated(rows, 48) + noise * torch.randn(classes, 48) / math.sqrt(48)
        return nearest_frame(moments_of(rows)).nearest

    orthogonal, etf = torch.eye(classes, dtype=torch.float64), simplex_etf(classes)
    across = torch.nn.functional.pad(etf, (0, 1))  # an offset in a direction of its own
    own = 1 / math.sqrt(classes)  # the length of the mean of an orthogonal frame
    for _ in range(2):
        assert named(orthogonal) == "nc2_of"
        assert named(orthogonal * (0.97 + 0.06 * torch.rand(classes, 1))) == "nc2_of"
        assert named(etf) == "nc2_etf_centered"
        for offset in (0.4, 2.5, 30):
            across[:, -1] = offset * own
            assert named(across) == "nc2_etf_centered", offset
        if not noise:
            assert named(etf + own * etf[0]) == "nc2_etf_centered"  # along a class mean


@pytest.mark.parametrize("unequal", [False, True])
@pytest.mark.parametrize(("classes", "features"), [(2, 20), (4, 5), (10, 64), (40, 64), (8, 6), (20, 10)])
def test_random_class_means_are_near_to_no_frame(classes, features, unequal):
    counts = torch.full((classes,), 50.0)
    if unequal:
        counts = (counts * torch.exp(-3 * torch.arange(classes) / classes)).ceil()
    named = []
    for _ in range(8):
        means = torch.randn(classes, features) / counts.sqrt().unsqueeze(1)  # the means of samples of nothing but noise
        found = nearest_frame(moments_of(means, counts))
        assert found.nearest is not None or str(found).startswith("no frame is near: ")
        named.append(found.nearest)
    assert named.count(None) >= 7


@pytest.mark.parametrize(
    ("classes", "features", "frames"),
    [
        (4, 4, ["nc2_etf_centered", "nc2_of", "nc2_seli"]),
        (5, 4, ["nc2_etf_centered", "nc2_seli"]),
        (6, 4, ["nc2_orthoplex"]),
        (8, 4, ["nc2_orthoplex"]),
    ],
)
@pytest.mark.parametrize("unequal", [False, True])
def test_the_class_means_are_compared_with_every_frame_that_exists_and_with_chance(classes, features, frames, unequal):
    frames = frames if unequal else [name for name in frames if name != "nc2_seli"]
    counts = 5.0 + unequal * torch.arange(classes)
    offset = 20 * torch.arange(
        features
    )  # so that the class means have nearly the same length, but not the centered ones
    means = torch.randn(classes, features).double() * torch.logspace(0, 1, classes).unsqueeze(1) + offset
    found = nearest_frame(moments_of(means, counts))
    lengths = {True: np.linalg.norm(means, axis=1), False: np.linalg.norm(means - means.mean(dim=0), axis=1)}
    drawn = {name: [] for name in frames}
    formulas = {
        "nc2_etf_centered": lambda rows: reference.frame(rows - rows.mean(0), "etf"),
        "nc2_of": lambda rows: reference.frame(rows, "of"),
        "nc2_seli": lambda rows: reference.seli(rows - rows.mean(0), counts.numpy(), -0.5),
        "nc2_orthoplex": reference.orthoplex,
    }
    assert found.distances == pytest.approx({name: formulas[name](means.numpy()) for name in frames}, rel=1e-9)
    generator = np.random.default_rng(0)
    for _ in range(200):
        rows = generator.standard_normal((classes, features))
        rows /= np.linalg.norm(rows, axis=1, keepdims=True)
        for name in frames:
            drawn[name].append(formulas[name](lengths[name == "nc2_of"][:, None] * rows))
    for name, values in drawn.items():  # five standard errors of the mean of 100 draws and of 200
        assert found.chance[name] == pytest.approx(
            np.mean(values), abs=5 * np.std(values) * math.sqrt(1 / 100 + 1 / 200)
        )


def test_a_frame_is_near_if_it_is_nearer_than_chance_by_five_percent():
    classes, features = 30, 40  # so many that chance varies by less
    etf, noise, named = rotated(simplex_etf(classes), features), torch.randn(classes, features).double(), set()
    for level in torch.linspace(1, 3, 11):
        found = nearest_frame(moments_of(etf + level / math.sqrt(features) * noise))
        ratio = found.distances["nc2_etf_centered"] / found.chance["nc2_etf_centered"]
        assert found.nearest == ("nc2_etf_centered" if ratio < 0.95 else None), ratio
        named.add((found.nearest, ratio > 0.9))
    assert (
        len(named) == 3
    )  # among them one that is nearer by less than a tenth, and one that is nearer by less than five percent


def test_seli_is_the_nearest_if_it_is_nearer_than_the_simplex_etf_by_a_tenth():
    counts = [200, 100, 60, 40, 20, 10, 5, 2]
    seli = torch.tensor(seli_of_labels(counts)[1] / np.linalg.norm(seli_of_labels(counts)[1]))
    etf, named = (torch.eye(8).double() - 1 / 8) / math.sqrt(7), set()
    for share in torch.linspace(0.46, 0.56, 11).double():
        values, vectors = torch.linalg.eigh(share * seli + (1 - share) * etf)
        found = nearest_frame(moments_of(vectors * values.clamp(min=0).sqrt() + 1, counts))
        ratio = found.distances["nc2_seli"] / found.distances["nc2_etf_centered"]
        assert found.nearest == ("nc2_seli" if ratio <= 0.9 else "nc2_etf_centered"), ratio
        named.add((found.nearest, ratio < 1))
    assert len(named) == 3


@pytest.mark.parametrize("noise", [0.0, 0.1])
def test_an_orthogonal_frame_has_a_mean_of_its_own_length(noise):
    classes, named = 6, []
    etf, error = torch.eye(classes).double() - 1 / classes, noise * torch.randn(classes, 9).double()
    rows = rotated(torch.cat([etf, torch.ones(classes, 1)], dim=1), 9) + error - error.mean(dim=0)
    rows, own = rows - rows.mean(dim=0), rows.mean(dim=0) / rows.mean(dim=0).norm()
    own = own * rows.norm() / math.sqrt(classes * (classes - 1))  # for which it is an orthogonal frame without noise
    between = reference.frame(np.eye(classes), "etf")
    for length in torch.linspace(0.6, 1.5, 19):
        found = nearest_frame(moments_of(rows + length * own))
        near = found.distances["nc2_of"] <= 1.5 * found.distances["nc2_etf_centered"] + 0.1 * between
        named.append(found.nearest)
        assert (found.nearest == "nc2_of") == (near and 0.5 < length**2 < 2), length
    assert {*named} == {"nc2_of", "nc2_etf_centered"}


@pytest.mark.parametrize(("classes", "features"), [(1000, 2000), (1002, 1000), (1500, 1000)])
def test_random_directions_of_very_many_classes_are_drawn_for_fewer_in_the_same_ratio(classes, features):
    found = nearest_frame(moments_of(torch.randn(classes, features)))  # which are random directions themselves
    assert found.chance == pytest.approx(found.distances, rel=0.01)
    for name in {"nc2_etf_centered", "nc2_of"} & found.chance.keys():  # |G|^2 of unit rows is K + K^2 / d
        assert found.chance[name] == pytest.approx(math.sqrt(2 - 2 / math.sqrt(1 + classes / features)), rel=0.002)


def test_with_more_classes_than_twice_the_dimensions_no_distance_is_computed():
    found = nearest_frame(moments_of(torch.randn(21, 10)))
    assert (found.distances, found.chance, found.nearest) == ({}, {}, None)
    assert str(found) == "no frame exists for 21 classes in 10 dimensions; what is expected is a softmax code"


def test_the_nearest_frame_is_that_of_the_classes_seen_and_of_finite_features():
    means, counts = torch.randn(6, 9), torch.full((6,), 5.0)
    means[[1, 4]] = 0
    counts[[1, 4]] = 0
    means[counts > 0] = rotated(simplex_etf(4), 9).float()
    found = nearest_frame(moments_of(means, counts))
    assert found.nearest == "nc2_etf_centered"
    assert (found.num_classes, found.num_features) == (4, 9)
    assert nearest_frame(moments_of(means, counts / 5)) == found  # one sample is enough for a class mean
    broken = replace(moments_of(means, counts), nonfinite=torch.tensor(1))
    two = replace(moments_of(torch.randn(2, 1)), nonfinite=torch.tensor(1))  # twice as many classes as dimensions
    assert str(nearest_frame(two)).endswith("are needed; got 2 classes in 1 dimensions")
    for nothing in (broken, moments_of(means, counts * (torch.arange(6) == 2)), moments_of(means, counts * 0)):
        found = nearest_frame(nothing)
        assert (found.distances, found.nearest) == ({}, None)
        assert str(found).startswith("no frame was compared: ")


def test_the_nearest_frame_moves_no_random_stream_and_is_the_same_every_time():
    moments, state = moments_of(rotated(simplex_etf(5), 7) + 0.1), torch.get_rng_state()
    assert nearest_frame(moments) == nearest_frame(moments)
    assert torch.equal(torch.get_rng_state(), state)


# ---------------------------------------------------------------------------------------------------------- chance


def test_random_directions_give_what_gaussian_class_means_and_weights_give():
    classes, features = 6, 40
    names = ("nc2_of", "nc2_etf_centered", "nc2_equiangular", "nc3_cosine", "nc2_weight")
    found = random_directions(names, classes, features)
    values = []
    for _ in range(300):
        rows, weight = torch.randn(2, classes, features, dtype=torch.float64)
        moments = ClassDeviations.of(rows, torch.arange(classes), classes)
        values.append([float(value) for value in evaluate(names, moments, weight).values()])
    mean, deviation = np.mean(values, axis=0), np.std(values, axis=0)
    for name, value, center, width in zip(names, found.values(), mean, deviation, strict=True):
        assert abs(value - center) < 4 * width / math.sqrt(8), name


def test_random_directions_leave_out_what_reads_samples_the_bias_or_other_data():
    found = random_directions(tuple(METRICS), 5, 7)
    assert {"nc2_of", "nc3", "nc2_weight", "nc2_seli"} <= found.keys()
    read_more = {"nc1", "nc1_trace", "nc1_cdnv", "nc4", "ncc_error", "nc1_cdnv_directional", "nc5", "bias_collapse"}
    assert found.keys().isdisjoint(read_more)
    assert math.isnan(found["nc2_orthoplex"])  # which five classes in seven dimensions do not have


def test_random_directions_depend_on_the_seed_and_the_counts_alone():
    state, names = torch.get_rng_state(), ("nc2_seli", "nc2_etf_centered")
    found = random_directions(names, 5, 7)
    assert random_directions(names, 5, 7) == found != random_directions(names, 5, 7, seed=1)
    assert found["nc2_seli"] == pytest.approx(found["nc2_etf_centered"])
    unequal = random_directions(names, 5, 7, counts=torch.tensor([100, 50, 20, 10, 5]))
    assert unequal["nc2_etf_centered"] == found["nc2_etf_centered"]
    assert unequal["nc2_seli"] > 1.02 * found["nc2_seli"]
    assert torch.equal(torch.get_rng_state(), state)


# --------------------------------------------------------------------------------------------------------- classes


@pytest.mark.parametrize(("classes", "features"), [(2, 3), (5, 8), (40, 3), (1100, 4)])
def test_the_table_of_classes_agrees_with_a_computation_class_by_class(classes, features):
    rows, target = clusters(classes, 4, features, 0.4, dtype=torch.float64)
    weight = torch.randn(classes, features)
    kept = (target > 0) | (torch.arange(len(target)) % 2 == 0)  # classes of unequal size
    rows, target = rows[kept] + 1e3, target[kept]
    moments = ClassMoments.zeros(classes, features, "cpu", scatter=False)
    moments.update(rows, target)
    table = pd.DataFrame(per_class(moments, weight))
    frame = pd.DataFrame(rows.numpy()).groupby(target.numpy())
    means, spread = frame.mean().to_numpy(), (frame.var(ddof=0).sum(axis=1) * frame.size()).to_numpy()
    counts, centered = frame.size().to_numpy(), means - means.mean(axis=0)
    squares = ((means[:, None] - means) ** 2).sum(axis=2) + np.diag(np.full(classes, np.inf))
    nearest = squares.argmin(axis=1)
    variance = spread / counts
    norms = np.linalg.norm(centered, axis=1)
    cosine = (weight.numpy() * centered).sum(axis=1) / norms / np.linalg.norm(weight.numpy(), axis=1)
    expected = {
        "class": np.arange(classes),
        "samples": counts,
        "nc1_trace_share": spread / spread.sum(),
        "mean_norm": norms,
        "weight_cosine": cosine,
        "nearest": nearest,
        "nearest_cdnv": (variance + variance[nearest]) / (2 * squares.min(axis=1)),
    }
    assert list(table) == list(expected)
    for name, column in expected.items():
        assert table[name].to_numpy() == pytest.approx(column, rel=1e-6), name
    assert table["nc1_trace_share"].sum() == pytest.approx(1)


def test_the_table_has_the_classes_seen_under_their_own_numbers_and_no_column_without_a_weight():
    rows, target = clusters(4, 10, 6, 0.2)
    kept = target != 1
    table = per_class(ClassDeviations.of(rows[kept], target[kept], 5))
    assert table["class"] == [0, 2, 3]
    assert set(table["nearest"]) <= {0, 2, 3}
    assert "weight_cosine" not in table
    assert [type(value) for value in (table["samples"][0], table["nearest"][0])] == [int, int]


def test_what_the_table_cannot_tell_is_nan_and_none():
    alone = per_class(ClassDeviations.of(torch.randn(4, 3), torch.full((4,), 2), 5), torch.randn(5, 3))
    assert (alone["class"], alone["samples"], alone["nearest"]) == ([2], [4], [None])
    assert np.isnan(alone["nearest_cdnv"]).all()
    rows, target = clusters(3, 5, 4, 0.2)
    rows[3, 1] = math.inf
    broken = per_class(ClassDeviations.of(rows, target, 3))
    assert (broken["samples"], broken["nearest"]) == ([5, 5, 5], [None] * 3)
    assert all(math.isnan(value) for name in ("nc1_trace_share", "mean_norm", "nearest_cdnv") for value in broken[name])
    collapsed = per_class(ClassDeviations.of(torch.eye(3)[[0, 0, 1, 1, 2]], torch.tensor([0, 0, 1, 1, 2]), 3))
    assert collapsed["nearest_cdnv"] == [0, 0, 0], "a class with two samples is enough"
    single = per_class(ClassDeviations.of(torch.eye(3), torch.arange(3), 3))
    assert np.isnan(single["nearest_cdnv"]).all(), "one sample in every class, so nothing is known about scatter"
    assert single["nearest"] == [1, 0, 0]
    assert not any(per_class(ClassMoments.zeros(3, 4)).values())
    assert worst(broken).split() == list(broken)


def test_the_worst_classes_are_those_that_overlap_with_another():
    means = torch.tensor([[0.0, 0], [10, 0], [0, 10], [10.5, 0], [10, 10]])
    target = torch.arange(5).repeat_interleave(40)
    noise = torch.randn(200, 2) * torch.tensor([0.1, 1, 0.1, 1, 2])[target].unsqueeze(1)
    lines = worst(per_class(ClassDeviations.of(means[target] + noise, target, 5)), count=3).splitlines()
    assert lines[0].split() == ["class", "samples", "nc1_trace_share", "mean_norm", "nearest", "nearest_cdnv"]
    assert {line.split()[0] for line in lines[1:3]} == {"1", "3"}
    assert {line.split()[4] for line in lines[1:3]} == {"1", "3"}
    assert lines[3].split()[0] == "4"
    assert len({len(line) for line in lines}) == 1
