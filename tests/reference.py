"""An independent float64 computation of every metric: two passes, d x d matrices, pseudoinverses; NumPy only."""

import itertools

import numpy as np
from scipy.optimize import nnls


def moments(features, target):
    features, target = np.asarray(features, dtype=np.float64), np.asarray(target)
    classes = np.unique(target)
    means = np.stack([features[target == k].mean(0) for k in classes])
    deviations = features - means[np.searchsorted(classes, target)]
    centered = means - means.mean(0)
    within = deviations.T @ deviations / len(features)
    between = centered.T @ centered / len(classes)
    return means, centered, deviations, within, between


def nc1(features, target):
    means, _, _, within, between = moments(features, target)
    # The rank of Sigma_B is known: what lies below is rounding, which a general cut-off can only guess at.
    values, vectors = np.linalg.eigh(between)
    rank = min(len(means) - 1, between.shape[0])
    values, vectors = values[-rank:], vectors[:, -rank:]
    return float(np.trace(within @ (vectors / values) @ vectors.T) / len(means))


def frame(rows, kind, other=None):
    gram = rows @ (rows if other is None else other).T
    k = len(gram)
    target = np.eye(k) / np.sqrt(k) if kind == "of" else (np.eye(k) - 1 / k) / np.sqrt(k - 1)
    return float(np.linalg.norm(gram / np.linalg.norm(gram) - target))


def seli(rows, counts, power):
    """Distance from a power of A = S diag(counts) S, by its eigenvectors; nan where K - 1 of them have no place."""
    k, d = rows.shape
    if k > d + 1:
        return np.nan
    center = np.eye(k) - 1 / k
    values, vectors = np.linalg.eigh(center @ np.diag(counts) @ center)
    target = (vectors[:, 1:] * values[1:] ** power) @ vectors[:, 1:].T
    gram = rows @ rows.T
    return float(np.linalg.norm(gram / np.linalg.norm(gram) - target / np.linalg.norm(target)))


def orthoplex(means):
    """Distance from vertices of which the pairs are chosen one after the other; nan unless d + 2 <= K <= 2d."""
    k, d = means.shape
    if not d + 2 <= k <= 2 * d:
        return np.nan
    centered = means - means.mean(0)
    unit = centered / np.linalg.norm(centered, axis=1, keepdims=True)
    pairs, free = [], set(range(k))
    for i, j in sorted(itertools.combinations(range(k), 2), key=lambda pair: unit[pair[0]] @ unit[pair[1]]):
        if {i, j} <= free and len(pairs) < k - d:
            pairs.append((i, j))
            free -= {i, j}
    target, rows = np.eye(k), means - means[np.ravel(pairs)].mean(0)
    for i, j in pairs:
        target[i, j] = target[j, i] = -1
    gram = rows @ rows.T
    return float(np.linalg.norm(gram / np.linalg.norm(gram) - target / np.linalg.norm(target)))


def direction(weight, means):
    return float(np.linalg.norm(weight / np.linalg.norm(weight) - means / np.linalg.norm(means)))


def cosines(rows):
    unit = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    return (unit @ unit.T)[np.triu_indices(len(rows), 1)]


