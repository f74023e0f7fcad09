"""The coordinates of pictures: the ideal corners, and class means turned onto them."""

import itertools

import numpy as np
import pytest
import scipy.linalg
import torch

from lightning_nc.functional.projection import AXES, check_few, simplex, span_of_means


def centered(means):
    return (means - means.mean(dim=0)).numpy()


def random_turn(size):
    return torch.linalg.qr(torch.randn(size, size, dtype=torch.float64)).Q


@pytest.mark.parametrize("classes", [2, 3, 4])
def test_the_corners_are_a_simplex_of_radius_one_around_the_origin(classes):
    corners = simplex(classes).numpy()
    gram = np.full((classes, classes), -1 / (classes - 1))
    np.fill_diagonal(gram, 1)
    np.testing.assert_allclose(corners @ corners.T, gram, atol=1e-15)
    np.testing.assert_allclose(corners.sum(axis=0), 0, atol=1e-15)
    assert np.all(corners[:, classes - 1 :] == 0)


@pytest.mark.parametrize("classes", [2, 3, 4])
def test_class_means_are_turned_as_scipy_turns_them_and_keep_their_distances(classes):
    means = torch.randn(classes, 9, dtype=torch.float64) + 5
    found = centered(means) @ span_of_means(means).numpy()
    basis = scipy.linalg.svd(centered(means))[2][: classes - 1].T
    coordinates, corners = centered(means) @ basis, simplex(classes).numpy()[:, : classes - 1]
    turn, _ = scipy.linalg.orthogonal_procrustes(coordinates, corners)
    np.testing.assert_allclose(found[:, : classes - 1], coordinates @ turn, atol=1e-12)
    for one, other in itertools.combinations(range(classes), 2):
        distance = np.linalg.norm(found[one] - found[other])
        assert distance == pytest.approx(np.linalg.norm(means[one] - means[other]), rel=1e-12)


@pytest.mark.parametrize("classes", [2, 3, 4])
def test_a_simplex_lies_on_the_corners_wherever_it_is_and_however_it_is_turned(classes):
    turn = random_turn(7)
    means = 4 * simplex(classes) @ turn[:AXES] + torch.randn(7, dtype=torch.float64)
    found = centered(means) @ span_of_means(means).numpy()
    np.testing.assert_allclose(found, 4 * simplex(classes).numpy(), atol=1e-12)


def test_a_picture_does_not_spin_when_the_features_do():
    means = torch.randn(3, 6, dtype=torch.float64)
    turned = means @ random_turn(6)
    for rows, scale in ((turned, 1), (7 * turned, 7), (turned + 3, 1)):
        found = centered(rows) @ span_of_means(rows).numpy()
        np.testing.assert_allclose(found, scale * centered(means) @ span_of_means(means).numpy(), atol=1e-12)


@pytest.mark.parametrize(("classes", "features"), [(3, 1), (4, 1), (4, 2)])
def test_classes_in_fewer_dimensions_than_the_picture_keep_their_distances(classes, features):
    means = torch.randn(classes, features, dtype=torch.float64)
    found = centered(means) @ span_of_means(means).numpy()
    np.testing.assert_allclose(found @ found.T, centered(means) @ centered(means).T, atol=1e-12)


def test_the_axes_are_orthonormal_and_those_that_are_not_needed_are_zero():
    axes = span_of_means(torch.randn(3, 5)).numpy()
    np.testing.assert_allclose(axes.T @ axes, np.diag([1, 1, 0]), atol=1e-12)


@pytest.mark.parametrize("classes", [(0, 1), [3, 1, 2], (0, 5, 7, 9)])
def test_two_to_four_classes_are_a_picture(classes):
    assert check_few(classes) == tuple(classes)


@pytest.mark.parametrize("classes", [(0,), (0, 1, 2, 3, 4), (1, 1), (0, -1), (0, 1.0), (True, 0), "012", 3, None])
def test_other_classes_are_refused_and_repeated(classes):
    with pytest.raises(ValueError, match="two to four different class indices") as error:
        check_few(classes)
    assert repr(classes) in str(error.value)
