"""Confidence intervals: the formula, shard by shard, and how often they cover the value of the population."""

import math
from copy import deepcopy
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import clusters, metric_value, simplex_etf
from scipy import stats

from lightning_nc.certainty import jackknife
from lightning_nc.functional.table import evaluate
from lightning_nc.moments import ClassMoments

LOGARITHMIC = ("nc1", "nc1_trace", "nc1_cdnv")


def shards_of(rows, target, classes, count, scatter=True):
    """The statistics of shards with the samples of each class spread over them, and the shard of each sample."""
    place = torch.empty(len(target), dtype=torch.long)
    for k in range(classes):
        mine = (target == k).nonzero().flatten()
        place[mine[torch.randperm(len(mine))]] = torch.arange(len(mine)) % count
    shards = [ClassMoments.zeros(classes, rows.shape[1], "cpu", scatter) for _ in range(count)]
    for number, shard in enumerate(shards):
        shard.update(rows[place == number], target[place == number])
    return shards, place


@pytest.mark.parametrize(("count", "level"), [(2, 0.5), (5, 0.9), (20, 0.95), (20, 0.68)])
def test_the_interval_is_the_jackknife_over_samples_left_out(count, level):
    names = (*LOGARITHMIC, "nc2_of", "nc2_equinorm", "nc2_etf_centered", "nc3", "nc3_cosine", "bias_collapse")
    rows, target = clusters(4, 60, 6, 0.8, dtype=torch.float64)
    rows, target = rows[20:] + 7, target[20:]  # classes of unequal size
    weight, bias = torch.randn(4, 6, dtype=torch.float64), torch.randn(4, dtype=torch.float64)
    shards, place = shards_of(rows, target, 4, count)
    found = jackknife(names, shards, weight, bias, level)
    assert tuple(found) == names
    for name in names:
        scale, back = (np.log, np.exp) if name in LOGARITHMIC else (np.asarray, np.asarray)
        whole = scale(metric_value(name, rows, target, weight, bias, 4).item())
        kept = [place != number for number in range(count)]
        rest = scale(
            [metric_value(name, rows[rows_left], target[rows_left], weight, bias, 4).item() for rows_left in kept]
        )
        width = stats.t.ppf((1 + level) / 2, count - 1) * math.sqrt((count - 1) * rest.var())
        center = count * whole - (count - 1) * rest.mean()
        expected = [max(float(back(end)), 0.0) for end in (center - width, center + width)]
        assert found[name] == pytest.approx(expected, rel=1e-4, abs=1e-4 * width), name


def test_the_shards_stay_as_they_are_and_their_order_does_not_matter():
    rows, target = clusters(3, 40, 5, 0.5)
    shards, _ = shards_of(rows, target, 3, 10)
    before = deepcopy(shards)
    found = jackknife(LOGARITHMIC, shards, None, None, 0.95)
    for shard, old in zip(shards, before, strict=True):
        for name, state in vars(old).items():
            assert torch.equal(getattr(shard, name), state), name
    turned = jackknife(LOGARITHMIC, [*shards[::-1], ClassMoments.zeros(3, 5, "cpu")], None, None, 0.95)
    for name in LOGARITHMIC:
        assert turned[name] == pytest.approx(found[name], rel=1e-9)


def test_tiny_nc1_keeps_its_digits_and_an_interval_ends_at_the_value_at_collapse():
    means = torch.nn.functional.pad(simplex_etf(4), (0, 2))
    target = torch.arange(4).repeat(200)
    noise = torch.randn(800, 6, dtype=torch.float64)
    ends = []
    for level in (1e-2, 1e-6):
        shards, _ = shards_of(means[target] + level * noise, target, 4, 20)
        torch.manual_seed(1)
        ends.append(jackknife(("nc1", "nc2_etf", "nc2_equinorm"), shards, None, None, 0.95))
        assert all(0 <= low < high for low, high in ends[-1].values())
    shards, _ = shards_of(means[target], target, 4, 20)
    assert all(0 <= low <= high < 1e-30 for low, high in jackknife(LOGARITHMIC, shards, None, None, 0.95).values())
    assert ends[1]["nc1"] == pytest.approx([1e-8 * end for end in ends[0]["nc1"]], rel=0.1)


def test_metrics_of_the_weight_are_sure_and_those_of_samples_or_other_data_are_left_out():
    rows, target = clusters(4, 40, 6, 0.5, dtype=torch.float64)
    weight = torch.randn(4, 6, dtype=torch.float64)
    shards, _ = shards_of(rows, target, 4, 8)
    found = jackknife(("nc2_weight", "nc4", "ncc_error", "nc1_cdnv_directional", "nc5"), shards, weight, None, 0.9)
    assert found.keys() == {"nc2_weight"}
    value = metric_value("nc2_weight", rows, target, weight, None).item()
    assert found["nc2_weight"] == pytest.approx((value, value))


