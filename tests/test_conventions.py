"""Each row of docs/conventions.md: the formula of the source, in NumPy, against the expression of ours that the page gives."""

import math
import re
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn.functional import normalize

from lightning_nc import functional
from lightning_nc.functional import METRICS
from lightning_nc.functional.table import evaluate
from lightning_nc.moments import ClassDeviations

PAGE = (Path(__file__).parents[1] / "docs/conventions.md").read_text(encoding="utf-8")


@dataclass
class Data:
    """Features h, labels y, weight w and bias b; features and labels of other data."""

    h: np.ndarray
    y: np.ndarray
    w: np.ndarray
    b: np.ndarray
    ood_h: np.ndarray
    ood_y: np.ndarray

    def __post_init__(self):
        self.classes, self.counts = np.unique(self.y, return_counts=True)
        self.K, self.N = len(self.classes), len(self.y)
        self.means = class_means(self.h, self.y)
        self.mean_of_samples = self.h.mean(0)
        self.centered = self.means - self.means.mean(0)
        self.around = self.means - self.mean_of_samples  # as sources that center by the mean of the samples
        self.deviations = self.h - self.means[self.y]
        self.within = self.deviations.T @ self.deviations / self.N
        self.spread = np.array([(self.deviations[self.y == k] ** 2).sum() for k in self.classes])


def class_means(h, y):
    return np.stack([h[y == k].mean(0) for k in np.unique(y)])


def data(counts, seed=0, scale=1.0):
    rng = np.random.default_rng(seed)
    classes, width = len(counts), 11
    y = rng.permutation(np.repeat(np.arange(classes), counts))
    means = rng.standard_normal((classes, width))
    h = np.maximum(means[y] + 0.7 * rng.standard_normal((len(y), width)), -0.3)
    ood_y = np.repeat([0, 1, 2], [3, 9, 21])
    ood_h = rng.standard_normal((3, width))[ood_y] + 0.4 * rng.standard_normal((len(ood_y), width))
    w = means + 0.8 * rng.standard_normal((classes, width))
    return Data(scale * h, y, w, rng.standard_normal(classes), ood_h, ood_y)


UNEQUAL, EQUAL = data([4, 9, 17, 6, 12, 5, 30]), data([13] * 7)


# ------------------------------------------------------------------------------------------------ formulas of the sources


def inverse(between, rank):
    """The pseudoinverse from the ``rank`` largest eigenvalues."""
    values, vectors = np.linalg.eigh(between)
    return vectors[:, -rank:] / values[-rank:] @ vectors[:, -rank:].T


def ratio(d, within=None, rows=None, between=None):
    """tr(Sigma_W pinv(Sigma_B))."""
    rows = d.centered if rows is None else rows
    between = rows.T @ rows / d.K if between is None else between
    return np.trace((d.within if within is None else within) @ inverse(between, d.K - 1))


def covariance(rows):
    return np.cov(rows.T, bias=True)


def between_over_samples(d):
    return (d.around * d.counts[:, None]).T @ d.around / d.N


def vci(d):
    between = d.centered.T @ d.centered / d.K
    return 1 - np.trace(np.linalg.inv(d.within + between) @ between) / min(d.h.shape[1], d.K - 1)


def to_etf(left, right):
    product, k = left @ right.T, len(left)
    etf = (np.eye(k) - np.ones((k, k)) / k) / math.sqrt(k - 1)
    return np.linalg.norm(product / np.linalg.norm(product) - etf)


def to_of(rows):
    gram, k = rows @ rows.T, len(rows)
    return np.linalg.norm(gram / np.linalg.norm(gram) - np.eye(k) / math.sqrt(k))


def between_directions(left, right):
    return np.linalg.norm(left / np.linalg.norm(left) - right / np.linalg.norm(right))


def unit(rows):
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def pairs(matrix, ordered=False):
    """The entries of a K x K matrix of two different classes."""
    return matrix[~np.eye(len(matrix), dtype=bool)] if ordered else matrix[np.triu_indices(len(matrix), 1)]


