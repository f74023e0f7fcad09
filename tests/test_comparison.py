import copy
from dataclasses import fields

import numpy as np
import pytest
import reference
import torch
from conftest import clusters

from lightning_nc.comparison import Centers, Comparison
from lightning_nc.functional import nc1_cdnv_directional, nc4, ncc_error


def compared(features, target, centers, sizes=(7, 20), ignore_index=None, along=True):
    """The comparison of all samples, batch by batch."""
    found = Comparison.zeros(len(centers.means), centers.means, along)
    start, step = 0, 0
    while start < len(features):
        stop = start + sizes[step % len(sizes)]
        found.update(features[start:stop], target[start:stop], centers, ignore_index)
        start, step = stop, step + 1
    return found


def states(comparison):
    return {part.name: getattr(comparison, part.name) for part in fields(comparison)}


def case(classes=6, features=8, noise=1.0, dtype=torch.float32):
    """Samples that overlap, centers that are not their own means, and a classifier."""
    rows, target = clusters(classes, 30, features, noise, dtype=dtype)
    means = torch.randn(classes, features).double()
    weight, bias = torch.randn(classes, features), torch.randn(classes)
    return rows, target, Centers(means, torch.ones(classes, dtype=torch.bool), weight, bias)


def sample_by_sample(rows, target, centers):
    """What the comparison should hold, by loops in NumPy: compared, misplaced, disagreeing, variance along unit vectors."""
    rows, target, means = (part.double().numpy() for part in (rows, target, centers.means))
    weight, bias, seen = centers.weight.double().numpy(), centers.bias.double().numpy(), centers.seen.numpy()
    count, misplaced, disagreeing = np.zeros((3, len(means)))
    along = np.zeros((len(means), len(means)))
    for row, k in zip(rows, target.astype(int), strict=True):
        if not seen[k]:
            continue
        count[k] += 1
        nearest = min(np.flatnonzero(seen), key=lambda j: ((row - means[j]) ** 2).sum())
        decision = max(np.flatnonzero(seen), key=lambda j: weight[j] @ row + bias[j])
        misplaced[k] += nearest != k
        disagreeing[k] += nearest != decision
        for j in set(np.flatnonzero(seen)) - {k}:
            scale = np.linalg.norm(means[k]) + np.linalg.norm(means[j])
            along[k, j] += ((row - means[k]) @ (means[j] - means[k]) / scale**2) ** 2
    return count, misplaced, disagreeing, along


@pytest.mark.parametrize("classes", [2, 6])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_batches_add_up_to_what_a_loop_over_the_samples_finds(classes, dtype):
    rows, target, centers = case(classes, dtype=dtype)
    found = compared(rows, target, centers)
    for state, expected in zip(states(found).values(), sample_by_sample(rows, target, centers), strict=True):
        assert state.dtype == torch.float64
        assert np.allclose(state.numpy(), expected, rtol=1e-9, atol=1e-12)
    assert 0 < found.misplaced.sum() < len(target)


def test_a_class_without_a_mean_is_neither_compared_nor_anybodys_nearest():
    rows, target, centers = case()
    centers.means[2], centers.seen[2] = 0, False  # among the others, so that it would be the nearest of many
    found = compared(rows, target, centers)
    seen = centers.seen
    for state, expected in zip(
        states(found.select(seen)).values(), sample_by_sample(rows, target, centers), strict=True
    ):
        expected = expected[seen][:, seen] if expected.ndim == 2 else expected[seen]
        assert np.allclose(state.numpy(), expected, rtol=1e-9, atol=1e-12)
    assert found.compared[2] == found.misplaced[2] == found.disagreeing[2] == 0


def test_ignored_samples_and_labels_out_of_range_count_nowhere_whatever_their_features_hold():
    rows, target, centers = case()
    expected = states(compared(rows, target, centers))
    junk = torch.full((5, rows.shape[1]), torch.nan)
    padded = (
        torch.cat([junk, rows, junk]),
        torch.cat([torch.tensor([-100, -1, 6, 300, -100]), target, target[:5] * 0 - 7]),
    )
    found = compared(*padded, centers, ignore_index=-100)
    assert all(torch.allclose(state, expected[name], rtol=1e-12) for name, state in states(found).items())
    ignored = compared(rows, target, centers, ignore_index=3)
    assert ignored.compared.tolist() == [30, 30, 30, 0, 30, 30]


