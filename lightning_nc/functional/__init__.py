r"""The metrics of neural collapse, as differentiable functions of features and labels.

Notation: K classes, N samples, d features; :math:`\mu_k` is the mean of class k, :math:`\mu_G` the mean of the class means
(not of the samples: the two differ when classes are unbalanced), H the K x d matrix of class means,
:math:`M = H - \mu_G` the centered means, W the K x d weight of the classifier, :math:`\Sigma_W` and :math:`\Sigma_B` the
within-class and between-class covariance, and :math:`E = (I - 11^\top / K) / \sqrt{K - 1}` the Gram matrix of a simplex
equiangular tight frame (ETF), of unit Frobenius norm.

Shared by all functions of features and labels:

* ``features`` is (N, d) and floating, ``target`` (N,) and integer; ``num_classes`` defaults to the number of rows of
  ``weight`` if there is one, and to the highest label plus one otherwise.
* The result is a tensor of shape (), without unit, in float64 (float32 on a device that has no float64).
* A class without a sample is left out, with a warning: K is then the number of classes seen, and the rows of W of the
  other classes are left out too. With fewer than two classes the result is nan.
* A non-finite feature gives nan, with a warning that says how many samples have one. So does a weight or bias that is not
  finite, and a scale of the features whose squares leave the floating range.
* ``ValueError`` for shapes that do not fit, labels that are not integers or lie outside [0, K).
"""

from __future__ import annotations

from lightning_nc.functional.alignment import ALIGNMENT, bias_collapse, nc3, nc3_cosine, nc3_gram, nc3_uniform
from lightning_nc.functional.angles import (
    ANGLES,
    ENERGY,
    gnc2_log,
    gnc2_log_spread,
    gnc2_riesz,
    nc2_equiangular,
    nc2_equinorm,
    nc2_maxangle,
)
from lightning_nc.functional.frames import FRAMES, nc2, nc2_weight
from lightning_nc.functional.geometry import GEOMETRY, nc2_orthoplex, nc2_seli, nc2_weight_seli, nc3_seli
from lightning_nc.functional.regression import nrc1, nrc2, nrc3
from lightning_nc.functional.samples import (
    SAMPLES,
    SCATTER_OF_SAMPLES,
    effective_depth,
    nc1_cdnv_directional,
    nc4,
    nc5,
    ncc_error,
)
from lightning_nc.functional.spectrum import (
    RANKS,
    numerical_rank,
    numerical_rank_features,
    stable_rank,
    stable_rank_features,
)
from lightning_nc.functional.table import METRICS, MetricSpec
from lightning_nc.functional.variability import VARIABILITY, nc1, nc1_cdnv, nc1_trace, nc1_vci
from lightning_nc.functional.weights import (
    WEIGHTS,
    gnc2_margin,
    minority_cosine,
    nc0,
    nc2_weight_equiangular,
    nc2_weight_equinorm,
    nc2_weight_maxangle,
)

__all__ = [
    "METRICS",
    "MetricSpec",
    "bias_collapse",
    "effective_depth",
    "gnc2_log",
    "gnc2_log_spread",
    "gnc2_margin",
    "gnc2_riesz",
    "minority_cosine",
    "nc0",
    "nc1",
    "nc1_cdnv",
    "nc1_cdnv_directional",
    "nc1_trace",
    "nc1_vci",
    "nc2",
    "nc2_equiangular",
    "nc2_equinorm",
    "nc2_maxangle",
    "nc2_orthoplex",
    "nc2_seli",
    "nc2_weight",
    "nc2_weight_equiangular",
    "nc2_weight_equinorm",
    "nc2_weight_maxangle",
    "nc2_weight_seli",
    "nc3",
    "nc3_cosine",
    "nc3_gram",
    "nc3_seli",
    "nc3_uniform",
    "nc4",
    "nc5",
    "ncc_error",
    "nrc1",
    "nrc2",
    "nrc3",
    "numerical_rank",
    "numerical_rank_features",
    "stable_rank",
    "stable_rank_features",
]

_FAMILIES = {
    "NC1, within-class variability": VARIABILITY | SCATTER_OF_SAMPLES,
    "NC2, class means to frame": FRAMES | {name: row for name, row in GEOMETRY.items() if not row.needs},
    "NC2, lengths and angles": ANGLES,
    "NC2, energy": ENERGY,
    "weight of the classifier": WEIGHTS | {name: row for name, row in GEOMETRY.items() if name == "nc2_weight_seli"},
    "NC3, weight to class means": ALIGNMENT | {"nc3_seli": GEOMETRY["nc3_seli"]},
    "NC4, NC5, nearest class mean": SAMPLES,
    "ranks": RANKS,
}
METRICS |= {name: row._replace(family=family) for family, rows in _FAMILIES.items() for name, row in rows.items()}