def cosines(rows, ordered=False):
    return pairs(unit(rows) @ unit(rows).T, ordered)


def distances(rows):
    return pairs(np.linalg.norm(rows[:, None] - rows, axis=2))


def aligned(d):
    return (unit(d.w) * unit(d.centered)).sum(1)


def variation(rows, ddof):
    lengths = np.linalg.norm(rows, axis=1)
    return lengths.std(ddof=ddof) / lengths.mean()


def cdnv(d, variances, power=2):
    return np.mean(pairs(variances[:, None] + variances) / 2 / distances(d.means) ** power)


def from_squares(d):
    """Mean squared distance to the class mean, as the mean square minus the square of the mean."""
    return np.array([(d.h[d.y == k] ** 2).sum(1).mean() for k in d.classes]) - (d.means**2).sum(1)


def nearest(d):
    return np.array([np.linalg.norm(row - d.means, axis=1).argmin() for row in d.h])


def decision(d, bias=True):
    return (d.h @ d.w.T + (d.b if bias else 0)).argmax(1)


def small_classes(d):
    order = np.argsort(-d.counts, kind="stable")
    t1 = int((d.counts >= np.median(d.counts)).sum())
    return np.mean(cosines(d.w[order][t1:], ordered=True))


def traces(d):
    return (d.spread / d.counts).sum() / (d.around**2).sum()


def share_of_traces(d):
    within, between = np.trace(d.within), np.trace(d.around.T @ d.around / d.K)
    return within / (within + between)


def normalized(d):
    return replace(d, h=unit(d.h))


def ood_cosines(d):
    ood = class_means(d.ood_h, d.ood_y).mean(0)
    return np.abs(unit(d.means) @ ood / np.linalg.norm(ood)).mean()


def log_kernel(rows):
    return np.log(distances(unit(rows)) ** -1.0)


