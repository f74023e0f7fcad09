"""What the metrics of some features must be, in float64, and how far a value may lie from that.

The features that a case hands over are those of the same layers, weights, samples and batches, so they are the same to the last
bit in every precision. What is left is float64 arithmetic: 1e-16 for each of some thousand operations, more where a formula
divides by a small separation. bfloat16 features therefore need no larger tolerance. They only make ties and class means that
coincide more frequent, and these are told apart below by what the documentation says of them.
"""

import numpy as np
import reference
import torch

from lightning_nc.functional import METRICS

ROUNDING = 1e-8  # relative; some 1e7 operations in float64
ALONG = ("nc1", "nc1_vci")  # divide by the separation along each direction of the class means


def digits(features):
    """The unit roundoff that holds every feature, and how much sums in earlier layers add to it, as docs/metrics.md says."""
    for dtype, spread in ((torch.bfloat16, 4), (torch.float16, 4), (torch.float32, 8)):
        kept = {torch.bfloat16: 8, torch.float16: 11, torch.float32: 24}[dtype]
        mantissa = np.frexp(features)[0] * 2.0**kept
        if np.array_equal(mantissa, np.round(mantissa)):
            return torch.finfo(dtype).eps, spread
    return np.finfo(np.float64).eps, 8


def separations(features, target, means=None):
    """The directions of the class means with their singular values, and for each by how much it exceeds what rounding can cause.

    A ratio above 1 counts by the first or the second condition of "What rounding can cause".
    """
    own, _, deviations, _, _ = reference.moments(features, target)
    means = own if means is None else means
    deviations = deviations + (own - means)[np.searchsorted(np.unique(target), target)]
    eps, spread = digits(features)
    error = eps * np.sqrt((features**2).mean(0)) / np.sqrt(12)
    counts = np.unique(target, return_counts=True)[1]
    factor = 1.5 + spread / np.sqrt(counts)
    bound = factor.max() * np.linalg.norm(error) + np.linalg.norm(factor) * error.max()
    rank = min(len(means) - 1, means.shape[1])
    values, rows = (part[:rank] for part in np.linalg.svd(means - means.mean(0), full_matrices=False)[1:])
    within = ((deviations @ rows.T) ** 2).mean(0)
    noise = spread**2 * ((error**2).mean() + rows**2 @ error**2)
    varied = np.where(values > 1e-14 * values[0], within / np.maximum(noise, 1e-300), 0)
    return rows, values, np.maximum(values / max(bound, 1e-300), varied), deviations


def nc1(features, target, means=None):
    """NC1, its relative tolerance, and whether the documentation leaves no doubt about which directions count."""
    rows, values, ratio, deviations = separations(features, target, means)
    kept = ratio > 1
    clear = bool(np.all((ratio > 2) | (ratio < 0.5)))
    if not kept.any():
        return np.nan, 0.0, clear
    value = (((deviations @ rows[kept].T) / values[kept]) ** 2).sum() / len(deviations)
    size = (features**2).sum(1).mean()
    # The scatter matrix is rounded relative to its largest entries; see "The floor".
    floor = 1e-13 * len(features) * size / values[kept].min() ** 2
    return value, ROUNDING + floor / max(value, 1e-300), clear


def ties(features, means, weight=None, bias=None):
    """The share of the samples whose nearest class mean, or largest logit, is so by no more than rounding."""
    square = ((features[:, None] - means) ** 2).sum(2)
    close = _is_close(np.sort(square, axis=1)[:, :2], (features**2).sum(1) + (means**2).sum(1).max())
    if weight is not None:
        logits = features @ weight.T + bias
        close |= _is_close(
            np.sort(-logits, axis=1)[:, :2], np.abs(features) @ np.abs(weight).max(0) + np.abs(bias).max()
        )
    return close.mean()


def _is_close(pair, size):
    return pair[:, 1] - pair[:, 0] <= 1e-11 * size if pair.shape[1] > 1 else np.zeros(len(pair), dtype=bool)