def test_the_classes_that_count_as_small_are_those_of_all_samples_whatever_the_parts_hold():
    rows, target = clusters(4, 50, 6, 0.5, dtype=torch.float64)
    weight = torch.randn(4, 6, dtype=torch.float64)
    unit = weight / weight.norm(dim=1, keepdim=True)
    mean = ((unit @ unit.T).sum() - 4).item() / 12
    shards = [ClassMoments.zeros(4, 6) for _ in range(3)]
    for shard, part in zip(shards, torch.arange(200).tensor_split(3), strict=True):  # of each class another number
        shard.update(rows[part], target[part])
    assert jackknife(("minority_cosine",), shards, weight, None, 0.9)["minority_cosine"] == pytest.approx((mean, mean))


def test_a_class_that_one_shard_alone_has_and_classes_never_seen_leave_an_interval():
    rows, target = clusters(6, 40, 8, 0.5, dtype=torch.float64)
    kept = (target != 4) & ((target != 2) | ((target == 2).cumsum(0) == 1))
    shards, _ = shards_of(rows[kept], target[kept], 6, 10)
    for low, high in jackknife((*LOGARITHMIC, "nc2_of"), shards, torch.randn(6, 8), None, 0.95).values():
        assert 0 <= low < high < math.inf


def test_what_is_not_defined_has_no_interval():
    rows, target = clusters(3, 20, 5, 0.5)
    shards, _ = shards_of(rows, target, 3, 4)
    for few in (shards[:1], [], [ClassMoments.zeros(3, 5, "cpu")] * 4):
        assert all(map(math.isnan, jackknife(("nc1",), few, None, None, 0.9)["nc1"]))
    broken = [replace(shard, nonfinite=torch.tensor(number)) for number, shard in enumerate(shards)]
    assert all(map(math.isnan, jackknife(("nc1",), broken, None, None, 0.9)["nc1"]))
    for level in (0, 1, 95, -0.5):
        with pytest.raises(ValueError, match="level of intervals must lie between 0 and 1"):
            jackknife(("nc1",), shards, None, None, level)


COVERED = (*LOGARITHMIC, "nc2_equinorm", "nc2_etf_centered", "nc2_maxangle", "nc3_centered", "nc3_cosine")


def coverage(per_class, simulations, level, classes=4, features=6):
    """How often the intervals of Gaussian classes cover the values of the population, which are in closed form."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    means, factors = normal(classes, features), 0.7 * normal(classes, features, features) / math.sqrt(features)
    weight = means - means.mean(dim=0) + 0.5 * normal(classes, features)
    covariances, size = factors @ factors.mT, torch.full((classes,), float(per_class), dtype=torch.float64)
    population = replace(
        ClassMoments.zeros(classes, features, "cpu"),
        counts=size,
        means=means,
        spread=size * covariances.diagonal(dim1=1, dim2=2).sum(dim=1),
        scatter=per_class * covariances.sum(dim=0),
        columns=per_class * covariances.sum(dim=0).diagonal(),
    )
    truth = {name: float(value) for name, value in evaluate(COVERED, population, weight).items()}
    target = torch.arange(classes).repeat(per_class)
    covered = dict.fromkeys(COVERED, 0)
    for _ in range(simulations):
        rows = means[target] + (factors[target] @ normal(len(target), features, 1)).squeeze(2)
        shards, _ = shards_of(rows, target, classes, 20)
        for name, (low, high) in jackknife(COVERED, shards, weight, None, level).items():
            covered[name] += low <= truth[name] <= high
    return {name: count / simulations for name, count in covered.items()}


def test_an_interval_covers_the_value_of_the_population_about_as_often_as_it_says():
    for name, share in coverage(100, simulations=25, level=0.8).items():
        assert abs(share - 0.8) < 3.3 * math.sqrt(0.8 * 0.2 / 25), name


@pytest.mark.slow
@pytest.mark.parametrize("per_class", [100, 400])
@pytest.mark.parametrize("level", [0.95, 0.68])
def test_the_coverage_of_500_simulations_is_the_level_within_two_percent_and_chance(per_class, level):
    found = coverage(per_class, simulations=500, level=level)
    assert abs(np.mean(list(found.values())) - level) < 0.02
    chance = math.sqrt(level * (1 - level) / 500)  # 1 % and 2 %: what one count of 500 can tell
    for name, share in found.items():
        assert abs(share - level) < 0.02 + 2.6 * chance, name