THEIRS = {
    "NC1 without 1/K": ratio,
    "NC1, between over K - 1": lambda d: ratio(d, between=d.centered.T @ d.centered / (d.K - 1)) / d.K,
    "NC1, between as a sum": lambda d: ratio(d, between=d.centered.T @ d.centered) / d.K,
    "NC1, within over N - K": lambda d: ratio(d, within=d.deviations.T @ d.deviations / (d.N - d.K)) / d.K,
    "NC1, within as mean over classes": lambda d: (
        ratio(d, within=np.mean([covariance(d.h[d.y == k]) for k in d.classes], axis=0)) / d.K
    ),
    "NC1, between over samples": lambda d: ratio(d, between=between_over_samples(d)) / d.K,
    "VCI over min(d, K - 1)": vci,
    "CDNV without 1/2": lambda d: 2 * cdnv(d, d.spread / d.counts),
    "CDNV with ddof 1": lambda d: cdnv(d, d.spread / (d.counts - 1)),
    "equal norms with ddof 1": lambda d: variation(d.centered, 1),
    "equal angles with ddof 1": lambda d: cosines(d.centered).std(ddof=1),
    "equal angles with ddof 1, ordered pairs": lambda d: cosines(d.centered, ordered=True).std(ddof=1),
    "squared distance to the ETF": lambda d: to_etf(d.centered, d.centered) ** 2,
    "squared NC3": lambda d: between_directions(d.w, d.centered) ** 2,
    "mean cosine of weight and mean": lambda d: aligned(d).mean(),
    "mean squared distance of directions": lambda d: ((unit(d.w) - unit(d.centered)) ** 2).sum(1).mean(),
    "accuracy of the nearest class center": lambda d: np.mean(nearest(d) == d.y),
    "agreement with the nearest class center": lambda d: np.mean(nearest(d) == decision(d)),
    # the notebook of Papyan and Han
    "Sw_invSb": ratio,
    "norm_M_CoV": lambda d: variation(d.centered, 1),
    "norm_W_CoV": lambda d: variation(d.w, 1),
    "cos_M": lambda d: np.abs(cosines(d.centered, ordered=True) + 1 / (d.K - 1)).mean(),
    "cos_W": lambda d: np.abs(cosines(d.w, ordered=True) + 1 / (d.K - 1)).mean(),
    "W_M_dist": lambda d: between_directions(d.w, d.centered) ** 2,
    "NCC_mismatch": lambda d: np.mean(nearest(d) != decision(d)),
    # Zhu, Zhou
    "collapse_metric": lambda d: ratio(d, rows=d.around) / d.K,
    "ETF_metric": lambda d: to_etf(d.w, d.w),
    "WH_relation_metric": lambda d: to_etf(d.w, d.around),
    "Wh_b_relation_metric": lambda d: np.linalg.norm(d.w @ d.mean_of_samples + d.b),
    "Zhou, ETF_metric": lambda d: to_etf(d.w - d.w.mean(0), d.w - d.w.mean(0)),
    "Zhou, WH_relation_metric": lambda d: to_etf(d.w - d.w.mean(0), d.around),
    # Tirer & Bruna
    "(26), (76)": lambda d: ratio(d, rows=d.around) / d.K,
    "(27), OF": lambda d: to_of(d.means),
    "(27), ETF": lambda d: to_etf(d.means, d.means),
    "(28)": lambda d: between_directions(d.w, d.means),
    "figures 5 and 10, NC2": lambda d: to_etf(d.around, d.around),
    # Linguistic Collapse
    "sqrt(norms_var) / norms_mean": lambda d: variation(d.centered, 1),
    "etf_error": lambda d: to_etf(d.centered, d.centered),
    "log_kern_mean": lambda d: log_kernel(d.centered).mean(),
    "log_kern_var": lambda d: log_kernel(d.centered).var(),
    "dual_error": lambda d: to_etf(d.w, d.centered),
    "simcos_mean": lambda d: aligned(d).mean(),
    "simcos_var": lambda d: aligned(d).var(ddof=1),
    "hits / (hits + misses)": lambda d: np.mean(nearest(d) == decision(d, bias=False)),
    # neural_collapse
    "nc1_pinv, nc1_svd": lambda d: ratio(d) / d.K,
    "nc1_quot": lambda d: np.trace(d.within) / np.trace(d.centered.T @ d.centered / d.K),
    "nc1_cdnv": lambda d: cdnv(d, d.spread / d.counts),
    "nc2_etf_err": lambda d: to_etf(d.centered, d.centered),
    "nc2g_log": lambda d: log_kernel(d.centered).var(),
    "kernel_stats(kernel=riesz_kernel)[0]": lambda d: np.mean(distances(unit(d.centered)) ** (2.0 - d.h.shape[1])),
    "nc3_dual_err": lambda d: to_etf(d.w, d.centered),
    "nc4_agree": lambda d: np.mean(nearest(d) == decision(d, bias=False)),
    "nc5_ood_dev": ood_cosines,
    # Galanti, Rangamani
    "Galanti, cdnv_train": lambda d: cdnv(d, from_squares(d)),
    "Rangamani, CDNV": lambda d: cdnv(d, d.spread / d.counts),
    "Rangamani, NC1": lambda d: ratio(d, rows=d.around) / d.K,
    "Rangamani, Traces, within over between": traces,
    "Rangamani, NCC": lambda d: np.mean(nearest(d) == d.y),
    # LPM, Jiang, nc-toolbox
    "LPM, std weights norm over avg": lambda d: variation(d.w, 0),
    "LPM, std between-class weights cosine": lambda d: cosines(d.w, ordered=True).std(),
    "LPM, avg weights cosine to -1/(C-1)": lambda d: np.abs(cosines(d.w, ordered=True) + 1 / (d.K - 1)).mean(),
    "LPM, cosine for small classes": small_classes,
    "LPM, dual distance square": lambda d: between_directions(d.w, d.around) ** 2,
    "Jiang, GNC1.py": lambda d: ratio(normalized(d), rows=normalized(d).around) / d.K,
    "toolbox, nc1_strong": lambda d: ratio(d, rows=d.around) / d.K,
    "toolbox, nc1_weak[1]": share_of_traces,
    "toolbox, nc1_cdnv": lambda d: cdnv(d, d.spread / (d.counts - 1)),
    "toolbox, gnc2_hypershperical_uniformity": lambda d: log_kernel(d.around).mean(),
    "toolbox, nc3_self_duality": lambda d: between_directions(d.w, d.around),
    "toolbox, nc4_classifier_agreement": lambda d: np.mean(nearest(d) == decision(d)),
}