def expected(features, target, weight, bias):
    """By name: the value, the relative and the absolute tolerance. What has no clear value is left out."""
    features = features.double().numpy()
    target = target.numpy()
    seen = np.unique(target)
    if len(seen) < 2:
        return {}
    weight, bias = (part[seen] if part is not None else None for part in (weight, bias))
    means, centered, _, within, _ = reference.moments(features, target)
    if np.linalg.norm(centered, axis=1).min() <= 1e-6 * np.linalg.norm(means):
        return {}  # class means that coincide but for rounding: most of the metrics have no value
    stand_in = np.ones_like(means) if weight is None else weight  # of a layer, whose own metrics need none
    with np.errstate(all="ignore"):
        found = reference.all_metrics(features, target, stand_in, np.zeros(len(means)) if bias is None else bias)
    values = {name: (value, ROUNDING, 1e-9) for name, value in found.items() if name != "nc5"}
    if weight is None:
        values = {name: entry for name, entry in values.items() if not METRICS[name].needs}
    value, relative, clear = nc1(features, target)
    values["nc1"] = value, relative, 1e-13
    ratio = separations(features, target)[2]
    smallest = np.linalg.eigvalsh(within)[0] * len(features)
    eps, spread = digits(features)
    if smallest < 1e3 * len(features) * spread**2 * eps**2 * (features**2).mean(0).max() or ratio.min() < 2:
        values.pop("nc1_vci")  # samples vary in some direction by rounding alone: what that explains is not defined
    if not clear:
        values.pop("nc1")
    if "nc4" in values:
        values["nc4"] = found["nc4"], 0, 1e-12 + ties(features, means, weight, bias)
    values["ncc_error"] = found["ncc_error"], 0, 1e-12 + ties(features, means)
    distances = np.linalg.norm(means[:, None] - means, axis=2) + 1e300 * np.eye(len(means))
    if distances.min() <= 1e-6 * np.linalg.norm(means):
        for name in ("nc1_cdnv", "nc1_cdnv_directional", "gnc2_log", "gnc2_log_spread", "gnc2_riesz"):
            values.pop(name, None)
    for name in ("numerical_rank", "numerical_rank_features"):
        values.update({name: (found[name], 0, 0)} if _is_clear_rank(name, features, centered) else {})
    if len(seen) == len(target):  # every class has one sample
        values = {name: (np.nan, 0, 0) if METRICS[name].within else entry for name, entry in values.items()}
    return values


def _is_clear_rank(name, features, centered):
    if name == "numerical_rank":
        shares = np.linalg.svd(centered, compute_uv=False) ** 2
    else:
        shares = np.linalg.eigvalsh(np.cov(features.T, ddof=0).reshape(features.shape[1], -1))
    return not np.any(np.abs(shares / shares.max() / 1e-3 - 1) < 1e-6)


def around(features, target, centers, weight=None, bias=None):
    """The metrics of held-out samples around class means of the training data, (K, d) with rows of nan, as :func:`expected`."""
    features, target = features.double().numpy(), target.numpy()
    known = np.isfinite(centers).all(1)
    seen = np.unique(target)
    if len(seen) < 2 or not known[seen].all():
        return {}
    means = centers[seen]
    owner = np.searchsorted(seen, target)
    deviations = features - means[owner]
    centered = means - means.mean(0)
    counts = np.bincount(owner)
    variance = np.bincount(owner, (deviations**2).sum(1)) / counts
    squares = ((means[:, None] - means) ** 2).sum(2)
    if squares[~np.eye(len(means), dtype=bool)].min() <= 1e-12 * (means**2).sum():
        return {}
    pairs = np.triu_indices(len(means), 1)
    cdnv = (variance[pairs[0]] + variance[pairs[1]]) / (2 * squares[pairs])
    trace = (deviations**2).sum() / len(features) / ((centered**2).sum() / len(means))
    found = {"nc1_trace_train_means": trace, "nc1_cdnv_train_means": cdnv.mean()}
    values = {name: (value, ROUNDING, 1e-9) for name, value in found.items()}
    value, relative, clear = nc1(features, target, means)
    values |= {"nc1_train_means": (value, relative, 1e-13)} if clear else {}
    everyone = np.where(known)[0]
    nearest = everyone[((features[:, None] - centers[known]) ** 2).sum(2).argmin(1)]
    values["ncc_error"] = (nearest != target).mean(), 0, 1e-12 + ties(features, centers[known])
    if weight is not None:
        decision = everyone[(features @ weight[known].T + bias[known]).argmax(1)]
        close = ties(features, centers[known], weight[known], bias[known])
        values["nc4"] = (nearest != decision).mean(), 0, 1e-12 + close
    return values


def differences(row, expected_values):
    """The names whose value in ``row`` is not the expected one, with both."""
    found = {}
    for name, (value, relative, absolute) in expected_values.items():
        own = row.get(name)
        if own is None or not (np.isfinite(own) or np.isfinite(value)):
            continue
        if not np.isfinite(value) or not abs(own - value) <= absolute + relative * abs(value):
            found[name] = own, float(value), absolute + relative * abs(value)
    return found
