"""Which geometry it is: SELI and the orthoplex, the nearest of all frames, what chance gives, and a table of the classes."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.linalg import vector_norm

from lightning_nc.functional.frames import frame_distance
from lightning_nc.functional.pairs import Pairs
from lightning_nc.functional.table import METRICS, MetricSpec, compute, evaluate, unit
from lightning_nc.moments import ClassDeviations, ClassMoments, state_dtype

__all__ = [
    "FRAMES_IN_WORDS",
    "GEOMETRY",
    "Geometry",
    "nc2_orthoplex",
    "nc2_seli",
    "nc2_weight_seli",
    "nc3_seli",
    "nearest_frame",
    "per_class",
    "random_directions",
    "worst",
]

FRAMES_IN_WORDS = {
    "nc2_etf_centered": "simplex ETF",
    "nc2_of": "orthogonal frame",
    "nc2_seli": "SELI",
    "nc2_orthoplex": "orthoplex",
}
_PAIRS = 2**20  # pairs of classes that are compared together
_WORK = 1e9  # multiplications of one set of random directions, about a tenth of a second


def nc2_seli(features: Tensor, target: Tensor, num_classes: int | None = None) -> Tensor:
    r"""Distance of the centered class means from SELI, the geometry of simplex-encoded labels of unbalanced classes.

    .. math:: \left\| \frac{MM^\top}{\|MM^\top\|_F} - \frac{T}{\|T\|_F} \right\|_F, \qquad
        T = (A^\dagger)^{1/2}, \quad A = S \operatorname{diag}(N_k) S, \quad S = I - 11^\top / K

    where :math:`N_k` is the number of samples of class k. Free features and weights that minimize cross-entropy have these
    class means as the regularization goes to zero. With equal :math:`N_k` they are a simplex ETF, and the value is that of
    ``nc2_etf_centered``. In [0, √2]; 0 at collapse. SELI has rank K - 1: nan if K > d + 1. The paper compares matrices of all
    N samples; the distance of normalized K x K matrices is a choice. Source: Thrampoulidis et al. (2022), arXiv 2208.05512.
    """
    return compute("nc2_seli", features, target, num_classes)


def _seli(counts: Tensor, inverse: bool) -> Tensor:
    """A^(1/2), or the pseudoinverse of it, of Frobenius norm 1; A = S diag(counts) S, S = I - 11'/K. (K, K)."""
    # Differences within classes of one size are eigenvectors. What remains is a matrix of a row for each size.
    sizes, place, members = counts.double().cpu().unique(return_inverse=True, return_counts=True)
    ones, sizes = members.double().sqrt(), sizes.reciprocal() if inverse else sizes
    scaled = ones * sizes
    if inverse:
        reduced = torch.diag(sizes) - torch.outer(scaled, scaled) / (ones @ scaled)
    else:
        center = torch.eye(len(sizes), dtype=sizes.dtype) - torch.outer(ones, ones) / len(counts)
        reduced = center @ torch.diag(sizes) @ center
    values, vectors = torch.linalg.eigh(reduced)
    values, vectors = values[1:].clamp(min=0), vectors[:, 1:]  # the first is zero, along the vector of ones
    root = (vectors * values.sqrt()) @ vectors.T
    shared = (root - torch.diag(sizes.sqrt())) / torch.outer(ones, ones)
    gram = shared[place][:, place] + torch.diag(sizes.sqrt()[place])
    normalized: Tensor = gram / vector_norm(gram)
    return normalized.to(counts)


def _gram_distance(rows: Tensor, target: Tensor) -> Tensor:
    """Distance of the Gram matrix, of Frobenius norm 1, from the ``target``."""
    rows = rows / vector_norm(rows)
    gram = rows @ rows.T
    distance: Tensor = vector_norm(gram / vector_norm(gram) - target)
    return distance


def nc2_weight_seli(features: Tensor, target: Tensor, weight: Tensor, num_classes: int | None = None) -> Tensor:
    r"""Distance of the rows of ``weight`` (K, d) from SELI: that of :math:`WW^\top` from :math:`A^{1/2}`, see :func:`nc2_seli`.

    Of ``features`` and ``target`` only the number of samples per class is read. If it is equal, the value is that of
    :func:`nc2_weight`. In [0, √2]; 0 at collapse; nan if K > d + 1.
    """
    return compute("nc2_weight_seli", features, target, num_classes, weight)