# ---------------------------------------------------------------------------------------------------------- the page


def cells(line):
    return [cell.strip() for cell in line.strip().strip("|").split(" | ")]


TABLES = [table for table in re.findall(r"(?:^\|.*\n)+", PAGE, re.MULTILINE) if table.startswith("| They compute")]
ROWS = [cells(line) for table in TABLES for line in table.splitlines()[2:]]
WITH_FACTOR = [(name.replace("`", ""), ours.strip("`"), counts) for name, _, ours, counts in (r for r in ROWS if r[3])]


def values(d):
    """All metrics of METRICS that the page names, and what else its expressions read."""
    features, target, weight, bias, ood = map(torch.tensor, (d.h, d.y, d.w, d.b, d.ood_h))
    names = [name for name in METRICS if re.search(rf"\b{name}\b", PAGE)]
    found = evaluate(names, ClassDeviations.of(features, target, d.K), weight, bias, ood_mean=ood.mean(0))
    found = {name: value.item() for name, value in found.items()}
    ood_means = torch.tensor(class_means(d.ood_h, d.ood_y))
    numbers = {"K": d.K, "N": d.N, "P": math.comb(d.K, 2), "n": d.N / d.K}
    functions = {"functional": functional, "normalize": normalize, "arange": torch.arange}
    roots = {"sqrt": math.sqrt, "exp": math.exp}
    tensors = {"features": features, "target": target, "weight": weight, "ood_means": ood_means}
    return {**found, **numbers, **functions, **roots, **tensors}


def ours(expression, d):
    return float(eval(expression, values(d)))


def test_the_page_has_a_row_for_each_formula_and_a_formula_for_each_row():
    named = [name for name, *_ in WITH_FACTOR]
    assert len(named) == len(set(named)) > 60
    assert set(named) == set(THEIRS)


@pytest.mark.parametrize(("name", "expression", "counts"), WITH_FACTOR)
def test_the_number_of_a_source_follows_from_ours(name, expression, counts):
    d = UNEQUAL if counts == "any" else EQUAL
    assert THEIRS[name](d) == pytest.approx(ours(expression, d), rel=1e-10, abs=1e-12)


@pytest.mark.parametrize(("name", "expression"), [row[:2] for row in WITH_FACTOR if row[2] == "equal"])
def test_what_holds_for_equal_counts_does_not_hold_for_others(name, expression):
    assert THEIRS[name](UNEQUAL) != pytest.approx(ours(expression, UNEQUAL), rel=1e-4)


# ---------------------------------------------------------------------------------------------------- what the text says


def test_around_the_mean_of_the_samples_the_formulas_of_the_page_hold():
    d, v = UNEQUAL, values(UNEQUAL)
    delta = d.means.mean(0) - d.mean_of_samples
    inverted = inverse(d.centered.T @ d.centered / d.K, d.K - 1)
    correction = delta @ inverted @ d.within @ inverted @ delta / (1 + delta @ inverted @ delta) / d.K
    assert THEIRS["collapse_metric"](d) == pytest.approx(v["nc1"] - correction, rel=1e-10)
    assert correction > 0.01 * v["nc1"]
    traces = np.trace(d.within) / (np.trace(d.centered.T @ d.centered) / d.K + delta @ delta)
    assert np.trace(d.within) / np.trace(d.around.T @ d.around / d.K) == pytest.approx(traces, rel=1e-10)
    assert d.w @ d.around.T == pytest.approx(d.w @ d.centered.T + np.outer(d.w @ delta, np.ones(d.K)), rel=1e-10)
    shifted = d.w @ d.means.mean(0) + d.b - d.w @ delta
    assert THEIRS["Wh_b_relation_metric"](d) == pytest.approx(np.linalg.norm(shifted), rel=1e-10)


