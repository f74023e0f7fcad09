"""What pictures of the classes are drawn from."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import clusters
from scene_cases import collapsing, measured

from lightning_nc.scenes import MOST_COSINES, first_middle_last, pictured, posed, scene, scenes_of


def scene_of(features, target, classes, **arguments):
    return scene(measured(features, target, classes, **arguments), 3, 30, "train")


def test_the_cosines_are_those_of_the_centered_means_of_the_classes_that_have_samples():
    features, target = clusters(5, 10, 7, 0.5)
    seen = target != 2
    found = scene_of(features[seen], target[seen], 5)
    assert (found.classes, found.labels, found.chosen) == (4, [0, 1, 3, 4], [])
    means = np.stack([features[target == label].double().mean(dim=0).numpy() for label in found.labels])
    means -= means.mean(axis=0)
    means /= np.linalg.norm(means, axis=1, keepdims=True)
    np.testing.assert_allclose(found.cosines, means @ means.T, atol=1e-6)


def test_of_many_classes_the_first_cosines_are_kept_and_the_center_is_that_of_all():
    means = torch.randn(50, 60, dtype=torch.float64)
    found = scene_of(means, torch.arange(50), 50)
    assert found.classes == 50
    assert found.labels == list(range(MOST_COSINES))
    unit = (means - means.mean(dim=0)).numpy()[:MOST_COSINES]
    unit /= np.linalg.norm(unit, axis=1, keepdims=True)
    np.testing.assert_allclose(found.cosines, unit @ unit.T, atol=1e-6)


def test_a_class_mean_at_the_center_has_no_cosines():
    found = scene_of(torch.tensor([[-1.0, 2.0], [0.0, 2.0], [1.0, 2.0]]), torch.arange(3), 3)
    np.testing.assert_array_equal(found.cosines, [[1, np.nan, -1], [np.nan] * 3, [-1, np.nan, 1]])


def test_samples_are_seen_from_the_center_of_the_chosen_means_within_their_span():
    features, target = clusters(5, 30, 7, 0.5, dtype=torch.float64)
    found = scene_of(features, target, 5, chosen=(4, 0, 2), each=10)
    assert found.chosen == [4, 0, 2]
    means = np.stack([features[target == label].mean(dim=0).numpy() for label in (4, 0, 2)])
    span = np.linalg.svd(means - means.mean(axis=0))[2][:2]
    for label, points in zip(found.chosen, found.samples, strict=True):
        seen = (features[target == label][:10].numpy() - means.mean(axis=0)) @ span.T
        points = np.array(points)
        assert points.shape == (10, 3)
        np.testing.assert_allclose(points @ points.T, seen @ seen.T, rtol=1e-4, atol=1e-4)  # but for a turn
    offsets, drawn = means - means.mean(axis=0), np.array(found.means)
    np.testing.assert_allclose(drawn @ drawn.T, offsets @ offsets.T, rtol=1e-4, atol=1e-4)


def test_weight_rows_lie_on_the_means_they_are_aligned_with_and_are_short_if_they_point_elsewhere():
    means = torch.zeros(4, 6, dtype=torch.float64)
    means[:, :3] = torch.randn(4, 3, dtype=torch.float64)
    target = torch.arange(4)
    aligned = scene_of(means, target, 4, weight=0.1 * means + 5, chosen=(0, 1, 2))
    np.testing.assert_allclose(aligned.weight, aligned.means, atol=1e-5)
    elsewhere = scene_of(means, target, 4, weight=torch.eye(4, 6).flip(1), chosen=(0, 1, 2))
    assert np.abs(elsewhere.weight).max() < 1e-5
    opposite = scene_of(means, target, 4, weight=-means, chosen=(0, 1, 2))
    np.testing.assert_allclose(opposite.weight, -np.array(opposite.means), atol=1e-5)


@pytest.mark.parametrize("weight", [None, torch.ones(3, 6), torch.full((3, 6), math.nan)])
def test_without_weight_rows_that_differ_there_are_class_means_alone(weight):
    features, target = clusters(3, 5, 6, 0.5)
    found = scene_of(features, target, 3, weight=weight, chosen=(0, 1, 2))
    assert (len(found.weight), len(found.means)) == (0, 3)


@pytest.mark.parametrize("value", [0.1, math.nan, math.inf])
def test_class_means_that_are_all_the_same_or_not_finite_have_no_picture(value):
    features = torch.randn(1, 6).repeat(9, 1)
    features[0] = features[0] if value == 0.1 else value
    found = scene_of(features, torch.arange(3).repeat(3), 3, chosen=(0, 1, 2))
    assert (found.chosen, found.samples, found.means, found.weight) == ([], [], [], [])
    assert posed([found]) == []


def test_scenes_come_back_from_a_file():
    scenes = collapsing(2)
    assert scenes_of([found.text for found in scenes]) == scenes


def test_the_training_data_are_pictured_in_order_and_each_step_once():
    train, held_out = collapsing(4), collapsing(4, stage="validate")
    assert pictured([*held_out, *reversed(train)]) == train
    assert pictured(held_out) == held_out
    assert pictured([]) == []
    averaged = replace(train[-1], chosen=[])  # of other weights, after the last step
    assert pictured([*train, averaged]) == [*train[:-1], averaged]


def test_posed_class_means_are_at_a_distance_of_one_on_average_and_everything_else_goes_with_them():
    scenes = collapsing(4)
    for raw, found in zip(scenes, posed(scenes), strict=True):
        means = np.array(found.means)
        assert np.sqrt((means**2).sum(axis=1).mean()) == pytest.approx(1, rel=1e-12)
        unit = np.sqrt((np.array(raw.means) ** 2).sum(axis=1).mean())
        np.testing.assert_allclose(unit * np.array(found.samples), raw.samples, rtol=1e-12)
        np.testing.assert_allclose(unit * np.array(found.weight), raw.weight, rtol=1e-12)


def test_scenes_of_other_classes_or_samples_than_the_last_are_not_posed():
    last = collapsing(6)[4:]
    others = [collapsing(1, chosen=(0, 1))[0], collapsing(2, each=5)[1], collapsing(3, chosen=())[2]]
    assert posed([*others, *last]) == posed(last)
    assert len(posed(last)) == 2


@pytest.mark.parametrize(
    ("count", "places"), [(0, []), (1, [0]), (2, [0, 1]), (3, [0, 1, 2]), (4, [0, 2, 3]), (61, [0, 30, 60])]
)
def test_the_middle_is_that_of_the_measurements(count, places):
    assert first_middle_last(range(count)) == places