def nc3_seli(features: Tensor, target: Tensor, weight: Tensor, num_classes: int | None = None) -> Tensor:
    r"""Distance of :math:`WM^\top` from that of SELI, with ``weight`` (K, d): the logits of the class means.

    At SELI it is proportional to :math:`S = I - 11^\top/K` whatever the samples per class, as at a simplex ETF, so the
    value is that of :func:`nc3_gram`. In [0, 2]; 0 at collapse. Source: see :func:`nc2_seli`.
    """
    return compute("nc3_seli", features, target, num_classes, weight)


def nc2_orthoplex(features: Tensor, target: Tensor, num_classes: int | None = None) -> Tensor:
    r"""Distance of the class means from K of the 2d vertices of an orthoplex, for d + 2 <= K <= 2d; nan for any other K.

    The vertices are plus and minus d orthogonal vectors of one length: K - d pairs of opposite ones, and 2d - K single ones.
    The pairs are the class means whose cosines, centered, are most negative, chosen one after the other. With V the class
    means minus the mean of the pairs, T the Gram matrix of the vertices (1 on the diagonal, -1 for a pair, else 0),

    .. math:: \left\| VV^\top / \|VV^\top\|_F - T / \|T\|_F \right\|_F

    In [0, √2]; 0 at an orthoplex of any offset and scale, without gradient through the choice of the pairs. The distance is
    a choice. K vertices with more pairs, so that they span less than d dimensions, are not recognized. Source of the
    geometry: arXiv 2603.20587.
    """
    return compute("nc2_orthoplex", features, target, num_classes)


def _nc2_orthoplex(rows: Tensor) -> Tensor:
    classes, features = rows.shape
    left, right = _opposites((rows - rows.mean(dim=0)).detach(), classes - features)
    rows = rows - torch.cat([rows[left], rows[right]]).mean(dim=0)
    rows = rows / vector_norm(rows)
    gram = rows @ rows.T
    gram = gram / vector_norm(gram)
    one = 1 / math.sqrt(classes + 2 * len(left))
    gram.diagonal().sub_(one)
    gram[torch.cat([left, right]), torch.cat([right, left])] += one
    distance: Tensor = vector_norm(gram)
    return distance