def others(means, centered, within, weight, counts, owner, features):
    """Lengths and angles of the weight, energies, ranks, and the variability collapse index."""
    k, d = means.shape
    unit = centered / np.linalg.norm(centered, axis=1, keepdims=True)
    logs = np.concatenate([-np.log(np.linalg.norm(unit[i + 1 :] - unit[i], axis=1)) for i in range(k)])
    powers = np.exp((d - 2) * (logs - logs.max()))
    lengths = np.linalg.norm(weight, axis=1)
    cosine = (weight * centered).sum(1) / (lengths * np.linalg.norm(centered, axis=1))
    small = (
        np.flatnonzero(counts < np.sort(counts)[(k - 1) // 2 : k // 2 + 1].mean()) if np.ptp(counts) else np.arange(k)
    )
    minority = cosines(weight[small]).mean() if len(small) > 1 else np.nan
    spread = np.linalg.svd(centered, compute_uv=False) ** 2
    total = np.linalg.eigvalsh(np.cov(np.asarray(features, dtype=np.float64).T, ddof=0).reshape(d, d))
    return {
        "nc0": np.linalg.norm(weight.sum(0)) / np.sqrt(k) / np.linalg.norm(weight),
        "nc1_vci": vci(within, centered, len(owner)),
        "nc2_weight_equinorm": lengths.std() / lengths.mean(),
        "nc2_weight_equiangular": cosines(weight).std(),
        "nc2_weight_maxangle": np.abs(cosines(weight) + 1 / (k - 1)).mean(),
        "nc3_uniform": cosine.std(),
        "gnc2_log": logs.mean(),
        "gnc2_log_spread": logs.std(),
        "gnc2_riesz": np.log(powers.mean()) + (d - 2) * logs.max() if d > 2 else np.nan,
        "gnc2_margin": margin(weight) if k < 100 else np.nan,
        "minority_cosine": minority,
        "stable_rank": spread.sum() / spread.max(),
        "numerical_rank": (np.sqrt(spread) > np.sqrt(1e-3) * np.sqrt(spread.max())).sum(),
        "stable_rank_features": total.sum() / total.max(),
        "numerical_rank_features": (total > 1e-3 * total.max()).sum(),
    }


def vci(within, centered, samples):
    """By its definition, with the rank of the class means known; nan where it is 0 for any features."""
    k, between = len(centered), centered.T @ centered / len(centered)
    rank = min(k - 1, np.linalg.matrix_rank(centered))
    lengths = np.abs(np.linalg.eigvalsh(within + between))
    varied = (lengths > 1e-12 * lengths.max()).sum()
    if samples - k <= varied - rank:
        return np.nan
    return 1 - np.trace(np.linalg.pinv(within + between, rcond=1e-12) @ between) / rank


def margin(weight):
    """Each row's distance to the hull of the others, by non-negative least squares with a row of ones for the sum."""
    unit = weight / np.linalg.norm(weight, axis=1, keepdims=True)
    found = []
    for i, row in enumerate(unit):
        rest = np.delete(unit, i, axis=0) - row
        shares = nnls(np.vstack([rest.T, np.ones(len(rest))]), np.append(np.zeros(len(row)), 1.0))[0]
        found.append(np.linalg.norm(shares / shares.sum() @ rest))
    return min(found)


def all_metrics(features, target, weight, bias, ood=None):
    """``ood``, features of no class, are by default every third sample."""
    means, centered, deviations, within, between = moments(features, target)
    ood_mean = np.asarray(features[::3] if ood is None else ood, dtype=np.float64).mean(0)
    k = len(means)
    counts = np.unique(target, return_counts=True)[1]
    owner = np.searchsorted(np.unique(target), target)
    variance = np.bincount(owner, (deviations**2).sum(1)) / counts
    cdnv = [(variance[i] + variance[i + 1 :]) / (2 * ((means[i] - means[i + 1 :]) ** 2).sum(1)) for i in range(k - 1)]
    norms = np.linalg.norm(centered, axis=1)
    cos_weight = (weight * centered).sum(1) / (np.linalg.norm(weight, axis=1) * norms)
    return {
        "nc1": nc1(features, target),
        "nc1_trace": np.trace(within) / np.trace(between),
        "nc1_cdnv": np.concatenate(cdnv).mean(),
        "nc2_etf": frame(means, "etf"),
        "nc2_etf_centered": frame(centered, "etf"),
        "nc2_of": frame(means, "of"),
        "nc2_of_centered": frame(centered, "of"),
        "nc2_equinorm": norms.std() / norms.mean(),
        "nc2_equiangular": cosines(centered).std(),
        "nc2_maxangle": np.abs(cosines(centered) + 1 / (k - 1)).mean(),
        **others(means, centered, within, weight, counts, owner, features),
        "nc2_seli": seli(centered, counts, -0.5),
        "nc2_orthoplex": orthoplex(means),
        "nc2_weight": frame(weight, "etf"),
        "nc2_weight_seli": seli(weight, counts, 0.5),
        "nc3": direction(weight, means),
        "nc3_centered": direction(weight, centered),
        "nc3_gram": frame(weight, "etf", centered),
        "nc3_seli": frame(weight, "etf", centered),
        "nc3_cosine": 1 - cos_weight.mean(),
        "bias_collapse": np.linalg.norm(weight @ means.mean(0) + bias),
        "nc4": nc4(features, target, weight, bias),
        "ncc_error": np.mean(nearest(features, target) != owner),
        "nc1_cdnv_directional": cdnv_directional(features, target),
        "nc5": np.mean([abs(m @ ood_mean) / np.linalg.norm(m) / np.linalg.norm(ood_mean) for m in means]),
    }


def nc1_by_axes(features, target):
    """NC1 through an SVD of the centered means in float64, for means whose directions differ much in size."""
    means, centered, deviations, _, _ = moments(features, target)
    rank = min(len(means) - 1, means.shape[1])
    values, rows = np.linalg.svd(centered, full_matrices=False)[1:]
    kept = values[:rank] > 1e-12 * values[0]
    return float((((deviations @ rows[:rank][kept].T) / values[:rank][kept]) ** 2).sum() / len(deviations))


def nearest(features, target):
    """The class whose mean is nearest, sample by sample."""
    means = moments(features, target)[0]
    return np.array([((row - means) ** 2).sum(1).argmin() for row in np.asarray(features, dtype=np.float64)])


def nc4(features, target, weight, bias):
    decision = [(weight @ row + bias).argmax() for row in np.asarray(features, dtype=np.float64)]
    return float(np.mean(nearest(features, target) != decision))


def cdnv_directional(features, target):
    """Sample by sample: along the unit vectors to the other means, over the squared distances."""
    means, _, deviations, _, _ = moments(features, target)
    classes, owner, counts = np.unique(target, return_inverse=True, return_counts=True)
    total = 0.0
    for own, deviation in zip(owner, deviations, strict=True):
        lines = np.delete(means, own, axis=0) - means[own]
        lengths = np.linalg.norm(lines, axis=1)
        total += ((lines @ deviation / lengths) ** 2 / lengths**2).sum() / counts[own]
    return total / (len(classes) * (len(classes) - 1))