def test_parts_merge_to_the_whole_and_the_other_part_stays_as_it_is():
    rows, target, centers = case()
    whole, first, second = (
        compared(*part, centers) for part in ((rows, target), (rows[:50], target[:50]), (rows[50:], target[50:]))
    )
    before = copy.deepcopy(states(second))
    first.merge(second)
    assert all(torch.allclose(state, states(whole)[name], rtol=1e-12) for name, state in states(first).items())
    assert all(torch.equal(state, before[name]) for name, state in states(second).items())


def test_without_the_table_of_pairs_the_memory_grows_with_the_classes_only():
    rows, target, centers = case()
    found = compared(rows, target, centers, along=False)
    assert found.along.shape == (0, 0)
    assert torch.equal(found.misplaced, compared(rows, target, centers).misplaced)
    assert found.select(centers.seen).along.shape == (0, 0)
    assert Comparison.zeros(50_000, centers.means, along=False).compared.shape == (50_000,)


def test_an_update_is_the_same_in_autocast_and_inference_mode():
    rows, target, centers = case()
    expected = states(compared(rows, target, centers))
    with torch.autocast("cpu", torch.bfloat16), torch.inference_mode():
        found = compared(rows, target, centers)
    found.update(rows[:0], target[:0], centers)  # outside of inference mode again
    assert all(torch.equal(state, expected[name]) for name, state in states(found).items())


def test_samples_far_from_the_origin_find_the_same_nearest_mean():
    rows, target, centers = case(noise=0.8, dtype=torch.float64)
    expected = compared(rows, target, centers)
    offset = 2.0**26
    moved = compared(rows + offset, target, centers._replace(means=centers.means + offset))
    assert torch.equal(moved.misplaced, expected.misplaced)


@pytest.mark.parametrize("scale", [1e-130, 1e-80, 1e80, 1e130])
def test_fourth_powers_of_the_features_do_not_leave_the_floating_range(scale):
    rows, target = clusters(5, 20, 8, 1.0, dtype=torch.float64)
    expected = reference.cdnv_directional(rows.numpy(), target.numpy())
    assert nc1_cdnv_directional(rows * scale, target).item() == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("distance", [1e-1, 1e-4])
def test_the_directional_variance_of_two_near_classes_keeps_its_digits(distance):
    rows, target = clusters(4, 20, 8, 0.1 * distance, dtype=torch.float64)
    rows[target == 1] = rows[target == 0] + distance * torch.randn(8, dtype=torch.float64)
    expected = reference.cdnv_directional(rows.numpy(), target.numpy())
    assert nc1_cdnv_directional(rows, target).item() == pytest.approx(expected, rel=1e-8)


def test_of_features_along_one_line_the_directional_variance_is_known():
    # Class means 0 and 4, samples 1 from their mean: variance 1 over 16, in both orders. Without the 1/2 of nc1_cdnv.
    rows = torch.tensor([[-1.0], [1.0], [3.0], [5.0]])
    target = torch.tensor([0, 0, 1, 1])
    assert nc1_cdnv_directional(rows, target).item() == pytest.approx(1 / 16, rel=1e-12)
    # Scatter across the line does not count.
    across = torch.tensor([[0.0, 7.0], [0.0, -7.0], [4.0, 7.0], [4.0, -7.0]])
    assert nc1_cdnv_directional(across, target).item() == 0


def test_a_class_with_one_sample_and_labels_of_any_integer_type_count_like_others():
    rows, target = torch.tensor([[0.0], [2.0], [1.2], [5.0]]), torch.tensor([0, 0, 1, 2])  # means 1, 1.2 and 5
    for dtype in (torch.uint8, torch.int8, torch.int16, torch.int32):
        assert ncc_error(rows, target.to(dtype)).item() == pytest.approx(1 / 4)  # 2 lies nearer to 1.2
        assert nc1_cdnv_directional(rows, target.to(dtype)) == nc1_cdnv_directional(rows, target)


def test_a_wrong_sample_is_one_share_of_the_error_and_of_the_disagreement():
    rows, target = torch.tensor([[-1.0], [-1.0], [4.0], [5.0], [5.0], [-2.0]]), torch.tensor([0, 0, 0, 1, 1, 1])
    # Class means 2/3 and 8/3: the third sample lies nearer to the other mean, and so does the last one.
    assert ncc_error(rows, target).item() == pytest.approx(2 / 6)
    assert nc4(rows, target, torch.tensor([[-1.0], [1.0]])).item() == 0  # the classifier decides by the sign
    bias = torch.tensor([0.0, -20.0])  # now it decides for class 0 always
    assert nc4(rows, target, torch.tensor([[-1.0], [1.0]]), bias).item() == pytest.approx(3 / 6)