def _opposites(rows: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """So many pairs of rows without a row in common, the most negative cosine first."""
    lengths = vector_norm(rows, dim=1, keepdim=True)
    # A class mean at the mean of all has no direction but that of rounding, and so no opposite.
    rows = torch.where(lengths > 1e-6 * lengths.amax(), rows / lengths, torch.zeros_like(rows))
    cosines, index = rows @ rows.T, torch.arange(len(rows), device=rows.device)
    cosines.fill_diagonal_(math.inf)
    found = []
    for _ in range(len(rows) // 2):
        # Two rows that have each other as the most negative one are a pair whichever cosine comes first.
        least, other = cosines.min(dim=1)
        mutual = (other[other] == index) & (index < other) & least.isfinite()
        left = mutual.nonzero().flatten() if mutual.any() else least.argmin().view(1)
        pair = torch.stack([left, other[left]])
        found.append((least[left], pair))
        cosines[pair.flatten()] = math.inf
        cosines[:, pair.flatten()] = math.inf
        if cosines.amin().isposinf():
            break
    first = torch.cat([cosine for cosine, _ in found]).argsort()[:count]
    left, right = torch.cat([pair for _, pair in found], dim=1)[:, first]
    return left, right


@dataclass(frozen=True)
class Geometry:
    """How far the class means are from each frame that exists for their number and their samples, and the nearest frame.

    Args:
        distances: by the name of the metric: ``nc2_etf_centered`` for the simplex ETF (K <= d + 1), ``nc2_of`` for the
            orthogonal frame (K <= d), ``nc2_seli`` for SELI (K <= d + 1 and classes of unequal size), ``nc2_orthoplex`` for the
            orthoplex (d + 2 <= K <= 2d). Empty for more classes, and without two classes or finite features.
        chance: the same distances, on average, of class means of the same lengths in random directions.
        nearest: the name of the nearest frame, None if no frame is nearer than chance explains.
        num_classes, num_features: K, the classes that have a sample, and d.
    """

    distances: dict[str, float]
    chance: dict[str, float]
    nearest: str | None
    num_classes: int
    num_features: int

    @property
    def words(self) -> str:
        """One sentence."""
        if not self.distances:
            size = f"{self.num_classes} class{'es' * (self.num_classes != 1)} in {self.num_features} dimensions"
            if self.num_classes > 2 * self.num_features:
                return f"no frame exists for {size}; what is expected is a softmax code"
            return f"no frame was compared: two classes with samples, and finite features, are needed; got {size}"
        if self.nearest is not None:
            return f"nearest frame: {self._distance(self.nearest, 'distance ')}"
        return f"no frame is near: {', '.join(map(self._distance, self.distances))}"

    def __str__(self) -> str:
        return self.words

    def _distance(self, name: str, word: str = "") -> str:
        distance, chance = self.distances[name], self.chance[name]
        return f"{FRAMES_IN_WORDS[name]} ({word}{distance:.2g}; random directions: {chance:.2g})"


def nearest_frame(moments: ClassMoments | ClassDeviations) -> Geometry:
    """The distance of the class means to every frame that exists for K, d and the samples per class, and the nearest frame.

    A frame is near if its distance is smaller than that of every one of up to 100 sets of random directions (by 5 % than
    their mean), each with the lengths of the class means. Of those that are near, the nearest has the smallest distance, but:

    * An orthogonal frame is an exact simplex ETF once centered. It is the nearest if the mean of the class means is as long
      as its own, within a factor of sqrt(2), and the uncentered class means are not much farther from it than the centered
      ones from the ETF.
    * SELI and the ETF are alike where the classes are nearly of one size. SELI must be nearer by a tenth.

    The metrics themselves take the class means as they are; the choice between frames is ours. Above about a billion
    multiplications, random directions are drawn for fewer classes and dimensions in the same ratio.
    """
    moments = moments.select(moments.counts > 0)
    classes, features = moments.means.shape
    if classes < 2 or moments.fault():
        return Geometry({}, {}, None, classes, features)
    means, counts = moments.means.detach(), moments.counts
    exist = {
        "nc2_etf_centered": _has_simplex(classes, features),
        "nc2_of": classes <= features,
        "nc2_seli": _has_simplex(classes, features) and bool(counts.min() < counts.max()),
        "nc2_orthoplex": _has_orthoplex(classes, features),
    }
    names = [name for name, exists in exist.items() if exists]
    distances = {name: float(distance(means)) for name, distance in _frames(names, counts).items()}
    draws = _draws(names, means, counts)
    chance = {name: math.fsum(values) / len(values) for name, values in draws.items()}
    near = {
        name: value
        for name, value in distances.items()
        if value < min(draws[name]) and value + 1e-6 < 0.95 * chance[name]  # two centered means are always an ETF
    }
    if "nc2_of" in near and not _is_orthogonal(means, distances):
        del near["nc2_of"]
    if near.keys() >= {"nc2_seli", "nc2_etf_centered"} and near["nc2_seli"] > 0.9 * near["nc2_etf_centered"]:
        del near["nc2_seli"]
    nearest = "nc2_of" if "nc2_of" in near else min(near, key=lambda name: near[name], default=None)
    return Geometry(distances, chance, nearest, classes, features)


def _is_orthogonal(means: Tensor, distances: dict[str, float]) -> bool:
    """Whether class means that are near to an orthogonal frame are one, or a simplex ETF with an offset."""
    classes, offset = len(means), means.mean(dim=0)
    ratio = classes * (classes - 1) * offset.square().sum() / (means - offset).square().sum()
    between = math.sqrt(2 - 2 * math.sqrt((classes - 1) / classes))  # the distance from one frame to the other
    return bool(0.5 < ratio < 2) and distances["nc2_of"] <= 1.5 * distances["nc2_etf_centered"] + 0.1 * between


def _frames(names: Sequence[str], counts: Tensor) -> dict[str, Callable[[Tensor], Tensor]]:
    """The distances of class means with these ``names``, each a function of the class means."""
    seli = _seli(counts, inverse=True) if "nc2_seli" in names else counts
    formulas = {
        "nc2_etf_centered": lambda rows: frame_distance(rows - rows.mean(dim=0), "etf"),
        "nc2_of": lambda rows: frame_distance(rows, "of"),
        "nc2_seli": lambda rows: _gram_distance(rows - rows.mean(dim=0), seli),
        "nc2_orthoplex": _nc2_orthoplex,
    }
    return {name: formulas[name] for name in names}


def _draws(names: Sequence[str], means: Tensor, counts: Tensor) -> dict[str, list[float]]:
    """The distances of random directions, in which the class means keep their lengths: if these differ, as with classes of
    unequal size, chance is farther from some frames and nearer to others.
    """
    generator = torch.Generator().manual_seed(0)
    (classes, features), work = means.shape, means.numel() * (len(means) + 50)
    share = min(1.0, (_WORK / work) ** (1 / 3))
    width = math.ceil(features * share)
    kept = torch.randperm(classes, generator=generator)
    kept = kept[: max(2, int(classes * share), width + 2 if classes > features + 1 else 0)]
    lengths = {name: vector_norm(means if name == "nc2_of" else means - means.mean(dim=0), dim=1) for name in names}
    lengths = {name: length.double().cpu()[kept].unsqueeze(1) for name, length in lengths.items()}
    formulas = _frames(names, counts.double().cpu()[kept])
    draws: dict[str, list[float]] = {name: [] for name in names}
    for _ in range(int(min(100, max(2, 4 * _WORK / (work * share**3))))):
        directions = unit(torch.randn(len(kept), width, dtype=torch.float64, generator=generator))
        for name in names:
            draws[name].append(float(formulas[name](lengths[name] * directions)))
    return draws


def random_directions(
    names: Sequence[str],
    num_classes: int,
    num_features: int,
    seed: int = 0,
    counts: Tensor | None = None,
    pairs: float | None = None,
) -> dict[str, float]:
    """What chance gives: the named metrics of Gaussian class means and an independent Gaussian weight.

    The mean of eight draws, or of fewer if they are large. Only the metrics that read nothing but the class means, the
    weight and the samples per class: the others are left out.

    Args:
        names: of :data:`METRICS`.
        num_classes: K.
        num_features: d.
        seed: of the draws; no other random stream moves.
        counts: samples per class, (K,), for the metrics that read them; equal by default.
        pairs: number of pairs of classes to sample, see :func:`nc1_cdnv`.
    """
    specs = {name: METRICS[name] for name in names}
    known = [
        name
        for name, spec in specs.items()
        if not (spec.within or spec.scatter or spec.samples or {"bias", "ood"} & {*spec.needs})
    ]
    generator = torch.Generator().manual_seed(seed)
    empty = ClassMoments.zeros(num_classes, num_features, "cpu", scatter=False)
    counts = torch.ones_like(empty.counts) if counts is None else counts.to(empty.counts)
    rounds = int(min(8, max(1, _WORK / (num_classes * num_features * (num_classes + 50)))))
    drawn: dict[str, list[float]] = {name: [] for name in known}
    for _ in range(rounds):
        means, weight = torch.randn(2, num_classes, num_features, generator=generator, dtype=state_dtype("cpu"))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # they would be about the random directions
            values = evaluate(known, replace(empty, counts=counts, means=means), weight, pairs=pairs)
        for name in known:
            drawn[name].append(float(values[name]))
    return {name: math.fsum(values) / rounds for name, values in drawn.items()}


def per_class(moments: ClassMoments | ClassDeviations, weight: Tensor | None = None) -> dict[str, list[Any]]:
    r"""A table of the classes that have a sample, as a dict of columns: ``pandas.DataFrame(per_class(moments))``.

    =================== ========================================================================================
    ``class``           class index
    ``samples``         :math:`N_k`
    ``nc1_trace_share`` share of :math:`\operatorname{tr} \Sigma_W`, and so of ``nc1_trace``, not of ``nc1``; sums to 1
    ``mean_norm``       norm of the centered class mean :math:`m_k`
    ``weight_cosine``   :math:`\cos(w_k, m_k)`; left out without ``weight``
    ``nearest``         the class j whose mean is nearest; None if there is no other
    ``nearest_cdnv``    :math:`(s_k^2 + s_j^2) / (2 \|\mu_k - \mu_j\|^2)`, the term of :func:`nc1_cdnv` of this pair
    =================== ========================================================================================

    What is not defined is nan, which with features that are not finite is everything but the first two columns, and with one
    sample in every class ``nearest_cdnv``. All pairs of classes are compared, in blocks of rows.

    Args:
        moments: the statistics; the scatter matrix is not read.
        weight: that of the classifier, (K, d), with a row for each class, seen or not.
    """
    seen = moments.counts > 0
    classes, moments = seen.nonzero().flatten(), moments.select(seen)
    centered, spread = (moments.means - moments.means.mean(dim=0)).detach(), moments.spread.detach()
    norms, variance = vector_norm(centered, dim=1), spread / moments.counts
    columns = {"nc1_trace_share": spread / spread.sum(), "mean_norm": norms}
    if weight is not None:
        weight = weight[seen].to(centered)
        columns["weight_cosine"] = torch.linalg.vecdot(weight, centered) / vector_norm(weight, dim=1) / norms
    nearest: list[int | None] = [None] * len(classes)
    columns["nearest_cdnv"] = torch.full_like(norms, math.nan)
    if len(classes) and moments.fault():
        columns = {name: torch.full_like(norms, math.nan) for name in columns}
    elif len(classes) > 1:
        other, squares = _nearest(centered)
        nearest = classes[other].tolist()
        if moments.varies():
            columns["nearest_cdnv"] = (variance + variance[other]) / (2 * squares)
    cdnv = columns.pop("nearest_cdnv").tolist()
    shown = {name: column.tolist() for name, column in columns.items()}
    samples = moments.counts.long().tolist()
    return {"class": classes.tolist(), "samples": samples, **shown, "nearest": nearest, "nearest_cdnv": cdnv}


def _nearest(rows: Tensor) -> tuple[Tensor, Tensor]:
    """The other row that is nearest to each of two or more rows, (K,), and the squared distance to it, (K,)."""
    size = max(1, _PAIRS // len(rows))
    least, other = rows.new_empty(len(rows)), torch.empty(len(rows), dtype=torch.long, device=rows.device)
    for start in range(0, len(rows), size):
        block = slice(start, min(start + size, len(rows)))
        # Another slice than the block, even if it is the same rows: each of the block with every row.
        squares = Pairs(block, slice(None)).squared_distances(rows).view(-1, len(rows))
        squares.diagonal(start).fill_(math.inf)
        torch.min(
            squares, dim=1, out=(least[block], other[block])
        )  # small tensors of its own would fragment the memory
    return other, least


def worst(table: Mapping[str, Sequence[Any]], count: int = 10) -> str:
    """The classes of :func:`per_class` with the largest ``nearest_cdnv`` as text in columns, the largest first.

    Example:
        >>> import torch
        >>> from lightning_nc.moments import ClassDeviations
        >>> features = torch.tensor([[0.0], [1.0], [4.0], [6.0], [20.0], [20.0]])
        >>> moments = ClassDeviations.of(features, torch.tensor([0, 0, 1, 1, 2, 2]), num_classes=3)
        >>> print(worst(per_class(moments), count=2))
        class  samples  nc1_trace_share  mean_norm  nearest  nearest_cdnv
            0        2              0.2          8        1       0.03086
            1        2              0.8        3.5        0       0.03086
    """
    rows = [row for row in zip(*table.values(), strict=True) if not math.isnan(row[-1])]
    rows = sorted(rows, key=lambda row: -row[-1])[:count]
    cells = [
        list(table),
        *([f"{value:.4g}" if isinstance(value, float) else str(value) for value in row] for row in rows),
    ]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return "\n".join("  ".join(map(str.rjust, line, widths)) for line in cells)


def _has_simplex(classes: int, features: int) -> bool:
    return classes <= features + 1


def _has_orthoplex(classes: int, features: int) -> bool:
    return features + 2 <= classes <= 2 * features


GEOMETRY = {
    "nc2_seli": MetricSpec(
        lambda s: _gram_distance(s.centered, _seli(s.moments.counts, inverse=True)),
        "NC2, centered means to SELI",
        exists=_has_simplex,
    ),
    "nc2_weight_seli": MetricSpec(
        lambda s: _gram_distance(s.weight, _seli(s.moments.counts, inverse=False)),
        "NC2, weight to SELI",
        ("weight",),
        exists=_has_simplex,
    ),
    "nc3_seli": MetricSpec(
        lambda s: frame_distance(s.weight, "etf", s.centered), "NC3, weight times means to SELI", ("weight",), etf=True
    ),
    "nc2_orthoplex": MetricSpec(
        lambda s: _nc2_orthoplex(s.means), "NC2, class means to orthoplex", opt_in=True, exists=_has_orthoplex
    ),
}
