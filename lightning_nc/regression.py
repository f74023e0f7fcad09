"""Neural collapse of regression as a torchmetrics class."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import torch
from torch import Tensor

from lightning_nc.functional.regression import REGRESSION, evaluate_regression
from lightning_nc.mergeable import MergeableMetric, Reference, Weight, check_size
from lightning_nc.regression_moments import RegressionMoments, check_regression

__all__ = ["NeuralRegressionCollapse"]


class NeuralRegressionCollapse(MergeableMetric):
    """NRC1, NRC2 and NRC3 of regression from one pass over the features.

    Input of ``update``: ``features``, (B, d) floating, and ``targets``, (B, n) real, or (B,) for one target. ``compute``
    returns a dict of tensors of shape (), without unit, in float64 (float32 on a device without it): ``nrc1``,
    :func:`lightning_nc.functional.nrc1`, and likewise ``nrc2`` and ``nrc3`` if there is a weight. All are 0 at collapse. The
    state takes 16 bytes for each pair of features, whatever the number of samples, and keeps its own precision under
    ``.to(dtype)``. Values carry no gradient: use :mod:`lightning_nc.functional` for a loss term.

    What means nothing is nan, with a warning that says why: ``nrc3`` of one target, ``nrc1`` and ``nrc2`` of features that are
    no more than the targets, samples with an infinity or a nan.

    Args:
        num_targets: n, at least 1.
        num_features: d, at least 1.
        weight: the weight of the last layer, (n, d): the layer itself, a tensor, or a callable; see :class:`NeuralCollapse`.
        kwargs: see :class:`torchmetrics.Metric`.

    Raises:
        ValueError: for sizes or shapes that do not fit.

    Source: Andriopoulos et al. (arXiv 2409.04180).

    Example:
        >>> import torch
        >>> from lightning_nc import NeuralRegressionCollapse
        >>> weight = torch.tensor([[1.0, 0, 0], [0, 2, 0]])
        >>> metric = NeuralRegressionCollapse(num_targets=2, num_features=3, weight=weight)
        >>> metric.update(torch.tensor([[1.0, 0, 0], [-1, 0, 0]]), torch.tensor([[1.0, 0], [-1, 0]]))
        >>> metric.update(torch.tensor([[0, 2.0, 0], [0, -2, 0]]), torch.tensor([[0, 4.0], [0, -4]]))
        >>> {name: float(value) for name, value in metric.compute().items()}
        {'nrc1': 0.0, 'nrc2': 0.0, 'nrc3': 0.0}
    """

    def __init__(self, num_targets: int, num_features: int, weight: Weight | None = None, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        check_size("num_targets", num_targets, 1)
        check_size("num_features", num_features, 1)
        self.num_targets, self.num_features = num_targets, num_features
        self._weight = Reference("weight", weight, (num_targets, num_features))
        self.add_statistics(RegressionMoments.zeros(num_targets, num_features))

    def update(self, features: Tensor, targets: Tensor) -> None:
        """Add a batch: ``features`` (B, d), ``targets`` (B, n), or (B,) for one target."""
        self._check_own("update")
        targets = check_regression(features, targets, self.num_features, self.num_targets)
        with torch.inference_mode(False), torch.no_grad():
            self.moments().merge(RegressionMoments.of(features, targets))

    def compute(self) -> dict[str, Tensor]:
        """The metrics by name, each a tensor of shape ()."""
        names = [name for name in REGRESSION if name == "nrc1" or self._weight.given]
        with torch.no_grad():
            return evaluate_regression(names, self.moments(), self._weight.read())

    def moments(self) -> RegressionMoments:
        """A view of the state."""
        return self._view(RegressionMoments)

    def _merge(self, group: Any) -> None:
        self.moments().merge_over_ranks(group)

    def _reduce_states(self, incoming_state: dict[str, Any]) -> None:
        names = [field.name for field in fields(RegressionMoments)]
        self.moments().merge(RegressionMoments(**{name: incoming_state[name] for name in names}))