WITHOUT_FACTOR = {
    "cdnv": (lambda d: cdnv(d, d.spread / d.counts, power=4), "nc1_cdnv", -2),
    "simdot_var": (lambda d: (d.w * d.centered).sum(1).var(ddof=1), "nc3_uniform", 2),
    "nc3u_uni_dual": (lambda d: (d.w * d.centered).sum(1).var(ddof=1), "nc3_uniform", 2),
}


@pytest.mark.parametrize("name", WITHOUT_FACTOR)
def test_numbers_with_a_unit_change_with_the_scale_of_the_features_and_ours_do_not(name):
    theirs, compared, power = WITHOUT_FACTOR[name]
    twice = data(UNEQUAL.counts, scale=2.0)
    assert theirs(twice) == pytest.approx(2.0**power * theirs(UNEQUAL), rel=1e-10)
    assert ours(compared, twice) == pytest.approx(ours(compared, UNEQUAL), rel=1e-10)
    assert any(row[0] == f"`{name}`" and f"compare `{compared}`" in row[2] for row in ROWS)


def test_signed_deviations_of_cosines_cancel_at_the_corners_of_a_square():
    corners = np.array([[1.0, 0], [0, 1], [-1, 0], [0, -1]])
    assert np.mean(cosines(corners) + 1 / 3) == pytest.approx(0, abs=1e-15)
    assert functional.nc2_maxangle(torch.tensor(corners), torch.arange(4)).item() == pytest.approx(4 / 9)


def test_signed_differences_of_norms_depend_on_the_order_of_the_classes():
    logs = np.log(np.linalg.norm(UNEQUAL.around, axis=1))
    forward, backward = (np.mean(pairs(x[:, None] - x)) for x in (logs, logs[::-1]))
    assert forward == pytest.approx(-backward)
    assert abs(forward) > 0.01


def test_pinv_in_float32_drops_a_weak_direction_of_the_class_means():
    rng = np.random.default_rng(0)
    directions = np.linalg.qr(rng.standard_normal((64, 64)))[0][:3]
    means = np.array([[1.0, 0, 0], [-1, 0, 0], [0, 1e-4, 0], [0, -1e-4, 0]]) @ directions
    y = np.repeat(np.arange(4), 100)
    h = means[y] + 1e-6 * rng.standard_normal((400, 64))
    exact = functional.nc1(torch.tensor(h), torch.tensor(y)).item()
    m = np.stack([h[y == k].mean(0) for k in range(4)]).astype(np.float32)
    z = (h - m[y]).astype(np.float32)
    m -= m.mean(0)
    peers = np.trace(z.T @ z / 400 @ np.linalg.pinv(m.T @ m / 4, rcond=64 * np.finfo(np.float32).eps)) / 4
    assert 0 < peers < 0.01 * exact


def test_a_difference_of_squares_in_float32_loses_the_scatter_near_collapse():
    rng = np.random.default_rng(0)
    means = 1e4 * unit(rng.standard_normal((5, 512)))
    y = np.repeat(np.arange(5), 100)
    h = (means[y] + rng.standard_normal((500, 512)) / math.sqrt(512)).astype(np.float32)
    small = Data(h, y, means, means[:, 0], h, y)  # NumPy keeps float32
    exact = functional.nc1_cdnv(torch.tensor(h).double(), torch.tensor(y)).item()
    assert not 0.5 < cdnv(small, np.abs(from_squares(small))) / exact < 2
